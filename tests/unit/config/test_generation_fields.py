"""Every field that the libraries have is taken, left without effect, or refused with a reason."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from transformers import GenerationConfig

from trl_ray.config.keywords import generation_fields
from trl_ray.config.keywords.generation_fields import read_generation_kwargs, reshaping, unknown_to
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.errors import ConfigError


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


@pytest.mark.parametrize(
    ("held", "left"),
    [
        ({"eos_token_id": 5, "stop_token_ids": [7]}, [5, 7]),
        ({"stop_token_ids": [7], "eos_token_id": 5}, [7, 5]),
        ({"stop_token_ids": 7}, [7]),
        ({"eos_token_id": (5, 6)}, [5, 6]),
    ],
)
def test_tokens_of_either_name_end_a_completion(held: dict[str, Any], left: list[int]) -> None:
    assert read_generation_kwargs({"generation_kwargs": held}) == {"generation_kwargs": {"stop_token_ids": left}}


@pytest.mark.parametrize("name", ["stop_token_ids", "eos_token_id"])
@pytest.mark.parametrize("value", ["ab", ["a"], True, 1.5, [[1]]])
def test_what_is_no_tokens_id_ends_nothing(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"generation_kwargs.{name} must be a token's id or a list of ids, got "):
        read_generation_kwargs({"generation_kwargs": {name: value}})


def test_a_second_structure_is_refused_and_the_same_one_twice_is_one() -> None:
    for second in ({"guided_json": {}}, {"structured_outputs": {"choice": ["a"]}}, {"guided_decoding": {"json": {}}}):
        with pytest.raises(ValueError, match=r"must ask for one structure of completions, got \{'regex': 'a'\} and "):
            read_generation_kwargs({"generation_kwargs": {"guided_regex": "a", **second}})
    same = {"guided_regex": "a", "structured_outputs": {"regex": "a"}}
    read = read_generation_kwargs({"generation_kwargs": same})
    assert read == {"generation_kwargs": {"structured_outputs": {"regex": "a"}}}


def test_broken_json_is_told_with_the_options_name() -> None:
    for option in ("generation_kwargs", "model_init_kwargs"):
        with pytest.raises(ConfigError, match=f"{option} must be a mapping, or one written as JSON, got"):
            GRPOConfig(**{option: '{"top_p": 0.9,'})
    assert GRPOConfig(generation_kwargs='{"top_p": 0.9}').top_p == 0.9


def test_keywords_of_a_model_that_are_none_say_nothing() -> None:
    held = {"dtype": None, "torch_dtype": None, "revision": None, "attn_implementation": None}
    config = GRPOConfig(model_init_kwargs=held, model_revision="v2", dtype="bfloat16")
    assert (config.model_revision, config.dtype.value, config.model_init_kwargs) == ("v2", "bfloat16", {})
