"""Predictions for metrics of the user's own: what a model says at every token of held-out rows, and how it is joined.

PredictionBatch --pad--> [R,T] --model--> logits [R,T,V] --preprocess_logits_for_metrics--> PredictedBatch   (learner)
PredictedBatch x batches --joined--> EvalPrediction, PredictionOutput                                       (driver)

Logits of a whole vocabulary exist for one batch at a time; what is kept of them is for the user's function to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput, denumpify_detensorize

from trl_ray.algorithms.batches.prediction_batches import IGNORED
from trl_ray.errors import CallbackError
from trl_ray.models.scoring.rope_regimes import rope_regimes
from trl_ray.types import IntArray, PredictedBatch, PredictionBatch, PredictionForm, PredictionPiece

Preprocess = Callable[[Any, Any], Any]
"""TRL's `preprocess_logits_for_metrics`: (logits, labels) -> what is kept of the logits."""
_READ = frozenset({PredictionForm.COMPARED, PredictionForm.RATED})
_MEANS = frozenset({PredictionForm.MEANS, PredictionForm.SHIFTED_MEANS})


class Predictor:
    """Runs a model over whole rows, with its head at every token.

    Args:
        model: in evaluation mode while `predict` is called.
        tokenizer: its padding fills rows up.
        bf16: run matrix products in bfloat16.
        preprocess: the user's function; None keeps the logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bf16: bool = False,
        preprocess: Preprocess | None = None,
    ) -> None:
        self._model, self._bf16, self._preprocess = model, bf16, preprocess
        pad = tokenizer.pad_token_id
        self._pad = int(tokenizer.eos_token_id if pad is None else pad)

    def predict_all(self, batches: Sequence[PredictionBatch], *, in_step: bool) -> list[PredictedBatch]:
        """The predictions of some batches; a rank without any makes a pass where others wait for it in each of theirs.

        Raises:
            CallbackError: the user's function raised.
        """
        if not batches and in_step:
            self._idle()
        return [self.predict(batch) for batch in batches]

    @torch.no_grad()
    def predict(self, batch: PredictionBatch) -> PredictedBatch:
        """The predictions of a batch.

        Raises:
            CallbackError: the user's function raised.
        """
        pieces = [piece for row in batch.rows for piece in row]
        logits = self._logits(pieces)
        inputs = self._laid_out(batch, [_whole(piece.token_ids) for piece in pieces], fill=self._pad)
        if batch.form is PredictionForm.SCORED:
            labels: Any = ()
        elif batch.form in _MEANS:
            logits, labels = _means(logits, batch.form), torch.zeros(2)
        else:
            if any(len(row) > 1 for row in batch.rows):
                kept = [logits[place, : len(piece.token_ids)] for place, piece in enumerate(pieces)]
                logits = self._laid_out(batch, kept, fill=IGNORED)
            labels = self._laid_out(batch, [_whole(piece.labels) for piece in pieces], fill=IGNORED)
            labels = inputs if batch.form in _READ else labels
            labels = labels.to(logits.device)
        return PredictedBatch(
            predictions=_as_arrays(self._preprocessed(logits, labels)),
            label_ids=_as_arrays(labels),
            inputs=inputs.numpy(),
        )

    def _idle(self) -> None:
        """A pass that stands for none."""
        ones = np.ones(2, np.int32)
        with torch.no_grad():
            self._logits([PredictionPiece(token_ids=ones, labels=ones)])

    def _logits(self, pieces: Sequence[PredictionPiece]) -> Tensor:
        device = self._model.device
        rows = [_whole(piece.token_ids) for piece in pieces]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        places: dict[str, Tensor] = {}
        if rope_regimes(self._model.config) is not None:  # padding must make no row longer than its sequence
            places["position_ids"] = (mask.cumsum(dim=1) - 1) * mask
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits
        return logits.float() if self._bf16 else logits

    def _laid_out(self, batch: PredictionBatch, values: Sequence[Tensor], *, fill: int) -> Tensor:
        """[rows, T, ...] of values [T, ...] of each piece."""
        rest, rows = iter(values), []
        for row in batch.rows:
            rows.append(torch.cat([next(rest) for _ in row]))
        return pad_sequence(rows, batch_first=True, padding_value=fill)

    def _preprocessed(self, logits: Tensor, labels: Any) -> Any:
        if self._preprocess is None:
            return logits
        try:
            return self._preprocess(logits, labels)
        except Exception as error:  # a user's function may raise anything
            shape = tuple(logits.shape)
            raise CallbackError(
                f"preprocess_logits_for_metrics must take logits {shape} and labels, but raised: "
                f"{type(error).__name__}: {error}. Mend it."
            ) from error


def _whole(numbers: IntArray) -> Tensor:
    return torch.from_numpy(numbers).long()


def _means(logits: Tensor, form: PredictionForm) -> Tensor:
    """[2] of chosen and of rejected."""
    places = logits[:, :-1] if form is PredictionForm.SHIFTED_MEANS else logits
    return torch.stack([half.float().mean() for half in places.chunk(2)])


def _as_arrays(found: Any) -> Any:
    """Tensors as arrays, whatever holds them."""
    if isinstance(found, Mapping):
        return {name: _as_arrays(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(_as_arrays(value) for value in found)
    if not isinstance(found, Tensor):
        return np.asarray(found)
    found = found.detach().cpu()
    return (found.float() if found.dtype is torch.bfloat16 else found).numpy()


def joined(parts: Sequence[Any]) -> Any:
    """Arrays [B, T, ...] of all batches as one, filled up with -100 where their T differ; so within what holds them."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(joined(of_all) for of_all in zip(*parts, strict=True))
    arrays = [np.atleast_1d(part) for part in parts]
    if arrays[0].ndim == 1 or len({array.shape[1] for array in arrays}) == 1:
        return np.concatenate(arrays)
    width, count = max(array.shape[1] for array in arrays), sum(len(array) for array in arrays)
    whole = np.full((count, width, *arrays[0].shape[2:]), IGNORED, arrays[0].dtype)
    start = 0
    for array in arrays:
        whole[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return whole


def eval_prediction(predictions: Any, label_ids: Any, *, inputs: Any = None, losses: Any = None) -> EvalPrediction:
    """What transformers hands to `compute_metrics`."""
    return EvalPrediction(predictions=predictions, label_ids=label_ids, inputs=inputs, losses=losses)


def as_tensors(found: Any) -> Any:
    """Arrays as tensors, as transformers hands over single batches."""
    if isinstance(found, Mapping):
        return {name: as_tensors(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(as_tensors(value) for value in found)
    return torch.from_numpy(found)


def prediction_output(predictions: Any, label_ids: Any, metrics: Mapping[str, float]) -> PredictionOutput:
    """What transformers' `predict` answers."""
    return PredictionOutput(predictions=predictions, label_ids=label_ids, metrics=dict(metrics))


def plain_numbers(found: Any) -> dict[str, Any]:
    """What `compute_metrics` answered, without arrays and tensors.

    Raises:
        CallbackError: it is no dict.
    """
    if not isinstance(found, Mapping):
        raise CallbackError(
            f"compute_metrics must return a dict of numbers, got a {type(found).__name__}. Return {{name: number}}."
        )
    plain: dict[str, Any] = denumpify_detensorize(dict(found))  # type: ignore[no-untyped-call]
    return plain
