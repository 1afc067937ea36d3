"""DeepSpeed's configuration agrees with ours, or says which two values do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trl_ray.config.deepspeed import DeepSpeedPlan, resolve_deepspeed
from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.sections import Dtype, TrainingConfig
from trl_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))


def resolve(
    given: dict[str, Any], *, ranks: int = 2, dtype: Dtype = Dtype.FLOAT32, hidden: int | None = 100, **options: Any
) -> DeepSpeedPlan:
    training = TrainingConfig(
        deepspeed=given,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        learning_rate=1e-5,
        max_grad_norm=0.7,
        **options,
    )
    return resolve_deepspeed(training, num_ranks=ranks, dtype=dtype, hidden_size=hidden)


def test_auto_takes_our_values() -> None:
    plan = resolve(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}},
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            },
        }
    )
    assert plan.config["train_micro_batch_size_per_gpu"] == 4
    assert plan.config["gradient_accumulation_steps"] == 3
    assert plan.config["gradient_clipping"] == 0.7
    assert plan.config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 9_000,
        "stage3_param_persistence_threshold": 1_000,
    }
    assert plan.config["bf16"] == {"enabled": False}
    assert "optimizer" not in plan.config and plan.torch_adam and not plan.bf16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_shards_what_the_one_before_does_and_one_thing_more(stage: int) -> None:
    plan = resolve({"zero_optimization": {"stage": stage}})
    assert (plan.shards_optimizer, plan.shards_gradients, plan.shards_weights) == (stage > 0, stage > 1, stage > 2)


def test_equal_values_may_stand_in_both_places() -> None:
    plan = resolve(
        {
            "train_batch_size": 24,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 3,
            "gradient_clipping": 0.7,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8}},
        }
    )
    assert plan.stage == 0


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"train_batch_size": 12}, ["train_batch_size", "runtime.num_learners", "12", "24"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["per_device_train_batch_size", "8", "4"]),
        ({"gradient_accumulation_steps": 1}, ["deepspeed.gradient_accumulation_steps", "1", "3"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "max_grad_norm", "1.0", "0.7"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, ["optimizer.params.lr", "learning_rate", "0.0001"]),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, ["adam_beta2", "0.95", "0.999"]),
        ({"optimizer": {"type": "Lion"}}, ["AdamW", "Lion"]),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1.0}}}, ["optimizer.params.learning_rate"]),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["adam_w_mode"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "lr_scheduler_type"]),
        ({"fp16": {"enabled": True}}, ["fp16", "bfloat16"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "dtype=float32"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", "zero_optimization"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "4"]),
        ({"zero_optimization": {"stage": "auto"}}, ["stage", "auto"]),
        ({"zero_optimization": 3}, ["zero_optimization", "mapping"]),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, ["allgather_bucket_size", "auto"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "stage"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["offload_optimizer", "memory"]),
    ],
)
def test_what_contradicts_or_is_not_known_is_refused_by_name(given: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(given)
    assert all(name in str(caught.value) for name in names), str(caught.value)


@pytest.mark.parametrize(
    ("optim", "given", "words"),
    [
        ("adafactor", {"zero_optimization": {"stage": 2}}, ["flat shards", "stage=2", "adafactor"]),
        ("muon", {"zero_optimization": {"stage": 1}}, ["flat shards", "stage=1", "muon"]),
        ("sgd", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, ["offload", "sgd"]),
        ("sgd", {"optimizer": {"type": "AdamW"}}, ["deepspeed.optimizer", "optim=sgd"]),
    ],
)
def test_an_optimizer_that_shards_cannot_have_is_refused(optim: str, given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(given, optim=optim)
    assert all(word in str(caught.value) for word in words)


def test_optimizers_that_move_each_number_by_itself_work_on_shards_and_all_on_whole_weights() -> None:
    assert resolve({"zero_optimization": {"stage": 3}}, optim="sgd").stage == 3
    assert resolve({"zero_optimization": {"stage": 0}}, optim="muon").stage == 0


def test_bfloat16_weights_switch_deepspeeds_bf16_on_and_add_gradients_up_in_float32() -> None:
    plan = resolve({"zero_optimization": {"stage": 2}}, dtype=Dtype.BFLOAT16)
    assert plan.bf16
    assert plan.config["bf16"] == {"enabled": True}
    assert plan.config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize("stage", [0, 1])
def test_bfloat16_weights_need_sharded_gradients(stage: int) -> None:
    with pytest.raises(ConfigError, match="stage 2 or 3"):
        resolve({"zero_optimization": {"stage": stage}}, dtype=Dtype.BFLOAT16)


def test_deepspeed_is_always_told_of_several_passes_and_never_clips_whole_gradients() -> None:
    training = TrainingConfig(deepspeed={}, max_grad_norm=0.5)
    config = resolve_deepspeed(training, num_ranks=1, dtype=Dtype.FLOAT32).config
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (2, 0.0)


def test_sizes_that_depend_on_the_model_are_left_to_deepspeed_where_it_is_unknown() -> None:
    plan = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, hidden=None)
    assert plan.config["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_resolve_and_are_named_after_their_stage(path: Path) -> None:
    plan = resolve(json.loads(path.read_text()))
    assert path.name == f"zero{plan.stage}.json"


def test_all_stages_that_shard_are_shipped() -> None:
    assert len(SHIPPED) == 3


def test_a_path_becomes_the_contents_of_its_file_in_the_resolved_configuration() -> None:
    config = GRPOConfig(deepspeed=str(ROOT / "configs/deepspeed/zero2.json"))
    assert config.deepspeed == json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    assert build(GRPOConfig, parse_yaml(dump_yaml(config), source="resolved")) == config


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "is none"), ("[]", "object"), ('{"a":1,"a":2}', "twice")]
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(deepspeed=str(path))


def test_a_pipelines_configuration_checks_it_against_the_number_of_learners() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size.*num_learners"):
        GRPOConfig(deepspeed={"train_batch_size": 16})
