"""What losses read off the samples of datasets: pairs, labels, lengths, and what the reference says of a completion.

samples in turn: chosen, rejected, chosen, ... --pairs_of--> (chosen, rejected) x P
label.reference of all, else log-probs [N] of a reference pass --reference_logprobs--> [B]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import sequence_logprobs
from trl_ray.algorithms.loss import LossInputs
from trl_ray.types import SampleLabel, TrainingSample


def pairs_of(samples: Sequence[TrainingSample]) -> list[tuple[TrainingSample, TrainingSample]]:
    """(chosen, rejected) of each pair.

    Raises:
        AssertionError: the samples are no pairs: two in turn must be of the same group.
    """
    assert len(samples) % 2 == 0, f"completions come in pairs, got {len(samples)}"
    pairs = list(zip(samples[::2], samples[1::2], strict=True))
    for chosen, rejected in pairs:
        same = chosen.group_id == rejected.group_id
        assert same, f"a pair is of one example, got {chosen.group_id} and {rejected.group_id}"
    return pairs


def label_of(sample: TrainingSample) -> SampleLabel:
    """The label of a sample that must have one."""
    assert sample.label is not None, f"the loss needs the label of example {sample.group_id}"
    return sample.label


def completion_lengths(inputs: LossInputs) -> Tensor:
    """[B] int64 tokens of each completion: as its label says, else those that are trained."""
    given = [None if sample.label is None else sample.label.length for sample in inputs.samples]
    counts = inputs.tokens.counts()
    # The two differ only where a prompt is empty: nothing predicts the first token then, though it is part of the text.
    if all(length is None for length in given):
        return counts
    known = torch.tensor([0 if length is None else length for length in given], device=counts.device)
    return torch.where(torch.tensor([length is None for length in given], device=counts.device), counts, known)


def reference_logprobs(inputs: LossInputs, *, ld_alpha: float | None) -> Tensor:
    """[B] of the reference, summed as `sequence_logprobs` does: precomputed for all samples, or of a reference pass."""
    # Where labels have them, no reference is held that could be asked (`LossNeeds.reference`).
    known = precomputed_references(inputs.samples)
    if known is not None:
        return inputs.logprobs.detach().new_tensor(known)
    assert inputs.reference_logprobs is not None, "the loss needs log-probs of the reference"
    return sequence_logprobs(inputs.reference_logprobs, inputs.tokens, ld_alpha=ld_alpha)


def precomputed_references(samples: Sequence[TrainingSample]) -> list[float] | None:
    """[B] `label.reference` of samples that all have it; None where one has not."""
    values = [None if sample.label is None else sample.label.reference for sample in samples]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
