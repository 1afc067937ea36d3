"""The queue and its disk: calls are answered while the journal is compacted, or waits for it."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from rollout_queues import (
    fill,
    finished,
    make,
    prompts,
    run,
    with_first_step_taken,
    with_first_step_trained,
)
from trl_ray.buffer.compaction import Compaction
from trl_ray.buffer.entry import Outcome
from trl_ray.errors import JournalError
from trl_ray.types import EventKind


def test_calls_are_answered_while_the_journal_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    true_run = Compaction.run

    def slow_run(self: Compaction) -> None:
        begun.set()
        assert go_on.wait(20)
        true_run(self)

    monkeypatch.setattr(Compaction, "run", slow_run)

    async def scene() -> None:
        queue = make(tmp_path)
        for ticket in (await fill(queue))[:3]:
            await queue.commit(group=finished(ticket))
        await queue.take(n=2, step=1, wait_s=0)
        await queue.trained(step=1)
        await queue.checkpoint(step=0, saved=1)
        await asyncio.to_thread(begun.wait, 20)
        before = queue.health().progress
        await queue.release(step=1, wait_s=0, step_s=1)
        await queue.admit(prompts=prompts(4, 2), version=1)
        tickets = await queue.lease(worker="rollout-1", capacity=9, wait_s=0)
        assert [ticket.group_id for ticket in tickets] == [4, 5]
        assert await queue.commit(group=finished(tickets[0], version=1)) is Outcome.APPLIED
        assert queue.health().progress > before
        go_on.set()
        await queue.compacted()
        await queue.commit(group=finished(tickets[1], version=1))
        snapshot = await queue.snapshot()
        queue.close()
        queue = make(tmp_path)
        assert await queue.snapshot() == snapshot
        await queue.check()
        [record, *_] = queue._store.journal.records()
        assert record.head["op"] == "base"
        queue.close()

    run(scene())


def test_a_journal_that_cannot_be_compacted_stays_long_and_the_queue_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    async def scene() -> None:
        queue = await with_first_step_trained(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            await queue.checkpoint(step=1)
            await queue.compacted()
        [warning] = [e for e in (await queue.drain()).events if e.kind is EventKind.WARNING]
        assert "No space left" in str(warning.detail) and queue.health().problem is None
        assert len(await queue.take(n=2, step=2, wait_s=0)) == 2
        assert not (tmp_path / "ledger.journal.new").exists()
        queue.close()

    run(scene())


def test_a_finished_step_waits_for_the_disk_beside_other_calls_and_a_repeated_call_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_sync, synced = threading.Event(), []

    def slow_sync(file: int) -> None:
        assert may_sync.wait(20)
        synced.append(file)

    async def scene() -> None:
        queue = await with_first_step_taken(tmp_path)
        monkeypatch.setattr(os, "fdatasync", slow_sync)
        both = [asyncio.create_task(queue.trained(step=1)) for _ in range(2)]
        assert len(await queue.take(n=2, step=2, wait_s=0)) == 2
        assert not any(task.done() for task in both)
        may_sync.set()
        assert await asyncio.gather(*both) == [Outcome.APPLIED, Outcome.REPEATED]
        assert len(synced) == 2
        queue.close()

    run(scene())


def test_a_disk_that_fails_is_the_queues_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    async def scene() -> None:
        queue = await with_first_step_taken(tmp_path)
        monkeypatch.setattr(os, "fdatasync", broken)
        with pytest.raises(JournalError, match="must reach its disk"):
            await queue.trained(step=1)
        assert "must reach its disk" in str(queue.health().problem)
        queue.close()

    run(scene())
