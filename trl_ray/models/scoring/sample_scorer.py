"""What a model says of the trained tokens of samples: layout, forward pass, head.

TrainingSample x B --layout--> [R,T] --base model--> hidden [R,T,H] --predictors--> [N,H] --head--> TokenLogprobs [N]
                                     |--------- ScoringModule, ClassifierModule ---------|          ClassScores [N,C]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trl_ray.algorithms.batches.layout import AttentionKind, Layout, additive_mask, build_layout, input_length
from trl_ray.algorithms.head.head_problem import ExtraOutputs
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossNeeds
from trl_ray.config.sections import SharePrompt
from trl_ray.errors import ModelError
from trl_ray.models.scoring.embedding_noise import noise_bounds
from trl_ray.models.scoring.head import head_weight
from trl_ray.models.scoring.rope_regimes import RopeRegimes, rope_regimes
from trl_ray.models.scoring.router_loss import RouterLoss
from trl_ray.models.scoring.scoring_module import HeadQuestion, PredictorModule, ScoringModule, token_scores
from trl_ray.models.scoring.segment_attention import SEGMENT_ATTENTION, attention_kind
from trl_ray.types import FloatArray, IntArray, ScoredSequence, TrainingGap, TrainingSample, WeightCheck

__all__ = ["ClassScores", "SampleScorer", "ScoringModule"]

_PROBE_TOLERANCE = 2e-2
"""Mean difference of probe log-probs in nats, or of class logits in shares of how far these differ among each other,
that float32 may show; a wrong mask is off by far more."""
_TINY = 1e-12
_CANNOT_READ = (ValueError, TypeError, RuntimeError, AttributeError, IndexError)
"""What architectures raise at masks that they did not expect."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassScores:
    """What a classifier says at the N positions that are read."""

    logits: Tensor
    """[N, C] float32 (float64 where it computes in that), with gradient."""


class SampleScorer:
    """Scores samples with one model; without padding, and a group's prompt once, where the model allows it.

    A model with `sdpa` attention gets one that can be told the segments of a row, and keeps it.

    Args:
        module: the model, a `ScoringModule` or a `ClassifierModule`.
        share_prompt: AUTO shares where it saves work.
        temperature: the logits are divided by it.
        forward: what to call instead of `module`, when something wraps it.
        needs: what `score` gives beside log-probs and entropies, and the noise on embeddings while the model trains.

    Raises:
        ModelError: `share_prompt` is ALWAYS and the model computes something else in a shared row.
    """

    def __init__(
        self,
        module: PredictorModule,
        *,
        share_prompt: SharePrompt,
        temperature: float,
        forward: Callable[..., tuple[Tensor, ...]] | None = None,
        needs: LossNeeds | None = None,
    ) -> None:
        self._module = module
        self._model = module.policy
        self._forward = forward or module
        self._share = share_prompt
        self._temperature = temperature
        needs = needs or LossNeeds()
        self._noise = needs.embedding_noise
        self._extras = ExtraOutputs(
            sum_squared_probs=needs.sum_squared_probs, top1=needs.top1, mean_logprobs=needs.mean_logprobs
        )
        self._device = head_weight(self._model).device
        self._regimes = rope_regimes(self._model.config)
        self._hidden_size = int(self._model.config.get_text_config().hidden_size)
        self.routers: RouterLoss | None = None
        """Of a mixture of experts whose routers have a loss."""
        # Proved rather than believed: a mask that is not obeyed gives wrong numbers and no error.
        self._attention = self._prove_attention(attention_kind(self._model))

    @property
    def can_share(self) -> bool:
        """Whether completions of a group may share one computation of their prompt."""
        return self._share is not SharePrompt.NEVER and self._attention in {
            AttentionKind.MASKED,
            AttentionKind.SEGMENTS,
        }

    @property
    def classifies(self) -> bool:
        """Whether `score` gives class logits rather than log-probs of tokens."""
        return not isinstance(self._module, ScoringModule)

    def score(
        self, samples: Sequence[TrainingSample], *, question: HeadQuestion | None = None
    ) -> TokenLogprobs | ClassScores | None:
        """What the head says of the trained tokens, in sample order; None when there are none.

        A language head gives log-probs, entropies, what `needs` asks for and what `question` does; a classifier gives
        logits, read at the token before each trained one. One for whole sequences reads where transformers does, before
        trailing padding.
        """
        pad = self._module.pooling_pad
        if pad is not None:
            samples = [_without_padding(sample, pad) for sample in samples]
        layout = self._lay_out(samples, share=self._share, attention=self._attention)
        if layout is None:
            return None
        outputs = self._run(
            layout, temperature=self._temperature, extras=self._extras, noise=self._bounds(layout), question=question
        )
        return ClassScores(logits=outputs[0]) if self.classifies else token_scores(outputs, self._extras, question)

    def states(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        """Hidden states [N, H] that predict the trained tokens; only for language heads. None without such tokens."""
        assert not self.classifies, "a classifier has no hidden states to go on from"
        layout = self._lay_out(samples, share=self._share, attention=self._attention)
        return None if layout is None else self._run(layout, temperature=self._temperature, with_head=False)[0]

    def judge(self, states: Tensor, targets: Tensor, *, question: HeadQuestion | None = None) -> TokenLogprobs:
        """What the head says of targets [N] that hidden states [N, H] predict; nothing of what `needs` asks for."""
        extras = ExtraOutputs()
        outputs = self._forward(
            None, None, None, None, targets, self._temperature, extras=extras, question=question, states=states
        )
        return token_scores(outputs, extras, question)

    def logprobs(self, samples: Sequence[TrainingSample]) -> Tensor | None:
        """Nothing but the log-probs [N] of the trained tokens; only for language heads."""
        assert not self.classifies, "a classifier has no log-probs of tokens"
        layout = self._lay_out(samples, share=self._share, attention=self._attention)
        return None if layout is None else self._run(layout, temperature=self._temperature)[0]

    @torch.no_grad()
    def sequence_logprobs(self, token_ids: IntArray) -> FloatArray:
        """Log-prob [T-1] of every token of a sequence [T] but its first, at temperature 1; only for language heads."""
        assert not self.classifies, "a classifier has no log-probs of tokens"
        sample = _probe_sample(token_ids[:1], token_ids[1:])
        # The plainest layout there is: engines are held against these numbers.
        layout = self._lay_out([sample], share=SharePrompt.NEVER, attention=AttentionKind.CAUSAL)
        if layout is None:
            return np.zeros(0, dtype=np.float32)
        with self._evaluation():
            values: FloatArray = self._run(layout, temperature=1.0)[0].cpu().numpy()
        return values

    def weight_check(
        self, token_ids: IntArray, *, version: int, further: Sequence[IntArray], asks_training: bool
    ) -> WeightCheck:
        """What engines that have these weights are held against; see `PolicyLearner.weight_check`."""
        logprobs, *others = (self.sequence_logprobs(ids) for ids in (token_ids, *further))
        longest = max((token_ids, *further), key=len)
        return WeightCheck(
            token_ids=token_ids,
            logprobs=logprobs,
            version=version,
            further=tuple(
                ScoredSequence(token_ids=ids, logprobs=values) for ids, values in zip(further, others, strict=True)
            ),
            training=self.training_gap(longest) if asks_training and len(longest) >= 4 else None,
        )

    @torch.no_grad()
    def training_gap(self, token_ids: IntArray) -> TrainingGap:
        """How far training passes over a sequence [T], T >= 4, are from an evaluation; only for language heads.

        The evaluation has one row for each of three samples. In training they share one where they ever do: the
        sequence, with another completion of its first half, and a short one.
        """
        half, quarter = len(token_ids) // 2, max(1, len(token_ids) // 4)
        samples = [
            _probe_sample(token_ids[:half], token_ids[half:]),
            _probe_sample(token_ids[:half], token_ids[:quarter]),
            replace(_probe_sample(token_ids[:1], token_ids[1 : quarter + 1]), group_id=1),
        ]
        plain = self._lay_out(samples, share=SharePrompt.NEVER, attention=AttentionKind.CAUSAL)
        packed = self._lay_out(samples, share=self._share, attention=self._attention)
        assert plain is not None and packed is not None, "the samples have trained tokens"
        with self._evaluation():
            expected = self._run(plain, temperature=self._temperature)[0].double()
        training = self._model.training
        self._model.train(True)
        # No noise on embeddings: that is asked for.
        first, second = (self._run(packed, temperature=self._temperature)[0].double() for _ in range(2))
        self._model.train(training)
        return TrainingGap(
            mean=float((first - expected).abs().mean()), between_passes=float((first - second).abs().mean())
        )

    def _lay_out(
        self, samples: Sequence[TrainingSample], *, share: SharePrompt, attention: AttentionKind
    ) -> Layout | None:
        if self._regimes is not None:
            samples = [_apart(sample, self._regimes) for sample in samples]
        return build_layout(samples, share=share, hidden_size=self._hidden_size, attention=attention)

    def _bounds(self, layout: Layout) -> Tensor | None:
        # A first pass, a reference or an evaluation through the same model must not be shaken.
        if self._noise is None or not self._model.training:
            return None
        return noise_bounds(layout.lengths.to(self._device), alpha=self._noise, hidden_size=self._hidden_size)

    def _run(
        self,
        layout: Layout,
        *,
        temperature: float,
        extras: ExtraOutputs | None = None,
        noise: Tensor | None = None,
        question: HeadQuestion | None = None,
        with_head: bool = True,
    ) -> tuple[Tensor, ...]:
        """One forward pass; hidden states alone without the head."""
        layout = layout.to(self._device)
        if self.routers is not None:
            # A real token's sequence has a prompt and a completion; padding stands alone.
            self.routers.real = (layout.lengths > 1).flatten()
        positions = layout.position_ids
        if self._regimes is not None:  # padding counts on, and would make a row longer than its sequence
            positions = positions.masked_fill(layout.lengths == 1, 0)
        # Classifiers are never asked about teachers, and take no such question.
        asked = {} if question is None else {"question": question}
        return self._forward(
            layout.input_ids,
            positions,
            self._mask(layout),
            layout.predictors,
            layout.targets if with_head else None,
            temperature,
            layout.segments,
            extras,
            noise,
            **asked,
        )

    def _mask(self, layout: Layout) -> Tensor | None:
        if layout.segments is not None:
            # Anything with four axes keeps transformers from making a mask [T, T] of its own; nobody reads it.
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        if layout.mask is None or self._model.config._attn_implementation in {"sdpa", SEGMENT_ATTENTION}:
            return layout.mask
        return additive_mask(layout.mask, head_weight(self._model).dtype)

    @torch.no_grad()
    def _prove_attention(self, kind: AttentionKind) -> AttentionKind:
        """Compare layouts on a made-up group: not every architecture takes masks, positions and arguments of ours."""
        if kind in {AttentionKind.CAUSAL, AttentionKind.RESTARTS}:
            self._refuse("has attention that takes no mask of ours (sliding window or a fused kernel)")
        if kind is AttentionKind.CAUSAL or (kind is AttentionKind.MASKED and self._share is SharePrompt.NEVER):
            return AttentionKind.CAUSAL
        if kind is AttentionKind.SEGMENTS:
            self._model.set_attn_implementation(SEGMENT_ATTENTION)
        # AUTO may share later, so that sharing is what must be proved.
        share = SharePrompt.NEVER if self._share is SharePrompt.NEVER else SharePrompt.ALWAYS
        prompt = np.array([5, 6, 7, 8], dtype=np.int32)
        group = [_probe_sample(prompt, np.array(ids, dtype=np.int32)) for ids in ([9, 10, 11], [12, 13], [14, 9, 12])]
        scores = []
        with self._evaluation():
            for attention in (AttentionKind.CAUSAL, kind):
                layout = self._lay_out(group, share=share, attention=attention)
                assert layout is not None, "the probe has trained tokens"
                try:
                    scores.append(self._run(layout, temperature=1.0)[0])
                except _CANNOT_READ as error:
                    if attention is not kind:
                        raise
                    return self._reads_apart(kind, f"cannot read a shared row ({type(error).__name__}: {error})")
        difference = float((scores[0] - scores[1]).abs().mean())
        if self.classifies:
            # Unlike log-probs, class logits have no unit: they are measured by how far they differ among each other.
            difference /= max(float((scores[1] - scores[1].mean(dim=0)).abs().mean()), _TINY)
        if difference <= (0.2 if self._is_half() else _PROBE_TOLERANCE):
            return kind
        unit = "of its logits" if self.classifies else "nats"
        return self._reads_apart(kind, f"is off by {difference:.3g} {unit} in a shared row")

    def _reads_apart(self, kind: AttentionKind, why: str) -> AttentionKind:
        """A model that does not read shared rows reads one sequence a row."""
        if kind is AttentionKind.SEGMENTS:
            self._model.set_attn_implementation("sdpa")
        self._refuse(why)
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
        return self._module.bf16 or head_weight(self._model).dtype != torch.float32

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


def _apart(sample: TrainingSample, regimes: RopeRegimes) -> TrainingSample:
    """A sample that shares its prompt with those of its regime alone."""
    length = len(sample.prompt_ids) + (input_length(sample) or 0)
    return replace(sample, group_id=hash((sample.group_id, regimes.of(length))))


def _without_padding(sample: TrainingSample, pad: int) -> TrainingSample:
    """A sample that is read at its end, without the padding tokens before the end; one that is read elsewhere as it is.

    transformers reads a sequence at its last token that is no padding, which an end-of-sequence token may be, too.
    """
    read = np.flatnonzero(sample.loss_mask)
    if len(read) != 1 or read[0] != len(sample.completion_ids) - 1:
        return sample
    before = np.concatenate([sample.prompt_ids, sample.completion_ids[:-1]])
    others = np.flatnonzero(before != pad)
    kept = int(others[-1]) + 1 if len(others) else 1
    if kept == len(before):
        return sample
    prompt = sample.prompt_ids[:kept]
    completion = np.concatenate([before[len(prompt) : kept], sample.completion_ids[-1:]])
    return replace(sample, prompt_ids=prompt, completion_ids=completion, loss_mask=sample.loss_mask[-len(completion) :])
