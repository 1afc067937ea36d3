"""Shows callbacks the batch that a step distils, in the padded tensors of TRL's self-distillation hooks.

    groups, samples of a step --pad--> on_generation_prompts_selected, on_teacher_context_built,
                                       on_self_distillation_batch_prepared, on_generation_batch_built

Axes: N completions of the step in training order, P tokens of the longest prompt, Q of the longest teacher prompt, C of
the longest completion. Training itself pads nothing; these tensors are made only where a callback has the hook.
Generation, teachers and training overlap, so all four are told when the step's batch is ready, in TRL's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.pipelines.callbacks.hooks import CallbackList, Hook
from trl_ray.types import FloatArray, Prompt, RolloutGroup, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherInputs:
    """What the teacher reads: its own prompts, then the completions."""

    teacher_input_ids: Tensor
    """[N, Q + C] int64, padded on the left of prompts and on the right of completions."""
    teacher_attention_mask: Tensor
    """[N, Q + C] int64, 1 at the tokens of prompts and at trained ones."""
    completion_mask: Tensor
    """[N, C] int64, 1 at trained tokens."""
    self_distillation_mask: Tensor
    """[N] float32, 1 where the teacher knows more than the student."""

    @classmethod
    def of(
        cls, groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample], *, pad_token_id: int
    ) -> TeacherInputs:
        """Those of the groups of one step."""
        contexts = [context for group in groups for context in group.contexts or (None,) * len(group.completions)]
        prompts = [
            sample.prompt_ids if context is None else context.prompt_ids
            for sample, context in zip(samples, contexts, strict=True)
        ]
        completion_mask = _padded([sample.loss_mask for sample in samples], fill=0, side="right")
        prompt_mask = _padded([np.ones(len(ids), np.int64) for ids in prompts], fill=0, side="left")
        completions = _padded([sample.completion_ids for sample in samples], fill=pad_token_id, side="right")
        return cls(
            teacher_input_ids=torch.cat([_padded(prompts, fill=pad_token_id, side="left"), completions], dim=1),
            teacher_attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
            completion_mask=completion_mask,
            self_distillation_mask=torch.tensor(
                [float(context is not None and context.is_distilled) for context in contexts]
            ),
        )


async def dispatch_self_distillation(
    callbacks: CallbackList,
    groups: Sequence[RolloutGroup],
    samples: Sequence[TrainingSample],
    config: RolloutRunConfig,
    *,
    pad_token_id: int,
    takes_sampler: bool,
) -> None:
    """Call the four hooks, once per step, before its first update.

    Args:
        callbacks: of the run.
        groups: of the step, in training order, with their `contexts`.
        samples: [N] theirs, in the same order, with what a first pass has added.
        config: of the run.
        pad_token_id: fills what is shorter than the longest.
        takes_sampler: ratios are taken against the policy that sampled.

    Raises:
        CallbackError: a callback raised.
    """
    asked = [hook for hook in Hook if hook.is_of_self_distillation and callbacks.has(hook)]
    if not asked:
        return
    await callbacks.dispatch(
        Hook.PROMPTS_SELECTED,
        generation_prompts=[_readable(group.ticket.prompt) for group in groups for _ in group.completions],
        generation_prompt_text=None,
    )
    if Hook.TEACHER_CONTEXT in asked or Hook.BATCH_PREPARED in asked:
        old = _old_logprobs(samples, takes_sampler=takes_sampler)
        await _dispatch_tensors(callbacks, groups, samples, old, pad_token_id)
    await callbacks.dispatch(
        Hook.BATCH_BUILT,
        generate_every=config.micro_batches_per_rank * config.passes_per_step,
        steps_per_generation=config.micro_batches_per_rank,
    )


async def _dispatch_tensors(
    callbacks: CallbackList,
    groups: Sequence[RolloutGroup],
    samples: Sequence[TrainingSample],
    old: Tensor | None,
    pad_token_id: int,
) -> None:
    inputs = TeacherInputs.of(groups, samples, pad_token_id=pad_token_id)
    teacher = {
        "teacher_input_ids": inputs.teacher_input_ids,
        "teacher_attention_mask": inputs.teacher_attention_mask,
        "self_distillation_mask": inputs.self_distillation_mask,
    }
    await callbacks.dispatch(Hook.TEACHER_CONTEXT, completion_mask=inputs.completion_mask, **teacher)
    await callbacks.dispatch(
        Hook.BATCH_PREPARED,
        prompt_ids=_padded([sample.prompt_ids for sample in samples], fill=pad_token_id, side="left"),
        completion_ids=_padded([sample.completion_ids for sample in samples], fill=pad_token_id, side="right"),
        old_per_token_logps=old,
        **teacher,
    )


def _readable(prompt: Prompt) -> Any:
    """The conversation or the text, as the dataset has it."""
    return prompt.text if prompt.messages is None else [dict(message) for message in prompt.messages]


def _old_logprobs(samples: Sequence[TrainingSample], *, takes_sampler: bool) -> Tensor | None:
    """[N, C] of the policy that ratios are taken against; None where it is the one of the training pass itself."""
    rows: list[FloatArray] = []
    for sample in samples:
        row = sample.sampler_logprobs if takes_sampler else sample.old_logprobs
        if row is None:
            return None
        rows.append(row)
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=0.0)


def _padded(rows: Sequence[NDArray[Any]], *, fill: int, side: str) -> Tensor:
    """[N, longest] int64."""
    tensors = [torch.tensor(np.asarray(row, np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=float(fill), padding_side=side)
