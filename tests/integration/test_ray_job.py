"""A run as a Ray job: submitted with relative files from the folder it lies in, stopped by `ray job stop`, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import PROMPTS, assert_balanced, events, ledger, lines, values
from tiny_models import build_tiny_model
from warm_processes import warm_python

pytestmark = [pytest.mark.integration, pytest.mark.long]

REWARD = """from counting import vowels_in

def vowels(completions, **kwargs):
    return [vowels_in(each) for each in completions]
"""
COUNTING = "def vowels_in(text):\n    return sum(letter in 'aeiou' for letter in text) / 8\n"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a job server: a head of our own, with ports and a folder of its own, ended by its pid."""
    folder = Path("/tmp") / f"tj-{os.getpid()}"
    gcs, dashboard, agent, agent_grpc, client = free_ports(5)
    options = {
        "port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent, "num-cpus": 4,
        "dashboard-agent-grpc-port": agent_grpc, "ray-client-server-port": client, "temp-dir": folder,
        "min-worker-port": 0, "max-worker-port": 0, "object-store-memory": 256 * 1024**2,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    yield f"http://127.0.0.1:{dashboard}"
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def client_of(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    end = time.monotonic() + 90
    while True:
        try:
            return JobSubmissionClient(address)
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < end, "the job server does not come up"
            time.sleep(0.2)


def test_a_job_of_relative_files_is_stopped_within_rays_three_seconds_and_goes_on(jobs: str, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", family="qwen2", tied=True, seed=0)
    run, work = tmp_path / "run", tmp_path / "work"
    (work / "configs").mkdir(parents=True)
    (work / "counting.py").write_text(COUNTING)
    (work / "configs" / "scores.py").write_text(REWARD)
    (work / "configs" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    changes = {"dataset_name": "configs/prompts.jsonl", "reward_funcs": ["scores.py:vowels"], "max_steps": 500}
    options = values(model, run, **changes, runtime={"kind": "ray", "health_interval_s": 0.5})
    (work / "configs" / "run.yaml").write_text(yaml.safe_dump(options))

    client = client_of(jobs)
    entrypoint = f"{warm_python()} -m trl_ray.cli.main async-grpo --config configs/run.yaml max_staleness=2"
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(work)})
    end = time.monotonic() + 120
    while len(lines(run / "metrics.jsonl")) < 3:
        assert client.get_job_status(job).value in {"PENDING", "RUNNING"}, client.get_job_logs(job)
        assert time.monotonic() < end, client.get_job_logs(job)
        time.sleep(0.1)
    pids = [int(event["detail"]["pid"]) for event in events(run, "actor_started")]
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < end
        time.sleep(0.1)

    log = client.get_job_logs(job)
    done = len(lines(run / "metrics.jsonl"))
    assert f"trl-ray: SIGTERM: interrupted after step {done}; go on with: trl-ray resume {run}" in log
    [asked] = events(run, "stop_requested")
    assert asked["detail"] == {"by": "SIGTERM", "seconds_left": pytest.approx(2.0, abs=0.11)}
    assert events(run, "interrupted") and "interrupted" in (run / "report.html").read_text()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "an actor outlives its job"
        time.sleep(0.1)

    kept = json.loads((run / "checkpoints" / f"step-{done}" / "ledger.json").read_text())
    entrypoint = f"{warm_python()} -m trl_ray.cli.main resume {run} max_steps={done + 3}"
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(work)})
    end = time.monotonic() + 120
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < end, client.get_job_logs(job)
        time.sleep(0.1)
    assert client.get_job_status(job).value == "SUCCEEDED", client.get_job_logs(job)
    assert_balanced(run, trained=4 * (done + 3))
    assert ledger(run)["reissued"] - kept["reissued"] <= sum(kept["live"].values()) - kept["live"].get("ready", 0)
