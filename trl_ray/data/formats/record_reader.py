"""Reads any dataset row by row into records: what the first row is, every row must be.

rows ─► RowConverter (ShareGPT, Alpaca, texts ─► messages) ─► RecordReader (checks) ─► records, one per row
first row and columns ─► convention, text format, DatasetFormat ─┘
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trl_ray.config.sections import ROLES
from trl_ray.data.formats.detection import ALL_TYPES, FORMAT_COLUMNS, DatasetFormat, DatasetType, detect
from trl_ray.data.formats.foreign_formats import RowConverter, converter_for
from trl_ray.data.formats.records import Record, RecordReader
from trl_ray.data.formats.transcripts import TextFormat, Written
from trl_ray.errors import DataError

TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReader:
    """Reads the rows of one dataset in any order; it remembers nothing between rows."""

    converter: RowConverter
    records: RecordReader
    text_field: str = "text"
    """How the column of plain texts is called."""
    is_tree: bool = False
    """Rows of text are messages of a tree, as in OpenAssistant's files."""

    @property
    def format(self) -> DatasetFormat:
        """What the rows are after their conversion."""
        return self.records.format

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the columns are read, a sentence each."""
        read, unread = self.format.columns, self.format.unread
        if self.is_tree:
            return (
                f"The rows of {self.records.name} are messages of a tree (parent_id): each is trained as a text of its "
                "own, whoever wrote it. Join them to conversations, in a column messages, where these are meant.",
            )
        if not unread:
            return ()
        written = [self.records.written.get(column, column) for column in read]
        return (
            f"{self.records.name} is read from {', '.join(written)}; {', '.join(unread)} could be learnt as well and "
            f"are not. To have them instead, set column_mapping={{{read[0]}: null}}.",
        )

    def read(self, number: int, row: Mapping[str, Any]) -> Record:
        """Row `number` as a record.

        Raises:
            DataError: the row is not what the first row is, or not what it must be; names row and field.
        """
        if not isinstance(row, Mapping):
            raise DataError(
                f"Row {number} of {self.records.name} must be an object with columns, got {type(row).__name__} "
                f"{str(row)[:80]!r}."
            )
        row = _renamed(row, self.text_field)
        record = self.records.read(number, self.converter.convert(number, row))
        kind = self.converter.text_format
        if kind is None or kind is TextFormat.PLAIN:
            return record
        texts = {column: row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str)}
        return replace(record, written=Written(kind=kind, texts=texts)) if texts else record


def _renamed(row: Mapping[str, Any], text_field: str) -> Mapping[str, Any]:
    """The row with the text that an option names as its only text."""
    if text_field == "text" or text_field not in row:
        return row
    others = FORMAT_COLUMNS - {text_field}
    return {("text" if column == text_field else column): row[column] for column in row if column not in others}


def reader_for(
    row: Mapping[str, Any],
    *,
    name: str,
    number: int = 0,
    columns: Collection[str] | None = None,
    accept: Collection[DatasetType] = ALL_TYPES,
    text_format: TextFormat | None = None,
    text_field: str = "text",
    role_mapping: Mapping[str, str] | None = None,
    has_system: bool = False,
) -> DatasetReader:
    """How to read a dataset, told from its first row, or another.

    Args:
        row: the first row.
        name: names the dataset in messages.
        number: of the row.
        columns: all columns, where they are known; else those of the first row.
        accept: the types that the caller can use; they also settle what would otherwise have two readings.
        text_format: how texts are written. None recognises it; `plain` takes texts as they are, markers and all.
        text_field: the column of rows that are plain text; where another than `text` is named and there, it is read
            whatever other columns there are.
        role_mapping: what the speakers of messages stand for.
        has_system: a column `system` begins each conversation.

    Raises:
        DataError: the columns are of no format, of several, or of one that is not accepted.
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"Row {number} of {name} must be an object with columns, got {type(row).__name__} {str(row)[:80]!r}."
        )
    known = tuple(dict.fromkeys([*row, *(columns or ())]))
    given = row
    if text_field != "text" and text_field in known:
        others = FORMAT_COLUMNS - {text_field}
        known = tuple("text" if column == text_field else column for column in known if column not in others)
        row = _renamed(row, text_field)
    told = "text" if row is not given else None
    roles = role_mapping or {}
    converter = converter_for(
        row,
        name=name,
        number=number,
        columns=known,
        text_format=text_format,
        role_mapping=roles,
        has_system=has_system,
        is_rated=_is_rated(known, accept),
    )
    converted = converter.convert(number, row)
    now = [*converted, *(column for column in known if column not in row)]
    # A text that was told may have become messages.
    told = "messages" if told is not None and told not in converted and "text" in row else told
    found = detect(now, converted, name=name, accept=accept, told=told)
    written = {column: _source(column, row) for column in converted if column not in row}
    if row is not given:
        written = {"text": text_field, **{column: text_field for column, source in written.items() if source == "text"}}
    return DatasetReader(
        converter=converter,
        records=RecordReader(name=name, format=found, written=written, roles=(*ROLES, *roles.values())),
        text_field=text_field,
        is_tree=found.columns == ("text",) and {"parent_id", "message_id"} <= set(known),
    )


def _is_rated(columns: Collection[str], accept: Collection[DatasetType]) -> bool:
    """Whether conversations come with a label that whoever asks can use for nothing but their last answers."""
    wanted = DatasetType.UNPAIRED_PREFERENCE in accept and DatasetType.LANGUAGE_MODELING not in accept
    whole = {"messages", "conversations"} & set(columns) and not {"prompt", "completion"} & set(columns)
    return wanted and bool(whole) and "label" in columns


def _source(column: str, row: Mapping[str, Any]) -> str:
    """The column of a foreign row that a converted one came from."""
    whole = ("messages", "conversations")
    sources = {
        "messages": ("conversations", "text"),
        "prompt": ("instruction", *whole),
        "completion": ("output", *whole),
    }
    return next((source for source in sources.get(column, ()) if source in row), column)
