"""What a tiny model says of completions, by one plain forward pass each; scores of engines are held against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trl_ray.types import FloatArray, TeacherQuestion, TeacherRequest, TeacherScores


def distributions(
    model: torch.nn.Module, request: TeacherRequest, *, temperature: float = 1.0, vocab_size: int | None = None
) -> FloatArray:
    """[L, V] log-probs at each token of the completion, over the first `vocab_size` tokens or all."""
    ids = torch.tensor([[*request.prompt_ids.tolist(), *request.completion_ids.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1, :vocab_size].float()
    logprobs: FloatArray = (logits / temperature).log_softmax(-1).numpy()
    return logprobs


def check_scores(
    model: torch.nn.Module,
    requests: Sequence[TeacherRequest],
    question: TeacherQuestion,
    scores: Sequence[TeacherScores],
    *,
    tolerance: float,
    over: int | None = None,
) -> None:
    """Own tokens, most probable tokens, those asked about, and the tail are those of the model.

    `over` is the size of the vocabulary that the probabilities sum to 1 over; None: the model's.
    """
    assert len(scores) == len(requests)
    for request, each in zip(requests, scores, strict=True):
        logprobs = distributions(model, request, temperature=question.temperature, vocab_size=over)
        own = np.take_along_axis(logprobs, request.completion_ids[:, None].astype(np.int64), axis=1)[:, 0]
        np.testing.assert_allclose(each.logprobs, own, rtol=tolerance, atol=tolerance)
        if question.top_k:
            assert each.top_ids is not None and each.top_logprobs is not None
            top = np.sort(logprobs[:, : question.vocab_size], axis=1)[:, ::-1][:, : question.top_k]
            np.testing.assert_allclose(each.top_logprobs[:, : question.top_k], top, rtol=tolerance, atol=tolerance)
        if each.top_ids is not None and each.top_logprobs is not None:
            at_ids = np.take_along_axis(logprobs, each.top_ids.astype(np.int64), axis=1)
            told = each.top_logprobs > -np.inf
            np.testing.assert_allclose(each.top_logprobs[told], at_ids[told], rtol=tolerance, atol=tolerance)
            if question.tail:
                assert each.tail is not None
                left = 1 - np.where(told, np.exp(at_ids.astype(np.float64)), 0).sum(axis=1)
                np.testing.assert_allclose(np.exp(each.tail), left, atol=max(tolerance, 1e-6))
