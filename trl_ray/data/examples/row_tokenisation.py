"""From rows to the table of their tokens: in this process, or on several and kept on disk.

    places ─ a batch ─► rows ─ read ─► records ─ write ─► texts ─ encode ─► tokens ─ read ─► RowTokens ─► Arrow

What is wrong with a row is written down like everything else about it, so that it makes no difference which process
saw it, and when.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from trl_ray.data.examples.example_tasks import ExampleDraft, Making, TakesTokens
from trl_ray.data.examples.given_tokens import GivenTokens
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.placed_records import PlacedRecord, RowReader, unread_speech
from trl_ray.data.examples.token_table import REASONS, SCHEMA, RowState, RowTokens, as_table
from trl_ray.data.examples.tokenisation import Encoded, ExampleTokenizer, Text, encode
from trl_ray.data.formats.records import first_said
from trl_ray.data.sources.dataset_loading import Origin
from trl_ray.errors import DataError, ModelError

BATCH_ROWS = 1000
"""Rows that are tokenised in one call."""
Rows = Sequence[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A row whose texts wait to be tokenised."""

    placed: PlacedRecord
    texts: tuple[Text, ...]
    unread: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTokeniser:
    """Makes the table of rows; a function of the rows, and of what it is made of."""

    making: Making
    tokenizer: ExampleTokenizer
    readers: Mapping[str, RowReader]
    """By the names of their datasets."""
    origin: Callable[[int], Origin]
    """Where the row at a place came from."""

    def table(self, rows: Rows, places: Sequence[int]) -> pa.Table:
        """The rows at some places, a line each, in batches.

        Raises:
            ModelError: the tokenizer cannot tell what the options ask it for.
        """
        batches = [self.batch(rows, places[i : i + BATCH_ROWS]) for i in range(0, len(places), BATCH_ROWS)]
        return pa.concat_tables(batches) if batches else SCHEMA.empty_table()

    def batch(self, rows: Rows, places: Sequence[int]) -> pa.Table:
        """The same at once."""
        lines = [self._write(rows, place) for place in places]
        written = [line for line in lines if isinstance(line, _Written)]
        texts = [text for line in written for text in line.texts]
        tokens = iter(encode(self.tokenizer, texts, masks=self.making.masks))
        read = iter([self._read(line, tuple(itertools.islice(tokens, len(line.texts)))) for line in written])
        return as_table([next(read) if isinstance(line, _Written) else line for line in lines])

    def _write(self, rows: Rows, place: int) -> _Written | RowTokens:
        try:
            row = rows[place]
        except DataError as error:
            return RowTokens(state=RowState.BROKEN, problem=str(error))
        unread = 0
        try:
            origin = self.origin(place)
            record = self.readers[origin.name].read(origin.number, row)
            placed = PlacedRecord(row=place, origin=origin, record=record)
            unread = unread_speech(record)
            texts = () if isinstance(record, GivenTokens) else self.making.write(record, where=placed.where)
            return _Written(placed=placed, texts=texts, unread=unread)
        except (DataError, ModelError) as error:
            return RowTokens(state=_state_of(error), problem=str(error), unread=unread)

    def _read(self, line: _Written, encoded: Sequence[Encoded]) -> RowTokens:
        told: dict[str, Any] = {
            "findings": tuple(dict.fromkeys(finding for text in line.texts for finding in text.findings)),
            "unread": line.unread,
        }
        placed, record = line.placed, line.placed.record
        try:
            if isinstance(record, GivenTokens):
                assert isinstance(self.making, TakesTokens), "readers are told what is taken"
                found = self.making.take(record, row=placed.row, where=placed.where)
            else:
                told["is_conversational"] = not isinstance(first_said(record), str)
                found = self.making.read(record, encoded, row=placed.row, where=placed.where)
        except (DataError, ModelError) as error:
            return RowTokens(state=_state_of(error), problem=str(error), **told)
        if isinstance(found, Untrained):
            return RowTokens(state=1 + REASONS.index(found), **told)
        return _kept(found, told)


def _kept(draft: ExampleDraft, told: Mapping[str, Any]) -> RowTokens:
    return RowTokens(
        state=RowState.KEPT,
        is_equal=draft.is_equal,
        prompt_diverges=draft.prompt_diverges,
        num_tokens=draft.num_tokens,
        cut_tokens=draft.cut_tokens,
        kept_tokens=draft.kept_tokens,
        samples=draft.samples,
        **told,
    )


def _state_of(error: DataError | ModelError) -> RowState:
    return RowState.BAD_MODEL if isinstance(error, ModelError) else RowState.BAD_DATA
