"""Several groups in one sandbox: async functions are awaited together, who is to blame fails, the others begin anew."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from trl_ray.rewards.reward_registry import make_spec
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.scoring import GroupInput
from trl_ray.types import RewardErrorKind, ScoredGroup

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills by process group")


@contextmanager
def sandbox(*functions: Any, timeout_s: float = 20.0) -> Iterator[Sandbox]:
    box = Sandbox(functions=[make_spec(function) for function in functions], weights=None, timeout_s=timeout_s)
    assert box.start() is None
    try:
        yield box
    finally:
        box.close()


def submit(box: Sandbox, text: str) -> Future[ScoredGroup]:
    group = {"prompt": "q", "completions": [text], "completion_ids": [[1]], "columns": {}}
    return box.submit(GroupInput(json.dumps(group)), size=1)


def outcome(future: Future[ScoredGroup]) -> Any:
    """The reward, or the kind of the failure."""
    scored = future.result(timeout=30)
    return scored.rewards[0].total if scored.failure is None else scored.failure.kind


async def judge(completions: list[str], **columns: Any) -> list[float]:
    """Answers after a while; does what the completion says."""
    import asyncio
    import os

    word, _, wait = completions[0].partition(" ")
    await asyncio.sleep(float(wait or 0.3))
    if word == "hang":
        await asyncio.sleep(3600)
    if word == "exit":
        os._exit(7)
    if word == "sys.exit":
        raise SystemExit(3)
    return [float(len(word))]


def busy(completions: list[str], **columns: Any) -> list[float]:
    """Holds the process for as long as the completion says."""
    import time

    word, _, wait = completions[0].partition(" ")
    if word == "busy":
        time.sleep(float(wait))
    return [0.0]


def test_sixteen_groups_are_awaited_together() -> None:
    with sandbox(judge) as box:
        begin = time.monotonic()
        found = [outcome(future) for future in [submit(box, "abc") for _ in range(16)]]
        assert found == [3.0] * 16
        assert time.monotonic() - begin < 1.5  # one after the other: 4.8


def test_functions_that_are_not_async_are_called_one_group_after_the_other() -> None:
    with sandbox(busy) as box:
        begin = time.monotonic()
        assert [outcome(future) for future in [submit(box, "busy 0.2") for _ in range(3)]] == [0.0] * 3
        assert time.monotonic() - begin >= 0.6


def test_a_group_that_is_answered_early_does_not_wait_for_the_others() -> None:
    with sandbox(judge) as box:
        slow, fast = submit(box, "abc 0.8"), submit(box, "ab 0.05")
        assert outcome(fast) == 2.0 and not slow.done()
        assert outcome(slow) == 3.0


def test_of_several_the_one_that_hangs_fails_and_the_others_begin_anew() -> None:
    with sandbox(judge, timeout_s=1.0) as box:
        pid = box.pid
        hangs, late, fine = submit(box, "hang 0"), submit(box, "abc 0.8"), submit(box, "ab 0.1")
        assert outcome(hangs) is RewardErrorKind.TIMEOUT
        assert (outcome(late), outcome(fine)) == (3.0, 2.0)
        assert box.pid != pid


def test_the_time_in_which_another_groups_functions_hold_the_process_is_nobodys_delay() -> None:
    with sandbox(busy, judge, timeout_s=1.6) as box:
        first = submit(box, "abc 1.2")
        time.sleep(0.1)
        others = [submit(box, "busy 0.6") for _ in range(3)]
        assert outcome(first) == 3.0
        assert [outcome(each) for each in others] == [4.0, 4.0, 4.0]


def test_a_function_that_holds_the_process_too_long_fails_its_own_group_alone() -> None:
    with sandbox(busy, judge, timeout_s=1.0) as box:
        first = submit(box, "abc 0.5")
        time.sleep(0.1)
        assert outcome(submit(box, "busy 5")) is RewardErrorKind.TIMEOUT
        assert outcome(first) == 3.0


@pytest.mark.parametrize("word", ["exit", "sys.exit"])
def test_where_one_of_several_ends_the_process_that_one_fails(word: str) -> None:
    with sandbox(judge) as box:
        ends, others = submit(box, f"{word} 0.3"), [submit(box, f"{'a' * n} 0.6") for n in (1, 2, 3)]
        assert outcome(ends) is RewardErrorKind.CRASH
        assert [outcome(other) for other in others] == [1.0, 2.0, 3.0]


def test_a_group_that_nobody_waits_for_any_more_is_not_begun() -> None:
    with sandbox(busy) as box:
        first, second, third = submit(box, "busy 0.4"), submit(box, "busy 5"), submit(box, "x")
        assert second.cancel()
        assert (outcome(first), outcome(third)) == (0.0, 0.0)


def test_close_answers_all_that_are_under_way_or_wait() -> None:
    with sandbox(busy, judge) as box:
        futures = [submit(box, "hang 0"), submit(box, "busy 5"), submit(box, "x")]
        time.sleep(0.3)
        box.close()
        assert [outcome(future) for future in futures] == [RewardErrorKind.CRASH] * 3
