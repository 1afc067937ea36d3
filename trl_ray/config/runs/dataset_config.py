"""The configurations of the pipelines that train on datasets: `sft`, `dpo`, `kto`, `orpo`, `cpo`, `reward`, `prm`.

flat, TRL's names: SupervisedRunConfig (StreamedRunConfig + ExampleConfig) + the options of its loss
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trl_ray.config.base import rule
from trl_ray.config.example_options import (
    AnsweredExampleConfig,
    ExampleConfig,
    PackingStrategy,
    SteppedExampleConfig,
    SupervisedExampleConfig,
)
from trl_ray.config.losses.preference_options import (
    CPOLossConfig,
    ORPOLossConfig,
    PreferenceLossConfig,
    UnpairedLossConfig,
)
from trl_ray.config.losses.reward_modelling_options import RewardLossConfig, StepLossConfig
from trl_ray.config.losses.supervised_options import SupervisedLossConfig
from trl_ray.config.runs.streamed_config import StreamedRunConfig

LearningRate = Annotated[float, Field(gt=0)]


class SupervisedRunConfig(StreamedRunConfig, ExampleConfig):
    """A run that trains on a dataset; batch sizes count examples."""

    ref_log_probs_cache_dir: str | None = None
    """Where precomputed log-probs of the reference are kept; None: in the user's cache folder."""

    @property
    def examples_per_step(self) -> int:
        """Examples of one optimizer step over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.runtime.num_learners

    @rule
    def _check_reference_of_a_stream(self) -> None:
        if self.dataset_streaming and getattr(self, "precompute_ref_log_probs", False):
            raise ValueError(
                "precompute_ref_log_probs must be false with dataset_streaming=true, got true: what comes is not known "
                "before training. Remove one of the two."
            )


class SFTConfig(SupervisedRunConfig, SupervisedExampleConfig, SupervisedLossConfig):
    """Supervised fine-tuning; names and defaults are those of TRL's SFTConfig."""

    pipeline: Literal["sft"] = "sft"
    disable_dropout: bool = False
    learning_rate: LearningRate = 2e-5

    @rule
    def _check_packing(self) -> None:
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise ValueError("max_length must be set with packing=true, got None: it is the length of a row. Set it.")
        if self.packing_strategy is not PackingStrategy.BFD and not (self.packing or self.eval_packing):
            raise ValueError(
                f"packing must be true with packing_strategy={self.packing_strategy.value}, got false: nothing would "
                "be packed. Set packing=true or remove packing_strategy."
            )


class DPOConfig(SupervisedRunConfig, AnsweredExampleConfig, PreferenceLossConfig):
    """Preference optimisation against a reference; names and defaults are those of TRL's DPOConfig."""

    pipeline: Literal["dpo"] = "dpo"

    @rule
    def _check_adapter_reference(self) -> None:
        if self.sync_ref_model and self.use_peft:
            raise ValueError(
                "sync_ref_model must be false with use_peft=true, got true: the reference of an adapter is the frozen "
                "model beneath it, of which there is no copy to move. Set sync_ref_model=false, or train all weights."
            )


class KTOConfig(SupervisedRunConfig, AnsweredExampleConfig, UnpairedLossConfig):
    """Preference optimisation on rated completions; names and defaults are those of TRL's KTOConfig."""

    pipeline: Literal["kto"] = "kto"

    @rule
    def _check_batch(self) -> None:
        if self.needs_kl and self.examples_per_step < 2:
            raise ValueError(
                "per_device_train_batch_size * gradient_accumulation_steps * runtime.num_learners must be at least 2 "
                f"with loss_type=kto, got {self.examples_per_step}: the KL is an average over an update. Raise one."
            )


class CPOConfig(SupervisedRunConfig, AnsweredExampleConfig, CPOLossConfig):
    """Preference optimisation without a reference (CPO, SimPO); names and defaults are those of TRL's CPOConfig."""

    pipeline: Literal["cpo"] = "cpo"


class ORPOConfig(SupervisedRunConfig, AnsweredExampleConfig, ORPOLossConfig):
    """Odds-ratio preference optimisation; names and defaults are those of TRL's ORPOConfig."""

    pipeline: Literal["orpo"] = "orpo"


class RewardModelConfig(SupervisedRunConfig, RewardLossConfig):
    """Reward modelling on pairs; names and defaults are those of TRL's RewardConfig."""

    pipeline: Literal["reward"] = "reward"
    learning_rate: LearningRate = 1e-4

    @property
    def _default_metric(self) -> str:
        return "accuracy"


class PRMConfig(SupervisedRunConfig, SteppedExampleConfig, StepLossConfig):
    """Process-reward modelling on rated steps; names and defaults are those of TRL's PRMConfig."""

    pipeline: Literal["prm"] = "prm"
    learning_rate: LearningRate = 1e-5

    @property
    def _default_metric(self) -> str:
        return "accuracy"
