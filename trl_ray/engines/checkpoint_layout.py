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
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion


def empty_model(config: Any, *, trust_remote_code: bool) -> Any:
    """A model without memory (torch's meta device).

    Raises:
        ValueError: transformers has no such model.
    """
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=trust_remote_code)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckpointLayout:
    """What transformers does to one model's files when it loads them; travels to the processes of an engine."""

    config: Any
    conversions: tuple[Any, ...]
    """In the order of loading; empty where parameters are as files have them."""

    @classmethod
    def of(cls, model: Any) -> CheckpointLayout:
        """That of a model, which may be empty.

        NOTE: vLLM may change classes of transformers in the process it runs in; make this before it starts.
        """
        # As transformers saves a model that was not read from files: names of old files are not written again.
        found = get_model_conversion_mapping(model, add_legacy=False)
        return cls(config=model.config, conversions=tuple(each for each in found if not isinstance(each, PrefixChange)))


@dataclass(frozen=True, slots=True)
class _StandIn:
    """What `revert_weight_conversion` asks of a model."""

    config: Any
    _weight_conversions: list[Any]


@torch.no_grad()
def in_checkpoint_layout(layout: CheckpointLayout, tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Named parameters, all of a model, as files hold them; views where that is possible."""
    if not layout.conversions:
        return list(tensors)
    model: Any = _StandIn(layout.config, list(layout.conversions))
    return list(revert_weight_conversion(model, dict(tensors)).items())
