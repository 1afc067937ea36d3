"""The weight of the entropy bonus: fixed, or moved after each update by the entropy the update met.

entropy <= target: coefficient + delta, applied        entropy > target: coefficient - delta, not applied
                    within [min, max]; both from the next update on           https://arxiv.org/abs/2505.22312
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trl_ray.config.losses.policy_options import LossConfig


class EntropyBonus:
    """Follows the entropy of the policy; its state goes into checkpoints."""

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self.coefficient = config.entropy_coef
        # No bonus before the first measurement, as in TRL.
        self._last_entropy = math.inf

    @property
    def applied(self) -> float:
        """The weight of the mean entropy in the update at hand."""
        if self._config.use_adaptive_entropy and self._last_entropy > self._config.entropy_target:
            return 0.0
        return self.coefficient

    def adapt(self, entropy: float) -> None:
        """Move the coefficient by the mean entropy of an update, in nats per token; nothing where it is fixed."""
        config = self._config
        if not config.use_adaptive_entropy:
            return
        self._last_entropy = entropy
        if entropy <= config.entropy_target:
            self.coefficient = min(self.coefficient + config.entropy_coef_delta, config.entropy_coef_max)
        else:
            self.coefficient = max(self.coefficient - config.entropy_coef_delta, config.entropy_coef_min)

    def state_dict(self) -> dict[str, float]:
        """Empty where nothing adapts."""
        if not self._config.use_adaptive_entropy:
            return {}
        return {"entropy_coef": self.coefficient, "last_entropy": self._last_entropy}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state.

        Raises:
            KeyError: it was saved by a run whose coefficient was fixed.
        """
        if self._config.use_adaptive_entropy:
            self.coefficient, self._last_entropy = float(state["entropy_coef"]), float(state["last_entropy"])
