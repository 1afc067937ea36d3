"""The policy objective of GRPO and its relatives, over the trained tokens of a micro-batch.

    L_t = surrogate(rho, A) * w * kept  +  beta * [rho] KL_t               loss = aggregate(L) - coef * mean entropy

    rho   policy / old policy, of a token or of a completion (GSPO, RLOO)        policy_terms.py
    surrogate  clipped, cispo, sapo, vespo                                       surrogates.py
    w     old policy / sampler, held within bounds                               policy_terms.py
    kept  0 where a completion is too far off-policy (policy_terms.py), or a token is too sure (first_pass.py)
    KL_t  estimate of KL(policy || reference), neither masked, clipped nor corrected
    aggregate, over the whole update                                             policy_terms.py

Every denominator is a total of the whole optimizer update, over all micro-batches and ranks; but for bnpo, which is
defined by micro-batches, it does not matter how an update is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenMetrics
from trl_ray.algorithms.loss import LossInputs, LossNeeds, LossOutput
from trl_ray.algorithms.policy import surrogates
from trl_ray.algorithms.policy.policy_terms import (
    EntropyBonus,
    aggregate,
    kl_estimate,
    kl_penalty,
    off_policy,
    old_logprobs,
    policy_ratio,
    sampler_correction,
)
from trl_ray.config.losses.policy_options import (
    CLIPPED,
    ImportanceLevel,
    KLEstimator,
    LossConfig,
    LossType,
)
from trl_ray.types import Metric, Reduce, TrainingSample


class PolicyLoss:
    """The surrogate with every option of `LossConfig`; implements the `Loss` protocol.

    *Decoupled PPO*, `old_logprobs=policy`: three policies meet in a token's loss. The sampler drew it, maybe versions
    ago; the old (proximal) policy is the learner before the first update on it; the policy is the learner now. The
    ratio policy / old policy is clipped, so that the updates of one step stay near to where the step began; the
    weight old policy / sampler, without gradient, corrects for who drew the token. When a generation batch gives one
    update only, the first two are one: the ratio is 1, nothing is clipped, and only its gradient counts. When it
    gives several, `TrainingSample.old_logprobs` must hold the old policy's log-probs of a first pass
    (`first_pass.with_scores`). With `old_logprobs=sampler` there is one ratio, policy / sampler, and clipping bounds
    staleness and updates together, as in TRL's asynchronous GRPO.

    Metrics, means over trained tokens unless said otherwise:

    * `entropy`, `kl/sampler`, `importance/mean`, `importance/max`, `importance/ess`; `kl/ref` with a KL in the loss;
    * `clip/low`, `clip/high`: where the ratio is out of bounds on the side the advantage pushes to; over completions,
      when the ratio is of completions. cispo has `clip/high` only, sapo and vespo have neither;
    * `off_policy/masked_fraction`, `entropy/kept_fraction`, `entropy/kept` (mean entropy where the mask keeps tokens);
    * `vespo/phi_seq_mean` over completions; `entropy_coef` after the update.

    Args:
        config: the options.
        max_completion_length: the fixed length dr_grpo divides by, in tokens; the others do without.
    """

    def __init__(self, config: LossConfig, *, max_completion_length: int | None = None) -> None:
        self.config = config
        self.max_completion_length = max_completion_length
        self._bonus = EntropyBonus(config)

    @property
    def needs(self) -> LossNeeds:
        """A reference while the KL has weight, in the loss or in the reward."""
        return LossNeeds(reference=self.config.beta > 0)

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        """Those that every batch has are enough."""
        del samples
        return {}

    def has_gradient(self, sample: TrainingSample) -> bool:
        """The KL moves every trained token; advantage and entropy bonus move those that no mask leaves out."""
        if self.config.kl_in_loss:
            return bool(sample.loss_mask.any())
        # A NaN is not 0: the learner must meet it.
        if sample.advantage == 0 and self._bonus.applied == 0:
            return False
        mask = sample.loss_mask if sample.surrogate_mask is None else sample.loss_mask & sample.surrogate_mask
        return bool(mask.any())

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Loss and metrics of one micro-batch."""
        config, tokens = self.config, inputs.tokens
        metrics = TokenMetrics(tokens)
        log_ratio = inputs.logprobs - old_logprobs(inputs, config)
        ratio = policy_ratio(log_ratio, tokens, config.importance_sampling_level)
        correction = sampler_correction(inputs, config)
        per_token = self.surrogate(inputs, log_ratio, ratio, correction.weight, metrics)
        if config.off_policy_mask_threshold is not None:
            far = off_policy(inputs, config.off_policy_mask_threshold)
            # Set to 0 rather than left out: denominators are those of the whole update, whatever is masked.
            per_token = per_token.masked_fill(far, 0.0)
            metrics.add("off_policy/masked_fraction", far)
        if tokens.surrogate_mask is not None:
            per_token = per_token.masked_fill(~tokens.surrogate_mask, 0.0)
            metrics.add("entropy/kept_fraction", tokens.surrogate_mask)
            metrics.add("entropy/kept", inputs.entropy, where=tokens.surrogate_mask)
        # vespo has multiplied it into the ratio of the completion.
        if correction.weight is not None and config.loss_type is not LossType.VESPO:
            per_token = per_token * correction.weight
        # After masks and weights: what holds the policy near its reference counts on every trained token.
        if config.kl_in_loss:
            per_token = per_token + config.beta * self._kl(inputs, ratio, metrics)
        loss = self.aggregate(per_token, inputs)
        # Not part of what is aggregated: the bonus is on the mean over tokens, whatever the loss averages over.
        if self._bonus.applied > 0:
            loss = loss - self._bonus.applied * _entropy_share(inputs)
        metrics.add("entropy", inputs.entropy)
        # k3 of tokens drawn from the sampler: the estimate of KL(sampler || policy) that is never negative.
        sampled = kl_estimate(inputs.sampler_logprobs, inputs.logprobs.detach(), KLEstimator.K3)
        metrics.add("kl/sampler", sampled)
        metrics.add_ratio("importance", correction.ratio)
        return LossOutput(loss=loss, metrics=metrics.metrics())

    def surrogate(
        self, inputs: LossInputs, log_ratio: Tensor, ratio: Tensor, weight: Tensor | None, metrics: TokenMetrics
    ) -> Tensor:
        """Token losses [N] before masks and weights; what a loss of another surrogate overrides.

        Args:
            inputs: of the micro-batch.
            log_ratio: [N] log policy - log old policy, with gradient.
            ratio: [N] the same as a ratio, of tokens or of completions (`importance_sampling_level`).
            weight: [N] old policy / sampler, held within bounds, which multiplies the result; None: there is none.
            metrics: takes what is to be reported.
        """
        assert self.config.loss_type in _SURROGATES, (
            f"a loss_type must have a surrogate of its own, but {self.config.loss_type} has none"
        )
        return _SURROGATES[self.config.loss_type](self, inputs, log_ratio, ratio, weight, metrics)

    def aggregate(self, per_token: Tensor, inputs: LossInputs) -> Tensor:
        """Token losses [N] to this micro-batch's share of the update's loss; what a loss of another mean overrides."""
        return aggregate(
            per_token, inputs, loss_type=self.config.loss_type, max_completion_length=self.max_completion_length
        )

    def _clipped(
        self, inputs: LossInputs, log_ratio: Tensor, ratio: Tensor, weight: Tensor | None, metrics: TokenMetrics
    ) -> Tensor:
        del log_ratio, weight
        config, advantages = self.config, inputs.tokens.advantages
        low, high = config.epsilon, config.upper_epsilon
        # Only on the side to which the advantage pushes does clipping take the gradient away.
        self._add_clip(metrics, "clip/low", (ratio < 1 - low) & (advantages < 0))
        self._add_clip(metrics, "clip/high", (ratio > 1 + high) & (advantages > 0))
        return surrogates.clipped(ratio, advantages, low=low, high=high, delta=config.delta)

    def _cispo(
        self, inputs: LossInputs, log_ratio: Tensor, ratio: Tensor, weight: Tensor | None, metrics: TokenMetrics
    ) -> Tensor:
        del log_ratio, weight
        advantages, cap = inputs.tokens.advantages, self.config.upper_epsilon
        self._add_clip(metrics, "clip/high", (ratio > cap) & (advantages > 0))
        return surrogates.cispo(inputs.logprobs, ratio, advantages, cap=cap)

    def _sapo(
        self, inputs: LossInputs, log_ratio: Tensor, ratio: Tensor, weight: Tensor | None, metrics: TokenMetrics
    ) -> Tensor:
        del log_ratio, weight, metrics
        positive, negative = self.config.sapo_temperature_pos, self.config.sapo_temperature_neg
        return surrogates.sapo(ratio, inputs.tokens.advantages, positive=positive, negative=negative)

    def _vespo(
        self, inputs: LossInputs, log_ratio: Tensor, ratio: Tensor, weight: Tensor | None, metrics: TokenMetrics
    ) -> Tensor:
        del ratio
        config = self.config
        phi = surrogates.vespo_weights(
            log_ratio,
            inputs.tokens,
            correction=weight,
            positive=(config.vespo_k_pos, config.vespo_lambda_pos),
            negative=(config.vespo_k_neg, config.vespo_lambda_neg),
        )
        metrics.add_by_sample("vespo/phi_seq_mean", phi)
        return surrogates.weighed(inputs.logprobs, phi, inputs.tokens.advantages)

    def _add_clip(self, metrics: TokenMetrics, name: str, clipped: Tensor) -> None:
        # The ratio of a completion is clipped once, however many tokens it stands at.
        if self.config.importance_sampling_level is ImportanceLevel.TOKEN:
            metrics.add(name, clipped)
        else:
            metrics.add_by_sample(name, clipped)

    def _kl(self, inputs: LossInputs, ratio: Tensor, metrics: TokenMetrics) -> Tensor:
        """Penalties [N]."""
        assert inputs.reference_logprobs is not None, "a KL in the loss needs log-probs of the reference"
        kl = kl_estimate(inputs.logprobs, inputs.reference_logprobs, self.config.kl_estimator)
        metrics.add("kl/ref", kl)
        return kl_penalty(kl, ratio, self.config.kl_estimator) if self.config.use_bias_correction_kl else kl

    def joined(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Nothing."""
        del metrics
        return {}

    def after_update(self, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Adapt the weight of the entropy bonus.

        Args:
            metrics: of the whole update, all ranks; `entropy/kept` where a mask leaves tokens out, else `entropy`.
        """
        entropy = metrics.get("entropy/kept", metrics.get("entropy"))
        if not self.config.has_entropy_bonus or entropy is None:
            return {}
        self._bonus.adapt(entropy.value)
        return {"entropy_coef": Metric(value=self._bonus.coefficient, reduce=Reduce.LAST)}

    def state_dict(self) -> dict[str, float]:
        """The state of the entropy bonus; empty where it is fixed."""
        return self._bonus.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state.

        Raises:
            KeyError: it was saved by a run whose bonus did not adapt.
        """
        self._bonus.load_state_dict(state)


def _entropy_share(inputs: LossInputs) -> Tensor:
    """What this micro-batch adds to the mean entropy over the tokens of the update that the surrogate trains on."""
    mask, totals = inputs.tokens.surrogate_mask, inputs.totals
    if mask is None:
        return inputs.entropy.sum() / max(totals.num_valid_tokens, 1)
    assert totals.num_surrogate_tokens is not None, "an update whose samples have surrogate masks counts their tokens"
    return inputs.entropy.masked_fill(~mask, 0.0).sum() / max(totals.num_surrogate_tokens, 1)


_SURROGATES: Mapping[str, Callable[..., Tensor]] = {
    **dict.fromkeys(CLIPPED, PolicyLoss._clipped),
    LossType.CISPO: PolicyLoss._cispo,
    LossType.SAPO: PolicyLoss._sapo,
    LossType.VESPO: PolicyLoss._vespo,
}
"""What a token loses, by type; `policy_terms.aggregate` has the same types' means."""
