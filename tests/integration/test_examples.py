"""The examples run as they stand, on a tiny random model: each is started as a user would start it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tiny_models import build_tiny_model
from warm_processes import warm_python

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEP = re.compile(r"^step\s+(\d+)\s+reward (\d\.\d{3})", re.MULTILINE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("examples") / "tiny")


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder whose path leaves room for Ray's sockets (107 characters in all)."""
    with tempfile.TemporaryDirectory(prefix="tx-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


def run(command: Sequence[str], *, folder: Path, environment: Mapping[str, str], timeout_s: float) -> str:
    """Run to the end and return what it printed; fails with both streams when it fails."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def flat(tiny: str, folder: Path, *options: str) -> str:
    command = [warm_python(), str(EXAMPLES / "grpo_flat.py"), "--model", tiny, *options]
    return run(command, folder=folder, environment={}, timeout_s=120)


def test_the_flat_example_prints_the_reward_of_every_step_and_repeats_itself(tiny: str, tmp_path: Path) -> None:
    first, second = (flat(tiny, tmp_path, "--steps", "2", "--seed", "7") for _ in range(2))
    assert [int(step) for step, _ in STEP.findall(first)] == [1, 2]
    # Tokens and losses, not only rewards: a random model earns nothing. Seconds differ, of course.
    without_times = [re.sub(r"\d+\.\d s", "", text) for text in (first, second)]
    assert without_times[0] == without_times[1]


def test_the_flat_example_needs_neither_ray_nor_this_package() -> None:
    text = (EXAMPLES / "grpo_flat.py").read_text()
    assert len(text.splitlines()) <= 250
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported.isdisjoint({"ray", "vllm", "trl", "trl_ray"})


def assert_balanced_run(folder: Path, *, steps: int) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    ledger = json.loads((folder / "ledger.json").read_text())
    dropped, live = ledger["dropped"], ledger["live"]
    assert ledger["issued"] == ledger["trained"] + sum(dropped.values()) + sum(live.values())


@pytest.mark.slow
@pytest.mark.parametrize("example", ["async_grpo.py", "rloo.py"])
def test_a_python_example_trains_with_a_reward_function_of_its_own(
    example: str, tiny: str, tmp_path: Path, short_folder: str
) -> None:
    command = [
        warm_python(),
        str(EXAMPLES / example),
        "--model",
        tiny,
        "--steps",
        "2",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    output = run(command, folder=tmp_path, environment={"RAY_TMPDIR": short_folder}, timeout_s=400)
    assert "2 steps, last mean reward" in output
    assert_balanced_run(tmp_path / "run", steps=2)
    assert "reward/number_reward/mean" in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "figure"),
    [
        ("sft.py", "held-out loss"),
        ("callbacks.py", "held-out loss"),
        ("dpo.py", "held-out accuracy"),
        ("kto.py", "held-out loss"),
        ("reward_model.py", "held-out accuracy"),
        ("prm.py", "held-out accuracy"),
    ],
)
def test_a_python_example_trains_on_rows_of_its_own(
    example: str, figure: str, tiny: str, tmp_path: Path, short_folder: str
) -> None:
    command = [warm_python(), str(EXAMPLES / example), "--model", tiny, "--steps", "2", "--output-dir", "run"]
    output = run(command, folder=tmp_path, environment={"RAY_TMPDIR": short_folder}, timeout_s=400)
    assert re.search(rf"^2 steps, {figure} \d+\.\d{{3}}, report in \S*run$", output, re.MULTILINE)
    assert_balanced_run(tmp_path / "run", steps=2)


def test_the_chain_hands_checkpoints_from_sft_to_a_reward_model_and_both_to_grpo(tiny: str, tmp_path: Path) -> None:
    script = str(EXAMPLES / "chain_sft_reward_grpo.py")
    command = [warm_python(), script, "--tiny", "--model", tiny, "--steps", "4", "--output-dir", "chain"]
    output = run(command, folder=tmp_path, environment={}, timeout_s=300)
    assert re.search(r"^GRPO: mean reward -?\d+\.\d{3}", output, re.MULTILINE)
    for part in ("sft", "reward", "grpo"):
        assert_balanced_run(tmp_path / "chain" / part, steps=4)
    started = {part: (tmp_path / "chain" / part / "config.yaml").read_text() for part in ("reward", "grpo")}
    assert all("chain/sft/checkpoints/step-4" in text for text in started.values())
    assert "chain/reward/checkpoints/step-4" in started["grpo"]
    assert "reward/short_answers/mean" in (tmp_path / "chain" / "grpo" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_cluster_job_trains_and_stops_the_cluster_it_started(tiny: str, tmp_path: Path, short_folder: str) -> None:
    run(
        [
            str(EXAMPLES / "ray_job.sh"),
            "configs/async-grpo/tiny.yaml",
            f"model_name_or_path={tiny}",
            f"output_dir={tmp_path / 'run'}",
            "max_steps=2",
        ],
        folder=tmp_path,
        environment={"PYTHON": sys.executable, "RAY_JOB_TMP": short_folder},
        timeout_s=500,
    )
    assert_balanced_run(tmp_path / "run", steps=2)
    assert not list(Path(short_folder).iterdir())
    assert not [pid for pid in _processes() if short_folder in _command_line(pid)]


def _processes() -> list[str]:
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _command_line(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it ended meanwhile
        return ""
