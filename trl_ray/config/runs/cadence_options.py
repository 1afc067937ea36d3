"""When a run evaluates, saves and tells, which of its models is the best one, and what it goes on from.

Names are those of transformers' TrainingArguments; the numbers of steps stand in ReportConfig.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from trl_ray.config.base import FROM_STRING, Positive, Section, rule


class Strategy(enum.StrEnum):
    """When something happens again."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    """After the last step of every epoch, and after the last of all."""


class SaveStrategy(enum.StrEnum):
    """When checkpoints are written; the last step always has one."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"
    """After evaluations that were better than all before."""


def _no_for_false(value: Any) -> Any:
    """YAML reads a bare ``no`` as false."""
    return "no" if value is False else value


def _read_metric(value: Any) -> Any:
    return value.removeprefix("eval_").removeprefix("eval/") if isinstance(value, str) else value


class HubStrategy(enum.StrEnum):
    """What goes to the Hub when; the names are transformers'."""

    END = "end"
    """The model, when the run ends."""
    EVERY_SAVE = "every_save"
    """The model, with every checkpoint."""
    CHECKPOINT = "checkpoint"
    """The newest checkpoint goes along, as ``last-checkpoint``."""
    ALL_CHECKPOINTS = "all_checkpoints"
    """All of them go along."""


class HubConfig(Section):
    """Where the model goes on the Hugging Face Hub."""

    push_to_hub: bool = False
    hub_model_id: str | None = None
    """``user/name``; None takes the name of `output_dir`."""
    hub_strategy: Annotated[HubStrategy, FROM_STRING] = HubStrategy.EVERY_SAVE
    hub_token: str | None = Field(default=None, exclude=True)
    """None takes HF_TOKEN, or what `hf auth login` keeps. It is written to no file."""
    hub_private_repo: bool | None = None
    hub_always_push: bool = False
    """Push a checkpoint even while the one before is under way; else it is left out."""
    hub_revision: str | None = None
    """A branch; None is the main one."""


class CadenceConfig(Section):
    """What comes how often."""

    eval_strategy: Annotated[Strategy | None, FROM_STRING, BeforeValidator(_no_for_false)] = None
    """None: steps where `eval_steps` is given, else no. With steps and without `eval_steps`, every `logging_steps`."""
    eval_on_start: bool | None = None
    """Evaluate before the first step; None: where there are evaluations and no `eval_delay`."""
    eval_delay: Annotated[float, Field(ge=0)] = 0.0
    """Steps, with eval_strategy=epoch epochs, before the first evaluation."""
    save_strategy: Annotated[SaveStrategy, FROM_STRING, BeforeValidator(_no_for_false)] = SaveStrategy.STEPS
    logging_strategy: Annotated[Strategy, FROM_STRING, BeforeValidator(_no_for_false)] = Strategy.STEPS
    """When the console, services and `on_log` are told; metrics.jsonl has every step."""
    logging_first_step: bool = False
    """Tell them of the first step, too."""
    save_only_model: bool = False
    """Checkpoints without the optimizer: smaller, but no run can go on from them."""
    load_best_model_at_end: bool = False
    """The run's model is the best one by `metric_for_best_model`, not the last; its checkpoint is kept."""
    metric_for_best_model: Annotated[str | None, BeforeValidator(_read_metric)] = None
    """Held-out metric, without its ``eval/``; None: the loss, of reward models the accuracy, of rewarded completions
    the mean reward."""
    greater_is_better: bool | None = None
    """None: true unless the metric is named a loss."""
    early_stopping_patience: Positive | None = None
    """Evaluations in a row without a better metric after which the run ends; None never."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """By how much the metric must be better to count."""
    resume_from_checkpoint: str | bool | None = None
    """Go on with the run in `output_dir`: true from its last checkpoint, or the path of one."""

    @model_validator(mode="before")
    @classmethod
    def _take_logging_steps(cls, values: Any) -> Any:
        """As in transformers, evaluations come with the log where nothing else is said."""
        if not isinstance(values, Mapping) or values.get("eval_steps") or "eval_steps" not in cls.model_fields:
            return values
        if str(values.get("eval_strategy")) != Strategy.STEPS.value:
            return values
        return {**values, "eval_steps": values.get("logging_steps") or cls.model_fields["logging_steps"].default}

    @property
    def _default_metric(self) -> str:
        return "loss"

    @property
    def best_metric(self) -> str:
        """The held-out metric that says which model is the best one."""
        return self.metric_for_best_model or self._default_metric

    @property
    def wants_greater(self) -> bool:
        """Whether a greater value of `best_metric` is a better one."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.best_metric.endswith(("loss", "nll"))

    @property
    def evaluation(self) -> Strategy:
        """When evaluations come."""
        if self.eval_strategy is not None:
            return self.eval_strategy
        return Strategy.STEPS if getattr(self, "eval_steps", 0) else Strategy.NO

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluations."""
        return self.evaluation is not Strategy.NO

    @property
    def evaluation_asked_by(self) -> str:
        """The option that asks for evaluations, as messages name it."""
        if self.evaluation is Strategy.EPOCH:
            return "eval_strategy=epoch"
        return f"eval_steps={getattr(self, 'eval_steps', 0)}"

    @property
    def evaluates_first(self) -> bool:
        """Whether there is one before the first step."""
        return self.evaluates and (self.eval_on_start if self.eval_on_start is not None else self.eval_delay == 0)

    @rule
    def _check_best(self) -> None:
        asks = {
            f"early_stopping_patience={self.early_stopping_patience}": self.early_stopping_patience is not None,
            "load_best_model_at_end=true": self.load_best_model_at_end,
            "save_strategy=best": self.save_strategy is SaveStrategy.BEST,
            "eval_on_start=true": bool(self.eval_on_start),
        }
        for name, asked in asks.items():
            if asked and not self.evaluates:
                raise ValueError(
                    f"eval_steps must be at least 1 with {name}, or eval_strategy be epoch, got 0 and "
                    f"{self.evaluation.value}: nothing would be evaluated. Set one of the two."
                )

    @rule
    def _check_best_is_saved(self) -> None:
        if not self.load_best_model_at_end or self.save_strategy is SaveStrategy.BEST:
            return
        if self.save_strategy.value != self.evaluation.value:
            raise ValueError(
                "save_strategy must be eval_strategy, or best, with load_best_model_at_end=true, got "
                f"{self.save_strategy.value} and {self.evaluation.value}: a model that is not saved cannot be loaded. "
                "Set save_strategy=best."
            )
        every, saves = getattr(self, "eval_steps", 0), getattr(self, "save_steps", 0)
        times = saves / every if self.evaluation is Strategy.STEPS and every else 1.0  # both may be shares of the run
        if times < 1 or abs(times - round(times)) > 1e-6:
            raise ValueError(
                f"save_steps must be a multiple of eval_steps with load_best_model_at_end=true, got {saves} and "
                f"{every}. Change one, or set save_strategy=best."
            )

    @rule
    def _check_going_on(self) -> None:
        if self.save_only_model and self.resume_from_checkpoint:
            raise ValueError(
                "save_only_model must be false with resume_from_checkpoint, got true: checkpoints without the "
                "optimizer cannot be gone on from. Remove one of the two."
            )
