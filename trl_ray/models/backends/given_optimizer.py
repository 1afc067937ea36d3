"""An optimizer and a schedule that Python gave as objects, as the options that build the same in the learner.

torch.optim.AdamW(model.parameters(), lr=...), get_cosine_schedule_with_warmup(...) --> optim, learning_rate, ...
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor

from trl_ray.errors import ConfigError

_NAMES = {
    torch.optim.SGD: "sgd",
    torch.optim.Adagrad: "adagrad",
    torch.optim.RMSprop: "rmsprop",
    Adafactor: "adafactor",
    torch.optim.AdamW: "adamw_torch",
}
_SCHEDULES = {
    "_get_constant_lambda": "constant",
    "_get_constant_schedule_with_warmup_lr_lambda": "constant_with_warmup",
    "_get_linear_schedule_with_warmup_lr_lambda": "linear",
    "_get_cosine_schedule_with_warmup_lr_lambda": "cosine",
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda": "cosine_with_restarts",
}
"""Functions of transformers' schedules by the schedule's name."""
_ADVICE = "Set optim, optim_args, learning_rate, lr_scheduler_type and warmup_steps in args"


def optimizer_options(
    optimizers: tuple[Any, Any] | None, class_and_kwargs: tuple[type, dict[str, Any]] | None
) -> dict[str, Any]:
    """Options of `TrainingConfig`; none where nothing was given.

    The parameters that an optimizer was made with are not looked at: the learner's are all that are trained.

    Raises:
        ConfigError: an optimizer or schedule that no options stand for.
    """
    optimizer, schedule = optimizers or (None, None)
    if class_and_kwargs is not None:
        if optimizer is not None or schedule is not None:
            raise ConfigError("optimizers must be left out with optimizer_cls_and_kwargs. Remove one of the two.")
        kind, kwargs = class_and_kwargs
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    options = {} if optimizer is None else _options_of(optimizer)
    return options | ({} if schedule is None else _schedule_of(schedule))


def _options_of(optimizer: Any) -> dict[str, Any]:
    name = _NAMES.get(type(optimizer))
    if name is None:
        raise ConfigError(
            f"optimizers must hold one of {', '.join(kind.__name__ for kind in _NAMES)}, got a "
            f"{type(optimizer).__name__}, which lives with the parameters of this process. {_ADVICE}."
        )
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    told = {key: value for key, value in groups[0].items() if key in optimizer.defaults and key != "differentiable"}
    for group in groups:
        unlike = [key for key in told if key != "weight_decay" and group[key] != told[key]]
        if unlike:
            raise ConfigError(
                f"optimizers must treat all parameters alike but for weight_decay, got groups with different "
                f"{unlike[0]}. {_ADVICE}."
            )
    # A schedule has already moved the rate of a group.
    rate = groups[0].get("initial_lr", told.pop("lr"))
    told.pop("lr", None)
    decay = max(float(group.get("weight_decay", 0.0)) for group in groups)
    told.pop("weight_decay", None)
    options: dict[str, Any] = {"optim": name, "learning_rate": float(rate), "weight_decay": decay}
    if name == "adamw_torch":
        options["adam_beta1"], options["adam_beta2"] = map(float, told.pop("betas"))
        options["adam_epsilon"] = float(told.pop("eps"))
        if told.pop("fused", None):
            options["optim"] = "adamw_torch_fused"
        told.pop("decoupled_weight_decay", None)
    started = type(optimizer)([torch.nn.Parameter(torch.zeros(1))], **({"lr": 1.0} if name != "adafactor" else {}))
    return options | {"optim_args": {key: value for key, value in told.items() if value != started.defaults.get(key)}}


def _schedule_of(schedule: Any) -> dict[str, Any]:
    made = schedule.lr_lambdas[0] if isinstance(schedule, LambdaLR) else None
    name = _SCHEDULES.get(made.func.__name__ if isinstance(made, partial) else getattr(made, "__name__", ""))
    if name is None:
        raise ConfigError(
            f"optimizers must hold a schedule of transformers.get_scheduler, got a {type(schedule).__name__} of "
            f"another kind. {_ADVICE}."
        )
    keywords = dict(made.keywords) if isinstance(made, partial) else {}
    options: dict[str, Any] = {"lr_scheduler_type": name, "warmup_steps": int(keywords.pop("num_warmup_steps", 0))}
    keywords.pop("num_training_steps", None)  # the run knows them
    usual = {"num_cycles": {"cosine": 0.5, "cosine_with_restarts": 1}.get(name)}
    further = {key: value for key, value in keywords.items() if value != usual.get(key)}
    return options | {"lr_scheduler_kwargs": further}
