"""Calls the hooks of the user's callbacks, and holds what they are shown and what they ask for.

loop --step_end, logged, ...--> CallbackList --on_X(args, state, control, **payload)--> callback, callback, ...
 ^                                  |
 '------- TrainerControl <----------'  stop, save, evaluate, log: acted on by the loop

Signature and meaning are those of transformers' `TrainerCallback`, and of TRL's for self-distillation. An object needs
no base class: whatever hook it has is called, on the driver, one callback after the other; coroutines are awaited. The
step waits for all of them, however long (an event says for whom), so a slow callback makes a slow step.
"""

from __future__ import annotations

import asyncio
import enum
import inspect
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from trl_ray.config.runs.cadence_options import Strategy
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import RuntimeKind
from trl_ray.config.step_counts import steps_of
from trl_ray.errors import CallbackError
from trl_ray.pipelines.callbacks.callback_states import read_states, write_states
from trl_ray.pipelines.callbacks.shown_objects import (
    ShownArguments,
    ShownOptimizer,
    ShownSchedule,
    with_their_names,
)
from trl_ray.types import EventKind

MAX_LOG_HISTORY = 1000
"""Entries of `TrainerState.log_history`; metrics.jsonl holds all of them."""
_SAY_WAITING_S = 30.0


Say = Callable[..., None]
"""(kind, actor, **detail) -> writes down an event."""


class Hook(enum.StrEnum):
    """The methods of a callback that are called."""

    INIT_END = "on_init_end"
    TRAIN_BEGIN = "on_train_begin"
    TRAIN_END = "on_train_end"
    EPOCH_BEGIN = "on_epoch_begin"
    EPOCH_END = "on_epoch_end"
    STEP_BEGIN = "on_step_begin"
    STEP_END = "on_step_end"
    EVALUATE = "on_evaluate"
    LOG = "on_log"
    SAVE = "on_save"
    PROMPTS_SELECTED = "on_generation_prompts_selected"
    TEACHER_CONTEXT = "on_teacher_context_built"
    BATCH_PREPARED = "on_self_distillation_batch_prepared"
    BATCH_BUILT = "on_generation_batch_built"

    @property
    def is_of_self_distillation(self) -> bool:
        """Whether it is one of TRL's, which are called with nothing but keywords."""
        return self in (Hook.PROMPTS_SELECTED, Hook.TEACHER_CONTEXT, Hook.BATCH_PREPARED, Hook.BATCH_BUILT)


@dataclass(slots=True, kw_only=True)
class TrainerControl:
    """What callbacks ask for.

    Mutable, against the rule of the house: setting a field is how a callback asks, in transformers' signature.
    """

    should_training_stop: bool = False
    """The run ends after this step, in order, with a checkpoint."""
    should_epoch_stop: bool = False
    """What is left of this epoch is left out; False again when the next begins."""
    should_save: bool = False
    """A checkpoint after this step; False again when it is written, or the next step begins."""
    should_evaluate: bool = False
    """An evaluation after this step; likewise."""
    should_log: bool = False
    """`on_log` for this step, whatever `logging_steps` says; likewise."""

    def clear_step(self) -> None:
        """Forget what was asked for one step."""
        self.should_save = self.should_evaluate = self.should_log = False


@dataclass(slots=True, kw_only=True)
class TrainerState:
    """How far the run is; one object for the whole run, since callbacks keep it. Read it, do not write it."""

    global_step: int = 0
    """Finished optimizer steps; goes back when the learner is lost and training goes on from a checkpoint."""
    max_steps: int = 0
    epoch: float = 0.0
    """Passes over the dataset that are done."""
    num_train_epochs: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    """What `on_log` was given, with `step`: the last 1000 entries since this process began."""
    best_metric: float | None = None
    """Of `metric_for_best_model`; None where a pipeline has none."""
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    """Folder of that step's checkpoint; None where there is none, or none any more."""
    is_world_process_zero: bool = True
    """Always: callbacks run on the driver, of which there is one."""
    is_local_process_zero: bool = True
    is_hyper_param_search: bool = False
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    train_batch_size: int | None = None
    """Of one micro-batch of one rank."""
    num_input_tokens_seen: int = 0
    """Always 0, as `total_flos`: metrics count tokens."""
    total_flos: float = 0.0
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)

    def save_to_json(self, json_path: str) -> None:
        """Write it to a file, as transformers does."""
        Path(json_path).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpan:
    """Where a session starts, where it ends, and what its loop can do for callbacks."""

    step: int
    """Finished optimizer steps."""
    max_steps: int
    epoch: float
    num_train_epochs: int
    checkpoints: Path
    """Their folder."""
    can_evaluate: bool
    can_stop_epoch: bool


class CallbackList:
    """The callbacks of a run, in order; they outlive sessions.

    Args:
        callbacks: objects with hooks.
        args: the configuration, first argument of every hook.
    """

    def __init__(self, callbacks: Sequence[Any], *, args: RunConfig) -> None:
        self.state, self.control = TrainerState(), TrainerControl()
        self.stopped_by: str | None = None
        """Who asked for the end of training."""
        self._callbacks, self._args = tuple(callbacks), args
        self._shown_args = ShownArguments(args)
        self._optimizer = ShownOptimizer(args.learning_rate)
        self._shown: dict[str, Any] = {"optimizer": self._optimizer, "lr_scheduler": ShownSchedule(self._optimizer)}
        self._span: TrainingSpan | None = None
        self._say: Say | None = None
        self._initial: bytes | None = None
        self._in_epoch, self._epoch_before = False, 0.0
        # A hook that holds the driver's loop would make actors seem lost, which answer meanwhile: it gets a thread, for
        # all callbacks the same. Without actors of their own there is nobody to lose, and breakpoints are simpler.
        has_actors = bool(callbacks) and args.runtime.kind is RuntimeKind.RAY
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="callbacks") if has_actors else None

    @property
    def is_empty(self) -> bool:
        """Whether there is nobody to tell."""
        return not self._callbacks

    def show(self, **objects: Any) -> None:
        """Give every hook of transformers these, too: model, processing_class, train_dataloader, ..."""
        self._shown |= objects

    def has(self, hook: Hook) -> bool:
        """Whether any callback wants to hear of it."""
        return any(callable(getattr(callback, hook, None)) for callback in self._callbacks)

    def close(self) -> None:
        """Let go of the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def begin(self, span: TrainingSpan, *, checkpoint: str | None, say: Say) -> None:
        """A session starts, the first or one after the learner was lost; states are those of the checkpoint.

        Args:
            course: of the session.
            checkpoint: that it goes on from.
            say: writes down an event of the driver.

        Raises:
            CallbackError: a callback raised, or asked for what cannot be done; so do all methods below.
        """
        restarted, self._span, self._say = self._span is not None, span, say
        for problem in self._rewind(checkpoint):
            say(EventKind.WARNING, "driver", detail=problem)
        state = self.state
        state.global_step, state.max_steps = span.step, span.max_steps
        state.epoch, state.num_train_epochs = span.epoch, span.num_train_epochs
        args = self._args
        state.logging_steps, state.eval_steps, state.save_steps = (
            steps_of(count, span.max_steps) for count in (args.logging_steps, args.eval_steps, args.save_steps)
        )
        state.train_batch_size = args.per_device_train_batch_size
        state.log_history[:] = [line for line in state.log_history if line["step"] <= span.step]
        self.control.should_training_stop, self.stopped_by = False, None
        if not restarted:
            for sentence in _uncalled(self._callbacks):
                say(EventKind.WARNING, "driver", detail=sentence)
            await self.dispatch(Hook.INIT_END)
            await self.dispatch(Hook.TRAIN_BEGIN)

    async def step_begin(self) -> None:
        """A step starts, and perhaps an epoch."""
        if not self._in_epoch:
            self._in_epoch, self.control.should_epoch_stop = True, False
            await self.dispatch(Hook.EPOCH_BEGIN)
        self.control.clear_step()
        await self.dispatch(Hook.STEP_BEGIN)

    async def step_end(self, *, step: int, epoch: float, lr: float | None = None) -> None:
        """A step is trained; `epoch` counts the passes done with it, and `lr` is its learning rate."""
        if lr is not None:
            self._optimizer.move(lr)
        self._epoch_before = self.state.epoch
        self.state.global_step, self.state.epoch = step, epoch
        await self.dispatch(Hook.STEP_END)

    async def evaluated(
        self, numbers: Mapping[str, float], *, best: float | None = None, best_step: int | None = None
    ) -> None:
        """Held-out numbers are known, by their names without ``eval_``; `best` is that of `metric_for_best_model`."""
        self.control.should_evaluate = False
        metrics = {f"eval_{name}": value for name, value in numbers.items()}
        # As in transformers they are a line of the log, before they are an evaluation.
        await self._tell_log({**metrics, "epoch": self.state.epoch})
        # They compare with the best before, which EarlyStoppingCallback relies on.
        await self.dispatch(Hook.EVALUATE, metrics=metrics)
        self.set_best(best, best_step)

    def set_best(self, best: float | None, best_step: int | None) -> None:
        """The best held-out value so far, and its step."""
        self.state.best_metric, self.state.best_global_step = best, None if best is None else best_step
        self._find_best_checkpoint()

    async def logged(self, record: Mapping[str, float]) -> None:
        """The line of a step is written."""
        state, control = self.state, self.control
        if not self._log_is_due and not control.should_log:
            return
        control.should_log = False
        await self._tell_log(with_their_names(record, epoch=state.epoch))

    async def _tell_log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append({**logs, "step": self.state.global_step})
        del self.state.log_history[:-MAX_LOG_HISTORY]
        await self.dispatch(Hook.LOG, logs=logs)

    @property
    def _log_is_due(self) -> bool:
        """Whether the line of the last step is one that is told."""
        if self.state.global_step == 1 and self._args.logging_first_step:
            return True
        match self._args.logging_strategy:
            case Strategy.STEPS:
                return self.state.global_step % steps_of(self._args.logging_steps, self.state.max_steps) == 0
            case Strategy.EPOCH:
                return math.floor(self.state.epoch) > math.floor(self._epoch_before)
            case Strategy.NO:
                return False

    async def epoch_end(self) -> None:
        """All of a step is done; tell the end of an epoch, if it was its last one or one has asked to leave it."""
        ended = math.floor(self.state.epoch) > math.floor(self._epoch_before)
        if ended or self.control.should_epoch_stop:
            await self._close_epoch()
            if not ended:
                self.state.epoch = float(math.ceil(self.state.epoch))

    async def saved(self) -> None:
        """A checkpoint is written."""
        self.control.should_save = False
        self._find_best_checkpoint()
        await self.dispatch(Hook.SAVE)

    async def train_end(self) -> None:
        """Training has ended in order, and its last checkpoint is written."""
        if self._in_epoch:
            await self._close_epoch()
        await self.dispatch(Hook.TRAIN_END)

    async def dispatch(self, hook: Hook, **payload: Any) -> None:
        """Call a hook of all callbacks that have it."""
        for callback in self._callbacks:
            if not callable(getattr(callback, hook, None)):
                continue
            answer = await self._call(callback, hook, payload)
            if answer is not None:
                self._take_control(callback, hook, answer)
            self._check_control(callback, hook)

    def files(self) -> dict[str, bytes]:
        """For a checkpoint: the states of callbacks with a `state_dict`."""
        return write_states(self._callbacks)

    def _rewind(self, checkpoint: str | None) -> tuple[str, ...]:
        """Callbacks have the state of the step that training goes on from."""
        if checkpoint is not None:
            return read_states(self._callbacks, Path(checkpoint))
        if self._initial is None:
            self._initial = next(iter(self.files().values()), b"")
            return ()
        return read_states(self._callbacks, self._initial)

    async def _close_epoch(self) -> None:
        self._in_epoch = False
        await self.dispatch(Hook.EPOCH_END)

    def _find_best_checkpoint(self) -> None:
        assert self._span is not None, "a session has begun"
        folder = self._span.checkpoints / f"step-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(folder) if folder.is_dir() else None

    async def _call(self, callback: Any, hook: Hook, payload: Mapping[str, Any]) -> Any:
        method = getattr(callback, hook)
        if hook.is_of_self_distillation:
            call = partial(method, args=self._shown_args, state=self.state, control=self.control, **payload)
        else:
            given = _taken(method, {**self._shown, **payload})
            call = partial(method, self._shown_args, self.state, self.control, **given)
        if self._thread is None or inspect.iscoroutinefunction(method):
            answer = _guarded(call, callback, hook)
        else:
            loop = asyncio.get_running_loop()
            answer = loop.run_in_executor(self._thread, _guarded, call, callback, hook)
            answer = await self._patiently(answer, callback, hook)
        if inspect.isawaitable(answer):
            try:
                return await self._patiently(answer, callback, hook)
            except Exception as error:  # a user's callback may raise anything
                raise _raised(callback, hook, error) from error
        return answer

    async def _patiently(self, answer: Awaitable[Any], callback: Any, hook: Hook) -> Any:
        """Wait as long as it takes, and say now and then for whom."""
        assert self._say is not None, "a session has begun"
        waited, began = asyncio.ensure_future(answer), time.monotonic()
        try:
            while not (await asyncio.wait([waited], timeout=_SAY_WAITING_S))[0]:
                seconds = round(time.monotonic() - began, 1)
                self._say(EventKind.WAITING, "driver", on=f"the callback {name_of(callback)}.{hook}", seconds=seconds)
            return waited.result()
        finally:
            waited.cancel()

    def _take_control(self, callback: Any, hook: Hook, answer: Any) -> None:
        """A hook may answer with a control, its own or the one it was given."""
        for flag in fields(TrainerControl):
            wanted = getattr(answer, flag.name, None)
            if not isinstance(wanted, bool):
                raise CallbackError(
                    f"{name_of(callback)}.{hook} must return the control it was given, or None, got "
                    f"{type(answer).__name__} without a true or false {flag.name}. Return control."
                )
            setattr(self.control, flag.name, wanted)

    def _check_control(self, callback: Any, hook: Hook) -> None:
        """Refuse what cannot be done when it is asked for, while it is known who asks."""
        control, span = self.control, self._span
        assert span is not None, "a session has begun"
        if control.should_training_stop and self.stopped_by is None:
            self.stopped_by = f"{name_of(callback)}.{hook}"
        if control.should_evaluate and not span.can_evaluate:
            raise CallbackError(
                f"{name_of(callback)}.{hook} may set control.should_evaluate only where there is something to evaluate "
                "on, but eval_steps is 0. Set eval_steps; more than the run has steps leaves evaluation to callbacks."
            )
        if control.should_epoch_stop and not span.can_stop_epoch:
            raise CallbackError(
                f"{name_of(callback)}.{hook} may set control.should_epoch_stop only where a dataset is in memory and "
                "trained on directly: prompts are handed out ahead of training, and a stream cannot be wound on. Set "
                "control.should_training_stop."
            )


_UNCALLED = {
    "on_substep_end": "micro-batches are the learner's own. Use on_step_end",
    "on_pre_optimizer_step": "gradients are in the learner. Use on_step_end, and grad_norm in on_log",
    "on_optimizer_step": "the optimizer is in the learner. Use on_step_end",
    "on_prediction_step": "held-out rows are measured in one go. Use on_evaluate",
    "on_predict": "predict() gives its answer to who calls it. Use what it returns",
    "on_push_begin": "pushes go beside training. Use on_save",
}
"""Hooks of transformers that nothing calls here, and why."""


def _uncalled(callbacks: Sequence[Any]) -> list[str]:
    """A sentence for each hook that a user wrote and nobody will call; those that transformers wrote count for none."""
    said = []
    for callback in callbacks:
        for hook, why in _UNCALLED.items():
            written = getattr(type(callback), hook, None)
            if callable(written) and not str(getattr(written, "__module__", "")).startswith("transformers."):
                said.append(f"{name_of(callback)}.{hook} is never called: {why}")
    return said


def _taken(method: Callable[..., Any], payload: Mapping[str, Any]) -> dict[str, Any]:
    """What of the payload a hook has room for: one may leave out the `**kwargs` that transformers asks for."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return dict(payload)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return dict(payload)
    return {each.name: payload[each.name] for each in parameters if each.name in payload}


def _guarded(call: Callable[[], Any], callback: Any, hook: Hook) -> Any:
    """The answer of a user's callback; what it raises is told with its name, also from its thread."""
    try:
        return call()
    except Exception as error:  # a user's callback may raise anything
        raise _raised(callback, hook, error) from error


def _raised(callback: Any, hook: Hook, error: Exception) -> CallbackError:
    return CallbackError(
        f"{name_of(callback)}.{hook} must not raise, but did: {type(error).__name__}: {error}. Mend the callback, then "
        "resume."
    )


def name_of(callback: Any) -> str:
    """What messages call a callback."""
    return type(callback).__name__
