"""Muon for matrices, AdamW for the rest, behind the face of one optimizer.

groups --2-d, neither embedding nor head--> torch.optim.Muon  --.
   '-----------------------------------> torch.optim.AdamW --+--> one `param_groups`, one `state`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Both move with one learning rate: Muon's updates are scaled to AdamW's size (https://arxiv.org/abs/2502.16982).

    Args:
        groups: of parameters, with their `weight_decay`.
        others: ids of parameters that AdamW has although they are matrices.
        adamw: options of AdamW.
        lr: of both.
        muon: further options of `torch.optim.Muon`.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        others: set[int],
        adamw: Mapping[str, Any],
        lr: float,
        **muon: Any,
    ) -> None:
        matrices, rest = [], []
        for group in groups:
            chosen = [p for p in group["params"] if p.dim() == 2 and id(p) not in others]
            left = [p for p in group["params"] if not (p.dim() == 2 and id(p) not in others)]
            matrices += [{**group, "params": chosen}] if chosen else []
            rest += [{**group, "params": left}] if left else []
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, **{"adjust_lr_fn": "match_rms_adamw", **muon}))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=lr, **adamw))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimizer's groups and state, so that schedules and checkpoints see one."""
        first = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first : first + count], self.state
            first += count

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are there before the step"
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
