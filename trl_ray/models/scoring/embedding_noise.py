"""NEFTune: noise on the embeddings that a model reads in training (https://arxiv.org/abs/2310.05914).

    e [R,T,H]  -->  e + u    u uniform in ± alpha / sqrt(L H)    L: tokens of the sequence that a token belongs to

Where a row holds several sequences each token has the L of its own; a prompt that several completions share has the
mean of theirs, because it is embedded once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trl_ray.models.scoring.head import causal_model


def noise_bounds(lengths: Tensor, *, alpha: float, hidden_size: int) -> Tensor:
    """The largest noise [R, T] of tokens whose sequences have these lengths [R, T]."""
    return alpha * (lengths * hidden_size).rsqrt()


@contextmanager
def noisy_embeddings(model: nn.Module, bounds: Tensor) -> Iterator[None]:
    """While it is open, the model's embeddings come with noise from torch's global random state.

    Args:
        model: whose input embeddings are looked up once inside.
        bounds: [R, T] of the tokens that will be looked up.
    """

    def shake(module: nn.Module, inputs: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        del module, inputs
        noise = torch.empty_like(embeddings).uniform_(-1.0, 1.0)
        return embeddings + noise * bounds.unsqueeze(-1).to(embeddings.dtype)

    embedding: nn.Module = causal_model(model).get_input_embeddings()
    # A hook, so that the model still takes token ids, and what it does to embeddings itself comes after the noise.
    hook = embedding.register_forward_hook(shake)
    try:
        yield
    finally:
        hook.remove()
