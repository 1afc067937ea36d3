"""Groups and runs small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from trl_ray.observe.observer import open_observer
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.sinks import TrainedGroups
from trl_ray.types import (
    Completion,
    Event,
    EventKind,
    FinishReason,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    Span,
    VersionSpan,
)

MALICIOUS = "<script>alert('x')</script></pre>\x1b[2J \ud800 https://example.org/track.png"
GroupMaker = Callable[..., RolloutGroup]


def _make_group(
    group_id: int = 0,
    versions: Sequence[Sequence[tuple[int, int, int]]] = (((0, 0, 4),),),
    texts: Sequence[str] = ("4",),
    loss_mask: Sequence[bool] | None = None,
    spans: tuple[Span, ...] = (),
) -> RolloutGroup:
    mask = None if loss_mask is None else np.array(loss_mask)
    completions = tuple(
        Completion(
            token_ids=np.zeros(runs[-1][2], np.int32),
            logprobs=np.zeros(runs[-1][2], np.float32),
            versions=tuple(VersionSpan(version=v, start=s, end=e) for v, s, e in runs),
            finish_reason=FinishReason.STOP,
            text=texts[index % len(texts)],
            loss_mask=mask,
        )
        for index, runs in enumerate(versions)
    )
    prompt = Prompt(
        prompt_id="0:1", token_ids=np.zeros(3, np.int32), messages=({"role": "user", "content": "2 + 2 = ?"},)
    )
    rewards = tuple(
        Reward(total=1.0 / (index + 1), parts={"exact": 1.0, "silent": None}, extra={"parsed": 4})
        for index in range(len(completions))
    )
    ticket = GroupTicket(group_id=group_id, attempt=1, prompt=prompt, admitted_at_version=0)
    return RolloutGroup(ticket=ticket, completions=completions, rewards=rewards, worker="rollout-0", spans=spans)


@pytest.fixture
def make_group() -> GroupMaker:
    return _make_group


@pytest.fixture
def finished_run(tmp_path: Path) -> RunDirectory:
    """Three steps, one lost worker, a malicious completion, a secret in the config."""
    run = RunDirectory.create(tmp_path / "run")
    run.write_config("model_name_or_path: tiny\nmax_staleness: 2\nmax_steps: 3\nhub_token: hunter2hunter2\n")
    with (tmp_path / "console.txt").open("w") as console:
        observer = open_observer(run, total_steps=3, config={}, console_stream=console)
        observer.event(Event(kind=EventKind.RUN_STARTED, actor="driver", time=100.0))
        for step in (1, 2, 3):
            group = _make_group(group_id=step, texts=(MALICIOUS,))
            observer.completions(TrainedGroups(step=step, groups=[group], advantages=[[0.5]], learner_version=step - 1))
            observer.spans([Span(actor="learner", name="step", start=100.0 + step, end=100.5 + step)])
            observer.step(step, {"reward/mean": step / 10, "loss": 0.5, "staleness/max": 2.0, "staleness/hist_0": 1.0})
        observer.event(Event(kind=EventKind.ACTOR_LOST, actor="rollout-0", time=103.0, detail={"reason": "<b>killed"}))
        observer.event(Event(kind=EventKind.RUN_FINISHED, actor="driver", time=104.0))
        observer.close()
    run.write_ledger({"issued": 6, "trained": 3, "dropped": {"end_of_run": 2}, "live": {"ready": 1, "leased": 0}})
    return run
