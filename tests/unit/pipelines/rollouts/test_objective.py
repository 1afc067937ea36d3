"""What becomes of groups: samples, the options of the loss they are for, and what is remembered from step to step."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from fakes import group
from objectives import objective_of
from trl_ray.config.losses.distillation_options import DistillationLossConfig, SDPOObjective
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.pipelines.distill import Distillation
from trl_ray.pipelines.grpo import PolicyObjective
from trl_ray.pipelines.rollouts.objective import with_metrics
from trl_ray.pipelines.sdpo import SelfDistillation
from trl_ray.types import Metric, RolloutGroup, SampleScores, TeacherContext

OWN = np.array([1, 2, 0], np.int32)
REPROMPT = np.array([7, 8, 9, 1], np.int32)


def taught(group_id: int, totals: tuple[float, ...], distilled: tuple[bool, ...]) -> RolloutGroup:
    """A group whose distilled completions have a reprompt, in which completion 0 is shown."""
    contexts = tuple(
        TeacherContext(prompt_ids=REPROMPT, is_distilled=True, demonstration=0)
        if each
        else TeacherContext(prompt_ids=OWN, is_distilled=False)
        for each in distilled
    )
    return dataclasses.replace(group(group_id, totals), contexts=contexts)


@pytest.mark.parametrize(
    ("config", "kind", "loss"),
    [
        (GRPOConfig(), PolicyObjective, LossConfig),
        (AsyncGRPOConfig(), PolicyObjective, LossConfig),
        (RLOOConfig(), PolicyObjective, LossConfig),
        (SDPOConfig(distillation_weight=0.25), SelfDistillation, SDPOObjective),
        (DistillConfig(beta=0.5), Distillation, DistillationLossConfig),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pipeline_has_its_objective_and_its_options_reach_the_loss(config: Any, kind: type[Any], loss: Any) -> None:
    objective = objective_of(config)
    assert type(objective) is kind
    assert type(objective.loss) is loss and objective.loss == config.part(loss)


def test_self_distillation_has_advantages_and_the_teachers_prompt_beside_them() -> None:
    built = objective_of(SDPOConfig()).build([taught(0, (1.0, 0.0), (False, True))])
    # Rewards 1 and 0: mean 1/2, deviation (of one degree less) 0.70711, of which 1e-4 more is taken.
    assert list(built.advantages[0]) == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)])
    first, second = built.samples
    assert (first.is_distilled, second.is_distilled) == (False, True)
    assert second.teacher_prompt_ids is not None and list(second.teacher_prompt_ids) == [7, 8, 9, 1]
    assert list(second.prompt_ids) == [1, 2, 0]


def test_distillation_has_no_advantages_whatever_the_rewards() -> None:
    built = objective_of(DistillConfig()).build([taught(0, (1.0, 0.0), (True, True))])
    assert [list(each) for each in built.advantages] == [[0.0, 0.0]]
    assert [sample.advantage for sample in built.samples] == [0.0, 0.0]
    assert built.metrics["distillation/label_fraction"].value == 0.0


@pytest.mark.parametrize(
    ("config", "needs", "builds"),
    [
        (GRPOConfig(), False, False),
        (GRPOConfig(num_iterations=2), True, False),
        (RLOOConfig(), True, True),
        (SDPOConfig(), False, False),
        (SDPOConfig(num_iterations=2), True, False),
        (SDPOConfig(steps_per_generation=2), True, False),
        # Whatever is made of them: what teachers say is compared with the policy at hand.
        (DistillConfig(), False, False),
        (DistillConfig(generation_batch_size=16), False, False),
    ],
)
def test_a_first_pass_is_made_where_ratios_are_taken_against_weights_that_are_gone(
    config: Any, needs: bool, builds: bool
) -> None:
    objective = objective_of(config)
    assert (objective.needs_first_pass, objective.builds_on_scores) == (needs, builds)


def test_the_first_pass_of_self_distillation_gives_its_clip_the_old_policy() -> None:
    objective = objective_of(SDPOConfig(num_iterations=2))
    samples = objective.build([taught(0, (1.0, 0.0), (True, True))]).samples
    logprobs = np.array([-0.5, -0.25], np.float32)
    scores = [SampleScores(logprobs=logprobs, entropy=np.ones(2), reference_logprobs=None) for _ in samples]
    scored = objective.with_scores(samples, scores)
    assert all(each.old_logprobs is not None and list(each.old_logprobs) == [-0.5, -0.25] for each in scored)
    assert all(each.teacher_prompt_ids is not None for each in scored)


def test_the_samples_of_distillation_are_left_as_they_are() -> None:
    objective = objective_of(DistillConfig())
    samples = objective.build([taught(0, (1.0, 0.0), (True, True))]).samples
    assert objective.with_scores(samples, []) == list(samples)


def test_what_a_step_could_teach_is_measured_and_a_step_without_it_warned_of() -> None:
    objective = objective_of(SDPOConfig(success_reward_threshold=0.5))
    fine = objective.observe([taught(0, (1.0, 0.0), (False, True)), taught(1, (0.0, 0.0), (False, False))])
    assert fine.metrics["self_distillation/reprompt_sample_fraction"] == Metric(value=0.25)
    assert fine.metrics["self_distillation/success_group_fraction"] == Metric(value=0.5)
    assert fine.warnings == ()
    idle = objective.observe([taught(2, (0.0, 0.0), (False, False))])
    assert idle.metrics["self_distillation/reprompt_sample_fraction"] == Metric(value=0.0)
    assert len(idle.warnings) == 3


def test_warnings_keep_their_rhythm_over_a_checkpoint() -> None:
    config = SDPOConfig(diagnostics_warning_interval=3)
    idle = [taught(0, (0.0, 0.0), (False, False))]
    whole, first = objective_of(config), objective_of(config)
    told = [len(whole.observe(idle).warnings) for _ in range(4)]
    assert told == [3, 0, 3, 0]
    halves = [len(first.observe(idle).warnings)]
    second = objective_of(config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [*halves, *(len(second.observe(idle).warnings) for _ in range(3))] == told
    second.load_state_dict({})
    assert len(second.observe(idle).warnings) == 3


def test_no_warning_is_ever_given_where_the_interval_is_0() -> None:
    objective = objective_of(SDPOConfig(diagnostics_warning_interval=0))
    assert not any(objective.observe([taught(0, (0.0,) * 2, (False,) * 2)]).warnings for _ in range(3))


@pytest.mark.parametrize("config", [GRPOConfig(), DistillConfig()], ids=["grpo", "distill"])
def test_the_other_objectives_look_at_nothing_and_remember_nothing(config: Any) -> None:
    objective = objective_of(config)
    observed = objective.observe([group(0)])
    assert (dict(observed.metrics), observed.warnings, objective.state_dict()) == ({}, (), {})


def test_metrics_are_added_to_what_a_step_tells_of_itself() -> None:
    built = objective_of(GRPOConfig()).build([group(0)])
    more = with_metrics(built, {"extra": Metric(value=2.0)})
    assert more.metrics == {**built.metrics, "extra": Metric(value=2.0)} and more.samples == built.samples


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig, SDPOConfig, DistillConfig])
def test_a_step_says_how_many_of_its_prompts_were_cut_where_prompts_are(config: Any) -> None:
    def cut(number: int, tokens: int) -> RolloutGroup:
        plain = taught(number, (1.0, 0.0), (False, False))
        prompt = dataclasses.replace(plain.ticket.prompt, num_cut=tokens)
        return dataclasses.replace(plain, ticket=dataclasses.replace(plain.ticket, prompt=prompt))

    groups = [cut(0, 0), cut(1, 6), cut(2, 0), cut(3, 2)]
    told = objective_of(config(max_prompt_length=3)).observe(groups).metrics
    assert (told["prompt/truncated_fraction"].value, told["prompt/truncated_tokens"].value) == (0.5, 2.0)
    untold = objective_of(config(max_prompt_length=None)).observe(groups).metrics
    assert not any(name.startswith("prompt/") for name in untold)
