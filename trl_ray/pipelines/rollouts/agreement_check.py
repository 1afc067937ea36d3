"""Compares sampler and learner at every step, and says which of them is wrong where they are two policies.

    agreement/age_<a>/... of the step --observe--> ess, level --AgreementRule--> Breach: cause, words, whether to stop
    evidence: what the weight checks showed (worker, learner, sampled tokens) -------^

The level is mean |x| / mean doubt over the tokens of age 0, x the learner's log-prob less the sampler's; the first
tokens of a run, both sides at version 0, give the baseline, which goes into checkpoints. A breach names its cause:

    training     the learner in training mode is not the learner in evaluation mode: dropout, packing
    numerics     sampler and learner differ already with the same files: dtype, kernels, rope
    weights      they agreed on the files, and do not on what was published: names, tied heads, experts
    sampling     they agree on a fixed text, yet not on what was sampled: top-p, top-k, min-p, temperature, penalties
    policy       age 0 agrees; older tokens are too far off to learn from: the policy moved

Weights that did not arrive (version, checksum) are refused by the pull itself. Filters only ever raise the
probabilities of what they keep, so x is at most 0: where |mean x| is nearly mean |x|, tokens were left out.

What reshapes sampling later in a run may show on older tokens alone, whose x has as many reasons as the policy has to
move: mass that went to tokens which the sampler seldom drew looks like mass that it left out. So nothing is read into
older tokens; engines of runs that are ahead compare what they said of tokens as they sampled them with what they say of
them afterwards (`Evidence.sampling`), which is one number computed twice, as at age 0.

Options of the run that reshape sampling excuse nothing: their log-probs are the policy's (`engines.sampling`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trl_ray.algorithms.policy.sampler_agreement import OLDEST, PREFIX
from trl_ray.config.runs.agreement_rule import FEWEST_TOKENS, AgreementRule
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.pipelines.run.model_notes import reshaping_options
from trl_ray.types import Metric, Reduce, SamplingGap, StepResult, TrainingGap

ONE_SIDED = 0.8
"""|mean x| / mean |x| from which on x counts as one-sided: rounding gives about 1 / sqrt(tokens)."""
_LEAST_ESS = 0.1
"""Effective sample size, as a share of the tokens, below which older tokens are too far off."""
_STEPS_IN_A_ROW = 3
"""Of older tokens that are too far off: one improbable token may ruin the size of one step."""
_TELL_AGAIN = 2.0
"""A warning comes again once the level is so many times what it was."""
_INNER = ("ratio", "ratio_square", "doubt")
"""What is not written down: others follow from it."""


class Cause(enum.StrEnum):
    """What is wrong when sampler and learner are two policies."""

    TRAINING = "training"
    NUMERICS = "numerics"
    WEIGHTS = "weights"
    SAMPLING = "sampling"
    POLICY = "policy"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the weight checks of the newest version showed, in nats; None: not known."""

    weights: float | None = None
    """Mean |difference| between learner and the engine that is farthest off, on the fixed text."""
    own_files: float | None = None
    """The same before any pull, both sides with the weights that the run began with."""
    training: TrainingGap | None = None
    sampling: tuple[SamplingGap, ...] = ()
    """The newest of each working engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """Sampler and learner are two policies."""

    cause: Cause
    detail: str
    stops: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What one step showed."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Those of the step, with the effective sample sizes and without what only led to them."""
    breaches: tuple[Breach, ...] = ()


class _Watch:
    """A level in the course of a run, held against what it was at first."""

    def __init__(self, rule: AgreementRule) -> None:
        self._rule, self._in_a_row = rule, 0
        self.baseline: float | None = None

    def judge(self, level: float) -> tuple[str, float] | None:
        """Since when it is beyond the limit, in words, and the limit; None where it is not, or may be by chance."""
        limit, first = self._rule.limit(self.baseline), self.baseline
        self.baseline = level if first is None else first
        self._in_a_row = 0 if level <= limit else self._in_a_row + 1
        if not self._in_a_row or not (first is None or self._rule.is_exact or self._in_a_row > 1):
            return None
        return ("at the first step" if first is None else f"after {first:.3g} at version 0"), limit


class AgreementCheck:
    """Holds the baseline of a run; used once a step::

        check = AgreementCheck(config)
        agreement = check.observe(step, result, Evidence(...))

    Args:
        config: of the run.
        rule: what it allows; None takes the configuration's.
        first_step: the first step that is judged: groups that a resumed run found may be of versions that this run
            makes anew.
    """

    def __init__(self, config: RolloutRunConfig, *, rule: AgreementRule | None = None, first_step: int = 1) -> None:
        self._rule = rule or AgreementRule.of(config)
        self._first_step = first_step
        self._reshapes = reshaping_options(config)
        self._has_dropout = not config.disable_dropout
        self._fresh, self._engines = _Watch(self._rule), _Watch(self._rule)
        self._judged: tuple[SamplingGap, ...] = ()
        self._in_a_row = dict.fromkeys(range(OLDEST + 1), 0)
        self._told: dict[Cause, float] = {}

    def observe(self, step: int, result: StepResult, evidence: Evidence) -> Agreement:
        """Judge a step by its metrics, merged over micro-batches, ranks and updates."""
        ages = _by_age(result.metrics)
        metrics = {name: metric for name, metric in result.metrics.items() if not _is_inner(name)}
        for age, values in ages.items():
            values["ess"] = values["ratio"] ** 2 / values["ratio_square"] if values["ratio_square"] else 0.0
            metrics[f"{PREFIX}{age}/ess"] = Metric(value=values["ess"], reduce=Reduce.LAST)
        if result.skipped or step < self._first_step:
            return Agreement(metrics=metrics)
        breaches = [*self._judge_training(evidence), *self._judge_sampled(ages.get(0), evidence)]
        breaches = breaches or list(self._judge_engines(evidence))
        if not breaches:
            breaches = list(self._judge_older(ages))
        return Agreement(metrics=metrics, breaches=tuple(breaches))

    def _judge_training(self, evidence: Evidence) -> Iterator[Breach]:
        """The learner against itself."""
        gap = evidence.training
        if gap is None:
            return
        # Two passes of the same text are one number, whatever it is computed in, unless something is drawn by lot.
        wavers = not self._has_dropout and gap.between_passes > self._rule.floor
        if (gap.mean > self._rule.ceiling or wavers) and self._is_news(Cause.TRAINING, gap.mean):
            yield self._breach(Cause.TRAINING, _training_words(gap, self._rule, has_dropout=self._has_dropout))

    def _judge_sampled(self, values: Mapping[str, float] | None, evidence: Evidence) -> Iterator[Breach]:
        """The tokens of age 0."""
        if values is None or values["tokens"] < FEWEST_TOKENS:
            return
        level = values["abs_diff"] / values["doubt"]
        judged = self._fresh.judge(level)
        if judged is None:
            return
        since, limit = judged
        cause, why = self._find_cause(values, evidence, level)
        if self._is_news(cause, level):
            yield self._breach(
                cause,
                f"sampler and learner must agree on tokens of age 0 within {limit:.3g} nats per unit of doubt, but "
                f"differ by {level:.3g} {since} (mean |difference| {values['abs_diff']:.3g} nats over "
                f"{values['tokens']:.0f} tokens, effective sample size {values['ess']:.3g}). {why}",
            )

    def _judge_engines(self, evidence: Evidence) -> Iterator[Breach]:
        """Engines against themselves, once for each comparison."""
        new = [gap for gap in evidence.sampling if not any(gap is other for other in self._judged)]
        self._judged = evidence.sampling
        enough = [gap for gap in new if gap.tokens >= FEWEST_TOKENS]
        if not enough:
            return
        gap = max(enough, key=lambda each: (each.level != each.level, each.level))  # NaN is farthest off
        judged = self._engines.judge(gap.level)
        if judged is None or not self._is_news(Cause.SAMPLING, gap.level):
            return
        since, limit = judged
        why = f"The weights are the same, {self._another_distribution} Or it decodes with other numerics (KV cache)."
        if -gap.diff >= ONE_SIDED * gap.abs_diff:
            why = self._left_out
        yield self._breach(
            Cause.SAMPLING,
            f"an engine must say of tokens what it said as it sampled them, within {limit:.3g} nats per unit of doubt, "
            f"but differs by {gap.level:.3g} {since} (mean |difference| {gap.abs_diff:.3g} nats over {gap.tokens} "
            f"tokens of version {gap.version}, with the weights that sampled them). {why}",
        )

    def _find_cause(self, values: Mapping[str, float], evidence: Evidence, level: float) -> tuple[Cause, str]:
        share = level / 4  # what explains a level is not far below it
        gap = evidence.training
        if gap is not None and gap.mean > max(share * values["doubt"], self._rule.floor):
            return Cause.TRAINING, _training_words(gap, self._rule, has_dropout=self._has_dropout)
        if values["diff"] < 0 and -values["diff"] >= ONE_SIDED * values["abs_diff"]:
            return Cause.SAMPLING, self._left_out
        if evidence.own_files is not None and evidence.own_files > max(self._rule.floor, share * values["doubt"]):
            return Cause.NUMERICS, (
                f"The numerics differ: engine and learner are apart by {evidence.own_files:.3g} nats on a fixed text "
                "with the same files already. Look at dtypes, kernels, rope and packing."
            )
        if evidence.weights is not None and evidence.weights > max(self._rule.floor, share * values["doubt"]):
            return Cause.WEIGHTS, (
                f"On a fixed text engine and learner are apart by {evidence.weights:.3g} nats as well: weights arrived "
                "and are not computed with (names, tied heads, experts)."
            )
        if evidence.weights is not None:
            return Cause.SAMPLING, (
                f"On a fixed text engine and learner agree within {evidence.weights:.3g} nats, so that the weights are "
                f"right and {self._another_distribution}"
            )
        return Cause.UNKNOWN, "Set rollout.canary_every=1, so that the weight check tells weights from sampling."

    @property
    def _left_out(self) -> str:
        return (
            "The sampler's probabilities are all too high: sampling was reshaped, tokens were left out of it "
            f"({self._asked}). Take such options out, of the model's generation config and rollout.engine_kwargs, too."
        )

    @property
    def _another_distribution(self) -> str:
        return (
            "sampling was reshaped: what was sampled came from another distribution than "
            f"temperature alone makes ({self._asked}). Look at temperature, top-k, top-p, min-p and penalties."
        )

    @property
    def _asked(self) -> str:
        if not self._reshapes:
            return "no option asks for that"
        return f"asked for: {', '.join(self._reshapes)}, with the policy's log-probs, which these are not"

    def _judge_older(self, ages: Mapping[int, Mapping[str, float]]) -> Iterator[Breach]:
        """Tokens that older versions sampled."""
        for age, values in ages.items():
            if age == 0 or values["tokens"] < FEWEST_TOKENS:
                continue
            self._in_a_row[age] = self._in_a_row[age] + 1 if values["ess"] < _LEAST_ESS else 0
            if self._in_a_row[age] == _STEPS_IN_A_ROW:
                yield Breach(
                    cause=Cause.POLICY,
                    detail=(
                        f"the policy moved: tokens of age {age} had an effective sample size below {_LEAST_ESS:g} of "
                        f"their number in {_STEPS_IN_A_ROW} steps in a row (now {values['ess']:.3g}; "
                        f"{100 * values['beyond_clip']:.0f} % of their ratios are out of the loss's bounds). Lower "
                        "learning_rate or max_staleness."
                    ),
                    stops=False,
                )

    def _breach(self, cause: Cause, detail: str) -> Breach:
        # What was asked for is said, and is no reason to end a run.
        wanted = cause is Cause.TRAINING and self._has_dropout
        return Breach(cause=cause, detail=detail, stops=self._rule.stops and not wanted)

    def _is_news(self, cause: Cause, level: float) -> bool:
        """Whether this was not told before, or was not that bad."""
        if level <= _TELL_AGAIN * self._told.get(cause, 0.0):
            return False
        self._told[cause] = level
        return True

    def state_dict(self) -> dict[str, float]:
        """The baselines; empty before they are known."""
        found = {"level": self._fresh.baseline, "engines": self._engines.baseline}
        return {name: level for name, level in found.items() if level is not None}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        self._fresh.baseline, self._engines.baseline = state.get("level"), state.get("engines")


def _training_words(gap: TrainingGap, rule: AgreementRule, *, has_dropout: bool) -> str:
    apart = (
        f"The learner must compute in training what it computes in evaluation within {rule.ceiling:.3g} nats, but "
        f"differs by {gap.mean:.3g} on a fixed text"
    )
    if gap.between_passes > gap.mean / 10:
        remedy = "Set disable_dropout=true." if has_dropout else "Look for dropout that disable_dropout does not reach."
        return f"{apart}, and two passes in training differ by {gap.between_passes:.3g}: dropout is on. {remedy}"
    return f"{apart}: its numerics differ where sequences share a row (rope, masks). Set share_prompt=never."


def _by_age(metrics: Mapping[str, Metric]) -> dict[int, dict[str, float]]:
    ages: dict[int, dict[str, float]] = {}
    for name, metric in metrics.items():
        if name.startswith(PREFIX):
            age, _, what = name.removeprefix(PREFIX).partition("/")
            ages.setdefault(int(age), {})[what] = metric.value
    return ages


def _is_inner(name: str) -> bool:
    return name.startswith(PREFIX) and name.rpartition("/")[2] in _INNER
