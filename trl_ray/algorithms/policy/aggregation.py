"""How token losses L_t of samples i become one number; T and B count tokens and samples of the whole optimizer update.

    dapo cispo vespo   sum_t L_t / T                                        https://arxiv.org/abs/2503.14476
    grpo sapo          (1/B) sum_i mean_t L_t                               https://arxiv.org/abs/2402.03300
    dr_grpo            sum_t L_t / (B * max_completion_length)              https://arxiv.org/abs/2503.20783
    luspo              (1/B) sum_i sum_t L_t                                https://arxiv.org/abs/2602.05261
    bnpo               mean over micro-batches of their token means         depends on how the update is cut

Denominators count every trained token and every sample, also where a mask or a weight makes its loss 0.
"""

from __future__ import annotations

from typing import assert_never

from torch import Tensor

from trl_ray.algorithms.loss import LossInputs
from trl_ray.config.losses.policy_options import LossType


def aggregate(
    per_token: Tensor, inputs: LossInputs, *, loss_type: LossType, max_completion_length: int | None
) -> Tensor:
    """Token losses [N] of a micro-batch to its share of the update's loss."""
    totals = inputs.totals
    samples = max(totals.num_samples, 1)
    match loss_type:
        case LossType.DAPO | LossType.CISPO | LossType.VESPO:
            return per_token.sum() / max(totals.num_valid_tokens, 1)
        case LossType.GRPO | LossType.SAPO:
            return inputs.tokens.means(per_token).sum() / samples
        case LossType.DR_GRPO:
            assert max_completion_length is not None, "dr_grpo divides by the longest possible completion"
            return per_token.sum() / (samples * max_completion_length)
        case LossType.LUSPO:
            return per_token.sum() / samples
        case LossType.BNPO:
            return per_token.sum() / max(inputs.micro_batch_tokens, 1) / max(totals.num_micro_batches, 1)
    assert_never(loss_type)
