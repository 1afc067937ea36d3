"""The loop of steps over rollouts, with actors whose answers a test writes: what comes before what, what is kept."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from callbacks_for_tests import Asks, Counter
from rollout_loops import RolloutRun, config
from trl_ray.buffer.journal_reach import LEDGER_COPY
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.errors import (
    AgreementError,
    EngineError,
    InterruptedRun,
    LearnerLostError,
    RewardError,
    StallError,
    TeacherError,
)
from trl_ray.pipelines.callbacks.callback_states import CALLBACKS
from trl_ray.pipelines.rollouts.failures_in_a_row import FailuresInARow
from trl_ray.pipelines.rollouts.preparation import OBJECTIVE_STATE, PROMPTS
from trl_ray.pipelines.rollouts.rollout_loop import AGREEMENT
from trl_ray.pipelines.run.going_back import ORIGIN_FILE
from trl_ray.types import DropReason, Event, EventKind
from virtual_time import run_in_virtual_time


def failure(kind: EventKind, number: int = 0) -> Event:
    return Event(kind=kind, actor="rollout-0", time=0.0, detail={"group": number})


def test_callbacks_hear_of_the_beginning_before_the_first_prompt_is_admitted(tmp_path: Path) -> None:
    class Slow:
        async def on_train_begin(self, args: Any, state: Any, control: Any) -> None:
            await asyncio.sleep(0.05)
            run.log.append("has begun")

    run = RolloutRun(tmp_path, total=1, callbacks=(Slow(),))
    assert run.go().log[:3] == ["train_begin 0", "has begun", "epoch_begin 0"]
    assert "prompt 0" in run.log


def test_no_more_groups_are_admitted_than_the_steps_take_and_tickets_carry_the_version_that_was_pulled(
    tmp_path: Path,
) -> None:
    run = RolloutRun(tmp_path, total=4).go()
    assert run.actors.admitted == 8
    assert run.logged("admit")[0] == "admit 4 at version 0"
    assert run.logged("prompt") == [f"prompt {ordinal}" for ordinal in range(8)]


def test_a_step_is_settled_published_pulled_and_released_in_this_order(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, total=2).go()
    told = ("trained", "publish", "pull", "release")
    assert run.logged(*told) == [
        "trained 1", "publish 1", "pull begins", "pull ends", "release 1",
        "trained 2", "publish 2", "pull begins", "pull ends", "release 2",
    ]  # fmt: skip


def test_weights_are_published_only_when_those_before_are_pulled(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, total=2)

    def on_step(step: int) -> None:
        if step == 1:
            run.actors.may_pull.clear()
        else:
            asyncio.get_running_loop().call_later(0.05, run.actors.may_pull.set)

    run.actors.on_step = on_step
    run.go()
    assert run.logged("trained", "publish", "pull") == [
        "trained 1", "publish 1", "pull begins", "trained 2", "pull ends", "publish 2", "pull begins", "pull ends",
    ]  # fmt: skip


def test_a_step_is_told_before_it_is_evaluated_and_its_line_has_the_numbers_of_workers_that_hold_its_weights(
    tmp_path: Path,
) -> None:
    run = RolloutRun(tmp_path, total=2, eval_steps=1)
    released: list[str] = []
    run.actors.on_step = lambda step: run.actors.may_pull.clear()

    class LetsPull:
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **payload: Any) -> None:
            if "loss" not in logs:
                return
            released.append(run.log[-1])
            asyncio.get_running_loop().call_later(0.05, run.actors.may_pull.set)

    run._callbacks._callbacks += (LetsPull(),)
    run.go()
    assert released == ["log 1", "log 2"]
    assert run.logged("step_end", "log", "pull ends", "evaluate") == [
        "evaluate by version 0", "log 0", "evaluate 0",
        "step_end 1", "log 1", "pull ends", "evaluate by version 1", "log 1", "evaluate 1",
        "step_end 2", "log 2", "pull ends", "evaluate by version 2", "log 2", "evaluate 2",
    ]  # fmt: skip
    assert [line["eval/reward"] for line in run.lines("metrics.jsonl")] == [1.0, 1.0]
    assert [event["detail"]["eval/reward"] for event in run.lines("events.jsonl") if event["kind"] == "evaluated"] == [
        1.0
    ] * 3


def test_what_callbacks_ask_for_is_done_once_and_an_epoch_ends_before_the_checkpoint(tmp_path: Path) -> None:
    asks = (Asks("should_evaluate", at=2, hook="on_epoch_end"), Asks("should_save", at=2))
    run = RolloutRun(tmp_path, total=3, eval_steps=100, callbacks=asks).go()
    # Four prompts, two a step: an epoch has two steps.
    assert run.logged("log 2", "evaluate ", "epoch_end", "save", "train_end") == [
        "evaluate by version 0", "evaluate 0", "log 2", "epoch_end 2", "evaluate by version 2", "log 2", "evaluate 2",
        "save 2", "save 2", "save 3", "save 3", "epoch_end 3", "train_end 3",
    ]  # fmt: skip


def test_strategies_follow_the_passes_over_the_prompts_and_the_best_reward_is_kept(tmp_path: Path) -> None:
    # Four prompts, two a step: an epoch has two steps. All rewards are 1, so the first evaluation is the best one.
    run = RolloutRun(
        tmp_path, total=5, eval_strategy="epoch", save_strategy="epoch", eval_on_start=False, logging_strategy="epoch"
    ).go()
    assert run.logged("log", "evaluate ", "save ") == [
        "log 2", "evaluate by version 2", "log 2", "evaluate 2", "save 2", "save 2",
        "log 4", "evaluate by version 4", "log 4", "evaluate 4", "save 4", "save 4",
        "evaluate by version 5", "log 5", "evaluate 5", "save 5", "save 5",
    ]  # fmt: skip
    assert json.loads(run.actors.files[5]["best.json"]) == {"best": 1.0, "best_step": 2, "worse": 2}


def test_a_run_on_rewards_ends_when_they_get_no_better(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, total=9, eval_steps=1, early_stopping_patience=2, metric_for_best_model="eval_reward")
    run.go()
    assert run.logged("train_end") == ["train_end 2"]
    assert any("eval/reward was no better 2 times" in str(event["detail"]) for event in run.lines("events.jsonl"))


def test_the_journal_forgets_up_to_the_checkpoint_before_the_newest(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, total=5, save_steps=2, callbacks=(Counter(),)).go()
    assert run.logged("save", "checkpoint") == [
        "save 2", "checkpoint 0", "save 2", "save 4", "checkpoint 2", "save 4", "save 5", "checkpoint 4", "save 5",
    ]  # fmt: skip
    assert list(run.actors.files[4]) == [
        "ledger.json", OBJECTIVE_STATE, PROMPTS, AGREEMENT, CALLBACKS, ORIGIN_FILE, LEDGER_COPY,
    ]  # fmt: skip
    assert json.loads(run.actors.files[4]["ledger.json"])["step"] == 4


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, total=4, save_steps=1, save_total_limit=2).go()
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step-3", "step-4"]


@pytest.mark.parametrize("averages", [True, False])
def test_the_average_of_teachers_is_adopted_by_the_checkpoint_that_they_go_on_from(
    tmp_path: Path, averages: bool
) -> None:
    run = RolloutRun(tmp_path, total=2)
    run.actors.averages = averages
    run.go()
    assert run.logged("average", "save") == ["average to teacher-2.tmp", "save 2", "save 2"]
    beside = {"teacher": str(run.path / "checkpoints" / "teacher-2.tmp")}
    assert run.actors.adopted == {2: beside if averages else {}}
    assert run.actors.teachers.checkpoint == str(run.path / "checkpoints" / "step-2")


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_stop_ends_the_run_after_the_step_once_the_workers_have_pulled_with_one_checkpoint(
    tmp_path: Path, max_staleness: int
) -> None:
    run = RolloutRun(tmp_path, max_staleness=max_staleness, save_steps=3)

    def on_step(step: int) -> None:
        if step == 2:
            run.stop.set()
            run.actors.may_pull.clear()
            asyncio.get_running_loop().call_later(0.2, run.actors.may_pull.set)

    run.actors.on_step = on_step
    with pytest.raises(InterruptedRun, match=r"interrupted after step 2; go on with: trl-ray resume .*run"):
        run.go()
    assert run.logged("publish", "pull ends", "release", "save") == [
        "publish 1", "pull ends", "release 1", "publish 2", "pull ends", "release 2", "save 2", "save 2",
    ]  # fmt: skip
    assert run.logged("train_end") == []


def test_a_stop_after_a_step_that_was_just_saved_saves_nothing_more(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, save_steps=2)
    run.actors.on_step = lambda step: run.stop.set() if step == 2 else None
    with pytest.raises(InterruptedRun, match="after step 2"):
        run.go()
    assert list(run.actors.files) == [2] and len(run.logged("save")) == 2


def test_a_stop_while_groups_are_waited_for_leaves_a_checkpoint_of_step_zero(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path)
    run.actors.delivers = False
    run.stop.set()
    with pytest.raises(InterruptedRun, match="after step 0"):
        run.go()
    assert list(run.actors.files) == [0]


def test_a_clock_that_is_set_back_makes_no_step_shorter_than_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr("time.time", lambda: float(next(moments)))
    run = RolloutRun(tmp_path, total=2, eval_steps=1, save_steps=1).go()
    for line in run.lines("metrics.jsonl"):
        durations = {key: value for key, value in line.items() if key.startswith(("time/", "throughput/"))}
        assert durations and min(durations.values()) >= 0, durations
    told = [event["detail"]["seconds"] for event in run.lines("events.jsonl") if "seconds" in event["detail"]]
    assert told and min(told) >= 0


def hurry(run: RolloutRun, grace: float = 30.0) -> None:
    """What SIGTERM does."""
    run.stop.grace_s = grace
    run.stop.request("SIGTERM", in_haste=True)
    run.stop.tell()


def test_an_evaluation_is_given_up_for_a_checkpoint_where_a_signal_leaves_little_time(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, eval_steps=2, eval_on_start=False, save_steps=0)

    async def on_evaluate() -> None:
        hurry(run)
        await asyncio.sleep(60)

    run.actors.on_evaluate = on_evaluate
    with pytest.raises(InterruptedRun, match="SIGTERM: interrupted after step 2; go on with"):
        run.go()
    assert list(run.actors.files) == [2]
    assert [line["step"] for line in run.lines("metrics.jsonl")] == [1, 2]
    assert "evaluation after step 2 was given up: SIGTERM" in str(run.lines("events.jsonl"))


def test_a_checkpoint_that_is_not_through_in_time_is_not_counted_and_the_last_one_stands(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, save_steps=2)

    def on_step(step: int) -> None:
        if step == 3:
            run.actors.may_save.clear()
            hurry(run, grace=0.3)

    run.actors.on_step = on_step
    text = r"after step 3; no time was left for its checkpoint; the checkpoint step-2 stands; go on with"
    with pytest.raises(InterruptedRun, match=text):
        run.go()
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-2"]


def test_a_checkpoint_that_took_longer_than_is_left_is_not_begun(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, save_steps=2)

    def on_step(step: int) -> None:
        if step == 2:
            run.actors.may_save.clear()
            asyncio.get_running_loop().call_later(0.5, run.actors.may_save.set)
        if step == 3:
            hurry(run, grace=0.6)

    run.actors.on_step = on_step
    with pytest.raises(InterruptedRun, match="after step 3; no time was left for its checkpoint"):
        run.go()
    assert run.logged("save") == ["save 2", "save 2"]


def test_a_worker_that_does_not_pull_keeps_no_run_that_is_to_end(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, max_staleness=1)

    def on_step(step: int) -> None:
        if step == 1:
            run.actors.may_pull.clear()
        if step == 2:
            run.stop.set()

    run.actors.on_step = on_step
    with pytest.raises(InterruptedRun, match="after step 2"):
        run.go()
    assert run.logged("publish", "pull ends", "save") == ["publish 1", "save 2", "save 2"]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_workers_without_the_weights_of_a_step_are_not_evaluated_for_it_before_a_run_ends(
    tmp_path: Path, max_staleness: int
) -> None:
    run = RolloutRun(tmp_path, max_staleness=max_staleness, eval_steps=2, eval_on_start=False)

    def on_step(step: int) -> None:
        if step == 2 - max_staleness:
            run.actors.may_pull.clear()
        if step == 2:
            run.stop.request("SIGINT", in_haste=False)
            run.stop.tell()

    run.actors.on_step = on_step
    with pytest.raises(InterruptedRun, match="after step 2; go on with"):
        run.go()
    assert run.logged("evaluate") == []
    assert "the evaluation after step 2 was given up: SIGINT" in str(run.lines("events.jsonl"))
    assert json.loads(run.actors.files[2]["best.json"])["best"] is None


def test_an_evaluation_that_is_given_up_while_it_waits_for_a_pull_leaves_the_checkpoint(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, eval_steps=2, eval_on_start=False)

    def on_step(step: int) -> None:
        if step == 2:
            run.actors.may_pull.clear()
            asyncio.get_running_loop().call_later(0.2, hurry, run)

    run.actors.on_step = on_step
    with pytest.raises(InterruptedRun, match="SIGTERM: interrupted after step 2; go on with"):
        run.go()
    assert (list(run.actors.files), run.logged("evaluate")) == ([2], [])


def test_a_run_ends_in_order_when_a_callback_asks_for_it(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, save_steps=3, callbacks=(Asks("should_training_stop", at=3),)).go()
    assert run.logged("save", "train_end") == ["save 3", "save 3", "train_end 3"]
    assert any("the callback Asks.on_step_end asked for it" in str(event) for event in run.lines("events.jsonl"))


def test_groups_of_a_skipped_step_are_dropped_and_said_to_be(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, total=2)
    run.actors.skips = frozenset({1})
    run.go()
    assert run.logged("skip", "trained") == ["skip 1", "trained 2"]
    [said] = [event for event in run.lines("events.jsonl") if "not finite" in str(event["detail"])]
    assert said["detail"] == {
        "step": 1,
        "detail": "loss or gradients were not finite; the step was skipped and its groups dropped",
    }


@pytest.mark.parametrize("delivers", [True, False])
def test_an_error_of_the_pull_ends_the_run_also_while_groups_are_waited_for(tmp_path: Path, delivers: bool) -> None:
    run = RolloutRun(tmp_path)
    run.actors.on_step = lambda step: setattr(run.actors, "delivers", delivers)
    run.actors.pull_fails = LearnerLostError("its weights are gone")
    with pytest.raises(LearnerLostError, match="gone"):
        run.go()


def test_a_lost_learner_ends_the_run_while_a_pull_hangs(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path)

    class Notices:
        async def run(self) -> None:
            while "publish 1" not in run.log:
                await asyncio.sleep(0.01)
            raise LearnerLostError("it hangs")

    notices: Any = Notices()
    run.actors.supervisor = notices
    run.actors.may_pull.clear()

    async def ends() -> None:
        loop = run.loop()
        with pytest.raises(LearnerLostError, match="it hangs"):
            await loop.run()
        assert loop._pulling is not None and loop._pulling.cancelled()

    asyncio.run(ends())
    assert "pull ends" not in run.log


def test_a_run_in_which_nothing_moves_names_who_it_waits_for(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, runtime={"kind": "local", "stall_deadline_s": 0.2})
    run.actors.delivers = False
    with pytest.raises(StallError, match=r"step 1 needs 2 groups, but nothing has moved .*: rollout-0\. Resume"):
        run.go()


def test_groups_that_are_dropped_and_replaced_without_end_are_no_progress(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, runtime={"kind": "local", "stall_deadline_s": 40.0})
    # The queue has ever more to do, and always as many groups at work.
    run.actors.delivers, run.actors.poll_s = False, 2.0
    with pytest.raises(StallError, match=r"step 1 needs 2 groups, but nothing has moved for 4\d s"):
        run_in_virtual_time(run.loop().run())


@pytest.mark.parametrize("reason", [DropReason.STALE, DropReason.RETRIES_EXHAUSTED, DropReason.REWARD_FAILED])
def test_no_reason_drops_groups_without_end_between_two_steps(reason: DropReason) -> None:
    counted = FailuresInARow(config())
    one = dropped(reason, in_a_row=1)  # others get ready in between
    counted.count([one] * 100)
    counted.next_step()
    counted.count([one] * 100)
    with pytest.raises(StallError, match=rf"at most 100 groups .* of 2 groups, but 101 were, as {reason.value}"):
        counted.count([one])


def dropped(reason: DropReason, **count: int) -> Event:
    detail = {"group_id": 7, "reason": reason.value, "because": "no judge today", **count}
    return Event(kind=EventKind.GROUP_DROPPED, actor="queue", time=0.0, detail=detail)


def test_groups_that_lose_their_rewards_in_a_row_end_the_run_and_the_last_one_is_told(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, total=3, reward={"max_failures_in_a_row": 2})
    one, two = (dropped(DropReason.REWARD_FAILED, in_a_row=number) for number in (1, 2))
    run.actors.failed = {1: [one], 2: [one], 3: [one]}
    run.go()
    again = RolloutRun(tmp_path, total=3, reward={"max_failures_in_a_row": 2})
    again.actors.failed = {1: [one], 2: [two]}
    with pytest.raises(RewardError) as raised:
        again.go()
    assert str(raised.value) == (
        "fewer than 2 groups in a row may lose their rewards (reward.max_failures_in_a_row), but 2 did without one "
        "that was ready. The last one: no judge today. Mend the reward function, then resume."
    )
    assert len(again.lines("metrics.jsonl")) == 1


def test_attempts_that_fail_are_no_groups_that_do() -> None:
    counted = FailuresInARow(config(reward={"max_failures_in_a_row": 1}))
    counted.count([failure(EventKind.REWARD_FAILED), failure(EventKind.TEACHER_FAILED), failure(EventKind.WARNING)] * 9)


def test_a_function_that_cannot_be_loaded_ends_the_run_at_once() -> None:
    detail = {"detail": "judge must load in the reward worker's process, but: no module.", "is_final": True}
    event = Event(kind=EventKind.REWARD_FAILED, actor="reward-0", time=0.0, detail=detail)
    with pytest.raises(RewardError, match=r"judge must load .* No group can be scored: mend it, then resume\."):
        FailuresInARow(config()).count([event])


def test_the_least_patient_teacher_decides_how_many_groups_may_lose_theirs() -> None:
    teachers = [
        {"name": name, "model_name_or_path": "models/far", "max_failures_in_a_row": allowed}
        for name, allowed in (("first", 5), ("second", 2))
    ]
    counted = FailuresInARow(DistillConfig(teachers=teachers, teacher_column="who"))
    counted.count([dropped(DropReason.TEACHER_FAILED, in_a_row=1)])
    with pytest.raises(TeacherError, match="fewer than 2 groups in a row may lose their teacher"):
        counted.count([dropped(DropReason.TEACHER_FAILED, in_a_row=2)])


def test_requests_that_an_engine_refuses_without_end_end_the_run() -> None:
    counted = FailuresInARow(config())
    counted.count([dropped(DropReason.REFUSED, in_a_row=19)])
    with pytest.raises(EngineError, match=r"fewer than 20 groups in a row may be refused, but 20 did.*no judge today"):
        counted.count([dropped(DropReason.REFUSED, in_a_row=20)])


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (DropReason.ZERO_VARIANCE, "all their rewards being equal: look at the reward functions"),
        (DropReason.TRUNCATED, "all their completions being cut off: raise max_completion_length"),
    ],
)
def test_groups_of_which_there_is_nothing_to_learn_are_not_replaced_without_end(
    tmp_path: Path, reason: DropReason, told: str
) -> None:
    run = RolloutRun(tmp_path, total=2, zero_variance_groups="drop", max_resampled_groups=5)
    run.actors.failed = {1: [dropped(reason, since_step=5)], 2: [dropped(reason, since_step=6)]}
    with pytest.raises(StallError) as raised:
        run.go()
    message = str(raised.value)
    assert "a step of 2 groups may replace at most 5" in message and "(max_resampled_groups), but 6 were" in message
    assert f"the last as {reason.value}" in message and told in message
    by_default = FailuresInARow(config(zero_variance_groups="drop"))
    by_default.count([dropped(reason, since_step=20)])  # ten times a step's
    with pytest.raises(StallError, match="at most 20"):
        by_default.count([dropped(reason, since_step=21)])


def test_rows_that_no_prompt_could_be_made_of_are_in_the_ledger_as_dropped(tmp_path: Path) -> None:
    plain, run = RolloutRun(tmp_path / "plain", total=2).go(), RolloutRun(tmp_path, total=2, left_out=3, save_steps=1)
    run.go()
    without, book = (json.loads((each.path / "ledger.json").read_text()) for each in (plain, run))
    assert book["dropped"] == {**without["dropped"], "bad_row": 3}
    assert book["issued"] == without["issued"] + 3 and book["balanced"] is True
    line = run.lines("metrics.jsonl")[-1]
    assert line["ledger/dropped"] == plain.lines("metrics.jsonl")[-1]["ledger/dropped"] + 3
    # As many groups are admitted as without.
    assert run.actors.admitted == plain.actors.admitted


AGREES = {"tokens": 100.0, "abs_diff": 1e-6, "diff": 0.0, "doubt": 0.5, "ratio": 1.0, "ratio_square": 1.0}
APART = {**AGREES, "abs_diff": 0.1, "diff": -0.1}


def test_sampler_and_learner_that_part_end_the_run_before_anything_of_the_step_is_published(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path)
    run.actors.sampled = {1: AGREES, 2: APART}
    with pytest.raises(AgreementError, match=r"step 2: .*left out.*on_disagreement"):
        run.go()
    assert run.logged("publish") == ["publish 1"] and "trained 2" not in run.log


def test_asked_to_warn_the_run_says_what_is_wrong_and_goes_on(tmp_path: Path) -> None:
    run = RolloutRun(tmp_path, save_steps=2, rollout={"on_disagreement": "warn", "num_workers": 1})
    run.actors.sampled = {1: AGREES, 2: AGREES, 3: APART}
    run.go()
    [told] = [event for event in run.lines("events.jsonl") if event["detail"].get("cause")]
    assert (told["kind"], told["detail"]["cause"], told["detail"]["step"]) == ("warning", "sampling", 3)
    # The first step's level is what a resumed run goes on from.
    assert json.loads(run.actors.files[2][AGREEMENT])["sampled"] == {"level": 2e-6}
    assert "agreement/age_0/ess" in run.lines("metrics.jsonl")[2]
