"""From whole examples to batches: of an update, of the mismatched completions of KTO, of what a reference is asked.

    examples --example_batch--> TrainBatch --learner.step--> an update
             --mismatched_batch--> TrainBatch --learner.score--> SampleScores --mismatched_kl--> totals["kl"]
             --reference_batch--> TrainBatch --learner.reference_logprobs--> [L] each --example_references--> floats

An example is never torn: chosen and rejected stand side by side in one micro-batch, pieces of a packed row in one row.
Everything here is deterministic, and no example is ever dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from trl_ray.algorithms.batches.micro_batches import MicroBatch, filled
from trl_ray.algorithms.batches.sequences import TokenSequences, sequence_logprobs, trained_tokens
from trl_ray.algorithms.batches.work_sharing import CutRules, pack, piece_of
from trl_ray.algorithms.preference.unpaired_preference import kl_estimate
from trl_ray.types import Example, FloatArray, SampleLabel, SampleScores, TrainBatch, TrainingSample


def example_batch(
    examples: Sequence[Example], *, step: int, rules: CutRules, totals: Mapping[str, float] | None = None
) -> TrainBatch:
    """One update on some examples.

    Args:
        examples: of all ranks.
        step: 1-based; of no meaning for an evaluation.
        rules: how it is cut into micro-batches; `max_examples` and `max_tokens` count.
        totals: `Loss.totals` of the samples, and what a first pass found out (`mismatched_kl`).
    """
    return _batch([example.samples for example in examples], step=step, rules=rules, totals=totals or {})


def cut_examples(examples: Sequence[Sequence[TrainingSample]], rules: CutRules) -> tuple[MicroBatch, ...]:
    """Cut samples, example by example, into micro-batches of nearly equal work, as few as the rules allow.

    Their number is a multiple of `rules.ranks`, unless there are fewer examples than ranks. Largest examples go first,
    each to the micro-batch with the least work that has room; those of one micro-batch keep their order.
    """
    samples = [sample for example in examples for sample in example]
    trained = [int(sample.loss_mask.sum()) for sample in samples]
    pieces, start = [], 0
    for example in examples:
        pieces.append(piece_of(samples, range(start, start + len(example)), trained, whole=True))
        start += len(example)
    # No smaller pieces are tried, as they are for groups: what a loss compares must meet in one forward pass.
    return filled(pack(pieces, rules, trained), samples) if pieces else ()


def mismatched_batch(examples: Sequence[Example], *, step: int, rules: CutRules) -> TrainBatch:
    """The mismatched completions of an update, for `learner.score`; its samples are in no particular order."""
    mismatched = [example.mismatched for example in examples]
    found = [sample for sample in mismatched if sample is not None]
    assert len(found) == len(examples) > 0, "every example has a mismatched completion"
    return _batch([(sample,) for sample in found], step=step, rules=rules, totals={})


def mismatched_kl(batch: TrainBatch, scores: Sequence[SampleScores]) -> float:
    """KTO's estimate of the KL in nats: `TrainBatch.totals["kl"]` of the update whose `mismatched_batch` was scored.

    Args:
        batch: of mismatched completions; references in their labels are used where there are any.
        scores: of its samples, in its order; with the reference where labels do not have it.
    """
    policy, reference = [], []
    for sample, score in zip(batch.samples, scores, strict=True):
        known = None if sample.label is None else sample.label.reference
        if known is None:
            assert score.reference_logprobs is not None, "the estimate needs log-probs of the reference"
            # In float64, as the estimate is a small difference of two large sums.
            known = float(score.reference_logprobs[sample.loss_mask].sum(dtype="float64"))
        policy.append(float(score.logprobs[sample.loss_mask].sum(dtype="float64")))
        reference.append(known)
    return kl_estimate(torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64))


def reference_batch(examples: Sequence[Example], *, rules: CutRules) -> TrainBatch:
    """All completions that the reference is asked about before training, the mismatched ones with their examples."""
    return _batch([asked_of(example) for example in examples], step=1, rules=rules, totals={})


def example_references(
    examples: Sequence[Example], batch: TrainBatch, answers: Sequence[FloatArray], *, ld_alpha: float | None = None
) -> list[tuple[float, ...]]:
    """What is kept of a reference: one number in nats for each completion, as the loss sums it.

    Args:
        examples: those of the batch.
        batch: `reference_batch` of them.
        answers: of `learner.reference_logprobs`: [L] for each of its samples, in its order.
        ld_alpha: that of the loss (`PreferenceLossConfig.ld_alpha`); examples are pairs then.

    Returns:
        Per example, the numbers of its samples and then of the mismatched one, if it has one: what `with_references`
        takes.
    """
    # By identity: the batch holds the same objects, cut and ordered anew.
    known = {id(sample): answer for sample, answer in zip(batch.samples, answers, strict=True)}
    return [
        _sums(asked_of(example), [known[id(sample)] for sample in asked_of(example)], ld_alpha=ld_alpha)
        for example in examples
    ]


def with_references(example: Example, values: Sequence[float]) -> Example:
    """The example with `label.reference` at all its samples; `values` are those of `example_references`."""
    labelled = [
        dataclasses.replace(sample, label=dataclasses.replace(sample.label or SampleLabel(), reference=value))
        for sample, value in zip(asked_of(example), values, strict=True)
    ]
    count = len(example.samples)
    mismatched = labelled[count] if example.mismatched is not None else None
    return dataclasses.replace(example, samples=tuple(labelled[:count]), mismatched=mismatched)


def _batch(
    examples: Sequence[Sequence[TrainingSample]], *, step: int, rules: CutRules, totals: Mapping[str, float]
) -> TrainBatch:
    micro_batches = cut_examples(examples, rules)
    samples = [sample for example in examples for sample in example]
    return TrainBatch(
        step=step,
        micro_batches=micro_batches,
        num_valid_tokens=trained_tokens(samples),
        num_samples=len(samples),
        num_micro_batches=len(micro_batches),
        totals=dict(totals),
    )


def asked_of(example: Example) -> tuple[TrainingSample, ...]:
    """What a reference is asked about: the samples of the example, then the mismatched one, if it has one."""
    return example.samples if example.mismatched is None else (*example.samples, example.mismatched)


def _sums(
    samples: Sequence[TrainingSample], logprobs: Sequence[FloatArray], *, ld_alpha: float | None
) -> tuple[float, ...]:
    """Summed as the losses do, in float64."""
    parts = [torch.from_numpy(values[sample.loss_mask]) for sample, values in zip(samples, logprobs, strict=True)]
    counts = torch.tensor([len(part) for part in parts])
    tokens = TokenSequences(
        sample_index=torch.repeat_interleave(torch.arange(len(parts)), counts), num_sequences=len(parts)
    )
    return tuple(sequence_logprobs(torch.cat(parts).double(), tokens, ld_alpha=ld_alpha).tolist())
