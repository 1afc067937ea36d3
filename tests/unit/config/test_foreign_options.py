"""Options of TRL and its neighbours that are none here: read into ours, accepted, or refused with a remedy."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from trl_ray.config.base import Section
from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.messages import nearest
from trl_ray.config.runs.dataset_config import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
)
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.config.sections import RolloutConfig
from trl_ray.config.trl_options.reading import entry_of, names
from trl_ray.errors import ConfigError

ROLLOUTS: list[type[Section]] = [GRPOConfig, AsyncGRPOConfig, RLOOConfig, SDPOConfig, DistillConfig]
RUNS: list[type[Section]] = [
    *ROLLOUTS,
    SFTConfig,
    DPOConfig,
    KTOConfig,
    CPOConfig,
    ORPOConfig,
    RewardModelConfig,
    PRMConfig,
]
# Written by users of TRL and transformers, and what it is here.
READ: list[tuple[type[Section], dict[str, Any], dict[str, Any]]] = [
    (GRPOConfig, {"use_vllm": True, "vllm_mode": "colocate"}, {}),
    (GRPOConfig, {"use_vllm": False}, {"rollout": {"engine": "transformers"}}),
    (GRPOConfig, {"vllm_gpu_memory_utilization": 0.3}, {"rollout": {"gpu_memory_utilization": 0.3}}),
    (RLOOConfig, {"vllm_tensor_parallel_size": 2}, {"rollout": {"tensor_parallel_size": 2}}),
    (SDPOConfig, {"vllm_max_model_length": 512}, {"rollout": {"max_model_len": 512}}),
    (GRPOConfig, {"vllm_model_impl": "transformers"}, {"rollout": {"engine_kwargs": {"model_impl": "transformers"}}}),
    (GRPOConfig, {"vllm_server_timeout": 120}, {"runtime": {"start_deadline_s": 120.0}}),
    (GRPOConfig, {"vllm_importance_sampling_cap": 2.0}, {"vllm_importance_sampling_clip_max": 2.0}),
    (AsyncGRPOConfig, {"token_budget": 4096, "queue_maxsize": 64}, {"max_tokens_per_micro_batch": 4096}),
    (SFTConfig, {"ddp_timeout": 1800}, {"runtime": {"collective_timeout_s": 1800.0}}),
    (SFTConfig, {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    (SFTConfig, {"torch_dtype": "auto"}, {"dtype": "auto"}),
    (SFTConfig, {"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    (SFTConfig, {"warmup_ratio": 0.1, "warmup_steps": 20}, {"warmup_steps": 20}),
    (SFTConfig, {"max_seq_length": 512}, {"max_length": 512}),
    (SFTConfig, {"train_sampling_strategy": "sequential"}, {"shuffle_dataset": False}),
    (GRPOConfig, {"train_sampling_strategy": "sequential"}, {}),
    (SFTConfig, {"fp16": False, "push_to_hub": False, "dataloader_num_workers": 4}, {}),
    (SFTConfig, {"optim": "adamw_torch_fused", "padding_free": True, "remove_unused_columns": False}, {}),
    (SFTConfig, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, {}),
    (SFTConfig, {"lora_task_type": "CAUSAL_LM"}, {}),
    (RewardModelConfig, {"lora_task_type": "SEQ_CLS"}, {}),
    (SFTConfig, {"lora_target_parameters": None}, {}),
    (SFTConfig, {"lora_target_parameters": ["experts.w"], "use_peft": True},
     {"lora_kwargs": {"target_parameters": ["experts.w"]}, "use_peft": True}),
    (DistillConfig, {"teacher_model_name_or_path": "far", "teacher_model_init_kwargs": {"torch_dtype": "bfloat16"}},
     {"teacher_model_name_or_path": "far", "teacher_dtype": "bfloat16"}),
    (SFTConfig, {"bf16_full_eval": True, "num_processes": 2}, {"runtime": {"num_learners": 2}}),
    (SFTConfig, {"accelerator_config": {"split_batches": False, "dispatch_batches": None, "even_batches": True}}, {}),
    (CPOConfig, {"max_completion_length": 128}, {}),
    # What saves memory or time, with the same numbers.
    (SFTConfig, {"torch_compile": True, "torch_compile_mode": "reduce-overhead", "auto_find_batch_size": True,
                 "activation_offloading": True, "save_on_each_node": True}, {}),
    (GRPOConfig, {"max_tool_calling_iterations": 5, "reward_model": "judge"}, {"reward_model_name_or_path": "judge"}),
    (SFTConfig, {"average_tokens_across_devices": False}, {}),
    (RewardModelConfig, {"logging_dir": "./logs", "save_safetensors": False}, {}),
    (SFTConfig, {"adafactor": True}, {"optim": "adafactor"}),
    (DPOConfig, {"ref_model": "org/first", "resize_vocab": True}, {"ref_model_name_or_path": "org/first"}),
    # The Hub, by past names.
    (SFTConfig, {"push_to_hub": True, "push_to_hub_model_id": "tuned", "push_to_hub_organization": "org"},
     {"push_to_hub": True, "hub_model_id": "org/tuned"}),
    (SFTConfig, {"output_dir": "runs/small", "push_to_hub_organization": "org"},
     {"output_dir": "runs/small", "hub_model_id": "org/small"}),
    (DPOConfig, {"push_to_hub_model_id": "me/tuned"}, {"hub_model_id": "me/tuned"}),
    (GRPOConfig, {"hub_model_revision": "v2", "push_to_hub_revision": True},
     {"hub_revision": "v2", "push_to_hub": True}),
    (GRPOConfig, {"push_to_hub_revision": False, "push_to_hub_organization": None}, {}),
    (GRPOConfig, {"trackio_static_space_id": False}, {}),
    (SFTConfig, {"push_to_hub_revision": "v1"}, {"hub_revision": "v1"}),
    (SFTConfig, {"push_to_hub_revision": True}, {"push_to_hub": True}),
    # LLaMA-Factory
    (SFTConfig, {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
     {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear", "assistant_only_loss": True}),
    (SFTConfig, {"lora_target": "q_proj,v_proj", "use_peft": True},
     {"lora_target_modules": ["q_proj", "v_proj"], "use_peft": True}),
    (SFTConfig, {"cutoff_len": 2048, "overwrite_cache": True, "preprocessing_num_workers": 16, "plot_loss": True},
     {"max_length": 2048, "dataset_num_proc": 16}),
    (DPOConfig, {"stage": "dpo", "pref_beta": 0.2, "pref_loss": "hinge"}, {"beta": 0.2, "loss_type": "hinge"}),
    (SFTConfig, {"flash_attn": "sdpa"}, {"attn_implementation": "sdpa"}),
    # axolotl
    (SFTConfig, {"base_model": "m", "sequence_len": 512, "micro_batch_size": 2, "num_epochs": 4},
     {"model_name_or_path": "m", "max_length": 512, "per_device_train_batch_size": 2, "num_train_epochs": 4}),
    (SFTConfig, {"adapter": "lora", "lora_target_linear": True, "sample_packing": True, "bf16": "auto", "tf32": False},
     {"use_peft": True, "lora_target_modules": "all-linear", "packing": True, "tf32": False}),
    (SFTConfig, {"num_epochs": 2, "evals_per_epoch": 2, "saves_per_epoch": 4},
     {"num_train_epochs": 2, "eval_steps": 0.25, "save_steps": 0.125}),
    (SFTConfig, {"datasets": [{"path": "a.jsonl", "type": "chat_template", "ds_type": "json", "train_on_split": "test",
                               "field_messages": "conversations", "roles": {"user": ["human"], "assistant": ["gpt"]},
                               "message_property_mappings": {"role": "from", "content": "value"}}]},
     {"datasets": [{"path": "a.jsonl", "split": "test"}]}),
    # alignment-handbook
    (SFTConfig, {"dataset_mixer": {"org/chats": 1.0}, "dataset_splits": ["train_sft", "test_sft"]},
     {"dataset_name": "org/chats", "dataset_train_split": "train_sft", "dataset_test_split": "test_sft"}),
    (SFTConfig, {"dataset_mixer": {"a": 0.5, "b": 1.0, "c": 0.0}, "dataset_configs": [None, "main", "x"]},
     {"datasets": [{"path": "a", "share": 0.5}, {"path": "b", "name": "main"}]}),
    (DPOConfig, {"dataset_mixer": {"a": 1}, "dataset_configs": ["main"]},
     {"dataset_name": "a", "dataset_config": "main"}),
    (SFTConfig, {"dataset_splits": ["test_sft", "train_sft"]},
     {"dataset_train_split": "train_sft", "dataset_test_split": "test_sft"}),
    # open-r1
    (SFTConfig, {"dataset_mixture": {"seed": 7, "test_split_size": 0.1, "datasets": [
        {"id": "a", "config": "main", "split": "train", "columns": ["messages"], "weight": 0.5},
        {"id": "b", "weight": 1.0}]}},
     {"test_split_size": 0.1, "datasets": [
         {"path": "a", "name": "main", "split": "train", "columns": ["messages"], "share": 0.5, "share_seed": 7},
         {"path": "b"}]}),
    # TRL's own mixture
    (SFTConfig, {"datasets": [{"path": "a", "data_dir": "d", "split": "train"}], "streaming": False}, {
        "datasets": [{"path": "a", "data_dir": "d", "split": "train"}]}),
    (SFTConfig, {"dataset_name": "a", "streaming": True, "max_steps": 1}, {
        "dataset_name": "a", "dataset_streaming": True, "max_steps": 1}),
    (GRPOConfig, {"dataset_name": "a", "streaming": True, "max_steps": 1}, {
        "dataset_name": "a", "dataset_streaming": True, "max_steps": 1}),
    # Held-out rows, a share or a number.
    (SFTConfig, {"val_set_size": 0.05}, {"test_split_size": 0.05}),
    (DPOConfig, {"val_size": 100}, {"test_split_size": 100}),
    (SFTConfig, {"val_set_size": 0.0}, {}),
    (SFTConfig, {"special_tokens": {"pad_token": "<pad>", "eos_token": "<end>"}},
     {"pad_token": "<pad>", "eos_token": "<end>"}),
    (CPOConfig, {"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),
]  # fmt: skip
REFUSED: list[tuple[type[Section], dict[str, Any], str]] = [
    (GRPOConfig, {"vllm_server_host": "10.0.0.5"}, "engines are actors of the run"),
    (GRPOConfig, {"fp16": True}, "bf16=true"),
    (SFTConfig, {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}}, "Remove what else it holds"),
    (KTOConfig, {"sync_ref_model": True}, "does not move"),
    (SFTConfig, {"template": "llama3"}, "chat template"),
    (SFTConfig, {"stage": "dpo"}, "Choose the pipeline"),
    (SFTConfig, {"dataset_mixer": {"a": 1.5}}, "share: 0.1"),
    (SFTConfig, {"dataset_mixer": {"a": True}}, "share: 0.1"),
    (SFTConfig, {"dataset_configs": ["main"]}, "Set dataset_config"),
    (SFTConfig, {"dataset_splits": ["train_a", "train_b"]}, "one split to train on"),
    (SFTConfig, {"dataset_mixture": {"datasets": [{"id": "a", "weight": 2.0}]}}, "from 0 to 1"),
    (SFTConfig, {"val_set_size": "5%"}, "test_split_size"),
    (SFTConfig, {"special_tokens": {"bos_token": "<s>"}}, "Set eos_token"),
    (SFTConfig, {"rl": "dpo"}, "trl-ray dpo"),
    (ORPOConfig, {"rl": "dpo"}, "trl-ray dpo"),
    (CPOConfig, {"rl": "orpo"}, "orpo"),
    (SFTConfig, {"trackio_static_space_id": "me/page"}, "trackio_space_id"),
    (DPOConfig, {"max_completion_length": 128}, "max_length cuts prompt and answer together"),
    (KTOConfig, {"max_completion_length": 128}, "max_length cuts prompt and answer together"),
    (SFTConfig, {"max_prompt_length": 128}, "max_length cuts a text or a conversation"),
    (SFTConfig, {"accelerator_config": {"split_batches": True}}, "not split over ranks"),
]


def called(part: Any) -> str:
    """For the names of tests."""
    return "+".join(part) if isinstance(part, dict) else getattr(part, "__name__", "")


def refusal(config: type[Section], **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(config, values)
    from_mapping = str(caught.value)
    with pytest.raises(ConfigError) as caught:
        config(**values)
    assert str(caught.value) == from_mapping
    return from_mapping


@pytest.mark.parametrize(("config", "written", "ours"), READ, ids=called)
def test_what_is_written_in_other_words_is_the_same_configuration(
    config: type[Section], written: dict[str, Any], ours: dict[str, Any]
) -> None:
    read = build(config, written)
    assert read == build(config, ours) == config(**written)
    # config.yaml holds our names only.
    assert build(config, parse_yaml(dump_yaml(read), source="config.yaml")) == read


@pytest.mark.parametrize(("config", "values", "instead"), REFUSED, ids=called)
def test_what_cannot_be_done_says_what_to_do_instead(
    config: type[Section], values: dict[str, Any], instead: str
) -> None:
    message, [name] = refusal(config, **values), values
    assert message.startswith(f"{name!r} ") and instead in message and "\n" not in message


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype"),
        ({"rollout": {"gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization": 0.3}, "rollout.gpu_memory"),
        ({"rollout": RolloutConfig(max_model_len=64), "vllm_max_model_length": 32}, "rollout.max_model_len"),
    ],
)
def test_two_options_that_contradict_each_other_are_refused(values: dict[str, Any], culprit: str) -> None:
    assert "Another option says it otherwise: " + culprit in refusal(GRPOConfig, **values)


def test_a_section_built_in_python_keeps_its_other_options() -> None:
    config = GRPOConfig(rollout=RolloutConfig(num_workers=2), vllm_max_model_length=99)
    assert (config.rollout.num_workers, config.rollout.max_model_len) == (2, 99)


def test_an_option_that_says_the_same_twice_is_no_contradiction() -> None:
    assert GRPOConfig(dtype="bfloat16", torch_dtype="bfloat16").dtype == "bfloat16"


def test_wrong_keys_and_wrong_values_are_told_in_one_message() -> None:
    lines = refusal(SDPOConfig, optim="lion", learning_rat=1e-5, seed=-1, vllm_server_host="far", temperature=0.0)
    told = {line.partition(" ")[0].strip("'") for line in lines.split("\n")}
    assert told == {"optim", "learning_rat", "seed", "vllm_server_host", "temperature"}
    assert "Did you mean 'learning_rate'?" in lines


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("num_generation", "num_generations"),
        ("max_stalenes", "max_staleness"),
        ("grad_acumulation_steps", "gradient_accumulation_steps"),
        ("gradient_acumulation_step", "gradient_accumulation_steps"),
        # Other words are no typing mistakes.
        ("max_prompt_length", None),
        ("dataset_num_proc", None),
        ("evaluation_strategy", None),
        ("lora_task_type", None),
        ("eval_batch_size", None),
        ("min_completion_length", None),
        ("teacher_temperature", None),
    ],
)
def test_only_a_mistyped_option_is_guessed(typed: str, meant: str | None) -> None:
    options = {*AsyncGRPOConfig.model_fields, "packing_strategy", "loss_type"} - {typed}
    assert nearest(typed, sorted(options)) == meant


def test_no_option_of_the_tables_is_answered_with_a_guess() -> None:
    for config in (SFTConfig, DPOConfig, GRPOConfig, DistillConfig):
        for name in names() - config.model_fields.keys():
            if entry_of(name, config.model_fields) is None:
                continue
            try:
                config(**{name: "nonsense"})
            except ConfigError as error:
                assert "Did you mean" not in str(error), name


def test_a_past_token_of_the_hub_is_the_token_and_is_written_to_no_file() -> None:
    config = SFTConfig(push_to_hub_token="secret")
    assert config.hub_token == "secret" and "secret" not in dump_yaml(config)


def test_an_organisation_beside_a_whole_name_is_a_contradiction() -> None:
    message = refusal(SFTConfig, push_to_hub_model_id="me/tuned", push_to_hub_organization="org")
    assert "hub_model_id: ORGANISATION/NAME" in message


def test_no_row_of_the_tables_stands_for_an_option_of_every_run() -> None:
    # Such a row is dead: a field wins over it.
    assert sorted(name for name in names() if all(name in config.model_fields for config in RUNS)) == []


def test_no_option_of_the_tables_speaks_of_options_that_no_run_has() -> None:
    options = {name for config in RUNS for name in config.model_fields}
    for name in names():
        for config in RUNS:
            entry = entry_of(name, config.model_fields)
            becomes = None if entry is None else entry.becomes
            assert becomes is None or becomes.partition(".")[0] in options, name


def test_what_an_entry_of_datasets_cannot_say_is_answered_with_its_place() -> None:
    lines = refusal(SFTConfig, datasets=[{"path": "a"}, {"path": "b", "type": "pygmalion", "shards": 4, "pth": "c"}])
    told = lines.split("\n")
    assert [line.split("'")[1] for line in told] == ["datasets.1.type", "datasets.1.shards", "datasets.1.pth"]
    assert "column_mapping" in told[0] and "Set share" in told[1] and "Did you mean 'path'?" in told[2]


def test_tokens_of_several_ranks_are_counted_together() -> None:
    message = refusal(SFTConfig, average_tokens_across_devices=False, runtime={"num_learners": 2})
    assert message.startswith("'average_tokens_across_devices' cannot be False here.")
    assert "reward_model_name_or_path in the pipeline grpo" in refusal(SFTConfig, reward_model="judge")


def test_what_stands_for_it_is_not_named_where_a_pipeline_has_no_such_thing() -> None:
    for config in (SFTConfig, DPOConfig):
        assert entry_of("use_vllm", config.model_fields) is None
        assert "rollout" not in refusal(config, use_vllm=True)
    assert entry_of("feedback_column", GRPOConfig.model_fields) is None
    assert entry_of("feedback_column", SDPOConfig.model_fields) is not None


def test_a_teacher_server_of_distillation_is_listed_among_the_teachers() -> None:
    message = refusal(DistillConfig, teacher_model_server_url="http://host:8000")
    assert "teachers: [{server: {url: http://HOST:PORT, protocol: trl}}]" in message
    DistillConfig(teachers=[{"server": {"url": "http://host:8000", "protocol": "trl"}}])
    # In self-distillation the rollout engines stand in for it.
    assert SDPOConfig(use_teacher_server=True, teacher_model_kind="live").teacher_on_engines


def test_every_field_has_the_bounds_of_the_class_that_python_takes_it_from() -> None:
    # Pydantic asks the direct bases in their order, whoever of them declares the field.
    for config in ROLLOUTS:
        for name, field in config.model_fields.items():
            owner = next(each for each in config.__mro__ if name in inspect.get_annotations(each))
            assert field.metadata == owner.model_fields[name].metadata, (config.__name__, name)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers"])
def test_a_pipeline_is_not_told_of_an_option_that_it_lacks(name: str) -> None:
    entry = entry_of(name, GRPOConfig.model_fields)
    assert entry is not None and entry.says == "Prompts are read and tokenised by the driver."


def test_whoever_wants_a_cache_made_anew_is_told_where_it_is() -> None:
    entry = entry_of("overwrite_cache", SFTConfig.model_fields)
    assert entry is not None and "HF_DATASETS_CACHE" in entry.says and "made anew" in entry.says
