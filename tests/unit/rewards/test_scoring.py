import asyncio
import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from trl_ray.rewards.reward_registry import REGISTERED, required_columns, wants_raw_texts
from trl_ray.rewards.scoring import GroupInput, RawTexts, TrainingCourse, join_scores, score_group, weighted
from trl_ray.types import (
    Completion,
    FinishReason,
    Prompt,
    Reward,
    RewardErrorKind,
    RewardFailure,
    ScoredGroup,
    VersionSpan,
)


def completion(text, size=2):
    return Completion(
        token_ids=np.arange(size, dtype=np.int32),
        logprobs=np.zeros(size, np.float32),
        text=text,
        versions=(VersionSpan(version=0, start=0, end=size),),
        finish_reason=FinishReason.STOP,
    )


def prompt(**columns):
    return Prompt(prompt_id="0:0", token_ids=np.arange(3, dtype=np.int32), text="q", columns=columns)


def score(*functions, weights=None, columns=None, conversation=None, size=2):
    given = prompt(**(columns or {}))
    if conversation:
        given = Prompt(prompt_id="0:0", token_ids=given.token_ids, messages=conversation)
    group = GroupInput.of(given, [completion(f"c{i}", i + 1) for i in range(size)])
    names = [f"f{i}" for i in range(len(functions))]
    return asyncio.run(score_group(weighted(names, functions, weights), group))


def returns(value):
    return lambda **columns: value


def failure_of(*functions, **options):
    scored = score(*functions, **options)
    assert scored.rewards == ()
    return scored.failure


def test_the_total_is_the_weighted_sum_over_functions_that_did_not_abstain():
    scored = score(returns([1.0, None]), returns([2, True]), weights=[0.5, 10.0])
    assert [reward.total for reward in scored.rewards] == [20.5, 10.0]
    assert [reward.parts for reward in scored.rewards] == [{"f0": 1.0, "f1": 2.0}, {"f0": None, "f1": 1.0}]
    assert scored.failure is None


def test_a_completion_that_nobody_scores_has_no_total_and_is_legal():
    assert [reward.total for reward in score(returns([None, 3.0])).rewards] == [None, 3.0]


def test_only_when_all_functions_abstain_on_all_completions_does_the_group_fail():
    assert score(returns([None, None]), returns([None, 1.0])).failure is None
    failure = failure_of(returns([None, None]), returns([None, None]))
    assert (failure.kind, failure.function) == (RewardErrorKind.NONE, "f0, f1")


@pytest.mark.parametrize(
    ("value", "kind", "detail"),
    [
        ([0.0, math.nan], RewardErrorKind.NAN, "value 1 is nan"),
        ([math.inf, 0.0], RewardErrorKind.NAN, "value 0 is inf"),
        ([10**400, 0.0], RewardErrorKind.NAN, "value 0 is 1"),
        ([1.0], RewardErrorKind.WRONG_LENGTH, "list of 2 numbers.*returned 1"),
        ([], RewardErrorKind.WRONG_LENGTH, "returned 0"),
        (1.0, RewardErrorKind.WRONG_TYPE, "returned float 1.0"),
        (None, RewardErrorKind.WRONG_TYPE, "is a return missing"),
        ({"a": 1, "b": 2}, RewardErrorKind.WRONG_TYPE, "returned dict"),
        ("ab", RewardErrorKind.WRONG_TYPE, "returned str"),
        (["1", "2"], RewardErrorKind.WRONG_TYPE, "value 0 is str '1'"),
        ([[1.0], [2.0]], RewardErrorKind.WRONG_TYPE, "value 0 is list"),
        ([1j, 0], RewardErrorKind.WRONG_TYPE, "value 0 is complex"),
    ],
)
def test_each_kind_of_wrong_answer_is_told_apart(value, kind, detail):
    failure = failure_of(returns([1.0, 1.0]), returns(value))
    assert (failure.function, failure.kind) == ("f1", kind)
    assert re.search(detail, failure.detail)


def test_an_exception_names_function_message_and_line():
    def broken(**columns):
        raise ValueError("no such judge")

    failure = failure_of(broken)
    assert failure.kind is RewardErrorKind.EXCEPTION
    assert "f0 must return rewards, it raised ValueError: no such judge at " in failure.detail
    assert failure.detail.endswith("in broken.")


def test_sys_exit_is_a_crash_with_its_code():
    def leaving(**columns):
        raise SystemExit(3)

    async def leaving_later(**columns):
        raise SystemExit(4)

    assert (failure_of(leaving).kind, "3" in failure_of(leaving).detail) == (RewardErrorKind.CRASH, True)
    assert (failure_of(leaving_later).kind, "4" in failure_of(leaving_later).detail) == (RewardErrorKind.CRASH, True)


def test_arrays_tensors_and_numpy_scalars_are_numbers():
    values = [np.array([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True), [np.float32(1), np.bool_(True)]]
    totals = [reward.total for reward in score(*map(returns, values)).rewards]
    assert totals == [3.0, 5.0]


def test_async_functions_run_together():
    order = []

    async def slow(completions, **columns):
        order.append("slow starts")
        await asyncio.sleep(0.02)
        order.append("slow ends")
        return [1.0] * len(completions)

    async def quick(completions, **columns):
        order.append("quick runs")
        return [1.0] * len(completions)

    assert [reward.total for reward in score(slow, quick).rewards] == [2.0, 2.0]
    assert order == ["slow starts", "quick runs", "slow ends"]


def test_an_async_exception_is_told_like_a_sync_one():
    async def broken(**columns):
        raise KeyError("x")

    assert failure_of(broken).kind is RewardErrorKind.EXCEPTION


def test_functions_get_columns_ids_and_completions_as_in_trl():
    seen = {}

    def look(prompts, completions, completion_ids, answer, **rest):
        seen.update(locals())
        return [0.0, 0.0]

    score(look, columns={"answer": "7", "completions": "reserved"})
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (["q", "q"], ["c0", "c1"], [[0], [0, 1]])
    assert (seen["answer"], sorted(seen["rest"])) == (["7", "7"], ["log_extra", "log_metric", "trainer_state"])


def test_conversational_prompts_give_conversations():
    seen = []
    messages = ({"role": "user", "content": "hi"},)
    score(lambda prompts, completions: seen.append((prompts, completions)) or [0.0, 0.0], conversation=messages)
    assert seen[0][0] == [[{"role": "user", "content": "hi"}]] * 2
    assert seen[0][1][1] == [{"role": "assistant", "content": "c1"}]


def test_a_function_that_changes_its_inputs_harms_no_other():
    def spoil(completions, answer, **columns):
        completions[:] = []
        answer[0]["deep"] = "gone"
        assert answer[1] == {"deep": "7"}
        return [0.0, 0.0]

    def check(completions, answer, **columns):
        return [float(completions == ["c0", "c1"] and answer == [{"deep": "7"}] * 2)] * 2

    assert score(spoil, check, columns={"answer": {"deep": "7"}}).rewards[0].total == 1.0


def test_logged_columns_and_metrics_travel_with_the_rewards():
    def logs(completions, log_extra, log_metric, **columns):
        log_extra("parsed", [{1}, "b"])
        log_metric("accuracy", 0.25)
        log_metric("accuracy", 0.75)
        return [1.0, 1.0]

    scored = score(logs)
    assert [reward.extra for reward in scored.rewards] == [{"parsed": "{1}"}, {"parsed": "b"}]
    assert scored.metrics == {"accuracy": 0.5}


def test_a_wrong_log_call_is_the_function_s_exception():
    short = failure_of(lambda log_extra, **rest: log_extra("x", [1]))
    endless = failure_of(lambda log_metric, **rest: log_metric("x", math.nan))
    assert "takes 2 values" in short.detail and "finite number" in endless.detail


def scored_as(name, *values, metrics=None, extra=None):
    """What one scorer says, its total unweighted."""
    rewards = tuple(Reward(total=value, parts={name: value}, extra=extra or {}) for value in values)
    return ScoredGroup(rewards=rewards, metrics=metrics or {})


def test_joined_scores_have_all_parts_in_order_and_one_weighted_total():
    functions = scored_as("length", 1.0, None, 2.0, metrics={"a": 1.0}, extra={"seen": True})
    model = scored_as("judge", 4.0, 3.0, None, metrics={"b": 2.0}, extra={"why": "so"})
    joined = join_scores([functions, model], weights={"length": 10.0, "judge": 0.5})
    assert [reward.total for reward in joined.rewards] == [12.0, 1.5, 20.0]
    assert [list(reward.parts.items()) for reward in joined.rewards] == [
        [("length", 1.0), ("judge", 4.0)],
        [("length", None), ("judge", 3.0)],
        [("length", 2.0), ("judge", None)],
    ]
    assert joined.rewards[0].extra == {"seen": True, "why": "so"}
    assert joined.metrics == {"a": 1.0, "b": 2.0}


def test_functions_that_may_abstain_leave_the_verdict_to_the_join():
    group = GroupInput.of(prompt(), [completion("a"), completion("b")])
    silent = asyncio.run(score_group(weighted(["f"], [returns([None, None])], None), group, may_abstain=True))
    assert [reward.total for reward in silent.rewards] == [None, None] and silent.failure is None
    weights = {"f": 1.0, "judge": 1.0}
    assert join_scores([silent, scored_as("judge", 1.0, None)], weights=weights).failure is None
    failure = join_scores([silent, scored_as("judge", None, None)], weights=weights).failure
    assert (failure.kind, failure.function) == (RewardErrorKind.NONE, "f, judge")


def test_whoever_fails_first_fails_the_joined_group():
    failed = ScoredGroup(failure=RewardFailure(function="judge", kind=RewardErrorKind.NAN, detail="nan"))
    joined = join_scores([scored_as("f", 1.0), failed], weights={"f": 1.0, "judge": 1.0})
    assert (joined.failure.function, joined.rewards) == ("judge", ())


def test_functions_are_told_where_the_run_stands_for_rewards_that_follow_a_schedule():
    seen = {}

    def look(completions, trainer_state, **columns):
        seen.update(vars_of(trainer_state))
        return [0.0] * len(completions)

    def vars_of(state):
        return {name: getattr(state, name) for name in ("global_step", "max_steps", "epoch", "num_train_epochs")}

    aged = [
        dataclasses.replace(completion("a"), versions=(VersionSpan(version=v, start=0, end=1),)) for v in (3, 4, -1)
    ]
    course = TrainingCourse(max_steps=10, steps_per_epoch=4.0)
    group = GroupInput.of(prompt(), aged, course=course)
    asyncio.run(score_group(weighted(["look"], [look], None), group))
    assert seen == {"global_step": 4, "max_steps": 10, "epoch": 1.0, "num_train_epochs": 2.5}
    group = GroupInput.of(prompt(), aged[2:])
    asyncio.run(score_group(weighted(["look"], [look], None), group))
    assert seen == {"global_step": 0, "max_steps": 0, "epoch": 0.0, "num_train_epochs": 0.0}


def test_texts_with_special_tokens_are_given_to_those_who_name_them():
    seen = []

    def look(completions, raw_completions, raw_prompts=None):
        seen.append((raw_prompts, raw_completions))
        return [0.0] * len(completions)

    raw = RawTexts(prompt="<s>q", completions=("a</s>", "b"))
    group = GroupInput.of(prompt(), [completion("a"), completion("b")], raw=raw)
    asyncio.run(score_group(weighted(["look"], [look], None), group))
    assert seen == [(["<s>q", "<s>q"], ["a</s>", "b"])]
    assert wants_raw_texts(look) and wants_raw_texts(REGISTERED["think_format"])
    assert not wants_raw_texts(REGISTERED["arithmetic"])
    assert required_columns(look) == set()
