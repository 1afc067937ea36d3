"""Options of OpenRLHF, verl, prime-rl, and of open-r1's scripts: read where ours is the same, else answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_ray.config.trl_options.foreign_option import Reading
from trl_ray.config.trl_options.table_rows import Rows, always, by_value, never, only, read_by, renamed

_REWARD = (
    "It belongs to a reward function: write one with what it needs, and name it in reward_funcs as "
    "package.module:function."
)
_LENGTHS = "Set reward_funcs: ['soft_overlong(max_completion_len=..., soft_punish_cache=...)']."
_COLUMN = "Set column_mapping={THEIRS: prompt}, and so on."
_PLACED = "Set runtime.num_learners and rollout.num_workers with runtime.learner_num_gpus and rollout.num_gpus."
_OWN = "Remove it: it belongs to another framework. "


def _zero(value: Any, given: Mapping[str, Any]) -> Reading | None:
    return {} if value in (None, 0) or given.get("deepspeed") is not None else None


OPEN_R1: Rows = {
    **dict.fromkeys(
        (
            "code_language",
            "code_provider",
            "code_eval_test_batch_size",
            "code_eval_scoring_mode",
            "parallel_code_exec_per_proc",
            "enforce_same_language",
            "e2b_router_url",
            "morph_router_url",
            "piston_endpoint",
            "ioi_provider",
            "cosine_min_value_wrong",
            "cosine_max_value_wrong",
            "cosine_min_value_correct",
            "cosine_max_value_correct",
            "cosine_max_len",
            "repetition_n_grams",
            "repetition_max_penalty",
        ),
        never(_REWARD),
    ),
    "max_completion_len": never(_LENGTHS),
    "soft_punish_cache": never(_LENGTHS),
    "tee_stdout": always("The console's lines stand in events.jsonl and metrics.jsonl."),
    "num_completions_to_log": always("All completions are in the run directory."),
}

OPENRLHF: Rows = {
    "pretrain": renamed("model_name_or_path"),
    "reward_pretrain": renamed("reward_model_name_or_path"),
    "prompt_data": renamed("dataset_name"),
    "prompt_split": renamed("dataset_train_split"),
    "eval_split": renamed("dataset_test_split"),
    "save_path": renamed("output_dir"),
    "ckpt_path": always("Checkpoints stand in the folder checkpoints of output_dir."),
    "max_len": renamed("max_length"),
    "max_epochs": renamed("num_train_epochs"),
    "num_episodes": renamed("num_train_epochs"),
    "micro_train_batch_size": renamed("per_device_train_batch_size"),
    "train_batch_size": never("Set gradient_accumulation_steps: a step takes that many batches of every rank."),
    "rollout_batch_size": never("Set generation_batch_size, or steps_per_generation: completions of one generation."),
    "micro_rollout_batch_size": always("Engines batch continuously."),
    "n_samples_per_prompt": renamed("num_generations"),
    "generate_max_len": renamed("max_completion_length"),
    "prompt_max_len": renamed("max_prompt_length"),
    "actor_learning_rate": renamed("learning_rate"),
    "critic_learning_rate": never("Remove it: there is no critic."),
    "init_kl_coef": renamed("beta"),
    "eps_clip": renamed("epsilon"),
    "advantage_estimator": never("Choose the pipeline: trl-ray grpo or rloo, or set advantage_baseline."),
    "remote_rm_url": never("Set reward_funcs to a function that asks it; it may be async."),
    "l2": renamed("weight_decay"),
    "lr_warmup_ratio": renamed("warmup_ratio"),
    "packing_samples": renamed("packing"),
    "use_wandb": never("Set report_to=wandb, and the key in the environment variable WANDB_API_KEY."),
    "zero_stage": read_by(_zero, says="Set deepspeed to a JSON file with zero_optimization.stage."),
    "multiturn": by_value(
        {True: {"assistant_only_loss": True}}, nothing=(False, None), says="Set assistant_only_loss=true."
    ),
    "apply_chat_template": always("Conversations are rendered by the chat template, texts are taken as they are."),
    **dict.fromkeys(
        ("input_key", "output_key", "label_key", "prompt_key", "chosen_key", "rejected_key"), never(_COLUMN)
    ),
    "input_template": only(None, "", says="Write the prompt as messages, or as the text that it is to be."),
    **dict.fromkeys(
        (
            "actor_num_nodes",
            "actor_num_gpus_per_node",
            "ref_num_nodes",
            "ref_num_gpus_per_node",
            "reward_num_nodes",
            "reward_num_gpus_per_node",
            "vllm_num_engines",
            "colocate_all_models",
        ),
        never(_PLACED),
    ),
}

VERL: Rows = {
    "data": never(
        _OWN + "Set dataset_name (train_files), max_prompt_length, max_completion_length (max_response_length), and "
        "per_device_train_batch_size with gradient_accumulation_steps."
    ),
    "actor_rollout_ref": never(
        _OWN + "Set model_name_or_path (model.path), learning_rate (actor.optim.lr), beta (actor.kl_loss_coef), "
        "num_generations (rollout.n), temperature, and rollout.tensor_parallel_size."
    ),
    "algorithm": never(_OWN + "Choose the pipeline: trl-ray grpo or rloo, or set advantage_baseline."),
    "critic": never(_OWN + "There is no critic."),
    "custom_reward_function": never(_OWN + "Set reward_funcs: [path/to/file.py:function]."),
    "trainer": never(
        _OWN
        + "Set num_train_epochs (total_epochs), save_steps (save_freq), eval_steps (test_freq), report_to (logger), "
        "run_name (experiment_name), and runtime for GPUs and nodes."
    ),
    "defaults": never(_OWN + "A configuration is one file."),
    "hydra": never(_OWN + "A configuration is one file."),
}

PRIME_RL: Rows = {
    "model": never(_OWN + "Set model_name_or_path."),
    "seq_len": renamed("rollout.max_model_len"),
    "orchestrator": never(
        _OWN + "Set num_generations (rollouts_per_example), max_staleness (max_async_level), and the batch by "
        "per_device_train_batch_size with gradient_accumulation_steps."
    ),
    "inference": never(_OWN + "Set rollout: engines are actors of the run."),
    "ckpt": never(_OWN + "Set save_steps and save_total_limit."),
    "wandb": never(_OWN + "Set report_to=wandb, wandb_project and run_name."),
    "max_async_level": renamed("max_staleness"),
    "rollouts_per_example": renamed("num_generations"),
    "weight_broadcast": always("Weights are published after every step and pulled by every worker."),
}
