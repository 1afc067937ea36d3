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

from torch import Tensor

from trl_ray.algorithms.batches.labels import completion_lengths, pairs_of, reference_logprobs
from trl_ray.algorithms.batches.sequences import TokenSequences, means_of, sequence_logprobs, trained_tokens
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.algorithms.preference.preference_terms import PAIR_LOSSES, PairScores, f_score
from trl_ray.config.losses.preference_options import PreferenceLossConfig, PreferenceLossType
from trl_ray.types import TrainingSample


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
        config, totals = self.config, inputs.totals
        pairs_of(inputs.samples)
        return preference_loss(
            inputs.tokens,
            inputs.language,
            config,
            lengths=completion_lengths(inputs),
            reference=reference_logprobs(inputs, ld_alpha=config.ld_alpha) if config.needs_reference else None,
            num_pairs=totals.count("pairs"),
            num_chosen_tokens=totals.count("chosen_tokens"),
        )


def preference_loss(
    tokens: TokenSequences,
    scores: TokenLogprobs,
    config: PreferenceLossConfig,
    *,
    lengths: Tensor,
    reference: Tensor | None,
    num_pairs: int,
    num_chosen_tokens: int,
) -> LossOutput:
    """The loss of a micro-batch of pairs, with every option of `PreferenceLossConfig`.

    Metrics, means over pairs, which TRL calls the same: `rewards/chosen` and `rewards/rejected` (beta times the
    log-ratio to the reference), `rewards/accuracies`, `rewards/margins`; `logps/chosen`, `logps/rejected`; and
    `wpo/weight` with `use_weighting`. Rewards are left out without a reference. `entropy` is over trained tokens, and
    where `top1` is given `mean_token_accuracy` over those of chosen completions.

    Args:
        tokens: the N trained tokens of 2P completions: 2i is the chosen one of pair i, 2i + 1 the rejected one.
        scores: [N] of the policy, with gradient. Weights need `sum_squared_probs`.
        config: the options.
        lengths: [2P] completion tokens, which ipo and sigmoid_norm divide by. More than the trained ones where a prompt
            is empty, so that nothing predicts the first token.
        reference: [2P] `sequence_logprobs` of the reference, with the same ld_alpha; None only for a config without a
            need.
        num_pairs: of the whole update, over all micro-batches and ranks.
        num_chosen_tokens: trained ones of chosen completions, of the whole update; only sft reads it.
    """
    assert len(lengths) == tokens.num_sequences, "every completion has a length"
    assert tokens.num_sequences % 2 == 0, "completions come in pairs"
    logps = sequence_logprobs(scores.logprobs, tokens, ld_alpha=config.ld_alpha).view(-1, 2)
    values = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1], "entropy": scores.entropy}
    if scores.top1 is not None:
        values["mean_token_accuracy"] = scores.top1[tokens.sample_index % 2 == 0]
    weights = pair_weights(tokens, scores) if config.use_weighting else None
    if weights is not None:
        values["wpo/weight"] = weights
    pairs = None if reference is None else _pair_scores(logps, reference, lengths, config)
    if pairs is not None:
        chosen, rejected = config.beta * pairs.chosen.detach(), config.beta * pairs.rejected.detach()
        values |= {"rewards/chosen": chosen, "rewards/rejected": rejected}
        values |= {"rewards/accuracies": chosen > rejected, "rewards/margins": chosen - rejected}
    loss = logps.new_zeros(())
    for kind, weight in config.weighted_losses:
        if kind is PreferenceLossType.SFT:
            loss = loss + weight * _chosen_nll(tokens, scores, weights, num_chosen_tokens)
            continue
        assert pairs is not None, f"{kind.value} needs log-probs of the reference"
        per_pair = PAIR_LOSSES[kind](pairs, config)
        if weights is not None:
            per_pair = per_pair * weights
        loss = loss + weight * per_pair.sum() / max(num_pairs, 1)
    return LossOutput(loss=loss, metrics=means_of(values))


def pair_weights(tokens: TokenSequences, scores: TokenLogprobs) -> Tensor:
    """WPO's weights [P], without gradient (https://arxiv.org/abs/2406.11827, eq. 2)."""
    assert scores.sum_squared_probs is not None, "WPO needs the sums of squared probabilities"
    aligned = scores.logprobs.detach() - scores.sum_squared_probs.detach().log()
    return tokens.means(aligned).view(-1, 2).sum(dim=1).exp()


def _pair_scores(logps: Tensor, reference: Tensor, lengths: Tensor, config: PreferenceLossConfig) -> PairScores:
    """From log-probs [P, 2] of the policy, and [2P] of the reference."""
    reference = reference.detach().view(-1, 2)
    ratios = logps - reference
    chosen, rejected = ratios.unbind(dim=1)
    lengths = lengths.clamp(min=1).view(-1, 2)
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


def _chosen_nll(
    tokens: TokenSequences, scores: TokenLogprobs, weights: Tensor | None, num_chosen_tokens: int
) -> Tensor:
    """The chosen completions' share of the update's mean negative log-likelihood; LD-DPO does not touch it."""
    sums = tokens.sums(scores.logprobs)[::2]
    if weights is not None:
        sums = sums * weights
    return -sums.sum() / max(num_chosen_tokens, 1)
