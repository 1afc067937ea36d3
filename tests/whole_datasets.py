"""Rows of a dataset read and tokenised one after the other, as the stages of loading do in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.data.examples.left_out_rows import Untrained, report_rows
from trl_ray.data.examples.supervised_texts import (
    SupervisedRecord,
    SupervisedRules,
    SupervisedSample,
    read_supervised,
    write_supervised,
)
from trl_ray.data.examples.tokenisation import ExampleTokenizer, encode
from trl_ray.data.formats.detection import DatasetType
from trl_ray.data.formats.record_reader import ALL_TYPES, reader_for
from trl_ray.data.formats.records import Record
from trl_ray.data.formats.transcripts import TextFormat
from trl_ray.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SupervisedData:
    """All examples of a data set of which something is trained, and what became of the others."""

    name: str
    samples: tuple[SupervisedSample, ...]
    untrained: Mapping[int, Untrained]
    """Why, by row number."""

    def report(self) -> tuple[str, ...]:
        """One sentence for each thing a user should know about the rows; none when all is well."""
        return report_rows(
            self.name,
            total=len(self.samples) + len(self.untrained),
            untrained=self.untrained,
            cut=[sample.row for sample in self.samples if sample.cut_tokens],
            diverging=[sample.row for sample in self.samples if sample.prompt_diverges],
        )


def tokenize_records(
    records: Iterable[SupervisedRecord], tokenizer: ExampleTokenizer, rules: SupervisedRules, *, name: str
) -> SupervisedData:
    """Tokenise every record; rows with nothing to train are left out and listed.

    Raises:
        DataError, ModelError: see `write_supervised`.
    """
    samples, untrained = [], {}
    for row, record in enumerate(records):
        found = tokenize_record(record, tokenizer, rules, row=row, name=name)
        if isinstance(found, Untrained):
            untrained[row] = found
        else:
            samples.append(found)
    return SupervisedData(name=name, samples=tuple(samples), untrained=untrained)


def tokenize_record(
    record: SupervisedRecord, tokenizer: ExampleTokenizer, rules: SupervisedRules, *, row: int, name: str
) -> SupervisedSample | Untrained:
    """One record as tokens and targets, or why there is nothing to train in it; a pure function of its arguments.

    Raises:
        DataError, ModelError: see `write_supervised`.
    """
    texts = write_supervised(record, tokenizer, rules, where=f"row {row} of {name}")
    return read_supervised(record, encode(tokenizer, texts, masks=rules.assistant_only_loss), rules, row=row)


def read_records(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str,
    columns: Collection[str] | None = None,
    accept: Collection[DatasetType] = ALL_TYPES,
    text_format: TextFormat | None = None,
    text_field: str = "text",
) -> Iterator[Record]:
    """One record per row, lazily; see `reader_for`.

    Raises:
        DataError: there is no row at all, or one that is not what it must be.
    """
    reader = None
    for number, row in enumerate(rows):
        if reader is None:
            reader = reader_for(
                row, name=name, columns=columns, accept=accept, text_format=text_format, text_field=text_field
            )
        yield reader.read(number, row)
    if reader is None:
        raise DataError(f"A dataset must have at least one row, {name} has none. Check the file or the split.")
