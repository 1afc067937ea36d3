"""The payloads of TRL's self-distillation hooks, from groups whose tokens are known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from objectives import objective_of
from trl_ray.config.load import build
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.pipelines.callbacks.hooks import CallbackList, TrainingSpan
from trl_ray.pipelines.callbacks.self_distillation_hooks import TeacherInputs
from trl_ray.types import (
    Completion,
    FinishReason,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    TeacherContext,
    TrainingSample,
    VersionSpan,
)

PAD = 9


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


def group(number: int, prompt: Prompt, completions: Sequence[Any], contexts: Sequence[TeacherContext]) -> RolloutGroup:
    return RolloutGroup(
        ticket=GroupTicket(group_id=number, attempt=0, prompt=prompt, admitted_at_version=0),
        completions=tuple(
            Completion(
                token_ids=tokens,
                logprobs=np.full(len(tokens), -0.5, np.float32),
                versions=(VersionSpan(version=0, start=0, end=len(tokens)),),
                finish_reason=FinishReason.STOP,
                text="",
            )
            for tokens in completions
        ),
        rewards=tuple(Reward(total=0.0, parts={}) for _ in completions),
        worker="rollout-0",
        contexts=tuple(contexts),
    )


CHAT = ({"role": "user", "content": "hi"},)
GROUPS = (
    group(
        0,
        Prompt(prompt_id="0:0", token_ids=ids(1, 2), messages=CHAT),
        [ids(3, 4, 5), ids(3)],
        [TeacherContext(prompt_ids=ids(1, 7, 2)), TeacherContext(prompt_ids=ids(1, 2), is_distilled=False)],
    ),
    group(
        1,
        Prompt(prompt_id="0:1", token_ids=ids(6), text="six"),
        [ids(8, 4), ids(4)],
        [TeacherContext(prompt_ids=ids(6, 7, 7, 7)), TeacherContext(prompt_ids=ids(6, 1))],
    ),
)
SAMPLES = tuple(
    TrainingSample(
        group_id=one.ticket.group_id,
        prompt_ids=one.ticket.prompt.token_ids,
        completion_ids=completion.token_ids,
        loss_mask=np.ones(len(completion.token_ids), np.bool_),
        sampler_logprobs=completion.logprobs,
    )
    for one in GROUPS
    for completion in one.completions
)


class Listens:
    """Has all four hooks, with the keywords that TRL gives them."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    def on_generation_batch_built(self, *, args: Any, state: Any, control: Any, **payload: Any) -> None:
        self.told.append(("built", payload))

    def on_self_distillation_batch_prepared(self, *, args: Any, state: Any, control: Any, **payload: Any) -> None:
        self.told.append(("prepared", payload))

    def on_teacher_context_built(self, *, args: Any, state: Any, control: Any, **payload: Any) -> None:
        self.told.append(("teacher", payload))

    def on_generation_prompts_selected(self, *, args: Any, state: Any, control: Any, **payload: Any) -> None:
        self.told.append(("prompts", payload))


def told(samples: Sequence[TrainingSample] = SAMPLES, callback: Any = None, **changes: Any) -> Any:
    """What a callback hears of the groups above."""
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "num_generations": 2,
        "num_iterations": 3,
        "runtime": {"kind": "local"},
    }
    config = build(SDPOConfig, {**values, **changes})
    listener = callback if callback is not None else Listens()
    callbacks = CallbackList([listener], args=config)
    span = TrainingSpan(
        step=0,
        max_steps=1,
        epoch=0.0,
        num_train_epochs=1,
        checkpoints=Path("nowhere"),
        can_evaluate=False,
        can_stop_epoch=False,
    )

    async def run() -> None:
        await callbacks.begin(span, checkpoint=None, say=lambda *told, **detail: None)
        await objective_of(config).show(callbacks, GROUPS, samples, pad_token_id=PAD)

    asyncio.run(run())
    return listener


def test_the_hooks_come_in_trl_s_order_with_prompts_once_per_completion() -> None:
    listener = told()
    assert [name for name, _ in listener.told] == ["prompts", "teacher", "prepared", "built"]
    assert listener.told[0][1]["generation_prompts"] == [list(CHAT), list(CHAT), "six", "six"]
    assert listener.told[3][1] == {"generate_every": 6, "steps_per_generation": 2}


def test_the_teacher_s_tensors_are_padded_left_of_prompts_and_right_of_completions() -> None:
    teacher = dict(told().told)["teacher"]
    assert teacher["teacher_input_ids"].tolist() == [
        [PAD, 1, 7, 2, 3, 4, 5],
        [PAD, PAD, 1, 2, 3, PAD, PAD],
        [6, 7, 7, 7, 8, 4, PAD],
        [PAD, PAD, 6, 1, 4, PAD, PAD],
    ]
    assert teacher["teacher_attention_mask"].tolist() == [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0, 0],
    ]
    assert teacher["completion_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert teacher["self_distillation_mask"].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert {teacher[name].dtype for name in ("teacher_input_ids", "teacher_attention_mask", "completion_mask")} == {
        torch.int64
    }


def test_the_batch_has_the_student_s_prompts_and_the_old_policy_where_it_is_known() -> None:
    batch = dict(told().told)["prepared"]
    assert batch["prompt_ids"].tolist() == [[1, 2], [1, 2], [PAD, 6], [PAD, 6]]
    assert batch["completion_ids"].tolist() == [[3, 4, 5], [3, PAD, PAD], [8, 4, PAD], [4, PAD, PAD]]
    assert batch["old_per_token_logps"] is None
    assert batch.keys() == {
        "prompt_ids",
        "completion_ids",
        "old_per_token_logps",
        "teacher_input_ids",
        "teacher_attention_mask",
        "self_distillation_mask",
    }
    scored = [replace(s, old_logprobs=np.full(len(s.completion_ids), -2.0, np.float32)) for s in SAMPLES]
    old = dict(told(scored).told)["prepared"]["old_per_token_logps"]
    assert old.tolist() == [[-2.0, -2.0, -2.0], [-2.0, 0.0, 0.0], [-2.0, -2.0, 0.0], [-2.0, 0.0, 0.0]]
    sampler = dict(told(old_logprobs="sampler").told)["prepared"]["old_per_token_logps"]
    assert sampler[0].tolist() == [-0.5, -0.5, -0.5]


def test_nothing_is_padded_where_no_callback_looks(monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nobody asked for tensors")

    class Counts:
        built = 0

        def on_generation_batch_built(self, **payload: Any) -> None:
            self.built += 1

    monkeypatch.setattr(TeacherInputs, "of", refuse)
    assert told(callback=Counts()).built == 1
