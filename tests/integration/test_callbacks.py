"""Callbacks in whole runs: what they are told by every kind of loop, stop, save, evaluate, restart and resume."""

import json
import os
import signal
from pathlib import Path

import pytest
from transformers import PrinterCallback, TrainerCallback

import dataset_runs
from callbacks_for_tests import Asks, Counter, Diary, Raises
from runs import PROMPTS, assert_balanced, async_grpo, events, grpo, lines, pid_of
from tiny_models import build_tiny_model
from trl_ray.cli.main import main
from trl_ray.config.load import dump_yaml
from trl_ray.errors import CallbackError, ConfigError
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.pipelines.grpo import GRPOPipeline

pytestmark = pytest.mark.integration
CALLBACKS = Path(__file__).parents[1] / "callbacks_for_tests.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


class Plateau(TrainerCallback):
    """Stops when the loss was logged so often."""

    def __init__(self, patience):
        self.patience, self.logged = patience, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged += "loss" in logs
        control.should_training_stop = self.logged >= self.patience
        return control


def saved_steps(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_grpo_tells_every_hook_in_order(model, tmp_path):
    # 24 prompts, 4 groups a step: an epoch has 6 steps.
    diary, run = Diary(), tmp_path / "run"
    config = grpo(model, run, max_steps=7, save_steps=4, eval_steps=5)
    GRPOPipeline(args=config, train_dataset=PROMPTS, eval_dataset=PROMPTS[:2], callbacks=[diary]).train()
    assert diary.book[:5] == ["train_begin 0", "log 0", "evaluate 0", "epoch_begin 0", "step_begin 0"]
    assert [line for line in diary.book if line.startswith(("epoch", "evaluate", "save", "train"))] == [
        "train_begin 0", "evaluate 0", "epoch_begin 0", "save 4", "evaluate 5", "epoch_end 6", "epoch_begin 6",
        "save 7", "epoch_end 7", "train_end 7",
    ]  # fmt: skip
    for payload in diary.of("on_evaluate"):
        told = payload["metrics"]
        assert told["eval_reward"] == told["eval_rewards/vowels/mean"] and told["eval_completions/max_length"] <= 8
    written = [
        {k: v for k, v in line.items() if k not in ("step", "time") and not k.startswith("eval/")}
        for line in lines(run / "metrics.jsonl")
    ]
    told = [payload["logs"] for payload in diary.of("on_log") if "loss" in payload["logs"]]
    assert [{k: v for k, v in logs.items() if k in line} for logs, line in zip(told, written, strict=True)] == written
    assert [logs["rewards/vowels/mean"] for logs in told] == [line["reward/vowels/mean"] for line in written]


def test_a_callback_stops_an_asynchronous_run_in_order(model, tmp_path):
    run = tmp_path / "run"
    config = async_grpo(model, run, max_steps=12, max_staleness=2)
    pipeline = AsyncGRPOPipeline(args=config, train_dataset=PROMPTS, callbacks=[Asks("should_training_stop", at=3)])
    output = pipeline.train()
    assert output.steps == 3
    assert saved_steps(run) == [3]
    assert_balanced(run, trained=12)
    assert events(run, "run_finished")


def test_a_callback_saves_and_evaluates_when_it_wants_to(model, tmp_path):
    run, diary = tmp_path / "run", Diary()
    callbacks = [Asks("should_save", at=2), Asks("should_evaluate", at=3), diary]
    config = grpo(model, run, eval_steps=100)
    GRPOPipeline(args=config, train_dataset=PROMPTS, eval_dataset=PROMPTS[:2], callbacks=callbacks).train()
    assert saved_steps(run) == [2, 4]
    assert [event["detail"]["step"] for event in events(run, "evaluated")] == [0, 3]
    assert [line for line in diary.book if line.startswith("evaluate")] == ["evaluate 0", "evaluate 3"]


def test_a_callback_that_raises_ends_the_run_by_its_name_and_keeps_what_was_saved(model, tmp_path):
    run = tmp_path / "run"
    pipeline = GRPOPipeline(args=grpo(model, run), train_dataset=PROMPTS, callbacks=[Raises()])
    with pytest.raises(CallbackError, match=r"Raises\.on_log"):
        pipeline.train()
    assert "Raises.on_log" in events(run, "run_failed")[0]["detail"]["error"]


def test_callbacks_of_transformers_work(model, tmp_path, capsys):
    inputs = {"callbacks": [PrinterCallback, Plateau(patience=3)]}
    output = dataset_runs.pipeline("sft", model, tmp_path / "run", inputs=inputs).train()
    assert output.steps == 3
    assert "'loss': '" in capsys.readouterr().out


@pytest.mark.parametrize("name", dataset_runs.SUPERVISED)
def test_every_pipeline_on_a_dataset_takes_callbacks(model, tmp_path, name):
    diary = Diary()
    inputs = {"callbacks": [diary, Asks("should_training_stop", at=1)]}
    assert dataset_runs.pipeline(name, model, tmp_path / "run", inputs=inputs).train().steps == 1
    assert diary.book[-3:] == ["save 1", "epoch_end 1", "train_end 1"]


def test_yaml_names_callbacks_with_arguments(model, tmp_path, capsys):
    told = tmp_path / "told"
    table = dataset_runs.write_rows(tmp_path / "rows.jsonl", dataset_runs.rows("sft", 28))
    values = dataset_runs.values(model, tmp_path / "run", dataset_name=table)
    stops = {"path": f"{CALLBACKS}:StopsAt", "kwargs": {"step": 2, "file": str(told)}}
    values["callbacks"] = [f"{CALLBACKS}:Counter", stops]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(values))
    assert main(["sft", "--config", str(file)]) == 0
    assert told.read_text().split() == ["1", "2"]
    values["callbacks"] = ["no.such:Callback"]
    file.write_text(json.dumps(values))
    assert main(["sft", "--config", str(file), f"output_dir={tmp_path / 'other'}"]) == 2
    assert "Callback 'no.such:Callback' must be importable" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_states_of_callbacks_are_resumed_and_those_of_python_must_be_given_again(model, tmp_path):
    run, counter = tmp_path / "run", Counter()
    config = grpo(model, run, max_steps=6, save_steps=2)

    class Dies:
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise RuntimeError("power cut")

    with pytest.raises(CallbackError, match="power cut"):
        GRPOPipeline(args=config, train_dataset=PROMPTS, callbacks=[counter, Dies()]).train()
    assert counter.steps == 3
    with pytest.raises(ConfigError, match="given as objects, in Python"):
        GRPOPipeline.from_run(run, train_dataset=PROMPTS).train()
    again, diary = Counter(), Diary()
    GRPOPipeline.from_run(run, train_dataset=PROMPTS, callbacks=[again, diary]).train()
    assert again.steps == 6
    assert diary.book[0] == "train_begin 2"
    assert_balanced(run, trained=24)


def test_callbacks_outlive_the_learner_on_ray(model, tmp_path, ray_local):
    counter, diary, run = Counter(), Diary(), tmp_path / "run"

    class Kills:
        done = False

        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.done:
                self.done = True
                os.kill(pid_of(run, "learner"), signal.SIGKILL)

    inputs = {"callbacks": [counter, diary, Kills()]}
    changes = {"max_steps": 5, "save_steps": 2, "runtime": dataset_runs.RAY}
    output = dataset_runs.pipeline("sft", model, run, inputs=inputs, **changes).train()
    assert (output.steps, counter.steps) == (5, 5)
    assert diary.book.count("train_begin 0") == 1
    assert [line for line in diary.book if line.startswith("step_end")] == [
        f"step_end {step}" for step in (1, 2, 3, 3, 4, 5)
    ]


def test_config_yaml_keeps_the_names(model, tmp_path):
    config = grpo(model, tmp_path / "run", callbacks=[f"{CALLBACKS}:Counter"])
    pipeline = GRPOPipeline(args=config, train_dataset=PROMPTS, callbacks=[Diary()])
    text = dump_yaml(pipeline.config)
    assert f"{CALLBACKS}:Counter" in text
    assert "python:Diary" in text
