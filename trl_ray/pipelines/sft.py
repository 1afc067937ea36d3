"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.data.examples.example_set import ExampleTask
from trl_ray.pipelines.supervised.dataset_pipeline import SupervisedPipeline
from trl_ray.types import PredictionForm


class SFTPipeline(SupervisedPipeline):
    """Learns texts, or the answers to prompts."""

    config_class: ClassVar[type[RunConfig]] = SFTConfig
    loss_class: ClassVar[type[LossSection]] = SupervisedLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.SUPERVISED
    prediction_form: ClassVar[PredictionForm] = PredictionForm.LABELLED
    name: ClassVar[str] = "sft"
