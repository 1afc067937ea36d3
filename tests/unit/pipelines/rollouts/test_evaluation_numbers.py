"""Answers to held-out prompts as numbers, and as what the user's own `compute_metrics` is given."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import EvalPrediction

from fakes import completion, prompt, reward
from objectives import prepare
from tiny_models import build_tiny_model
from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.config.load import dump_yaml, load_config
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.errors import CallbackError, ConfigError
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.rollouts.evaluation_numbers import answer_numbers, prediction_of
from trl_ray.pipelines.rollouts.preparation import Inputs
from trl_ray.pipelines.run.own_metrics import computed_metrics, own_numbers
from trl_ray.rewards.scoring import ScoredGroup
from trl_ray.types import FinishReason

ROWS = [{"prompt": "a"}, {"prompt": "b"}]


def answers() -> list[EvaluatedPrompt]:
    first = dataclasses.replace(prompt(7), columns={"answer": 3})
    second = dataclasses.replace(prompt(8), messages=({"role": "user", "content": "hi"},), text=None)
    cut = completion("abc", finish=FinishReason.LENGTH)
    return [
        EvaluatedPrompt(
            prompt=first,
            completions=(completion("ab"), cut),
            scored=ScoredGroup(rewards=(reward(1.0), reward(None))),
        ),
        EvaluatedPrompt(prompt=second, completions=(completion("a"),), scored=ScoredGroup(rewards=())),
    ]


def test_the_user_s_function_is_given_every_answer_with_all_that_is_known_of_it() -> None:
    given = prediction_of(answers())
    assert isinstance(given, EvalPrediction)
    ids, labels = given
    assert ids.tolist() == [[0, 1, -100], [0, 1, 2], [0, -100, -100]] and labels is None
    assert given.inputs.tolist() == [[1, 2, 7], [1, 2, 7], [1, 2, 8]]
    assert given.prompts == ["prompt 7", "prompt 7", [{"role": "user", "content": "hi"}]]
    assert given.completions == ["ab", "abc", [{"role": "assistant", "content": "a"}]]
    assert given.completion_ids == [[0, 1], [0, 1, 2], [0]] and given.prompt_ids[2] == [1, 2, 8]
    assert given.prompt_indices.tolist() == [0, 0, 1]
    assert np.array_equal(given.rewards, [1.0, np.nan, np.nan], equal_nan=True)
    assert all(len(values) == 3 for values in given.reward_parts.values())
    assert given.columns == {"answer": [3, 3, None]}
    assert given.is_truncated.tolist() == [False, True, False]
    assert [len(each) for each in given.logprobs] == [2, 3, 1]


def test_the_sampler_s_entropy_is_a_mean_over_the_tokens_that_it_drew() -> None:
    def drawn(*logprobs: float, is_sampled: bool = True) -> Any:
        one = completion("x" * len(logprobs))
        return dataclasses.replace(one, logprobs=np.array(logprobs, np.float32), is_sampled=is_sampled)

    def entropy(*completions: Any) -> float | None:
        scored = ScoredGroup(rewards=tuple(reward(0.0) for _ in completions))
        held_out = EvaluatedPrompt(prompt=prompt(0), completions=completions, scored=scored)
        return answer_numbers([held_out]).get("entropy")

    # (1 + 2 + 3 + 0.5) / 4
    assert entropy(drawn(-1.0, -2.0, -3.0), drawn(-0.5)) == 1.625
    assert str(entropy(drawn(0.0, 0.0))) == "0.0"
    assert entropy(drawn(-1.0, is_sampled=False)) is None


def test_numbers_are_written_and_the_rest_is_told() -> None:
    numbers, told = own_numbers({"eval_far_right": 1, "wrong": 0.5, "table": [1]}, "far")
    assert numbers == {"right": 1, "wrong": 0.5}
    assert told == "compute_metrics gave table, which are no numbers and written nowhere"
    config = GRPOConfig(runtime={"kind": "local"})

    def raising(given: Any) -> dict[str, float]:
        return {"x": given.predictions[99]}

    with pytest.raises(CallbackError, match=r"must not raise, but did: IndexError.*predictions \(3, 3\)"):
        asyncio.run(computed_metrics(raising, prediction_of(answers()), config))
    with pytest.raises(CallbackError, match="must return a dict of numbers, got a float"):
        asyncio.run(computed_metrics(lambda given: 1.0, prediction_of(answers()), config))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_function_is_named_in_the_configuration_or_given_as_an_object(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def measure(given):\n    return {'n': len(given.completions)}\n")
    options = ("compute_metrics: mine.py:measure", "max_steps: 1", "max_completion_length: 8")
    (tmp_path / "run.yaml").write_text("\n".join((f"model_name_or_path: {model}", *options)))
    config = load_config(GRPOConfig, tmp_path / "run.yaml")
    # Beside the file, and found from any other folder.
    assert config.compute_metrics == f"{tmp_path / 'mine.py'}:measure"
    inputs = {"train_dataset": ROWS, "reward_funcs": [lambda completions, **_: [0.0] * len(completions)]}
    plan = prepare(config, Inputs(**inputs))
    assert plan.compute_metrics is not None and plan.compute_metrics(prediction_of(answers())) == {"n": 3}
    with pytest.raises(ConfigError, match=r"Did you mean .*mine\.py:measure"):
        prepare(config.replace(compute_metrics=f"{tmp_path / 'mine.py'}:mesure"), Inputs(**inputs))

    def own(given: Any) -> dict[str, float]:
        return {}

    pipeline = GRPOPipeline(args=config, compute_metrics=own, **inputs)
    assert "compute_metrics: python:own" in dump_yaml(pipeline.config)
    with pytest.raises(ConfigError, match=r"python:own.*from_run\(run_dir, compute_metrics=.*compute_metrics=null"):
        prepare(pipeline.config, Inputs(**inputs))
    with pytest.raises(ConfigError, match="compute_metrics must be a function, got a float"):
        prepare(config, Inputs(**inputs, compute_metrics=0.5))  # type: ignore[arg-type]
