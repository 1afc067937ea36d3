"""Cutting and dealing: every sample once, within the budget, evenly, and the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ray.algorithms.batches.layout import AttentionKind, build_layout
from trl_ray.algorithms.batches.micro_batches import CutRules, cut_samples, shard, split_updates, train_batch
from trl_ray.config.sections import SharePrompt
from trl_ray.types import TrainBatch, TrainingSample


def _sample(group: int, prompt: int, body: int, *, trained: bool = True) -> TrainingSample:
    """`body` completion tokens are inputs; the last one is only a target."""
    length = body + 1
    return TrainingSample(
        group_id=group,
        prompt_ids=np.full(prompt, group, dtype=np.int32),
        completion_ids=np.zeros(length, dtype=np.int32),
        loss_mask=np.full(length, trained),
        sampler_logprobs=np.zeros(length, dtype=np.float32),
        advantage=1.0,
        min_version=0,
    )


def _batch(micro_batches: list[list[TrainingSample]]) -> TrainBatch:
    every = [sample for micro_batch in micro_batches for sample in micro_batch]
    return TrainBatch(
        step=1,
        micro_batches=tuple(tuple(micro_batch) for micro_batch in micro_batches),
        num_valid_tokens=sum(int(sample.loss_mask.sum()) for sample in every),
        num_samples=len(every),
        num_micro_batches=len(micro_batches),
    )


def _ids(micro_batches: object) -> list[list[int]]:
    return [[sample.group_id for sample in micro] for micro in micro_batches]  # type: ignore[attr-defined]


@st.composite
def updates(draw: st.DrawFn) -> list[TrainingSample]:
    groups = draw(st.integers(1, 6))
    return [
        _sample(group, prompt, draw(st.integers(0, 60)), trained=draw(st.integers(0, 9)) > 0)
        for group in range(groups)
        for prompt in [draw(st.integers(1, 40))]
        for _ in range(draw(st.integers(1, 6)))
    ]


@st.composite
def rules(draw: st.DrawFn) -> CutRules:
    return CutRules(
        max_samples=draw(st.none() | st.integers(1, 9)),
        max_tokens=draw(st.none() | st.integers(1, 200)),
        ranks=draw(st.integers(1, 4)),
        share=draw(st.sampled_from([SharePrompt.AUTO, SharePrompt.NEVER])),
        padded=draw(st.booleans()),
    )


def _tokens(samples: tuple[TrainingSample, ...], rules: CutRules) -> int:
    """Of the layout that the learner will make."""
    kind = AttentionKind.CAUSAL if rules.padded else AttentionKind.SEGMENTS
    layout = build_layout(samples, share=rules.share, hidden_size=64, attention=kind)
    return 0 if layout is None else layout.input_ids.numel()


@given(updates(), rules())
def test_every_sample_is_in_one_micro_batch_within_the_budget(samples: list[TrainingSample], rules: CutRules) -> None:
    cut = cut_samples(samples, rules)
    assert sorted(id(s) for micro in cut for s in micro) == sorted(id(s) for s in samples)
    places = {id(sample): place for place, sample in enumerate(samples)}
    for micro in cut:
        order = [places[id(sample)] for sample in micro]
        assert order == sorted(order) and order
        assert rules.max_samples is None or len(micro) <= rules.max_samples
        # A sample longer than the budget has a micro-batch of its own; those without trained tokens take no room.
        assert rules.max_tokens is None or _tokens(micro, rules) <= rules.max_tokens or len(micro) == 1
    assert _ids(cut_samples(samples, rules)) == _ids(cut)


def test_a_shared_prompt_counts_once_in_the_budget() -> None:
    samples = [_sample(0, 10, 5) for _ in range(4)]
    assert len(cut_samples(samples, CutRules(max_tokens=30))) == 1
    assert [len(m) for m in cut_samples(samples, CutRules(max_tokens=29))] == [2, 2]
    assert [len(m) for m in cut_samples(samples, CutRules(max_tokens=30, share=SharePrompt.NEVER))] == [2, 2]
    uneven = [_sample(0, 10, 5), _sample(0, 10, 10)]
    assert len(cut_samples(uneven, CutRules(max_tokens=39, padded=True))) == 2
    assert len(cut_samples(uneven, CutRules(max_tokens=40, padded=True))) == 1


def test_pieces_of_a_torn_group_that_meet_again_share_their_prompt() -> None:
    # 10 + 9 + 8 are too many for one; torn into single samples, the last (1) joins one of the others for 1, not 11.
    cut = cut_samples([_sample(0, 10, body) for body in (9, 8, 1)], CutRules(max_tokens=25))
    assert sorted(len(micro) for micro in cut) == [1, 2]


def test_a_sample_longer_than_the_budget_is_trained_alone() -> None:
    samples = [_sample(0, 10, 5), _sample(0, 10, 500), _sample(1, 10, 5)]
    cut = cut_samples(samples, CutRules(max_tokens=100))
    assert sorted(len(micro) for micro in cut) == [1, 2]
    assert next(micro for micro in cut if len(micro) == 1)[0] is samples[1]


def test_groups_stay_together_where_they_fit() -> None:
    samples = [_sample(group, 20, 10) for group in range(6) for _ in range(4)]
    cut = cut_samples(samples, CutRules(max_tokens=120))
    assert len(cut) == 3
    assert all(len(set(ids)) == 2 and len(ids) == 8 for ids in _ids(cut))


def test_a_group_is_torn_only_where_ranks_become_more_even() -> None:
    # One group, two ranks: its prompt is computed twice, yet neither rank idles.
    assert _ids(cut_samples([_sample(0, 8, 50) for _ in range(4)], CutRules(ranks=2))) == [[0, 0], [0, 0]]
    # Two equal groups are even as they are.
    two = [_sample(group, 8, 50) for group in range(2) for _ in range(4)]
    assert _ids(cut_samples(two, CutRules(ranks=2))) == [[0] * 4, [1] * 4]
    # A prompt so long that two of it are more work than one rank has with all.
    assert _ids(cut_samples([_sample(0, 4000, 1) for _ in range(2)], CutRules(ranks=2))) == [[0, 0]]


def test_ranks_get_nearly_equal_work_on_a_realistic_mix() -> None:
    rng = np.random.default_rng(0)
    samples = [
        _sample(group, prompt, int(np.clip(rng.lognormal(np.log(128), 0.8), 16, 512)))
        for group in range(16)
        for prompt in [int(rng.integers(32, 128))]
        for _ in range(8)
    ]
    batch = train_batch(samples, step=1, rules=CutRules(max_samples=16, ranks=4))
    work = []
    for part in shard(batch, ranks=4, equal=True):
        work.append(sum(_tokens(micro, CutRules()) for micro in part.micro_batches))
    assert batch.num_micro_batches == 8
    assert max(work) <= 1.05 * np.mean(work)
    # Dealt out in order instead, as many samples each, the longest rank has a good tenth more.
    in_order = [sum(int(s.loss_mask.sum()) for s in samples[32 * r : 32 * (r + 1)]) for r in range(4)]
    assert max(in_order) > 1.1 * np.mean(in_order)


@given(updates(), rules(), st.booleans())
def test_shards_hold_every_micro_batch_once_and_the_totals_of_all(
    samples: list[TrainingSample], rules: CutRules, equal: bool
) -> None:
    batch = train_batch(samples, step=3, rules=rules)
    shards = shard(batch, ranks=rules.ranks, equal=equal)
    assert len(shards) == rules.ranks
    dealt = [micro for part in shards for micro in part.micro_batches if micro]
    assert sorted(map(id, dealt)) == sorted(map(id, batch.micro_batches))
    for part in shards:
        assert part.num_valid_tokens == sum(int(sample.loss_mask.sum()) for sample in samples)
        assert (part.num_samples, part.num_micro_batches, part.step) == (len(samples), len(batch.micro_batches), 3)
    if equal:
        assert len({len(part.micro_batches) for part in shards}) == 1
        assert len(shards[0].micro_batches) == -(-len(batch.micro_batches) // rules.ranks)


def test_the_largest_micro_batches_go_to_different_ranks_and_empty_ones_are_not_counted() -> None:
    sizes = [100, 10, 80, 20, 30]
    batch = _batch([[_sample(place, 1, size)] for place, size in enumerate(sizes)])
    # 100 to rank 0; 80 and 30 to rank 1; 20 to rank 0, who has less by then; 10 to rank 1.
    uneven = [_ids(part.micro_batches) for part in shard(batch, ranks=2, equal=False)]
    assert uneven == [[[0], [3]], [[1], [2], [4]]]
    equal = shard(batch, ranks=2, equal=True)
    assert [_ids(part.micro_batches) for part in equal] == [[[0], [3], []], [[1], [2], [4]]]
    assert [part.num_micro_batches for part in equal] == [5, 5]


def test_only_where_it_must_does_a_rank_take_as_many_micro_batches_as_another() -> None:
    batch = _batch([[_sample(place, 1, size)] for place, size in enumerate([100, 1, 1, 1])])
    assert [len(part.micro_batches) for part in shard(batch, ranks=2, equal=False)] == [1, 3]
    assert [len(part.micro_batches) for part in shard(batch, ranks=2, equal=True)] == [2, 2]


@given(updates(), rules(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_slices_hold_every_sample_once_per_iteration(
    samples: list[TrainingSample], rules: CutRules, count: int, iterations: int, seed: int
) -> None:
    count = min(count, len(samples))
    batches = split_updates(samples, step=2, updates=count, iterations=iterations, seed=seed, rules=rules)
    assert len(batches) == count * iterations
    assert [batch.is_last_update for batch in batches] == [False] * (len(batches) - 1) + [True]
    for start in range(0, len(batches), count):
        one = batches[start : start + count]
        held = [sample for batch in one for micro in batch.micro_batches for sample in micro]
        assert sorted(map(id, held)) == sorted(map(id, samples))
        assert max(batch.num_samples for batch in one) - min(batch.num_samples for batch in one) <= 1
    for batch in batches:
        held = [sample for micro in batch.micro_batches for sample in micro]
        assert batch.num_samples == len(held) and batch.num_micro_batches == len(batch.micro_batches)
        assert batch.num_valid_tokens == sum(int(sample.loss_mask.sum()) for sample in held)
    again = split_updates(samples, step=2, updates=count, iterations=iterations, seed=seed, rules=rules)
    assert [_ids(batch.micro_batches) for batch in again] == [_ids(batch.micro_batches) for batch in batches]


def test_slices_hold_whole_groups_in_an_order_that_seed_and_step_decide() -> None:
    samples = [_sample(group, 3, 4) for group in range(8) for _ in range(2)]

    def groups(seed: int, step: int) -> list[set[int]]:
        batches = split_updates(samples, step=step, updates=4, seed=seed, rules=CutRules())
        assert all(batch.num_samples == 4 for batch in batches)
        return [{sample.group_id for micro in batch.micro_batches for sample in micro} for batch in batches]

    assert all(len(one) == 2 for one in groups(0, 1))
    assert groups(0, 1) == groups(0, 1)
    assert groups(0, 1) != groups(0, 2) and groups(0, 1) != groups(1, 1)


def test_one_slice_keeps_its_order_and_more_slices_than_samples_are_refused() -> None:
    samples = [_sample(group, 3, 4) for group in (5, 2, 9)]
    (batch,) = split_updates(samples, step=1, updates=1, seed=0, rules=CutRules())
    assert _ids(batch.micro_batches) == [[5, 2, 9]]
    with pytest.raises(AssertionError, match="every update needs a sample"):
        split_updates(samples, step=1, updates=4, seed=0, rules=CutRules())
