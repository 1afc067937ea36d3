"""When sampler and learner count as two policies: the one place with these numbers.

    level          what is compared: mean |x|, or on sampled tokens mean |x| / mean doubt; x in nats, see
                   `algorithms.policy.sampler_agreement`
    at version 0   level <= ceiling                          float32: 1e-3      else 0.2
    afterwards     level <= max(floor, 4 x the level that the pair showed at version 0)
                                                             float32: 2e-4      else 0.02

*The same weights, computed twice.* float32 on both sides differs by rounding alone: 1e-6 to 1e-5 nats a token, however
many tokens there are, so that one step beyond the limit is proof. bfloat16 and other kernels differ by 1e-3 to 5e-2;
what they differ by is measured at version 0 and kept in checkpoints, and as it wanders with the policy, two steps in a
row must be beyond the limit. A level of means over fewer than `FEWEST_TOKENS` is not looked at: |x| has a standard
deviation of about its mean, so that of 64 tokens the level is known to an eighth of itself, and 4 times it is 24
standard errors away.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.config.sections import Dtype, OnDisagreement

FEWEST_TOKENS = 64
FACTOR = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementRule:
    """What a run allows between its sampler and its learner."""

    ceiling: float
    """Largest level in nats at version 0, whatever the pair is."""
    floor: float
    """Level in nats below which nothing is ever wrong."""
    is_exact: bool
    """Whether both sides compute in float32."""
    is_ahead: bool = False
    """Whether generation runs ahead of training, so that a step may have no token of age 0."""
    on_disagreement: OnDisagreement | None = None
    """None: stop where the pair is exact."""

    @classmethod
    def of(cls, config: RolloutRunConfig) -> AgreementRule:
        """What a configuration says."""
        rollout = config.rollout
        is_plain = config.dtype is Dtype.FLOAT32 and rollout.dtype in (None, Dtype.FLOAT32) and not config.bf16
        # Quantised weights are published as plain ones, and computed with by kernels of their own.
        is_exact = is_plain and not (config.load_in_4bit or config.load_in_8bit)
        ceiling = rollout.canary_tolerance or (1e-3 if is_exact else 0.2)
        return cls(
            ceiling=ceiling,
            floor=min(ceiling, 2e-4 if is_exact else 0.02),
            is_exact=is_exact,
            is_ahead=config.slot_bounds.max_staleness > 0,
            on_disagreement=rollout.on_disagreement,
        )

    @property
    def stops(self) -> bool:
        """Whether a pair that drifts apart ends the run."""
        return self.on_disagreement is OnDisagreement.STOP or (self.on_disagreement is None and self.is_exact)

    @property
    def only_warns(self) -> bool:
        """Whether not even what is beyond the ceiling ends it."""
        return self.on_disagreement is OnDisagreement.WARN

    def limit(self, baseline: float | None) -> float:
        """The largest level, given what the pair showed at version 0; None: this is it."""
        return self.ceiling if baseline is None else min(self.ceiling, max(self.floor, FACTOR * baseline))
