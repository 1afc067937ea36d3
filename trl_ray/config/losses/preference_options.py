"""The options of losses on preferences, under the argument names of TRL's DPOConfig, KTOConfig, CPOConfig, ORPOConfig.

PreferenceLossConfig     pairs against a reference (DPO and its family)    algorithms.preference.paired_preference
UnpairedLossConfig       single labelled completions against a reference   algorithms.preference.unpaired_preference
CPOLossConfig, ORPOLossConfig    pairs without a reference                 algorithms.preference.reference_free

Options that contradict each other are refused here, from their values alone.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from trl_ray.config.base import FROM_STRING, Fraction, Positive, rule
from trl_ray.config.losses.loss_section import LossSection, ReferenceSync

NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
FlipProbability = Annotated[float, Field(ge=0, lt=0.5)]


class PreferenceLossType(enum.StrEnum):
    """What a pair of completions loses (`trl_ray.algorithms.preference.preference_terms` has the formulas)."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    EXO_PAIR = "exo_pair"
    NCA_PAIR = "nca_pair"
    ROBUST = "robust"
    BCO_PAIR = "bco_pair"
    SPPO_HARD = "sppo_hard"
    AOT = "aot"
    AOT_UNPAIRED = "aot_unpaired"
    APO_ZERO = "apo_zero"
    APO_DOWN = "apo_down"
    DISCOPOP = "discopop"
    SFT = "sft"
    SIGMOID_NORM = "sigmoid_norm"


class FDivergence(enum.StrEnum):
    """What holds the policy near the reference (https://arxiv.org/abs/2309.16240)."""

    REVERSE_KL = "reverse_kl"
    FORWARD_KL = "forward_kl"
    JS_DIVERGENCE = "js_divergence"
    ALPHA_DIVERGENCE = "alpha_divergence"


class UnpairedLossType(enum.StrEnum):
    """What a completion that was found good or bad loses (`trl_ray.algorithms.preference.unpaired_preference`)."""

    KTO = "kto"
    APO_ZERO_UNPAIRED = "apo_zero_unpaired"


class CPOLossType(enum.StrEnum):
    """What a pair loses without a reference (`trl_ray.algorithms.preference.reference_free`)."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    SIMPO = "simpo"
    ALPHAPO = "alphapo"
    """simpo without the likelihood of the chosen completions; its shape is `alpha`."""


SORTING = frozenset({PreferenceLossType.AOT, PreferenceLossType.AOT_UNPAIRED})
"""Losses that sort the pairs of a micro-batch, so that they depend on how an update is cut."""
DIFFERENCE_OF_SCORES = frozenset(
    {
        PreferenceLossType.SIGMOID,
        PreferenceLossType.SIGMOID_NORM,
        PreferenceLossType.HINGE,
        PreferenceLossType.IPO,
        PreferenceLossType.EXO_PAIR,
        PreferenceLossType.ROBUST,
        PreferenceLossType.DISCOPOP,
    }
)
"""Losses in which what an f-divergence leaves unknown, a term of the prompt alone, cancels."""
SMOOTHED = SORTING | {PreferenceLossType.ROBUST, PreferenceLossType.EXO_PAIR}
"""Losses that read `label_smoothing`."""


def _as_tuple(value: Any) -> Any:
    """A strict model takes no list for a tuple, and YAML has nothing else; one name stands for itself."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class PreferenceLossConfig(LossSection):
    """The loss of pairs against a reference; names and defaults are those of TRL's DPOConfig."""

    built_in: ClassVar[str] = "trl_ray.algorithms.preference.paired_preference:PreferenceLoss"

    loss_type: Annotated[
        tuple[Annotated[PreferenceLossType, FROM_STRING], ...], BeforeValidator(_as_tuple), Field(min_length=1)
    ] = (PreferenceLossType.SIGMOID,)
    """One name or several; the loss is their sum, weighed by `loss_weights`."""
    loss_weights: Annotated[tuple[NonNegative, ...] | None, BeforeValidator(_as_tuple)] = None
    """One per loss; None: 1.0 each. MPO is ``[sigmoid, bco_pair, sft]`` with ``[0.8, 0.2, 1.0]``."""
    beta: AboveZero = 0.1
    """How strongly the policy is held to the reference; the target margin of ipo is 1 / (2 beta)."""
    label_smoothing: FlipProbability = 0.0
    """Probability that a pair is labelled the wrong way round: robust, exo_pair, aot and aot_unpaired."""
    f_divergence_type: Annotated[FDivergence, FROM_STRING] = FDivergence.REVERSE_KL
    f_alpha_divergence_coef: float = 0.5
    """The alpha of alpha_divergence: 0 is forward_kl, 1 is reverse_kl."""
    ld_alpha: Fraction | None = None
    """What a token counts beyond the length of the pair's shorter completion (LD-DPO); None: as the others."""
    use_weighting: bool = False
    """Weigh pairs by how probable the policy finds them (WPO)."""
    discopop_tau: AboveZero = 0.05
    """Temperature of discopop's blend."""
    precompute_ref_log_probs: bool = False
    """Ask the reference once, before training, and keep its answers on disk."""
    sync_ref_model: bool = False
    """Move the reference towards the policy every `ref_model_sync_steps` steps (TR-DPO)."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """reference <- (1 - alpha) reference + alpha policy."""
    ref_model_sync_steps: Positive = 512

    @property
    def weighted_losses(self) -> tuple[tuple[PreferenceLossType, float], ...]:
        """Each loss with its weight; those of weight 0 are left out."""
        weights = self.loss_weights if self.loss_weights is not None else (1.0,) * len(self.loss_type)
        return tuple((kind, weight) for kind, weight in zip(self.loss_type, weights, strict=True) if weight)

    @property
    def compares_with_reference(self) -> bool:
        return self.needs_reference

    @property
    def precomputes_reference(self) -> bool:
        return self.precompute_ref_log_probs

    @property
    def reference_sync(self) -> ReferenceSync | None:
        if not self.sync_ref_model:
            return None
        return ReferenceSync(mixup_alpha=self.ref_model_mixup_alpha, sync_steps=self.ref_model_sync_steps)

    @property
    def needs_reference(self) -> bool:
        """Whether any loss with weight compares with the reference: all but sft do."""
        return any(kind is not PreferenceLossType.SFT for kind, _ in self.weighted_losses)

    @property
    def depends_on_cut(self) -> bool:
        """Whether the loss changes with how an update is cut into micro-batches."""
        return any(kind in SORTING for kind, _ in self.weighted_losses)

    def _names(self) -> str:
        return ", ".join(kind.value for kind in self.loss_type)

    @rule
    def _check_weights(self) -> None:
        if len(set(self.loss_type)) != len(self.loss_type):
            raise ValueError(
                f"loss_type must name each loss once, got {self._names()}. Name it once and add up its weights in "
                "loss_weights."
            )
        if self.loss_weights is None:
            return
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights must hold one weight per loss_type, got {len(self.loss_weights)} for "
                f"{len(self.loss_type)} ({self._names()}). Give one each, or leave loss_weights out."
            )
        if not any(self.loss_weights):
            raise ValueError(
                f"loss_weights must hold a weight above 0, got {list(self.loss_weights)}: nothing would be trained. "
                "Raise one."
            )

    @rule
    def _check_f_divergence(self) -> None:
        supported = DIFFERENCE_OF_SCORES | {PreferenceLossType.SFT}
        others = [kind.value for kind in self.loss_type if kind not in supported]
        if self.f_divergence_type is not FDivergence.REVERSE_KL and others:
            raise ValueError(
                f"f_divergence_type must be reverse_kl with loss_type={', '.join(others)}, got "
                f"{self.f_divergence_type.value}: only in a difference of scores does the divergence's unknown term "
                f"cancel. Choose among {', '.join(sorted(supported))}, or remove f_divergence_type."
            )

    @rule
    def _check_label_smoothing(self) -> None:
        if PreferenceLossType.EXO_PAIR in self.loss_type and self.label_smoothing == 0:
            raise ValueError(
                "label_smoothing must be above 0 with loss_type=exo_pair, got 0.0: the loss takes its logarithm. Set "
                "label_smoothing=0.001, as the EXO paper does."
            )
        if self.label_smoothing > 0 and not SMOOTHED & set(self.loss_type):
            raise ValueError(
                f"label_smoothing must be 0 with loss_type={self._names()}, got {self.label_smoothing}: only "
                f"{', '.join(sorted(SMOOTHED))} read it. Choose robust, or remove label_smoothing."
            )

    @rule
    def _check_weighting(self) -> None:
        sorting = [kind.value for kind in self.loss_type if kind in SORTING]
        if self.use_weighting and sorting:
            raise ValueError(
                f"use_weighting must be false with loss_type={', '.join(sorting)}, got true: sorting takes pairs "
                "apart, so that weights of pairs mean nothing. Remove one of the two."
            )

    @rule
    def _check_reference(self) -> None:
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model must be false with precompute_ref_log_probs=true, got true: what was asked of the "
                "reference before training would be out of date after the first synchronisation. Remove one of the two."
            )
        for name in ("sync_ref_model", "precompute_ref_log_probs"):
            if getattr(self, name) and not self.needs_reference:
                raise ValueError(
                    f"{name} must be false with loss_type=sft, got true: sft has no reference. Remove {name}, or add a "
                    "loss that compares with one."
                )


class UnpairedLossConfig(LossSection):
    """The loss of single completions against a reference; names and defaults are those of TRL's KTOConfig."""

    built_in: ClassVar[str] = "trl_ray.algorithms.preference.unpaired_preference:UnpairedLoss"

    loss_type: Annotated[UnpairedLossType, FROM_STRING] = UnpairedLossType.KTO
    beta: AboveZero = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: NonNegative = 1.0
    """What a good completion counts; KTO's paper keeps weight times number of both kinds within 1 to 4/3."""
    undesirable_weight: NonNegative = 1.0
    precompute_ref_log_probs: bool = False
    """Ask the reference once, before training, and keep its answers on disk."""

    @property
    def compares_with_reference(self) -> bool:
        return True

    @property
    def precomputes_reference(self) -> bool:
        return self.precompute_ref_log_probs

    @property
    def needs_kl(self) -> bool:
        """Whether the update needs an estimate of the KL, from mismatched completions."""
        return self.loss_type is UnpairedLossType.KTO

    @rule
    def _check_weights(self) -> None:
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "desirable_weight or undesirable_weight must be above 0, got 0.0 and 0.0: nothing would be trained. "
                "Raise one."
            )


class CPOLossConfig(LossSection):
    """The loss of pairs without a reference; names and defaults are those of TRL's CPOConfig. SimPO is one of them."""

    built_in: ClassVar[str] = "trl_ray.algorithms.preference.reference_free:CPOLoss"

    loss_type: Annotated[CPOLossType, FROM_STRING] = CPOLossType.SIGMOID
    beta: AboveZero = 0.1
    label_smoothing: FlipProbability = 0.0
    """Probability that a pair is labelled the wrong way round; not for hinge and ipo."""
    cpo_alpha: NonNegative = 1.0
    """Weight of the chosen completions' negative log-likelihood; alphapo has none. SimPO proper sets it to 0."""
    simpo_gamma: float = 0.5
    """Target margin of simpo and alphapo, in units of beta times mean log-prob."""
    alpha: float = 0.0
    """Shape of the reward (1 - p^-alpha) / alpha; 0 is the log-prob itself."""

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood."""
        return 0.0 if self.loss_type is CPOLossType.ALPHAPO else self.cpo_alpha

    @property
    def averages_tokens(self) -> bool:
        """Whether a completion's log-prob is the mean over its tokens, not the sum."""
        return self.loss_type in {CPOLossType.IPO, CPOLossType.SIMPO, CPOLossType.ALPHAPO}

    @rule
    def _check_label_smoothing(self) -> None:
        if self.label_smoothing > 0 and self.loss_type in {CPOLossType.HINGE, CPOLossType.IPO}:
            raise ValueError(
                f"label_smoothing must be 0 with loss_type={self.loss_type.value}, got {self.label_smoothing}: that "
                "loss does not read it. Choose sigmoid, simpo or alphapo, or remove label_smoothing."
            )


class ORPOLossConfig(LossSection):
    """The odds-ratio loss; names and defaults are those of TRL's ORPOConfig."""

    built_in: ClassVar[str] = "trl_ray.algorithms.preference.reference_free:ORPOLoss"

    beta: AboveZero = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen texts (lambda in the paper)."""
