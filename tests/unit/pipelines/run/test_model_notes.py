"""What is told of the model and of sampling before a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_models import build_tiny_model, build_tokenizer
from trl_ray.config.load import build
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.sections import GenerationConfig, ModelConfig, RolloutConfig
from trl_ray.errors import ConfigError
from trl_ray.models.policy_loading import load_tokenizer
from trl_ray.pipelines.run.model_notes import model_notes, precision_notes, sampling_notes

ROLLOUT = RolloutConfig(engine="transformers")


def test_a_longer_tokenizer_is_told_with_both_sizes(tmp_path: Path) -> None:
    model = ModelConfig(model_name_or_path=build_tiny_model(tmp_path))
    assert model_notes(model, load_tokenizer(model)) == ()
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    [note] = model_notes(model, tokenizer)
    assert note.startswith("The tokenizer has ids up to 260, the model 260 rows: embeddings and head get 320")
    [note] = model_notes(model.replace(use_peft=True), tokenizer)
    assert note.endswith("Beside the adapter they are trained in full.")


def test_what_moves_the_distribution_is_told_once() -> None:
    assert sampling_notes(GenerationConfig(generation_kwargs={"stop_token_ids": [5]}), ROLLOUT) == ()
    generation = GenerationConfig(generation_kwargs={"logit_bias": {5: -1}}, repetition_penalty=1.1)
    [note] = sampling_notes(generation, ROLLOUT)
    assert note.startswith("repetition_penalty=1.1, logit_bias: completions are drawn from another distribution")
    assert note.endswith("ratios of fresh tokens are 1, and of what sampling leaves out nothing is learnt.")
    for name, value in (("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("min_tokens", 2)):
        [note] = sampling_notes(GenerationConfig(**{name: value}), ROLLOUT)
        assert note.startswith(f"{name}={value}: completions are drawn from another distribution")


def test_a_field_that_the_engine_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"structured_outputs must be left out with the engine transformers"):
        sampling_notes(GenerationConfig(vllm_structured_outputs_regex="a+"), ROLLOUT)


@pytest.mark.parametrize(
    ("engine_kwargs", "top_p", "words"),
    [
        ({"logprobs_mode": "raw_logprobs"}, 1.0, r"logprobs_mode must be processed_logprobs, got raw_logprobs"),
        ({"speculative_config": {"method": "ngram"}}, 0.9, r"speculative_config must be left out with top_p=0\.9, got"),
    ],
)
def test_what_keeps_vllm_from_the_learners_log_probs_is_refused(
    engine_kwargs: dict[str, Any], top_p: float, words: str
) -> None:
    rollout = RolloutConfig(engine="vllm", engine_kwargs=engine_kwargs)
    with pytest.raises(ConfigError, match=words):
        sampling_notes(GenerationConfig(top_p=top_p), rollout)


def test_logits_processors_of_the_engine_are_told_of() -> None:
    rollout = RolloutConfig(engine="vllm", engine_kwargs={"logits_processors": ["mine:Mine"]})
    [note] = sampling_notes(GenerationConfig(), rollout)
    assert note.startswith("rollout.engine_kwargs.logits_processors: completions are drawn from another distribution")


def test_drafts_and_filters_are_had_each_without_the_other() -> None:
    rollout = RolloutConfig(engine="vllm", engine_kwargs={"speculative_config": {"method": "ngram"}})
    assert sampling_notes(GenerationConfig(), rollout) == ()
    assert len(sampling_notes(GenerationConfig(top_p=0.9), rollout.replace(engine_kwargs={}))) == 1


def test_that_bf16_leaves_engines_in_float32_is_told_unless_it_was_asked_for() -> None:
    [note] = precision_notes(GRPOConfig(bf16=True))
    assert note.startswith("bf16 is of the learner's products alone: engines have the weights in float32")
    for changes in ({"bf16": False}, {"rollout": {"dtype": "float32"}}, {"dtype": "bfloat16"}):
        assert precision_notes(build(GRPOConfig, {"bf16": True, **changes})) == ()
