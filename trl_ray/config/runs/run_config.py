"""What the configurations of all pipelines have in common.

flat, TRL's names: ModelConfig + DataConfig + TrainingConfig + ReportConfig + CadenceConfig + HubConfig
nested, ours:      runtime: RuntimeConfig
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from trl_ray.config.base import rule
from trl_ray.config.deepspeed import resolve_deepspeed
from trl_ray.config.object_paths import is_same_object, real_path
from trl_ray.config.runs.cadence_options import CadenceConfig, HubConfig
from trl_ray.config.sections import (
    DataConfig,
    Dtype,
    ModelConfig,
    ReportConfig,
    RuntimeConfig,
    RuntimeKind,
    TrainingConfig,
)
from trl_ray.config.trl_options.reading import read_foreign


class RunConfig(ModelConfig, DataConfig, TrainingConfig, ReportConfig, CadenceConfig, HubConfig):
    """A run of any pipeline: a model, rows, an optimizer, a run directory, actors."""

    pipeline: str = ""
    """Which pipeline this configuration is for; written to config.yaml so that a run can be resumed by its folder."""
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    compute_metrics: Annotated[str | None, AfterValidator(lambda path: path and real_path(path))] = None
    """A function that measures held-out rows, ``package.module:function`` or ``file.py:function``; it is given an
    `EvalPrediction`, of sampled completions a `RolloutPrediction`, and returns numbers by name."""

    @model_validator(mode="before")
    @classmethod
    def _check_pipeline(cls, values: Any) -> Any:
        # Before all else: the options of another pipeline would be found unknown one by one.
        own = cls.model_fields["pipeline"].default
        given = values.get("pipeline", own) if isinstance(values, Mapping) else own
        if isinstance(given, str) and not is_same_object(own, given):
            raise ValueError(f"pipeline must be {own} here, got {given}. Run it with: trl-ray {given} --config FILE")
        return values

    @model_validator(mode="before")
    @classmethod
    def _read_foreign(cls, values: Any) -> Any:
        return read_foreign(values, cls.model_fields) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _choose_format(cls, values: Any) -> Any:
        # Here, not where it computes: config.yaml says what was computed, and what is built from it agrees.
        if not isinstance(values, Mapping) or values.get("bf16") not in (None, "auto"):
            return values
        runtime = values.get("runtime")
        learner = runtime.get("learner_num_gpus") if isinstance(runtime, Mapping) else runtime
        gpus = learner.learner_num_gpus if isinstance(learner, RuntimeConfig) else learner
        return {**values, "bf16": isinstance(gpus, (int, float)) and gpus > 0}

    @property
    def computes_in(self) -> str:
        """The number format of forward and backward, and why where it is not TRL's default."""
        if self.bf16:
            return "bfloat16 (autocast)"
        if self.dtype is not Dtype.FLOAT32:
            copies = self.float32_master_weights and self.deepspeed is None and not self.use_peft
            return self.dtype.value + (" (weights have copies in float32)" if copies else "")
        on_cpu = self.runtime.learner_num_gpus == 0
        return "float32" + (" (bf16 is the default where runtime.learner_num_gpus is above 0)" if on_cpu else "")

    @rule
    def _check_kernels(self) -> None:
        if self.use_liger_kernel and self.chunk_lm_head_size is not None:
            raise ValueError(
                "chunk_lm_head_size must be left out with use_liger_kernel=true, got "
                f"{self.chunk_lm_head_size}: both replace the forward pass of the language-model head. Remove one."
            )

    @rule
    def _check_deepspeed(self) -> None:
        if self.deepspeed is not None and self.dtype is not Dtype.AUTO:
            resolve_deepspeed(self, num_ranks=self.runtime.num_learners, dtype=self.dtype)

    @rule
    def _check_learners(self) -> None:
        if self.runtime.kind is RuntimeKind.LOCAL and self.runtime.num_learners > 1:
            raise ValueError(
                f"runtime.num_learners must be 1 with runtime.kind=local, got {self.runtime.num_learners}: each rank "
                "needs a process of its own. Use runtime.kind=ray for more."
            )
