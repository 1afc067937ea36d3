"""What an engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_ray.types.arrays import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an engine samples; TRL's names."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields, in the engine's own names."""
    policy_logprobs: bool = False
    """Give the log-probs of the policy at the temperature, before whatever else reshapes sampling, and not those of the
    distribution that is drawn from; without anything that reshapes it they are the same."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationRequest:
    """n samples of one prompt."""

    request_id: str
    prompt_ids: IntArray
    """[P]"""
    n: int
    sampling: SamplingParams
    seed: int
    """Sample i draws from a generator seeded by (seed, i) alone, whatever else is in the batch."""
