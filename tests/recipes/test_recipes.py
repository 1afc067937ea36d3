"""Recipes of TRL's users run as they are; of its neighbours' each option is read or answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.recipe_files import NEIGHBOURS, TRL, answered, pipeline_of, replaced, without
from tiny_models import build_tiny_model
from trl_ray.config.load import build, dump_yaml, parse_yaml
from trl_ray.errors import ConfigError
from trl_ray.pipelines.pipeline_registry import PIPELINES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a chat template."""
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def prepared(recipe: Path, options: dict[str, Any]) -> Any:
    """The plan of a run, as the dry run makes it."""
    pipeline: Any = PIPELINES[pipeline_of(recipe)]
    return pipeline(args=build(pipeline.config_class, options)).prepare()


def test_there_are_recipes_of_every_pipeline_that_trl_has() -> None:
    assert len([*TRL, *NEIGHBOURS]) >= 20
    assert {pipeline_of(each) for each in TRL} == set(PIPELINES) - {"prm"}


@pytest.mark.parametrize("recipe", TRL, ids=lambda recipe: recipe.stem)
def test_a_recipe_of_trls_users_is_planned_with_only_model_and_data_replaced(
    recipe: Path, model: str, tmp_path: Path
) -> None:
    plan = prepared(recipe, replaced(recipe, model=model, data=tmp_path, output_dir=tmp_path / "runs"))
    assert plan.total_steps >= 1 and plan.describe() and plan.actors()
    # What is resolved is the same run.
    config_class = type(plan.config)
    assert build(config_class, parse_yaml(dump_yaml(plan.config), source="config.yaml")) == plan.config
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("recipe", NEIGHBOURS, ids=lambda recipe: recipe.stem)
def test_a_recipe_of_the_neighbours_is_answered_once_and_then_planned(recipe: Path, model: str, tmp_path: Path) -> None:
    options = replaced(recipe, model=model, data=tmp_path, output_dir=tmp_path / "runs")
    told: list[str] = []
    if answered(recipe):
        with pytest.raises(ConfigError) as caught:
            prepared(recipe, options)
        told = [line.split("'")[1] for line in str(caught.value).split("\n")]
        assert "Did you mean" not in str(caught.value) and "--help" not in str(caught.value)
    assert sorted(told) == sorted(answered(recipe))
    kept = without(options, told)
    if not {"datasets", "dataset_mixture"} & set(kept):
        kept["dataset_name"] = str(tmp_path / recipe.stem)
    assert prepared(recipe, kept).total_steps >= 1


@pytest.mark.integration
@pytest.mark.parametrize("name", ["sft-handbook", "dpo-mpo", "cpo-simpo", "grpo-lora"])
def test_a_recipe_trains(name: str, model: str, tmp_path: Path) -> None:
    [recipe] = [each for each in TRL if each.stem == name]
    options = replaced(recipe, model=model, data=tmp_path, output_dir=tmp_path / "runs")
    options |= {"max_steps": 2, "runtime": {"kind": "local"}}
    pipeline: Any = PIPELINES[pipeline_of(recipe)]
    output = pipeline(args=build(pipeline.config_class, options)).train()
    assert output.steps == 2
    assert (output.run_dir / "checkpoints" / "step-2").is_dir()
