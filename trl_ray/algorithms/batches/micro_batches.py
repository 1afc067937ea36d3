"""Cutting what a step trains on into updates, the update into micro-batches, and dealing these out to ranks.

    samples --split_updates--> TrainBatch x U x iterations --shard--> TrainBatch x R
                   each cut by `cut_samples`: R * k micro-batches of nearly equal work, within a budget

A group that is torn apart costs its prompt again and is torn only where ranks become more even by it
(`algorithms/batches/work_sharing.py`). Everything here is deterministic, and no sample is ever dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from trl_ray.algorithms.batches.work_sharing import (
    Bin,
    CutRules,
    Piece,
    assign_to_ranks,
    fewest,
    pack,
    piece_of,
    prompt_key,
    split_piece,
)
from trl_ray.types import TrainBatch, TrainingSample

__all__ = ["CutRules", "MicroBatch", "cut_samples", "filled", "shard", "split_updates", "train_batch"]

MicroBatch: TypeAlias = tuple[TrainingSample, ...]
TotalsOf: TypeAlias = Callable[[Sequence[TrainingSample]], Mapping[str, float]]
"""From the samples of a whole update to the denominators that its loss names (`Loss.totals`)."""
_TORN_GAIN = 0.98
"""Groups are torn into smaller pieces only if the busiest rank's work shrinks to this."""


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
    best: list[Bin] | None = None
    size = min(largest, rules.max_samples or largest)
    # Whole groups first, then halves, quarters, ...: each tear costs a prompt that is computed again.
    while size:
        pieces = [piece for group in groups for piece in split_piece(group, size, trained)]
        bins = pack(pieces, rules, trained)
        if best is None or _is_better(bins, best, rules.ranks):
            best = bins
        # One rank gains nothing from evenness, and there is no cut into fewer.
        if rules.ranks == 1 and len(best) == fewest(pieces, rules):
            break
        size //= 2
    assert best is not None, "a largest group has at least one sample"
    return filled(best, samples)


def filled(bins: Sequence[Bin], samples: Sequence[TrainingSample]) -> tuple[MicroBatch, ...]:
    """What is in the bins, in the order of the samples; empty ones are left out."""
    chosen = [sorted(member for piece in one.pieces for member in piece.members) for one in bins if one.pieces]
    return tuple(tuple(samples[member] for member in members) for members in sorted(chosen))


def _groups(samples: Sequence[TrainingSample], trained: Sequence[int]) -> list[Piece]:
    """Samples by prompt."""
    places: dict[tuple[int, bytes], list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(prompt_key(sample), []).append(place)
    return [piece_of(samples, members, trained) for members in places.values()]


def _is_better(bins: Sequence[Bin], than: Sequence[Bin], ranks: int) -> bool:
    """Fewer micro-batches, or clearly less work for the busiest rank."""
    if len(bins) != len(than):
        return len(bins) < len(than)
    return _busiest(bins, ranks) < _TORN_GAIN * _busiest(than, ranks)


def _busiest(bins: Sequence[Bin], ranks: int) -> float:
    """Work of the rank that has most when bins are dealt out."""
    costs = [one.cost for one in bins]
    return max(sum(costs[place] for place in share) for share in assign_to_ranks(costs, ranks, equal=True))


def train_batch(
    samples: Sequence[TrainingSample],
    *,
    step: int,
    rules: CutRules,
    is_last_update: bool = True,
    totals_of: TotalsOf | None = None,
) -> TrainBatch:
    """One update on some samples, with its totals; `totals_of` adds those of its loss, a first pass needs none."""
    micro_batches = cut_samples(samples, rules)
    # Counted over the whole update, since a micro-batch sees only its own masks.
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
        totals={} if totals_of is None else dict(totals_of(samples)),
    )


def split_updates(
    samples: Sequence[TrainingSample],
    *,
    step: int,
    updates: int,
    iterations: int = 1,
    seed: int,
    rules: CutRules,
    totals_of: TotalsOf | None = None,
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
        totals_of: what the loss divides each slice by, beside the totals of every batch.

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
        # From seed and step alone, so that a step that is done again after a resume is cut as it was.
        shuffled = np.random.default_rng([seed, step]).permutation(len(groups))
        whole = list(groups.values())
        order = [place for number in shuffled for place in whole[number]]
    slices = [
        train_batch([samples[i] for i in places], step=step, rules=rules, is_last_update=False, totals_of=totals_of)
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
    # The cut stands; costs only say who gets what, for which the sizes of a usual model do.
    rules = CutRules()
    costs = []
    for micro_batch in batch.micro_batches:
        one = Bin(rules=rules)
        for piece in _groups(micro_batch, [int(sample.loss_mask.sum()) for sample in micro_batch]):
            one.add(piece)
        costs.append(one.cost)
    hands = assign_to_ranks(costs, ranks, equal=equal)
    most = max(len(hand) for hand in hands)
    shards = []
    for hand in hands:
        parts = [batch.micro_batches[place] for place in hand]
        if equal:
            # Ranks that exchange data in each pass would wait for ever for one with fewer passes.
            parts += [()] * (most - len(parts))
        shards.append(dataclasses.replace(batch, micro_batches=tuple(parts)))
    return shards
