"""The auxiliary loss of a mixture of experts: routers that send all tokens to few experts pay for it.

    routers of the model --hooks, while a training pass listens--> logits [tokens, E] a layer --take--> scalar

    loss = E sum_e f_e p_e         f_e  assignments to expert e a token, p_e  mean probability that routers give to e
                                   https://arxiv.org/abs/2101.03961, eq. 4 to 6, over all layers and tokens together

It is the loss of transformers' models (`load_balancing_loss_func`), of the tokens of a micro-batch; a prompt that
several completions share is one text there. TRL adds its mean over micro-batches, times `router_aux_loss_coef`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_ray.errors import ModelError

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names in configurations of how many experts there are."""


def aux_loss_coefficient(config: Any, asked: float | None) -> float:
    """The weight of the loss: what is asked for, or what the model's configuration says; 0 where there is none.

    Raises:
        ModelError: it is asked for, and the model has no routers that transformers has such a loss for.
    """
    text = config.get_text_config()
    has_loss = hasattr(text, "output_router_logits")
    if asked and not has_loss:
        raise ModelError(
            f"router_aux_loss_coef must be left out for a {text.model_type}, got {asked}: it is no mixture of experts "
            "whose routers transformers has a loss for. Remove it, or set 0."
        )
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if asked is None else asked
    return float(coefficient or 0.0) if has_loss else 0.0


def router_loss(policy: nn.Module, asked: float | None) -> RouterLoss | None:
    """The loss of a policy's routers; None where it has no weight.

    Raises:
        ModelError: it is asked for and cannot be had.
    """
    coefficient = aux_loss_coefficient(policy.config, asked)
    return RouterLoss(policy, coefficient) if coefficient else None


class RouterLoss:
    """Gathers what the routers of a model say, and makes the loss of it::

        with routers.listening():
            scores = scorer.score(samples)
        aux_loss = routers.take()

    Args:
        policy: a mixture of experts.
        coefficient: weight of the loss.

    Raises:
        ModelError: its routers or its numbers of experts are not known.
    """

    def __init__(self, policy: nn.Module, coefficient: float) -> None:
        self.coefficient = coefficient
        config: Any = policy.config.get_text_config()  # type: ignore[operator,union-attr]
        found = [int(value) for name in _EXPERTS if (value := getattr(config, name, None))]
        recorders = _recorders(policy)
        routers = [
            (module, recorder.index)
            for name, module in policy.named_modules()
            for recorder in recorders
            if isinstance(module, recorder.target_class) and _is_named(name, recorder.layer_name)
        ]
        if not found or not routers:
            raise ModelError(
                f"router_aux_loss_coef must be 0 for {type(policy).__name__}: transformers does not know its routers "
                "by name. Set router_aux_loss_coef=0."
            )
        self._num_experts, self._top_k = found[0], int(config.num_experts_per_tok)
        self._logits: list[Tensor] = []
        self._listens = False
        self._real: Tensor | None = None
        self.real: Tensor | None = None
        """[R*T] bool, False for padding of the pass at hand; None: there is none."""
        for router, index in routers:
            router.register_forward_hook(lambda module, given, output, index=index: self._hear(output, index))

    def _hear(self, output: Any, index: int) -> None:
        logits = output if isinstance(output, Tensor) else output[index]
        # Passes without gradient are of references and teachers, and layers that are computed again come when this is
        # over.
        if self._listens and logits.requires_grad:
            # As they are: layers that are computed again would miss what is computed of them here.
            self._logits.append(logits)
            self._real = self.real

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Gather while it is open."""
        self._logits, self._listens = [], True
        try:
            yield
        finally:
            self._listens = False

    def take(self) -> Tensor | None:
        """The loss of what was gathered, a scalar with gradient; None where no router was asked."""
        if not self._logits:
            return None
        rows, self._logits = [layer.reshape(-1, layer.shape[-1]) for layer in self._logits], []
        logits = rows if self._real is None else [layer[self._real] for layer in rows]
        return load_balancing_loss(logits, num_experts=self._num_experts, top_k=self._top_k)


def load_balancing_loss(logits: list[Tensor], *, num_experts: int, top_k: int) -> Tensor:
    """E sum_e f_e p_e of router logits [tokens, E] of each layer."""
    joined = torch.cat([layer.float() for layer in logits])
    probabilities = joined.softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    assignments = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0).mean(dim=0)
    return num_experts * (assignments * probabilities.mean(dim=0)).sum()


def _is_named(name: str, part: str | None) -> bool:
    """As transformers records: where routers are plain linear layers, their name tells them from others."""
    return part is None or f".{part.strip('.')}." in f".{name}."


def _recorders(policy: nn.Module) -> list[Any]:
    for module in policy.modules():
        named = getattr(module, "_can_record_outputs", None) or {}
        recorders = named.get("router_logits")
        if recorders is not None:
            return recorders if isinstance(recorders, list) else [recorders]
    return []
