"""Small real runs for integration tests: a tiny model, a handful of prompts, and what a run leaves behind."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_ray.config.load import build
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from warm_processes import warm_python

ROOT = Path(__file__).parents[1]
REWARDS = Path(__file__).parent / "rewards_for_tests.py"
PROMPTS = [{"prompt": f"count to {number}: "} for number in range(1, 25)]


def values(model: str, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run that takes seconds: 4 groups of 4 completions of at most 8 tokens a step."""
    base: dict[str, Any] = {
        "model_name_or_path": model,
        "reward_funcs": [f"{REWARDS}:vowels"],
        "output_dir": str(output_dir),
        "max_steps": 4,
        "learning_rate": 1e-3,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "linear",
        "disable_dropout": True,
        "num_generations_eval": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "rollout": {"engine": "transformers", "max_num_seqs": 32},
        "runtime": {"kind": "local", "health_interval_s": 0.5, "health_deadline_s": 20.0},
    }
    return merge(base, changes)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes over a base, sections joined key by key."""
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def grpo(model: str, output_dir: Path, **changes: Any) -> GRPOConfig:
    """A synchronous run."""
    return build(GRPOConfig, values(model, output_dir, **changes))


def async_grpo(model: str, output_dir: Path, **changes: Any) -> AsyncGRPOConfig:
    """An asynchronous run."""
    return build(AsyncGRPOConfig, values(model, output_dir, **changes))


def sdpo(model: str, output_dir: Path, **changes: Any) -> SDPOConfig:
    """A run of self-distillation in which about half of the completions are successes."""
    base = {"success_reward_threshold": 0.01, "learning_rate": 1e-4}
    return build(SDPOConfig, values(model, output_dir, **{**base, **changes}))


def distill(model: str, teacher: str | None, output_dir: Path, **changes: Any) -> DistillConfig:
    """A run of distillation: 16 prompts a step, one completion each, and no rewards."""
    base = {"reward_funcs": [], "num_generations": 1, "teacher_model_name_or_path": teacher}
    return build(DistillConfig, values(model, output_dir, **{**base, **changes}))


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file; a line still being written is left out."""
    if not path.exists():
        return []
    whole = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in whole if line]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind."""
    return [event for event in lines(run_dir / "events.jsonl") if event["kind"] == kind]


def ledger(run_dir: Path) -> dict[str, Any]:
    """The ledger at the end."""
    return json.loads((run_dir / "ledger.json").read_text())


def assert_balanced(run_dir: Path, *, trained: int) -> None:
    """Every group issued was trained or dropped with a reason, and nothing is left."""
    final = ledger(run_dir)
    live, dropped = sum(final["live"].values()), sum(final["dropped"].values())
    assert final["issued"] == final["trained"] + dropped + live, final
    assert live == 0, final
    assert final["trained"] == trained, final


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    clock = ("time", "throughput/", "staleness/in_queue_s", "queue/", "ledger/reissued", "ledger/issued")
    return [
        {key: value for key, value in line.items() if not key.startswith(clock)}
        for line in lines(run_dir / "metrics.jsonl")
    ]


def command(*arguments: str) -> subprocess.Popen[str]:
    """The real command, in a process group of its own."""
    return subprocess.Popen(
        [warm_python(), "-m", "trl_ray.cli.main", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until a command has trained so many steps."""
    end = time.monotonic() + 120
    while len(lines(run / "metrics.jsonl")) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run makes no steps"
        time.sleep(0.05)


class Disturbance:
    """Does something to a run once it has reached a step, from a thread of its own."""

    def __init__(self, run_dir: Path, *, after_step: int, act: Callable[[], None]) -> None:
        self._run_dir, self._after_step, self._act = run_dir, after_step, act
        self.done = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if len(lines(self._run_dir / "metrics.jsonl")) >= self._after_step:
                self._act()
                self.done = True
                return
            time.sleep(0.02)


def pid_of(run_dir: Path, actor: str) -> int:
    """The process of an actor, as the events tell."""
    started = [event for event in events(run_dir, "actor_started") if event["actor"] == actor]
    return int(started[-1]["detail"]["pid"])
