"""Weights under the names, and in the shapes, that checkpoint files have.

    parameters of transformers: fused experts [E, 2F, H] --revert--> experts.0.w1.weight [F, H], ... --> vLLM

transformers joins on loading what files keep apart (above all experts), and takes it apart again on saving. Engines
that read files know the names of files only: under others they would leave weights as they were, some without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion


def empty_model(config: Any, *, trust_remote_code: bool) -> Any:
    """A model without memory (torch's meta device).

    Raises:
        ValueError: transformers has no such model.
    """
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=trust_remote_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """How the files of one model are laid out; travels to the processes of an engine."""

    model: str
    """Path or hub name."""
    trust_remote_code: bool = False
    revision: str | None = None
    """Of a hub name; None: the default."""

    def empty(self) -> Any:
        """The model that knows how it is saved."""
        options = {} if self.revision is None else {"revision": self.revision}
        config = AutoConfig.from_pretrained(self.model, trust_remote_code=self.trust_remote_code, **options)
        return empty_model(config, trust_remote_code=self.trust_remote_code)


@torch.no_grad()
def in_checkpoint_layout(empty: Any, tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Named parameters as files hold them; views where that is possible.

    Args:
        empty: a model of that architecture, whose weights are not looked at.
        tensors: all of its parameters.
    """
    return list(revert_weight_conversion(empty, dict(tensors)).items())
