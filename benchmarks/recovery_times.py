"""Measures how long a run stands still when one of its actors dies or hangs.

    this process --spawns--> one run per role, fault and seed --its last line, JSON--> seconds --> table, p50 and max
    in the run: every so many steps a signal to the process of an actor --> the longest gap between steps after it

A tiny random model, two rollout workers and two reward workers, everything on this machine. `kill` is SIGKILL, `hang`
is SIGSTOP, which nothing but a missed deadline shows. A gap counts from the last step before the fault, or from the
fault where steps went on after it: what a user sees on the console. Of hangs the deadline is taken off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "measurement:"
FAULTS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}
ROLES = ("rollout", "reward", "queue", "learner")
GOALS = {"kill": (2.0, 6.0), "hang": (3.0, 3.0)}
"""Median and most seconds; of a learner, which loads its model and goes back to a checkpoint, there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one child measures; travels to it as JSON."""

    role: str
    fault: str
    seed: int
    count: int
    """Faults in one run."""
    every: int
    """Steps between them."""
    deadline_s: float
    workers: int


def prompts() -> list[dict[str, str]]:
    """Enough of them for short epochs."""
    return [{"prompt": f"count to {number}: "} for number in range(1, 25)]


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group."""
    return [(sum(map(ord, str(text))) % 97) / 97 for text in completions]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


class Faults:
    """Strikes again and again, from a thread of its own, and remembers when."""

    def __init__(self, settings: Settings, run: Path) -> None:
        self._settings, self._run = settings, run
        self.struck: list[float] = []
        threading.Thread(target=self._strike, daemon=True).start()

    def _strike(self) -> None:
        for number in range(self._settings.count):
            steps = (number + 1) * self._settings.every + self._settings.seed
            while len(read_lines(self._run / "metrics.jsonl")) < steps:
                time.sleep(0.02)
            victim = self._victim()
            self.struck.append(time.time())
            os.kill(victim, FAULTS[self._settings.fault])

    def _victim(self) -> int:
        """A process that plays the role and has been there longest, once all that were lost are back."""
        while True:
            alive: dict[str, int] = {}
            for event in read_lines(self._run / "events.jsonl"):
                name, kind = event["actor"], event["kind"]
                if kind in ("actor_started", "actor_restarted") and name.startswith(self._settings.role):
                    alive[name] = int(event["detail"]["pid"])
                elif kind == "actor_lost":
                    alive.pop(name, None)
            if len(alive) >= (self._settings.workers if self._settings.role == "rollout" else 1):
                return next(iter(alive.values()))
            time.sleep(0.05)


def measure(settings: Settings) -> list[float]:
    """Seconds without a step after each fault of one run."""
    import trl_ray
    from tiny_models import build_tiny_model  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory(prefix="trl_ray-recovery-") as folder:
        run = Path(folder, "run")
        config = trl_ray.AsyncGRPOConfig(
            model_name_or_path=str(build_tiny_model(Path(folder, "tiny"))),
            output_dir=str(run),
            max_steps=settings.every * (settings.count + 2),
            num_generations=4,
            per_device_train_batch_size=16,
            max_completion_length=16,
            gradient_checkpointing=False,
            max_staleness=2,
            save_steps=5,
            logging_steps=1_000_000,
            seed=settings.seed,
            html_report=False,
            rollout={"engine": "transformers", "num_workers": settings.workers, "num_cpus": 0.5},
            reward={"num_workers": 2},
            runtime={
                "num_cpus": 4,
                "health_interval_s": 0.5,
                "health_deadline_s": settings.deadline_s,
                "max_learner_restarts": 100,
            },
        )
        faults = Faults(settings, run)
        pipeline = trl_ray.AsyncGRPOPipeline(reward_funcs=letters, args=config, train_dataset=prompts())
        pipeline.train()
        return [gap_after(struck, run) for struck in faults.struck]


def gap_after(struck: float, run: Path) -> float:
    """The longest time without a step that ends after the fault, up to the end of the recovery."""
    told = read_lines(run / "events.jsonl")
    back = [event["time"] for event in told if event["kind"] == "actor_restarted" and event["time"] > struck]
    end = max(struck + 10.0, back[0] + 2.0 if back else 0.0)
    steps = sorted({struck, *(line["time"] for line in read_lines(run / "metrics.jsonl"))})
    return max((later - sooner for sooner, later in pairwise(steps) if struck <= sooner < end), default=0.0)


def spawn(settings: Settings) -> list[float]:
    """The same in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            found: list[float] = json.loads(line.removeprefix(MARK))
            return found
    raise SystemExit(f"{settings} measured nothing:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def report(found: dict[tuple[str, str], list[float]], deadline_s: float) -> bool:
    """Print the table; tell whether every goal is met."""
    print(f"{'role':10} {'fault':6} {'n':>3} {'p50':>7} {'max':>7}   goal")
    met = True
    for (role, fault), seconds in found.items():
        beyond = [each - (deadline_s if fault == "hang" else 0.0) for each in seconds]
        middle, most = statistics.median(beyond), max(beyond)
        goal = GOALS[fault] if role != "learner" else None
        is_met = goal is None or (middle <= goal[0] and most <= goal[1])
        met &= is_met
        told = "-" if goal is None else f"p50 {goal[0]:g}, max {goal[1]:g}{'' if is_met else '   MISSED'}"
        print(f"{role:10} {fault:6} {len(beyond):3} {middle:7.2f} {most:7.2f}   {told}")
    return met


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roles", nargs="+", default=["rollout", "reward", "queue"], choices=ROLES)
    parser.add_argument("--faults", nargs="+", default=["kill"], choices=list(FAULTS))
    parser.add_argument("--seeds", type=int, default=2, help="runs of each role and fault")
    parser.add_argument("--count", type=int, default=4, help="faults in one run")
    parser.add_argument("--every", type=int, default=40, help="steps between two faults")
    parser.add_argument("--workers", type=int, default=2, help="rollout workers")
    parser.add_argument("--deadline", type=float, default=6.0, help="runtime.health_deadline_s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(MARK + json.dumps(measure(Settings(**json.loads(given.child)))))
        return
    found: dict[tuple[str, str], list[float]] = {}
    for role in given.roles:
        for fault in given.faults:
            settings = Settings(
                role=role,
                fault=fault,
                seed=0,
                count=given.count,
                every=given.every,
                deadline_s=given.deadline,
                workers=given.workers,
            )
            seconds = [spawn(dataclasses.replace(settings, seed=seed)) for seed in range(given.seeds)]
            found[role, fault] = [each for of_run in seconds for each in of_run]
    met = report(found, given.deadline)
    print(f"recovery_goals_met: {int(met)}")


if __name__ == "__main__":
    main()
