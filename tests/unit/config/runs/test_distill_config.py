"""What the configuration of distillation refuses, and where it says that its teachers stand."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.losses.distillation_options import DistillationLossConfig
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.sections import GenerationConfig, ModelConfig
from trl_ray.config.teacher_options import TeacherKind, TeacherProtocol
from trl_ray.errors import ConfigError

ONE = {"teacher_model_name_or_path": "models/teacher"}
SERVER = {"name": "far", "server": {"url": "http://host:8100"}}
TWO = {**ONE, "teachers": [{"name": "other", "model_name_or_path": "models/other"}]}
SAMPLED = {"loss_support": "sampled"}
# Each contradiction, how its message begins, and the change that resolves it.
CONTRADICTIONS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    # Where completions come from
    ({"lmbda": 1.5}, "lmbda must be less than or equal to 1, got 1.5", {"lmbda": 1.0}),
    ({"lmbda": -0.5}, "lmbda must be greater than or equal to 0, got -0.5", {"lmbda": 0.0}),
    (
        {"lmbda": 0.5, "distillation_objective": "iw_opd"},
        "lmbda must be 1 with distillation_objective=iw_opd, got 0.5",
        {"lmbda": 1.0},
    ),
    ({"lmbda": 0.5, **SAMPLED}, "lmbda must be 1 with loss_support=sampled, got 0.5", {"loss_support": "teacher"}),
    (
        {"cross_entropy_weight": 0.5},
        "lmbda must be below 1 with cross_entropy_weight=0.5, got 1.0",
        {"lmbda": 0.5},
    ),
    # The objective
    ({"beta": 1.5}, "beta must be less than or equal to 1, got 1.5", {"beta": 1.0}),
    ({"beta": -0.5}, "beta must be greater than or equal to 0, got -0.5", {"beta": 0.0}),
    ({"beta": 0.5, **SAMPLED}, "beta must be 1 with loss_support=sampled, got 0.5", {"beta": 1.0}),
    (
        {"beta": 0.5, "distillation_objective": "iw_opd"},
        "beta must be 1 with distillation_objective=iw_opd, got 0.5",
        {"beta": 1.0},
    ),
    (
        {"distillation_objective": "kl"},
        "distillation_objective must be 'jsd' or 'iw_opd', got 'kl'",
        {"distillation_objective": "jsd"},
    ),
    ({"iw_opd_gamma": -1.0}, "iw_opd_gamma must be greater than or equal to 0, got -1.0", {"iw_opd_gamma": 0.0}),
    ({"iw_opd_epsilon": 0.0}, "iw_opd_epsilon must be greater than 0, got 0.0", {"iw_opd_epsilon": 1e-9}),
    (
        {"loss_top_k": 0},
        "loss_top_k: it must be at least 1, got 0. For the whole vocabulary set loss_support=full.",
        {"loss_top_k": 1},
    ),
    (
        {"loss_top_k": 1, "loss_add_tail": False},
        "loss_add_tail must be true with loss_support=teacher, loss_top_k=1 and beta=1.0, got false",
        {"loss_top_k": 2},
    ),
    (
        {"cross_entropy_weight": 1.5},
        "cross_entropy_weight must be less than or equal to 1, got 1.5",
        {"cross_entropy_weight": 0.0},
    ),
    ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0", {"temperature": 0.5}),
    # Teachers
    (
        {"teachers": [{"model_name_or_path": "models/b"}]},
        "teachers must have different names, got ['teacher', 'teacher']",
        {"teachers": []},
    ),
    (TWO, "teacher_column must be set with several teachers, got ['teacher', 'other']", {"teacher_column": "who"}),
    (
        {**TWO, "teacher_column": "who", "loss_support": "full"},
        "loss_support must be teacher, realised or sampled with several teachers or a server, got full",
        {"loss_support": "realised"},
    ),
    (
        {"teacher_model_name_or_path": None, "teachers": [SERVER], "loss_support": "student"},
        "loss_support must be teacher, realised or sampled with several teachers or a server, got student",
        {"loss_support": "teacher"},
    ),
    (
        {
            **ONE,
            "teachers": [{"name": "b", "model_name_or_path": "b", "placement": "learner"}],
            "teacher_column": "who",
        },
        "placement must not be learner with several teachers, got ['teacher', 'b']",
        {"teachers": []},
    ),
    (
        {
            "teacher_model_name_or_path": None,
            "teachers": [{"model_name_or_path": "models/a", "placement": "actor"}],
            "loss_support": "union",
        },
        "placement must be learner with loss_support=union, got actor",
        {"loss_support": "teacher"},
    ),
    (
        {"teacher_model_name_or_path": None, "teachers": [{"name": "none"}]},
        "teachers.0: teacher none must have either model_name_or_path or server, got None and no server",
        {"teachers": [SERVER]},
    ),
    (
        {"teacher_model_name_or_path": None, "teachers": [{**SERVER, "model_name_or_path": "models/a"}]},
        "teachers.0: teacher far must have either model_name_or_path or server, got 'models/a' and a server",
        {"teachers": [SERVER]},
    ),
    (
        {"teacher_model_name_or_path": None, "teachers": [{**SERVER, "placement": "learner"}]},
        "teachers.0: placement must not be learner for teacher far, got learner with server",
        {"teachers": [SERVER]},
    ),
    (
        {"teacher_model_name_or_path": None, "teachers": [{"name": "a b", "model_name_or_path": "models/a"}]},
        "teachers.0.name must be one of",
        {"teachers": [{"name": "a-b", "model_name_or_path": "models/a"}]},
    ),
    (
        {"teacher_model_name_or_path": None, "teachers": [{"server": {"url": "http://h:1", "protocol": "vllm"}}]},
        "teachers.0.server: model must be set with protocol=vllm and left out otherwise, got None and vllm",
        {"teachers": [{"server": {"url": "http://h:1", "protocol": "vllm", "model": "m"}}]},
    ),
    (
        {"teacher_model_name_or_path": None, "teacher_model_revision": "v2"},
        "teacher_model_name_or_path must be set with teacher_model_revision=v2, got None",
        {"teacher_model_revision": None},
    ),
    # Names of TRL's
    (
        {"reverse_kl_top_1_mode": "argmax"},
        "'reverse_kl_top_1_mode' is not an option here. Set loss_support=realised for sampled",
        {"reverse_kl_top_1_mode": ...},
    ),
    (
        {"use_teacher_server": True},
        "'use_teacher_server' cannot be True here. List the teacher under teachers with its server",
        {"use_teacher_server": ...},
    ),
    (
        {"teacher_model_init_kwargs": {"attn_implementation": "sdpa"}},
        "'teacher_model_init_kwargs' cannot be {'attn_implementation': 'sdpa'} here. List the teacher under teachers",
        {"teacher_model_init_kwargs": ..., "teacher_dtype": "bfloat16"},
    ),
    # Generation
    (
        {"generation_batch_size": 12},
        "generation_batch_size must be a multiple of per_device_train_batch_size * runtime.num_learners, got 12 and 8",
        {"generation_batch_size": 16},
    ),
    ({"max_look_ahead": 2}, "max_look_ahead must be 1 with max_staleness=0, got 2", {"max_staleness": 1}),
]


@pytest.mark.parametrize(("values", "begins", "remedy"), CONTRADICTIONS)
def test_a_contradiction_is_refused_in_one_message_and_its_remedy_is_accepted(
    values: dict[str, Any], begins: str, remedy: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(DistillConfig, {**ONE, **values})
    message = str(caught.value)
    assert message.startswith(begins) and "\n" not in message, message
    healed = {**ONE, **values, **remedy}
    build(DistillConfig, {name: value for name, value in healed.items() if value is not ...})


@pytest.mark.parametrize(
    "values",
    [
        {},
        ONE,
        {**ONE, "teacher_model_revision": "v2", "teacher_dtype": "bfloat16", "loss_support": "full", "beta": 0.5},
        {**TWO, "teacher_column": "who", "lmbda": 0.5, "cross_entropy_weight": 0.3, "max_staleness": 2},
        {"teachers": [SERVER], "distillation_objective": "iw_opd", "max_prompt_length": 64},
        {**ONE, "model_init_kwargs": {"dtype": "bfloat16"}, "generation_kwargs": {"min_tokens": 2}},
    ],
)
def test_a_configuration_survives_being_written_and_changed(values: dict[str, Any]) -> None:
    config = build(DistillConfig, values)
    assert build(DistillConfig, parse_yaml(dump_yaml(config), source="resolved")) == config
    assert config.replace(seed=7).replace(seed=config.seed) == config
    for part in (DistillationLossConfig, ModelConfig, GenerationConfig):
        own = config.part(part)
        assert all(getattr(own, name) == getattr(config, name) for name in part.model_fields)


def test_the_short_form_of_a_teacher_comes_first_and_is_told_its_revision() -> None:
    config = build(
        DistillConfig, {**TWO, "teacher_column": "who", "teacher_dtype": "bfloat16", "teacher_model_revision": "v2"}
    )
    first, second = config.teacher_sources
    assert (first.name, first.kind, first.model.model_name_or_path) == (
        "teacher",
        TeacherKind.EXTERNAL,
        "models/teacher",
    )
    assert (first.model.model_revision, first.model.dtype.value) == ("v2", "bfloat16")
    assert (second.name, second.model.model_revision, second.model.dtype.value) == ("other", "main", "float32")
    assert not first.follows_policy and first.weights is None


def test_a_server_is_a_teacher_without_a_model() -> None:
    [source] = build(DistillConfig, {"teachers": [SERVER]}).teacher_sources
    assert source.model.model_name_or_path is None
    server = source.options.server  # type: ignore[attr-defined]
    assert (server.url, server.protocol) == ("http://host:8100", TeacherProtocol.TRL_RAY)


@pytest.mark.parametrize(
    ("values", "in_learner"),
    [
        ({}, False),
        (SAMPLED, False),
        ({"loss_support": "realised", "beta": 0.5}, False),
        ({"distillation_objective": "iw_opd"}, False),
        # The objective asks for the completion's own tokens, whatever the support.
        ({"distillation_objective": "iw_opd", "loss_support": "full"}, False),
        ({"loss_support": "full"}, True),
        ({"loss_support": "student"}, True),
        ({"loss_support": "union"}, True),
    ],
)
def test_the_learner_holds_the_teacher_where_nobody_else_knows_both_sides(
    values: dict[str, Any], in_learner: bool
) -> None:
    config = build(DistillConfig, {**ONE, **values})
    assert (config.teacher_in_learner, len(config.acting_teachers)) == (in_learner, 0 if in_learner else 1)


def test_a_teacher_may_be_put_into_the_learner_for_any_support() -> None:
    teachers = [{"model_name_or_path": "models/a", "placement": "learner"}]
    assert build(DistillConfig, {"teachers": teachers}).teacher_in_learner


def test_rewards_are_measured_only_where_there_are_any() -> None:
    assert not DistillConfig().has_rewards
    assert DistillConfig(reward_funcs=["arithmetic"]).has_rewards
    assert DistillConfig(reward_model_name_or_path="models/judge").has_rewards


def test_the_generation_batch_is_cut_into_updates() -> None:
    config = DistillConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, generation_batch_size=32)
    assert (config.completions_per_step, config.groups_per_step, config.updates_per_step) == (32, 32, 4)
