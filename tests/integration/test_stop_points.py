"""SIGTERM wherever a run is: it ends within the grace with 130, its events say so, no process is left, it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import dataset_runs
from runs import PROMPTS, assert_balanced, events, lines, pid_of, values
from tiny_models import build_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.long]

GRACE_S = 3
SLOW = '''
import pathlib, time
from trl_ray.algorithms.supervised_loss import SupervisedLoss

class SlowLoss(SupervisedLoss):
    """Takes a minute once its marker is there."""

    def __call__(self, inputs):
        if pathlib.Path("{marker}").exists():
            for _ in range(600):
                time.sleep(0.1)
        return super().__call__(inputs)

def waits(completions, **kwargs):
    while pathlib.Path("{marker}").exists():
        time.sleep(0.1)
    return [0.5 * (index % 2) for index, _ in enumerate(completions)]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def plain_command(*arguments: str) -> subprocess.Popen[str]:
    """The command in plain Python: the environment of a fork is its parent's, and tells nothing."""
    return subprocess.Popen(
        [sys.executable, "-m", "trl_ray.cli.main", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


class Stage:
    """A run of the command that can be made to hang where it is, in a folder of its own."""

    def __init__(self, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._model, self.run, self.marker = folder, model, folder / "run", folder / "marker"
        self._mark = uuid.uuid4().hex
        monkeypatch.setenv("STOP_POINTS", self._mark)
        (folder / "slow.py").write_text(SLOW.replace("{marker}", str(self.marker)))

    def begin(self, pipeline: str, kind: str, **changes: Any) -> None:
        runtime = {"kind": kind, "stop_grace_s": GRACE_S, "health_interval_s": 0.5, "stall_deadline_s": 600}
        if kind == "ray":
            runtime["num_cpus"] = 4
        rows = PROMPTS if pipeline == "async-grpo" else dataset_runs.rows("sft", 400)
        make = values if pipeline == "async-grpo" else dataset_runs.values
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = make(self._model, self.run, dataset_name=str(self.folder / "rows.jsonl"), max_steps=400, **changes)
        options["runtime"] = runtime
        (self.folder / "run.yaml").write_text(yaml.safe_dump(options))
        self.process = plain_command(pipeline, "--config", str(self.folder / "run.yaml"))

    def wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not until():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end, "it does not come so far"
            time.sleep(0.005)

    def steps(self, count: int) -> None:
        self.wait(lambda: len(lines(self.run / "metrics.jsonl")) >= count)

    def own(self) -> list[int]:
        """All living processes of the run, wherever they were handed to."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if f"STOP_POINTS={self._mark}".encode() in (folder / "environ").read_bytes() and state != "Z":
                    found.append(int(folder.name))
            except OSError:
                continue
        return [pid for pid in found if pid != os.getpid()]

    def stop(self, *, whom: list[int] | None = None) -> float:
        begin = time.monotonic()
        for pid in [self.process.pid] if whom is None else whom:
            os.kill(pid, signal.SIGTERM)
        output = self.process.communicate(timeout=60)[0]
        took = time.monotonic() - begin
        assert self.process.returncode == 130, output
        assert "Traceback" not in output, output
        assert took < GRACE_S + 0.3, output
        end = time.monotonic() + 10
        while self.own():
            assert time.monotonic() < end, self.own()
            time.sleep(0.1)
        return took

    def goes_on(self) -> None:
        """With no step trained twice, and none left out."""
        assert [event["detail"] for event in events(self.run, "interrupted")]
        self.marker.unlink(missing_ok=True)
        last = max([int(path.name[5:]) for path in (self.run / "checkpoints").glob("step-*[0-9]")], default=0)
        process = plain_command("resume", str(self.run), f"max_steps={last + 3}")
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output
        assert [line["step"] for line in lines(self.run / "metrics.jsonl")] == list(range(1, last + 4))


@pytest.fixture
def stage(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, ray_tmpdir: str) -> Stage:
    return Stage(tmp_path, model, monkeypatch)


RAY_AND_LOCAL = pytest.mark.parametrize("kind", ["ray", "local"])


@pytest.mark.parametrize("pipeline", ["async-grpo", "sft"])
def test_while_the_models_are_loaded(stage: Stage, pipeline: str) -> None:
    stage.begin(pipeline, "ray")
    stage.wait(lambda: bool(events(stage.run, "run_started")))
    assert not events(stage.run, "ready")
    assert stage.stop() < 2.5
    assert "while the actors started" in events(stage.run, "interrupted")[0]["detail"]["error"]
    stage.goes_on()


@pytest.mark.parametrize("seconds", [0.7, 1.5, 2.5, 4.0])
def test_before_there_is_a_run(stage: Stage, seconds: float) -> None:
    stage.begin("async-grpo", "ray")
    time.sleep(seconds)
    stage.stop()


@RAY_AND_LOCAL
def test_in_a_step_that_ends_in_time(stage: Stage, kind: str) -> None:
    stage.begin("async-grpo", kind)
    stage.steps(3)
    stage.stop()
    assert "interrupted after step" in events(stage.run, "interrupted")[0]["detail"]["error"]
    stage.goes_on()
    assert_balanced(stage.run, trained=4 * len(lines(stage.run / "metrics.jsonl")))


@RAY_AND_LOCAL
def test_in_a_step_that_does_not(stage: Stage, kind: str) -> None:
    stage.begin("sft", kind, loss=f"{stage.folder}/slow.py:SlowLoss", save_steps=2)
    stage.steps(3)
    stage.marker.touch()
    time.sleep(1.0)
    stage.stop()
    detail = events(stage.run, "interrupted")[0]["detail"]["error"]
    assert "no time was left to end the step; the checkpoint step-" in detail
    stage.goes_on()


@pytest.mark.parametrize("pipeline", ["async-grpo", "sft"])
def test_in_a_checkpoint(stage: Stage, pipeline: str) -> None:
    stage.begin(pipeline, "ray", save_steps=3)
    stage.wait(lambda: any((stage.run / "checkpoints").glob("step-*.tmp")))
    stage.stop()
    stage.goes_on()


@RAY_AND_LOCAL
def test_in_an_evaluation(stage: Stage, kind: str) -> None:
    changes = {"reward_funcs": [f"{stage.folder}/slow.py:waits"], "reward": {"timeout_s": 120.0}}
    stage.begin("async-grpo", kind, eval_steps=3, eval_on_start=False, dataset_test_split="train", **changes)
    stage.steps(2)
    stage.marker.touch()
    time.sleep(1.5)
    stage.stop()
    stage.goes_on()


def test_while_nothing_comes_because_an_actor_hangs(stage: Stage) -> None:
    stage.begin("async-grpo", "ray")
    stage.steps(2)
    os.kill(pid_of(stage.run, "rollout-0"), signal.SIGSTOP)
    time.sleep(2.0)
    stage.stop()
    stage.goes_on()


def test_while_a_killed_actor_is_replaced(stage: Stage) -> None:
    stage.begin("async-grpo", "ray")
    stage.steps(2)
    os.kill(pid_of(stage.run, "queue"), signal.SIGKILL)
    time.sleep(0.3)
    stage.stop()
    stage.goes_on()


def test_with_every_process_of_the_run_signalled_as_slurm_does(stage: Stage) -> None:
    stage.begin("async-grpo", "ray", save_steps=2)
    stage.steps(5)
    stage.stop(whom=stage.own())
    stage.goes_on()


@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_run_whose_ray_is_killed_fails_by_name_and_leaves_no_process(stage: Stage, part: str) -> None:
    stage.begin("async-grpo", "ray", save_steps=2)
    stage.steps(3)
    begin = time.monotonic()
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in stage.own()}
    os.kill(next(pid for pid, name in names.items() if name == part), signal.SIGKILL)
    output = stage.process.communicate(timeout=60)[0]
    assert stage.process.returncode == 3, output
    assert time.monotonic() - begin < 15
    assert "ClusterLostError" in output and "trl-ray resume" in output
    assert "ClusterLostError" in events(stage.run, "run_failed")[0]["detail"]["error"]
    time.sleep(10)
    assert stage.own() == []
