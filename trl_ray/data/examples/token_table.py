"""What tokenising makes of rows, as columns: a line for each row, whatever became of it.

    rows ─ row_tokenisation.py ─► RowTokens, one a row ─ as_table ─► Arrow table ─ TokenTable ─┬─► columns [N]
                                                                  (in memory, or mapped)       └─► samples of one row

Small columns stand before the tokens, so that who looks at all rows leaves the tokens on disk.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from trl_ray.data.chat.faithful_rendering import Finding, Unrendered
from trl_ray.data.examples.left_out_rows import RowFindings, Untrained
from trl_ray.types import BoolArray, IntArray, SampleLabel, TrainingSample


class RowState(enum.IntEnum):
    """What became of a row; reasons why it is not trained follow, in their order."""

    BROKEN = -3
    """It cannot be read, and so nothing can be trained."""
    BAD_MODEL = -2
    """It cannot be used, as a `ModelError` says."""
    BAD_DATA = -1
    """It cannot be used, as a `DataError` says."""
    KEPT = 0


REASONS = tuple(Untrained)
_INTS, _BITS = pa.list_(pa.int32()), pa.list_(pa.bool_())
SCHEMA = pa.schema(
    {
        "state": pa.int8(),
        "problem": pa.string(),
        "findings": pa.string(),
        "unread": pa.int16(),
        "is_conversational": pa.int8(),
        "is_equal": pa.int8(),
        "prompt_diverges": pa.int8(),
        "num_tokens": pa.int32(),
        "cut_tokens": pa.int32(),
        "kept_tokens": pa.int32(),
        "num_samples": pa.int8(),
        "first_target": pa.int32(),
        "last_target": pa.int32(),
        "num_targets": pa.int32(),
        "groups": pa.list_(pa.int64()),
        "prompts": _INTS,
        "completions": _INTS,
        "desirable": _INTS,
        "label_lengths": _INTS,
        "margin": pa.float64(),
        "steps": _BITS,
        "mask": _BITS,
        "tokens": _INTS,
    }
)
_LISTS = ("groups", "prompts", "completions", "desirable", "label_lengths", "steps", "mask", "tokens")
_TRAINED = ("state", "margin", *_LISTS)
"""Columns that examples are made of."""
_NONE = -1
_NO_LABEL = SampleLabel()
_NO_TARGETS = (_NONE, _NONE, 0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowTokens:
    """One row, tokenised or not."""

    state: int
    """A `RowState`, or 1 + the place of the reason in `REASONS`."""
    problem: str | None = None
    """What is wrong with it."""
    findings: tuple[Finding, ...] = ()
    unread: int = 0
    """A bit for each column of speech that is not trained."""
    is_conversational: bool = False
    is_equal: bool = False
    prompt_diverges: bool = False
    num_tokens: int = 0
    cut_tokens: int = 0
    kept_tokens: int = 0
    """Of its examples, as they are trained."""
    samples: tuple[TrainingSample, ...] = ()


def as_table(rows: Sequence[RowTokens]) -> pa.Table:
    """The rows as one record batch of `SCHEMA`."""
    samples = [sample for row in rows for sample in row.samples]
    labels = [sample.label or _NO_LABEL for sample in samples]
    firsts = [_targets(row.samples[0]) if row.samples else _NO_TARGETS for row in rows]
    counts = [len(row.samples) for row in rows]
    starts = pa.array(np.cumsum([0, *counts], dtype=np.int32))
    steps = [
        [label.steps for sample in row.samples if (label := sample.label) and label.steps is not None] for row in rows
    ]
    lists: dict[str, list[int]] = {
        "groups": [sample.group_id for sample in samples],
        "prompts": [len(sample.prompt_ids) for sample in samples],
        "completions": [len(sample.completion_ids) for sample in samples],
        "desirable": [_NONE if label.desirable is None else int(label.desirable) for label in labels],
        "label_lengths": [_NONE if label.length is None else label.length for label in labels],
    }
    columns: dict[str, Any] = {
        "state": [row.state for row in rows],
        "unread": [row.unread for row in rows],
        "is_conversational": [row.is_conversational for row in rows],
        "is_equal": [row.is_equal for row in rows],
        "prompt_diverges": [row.prompt_diverges for row in rows],
        "num_tokens": [row.num_tokens for row in rows],
        "cut_tokens": [row.cut_tokens for row in rows],
        "kept_tokens": [row.kept_tokens for row in rows],
        "num_samples": counts,
        "first_target": [first for first, _, _ in firsts],
        "last_target": [last for _, last, _ in firsts],
        "num_targets": [number for _, _, number in firsts],
    }
    made = {name: pa.array(np.array(values, str(SCHEMA.field(name).type))) for name, values in columns.items()}
    for name, values in lists.items():
        dtype = str(SCHEMA.field(name).type.value_type)
        made[name] = pa.ListArray.from_arrays(starts, pa.array(np.array(values, dtype)))
    made["problem"] = pa.array([row.problem for row in rows], pa.string())
    made["findings"] = pa.array([_written(row.findings) if row.findings else None for row in rows], pa.string())
    made["margin"] = pa.array([_margin(row) for row in rows], pa.float64())
    made["steps"] = _list_array(steps, np.bool_)
    made["mask"] = _list_array([[sample.loss_mask for sample in row.samples] for row in rows], np.bool_)
    made["tokens"] = _list_array(
        [[ids for sample in row.samples for ids in (sample.prompt_ids, sample.completion_ids)] for row in rows],
        np.int32,
    )
    return pa.table([made[name] for name in SCHEMA.names], schema=SCHEMA)


def _targets(sample: TrainingSample) -> tuple[int, int, int]:
    """The places of the first and the last target in a sample, and how many there are."""
    places, context = np.flatnonzero(sample.loss_mask), len(sample.prompt_ids)
    return (context + int(places[0]), context + int(places[-1]), len(places)) if len(places) else _NO_TARGETS


def _margin(row: RowTokens) -> float | None:
    label = row.samples[0].label if row.samples else None
    return None if label is None else label.margin


def _list_array(rows: Sequence[Sequence[NDArray[Any]]], dtype: type) -> pa.ListArray:
    """Arrays of each row, one behind the other, as a list column."""
    ends = np.cumsum([0, *(sum(map(len, arrays)) for arrays in rows)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *(array for arrays in rows for array in arrays)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.astype(dtype, copy=False)))


def _written(findings: Iterable[Finding]) -> str:
    return json.dumps([[finding.kind, finding.message, finding.field] for finding in findings])


def _read(written: str) -> tuple[Finding, ...]:
    return tuple(Finding(kind=Unrendered(kind), message=n, field=name) for kind, n, name in json.loads(written))


class _Batch:
    """A record batch as numpy arrays, which are views of it."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._offsets = {name: batch.column(name).offsets.to_numpy() for name in _LISTS}
        self._values = {name: batch.column(name).values for name in _LISTS}
        self._margins = batch.column("margin")

    def list(self, name: str, row: int) -> NDArray[Any]:
        """A list of a row, as a copy: what is mapped cannot be written to."""
        start, stop = self._offsets[name][row : row + 2]
        return np.array(self._values[name].slice(start, stop - start).to_numpy(zero_copy_only=False))

    def margin(self, row: int) -> float | None:
        value = self._margins[row].as_py()
        return None if value is None else float(value)


class TokenTable:
    """Rows as columns, and the samples of each.

    Args:
        table: of `SCHEMA`.
        start: the number of its first row.
    """

    def __init__(self, table: pa.Table, *, start: int = 0) -> None:
        self.start = start
        self._table = table
        self._batches = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        self._views: dict[int, _Batch] = {}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> NDArray[Any]:
        """[N] of all rows."""
        return np.asarray(self._table.column(name).to_numpy())

    @cached_property
    def kept(self) -> NDArray[np.int32]:
        """[K] places, from 0, of the rows that are in examples."""
        return np.flatnonzero(self.column("state") == RowState.KEPT).astype(np.int32)

    def numbers(self, places: NDArray[Any]) -> tuple[int, ...]:
        """The numbers of rows in the dataset."""
        return tuple((places.astype(np.int64) + self.start).tolist())

    def where(self, name: str) -> tuple[int, ...]:
        """The numbers of the kept rows of which a column is above 0."""
        return self.numbers(self.kept[self.column(name)[self.kept] > 0])

    def total(self, name: str) -> int:
        """The sum of a column over the kept rows."""
        return int(self.column(name)[self.kept].sum(dtype=np.int64))

    def untrained(self) -> dict[int, Untrained]:
        """Why rows are in no example, by their number."""
        states = self.column("state")
        places = np.flatnonzero(states > RowState.KEPT)
        reasons = [REASONS[state - 1] for state in states[places].tolist()]
        return dict(zip(self.numbers(places), reasons, strict=True))

    def problems(self) -> Iterator[tuple[int, RowState, str]]:
        """Rows that cannot be used, in order: their place, what kind of error says so, and the error."""
        states = self.column("state")
        places = np.flatnonzero(states < RowState.KEPT)
        told = self._table.column("problem").take(pa.array(places)).to_pylist() if len(places) else []
        for place, problem in zip(places.tolist(), told, strict=True):
            yield place, RowState(int(states[place])), str(problem)

    def findings(self) -> RowFindings:
        """What the chat template does not write of the rows."""
        column = self._table.column("findings").combine_chunks().dictionary_encode()
        places = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        codes = column.indices.take(pa.array(places)).to_numpy().astype(np.int64)
        return RowFindings(places + self.start, codes, [_read(text) for text in column.dictionary.to_pylist()])

    def samples(self, place: int) -> tuple[TrainingSample, ...]:
        """The samples of a row."""
        batch, row = self._find(place)
        groups, prompts, completions = (batch.list(name, row) for name in ("groups", "prompts", "completions"))
        desirable, lengths, steps = (batch.list(name, row) for name in ("desirable", "label_lengths", "steps"))
        tokens, mask, margin = batch.list("tokens", row), batch.list("mask", row), batch.margin(row)
        found, token, target = [], 0, 0
        for lane, (prompt, completion) in enumerate(zip(prompts.tolist(), completions.tolist(), strict=True)):
            border, end = token + prompt, token + prompt + completion
            label = _label(int(desirable[lane]), int(lengths[lane]), margin, steps)
            found.append(
                TrainingSample(
                    group_id=int(groups[lane]),
                    prompt_ids=tokens[token:border],
                    completion_ids=tokens[border:end],
                    loss_mask=mask[target : target + completion],
                    label=label,
                )
            )
            token, target = end, target + completion
        return tuple(found)

    def sequence(self, place: int) -> tuple[IntArray, BoolArray]:
        """The tokens [T] of a row with one sample, and which of them are targets."""
        batch, row = self._find(place)
        tokens, mask = batch.list("tokens", row), batch.list("mask", row)
        return tokens, np.concatenate([np.zeros(len(tokens) - len(mask), np.bool_), mask])

    def content_key(self) -> str:
        """A hash of all that is trained of all rows; how they are cut into batches does not enter."""
        digests = {name: xxhash.xxh3_128() for name in (*_TRAINED, *(f"{name} lengths" for name in _LISTS))}
        for batch in self._batches:
            for name in _TRAINED:
                column = batch.column(name)
                if name in _LISTS:
                    offsets = column.offsets.to_numpy()
                    digests[f"{name} lengths"].update(np.diff(offsets).astype(np.int32).tobytes())
                    column = column.values.slice(offsets[0], offsets[-1] - offsets[0])
                values = column.to_numpy(zero_copy_only=False)
                digests[name].update(values.tobytes())
        told = "".join(digest.hexdigest() for digest in digests.values())
        return xxhash.xxh3_128(f"{len(self)} {told}".encode()).hexdigest()

    def _find(self, place: int) -> tuple[_Batch, int]:
        number = int(np.searchsorted(self._ends, place, side="right"))
        view = self._views.get(number)
        if view is None:
            view = self._views[number] = _Batch(self._batches[number])
        return view, place - (int(self._ends[number - 1]) if number else 0)


def _label(desirable: int, length: int, margin: float | None, steps: BoolArray) -> SampleLabel | None:
    if desirable == _NONE and length == _NONE and margin is None and not len(steps):
        return None
    return SampleLabel(
        desirable=None if desirable == _NONE else bool(desirable),
        margin=margin,
        steps=steps if len(steps) else None,
        length=None if length == _NONE else length,
    )
