"""What no file system can hold is refused with the name of its option, before anything looks for it."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.errors import ConfigError

NAMES = ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir", "run_name", "hub_model_id")


@pytest.mark.parametrize("name", [*NAMES, "chat_template"])
def test_a_nul_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must hold no NUL character"):
        build(GRPOConfig, {name: "a\0b"})


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("given", ["x" * 300, "/tmp/" + "x" * 256 + "/y", "ü" * 128])
def test_a_name_that_is_too_long_is_refused_with_its_length(name: str, given: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{name} must be a name or a path.*255 bytes, got one of (300|256)"
    ) as caught:
        build(SFTConfig, {name: given})
    assert len(str(caught.value)) < 300


def test_of_lists_every_text_is_looked_at() -> None:
    with pytest.raises(ConfigError, match="reward_funcs must hold no NUL character"):
        build(GRPOConfig, {"reward_funcs": ["file.py:one", "file.py:two\0"]})


@pytest.mark.parametrize(
    "values", [{"model_name_or_path": "/".join(["x" * 255] * 4)}, {"chat_template": "{{ messages }}" * 100}]
)
def test_long_paths_of_short_names_and_long_templates_are_fine(values: dict[str, Any]) -> None:
    build(SFTConfig, values)
