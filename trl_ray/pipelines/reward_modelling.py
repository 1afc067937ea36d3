"""Reward models: one number for an answer, or for each step of a solution."""

from __future__ import annotations

from typing import ClassVar

from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepLossConfig
from trl_ray.config.runs.dataset_config import PRMConfig, RewardModelConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.pipelines.supervised.dataset_pipeline import SupervisedPipeline
from trl_ray.types import PredictionForm


class RewardPipeline(SupervisedPipeline):
    """Learns to rate chosen answers above rejected ones (Bradley and Terry 1952; arXiv 2203.02155)."""

    config_class: ClassVar[type[RunConfig]] = RewardModelConfig
    loss_class: ClassVar[type[LossSection]] = RewardLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.REWARD_PAIRS
    prediction_form: ClassVar[PredictionForm] = PredictionForm.SCORED
    name: ClassVar[str] = "reward"


class PRMPipeline(SupervisedPipeline):
    """Learns which steps of a solution are right (Lightman et al. 2023, arXiv 2305.20050)."""

    config_class: ClassVar[type[RunConfig]] = PRMConfig
    loss_class: ClassVar[type[LossSection]] = StepLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.STEPS
    prediction_form: ClassVar[PredictionForm] = PredictionForm.STEPPED
    name: ClassVar[str] = "prm"
