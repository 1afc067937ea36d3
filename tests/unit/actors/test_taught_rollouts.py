"""Teachers, dataset completions and evaluations of a rollout worker: no model, no Ray."""

import asyncio
import dataclasses

import numpy as np
import pytest

from fakes import FakeHandle, prompt, reward, ticket, until
from rollout_worker_stage import G, Stage, evaluated
from trl_ray.actors import rollout_worker
from trl_ray.actors.teaching import TeacherErrorKind, TeacherSeat, TeachingPlan
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.config.sections import GenerationConfig
from trl_ray.errors import TeacherError
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
    WeightVersion,
)
from trl_ray.wire.teacher_payload import encode_scores


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
