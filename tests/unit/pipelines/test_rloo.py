"""The RLOO pipeline: its name, its configuration, and what it hands to the learner."""

from __future__ import annotations

import pytest

from trl_ray.config.load import dump_yaml
from trl_ray.config.losses.advantage_options import AdvantageBaseline
from trl_ray.config.runs.grpo_config import GRPOConfig, RLOOConfig
from trl_ray.errors import ConfigError
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.pipelines.pipeline_registry import PIPELINES
from trl_ray.pipelines.rloo import RLOOPipeline


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_reads_configurations_that_bear_its_name(name: str) -> None:
    assert PIPELINES[name].config_class().pipeline == name == PIPELINES[name].name


def test_it_takes_a_configuration_of_rloo_only() -> None:
    assert RLOOPipeline().config.advantage_baseline is AdvantageBaseline.LEAVE_ONE_OUT
    with pytest.raises(ConfigError, match="args must be a RLOOConfig, got a GRPOConfig"):
        RLOOPipeline(args=GRPOConfig())


def test_a_run_goes_on_with_the_configuration_it_was_started_with(tmp_path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    directory.write_config(dump_yaml(RLOOConfig(beta=0.0, reward_clip_range=(0.0, 1.0), output_dir="elsewhere")))
    directory.metrics.touch()
    config = RLOOPipeline.from_run(directory.path).config
    assert (config.pipeline, config.beta, config.reward_clip_range) == ("rloo", 0.0, (0.0, 1.0))
