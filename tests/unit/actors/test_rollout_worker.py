"""The rollout worker between a fake engine, queue, reward worker and teacher: no model, no Ray."""

import asyncio
import dataclasses

import numpy as np
import pytest

from fakes import prompt, reward, ticket, until
from rollout_worker_stage import G, Stage, evaluated
from trl_ray.actors import rollout_worker
from trl_ray.actors.calling import Patience
from trl_ray.actors.rollout_worker import held_out_params, sampling_params
from trl_ray.config.sections import GenerationConfig
from trl_ray.errors import ActorLostError, DataError, DeadlineError, EngineError, WeightError
from trl_ray.rewards.scoring import RawTexts
from trl_ray.types import (
    DropReason,
    EventKind,
    RewardErrorKind,
    RewardFailure,
    ScoredGroup,
    WeightCheck,
    WeightPayload,
    WeightVersion,
)


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


def test_a_run_asks_for_the_policys_log_probs_where_its_options_reshape_sampling_and_only_there():
    assert not sampling_params(GenerationConfig(temperature=0.7, stop=["a"])).policy_logprobs
    for changes in ({"top_p": 0.9}, {"min_tokens": 2}, {"generation_kwargs": {"logit_bias": {5: 1.0}}}):
        assert sampling_params(GenerationConfig(**changes)).policy_logprobs


def test_held_out_log_probs_are_those_of_what_is_drawn_from_unless_the_held_out_loss_reads_the_policys(monkeypatch):
    for own in (None, 0.2, 0.0):
        asked = GenerationConfig(temperature=0.7, top_p=0.9, eval_temperature=own)
        assert sampling_params(asked).policy_logprobs
        assert not held_out_params(asked).policy_logprobs
        assert held_out_params(asked, of_policy=True).policy_logprobs
    assert not held_out_params(GenerationConfig(temperature=0.7), of_policy=True).policy_logprobs
    stage = Stage(monkeypatch, generation={"top_p": 0.9})
    evaluated(stage, prompt(5))
    [[request]] = stage.engine.batches
    assert (request.sampling.top_p, request.sampling.policy_logprobs) == (0.9, False)
    assert stage.worker._sampling.policy_logprobs


def test_held_out_prompts_may_be_answered_at_a_temperature_of_their_own(monkeypatch):
    asked = GenerationConfig(temperature=0.7, top_p=0.9, max_completion_length=8)
    assert held_out_params(asked, of_policy=True) == sampling_params(asked)
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


def test_it_asks_with_the_version_that_it_samples_with_and_tells_of_a_pull(monkeypatch):
    stage = Stage(monkeypatch)

    async def run():
        await stage.worker.pull(payload(3))
        await stage.worker.start()
        await until(lambda: bool(stage.queue.asked("lease")))
        await stage.worker.pull(payload(4))
        await until(lambda: bool(stage.queue.asked("pulled")))
        stage.worker.close()

    asyncio.run(run())
    assert stage.queue.asked("lease")[0].kwargs["version"] == 3
    assert [call.kwargs for call in stage.queue.asked("pulled")] == [{"worker": "rollout-0", "version": 4}]
