"""DPO and its family: a loss of pairs of completions, against a reference.

    tokens [N] --sequence_logprobs (LD-DPO)--> log-probs [2P] -- minus reference [2P] --> PairScores
                                                                                             |
    loss = sum_j weight_j sum_i w_i L_j(pair i) / pairs of the update  <---  preference_terms.py
           + weight_sft sum_i w_i sum_t -log pi(chosen token) / chosen tokens of the update

    w_i   1, or WPO's weight: the product over both completions of e^(mean_t (log pi - ln sum_v pi_v^2)), no gradient
                                                                                    https://arxiv.org/abs/2406.11827

Denominators are totals of the whole optimizer update, over all micro-batches and ranks: but for aot and aot_unpaired,
which sort the pairs of a micro-batch, it does not matter how an update is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences, means_of, sequence_logprobs
from trl_ray.algorithms.batches.trained_tokens import completion_lengths, pairs_of, reference_logprobs, trained_tokens
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.algorithms.preference.preference_terms import PAIR_LOSSES, PairScores, f_score
from trl_ray.config.losses.preference_options import PreferenceLossConfig, PreferenceLossType
from trl_ray.types import TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTotals:
    """Denominators of one optimizer update, over all micro-batches and ranks."""

    num_pairs: int
    num_chosen_tokens: int
    """Trained tokens of chosen completions; only sft reads it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairInputs:
    """P pairs of a micro-batch: completion 2i is the chosen one of pair i, 2i + 1 the rejected one."""

    tokens: TokenSequences
    """The N trained tokens of the 2P completions."""
    logprobs: Tensor
    """[N] of the policy, with gradient, in nats."""
    lengths: Tensor
    """[2P] completion tokens, which ipo and sigmoid_norm divide by. More than the trained ones where a prompt is empty,
    so that nothing predicts the first token."""
    reference: Tensor | None
    """[2P] `sequence_logprobs` of the reference, with the same ld_alpha; None only for a config without a need."""
    sum_squared_probs: Tensor | None = None
    """[N] sum over the vocabulary of the policy's squared probabilities, in (0, 1]; only WPO asks for it."""
    entropy: Tensor | None = None
    """[N] nats; None: it is not reported."""
    top1: Tensor | None = None
    """[N] bool, whether the token is the most probable one; None: accuracy is not reported."""
    totals: PairTotals


class PreferenceLoss(FixedLoss):
    """`preference_loss` as the learner calls it; implements the `Loss` protocol.

    Samples are chosen and rejected completions in turn. Totals: `pairs`; `chosen_tokens`, the trained tokens of chosen
    completions.
    """

    def __init__(self, config: PreferenceLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        """Precomputed references stand in the labels."""
        config = self.config
        return LossNeeds(
            reference=config.needs_reference and not config.precompute_ref_log_probs,
            sum_squared_probs=config.use_weighting,
            top1=True,
            whole_groups=True,
        )

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        chosen = [pair[0] for pair in pairs_of(samples)]
        return {"pairs": len(chosen), "chosen_tokens": trained_tokens(chosen)}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        config, scores, totals = self.config, inputs.language, inputs.totals
        pairs_of(inputs.samples)
        given = PairInputs(
            tokens=inputs.tokens,
            logprobs=scores.logprobs,
            lengths=completion_lengths(inputs),
            reference=reference_logprobs(inputs, ld_alpha=config.ld_alpha) if config.needs_reference else None,
            sum_squared_probs=scores.sum_squared_probs,
            entropy=scores.entropy,
            top1=scores.top1,
            totals=PairTotals(num_pairs=totals.count("pairs"), num_chosen_tokens=totals.count("chosen_tokens")),
        )
        return preference_loss(given, config)


def preference_loss(inputs: PairInputs, config: PreferenceLossConfig) -> LossOutput:
    """The loss of a micro-batch of pairs, with every option of `PreferenceLossConfig`.

    Metrics, means over pairs, which TRL calls the same: `rewards/chosen` and `rewards/rejected` (beta times the
    log-ratio to the reference), `rewards/accuracies`, `rewards/margins`; `logps/chosen`, `logps/rejected`; and
    `wpo/weight` with `use_weighting`. Rewards are left out without a reference. Where they are given, `entropy` over
    trained tokens and `mean_token_accuracy` over those of chosen completions.
    """
    assert len(inputs.lengths) == inputs.tokens.num_sequences, "every completion has a length"
    assert inputs.tokens.num_sequences % 2 == 0, "completions come in pairs"
    logps = sequence_logprobs(inputs.logprobs, inputs.tokens, ld_alpha=config.ld_alpha).view(-1, 2)
    values = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
    if inputs.entropy is not None:
        values["entropy"] = inputs.entropy
    if inputs.top1 is not None:
        values["mean_token_accuracy"] = inputs.top1[inputs.tokens.sample_index % 2 == 0]
    weights = pair_weights(inputs) if config.use_weighting else None
    if weights is not None:
        values["wpo/weight"] = weights
    pairs = _scores(logps, inputs, config)
    if pairs is not None:
        chosen, rejected = config.beta * pairs.chosen.detach(), config.beta * pairs.rejected.detach()
        values |= {"rewards/chosen": chosen, "rewards/rejected": rejected}
        values |= {"rewards/accuracies": chosen > rejected, "rewards/margins": chosen - rejected}
    loss = logps.new_zeros(())
    for kind, weight in config.weighted_losses:
        if kind is PreferenceLossType.SFT:
            loss = loss + weight * _chosen_nll(inputs, weights)
            continue
        assert pairs is not None, f"{kind.value} needs log-probs of the reference"
        per_pair = PAIR_LOSSES[kind](pairs, config)
        if weights is not None:
            per_pair = per_pair * weights
        loss = loss + weight * per_pair.sum() / max(inputs.totals.num_pairs, 1)
    return LossOutput(loss=loss, metrics=means_of(values))


def pair_weights(inputs: PairInputs) -> Tensor:
    """WPO's weights [P], without gradient (https://arxiv.org/abs/2406.11827, eq. 2)."""
    assert inputs.sum_squared_probs is not None, "WPO needs the sums of squared probabilities"
    aligned = inputs.logprobs.detach() - inputs.sum_squared_probs.detach().log()
    return inputs.tokens.means(aligned).view(-1, 2).sum(dim=1).exp()


def _scores(logps: Tensor, inputs: PairInputs, config: PreferenceLossConfig) -> PairScores | None:
    """From log-probs [P, 2] of the policy; None without a reference."""
    if inputs.reference is None:
        return None
    reference = inputs.reference.detach().view(-1, 2)
    ratios = logps - reference
    chosen, rejected = ratios.unbind(dim=1)
    lengths = inputs.lengths.clamp(min=1).view(-1, 2)
    return PairScores(
        chosen=chosen,
        rejected=rejected,
        chosen_score=f_score(chosen, config),
        rejected_score=f_score(rejected, config),
        chosen_length=lengths[:, 0],
        rejected_length=lengths[:, 1],
        policy_margin=logps[:, 0] - logps[:, 1],
        reference_margin=reference[:, 0] - reference[:, 1],
    )


def _chosen_nll(inputs: PairInputs, weights: Tensor | None) -> Tensor:
    """The chosen completions' share of the update's mean negative log-likelihood; LD-DPO does not touch it."""
    sums = inputs.tokens.sums(inputs.logprobs)[::2]
    if weights is not None:
        sums = sums * weights
    return -sums.sum() / max(inputs.totals.num_chosen_tokens, 1)
