"""What every test shares: no network, no surprise GPU, few threads, and a Ray of its own.

environment (set before anything imports torch or Ray) -> markers -> `ray_local`: one Ray per session, on request
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from warm_processes import warm_python

ROOT = Path(__file__).parents[1]

# Tests send Ctrl-C to what they start; a shell lets what it runs in the background, and all below it, ignore that.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Child processes and Ray workers inherit all of these.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    WANDB_MODE="offline",
    # A cluster that happens to run on this machine is none of the tests' business.
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DEDUP_LOGS="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    # Ray lets its workers step back behind everything else; here everything else waits for them.
    RAY_worker_niceness="0",
    # What a killed worker that was stopped before has left of its life, and its CPU with it: 5 s otherwise.
    RAY_kill_worker_timeout_milliseconds="1000",
)
for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_NAMESPACE"):
    os.environ.pop(name, None)

# Times on a shared machine say nothing about correctness: no deadlines.
# The ledger's state machine, which has the most to find, takes four times as many.
settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("quick", deadline=None, max_examples=5)
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long` also runs what is marked `long`."""
    parser.addoption("--long", action="store_true", help="also run the tests marked `long`")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs before torch looks for them, unless the run asks for the `gpu` marker."""
    selected = config.option.markexpr or ""
    if "gpu" not in selected or "not gpu" in selected:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Seconds of the files that take longest on two cores; they start first, so that no process waits for one of them in the
# end. What is not here takes less; a figure that is out of date costs time, never a check. `--durations=N` prints these
# figures as they are now.
SECONDS = {
    "test_examples.py": 158,
    "test_faults.py": 95,
    "test_teacher_faults.py": 62,
    "test_interrupt.py": 60,
    "test_weight_update_matrix.py": 55,
    "test_loss_options.py": 46,
    "test_reward_models.py": 42,
    "test_supervised_on_ray.py": 41,
    "test_sdpo_runs.py": 34,
    "test_learner_ranks.py": 34,
    "test_shipped_runs.py": 30,
    "test_taught_learner.py": 29,
    "test_teacher_on_vllm_server.py": 28,
    "test_deepspeed_ranks.py": 26,
    "test_wrong_input.py": 24,
    "test_pipeline_local.py": 23,
    "test_supervised_resume.py": 23,
    "test_planted_disagreements.py": 21,
    "test_learner_adapter.py": 18,
    "test_streamed_prompts.py": 17,
    "test_twenty_steps_vs_trl.py": 17,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; skip `gpu` tests where GPUs are hidden, `long` ones unless they are asked for."""
    for item in items:
        if item.get_closest_marker("long") and not config.option.long:
            item.add_marker(pytest.mark.skip(reason="takes long, and needs --long"))
    items.sort(key=lambda item: -SECONDS.get(item.path.name, 0))
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU and -m gpu"))


_taken: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what each file takes, fixtures included; in the process that prints."""
    _taken[Path(report.nodeid.partition("::")[0]).name] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say beside the slowest tests which files take longest, as they stand in `SECONDS`."""
    if terminalreporter.config.option.durations is None:
        return
    terminalreporter.section(f"slowest {len(SECONDS)} of {len(_taken)} files, {sum(_taken.values()):.0f} s in all")
    for name, seconds in sorted(_taken.items(), key=lambda item: -item[1])[: len(SECONDS)]:
        terminalreporter.write_line(f'"{name}": {seconds:.0f},')


@pytest.fixture(scope="session")
def ray_tmpdir() -> Iterator[str]:
    """A short folder for Ray's sockets (their paths are limited to 107 characters), deleted afterwards."""
    folder = tempfile.mkdtemp(prefix="tr-", dir="/tmp")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    yield folder
    if before is None:
        del os.environ["RAY_TMPDIR"]
    else:
        os.environ["RAY_TMPDIR"] = before
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_local(ray_tmpdir: str) -> Iterator[Any]:
    """Ray with four logical CPUs in a cluster of its own; started once per session, only if a test asks.

    Yields the `ray` module. A test that stops this Ray, or calls code that does, must not use this fixture.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=256 * 1024**2,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=False,
        _temp_dir=ray_tmpdir,
        # Workers import the checkout, and helpers that lie in tests/, wherever pytest was started.
        runtime_env={
            "env_vars": {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
            "py_executable": warm_python(),
        },
    )
    yield ray
    ray.shutdown()
