"""Models as one module each, from token ids to what their heads say where something is predicted.

    [R,T] --base model--> hidden [R,T,H] --predictors--> [N,H] --head--> logprobs, entropy, ... [N]
          embeddings [+ noise]                                  (models.classifier: class logits [N,C])

Whatever wraps modules, as sharded training does, can so wrap the whole of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_ray.algorithms.head_problem import ExtraOutputs
from trl_ray.algorithms.layout import Segment
from trl_ray.algorithms.logprobs import TokenLogprobs, token_logprobs
from trl_ray.models.embedding_noise import noisy_embeddings
from trl_ray.models.head import head_module, hidden_states, logit_transform

_EXTRAS = ("sum_squared_probs", "top1", "mean_logprobs")
"""What may follow log-probs and entropies, in this order."""


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
            noisy_embeddings(self.policy, noise),
        ):
            states = hidden_states(
                self.policy, input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **told
            )
        return states.flatten(0, 1).index_select(0, predictors)


class ScoringModule(PredictorModule):
    """A policy as one module from token ids to log-probs.

    The head is called as a module too: sharded training gathers the weights of modules around their forward passes.

    Args:
        policy: a causal language model with a linear head.
        chunk_size: vocabulary entries projected at a time; None lets the device decide.
        bf16: run matrix products in bfloat16.
    """

    def __init__(self, policy: PreTrainedModel, *, chunk_size: int | None, bf16: bool = False) -> None:
        super().__init__(policy, bf16=bf16)
        self._chunk_size = chunk_size
        self._transform = logit_transform(policy)
        head = head_module(policy)
        plain = head.forward

        def forward(
            hidden: Tensor,
            targets: Tensor | None = None,
            temperature: float = 1.0,
            extras: ExtraOutputs | None = None,
        ) -> Any:
            """The head as it was; with targets, their log-probs and entropies instead of logits."""
            return plain(hidden) if targets is None else self._score(head, hidden, targets, temperature, extras)

        setattr(head, "forward", forward)  # noqa: B010  (a plain assignment to a method upsets type checkers)

    def _score(
        self, head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float, extras: ExtraOutputs | None
    ) -> tuple[Tensor, ...]:
        scores = token_logprobs(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            temperature=temperature,
            chunk_size=self._chunk_size,
            compute_dtype=torch.bfloat16 if self.bf16 else None,
            transform=self._transform,
            extras=extras,
        )
        found = [getattr(scores, name) for name in _EXTRAS]
        return (scores.logprobs, scores.entropy, *(value for value in found if value is not None))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        predictors: Tensor,
        targets: Tensor,
        temperature: float,
        segments: tuple[Segment, ...] | None = None,
        extras: ExtraOutputs | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What the head says of `targets` [N], predicted at `predictors` [N] of the [R, T] inputs.

        Returns:
            Log-probs [N], entropies [N], and [N] for each of the extras asked for; `token_scores` gives them names.
        """
        chosen = self.states(input_ids, position_ids, attention_mask, predictors, segments, noise)
        scores: tuple[Tensor, ...] = head_module(self.policy)(
            chosen, targets=targets, temperature=temperature, extras=extras
        )
        return scores


def token_scores(outputs: tuple[Tensor, ...], extras: ExtraOutputs) -> TokenLogprobs:
    """The outputs of a `ScoringModule` by their names."""
    logprobs, entropy, *others = outputs
    asked = [name for name in _EXTRAS if getattr(extras, name)]
    return TokenLogprobs(logprobs=logprobs, entropy=entropy, **dict(zip(asked, others, strict=True)))
