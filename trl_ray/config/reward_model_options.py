"""The options of reward models that score completions beside, or instead of, reward functions.

RewardModelOptions x N  --GRPOConfig.scoring_models-->  actors of their own, parts of the reward by name
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from trl_ray.config.base import FROM_STRING, Positive, Seconds, Section
from trl_ray.config.losses.reward_modelling_options import StepAggregation
from trl_ray.config.sections import Dtype, StatedDtype


class RewardModelKind(enum.StrEnum):
    """What a reward model rates."""

    AUTO = "auto"
    """As its configuration says: a sequence classifier or a token classifier."""
    SEQUENCE = "sequence"
    """The whole completion, at its last token (one label)."""
    STEPS = "steps"
    """Each step at its separator, wrong or right (two labels): a process reward model."""


class StepFormat(enum.StrEnum):
    """How the steps of a solution are told apart."""

    AUTO = "auto"
    """Headings where there is one, else numbers where they begin with 1, else lines."""
    STEP = "step"
    """A step begins at ``Step n:``, at the beginning of a line or after a sentence."""
    NUMBERED = "numbered"
    """A step begins at ``n.`` or ``n)`` at the beginning of a line."""
    NEWLINE = "newline"
    """Each paragraph is a step; where there is no blank line, each line."""


class RewardModelOptions(Section):
    """One reward model, on actors of its own."""

    model_name_or_path: Annotated[str, Field(min_length=1)]
    """Hub name, a folder written by save_pretrained, or the folder of an adapter."""
    revision: str = "main"
    trust_remote_code: bool = False
    dtype: StatedDtype = Dtype.FLOAT32
    """Of its weights."""
    bf16: bool = False
    """Compute under bfloat16 autocast."""
    name: Annotated[str, Field(pattern=r"^[^\s/][^/]*$")] | None = None
    """Names its part of the reward and its actors; None takes the last part of the path."""
    weight: float = 1.0
    """Of its part in the total."""
    kind: Annotated[RewardModelKind, FROM_STRING] = RewardModelKind.AUTO
    append_eos: bool = True
    """End a finished plain-text completion with the end-of-sequence token, as reward models are trained; TRL's
    GRPOTrainer leaves it out. Chat templates end turns themselves."""
    aggregation: Annotated[StepAggregation, FROM_STRING] = StepAggregation.MIN
    """How P(right) of the steps becomes one reward (process reward models)."""
    step_format: Annotated[StepFormat, FROM_STRING] = StepFormat.AUTO
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    """Put after each step; the model rates a step at its last token, so it must be the one it was trained with."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of prompt and completion, of which the last ones are kept; None takes what the model allows."""
    batch_size: Positive = 8
    """Completions in one forward pass."""
    max_tokens_per_forward: Positive | None = None
    """Tokens in one forward pass, padding included; None lets `batch_size` alone decide."""
    join_groups: bool | None = None
    """Rate groups that wait together in the same forward passes; None: in asynchronous runs on Ray only, because the
    last digits of a reward then depend on who waited, and other runs are to repeat themselves exactly."""
    num_workers: Positive = 1
    """Copies of the model, one actor each; groups go to the one with the least to do."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.0
    """CPUs that Ray sets aside for each of them."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, or a share of one, for each of them; 0 computes on the CPU."""
    threads: Positive | None = None
    """Compute threads of each of them; None uses its CPUs."""
    timeout_s: Seconds = 60.0
    """A forward pass that takes longer has hung; its groups fail and its actor is replaced."""

    @property
    def label(self) -> str:
        """The name of its part."""
        return self.name or self.model_name_or_path.rstrip("/").rpartition("/")[2] or self.model_name_or_path

    @property
    def num_threads(self) -> int:
        """Compute threads: `threads`, or one for each of its CPUs."""
        return self.threads or max(1, int(self.num_cpus))


def check_reward_models(models: Sequence[RewardModelOptions], functions: Sequence[str]) -> None:
    """Check that parts of the reward can be told apart by their names.

    Raises:
        ValueError: two reward models of one name, or one named as a reward function.
    """
    seen = set(functions)
    for model in models:
        if model.label in seen:
            raise ValueError(
                f"reward models and functions must have different names, {model.label!r} appears twice. Give "
                "reward_models[].name."
            )
        seen.add(model.label)
