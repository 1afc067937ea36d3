"""Shows a run in the terminal: a live line on a tty, one plain line per step elsewhere, notable events in between.

    step 12/30 ━━━━━━━━╸        reward 0.412 ▁▂▃▅▆  loss 0.0123  stale 0.8 max 2  ...  eta 2m 31s

The terminal may go away at any time; the run does not notice.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trl_ray.observe.run_files import jsonable
from trl_ray.observe.sinks import Sink, TrainedGroups
from trl_ray.types import Event, EventKind

_STYLES = {
    EventKind.RUN_FAILED: "bold red",
    EventKind.ACTOR_LOST: "red",
    EventKind.INTERRUPTED: "yellow",
    EventKind.ACTOR_RESTARTED: "yellow",
    EventKind.LEASE_EXPIRED: "yellow",
    EventKind.REWARD_FAILED: "yellow",
    EventKind.TEACHER_FAILED: "yellow",
    EventKind.WARNING: "yellow",
    EventKind.WAITING: "yellow",
    EventKind.EVALUATED: "green",
    EventKind.CHECKPOINT: "dim",
    EventKind.RUN_STARTED: "dim",
    EventKind.RUN_RESUMED: "dim",
    EventKind.RUN_FINISHED: "green",
}
_BARS = "▁▂▃▄▅▆▇█"
_SPARK_STEPS = 16
_ETA_STEPS = 20
_MAX_TEXT = 400


class ForgivingStream:
    """A text stream that goes silent when its terminal is gone: a closed window is no reason to lose a run."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.gone = False

    def write(self, text: str) -> int:
        """Write, or do nothing once the terminal is gone."""
        if not self.gone:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode("ascii", "replace").decode())
            except (OSError, ValueError):  # ValueError: the stream was closed
                self.gone = True
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once the terminal is gone."""
        if not self.gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self.gone = True

    def isatty(self) -> bool:
        """Whether someone can watch a line move."""
        try:
            return not self.gone and self._stream.isatty()
        except ValueError:
            return False

    @property
    def encoding(self) -> str:
        """Of the wrapped stream; rich asks for it."""
        return getattr(self._stream, "encoding", None) or "utf-8"


class ConsoleSink(Sink):
    """The terminal of whoever started the run.

    Args:
        total_steps: optimizer steps of the run; None when unknown.
        every: steps between lines where the terminal cannot be rewritten.
        first: print a line of the first step, too.
        print_completions: completions shown after each shown step.
        stream: where to write; standard output by default.
        clock: seconds, for the remaining time.
    """

    def __init__(
        self,
        *,
        total_steps: int | None,
        every: int = 1,
        first: bool = False,
        print_completions: int = 0,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = ForgivingStream(stream or sys.stdout)
        self._console = Console(file=cast(IO[str], self._out), highlight=False, markup=False, emoji=False)
        self._total, self._every, self._first, self._print_completions = total_steps, every, first, print_completions
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=_ETA_STEPS)
        self._rewards: deque[float] = deque(maxlen=_SPARK_STEPS)
        self._live: Live | None = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the live line, or print a line every `every` steps, at the last, and where asked at the first."""
        self._times.append((step, self._clock()))
        if "reward/mean" in metrics:
            self._rewards.append(metrics["reward/mean"])
        line = progress_line(step, self._total, metrics, eta_s=self._eta(step))
        if not self._out.isatty():
            if step % self._every == 0 or step == self._total or (self._first and step == 1):
                self._print(Text(line))
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(self._live_line(line), refresh=True)

    def event(self, event: Event) -> None:
        """Print events a person should know of; the rest is in events.jsonl."""
        style = _STYLES.get(event.kind)
        if style is not None:
            self._print(Text(event_line(event), style=style))

    def completions(self, trained: TrainedGroups) -> None:
        """Print the first completions of a shown step."""
        if not self._print_completions or trained.step % self._every or trained.held_out is not None:
            return
        pairs = [pair for group in trained.groups for pair in zip(group.completions, group.rewards, strict=True)]
        for completion, reward in pairs[: self._print_completions]:
            total = "none" if reward.total is None else f"{reward.total:.3f}"
            self._print(Text(f"  reward {total}  {printable(completion.text)}"))

    def close(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _live_line(self, line: str) -> Text:
        spark = sparkline(list(self._rewards)) if self._out.encoding.lower().startswith("utf") else ""
        return Text(f"{line}  {spark}", no_wrap=True, overflow="ellipsis")

    def _eta(self, step: int) -> float | None:
        if self._total is None or len(self._times) < 2:
            return None
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return None
        return (self._total - step) * (last_time - first_time) / (last_step - first_step)


def progress_line(step: int, total: int | None, metrics: Mapping[str, float], *, eta_s: float | None = None) -> str:
    """One line about a step; what was not measured is left out."""
    parts = [f"step {step}/{total}" if total else f"step {step}"]

    def add(template: str, *keys: str) -> None:
        if all(key in metrics for key in keys):
            parts.append(template.format(*(metrics[key] for key in keys)))

    add("reward {:.3f}", "reward/mean")
    # The loss of a policy alone is near 0 by construction, healthy or not.
    if "kl/sampler" not in metrics or "self_distillation/distillation_loss" in metrics:
        add("loss {:.4f}", "loss")
    if "kl/sampler" in metrics:
        add("sampler kl {:.1e}", "kl/sampler")
        add("ess {:.2f}", "importance/ess")
        add("entropy {:.3f}", "entropy")
        add("grad {:.3g}", "grad_norm")
        add("cut off {:.0%}", "completion/truncated_fraction")
    add("held out {:.4f}", "eval/loss")
    add("held-out reward {:.3f}", "eval/reward")
    add("token accuracy {:.3f}", "mean_token_accuracy")
    add("accuracy {:.3f}", "accuracy")
    add("accuracy {:.3f}", "rewards/accuracies")
    add("stale {:.2f} max {:.0f}", "staleness/mean", "staleness/max")
    add("trained {:.0f} tok/s", "throughput/trained_tokens_per_s")
    add("generated {:.0f} tok/s", "throughput/generated_tokens_per_s")
    add("seen {:.0f} tok/s", "throughput/seen_tokens_per_s")
    add("queue {:.0f} ready {:.0f} in flight {:.0f} slots", "queue/ready", "queue/in_flight", "queue/slots")
    if eta_s is not None and eta_s > 0:
        parts.append(f"eta {duration(eta_s)}")
    return "  ".join(parts)


def event_line(event: Event) -> str:
    """One line about an event."""
    details = (f"{key}={printable(_short(value))}" for key, value in event.detail.items())
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return " ".join([clock, event.kind.value.replace("_", " "), f"[{printable(event.actor)}]", *details])


def duration(seconds: float) -> str:
    """``45s``, ``2m 31s``, ``3h 07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def sparkline(values: list[float]) -> str:
    """The course of a few values in one character each; NaN is a gap."""
    finite = [value for value in values if value == value]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[int((value - low) * scale)] if value == value else " " for value in values)


def printable(text: str) -> str:
    """`text` on one line with control characters escaped: a completion must not steer the terminal."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_MAX_TEXT])
    return shown + ("…" if len(text) > _MAX_TEXT else "")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(jsonable(value), ensure_ascii=False)
