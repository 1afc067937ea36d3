"""Interrupted and resumed is uninterrupted, bit for bit: weights, optimizer, random state, ledger, every number.

straight run ──────────────────────────► last checkpoint ─┐
broken run ──✂ ─► checkpoint ─► resumed ─► last checkpoint ┴─► the same bytes
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

import dataset_runs
from dataset_runs import assert_same_run, pipeline, rows, train, write_rows
from runs import assert_balanced, command, comparable, events, ledger, lines, wait_for_steps
from tiny_models import build_tiny_model
from trl_ray.errors import ConfigError, DataError, InterruptedRun
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.supervised.dataset_recording import SupervisedRecorder

pytestmark = pytest.mark.integration
STEPS = 6
NOISY = {"neftune_noise_alpha": 5.0, "disable_dropout": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft with noise, dropout and packing": ("sft", {**NOISY, "packing": True, "max_steps": STEPS}),
    "sft with an adapter's dropout": ("sft", {"use_peft": True, "lora_dropout": 0.3, "disable_dropout": False}),
    "sft with an adapter, embeddings and head": (
        "sft",
        {"use_peft": True, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "sft in bfloat16": ("sft", {"dtype": "bfloat16", "learning_rate": 1e-5}),
    "sft in bfloat16 with muon": ("sft", {"dtype": "bfloat16", "optim": "muon"}),
    "dpo": ("dpo", {}),
    "dpo, precomputed": ("dpo", {"precompute_ref_log_probs": True, "ref_log_probs_cache_dir": "{folder}/cache"}),
    "dpo, synchronised": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "kto": ("kto", {}),
    "reward": ("reward", {}),
    "prm": ("prm", {}),
    "sft from a stream": ("sft", {**NOISY, "dataset_streaming": True, "stream_window": 12}),
    "sft from a stream of packed rows": ("sft", {"packing": True, "dataset_streaming": True, "stream_window": 12}),
    "kto from a stream": ("kto", {"dataset_streaming": True, "stream_window": 12}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def options_of(case: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """The pipeline of a case and its options; of a stream, one row in ten has nothing to train."""
    name, options = CASES[case]
    options = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in options.items()}
    if options.get("dataset_streaming"):
        table = rows(name, 28)
        for row in table[::10]:
            row["prompt"] = row["prompt"] * 20  # longer than max_length
        options["dataset_name"] = write_rows(folder / "rows.jsonl", table)
    return name, {"max_steps": STEPS, **options}


def break_after(step: int, monkeypatch: pytest.MonkeyPatch, *, kill: bool = False) -> None:
    """Ctrl-C as soon as a step's line is written, or a death that nothing is done about."""
    original = SupervisedRecorder.step

    def breaking(self: SupervisedRecorder, number: int, **told: Any) -> None:
        original(self, number, **told)
        if number != step:
            return
        if kill:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SupervisedRecorder, "step", breaking)


def go_on(name: str, run: Path, options: dict[str, Any]) -> None:
    """Resume; rows that Python gave are given again."""
    inputs: dict[str, Any] = {} if "dataset_name" in options else {"train_dataset": rows(name, 28)}
    if options.get("eval_steps"):
        inputs["eval_dataset"] = rows(name, 6, start=100)
    PIPELINES[name].from_run(run, **inputs).train()


@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = options_of(case, tmp_path)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(name, model, straight, **options)
    with monkeypatch.context() as patch:
        break_after(3, patch)
        with pytest.raises(InterruptedRun, match="after step 3"):
            train(name, model, broken, **options)
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["step-3"]
    go_on(name, broken, options)
    assert_same_run(straight, broken, step=STEPS)
    assert ledger(straight) == ledger(broken)
    assert_balanced(broken, trained=ledger(straight)["trained"])
    if options.get("dataset_streaming"):
        assert sum(ledger(broken)["dropped"].values()) > 0


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_stream_goes_on_from_any_step_of_any_pass(
    step: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = options_of("sft from a stream", tmp_path)  # 25 examples a pass, 8 a step: step 4 is in two passes
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(name, model, straight, **options)
    with monkeypatch.context() as patch:
        break_after(step, patch)
        with pytest.raises(InterruptedRun):
            train(name, model, broken, **options)
    go_on(name, broken, options)
    assert_same_run(straight, broken, step=STEPS)
    assert ledger(straight) == ledger(broken)
    assert lines(broken / "metrics.jsonl")[3]["epoch"] == 1.0


@pytest.mark.parametrize("case", ["sft with noise, dropout and packing", "dpo, synchronised", "kto from a stream"])
def test_a_run_that_dies_between_checkpoints_repeats_the_lost_steps_exactly(
    case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = options_of(case, tmp_path)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(name, model, straight, save_steps=2, **options)
    with monkeypatch.context() as patch:
        break_after(5, patch, kill=True)
        with pytest.raises(KeyboardInterrupt):
            train(name, model, broken, save_steps=2, **options)
    assert events(broken, "interrupted")
    go_on(name, broken, options)
    assert events(broken, "run_resumed")[0]["detail"]["step"] == 4
    assert_same_run(straight, broken, step=STEPS)
    assert ledger(straight) == ledger(broken)


def test_a_run_that_dies_before_its_first_checkpoint_begins_anew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train("dpo", model, straight, eval_steps=2)
    with monkeypatch.context() as patch:
        break_after(2, patch, kill=True)
        with pytest.raises(KeyboardInterrupt):
            train("dpo", model, broken, eval_steps=2)
    go_on("dpo", broken, {"eval_steps": 2})
    assert_same_run(straight, broken, step=4)


def test_patience_is_not_renewed_by_an_interruption(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rate is so high that the held-out loss rises from the second evaluation on.
    options = {"max_steps": 12, "eval_steps": 1, "early_stopping_patience": 3, "learning_rate": 0.05}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    stopped = train("sft", model, straight, **options).steps
    assert 3 <= stopped < 12
    with monkeypatch.context() as patch:
        break_after(stopped - 1, patch)
        with pytest.raises(InterruptedRun):
            train("sft", model, broken, **options)
    progress = json.loads((broken / "checkpoints" / f"step-{stopped - 1}" / "progress.json").read_text())
    assert progress["stopping"]["worse"] == 2
    go_on("sft", broken, options)
    assert_same_run(straight, broken, step=stopped)
    # A run that has ended early stays ended.
    go_on("sft", broken, options)
    assert_same_run(straight, broken, step=stopped)


def test_a_finished_run_that_is_resumed_changes_nothing(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("kto", model, run, eval_steps=2)
    before = comparable(run), ledger(run), dataset_runs.weights(run, 4)
    output = pipeline("kto", model, run).from_run(
        run, train_dataset=rows("kto", 28), eval_dataset=rows("kto", 6, start=100)
    )
    assert output.train().steps == 4
    after = comparable(run), ledger(run), dataset_runs.weights(run, 4)
    assert before[:2] == after[:2]
    dataset_runs.assert_close_weights(before[2], after[2], atol=0)


def test_a_run_goes_on_with_the_rows_that_it_began_with(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("dpo", model, run)
    with pytest.raises(DataError, match="28 examples then and 29 examples now"):
        PIPELINES["dpo"].from_run(run, train_dataset=rows("dpo", 29)).train()
    with pytest.raises(DataError, match="28 examples then and 28 examples now with another content"):
        PIPELINES["dpo"].from_run(run, train_dataset=rows("dpo", 28, start=1)).train()
    assert ledger(run)["trained"] == 28


@pytest.mark.parametrize("is_streamed", [False, True], ids=["dataset", "stream"])
def test_options_and_rows_that_are_edited_between_kill_and_resume_are_noticed(
    model: str, tmp_path: Path, is_streamed: bool
) -> None:
    run = tmp_path / "run"
    name = write_rows(tmp_path / "rows.jsonl", rows("dpo", 28))
    options = {"dataset_name": name, "dataset_streaming": is_streamed, "max_steps": 1, "stream_window": 12}
    train("dpo", model, run, **options)
    written = (run / "config.yaml").read_text()
    for option, value in {"seed": 43, "learning_rate": 0.5, "per_device_train_batch_size": 2}.items():
        found = re.search(rf"^{option}: .*$", written, re.MULTILINE)
        assert found is not None
        (run / "config.yaml").write_text(written.replace(found[0], f"{option}: {value}"))
        with pytest.raises(ConfigError, match=f"^{option} must stay as the run began with when it goes on"):
            PIPELINES["dpo"].from_run(run)
        (run / "config.yaml").write_text(written)
        again = pipeline("dpo", model, run, **options, **{option: value})
        with pytest.raises(ConfigError, match=f"^{option} must stay as the run began with when it goes on"):
            again.train(resume_from_checkpoint=True)
    write_rows(tmp_path / "rows.jsonl", [*rows("dpo", 3), *rows("dpo", 1, start=99), *rows("dpo", 24, start=4)])
    told = "a stream then and a stream now with other first rows" if is_streamed else "28 examples now with another"
    with pytest.raises(DataError, match=told):
        PIPELINES["dpo"].from_run(run, changes=["max_steps=2"]).train()
    write_rows(tmp_path / "rows.jsonl", rows("dpo", 28))
    more = pipeline("dpo", model, run, **{**options, "max_steps": 2})
    assert more.train(resume_from_checkpoint=True).steps == 2
    assert events(run, "run_resumed")[0]["detail"]["changed"] == {"max_steps": "1 -> 2"}


def test_a_finished_run_goes_on_for_more_steps(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("dpo", model, run)
    output = PIPELINES["dpo"].from_run(run, changes=["max_steps=6", "save_steps=2"], train_dataset=rows("dpo", 28))
    assert output.train().steps == 6
    assert "max_steps: 6" in (run / "config.yaml").read_text()


def test_the_command_is_interrupted_by_ctrl_c_and_resumed_by_its_folder(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    name = write_rows(tmp_path / "rows.jsonl", rows("dpo", 28))
    options = {"max_steps": 400, "dataset_name": name, "dataset_streaming": True, "stream_window": 12}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataset_runs.values(model, run, **options)))
    process = command("dpo", "--config", str(tmp_path / "config.yaml"))
    wait_for_steps(run, 3, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert f"trl-ray resume {run}" in output
    done = len(lines(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step-{done}" / "model.safetensors").exists()
    text = (run / "config.yaml").read_text().replace("max_steps: 400", f"max_steps: {done + 2}")
    (run / "config.yaml").write_text(text)
    process = command("resume", str(run))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "live 0" in output
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, done + 3))
    assert_balanced(run, trained=8 * (done + 2))
