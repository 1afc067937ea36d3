"""Options of TRL's own trainers, ModelConfig and ScriptArguments, of past versions too, that are none of ours."""

from __future__ import annotations

from typing import Any

from trl_ray.config.trl_options.foreign_option import Reading
from trl_ray.config.trl_options.table_rows import Rows, always, by_value, never, only, read_by, renamed

_SERVER = (
    "Remove it: engines are actors of the run (rollout.num_workers, rollout.num_gpus), on any machine of the cluster "
    "that runtime.address names."
)
_TEACHER_SERVER = (
    "List the teacher under teachers with its server: teachers: [{server: {url: http://HOST:PORT, protocol: trl}}]."
)
_CONTINUOUS = "Both engines batch continuously, rollout.max_num_seqs completions at once."
_UNPADDED = "Nothing is padded."
_NO_SYNC = "The reference of the pipeline kto does not move. Remove it."


def _engine(value: Any, given: Any) -> Reading | None:
    """vLLM is what `auto` takes where it is installed; who asks for no vLLM gets transformers."""
    rollout = given.get("rollout")
    chosen = rollout.get("engine") if isinstance(rollout, dict) else getattr(rollout, "engine", None)
    if value is True:
        return None if str(chosen) == "transformers" else {}
    if value is False:
        return {} if chosen is not None else {"rollout.engine": "transformers"}
    return None


def _teacher_options(value: Any, given: Any) -> Reading | None:
    """What has an option of its own; the rest is one of a listed teacher's."""
    names = {"dtype": "teacher_dtype", "torch_dtype": "teacher_dtype", "revision": "teacher_model_revision"}
    if value is None:
        return {}
    if not isinstance(value, dict) or not set(value) <= set(names):
        return None
    return {names[key]: item for key, item in value.items()}


ENGINES: Rows = {
    "use_vllm": read_by(
        _engine,
        says="Set rollout.engine to vllm, transformers or auto (vLLM where it is installed).",
        needs=("rollout",),
    ),
    "vllm_mode": only(
        "colocate",
        "server",
        says="Engines are actors of the run, beside the learner or on GPUs of their own.",
        needs=("rollout",),
    ),
    "vllm_device": only("auto", None, says=_SERVER, needs=("rollout",)),
    "vllm_dtype": by_value(
        {name: {"rollout.dtype": name} for name in ("float32", "bfloat16")},
        nothing=("auto", None),
        says="Set rollout.dtype.",
        needs=("rollout",),
    ),
    "vllm_server_base_url": only(None, "http://localhost:8000", says=_SERVER, needs=("rollout",)),
    "vllm_server_host": only(None, "0.0.0.0", "localhost", "127.0.0.1", says=_SERVER, needs=("rollout",)),
    "vllm_server_port": always("Engines of the run need no port.", "rollout"),
    "vllm_group_port": always("Engines of the run need no port.", "rollout"),
    "vllm_server_timeout": renamed("runtime.start_deadline_s"),
    "vllm_model_impl": by_value(
        {"transformers": {"rollout.engine_kwargs.model_impl": "transformers"}},
        nothing=("vllm", "auto", None),
        says="Set rollout.engine_kwargs={model_impl: ...}, or leave it to vLLM.",
        needs=("rollout",),
    ),
    "vllm_enable_sleep_mode": always(
        "Engines generate while the learner trains and keep their memory: rollout.gpu_memory_utilization bounds it.",
        "rollout",
    ),
    "vllm_enable_prefix_caching": always("Prompts of a group are computed once.", "rollout"),
    "vllm_tensor_parallel_size": renamed("rollout.tensor_parallel_size"),
    "vllm_gpu_memory_utilization": renamed("rollout.gpu_memory_utilization"),
    "vllm_max_model_length": renamed("rollout.max_model_len"),
    "vllm_max_model_len": renamed("rollout.max_model_len"),
    "vllm_guided_decoding_regex": renamed("vllm_structured_outputs_regex"),
    "guided_decoding_regex": renamed("vllm_structured_outputs_regex"),
    "vllm_sync_frequency": only(
        1,
        says="Set max_staleness: weights are pulled after every step, and generation runs ahead by so many.",
        needs=("max_staleness",),
    ),
    "vllm_importance_sampling_cap": renamed("vllm_importance_sampling_clip_max"),
    "cache_implementation": always("Engines manage their caches (rollout.kv_cache_memory_gib).", "rollout"),
    "use_transformers_continuous_batching": always(_CONTINUOUS, "rollout"),
    "transformers_continuous_batching_config": always(_CONTINUOUS, "rollout"),
    "use_transformers_paged": always(_CONTINUOUS, "rollout"),
    "ds3_gather_for_generation": always(
        "Weights are gathered when they are published, whatever the ZeRO stage.", "rollout"
    ),
    "max_tool_calling_iterations": always("Completions are a single turn, so that no tool is called.", "rollout"),
    "fork_threshold_tokens": always("Completions are a single turn, so that nothing forks.", "rollout"),
    "max_inflight_tasks": only(
        -1, says="Set rollout.max_num_seqs, and max_staleness for how far generation runs ahead.", needs=("rollout",)
    ),
    "queue_maxsize": always("The queue holds what max_staleness allows, never more.", "rollout"),
    "weight_sync_steps": only(
        1,
        says="Set max_staleness: weights are pulled after every step, and generation runs ahead by so many.",
        needs=("rollout",),
    ),
    "weight_sync_timeout": renamed("runtime.pull_deadline_s"),
    "heartbeat_stale_after_s": renamed("runtime.health_deadline_s"),
    "request_timeout": renamed("rollout.lease_s"),
    "token_budget": renamed("max_tokens_per_micro_batch"),
}

TEACHERS: Rows = {
    "teacher_model_init_kwargs": read_by(
        _teacher_options,
        says="List the teacher under teachers: [{model_name_or_path: NAME, dtype: bfloat16, attn_implementation: ..., "
        "trust_remote_code: ...}].",
        needs=("teachers",),
    ),
    "use_teacher_server": only(False, says=_TEACHER_SERVER, needs=("teachers",)),
    "teacher_model_server_url": only(None, says=_TEACHER_SERVER, needs=("teachers",)),
    "teacher_model_name_or_path": only(
        None,
        says="Set teacher_model_kind: the policy is its own teacher. Another model teaches in the pipeline distill.",
        needs=("teacher_model_kind",),
    ),
    "reverse_kl_top_1_mode": never(
        "Set loss_support=realised for sampled, or loss_support=student with loss_top_k=1 for argmax.", "loss_support"
    ),
    "feedback_column": only(
        None,
        "privileged_context",
        says="Call the dataset's column privileged_context.",
        needs=("include_environment_feedback",),
    ),
}

TRAINERS: Rows = {
    "max_seq_length": renamed("max_length"),
    "max_length": only(
        None, says="Set rollout.max_model_len: tokens of prompt and completion together.", needs=("rollout",)
    ),
    "max_prompt_length": only(
        None,
        says="max_length cuts a text or a conversation as a whole.",
        needs=("max_length",),
    ),
    "max_completion_length": (
        *(
            entry
            for option in ("f_divergence_type", "desirable_weight", "packing", "center_rewards_coefficient")
            for entry in only(
                None, says="As in TRL 1.16, max_length cuts prompt and answer together.", needs=(option, "max_length")
            )
        ),
        # CPO and ORPO.
        *always(
            "In TRL it cuts what encoder-decoder models write; max_length cuts prompt and answer together.",
            "max_length",
        ),
    ),
    "max_target_length": only(
        None, says="As in TRL 1.16, max_length cuts prompt and answer together.", needs=("max_length",)
    ),
    "padding_free": always(_UNPADDED + " Pieces of a row do not see each other."),
    "padding_value": always(_UNPADDED),
    "label_pad_token_id": always(_UNPADDED),
    "eval_packing": only(None, False, says="Remove it: only the pipeline sft packs examples."),
    "activation_offloading": always(
        "Activations stay where they are, with the same numbers; gradient_checkpointing and max_tokens_per_micro_batch "
        "save memory."
    ),
    "use_liger_loss": renamed("use_liger_kernel"),
    "use_liger": renamed("use_liger_kernel"),
    "chat_template_path": renamed("chat_template"),
    "precompute_ref_batch_size": always("The reference's answers are taken in micro-batches like the policy's."),
    "generate_during_eval": only(False, says="Remove it: evaluations measure held-out rows, and generate nothing."),
    "is_encoder_decoder": only(None, False, says="Remove it: models are decoders."),
    "sync_ref_model": only(False, says=_NO_SYNC, needs=("desirable_weight",)),
    "ref_model_mixup_alpha": always("The reference of the pipeline kto does not move.", "desirable_weight"),
    "ref_model_sync_steps": always("The reference of the pipeline kto does not move.", "desirable_weight"),
    "reference_free": only(False, says="Use the pipeline cpo or orpo, which have no reference."),
    "force_use_ref_model": only(False, says="Remove it: with use_peft the reference is the model beneath the adapter."),
    "model_adapter_name": only(None, "default", says="Remove it: there is one adapter."),
    "ref_adapter_name": only(None, says="Remove it: the reference of an adapter is the model it began with."),
    "ref_model_init_kwargs": only(None, {}, says="Remove it: the reference is the policy's first state."),
    "truncation_side": by_value(
        {"left": {"truncation_mode": "keep_end"}, "right": {"truncation_mode": "keep_start"}},
        says="Set truncation_mode: keep_start or keep_end.",
        needs=("truncation_mode",),
    ),
    "use_num_logits_to_keep": always("The head never computes logits of the whole row."),
    "use_logits_to_keep": always("The head never computes logits of the whole row."),
    "num_of_sequences": always("It belonged to packing as a stream, and packing takes whole rows."),
    "chars_per_token": always("It belonged to packing as a stream, and packing counts tokens."),
    "dataset_batch_size": always("Rows are tokenised one by one."),
    "log_completions_steps": always("The completions of every step stand in the run directory."),
    "log_completions_hub_repo": only(None, says="Upload the run's folder completions with: hf upload NAME FOLDER"),
    "log_unique_prompts": always("num_completions_to_print says how many are shown; all are in the run directory."),
    "log_multimodal": always("Completions are text."),
    "cast_lm_head_to_fp32": only(
        False, says="Remove it: the head computes in the model's format; dtype=float32 makes log-probs exact."
    ),
    "wandb_log_unique_prompts": always(
        "num_completions_to_print says how many are shown; all are in the run directory."
    ),
    # ModelConfig, ScriptArguments.
    "lora_task_type": (
        *only("TOKEN_CLS", "CAUSAL_LM", says="It follows from the pipeline. Remove it.", needs=("step_separator",)),
        *only(
            "SEQ_CLS",
            "CAUSAL_LM",
            says="It follows from the pipeline. Remove it.",
            needs=("center_rewards_coefficient",),
        ),
        *only("CAUSAL_LM", None, says="It follows from the pipeline. Remove it."),
    ),
    "lora_target_parameters": renamed("lora_kwargs.target_parameters"),
    "bnb_4bit_quant_storage": only(
        None, "uint8", says="Remove it: 4-bit weights are stored as bitsandbytes does unless told otherwise."
    ),
    "ignore_bias_buffers": always("Ranks sum gradients; buffers are not broadcast."),
    "streaming": by_value({True: {"dataset_streaming": True}}, nothing=(False,), says="Set dataset_streaming."),
    "gradient_checkpointing_use_reentrant": always("Recomputation gives the same numbers either way."),
    "num_processes": renamed("runtime.num_learners"),
    "accelerate_config": never(
        "Set runtime.num_learners, and deepspeed to split weights: a run starts its own processes."
    ),
    "dataset_num_workers": renamed("dataset_num_proc"),
}
