"""Examples that are made when they are asked for, of the columns that tokenised rows are kept in.

    TokenTable ─┬─► RowExamples     one a row
                ├─► RatedExamples   one a rated answer, with the answer of another one
                └─► PackedExamples  one a packed row: the pieces in it

A step asks for tens of them, so that a million rows cost a few numbers each.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.data.examples.packing import Packing
from trl_ray.data.examples.pairs import Answer, answer_sample, mismatched_sample
from trl_ray.data.examples.supervised_texts import as_training_sample
from trl_ray.data.examples.token_table import TokenTable
from trl_ray.data.examples.tokenisation import TextRules
from trl_ray.types import Example, TrainingSample


class MadeExamples(Sequence[Example]):
    """Examples by their number; asked twice for one, it gives two that are alike.

    Args:
        table: of the rows that they are made of.
    """

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def content_key(self) -> str:
        """A hash of the rows that they are made of, all of them; the rules that make them are the run's."""
        return self._table.content_key()

    @abc.abstractmethod
    def make(self, index: int) -> Example:
        """Example `index`, from 0."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self.make(place) for place in range(*index.indices(len(self))))
        place = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self.make(place)


class RowExamples(MadeExamples):
    """Every kept row is an example."""

    def __len__(self) -> int:
        return len(self._table.kept)

    def make(self, index: int) -> Example:
        place = int(self._table.kept[index])
        return Example(row=self._table.start + place, samples=self._table.samples(place))


class RatedExamples(MadeExamples):
    """Every rated answer is an example; the table has prompts and answers as they were before they are cut.

    Args:
        table: of rows with one or two rated answers.
        rules: how much of them is kept.
        mismatched: give each prompt the answer of its predecessor, in a ring, as well.
    """

    def __init__(self, table: TokenTable, rules: TextRules, *, mismatched: bool) -> None:
        super().__init__(table)
        self._rules = rules
        counts = table.column("num_samples")[table.kept].astype(np.int32)
        self._owners = np.repeat(table.kept, counts)
        self._lanes = _within(counts).astype(np.int8)
        self._partners = _predecessors(self._owners, self._lanes) if mismatched and len(self._owners) else None

    def __len__(self) -> int:
        return len(self._owners)

    def make(self, index: int) -> Example:
        rated = self._uncut(index)
        label = rated.label
        assert label is not None, "it was rated"
        sample = answer_sample(
            rated.prompt_ids, _answer(rated), self._rules, group_id=rated.group_id, desirable=label.desirable
        )
        assert isinstance(sample, TrainingSample), "it had a token to train when it was read"
        return Example(
            row=self._table.start + int(self._owners[index]),
            samples=(sample,),
            mismatched=self._mismatched(index, rated),
        )

    def _uncut(self, index: int) -> TrainingSample:
        return self._table.samples(int(self._owners[index]))[int(self._lanes[index])]

    def _mismatched(self, index: int, rated: TrainingSample) -> TrainingSample | None:
        if self._partners is None:
            return None
        other = self._uncut(int(self._partners[index]))
        return mismatched_sample(rated.prompt_ids, _answer(other), self._rules, group_id=rated.group_id)


def _answer(rated: TrainingSample) -> Answer:
    return Answer(token_ids=rated.completion_ids, heard=rated.loss_mask)


def _within(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """The place of each thing among those of its owner; owners have `counts` things."""
    begins = np.cumsum(counts, dtype=np.int64) - counts
    return np.arange(int(counts.sum())) - np.repeat(begins, counts)


def _predecessors(owners: NDArray[np.int32], lanes: NDArray[np.int8]) -> NDArray[np.int32]:
    """For each answer the nearest one of another row before it, in a ring.

    The ring has of pairs first all wanted answers, then all others (TRL's order), lest a prompt get its own other one.
    There must be answers of two rows.
    """
    ring = np.argsort(lanes, kind="stable")
    places = np.arange(len(ring))
    before = places - 1
    while len(same := np.flatnonzero(owners[ring[before]] == owners[ring])):
        before[same] -= 1
    partners = np.empty(len(ring), np.int32)
    partners[ring] = ring[before]
    return partners


class PackedExamples(MadeExamples):
    """Every packed row with something to train is an example.

    Args:
        table: of rows with one sample.
        packing: of the kept ones.
        first_group: the number of the first piece; the others count on.
    """

    def __init__(self, table: TokenTable, packing: Packing, *, first_group: int) -> None:
        super().__init__(table)
        self._first_group = first_group
        targets = _Targets(table, packing)
        self.unpacked = int(targets.at_start().sum())
        """Targets that are the first token of a piece, where nothing predicts them."""
        trained = targets.within()
        self._pieces = packing.pieces[trained]
        counts = np.bincount(packing.row_numbers[trained], minlength=packing.num_rows)
        self._ends = np.concatenate([[0], np.cumsum(counts[counts > 0])])
        self.trained = np.unique(self._pieces[:, 0])
        """Of the kept rows, those with a piece in an example."""
        self.num_tokens = int((self._pieces[:, 2] - self._pieces[:, 1]).sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def make(self, index: int) -> Example:
        begin, end = int(self._ends[index]), int(self._ends[index + 1])
        samples, places = [], []
        for number, (example, start, stop) in enumerate(self._pieces[begin:end].tolist(), start=begin):
            places.append(int(self._table.kept[example]))
            tokens, mask = self._table.sequence(places[-1])
            mask[start] = False  # nothing predicts it
            samples.append(
                as_training_sample(tokens[start:stop], mask[start:stop], group_id=self._first_group + number)
            )
        return Example(row=self._table.start + places[0], samples=tuple(samples), num_rows=len(samples))


class _Targets:
    """Where pieces have targets: told from the first and the last of each row, or by its mask where it has gaps."""

    def __init__(self, table: TokenTable, packing: Packing) -> None:
        self._table = table
        self._owners, self._starts, self._stops = packing.pieces.T
        kept = table.kept[self._owners]
        self._first, self._last = (table.column(name)[kept] for name in ("first_target", "last_target"))
        self._gaps = table.column("num_targets")[kept] <= self._last - self._first

    def at_start(self) -> NDArray[np.bool_]:
        """Whether the first token of each piece is a target."""
        within = (self._first <= self._starts) & (self._starts <= self._last)
        unsure = within & self._gaps & (self._starts != self._first) & (self._starts != self._last)
        return self._looked_up(within, unsure, lambda mask, start, stop: bool(mask[start]))

    def within(self) -> NDArray[np.bool_]:
        """Whether a token of each piece but the first is a target."""
        meets = np.maximum(self._first, self._starts + 1) <= np.minimum(self._last, self._stops - 1)
        ends = [(self._starts < place) & (place < self._stops) for place in (self._first, self._last)]
        unsure = meets & self._gaps & ~ends[0] & ~ends[1]
        return self._looked_up(meets, unsure, lambda mask, start, stop: bool(mask[start + 1 : stop].any()))

    def _looked_up(self, found: NDArray[np.bool_], unsure: NDArray[np.bool_], look: Any) -> NDArray[np.bool_]:
        for piece in np.flatnonzero(unsure).tolist():
            _, mask = self._table.sequence(int(self._table.kept[self._owners[piece]]))
            found[piece] = look(mask, int(self._starts[piece]), int(self._stops[piece]))
        return found
