"""Cutting what a step trains on into updates, the update into micro-batches, and dealing these out to ranks.

    samples --split_updates--> TrainBatch x U x iterations --shard--> TrainBatch x R
                   each cut by `cut_samples`: R * k micro-batches of nearly equal work, within a budget

Work is counted in tokens as the layout lays them out (`algorithms/layout.py`): a prompt once for all its completions in
a micro-batch, so a group that is torn apart costs its prompt again and is torn only where ranks become more even by it.
Everything here is deterministic, and no sample is ever dropped.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from trl_ray.algorithms.layout import input_length
from trl_ray.config.sections import SharePrompt
from trl_ray.types import TrainBatch, TrainingSample

MicroBatch: TypeAlias = tuple[TrainingSample, ...]
_TORN_GAIN = 0.98
"""Groups are torn into smaller pieces only if the busiest rank's work shrinks to this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRules:
    """What a micro-batch may hold, and what its work is estimated by."""

    max_samples: int | None = None
    """Completions in one micro-batch, at most; None: any number."""
    max_tokens: int | None = None
    """Tokens of model input in one micro-batch, at most. A sample that is longer gets one of its own."""
    ranks: int = 1
    """The micro-batches are made to be dealt out to this many ranks evenly."""
    share: SharePrompt = SharePrompt.AUTO
    """NEVER counts a group's prompt once per completion."""
    padded: bool = False
    """The model's attention cannot be told where sequences begin: every row counts as long as the longest."""
    hidden_size: int = 1024
    """H; a pair of tokens in attention costs 2 H where a token costs 12 H^2 in the linear layers of a block."""
    head_share: float = 0.25
    """Work of a trained token in the head, forward and backward twice, over that of a token in all blocks:
    V / (9 H layers)."""

    def __post_init__(self) -> None:
        assert self.max_samples is None or self.max_samples >= 1, "a micro-batch holds at least one completion"
        assert self.max_tokens is None or self.max_tokens >= 1, "a micro-batch holds at least one token"
        assert self.ranks >= 1, "there is at least one rank"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Piece:
    """Samples that stay together: a group or a part of one. Those without a trained token take no room."""

    members: tuple[int, ...]
    """Places in the list that is cut; ascending."""
    keys: tuple[tuple[int, bytes] | None, ...]
    """Which prompt it is, if it may be shared; None for a sample that is no input."""
    prompts: tuple[int, ...]
    bodies: tuple[int, ...]
    trained: int

    def part(self, places: Sequence[int], trained: Sequence[int]) -> _Piece:
        """Some of the members, with their numbers of trained tokens."""
        return _Piece(
            members=tuple(self.members[i] for i in places),
            keys=tuple(self.keys[i] for i in places),
            prompts=tuple(self.prompts[i] for i in places),
            bodies=tuple(self.bodies[i] for i in places),
            trained=sum(trained[self.members[i]] for i in places),
        )


@dataclass(slots=True, kw_only=True)
class _Bin:
    """A micro-batch that is being filled."""

    rules: CutRules
    pieces: list[_Piece] = field(default_factory=list)
    cost: float = 0.0
    tokens: int = 0
    _rows: int = 0
    _longest: int = 0
    _samples: int = 0
    _prompts: set[tuple[int, bytes]] = field(default_factory=set)

    def fits(self, piece: _Piece) -> bool:
        """Whether it can be added; an empty bin takes a single sample of any length."""
        if not self.pieces and len(piece.members) == 1:
            return True
        rules = self.rules
        if rules.max_samples is not None and self._samples + len(piece.members) > rules.max_samples:
            return False
        return rules.max_tokens is None or self._size_with(piece) <= rules.max_tokens

    def _size_with(self, piece: _Piece) -> int:
        if self.rules.padded:
            rows = [p + b for key, p, b in zip(piece.keys, piece.prompts, piece.bodies, strict=True) if key]
            return (self._rows + len(rows)) * max([self._longest, *rows])
        return self.tokens + _tokens(piece, self.rules, self._prompts)

    def add(self, piece: _Piece) -> None:
        """Put it in."""
        rows = [p + b for key, p, b in zip(piece.keys, piece.prompts, piece.bodies, strict=True) if key]
        self.tokens = self._size_with(piece)
        self.cost += _cost(piece, self.rules, self._prompts)
        self._prompts.update(key for key in piece.keys if key)
        self._rows += len(rows)
        self._longest = max([self._longest, *rows])
        self._samples += len(piece.members)
        self.pieces.append(piece)


def _tokens(piece: _Piece, rules: CutRules, known: Iterable[tuple[int, bytes]] = ()) -> int:
    """Tokens of model input; prompts that are `known` are there already."""
    if rules.share is SharePrompt.NEVER:
        return sum(p + b for key, p, b in zip(piece.keys, piece.prompts, piece.bodies, strict=True) if key)
    new = {key: p for key, p in zip(piece.keys, piece.prompts, strict=True) if key and key not in known}
    return sum(new.values()) + sum(piece.bodies)


def _cost(piece: _Piece, rules: CutRules, known: Iterable[tuple[int, bytes]] = ()) -> float:
    """Work in tokens: linear layers, attention (pairs of tokens), head."""
    pairs = sum(b * (p + b / 2) for p, b in zip(piece.prompts, piece.bodies, strict=True))
    return _tokens(piece, rules, known) + pairs / (6 * rules.hidden_size) + rules.head_share * piece.trained


def cut_samples(samples: Sequence[TrainingSample], rules: CutRules) -> tuple[MicroBatch, ...]:
    """Cut samples into micro-batches of nearly equal work, as few as the rules allow.

    Their number is a multiple of `rules.ranks`, unless there are fewer samples than ranks. Pieces of groups go,
    largest first, to the micro-batch with the least work that has room (Graham's LPT rule,
    https://doi.org/10.1137/0117039); the samples of one micro-batch keep their order.
    """
    if not samples:
        return ()
    trained = [int(sample.loss_mask.sum()) for sample in samples]
    groups = _groups(samples, trained)
    largest = max(len(group.members) for group in groups)
    best: list[_Bin] | None = None
    size = min(largest, rules.max_samples or largest)
    while size:
        pieces = [piece for group in groups for piece in _tear(group, size, trained)]
        bins = _pack(pieces, rules, trained, len(samples))
        if best is None or _is_better(bins, best, rules.ranks):
            best = bins
        if rules.ranks == 1 and len(best) == _fewest(pieces, rules, len(samples)):
            break
        size //= 2
    assert best is not None, "a largest group has at least one sample"
    chosen = [sorted(member for piece in one.pieces for member in piece.members) for one in best if one.pieces]
    return tuple(tuple(samples[member] for member in members) for members in sorted(chosen))


def _groups(samples: Sequence[TrainingSample], trained: Sequence[int]) -> list[_Piece]:
    """Samples by prompt: same group and, to be sure, same tokens."""
    places: dict[tuple[int, bytes], list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault((sample.group_id, sample.prompt_ids.tobytes()), []).append(place)
    groups = []
    for key, members in places.items():
        lengths = [input_length(samples[member]) for member in members]
        groups.append(
            _Piece(
                members=tuple(members),
                keys=tuple(None if length is None else key for length in lengths),
                prompts=tuple(0 if length is None else len(samples[members[0]].prompt_ids) for length in lengths),
                bodies=tuple(length or 0 for length in lengths),
                trained=sum(trained[member] for member in members),
            )
        )
    return groups


def _tear(piece: _Piece, size: int, trained: Sequence[int]) -> list[_Piece]:
    """Pieces of at most `size` samples, of nearly equal numbers of them."""
    count = -(-len(piece.members) // size)
    if count == 1:
        return [piece]
    return [piece.part(places.tolist(), trained) for places in np.array_split(np.arange(len(piece.members)), count)]


def _pack(pieces: Sequence[_Piece], rules: CutRules, trained: Sequence[int], num_samples: int) -> list[_Bin]:
    """The fewest bins, in multiples of the ranks, that the longest-first rule can do with."""
    count = rules.ranks * max(1, -(-_fewest(pieces, rules, num_samples) // rules.ranks))
    while True:
        bins = _fill(pieces, rules, trained, count)
        if bins is not None:
            return bins
        assert count < num_samples + rules.ranks, "every sample fits a bin of its own"
        count += rules.ranks


def _fewest(pieces: Sequence[_Piece], rules: CutRules, num_samples: int) -> int:
    """No fewer bins than this can do."""
    by_samples = 1 if rules.max_samples is None else -(-num_samples // rules.max_samples)
    if rules.max_tokens is None:
        return by_samples
    prompts: dict[tuple[int, bytes], int] = {}
    for piece in pieces:
        prompts |= {key: p for key, p in zip(piece.keys, piece.prompts, strict=True) if key}
    once = sum(prompts.values())
    each = sum(sum(piece.prompts) for piece in pieces)
    tokens = (each if rules.padded or rules.share is SharePrompt.NEVER else once) + sum(
        sum(piece.bodies) for piece in pieces
    )
    # A sample longer than the budget fills one bin however long it is.
    excess = sum(
        max(0, p + b - rules.max_tokens) for piece in pieces for p, b in zip(piece.prompts, piece.bodies, strict=True)
    )
    return max(by_samples, -(-max(tokens - excess, 1) // rules.max_tokens))


def _fill(pieces: Sequence[_Piece], rules: CutRules, trained: Sequence[int], count: int) -> list[_Bin] | None:
    """Longest first onto the least loaded bin with room; what fits nowhere is halved. None when even that fails."""
    bins = [_Bin(rules=rules) for _ in range(count)]
    # No two pieces share a member, so pieces themselves are never compared.
    waiting = [(-_cost(piece, rules), piece.members, piece) for piece in pieces]
    heapq.heapify(waiting)
    while waiting:
        piece = heapq.heappop(waiting)[-1]
        room = [one for one in bins if one.fits(piece)]
        if room:
            min(room, key=lambda one: one.cost).add(piece)
        elif len(piece.members) > 1:
            for half in _tear(piece, -(-len(piece.members) // 2), trained):
                heapq.heappush(waiting, (-_cost(half, rules), half.members, half))
        else:
            return None
    return bins


def _is_better(bins: Sequence[_Bin], than: Sequence[_Bin], ranks: int) -> bool:
    """Fewer micro-batches, or clearly less work for the busiest rank."""
    if len(bins) != len(than):
        return len(bins) < len(than)
    return _busiest(bins, ranks) < _TORN_GAIN * _busiest(than, ranks)


def _busiest(bins: Sequence[_Bin], ranks: int) -> float:
    """Work of the rank that has most when bins are dealt out."""
    costs = [one.cost for one in bins]
    return max(sum(costs[place] for place in share) for share in _deal(costs, ranks, equal=True))


def _deal(costs: Sequence[float], ranks: int, *, equal: bool) -> list[list[int]]:
    """Places [R][...] of items, dealt largest first to the rank with the least work so far.

    With `equal` no rank gets more than its share of the number of items. Ascending within a rank.
    """
    most = -(-len(costs) // ranks) if equal else len(costs)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        rank = min((r for r in range(ranks) if len(hands[r]) < most), key=lambda r: (loads[r], len(hands[r]), r))
        hands[rank].append(place)
        loads[rank] += costs[place]
    return [sorted(hand) for hand in hands]


def train_batch(
    samples: Sequence[TrainingSample], *, step: int, rules: CutRules, is_last_update: bool = True
) -> TrainBatch:
    """One update on some samples, with its totals."""
    micro_batches = cut_samples(samples, rules)
    kept = [int(sample.surrogate_mask.sum()) for sample in samples if sample.surrogate_mask is not None]
    assert len(kept) in {0, len(samples)}, "all samples of an update have a surrogate mask, or none has"
    return TrainBatch(
        step=step,
        micro_batches=micro_batches,
        num_valid_tokens=sum(int(sample.loss_mask.sum()) for sample in samples),
        num_samples=len(samples),
        num_micro_batches=len(micro_batches),
        num_surrogate_tokens=sum(kept) if kept else None,
        is_last_update=is_last_update,
    )


def split_updates(
    samples: Sequence[TrainingSample], *, step: int, updates: int, iterations: int = 1, seed: int, rules: CutRules
) -> tuple[TrainBatch, ...]:
    """Slices of one generation batch, each for an optimizer update of its own.

    Groups are put in a random order and stay whole (TRL shuffles completions): a slice then learns from all
    completions of a prompt, and their prompt is computed once. Slices hold equally many completions, give or take one;
    a group is torn only where a slice ends within it. Later iterations go through the same slices again. With one
    slice the order is left as it is.

    Args:
        samples: of one generation batch.
        step: 1-based step all the updates belong to.
        updates: slices.
        iterations: times each slice is trained on (`num_iterations`).
        seed: with the step, it decides on the order.
        rules: how each slice is cut into micro-batches.

    Returns:
        ``updates * iterations`` batches; the last one has `is_last_update`.
    """
    assert 1 <= updates <= len(samples), f"every update needs a sample: {updates} updates, {len(samples)} samples"
    assert iterations >= 1, "every slice is trained on at least once"
    order = list(range(len(samples)))
    if updates > 1:
        groups: dict[int, list[int]] = {}
        for place, sample in enumerate(samples):
            groups.setdefault(sample.group_id, []).append(place)
        shuffled = np.random.default_rng([seed, step]).permutation(len(groups))
        whole = list(groups.values())
        order = [place for number in shuffled for place in whole[number]]
    slices = [
        train_batch([samples[i] for i in places], step=step, rules=rules, is_last_update=False)
        for places in np.array_split(order, updates)
    ]
    batches = slices * iterations
    batches[-1] = dataclasses.replace(batches[-1], is_last_update=True)
    return tuple(batches)


def shard(batch: TrainBatch, *, ranks: int, equal: bool) -> list[TrainBatch]:
    """One batch per rank, with the totals of the whole: micro-batches are dealt out as they are.

    Args:
        batch: cut for this many ranks, so that its micro-batches can be dealt out evenly.
        ranks: how many there are.
        equal: every rank must make equally many passes (DeepSpeed's ZeRO): ranks with fewer micro-batches get empty
            ones at the end, which are not counted in `num_micro_batches`.
    """
    assert ranks >= 1, "there is at least one rank"
    rules = CutRules()
    costs = []
    for micro_batch in batch.micro_batches:
        one = _Bin(rules=rules)
        for piece in _groups(micro_batch, [int(sample.loss_mask.sum()) for sample in micro_batch]):
            one.add(piece)
        costs.append(one.cost)
    hands = _deal(costs, ranks, equal=equal)
    most = max(len(hand) for hand in hands)
    shards = []
    for hand in hands:
        parts = [batch.micro_batches[place] for place in hand]
        if equal:
            parts += [()] * (most - len(parts))
        shards.append(dataclasses.replace(batch, micro_batches=tuple(parts)))
    return shards
