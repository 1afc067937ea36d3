"""Whole examples in micro-batches: none torn, none dropped, even work; first passes over them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervised_batches import packed, pairs, rated, sample, texts
from trl_ray.algorithms.batches.example_batches import (
    asked_of,
    cut_examples,
    example_batch,
    example_references,
    mismatched_batch,
    mismatched_kl,
    reference_batch,
    with_references,
)
from trl_ray.algorithms.batches.micro_batches import shard
from trl_ray.algorithms.batches.work_sharing import CutRules
from trl_ray.config.sections import SharePrompt
from trl_ray.types import Example, SampleScores, TrainingSample


def example(row: int, prompt: int, *completions: int, own_groups: bool = False) -> Example:
    """Of zeros; completions of the given lengths, which are of groups of their own in a packed row."""
    samples = tuple(
        sample(1000 * row + place if own_groups else row, np.zeros(prompt, np.int32), np.zeros(length, np.int32))
        for place, length in enumerate(completions)
    )
    return Example(row=row, samples=samples)


def size_of(one: Example, *, share: SharePrompt = SharePrompt.AUTO) -> int:
    """Tokens of model input, worked out from the layout's rules."""
    seen, total = set(), 0
    for part in one.samples:
        key = (part.group_id, part.prompt_ids.tobytes())
        if key not in seen or share is SharePrompt.NEVER:
            total += len(part.prompt_ids)
        seen.add(key)
        total += len(part.completion_ids) - 1
    return total


lengths = st.integers(1, 30)
examples_of_all_kinds = st.lists(
    st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4), st.booleans()), min_size=1, max_size=12
).map(lambda drawn: [example(row, p, *bodies, own_groups=own) for row, (p, bodies, own) in enumerate(drawn)])


@given(
    examples=examples_of_all_kinds,
    max_examples=st.none() | st.integers(1, 5),
    max_tokens=st.none() | st.integers(1, 120),
    ranks=st.integers(1, 3),
    share=st.sampled_from([SharePrompt.AUTO, SharePrompt.NEVER]),
)
def test_every_example_is_whole_in_one_micro_batch_within_the_budget(
    examples: list[Example], max_examples: int | None, max_tokens: int | None, ranks: int, share: SharePrompt
) -> None:
    rules = CutRules(max_examples=max_examples, max_tokens=max_tokens, ranks=ranks, share=share, max_samples=1)
    cut = cut_examples([one.samples for one in examples], rules)
    home = {id(part): one for one in examples for part in one.samples}
    seen = []
    for micro_batch in cut:
        inside = list({id(home[id(part)]): home[id(part)] for part in micro_batch}.values())
        assert [id(part) for part in micro_batch] == [id(part) for one in inside for part in one.samples]
        assert [one.row for one in inside] == sorted(one.row for one in inside)
        assert max_examples is None or len(inside) <= max_examples
        total = sum(size_of(one, share=share) for one in inside)
        assert max_tokens is None or len(inside) == 1 or total <= max_tokens
        seen += [one.row for one in inside]
    assert sorted(seen) == list(range(len(examples)))
    assert len(cut) % ranks == 0 or len(cut) == len(examples)


def rows(cut: tuple[tuple[TrainingSample, ...], ...]) -> list[list[int]]:
    return [[part.group_id for part in micro_batch] for micro_batch in cut]


def test_an_example_beyond_the_budget_has_a_micro_batch_of_its_own() -> None:
    examples = [example(0, 10, 5, 5), example(1, 200, 9), example(2, 10, 5, 5)]
    cut = cut_examples([one.samples for one in examples], CutRules(max_tokens=36))
    assert rows(cut) == [[0, 0, 2, 2], [1]]  # 10 + 4 + 4 each: the prompt of a pair is counted once
    # A pair that exceeds the budget only as a whole, too, costs one micro-batch and no more.
    examples[1] = example(1, 10, 20, 20)
    cut = cut_examples([one.samples for one in examples], CutRules(max_tokens=36))
    assert rows(cut) == [[0, 0, 2, 2], [1, 1]]
    never = CutRules(max_tokens=36, share=SharePrompt.NEVER)
    assert rows(cut_examples([one.samples for one in examples], never)) == [[0, 0], [1, 1], [2, 2]]


def test_examples_are_counted_not_their_samples() -> None:
    cut = cut_examples([one.samples for one in pairs(1)], CutRules(max_examples=4))
    assert sorted(len(micro_batch) for micro_batch in cut) == [8, 8]


def test_work_is_even_over_ranks() -> None:
    rng = np.random.default_rng(5)
    examples = [example(row, int(rng.integers(1, 100)), *rng.integers(1, 200, 2).tolist()) for row in range(64)]
    batch = example_batch(examples, step=1, rules=CutRules(max_examples=8, ranks=4))
    by_row = {one.row: size_of(one) for one in examples}
    work = [
        sum(by_row[row] for micro in part.micro_batches for row in {one.group_id for one in micro})
        for part in shard(batch, ranks=4, equal=True)
    ]
    assert max(work) < 1.05 * min(work)


def test_a_batch_has_the_totals_of_all_its_samples() -> None:
    batch = example_batch([packed(1)], step=3, rules=CutRules(max_examples=1), totals={"pairs": 2.0})
    trained = sum(int(one.loss_mask.sum()) for one in packed(1).samples)
    assert (batch.step, batch.num_samples, batch.num_micro_batches, batch.num_valid_tokens) == (3, 8, 1, trained)
    assert batch.totals == {"pairs": 2.0} and batch.is_last_update
    assert example_batch([], step=1, rules=CutRules()).micro_batches == ()


def scores_of(one: TrainingSample, logprob: float, reference: float | None) -> SampleScores:
    """The same at all tokens."""
    length = len(one.completion_ids)
    values = np.full(length, logprob, np.float32)
    known = None if reference is None else np.full(length, reference, np.float32)
    return SampleScores(logprobs=values, entropy=np.zeros(length, np.float32), reference_logprobs=known)


def test_the_kl_is_the_mean_over_mismatched_completions_and_never_negative() -> None:
    examples = [
        Example(row=row, samples=(), mismatched=sample(row, np.zeros(2, np.int32), np.zeros(length, np.int32)))
        for row, length in enumerate((2, 4))
    ]
    batch = mismatched_batch(examples, step=1, rules=CutRules(max_examples=1))
    assert batch.num_samples == 2 and len(batch.micro_batches) == 2
    # x = 2 * 0.5 and 4 * 0.5 nats
    assert mismatched_kl(batch, [scores_of(one, -1.0, -1.5) for one in batch.samples]) == pytest.approx(1.5)
    assert mismatched_kl(batch, [scores_of(one, -1.5, -1.0) for one in batch.samples]) == 0.0
    known = [with_references(one, [-1.0]) for one in examples]
    batch = mismatched_batch(known, step=1, rules=CutRules())
    assert mismatched_kl(batch, [scores_of(one, -0.25, None) for one in batch.samples]) == pytest.approx(0.25)
    assert mismatched_kl(batch, [scores_of(one, -0.125, None) for one in batch.samples]) == pytest.approx(0.625)
    with pytest.raises(AssertionError, match="mismatched completion"):
        mismatched_batch(texts(1), step=1, rules=CutRules())


def test_references_come_back_to_their_samples_whatever_the_cut() -> None:
    examples = rated(3)
    batch = reference_batch(examples, rules=CutRules(max_examples=3))
    assert batch.num_samples == 16
    answers = [np.full(len(one.completion_ids), -1.0 - one.group_id, np.float32) for one in batch.samples]
    found = example_references(examples, batch, answers)
    for one, (value, mismatched) in zip(examples, found, strict=True):
        assert one.mismatched is not None
        assert value == -len(one.samples[0].completion_ids) * (1.0 + one.row)
        assert mismatched == -len(one.mismatched.completion_ids) * (1.0 + one.row)
        labelled = with_references(one, (value, mismatched))
        labels = [part.label for part in asked_of(labelled)]
        assert [label.reference for label in labels if label is not None] == [value, mismatched]
        assert labels[0] is not None and labels[0].desirable is (one.row % 2 == 0)


def test_references_of_pairs_weigh_the_tail_of_the_longer_completion() -> None:
    pair = example(0, 3, 2, 5)
    batch = reference_batch([pair], rules=CutRules())
    answers = [np.full(len(one.completion_ids), -1.0, np.float32) for one in batch.samples]
    assert example_references([pair], batch, answers, ld_alpha=0.5) == [(-2.0, -3.5)]
    assert example_references([pair], batch, answers) == [(-2.0, -5.0)]
    untrained = Example(
        row=0,
        samples=(sample(0, np.zeros(2, np.int32), np.zeros(3, np.int32), loss_mask=np.array([True, False, True])),),
    )
    batch = reference_batch([untrained], rules=CutRules())
    assert example_references([untrained], batch, [np.array([-1.0, -9.0, -2.0], np.float32)]) == [(-3.0,)]
