"""Runs the Triton kernels of the chunked head in Triton's interpreter and compares them with the torch reference.

The program of one test: the interpreter must be switched on (TRITON_INTERPRET=1) before the kernels are imported.
"""

from __future__ import annotations

import torch

from trl_ray.algorithms.head.head_problem import ExtraOutputs, LogitTransform
from trl_ray.algorithms.head.logprobs import HeadBackend, token_logprobs

Case = tuple[int | None, bool, LogitTransform, tuple[float, float, float], torch.dtype]
CASES: list[Case] = [
    # chunk, bias, transform, weights of the three gradients, dtype; the third is that of further tokens
    (16, False, LogitTransform(), (1.0, 0.0, 0.0), torch.float32),
    (5, True, LogitTransform(), (0.0, 1.0, 0.0), torch.float32),
    (7, True, LogitTransform(scale=0.5), (0.7, -0.3, 0.0), torch.float32),
    (16, False, LogitTransform(scale=1.5, softcap=2.0), (0.7, -0.3, 0.0), torch.float32),
    (5, True, LogitTransform(softcap=3.0), (1.0, 0.0, 0.0), torch.float32),
    (None, True, LogitTransform(), (0.7, -0.3, 0.0), torch.float32),
    (16, False, LogitTransform(), (0.7, -0.3, 0.0), torch.bfloat16),
    (None, True, LogitTransform(softcap=3.0), (0.7, -0.3, 0.0), torch.bfloat16),
    (5, True, LogitTransform(), (0.0, 0.0, 1.0), torch.float32),
    (7, True, LogitTransform(scale=1.5, softcap=2.0), (0.7, -0.3, 0.5), torch.float32),
    (16, False, LogitTransform(), (0.7, 0.0, 0.5), torch.bfloat16),
]


def outputs(backend: HeadBackend, case: Case, vocab: int) -> list[torch.Tensor]:
    """All results and gradients of one case; the first word is ruled out where there is a bias and no cap."""
    chunk, with_bias, transform, weights, dtype = case
    torch.manual_seed(0)
    leaves = [torch.randn(3, 8), torch.randn(vocab, 8), torch.randn(vocab)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves[: 3 if with_bias else 2]]
    targets = torch.randint(1, vocab, (3,))
    upstream = torch.randn(2, 3)
    upstream[:, 1] = 0.0  # a token without a gradient
    support = torch.randint(1, vocab, (3, 4))
    support[:, 1], support[:, 2] = targets, support[:, 0]
    bias = None
    if with_bias:
        ruled_out = torch.zeros(vocab, dtype=dtype)
        ruled_out[0] = -torch.inf if transform.softcap is None else 0.0
        bias = leaves[2] + ruled_out
    scores = token_logprobs(
        leaves[0],
        leaves[1],
        targets,
        support=support if weights[2] else None,
        bias=bias,
        temperature=0.8,
        chunk_size=chunk,
        transform=transform,
        extras=ExtraOutputs(sum_squared_probs=True, top1=True, top_k=3, top_gradient=weights[2] != 0),
        backend=backend,
    )
    total = weights[0] * (upstream[0] * scores.logprobs).sum() + weights[1] * (upstream[1] * scores.entropy).sum()
    if scores.support_logprobs is not None and scores.top_logprobs is not None:
        further = torch.cat((scores.support_logprobs, scores.top_logprobs), dim=1)
        total = total + weights[2] * (upstream[0][:, None] * further / torch.arange(1, 8)).sum()
    extras = [scores.support_logprobs, scores.sum_squared_probs, scores.top1, scores.top_ids, scores.top_logprobs]
    return [scores.logprobs, scores.entropy, *extras, *torch.autograd.grad(total, leaves)]


def main() -> None:
    """Compare all cases; the vocabulary is longer than a block of the kernels in the last of each dtype."""
    for case in CASES:
        vocab = 40 if case[0] is not None else 2100
        tolerance = 1e-5 if case[4] == torch.float32 else 2e-2
        found, expected = (outputs(backend, case, vocab) for backend in (HeadBackend.TRITON, HeadBackend.TORCH))
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    print(f"{len(CASES)} cases agree")


if __name__ == "__main__":
    main()
