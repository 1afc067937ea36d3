"""Options that users of TRL's neighbours write: alignment-handbook, open-r1, LLaMA-Factory, axolotl.

What has another name here is read; what is done by something else is answered with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_ray.config.trl_options.foreign_option import ForeignOption, Reading
from trl_ray.config.trl_options.table_rows import Rows, always, by_value, never, only, read_by, renamed

_CACHE = (
    "What is kept of rows is in the folder trl_ray of the datasets library's cache (HF_DATASETS_CACHE), and is made "
    "anew where rows, tokenizer or options are others."
)
_PACKING = "Packing takes whole rows, as packing_strategy says."
_TEMPLATE = (
    "Remove it: rows are rendered by the tokenizer's own chat template, or by chat_template: its text, a jinja "
    "file, or a tokenizer that has it."
)
_HELD_OUT = "Set test_split_size to a share below 1 or a number of rows, or dataset_test_split to a split."
_TOKENIZER = "The tokenizer is the one in the model's folder, in its fast form."
_PIPELINE = "Choose the pipeline: trl-ray dpo, kto, orpo, cpo (SimPO) or grpo."
_TABLES = "Evaluations measure held-out rows; completions are in the run directory."
_KERNEL = "Kernels are chosen by attn_implementation and use_liger_kernel."
_NO_QUANTISING = "Set load_in_4bit or load_in_8bit, with use_peft."


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _mixer(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """{name: share of its rows}, the first ones; a share of 0 leaves the dataset out."""
    configs = given.get("dataset_configs") or [None] * len(value or ())
    if not isinstance(value, Mapping) or not all(map(_is_share, value.values())):
        return None
    if not isinstance(configs, list) or len(configs) != len(value) or not any(value.values()):
        return None
    named = [
        {"path": path, **({} if name is None else {"name": name}), **({} if share == 1 else {"share": float(share)})}
        for (path, share), name in zip(value.items(), configs, strict=True)
        if share
    ]
    if len(named) > 1 or "share" in named[0]:
        return {"datasets": named}
    return {"dataset_name": named[0]["path"], **({"dataset_config": named[0]["name"]} if "name" in named[0] else {})}


def _mixer_configs(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """One for each dataset of the mixer, which reads them."""
    mixer = given.get("dataset_mixer")
    return {} if not value or (isinstance(mixer, Mapping) and _mixer(mixer, given) is not None) else None


def _splits(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """One to train on and one held out; which is which, their names say."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return None
    held_out = [each for each in value if "train" not in each and "test" in each]
    trained = [each for each in value if "train" in each]
    if len(trained) != 1 or len(held_out) > 1 or len(value) > len(trained) + len(held_out):
        return None
    return {"dataset_train_split": trained[0], **({"dataset_test_split": held_out[0]} if held_out else {})}


def _mixture(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """{datasets: [{id, config, split, columns, weight}], seed, test_split_size}; a weight is a share of those rows."""
    if not isinstance(value, Mapping) or not isinstance(value.get("datasets"), list):
        return None
    if set(value) - {"datasets", "seed", "test_split_size"}:
        return None
    names, seed = {"id": "path", "config": "name"}, value.get("seed", 0)
    sources = []
    for each in value["datasets"]:
        if not isinstance(each, Mapping) or not _is_share(each.get("weight") or 1):
            return None
        named = {names.get(key, key): item for key, item in each.items() if item is not None and key != "weight"}
        share = each.get("weight") or 1
        sources.append(named if share == 1 else {**named, "share": float(share), "share_seed": seed})
    size = value.get("test_split_size")
    return {"datasets": sources, **({} if size is None else {"test_split_size": size})}


def _held_out(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """A share below 1, or a number of rows."""
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return {"test_split_size": value} if value > 0 else {}


def _special_tokens(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """{pad_token, eos_token}."""
    if not value:
        return {}
    if not isinstance(value, Mapping) or set(value) - {"pad_token", "eos_token"}:
        return None
    return {name: token for name, token in value.items() if token is not None}


def _vllm(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """Of a server's options, those of an engine; where it listens, is nobody's business."""
    names = {"tensor_parallel_size": "tensor_parallel_size", "gpu_memory_utilization": "gpu_memory_utilization"}
    names |= {"max_model_len": "max_model_len"}
    nothing = {"host", "port", "dtype", "enable_prefix_caching"}
    if (
        not isinstance(value, Mapping)
        or not set(value) <= {*names, *nothing}
        or value.get("dtype") not in ("auto", None)
    ):
        return None
    return {f"rollout.{names[key]}": item for key, item in value.items() if key in names and item is not None}


def _targets(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """``all`` or names with commas."""
    if value == "all":
        return {"lora_target_modules": "all-linear"}
    if isinstance(value, str):
        return {"lora_target_modules": [name.strip() for name in value.split(",")]}
    return {"lora_target_modules": value} if isinstance(value, list) else None


def _quantised(value: Any, given: Mapping[str, Any]) -> Reading | None:
    if value in (None, 16, 32):
        return {}
    return {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}.get(value) if isinstance(value, int) else None


def _per_epoch(option: str) -> tuple[ForeignOption, ...]:
    """So many times in an epoch: a fraction of the run."""

    def read(value: Any, given: Mapping[str, Any]) -> Reading | None:
        epochs = given.get("num_train_epochs", given.get("num_epochs", 3))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isinstance(epochs, (int, float)):
            return None
        if value == 0:
            return {option: 0}
        fraction = 1 / (value * epochs)
        return {option: fraction} if fraction < 1 else None

    return read_by(read, says=f"Set {option}: a number of steps, or a fraction of the run's below 1.")


def _rpo(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """The weight of the chosen answers' likelihood beside DPO's loss."""
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, (int, float)) or given.get("loss_type") is not None:
        return None
    return {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, float(value)]}


def _stage(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """Supervised fine-tuning trains what the assistant says there, unless it is told otherwise."""
    if value == "pt":
        return {}
    if value != "sft":
        return None
    return {} if given.get("train_on_prompt") else {"assistant_only_loss": True}


def _inputs(value: Any, given: Mapping[str, Any]) -> Reading | None:
    """Whether what is answered is trained: prompts beside completions, and in conversations what others say."""
    if value is True:
        return {"completion_only_loss": False}
    if value not in (False, None):
        return None
    entries = [each for each in given.get("datasets") or () if isinstance(each, Mapping)]
    talks = any(
        str(each.get("type") or "").startswith(("chat_template", "sharegpt")) or "field_messages" in each
        for each in entries
    )
    return {"assistant_only_loss": True} if talks else {"completion_only_loss": None}


HANDBOOK: Rows = {
    "rpo_alpha": read_by(
        _rpo, says="Set loss_type=[sigmoid, sft] with loss_weights=[1.0, ALPHA].", needs=("loss_weights",)
    ),
    "base_model_attribute_name": always("The base of a model is found by transformers."),
    "packing": only(False, None, says="Remove it: only the pipeline sft packs examples."),
    "dataset_mixer": read_by(
        _mixer,
        says="Shares must be from 0 to 1. List them under datasets: [{path: NAME, share: 0.1}].",
    ),
    "dataset_splits": read_by(
        _splits, says="Set dataset_train_split and dataset_test_split: one split to train on, and one that is held out."
    ),
    "dataset_configs": read_by(_mixer_configs, says="Set dataset_config, or name in datasets."),
    "dataset_mixture": read_by(
        _mixture,
        says="List them under datasets: [{path, name, split, columns, share}]; a share of the rows is from 0 to 1.",
    ),
    "columns_to_keep": never("Set datasets: [{path: NAME, columns: [...]}]."),
    "use_flash_attention_2": by_value(
        {True: {"attn_implementation": "flash_attention_2"}}, nothing=(False, None), says="Set attn_implementation."
    ),
    "auto_insert_empty_system_msg": only(False, says="Remove it: messages are rendered as they are."),
    "tokenizer_name_or_path": only(None, says="Remove it: the tokenizer is the one in the model's folder."),
    "tokenizer_name": only(None, says="Remove it: the tokenizer is the one in the model's folder."),
    "dataset_prompt_column": only("prompt", None, says="Call the dataset's column prompt.", needs=("max_length",)),
    "base_model_revision": only(None, says="Set model_revision."),
    "wandb_run_name": renamed("run_name"),
    "benchmarks": only([], None, says="Remove it: eval_steps measures held-out rows; run benchmarks on a checkpoint."),
}

FACTORY: Rows = {
    "stage": (
        *read_by(_stage, says="Choose the pipeline: trl-ray sft, dpo, kto, reward or grpo.", needs=("packing",)),
        *only(
            "rm",
            says="Choose the pipeline: trl-ray sft, dpo, kto, reward or grpo.",
            needs=("center_rewards_coefficient",),
        ),
        *only("kto", says="Choose the pipeline: trl-ray sft, dpo, kto, reward or grpo.", needs=("desirable_weight",)),
        *only(
            "dpo", says="Choose the pipeline: trl-ray sft, dpo, kto, reward or grpo.", needs=("loss_type", "max_length")
        ),
        *never("Choose the pipeline: trl-ray sft, dpo, kto, reward or grpo."),
    ),
    "finetuning_type": by_value(
        {"lora": {"use_peft": True}, "full": {"use_peft": False}},
        says="Set use_peft: true for LoRA, false for all weights; there is no freezing of layers.",
    ),
    "lora_rank": renamed("lora_r"),
    "lora_target": read_by(_targets, says="Set lora_target_modules: all-linear, or a list of names."),
    "additional_target": read_by(
        lambda value, given: None if value is not None else {}, says="Set lora_modules_to_save: a list of names."
    ),
    "cutoff_len": renamed("max_length"),
    "template": never(_TEMPLATE),
    "dataset": never("Set dataset_name: a hub name, a file or a folder; or datasets for several."),
    "dataset_dir": never("Set dataset_name to the path of the file or folder."),
    "eval_dataset": never("Set dataset_test_split, or pass eval_dataset in Python."),
    "media_dir": only(None, says="Remove it: rows are text."),
    "max_samples": only(None, says="Name a part of the dataset by its split: dataset_train_split: 'train[:1000]'."),
    "val_size": read_by(_held_out, says=_HELD_OUT),
    "overwrite_cache": always(_CACHE),
    "tokenized_path": only(
        None, says="Remove it, and name the rows: tokens are found again by what made them. " + _CACHE
    ),
    "plot_loss": always("report.html has the curves."),
    "flash_attn": by_value(
        {
            "fa2": {"attn_implementation": "flash_attention_2"},
            "sdpa": {"attn_implementation": "sdpa"},
            "disabled": {"attn_implementation": "eager"},
        },
        nothing=("auto", None),
        says="Set attn_implementation: flash_attention_2, sdpa or eager.",
    ),
    "enable_liger_kernel": renamed("use_liger_kernel"),
    "use_unsloth": only(False, says="Set use_liger_kernel=true for faster layers."),
    "neat_packing": renamed("packing"),
    "train_on_prompt": by_value(
        {True: {"completion_only_loss": False}, False: {"assistant_only_loss": True}},
        says="Set completion_only_loss, or assistant_only_loss for conversations.",
        needs=("completion_only_loss",),
    ),
    "mask_history": only(False, says="Remove it: assistant_only_loss trains every turn of the assistant."),
    "pref_beta": renamed("beta"),
    "pref_loss": renamed("loss_type"),
    "pref_ftx": only(0, says="Set loss_type=[sigmoid, sft] with loss_weights=[1.0, SHARE]."),
    "dpo_label_smoothing": renamed("label_smoothing"),
    "kto_chosen_weight": renamed("desirable_weight"),
    "kto_rejected_weight": renamed("undesirable_weight"),
    "ref_model": renamed("ref_model_name_or_path"),
    "ref_model_path": renamed("ref_model_name_or_path"),
    "reward_model": (
        *renamed("reward_model_name_or_path", needs=("rollout",)),
        *never("Set reward_model_name_or_path in the pipeline grpo, rloo or async-grpo."),
    ),
    "use_fast_tokenizer": always("Tokenizers are the fast ones where a model has them."),
    "resize_vocab": always("Embeddings grow with the tokenizer."),
    "low_cpu_mem_usage": always("Weights are read once."),
    "quantization_bit": read_by(_quantised, says=_NO_QUANTISING),
    "quantization_method": only("bitsandbytes", "bnb", None, says=_NO_QUANTISING),
    "quantization_type": renamed("bnb_4bit_quant_type"),
    "double_quantization": renamed("use_bnb_nested_quant"),
    "adapter_name_or_path": only(
        None, says="Set model_name_or_path to the adapter's folder: training goes on with it."
    ),
    "upcast_layernorm": only(False, says="Remove it: norms compute in float32 where bf16 is set."),
    "pure_bf16": by_value({True: {"dtype": "bfloat16"}}, nothing=(False,), says="Set dtype=bfloat16."),
    "infer_dtype": only("auto", None, says="Set rollout.dtype."),
    "image_max_pixels": always("Rows are text."),
    "video_max_pixels": always("Rows are text."),
    "loraplus_lr_ratio": only(None, says="Remove it: all weights of an adapter have one learning rate."),
    "use_galore": only(False, says="Set use_peft=true to save memory."),
    "shift_attn": only(False, says="Remove it: attention is the model's own."),
    "rope_scaling": only(None, says="Set it in the model's config.json."),
    "do_sample": always("Completions are sampled by temperature, top_p and top_k."),
    "predict_with_generate": only(False, says="Remove it: evaluations measure held-out rows."),
    "disable_shuffling": by_value(
        {True: {"shuffle_dataset": False}, False: {"shuffle_dataset": True}}, says="Set shuffle_dataset."
    ),
    "mix_strategy": only("concat", says="Set weight of each of the datasets, and mixture_stopping."),
    "interleave_probs": read_by(
        lambda value, given: {} if value is None or given.get("mix_strategy", "concat") == "concat" else None,
        says="Set weight of each of the datasets, and mixture_stopping.",
    ),
    "streaming": renamed("dataset_streaming"),
    "buffer_size": read_by(
        lambda value, given: None if value is not None and given.get("streaming") else {},
        says="Set stream_window: rows of a stream that are shuffled together.",
    ),
    "add_tokens": only(None, "", says="Add them to the tokenizer's files: embeddings get rows for them."),
    "add_special_tokens": only(None, "", says="Add them to the tokenizer's files: embeddings get rows for them."),
    "new_special_tokens": only(None, "", says="Add them to the tokenizer's files: embeddings get rows for them."),
    "ignore_pad_token_for_loss": only(True, says="Remove it: nothing is padded."),
    **dict.fromkeys(
        ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"), always("Rows are text.")
    ),
    **dict.fromkeys(
        ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
        never("Set use_peft with lora_target_modules to train a part of the weights."),
    ),
    **dict.fromkeys(
        ("use_badam", "use_llama_pro", "use_apollo", "use_adam_mini", "pissa_init"),
        only(False, None, says="Set use_peft=true to save memory."),
    ),
    **dict.fromkeys(
        ("galore_layerwise", "galore_target", "galore_rank", "galore_scale", "galore_update_interval"),
        never("Set use_peft=true to save memory."),
    ),
    "use_muon": by_value({True: {"optim": "muon"}}, nothing=(False, None), says="Set optim=muon."),
    "use_dft_loss": by_value(
        {True: {"loss_type": "dft"}}, nothing=(False, None), says="Set loss_type=dft in trl-ray sft."
    ),
    "use_swanlab": only(False, None, says="Set report_to: wandb, tensorboard, mlflow or trackio."),
    **dict.fromkeys(
        ("swanlab_project", "swanlab_run_name", "swanlab_mode", "swanlab_api_key", "swanlab_workspace"),
        only(None, says="Set report_to, run_name and project."),
    ),
    "create_new_adapter": always("An adapter is new unless model_name_or_path names one."),
    "train_from_scratch": only(False, None, says="Save a model of random weights, and name its folder."),
    "compute_accuracy": always("Token accuracy is always measured."),
    "disable_gradient_checkpointing": by_value(
        {True: {"gradient_checkpointing": False}, False: {"gradient_checkpointing": True}},
        says="Set gradient_checkpointing.",
    ),
    "use_cache": always("Training keeps no cache, and generation always does."),
    "print_param_status": always("The dry run counts parameters."),
    "eval_on_each_dataset": only(False, None, says="Pass eval_dataset={NAME: rows} in Python."),
    "enable_thinking": renamed("chat_template_kwargs.enable_thinking"),
    "default_system": only(None, "", says="Set system_prompt, or give rows a column system."),
    "tool_format": only(None, says=_TEMPLATE),
    "cache_dir": only(None, says="Set the environment variable HF_HOME."),
    "hf_hub_token": only(None, says="Set the environment variable HF_TOKEN."),
    "infer_backend": always("rollout.engine says who generates."),
    "data_shared_file_system": always("Rows are read on the driver's machine alone."),
    "moe_aux_loss_coef": renamed("router_aux_loss_coef"),
    **dict.fromkeys(
        ("export_dir", "export_size", "export_device", "export_legacy_format", "export_hub_model_id"),
        never("Checkpoints load with from_pretrained; models.adapters.merging.export_merged merges an adapter."),
    ),
    **dict.fromkeys(
        ("use_ray", "ray_run_name", "ray_storage_path"), always("Runs are on Ray, with output_dir as their folder.")
    ),
    **dict.fromkeys(
        ("ray_num_workers", "resources_per_worker", "placement_strategy"), never("Set runtime.num_learners.")
    ),
}

AXOLOTL: Rows = {
    "base_model": renamed("model_name_or_path"),
    "base_model_config": always("It is the one in the model's folder."),
    "tokenizer_config": only(None, says="Remove it: the tokenizer is the one in the model's folder."),
    "model_type": always("Models are loaded by their own configuration."),
    "tokenizer_type": always("Models are loaded by their own configuration."),
    "is_llama_derived_model": always("Models are loaded by their own configuration."),
    "is_mistral_derived_model": always("Models are loaded by their own configuration."),
    "strict": always("Options are always checked."),
    "sequence_len": renamed("max_length"),
    "micro_batch_size": renamed("per_device_train_batch_size"),
    "eval_batch_size": renamed("per_device_eval_batch_size"),
    "num_epochs": renamed("num_train_epochs"),
    "lr_scheduler": renamed("lr_scheduler_type"),
    "cosine_min_lr_ratio": never(
        "Set lr_scheduler_type=cosine_with_min_lr with lr_scheduler_kwargs={min_lr_rate: ...}."
    ),
    "optimizer": renamed("optim"),
    "sample_packing": renamed("packing"),
    "eval_sample_packing": renamed("eval_packing"),
    "sample_packing_group_size": always(_PACKING),
    "sample_packing_bin_size": always(_PACKING),
    "pad_to_sequence_len": always("Nothing is padded."),
    "train_on_inputs": read_by(
        _inputs,
        says="Set completion_only_loss, or assistant_only_loss for conversations.",
        needs=("completion_only_loss",),
    ),
    "adapter": by_value(
        {"lora": {"use_peft": True}, "qlora": {"use_peft": True}},
        nothing=(None, ""),
        says="Set use_peft: true for LoRA; load_in_4bit quantises the weights beneath.",
    ),
    "lora_model_dir": only(None, "", says="Set model_name_or_path to the adapter's folder: training goes on with it."),
    "peft_use_rslora": renamed("use_rslora"),
    "peft_use_dora": renamed("use_dora"),
    "lora_target_linear": by_value(
        {True: {"lora_target_modules": "all-linear"}}, nothing=(False, None), says="Set lora_target_modules=all-linear."
    ),
    "lora_fan_in_fan_out": only(False, None, says="Set lora_kwargs={fan_in_fan_out: true}."),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), always(_KERNEL)),
    "flash_attention": by_value(
        {True: {"attn_implementation": "flash_attention_2"}}, nothing=(False, None), says="Set attn_implementation."
    ),
    "sdp_attention": by_value(
        {True: {"attn_implementation": "sdpa"}}, nothing=(False, None), says="Set attn_implementation."
    ),
    "eager_attention": by_value(
        {True: {"attn_implementation": "eager"}}, nothing=(False, None), says="Set attn_implementation."
    ),
    "flex_attention": by_value(
        {True: {"attn_implementation": "flex_attention"}}, nothing=(False, None), says="Set attn_implementation."
    ),
    "xformers_attention": only(False, None, says="Set attn_implementation."),
    "s2_attention": only(False, None, says="Remove it: attention is the model's own."),
    "dataset_prepared_path": always(_CACHE),
    "dataset_processes": renamed("dataset_num_proc"),
    "shuffle_merged_datasets": by_value(
        {True: {"shuffle_dataset": True}, False: {"shuffle_dataset": False}}, says="Set shuffle_dataset."
    ),
    "val_set_size": read_by(_held_out, says=_HELD_OUT),
    "test_datasets": only(None, [], says="Set dataset_test_split."),
    "evals_per_epoch": _per_epoch("eval_steps"),
    "saves_per_epoch": _per_epoch("save_steps"),
    "wandb_name": renamed("run_name"),
    "wandb_watch": only(None, "", False, says="Remove it: gradients are not sent."),
    "wandb_log_model": only(None, "", False, says="Remove it: checkpoints stay in output_dir."),
    "wandb_mode": only(None, "", "offline", says="Set the environment variable WANDB_MODE."),
    "wandb_run_id": only(None, "", says="Remove it: a resumed run goes on with its own."),
    "special_tokens": read_by(
        _special_tokens,
        says="Set eos_token and pad_token, and others in the tokenizer's files.",
    ),
    "tokens": only(None, [], says="Add them to the tokenizer's files: embeddings grow with it."),
    "rl": (
        *only("kto", says=_PIPELINE, needs=("desirable_weight",)),
        *by_value({"ipo": {"loss_type": "ipo"}}, nothing=("dpo",), says=_PIPELINE, needs=("f_divergence_type",)),
        *by_value(
            {"simpo": {"loss_type": "simpo", "cpo_alpha": 0.0}}, says=_PIPELINE, needs=("cpo_alpha", "simpo_gamma")
        ),
        *only("grpo", says=_PIPELINE, needs=("num_generations", "loss_type", "epsilon")),
        # Of those that are left, only orpo has all of these.
        *only("orpo", says=_PIPELINE, needs=("beta", "max_length", "max_prompt_length")),
        *never(_PIPELINE),
    ),
    "vllm": read_by(_vllm, says="Set rollout: tensor_parallel_size, gpu_memory_utilization, max_model_len."),
    "tokenizer_use_fast": always(_TOKENIZER),
    "tokenizer_legacy": always(_TOKENIZER),
    "resize_token_embeddings_to_32x": always("Embeddings get a row for each token of the tokenizer."),
    "push_dataset_to_hub": only(None, "", says="Remove it: rows are not sent."),
    "skip_prepare_dataset": always("Rows that hold tokens are taken as they are, and others tokenised."),
    "torchdistx_path": only(None, "", says="Remove it."),
    **dict.fromkeys(
        ("gptq", "gptq_groupsize", "gptq_model_v1"),
        only(None, False, "", says="A checkpoint says how it is quantised."),
    ),
    "gc_steps": always("Memory is the run's own business."),
    "eval_max_new_tokens": always(_TABLES),
    "eval_table_size": always(_TABLES),
    "save_first_step": only(False, None, says="Set save_steps."),
    "eot_tokens": only(None, [], says="Set eos_token: the token that ends a turn."),
    "lora_on_cpu": only(False, None, says="Remove it: adapters are read where the model is."),
    "relora_steps": only(None, says="Remove it: an adapter is one for the whole run."),
    "loraplus_lr_embedding": only(None, says="Remove it: all weights of an adapter have one learning rate."),
    "bench_dataset": only(None, says="Remove it: run benchmarks on a checkpoint."),
    "sdp_attn_kernel": always(_KERNEL),
    "load_best_model_at_end_metric": renamed("metric_for_best_model"),
    "rl_beta": renamed("beta"),
    "dpo_beta": renamed("beta"),
    "orpo_alpha": renamed("beta"),
    "trl": never("Write what it holds beside the other options: some of it stands there as well."),
    "plugins": only(None, [], says="Set use_liger_kernel=true for Liger's kernels, and callbacks for the rest."),
    "liger_rope": always(_KERNEL),
    "liger_rms_norm": always(_KERNEL),
    "liger_glu_activation": always(_KERNEL),
    "liger_layer_norm": always(_KERNEL),
    "liger_fused_linear_cross_entropy": always(_KERNEL),
    "max_packed_sequence_len": only(None, says="Set max_length with packing=true."),
    "gpu_memory_limit": only(None, says="Set max_tokens_per_micro_batch: it bounds the memory of a pass."),
    "loss_watchdog_threshold": only(None, says="Write a callback that sets control.should_training_stop."),
    "loss_watchdog_patience": only(None, says="Write a callback that sets control.should_training_stop."),
    "float16": only(False, None, says="Set bf16=true, or dtype=bfloat16 for the weights themselves."),
    "bfloat16": by_value({True: {"dtype": "bfloat16"}}, nothing=(False, None), says="Set dtype=bfloat16."),
    "unfrozen_parameters": only(None, [], says="Set use_peft with lora_target_modules to train a part of the weights."),
    "mean_resizing_embeddings": always("New rows are drawn from the distribution of the old ones."),
    "roles_to_train": only(
        ["assistant"], None, says="Set assistant_only_loss=true: the assistant's turns are trained."
    ),
    "train_on_eos": only("turn", "all", None, says="Remove it: what ends a turn is trained with it."),
}
