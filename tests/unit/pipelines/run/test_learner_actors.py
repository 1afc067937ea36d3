"""Work under watch ends with its result, its own error, or the loss of the learner, whichever comes first."""

from __future__ import annotations

import asyncio

import pytest

from trl_ray.errors import LearnerLostError
from trl_ray.pipelines.run.learner_actors import under_watch


class Watch:
    """Finds nothing, or that the learner hangs."""

    def __init__(self, *, finds: bool) -> None:
        self._finds = finds
        self.ended = False

    async def run(self) -> None:
        try:
            if self._finds:
                raise LearnerLostError("the learner hangs")
            await asyncio.Event().wait()
        finally:
            self.ended = True


async def answer() -> int:
    await asyncio.sleep(0)
    return 7


async def wait_for_ever() -> int:
    await asyncio.Event().wait()
    return 0


async def fail() -> int:
    raise ValueError("the work's own")


def test_the_result_of_the_work_ends_the_watch() -> None:
    watch = Watch(finds=False)
    assert asyncio.run(under_watch(watch, answer())) == 7
    assert watch.ended


def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="own"):
        asyncio.run(under_watch(Watch(finds=False), fail()))


def test_a_lost_learner_ends_work_that_would_wait_for_ever() -> None:
    with pytest.raises(LearnerLostError, match="hangs"):
        asyncio.run(under_watch(Watch(finds=True), wait_for_ever()))


def test_of_two_errors_at_once_the_watch_knows_best() -> None:
    with pytest.raises(LearnerLostError, match="hangs"):
        asyncio.run(under_watch(Watch(finds=True), fail()))


def test_cancelling_it_cancels_both() -> None:
    watch = Watch(finds=False)

    async def cancelled() -> None:
        task = asyncio.create_task(under_watch(watch, wait_for_ever()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert watch.ended
