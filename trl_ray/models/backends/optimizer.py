"""The optimizer that `optim` names, and the learning-rate schedules, which are transformers' own.

named_parameters --> two groups (decayed, not decayed) --> optimizer <-- LambdaLR(schedule)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from trl_ray.config.optimizer_options import Optim
from trl_ray.config.sections import TrainingConfig
from trl_ray.config.step_counts import steps_of
from trl_ray.errors import ConfigError
from trl_ray.models.backends.muon import MuonWithAdamW

Groups: TypeAlias = list[dict[str, Any]]

_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""In lower-case names of parameters, as in transformers' Trainer."""


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim`; biases and norms are not decayed.

    AdamW is https://arxiv.org/abs/1711.05101, Adafactor https://arxiv.org/abs/1804.04235 with the learning rate of the
    schedule, Muon https://kellerjordan.github.io/posts/muon.

    Raises:
        ConfigError: its library is not installed, or `optim_args` are not options of it.
    """
    optim = training.optim
    if optim.is_of_bitsandbytes:
        _require_bitsandbytes(optim)
    if optim is Optim.MUON and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optim=muon needs torch 2.9 or younger, this is {torch.__version__}. Take adamw_torch_fused."
        )
    groups = _decay_groups(model, training.weight_decay)
    # `weight_decay` stands in the groups. What `optim_args` names wins, as in transformers.
    options = {"lr": training.learning_rate, **_own_options(training), **training.optim_args}
    if "weight_decay" in training.optim_args:
        groups = _decay_groups(model, float(options.pop("weight_decay")))
    try:
        if optim is Optim.MUON:
            return _muon(model, groups, training, options)
        built: torch.optim.Optimizer = _class_of(optim)(groups, **options)
        return built
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim_args must be options of optim={optim.value}, got {training.optim_args}: {error}. Correct them."
        ) from error


def _decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED))  # type: ignore[no-untyped-call]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: Groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _own_options(training: TrainingConfig) -> dict[str, Any]:
    """What the other options say to this optimizer."""
    optim, name = training.optim, training.optim.value
    adam: dict[str, Any] = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    if optim.is_adamw:
        return {**adam, "fused": optim is Optim.ADAMW_TORCH_FUSED}
    if optim is Optim.ADAFACTOR:
        return {"scale_parameter": False, "relative_step": False}
    if not optim.is_of_bitsandbytes:
        return {}
    bits = {"optim_bits": 8 if "8bit" in name else 32}
    if "rmsprop" in name:
        return bits
    bits["is_paged"] = "paged" in name
    if "lion" in name:
        return {"betas": adam["betas"], **bits}
    if "ademamix" in name:
        return {"betas": (*adam["betas"], 0.9999), "eps": adam["eps"], **bits}
    return {**adam, **bits}


def _class_of(optim: Optim) -> Any:
    plain = {
        Optim.ADAMW_TORCH: torch.optim.AdamW,
        Optim.ADAMW_TORCH_FUSED: torch.optim.AdamW,
        Optim.ADAFACTOR: Adafactor,
        Optim.SGD: torch.optim.SGD,
        Optim.ADAGRAD: torch.optim.Adagrad,
        Optim.RMSPROP: torch.optim.RMSprop,
    }
    if optim in plain:
        return plain[optim]
    names = {"ademamix": "AdEMAMix", "adamw": "AdamW", "lion": "Lion", "rmsprop": "RMSprop"}
    library = importlib.import_module("bitsandbytes.optim")
    return getattr(library, next(name for part, name in names.items() if part in optim.value))


def _require_bitsandbytes(optim: Optim) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        nearest = "sgd with optim_args momentum=0.9" if "lion" in optim.value else "adamw_torch_fused or adafactor"
        raise ConfigError(
            f"optim={optim.value} needs the package bitsandbytes, which is not installed. pip install bitsandbytes, or "
            f"set optim={nearest}."
        )


def _muon(model: nn.Module, groups: Groups, training: TrainingConfig, options: Mapping[str, Any]) -> MuonWithAdamW:
    return MuonWithAdamW(
        groups,
        others={id(parameter) for parameter in _embeddings_and_head(model)},
        adamw={"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon, "fused": True},
        **options,
    )


def _embeddings_and_head(model: nn.Module) -> list[nn.Parameter]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    heads: list[nn.Module] = [] if head is None else [head]
    return [parameter for module in (*tables, *heads) for parameter in module.parameters()]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from a state, bit for bit: torch alone would round what is kept in float32 for bfloat16 weights.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: it does not fit.
    """
    optimizer.load_state_dict(state)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        return  # it keeps what it quantised as it is
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        kept, found = state["state"].get(number, {}), optimizer.state.get(parameter, {})
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.dtype != found[key].dtype:
                found[key] = value.to(found[key].device, copy=True)


def build_scheduler(optimizer: torch.optim.Optimizer, training: TrainingConfig, *, total_steps: int) -> LambdaLR:
    """The schedule, to be stepped once after each optimizer step.

    Raises:
        ConfigError: `lr_scheduler_kwargs` are not those of this schedule.
    """
    try:
        scheduler: LambdaLR = get_scheduler(
            training.lr_scheduler_type.value,
            optimizer,
            num_warmup_steps=steps_of(training.warmup_steps, total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_kwargs must be options of lr_scheduler_type={training.lr_scheduler_type.value} in "
            f"transformers, got {training.lr_scheduler_kwargs}: {error}. Correct one of the two."
        ) from error
    return scheduler


def check_optimizer(training: TrainingConfig) -> None:
    """Refuse an optimizer that cannot be had and options that it or the schedule does not have, before anything starts.

    Raises:
        ConfigError: as `build_optimizer` and `build_scheduler`.
    """
    build_scheduler(build_optimizer(nn.Linear(2, 2), training), training, total_steps=2)
