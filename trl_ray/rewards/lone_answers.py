"""Has each completion evaluated in a process of its own: what an answer does ends with it and touches no other's score.

group of G --plain ones--> one call, in the group's process
           --the others--> a fork each, a few at once: call with lists of 1 --> a pipe --> value
                           it dies, or computes for too long: the answer is wrong (0), and counted as a metric
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_ray.rewards.functions import RewardFunction
from trl_ray.rewards.jail.walls import MAX_FILES, Walls
from trl_ray.rewards.scoring import accepted

_CHARACTERS = re.compile(r"[A-Za-z0-9 .,:;=<>/?!+\-\n()\[\]*^'\"]{0,500}")
_FUNCTION = re.compile(r"\b(?:a?(?:sin|cos|tan)h?|sec|csc|cot|exp|log|ln|sqrt|abs|Abs)\(")
_CALL = re.compile(r"[A-Za-z0-9)\]'\"]\s*\(")
_POWER = re.compile(r"\*\*|\^")
_SMALL_POWER = re.compile(r"(?:\*\*|\^)\s*[0-9]{1,2}(?![0-9.]|\s*(?:\*\*|\^))")
_STORE = re.compile(r"(?:\]|\.\s*[A-Za-z][A-Za-z0-9]*)\s*[-+*/^]*=(?!=)")
_LARGE_NUMBER = re.compile(r"[0-9]{16}|<<|['\"].*\*|\*.*['\"]", re.DOTALL)
_AT_ONCE = min(4, os.cpu_count() or 1)
_MAX_CPU_S = 2.0
_MIN_CPU_S = 0.25
_MAX_RESULT_BYTES = 2**20


@dataclass(slots=True, kw_only=True, eq=False)
class _Result:
    """Of one call, for the completions `rows`."""

    rows: list[int]
    values: list[Any] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True, eq=False)
class _Fork:
    """One at work."""

    row: int
    pid: int
    pipe: int
    deadline: float
    received: bytearray = field(default_factory=bytearray)


def is_plain(text: str) -> bool:
    """Whether nothing could be called, changed or grow, were it run as Python: it needs no process of its own."""
    if not _CHARACTERS.fullmatch(text) or _LARGE_NUMBER.search(text) or _STORE.search(text):
        return False
    powers = len(_POWER.findall(text))
    if powers > 2 or powers != len(_SMALL_POWER.findall(text)):
        return False
    return _CALL.search(_FUNCTION.sub(" + (", text)) is None


class ScorerRaisedError(Exception):
    """The function raised for one completion; says what."""


class _StoppedError(Exception):
    """The evaluation of an answer did not come to an end."""


def scored_alone(
    function: RewardFunction,
    *,
    name: str,
    reads: Callable[[Any], str],
    walls: Walls,
    timeout_s: float,
    plain: Callable[[str], bool] | None = None,
) -> RewardFunction:
    """The same function, each completion for itself.

    An answer whose evaluation does not come to an end, or raises where others do not, counts as an empty one.

    Args:
        function: scores each completion without regard to the others, not async.
        name: of its part.
        reads: the text of a completion that it evaluates.
        walls: around this process.
        timeout_s: for all.
        plain: which texts need no process of their own; None: those of `is_plain`.
    """
    lone = _LoneAnswers(function, name, reads, walls, timeout_s, plain or is_plain)

    def score(**arguments: Any) -> list[Any]:
        return lone.score(arguments)

    return score


class _LoneAnswers:
    def __init__(
        self,
        function: RewardFunction,
        name: str,
        reads: Callable[[Any], str],
        walls: Walls,
        timeout_s: float,
        plain: Callable[[str], bool],
    ) -> None:
        self._function, self._name, self._reads, self._is_plain = function, name, reads, plain
        self._walls, self._timeout_s = walls, timeout_s

    def score(self, arguments: Mapping[str, Any]) -> list[Any]:
        texts = [self._reads(completion) for completion in arguments["completions"]]
        plain = [row for row, text in enumerate(texts) if self._is_plain(text)]
        lone = sorted(set(range(len(texts))) - set(plain))
        results = [_call(self._function, arguments, plain)] if plain else []
        raised, failed = [], []
        for row, body in self._fork_each(arguments, lone).items():
            try:
                results.append(_read(row, body))
            except ScorerRaisedError as error:
                raised.append(str(error))
                failed.append(row)
            except _StoppedError:
                failed.append(row)
        if raised and not results:
            raise ScorerRaisedError(raised[0])
        if failed:
            results.append(_call(self._function, _with_empty(arguments), sorted(failed)))
            arguments["log_metric"](f"{self._name}/answers_stopped", len(failed))
        self._log(arguments, results, len(texts))
        scores = {row: value for result in results for row, value in zip(result.rows, result.values, strict=True)}
        return [scores[row] for row in range(len(texts))]

    def _log(self, arguments: Mapping[str, Any], results: Sequence[_Result], size: int) -> None:
        for column in dict.fromkeys(column for result in results for column in result.extra):
            values = [None] * size
            for result in results:
                for row, value in zip(result.rows, result.extra.get(column, [None] * len(result.rows)), strict=True):
                    values[row] = value
            arguments["log_extra"](column, values)
        for result in results:
            for metric, number in result.metrics:
                arguments["log_metric"](metric, number)

    def _fork_each(self, arguments: Mapping[str, Any], rows: Sequence[int]) -> dict[int, bytes | None]:
        """What each fork wrote; None of those that did not come to an end."""
        cpu_s = max(_MIN_CPU_S, min(_MAX_CPU_S, 0.7 * self._timeout_s / max(1, len(rows))))
        waiting, at_work, done = list(reversed(rows)), list[_Fork](), dict[int, bytes | None]()
        while waiting or at_work:
            while waiting and len(at_work) < _AT_ONCE:
                at_work.append(self._fork(arguments, waiting.pop(), cpu_s))
            poller = select.poll()
            for fork in at_work:
                poller.register(fork.pipe, select.POLLIN)
            patience = max(0.0, min(fork.deadline for fork in at_work) - time.monotonic())
            ready = {fd for fd, _ in poller.poll(patience * 1000 + 1)}
            for fork in list(at_work):
                piece = os.read(fork.pipe, 2**16) if fork.pipe in ready else None
                fork.received += piece or b""
                is_late = time.monotonic() >= fork.deadline or len(fork.received) > _MAX_RESULT_BYTES
                if piece == b"" or is_late:
                    done[fork.row] = _end(fork)
                    at_work.remove(fork)
        return done

    def _fork(self, arguments: Mapping[str, Any], row: int, cpu_s: float) -> _Fork:
        pipe, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                # What an answer does must not reach the group's pipe, or another answer's.
                os.closerange(3, writes)
                os.closerange(writes + 1, MAX_FILES)
                self._walls.enter_answer(cpu_s=cpu_s)
                _write(writes, _outcome(self._function, arguments, row))
                code = 0
            finally:
                os._exit(code)
        os.close(writes)
        return _Fork(row=row, pid=pid, pipe=pipe, deadline=time.monotonic() + 5 * cpu_s)


def _outcome(function: RewardFunction, arguments: Mapping[str, Any], row: int) -> dict[str, Any]:
    try:
        result = _call(function, arguments, [row])
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a scorer may raise anything
        return {"raised": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"value": result.values[0], "extra": {key: values[0] for key, values in result.extra.items()}} | {
        "metrics": result.metrics
    }


def _call(function: RewardFunction, arguments: Mapping[str, Any], rows: list[int]) -> _Result:
    """The function's values for some completions."""
    size, result = len(arguments["completions"]), _Result(rows=rows)

    def of_rows(value: Any) -> Any:
        is_column = isinstance(value, list) and len(value) == size
        return [value[row] for row in rows] if is_column else value

    chosen = {name: of_rows(value) for name, value in arguments.items()}
    chosen |= {
        "log_extra": lambda column, values: result.extra.__setitem__(str(column), list(values)),
        "log_metric": lambda metric, value: result.metrics.append((str(metric), float(value))),
    }
    returned = function(**accepted(function, chosen))
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)) or len(values) != len(rows):
        raise TypeError(f"it must return {len(rows)} numbers for as many completions, it returned {repr(values)[:200]}")
    result.values = list(values)
    return result


def _with_empty(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same for completions that say nothing."""

    def emptied(completion: Any) -> Any:
        return "" if isinstance(completion, str) else [{**message, "content": ""} for message in completion]

    return {**arguments, "completions": [emptied(completion) for completion in arguments["completions"]]}


def _read(row: int, body: bytes | None) -> _Result:
    """What a fork wrote, trusting nothing: it evaluated what a model wrote.

    Raises:
        ScorerRaisedError: the function raised.
        _StoppedError: it did not come to an end.
    """
    try:
        found = json.loads(body or b"{}")
        if "raised" in found:
            raise ScorerRaisedError(str(found["raised"]))
        return _Result(
            rows=[row],
            values=[found["value"]],
            extra={str(key): [value] for key, value in found["extra"].items()},
            metrics=[(str(metric), float(number)) for metric, number in found["metrics"]],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _StoppedError from None


def _write(fd: int, value: Mapping[str, Any]) -> None:
    data = memoryview(json.dumps(value, default=str).encode())
    while data:
        data = data[os.write(fd, data) :]


def _end(fork: _Fork) -> bytes | None:
    """Kill it if it lives; what it wrote if it ended by itself and well."""
    pid, status = os.waitpid(fork.pid, os.WNOHANG)
    if pid == 0:
        deadline = time.monotonic() + 0.5 if fork.received else 0.0
        while pid == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
            pid, status = os.waitpid(fork.pid, os.WNOHANG)
    if pid == 0:
        os.kill(fork.pid, signal.SIGKILL)
        _, status = os.waitpid(fork.pid, 0)
    os.close(fork.pipe)
    return bytes(fork.received) if status == 0 and fork.received else None
