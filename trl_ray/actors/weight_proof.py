"""Proves that an engine computes with the weights it was given, and says what is wrong where it does not.

    completions --note--> newest tokens --look_before: scored by the weights that sampled them--> SamplingGap
    check, before the first pull --look_before--> own_files: the engine's files against the learner's version 0
    payload, check --prove--> version, checksum; engine - learner on fixed texts --AgreementRule--> PullReport

What is wrong is told apart by what both sides said before: engine and learner that differ on the same files have
different numerics; those that agreed on the files and differ now have different weights, and an engine that says what
it said before the pull has kept its own.

Where generation runs ahead, tokens are trained on by weights that have moved, which may be off for many reasons; so an
engine is held against itself: what it says of tokens afterwards, with the weights that sampled them, must be what it
said as it sampled them. Whatever the age of tokens and the learning rate are, the two differ by rounding alone, unless
sampling is reshaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trl_ray.algorithms.policy.sampler_agreement import LEAST_DOUBT
from trl_ray.config.runs.agreement_rule import FEWEST_TOKENS, AgreementRule
from trl_ray.config.sections import ModelConfig
from trl_ray.engines.backend import CHECKPOINT_VERSION
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import ConfigError, WeightError
from trl_ray.models.policy_loading import find_source
from trl_ray.types import (
    Completion,
    FloatArray,
    IntArray,
    PullReport,
    SamplingGap,
    ScoredSequence,
    TeacherQuestion,
    TeacherRequest,
    WeightCheck,
    WeightPayload,
    steady_time,
)

UNKNOWN = 1.0
"""In the place of a log-prob that is not known; no log-prob is above 0."""
MOST_PROBABLE = 256
"""Tokens that an engine is asked about which scores at temperature 1 alone, where samples have another one."""
_NEWEST = 32
"""Completions kept to be compared."""
_LONGEST = 512
"""Tokens of a sequence that is scored for it: engines hold log-probs [tokens, V] while they do so."""
_MOST_SCORED = 1024
"""Tokens of all these sequences."""
_ENOUGH_TOKENS = 4 * FEWEST_TOKENS
"""Compared, and no more: the mean of so many |x| is known to a sixteenth of itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Said:
    """What both sides said of the fixed text at one version."""

    engine: FloatArray
    """[T-1]"""
    learner: FloatArray
    """[T-1]"""

    @property
    def mean(self) -> float:
        """Mean |difference| in nats."""
        return _apart(self.engine, self.learner)[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sampled:
    """The tokens [start, end) of a completion, sampled by the weights that the engine has."""

    prompt_ids: IntArray
    """[P]"""
    completion: Completion
    start: int
    end: int

    @property
    def token_ids(self) -> IntArray:
        """[P + end]"""
        return np.concatenate([self.prompt_ids, self.completion.token_ids[: self.end]])


class WeightProof:
    """Of one engine; `look_before` comes before each pull, `prove` after it.

    Args:
        engine: whose weights are proved.
        name: of the worker, as errors name it.
        model: the policy.
        rule: how far engine and learner may be apart.
        deadline_s: seconds for the engine to score the texts.
        temperature: of the samples that are noted; they are compared where the rule's run is ahead.
    """

    def __init__(
        self,
        engine: EngineThread,
        *,
        name: str,
        model: ModelConfig,
        rule: AgreementRule,
        deadline_s: float,
        temperature: float = 1.0,
    ) -> None:
        self._engine, self._name, self._rule, self._deadline_s = engine, name, rule, deadline_s
        self._model, self._temperature, self._compares_samples = model, temperature, rule.is_ahead
        self._own_files: float | None = None
        self._before: _Said | None = None
        # Replaced as a whole, since samples are noted while others are compared.
        self._noted: tuple[tuple[IntArray, Completion], ...] = ()
        self._sampling: SamplingGap | None = None

    def note(self, prompt_ids: IntArray, completions: Sequence[Completion]) -> None:
        """Remember what was sampled of a prompt [P], to be compared before the next pull."""
        if self._compares_samples:
            sampled = [(prompt_ids, each) for each in completions if each.is_sampled]
            self._noted = (*self._noted, *sampled)[-_NEWEST:]

    def look_before(self, check: WeightCheck | None) -> None:
        """Before a pull with a check: what the engine says of what it sampled; before the first one also how far it is
        off with the files it was started from.

        Raises:
            DeadlineError: the texts were not scored in time.
            EngineError: the engine failed.
        """
        self._sampling = None if check is None else self._compare_samples()
        if check is None or check.initial_logprobs is None or self._engine.version != CHECKPOINT_VERSION:
            return
        if not self._engine.starts_from_files:
            return
        # Of quantised weights, and of those with an adapter, the files hold something else than is published.
        if self._model.load_in_4bit or self._model.load_in_8bit or find_source(self._model).initial_adapter:
            return
        self._before = _Said(engine=self._score([check.token_ids])[0], learner=check.initial_logprobs)
        self._own_files = self._before.mean

    def prove(self, payload: WeightPayload, check: WeightCheck | None, *, begin: float) -> PullReport:
        """Compare engine and learner after a pull that began at `begin`, in seconds since the epoch.

        Raises:
            WeightError: the engine runs another version, or is farther off than it may be.
            DeadlineError: the texts were not scored in time.
            EngineError: the engine failed.
        """
        identity = self._engine.version
        if identity != payload.identity:
            raise WeightError(
                f"the weights did not arrive: {self._name} must run {payload.identity} after its pull, but runs "
                f"{identity}."
            )
        mean = worst = problem = None
        if check is not None:
            # Neighbouring versions are so much alike that a check of the wrong one might pass.
            if check.version != identity.version:
                raise WeightError(f"a weight check of version {check.version} cannot prove version {identity.version}.")
            mean, worst, problem = self._compare(check)
        return PullReport(
            version=identity.version,
            checksum=identity.checksum,
            seconds=steady_time() - begin,
            weight_check_mean=mean,
            weight_check_max=worst,
            own_files_mean=self._own_files,
            sampling=self._sampling,
            disagreement=problem,
        )

    def _compare(self, check: WeightCheck) -> tuple[float, float, str | None]:
        """Mean and largest |difference| of the text that is farthest off, and what is wrong where the run goes on."""
        texts = (ScoredSequence(token_ids=check.token_ids, logprobs=check.logprobs), *check.further)
        scored = self._score([text.token_ids for text in texts])
        apart = [_apart(values, text.logprobs) for values, text in zip(scored, texts, strict=True)]
        worst = max(apart, key=lambda pair: (pair[0] != pair[0], pair[0]))
        means = {len(text.token_ids): mean for text, (mean, _) in zip(texts, apart, strict=True)}
        said, limit = _Said(engine=scored[0], learner=check.logprobs), self._rule.limit(check.baseline)
        problem = None
        # "not <=" so that NaN fails too.
        if not worst[0] <= limit:
            problem = (
                f"after pulling version {check.version}, {self._name} must agree with the learner on the weight check "
                f"within {limit:.3g} nats on average, but differs by {worst[0]:.4g} (worst {worst[1]:.4g}). "
                f"{self._why(said, means, limit)}"
            )
            is_beyond_all = not worst[0] <= self._rule.ceiling
            if not self._rule.only_warns and (is_beyond_all or self._rule.stops):
                raise WeightError(problem)
        self._before = said
        return worst[0], worst[1], problem

    def _why(self, said: _Said, means: Mapping[int, float], limit: float) -> str:
        """A sentence on the cause.

        Args:
            said: of the text that every check has.
            means: mean |difference| of each text, by its length.
            limit: what these must not exceed.
        """
        before, own = self._before, self._own_files
        if own is not None and own > limit:
            return (
                f"The numerics differ: with the files they were both started from, before any pull, they are apart by "
                f"{own:.3g} nats already. Look at dtypes, kernels, rope, and what rollout.engine_kwargs changes."
            )
        longer = [length for length, mean in means.items() if not mean <= limit]
        if means[len(said.learner) + 1] <= limit:
            return (
                f"The numerics differ with length: a text of {len(said.learner) + 1} tokens agrees, one of "
                f"{min(longer)} does not. Look at rope scaling, and at how the KV cache is cut into blocks."
            )
        moved = 0.0 if before is None else _apart(said.learner, before.learner)[0]
        stayed = 1.0 if before is None else _apart(said.engine, before.engine)[0]
        if before is not None and moved > 0 and stayed < moved / 100:
            return (
                "The weights arrived, as version and checksum tell, but are not computed with: the engine says what it "
                "said before the pull, and computes with the weights it had."
            )
        if own is not None or before is not None:
            return (
                "The weights arrived, as version and checksum tell, but are not all computed with: engine and learner "
                "agreed before. Look at the names of the parameters, a tied head, or experts that stay as they were."
            )
        return (
            "The weights arrived, as version and checksum tell, but are not computed with (names, a tied head, "
            "experts), or the numerics differ (dtypes, kernels, rope)."
        )

    def _compare_samples(self) -> SamplingGap | None:
        """Of the newest tokens that the weights of the engine have sampled; None without any."""
        version, left, room = self._engine.version.version, _ENOUGH_TOKENS, _MOST_SCORED
        picked = list[_Sampled]()
        for prompt_ids, completion in reversed(self._noted):
            spans = [span for span in completion.versions if span.version == version]
            start = min((span.start for span in spans), default=0)
            end = min(max((span.end for span in spans), default=0), _LONGEST - len(prompt_ids))
            if left > 0 and end > start and len(prompt_ids) + end <= room:
                picked.append(_Sampled(prompt_ids=prompt_ids, completion=completion, start=start, end=end))
                left, room = left - (end - start), room - (len(prompt_ids) + end)
        self._noted = ()
        if not picked:
            return None
        scored = np.concatenate(self._score_samples(picked)).astype(float)
        sampled = np.concatenate([each.completion.logprobs[each.start : each.end] for each in picked]).astype(float)
        # Which tokens these are does not depend on what was drawn.
        scored, sampled = (values[scored != UNKNOWN] for values in (scored, sampled))
        if not len(scored):
            return None
        x = scored - sampled
        return SamplingGap(
            version=version,
            tokens=len(x),
            abs_diff=float(np.abs(x).mean()),
            diff=float(x.mean()),
            doubt=float(np.maximum(1 - np.exp(sampled), LEAST_DOUBT).mean()),
        )

    def _score_samples(self, picked: Sequence[_Sampled]) -> list[FloatArray]:
        """Log-probs of the tokens of each; `UNKNOWN` where the engine does not tell them at this temperature."""
        if self._temperature == 1:
            scores = self._score([each.token_ids for each in picked])
            return [
                values[len(each.prompt_ids) - 1 + each.start :] for each, values in zip(picked, scores, strict=True)
            ]
        question = TeacherQuestion(vocab_size=self._engine.vocab_size, temperature=self._temperature)
        requests = [
            TeacherRequest(prompt_ids=each.prompt_ids, completion_ids=each.completion.token_ids[: each.end])
            for each in picked
        ]
        try:
            answers = self._engine.score_completions(requests, question, deadline_s=self._deadline_s)
        except ConfigError:  # vLLM scores at temperature 1 alone
            return self._cool(picked, requests)
        return [answer.logprobs[each.start :] for each, answer in zip(picked, answers, strict=True)]

    def _cool(self, picked: Sequence[_Sampled], requests: Sequence[TeacherRequest]) -> list[FloatArray]:
        """The same from log-probs at temperature 1 of the tokens and of the most probable ones."""
        vocab_size = self._engine.vocab_size
        question = TeacherQuestion(vocab_size=vocab_size, top_k=min(MOST_PROBABLE, vocab_size))
        try:
            answers = self._engine.score_completions(requests, question, deadline_s=self._deadline_s)
        except ConfigError:  # the engine was started for fewer
            self._compares_samples = False
            return [np.full(each.end - each.start, UNKNOWN) for each in picked]
        return [
            cooled_logprobs(
                answer.logprobs[each.start :],
                answer.top_logprobs[each.start :],
                temperature=self._temperature,
                vocab_size=vocab_size,
                tolerance=self._rule.floor / 4,
            )
            for each, answer in zip(picked, answers, strict=True)
            if answer.top_logprobs is not None
        ]

    def _score(self, sequences: list[IntArray]) -> list[FloatArray]:
        return self._engine.score(sequences, deadline_s=self._deadline_s)


def cooled_logprobs(
    logprobs: FloatArray, top_logprobs: FloatArray, *, temperature: float, vocab_size: int, tolerance: float
) -> FloatArray:
    """Log-probs [L] at a temperature T from some at temperature 1: log p_T(a) = log p(a) / T - log sum_b p(b)^(1/T).

    Of the sum the K largest terms are known. The others, of probabilities at most p_K with the mass m together, add at
    most m p_K^(1/T - 1) where T < 1, and by Hoelder's inequality (V - K)^(1 - 1/T) m^(1/T) where T > 1.

    Args:
        logprobs: [L] of the tokens.
        top_logprobs: [L, K] of the most probable ones, most probable first.
        temperature: T.
        vocab_size: V.
        tolerance: nats by which a result may be off; others are `UNKNOWN`.
    """
    power, top = 1 / temperature, top_logprobs.astype(float)
    left, others = np.maximum(1 - np.exp(top).sum(axis=1), 0.0), vocab_size - top.shape[1]
    cool, warm = left * np.exp((power - 1) * top[:, -1]), others ** max(1 - power, 0.0) * left**power
    most = (cool if power >= 1 else warm) if others else np.zeros(len(top))
    known = np.exp(power * top).sum(axis=1)
    values = power * logprobs.astype(float) - np.log(known + most / 2)
    return np.where(np.log1p(most / known) / 2 <= tolerance, values, UNKNOWN)


def _apart(one: FloatArray, other: FloatArray) -> tuple[float, float]:
    """Mean and largest |difference|."""
    difference = np.abs(one.astype(np.float64) - other)
    return float(difference.mean()), float(difference.max())
