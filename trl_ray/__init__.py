"""Post-training of language models on Ray actors, with TRL's arguments: the names that users write.

    from trl_ray import AsyncGRPOConfig, AsyncGRPOPipeline

    AsyncGRPOPipeline(model=..., reward_funcs=..., args=AsyncGRPOConfig(...), train_dataset=...).train()

A name's module is imported when the name is first used, so that `import trl_ray` costs nothing and parts load without
the libraries of others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ray.algorithms.loss import FixedLoss, Loss, LossInputs, LossNeeds, LossOutput
    from trl_ray.algorithms.policy.policy_loss import PolicyLoss
    from trl_ray.config.load import dump_yaml, load_config
    from trl_ray.config.losses.loss_section import LossSection
    from trl_ray.config.reward_model_options import RewardModelOptions
    from trl_ray.config.runs.dataset_config import (
        CPOConfig,
        DPOConfig,
        KTOConfig,
        ORPOConfig,
        PRMConfig,
        RewardModelConfig,
        SFTConfig,
    )
    from trl_ray.config.runs.distill_config import DistillConfig
    from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
    from trl_ray.config.runs.sdpo_config import SDPOConfig
    from trl_ray.config.sections import RewardConfig, RolloutConfig, RuntimeConfig
    from trl_ray.config.teacher_options import TeacherConfig, TeacherOptions
    from trl_ray.errors import InputError, InterruptedRun, RunError, TrlRayError
    from trl_ray.models.scoring.rollout_prediction import RolloutPrediction
    from trl_ray.observe.report.report_page import build_report
    from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
    from trl_ray.pipelines.distill import DistillPipeline
    from trl_ray.pipelines.grpo import GRPOPipeline, PolicyObjective
    from trl_ray.pipelines.pipeline_registry import find_pipeline
    from trl_ray.pipelines.preference import CPOPipeline, DPOPipeline, KTOPipeline, ORPOPipeline
    from trl_ray.pipelines.reward_modelling import PRMPipeline, RewardPipeline
    from trl_ray.pipelines.rloo import RLOOPipeline
    from trl_ray.pipelines.rollouts.objective import Objective
    from trl_ray.pipelines.rollouts.rollout_pipeline import RolloutPipeline
    from trl_ray.pipelines.run.session import TrainOutput
    from trl_ray.pipelines.sdpo import SDPOPipeline
    from trl_ray.pipelines.sft import SFTPipeline

    SFTTrainer, DPOTrainer, KTOTrainer, CPOTrainer, ORPOTrainer = (
        SFTPipeline,
        DPOPipeline,
        KTOPipeline,
        CPOPipeline,
        ORPOPipeline,
    )
    RewardTrainer, PRMTrainer, GRPOTrainer, AsyncGRPOTrainer = (
        RewardPipeline,
        PRMPipeline,
        GRPOPipeline,
        AsyncGRPOPipeline,
    )
    RLOOTrainer, SDPOTrainer, DistillationTrainer, DistillationConfig = (
        RLOOPipeline,
        SDPOPipeline,
        DistillPipeline,
        DistillConfig,
    )

_HOMES = {
    "algorithms.loss": ("FixedLoss", "Loss", "LossInputs", "LossNeeds", "LossOutput"),
    "algorithms.policy.policy_loss": ("PolicyLoss",),
    "config.load": ("dump_yaml", "load_config"),
    "config.losses.loss_section": ("LossSection",),
    "config.reward_model_options": ("RewardModelOptions",),
    "config.runs.dataset_config": (
        "CPOConfig",
        "DPOConfig",
        "KTOConfig",
        "ORPOConfig",
        "PRMConfig",
        "RewardModelConfig",
        "SFTConfig",
    ),
    "config.runs.distill_config": ("DistillConfig",),
    "config.runs.grpo_config": ("AsyncGRPOConfig", "GRPOConfig", "RLOOConfig"),
    "config.runs.sdpo_config": ("SDPOConfig",),
    "config.sections": ("RewardConfig", "RolloutConfig", "RuntimeConfig"),
    "config.teacher_options": ("TeacherConfig", "TeacherOptions"),
    "errors": ("InputError", "InterruptedRun", "RunError", "TrlRayError"),
    "models.scoring.rollout_prediction": ("RolloutPrediction",),
    "observe.report.report_page": ("build_report",),
    "pipelines.async_grpo": ("AsyncGRPOPipeline",),
    "pipelines.distill": ("DistillPipeline",),
    "pipelines.grpo": ("GRPOPipeline", "PolicyObjective"),
    "pipelines.pipeline_registry": ("find_pipeline",),
    "pipelines.preference": ("CPOPipeline", "DPOPipeline", "KTOPipeline", "ORPOPipeline"),
    "pipelines.reward_modelling": ("PRMPipeline", "RewardPipeline"),
    "pipelines.rloo": ("RLOOPipeline",),
    "pipelines.rollouts.objective": ("Objective",),
    "pipelines.rollouts.rollout_pipeline": ("RolloutPipeline",),
    "pipelines.run.session": ("TrainOutput",),
    "pipelines.sdpo": ("SDPOPipeline",),
    "pipelines.sft": ("SFTPipeline",),
}
TRL_NAMES = {
    **{f"{name}Trainer": f"{name}Pipeline" for name in ("SFT", "DPO", "KTO", "CPO", "ORPO", "Reward", "PRM")},
    **{f"{name}Trainer": f"{name}Pipeline" for name in ("GRPO", "AsyncGRPO", "RLOO", "SDPO")},
    "DistillationTrainer": "DistillPipeline",
    "DistillationConfig": "DistillConfig",
}
"""What TRL calls them, so that a script of TRL's needs another import and no other name.

`RewardConfig` is what it is here: TRL's is `RewardModelConfig`.
"""
_MODULE_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    name = TRL_NAMES.get(name, name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *TRL_NAMES})
