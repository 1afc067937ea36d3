"""Frames between a reward worker and its sandbox: 8 bytes of length, then that many bytes of JSON.

{"nonce", "functions", "weights", ...}             worker -> child    once, after the start
{"nonce", "group", "timeout_s"}                    worker -> child    per group
{"nonce", "running": name}                         child -> worker    before each function
{"nonce", "waiting": true}                         child -> worker    once all are called, if some are awaited
{"nonce", "scored": ...}                           child -> worker    the answer
{"nonce", "lost": kind, "what", "ended"}           child -> worker    the group's process is lost, the child lives
{"nonce", "ready": true, "pid", "missing"}         child -> worker    functions are loaded; walls that are not there
"""

from __future__ import annotations

import base64
import enum
import json
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

from trl_ray.rewards.reward_registry import RewardSpec, Scorer
from trl_ray.types import Reward, RewardErrorKind, RewardFailure, ScoredGroup


class Lifetime(enum.StrEnum):
    """How long a process that calls reward functions lives."""

    RUN = "run"
    """Functions may keep models and caches, and the same process serves all groups until it hangs or crashes."""
    RUN_WALLED = "run_walled"
    """The same behind walls, for functions that evaluate nothing."""
    GROUP = "group"
    """Nothing that a group's answers do outlives the group, and they reach neither files nor network."""


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
    try:
        frame = json.loads(body)
    except RecursionError as error:
        raise ValueError("a frame must be nested less deeply") from error
    if not isinstance(frame, dict):
        raise ValueError(f"a frame must be a JSON object, got {type(frame).__name__}")
    return frame


def write_frame(fd: int, frame: Mapping[str, Any]) -> None:
    """Write one frame to a blocking pipe."""
    data = memoryview(encode(frame))
    while data:
        data = data[os.write(fd, data) :]


def read_frame(fd: int) -> dict[str, Any] | None:
    """The next frame of a blocking pipe of the worker's; None at its end."""
    header = _read(fd, HEADER_BYTES)
    body = _read(fd, int.from_bytes(header, "big")) if header else b""
    return decode(body) if body else None


def _read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := os.read(fd, min(size - len(data), 2**20))):
        data += piece
    return bytes(data) if len(data) == size else b""


def spec_to_json(spec: RewardSpec) -> dict[str, Any]:
    """A function's spec as JSON values."""
    pickled = None if spec.pickled is None else base64.b64encode(spec.pickled).decode()
    return {"name": spec.name, "reference": spec.reference, "pickled": pickled, "scorer": spec.scorer.value}


def spec_from_json(value: Mapping[str, Any]) -> RewardSpec:
    """The inverse of `spec_to_json`."""
    pickled = value["pickled"]
    return RewardSpec(
        name=value["name"],
        reference=value["reference"],
        pickled=None if pickled is None else base64.b64decode(pickled),
        scorer=Scorer(value["scorer"]),
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


def scored_from_json(value: Any, size: int, *, parts: Collection[str]) -> ScoredGroup:
    """The inverse of `scored_to_json`, trusting nothing: the child ran code that is not ours.

    Only a child that could not load its functions, of which no `parts` are wanted, may say that a failure is final.

    Raises:
        ValueError: not `size` rewards with finite totals and `parts`.
    """
    try:
        if value["failure"] is not None:
            failure = value["failure"]
            return ScoredGroup(
                failure=RewardFailure(
                    function=str(failure["function"]),
                    kind=RewardErrorKind(failure["kind"]),
                    detail=str(failure["detail"]),
                    is_final=failure["is_final"] is True and not parts,
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
        metrics = {str(name): _finite(number) or 0.0 for name, number in value["metrics"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"malformed rewards: {type(error).__name__}: {error}") from error
    if any(set(reward.parts) != set(parts) for reward in rewards):
        raise ValueError(f"rewards of other functions than {', '.join(parts)}")
    if len(rewards) != size:
        raise ValueError(f"{len(rewards)} rewards for {size} completions")
    return ScoredGroup(rewards=rewards, metrics=metrics)


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number or None, got {value!r}")
    return float(value)
