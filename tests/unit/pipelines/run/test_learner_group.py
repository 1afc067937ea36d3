"""Ranks behind the face of one learner: who is asked what, and whose answer counts."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from fakes import FakeHandle, health
from training_batches import batch
from trl_ray.errors import ActorLostError, RunError
from trl_ray.pipelines.run import learner_group
from trl_ray.pipelines.run.learner_group import LearnerGroup, ranks_of
from trl_ray.runtime.runtime import Role
from trl_ray.types import ActorReport, Health, SampleScores, Span, TrainBatch


def score(batch: TrainBatch) -> list[SampleScores]:
    """Of each sample its first token, which tells the samples apart."""
    samples = [sample for micro_batch in batch.micro_batches for sample in micro_batch]
    return [
        SampleScores(
            logprobs=sample.completion_ids[:1].astype(np.float32),
            entropy=np.zeros(1, np.float32),
            reference_logprobs=None,
        )
        for sample in samples
    ]


def group_of(count: int, *, equal: bool = False, **answers: Any) -> tuple[LearnerGroup, list[FakeHandle]]:
    handles = [
        FakeHandle(name=f"learner-{rank}", role=Role.LEARNER, answers={"score": score, "step": rank, **answers})
        for rank in range(count)
    ]
    return LearnerGroup(handles, equal_passes=equal), handles


def call(group: LearnerGroup, method: str, *args: Any, **kwargs: Any) -> Any:
    return asyncio.run(group.call(method, *args, deadline_s=5.0, **kwargs))


def test_a_step_is_dealt_out_whole_and_rank_0_answers() -> None:
    group, handles = group_of(2)
    whole = batch(1, size=2)
    assert call(group, "step", whole) == 0
    shares = [handle.asked("step")[0].args[0] for handle in handles]
    dealt = sorted(id(sample) for share in shares for micro_batch in share.micro_batches for sample in micro_batch)
    assert dealt == sorted(id(sample) for micro_batch in whole.micro_batches for sample in micro_batch)
    assert all(len(share.micro_batches) == 2 for share in shares)
    assert {(s.num_valid_tokens, s.num_samples, s.num_micro_batches) for s in shares} == {
        (whole.num_valid_tokens, 8, 4)
    }


@pytest.mark.parametrize(("equal", "expected"), [(True, [2, 2]), (False, [1, 2])])
def test_ranks_make_equally_many_passes_only_where_they_must(equal: bool, expected: list[int]) -> None:
    group, handles = group_of(2, equal=equal)
    call(group, "step", batch(1, size=3))
    counts = sorted(len(handle.asked("step")[0].args[0].micro_batches) for handle in handles)
    assert counts == expected


def test_scores_come_back_in_the_order_of_the_whole_batch() -> None:
    group, _ = group_of(3)
    whole = batch(1, size=1)
    answers = call(group, "score", whole)
    expected = [sample.completion_ids[0] for micro_batch in whole.micro_batches for sample in micro_batch]
    assert [float(answer.logprobs[0]) for answer in answers] == expected


def test_evaluations_and_references_are_dealt_out_like_steps_and_scores() -> None:
    def reference(batch: TrainBatch) -> list[np.ndarray]:
        return [sample.completion_ids[:1] for sample in batch.samples]

    group, handles = group_of(2, evaluate="loss", reference_logprobs=reference)
    whole = batch(1, size=2)
    assert call(group, "evaluate", whole) == "loss"
    assert [len(handle.asked("evaluate")[0].args[0].micro_batches) for handle in handles] == [2, 2]
    answers = call(group, "reference_logprobs", whole)
    assert [int(answer[0]) for answer in answers] == [int(sample.completion_ids[0]) for sample in whole.samples]


def test_everything_else_is_asked_of_all_ranks_but_identity_of_the_first_alone() -> None:
    group, handles = group_of(2, save="path", identity="v3")
    assert call(group, "save", "folder", step=3) == "path"
    assert [len(handle.asked("save")) for handle in handles] == [1, 1]
    assert call(group, "identity") == "v3"
    assert [len(handle.asked("identity")) for handle in handles] == [1, 0]
    assert asyncio.run(group.call_shared("publish", deadline_s=5.0)) is None
    assert [len(handle.asked("publish")) for handle in handles] == [1, 1]


def test_all_ranks_join_at_the_address_of_the_first() -> None:
    group, handles = group_of(3, address="tcp://here:1")
    asyncio.run(group.join(deadline_s=5.0))
    assert [handle.asked("join")[0].args for handle in handles] == [("tcp://here:1",)] * 3
    assert [len(handle.asked("address")) for handle in handles] == [1, 0, 0]


def test_health_and_reports_are_those_of_all_ranks() -> None:
    group, handles = group_of(2)
    handles[0].answers["health"] = Health(pid=7, progress=3, busy_since=20.0, version=2)
    handles[1].answers["health"] = Health(pid=8, progress=4, busy_since=10.0, version=2, problem="no memory")
    merged = call(group, "health")
    assert (merged.pid, merged.progress, merged.busy_since, merged.version) == (7, 7, 10.0, 2)
    assert merged.problem == "no memory"
    for rank, handle in enumerate(handles):
        span = Span(actor=f"learner-{rank}", name="step", start=0.0, end=1.0)
        handle.answers["drain"] = ActorReport(spans=(span,))
    assert [span.actor for span in call(group, "drain").spans] == ["learner-0", "learner-1"]


def test_a_lost_rank_is_told_at_once_though_the_others_still_wait() -> None:
    group, handles = group_of(2, health=health())
    handles[0].answers["step"] = lambda batch: asyncio.sleep(60)
    handles[1].answers["step"] = ActorLostError("learner-1 died")
    with pytest.raises(ActorLostError, match="learner-1"):
        call(group, "step", batch(1, size=1))


def test_the_loss_of_a_rank_is_told_though_what_it_left_behind_fails_before_it() -> None:
    group, handles = group_of(3)

    async def dies(batch: TrainBatch) -> ActorLostError:
        await asyncio.sleep(0.05)
        return ActorLostError("learner-2 died")

    handles[0].answers["step"] = RunError("learner-0.step raised RuntimeError: connection reset by peer")
    handles[1].answers["step"] = lambda batch: asyncio.sleep(60)
    handles[2].answers["step"] = dies
    with pytest.raises(ActorLostError, match="learner-2 died"):
        call(group, "step", batch(1, size=1))


def test_an_error_of_one_rank_alone_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    group, handles = group_of(2)
    monkeypatch.setattr(learner_group, "_GRACE_S", 0.05)
    handles[0].answers["step"] = RunError("learner-0.step raised RuntimeError: out of memory")
    handles[1].answers["step"] = lambda batch: asyncio.sleep(60)
    with pytest.raises(RunError, match="out of memory"):
        call(group, "step", batch(1, size=1))


def test_one_actor_is_its_own_only_rank() -> None:
    alone = FakeHandle(name="learner", role=Role.LEARNER)
    group, handles = group_of(2)
    assert ranks_of(None) == () and ranks_of(alone) == (alone,) and ranks_of(group) == tuple(handles)
