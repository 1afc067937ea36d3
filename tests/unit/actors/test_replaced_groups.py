"""Groups that the queue has drawn again, drops or replaces, and how it counts them."""

import time
from pathlib import Path
from typing import Any

from rollout_queues import fill, finished, make, prompts, run
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.types import (
    DropReason,
    EventKind,
)


async def dropped(queue: RolloutQueue) -> list[dict[str, Any]]:
    return [dict(event.detail) for event in (await queue.drain()).events if event.kind is EventKind.GROUP_DROPPED]


def test_groups_that_lose_their_rewards_are_counted_until_one_is_ready(tmp_path: Path) -> None:
    async def play() -> list[int]:
        queue = make(tmp_path, max_attempts=2, groups_per_step=8)
        tickets, counts = await fill(queue, 6), list[int]()
        for ticket in tickets:
            if ticket.group_id == 3:
                await queue.commit(group=finished(ticket))
                continue
            for attempt in range(2):
                await queue.fail(
                    group_id=ticket.group_id, attempt=attempt, detail="no", exhausted=DropReason.REWARD_FAILED
                )
                await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
            counts += [each["in_a_row"] for each in await dropped(queue)]
        return counts

    assert run(play()) == [1, 2, 3, 1, 2]  # two attempts each, one count


def test_an_attempt_draws_other_completions_where_the_last_ones_could_not_be_scored(
    tmp_path: Path,
) -> None:
    async def play() -> list[tuple[int, int]]:
        queue, drawn = make(tmp_path, max_attempts=9), list[tuple[int, int]]()
        await queue.admit(prompts=prompts(0, 1), version=0)
        for exhausted in (DropReason.REWARD_FAILED, DropReason.TEACHER_FAILED, DropReason.REWARD_FAILED):
            [ticket] = await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
            drawn.append((ticket.attempt, ticket.draw))
            await queue.fail(group_id=0, attempt=ticket.attempt, detail="no", exhausted=exhausted)
        [ticket] = await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
        await queue.lose_worker(worker="rollout-0")
        [again] = await queue.lease(worker="rollout-1", capacity=1, wait_s=0)
        return [*drawn, *((each.attempt, each.draw) for each in (ticket, again))]

    assert run(play()) == [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_draws_outlive_a_restart_and_begin_anew_with_a_restore(tmp_path: Path) -> None:
    async def play() -> list[int]:
        queue = make(tmp_path)
        await queue.admit(prompts=prompts(0, 1), version=0)
        [ticket] = await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
        await queue.fail(group_id=0, attempt=0, detail="no", exhausted=DropReason.REWARD_FAILED)
        queue.close()
        queue = make(tmp_path)
        [again] = await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
        queue.close()
        queue = make(tmp_path, incarnation="job-2", resume_from_step=0)
        [anew] = await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
        return [ticket.draw, again.draw, anew.draw]

    assert run(play()) == [0, 1, 0]


def test_rewards_that_are_equal_once_they_are_clipped_are_equal(tmp_path: Path) -> None:
    async def play() -> list[str]:
        queue = make(tmp_path, reward_clip_range=(-1.0, 1.0))
        first, second, *_ = await fill(queue, 2)
        await queue.commit(group=finished(first, totals=(2.0, 5.0)))
        await queue.commit(group=finished(second, totals=(0.5, 5.0)))
        return [each["reason"] for each in await dropped(queue)]

    assert run(play()) == ["zero_variance"]


def test_groups_are_replaced_so_many_times_in_a_step_and_no_more(tmp_path: Path) -> None:
    async def play() -> tuple[list[int], list[int], float, str]:
        queue = make(tmp_path, max_resampled_groups=2, groups_per_step=2, max_staleness=0)
        counts, free = list[int](), list[int]()
        for number in range(3):
            await queue.admit(prompts=prompts(number, 1), version=0)
            [ticket] = await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
            await queue.commit(group=finished(ticket, totals=(1.0, 1.0)))
            counts += [each["since_step"] for each in await dropped(queue)]
            free.append(await queue.wait_for_slots(wait_s=0))
        begin = time.monotonic()
        await queue.take(n=2, step=1, wait_s=30)  # whoever waits hears of it at once
        waited = time.monotonic() - begin
        told = await queue.describe_wait(n=2)
        return counts, free, waited, told

    counts, free, waited, told = run(play())
    assert (counts, free) == ([1, 2, 3], [2, 2, 0]) and waited < 5
    assert "3 that were dropped since the last step (zero_variance 3)" in told


def test_a_finished_step_begins_a_new_count(tmp_path: Path) -> None:
    async def play() -> list[int]:
        queue, counts = make(tmp_path, max_resampled_groups=1, groups_per_step=1), list[int]()
        for step in (1, 2):
            for number in range(2):
                await queue.admit(prompts=prompts(10 * step + number, 1), version=step - 1)
                [ticket] = await queue.lease(worker="rollout-0", capacity=1, wait_s=0)
                totals = (1.0, 1.0 - number)
                await queue.commit(group=finished(ticket, totals=totals, version=step - 1))
            counts += [each["since_step"] for each in await dropped(queue)]
            await queue.take(n=1, step=step, wait_s=0)
            await queue.trained(step=step)
            await queue.release(step=step, wait_s=0.0, step_s=1.0)
        return counts

    assert run(play()) == [1, 1]
