"""Work under watch ends with whatever comes first; a learner of one rank or several is started, told of and asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fakes import FakeHandle, health
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.errors import ActorLostError, DeadlineError, LearnerLostError
from trl_ray.pipelines.run.learner_actors import LearnerActors, under_watch
from trl_ray.runtime.runtime import Role
from trl_ray.types import ActorReport, Event


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


def test_what_runs_beside_the_work_ends_it_by_its_error_and_ends_with_it() -> None:
    beside = Watch(finds=False)
    assert asyncio.run(under_watch(Watch(finds=False), answer(), beside.run())) == 7
    assert beside.ended
    with pytest.raises(ValueError, match="own"):
        asyncio.run(under_watch(Watch(finds=False), wait_for_ever(), fail_beside()))


def test_of_the_watch_and_what_runs_beside_the_watch_knows_best() -> None:
    with pytest.raises(LearnerLostError, match="hangs"):
        asyncio.run(under_watch(Watch(finds=True), wait_for_ever(), fail_beside()))


async def fail_beside() -> None:
    raise ValueError("the work's own")


class OneLearner:
    """A runtime whose ranks answer what a test writes."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.handles, self.ended = answers, list[FakeHandle](), list[str]()

    async def spawn(self, role: Role, name: str, cls: type, /, *, slot: int = 0, **kwargs: Any) -> FakeHandle:
        answers = {"health": health(pid=slot + 1), **self.answers}
        self.handles.append(FakeHandle(name=name, role=role, answers=answers))
        return self.handles[-1]

    async def end(self, handle: FakeHandle) -> None:
        self.ended.append(handle.name)


def learner(runtime: Any, events: list[Event], *, ranks: int = 1) -> LearnerActors:
    config = SFTConfig(runtime={"num_learners": ranks, "start_deadline_s": 50.0, "step_deadline_s": 70.0})
    return LearnerActors(runtime=runtime, config=config, arguments={}, emit=events.append)


@pytest.mark.parametrize(("ranks", "names"), [(1, ["learner"]), (2, ["learner-0", "learner-1"])])
def test_a_learner_is_watched_as_one_and_told_of_rank_by_rank(ranks: int, names: list[str]) -> None:
    async def run() -> None:
        await actors.start()
        assert [(event.actor, event.detail["pid"]) for event in events] == list(zip(names, (1, 2), strict=False))
        assert [watched.handle.name for watched in actors.supervisor.watched] == ["learner"]
        assert [len(handle.asked("join")) for handle in runtime.handles] == [int(ranks > 1)] * ranks
        await actors.dismiss()

    runtime, events = OneLearner(address="here"), list[Event]()
    actors = learner(runtime, events, ranks=ranks)
    asyncio.run(run())
    assert runtime.ended == names and not actors.is_started and actors.supervisor.watched == ()


@pytest.mark.parametrize("error", [ActorLostError("gone"), DeadlineError("silent")])
@pytest.mark.parametrize(("ranks", "method"), [(1, "health"), (2, "health"), (2, "join"), (2, "address")])
def test_a_rank_that_does_not_come_up_is_a_lost_learner(ranks: int, method: str, error: Exception) -> None:
    events = list[Event]()
    with pytest.raises(LearnerLostError, match=str(error)):
        asyncio.run(learner(OneLearner(**{method: error}), events, ranks=ranks).start())
    assert events == []


def test_what_is_asked_may_take_as_long_as_a_step_and_no_answer_is_a_lost_learner() -> None:
    given: list[float] = []

    class Timed(FakeHandle):
        async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
            given.append(deadline_s)
            return await FakeHandle.call(self, method, *args, deadline_s=deadline_s, **kwargs)

    class Runtime(OneLearner):
        async def spawn(self, role: Role, name: str, cls: type, /, *, slot: int = 0, **kwargs: Any) -> FakeHandle:
            return Timed(name=name, role=role, answers={"health": health(), **self.answers})

    async def run() -> None:
        await actors.start()
        assert await actors.ask("step", "batch") == 3
        assert given == [50.0, 70.0]
        with pytest.raises(LearnerLostError, match="silent"):
            await actors.ask("score", "batch")

    actors = learner(Runtime(step=3, score=DeadlineError("silent")), [])
    asyncio.run(run())


def test_a_learner_that_is_gone_has_nothing_to_tell() -> None:
    async def run() -> ActorReport:
        await actors.start()
        return await actors.drain()

    actors = learner(OneLearner(drain=ActorLostError("gone")), [])
    assert asyncio.run(run()) == ActorReport()


@pytest.mark.parametrize("finds", ["lost", "reborn"])
def test_a_learner_that_died_is_lost_even_if_it_answers_again(finds: str) -> None:
    async def run() -> None:
        await actors.start()
        [watched] = actors.supervisor.watched
        told = actors.lost(watched, "it died") if finds == "lost" else actors.reborn(watched, health(pid=9))
        with pytest.raises(LearnerLostError, match="it died" if finds == "lost" else "another process"):
            await told

    actors = learner(OneLearner(), [])
    asyncio.run(run())
