"""From held-out examples to the rows that a model reads for predictions, in the order of the dataset.

examples --prediction_batches--> [PredictionBatch of at most `per_batch` examples, ...]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trl_ray.types import BoolArray, Example, IntArray, PredictionBatch, PredictionForm, PredictionPiece, TrainingSample

IGNORED = -100
"""The label where nothing is to be predicted, and what arrays of different lengths are filled up with."""
_PAIRED = frozenset(
    {PredictionForm.COMPARED, PredictionForm.MEANS, PredictionForm.SHIFTED_MEANS, PredictionForm.SCORED}
)
_CLASSIFIED = frozenset({PredictionForm.SCORED, PredictionForm.STEPPED})


def prediction_batches(
    examples: Sequence[Example], form: PredictionForm, *, per_batch: int, is_flat: bool = False
) -> list[PredictionBatch]:
    """Cut examples into batches.

    Args:
        examples: of one held-out set.
        form: of the pipeline.
        per_batch: examples in one.
        is_flat: the examples of a batch stand one behind the other in a single row, as TRL lays out packed rows.
    """
    batches = []
    for start in range(0, len(examples), per_batch):
        chosen = examples[start : start + per_batch]
        rows = _rows(chosen, form)
        if is_flat:
            rows = (tuple(piece for row in rows for piece in row),)
        elif form is PredictionForm.LABELLED:
            rows = tuple(tuple(map(_with_first_label, row)) for row in rows)
        batches.append(PredictionBatch(form=form, rows=rows, num_examples=len(chosen)))
    return batches


def _rows(examples: Sequence[Example], form: PredictionForm) -> tuple[tuple[PredictionPiece, ...], ...]:
    if form in _PAIRED:
        return tuple((_piece(example.samples[side], form),) for side in (0, 1) for example in examples)
    return tuple(tuple(_piece(sample, form) for sample in example.samples) for example in examples)


def _piece(sample: TrainingSample, form: PredictionForm) -> PredictionPiece:
    ids = np.concatenate([sample.prompt_ids, sample.completion_ids]).astype(np.int32)
    mask = np.concatenate([np.zeros(len(sample.prompt_ids), np.bool_), sample.loss_mask])
    if form in _CLASSIFIED:
        # The last token stands in for a target: what is read ends before it.
        return PredictionPiece(token_ids=ids[:-1], labels=_step_labels(sample, mask[1:]))
    return PredictionPiece(token_ids=ids, labels=np.where(mask, ids, np.int32(IGNORED)))


def _step_labels(sample: TrainingSample, ends: BoolArray) -> IntArray:
    """[T] 1 and 0 where steps end; scores of whole sequences have no labels."""
    labels = np.full(len(ends), IGNORED, np.int32)
    if sample.label is not None and sample.label.steps is not None:
        labels[np.flatnonzero(ends)] = sample.label.steps
    return labels


def _with_first_label(piece: PredictionPiece) -> PredictionPiece:
    """Of a text whose second token is trained the first one is a label in TRL, too, although nothing predicts it."""
    if piece.labels[1] == IGNORED:
        return piece
    return PredictionPiece(
        token_ids=piece.token_ids, labels=np.concatenate([piece.token_ids[:1], piece.labels[1:]]).astype(np.int32)
    )
