"""Options of frameworks beyond TRL: read where ours is the same, answered where it is not, all in one message."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.base import Section
from trl_ray.config.runs.dataset_config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SFTConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.errors import ConfigError


def refusal(config: type[Section], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "written", "meant"),
    [
        (SFTConfig, {"pretrain": "m", "max_len": 64, "max_epochs": 2, "l2": 0.1, "save_path": "o"},
         {"model_name_or_path": "m", "max_length": 64, "num_train_epochs": 2, "weight_decay": 0.1, "output_dir": "o"}),
        (SFTConfig, {"multiturn": True, "packing_samples": True}, {"assistant_only_loss": True, "packing": True}),
        (SFTConfig, {"lora_target_linear": True, "lora_target_modules": None, "adapter": "lora"},
         {"lora_target_modules": "all-linear", "use_peft": True}),
        (SFTConfig, {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (SFTConfig, {"buffer_size": 16, "interleave_probs": "0.5,0.5", "mix_strategy": "concat"}, {}),
        (SFTConfig, {"wandb_project": None, "gptq": False, "tokenizer_use_fast": True}, {}),
        # What these train unless they are told otherwise: what the assistant says.
        (SFTConfig, {"stage": "sft"}, {"assistant_only_loss": True}),
        (SFTConfig, {"stage": "sft", "train_on_prompt": True}, {"completion_only_loss": False}),
        (SFTConfig, {"stage": "pt"}, {}),
        (SFTConfig, {"train_on_inputs": False, "datasets": [{"path": "a", "type": "chat_template"}]},
         {"assistant_only_loss": True, "datasets": [{"path": "a"}]}),
        (SFTConfig, {"train_on_inputs": False, "datasets": [{"path": "a", "type": "alpaca"}]},
         {"datasets": [{"path": "a"}]}),
        (SFTConfig, {"train_on_inputs": True}, {"completion_only_loss": False}),
        (DPOConfig, {"rl": "dpo"}, {}),
        (DPOConfig, {"rl": "ipo"}, {"loss_type": "ipo"}),
        (DPOConfig, {"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        (KTOConfig, {"rl": "kto"}, {}),
        (ORPOConfig, {"rl": "orpo", "rl_beta": 0.2}, {"beta": 0.2}),
        (SFTConfig, {"dataset_processes": 4, "dataset_prepared_path": "prepared"}, {"dataset_num_proc": 4}),
        (GRPOConfig, {"dataset_processes": 4, "dataset_num_proc": 4, "dataset_num_workers": 4}, {}),
        (CPOConfig, {"rl": "simpo"}, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        (GRPOConfig, {"rl": "grpo", "trl": {"num_generations": 4, "beta": 0.1, "use_vllm": True}},
         {"num_generations": 4, "beta": 0.1}),
        (GRPOConfig, {"vllm": {"host": "h", "port": 1, "tensor_parallel_size": 2, "dtype": "auto"}},
         {"rollout": {"tensor_parallel_size": 2}}),
        (GRPOConfig, {"n_samples_per_prompt": 4, "generate_max_len": 32, "prompt_max_len": 16, "init_kl_coef": 0.1},
         {"num_generations": 4, "max_completion_length": 32, "max_prompt_length": 16, "beta": 0.1}),
    ],
)  # fmt: skip
def test_what_has_another_name_there_is_read(
    config: type[Section], written: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert config(**written) == config(**meant)


def test_each_option_of_another_framework_is_answered_in_one_message() -> None:
    verl = {name: {} for name in ("data", "actor_rollout_ref", "algorithm", "trainer")}
    code = {"code_provider": "e2b", "cosine_max_len": 1000, "input_key": "question", "zero_stage": 2}
    lines = refusal(GRPOConfig, **verl, **code).split("\n")
    assert [line.split("'")[1] for line in lines] == [*verl, *code]
    assert all(" is not an option here. " in line or " cannot be " in line for line in lines)
    assert not any("--help" in line or "Did you mean" in line for line in lines)


def test_entries_of_datasets_are_answered_by_their_names() -> None:
    entry = {"path": "a", "type": "pygmalion", "field_messages": "turns", "roles_to_train": ["assistant"]}
    lines = refusal(SFTConfig, datasets=[{"path": "b"}, entry]).split("\n")
    assert [line.split("'")[1] for line in lines] == [f"datasets.1.{name}" for name in list(entry)[1:]]
    assert "told by their columns" in lines[0] and "column_mapping" in lines[1] and "assistant_only_loss" in lines[2]


def test_what_stands_twice_and_what_belongs_to_another_pipeline_is_refused() -> None:
    assert "some of it stands there as well" in refusal(GRPOConfig, beta=0.2, trl={"beta": 0.1})
    assert "'loss_typ' is not an option here. Did you mean 'loss_type'?" in refusal(
        GRPOConfig, trl={"loss_typ": "grpo"}
    )
    assert "'rl' cannot be 'kto' here. Choose the pipeline" in refusal(DPOConfig, rl="kto")
    assert "Set loss_type=[sigmoid, sft]" in refusal(DPOConfig, rpo_alpha=0.5, loss_type="hinge")
