"""Metrics and spans of a long run as columns: a hundred thousand steps in little time and memory.

    metrics.jsonl --Arrow--> Columns: a float array per key, NaN where a step lacks it      reads like a list of rows
    trace.jsonl   --Arrow--> SpanColumns: actor, name, start, end                           reads like a list of spans

Arrow reads a file of whole lines of one shape. Any other file is read line by line, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
from numpy.typing import NDArray

from trl_ray.types import Span

_BLOCK_BYTES = 4 << 20
_SPAN = pa.schema([("actor", pa.string()), ("name", pa.string()), ("start", pa.float64()), ("end", pa.float64())])

Floats = NDArray[np.float64]


class Columns(Sequence[Mapping[str, float]]):
    """Rows of numbers, stored by key.

    rows = Columns({"step": np.array([1.0, 2.0]), "loss": np.array([0.5, np.nan])})
    rows[1], rows.present("loss")                                             # {"step": 2.0}, [0.5]
    """

    def __init__(self, columns: Mapping[str, Floats]) -> None:
        """All columns are equally long; NaN stands for nothing, which is what a file of metrics writes for it."""
        self.columns = columns
        self._length = len(next(iter(columns.values()), ()))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Mapping[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> Columns: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, float] | Columns:
        if isinstance(index, slice):
            return Columns({key: column[index] for key, column in self.columns.items()})
        row = {key: float(column[index]) for key, column in self.columns.items()}
        return {key: value for key, value in row.items() if value == value}

    def values(self, key: str) -> list[float | None]:
        """[rows] of one key, None where a row lacks it."""
        column = self.columns.get(key)
        if column is None:
            return [None] * len(self)
        return [value if value == value else None for value in column.tolist()]

    def present(self, key: str) -> list[float]:
        """The values of one key that exist, in order."""
        column = self.columns.get(key)
        found: list[float] = [] if column is None else column[~np.isnan(column)].tolist()
        return found

    def joined(self, edges: Sequence[int], *, by_largest: Iterable[str]) -> list[dict[str, float]]:
        """One row for each range between two edges: the mean of each key, of some the largest."""
        starts, largest = np.asarray(edges[:-1]), set(by_largest)
        rows: list[dict[str, float]] = [{} for _ in starts]
        for key, column in self.columns.items():
            known = ~np.isnan(column)
            counts = np.add.reduceat(known, starts)
            if key in largest:
                found = np.maximum.reduceat(np.where(known, column, -np.inf), starts)
            else:
                found = np.add.reduceat(np.where(known, column, 0.0), starts) / np.maximum(counts, 1)
            for row, count, value in zip(rows, counts.tolist(), found.tolist(), strict=True):
                if count:
                    row[key] = value
        return rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpanColumns(Sequence[Span]):
    """Spans by their start."""

    actors: Sequence[str]
    """By number, in the order in which they begin."""
    names: Sequence[str]
    """By number, in the order in which they begin."""
    actor: NDArray[np.int64]
    """[spans] numbers of actors."""
    name: NDArray[np.int64]
    """[spans] numbers of names."""
    start: Floats
    """[spans] seconds since the epoch, ascending."""
    end: Floats
    """[spans]"""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> SpanColumns:
        """From spans in any order."""
        if isinstance(spans, SpanColumns):
            return spans
        return cls.sorted(
            actors=[span.actor for span in spans],
            names=[span.name for span in spans],
            start=np.array([span.start for span in spans], dtype=np.float64),
            end=np.array([span.end for span in spans], dtype=np.float64),
        )

    @classmethod
    def sorted(cls, *, actors: Any, names: Any, start: Floats, end: Floats) -> SpanColumns:
        """From lists or arrays of Arrow, in any order."""
        order = np.argsort(start, kind="stable")
        actor, actor_names = _numbered(actors, order)
        name, name_names = _numbered(names, order)
        return cls(actors=actor_names, names=name_names, actor=actor, name=name, start=start[order], end=end[order])

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, index: int) -> Span: ...

    @overload
    def __getitem__(self, index: slice) -> SpanColumns: ...

    def __getitem__(self, index: int | slice) -> Span | SpanColumns:
        if isinstance(index, slice):
            return self.where(np.arange(len(self))[index])
        return Span(
            actor=self.actors[self.actor[index]],
            name=self.names[self.name[index]],
            start=float(self.start[index]),
            end=float(self.end[index]),
        )

    def __iter__(self) -> Iterator[Span]:
        rows = zip(self.actor.tolist(), self.name.tolist(), self.start.tolist(), self.end.tolist(), strict=True)
        for actor, name, start, end in rows:
            yield Span(actor=self.actors[actor], name=self.names[name], start=start, end=end)

    def where(self, chosen: NDArray[Any]) -> SpanColumns:
        """Some of the spans, by a mask or by their places in order."""
        return SpanColumns(
            actors=self.actors,
            names=self.names,
            actor=self.actor[chosen],
            name=self.name[chosen],
            start=self.start[chosen],
            end=self.end[chosen],
        )


def _numbered(values: Any, order: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    """Each value's number, and the values by number, in the order of their first appearance."""
    encoded = pa.array(values, type=pa.string()) if isinstance(values, list) else values
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    encoded = encoded.take(pa.array(order)).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def covered(start: Floats, end: Floats) -> float:
    """Seconds of the union of intervals, in any order."""
    if not len(start):
        return 0.0
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    gaps = start[1:] > end[:-1]
    begins = start[np.concatenate([[True], gaps])]
    ends = end[np.concatenate([gaps, [True]])]
    return float((ends - begins).sum())


def read_metric_columns(path: Path) -> Columns | None:
    """Metrics by step; None where the file must be read line by line, or a step was written twice."""
    table = _read(path, pj.ParseOptions())
    if table is None or "step" not in table.column_names:
        return None
    numbers = {
        name: table.column(name).cast(pa.float64()).to_numpy()
        for name in table.column_names
        if pa.types.is_floating(kind := table.schema.field(name).type) or pa.types.is_integer(kind)
    }
    if "step" not in numbers or not (np.diff(numbers["step"]) > 0).all():
        return None
    return Columns(numbers)


def read_span_columns(path: Path) -> SpanColumns | None:
    """A trace; None where the file must be read line by line."""
    table = _read(path, pj.ParseOptions(explicit_schema=_SPAN, unexpected_field_behavior="ignore"))
    if table is None or any(table.column(name).null_count for name in _SPAN.names):
        return None
    start, end = (table.column(name).to_numpy() for name in ("start", "end"))
    spans = SpanColumns.sorted(actors=table.column("actor"), names=table.column("name"), start=start, end=end)
    return spans.where(spans.end >= spans.start)


def _read(path: Path, options: pj.ParseOptions) -> pa.Table | None:
    try:
        with pa.memory_map(str(path)) as file:
            whole = file.read_buffer()
            # A torn last line is left out, as everywhere.
            cut = bytes(whole[-_BLOCK_BYTES:]).rfind(b"\n") + 1
            kept = whole.slice(0, max(0, whole.size - _BLOCK_BYTES) + cut)
            blocks = pj.ReadOptions(block_size=_BLOCK_BYTES)
            return pj.read_json(pa.BufferReader(kept), read_options=blocks, parse_options=options)
    except (OSError, pa.ArrowException):
        return None
