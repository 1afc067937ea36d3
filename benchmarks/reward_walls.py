"""Measures what a group's rewards cost behind walls: milliseconds per group of 16 completions.

    run          one process for all groups, no walls (how all functions ran before, and how the user's own run)
    run_walled   one process for all groups, behind walls (functions of this package that evaluate nothing, and answers
                 in which nothing could be called)
    group        a new process for each group, behind walls (functions that evaluate answers, for all other groups)

Groups are scored one after the other, as a reward worker does, and answers are right ones; of the times the median
counts. CPU time is that of all processes, without their start: it depends less on what else the machine does. Answers
that call functions (`puzzle24_calls`) get a process each. The last line, `ratio`, is the part of one core that five
groups of arithmetic problems a second take as a reward worker scores them (`run_walled`).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from trl_ray.rewards.reward_registry import make_spec
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.sandbox_messages import Lifetime
from trl_ray.rewards.scoring import GroupInput

GROUP_SIZE = 16
GROUPS_PER_SECOND = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A reward function and one group for it."""

    name: str
    function: str
    completion: str
    columns: Mapping[str, Any]


def cases() -> list[Case]:
    """Plain text, an answer that is compared, one that is evaluated, one that calls a function."""
    found = [Case(name="exact_answer", function="exact_answer", completion="42", columns={"answer": "42"})]
    for name, task, before in (
        ("chain_sum", "chain_sum", ""),
        ("puzzle24", "puzzle24", ""),
        ("puzzle24_calls", "puzzle24", "Mul(1, 1) * "),
    ):
        row = reasoning_gym.create_dataset(task, size=1, seed=3)[0]
        columns = {"task": task, "answer": row["answer"], "metadata": row["metadata"]}
        found.append(Case(name=name, function="reasoning_gym", completion=before + row["answer"], columns=columns))
    return found


def score_groups(case: Case, lifetime: Lifetime, groups: int) -> tuple[float, float]:
    """Median time of a group in milliseconds, the first two left out, and CPU seconds of all."""
    group = {
        "prompt": "q",
        "completions": [case.completion] * GROUP_SIZE,
        "completion_ids": [[1]] * GROUP_SIZE,
        "columns": dict(case.columns),
    }
    before = cpu_seconds()
    box = Sandbox(functions=[make_spec(case.function)], weights=None, timeout_s=60.0, lifetime=lifetime)
    times = []
    try:
        box.start()
        for _ in range(groups + 2):
            begin = time.perf_counter()
            scored = box.score(GroupInput(json.dumps(group)), size=GROUP_SIZE)
            times.append(time.perf_counter() - begin)
            if scored.failure is not None:
                raise SystemExit(f"{case.name} must be scored, got: {scored.failure.detail}")
    finally:
        box.close()
    return 1000 * statistics.median(times[2:] or [0.0]), cpu_seconds() - before


def cpu_seconds() -> float:
    """Of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=50, help="measured groups of each case")
    groups = parser.parse_args().groups
    found = {}
    for case in cases():
        for lifetime in Lifetime:
            _, start = score_groups(case, lifetime, 0)
            wall_ms, cpu = score_groups(case, lifetime, groups)
            found[case.name, lifetime] = max(0.0, cpu - start) / groups
            print(f"{case.name}_{lifetime.value}_ms: {wall_ms:.2f}")
            print(f"{case.name}_{lifetime.value}_cpu_ms: {1000 * found[case.name, lifetime]:.2f}", flush=True)
    print(f"ratio: {found['chain_sum', Lifetime.RUN_WALLED] * GROUPS_PER_SECOND:.3f}")


if __name__ == "__main__":
    main()
