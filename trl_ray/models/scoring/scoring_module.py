"""Models as one module each, from token ids to what their heads say where something is predicted.

    [R,T] --base model--> hidden [R,T,H] --predictors--> [N,H] --head--> logprobs, entropy, ... [N]
          embeddings [+ noise]                                  (models.classifier: class logits [N,C])
                                 a teacher's [N',H'] and its head --^ divergence over the vocabulary [N']

Whatever wraps modules, as sharded training does, can so wrap the whole of it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_ray.algorithms.batches.layout import Segment
from trl_ray.algorithms.head.divergence import HeadInput, vocabulary_divergence
from trl_ray.algorithms.head.head_problem import ExtraOutputs
from trl_ray.algorithms.head.logprobs import TokenLogprobs, token_logprobs
from trl_ray.models.scoring.embedding_noise import noisy_embeddings
from trl_ray.models.scoring.head import head_module, head_modules, hidden_states, logit_transform

_EXTRAS = (
    "sum_squared_probs",
    "top1",
    "mean_logprobs",
    "top_ids",
    "top_logprobs",
    "support_logprobs",
    "divergence",
)
"""What may follow log-probs and entropies, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DivergenceTarget:
    """A teacher at N' of the N tokens, whose distance over the whole vocabulary is asked for."""

    states: Tensor
    """[N', H'] hidden states of the teacher, which predict the same tokens."""
    places: Tensor
    """[N'] int64 which of the N tokens these are."""
    beta: float
    """Of the divergence, from 0 to 1."""
    module: ScoringModule | None = None
    """Whose head reads the states; None: the one that is asked."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadQuestion:
    """What a language-model head is asked for a teacher's sake, beside what its loss asks in every pass."""

    support: Tensor | None = None
    """[N, S] further tokens; an id outside the vocabulary stands for none."""
    top_k: int = 0
    """How many of its most probable tokens to name, with differentiable log-probs."""
    divergence_target: DivergenceTarget | None = None

    def extras(self, always: ExtraOutputs) -> ExtraOutputs:
        """The extra outputs of a pass, from those of every pass."""
        return replace(always, top_k=self.top_k, top_gradient=self.top_k > 0)


class PredictorModule(nn.Module):
    """A model with its head: what both kinds of heads have in common.

    Args:
        policy: the model.
        bf16: run matrix products in bfloat16.
    """

    pooling_pad: int | None = None
    """Id of the padding token, where the model reads a sequence at its last token that is another."""

    def __init__(self, policy: PreTrainedModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self.bf16 = bf16

    def states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        predictors: Tensor,
        segments: tuple[Segment, ...] | None,
        noise: Tensor | None,
    ) -> Tensor:
        """Hidden states [N, H] at the predictors [N]; `noise` [R, T] is how far embeddings are shaken."""
        # An argument, so that layers which are computed again for their gradients have it then, too.
        told: dict[str, Any] = {} if segments is None else {"segments": segments}
        with (
            torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=self.bf16),
            nullcontext() if noise is None else noisy_embeddings(self.policy, noise),
        ):
            states = hidden_states(
                self.policy, input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **told
            )
        # The head is not asked about prompts: only where a trained token is predicted.
        return states.flatten(0, 1).index_select(0, predictors)


class ScoringModule(PredictorModule):
    """A policy as one module from token ids to log-probs.

    The head is called as a module too: sharded training gathers the weights of modules around their forward passes.

    Args:
        policy: a causal language model with a linear head.
        chunk_size: vocabulary entries projected at a time; None lets the device decide.
        bf16: run matrix products in bfloat16.
        vocab_size: entries of the head that count, the first ones; None: all.
    """

    def __init__(
        self, policy: PreTrainedModel, *, chunk_size: int | None, bf16: bool = False, vocab_size: int | None = None
    ) -> None:
        super().__init__(policy, bf16=bf16)
        self._chunk_size, self._vocab_size = chunk_size, vocab_size
        self._transform = logit_transform(policy)
        for head in head_modules(policy):
            self._teach(head)

    def _teach(self, head: nn.Linear) -> None:
        """Let a head answer for targets, too."""
        # Kept: called without targets, as the model itself does, the head goes on giving logits.
        plain = head.forward

        def forward(
            hidden: Tensor,
            targets: Tensor | None = None,
            temperature: float = 1.0,
            extras: ExtraOutputs | None = None,
            question: HeadQuestion | None = None,
        ) -> Any:
            """The head as it was; with targets, their log-probs and entropies instead of logits."""
            if targets is None:
                return plain(hidden)
            return self._score(hidden, targets, temperature, extras or ExtraOutputs(), question or HeadQuestion())

        setattr(head, "forward", forward)  # noqa: B010  (a plain assignment to a method upsets type checkers)

    def _score(
        self, hidden: Tensor, targets: Tensor, temperature: float, extras: ExtraOutputs, question: HeadQuestion
    ) -> tuple[Tensor, ...]:
        own = self.head_input(hidden)
        scores = token_logprobs(
            hidden,
            own.weight,
            targets,
            support=question.support,
            bias=own.bias,
            temperature=temperature,
            chunk_size=self._chunk_size,
            compute_dtype=self._compute_dtype,
            transform=self._transform,
            extras=question.extras(extras),
        )
        if question.divergence_target is not None:
            scores = replace(scores, divergence=self._divergence(own, question.divergence_target, temperature))
        found = [getattr(scores, name) for name in _EXTRAS]
        # A tuple, since hooks of sharded training look for tensors in tuples and not in classes of ours.
        return (scores.logprobs, scores.entropy, *(value for value in found if value is not None))

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.bf16 else None

    def head_input(self, hidden: Tensor) -> HeadInput:
        """Hidden states [N, H] with the head that reads them, of the vocabulary that counts."""
        head = head_module(self.policy)
        found = HeadInput(hidden=hidden, weight=head.weight, bias=head.bias, transform=self._transform)
        return found if self._vocab_size is None else _cut(found, self._vocab_size)

    def _divergence(self, own: HeadInput, divergence_target: DivergenceTarget, temperature: float) -> Tensor:
        """[N'] over the entries that both heads have: vocabularies are padded to different lengths."""
        other = (divergence_target.module or self).head_input(divergence_target.states)
        shared = min(own.weight.shape[0], other.weight.shape[0])
        return vocabulary_divergence(
            _cut(replace(own, hidden=own.hidden.index_select(0, divergence_target.places)), shared),
            _cut(other, shared),
            beta=divergence_target.beta,
            temperature=temperature,
            chunk_size=self._chunk_size,
            compute_dtype=self._compute_dtype,
        )

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        predictors: Tensor | None,
        targets: Tensor | None,
        temperature: float,
        segments: tuple[Segment, ...] | None = None,
        extras: ExtraOutputs | None = None,
        noise: Tensor | None = None,
        question: HeadQuestion | None = None,
        states: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What the head says of `targets` [N], predicted at `predictors` [N] of the [R, T] inputs.

        Args:
            input_ids, position_ids, attention_mask, predictors, segments, noise: see `states`; not read where `states`
                are given.
            targets: [N] token ids; None gives the hidden states alone.
            temperature: the logits are divided by it.
            extras: what else to compute in every pass.
            question: what else to compute in this one.
            states: [N, H] hidden states, where these are known already.

        Returns:
            Log-probs [N], entropies [N], and each of the extras asked for; `token_scores` gives them names.
        """
        if states is None:
            assert input_ids is not None and position_ids is not None and predictors is not None, "inputs, or states"
            states = self.states(input_ids, position_ids, attention_mask, predictors, segments, noise)
        # The head is asked later (`judge`), as what it is asked may depend on the other side's answer.
        if targets is None:
            return (states,)
        scores: tuple[Tensor, ...] = head_module(self.policy)(
            states, targets=targets, temperature=temperature, extras=extras, question=question
        )
        return scores


def _cut(given: HeadInput, size: int) -> HeadInput:
    """The first entries of a vocabulary."""
    if given.weight.shape[0] <= size:
        return given
    return replace(given, weight=given.weight[:size], bias=None if given.bias is None else given.bias[:size])


def token_scores(
    outputs: tuple[Tensor, ...], extras: ExtraOutputs, question: HeadQuestion | None = None
) -> TokenLogprobs:
    """The outputs of a `ScoringModule` by their names."""
    logprobs, entropy, *others = outputs
    question = question or HeadQuestion()
    asked = {
        "sum_squared_probs": extras.sum_squared_probs,
        "top1": extras.top1,
        "mean_logprobs": extras.mean_logprobs,
        "top_ids": question.top_k > 0,
        "top_logprobs": question.top_k > 0,
        "support_logprobs": question.support is not None,
        "divergence": question.divergence_target is not None,
    }
    names = [name for name in _EXTRAS if asked[name]]
    return TokenLogprobs(logprobs=logprobs, entropy=entropy, **dict(zip(names, others, strict=True)))
