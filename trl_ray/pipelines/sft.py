"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from trl_ray.config.base import Section
from trl_ray.config.run import RunConfig
from trl_ray.config.supervised import SupervisedLossConfig
from trl_ray.config.supervised_runs import SFTConfig
from trl_ray.data.examples import ExampleTask
from trl_ray.pipelines.supervised import SupervisedPipeline


class SFTPipeline(SupervisedPipeline):
    """Learns texts, or the answers to prompts."""

    config_class: ClassVar[type[RunConfig]] = SFTConfig
    loss_class: ClassVar[type[Section]] = SupervisedLossConfig
    task: ClassVar[ExampleTask] = ExampleTask.SUPERVISED
    name: ClassVar[str] = "sft"
