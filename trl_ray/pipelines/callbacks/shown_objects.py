"""What callbacks of transformers are shown beside state and control: options, tokenizer, and stand-ins for the rest.

configuration --ShownArguments--> args     learner's model, optimizer, schedule, loaders --> stand-ins that say where

A stand-in knows what the driver knows (the model's configuration, the learning rate, how many batches there are); for
anything else it says what to use, since the thing itself lives in the learner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

from trl_ray.config.messages import nearest
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.models.policy_loading import count_parameters, load_model_config
from trl_ray.models.trainer_defaults import default_argument, knows_argument

_NAMES = {
    "lr": "learning_rate",
    "reward/mean": "reward",
    "reward/std": "reward_std",
    "kl/ref": "kl",
    "advantage/zero_std_fraction": "frac_reward_zero_std",
    "completion/length_mean": "completions/mean_length",
    "completion/length_max": "completions/max_length",
    "completion/truncated_fraction": "completions/clipped_ratio",
}
"""Names of transformers and TRL for what the lines of metrics.jsonl call otherwise."""


def with_their_names(record: Mapping[str, float], *, epoch: float) -> dict[str, float]:
    """A line of metrics as `on_log` is given it: under our names, and under those of transformers and TRL."""
    told = {**record, "epoch": record.get("epoch", epoch)}
    for name, value in record.items():
        if name in _NAMES:
            told[_NAMES[name]] = value
        elif name.startswith("reward/"):
            told[f"rewards/{name.removeprefix('reward/')}"] = value
    return told


class ShownArguments:
    """The configuration with what `TrainingArguments` has beside it; read like the configuration itself.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        ranks = config.runtime.num_learners
        rows = int(getattr(config, "per_device_eval_batch_size", config.per_device_train_batch_size))
        self._config = config
        self._more: dict[str, Any] = {
            # What is None here and never None there; callbacks of transformers compare with it.
            "eval_strategy": config.evaluation,
            "metric_for_best_model": config.best_metric if config.evaluates else config.metric_for_best_model,
            "greater_is_better": config.wants_greater,
            "per_device_eval_batch_size": rows,
            # Callbacks run on the driver, of which there is one.
            "process_index": 0,
            "local_process_index": 0,
            "should_save": True,
            "should_log": True,
            "world_size": ranks,
            "n_gpu": 1,
            "device": "cpu",
            "train_batch_size": config.per_device_train_batch_size,
            "eval_batch_size": rows,
            "disable_tqdm": False,
            "logging_dir": f"{config.output_dir}/tensorboard",
        }

    # What asks for its class is told the configuration's.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._more:
            return self._more[name]
        if hasattr(self._config, name):
            return getattr(self._config, name)
        if knows_argument(name):
            return default_argument(name)
        guess = nearest(name, type(self._config).model_fields)
        hint = f" Did you mean {guess}?" if guess else ""
        raise AttributeError(f"args has no {name}.{hint}")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values."""
        return self._config.model_dump(mode="json")

    to_sanitized_dict = to_dict

    def to_json_string(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of the warm-up, of so many of the run."""
        given = self._config.warmup_steps
        return int(given * num_training_steps) if 0 < given < 1 else int(given)


class _StandIn:
    """Something that lives in the learner."""

    _what = "it"
    _instead = "look elsewhere"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"{self._what}.{name} cannot be had in a callback: {self._instead}.")

    def _refuse(self, *given: Any, **named: Any) -> NoReturn:
        raise TypeError(f"{self._what} cannot be used in a callback: {self._instead}.")

    def __repr__(self) -> str:
        return f"<{self._what}, which lives in the learner>"


class ShownModel(_StandIn):
    """The policy: its configuration, its name, its size."""

    _what = "model"
    _instead = (
        "the weights live in the learner. Load the newest folder of args.output_dir/checkpoints in on_save, set "
        "control.should_evaluate for held-out numbers, or pass compute_metrics"
    )
    __call__ = _StandIn._refuse

    def __init__(self, config: RunConfig) -> None:
        self._options = config.part(ModelConfig)

    @cached_property
    def config(self) -> Any:
        """transformers' configuration of the model."""
        return load_model_config(self._options)

    @property
    def name_or_path(self) -> str | None:
        """Where it came from."""
        return self._options.model_name_or_path

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many it has, or trains."""
        count = count_parameters(self._options)
        return count.trained if only_trainable else count.base


class ShownOptimizer(_StandIn):
    """The optimizer: its learning rate."""

    _what = "optimizer"
    _instead = "its state lives in the learner, and checkpoints hold it. Only param_groups[0]['lr'] is known here"
    step = zero_grad = _StandIn._refuse

    def __init__(self, rate: float) -> None:
        self.param_groups: list[dict[str, float]] = [{"lr": rate, "initial_lr": rate}]

    def move(self, rate: float) -> None:
        """The rate of the step that was trained last."""
        self.param_groups[0]["lr"] = rate


class ShownSchedule(_StandIn):
    """The schedule of the learning rate: where it is."""

    _what = "lr_scheduler"
    _instead = "the schedule lives in the learner. Name it by lr_scheduler_type; only get_last_lr() is known here"
    step = _StandIn._refuse

    def __init__(self, optimizer: ShownOptimizer) -> None:
        self._optimizer = optimizer

    def get_last_lr(self) -> list[float]:
        """Of the step that was trained last."""
        return [group["lr"] for group in self._optimizer.param_groups]


class ShownLoader(_StandIn):
    """A loader of batches: how many there are in an epoch, and what of."""

    _instead = "rows are tokenised and packed into micro-batches by the run itself. Iterate .dataset"

    def __init__(self, what: str, *, dataset: Any, batch_size: int, batches: int | None) -> None:
        self._what, self.dataset, self.batch_size, self._batches = what, dataset, batch_size, batches

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError(f"{self._what} has no length: nobody knows how long the rows are.")
        return self._batches

    __iter__ = _StandIn._refuse
