"""The options of the policy objective, under TRL's argument names where TRL has the option.

Options that contradict each other are refused here, from their values alone. What only has no effect beside other
options, like `entropy_target` without `use_adaptive_entropy`, is left alone unless it looks as if it had one.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

from pydantic import Field

from trl_ray.config.base import FROM_STRING, Fraction, Positive, rule
from trl_ray.config.losses.loss_section import LossSection, ReferenceSync

NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]


class LossType(enum.StrEnum):
    """What a token's loss is (`trl_ray.algorithms.policy.surrogates`) and how token losses become one number
    (`trl_ray.algorithms.policy.policy_terms`)."""

    GRPO = "grpo"
    DAPO = "dapo"
    DR_GRPO = "dr_grpo"
    BNPO = "bnpo"
    CISPO = "cispo"
    SAPO = "sapo"
    LUSPO = "luspo"
    VESPO = "vespo"


class ImportanceLevel(enum.StrEnum):
    """Over what the ratio policy / old policy is taken."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    """Geometric mean over the completion, one ratio for all its tokens (GSPO)."""
    SEQUENCE_PRODUCT = "sequence_product"
    """Product over the completion: the ratio of the whole completion's probabilities (RLOO)."""


class OldLogprobs(enum.StrEnum):
    """Which policy the probability ratio is taken against."""

    POLICY = "policy"
    """The learner's weights before the first update on the completions: the proximal policy of decoupled PPO
    (https://arxiv.org/abs/2110.00641). The staleness of the sampler is left to the importance correction."""
    SAMPLER = "sampler"
    """The policy that sampled the token: the ratio carries the staleness, and clipping bounds it."""


class ImportanceMode(enum.StrEnum):
    """How the ratio old policy / sampler corrects for their mismatch."""

    TOKEN_TRUNCATE = "token_truncate"
    TOKEN_MASK = "token_mask"
    SEQUENCE_TRUNCATE = "sequence_truncate"
    SEQUENCE_MASK = "sequence_mask"


class KLEstimator(enum.StrEnum):
    """How the divergence from the reference is estimated from one token; x = log reference - log policy."""

    K1 = "k1"
    """-x: unbiased, of either sign. Its own gradient is 0 in the mean: in the loss it needs the ratio."""
    K2 = "k2"
    """x^2 / 2: its gradient is that of the KL, for tokens drawn from the policy."""
    K3 = "k3"
    """e^x - x - 1: unbiased, never negative."""


class KLPlacement(enum.StrEnum):
    """Where the divergence from the reference counts."""

    LOSS = "loss"
    """Added to each token's loss, with its gradient."""
    REWARD = "reward"
    """Summed over the completion and taken from its reward before advantages are formed, without gradient."""


CLIPPED = frozenset({LossType.GRPO, LossType.DAPO, LossType.DR_GRPO, LossType.BNPO, LossType.LUSPO})
"""Losses with PPO's clipped ratio; they differ in how token losses become one number."""
SEQUENCE_MODES = frozenset({ImportanceMode.SEQUENCE_TRUNCATE, ImportanceMode.SEQUENCE_MASK})
"""Corrections by the product of the ratios of all tokens of a completion."""
MASK_MODES = frozenset({ImportanceMode.TOKEN_MASK, ImportanceMode.SEQUENCE_MASK})
"""Corrections that leave out what is out of bounds."""


class LossConfig(LossSection):
    """The policy objective; `trl_ray.algorithms.policy.policy_loss` has the formulas.

    Names and defaults are those of TRL's GRPOConfig. Its default importance mode, sequence_mask, leaves out almost all
    long completions of an asynchronous sampler (it bounds a product over all tokens), so the default here is
    token_truncate.
    """

    built_in: ClassVar[str] = "trl_ray.algorithms.policy.policy_loss:PolicyLoss"

    loss_type: Annotated[LossType, FROM_STRING] = LossType.DAPO
    importance_sampling_level: Annotated[ImportanceLevel, FROM_STRING] = ImportanceLevel.TOKEN
    """GSPO is ``sequence`` with ``loss_type=grpo``; luspo's paper uses it too. vespo has a level of its own."""
    epsilon: NonNegative = 0.2
    """Clipping range of the ratio: from 1 - epsilon; grpo, dapo, dr_grpo, bnpo and luspo."""
    epsilon_high: NonNegative | None = None
    """To 1 + epsilon_high; None uses `epsilon`. For cispo it is the largest ratio itself (5.0 in ScaleRL)."""
    delta: AboveZero | None = None
    """Largest ratio that counts where the advantage is negative (two-sided clipping); None is none."""
    old_logprobs: Annotated[OldLogprobs, FROM_STRING] = OldLogprobs.POLICY
    sapo_temperature_pos: AboveZero = 1.0
    sapo_temperature_neg: AboveZero = 1.05
    vespo_k_pos: AboveZero = 2.0
    vespo_lambda_pos: AboveZero = 3.0
    vespo_k_neg: AboveZero = 3.0
    vespo_lambda_neg: AboveZero = 2.0

    beta: NonNegative = 0.0
    """Weight of the KL to the reference; 0 loads no reference model."""
    kl_estimator: Annotated[KLEstimator, FROM_STRING] = KLEstimator.K3
    use_bias_correction_kl: bool = True
    """Multiply the estimate by the ratio, so that its gradient is that of the KL itself."""
    kl_placement: Annotated[KLPlacement, FROM_STRING] = KLPlacement.LOSS
    sync_ref_model: bool = False
    """Move the reference towards the policy every `ref_model_sync_steps` steps."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """reference <- (1 - alpha) reference + alpha policy."""
    ref_model_sync_steps: Positive = 512

    off_policy_mask_threshold: NonNegative | None = None
    """Leave out completions of negative advantage whose mean log-ratio sampler / policy exceeds this, in nats per
    token; None: none."""
    top_entropy_quantile: Fraction = 1.0
    """Train only on this share of the step's tokens, those of highest entropy; 1 trains on all, 0 on the highest."""
    entropy_coef: NonNegative = 0.0
    """Weight of the mean entropy as a bonus; the start value where it adapts."""
    use_adaptive_entropy: bool = False
    """Raise the coefficient while entropy is at or below `entropy_target`, lower it and leave the bonus out above."""
    entropy_coef_min: NonNegative = 0.0
    entropy_coef_max: NonNegative = 1.0
    entropy_coef_delta: NonNegative = 0.005
    """How far the coefficient moves with each optimizer update."""
    entropy_target: NonNegative = 0.2
    """Nats per token."""

    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: Annotated[ImportanceMode, FROM_STRING] = ImportanceMode.TOKEN_TRUNCATE
    vllm_importance_sampling_clip_max: AboveZero | None = 3.0
    """Largest ratio; above it a truncated one is held and a masked one is 0. None: unbounded."""
    vllm_importance_sampling_clip_min: NonNegative | None = None

    num_iterations: Positive = 1
    """Passes over the completions of one generation batch (mu)."""

    @property
    def compares_with_reference(self) -> bool:
        return self.beta != 0

    @property
    def clip_bounds(self) -> tuple[float, float]:
        if self.loss_type is LossType.CISPO:
            return 0.0, self.upper_epsilon
        return 1 - self.epsilon, 1 + self.upper_epsilon

    @property
    def reference_sync(self) -> ReferenceSync | None:
        if not self.sync_ref_model:
            return None
        return ReferenceSync(mixup_alpha=self.ref_model_mixup_alpha, sync_steps=self.ref_model_sync_steps)

    @property
    def corrects_for_sampler(self) -> bool:
        """Whether token losses are weighed by old policy / sampler; with `old_logprobs=sampler` that ratio is 1."""
        return self.vllm_importance_sampling_correction and self.old_logprobs is OldLogprobs.POLICY

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether entropy is rewarded, be it with a weight that is 0 at times."""
        return self.entropy_coef > 0 or self.use_adaptive_entropy

    @property
    def kl_in_loss(self) -> bool:
        """Whether the divergence from the reference is added to each token's loss."""
        return self.beta > 0 and self.kl_placement is KLPlacement.LOSS

    @property
    def kl_in_reward(self) -> bool:
        """Whether the divergence from the reference is taken from rewards."""
        return self.beta > 0 and self.kl_placement is KLPlacement.REWARD

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon` where it is left out."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @rule
    def _check_upper_clip(self) -> None:
        if self.loss_type in {LossType.SAPO, LossType.VESPO} and self.epsilon_high is not None:
            raise ValueError(
                f"epsilon_high must be left out with loss_type={self.loss_type.value}, got {self.epsilon_high}: "
                f"{self.loss_type.value} does not clip. Remove it."
            )
        if self.loss_type in CLIPPED and self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise ValueError(
                f"epsilon_high must be at least epsilon, got epsilon_high={self.epsilon_high} and "
                f"epsilon={self.epsilon}. Raise epsilon_high or leave it out."
            )

    @rule
    def _check_cispo_cap(self) -> None:
        if self.loss_type is LossType.CISPO and (self.epsilon_high is None or self.epsilon_high < 1):
            given = "null" if self.epsilon_high is None else self.epsilon_high
            raise ValueError(
                f"epsilon_high must be at least 1 with loss_type=cispo, got {given}: there it is the largest ratio "
                "itself, not the distance from 1. Set epsilon_high=5.0, as ScaleRL does."
            )

    @rule
    def _check_delta(self) -> None:
        if self.delta is None:
            return
        if self.loss_type not in CLIPPED:
            raise ValueError(
                f"delta must be left out with loss_type={self.loss_type.value}, got {self.delta}: it bounds the ratio "
                f"of a clipped loss from above. Remove it, or choose one of {', '.join(sorted(CLIPPED))}."
            )
        if self.delta <= 1 + self.upper_epsilon:
            raise ValueError(
                f"delta must exceed 1 + epsilon_high (or epsilon), got delta={self.delta} and "
                f"{1 + self.upper_epsilon:g}: below it would clip positive advantages and leave negative ones alone. "
                "Raise delta."
            )

    @rule
    def _check_vespo(self) -> None:
        if self.loss_type is not LossType.VESPO:
            return
        if self.importance_sampling_level is ImportanceLevel.SEQUENCE:
            raise ValueError(
                "importance_sampling_level must be token with loss_type=vespo, got sequence: vespo weighs completions "
                "by the product of their tokens' ratios itself. Remove importance_sampling_level."
            )
        if self.corrects_for_sampler and self.vllm_importance_sampling_mode in SEQUENCE_MODES:
            raise ValueError(
                "vllm_importance_sampling_mode must be token_truncate or token_mask with loss_type=vespo, got "
                f"{self.vllm_importance_sampling_mode.value}: vespo multiplies the tokens' ratios itself. Choose one "
                "of the two."
            )

    @rule
    def _check_correction_bounds(self) -> None:
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                "vllm_importance_sampling_clip_min must be less than vllm_importance_sampling_clip_max, "
                f"got {low} and {high}. Lower the minimum."
            )
        mode = self.vllm_importance_sampling_mode
        if self.corrects_for_sampler and mode not in MASK_MODES and low is None and high is None:
            raise ValueError(
                "vllm_importance_sampling_clip_max must be set unless vllm_importance_sampling_clip_min is, got null: "
                f"{mode.value} would truncate nothing. Set one of the two."
            )

    @rule
    def _check_correction_of_nothing(self) -> None:
        if (
            self.old_logprobs is OldLogprobs.SAMPLER
            and self.vllm_importance_sampling_mode is not ImportanceMode.TOKEN_TRUNCATE
            and self.vllm_importance_sampling_correction
        ):
            raise ValueError(
                "vllm_importance_sampling_mode must be left out with old_logprobs=sampler, got "
                f"{self.vllm_importance_sampling_mode.value}: that ratio already is policy / sampler, so there is "
                "nothing left to correct. Remove one of the two."
            )

    @rule
    def _check_reference(self) -> None:
        if self.sync_ref_model and self.beta == 0:
            raise ValueError(
                "sync_ref_model must be false with beta=0, got true: without a KL there is no reference. Set beta, or "
                "remove sync_ref_model."
            )
        in_loss = self.kl_in_loss
        if in_loss and self.kl_estimator is KLEstimator.K1 and not self.use_bias_correction_kl:
            raise ValueError(
                "use_bias_correction_kl must be true with kl_estimator=k1 and kl_placement=loss, got false: the mean "
                "of that estimate's gradient is 0, so it would add noise and hold nothing. Set it to true, choose k2 "
                "or k3, or set kl_placement=reward."
            )

    @rule
    def _check_adaptive_entropy(self) -> None:
        if not self.use_adaptive_entropy:
            return
        low, high = self.entropy_coef_min, self.entropy_coef_max
        if low >= high:
            raise ValueError(
                "entropy_coef_min must be less than entropy_coef_max with use_adaptive_entropy=true, got "
                f"{low} and {high}: the coefficient could not move. Change one of the two."
            )
        if not low <= self.entropy_coef <= high:
            raise ValueError(
                "entropy_coef must lie between entropy_coef_min and entropy_coef_max with use_adaptive_entropy=true, "
                f"got {self.entropy_coef}, which is not in [{low}, {high}]. Change one of the three."
            )
        if self.entropy_coef_delta == 0:
            raise ValueError(
                "entropy_coef_delta must be above 0 with use_adaptive_entropy=true, got 0.0: the coefficient would "
                "never change. Raise it, or set use_adaptive_entropy=false."
            )
