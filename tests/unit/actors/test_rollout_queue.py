"""The queue as its callers meet it: long-polls, lost answers, restarts, events."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rollout_queues import (
    Clock,
    fill,
    finished,
    kinds,
    make,
    prompts,
    run,
    with_first_step_taken,
    with_first_step_trained,
)
from trl_ray.buffer.entry import Outcome, State
from trl_ray.buffer.journal import Journal
from trl_ray.errors import CheckpointError, DataError, JournalError
from trl_ray.types import DropReason, EventKind, FinishReason
from trl_ray.wire.worker_news import GroupFailed, GroupGenerated, finished_group


def test_a_group_goes_from_prompt_to_batch(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        assert await queue.wait_for_slots(wait_s=0) == 4
        tickets = await fill(queue)
        assert [t.group_id for t in tickets] == [0, 1, 2, 3]
        assert (tickets[2].prompt.prompt_id, tickets[2].prompt.columns) == ("0:2", {"answer": 2})
        assert await queue.wait_for_slots(wait_s=0) == 0
        assert await queue.generated(group_id=1, attempt=0) is Outcome.APPLIED
        for ticket in reversed(tickets):
            assert await queue.commit(group=finished(ticket)) is Outcome.APPLIED
        groups = await queue.take(n=2, step=1, wait_s=0)
        assert [g.ticket.group_id for g in groups] == [0, 1]
        assert groups[1].rewards[1].total == 1.0
        await queue.trained(step=1)
        assert await queue.wait_for_slots(wait_s=0) == 0
        await queue.release(step=1, wait_s=0.0, step_s=1.0)
        assert await queue.wait_for_slots(wait_s=0) == 2
        await queue.check()
        snapshot = await queue.finish()
        assert (snapshot.issued, snapshot.trained, snapshot.dropped) == (4, 2, {"end_of_run": 2})
        assert snapshot.to_json()["balanced"] is True

    run(scenario())


def test_long_polls_answer_with_nothing_at_their_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        began = time.monotonic()
        assert await queue.lease(worker="w", capacity=1, wait_s=0.05) == []
        assert await queue.take(n=2, step=1, wait_s=0.05) == []
        await fill(queue)
        assert await queue.wait_for_slots(wait_s=0.05) == 0
        assert 0.15 <= time.monotonic() - began < 5

    run(scenario())


def test_long_polls_wake_as_soon_as_there_is_something(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        worker = asyncio.create_task(queue.lease(worker="w", capacity=4, wait_s=30))
        learner = asyncio.create_task(queue.take(n=2, step=1, wait_s=30))
        await asyncio.sleep(0)
        await queue.admit(prompts=prompts(0, 4), version=0)
        tickets = await asyncio.wait_for(worker, 5)
        source = asyncio.create_task(queue.wait_for_slots(wait_s=30))
        for ticket in tickets[:2]:
            await queue.commit(group=finished(ticket))
        assert len(await asyncio.wait_for(learner, 5)) == 2
        await queue.fail(group_id=2, attempt=0, detail="scorer refused", drop=DropReason.REWARD_FAILED)
        assert await asyncio.wait_for(source, 5) == 1

    run(scenario())


@pytest.mark.parametrize("reason", [DropReason.REWARD_FAILED, DropReason.TEACHER_FAILED])
def test_who_waits_for_groups_is_told_of_a_failed_reward_or_teacher_at_once(tmp_path: Path, reason: DropReason) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        await fill(queue)
        for group_id in range(2):
            learner = asyncio.create_task(queue.take(n=2, step=1, wait_s=3600))
            await asyncio.sleep(0)
            await queue.generated(group_id=2, attempt=0)
            assert not learner.done()
            await queue.fail(group_id=group_id, attempt=0, detail="no answer", exhausted=reason)
            assert await asyncio.wait_for(learner, 5) == []

    run(scenario())


def test_prompts_admitted_together_are_leased_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        worker = asyncio.create_task(queue.lease(worker="w", capacity=3, wait_s=30))
        await asyncio.sleep(0)
        await queue.admit(prompts=prompts(0, 3), version=0)
        assert len(await worker) == 3

    run(scenario())


def test_after_a_kill_leases_groups_and_steps_are_as_they_were(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        queue = make(tmp_path, clock=clock)
        tickets = await fill(queue)
        for ticket in tickets[:2]:
            await queue.commit(group=finished(ticket))
        first = await queue.take(n=2, step=1, wait_s=0)
        queue._store.journal.close()  # what the kernel does to a killed process

        clock.now += 500
        queue = make(tmp_path, clock=clock)
        again = await queue.take(n=2, step=1, wait_s=0)
        assert [g.ticket.group_id for g in again] == [g.ticket.group_id for g in first]
        assert await queue.admit(prompts=prompts(0, 4), version=0) == [0, 1, 2, 3]
        assert await queue.next_ordinal() == 4
        assert await queue.commit(group=finished(tickets[2])) is Outcome.APPLIED
        assert await queue.commit(group=finished(tickets[2])) is Outcome.REPEATED
        assert await queue.lease(worker="other", capacity=4, wait_s=0) == []
        await queue.check()

    run(scenario())


def test_a_torn_record_is_cut_off_and_reported(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        await fill(queue)
        queue.close(reason="test")
        with (tmp_path / "ledger.journal").open("ab") as file:
            file.write(b"0000")
        queue = make(tmp_path)
        [event] = (await queue.drain()).events
        assert (event.kind, event.detail["truncated_bytes"]) == (EventKind.WARNING, 4)

    run(scenario())


def test_a_resume_trains_again_what_came_after_the_checkpoint_and_happens_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = await with_first_step_trained(tmp_path)
        await queue.checkpoint(step=1)
        await queue.take(n=2, step=2, wait_s=0)
        await queue.trained(step=2)
        queue.close(reason="test")
        queue = make(tmp_path, incarnation="job-2", resume_from_step=1)
        assert (await queue.snapshot()).trained == 2
        assert [g.ticket.group_id for g in await queue.take(n=2, step=2, wait_s=0)] == [2, 3]
        await queue.trained(step=2)
        queue.close(reason="test")
        queue = make(tmp_path, incarnation="job-2", resume_from_step=1)
        assert (await queue.snapshot()).trained == 4
        queue.close(reason="test")
        with pytest.raises(JournalError, match="another run"):
            make(tmp_path, incarnation="job-3")

    run(scenario())


def test_a_queue_that_went_on_from_a_copy_restarts_without_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = await with_first_step_trained(tmp_path)
        copy = tmp_path / "ledger_copy.json"
        copy.write_bytes(await queue.ledger_copy(step=1))
        queue.close(reason="test")
        (tmp_path / "new").mkdir()
        given: dict[str, Any] = {"incarnation": "job-2", "resume_from_step": 1, "ledger_copy": str(copy)}
        make(tmp_path / "new", **given).close(reason="test")
        for change in (lambda: copy.write_bytes(b"{"), copy.unlink):  # damaged, then deleted with its checkpoint
            change()
            queue = make(tmp_path / "new", **given)
            await queue.check()
            assert ((await queue.snapshot()).trained, (await queue.snapshot()).step) == (2, 1)
            queue.close(reason="test")
        with pytest.raises(CheckpointError, match=r"ledger_copy\.json must be readable"):
            make(tmp_path / "other", **given)

    run(scenario())


def test_without_staleness_a_resume_generates_everything_after_the_checkpoint_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path, max_staleness=0)
        for ticket in await fill(queue, 2):
            await queue.commit(group=finished(ticket))
        queue.close(reason="test")
        queue = make(tmp_path, max_staleness=0, incarnation="job-2", resume_from_step=0)
        tickets = await queue.lease(worker="w", capacity=9, wait_s=0)
        assert [(t.group_id, t.attempt) for t in tickets] == [(0, 1), (1, 1)]

    run(scenario())


def test_a_learner_that_was_lost_takes_the_ledger_back_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        late, *_ = await fill(queue)
        assert await queue.restore(step=0, mark="learner lost at 12:00")
        assert not await queue.restore(step=0, mark="learner lost at 12:00")
        assert await queue.commit(group=finished(late)) is Outcome.FENCED
        assert (await queue.snapshot()).fenced == 1

    run(scenario())


@pytest.mark.parametrize(
    ("totals", "reason", "expected"),
    [
        ((1.0, 1.0), FinishReason.STOP, {"zero_variance": 1}),
        ((1.0, None), FinishReason.STOP, {"zero_variance": 1}),
        ((0.0, 1.0), FinishReason.LENGTH, {"truncated": 1}),
        ((0.0, 1.0), FinishReason.STOP, {}),
        ((0.0, 1.0, None), FinishReason.STOP, {}),
    ],
)
def test_a_group_with_nothing_to_learn_is_dropped_with_its_reason_and_frees_its_slot(
    tmp_path: Path, totals: tuple[float | None, ...], reason: FinishReason, expected: dict[str, int]
) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        ticket, *_ = await fill(queue)
        group = finished(ticket, totals=totals, reason=reason)
        assert await queue.commit(group=group) is Outcome.APPLIED
        assert await queue.commit(group=group) is Outcome.REPEATED
        assert (await queue.snapshot()).dropped == expected
        assert await queue.wait_for_slots(wait_s=0) == len(expected)

    run(scenario())


def test_such_groups_are_kept_when_the_run_asks_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path, drop_zero_variance=False, mask_truncated=False)
        ticket, *_ = await fill(queue)
        await queue.commit(group=finished(ticket, totals=(1.0, 1.0), reason=FinishReason.LENGTH))
        assert (await queue.snapshot()).live["ready"] == 1

    run(scenario())


def test_expired_leases_lost_workers_and_failures_are_issued_again_and_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        queue = make(tmp_path, clock=clock)
        await fill(queue)
        clock.now += 6
        assert await queue.renew(worker="rollout-0", keys=[(1, 0), (2, 0), (3, 0)]) == 3
        clock.now += 6
        assert await queue.expire() == [0]
        assert await kinds(queue) == [EventKind.LEASE_EXPIRED, EventKind.GROUP_REISSUED]
        await queue.fail(group_id=1, attempt=0, detail="engine hung")
        assert await queue.lose_worker(worker="rollout-0") == [2, 3]
        events = (await queue.drain()).events
        assert [(e.detail["group_id"], e.detail["because"]) for e in events] == [
            (1, "engine hung"),
            (2, "worker lost"),
            (3, "worker lost"),
        ]
        assert len(await queue.lease(worker="rollout-1", capacity=9, wait_s=0)) == 4

    run(scenario())


def test_a_lease_asks_for_expired_groups_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        queue = make(tmp_path, clock=clock)
        await fill(queue)
        clock.now += 11
        tickets = await queue.lease(worker="rollout-1", capacity=2, wait_s=0)
        assert [(t.group_id, t.attempt) for t in tickets] == [(0, 1), (1, 1)]

    run(scenario())


def test_a_lease_whose_answer_was_lost_is_given_out_again_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        await fill(queue)
        tickets = await queue.lease(worker="rollout-0", capacity=4, wait_s=0, holding=[(0, 0), (2, 0)])
        assert [(t.group_id, t.attempt) for t in tickets] == [(1, 1), (3, 1)]
        assert await queue.lease(worker="rollout-1", capacity=4, wait_s=0, holding=[]) == []
        await queue.check()

    run(scenario())


def test_a_group_whose_reward_keeps_failing_is_dropped_for_that_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path, max_attempts=2)
        await fill(queue, 1)
        failure = {"detail": "reward f timed out", "exhausted": DropReason.REWARD_FAILED}
        await queue.fail(group_id=0, attempt=0, **failure)
        await queue.lease(worker="w", capacity=1, wait_s=0)
        await queue.fail(group_id=0, attempt=1, **failure)
        assert (await queue.snapshot()).dropped == {"reward_failed": 1}
        dropped = (await queue.drain()).events[-1]
        assert dropped.kind is EventKind.GROUP_DROPPED
        assert (dropped.detail["reason"], dropped.detail["because"]) == ("reward_failed", "reward f timed out")

    run(scenario())


def test_a_skipped_step_drops_its_groups_and_the_next_step_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = await with_first_step_taken(tmp_path)
        await queue.skip(step=1)
        assert [g.ticket.group_id for g in await queue.take(n=2, step=2, wait_s=0)] == [2, 3]
        assert (await queue.snapshot()).dropped == {"numerics": 2}

    run(scenario())


def test_a_group_that_contradicts_itself_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        ticket, *_ = await fill(queue)
        with pytest.raises(DataError, match="holds no"):
            await queue.commit(group=finished(ticket, totals=()))
        assert (await queue.snapshot()).live["leased"] == 4

    run(scenario())


def test_whoever_waits_can_say_for_whom(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        queue = make(tmp_path, clock=clock)
        await fill(queue, 1)
        clock.now += 3
        [waiting] = await queue.waiting_on(n=2)
        assert (waiting.group_id, waiting.state, waiting.worker) == (0, State.LEASED, "rollout-0")
        assert await queue.describe_wait(n=2) == (
            "waiting for group 0 (attempt 0) leased by rollout-0 for 3.0 s; "
            "1 groups that were never admitted (3 slots are free)"
        )

    run(scenario())


def test_the_controller_is_fed_and_its_moves_are_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path, groups_per_step=1, max_staleness=2, adaptive_slots=True)
        for step in range(1, 5):
            for ticket in await fill(queue, await queue.wait_for_slots(wait_s=0)):
                await queue.commit(group=finished(ticket, version=step - 1))
            await queue.take(n=1, step=step, wait_s=0)
            await queue.trained(step=step)
            await queue.release(step=step, wait_s=0.0, step_s=1.0)
        assert await queue.slots() == 2
        [event] = (await queue.drain()).events
        assert (event.kind, event.detail) == (EventKind.SLOTS, {"before": 3, "after": 2})

    run(scenario())


def test_closing_ends_the_long_polls_and_gives_the_journal_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        poll = asyncio.create_task(queue.lease(worker="w", capacity=1, wait_s=30))
        await asyncio.sleep(0)
        queue.close(reason="the run is over")
        queue.close(reason="again")
        assert await asyncio.wait_for(poll, 5) == []
        with pytest.raises(JournalError, match="closed"):
            await queue.admit(prompts=prompts(0, 1), version=0)

    run(scenario())


def test_a_cancelled_long_poll_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        poll = asyncio.create_task(queue.take(n=2, step=1, wait_s=30))
        await asyncio.sleep(0)
        poll.cancel()
        with pytest.raises(asyncio.CancelledError):
            await poll
        assert not queue._waiters

    run(scenario())


def test_a_restart_waits_for_its_dying_predecessor_to_let_go(tmp_path: Path) -> None:
    predecessor = Journal(tmp_path / "ledger.journal")
    release = threading.Timer(0.2, predecessor.close)
    release.start()
    queue = make(tmp_path)
    release.join()
    queue.close(reason="test")


def test_health_counts_progress_and_names_a_journal_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        before = queue.health()
        await fill(queue)
        after = queue.health()
        assert after.progress > before.progress
        assert after.problem is None

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.write", full)
            with pytest.raises(JournalError):
                await queue.generated(group_id=0, attempt=0)
        assert "No space left" in str(queue.health().problem)

    run(scenario())


def test_a_long_poll_that_outlives_its_worker_leases_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path)
        poll = asyncio.create_task(queue.lease(worker="rollout-0", capacity=4, wait_s=0.3))
        await asyncio.sleep(0)
        await queue.lose_worker(worker="rollout-0")
        await queue.admit(prompts=prompts(0, 1), version=0)
        assert await poll == []
        tickets = await queue.lease(worker="rollout-0+1", capacity=4, wait_s=0)
        assert [ticket.group_id for ticket in tickets] == [0]
        queue.close()

    run(scenario())


def test_every_attempt_that_a_teacher_failed_is_an_event_and_the_last_one_a_drop(tmp_path: Path) -> None:
    async def scenario() -> None:
        queue = make(tmp_path, max_attempts=2)
        await fill(queue)
        failed = {"detail": "teacher t (error): HTTP 500", "exhausted": DropReason.TEACHER_FAILED}
        await queue.fail(group_id=0, attempt=0, **failed)
        [event] = [each for each in (await queue.drain()).events if each.kind is EventKind.TEACHER_FAILED]
        assert event.detail == {"group_id": 0, "attempt": 0, "detail": "teacher t (error): HTTP 500"}
        # The same failure told twice, and one of an attempt that is over, are nothing new.
        await queue.fail(group_id=0, attempt=0, **failed)
        assert EventKind.TEACHER_FAILED not in await kinds(queue)
        await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
        await queue.fail(group_id=0, attempt=1, **failed)
        assert await kinds(queue) == [EventKind.TEACHER_FAILED, EventKind.GROUP_DROPPED]
        assert (await queue.snapshot()).dropped == {"teacher_failed": 1}
        await queue.fail(group_id=1, attempt=0, detail="judge", exhausted=DropReason.REWARD_FAILED)
        assert EventKind.TEACHER_FAILED not in await kinds(queue)

    run(scenario())


def test_a_workers_news_come_in_one_call_and_each_has_its_outcome(tmp_path: Path) -> None:
    async def scene() -> None:
        queue = make(tmp_path)
        [a, b, c, d] = await fill(queue)
        told = [
            GroupGenerated(group_id=a.group_id, attempt=0),
            finished_group(finished(a)),
            finished_group(finished(b, totals=(1.0, 1.0))),
            finished_group(finished(c, reason=FinishReason.LENGTH)),
            GroupFailed(group_id=d.group_id, attempt=0, detail="engine died"),
            GroupFailed(group_id=d.group_id, attempt=5, detail="of a lost timeline"),
        ]
        assert await queue.report(news=told) == [Outcome.APPLIED] * 5 + [Outcome.FENCED]
        assert await queue.report(news=told) == [Outcome.REPEATED] * 5 + [Outcome.FENCED]
        snapshot = await queue.snapshot()
        assert (snapshot.dropped, snapshot.live["ready"]) == ({"zero_variance": 1, "truncated": 1}, 1)
        assert (await queue.lease(worker="rollout-1", capacity=9, wait_s=0))[0].attempt == 1
        queue.close()

    run(scene())


def test_a_worker_that_has_not_pulled_what_was_released_gets_nothing_until_it_tells_of_its_pull(tmp_path: Path) -> None:
    async def scene() -> None:
        queue = make(tmp_path, groups_per_step=1)
        [first, *_] = await fill(queue, 2)
        await queue.commit(group=finished(first))
        await queue.take(n=1, step=1, wait_s=0)
        await queue.trained(step=1)
        await queue.lose_worker(worker="rollout-0")
        behind = {"worker": "rollout-1", "capacity": 9, "version": 0}
        assert [ticket.group_id for ticket in await queue.lease(**behind, wait_s=0)] == [1]
        await queue.release(step=1, wait_s=0, step_s=1)
        await queue.admit(prompts=prompts(2, 1), version=1)
        holding = [(1, 1)]
        assert await queue.lease(**behind, wait_s=0, holding=holding) == []
        waiting = asyncio.create_task(queue.lease(**behind, wait_s=20, holding=holding))
        await asyncio.sleep(0)
        await queue.pulled(worker="rollout-1", version=1)
        assert [ticket.group_id for ticket in await waiting] == [2]
        before = await queue.snapshot()
        queue.close()
        queue = make(tmp_path, groups_per_step=1)
        assert await queue.snapshot() == before
        queue.close()

    run(scene())
