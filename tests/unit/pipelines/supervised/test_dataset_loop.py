"""The loop of steps over a dataset, with a learner whose answers a test writes: order, accounts, stops, resumption."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from callbacks_for_tests import Asks, Diary
from dataset_loops import Learner, Run, Watch, examples
from trl_ray.config.runs.dataset_config import KTOConfig, SFTConfig
from trl_ray.errors import DataError, InterruptedRun, LearnerLostError
from trl_ray.pipelines.supervised.dataset_recording import Accounts
from trl_ray.pipelines.supervised.example_feed import Fed


def test_steps_take_their_examples_in_order_and_the_ledger_balances(tmp_path: Path) -> None:
    run = Run(tmp_path).go()
    assert run.rows == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]
    last = run.lines("metrics.jsonl")[-1]
    assert (last["ledger/issued"], last["ledger/trained"], last["ledger/dropped"]) == (10, 10, 0)
    assert (last["epoch"], last["tokens/seen"], last["tokens/trained"]) == (2.0, 4, 2)


def test_rows_of_a_skipped_step_are_dropped_with_their_reason(tmp_path: Path) -> None:
    run = Run(tmp_path, learner=Learner(skips=frozenset({2})), total=3).go()
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert (ledger["issued"], ledger["trained"], ledger["dropped"]) == (5, 3, {"numerics": 2})
    assert any("not finite" in str(event["detail"]) for event in run.lines("events.jsonl"))


def test_checkpoints_are_written_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, total=5).go()
    assert sorted(run.learner.saved) == [2, 4, 5]
    assert run.learner.saved[4]["accounts"]["trained"] == 7


def test_a_resumed_walk_takes_the_examples_that_follow(tmp_path: Path) -> None:
    whole = Run(tmp_path).go()
    state = whole.learner.saved[4]["accounts"]
    resumed = Run(tmp_path, accounts=Accounts.from_state(state)).go()
    assert resumed.rows == whole.rows[4:]
    assert [batch.step for batch in resumed.learner.batches] == [5, 6]
    assert resumed.lines("metrics.jsonl")[-1]["ledger/issued"] == 10


def test_held_out_examples_are_evaluated_before_the_first_step_and_after_every_so_many(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=2)
    run = Run(tmp_path, config=config, total=5, held_out=3).go()
    told = [
        (e["detail"]["step"], e["detail"]["eval/loss"]) for e in run.lines("events.jsonl") if "evaluated" in e["kind"]
    ]
    assert told == [(0, 5.0), (2, 4.0), (4, 3.0), (5, 2.0)]
    assert [line.get("eval/loss") for line in run.lines("metrics.jsonl")] == [None, 4.0, None, 3.0, 2.0]


def evaluated(run: Run) -> list[int]:
    """The steps after which there was an evaluation."""
    return [event["detail"]["step"] for event in run.lines("events.jsonl") if event["kind"] == "evaluated"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Three steps an epoch, seven steps.
        ({"eval_strategy": "no", "eval_steps": 2}, []),
        ({"eval_strategy": False, "eval_steps": 2}, []),  # as YAML reads a bare no
        ({"eval_steps": 3}, [0, 3, 6, 7]),
        ({"eval_steps": 3, "eval_on_start": False}, [3, 6, 7]),
        ({"eval_strategy": "steps", "logging_steps": 4}, [0, 4, 7]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3}, [4, 6, 7]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "eval_on_start": True}, [0, 4, 6, 7]),
        ({"eval_strategy": "epoch"}, [0, 3, 6, 7]),
        ({"eval_strategy": "epoch", "eval_delay": 2, "eval_on_start": False}, [6, 7]),
    ],
)
def test_evaluations_come_when_their_strategy_says(
    tmp_path: Path, options: dict[str, Any], expected: list[int]
) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, shuffle_dataset=False, **options)
    held_out = 1 if config.evaluates else 0  # nothing is loaded where nothing is evaluated
    assert evaluated(Run(tmp_path, config=config, total=7, held_out=held_out).go()) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_strategy": "no", "save_steps": 2}, [7]),
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4, 6, 7]),
        ({"save_strategy": "epoch", "save_steps": 2}, [3, 6, 7]),
        # Losses after each step: better after 1, 2 and 5.
        ({"save_strategy": "best", "save_steps": 2, "eval_steps": 1}, [1, 2, 5, 7]),
    ],
)
def test_checkpoints_come_when_their_strategy_says(
    tmp_path: Path, options: dict[str, Any], expected: list[int]
) -> None:
    config = SFTConfig(per_device_train_batch_size=2, eval_on_start=None, **options)
    learner = Learner(eval_losses=[9.0, 8.0, 7.0, 7.5, 7.0, 6.0, 9.0, 9.0])
    run = Run(tmp_path, config=config, total=7, learner=learner, held_out=1 if config.evaluates else 0).go()
    assert sorted(run.learner.saved) == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"logging_strategy": "steps"}, [2, 4, 6]),
        ({"logging_first_step": True}, [1, 2, 4, 6]),
        ({"logging_strategy": "epoch"}, [3, 6]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_callbacks_hear_of_the_log_when_its_strategy_says(
    tmp_path: Path, options: dict[str, Any], told: list[int]
) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, logging_steps=2, **options)
    diary = Diary()
    run = Run(tmp_path, config=config, total=7, callbacks=[diary]).go()
    assert [line for line in diary.book if line.startswith("log")] == [f"log {step}" for step in told]
    assert len(run.lines("metrics.jsonl")) == 7


def test_the_best_model_outlives_younger_checkpoints_and_is_what_the_run_ends_with(tmp_path: Path) -> None:
    config = SFTConfig(
        per_device_train_batch_size=2,
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    learner = Learner(eval_losses=[0.1, 5.0, 3.0, 4.0, 6.0])  # the first is of weights that no checkpoint has
    loop = Run(tmp_path, config=config, total=4, held_out=1, learner=learner).loop()
    asyncio.run(loop.run())
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-2", "step-4"]
    assert loop.model == checkpoints / "step-2"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert {"detail": "the model of the run is the best one, step-2", "best": 3.0} in [e["detail"] for e in events]


def test_without_a_best_model_the_run_ends_with_the_last(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, eval_steps=1, save_only_model=True)
    loop = Run(tmp_path, config=config, total=4, held_out=1).loop()
    asyncio.run(loop.run())
    assert loop.model == tmp_path / "run" / "checkpoints" / "step-4"
    assert loop._actors.only_models == [True]  # type: ignore[attr-defined]


def test_several_held_out_sets_are_evaluated_by_their_names_as_transformers_names_them(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=3, eval_on_start=False)
    config = config.replace(metric_for_best_model="eval_hard_loss")
    learner, diary = Learner(eval_losses=[4.0, 3.0]), Diary()
    run = Run(tmp_path, config=config, total=3, learner=learner, callbacks=[diary])
    run.sets = {"easy": examples(1), "hard": examples(3)}
    loop = run.loop()
    asyncio.run(loop.run())
    assert loop._stopping.best == 3.0
    assert [(e["detail"]["examples"]) for e in run.lines("events.jsonl") if e["kind"] == "evaluated"] == [1, 3]
    last = run.lines("metrics.jsonl")[-1]
    assert (last["eval/easy_loss"], last["eval/hard_loss"], last["eval/hard_accuracy"]) == (4.0, 3.0, 0.5)
    assert [payload["metrics"]["eval_hard_loss"] for payload in diary.of("on_evaluate")] == [3.0]


def test_leaving_an_epoch_is_its_end_for_what_comes_with_epochs(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, eval_strategy="epoch", save_strategy="epoch", eval_on_start=False)
    asks = Asks("should_epoch_stop", at=1)
    run = Run(tmp_path, config=config, total=6, held_out=1, callbacks=[asks]).go()
    assert (evaluated(run), sorted(run.learner.saved)) == ([1, 4], [1, 4])


def test_a_run_that_goes_on_is_not_evaluated_where_it_was_before(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=2)
    run = Run(tmp_path, config=config, total=4, held_out=1, accounts=Accounts(step=2)).go()
    assert [event["detail"]["step"] for event in run.lines("events.jsonl") if event["kind"] == "evaluated"] == [4]


def test_it_ends_when_the_held_out_loss_gets_no_better(tmp_path: Path) -> None:
    config = SFTConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=1, early_stopping_patience=2)
    run = Run(tmp_path, config=config, held_out=1, learner=Learner(eval_losses=[3.0, 2.0, 2.5, 2.0, 9.0])).go()
    assert len(run.learner.batches) == 3 and list(run.learner.saved) == [3]
    assert run.learner.saved[3]["stopping"] == {"best": 2.0, "best_step": 1, "worse": 2}
    [said] = [event["detail"] for event in run.lines("events.jsonl") if event["kind"] == "warning"]
    assert said == {
        "step": 3,
        "detail": "training ends early: eval/loss was no better 2 times in a row",
        "best": 2.0,
        "best_step": 1,
    }


def test_callbacks_of_a_resumed_run_know_the_best_that_was_found_before_once_it_has_begun(tmp_path: Path) -> None:
    seen: list[tuple[str, float | None, int | None]] = []

    class Looks:
        def on_train_begin(self, args: Any, state: Any, control: Any) -> None:
            seen.append(("train_begin", state.best_metric, state.best_global_step))

        def on_step_begin(self, args: Any, state: Any, control: Any) -> None:
            seen.append(("step_begin", state.best_metric, state.best_global_step))

    run = Run(tmp_path, total=3, accounts=Accounts(step=2), callbacks=[Looks()])
    loop = run.loop()
    loop._stopping.load_state_dict({"best": 2.0, "best_step": 1, "worse": 1})
    asyncio.run(loop.run())
    assert seen == [("train_begin", None, None), ("step_begin", 2.0, 1)]


def test_a_stop_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.learner.on_step = lambda step: run.stop.set() if step == 3 else None
    with pytest.raises(InterruptedRun, match="after step 3"):
        run.go()
    assert sorted(run.learner.saved) == [2, 3]


@pytest.mark.parametrize("left_at", [None, 4])
def test_a_stop_in_the_last_step_is_no_interruption(tmp_path: Path, left_at: int | None) -> None:
    # Of two epochs of three steps; leaving the second after its first step makes that the last.
    diary, last = Diary(), left_at or 6
    callbacks = [diary] if left_at is None else [diary, Asks("should_epoch_stop", at=left_at)]
    run = Run(tmp_path, config=SFTConfig(per_device_train_batch_size=2, save_steps=0), callbacks=callbacks)
    run.learner.on_step = lambda step: run.stop.set() if step == last else None
    run.go()
    assert list(run.learner.saved) == [last]
    assert diary.book[-1] == f"train_end {last}"


def test_a_signal_that_came_while_the_learner_held_the_loop_is_heeded_after_that_step(tmp_path: Path) -> None:
    run = Run(tmp_path, config=SFTConfig(per_device_train_batch_size=2, save_steps=0))

    def noticed_two_turns_later(step: int) -> None:
        if step == 3:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, run.stop.set)

    run.learner.on_step = noticed_two_turns_later
    with pytest.raises(InterruptedRun, match="after step 3"):
        run.go()
    assert list(run.learner.saved) == [3]


def test_a_row_that_cannot_be_used_ends_the_run_with_what_was_trained_before_it_saved_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    loop = run.loop()
    take = loop._feed.take

    def fails(step: int) -> Fed:
        if step == 4:
            raise DataError("Row 7 must be text.")
        return take(step)

    setattr(loop._feed, "take", fails)  # noqa: B010
    with pytest.raises(DataError, match=r"^Row 7 must be text\. 3 steps were trained before it and are kept"):
        asyncio.run(loop.run())
    assert list(run.learner.saved) == [2, 3]


def test_a_lost_learner_ends_the_walk(tmp_path: Path) -> None:
    run = Run(tmp_path, learner=Learner(supervisor=Watch(LearnerLostError("learner died"))))
    with pytest.raises(LearnerLostError, match="learner died"):
        run.go()


def test_kto_gets_the_kl_of_the_weights_as_they_are_at_every_step_and_evaluation(tmp_path: Path) -> None:
    config = KTOConfig(per_device_train_batch_size=2, save_steps=0, eval_steps=3)
    run = Run(tmp_path, config=config, total=3, held_out=2, mismatched=True).go()
    # Two tokens of a nat each above the reference.
    assert [batch.totals["kl"] for batch in run.learner.batches] == [2.0, 2.0, 2.0]
    assert [batch.num_samples for batch in run.learner.scored] == [2, 2, 2, 1, 2]


def test_no_examples_are_made_beyond_the_last_step_or_for_a_step_that_was_left_out(tmp_path: Path) -> None:
    # Three steps make an epoch; after the fourth, the rest of the second is left out.
    run, places = Run(tmp_path, total=9, callbacks=[Asks("should_epoch_stop", at=4)]), list[int]()
    loop = run.loop()
    take = loop._feed.take

    def note(step: int) -> Fed:
        places.append(step)
        return take(step)

    setattr(loop._feed, "take", note)  # noqa: B010
    asyncio.run(loop.run())
    # The fifth was made already; it is made no use of.
    assert places == [1, 2, 3, 4, 5, 7, 8, 9]
    assert [batch.step for batch in run.learner.batches] == [1, 2, 3, 4, 5, 6, 7]


def test_the_next_examples_are_made_while_the_learner_trains(tmp_path: Path) -> None:
    run, second_made = Run(tmp_path, total=2), threading.Event()
    loop = run.loop()
    take = loop._feed.take

    def note(step: int) -> Fed:
        if step == 2:
            second_made.set()
        return take(step)

    setattr(loop._feed, "take", note)  # noqa: B010
    found: list[bool] = []
    run.learner.on_step = lambda step: found.append(second_made.wait(timeout=10.0))
    asyncio.run(loop.run())
    assert found == [True, True]
