"""DeepSpeed's own configuration: checked against the options it repeats, its ``"auto"`` values filled in.

mapping or path --deepspeed_file--> TrainingConfig.deepspeed --resolve_deepspeed--> DeepSpeedPlan: what DeepSpeed gets
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.config.messages import unknown_key
from trl_ray.config.optimizer_options import Optim
from trl_ray.config.sections import Dtype, TrainingConfig
from trl_ray.errors import ConfigError

AUTO = "auto"
_PASSED = frozenset(
    {
        "aio",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "dump_state",
        "flops_profiler",
        "memory_breakdown",
        "steps_per_print",
        "wall_clock_breakdown",
    }
)
"""Sections and values that DeepSpeed gets as they are."""
_READ = frozenset(
    {
        "bf16",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
_REFUSED_ZERO = {
    "compute_grad_norm": "the norm of the gradients decides whether a step is skipped",
    "elastic_checkpoint": "checkpoints are written without DeepSpeed",
    "legacy_stage1": "DeepSpeed has dropped it",
    "zenflow": "it applies gradients of earlier steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedPlan:
    """A configuration without open questions."""

    stage: int
    """Of ZeRO (https://arxiv.org/abs/1910.02054): 0 shards nothing, 1 the optimizer, 2 gradients too, 3 weights too."""
    bf16: bool
    """Weights in bfloat16, with float32 copies in the optimizer's shards."""
    offload: bool
    """The optimizer's shards live on the CPU."""
    torch_adam: bool
    """Use torch's AdamW even where the shards are on the CPU; it needs no compiler."""
    config: dict[str, Any]
    """For `deepspeed.initialize`, which also gets an optimizer and no schedule."""

    @property
    def shards_optimizer(self) -> bool:
        """Each rank keeps the optimizer's state, and float32 weights, of its own part of the model only."""
        return self.stage >= 1

    @property
    def shards_gradients(self) -> bool:
        """Gradients are reduced into shards in every backward pass, so that ranks wait for each other in it."""
        return self.stage >= 2

    @property
    def shards_weights(self) -> bool:
        """No rank holds the parameters whole, but for those that a pass is using."""
        return self.stage >= 3


def resolve_deepspeed(
    training: TrainingConfig, *, num_ranks: int, dtype: Dtype, hidden_size: int | None = None
) -> DeepSpeedPlan:
    """Check DeepSpeed's configuration against ours, and fill in what it leaves to us.

    Args:
        training: its options; `deepspeed` must not be None.
        num_ranks: of the learner.
        dtype: of the weights the optimizer updates.
        hidden_size: of the model, for bucket sizes that are ``"auto"``; None leaves those to DeepSpeed.

    Raises:
        ConfigError: a key that is not supported, or a value that contradicts an option of ours.
    """
    assert training.deepspeed is not None, "there must be a DeepSpeed configuration to resolve"
    given = training.deepspeed
    _check_keys(given)
    _check_batch(given, training, num_ranks)
    torch_adam = _check_optimizer(given.get("optimizer"), training)
    stage, zero = _resolve_zero(_section(given, "zero_optimization"), hidden_size)
    bf16 = _resolve_precision(given, dtype, stage)
    offload = _offload_device(zero, "offload_optimizer") == "cpu"
    if offload and stage == 0:
        raise ConfigError(
            "deepspeed.zero_optimization.stage must be at least 1 with offload_optimizer, got 0. Raise the stage."
        )
    _check_shards(training.optim, stage=stage, offload=offload)
    config: dict[str, Any] = {key: value for key, value in given.items() if key in _PASSED}
    config |= {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        # The learner says itself where an update ends; DeepSpeed only has to know that there can be several passes.
        "gradient_accumulation_steps": max(2, training.gradient_accumulation_steps),
        # Without shards the gradients are whole, and clipped by whoever takes their norm.
        "gradient_clipping": training.max_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": not torch_adam,
        "bf16": {"enabled": bf16},
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32", **_section(given, "data_types")}
    _refuse_auto(config)
    return DeepSpeedPlan(stage=stage, bf16=bf16, offload=offload, torch_adam=torch_adam, config=config)


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"deepspeed.{name} must be a mapping, got {section!r}.")
    return dict(section)


def _check_keys(given: Mapping[str, Any]) -> None:
    if "scheduler" in given:
        raise ConfigError(
            "deepspeed.scheduler must be left out: the learning rate follows lr_scheduler_type and warmup_steps. "
            "Remove it and set those."
        )
    for key in given:
        if key not in _PASSED | _READ:
            raise ConfigError(unknown_key(f"deepspeed.{key}", _PASSED | _READ))


def _check_batch(given: Mapping[str, Any], training: TrainingConfig, num_ranks: int) -> None:
    size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    _must_agree("train_micro_batch_size_per_gpu", given, "per_device_train_batch_size", size)
    _must_agree("gradient_accumulation_steps", given, "gradient_accumulation_steps", steps)
    _must_agree("gradient_clipping", given, "max_grad_norm", training.max_grad_norm)
    product = "per_device_train_batch_size * gradient_accumulation_steps * runtime.num_learners"
    _must_agree("train_batch_size", given, product, size * steps * num_ranks)


def _must_agree(key: str, given: Mapping[str, Any], option: str, value: Any) -> None:
    """A value that stands in both places must be the same in both."""
    name = key.rpartition(".")[2]
    other = given.get(name, AUTO)
    if other != AUTO and (isinstance(other, bool) or other != value):
        raise ConfigError(
            f'deepspeed.{key} must equal {option}, got {other!r} and {value!r}. Set it to "auto", or change one.'
        )


def _check_optimizer(section: Any, training: TrainingConfig) -> bool:
    """Whether torch's AdamW was asked for by name; only AdamW is known, and its numbers are those of our options."""
    if section is None:
        return False
    if not isinstance(section, Mapping) or section.get("type") not in {"Adam", "AdamW"}:
        kind = section.get("type") if isinstance(section, Mapping) else section
        raise ConfigError(f"deepspeed.optimizer.type must be AdamW, got {kind!r}. Set it, or remove the section.")
    if not training.optim.is_adamw:
        raise ConfigError(
            f"deepspeed.optimizer must be left out with optim={training.optim.value}, got AdamW. Remove one of the two."
        )
    params = section.get("params", {})
    ours = {
        "lr": ("learning_rate", training.learning_rate),
        "betas": ("adam_beta1 and adam_beta2", [training.adam_beta1, training.adam_beta2]),
        "eps": ("adam_epsilon", training.adam_epsilon),
        "weight_decay": ("weight_decay", training.weight_decay),
    }
    known = [*ours, "torch_adam", "adam_w_mode"]
    for name in params:
        if name not in known:
            raise ConfigError(unknown_key(f"deepspeed.optimizer.params.{name}", known))
    for name, (option, value) in ours.items():
        _must_agree(f"optimizer.params.{name}", params, option, value)
    if params.get("adam_w_mode", True) is not True:
        raise ConfigError(
            "deepspeed.optimizer.params.adam_w_mode must be true, got false: weight decay is not part of the gradient. "
            "Remove it, or set weight_decay=0."
        )
    return bool(params.get("torch_adam", False))


def _check_shards(optim: Optim, *, stage: int, offload: bool) -> None:
    """From stage 1 on an optimizer sees flat pieces of the weights, and not their shapes."""
    if stage >= 1 and optim.needs_whole_matrices:
        raise ConfigError(
            f"optim must work on flat shards with deepspeed.zero_optimization.stage={stage}, got {optim.value}, which "
            "needs whole matrices. Take optim=adamw_torch_fused, or stage 0."
        )
    if offload and not optim.is_adamw:
        raise ConfigError(
            f"optim must be adamw_torch_fused or adamw_torch with offload_optimizer, got {optim.value}: DeepSpeed has "
            "AdamW alone for shards on the CPU. Set it, or remove offload_optimizer."
        )


def _resolve_zero(zero: dict[str, Any], hidden_size: int | None) -> tuple[int, dict[str, Any]]:
    """The stage, and the section without ``"auto"``; the sizes are those that Hugging Face's Trainer takes."""
    stage = zero.setdefault("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}.")
    for key, why in _REFUSED_ZERO.items():
        if key in zero and zero[key] is not (key == "compute_grad_norm"):
            raise ConfigError(f"deepspeed.zero_optimization.{key} must be left out, got {zero[key]!r}: {why}.")
    for key in ("offload_optimizer", "offload_param"):
        if _offload_device(zero, key) == "nvme" or _section(zero, key).get("super_offload"):
            raise ConfigError(
                f"deepspeed.zero_optimization.{key} must stay in memory, got {zero[key]!r}: checkpoints read it there. "
                'Set its device to "cpu", without super_offload.'
            )
    if stage == 1:
        zero["overlap_comm"] = False  # gradients are reduced once, after the last backward pass: nothing to overlap
    sizes = {"reduce_bucket_size": 1.0, "stage3_prefetch_bucket_size": 0.9}
    for key, share in sizes.items():
        _fill_size(zero, key, None if hidden_size is None else int(share * hidden_size * hidden_size))
    _fill_size(zero, "stage3_param_persistence_threshold", None if hidden_size is None else 10 * hidden_size)
    return int(stage), zero


def _fill_size(zero: dict[str, Any], key: str, size: int | None) -> None:
    if zero.get(key) != AUTO:
        return
    if size is None:
        del zero[key]
    else:
        zero[key] = size


def _offload_device(zero: Mapping[str, Any], key: str) -> str:
    return "none" if zero.get(key) is None else str(_section(zero, key).get("device", "none"))


def _resolve_precision(given: Mapping[str, Any], dtype: Dtype, stage: int) -> bool:
    """Whether the weights are bfloat16, which DeepSpeed has to be told."""
    if _section(given, "fp16").get("enabled", False) not in (False, AUTO):
        raise ConfigError(
            "deepspeed.fp16.enabled must be false: the learner knows float32 and bfloat16. Remove it; bf16=true is for "
            "bfloat16 arithmetic on float32 weights, dtype=bfloat16 for bfloat16 weights."
        )
    half = dtype.value == "bfloat16"
    enabled = _section(given, "bf16").get("enabled", AUTO)
    if enabled != AUTO and enabled is not half:
        raise ConfigError(
            f"deepspeed.bf16.enabled must be true exactly with dtype=bfloat16, got {enabled!r} and dtype={dtype.value}."
            ' Set it to "auto", or change one of them.'
        )
    if half and stage < 2:
        raise ConfigError(
            f"dtype must be float32 with deepspeed.zero_optimization.stage={stage}, got bfloat16: gradients would be "
            "added up in bfloat16. Use stage 2 or 3, or dtype=float32 with bf16=true."
        )
    return half


def _refuse_auto(config: Mapping[str, Any]) -> None:
    for name in _autos(config, "deepspeed"):
        raise ConfigError(f'{name} must be a value, got "auto": there is no option it could be taken from. Set it.')


def _autos(value: Any, name: str) -> Iterator[str]:
    """Dotted names whose value is still ``"auto"``."""
    if value == AUTO:
        yield name
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _autos(part, f"{name}.{key}")
