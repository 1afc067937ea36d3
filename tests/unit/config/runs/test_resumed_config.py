"""What of a run's options may change while it goes on, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_ray.config.load import dump_yaml
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig
from trl_ray.config.runs.resumed_config import check_resumed, resumed_config
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(AsyncGRPOConfig(max_steps=10, learning_rate=1e-5)), encoding="utf-8")
    return path


def test_without_changes_the_options_are_those_of_the_file(file: Path) -> None:
    assert resumed_config(AsyncGRPOConfig, file) == AsyncGRPOConfig(max_steps=10, learning_rate=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        "max_steps=20",
        "num_train_epochs=5",
        "save_steps=7",
        "save_strategy=epoch",
        "save_total_limit=2",
        "logging_steps=7",
        "eval_num_prompts=3",
        "report_to=none",
        "html_report=false",
        "max_resampled_groups=99",
        "reward.timeout_s=120",
        "reward.num_workers=4",
        "rollout.lease_s=600",
        "rollout.num_workers=2",
        "runtime.stall_deadline_s=1800",
    ],
)
def test_how_long_and_how_often_may_change(file: Path, change: str) -> None:
    found = resumed_config(AsyncGRPOConfig, file, [change])
    assert found != AsyncGRPOConfig(max_steps=10, learning_rate=1e-5) or change in ("report_to=none",)
    assert (found.learning_rate, found.pipeline) == (1e-5, "async-grpo")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("learning_rate=1e-6", "learning_rate"),
        ("temperature=0.5", "temperature"),
        ("dataset_name=other", "dataset_name"),
        ("beta=0.1", "beta"),
        ("seed=1", "seed"),
        ("model_name_or_path=other", "model_name_or_path"),
        ("max_staleness=1", "max_staleness"),
        ("runtime.num_learners=2", "runtime.num_learners"),
        ("rollout.max_model_len=99", "rollout.max_model_len"),
        ("reward_funcs=[arithmetic]", "reward_funcs"),
    ],
)
def test_what_was_trained_with_so_far_stays_and_is_named(file: Path, change: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resumed_config(AsyncGRPOConfig, file, [change, "save_steps=1"])
    message = str(caught.value)
    assert message.startswith(f"{named} must stay as the run began with") and "save_steps" not in message


def test_all_that_must_stay_is_named_at_once_and_the_same_value_is_no_change(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^(?=.*learning_rate)(?=.*beta).* must stay"):
        resumed_config(AsyncGRPOConfig, file, ["learning_rate=1e-6", "beta=0.1"])
    assert resumed_config(AsyncGRPOConfig, file, ["learning_rate=1e-5", "seed=42"]).seed == 42


def test_an_option_that_is_none_is_told_as_always(file: Path) -> None:
    with pytest.raises(ConfigError, match="max_step"):
        resumed_config(AsyncGRPOConfig, file, ["max_stepz=3"])


def test_a_run_on_a_dataset_is_no_exception(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(SFTConfig(max_steps=3)), encoding="utf-8")
    assert resumed_config(SFTConfig, path, ["max_steps=6"]).max_steps == 6
    with pytest.raises(ConfigError, match=r"^packing must stay"):
        resumed_config(SFTConfig, path, ["packing=true"])
    changes = ["dataset_num_proc=3", "per_device_eval_batch_size=2", "torch_empty_cache_steps=5", "hub_token=hf_x"]
    found = resumed_config(SFTConfig, path, [*changes, "trackio_bucket_id=me/bucket", "callbacks=[package.module:C]"])
    assert (found.dataset_num_proc, found.per_device_eval_batch_size, found.torch_empty_cache_steps) == (3, 2, 5)
    assert (found.hub_token, found.trackio_bucket_id) == ("hf_x", "me/bucket")
    assert [each.path for each in found.callbacks] == ["package.module:C"]


def test_how_long_a_teacher_is_waited_for_may_change_and_what_it_computes_with_may_not(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(SDPOConfig()), encoding="utf-8")
    names = ("timeout_s", "num_workers", "max_attempts", "max_failures_in_a_row")
    teacher = resumed_config(SDPOConfig, path, [f"teacher.{name}=7" for name in names]).teacher
    assert [getattr(teacher, name) for name in names] == [7] * 4
    with pytest.raises(ConfigError, match=r"^teacher.payload_dtype must stay"):
        resumed_config(SDPOConfig, path, ["teacher.payload_dtype=float16", "teacher.timeout_s=7"])


def test_an_edit_of_the_file_is_known_by_what_the_run_wrote_down_itself(tmp_path: Path, file: Path) -> None:
    recorded = tmp_path / ".config.yaml"
    recorded.write_text(file.read_text())
    file.write_text(
        file.read_text().replace("seed: 42", "seed: 43").replace("num_generations: 8", "num_generations: 4")
    )
    with pytest.raises(ConfigError, match=r"^(?=.*\bseed)(?=.*num_generations).* must stay as the run began with"):
        resumed_config(AsyncGRPOConfig, file, recorded=recorded)
    file.write_text(recorded.read_text().replace("max_steps: 10", "max_steps: 12"))
    found = resumed_config(AsyncGRPOConfig, file, ["save_steps=3"], recorded=recorded)
    assert (found.max_steps, found.save_steps, found.seed) == (12, 3, 42)


def test_what_changes_is_told_and_no_secret(tmp_path: Path) -> None:
    before = AsyncGRPOConfig(max_steps=10, output_dir="a")
    after = before.replace(
        max_steps=20, save_strategy="epoch", output_dir="b", hub_token="hf_x", resume_from_checkpoint=True
    )
    assert check_resumed(before, after) == {"max_steps": "10 -> 20", "save_strategy": "steps -> epoch"}
    assert check_resumed(before, before) == {}
    with pytest.raises(ConfigError, match=r"^chat_template_kwargs must stay"):
        check_resumed(before, before.replace(chat_template_kwargs={"a": 1}))
    assert (
        check_resumed(before, before.replace(chat_template_kwargs={"a": 1}), unresolved=["chat_template_kwargs"]) == {}
    )
