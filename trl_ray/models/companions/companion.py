"""A model beside the policy: what its references and the teachers that a learner holds are.

    Companion                 another model, frozen; or the policy itself, as it is
    AdapterlessCompanion      the policy as it was before its adapter was trained
    AveragedCompanion         a copy that is blended with the policy after steps
    AveragedAdapterCompanion  the policy with an averaged adapter in its place

samples --logprobs--> [N]                                                     as a reference: in their own context
samples --states--> [N,H] --judge--> log-probs [N], [N,K]                     as a teacher: in the teacher's context
                          --divergence_target--> its side of a divergence over the vocabulary
weights of the policy --after_step--> average --save/load--> step-N/FOLDER/

Every rank holds its own. One that is no copy of the policy has no memory of its own either, but for an averaged
adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.models.adapters.lora import TRAINED, as_reference, lora_layers
from trl_ray.models.companions.average_file import read_average, write_average
from trl_ray.models.companions.averaging import (
    AdapterAverageBase,
    Average,
    FactorAverage,
    LoraFactors,
    WeightAverage,
)
from trl_ray.models.policy_loading import Policy
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.models.scoring.scoring_module import DivergenceTarget, HeadQuestion
from trl_ray.types import TrainingSample


class Companion:
    """A model that does not follow the policy, or the policy itself; the base of those that are something else.

    Args:
        policy: what computes, the policy itself or a model of its own.
        scorer: of it; a model's head must not be wrapped twice.
        module: of it, where it is a model of its own; None: the policy's.
    """

    def __init__(self, policy: Policy, scorer: SampleScorer, *, module: ScoringModule | None = None) -> None:
        self._policy, self._scorer, self._module = policy, scorer, module

    def logprobs(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        """Log-probs [N] of the trained tokens, in sample order, without gradient; None when there are none."""
        with self._computing():
            return self._scorer.logprobs(samples)

    def states(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        """Hidden states [N, H] at the trained tokens of samples, each behind the teacher's prompt; None without any."""
        with self._computing():
            return self._scorer.states([in_context(sample) for sample in samples])

    @torch.no_grad()
    def judge(self, states: Tensor, targets: Tensor, *, question: HeadQuestion | None = None) -> TokenLogprobs:
        """What it says of tokens [N] behind its hidden states [N, H]."""
        with self._in_place():
            return self._scorer.judge(states, targets, question=question)

    def divergence_target(self, states: Tensor, places: Tensor, *, beta: float) -> DivergenceTarget:
        """Its side of a divergence over the whole vocabulary.

        Args:
            states: [N', H] of `states`.
            places: [N'] which of the student's tokens they are.
            beta: from 0 to 1.
        """
        return DivergenceTarget(states=states, places=places, beta=beta, module=self._module)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Without gradient and dropout, and with this companion's weights."""
        training = self._policy.training
        self._policy.train(False)
        try:
            with torch.no_grad(), self._in_place():
                yield
        finally:
            self._policy.train(training)

    def _in_place(self) -> AbstractContextManager[None]:
        """While it is open, the policy computes with the companion's weights."""
        return nullcontext()

    def is_due(self, step: int) -> bool:
        """Whether it moves after this optimizer step, counted from 1."""
        del step
        return False

    def after_step(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards the policy.

        Args:
            step: one that `is_due`.
            weights: all parameters of the policy, whole, by name; tied ones once. Each is used before the next is asked
                for.
        """
        del weights
        raise AssertionError(f"a {type(self).__name__} does not move, but was asked to after step {step}")

    def save(self, directory: str | Path) -> None:
        """Write into a checkpoint's folder what cannot be had from elsewhere; on one rank.

        Raises:
            CheckpointError: it cannot be written.
        """

    def load(self, directory: str | Path, *, step: int) -> None:
        """Go on from what `save` wrote; on every rank.

        Args:
            directory: of the checkpoint.
            step: of the checkpoint.

        Raises:
            CheckpointError: it is missing or does not fit.
        """


def in_context(sample: TrainingSample) -> TrainingSample:
    """A sample behind the prompt that its teacher sees."""
    prompt = sample.teacher_prompt_ids
    return sample if prompt is None else replace(sample, prompt_ids=prompt)


class AdapterlessCompanion(Companion):
    """What the policy was before its adapter was trained: without one, or with the frozen one it started from."""

    def _in_place(self) -> AbstractContextManager[None]:
        return as_reference(self._policy)


class _MovingCompanion(Companion):
    """One with an average that is kept in checkpoints.

    Args:
        average: what follows the policy.
        folder: below a checkpoint.
        what: whose average it is, in messages.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: SampleScorer,
        *,
        average: Average,
        folder: str,
        what: str,
        module: ScoringModule | None = None,
    ) -> None:
        super().__init__(policy, scorer, module=module)
        self._average, self._folder, self._what = average, folder, what

    def is_due(self, step: int) -> bool:
        return self._average.is_due(step)

    def save(self, directory: str | Path) -> None:
        write_average(Path(directory) / self._folder, self._average.state(), what=self._what)

    def load(self, directory: str | Path, *, step: int) -> None:
        self._average.restore(read_average(Path(directory) / self._folder, what=self._what, step=step).state)


class AveragedCompanion(_MovingCompanion):
    """A copy of the policy with averaged weights: parameters only, no buffers.

    Args:
        policy: the copy, at the initial weights.
        scorer, module: of the copy.
        average: of its parameters.
        folder, what: below a checkpoint, and in messages.
    """

    _average: WeightAverage

    def after_step(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert self.is_due(step), f"{self._what} is not due after step {step}"
        self._average.update(step, weights)


class AveragedAdapterCompanion(_MovingCompanion):
    """The policy with an average in its adapter's place.

    Its layers compute without their adapter, and the average's contribution is added to what they give; so no weight is
    touched, whole or split over ranks.

    Args:
        policy: with an adapter and nothing else that is trained.
        scorer: the policy's own.
        factors: of the policy, whole.
        average: of these.
        folder, what: below a checkpoint, and in messages.
    """

    _average: AdapterAverageBase

    def __init__(
        self,
        policy: Policy,
        scorer: SampleScorer,
        *,
        factors: Mapping[str, LoraFactors],
        average: AdapterAverageBase,
        folder: str,
        what: str,
    ) -> None:
        super().__init__(policy, scorer, average=average, folder=folder, what=what)
        self._scales = {name: layer.scale for name, layer in factors.items()}
        self._transposed = {name: layer.transposed for name, layer in factors.items()}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        layers = lora_layers(self._policy)
        handles = [layers[name].register_forward_hook(_addition(matrices)) for name, matrices in self._parts().items()]
        try:
            with _without_adapter(list(layers.values())):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _parts(self) -> dict[str, tuple[Tensor, ...]]:
        """By layer, matrices whose product, last to first, is added to its weight [out, in]; the scale comes on top."""
        average = self._average
        if isinstance(average, FactorAverage):
            return {name: (layer.down, layer.up * layer.scale) for name, layer in average.factors().items()}
        deltas = {name: average.delta(name) for name in self._scales}
        return {name: (delta.T if self._transposed[name] else delta,) for name, delta in deltas.items()}

    def after_step(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        found = {name: weight.clone() for name, weight in weights if ".lora_A." in name or ".lora_B." in name}
        self._average.update(
            step,
            {
                name: LoraFactors(
                    down=found[f"{name}.lora_A.{TRAINED}.weight"],
                    up=found[f"{name}.lora_B.{TRAINED}.weight"],
                    scale=scale,
                    transposed=self._transposed[name],
                )
                for name, scale in self._scales.items()
            },
        )


def _addition(matrices: tuple[Tensor, ...]) -> Any:
    """A forward hook that adds the product of a layer's inputs and some matrices to what the layer gives."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del layer
        value = inputs[0]
        for matrix in matrices:
            value = nn.functional.linear(value.to(matrix.dtype), matrix)
        return (output + value).to(output.dtype)

    return add


@contextmanager
def _without_adapter(layers: Sequence[Any]) -> Iterator[None]:
    """PEFT's layers compute as the linear ones they stand for."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
