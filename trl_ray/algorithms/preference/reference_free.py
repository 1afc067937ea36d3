"""Losses of pairs that need no reference: CPO with SimPO and AlphaPO, and ORPO.

    l    log-prob of a completion, in nats: a sum over its tokens, or the mean (ipo, simpo, alphapo, ORPO)
    s    l, or with alpha other than 0 AlphaPO's (1 - e^(-alpha l)) / alpha          https://arxiv.org/abs/2501.03884
    d    s_chosen - s_rejected

    CPO   loss of d + cpo_alpha NLL                                                  https://arxiv.org/abs/2401.08417
          sigmoid          -(1 - e) ln sigma(beta d) - e ln sigma(-beta d)
          simpo, alphapo   the same of d - simpo_gamma / beta                        https://arxiv.org/abs/2405.14734
          hinge            max(0, 1 - beta d)
          ipo              (d - 1 / (2 beta))^2
    ORPO  NLL - beta ln sigma(ln odds_chosen - ln odds_rejected), odds = p / (1 - p), p = e^l
                                                                                     https://arxiv.org/abs/2403.07691
    NLL   negative log-likelihood of chosen completions per token (ORPO: of their prompts as well)

Means are over the pairs and the tokens of the whole optimizer update, so that it does not matter how it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_ray.algorithms.batches.labels import pairs_of
from trl_ray.algorithms.batches.sequences import TokenSequences, means_of, trained_tokens
from trl_ray.algorithms.loss import FixedLoss, LossInputs, LossNeeds, LossOutput
from trl_ray.config.losses.preference_options import CPOLossConfig, CPOLossType, ORPOLossConfig
from trl_ray.types import Metric, TrainingSample


class CPOLoss(FixedLoss):
    """`cpo_loss` as the learner calls it; implements the `Loss` protocol.

    Samples are chosen and rejected completions in turn. Totals: `pairs`; `likelihood_tokens`, the trained tokens of
    chosen completions.
    """

    def __init__(self, config: CPOLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(whole_groups=True)

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        chosen = [pair[0] for pair in pairs_of(samples)]
        return {"pairs": len(chosen), "likelihood_tokens": trained_tokens(chosen)}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        pairs_of(inputs.samples)
        return cpo_loss(
            inputs.tokens,
            inputs.logprobs,
            self.config,
            num_pairs=inputs.totals.count("pairs"),
            num_likelihood_tokens=inputs.totals.count("likelihood_tokens"),
        )


class ORPOLoss(FixedLoss):
    """`orpo_loss` as the learner calls it; implements the `Loss` protocol.

    Samples are chosen and rejected completions in turn, and after a pair the rest of its prompt, if that has more than
    one token. Totals: `pairs`; `likelihood_tokens`, the trained tokens of chosen completions and of prompts.
    """

    def __init__(self, config: ORPOLossConfig, *, max_completion_length: int | None = None) -> None:
        del max_completion_length
        self.config = config

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(whole_groups=True)

    def totals(self, samples: Sequence[TrainingSample]) -> Mapping[str, float]:
        prompts = are_prompts(samples)
        chosen = [pair[0] for pair in pairs_of(_without(samples, prompts))]
        texts = [sample for sample, is_prompt in zip(samples, prompts, strict=True) if is_prompt]
        return {"pairs": len(chosen), "likelihood_tokens": trained_tokens([*chosen, *texts])}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        prompts = are_prompts(inputs.samples)
        completions = pairs_of(_without(inputs.samples, prompts))
        index = inputs.tokens.sample_index
        is_prompt = torch.tensor(prompts, dtype=torch.bool, device=index.device)
        numbers = (~is_prompt).long().cumsum(0) - 1
        of_prompt = is_prompt[index]
        return orpo_loss(
            TokenSequences(sample_index=numbers[index[~of_prompt]], num_sequences=2 * len(completions)),
            inputs.logprobs[~of_prompt],
            inputs.logprobs[of_prompt],
            self.config,
            num_pairs=inputs.totals.count("pairs"),
            num_likelihood_tokens=inputs.totals.count("likelihood_tokens"),
        )


def are_prompts(samples: Sequence[TrainingSample]) -> list[bool]:
    """Which of the samples are the rest of a prompt: those that follow a pair of their group, and go on from less."""
    found: list[bool] = []
    pair: list[TrainingSample] = []
    for sample in samples:
        is_prompt = (
            len(pair) == 2 and sample.group_id == pair[0].group_id and len(sample.prompt_ids) < len(pair[0].prompt_ids)
        )
        found.append(is_prompt)
        if len(pair) != 1:
            pair = []
        if not is_prompt:
            pair.append(sample)
    return found


def _without(samples: Sequence[TrainingSample], left_out: Sequence[bool]) -> list[TrainingSample]:
    return [sample for sample, out in zip(samples, left_out, strict=True) if not out]


def cpo_loss(
    tokens: TokenSequences, logprobs: Tensor, config: CPOLossConfig, *, num_pairs: int, num_likelihood_tokens: int
) -> LossOutput:
    """The loss of a micro-batch of pairs, with every option of `CPOLossConfig`.

    Metrics, means over pairs: `rewards/chosen` and `rewards/rejected` (beta s), `rewards/accuracies`,
    `rewards/margins`, `logps/chosen`, `logps/rejected` (l); `nll_loss` over tokens, if it has weight.

    Args:
        tokens: the N trained tokens of 2P completions: 2i is the chosen one of pair i, 2i + 1 the rejected one.
        logprobs: [N] of the policy, with gradient, in nats.
        config: the options.
        num_pairs: of the whole update, over all micro-batches and ranks.
        num_likelihood_tokens: trained ones of chosen completions, of the whole update.
    """
    logps = tokens.means(logprobs) if config.averages_tokens else tokens.sums(logprobs)
    logps = logps.view(-1, 2)
    scores = logps if config.alpha == 0 else -torch.expm1(-config.alpha * logps) / config.alpha
    loss = _cpo_terms(scores[:, 0] - scores[:, 1], config).sum() / max(num_pairs, 1)
    metrics = _pair_metrics(config.beta * scores.detach(), logps)
    if config.nll_weight:
        chosen = logprobs[tokens.sample_index % 2 == 0]
        loss = loss + config.nll_weight * _nll(chosen, num_likelihood_tokens, metrics)
    return LossOutput(loss=loss, metrics=metrics)


def orpo_loss(
    tokens: TokenSequences,
    logprobs: Tensor,
    prompt_logprobs: Tensor,
    config: ORPOLossConfig,
    *,
    num_pairs: int,
    num_likelihood_tokens: int,
) -> LossOutput:
    """The loss of a micro-batch of pairs.

    A mean log-prob is held four roundings of its type below 0, where odds are infinite.

    Metrics, means over pairs: those of `cpo_loss`, with rewards beta l; `log_odds_chosen`, the logarithm of the ratio
    of the odds, and `log_odds_ratio`, its ln sigma. `nll_loss` over tokens.

    Args:
        tokens, logprobs, config, num_pairs: as for `cpo_loss`.
        prompt_logprobs: [M] of the policy, with gradient: the prompts' tokens but for each one's first, every pair's
            prompt once.
        num_likelihood_tokens: trained ones of chosen completions and of prompts, of the whole update.
    """
    logps = tokens.means(logprobs).view(-1, 2)
    # Far enough from 0 that e^x does not round to 1, which would make a NaN of the gradient of the branch not taken.
    log_odds = logps - _log1mexp(logps.clamp(max=-4 * torch.finfo(logps.dtype).eps))
    log_ratio = log_odds[:, 0] - log_odds[:, 1]
    found = logsigmoid(log_ratio)
    metrics = _pair_metrics(config.beta * logps.detach(), logps)
    metrics |= means_of({"log_odds_chosen": log_ratio, "log_odds_ratio": found})
    likelihood = torch.cat((logprobs[tokens.sample_index % 2 == 0], prompt_logprobs))
    loss = _nll(likelihood, num_likelihood_tokens, metrics) - config.beta * found.sum() / max(num_pairs, 1)
    return LossOutput(loss=loss, metrics=metrics)


def _cpo_terms(difference: Tensor, config: CPOLossConfig) -> Tensor:
    """Losses [P]."""
    if config.loss_type is CPOLossType.HINGE:
        return torch.relu(1 - config.beta * difference)
    if config.loss_type is CPOLossType.IPO:
        return (difference - 1 / (2 * config.beta)).square()
    z, e = config.beta * difference, config.label_smoothing
    if config.loss_type is not CPOLossType.SIGMOID:
        z = z - config.simpo_gamma
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def _log1mexp(x: Tensor) -> Tensor:
    """ln(1 - e^x) for x below 0, exact at both ends (Maechler, https://cran.r-project.org/package=Rmpfr)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _nll(logprobs: Tensor, num_likelihood_tokens: int, metrics: dict[str, Metric]) -> Tensor:
    """A micro-batch's share of the update's mean negative log-likelihood, from the log-probs [K] it counts."""
    metrics |= means_of({"nll_loss": -logprobs})
    return -logprobs.sum() / max(num_likelihood_tokens, 1)


def _pair_metrics(rewards: Tensor, logps: Tensor) -> dict[str, Metric]:
    """From rewards [P, 2] and log-probs [P, 2]."""
    chosen, rejected = rewards.unbind(dim=1)
    return means_of(
        {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }
    )
