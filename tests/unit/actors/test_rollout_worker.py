"""The rollout worker between a fake engine, a fake queue and a fake reward worker: no model, no Ray."""

import asyncio
from concurrent.futures import Future

import numpy as np
import pytest

from fakes import FakeHandle, completion, prompt, reward, ticket, until
from trl_ray.actors import rollout_worker
from trl_ray.actors.rollout_worker import RolloutWorker
from trl_ray.config.sections import GenerationConfig, ModelConfig, RolloutConfig
from trl_ray.errors import DataError, EngineError, WeightError
from trl_ray.types import (
    Canary,
    DropReason,
    RewardErrorKind,
    RewardFailure,
    ScoredGroup,
    WeightPayload,
    WeightVersion,
)

G = 2


class FakeEngine:
    """Holds requests until a test finishes them; two groups fit."""

    def __init__(self, *, max_num_seqs=2 * G):
        self.max_num_seqs, self.version, self.broken = max_num_seqs, WeightVersion(version=-1, checksum=""), None
        self.batches, self.running, self.loaded = [], {}, []
        self.canary = np.array([-1.0, -2.0], np.float32)
        self.load_error, self.wrong_version = None, None

    @property
    def in_flight(self):
        return sum(request.n for request, _ in self.running.values())

    def submit(self, requests):
        if self.broken:
            raise EngineError(self.broken)
        self.batches.append(list(requests))
        futures = [Future() for _ in requests]
        self.running |= {
            request.request_id: (request, future) for request, future in zip(requests, futures, strict=True)
        }
        return futures

    def finish(self, request_id):
        request, future = self.running.pop(request_id)
        future.set_result(tuple(completion() for _ in range(request.n)))

    def fail(self, problem):
        self.broken, running, self.running = problem, self.running, {}
        for _, future in running.values():
            future.set_exception(EngineError(problem))

    def pause(self):
        pass

    def resume(self):
        pass

    def load_weights(self, payload):
        if self.load_error:
            raise self.load_error
        self.version = self.wrong_version or payload.identity

    def score(self, sequences, *, deadline_s):
        return [self.canary]

    def close(self):
        pass


class FakeQueue(FakeHandle):
    """Leases what a test puts there, a long-poll like the real one."""

    def __init__(self, *tickets):
        super().__init__(name="queue")
        self.waiting = list(tickets)
        self.answers = {"lease": self.lease}

    async def lease(self, *, worker, capacity, holding, wait_s):
        if not self.waiting:
            await asyncio.sleep(0.01)
        taken, self.waiting = self.waiting[:capacity], self.waiting[capacity:]
        return taken


class Stage:
    """A worker and everything around it."""

    def __init__(self, monkeypatch, *tickets, scored=None, seed=1, **engine):
        self.engine, self.queue = FakeEngine(**engine), FakeQueue(*tickets)
        scored = scored or ScoredGroup(rewards=(reward(0.0), reward(1.0)))
        self.reward = FakeHandle(name="reward-0", answers={"score": scored})
        monkeypatch.setattr(rollout_worker, "open_engine", lambda **options: self.engine)
        # Whatever must be woken by something else than time passing waits for too long then.
        monkeypatch.setattr(rollout_worker, "_POLL_S", 3600.0)
        self.worker = RolloutWorker(
            name="rollout-0",
            model=ModelConfig(model_name_or_path="none"),
            rollout=RolloutConfig(lease_s=40_000.0),
            generation=GenerationConfig(num_generations=G),
            seed=seed,
            max_model_len=64,
            canary_tolerance=0.01,
            queue=self.queue,
            rewards=(self.reward,),
        )

    def play(self, *acts):
        """Start the worker and wait for one condition after the other; a callable that answers None is an act."""

        async def run():
            await self.worker.start()
            for act in acts:
                if act() is not None:
                    await until(act)
            self.worker.close()

        asyncio.run(run())

    def ledger_calls(self):
        """Calls that change the ledger."""
        return [call.method for call in self.queue.calls if call.method != "lease"]


def test_a_group_is_leased_generated_scored_and_committed(monkeypatch):
    stage = Stage(monkeypatch, ticket(3, attempt=1))
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("3.1"),
        lambda: bool(stage.queue.asked("commit")),
    )
    assert stage.ledger_calls() == ["generated", "commit"]
    group = stage.queue.asked("commit")[0].kwargs["group"]
    assert (group.ticket.group_id, group.ticket.attempt, group.worker) == (3, 1, "rollout-0")
    assert [each.total for each in group.rewards] == [0.0, 1.0]
    assert len(group.completions) == G
    assert [span.name for span in group.spans] == ["generate", "score"]


def test_it_pulls_only_as_many_groups_as_the_engine_has_room_and_submits_one_lease_at_once(monkeypatch):
    stage = Stage(monkeypatch, *(ticket(number) for number in range(5)), max_num_seqs=3 * G + 1)
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("1.0"),
        lambda: len(stage.engine.batches) == 2,
    )
    batches = [[request.request_id for request in batch] for batch in stage.engine.batches]
    assert batches == [["0.0", "1.0", "2.0"], ["3.0"]]
    assert [call.kwargs["capacity"] for call in stage.queue.asked("lease")] == [3, 1]
    assert set(stage.queue.asked("lease")[1].kwargs["holding"]) >= {(0, 0), (2, 0)}


def test_an_idle_engine_takes_a_group_that_is_larger_than_it_holds_at_once(monkeypatch):
    stage = Stage(monkeypatch, ticket(0), ticket(1), max_num_seqs=1)
    stage.play(lambda: len(stage.engine.batches) == 1)
    assert [call.kwargs["capacity"] for call in stage.queue.asked("lease")] == [1]


def test_the_engine_gets_the_next_group_while_rewards_of_the_last_are_outstanding(monkeypatch):
    async def slow_reward(**arguments):
        await asyncio.sleep(3600)

    stage = Stage(monkeypatch, ticket(0), ticket(1), scored=slow_reward, max_num_seqs=G)
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("0.0"),
        lambda: len(stage.engine.batches) == 2,
    )
    assert stage.ledger_calls() == ["generated"]


def test_an_engine_full_of_evaluation_is_waited_for(monkeypatch):
    stage = Stage(monkeypatch, max_num_seqs=G)

    async def run():
        evaluation = asyncio.create_task(stage.worker.evaluate([prompt(0), prompt(1)], seed=7))
        await until(lambda: stage.engine.in_flight == 2)
        stage.queue.waiting.append(ticket(0))
        await stage.worker.start()
        await asyncio.sleep(0.05)
        assert (stage.queue.calls, stage.worker.health().problem) == ([], None)
        for request_id in list(stage.engine.running):
            stage.engine.finish(request_id)
        await evaluation
        await until(lambda: len(stage.engine.batches) == 2)
        stage.worker.close()

    asyncio.run(run())


def test_a_failed_reward_gives_the_group_back_and_never_commits(monkeypatch):
    failure = RewardFailure(function="judge", kind=RewardErrorKind.TIMEOUT, detail="took 60 s")
    stage = Stage(monkeypatch, ticket(4), scored=ScoredGroup(failure=failure))
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("4.0"),
        lambda: bool(stage.queue.asked("fail")),
    )
    assert stage.ledger_calls() == ["generated", "fail"]
    told = stage.queue.asked("fail")[0].kwargs
    assert (told["group_id"], told["attempt"], told["exhausted"]) == (4, 0, DropReason.REWARD_FAILED)
    assert "drop" not in told
    assert all(word in told["detail"] for word in ("judge", "timeout", "took 60 s"))
    assert stage.worker.health().problem is None


def test_a_failed_engine_is_a_problem_and_the_ledger_hears_nothing_more(monkeypatch):
    stage = Stage(monkeypatch, *(ticket(number) for number in range(9)))

    async def run():
        await stage.worker.start()
        await until(lambda: len(stage.engine.batches) == 1)
        stage.engine.finish("0.0")
        stage.engine.fail("no step finished for 120 s")
        assert stage.worker.health().problem == "no step finished for 120 s"
        await until(lambda: not stage.worker._tasks)
        before = len(stage.queue.calls)
        await asyncio.sleep(0.05)
        assert len(stage.queue.calls) == before
        assert "no step finished" in str(stage.worker.health().problem)

    asyncio.run(run())
    assert not stage.queue.asked("commit")
    assert not stage.queue.asked("fail")


@pytest.mark.parametrize("error", [DataError("a prompt is empty"), ValueError("what no one thought of")])
def test_whatever_ends_the_workers_loop_is_a_problem_and_not_silence(monkeypatch, error):
    stage = Stage(monkeypatch)
    stage.queue.answers["lease"] = error
    stage.play(lambda: stage.worker.health().problem is not None)
    assert str(error) in str(stage.worker.health().problem)


def payload(version=3):
    return WeightPayload(
        identity=WeightVersion(version=version, checksum=f"c{version}"), manifest=(), buffer=np.zeros(0, np.uint8)
    )


def canary(*logprobs, version=3):
    return Canary(token_ids=np.arange(3, dtype=np.int32), logprobs=np.array(logprobs, np.float32), version=version)


def test_a_pull_reports_what_the_engine_runs_and_how_well_it_agrees(monkeypatch):
    stage = Stage(monkeypatch)
    report = asyncio.run(stage.worker.pull(payload(), canary(-1.004, -2.0)))
    assert (report.version, report.checksum) == (3, "c3")
    assert report.canary_mean == pytest.approx(0.002, abs=1e-6)
    assert report.canary_max == pytest.approx(0.004, abs=1e-6)
    assert (stage.worker.health().version, stage.worker.health().problem) == (3, None)


@pytest.mark.parametrize(
    ("engine_says", "learner_says", "message"),
    [
        ([-1.0, -2.0], canary(-1.0, -2.03), "canary"),
        ([-1.0, float("nan")], canary(-1.0, -2.0), "nan"),
        ([-1.0, -2.0], canary(-1.0, float("nan")), "nan"),
        ([-1.0, -2.0], canary(-1.0, -2.0, version=2), "canary of version 2"),
    ],
    ids=["disagrees", "engine-nan", "learner-nan", "other-version"],
)
def test_a_canary_that_does_not_agree_is_an_alarm_and_a_problem(monkeypatch, engine_says, learner_says, message):
    stage = Stage(monkeypatch)
    stage.engine.canary = np.array(engine_says, np.float32)
    with pytest.raises(WeightError, match=message):
        asyncio.run(stage.worker.pull(payload(), learner_says))
    assert message in str(stage.worker.health().problem)


def test_an_engine_that_runs_another_version_than_it_pulled_is_an_alarm(monkeypatch):
    stage = Stage(monkeypatch)
    stage.engine.wrong_version = WeightVersion(version=3, checksum="other")
    with pytest.raises(WeightError, match="other"):
        asyncio.run(stage.worker.pull(payload()))


@pytest.mark.parametrize("error", [WeightError("names differ"), EngineError("half loaded")], ids=["wrong", "half"])
def test_after_a_failed_pull_nothing_is_committed_any_more(monkeypatch, error):
    stage = Stage(monkeypatch, ticket(0), ticket(1))

    async def run():
        await stage.worker.start()
        await until(lambda: len(stage.engine.batches) == 1)
        stage.engine.load_error = error
        with pytest.raises(type(error)):
            await stage.worker.pull(payload())
        await until(lambda: not stage.worker._tasks)

    asyncio.run(run())
    assert stage.ledger_calls() == []
    assert stage.worker.health().problem == str(error)


def test_seeds_differ_between_groups_and_runs_and_not_between_attempts(monkeypatch):
    def seeds(seed):
        stage = Stage(monkeypatch, ticket(1), ticket(2), ticket(1, attempt=1), max_num_seqs=3 * G, seed=seed)
        stage.play(lambda: len(stage.engine.batches) == 1)
        return [request.seed for request in stage.engine.batches[0]]

    first, second, again = seeds(1)
    assert first == again
    assert len({first, second, *seeds(2)}) == 4


def test_an_evaluation_answers_every_prompt_once_and_leaves_the_ledger_alone(monkeypatch):
    stage = Stage(monkeypatch)

    async def run():
        task = asyncio.create_task(stage.worker.evaluate([prompt(5), prompt(6)], seed=7))
        await until(lambda: stage.engine.in_flight == 2)
        for request_id in list(stage.engine.running):
            stage.engine.finish(request_id)
        return await task

    answers = asyncio.run(run())
    assert [answer.prompt.prompt_id for answer in answers] == ["0:5", "0:6"]
    assert [len(answer.completions) for answer in answers] == [1, 1]
    assert [call.kwargs["group_prompt"].prompt_id for call in stage.reward.calls] == ["0:5", "0:6"]
    assert stage.queue.calls == []
    [batch] = stage.engine.batches
    assert batch[0].seed != batch[1].seed
