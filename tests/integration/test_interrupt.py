"""The command itself, in a process of its own: Ctrl-C, SIGTERM, resume, and their exit codes."""

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from runs import PROMPTS, assert_balanced, command, events, lines, values, wait_for_steps
from tiny_models import build_tiny_model

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def config_file(folder: Path, model: str, **changes) -> Path:
    """A config whose prompts come from a file, as on the command line they must."""
    import json

    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values(model, folder / "run", **changes), "dataset_name": str(data)}))
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_resume_finishes_the_run(model, tmp_path, number):
    run = tmp_path / "run"
    config = config_file(tmp_path, model, max_steps=200)
    process = command("async-grpo", "--config", str(config), "max_staleness=2")
    wait_for_steps(run, 3, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert f"trl-ray resume {run}" in output
    done = len(lines(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step-{done}" / "model.safetensors").exists()
    text = (run / "config.yaml").read_text().replace("max_steps: 200", f"max_steps: {done + 3}")
    (run / "config.yaml").write_text(text)
    process = command("resume", str(run))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "live 0" in output
    assert len(lines(run / "metrics.jsonl")) == done + 3
    assert_balanced(run, trained=4 * (done + 3))


def test_ctrl_c_on_ray_leaves_no_process_behind(model, tmp_path, ray_tmpdir):
    run = tmp_path / "run"
    ray_options = {"kind": "ray", "num_cpus": 4, "health_interval_s": 0.5}
    config = config_file(tmp_path, model, max_steps=500, runtime=ray_options)
    process = command("async-grpo", "--config", str(config), "max_staleness=2")
    wait_for_steps(run, 3, process)
    pids = [int(event["detail"]["pid"]) for event in events(run, "actor_started")]
    assert len(pids) == 4
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 130, output
    assert events(run, "interrupted")
    end = time.monotonic() + 15
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_driver_that_is_killed_outright_loses_nothing_but_the_steps_since_its_checkpoint(model, tmp_path, ray_tmpdir):
    run = tmp_path / "run"
    ray_options = {"kind": "ray", "num_cpus": 4, "health_interval_s": 0.5}
    config = config_file(tmp_path, model, max_steps=40, save_steps=5, runtime=ray_options)
    process = command("async-grpo", "--config", str(config), "max_staleness=2")
    wait_for_steps(run, 12, process)
    process.kill()
    process.wait()
    process = command("resume", str(run))
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    resumed = events(run, "run_resumed")[0]["detail"]["step"]
    assert resumed >= 10
    assert resumed % 5 == 0
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, 41))
    assert_balanced(run, trained=160)
