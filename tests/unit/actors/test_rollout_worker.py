"""The rollout worker between a fake engine, queue, reward worker and teacher: no model, no Ray."""

import asyncio
import dataclasses
from concurrent.futures import Future

import numpy as np
import pytest

from fakes import FakeHandle, completion, prompt, reward, ticket, until
from trl_ray.actors import rollout_worker
from trl_ray.actors.calling import Patience
from trl_ray.actors.rollout_worker import RolloutWorker, held_out_params, sampling_params
from trl_ray.actors.teaching import TeacherErrorKind, TeacherSeat, TeachingPlan
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.sections import GenerationConfig, ModelConfig, RolloutConfig
from trl_ray.errors import ActorLostError, DataError, DeadlineError, EngineError, TeacherError, WeightError
from trl_ray.rewards.scoring import RawTexts
from trl_ray.types import (
    DropReason,
    EventKind,
    FinishReason,
    RewardErrorKind,
    RewardFailure,
    ScoredGroup,
    TeacherQuestion,
    TeacherScores,
    VersionSpan,
    WeightCheck,
    WeightPayload,
    WeightVersion,
)
from trl_ray.wire.teacher_payload import encode_scores

G = 2


class FakeEngine:
    """Holds requests until a test finishes them; two groups fit."""

    def __init__(self, *, max_num_seqs=2 * G):
        self.max_num_seqs, self.version, self.broken = max_num_seqs, WeightVersion(version=-1, checksum=""), None
        self.batches, self.running, self.loaded = [], {}, []
        self.check = np.array([-1.0, -2.0], np.float32)
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
        return [self.check]

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


class Letters:
    """A tokenizer of one letter per token."""

    chat_template = None
    pad_token_id = None

    def __call__(self, texts, **options):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(token) for token in token_ids)


class Stage:
    """A worker and everything around it."""

    def __init__(
        self,
        monkeypatch,
        *tickets,
        scored=None,
        seed=1,
        rewarded=True,
        teaching=None,
        teachers=None,
        lease_s=40_000.0,
        generation=None,
        raw=False,
        **engine,
    ):
        self.engine, self.queue = FakeEngine(**engine), FakeQueue(*tickets)
        scored = scored or ScoredGroup(rewards=(reward(0.0), reward(1.0)))
        self.reward = FakeHandle(name="reward-0", answers={"score": scored})
        monkeypatch.setattr(rollout_worker, "open_engine", lambda **options: self.engine)
        monkeypatch.setattr(rollout_worker, "load_tokenizer", lambda model: Letters())
        # Whatever must be woken by something else than time passing waits for too long then.
        monkeypatch.setattr(rollout_worker, "_POLL_S", 3600.0)
        self.worker = RolloutWorker(
            name="rollout-0",
            model=ModelConfig(model_name_or_path="none"),
            rollout=RolloutConfig(lease_s=lease_s),
            generation=GenerationConfig(**{"num_generations": G, "num_generations_eval": 1, **(generation or {})}),
            seed=seed,
            max_model_len=64,
            agreement=AgreementRule(ceiling=0.01, floor=0.01, is_exact=True),
            queue=self.queue,
            rewards=(self.reward,) if rewarded else (),
            teaching=teaching,
            teachers=teachers,
            scores_raw_texts=raw,
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


def test_waiting_longer_than_a_lease_for_rewards_is_no_failure(monkeypatch):
    answers = [None, None, None, ScoredGroup(rewards=(reward(0.0), reward(1.0)))]

    async def slow(**arguments):
        await asyncio.sleep(0.1)
        return answers.pop(0)

    stage = Stage(monkeypatch, ticket(3), scored=slow, lease_s=0.04)
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("3.0"),
        lambda: bool(stage.queue.asked("commit")),
    )
    assert stage.queue.asked("renew") and not stage.queue.asked("fail") and stage.worker.health().problem is None
    calls = stage.reward.asked("score")
    assert len(calls) == 4 and len({call.kwargs["key"] for call in calls}) == 1


@pytest.mark.parametrize("error", [ActorLostError("gone"), DeadlineError("late")])
def test_a_reward_worker_that_is_lost_for_good_fails_the_group_and_not_the_engine(monkeypatch, error):
    monkeypatch.setattr(rollout_worker, "CALL", Patience(deadline_s=0.01, total_s=0.02))
    stage = Stage(monkeypatch, ticket(3), scored=error)
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("3.0"),
        lambda: bool(stage.queue.asked("fail")),
    )
    [call] = stage.queue.asked("fail")
    assert (
        call.kwargs["exhausted"] is DropReason.REWARD_FAILED and "reward-0 must answer within" in call.kwargs["detail"]
    )
    assert stage.worker.health().problem is None
    [event] = stage.worker.drain().events
    assert (event.kind, event.detail["kind"], event.detail["prompt_id"]) == (EventKind.REWARD_FAILED, "crash", "0:3")


def test_held_out_prompts_may_be_answered_at_a_temperature_of_their_own(monkeypatch):
    asked = GenerationConfig(temperature=0.7, top_p=0.9, max_completion_length=8)
    assert held_out_params(asked) == sampling_params(asked)
    cooler = held_out_params(asked.replace(eval_temperature=0.2))
    assert (cooler.temperature, cooler.top_p) == (0.2, 0.9)
    greedy = held_out_params(asked.replace(eval_temperature=0))
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.max_tokens) == (1.0, 1, 1.0, 8)
    stage = Stage(monkeypatch)
    stage.worker._eval_sampling = greedy
    evaluated(stage, prompt(5))
    [[request]] = stage.engine.batches
    assert request.sampling == greedy != stage.worker._sampling


@pytest.mark.parametrize("raw", [False, True])
def test_functions_that_ask_for_special_tokens_are_given_them(monkeypatch, raw):
    stage = Stage(monkeypatch, ticket(3), raw=raw)
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("3.0"),
        lambda: bool(stage.queue.asked("commit")),
    )
    [call] = stage.reward.asked("score")
    prompt_ids, completions = "\x01\x02\x03", ("\x00\x01",) * G
    assert call.kwargs.get("raw") == (RawTexts(prompt=prompt_ids, completions=completions) if raw else None)


def test_an_evaluation_waits_for_slow_rewards_as_well(monkeypatch):
    answers = [None, None, ScoredGroup(rewards=(reward(0.5),))]
    stage = Stage(monkeypatch, scored=lambda **arguments: answers.pop(0), lease_s=0.01)
    [answer] = evaluated(stage, prompt(1))
    assert answer.scored.rewards[0].total == 0.5


def test_a_group_that_could_not_be_scored_is_drawn_anew(monkeypatch):
    def seeds(*tickets):
        stage = Stage(monkeypatch, *tickets)
        stage.play(lambda: len(stage.engine.batches) == 1)
        return [request.seed for request in stage.engine.batches[0]]

    again = dataclasses.replace(ticket(3, attempt=1), draw=1)
    lost = ticket(3, attempt=1)
    assert seeds(ticket(3)) == seeds(lost) != seeds(again)


def test_a_request_that_the_engine_refuses_fails_its_group_alone_and_at_once(monkeypatch):
    stage = Stage(monkeypatch, ticket(3), ticket(4), ticket(5), max_num_seqs=3 * G)
    submit = stage.engine.submit

    def picky(requests):
        if any(request.request_id.startswith("4.") for request in requests):
            raise DataError("the prompt of request 4.0 must have 1 to 63 tokens, but has 99")
        return submit(requests)

    stage.engine.submit = picky
    stage.play(
        lambda: len(stage.engine.batches) == 2,
        lambda: [stage.engine.finish(name) for name in ("3.0", "5.0")] and None,
        lambda: len(stage.queue.asked("commit")) == 2 and bool(stage.queue.asked("fail")),
    )
    [call] = stage.queue.asked("fail")
    assert (call.kwargs["group_id"], call.kwargs["drop"]) == (4, DropReason.REFUSED)
    assert "has 99" in call.kwargs["detail"] and stage.worker.health().problem is None


@pytest.mark.parametrize("error", [EngineError("vllm refused 0:3.0: top_k"), DataError("A group must hold")])
def test_what_an_engine_that_works_or_the_ledger_refuses_is_no_reason_for_a_new_engine(monkeypatch, error):
    stage = Stage(monkeypatch, ticket(3))

    def act():
        if isinstance(error, DataError):
            stage.queue.answers["commit"] = error
            stage.engine.finish("3.0")
        else:
            stage.engine.running["3.0"][1].set_exception(error)

    stage.play(lambda: len(stage.engine.batches) == 1, act, lambda: bool(stage.queue.asked("fail")))
    [call] = stage.queue.asked("fail")
    assert (call.kwargs["drop"], call.kwargs["detail"]) == (DropReason.REFUSED, str(error))
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


def check(*logprobs, version=3):
    return WeightCheck(token_ids=np.arange(3, dtype=np.int32), logprobs=np.array(logprobs, np.float32), version=version)


def test_a_pull_reports_what_the_engine_runs_and_how_well_it_agrees(monkeypatch):
    stage = Stage(monkeypatch)
    report = asyncio.run(stage.worker.pull(payload(), check(-1.004, -2.0)))
    assert (report.version, report.checksum) == (3, "c3")
    assert report.weight_check_mean == pytest.approx(0.002, abs=1e-6)
    assert report.weight_check_max == pytest.approx(0.004, abs=1e-6)
    assert (stage.worker.health().version, stage.worker.health().problem) == (3, None)


@pytest.mark.parametrize(
    ("engine_says", "learner_says", "message"),
    [
        ([-1.0, -2.0], check(-1.0, -2.03), "weight check"),
        ([-1.0, float("nan")], check(-1.0, -2.0), "nan"),
        ([-1.0, -2.0], check(-1.0, float("nan")), "nan"),
        ([-1.0, -2.0], check(-1.0, -2.0, version=2), "weight check of version 2"),
    ],
    ids=["disagrees", "engine-nan", "learner-nan", "other-version"],
)
def test_a_weight_check_that_does_not_agree_is_an_alarm_and_a_problem(monkeypatch, engine_says, learner_says, message):
    stage = Stage(monkeypatch)
    stage.engine.check = np.array(engine_says, np.float32)
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


def scores_of(request, *, version=3):
    return TeacherScores(teacher="t", version=version, logprobs=np.full(len(request.completion_ids), -0.5, np.float32))


def answer(*, requests, question, dtype, ids):
    return encode_scores([scores_of(request) for request in requests], question=question)


def teacher(says=answer):
    return FakeHandle(name="teacher-0", answers={"score": says})


def plan(**options):
    return TeachingPlan(**{"question": TeacherQuestion(vocab_size=300), "timeout_s": 30.0, "max_attempts": 2} | options)


def given(group_id, text):
    row = dataclasses.replace(prompt(group_id), given_ids=np.array([ord(letter) for letter in text], np.int32))
    return dataclasses.replace(ticket(group_id), prompt=row)


def committed(stage, request_id="3.0"):
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish(request_id),
        lambda: bool(stage.queue.asked("commit")) or bool(stage.queue.asked("fail")),
    )
    return stage.queue.asked("commit")[0].kwargs["group"]


def test_a_group_is_taught_after_it_was_scored_and_before_it_is_committed(monkeypatch):
    expert = teacher()
    stage = Stage(monkeypatch, ticket(3), teaching=plan(), teachers={"t": (expert,)})
    group = committed(stage)
    assert [span.name for span in group.spans] == ["generate", "score", "teach"]
    assert [context.prompt_ids.tolist() for context in group.contexts] == [[1, 2, 3]] * G
    assert [scores.logprobs.tolist() for scores in group.teachings] == [[-0.5, -0.5]] * G
    assert group.metrics["teacher/attempts"] == 1.0
    assert [each.total for each in group.rewards] == [0.0, 1.0]


def test_rewards_decide_what_the_teacher_is_shown(monkeypatch):
    expert = teacher()
    reprompt = RepromptConfig(reprompt_template="{prompt}{solution}{feedback}", solution_template="!")
    stage = Stage(monkeypatch, ticket(3), teaching=plan(reprompt=reprompt), teachers={"t": (expert,)})
    group = committed(stage)
    [request] = expert.calls[0].kwargs["requests"]
    assert "".join(map(chr, request.prompt_ids)) == "prompt 3!"
    assert [scores is not None for scores in group.teachings] == [True, False]


def test_without_reward_workers_nothing_is_scored(monkeypatch):
    stage = Stage(monkeypatch, ticket(3), rewarded=False, teaching=plan(), teachers={"t": (teacher(),)})
    group = committed(stage)
    assert [(each.total, each.parts) for each in group.rewards] == [(None, {})] * G
    assert [span.name for span in group.spans] == ["generate", "teach"]
    assert len(group.teachings) == G


def test_where_the_learner_holds_the_teacher_a_group_brings_contexts_only(monkeypatch):
    stage = Stage(monkeypatch, ticket(3), teaching=plan(asks=TeacherSeat.LEARNER))
    group = committed(stage)
    assert (len(group.contexts), group.teachings) == (G, ())


def test_the_engine_itself_may_be_the_teacher(monkeypatch):
    stage = Stage(monkeypatch, ticket(3), teaching=plan(asks=TeacherSeat.OWN_ENGINE))
    stage.engine.score_completions = lambda requests, question, *, teacher, deadline_s: [
        scores_of(request) for request in requests
    ]
    assert [scores.version for scores in committed(stage).teachings] == [3] * G


def test_a_failed_teacher_gives_the_group_back_and_never_commits(monkeypatch):
    expert = teacher(TeacherError("teacher t: HTTP 500"))
    stage = Stage(monkeypatch, ticket(4, attempt=1), teaching=plan(), teachers={"t": (expert,)})
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("4.1"),
        lambda: bool(stage.queue.asked("fail")),
    )
    assert stage.ledger_calls() == ["generated", "fail"]
    told = stage.queue.asked("fail")[0].kwargs
    assert (told["group_id"], told["attempt"], told["exhausted"]) == (4, 1, DropReason.TEACHER_FAILED)
    assert all(word in told["detail"] for word in ("teacher t", "error", "HTTP 500"))
    assert len(expert.calls) == 2
    assert stage.worker.health().problem is None


def test_leases_are_renewed_while_a_teacher_takes_its_time(monkeypatch):
    async def slow(**arguments):
        await asyncio.sleep(3600)

    expert = teacher(slow)
    stage = Stage(monkeypatch, ticket(3), teaching=plan(timeout_s=3600.0), teachers={"t": (expert,)}, lease_s=0.04)
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: stage.engine.finish("3.0"),
        lambda: bool(expert.calls),
        lambda: stage.queue.calls.clear(),
        lambda: len(stage.queue.asked("renew")) >= 3,
    )
    assert all(call.kwargs["keys"] == [(3, 0)] for call in stage.queue.asked("renew"))


def test_the_datasets_completion_takes_the_place_of_sampled_ones(monkeypatch):
    stage = Stage(monkeypatch, given(3, "yes"), teaching=plan(), teachers={"t": (teacher(),)})
    stage.engine.version = WeightVersion(version=7, checksum="")
    stage.play(lambda: bool(stage.queue.asked("commit")))
    group = stage.queue.asked("commit")[0].kwargs["group"]
    assert stage.engine.batches == []
    assert len(group.completions) == G
    for each in group.completions:
        assert (each.text, each.is_sampled, each.finish_reason) == ("yes", False, FinishReason.STOP)
        assert each.token_ids.tolist() == [ord(letter) for letter in "yes"]
        assert each.logprobs.tolist() == [0, 0, 0] and each.logprobs.dtype == np.float32
        assert each.versions == (VersionSpan(version=7, start=0, end=3),)
    assert len(group.teachings) == G


def test_one_lease_may_hold_prompts_with_and_without_completions(monkeypatch):
    stage = Stage(monkeypatch, given(0, "a"), ticket(1), given(2, "b"), ticket(3), max_num_seqs=4 * G)
    stage.play(
        lambda: len(stage.engine.batches) == 1,
        lambda: len(stage.queue.asked("commit")) == 2,
        lambda: stage.engine.finish("3.0"),
        lambda: len(stage.queue.asked("commit")) == 3,
        lambda: stage.engine.finish("1.0"),
        lambda: len(stage.queue.asked("commit")) == 4,
    )
    assert [[request.request_id for request in batch] for batch in stage.engine.batches] == [["1.0", "3.0"]]
    groups = [call.kwargs["group"] for call in stage.queue.asked("commit")]
    assert [(group.ticket.group_id, group.completions[0].is_sampled) for group in groups] == [
        (0, False),
        (2, False),
        (3, True),
        (1, True),
    ]


def evaluated(stage, *prompts):
    async def run():
        task = asyncio.create_task(stage.worker.evaluate(prompts, seed=7))
        await until(lambda: stage.engine.in_flight == sum(each.given_ids is None for each in prompts))
        for request_id in list(stage.engine.running):
            stage.engine.finish(request_id)
        return await task

    return asyncio.run(run())


def test_an_evaluation_is_taught_and_can_be_read_as_groups(monkeypatch):
    scored = ScoredGroup(rewards=(reward(0.5),))
    stage = Stage(monkeypatch, scored=scored, teaching=plan(), teachers={"t": (teacher(),)})
    first, second = evaluated(stage, prompt(5), given(6, "ok").prompt)
    assert [len(each.teachings) for each in (first, second)] == [1, 1]
    assert (first.completions[0].is_sampled, second.completions[0].text) == (True, "ok")
    group = first.as_group(9)
    assert (group.ticket.group_id, group.teachings, group.contexts) == (9, first.teachings, first.contexts)
    assert group.rewards == scored.rewards
    assert stage.worker.drain().events == ()


@pytest.mark.parametrize(("asked", "answered"), [(1, 1), (3, 3), (None, G)])
def test_an_evaluation_takes_as_many_completions_of_a_prompt_as_it_is_told(monkeypatch, asked, answered):
    scored = ScoredGroup(rewards=(reward(0.5),) * answered)
    stage = Stage(monkeypatch, scored=scored, generation={"num_generations_eval": asked})

    async def run():
        task = asyncio.create_task(stage.worker.evaluate([prompt(5), prompt(6)], seed=7))
        await until(lambda: len(stage.engine.running) == 2)
        for request_id in list(stage.engine.running):
            stage.engine.finish(request_id)
        return await task

    assert [len(each.completions) for each in asyncio.run(run())] == [answered] * 2
    assert [len(call.kwargs["completions"]) for call in stage.reward.asked("score")] == [answered] * 2


def test_a_self_teacher_is_not_asked_in_evaluations_which_measure_rewards(monkeypatch):
    expert = teacher()
    teaching = plan(reprompt=RepromptConfig(include_environment_feedback=True))
    scored = ScoredGroup(rewards=(reward(1.0),))
    stage = Stage(monkeypatch, scored=scored, teaching=teaching, teachers={"t": (expert,)})
    [answer_] = evaluated(stage, prompt(5))
    assert (expert.calls, answer_.contexts, answer_.teacher_failure) == ([], (), None)


def test_completions_are_sampled_as_the_options_say():
    options = {"min_tokens": 3, "stop": ["."], "temperature": 0.5, "top_k": 7, "max_completion_length": 9}
    sampling = rollout_worker.sampling_params(GenerationConfig(**options))
    assert (sampling.min_tokens, sampling.stop, sampling.temperature) == (3, (".",), 0.5)
    assert (sampling.top_k, sampling.max_tokens) == (7, 9)


def test_a_teacher_that_fails_in_an_evaluation_is_a_warning(monkeypatch):
    failure = RewardFailure(function="judge", kind=RewardErrorKind.TIMEOUT, detail="took 60 s")
    expert = teacher(TeacherError("teacher t: HTTP 500"))
    scored = ScoredGroup(failure=failure)
    stage = Stage(monkeypatch, scored=scored, teaching=plan(), teachers={"t": (expert,)})
    [lost] = evaluated(stage, prompt(5))
    assert lost.teacher_failure is not None
    assert lost.teacher_failure.kind is TeacherErrorKind.ERROR
    assert (lost.contexts, lost.teachings) == ((), ())
    assert lost.as_group(0).rewards[0].total is None
    [event] = stage.worker.drain().events
    assert (event.kind, event.actor) == (EventKind.WARNING, "rollout-0")
    assert all(word in event.detail["detail"] for word in ("0:5", "HTTP 500"))
    assert stage.worker.health().problem is None
    assert stage.worker.drain().events == ()
