"""Frames between a reward worker and its sandbox: 8 bytes of length, then that many bytes of JSON.

{"nonce", "functions", "weights", ...}             worker -> child    once, after the start
{"nonce", "group"}                                 worker -> child    per group
{"nonce", "running": name}                         child -> worker    before each function
{"nonce", "waiting": true}                         child -> worker    once all are called, if some are awaited
{"nonce", "scored": ...} or {"nonce", "ready"}     child -> worker    the answer
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from trl_ray.rewards.reward_registry import RewardSpec
from trl_ray.types import Reward, RewardErrorKind, RewardFailure, ScoredGroup

HEADER_BYTES = 8
MAX_FRAME_BYTES = 256 * 2**20


def encode(frame: Mapping[str, Any]) -> bytes:
    """A frame as bytes."""
    body = json.dumps(frame).encode()
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def decode(body: bytes) -> dict[str, Any]:
    """A frame from the bytes behind its header.

    Raises:
        ValueError: not a JSON object.
    """
    frame = json.loads(body)
    if not isinstance(frame, dict):
        raise ValueError(f"a frame must be a JSON object, got {type(frame).__name__}")
    return frame


def spec_to_json(spec: RewardSpec) -> dict[str, Any]:
    """A function's spec as JSON values."""
    pickled = None if spec.pickled is None else base64.b64encode(spec.pickled).decode()
    return {"name": spec.name, "reference": spec.reference, "pickled": pickled}


def spec_from_json(value: Mapping[str, Any]) -> RewardSpec:
    """The inverse of `spec_to_json`."""
    pickled = value["pickled"]
    return RewardSpec(
        name=value["name"],
        reference=value["reference"],
        pickled=None if pickled is None else base64.b64decode(pickled),
    )


def scored_to_json(scored: ScoredGroup) -> dict[str, Any]:
    """A scored group as JSON values."""
    failure = scored.failure
    return {
        "rewards": [
            {"total": reward.total, "parts": dict(reward.parts), "extra": dict(reward.extra)}
            for reward in scored.rewards
        ],
        "failure": failure
        and {
            "function": failure.function,
            "kind": failure.kind.value,
            "detail": failure.detail,
            "is_final": failure.is_final,
        },
        "metrics": dict(scored.metrics),
    }


def scored_from_json(value: Any, size: int) -> ScoredGroup:
    """The inverse of `scored_to_json`, trusting nothing: the child ran code that is not ours.

    Raises:
        ValueError: not `size` rewards with finite totals and parts.
    """
    try:
        if value["failure"] is not None:
            failure = value["failure"]
            return ScoredGroup(
                failure=RewardFailure(
                    function=str(failure["function"]),
                    kind=RewardErrorKind(failure["kind"]),
                    detail=str(failure["detail"]),
                    is_final=failure["is_final"] is True,
                )
            )
        rewards = tuple(
            Reward(
                total=_finite(item["total"]),
                parts={str(k): _finite(v) for k, v in item["parts"].items()},
                extra=dict(item["extra"]),
            )
            for item in value["rewards"]
        )
        metrics = {str(name): float(number) for name, number in value["metrics"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"malformed rewards: {type(error).__name__}: {error}") from error
    if len(rewards) != size:
        raise ValueError(f"{len(rewards)} rewards for {size} completions")
    return ScoredGroup(rewards=rewards, metrics=metrics)


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number or None, got {value!r}")
    return float(value)
