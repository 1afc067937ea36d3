import asyncio
import os
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest

from fakes import FakeHandle, until
from trl_ray.actors.reward_worker import RewardWorker, ScoringModel, homes_of
from trl_ray.config.sections import Isolation
from trl_ray.errors import ActorLostError, DeadlineError
from trl_ray.rewards.reward_registry import make_spec
from trl_ray.rewards.sandbox_messages import Lifetime
from trl_ray.rewards.scoring import RawTexts, TrainingCourse
from trl_ray.types import (
    Completion,
    EventKind,
    FinishReason,
    Prompt,
    Reward,
    RewardErrorKind,
    RewardFailure,
    ScoredGroup,
    VersionSpan,
)

PROMPT = Prompt(
    prompt_id="2:5",
    token_ids=np.arange(3, dtype=np.int32),
    columns={"answer": "3"},
    messages=({"role": "user", "content": "What is 1 + 2?"},),
)


def completion(text):
    return Completion(
        token_ids=np.arange(2, dtype=np.int32),
        logprobs=np.zeros(2, np.float32),
        text=text,
        versions=(VersionSpan(version=0, start=0, end=2),),
        finish_reason=FinishReason.STOP,
    )


@contextmanager
def worker(*functions, isolation=Isolation.PROCESS, timeout_s=20.0, weights=None, models=()):
    made = RewardWorker(
        functions=[make_spec(function) for function in functions],
        weights=weights,
        timeout_s=timeout_s,
        isolation=isolation,
        name="reward-0",
        models=models,
    )
    try:
        yield made
    finally:
        made.close()


def slow(completions, **columns):
    import os
    import time

    time.sleep(0.4)
    return [float(os.getpid())] * len(completions)


def score(made, *texts):
    return made.score(PROMPT, [completion(text) for text in texts])


def test_a_group_is_scored_in_a_process_of_its_own_and_inline_alike():
    for isolation in Isolation:
        with worker("arithmetic", slow, weights=[2.0, 0.0], isolation=isolation) as made:
            scored = asyncio.run(score(made, "3", "4", "three"))
            assert [reward.total for reward in scored.rewards] == [2.0, 1.0, 0.0]
            inline = scored.rewards[0].parts["slow"] == os.getpid()
            assert inline == (isolation is Isolation.INLINE)


def test_overlapping_calls_queue_and_each_gets_its_own_answer():
    async def run(made):
        return await asyncio.gather(*(score(made, text) for text in ("3", "4", "x")))

    with worker("arithmetic") as made:
        assert [scored.rewards[0].total for scored in asyncio.run(run(made))] == [1.0, 0.5, 0.0]
        assert (made.health().progress, len(made.drain().spans)) == (3, 3)


def test_health_is_answered_while_a_function_runs():
    async def run(made):
        await score(made, "x")
        task = asyncio.ensure_future(score(made, "x"))
        await asyncio.sleep(0.2)
        during = made.health()
        await task
        return during, made.health()

    with worker(slow) as made:
        during, after = asyncio.run(run(made))
        assert (during.progress, after.progress) == (1, 2)
        assert time.time() - 60 < during.busy_since < time.time() and after.busy_since is None
        assert during.pid == os.getpid()


def test_a_child_killed_under_way_fails_that_group_and_the_next_one_is_scored():
    async def run(made):
        pid = int((await score(made, "x")).rewards[0].total)
        task = asyncio.ensure_future(score(made, "x"))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        return await task, await score(made, "x")

    with worker(slow) as made:
        killed, after = asyncio.run(run(made))
        assert killed.failure.kind is RewardErrorKind.CRASH and "SIGKILL" in killed.failure.detail
        assert after.failure is None


def test_an_idle_child_that_was_killed_is_replaced_unnoticed():
    async def run(made):
        pid = int((await score(made, "x")).rewards[0].total)
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        return pid, await score(made, "x")

    with worker(slow) as made:
        pid, after = asyncio.run(run(made))
        assert after.rewards[0].total not in (None, pid)


def test_a_failure_becomes_an_event_once_and_is_not_retried(tmp_path):
    calls = tmp_path / "calls"

    def broken(completions, **columns):
        with open(calls, "a") as file:
            file.write("x")
        raise ValueError("boom")

    with worker(broken) as made:
        scored = asyncio.run(score(made, "x"))
        assert (scored.failure.kind, calls.read_text()) == (RewardErrorKind.EXCEPTION, "x")
        [event] = made.drain().events
        assert (event.kind, event.actor) == (EventKind.REWARD_FAILED, "reward-0")
        assert (event.detail["kind"], event.detail["prompt_id"]) == ("exception", "2:5")
        assert "boom" in event.detail["detail"]
        assert made.drain().events == ()


def test_a_hang_is_cut_short_and_the_group_behind_it_is_scored():
    def hang(completions, **columns):
        import time

        time.sleep(3600 if "hang" in str(completions) else 0)
        return [1.0]

    async def run(made):
        return await asyncio.gather(score(made, "hang"), score(made, "fine"))

    with worker(hang, timeout_s=1.0) as made:
        first, second = asyncio.run(run(made))
        assert (first.failure.kind, second.rewards[0].total) == (RewardErrorKind.TIMEOUT, 1.0)


def test_close_answers_what_is_queued_and_may_be_called_twice():
    async def run(made):
        tasks = [asyncio.ensure_future(score(made, "x")) for _ in range(2)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(made.close)
        return await asyncio.gather(*tasks)

    with worker(slow) as made:
        assert [scored.failure.kind for scored in asyncio.run(run(made))] == [RewardErrorKind.CRASH] * 2


def rates(*values, name="judge", metrics=None):
    """The answer of a reward model."""
    return ScoredGroup(
        rewards=tuple(Reward(total=value, parts={name: value}) for value in values), metrics=metrics or {}
    )


def judge(*answers, weight=1.0, deadline_s=10.0):
    """A reward model with a copy for each answer."""
    handles = tuple(
        FakeHandle(name=f"reward-model-judge-{slot}", answers={"score": answer}) for slot, answer in enumerate(answers)
    )
    return ScoringModel(name="judge", weight=weight, handles=handles, deadline_s=deadline_s)


def silent(completions, **columns):
    return [None] * len(completions)


@pytest.mark.parametrize("isolation", list(Isolation))
def test_a_reward_model_adds_a_part_of_its_own_weight_to_those_of_the_functions(isolation):
    models = [judge(rates(0.25, None, metrics={"m": 1.0}), weight=4.0)]
    with worker("arithmetic", silent, weights=[2.0, 1.0], models=models, isolation=isolation) as made:
        scored = asyncio.run(score(made, "3", "4"))
    assert [reward.total for reward in scored.rewards] == [3.0, 1.0]
    assert [dict(reward.parts) for reward in scored.rewards] == [
        {"arithmetic": 1.0, "silent": None, "judge": 0.25},
        {"arithmetic": 0.5, "silent": None, "judge": None},
    ]
    assert scored.metrics == {"m": 1.0}
    [call] = models[0].handles[0].asked("score")
    assert call.kwargs["group_prompt"] is PROMPT and [each.text for each in call.kwargs["completions"]] == ["3", "4"]


def test_reward_models_alone_need_no_sandbox():
    with worker(models=[judge(rates(0.5))]) as made:
        scored = asyncio.run(score(made, "x"))
        assert scored.rewards[0].total == 0.5 and made._scorers == []


@pytest.mark.parametrize("isolation", list(Isolation))
def test_functions_may_all_abstain_where_a_reward_model_scores_and_the_group_fails_where_none_does(isolation):
    with worker(silent, models=[judge(rates(None, 2.0))], isolation=isolation) as made:
        assert [reward.total for reward in asyncio.run(score(made, "a", "b")).rewards] == [None, 2.0]
    with worker(silent, models=[judge(rates(None, None))], isolation=isolation) as made:
        failure = asyncio.run(score(made, "a", "b")).failure
        assert (failure.kind, failure.function) == (RewardErrorKind.NONE, "silent, judge")


def test_a_failed_reward_model_fails_the_group_under_its_name_in_one_event():
    failed = ScoredGroup(failure=RewardFailure(function="judge", kind=RewardErrorKind.NAN, detail="nan"))
    with worker("arithmetic", models=[judge(failed)]) as made:
        assert asyncio.run(score(made, "3")).failure == failed.failure
        [event] = made.drain().events
        assert (event.kind, event.detail["function"], event.detail["kind"]) == (EventKind.REWARD_FAILED, "judge", "nan")


def test_a_copy_that_is_being_restarted_is_waited_for():
    answers = [ActorLostError("gone"), ActorLostError("restarting"), rates(1.0)]
    model = judge(lambda **kwargs: answers.pop(0))
    with worker(models=[model]) as made:
        assert asyncio.run(score(made, "x")).rewards[0].total == 1.0
    assert len(model.handles[0].asked("score")) == 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [(DeadlineError("late"), RewardErrorKind.TIMEOUT), (ActorLostError("gone"), RewardErrorKind.CRASH)],
)
def test_a_copy_that_does_not_come_back_in_time_is_a_failure_not_a_reward(error, kind):
    with worker(models=[judge(error, deadline_s=0.01)]) as made:
        failure = asyncio.run(score(made, "x")).failure
    assert (failure.kind, failure.function) == (kind, "judge")
    assert "within 0.01 s" in failure.detail


def test_groups_go_to_the_copy_with_the_least_to_do():
    async def run(made):
        async def busy(**kwargs):
            await free.wait()
            return rates(0.0)

        free = asyncio.Event()
        first.answers["score"] = busy
        begun = asyncio.ensure_future(score(made, "a"))
        await until(lambda: bool(first.calls))
        others = [(await score(made, text)).rewards[0].total for text in ("b", "c")]
        free.set()
        return others, (await begun).rewards[0].total

    model = judge(rates(0.0), rates(1.0))
    first, second = model.handles
    with worker(models=[model]) as made:
        assert asyncio.run(run(made)) == ([1.0, 1.0], 0.0)
    assert (len(first.calls), len(second.calls)) == (1, 2)


@pytest.mark.parametrize("isolation", list(Isolation))
def test_a_schedule_and_a_thought_that_the_template_opens_reach_the_functions(isolation):
    def step(completions, trainer_state, **columns):
        return [float(trainer_state.global_step + trainer_state.max_steps)] * len(completions)

    made = RewardWorker(
        functions=[make_spec("think_format"), make_spec(step)],
        weights=None,
        timeout_s=20.0,
        isolation=isolation,
        name="reward-0",
        course=TrainingCourse(max_steps=7),
    )
    texts = ("why</think>4", "4")
    raw = RawTexts(prompt="<|assistant|><think>\n", completions=texts)
    try:
        scored = asyncio.run(made.score(PROMPT, [completion(text) for text in texts], raw=raw))
        unopened = asyncio.run(score(made, *texts))
    finally:
        made.close()
    assert [dict(reward.parts) for reward in scored.rewards] == [
        {"think_format": 1.0, "step": 7.0},
        {"think_format": 0.0, "step": 7.0},
    ]
    assert [reward.parts["think_format"] for reward in unopened.rewards] == [0.0, 0.0]


def test_a_score_is_asked_for_again_until_it_is_there():
    async def run(made):
        first = await made.score(PROMPT, [completion("x")], key="k", wait_s=0.01)
        while (answer := await made.score(PROMPT, [completion("x")], key="k", wait_s=5.0)) is None:
            pass
        return first, answer, made.health().progress

    with worker(slow) as made:
        first, answer, progress = asyncio.run(run(made))
    assert (first, answer.failure, progress) == (None, None, 1)


def test_sixteen_groups_of_an_async_function_take_as_long_as_a_few():
    async def judge(completions, **columns):
        import asyncio

        await asyncio.sleep(0.3)
        return [1.0] * len(completions)

    async def run(made):
        await score(made, "x")
        begin = time.monotonic()
        await asyncio.gather(*(score(made, "x") for _ in range(16)))
        return time.monotonic() - begin

    with worker(judge) as made:
        assert asyncio.run(run(made)) < 1.5


def test_a_function_that_cannot_be_loaded_here_is_told_as_final(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(completions, **columns):\n    return [1.0]\n")
    spec = make_spec(f"{file}:f")
    file.unlink()
    made = RewardWorker(functions=[spec], weights=None, timeout_s=20.0, isolation=Isolation.PROCESS, name="reward-0")
    try:
        assert asyncio.run(score(made, "x")).failure.is_final
        assert [event.detail["is_final"] for event in made.drain().events] == [True]
    finally:
        made.close()


def test_what_evaluates_answers_shares_no_process_with_the_users_functions():
    pytest.importorskip("reasoning_gym")
    prompt = Prompt(
        prompt_id="0:0",
        token_ids=np.arange(3, dtype=np.int32),
        columns={"answer": "3", "task": "chain_sum", "metadata": {}},
        messages=({"role": "user", "content": "What is 1 + 2?"},),
    )
    with worker(slow, "reasoning_gym", "exact_answer", weights=[0.0, 2.0, 0.5]) as made:
        scored = asyncio.run(made.score(prompt, [completion("3"), completion("x")]))
        assert [list(reward.parts) for reward in scored.rewards] == [["slow", "reasoning_gym", "exact_answer"]] * 2
        assert scored.rewards[0].total == 2.5
        # Nothing could be called in these answers: no process was made for the group.
        assert [[pid is not None for pid in scorer.pids] for scorer in made._scorers] == [[True], [False, True]]
        scored = asyncio.run(made.score(prompt, [completion("3"), completion("exit()")]))
        assert [reward.total for reward in scored.rewards] == [2.5, 0.0]
        assert len({pid for scorer in made._scorers for pid in scorer.pids}) == 3
        assert made.drain().events == ()


def test_walls_that_this_machine_does_not_allow_are_told_once():
    with worker("arithmetic") as made:
        for _ in range(2):
            made._tell_walls(Lifetime.GROUP, ["arithmetic"], {"files": "landlock: Function not implemented"})
        [event] = made.drain().events
        assert event.kind is EventKind.WARNING
        assert "arithmetic must run out of reach" in event.detail["detail"]
        assert "files: landlock: Function not implemented" in event.detail["detail"]


@pytest.mark.parametrize(
    ("functions", "isolation", "homes"),
    [
        (["arithmetic"], Isolation.PROCESS, {Lifetime.RUN_WALLED: ["arithmetic"]}),
        (["arithmetic", slow], Isolation.PROCESS, {Lifetime.RUN: ["arithmetic", "slow"]}),
        (["arithmetic", slow], Isolation.INLINE, {None: ["arithmetic", "slow"]}),
        (["arithmetic", slow], Isolation.SANDBOX, {Lifetime.GROUP: ["arithmetic", "slow"]}),
        (["reasoning_gym"], Isolation.INLINE, {Lifetime.GROUP: ["reasoning_gym"]}),
        (
            ["reasoning_gym", slow, "arithmetic"],
            Isolation.PROCESS,
            {Lifetime.GROUP: ["reasoning_gym", "arithmetic"], Lifetime.RUN: ["slow"]},
        ),
    ],
)
def test_where_a_function_runs_follows_from_what_it_does_with_answers(functions, isolation, homes):
    found = homes_of([make_spec(function) for function in functions], isolation)
    assert {home: [spec.name for spec in specs] for home, specs in found.items()} == homes
