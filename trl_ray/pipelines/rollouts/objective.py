"""What a pipeline makes of finished groups, and what it asks of data, teachers and callbacks for it.

    groups --build--> BuiltStep --with_scores (first pass)--> samples --Loss--> learner
       '--observe--> metrics and warnings of the step          '--show--> callbacks

Each pipeline that trains on rollouts has one, in its own module: `grpo`, `sdpo`, `distill`. Everything in this folder
asks the objective; nothing here knows which pipelines there are.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

from trl_ray.algorithms.batches.micro_batches import TotalsOf
from trl_ray.algorithms.loss_registry import build_loss
from trl_ray.algorithms.metric_merging import mean_metric
from trl_ray.algorithms.policy.group_samples import BuiltStep
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.data.prompts.given_completions import GivenCompletions
from trl_ray.data.prompts.prompt_source import PromptSource
from trl_ray.pipelines.callbacks.hooks import CallbackList
from trl_ray.pipelines.callbacks.self_distillation_hooks import dispatch_self_distillation
from trl_ray.types import Metric, RolloutGroup, SampleScores, TeacherQuestion, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the groups of a step show beside what they are trained on."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


ConfigT = TypeVar("ConfigT", bound=RolloutRunConfig)


class Objective(ABC, Generic[ConfigT]):
    """What is learnt from groups; it holds no tensors and runs on the driver.

    Args:
        config: of the run.
    """

    needs_first_pass = False
    """Whether the learner scores samples before it trains on them."""
    builds_on_scores = False
    """Whether what the first pass says of the reference enters the samples' advantages."""
    evaluates_loss = False
    """Whether evaluations take the loss of held-out answers: where it is of teachers alone."""
    compares_with_sampler = False
    """Whether ratios are taken against the policy that sampled, and not against the learner before its update."""
    evaluates_with_sampler = False
    """Whether the loss of held-out answers compares the policy with the one that sampled."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    # What is learnt.

    @property
    @abstractmethod
    def loss(self) -> LossSection:
        """The options of the loss that the learner runs."""

    @cached_property
    def totals_of(self) -> TotalsOf:
        """What the loss divides an update by, from the update's samples."""
        return build_loss(self.loss).totals

    @abstractmethod
    def build(self, groups: Sequence[RolloutGroup], *, scores: Sequence[SampleScores] | None = None) -> BuiltStep:
        """Samples of the groups of one step; `scores` are those of the samples of a draft."""

    def with_scores(self, samples: Sequence[TrainingSample], scores: Sequence[SampleScores]) -> list[TrainingSample]:
        """Samples with all that the loss takes from a first pass."""
        del scores
        return list(samples)

    def observe(self, groups: Sequence[RolloutGroup]) -> Observed:
        """Look at the groups of one step, once: how many of their prompts are cut, where prompts are."""
        if self.max_prompt_length is None:
            return Observed()
        cut = [group.ticket.prompt.num_cut for group in groups]
        return Observed(
            metrics={
                "prompt/truncated_fraction": mean_metric([float(tokens > 0) for tokens in cut]),
                "prompt/truncated_tokens": mean_metric(cut),
            }
        )

    async def show(
        self,
        callbacks: CallbackList,
        groups: Sequence[RolloutGroup],
        samples: Sequence[TrainingSample],
        *,
        pad_token_id: int,
    ) -> None:
        """Show callbacks what a step is trained on, once per step, before its first update.

        Raises:
            CallbackError: a callback raised.
        """
        if self.config.teacher_sources:
            await dispatch_self_distillation(
                callbacks,
                groups,
                samples,
                self.config,
                pad_token_id=pad_token_id,
                takes_sampler=self.compares_with_sampler,
            )

    # What is asked of the data.

    @property
    def max_prompt_length(self) -> int | None:
        """Tokens of a prompt beyond which its head is cut off; None cuts nothing."""
        return None

    def dataset_completions(self) -> GivenCompletions | None:
        """Which prompts are answered by the dataset; None: none."""
        return None

    def check_prompts(self, prompts: PromptSource) -> None:
        """See that the objective can be had of every prompt, trained on or held out.

        Raises:
            DataError: what is wrong with which row.
        """
        del prompts

    # What is asked of teachers.

    @property
    def teacher_column(self) -> str | None:
        """The dataset's column that names each row's teacher; None: all rows have the first."""
        return None

    def check_teachers(self) -> None:
        """See that there are as many teachers as are needed.

        Raises:
            ConfigError: there are not.
        """

    def teacher_question(self, *, vocab_size: int) -> TeacherQuestion:
        """What teachers are asked about each completion; asked where there are teachers.

        Args:
            vocab_size: entries of the vocabulary that student and teachers share.
        """
        raise AssertionError(f"{type(self).__name__} has teachers, so it must say what they are asked: {vocab_size=}")

    def reprompting(self) -> RepromptConfig | None:
        """How a self-teacher's prompts are made of successes and feedback; None: teachers read the student's prompts.

        Raises:
            ConfigError: the model has no room for them.
        """
        return None

    # What goes into checkpoints.

    def state_dict(self) -> dict[str, int]:
        """What `observe` remembers from step to step, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved state."""
        del state


def with_metrics(built: BuiltStep, metrics: Mapping[str, Metric]) -> BuiltStep:
    """A step with more to tell of itself."""
    return dataclasses.replace(built, metrics={**built.metrics, **metrics})
