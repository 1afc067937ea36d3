"""What vLLM is told because it would compute otherwise than the learner."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_architectures import tiny_config
from trl_ray.engines.start.vllm_differences import config_corrections, cpu_corrections


def test_a_window_that_vllm_widens_by_one_token_is_given_one_shorter() -> None:
    # cohere2 of the tiny ones has a window of 64 tokens.
    assert config_corrections(tiny_config("cohere2")) == {"sliding_window": 63}


@pytest.mark.parametrize("name", ["gemma3", "llama", "olmo3", "cohere"])
def test_other_windows_are_given_as_they_are(name: str) -> None:
    assert config_corrections(tiny_config(name)) == {}


def test_latent_attention_is_not_rotated_by_the_kernel_for_cpus() -> None:
    wanted: dict[str, Any] = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
    assert cpu_corrections(tiny_config("deepseek_v3")) == wanted
    assert cpu_corrections(tiny_config("llama")) == {}
