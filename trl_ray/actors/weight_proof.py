"""Proves that an engine computes with the weights it was given, and says what is wrong where it does not.

    check, before the first pull --look_before--> own_files: the engine's files against the learner's version 0
    payload, check --prove--> version, checksum; engine - learner on fixed texts --AgreementRule--> PullReport

What is wrong is told apart by what both sides said before: engine and learner that differ on the same files have
different numerics; those that agreed on the files and differ now have different weights, and an engine that says what
it said before the pull has kept its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.sections import ModelConfig
from trl_ray.engines.backend import CHECKPOINT_VERSION
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import WeightError
from trl_ray.models.policy_loading import find_source
from trl_ray.types import FloatArray, IntArray, PullReport, ScoredSequence, WeightCheck, WeightPayload


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


class WeightProof:
    """Of one engine; `look_before` comes before each pull, `prove` after it.

    Args:
        engine: whose weights are proved.
        name: of the worker, as errors name it.
        model: the policy.
        rule: how far engine and learner may be apart.
        deadline_s: seconds for the engine to score the texts.
    """

    def __init__(
        self, engine: EngineThread, *, name: str, model: ModelConfig, rule: AgreementRule, deadline_s: float
    ) -> None:
        self._engine, self._name, self._rule, self._deadline_s = engine, name, rule, deadline_s
        self._model = model
        self._own_files: float | None = None
        self._before: _Said | None = None

    def look_before(self, check: WeightCheck | None) -> None:
        """Before the first pull: how far the engine is off with the files it was started from.

        Raises:
            DeadlineError: the texts were not scored in time.
            EngineError: the engine failed.
        """
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
            seconds=time.time() - begin,
            weight_check_mean=mean,
            weight_check_max=worst,
            own_files_mean=self._own_files,
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

    def _score(self, sequences: list[IntArray]) -> list[FloatArray]:
        return self._engine.score(sequences, deadline_s=self._deadline_s)


def _apart(one: FloatArray, other: FloatArray) -> tuple[float, float]:
    """Mean and largest |difference|."""
    difference = np.abs(one.astype(np.float64) - other)
    return float(difference.mean()), float(difference.max())
