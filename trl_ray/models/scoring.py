"""Log-probs of the trained tokens of samples under a model: layout, forward pass, head.

TrainingSample x B --layout--> [R,T] --base model--> hidden [R,T,H] --predictors--> [N,H] --head--> logprobs [N]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from trl_ray.algorithms.layout import Layout, additive_mask, build_layout
from trl_ray.algorithms.logprobs import TokenLogprobs, token_logprobs
from trl_ray.config.sections import SharePrompt
from trl_ray.errors import ModelError
from trl_ray.models.load import Policy, has_plain_attention, hidden_states, lm_head_of
from trl_ray.types import FloatArray, IntArray, TrainingSample

_PROBE_TOLERANCE = 2e-2
"""Mean difference of probe log-probs in nats that float32 may show; a wrong mask is off by far more."""


class SampleScorer:
    """Scores samples with one model; a group's prompt is computed once where the model allows it.

    Args:
        model: a causal language model with a plain linear head.
        share_prompt: AUTO shares where it saves work.
        temperature: the logits are divided by it.
        chunk_size: tokens projected onto the vocabulary at a time.
        bf16: run matrix products in bfloat16.

    Raises:
        ModelError: `share_prompt` is ALWAYS and the model computes something else in a shared row.
    """

    def __init__(
        self,
        model: Policy,
        *,
        share_prompt: SharePrompt,
        temperature: float,
        chunk_size: int,
        bf16: bool = False,
    ) -> None:
        self._model = model
        self._share = share_prompt
        self._temperature = temperature
        self._chunk_size = chunk_size
        self._bf16 = bf16
        self._hidden_size = int(model.config.get_text_config().hidden_size)
        self.can_share = share_prompt is not SharePrompt.NEVER and self._prove_sharing()

    def score(self, samples: Sequence[TrainingSample]) -> TokenLogprobs | None:
        """Log-probs and entropies [N] of the trained tokens, in sample order; None when there are none."""
        layout = build_layout(samples, share=self._share, hidden_size=self._hidden_size, can_share=self.can_share)
        return None if layout is None else self._run(layout, temperature=self._temperature)

    @torch.no_grad()
    def sequence_logprobs(self, token_ids: IntArray) -> FloatArray:
        """Log-prob [T-1] of every token of a sequence [T] but its first, at temperature 1."""
        sample = _probe_sample(token_ids[:1], token_ids[1:])
        layout = build_layout([sample], share=SharePrompt.NEVER, hidden_size=self._hidden_size)
        if layout is None:
            return np.zeros(0, dtype=np.float32)
        with self._evaluation():
            values: FloatArray = self._run(layout, temperature=1.0).logprobs.cpu().numpy()
        return values

    def _run(self, layout: Layout, *, temperature: float) -> TokenLogprobs:
        weight, bias = lm_head_of(self._model)
        layout = layout.to(weight.device)
        with torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            states = hidden_states(
                self._model,
                input_ids=layout.input_ids,
                position_ids=layout.position_ids,
                attention_mask=self._mask(layout, weight.dtype),
            )
        return token_logprobs(
            states.flatten(0, 1).index_select(0, layout.predictors),
            weight,
            layout.targets,
            bias=bias,
            temperature=temperature,
            chunk_size=self._chunk_size,
            compute_dtype=torch.bfloat16 if self._bf16 else None,
        )

    def _mask(self, layout: Layout, dtype: torch.dtype) -> Tensor | None:
        if layout.mask is None or self._model.config._attn_implementation == "sdpa":
            return layout.mask
        return additive_mask(layout.mask, dtype)

    @torch.no_grad()
    def _prove_sharing(self) -> bool:
        """Compare both layouts on a made-up group: not every architecture takes masks and positions of ours."""
        if not has_plain_attention(self._model):
            return self._refuse("has attention that takes no mask of ours (sliding window or a fused kernel)")
        prompt = np.array([5, 6, 7, 8], dtype=np.int32)
        group = [_probe_sample(prompt, np.array(ids, dtype=np.int32)) for ids in ([9, 10, 11], [12, 13], [14, 9, 12])]
        scores = []
        with self._evaluation():
            for share in (SharePrompt.ALWAYS, SharePrompt.NEVER):
                layout = build_layout(group, share=share, hidden_size=self._hidden_size)
                assert layout is not None, "the probe has trained tokens"
                scores.append(self._run(layout, temperature=1.0).logprobs)
        difference = float((scores[0] - scores[1]).abs().mean())
        tolerance = 0.2 if self._is_half() else _PROBE_TOLERANCE
        return difference <= tolerance or self._refuse(f"is off by {difference:.3g} nats in a shared row")

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        training = self._model.training
        self._model.train(False)
        try:
            yield
        finally:
            self._model.train(training)

    def _is_half(self) -> bool:
        return self._bf16 or lm_head_of(self._model)[0].dtype != torch.float32

    def _refuse(self, why: str) -> bool:
        if self._share is SharePrompt.ALWAYS:
            raise ModelError(
                f"share_prompt=always needs a model with plain full attention, but {type(self._model).__name__} {why}. "
                "Use share_prompt=auto, or attn_implementation sdpa."
            )
        return False


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
