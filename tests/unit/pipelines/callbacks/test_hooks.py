"""What callbacks are told, in which order, and what comes of what they ask for; over a loop whose learner is a fake."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import DefaultFlowCallback, EarlyStoppingCallback, IntervalStrategy, PrinterCallback, ProgressCallback

from callbacks_for_tests import Asks, Counter, Diary, Raises, StopsAt
from dataset_loops import Learner, Run, Watch
from trl_ray.config.callback_options import CallbackSpec
from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.errors import CallbackError, ConfigError, LearnerLostError
from trl_ray.pipelines.callbacks.callback_loading import make_callbacks, specs_with
from trl_ray.pipelines.callbacks.callback_states import CALLBACKS, read_states
from trl_ray.pipelines.callbacks.hooks import MAX_LOG_HISTORY, CallbackList, TrainerControl, TrainingSpan
from trl_ray.pipelines.supervised.dataset_recording import Accounts
from trl_ray.types import EventKind

HERE = Path(__file__).parents[3] / "callbacks_for_tests.py"


def config(**changes: Any) -> SFTConfig:
    return build(
        SFTConfig,
        {"per_device_train_batch_size": 2, "shuffle_dataset": False, "save_steps": 0, "logging_steps": 1, **changes},
    )


def span(**changes: Any) -> TrainingSpan:
    values: dict[str, Any] = {
        "step": 0,
        "max_steps": 6,
        "epoch": 0.0,
        "num_train_epochs": 2,
        "checkpoints": Path("nowhere"),
        "can_evaluate": False,
        "can_stop_epoch": False,
    }
    return TrainingSpan(**{**values, **changes})


def quiet(kind: EventKind, actor: str, **detail: Any) -> None:
    """Nobody reads the events."""


def begun(*callbacks: Any, **changes: Any) -> CallbackList:
    """Callbacks of a session that has begun."""
    made = CallbackList(callbacks, args=config(runtime={"kind": "local"}))
    asyncio.run(made.begin(span(**changes), checkpoint=None, say=quiet))
    return made


def test_hooks_come_in_order_with_epochs_around_steps_and_the_save_before_the_end(tmp_path: Path) -> None:
    diary = Diary()
    Run(tmp_path, config=config(eval_steps=3, save_steps=4), total=4, held_out=2, callbacks=[diary]).go()
    assert diary.book == [
        "train_begin 0", "log 0", "evaluate 0",
        "epoch_begin 0", "step_begin 0", "step_end 1", "log 1",
        "step_begin 1", "step_end 2", "log 2",
        "step_begin 2", "step_end 3", "log 3", "evaluate 3", "log 3", "epoch_end 3",
        "epoch_begin 3", "step_begin 3", "step_end 4", "log 4", "evaluate 4", "log 4",
        "save 4", "epoch_end 4", "train_end 4",
    ]  # fmt: skip


def test_logs_are_the_lines_of_the_metrics_file_and_metrics_are_named_as_transformers_names_them(
    tmp_path: Path,
) -> None:
    diary = Diary()
    run = Run(tmp_path, config=config(eval_steps=2), total=2, held_out=2, callbacks=[diary]).go()
    written = [{k: v for k, v in line.items() if k not in ("step", "time")} for line in run.lines("metrics.jsonl")]
    logs = [payload["logs"] for payload in diary.of("on_log")]
    assert [told for told in logs if "loss" in told] == [{**line, "learning_rate": line["lr"]} for line in written]
    # Evaluations are lines of the log, too, as in transformers.
    assert [told for told in logs if "loss" not in told] == [
        {"eval_loss": 5.0, "eval_accuracy": 0.5, "epoch": 0.0},
        {"eval_loss": 4.0, "eval_accuracy": 0.5, "epoch": 2 / 3},
    ]
    assert [payload["metrics"] for payload in diary.of("on_evaluate")] == [
        {"eval_loss": 5.0, "eval_accuracy": 0.5},
        {"eval_loss": 4.0, "eval_accuracy": 0.5},
    ]


def test_state_counts_steps_and_epochs_and_knows_the_best_metric(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []
    before: list[float | None] = []

    class Looks:
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **payload: Any) -> None:
            if "loss" in logs:
                seen.append((state.global_step, round(state.epoch, 2), state.best_metric, state.best_global_step))

        def on_evaluate(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
            before.append(state.best_metric)

    learner = Learner(eval_losses=[5.0, 3.0, 4.0])
    run = Run(tmp_path, config=config(eval_steps=2), total=4, held_out=1, learner=learner, callbacks=[Looks()])
    loop = run.loop()
    best = run.path / "run" / "checkpoints" / "step-2"
    best.mkdir(parents=True)
    asyncio.run(loop.run())
    assert seen == [(1, 0.33, 5.0, 0), (2, 0.67, 3.0, 2), (3, 1.0, 3.0, 2), (4, 1.33, 3.0, 2)]
    assert before == [None, 5.0, 3.0]  # the best of those before, as in transformers
    state = loop._callbacks.state
    assert (state.max_steps, state.num_train_epochs, state.is_world_process_zero) == (4, 2, True)
    assert state.best_model_checkpoint == str(best)
    best.rmdir()
    loop._callbacks.set_best(3.0, 2)
    assert state.best_model_checkpoint is None


def test_a_callback_stops_the_run_after_the_step_with_a_checkpoint_and_its_name(tmp_path: Path) -> None:
    diary = Diary()
    run = Run(tmp_path, callbacks=[StopsAt(3), diary], config=config(save_steps=3)).go()
    assert [batch.step for batch in run.learner.batches] == [1, 2, 3]
    assert list(run.learner.saved) == [3]
    assert diary.book[-3:] == ["epoch_end 3", "save 3", "train_end 3"]
    assert any("StopsAt.on_step_end" in str(event["detail"]) for event in run.lines("events.jsonl"))


def test_a_stop_asked_for_when_the_checkpoint_is_written_does_not_write_it_again(tmp_path: Path) -> None:
    diary = Diary()
    run = Run(
        tmp_path, callbacks=[Asks("should_training_stop", at=2, hook="on_save"), diary], config=config(save_steps=2)
    )
    run.go()
    assert len(run.learner.batches) == 2
    assert [line for line in diary.book if line.startswith("save")] == ["save 2"]


@pytest.mark.parametrize("hook", ["on_step_begin", "on_step_end", "on_log", "on_epoch_end"])
def test_a_callback_has_a_checkpoint_written_once(tmp_path: Path, hook: str) -> None:
    at = {"on_step_begin": 2}.get(hook, 3)
    run = Run(tmp_path, callbacks=[Asks("should_save", at=at, hook=hook)], config=config()).go()
    assert list(run.learner.saved) == [3, 6]


@pytest.mark.parametrize("hook", ["on_step_end", "on_log", "on_epoch_end"])
def test_a_callback_has_an_evaluation_made_once(tmp_path: Path, hook: str) -> None:
    diary = Diary()
    callbacks = [Asks("should_evaluate", at=3, hook=hook), diary]
    Run(tmp_path, callbacks=callbacks, config=config(eval_steps=100), held_out=1).go()
    assert [line for line in diary.book if line.startswith("evaluate")] == ["evaluate 0", "evaluate 3", "evaluate 6"]


def test_a_callback_is_logged_to_between_logging_steps_when_it_asks(tmp_path: Path) -> None:
    diary = Diary()
    Run(tmp_path, callbacks=[Asks("should_log", at=1), diary], config=config(logging_steps=4)).go()
    assert [line for line in diary.book if line.startswith("log")] == ["log 1", "log 4"]


def test_what_is_asked_too_late_for_a_step_is_not_done_in_the_next(tmp_path: Path) -> None:
    diary = Diary()
    Run(tmp_path, callbacks=[Asks("should_log", at=4, hook="on_log"), diary], config=config(logging_steps=4)).go()
    assert [line for line in diary.book if line.startswith("log")] == ["log 4"]


def test_on_save_sees_that_nobody_asks_for_a_checkpoint_any_more(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Looks:
        def on_save(self, args: Any, state: Any, control: Any) -> None:
            seen.append(control.should_save)

    Run(tmp_path, callbacks=[Asks("should_save", at=2), Looks()], config=config(), total=3).go()
    assert seen == [False, False]


def test_the_rest_of_an_epoch_is_left_out_and_a_resumed_run_knows_it(tmp_path: Path) -> None:
    diary = Diary()
    callbacks = [Asks("should_epoch_stop", at=1), Asks("should_save", at=2), diary]
    run = Run(tmp_path, callbacks=callbacks, config=config()).go()
    # Steps of an epoch are [0, 1], [2, 3], [4]: after the first, the second epoch begins.
    assert run.rows == [[0, 1], [0, 1], [2, 3], [4]]
    assert [batch.step for batch in run.learner.batches] == [1, 2, 3, 4]
    assert diary.book[5:8] == ["epoch_end 1", "epoch_begin 1", "step_begin 1"]
    assert diary.book[-3:] == ["epoch_end 4", "save 4", "train_end 4"]
    resumed = Run(tmp_path, accounts=Accounts.from_state(run.learner.saved[2]["accounts"]), config=config()).go()
    assert resumed.rows == run.rows[2:]


def test_what_a_walk_cannot_do_is_refused_when_it_is_asked_for() -> None:
    for field, hint in (("should_evaluate", "Set eval_steps"), ("should_epoch_stop", "should_training_stop")):
        callbacks = begun(Asks(field, at=1))
        with pytest.raises(CallbackError, match=rf"Asks.on_step_end may set control.{field} .*{hint}"):
            asyncio.run(callbacks.step_end(step=1, epoch=0.5))


def test_what_a_callback_raises_ends_the_run_with_its_name_from_a_thread_too(tmp_path: Path) -> None:
    for kind in ("local", "ray"):
        run = Run(tmp_path, callbacks=[Raises()], config=config(runtime={"kind": kind}))
        with pytest.raises(
            CallbackError, match=r"Raises\.on_log must not raise, but did: StopIteration: no more patience"
        ):
            run.go()


def test_coroutines_are_awaited_in_turn_and_plain_hooks_leave_the_loop_free() -> None:
    order: list[tuple[str, bool]] = []

    class Asynchronous:
        async def on_step_end(self, args: Any, state: Any, control: Any) -> None:
            await asyncio.sleep(0)
            order.append(("first", threading.current_thread() is threading.main_thread()))

    class Plain:
        def on_step_end(self, args: Any, state: Any, control: Any) -> None:
            order.append(("second", threading.current_thread() is threading.main_thread()))

    async def told(kind: str) -> None:
        callbacks = CallbackList([Asynchronous(), Plain()], args=config(runtime={"kind": kind}))
        await callbacks.begin(span(), checkpoint=None, say=quiet)
        await callbacks.step_end(step=1, epoch=0.5)
        callbacks.close()

    asyncio.run(told("ray"))
    asyncio.run(told("local"))
    assert order == [("first", True), ("second", False), ("first", True), ("second", True)]


def test_a_slow_callback_is_waited_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ray.pipelines.callbacks.hooks._SAY_WAITING_S", 0.01)
    known, said = threading.Event(), []

    class Slow:
        def on_train_begin(self, args: Any, state: Any, control: Any) -> None:
            assert known.wait(timeout=20)

    def say(kind: EventKind, actor: str, **detail: Any) -> None:
        said.append((kind, detail["on"]))
        known.set()

    callbacks = CallbackList([Slow()], args=config(runtime={"kind": "ray"}))
    asyncio.run(callbacks.begin(span(), checkpoint=None, say=say))
    assert said[0] == (EventKind.WAITING, "the callback Slow.on_train_begin")


def test_a_coroutine_that_raises_is_named() -> None:
    class Fails:
        async def on_save(self, args: Any, state: Any, control: Any) -> None:
            raise OSError("disk full")

    with pytest.raises(CallbackError, match=r"Fails\.on_save must not raise, but did: OSError: disk full"):
        asyncio.run(begun(Fails()).saved())


def test_a_returned_control_takes_the_place_of_the_one_given() -> None:
    class Returns:
        def on_step_end(self, args: Any, state: Any, control: Any) -> Any:
            return TrainerControl(should_save=True)

    class Wrong:
        def on_step_end(self, args: Any, state: Any, control: Any) -> Any:
            return True

    callbacks = begun(Returns())
    asyncio.run(callbacks.step_end(step=1, epoch=0.5))
    assert callbacks.control.should_save
    with pytest.raises(
        CallbackError, match=r"Wrong\.on_step_end must return the control it was given, or None, got bool"
    ):
        asyncio.run(begun(Wrong()).step_end(step=1, epoch=0.5))


def test_the_log_history_is_bounded_and_goes_back_with_the_run() -> None:
    callbacks = begun(Diary())

    async def logs(count: int) -> None:
        for step in range(1, count + 1):
            await callbacks.step_end(step=step, epoch=0.1)
            await callbacks.logged({"loss": 1.0 / step})

    asyncio.run(logs(MAX_LOG_HISTORY + 2))
    history = callbacks.state.log_history
    assert (len(history), history[0]) == (MAX_LOG_HISTORY, {"loss": 1.0 / 3, "epoch": 0.1, "step": 3})
    asyncio.run(callbacks.begin(span(step=10), checkpoint=None, say=quiet))
    assert [line["step"] for line in history] == [3, 4, 5, 6, 7, 8, 9, 10]


def test_states_are_in_checkpoints_and_come_back_to_callbacks_of_their_class(tmp_path: Path) -> None:
    run = Run(tmp_path, callbacks=[Counter(), Diary(), Counter()], config=config(save_steps=2), total=4).go()
    assert json.loads(run.learner.files[2][CALLBACKS]) == [{"class": "Counter", "state": {"steps": 2}}] * 2
    (tmp_path / CALLBACKS).write_bytes(run.learner.files[2][CALLBACKS])
    again, diary = Counter(), Diary()
    callbacks = CallbackList([diary, again], args=config(runtime={"kind": "local"}))
    said: list[str] = []
    asyncio.run(
        callbacks.begin(
            span(step=2), checkpoint=str(tmp_path), say=lambda kind, actor, **detail: said.append(detail["detail"])
        )
    )
    assert again.steps == 2
    assert said == ["the checkpoint holds a state of the callback Counter, but the run has none that takes it"]
    assert diary.book == ["train_begin 2"]


def test_without_states_checkpoints_are_what_they_were(tmp_path: Path) -> None:
    run = Run(tmp_path, callbacks=[Diary()], total=1, config=config()).go()
    assert CALLBACKS not in run.learner.files[1]


def test_callbacks_live_on_when_the_learner_is_lost_and_their_states_go_back(tmp_path: Path) -> None:
    counter, diary = Counter(), Diary()
    callbacks = begun(counter, diary)

    async def session(steps: int) -> None:
        for step in range(1, steps + 1):
            await callbacks.step_begin()
            await callbacks.step_end(step=step, epoch=step / 3)

    asyncio.run(session(2))
    (tmp_path / CALLBACKS).write_bytes(json.dumps([{"class": "Counter", "state": {"steps": 1}}]).encode())
    asyncio.run(callbacks.begin(span(step=1, epoch=1 / 3), checkpoint=str(tmp_path), say=quiet))
    assert (counter.steps, callbacks.state.global_step) == (1, 1)
    asyncio.run(callbacks.begin(span(), checkpoint=None, say=quiet))
    assert (counter.steps, callbacks.state.global_step) == (0, 0)
    assert diary.book.count("train_begin 0") == 1
    assert [line for line in diary.book if line.startswith("epoch")] == ["epoch_begin 0"]


def test_a_state_that_json_cannot_hold_is_named() -> None:
    class Holds(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"steps": {1, 2}}

    with pytest.raises(CallbackError, match=r"Holds\.state_dict must give what JSON can hold"):
        begun(Holds())


def test_a_run_that_fails_tells_no_end_of_training(tmp_path: Path) -> None:
    diary = Diary()
    run = Run(tmp_path, callbacks=[diary], learner=Learner(supervisor=Watch(LearnerLostError("gone"))))
    with pytest.raises(LearnerLostError):
        run.go()
    assert "train_end" not in str(diary.book)


def test_callbacks_are_named_in_yaml_and_those_of_python_follow() -> None:
    text = f"callbacks: ['{HERE}:Counter', {{path: '{HERE}:StopsAt', kwargs: {{step: 3}}}}]"
    named = config(**parse_yaml(text, source="test"))
    assert [spec.kwargs for spec in named.callbacks] == [{}, {"step": 3}]
    again = build(SFTConfig, parse_yaml(dump_yaml(named), source="test"))
    assert again.callbacks == named.callbacks
    book: list[str] = []
    callbacks = make_callbacks(again, [Diary(book=book), Counter])
    assert [type(callback).__name__ for callback in callbacks._callbacks] == ["Counter", "StopsAt", "Diary", "Counter"]


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        ("no.such.module:X", {}, "Callback 'no.such.module:X' must be importable"),
        (f"{HERE}:Countr", {}, "Did you mean .*:Counter?"),
        ("Counter", {}, "must be named as package.module:name or file.py:name"),
        (f"{HERE}:WantsAnArgument", {}, "must be constructible, but: TypeError.*needed"),
        (f"{HERE}:StopsAt", {"stp": 3}, r"StopsAt\(stp=3\) must be constructible"),
        (f"{HERE}:NoHook", {}, "at least one hook.*It has on_step_ended; did you mean on_step_end?"),
        (f"{HERE}:PLAIN", {}, "must be a class, or a function that makes an object, it is tuple"),
    ],
)
def test_what_cannot_be_a_callback_is_refused_before_anything_starts(
    path: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_callbacks(config(callbacks=[{"path": path, "kwargs": kwargs}]), None)


def test_callbacks_of_python_keep_their_place_in_the_configuration_and_are_missed_when_they_are_absent() -> None:
    named = [CallbackSpec(path="a.b:C"), CallbackSpec(path="python:Old")]
    assert [spec.path for spec in specs_with(named, [Counter(), Counter])] == [
        "a.b:C",
        "python:Counter",
        "python:Counter",
    ]
    with pytest.raises(ConfigError, match="callbacks must be a list, got a Counter"):
        specs_with(named, Counter())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"given as objects, in Python\. Resume there too"):
        make_callbacks(config(callbacks=["python:Counter"]), None)
    assert not make_callbacks(config(callbacks=[]), [])._callbacks


def test_early_stopping_of_transformers_counts_evaluations_that_were_no_better(tmp_path: Path) -> None:
    patience = EarlyStoppingCallback(early_stopping_patience=2)
    learner = Learner(eval_losses=[5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 1.0])
    run = Run(tmp_path, config=config(eval_steps=1), total=6, held_out=1, learner=learner, callbacks=[patience]).go()
    assert [batch.step for batch in run.learner.batches] == [1, 2, 3, 4, 5]
    assert any("EarlyStoppingCallback.on_evaluate" in str(event["detail"]) for event in run.lines("events.jsonl"))


def test_early_stopping_of_transformers_keeps_its_patience_in_checkpoints(tmp_path: Path) -> None:
    patience = EarlyStoppingCallback(early_stopping_patience=9)
    learner = Learner(eval_losses=[5.0, 6.0, 6.0])
    run = Run(
        tmp_path, config=config(eval_steps=1, save_steps=2), total=2, held_out=1, learner=learner, callbacks=[patience]
    ).go()
    (tmp_path / CALLBACKS).write_bytes(run.learner.files[2][CALLBACKS])
    renewed = EarlyStoppingCallback(early_stopping_patience=9)
    assert read_states([renewed], tmp_path) == ()
    assert renewed.early_stopping_patience_counter == patience.early_stopping_patience_counter == 2


def test_callbacks_of_transformers_find_what_they_look_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [PrinterCallback(), ProgressCallback(), DefaultFlowCallback()]
    run = Run(tmp_path, config=config(eval_steps=2, save_steps=3, logging_steps=2), total=4, held_out=1)
    run.callbacks = callbacks
    run.go()
    assert sorted(run.learner.saved) == [3, 4]
    assert capsys.readouterr().out.count("'loss': '0.5'") == 2  # of step 2, by two of them


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, (IntervalStrategy.NO, None, False)),
        ({"eval_steps": 2}, (IntervalStrategy.STEPS, "loss", False)),
        ({"eval_strategy": "epoch", "metric_for_best_model": "eval_accuracy"}, ("epoch", "accuracy", True)),
    ],
)
def test_callbacks_are_shown_options_as_transformers_has_them(
    tmp_path: Path, options: dict[str, Any], shown: tuple[Any, ...]
) -> None:
    seen: list[tuple[Any, ...]] = []

    class Looks:
        def on_init_end(self, args: Any, state: Any, control: Any, **payload: Any) -> None:
            seen.append((args.eval_strategy, args.metric_for_best_model, args.greater_is_better))

    Run(tmp_path, config=config(**options), total=1, held_out=int(bool(options)), callbacks=[Looks()]).go()
    assert seen == [shown] and (seen[0][0] == IntervalStrategy.NO) is (not options)
