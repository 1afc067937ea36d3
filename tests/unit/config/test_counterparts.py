"""What an option of TRL's that has another name here is answered with."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from trl_ray.config.base import Section
from trl_ray.config.counterparts import COUNTERPARTS, counterpart
from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import DPOConfig, SFTConfig
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.errors import ConfigError

ROLLOUTS: list[type[Section]] = [GRPOConfig, AsyncGRPOConfig, RLOOConfig, SDPOConfig, DistillConfig]


def refusal(config: type[Section], **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(config, values)
    from_mapping = str(caught.value)
    with pytest.raises(ConfigError) as caught:
        config(**values)
    assert str(caught.value) == from_mapping
    return from_mapping


@pytest.mark.parametrize("config", ROLLOUTS)
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("use_vllm", "rollout.engine"),
        ("vllm_gpu_memory_utilization", "rollout.gpu_memory_utilization"),
        ("vllm_tensor_parallel_size", "rollout.tensor_parallel_size"),
        ("vllm_max_model_length", "rollout.max_model_len"),
        ("cache_implementation", "rollout.kv_cache_memory_gib"),
        ("remove_unused_columns", "no column is dropped"),
        ("per_device_eval_batch_size", "eval_num_prompts"),
        ("fp16", "bf16"),
    ],
)
def test_the_option_that_stands_for_it_is_named(config: type[Section], name: str, instead: str) -> None:
    message = refusal(config, **{name: None})
    assert message.startswith(f"{name!r} is not an option here. ") and instead in message


def test_several_of_them_are_answered_line_by_line() -> None:
    lines = refusal(SDPOConfig, use_vllm=True, vllm_mode="server", learning_rat=1e-5).split("\n")
    assert [line.partition(" ")[0] for line in lines] == ["'use_vllm'", "'vllm_mode'", "'learning_rat'"]
    assert lines[2].endswith("Did you mean 'learning_rate'?")


def test_options_of_ours_are_none_of_these() -> None:
    for config in ROLLOUTS:
        named = {name for name in COUNTERPARTS if name in config.model_fields}
        # Of the two pipelines with teachers, each has options that the other lacks.
        assert named <= {"use_teacher_server", "teacher_model_name_or_path", "max_length"}


def test_what_stands_for_it_is_not_named_where_a_pipeline_has_no_such_thing() -> None:
    for config in (SFTConfig, DPOConfig):
        assert counterpart("use_vllm", config.model_fields) is None
        assert "rollout" not in refusal(config, use_vllm=True)
    assert counterpart("feedback_column", GRPOConfig.model_fields) is None
    assert counterpart("feedback_column", SDPOConfig.model_fields) is not None


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
