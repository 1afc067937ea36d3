"""What stands here for those options of TRL and transformers that trl_ray does not have under their names.

an unknown key --counterpart--> what to do instead, where the configuration has the option that is named
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterpart:
    """One option of TRL's or transformers'."""

    says: str
    """What to do instead, as a sentence."""
    needs: tuple[str, ...] = ()
    """Options that a configuration must have for that."""


def counterpart(name: str, known: Container[str]) -> str | None:
    """What to do instead of giving an option of TRL's; None where it is none, or this configuration has nothing for it.

    Args:
        name: of the option.
        known: options of the configuration.
    """
    for entry in COUNTERPARTS.get(name, ()):
        if all(option in known for option in entry.needs):
            return entry.says
    return None


def _of(says: str, *needs: str) -> tuple[Counterpart, ...]:
    return (Counterpart(says=says, needs=needs),)


_SERVER = _of(
    "Remove it: engines are actors of the run (rollout.num_workers, rollout.num_gpus), on any machine of the cluster "
    "that runtime.address names.",
    "rollout",
)
_TEACHER_SERVER = _of(
    "List the teacher under teachers with its server: teachers: [{server: {url: http://HOST:PORT, protocol: trl}}].",
    "teachers",
)
_ENGINE: Mapping[str, tuple[Counterpart, ...]] = {
    "use_vllm": _of("Set rollout.engine to vllm, transformers or auto (vLLM where it is installed).", "rollout"),
    "vllm_mode": _SERVER,
    "vllm_server_base_url": _SERVER,
    "vllm_server_host": _SERVER,
    "vllm_server_port": _SERVER,
    "vllm_group_port": _SERVER,
    "vllm_server_timeout": _of(
        "Set runtime.start_deadline_s: the seconds that an engine may take to load its model.", "rollout", "runtime"
    ),
    "vllm_model_impl": _of("Set rollout.engine_kwargs={model_impl: transformers}, or leave it to vLLM.", "rollout"),
    "vllm_enable_sleep_mode": _of(
        "Remove it: engines generate while the learner trains, so they keep their memory. Lower "
        "rollout.gpu_memory_utilization where they share a GPU.",
        "rollout",
    ),
    "vllm_tensor_parallel_size": _of("Set rollout.tensor_parallel_size.", "rollout"),
    "vllm_gpu_memory_utilization": _of("Set rollout.gpu_memory_utilization.", "rollout"),
    "vllm_max_model_length": _of("Set rollout.max_model_len.", "rollout"),
    "vllm_structured_outputs_regex": _of(
        "Remove it: completions are sampled from the whole distribution, which ratios are taken of.", "rollout"
    ),
    "vllm_sync_frequency": _of(
        "Set max_staleness: weights are pulled after every step, and generation runs ahead by so many.", "max_staleness"
    ),
    "vllm_importance_sampling_cap": _of("Set vllm_importance_sampling_clip_max.", "vllm_importance_sampling_clip_max"),
    "cache_implementation": _of("Remove it: engines manage their caches (rollout.kv_cache_memory_gib).", "rollout"),
    "use_transformers_continuous_batching": _of(
        "Remove it: both engines batch continuously, rollout.max_num_seqs completions at once.", "rollout"
    ),
    "transformers_continuous_batching_config": _of("Set rollout.max_num_seqs.", "rollout"),
    "use_transformers_paged": _of("Set rollout.engine=vllm, which pages its cache.", "rollout"),
    "ds3_gather_for_generation": _of(
        "Remove it: weights are gathered when they are published, whatever the ZeRO stage.", "rollout"
    ),
    "max_tool_calling_iterations": _of("Remove it: completions are a single turn.", "rollout"),
}

_TEACHERS: Mapping[str, tuple[Counterpart, ...]] = {
    "teacher_model_init_kwargs": _of(
        "List the teacher under teachers: [{model_name_or_path: NAME, dtype: bfloat16, attn_implementation: ..., "
        "trust_remote_code: ...}].",
        "teachers",
    ),
    "use_teacher_server": _TEACHER_SERVER,
    "teacher_model_server_url": _TEACHER_SERVER,
    "teacher_model_name_or_path": _of(
        "Set teacher_model_kind: the policy is its own teacher. For another model's lessons use the pipeline distill.",
        "teacher_model_kind",
    ),
    "reverse_kl_top_1_mode": _of(
        "Set loss_support=realised for sampled, or loss_support=student with loss_top_k=1 for argmax.", "loss_support"
    ),
    "max_length": _of("Set rollout.max_model_len: tokens of prompt and completion together.", "rollout"),
    "feedback_column": _of("Call the dataset's column privileged_context.", "include_environment_feedback"),
}

_HUB = "Remove it: completions stand in output_dir alone; upload their folder with hf upload."
_FSDP = "Remove it: ranks are actors (runtime.num_learners); set deepspeed to split weights over them."
_COMPILE = "Remove it: the learner runs uncompiled."
_ROWS = "Remove it: rows are read by the driver."
_LOG = "Remove it: every step stands in metrics.jsonl, and logging_steps thins out the console."
_COLUMNS = "Remove it: no column is dropped; reward functions are given all of them."
_TRACKIO = "Remove it: Trackio writes on this machine, or to the Space that trackio_space_id names."

_TRAINING: Mapping[str, str] = {
    "warmup_ratio": "Set warmup_steps: a number of optimizer steps.",
    "optim_target_modules": "Set use_peft with lora_target_modules to train a part of the weights.",
    "average_tokens_across_devices": "Remove it: tokens are always counted over all ranks.",
    "fp16": "Set bf16=true, or dtype=bfloat16 for the weights themselves.",
    "fp16_full_eval": "Remove it: evaluations compute as training does.",
    "bf16_full_eval": "Remove it: evaluations compute as training does.",
    "tf32": "Set bf16=true for fast matrix products.",
    "torch_dtype": "Set dtype: float32 or bfloat16.",
    "gradient_checkpointing_kwargs": "Remove it: gradient_checkpointing recomputes without reentry.",
    "cast_lm_head_to_fp32": "Remove it: the head computes in the model's format; dtype=float32 makes log-probs exact.",
    "router_aux_loss_coef": "Remove it: routers of experts have no loss of their own here.",
    "liger_kernel_config": "Remove it: use_liger_kernel=true takes Liger's own choice of kernels.",
    "label_smoothing_factor": "Remove it: only the pipeline sft has labels to smooth.",
    "neftune_noise_alpha": "Remove it: only the pipeline sft has noisy embeddings.",
    "use_cache": "Remove it: the learner computes without a cache, engines with one.",
    "auto_find_batch_size": "Set max_tokens_per_micro_batch: it bounds the memory of a pass.",
    "torch_empty_cache_steps": "Set max_tokens_per_micro_batch: it bounds the memory of a pass.",
    "per_device_eval_batch_size": "Set eval_num_prompts: engines batch evaluations themselves.",
    "eval_accumulation_steps": "Set eval_num_prompts: engines batch evaluations themselves.",
    "train_sampling_strategy": "Set shuffle_dataset: true draws rows at random, false takes them in order.",
    "remove_unused_columns": _COLUMNS,
    "label_names": _COLUMNS,
    "length_column_name": _COLUMNS,
    "pad_to_multiple_of": "Remove it: micro-batches are packed without padding.",
    "use_cpu": "Set runtime.learner_num_gpus=0.",
    "accelerator_config": "Set runtime and deepspeed.",
    "parallelism_config": "Set runtime.num_learners and deepspeed.",
    "local_rank": "Set runtime.num_learners: ranks are actors and started by the run.",
    "ddp_timeout": "Set runtime.collective_timeout_s.",
    "ignore_data_skip": "Remove it: a resumed run takes up the very prompts that it left.",
    "restore_callback_states_from_checkpoint": "Remove it: callbacks with state_dict are always restored.",
    "logging_dir": "Set output_dir: all that a run writes is in it.",
    "log_completions_steps": "Set log_completions: the completions of every step stand in the run directory.",
    "log_completions_hub_repo": _HUB,
    "log_unique_prompts": "Set num_completions_to_print.",
    "log_multimodal": "Remove it: completions are text.",
    **dict.fromkeys(
        ("save_on_each_node", "enable_jit_checkpoint"),
        "Remove it: a checkpoint is whole, on the driver's machine, and SIGTERM writes one.",
    ),
    **dict.fromkeys(
        (
            "fsdp",
            "fsdp_config",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
        ),
        _FSDP,
    ),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILE),
    **dict.fromkeys(
        (
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        _ROWS,
    ),
    **dict.fromkeys(
        (
            "log_on_each_node",
            "logging_nan_inf_filter",
            "include_num_input_tokens_seen",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "debug",
            "skip_memory_metrics",
        ),
        _LOG,
    ),
    **dict.fromkeys(("trackio_bucket_id", "trackio_static_space_id"), _TRACKIO),
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "include_for_metrics",
            "batch_eval_metrics",
        ),
        "Remove it: what evaluations measure is fixed.",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "Remove it: eval_steps says whether there are evaluations."),
}

COUNTERPARTS: Mapping[str, tuple[Counterpart, ...]] = {
    **{name: _of(says) for name, says in _TRAINING.items()},
    **_ENGINE,
    **_TEACHERS,
}
"""By TRL's name."""
