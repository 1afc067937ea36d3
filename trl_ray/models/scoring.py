"""Log-probs of the trained tokens of samples under a model: layout, forward pass, head.

TrainingSample x B --layout--> [R,T] --base model--> hidden [R,T,H] --predictors--> [N,H] --head--> logprobs [N]
                                     |------------------- ScoringModule ---------------------|
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trl_ray.algorithms.layout import AttentionKind, Layout, Segment, additive_mask, build_layout
from trl_ray.algorithms.logprobs import TokenLogprobs, token_logprobs
from trl_ray.config.sections import SharePrompt
from trl_ray.errors import ModelError
from trl_ray.models.head import head_module, hidden_states, logit_transform
from trl_ray.models.load import Policy
from trl_ray.models.segment_attention import SEGMENT_ATTENTION, attention_kind
from trl_ray.types import FloatArray, IntArray, TrainingSample

_PROBE_TOLERANCE = 2e-2
"""Mean difference of probe log-probs in nats that float32 may show; a wrong mask is off by far more."""


class ScoringModule(nn.Module):
    """A policy as one module from token ids to log-probs, so that whatever wraps modules can wrap the whole of it.

    The head is called as a module too: sharded training gathers the weights of modules around their forward passes.

    Args:
        policy: a causal language model with a linear head.
        chunk_size: vocabulary entries projected at a time; None lets the device decide.
        bf16: run matrix products in bfloat16.
    """

    def __init__(self, policy: Policy, *, chunk_size: int | None, bf16: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self._chunk_size = chunk_size
        self.bf16 = bf16
        self._transform = logit_transform(policy)
        head = head_module(policy)
        plain = head.forward

        def forward(hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0) -> Any:
            """The head as it was; with targets, their log-probs and entropies instead of logits."""
            return plain(hidden) if targets is None else self._score(head, hidden, targets, temperature)

        setattr(head, "forward", forward)  # noqa: B010  (a plain assignment to a method upsets type checkers)

    def _score(self, head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scores = token_logprobs(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            temperature=temperature,
            chunk_size=self._chunk_size,
            compute_dtype=torch.bfloat16 if self.bf16 else None,
            transform=self._transform,
        )
        return scores.logprobs, scores.entropy

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        predictors: Tensor,
        targets: Tensor,
        temperature: float,
        segments: tuple[Segment, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs [N] and entropies [N] of `targets` [N], predicted at `predictors` [N] of the [R, T] inputs."""
        # An argument, so that layers which are computed again for their gradients have it then, too.
        told: dict[str, Any] = {} if segments is None else {"segments": segments}
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            states = hidden_states(
                self.policy, input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **told
            )
        chosen = states.flatten(0, 1).index_select(0, predictors)
        logprobs, entropy = head_module(self.policy)(chosen, targets=targets, temperature=temperature)
        return logprobs, entropy


class SampleScorer:
    """Scores samples with one model; without padding, and a group's prompt once, where the model allows it.

    A model with `sdpa` attention gets one that can be told the segments of a row, and keeps it.

    Args:
        module: the model.
        share_prompt: AUTO shares where it saves work.
        temperature: the logits are divided by it.
        forward: what to call instead of `module`, when something wraps it.

    Raises:
        ModelError: `share_prompt` is ALWAYS and the model computes something else in a shared row.
    """

    def __init__(
        self,
        module: ScoringModule,
        *,
        share_prompt: SharePrompt,
        temperature: float,
        forward: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._module = module
        self._model = module.policy
        self._forward = forward or module
        self._share = share_prompt
        self._temperature = temperature
        self._device = head_module(self._model).weight.device
        self._hidden_size = int(self._model.config.get_text_config().hidden_size)
        self._attention = self._prove_attention(attention_kind(self._model))

    @property
    def can_share(self) -> bool:
        """Whether completions of a group may share one computation of their prompt."""
        return self._share is not SharePrompt.NEVER and self._attention in {
            AttentionKind.MASKED,
            AttentionKind.SEGMENTS,
        }

    def score(self, samples: Sequence[TrainingSample]) -> TokenLogprobs | None:
        """Log-probs and entropies [N] of the trained tokens, in sample order; None when there are none."""
        layout = self._lay_out(samples, share=self._share, attention=self._attention)
        return None if layout is None else self._run(layout, temperature=self._temperature)

    @torch.no_grad()
    def sequence_logprobs(self, token_ids: IntArray) -> FloatArray:
        """Log-prob [T-1] of every token of a sequence [T] but its first, at temperature 1."""
        sample = _probe_sample(token_ids[:1], token_ids[1:])
        layout = self._lay_out([sample], share=SharePrompt.NEVER, attention=AttentionKind.CAUSAL)
        if layout is None:
            return np.zeros(0, dtype=np.float32)
        with self._evaluation():
            values: FloatArray = self._run(layout, temperature=1.0).logprobs.cpu().numpy()
        return values

    def _lay_out(
        self, samples: Sequence[TrainingSample], *, share: SharePrompt, attention: AttentionKind
    ) -> Layout | None:
        return build_layout(samples, share=share, hidden_size=self._hidden_size, attention=attention)

    def _run(self, layout: Layout, *, temperature: float) -> TokenLogprobs:
        layout = layout.to(self._device)
        logprobs, entropy = self._forward(
            layout.input_ids,
            layout.position_ids,
            self._mask(layout),
            layout.predictors,
            layout.targets,
            temperature,
            layout.segments,
        )
        return TokenLogprobs(logprobs=logprobs, entropy=entropy)

    def _mask(self, layout: Layout) -> Tensor | None:
        if layout.segments is not None:
            # Anything with four axes keeps transformers from making a mask [T, T] of its own; nobody reads it.
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        if layout.mask is None or self._model.config._attn_implementation in {"sdpa", SEGMENT_ATTENTION}:
            return layout.mask
        return additive_mask(layout.mask, head_module(self._model).weight.dtype)

    @torch.no_grad()
    def _prove_attention(self, kind: AttentionKind) -> AttentionKind:
        """Compare layouts on a made-up group: not every architecture takes masks, positions and arguments of ours."""
        if kind in {AttentionKind.CAUSAL, AttentionKind.RESTARTS}:
            self._refuse("has attention that takes no mask of ours (sliding window or a fused kernel)")
        if kind is AttentionKind.CAUSAL or (kind is AttentionKind.MASKED and self._share is SharePrompt.NEVER):
            return AttentionKind.CAUSAL
        if kind is AttentionKind.SEGMENTS:
            self._model.set_attn_implementation(SEGMENT_ATTENTION)
        share = SharePrompt.NEVER if self._share is SharePrompt.NEVER else SharePrompt.ALWAYS
        prompt = np.array([5, 6, 7, 8], dtype=np.int32)
        group = [_probe_sample(prompt, np.array(ids, dtype=np.int32)) for ids in ([9, 10, 11], [12, 13], [14, 9, 12])]
        scores = []
        with self._evaluation():
            for attention in (kind, AttentionKind.CAUSAL):
                layout = self._lay_out(group, share=share, attention=attention)
                assert layout is not None, "the probe has trained tokens"
                scores.append(self._run(layout, temperature=1.0).logprobs)
        difference = float((scores[0] - scores[1]).abs().mean())
        if difference <= (0.2 if self._is_half() else _PROBE_TOLERANCE):
            return kind
        if kind is AttentionKind.SEGMENTS:
            self._model.set_attn_implementation("sdpa")
        self._refuse(f"is off by {difference:.3g} nats in a shared row")
        return AttentionKind.CAUSAL

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        training = self._model.training
        self._model.train(False)
        try:
            yield
        finally:
            self._model.train(training)

    def _is_half(self) -> bool:
        return self._module.bf16 or head_module(self._model).weight.dtype != torch.float32

    def _refuse(self, why: str) -> None:
        """Sharing is out of the question; an error where it was asked for."""
        if self._share is SharePrompt.ALWAYS:
            raise ModelError(
                f"share_prompt=always needs a model with plain full attention, but {type(self._model).__name__} {why}. "
                "Use share_prompt=auto, or attn_implementation sdpa."
            )


def _probe_sample(prompt: IntArray, completion: IntArray) -> TrainingSample:
    return TrainingSample(
        group_id=0,
        prompt_ids=prompt,
        completion_ids=completion,
        loss_mask=np.ones(len(completion), dtype=np.bool_),
        sampler_logprobs=np.zeros(len(completion), dtype=np.float32),
        advantage=0.0,
        min_version=0,
    )
