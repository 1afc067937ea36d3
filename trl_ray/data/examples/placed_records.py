"""Reads the rows of a dataset, a mixture or a stream as records that know their place.

rows ─► a reader for each source, told from its first usable row ─► PlacedRecord
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.messages import nearest
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.data.examples.example_tasks import Making, TakesTokens
from trl_ray.data.examples.given_tokens import GivenTokens, TokenReader, has_tokens
from trl_ray.data.formats.detection import SPEECH
from trl_ray.data.formats.record_reader import DatasetReader, reader_for
from trl_ray.data.formats.records import Document, Record
from trl_ray.data.formats.transcripts import TextFormat
from trl_ray.data.sources.dataset_loading import Origin, Rows
from trl_ray.errors import ConfigError, DataError

_TRIED_ROWS = 100
"""Rows of which one must tell how a dataset is to be read."""


RowReader: TypeAlias = DatasetReader | TokenReader


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRecord:
    """A record, its number in the dataset or mixture, and where it came from."""

    row: int
    origin: Origin
    record: Record | GivenTokens

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"row {self.origin.number} of {self.origin.name}"


def readers_for(rows: Rows, config: SupervisedRunConfig, making: Making) -> dict[str, RowReader]:
    """How to read each source of a mixture, or the one dataset: by name.

    Raises:
        DataError: the columns are of no format that can be used.
        ConfigError: there is no way of writing texts of the name that is given.
    """
    sources = {source.name: source for source in rows.sources or (rows,)}
    return {
        name: reader_of(enumerate(source.rows), config, making, name=name, columns=source.columns)
        for name, source in sources.items()
    }


def unread_speech(record: Record | GivenTokens) -> int:
    """Which columns of a record say something that nobody reads: a bit for each of `SPEECH`."""
    if isinstance(record, GivenTokens):
        return 0
    found = 0
    for bit, column in enumerate(SPEECH):
        value = record.columns.get(column)
        if isinstance(value, str) and value.strip() and value.strip() not in _said(record):
            found |= 1 << bit
    return found


def report_unread(unread: NDArray[np.int16], name: str, *, told: Collection[str] = ()) -> tuple[str, ...]:
    """A sentence for each column that says something in some rows and is not read.

    Args:
        unread: [N] `unread_speech` of all rows.
        name: of the dataset.
        told: columns that the user is told of already.
    """
    counts = {column: int((unread >> bit & 1).sum()) for bit, column in enumerate(SPEECH) if column not in told}
    return tuple(
        f"{count} of {len(unread)} rows of {name} have a text in the column {column!r}, which is not trained: map it "
        f"to what it is, as in column_mapping={{{column}: system}}, which begins conversations with it, or to null."
        for column, count in counts.items()
        if count
    )


def _said(record: Record) -> str:
    """What a record is asked, or all of it, as one text."""
    said = record.content if isinstance(record, Document) else record.prompt
    return said if isinstance(said, str) else "\n".join(message["content"] or "" for message in said)


def reader_of(
    rows: Iterable[tuple[int, Mapping[str, object]]],
    config: SupervisedRunConfig,
    making: Making,
    *,
    name: str,
    columns: Sequence[str] | None,
) -> RowReader:
    """How to read a dataset, told from the first row that can be read, or where none can, from the first.

    Args:
        rows: numbered.
        config: of the run.
        making: the task, which says what formats can be used.
        name: of the dataset.
        columns: of all rows; None: those of the row.

    Raises:
        DataError: the columns are of no format that can be used, in any of the first rows.
        ConfigError: there is no way of writing texts of the name that is given.
    """
    text_format = _text_format(config.dataset_text_format)
    found: DatasetReader | None = None
    first: DataError | None = None
    for number, row in itertools.islice(rows, _TRIED_ROWS):
        if (tokens := _tokens(row, making, name=name, columns=columns)) is not None:
            return tokens
        try:
            reader = reader_for(
                row,
                name=name,
                number=number,
                columns=columns,
                accept=making.accept,
                text_format=text_format,
                text_field=config.text_column,
                role_mapping=config.role_mapping,
                has_system="system" in config.column_mapping.values(),
            )
            found = found or reader
            reader.read(number, row)
            return reader
        except DataError as error:
            first = first or error
    if found is not None:
        return found
    assert first is not None, "a dataset has rows"
    raise first


def _tokens(row: object, making: Making, *, name: str, columns: Sequence[str] | None) -> TokenReader | None:
    """How to read rows that are tokenised already, where the row is one and the task has a use for it."""
    if not isinstance(making, TakesTokens) or not isinstance(row, Mapping):
        return None
    if not has_tokens(tuple(columns or row), making.token_columns):
        return None
    return making.token_reader(tuple(columns or row), name=name)


def _text_format(name: str | None) -> TextFormat | None:
    if name is None or name in list(TextFormat):
        return None if name is None else TextFormat(name)
    guess = nearest(name, list(TextFormat))
    raise ConfigError(
        f"dataset_text_format must be one of {', '.join(TextFormat)}, got {name!r}. "
        f"{f'Did you mean {guess}?' if guess else 'Leave it out to have it recognised.'}"
    )
