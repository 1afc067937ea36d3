"""TRL's names of reward functions, and its way to write a path to one, in ours.

["think_format_reward", "my_lib.rewards.custom"] --read_reward_names--> ["think_format", "my_lib.rewards:custom"]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trl_ray.config.object_paths import real_path

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "think_format_reward": "think_format",
        "get_soft_overlong_punishment": "soft_overlong(max_completion_len=1280, soft_punish_cache=256)",
        "accuracy_reward": "accuracy_reward",
        "reasoning_accuracy_reward": "reasoning_accuracy_reward",
    }
)
_MODULE = "trl.rewards"
"""Where TRL keeps them; whoever names one by this path gets ours, and needs no TRL."""
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def read_reward_names(value: Any) -> Any:
    """The same list in our names; None is none, and what is no text is left to validation."""
    if value is None:
        return []
    return [_read(each) if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _read(name: str) -> str:
    known = name.removeprefix(f"{_MODULE}.").removeprefix(f"{_MODULE}:")
    if known in _NAMES:
        return _NAMES[known]
    if _DOTTED.fullmatch(name) is None:
        return real_path(name)
    module, _, function = name.rpartition(".")
    return f"{module}:{function}"
