"""Turns records to be learnt by heart into token ids and the mask of what is trained.

    Document            ─┐                                          every token
    PromptCompletion    ─┴─ write ─ encode ─► ids [T], mask [T] ◄── what the assistant wrote
                                     │                              what follows the prompt
                                  truncate ─► SupervisedSample, or why nothing of it is trained

A token is trained when it is a target: the mask of the first token is always False, for nothing predicts it. Texts
without roles end with the tokenizer's end-of-sequence token, conversations with whatever their template says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.record_writer import Writer
from trl_ray.data.examples.tokenisation import (
    Encoded,
    ExampleTokenizer,
    Text,
    TextRules,
    common_prefix_length,
)
from trl_ray.data.formats.records import Document, PromptCompletion
from trl_ray.errors import DataError
from trl_ray.types import BoolArray, IntArray, TrainingSample

IGNORED_LABEL = -100

SupervisedRecord: TypeAlias = Document | PromptCompletion


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedRules(TextRules):
    """Which tokens are kept, and which of them are trained."""

    completion_only_loss: bool | None = None
    """Train only what follows the prompt; None: where a row has a prompt, TRL's default."""
    assistant_only_loss: bool = False
    """Train only what stands between the template's generation markers; needs conversations."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SupervisedSample:
    """One example: its tokens and which of them are targets."""

    row: int
    token_ids: IntArray
    """``[T]``"""
    loss_mask: BoolArray
    """``[T]``, the first is False"""
    cut_tokens: int
    """Tokens beyond `max_length` that were cut off."""
    prompt_diverges: bool
    """The prompt alone is tokenised differently from the prompt within the example: the model is trained on a
    context that it will not see. Tokens merge across the border, or the template renders the two differently."""

    def labels(self) -> NDArray[np.int64]:
        """``[T]``: the token where it is trained, elsewhere -100, not shifted: what transformers calls labels."""
        return np.where(self.loss_mask, self.token_ids, IGNORED_LABEL).astype(np.int64)


def write_supervised(
    record: SupervisedRecord, tokenizer: ExampleTokenizer, rules: SupervisedRules, *, where: str
) -> tuple[Text, ...]:
    """The texts of one record: its prompt where it has one, and the whole.

    Raises:
        DataError: only assistant turns are to be trained, and the record is text.
        ModelError: the chat template is missing, refuses the record, or leaves out a tool or a call of it.
    """
    writer = Writer(record=record, tokenizer=tokenizer, rules=rules, where=where)
    said = record.content if isinstance(record, Document) else record.completion
    if rules.assistant_only_loss and isinstance(said, str):
        raise DataError(
            f"assistant_only_loss needs conversations, and {where} is text: {said[:80]!r}. Set assistant_only_loss to "
            "False, or write the rows as messages."
        )
    if isinstance(record, PromptCompletion):
        return (writer.prompt(record.prompt), writer.answered(record.prompt, record.completion))
    if isinstance(record.content, str):
        return (writer.text(writer.with_end(record.content)),)
    return (writer.document(record.content),)


def read_supervised(
    record: SupervisedRecord, encoded: Sequence[Encoded], rules: SupervisedRules, *, row: int
) -> SupervisedSample | Untrained:
    """The tokens of the texts that `write_supervised` wrote, cut, with their targets."""
    whole = encoded[-1]
    mask = np.ones(len(whole.token_ids), dtype=np.bool_)
    if rules.assistant_only_loss:
        assert whole.assistant_mask is not None, "assistant turns were asked for"
        mask = whole.assistant_mask
    diverges = False
    if isinstance(record, PromptCompletion):
        prompt_ids = encoded[0].token_ids
        shared = common_prefix_length(prompt_ids, whole.token_ids)
        diverges = shared < len(prompt_ids)
        if rules.completion_only_loss is not False:
            mask[:shared] = False
    if whole.muted_mask is not None:
        mask[whole.muted_mask] = False
    return cut_supervised(whole.token_ids, mask, rules, row=row, prompt_diverges=diverges)


def cut_supervised(
    token_ids: IntArray, mask: BoolArray, rules: TextRules, *, row: int, prompt_diverges: bool = False
) -> SupervisedSample | Untrained:
    """Tokens and the mask of what is to be trained, both ``[T]``, as much as is kept; the mask is written to."""
    mask[:1] = False
    if not mask.any():
        return Untrained.NO_TARGET
    kept = rules.kept(len(mask))
    mask = mask[kept]
    mask[0] = False
    if not mask.any():
        return Untrained.TRUNCATED
    return SupervisedSample(
        row=row,
        token_ids=token_ids[kept],
        loss_mask=mask,
        cut_tokens=len(token_ids) - len(mask),
        prompt_diverges=prompt_diverges,
    )


def as_training_sample(token_ids: IntArray, loss_mask: BoolArray, *, group_id: int) -> TrainingSample:
    """Tokens and targets ``[T]`` as a sample: what stands before the first target is its prompt.

    The arrays are views. The first token must not be a target, and one of the others must be.
    """
    first = int(loss_mask.argmax())
    assert first > 0, "the first token has no context, and without a target there is nothing to train"
    return TrainingSample(
        group_id=group_id,
        prompt_ids=token_ids[:first],
        completion_ids=token_ids[first:],
        loss_mask=loss_mask[first:],
    )
