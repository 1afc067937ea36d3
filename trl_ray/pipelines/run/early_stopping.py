"""Knows the best held-out value so far, and ends a run early when there comes no better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.config.runs.cadence_options import CadenceConfig, SaveStrategy
from trl_ray.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class EarlyStopping:
    """Counts evaluations without improvement; mutable, owned by the loop, kept in checkpoints."""

    metric: str
    wants_greater: bool
    threshold: float
    patience: int | None
    """None never stops, but the best value is known all the same."""
    is_needed: bool = False
    """Whether something hangs on the metric, so that it must be there."""
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    """Evaluations in a row that were no better."""

    @classmethod
    def of(cls, config: CadenceConfig) -> EarlyStopping:
        """As configured, before the first evaluation."""
        return cls(
            metric=config.best_metric,
            wants_greater=config.wants_greater,
            threshold=config.early_stopping_threshold,
            patience=config.early_stopping_patience,
            is_needed=config.load_best_model_at_end or config.save_strategy is SaveStrategy.BEST,
        )

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one evaluation, without ``eval/``.

        Raises:
            ConfigError: there is no such metric.
        """
        # Rewards are means, whether a name says so or not.
        names = (self.metric, f"{self.metric}/mean", self.metric.removesuffix("/mean"))
        name = next((each for each in names if each in metrics), None)
        if name is None:
            if self.patience is None and not self.is_needed:
                return
            guess = nearest(self.metric, metrics)
            hint = f"Did you mean {guess!r}?" if guess else f"There are {', '.join(sorted(metrics))}."
            raise ConfigError(f"metric_for_best_model must be a held-out metric, got {self.metric!r}. {hint}")
        value = metrics[name]
        if self._is_better(value):
            self.best, self.best_step, self.worse = value, step, 0
        else:
            self.worse += 1

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if self.wants_greater else self.best - value
        return gain > self.threshold

    def was_best(self, step: int) -> bool:
        """Whether the evaluation after this step was better than all before."""
        return self.best is not None and self.best_step == step and not self.worse

    @property
    def is_due(self) -> bool:
        """Whether the run should end."""
        return self.patience is not None and self.worse >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What changes; JSON values."""
        return {"best": self.best, "best_step": self.best_step, "worse": self.worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
