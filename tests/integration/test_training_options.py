"""Runs with other optimizers, strategies and points of return: what they leave in checkpoints and where they go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset_runs import assert_same_run, pipeline, rows, train, weights, write_rows
from runs import PROMPTS, assert_balanced, comparable, events, grpo, lines
from tiny_models import build_tiny_model
from trl_ray.cli.main import main
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.policy_loading import load_policy
from trl_ray.pipelines.grpo import GRPOPipeline

pytestmark = pytest.mark.integration
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def go_on(run: Path, given: str | bool, **options: Any) -> Any:
    """The run's pipeline once more, as a user writes it again, from a checkpoint."""
    again = pipeline("sft", "", run, **options)
    return again.train(resume_from_checkpoint=given)


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adafactor"},
        {"optim": "muon", "weight_decay": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adamw_torch", "dtype": "bfloat16"},
        {"optim": "adafactor", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_run_from_a_checkpoint_that_is_named_equals_the_run_that_went_on(
    model: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"model_name_or_path": model, "max_steps": STEPS, "save_steps": 2, **options}
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    train("sft", model, straight, **options)
    train("sft", model, twice, **options)
    checkpoints = twice / "checkpoints"
    output = go_on(twice, str(checkpoints / "step-2"), **options)
    assert_same_run(straight, twice, step=STEPS)
    assert output.steps == STEPS and output.model == checkpoints / f"step-{STEPS}"
    assert {path.name for path in checkpoints.glob("*.left")} == {"step-4.left", "step-6.left"}
    assert [event["detail"]["step"] for event in events(twice, "run_resumed")] == [2]


def test_true_goes_on_from_the_last_checkpoint_with_the_options_that_are_given_now(model: str, tmp_path: Path) -> None:
    run, options = tmp_path / "run", {"model_name_or_path": model, "lr_scheduler_type": "constant"}
    train("sft", model, run, max_steps=2, **options)
    assert go_on(run, True, max_steps=4, **options).steps == 4
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    config = (run / "config.yaml").read_text()
    assert "max_steps: 4" in config and "resume_from_checkpoint: null" in config


def test_what_cannot_be_gone_on_from_is_refused_before_anything_changes(model: str, tmp_path: Path) -> None:
    run, options = tmp_path / "run", {"model_name_or_path": model, "max_steps": 2}
    with pytest.raises(ConfigError, match="must exist"):
        go_on(run, True, **options)
    train("sft", model, run, **options, save_only_model=True)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(ConfigError, match=r"must be true or a checkpoint of the run in output_dir, which has step-2"):
        go_on(run, str(run / "checkpoints" / "step-9"), **options)
    with pytest.raises(ConfigError, match="save_only_model must be false"):
        go_on(run, True, **options, save_only_model=True)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(CheckpointError, match="was written with save_only_model=true"):
        go_on(run, True, **options)
    assert weights(run, 2)  # which a new run may begin with


def test_the_best_model_is_kept_and_named(model: str, tmp_path: Path) -> None:
    # A learning rate that ruins the model at once: the first evaluation is the best one.
    options = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "learning_rate": 0.5}
    output = train("sft", model, tmp_path / "run", **options, load_best_model_at_end=True)
    found = {line["step"]: line["eval/loss"] for line in lines(tmp_path / "run" / "metrics.jsonl")}
    best = min(found, key=lambda step: found[step])
    assert output.model == tmp_path / "run" / "checkpoints" / f"step-{best}" and output.model.is_dir()


def test_a_policy_goes_on_from_the_checkpoint_before_the_last_but_from_no_older_one(model: str, tmp_path: Path) -> None:
    config = grpo(model, tmp_path / "run", max_steps=4, save_steps=1)
    GRPOPipeline(args=config, train_dataset=PROMPTS).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    again = GRPOPipeline(args=config, train_dataset=PROMPTS)
    with pytest.raises(ConfigError, match="must be one of the last 2 checkpoints"):
        again.train(resume_from_checkpoint=str(checkpoints / "step-2"))
    before = weights(tmp_path / "run", 4)
    again.train(resume_from_checkpoint=str(checkpoints / "step-3"))
    after = weights(tmp_path / "run", 4)
    assert all((before[name] == after[name]).all() for name in before)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_policy_goes_on_from_any_checkpoint_that_is_whole_with_the_ledger_that_is_in_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    data = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    GRPOPipeline(args=grpo(model, run, max_steps=5, save_steps=1, dataset_name=data)).train()
    straight, numbers = weights(run, 5), comparable(run)
    (run / "journal.bin").unlink()
    for file in (run / "checkpoints" / "step-5", run / "checkpoints" / "step-4"):
        flip(file / "model.safetensors")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["resume", str(run)]) == 3
    said = capsys.readouterr().err
    assert f"trl-ray resume {run} --from-checkpoint 3 --new-journal" in said and "step-3 itself can be used" in said
    assert "trl-ray resume RUN_DIR" not in said
    assert (run / "metrics.jsonl").read_bytes() == before
    assert main(["resume", str(run), "--from-checkpoint", "9"]) == 2
    assert main(["resume", str(run), "--from-checkpoint", "3", "--new-journal"]) == 0
    told = [event["detail"].get("detail", "") for event in events(run, "warning")]
    assert any(re.search(r"steps 4 to 5 are trained again, \d groups that were on their way", text) for text in told)
    assert_balanced(run, trained=20)
    assert comparable(run) == numbers
    after = weights(run, 5)
    assert all((straight[name] == after[name]).all() for name in straight)

    # The journal is whole now, but what it has forgotten is in the checkpoint alone.
    for file in (run / "checkpoints" / "step-5", run / "checkpoints" / "step-4"):
        flip(file / "trainer_state.pt")
    assert main(["resume", str(run)]) == 0
    assert [event["detail"]["step"] for event in events(run, "run_resumed")] == [3, 3]
    assert (run / "journal.bin.left").is_file()
    assert_balanced(run, trained=20)
    assert comparable(run) == numbers


def test_a_run_on_a_dataset_is_refused_where_no_checkpoint_is_whole_and_keeps_everything(
    model: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train("sft", model, run, max_steps=2, save_steps=1)
    for step in (1, 2):
        flip(run / "checkpoints" / f"step-{step}" / "model.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"step-2.*step-1.*Nothing was changed"):
        pipeline("sft", model, run, max_steps=3).train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.fixture
def nondeterministic_afterwards() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nondeterministic_afterwards")
def test_deterministic_kernels_are_asked_for_and_rows_have_a_seed_of_their_own(model: str, tmp_path: Path) -> None:
    train("sft", model, tmp_path / "one", full_determinism=True)
    assert torch.are_deterministic_algorithms_enabled()
    train("sft", model, tmp_path / "other", data_seed=1)
    train("sft", model, tmp_path / "same", data_seed=42)
    one, other, same = (
        [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "other", "same")
    )
    assert one == same and one != other


def test_evaluations_in_python_are_those_of_the_run_and_leave_nothing_behind(model: str, tmp_path: Path) -> None:
    made = pipeline("dpo", model, tmp_path / "run", max_steps=3, eval_steps=3)
    first = made.evaluate()
    assert first["eval_rewards/margins"] == 0.0 and not (tmp_path / "run").exists()  # the policy is its reference
    made.train()
    told = {
        name.replace("eval/", "eval_"): value
        for name, value in lines(tmp_path / "run" / "metrics.jsonl")[-1].items()
        if name.startswith("eval/")
    }
    assert made.evaluate() == pytest.approx(told)
    other = made.evaluate(rows("dpo", 4, start=50), metric_key_prefix="test")
    assert set(other) == {name.replace("eval_", "test_") for name in told} and other["test_loss"] != told["eval_loss"]
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_completions_are_evaluated_in_python_before_and_after_training(model: str, tmp_path: Path) -> None:
    made = GRPOPipeline(args=grpo(model, tmp_path / "run", max_steps=1), train_dataset=PROMPTS)
    assert 0 <= made.evaluate(PROMPTS[:2])["eval_reward"] <= 1
    output = made.train()
    assert 0 <= made.evaluate(PROMPTS[:2])["eval_reward"] <= 1
    # Other prompts than the run's own are no other run.
    assert 0 <= GRPOPipeline.from_run(output.run_dir).evaluate(PROMPTS[:2])["eval_reward"] <= 1


def test_a_model_is_saved_without_what_only_a_run_needs(model: str, tmp_path: Path) -> None:
    made = pipeline("sft", model, tmp_path / "run", max_steps=1)
    with pytest.raises(ConfigError, match=r"there is none.*Call train\(\)"):
        made.save_model(tmp_path / "early")
    made.train()
    folder = made.save_model(tmp_path / "saved")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not {"trainer_state.pt", "manifest.json", "progress.json"} & {path.name for path in folder.iterdir()}
    again = load_policy(ModelConfig(model_name_or_path=str(folder)))
    kept = weights(tmp_path / "run", 1)
    assert all((tensor.numpy() == kept[name]).all() for name, tensor in again.state_dict().items() if name in kept)
