"""Every file under configs/ loads as a configuration of the pipeline its folder is named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_ray.config.base import Section
from trl_ray.config.load import build, dump_yaml, load_config, parse_yaml
from trl_ray.config.runs.dataset_config import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedRunConfig,
)
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig

ROOT = Path(__file__).parents[4]
FILES = sorted((ROOT / "configs").rglob("*.y*ml"))
SUPERVISED: dict[str, type[SupervisedRunConfig]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "cpo": CPOConfig,
    "orpo": ORPOConfig,
    "reward": RewardModelConfig,
    "prm": PRMConfig,
}
CONFIGS: dict[str, type[Section]] = {
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
    "async-grpo": AsyncGRPOConfig,
    "sdpo": SDPOConfig,
    "distill": DistillConfig,
    **SUPERVISED,
}


def load_shipped(path: Path) -> Section:
    return load_config(CONFIGS[path.parent.name], path)


@pytest.mark.parametrize("pipeline", CONFIGS)
def test_every_pipeline_ships_a_quickstart(pipeline: str) -> None:
    assert ROOT / "configs" / pipeline / "quickstart.yaml" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_loads_and_its_resolved_form_loads_to_the_same(path: Path) -> None:
    config = load_shipped(path)
    assert build(type(config), parse_yaml(dump_yaml(config), source="resolved")) == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_writes_into_a_run_directory_of_its_own(path: Path) -> None:
    output_dirs = [load_shipped(other).output_dir for other in FILES]  # type: ignore[attr-defined]
    assert output_dirs.count(load_shipped(path).output_dir) == 1  # type: ignore[attr-defined]


def test_the_quickstart_takes_eight_groups_of_eight_and_runs_at_most_two_steps_ahead() -> None:
    config = load_config(AsyncGRPOConfig, ROOT / "configs/async-grpo/quickstart.yaml")
    assert (config.groups_per_step, config.num_generations) == (8, 8)
    assert (config.max_age_at_use, config.slots) == (2, 24)


def test_the_synchronous_quickstart_differs_from_the_asynchronous_one_only_in_staleness_and_output() -> None:
    sync = load_config(GRPOConfig, ROOT / "configs/grpo/quickstart.yaml").model_dump()
    asynchronous = load_config(AsyncGRPOConfig, ROOT / "configs/async-grpo/quickstart.yaml").model_dump()
    different = {key for key in asynchronous if key not in sync or sync[key] != asynchronous[key]}
    assert different == {"pipeline", "output_dir", "max_staleness", "max_look_ahead", "adaptive_slots"}


def test_the_quickstart_of_rloo_takes_as_many_completions_of_the_same_prompts_as_that_of_grpo() -> None:
    grpo, rloo = (load_config(CONFIGS[name], ROOT / "configs" / name / "quickstart.yaml") for name in ("grpo", "rloo"))
    shared = ("completions_per_step", "dataset_kwargs", "reward_funcs", "max_steps", "learning_rate", "rollout", "seed")
    assert [getattr(rloo, name) for name in shared] == [getattr(grpo, name) for name in shared]
    assert (rloo.groups_per_step, rloo.num_generations) == (16, 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("pipeline", SUPERVISED)
@pytest.mark.parametrize("name", ["quickstart", "tiny"])
def test_every_supervised_config_shows_what_was_learnt_on_rows_of_its_own_form(pipeline: str, name: str) -> None:
    config = load_config(SUPERVISED[pipeline], ROOT / "configs" / pipeline / f"{name}.yaml")
    forms = {"sft": "completions", "kto": "ratings", "prm": "steps"}
    assert config.dataset_kwargs["form"] == forms.get(pipeline, "preferences")
    # Each row once at most, and few enough held-out ones that looking at them twice costs less than training.
    assert config.max_steps * config.examples_per_step <= config.dataset_kwargs["size"]
    assert config.eval_steps > 0 and 2 * config.dataset_kwargs["held_out_size"] <= config.dataset_kwargs["size"]
