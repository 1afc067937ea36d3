"""Every field that the libraries have is taken, left without effect, or refused with a reason."""

from __future__ import annotations

import importlib.util

import pytest
from transformers import GenerationConfig

from trl_ray.config.keywords import generation_fields
from trl_ray.config.keywords.generation_fields import read_generation_kwargs, reshaping, unknown_to


def is_known(name: str) -> bool:
    """Whether a field is answered otherwise than as one that nobody has."""
    try:
        read_generation_kwargs({"generation_kwargs": {name: "a value"}})
    except ValueError as error:
        return "must hold fields of" not in str(error)
    return True


def test_no_field_of_transformers_is_unheard_of() -> None:
    fields = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    assert len(fields) > 50
    assert [name for name in fields if not is_known(name)] == []


def test_no_field_of_vllm_is_unheard_of() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    fields = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    assert [name for name in fields if not is_known(name)] == []
    for name, field in generation_fields.ENGINE_FIELDS.items():
        assert ("vllm" in field.engines) == (name in fields), name
    structure = {name for name in StructuredOutputsParams.__dataclass_fields__ if not name.startswith("_")}
    assert structure == generation_fields._STRUCTURE_FIELDS


def test_an_engine_without_a_field_is_told_with_what_to_do() -> None:
    assert unknown_to("vllm", {"logit_bias": {}, "stop_token_ids": []}) is None
    assert unknown_to("transformers", {"structured_outputs": {}}) == (
        "generation_kwargs.structured_outputs must be left out with the engine transformers, which has none. Set "
        "rollout.engine=vllm, or remove it."
    )
    assert "Set bad_words" in (unknown_to("vllm", {"bad_words_ids": [[1]]}) or "")


def test_fields_under_which_sampler_and_learner_differ_are_told_apart() -> None:
    assert reshaping({"stop_token_ids": [5], "presence_penalty": 1, "structured_outputs": {}}) == [
        "presence_penalty",
        "structured_outputs",
    ]
