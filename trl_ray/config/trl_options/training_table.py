"""Options of transformers' TrainingArguments, of past versions too, that are none of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ray.config.trl_options.foreign_option import Reading
from trl_ray.config.trl_options.table_rows import Rows, always, by_value, never, only, read_by, renamed

_CONSOLE = "The console shows every logging_steps-th step, and metrics.jsonl has all of them."
_RANKS = "Ranks are actors of the run (runtime.num_learners); set deepspeed to split weights over them."
_READING = (
    *always(
        "Rows are read by the driver and by dataset_num_proc, in an order that does not depend on it.",
        "dataset_num_proc",
    ),
    *always("Prompts are read and tokenised by the driver."),
)
_CHECKPOINT = "A checkpoint is whole, on the driver's machine, and SIGTERM writes one."
_REPOSITORY = "Set hub_model_id: ORGANISATION/NAME."
_COMPILE = "The learner runs uncompiled, which computes the same numbers."
_MEASURED = "What evaluations measure is fixed."
_UNPADDED = "Micro-batches are packed without padding."


def _sampling(value: Any, given: Any) -> Reading | None:
    """Where rows are examples; `group_by_length` saves padding, of which there is none."""
    if value in ("random", "group_by_length"):
        return {"shuffle_dataset": True}
    return {"shuffle_dataset": False} if value == "sequential" else None


def _warmup(value: Any, given: Any) -> Reading | None:
    # transformers: the steps win where both are given.
    return {} if value in (None, 0, 0.0) or given.get("warmup_steps") else {"warmup_steps": value}


def _counts_tokens(value: Any, given: Any) -> Reading | None:
    """Of one rank alone there is nothing to average."""
    runtime = given.get("runtime")
    ranks = runtime.get("num_learners", 1) if isinstance(runtime, Mapping) else getattr(runtime, "num_learners", 1)
    return {} if value is True or ranks == 1 else None


def _accelerator(value: Any, given: Any) -> Reading | None:
    """What accelerate does unless it is told otherwise, or how it hands rows to ranks."""
    usual = {"split_batches": (False, None), "dispatch_batches": (True, False, None), "even_batches": (True, False),
             "use_seedable_sampler": (True, None), "non_blocking": (True, False)}  # fmt: skip
    held = value or {}
    if not isinstance(held, Mapping) or any(held[name] not in usual.get(name, ()) for name in held):
        return None
    return {}


def _repository(value: Any, given: Any) -> Reading | None:
    """Of an organisation and a name, whichever of the two this is; the name is the folder's where there is none."""
    if value is None:
        return {}
    name, organisation = given.get("push_to_hub_model_id"), given.get("push_to_hub_organization")
    if organisation is None:
        return {"hub_model_id": name}
    name = name or Path(str(given.get("output_dir", "runs/run"))).name
    return None if "/" in str(name) else {"hub_model_id": f"{organisation}/{name}"}


def _pushed_revision(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """open-r1's switch, or the name of a branch."""
    if isinstance(value, str):
        return {"hub_revision": value}
    if value is True:
        return {"push_to_hub": True}
    return {} if value in (False, None) else None


TRAINING: Rows = {
    # Precision and speed.
    "fp16": only(False, None, says="Set bf16=true, which needs no scaling of the loss."),
    "fp16_full_eval": only(False, says="Remove it: evaluations compute as training does."),
    "bf16_full_eval": always("Evaluations compute as training does, with bf16 in bfloat16."),
    "fp16_opt_level": always("It is an option of fp16, which is not used."),
    "half_precision_backend": always("Mixed precision is torch's own."),
    "torch_dtype": renamed("dtype"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), always(_COMPILE)),
    "gradient_checkpointing_kwargs": only(
        None,
        {},
        {"use_reentrant": False},
        {"use_reentrant": True},
        says="Checkpointing recomputes without reentry, which gives the same numbers. Remove what else it holds.",
    ),
    "liger_kernel_config": only(
        None, {}, says="Liger's own choice of kernels is what use_liger_kernel=true takes. Remove it."
    ),
    "auto_find_batch_size": always(
        "What does not fit ends the run; max_tokens_per_micro_batch bounds the memory of a pass, with the same numbers."
    ),
    "use_cache": always("The learner computes without a cache, engines with one."),
    "use_cpu": by_value(
        {True: {"runtime.learner_num_gpus": 0.0}}, nothing=(False,), says="Set runtime.learner_num_gpus."
    ),
    "no_cuda": by_value(
        {True: {"runtime.learner_num_gpus": 0.0}}, nothing=(False,), says="Set runtime.learner_num_gpus."
    ),
    "use_mps_device": only(False, says="Remove it: the learner computes on CPUs or NVIDIA GPUs."),
    "use_ipex": only(False, says="Remove it: the learner computes with plain torch."),
    "jit_mode_eval": always(_COMPILE),
    # Optimizer.
    "warmup_ratio": read_by(_warmup, says="Set warmup_steps, a number of steps or a fraction of the run's below 1."),
    "optim_target_modules": only(None, says="Set use_peft with lora_target_modules to train a part of the weights."),
    "adafactor": by_value({True: {"optim": "adafactor"}}, nothing=(False, None), says="Set optim=adafactor."),
    "average_tokens_across_devices": read_by(
        _counts_tokens, says="Remove it: tokens are always counted over all ranks."
    ),
    "label_smoothing_factor": only(0, says="Remove it: only the pipeline sft has labels to smooth."),
    "neftune_noise_alpha": only(None, 0, says="Remove it: only the pipeline sft has noisy embeddings."),
    # When to log, save, evaluate.
    "evaluation_strategy": renamed("eval_strategy"),
    "save_on_each_node": always(_CHECKPOINT),
    "save_safetensors": always("Checkpoints are safetensors."),
    "enable_jit_checkpoint": always(_CHECKPOINT),
    "ignore_data_skip": always("A resumed run takes up the very rows or prompts that it left."),
    "restore_callback_states_from_checkpoint": always("Callbacks with state_dict are always restored."),
    # Evaluations.
    "do_train": always("The pipeline trains."),
    "do_eval": always("eval_steps says whether there are evaluations."),
    "do_predict": only(False, says="Remove it: pipelines train and evaluate."),
    "per_device_eval_batch_size": always(
        "Engines batch evaluations themselves; eval_num_prompts says how many prompts."
    ),
    "eval_accumulation_steps": always("Evaluations add up as they go."),
    "prediction_loss_only": always(_MEASURED),
    "eval_do_concat_batches": always(_MEASURED),
    "eval_use_gather_object": always(_MEASURED),
    "batch_eval_metrics": only(False, says=_MEASURED + " Remove it."),
    "include_for_metrics": only([], None, says=_MEASURED + " Remove it."),
    "include_inputs_for_metrics": only(False, says=_MEASURED + " Remove it."),
    # Rows.
    "train_sampling_strategy": (
        *always("Prompts are drawn as shuffle_dataset says, each for a whole group.", "rollout"),
        *read_by(_sampling, says="Set shuffle_dataset: true draws rows at random, false takes them in order."),
    ),
    "group_by_length": always("It saves padding, and nothing is padded here."),
    "length_column_name": always("It saves padding, and nothing is padded here."),
    "pad_to_multiple_of": always(_UNPADDED),
    "remove_unused_columns": always("Columns that are not needed do no harm, and reward functions are given all."),
    "label_names": only(None, [], says="Remove it: labels are made from the rows."),
    "dataloader_drop_last": only(
        False, says="Remove it: an update takes what is left of an epoch, with its own totals."
    ),
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
            "dataset_num_proc",
            "split_batches",
            "dispatch_batches",
        ),
        _READING,
    ),
    "preprocessing_num_workers": renamed("dataset_num_proc"),
    # Ranks.
    "accelerator_config": read_by(
        _accelerator,
        says="Set runtime and deepspeed: batches are not split over ranks, and rows are seeded by data_seed.",
    ),
    "parallelism_config": only(None, {}, says="Set runtime.num_learners and deepspeed."),
    "local_rank": always(_RANKS),
    "ddp_timeout": renamed("runtime.collective_timeout_s"),
    "ddp_backend": always("Ranks speak NCCL on GPUs and Gloo on CPUs."),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        always("Gradients are summed over ranks after the last micro-batch, all at once."),
    ),
    **dict.fromkeys(("fsdp", "fsdp_config"), only(None, "", [], {}, False, says=_RANKS)),
    "fsdp_min_num_params": only(0, says=_RANKS),
    "fsdp_transformer_layer_cls_to_wrap": only(None, says=_RANKS),
    # What is shown and kept.
    "logging_dir": always("What a run writes is in output_dir, TensorBoard's files too."),
    "debug": only("", [], None, says="Set runtime.kind=local for a debugger."),
    **dict.fromkeys(
        (
            "log_on_each_node",
            "logging_nan_inf_filter",
            "include_num_input_tokens_seen",
            "include_tokens_per_second",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "skip_memory_metrics",
        ),
        always(_CONSOLE),
    ),
    "trackio_static_space_id": only(
        None,
        False,
        says="Remove it: the Space that trackio_space_id names is not frozen when the run ends; report.html is a page "
        "that stays.",
    ),
    # The Hub, by names of the past: transformers joined an organisation and a name.
    "hub_model_revision": renamed("hub_revision"),
    "push_to_hub_token": renamed("hub_token"),
    "push_to_hub_model_id": read_by(_repository, says=_REPOSITORY),
    "push_to_hub_organization": read_by(_repository, says=_REPOSITORY),
    "push_to_hub_revision": read_by(_pushed_revision, says="Set hub_revision, the name of a branch."),
    "tpu_num_cores": only(None, says="Remove it: the learner computes on CPUs or NVIDIA GPUs."),
    "past_index": only(-1, says="Remove it."),
    "torchdynamo": always(_COMPILE),
    "ray_scope": never("Remove it: it belongs to searches of hyper-parameters."),
}
"""By name."""
