"""The nouns that travel between layers: frozen, keyword-only dataclasses with shapes at the field.

    Prompt -> GroupTicket -> Completion x G -> Reward x G -> RolloutGroup -> TrainingSample -> TrainBatch
    TensorEntry x parameters + buffer = WeightPayload (learner -> engines), named by its WeightVersion

Import from `trl_ray.types`; its modules are the drawers.

Axes: P prompt tokens, L completion tokens, T = P + L, G completions of a group.
Arrays are NumPy so that Ray hands them over without copying; nothing here imports torch.
"""

from trl_ray.types.actor_handles import Handle, Health
from trl_ray.types.arrays import BoolArray, FloatArray, IntArray
from trl_ray.types.clock import steady_time
from trl_ray.types.events import ActorReport, Event, EventKind, Span
from trl_ray.types.generation_requests import GenerationRequest, SamplingParams
from trl_ray.types.groups import (
    Completion,
    DropReason,
    FinishReason,
    GroupTicket,
    Message,
    Prompt,
    RolloutGroup,
    VersionSpan,
)
from trl_ray.types.predictions import PredictedBatch, PredictionBatch, PredictionForm, PredictionPiece
from trl_ray.types.published_weights import (
    PullReport,
    SamplingGap,
    ScoredSequence,
    TensorEntry,
    TrainingGap,
    WeightCheck,
    WeightPayload,
    WeightVersion,
)
from trl_ray.types.reward_results import Reward, RewardErrorKind, RewardFailure, ScoredGroup
from trl_ray.types.step_results import Evaluation, Metric, Reduce, StepResult
from trl_ray.types.teacher_scores import TeacherContext, TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.types.training_samples import Example, SampleLabel, SampleScores, TrainBatch, TrainingSample

__all__ = [
    "ActorReport",
    "BoolArray",
    "Completion",
    "DropReason",
    "Evaluation",
    "Event",
    "EventKind",
    "Example",
    "FinishReason",
    "FloatArray",
    "GenerationRequest",
    "GroupTicket",
    "Handle",
    "Health",
    "IntArray",
    "Message",
    "Metric",
    "PredictedBatch",
    "PredictionBatch",
    "PredictionForm",
    "PredictionPiece",
    "Prompt",
    "PullReport",
    "Reduce",
    "Reward",
    "RewardErrorKind",
    "RewardFailure",
    "RolloutGroup",
    "SampleLabel",
    "SampleScores",
    "SamplingGap",
    "SamplingParams",
    "ScoredGroup",
    "ScoredSequence",
    "Span",
    "StepResult",
    "TeacherContext",
    "TeacherQuestion",
    "TeacherRequest",
    "TeacherScores",
    "TensorEntry",
    "TrainBatch",
    "TrainingGap",
    "TrainingSample",
    "VersionSpan",
    "WeightCheck",
    "WeightPayload",
    "WeightVersion",
    "steady_time",
]
