"""A teacher that the learner holds, in the kinds there are.

    live       the policy itself, in evaluation mode, without gradient
    base       the initial weights: a frozen copy, or the policy without its adapter
    ema        a copy that is blended with the policy after steps, or the policy with an averaged adapter in its place
    external   another model, frozen

samples --states: in the teacher's context--> [N,H] --judge--> log-probs [N], [N,K]
                                                    --divergence_target--> its side of a divergence over the vocabulary
weights of the policy --after_step--> average --save/load--> step-N/teacher/

Every rank holds a teacher of its own. One that is no copy of the policy has no memory of its own either, but for an
averaged adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.config.sections import ModelConfig, TrainingConfig
from trl_ray.config.teacher_options import AdapterAverage, TeacherKind, TeacherSource
from trl_ray.errors import CheckpointError
from trl_ray.models.adapters.lora import TRAINED, as_reference, lora_layers
from trl_ray.models.adapters.merging import Gather
from trl_ray.models.companions.averaging import (
    AdapterAverageBase,
    Average,
    AverageState,
    FactorAverage,
    LoraFactors,
    Pace,
    ProductAverage,
    WeightAverage,
    lora_factors,
)
from trl_ray.models.policy_loading import Policy, load_policy
from trl_ray.models.scoring.head import head_module
from trl_ray.models.scoring.sample_scorer import SampleScorer, ScoringModule
from trl_ray.models.scoring.scoring_module import DivergenceTarget, HeadQuestion
from trl_ray.types import TrainingSample

FOLDER = "teacher"
"""Below the checkpoint: engines read every weight file of the folder itself."""
_WEIGHTS = "weights.safetensors"
_STEP = "step"


class ResidentTeacher:
    """The policy as it is; the base of those that are something else.

    Args:
        kind: of the teacher.
        policy: what computes, the policy itself or a model of its own.
        scorer: of it.
        module: of it, where it is a model of its own; None: the policy's.
    """

    def __init__(
        self, kind: TeacherKind, policy: Policy, scorer: SampleScorer, *, module: ScoringModule | None = None
    ) -> None:
        self.kind = kind
        self._policy, self._scorer, self._module = policy, scorer, module

    @torch.no_grad()
    def states(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        """Hidden states [N, H] at the trained tokens of samples, each behind the teacher's prompt; None without any."""
        training = self._policy.training
        self._policy.train(False)
        try:
            with self._as_teacher():
                return self._scorer.states([in_context(sample) for sample in samples])
        finally:
            self._policy.train(training)

    @torch.no_grad()
    def judge(self, states: Tensor, targets: Tensor, *, question: HeadQuestion | None = None) -> TokenLogprobs:
        """What the teacher says of tokens [N] behind its hidden states [N, H]; heads are the same with any adapter."""
        return self._scorer.judge(states, targets, question=question)

    def divergence_target(self, states: Tensor, places: Tensor, *, beta: float) -> DivergenceTarget:
        """The teacher's side of a divergence over the whole vocabulary.

        Args:
            states: [N', H] of `states`.
            places: [N'] which of the student's tokens they are.
            beta: from 0 to 1.
        """
        return DivergenceTarget(states=states, places=places, beta=beta, module=self._module)

    def _as_teacher(self) -> AbstractContextManager[None]:
        """While it is open, the policy computes with the teacher's weights."""
        return nullcontext()

    def is_due(self, step: int) -> bool:
        """Whether the teacher moves after this optimizer step, counted from 1."""
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
        raise AssertionError(f"a teacher of kind {self.kind.value} does not move, but was asked to after step {step}")

    def save(self, directory: str | Path) -> None:
        """Write into a checkpoint's folder what cannot be had from elsewhere; on one rank.

        Raises:
            CheckpointError: it cannot be written.
        """

    def load(self, directory: str | Path) -> None:
        """Go on from what `save` wrote; on every rank.

        Raises:
            CheckpointError: it is missing or does not fit.
        """


def in_context(sample: TrainingSample) -> TrainingSample:
    """A sample behind the prompt that its teacher sees."""
    prompt = sample.teacher_prompt_ids
    return sample if prompt is None else replace(sample, prompt_ids=prompt)


class AdapterlessTeacher(ResidentTeacher):
    """What the policy was before its adapter was trained."""

    def _as_teacher(self) -> AbstractContextManager[None]:
        return as_reference(self._policy)


class _AveragedTeacher(ResidentTeacher):
    """A teacher with an average that is kept in checkpoints."""

    _average: Average

    def is_due(self, step: int) -> bool:
        return self._average.is_due(step)

    def save(self, directory: str | Path) -> None:
        write_average(self._average, Path(directory) / FOLDER)

    def load(self, directory: str | Path) -> None:
        read_average(self._average, Path(directory) / FOLDER)


class AveragedTeacher(_AveragedTeacher):
    """A copy of the policy with averaged weights: parameters only, no buffers.

    Args:
        policy: the copy, at the initial weights.
        scorer, module: of the copy.
        pace: how fast it follows.
    """

    def __init__(self, policy: Policy, scorer: SampleScorer, *, module: ScoringModule, pace: Pace) -> None:
        super().__init__(TeacherKind.EMA, policy, scorer, module=module)
        self._average: WeightAverage = WeightAverage(dict(policy.named_parameters()), pace)

    def after_step(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._average.update(step, weights)


class AveragedAdapterTeacher(_AveragedTeacher):
    """The policy with an average in its adapter's place.

    Its layers compute without their adapter, and the average's contribution is added to what they give; so no weight is
    touched, whole or split over ranks.

    Args:
        policy: with an adapter and nothing else that is trained.
        scorer: the policy's own.
        factors: of the policy, whole.
        average: of these.
    """

    def __init__(
        self, policy: Policy, scorer: SampleScorer, *, factors: Mapping[str, LoraFactors], average: AdapterAverageBase
    ) -> None:
        super().__init__(TeacherKind.EMA, policy, scorer)
        self._average: AdapterAverageBase = average
        self._scales = {name: layer.scale for name, layer in factors.items()}
        self._transposed = {name: layer.transposed for name, layer in factors.items()}

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
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


def write_average(average: Average, folder: Path) -> None:
    """Write an average into a folder, which is made when missing.

    Raises:
        CheckpointError: it cannot be written.
    """
    state = average.state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    try:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt", _STEP: str(state.step)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the teacher's average must be written to {folder}, but: {error}. Free space or check permissions; "
            "earlier checkpoints are untouched."
        ) from error


def read_average(average: Average, folder: Path) -> None:
    """Go on from what `write_average` wrote.

    Raises:
        CheckpointError: it is missing, damaged or does not fit.
    """
    file = folder / _WEIGHTS
    try:
        with safe_open(file, framework="pt") as kept:
            step = int((kept.metadata() or {})[_STEP])
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file} must hold the teacher's average, but: {type(error).__name__}: {error}. Resume with the "
            "configuration of the run that wrote it, or use another checkpoint."
        ) from error
    average.restore(AverageState(step=step, tensors=tensors))


def build_resident_teacher(
    source: TeacherSource,
    *,
    model: ModelConfig,
    training: TrainingConfig,
    temperature: float,
    device: torch.device | str,
    policy: Policy,
    scorer: SampleScorer,
    gather: Gather,
) -> ResidentTeacher:
    """The teacher that the options ask for, at its initial weights; collective.

    Args:
        source: its kind, and how it follows the policy.
        model, training: as for the policy.
        temperature: logits are divided by it.
        device: where a copy lives.
        policy: as `load_policy` gave it (`with_reference` where it trains an adapter on and the teacher is its base).
        scorer: of the policy.
        gather: makes parameters of the policy whole.

    Raises:
        ConfigError: an average of an adapter beside which something else is trained.
        ModelError: a model cannot be loaded.
    """
    if source.kind is TeacherKind.LIVE:
        return ResidentTeacher(source.kind, policy, scorer)
    if source.kind is not TeacherKind.EXTERNAL and model.use_peft:
        if source.kind is TeacherKind.BASE:
            return AdapterlessTeacher(source.kind, policy, scorer)
        return _averaged_adapter(source, policy, scorer, gather)
    # Never has gradients, so that there is nothing to recompute for them.
    held = (source.model if source.kind is TeacherKind.EXTERNAL else model).replace(gradient_checkpointing=False)
    copy = load_policy(held, device=device, trainable=False)
    module = ScoringModule(
        copy,
        chunk_size=training.chunk_lm_head_size,
        bf16=held.bf16,
        vocab_size=head_size(policy) if source.kind is TeacherKind.EXTERNAL else None,
    )
    own = SampleScorer(module, share_prompt=training.share_prompt, temperature=temperature)
    if source.kind is TeacherKind.EMA:
        return AveragedTeacher(copy, own, module=module, pace=_pace(source))
    return ResidentTeacher(source.kind, copy, own, module=module)


def head_size(policy: Policy) -> int:
    """Entries of a policy's vocabulary, padding included."""
    return int(head_module(policy).out_features)


def _pace(source: TeacherSource) -> Pace:
    assert source.weights is not None, "a teacher that follows the policy is told how"
    return Pace(rate=source.weights.teacher_update_rate, every=source.weights.teacher_sync_steps)


def _averaged_adapter(
    source: TeacherSource, policy: Policy, scorer: SampleScorer, gather: Gather
) -> AveragedAdapterTeacher:
    assert source.weights is not None, "a teacher that follows the policy is told how"
    kind = FactorAverage if source.weights.teacher_adapter_average is AdapterAverage.FACTORS else ProductAverage
    # Averages take their shapes from factors that are whole.
    with gather([parameter for parameter in policy.parameters() if parameter.requires_grad]):
        factors = lora_factors(policy)
        average = kind(factors, _pace(source))
        return AveragedAdapterTeacher(policy, scorer, factors=factors, average=average)
