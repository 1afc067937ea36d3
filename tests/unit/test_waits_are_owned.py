"""Nobody waits outside the one primitive, but for those on the list; and the check would see who does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAKED = frozenset(
    {
        "asyncio.sleep",
        "asyncio.timeout",
        "asyncio.timeout_at",
        "asyncio.wait",
        "asyncio.wait_for",
        "ray.get",
        "ray.wait",
        "time.sleep",
    }
)
LOOKS_LIKE_ONE = re.compile(r"\b(sleep|wait|wait_for|timeout|timeout_at|remote)\b|ray\.get")
HOME = "trl_ray/runtime/waits.py"
REVIEWED = {
    "trl_ray/runtime/cluster.py": "ray.wait with timeout=0 looks and does not wait",
    "trl_ray/runtime/cluster_watch.py": "the pulse of the watch over Ray itself; connections with a deadline",
    # Waits of a process that serves: they end with a deadline, and whoever asked waits through the primitive.
    "trl_ray/actors/calling.py": "the pause between tries, of which each has a deadline",
    "trl_ray/actors/pending_scores.py": "a long poll with a deadline",
    "trl_ray/actors/reward_model_worker.py": "a pass with a deadline",
    "trl_ray/actors/rollout_queue.py": "long polls with a deadline; the lock of a killed predecessor",
    "trl_ray/actors/rollout_worker.py": "room in the engine, with a deadline",
    "trl_ray/actors/teacher.py": "a pass with a deadline",
    "trl_ray/actors/teacher_scoring.py": "a request with a deadline",
    "trl_ray/actors/teaching.py": "the pause between tries, which are counted",
    "trl_ray/engines/teacher_service.py": "connections, each with deadlines",
    "trl_ray/engines/teacher_transport.py": "the pause between tries, which are counted",
    "trl_ray/cli/teacher_serve.py": "a server's own life",
    "trl_ray/observe/run_lock.py": "another run's sign of life, before anything is begun",
    "trl_ray/rewards/lone_answers.py": "the end of a child, within half a second",
    # The driver's.
    "trl_ray/pipelines/callbacks/hooks.py": "a user's callback, which may take its time, and is told of",
    "trl_ray/pipelines/run/signals.py": "ends other waits when the run is to end",
    "trl_ray/pipelines/run/step_loop.py": "the last checkpoint, in what time a signal leaves",
    "trl_ray/pipelines/run/stopping.py": "the end of the actors, in what time a signal leaves",
}


def naked_waits(source: str) -> Iterator[tuple[str, int]]:
    """Calls that wait, and awaits of what Ray's `remote` gives, with their lines."""
    if not LOOKS_LIKE_ONE.search(source):
        return
    tree = ast.parse(source)
    renamed: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in {"asyncio", "time", "ray"}:
            renamed |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            renamed |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Await) and isinstance(node.value, ast.Call) and ".remote(" in ast.unparse(node.value):
            yield "await of a reference", node.lineno
        found = ""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = f"{renamed.get(node.value.id, node.value.id)}.{node.attr}"
        elif isinstance(node, ast.Name):
            found = renamed.get(node.id, "")
        if found in NAKED:
            yield found, node.lineno


def package_files() -> list[tuple[str, str]]:
    paths = sorted((ROOT / "trl_ray").rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def test_every_wait_goes_through_the_one_primitive_or_is_on_the_list() -> None:
    breaches = [
        f"{name}:{line} waits by {what}; go through trl_ray.runtime.waits, which knows owner, deadline and who is asked"
        for name, source in package_files()
        if name != HOME and name not in REVIEWED
        for what, line in naked_waits(source)
    ]
    assert breaches == []


def test_the_list_names_only_who_still_waits_by_themselves() -> None:
    sources = dict(package_files())
    assert [name for name in REVIEWED if not list(naked_waits(sources.get(name, "")))] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("async def f():\n    await asyncio.wait_for(g(), 3)", "asyncio.wait_for"),
        ("import asyncio as a\nasync def f():\n    await a.sleep(3)", "asyncio.sleep"),
        ("from asyncio import wait\nasync def f(t):\n    await wait(t)", "asyncio.wait"),
        ("from time import sleep as nap\ndef f():\n    nap(3)", "time.sleep"),
        ("def f(ref):\n    return ray.get(ref)", "ray.get"),
        ("async def f(actor):\n    return await actor.step.remote()", "await of a reference"),
        ("def f(retry):\n    retry(sleep=asyncio.sleep)", "asyncio.sleep"),
    ],
)
def test_a_naked_wait_is_seen(source: str, found: str) -> None:
    assert [what for what, _ in naked_waits(source)] == [found]


def test_waits_of_the_primitive_are_none() -> None:
    assert list(naked_waits("async def f(work):\n    return await waits.answer(work, on='x', deadline_s=3)")) == []
