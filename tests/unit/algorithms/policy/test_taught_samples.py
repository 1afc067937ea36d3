"""From taught groups to samples: what teachers say, what they are to be shown, and whose completions they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trl_ray.algorithms.policy.group_samples import build_distillation_step, build_step
from trl_ray.config.losses.advantage_options import AdvantageConfig
from trl_ray.types import (
    Completion,
    FinishReason,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    TeacherContext,
    TeacherScores,
    VersionSpan,
)

PROMPT = np.array([1, 2], np.int32)
HINTED = np.array([1, 2, 9], np.int32)


def completion(length: int, *, sampled: bool = True, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -1.0 if sampled else 0.0, np.float32),
        versions=(VersionSpan(version=4, start=0, end=length),),
        finish_reason=finish,
        text="",
        is_sampled=sampled,
    )


def scores(length: int) -> TeacherScores:
    return TeacherScores(teacher="t", version=None, logprobs=np.full(length, -0.5, np.float32))


def group(*completions: Completion, rewards: tuple[float | None, ...] | None = None, **fields: Any) -> RolloutGroup:
    totals = rewards if rewards is not None else (None,) * len(completions)
    return RolloutGroup(
        ticket=GroupTicket(
            group_id=7, attempt=0, prompt=Prompt(prompt_id="0:7", token_ids=PROMPT), admitted_at_version=4
        ),
        completions=completions,
        rewards=tuple(Reward(total=r, parts={} if r is None else {"f": r}) for r in totals),
        worker="w",
        **fields,
    )


def test_samples_carry_what_their_teacher_says() -> None:
    teachings = (scores(2), None)
    contexts = (TeacherContext(prompt_ids=HINTED), TeacherContext(prompt_ids=PROMPT, is_distilled=False))
    built = build_step(
        [group(completion(2), completion(3), rewards=(0.0, 1.0), contexts=contexts, teachings=teachings)],
        config=AdvantageConfig(),
    )
    first, second = built.samples
    assert (first.teacher, second.teacher) == teachings
    assert (first.is_distilled, second.is_distilled) == (True, False)
    # Whoever has answered needs no context any more.
    assert (first.teacher_prompt_ids, second.teacher_prompt_ids) == (None, None)
    assert first.advantage < 0 < second.advantage


def test_where_the_learner_holds_the_teacher_samples_carry_its_context() -> None:
    contexts = (
        TeacherContext(prompt_ids=HINTED),
        TeacherContext(prompt_ids=PROMPT, is_distilled=False),
        TeacherContext(prompt_ids=PROMPT.copy()),
    )
    built = build_distillation_step([group(completion(2), completion(2), completion(2), contexts=contexts)])
    assert built.samples[0].teacher_prompt_ids is HINTED
    # None stands for the student's own prompt, whose computation can then be shared.
    assert [sample.teacher_prompt_ids for sample in built.samples[1:]] == [None, None]
    assert [sample.is_distilled for sample in built.samples] == [True, False, True]
    assert all(sample.teacher is None for sample in built.samples)


def test_without_teachers_samples_are_as_ever() -> None:
    [sample] = build_step([group(completion(2), rewards=(1.0,))], config=AdvantageConfig()).samples
    assert (sample.teacher, sample.teacher_prompt_ids, sample.is_distilled, sample.is_label) == (
        None,
        None,
        True,
        False,
    )


def test_the_datasets_completions_are_labels() -> None:
    both = group(completion(2, sampled=False), completion(2))
    built = build_distillation_step([both])
    assert [sample.is_label for sample in built.samples] == [True, False]
    assert built.metrics["distillation/label_fraction"].value == 0.5


def test_a_distillation_step_has_no_advantages_whatever_the_rewards() -> None:
    first = group(completion(2), completion(4, finish=FinishReason.LENGTH), rewards=(0.0, 3.0))
    second = group(completion(3), rewards=(1.0,), metrics={"teacher/version_lag": 2.0})
    built = build_distillation_step([first, second])
    assert [values.tolist() for values in built.advantages] == [[0.0, 0.0], [0.0]]
    assert [sample.advantage for sample in built.samples] == [0.0, 0.0, 0.0]
    # Completions that were cut off say as much to a teacher as others.
    assert built.num_valid_tokens == 9
    values = {name: metric.value for name, metric in built.metrics.items()}
    assert values == {
        "reward/mean": pytest.approx(4 / 3),
        # sqrt(4.5) in the first group; one completion alone deviates from nothing.
        "reward/std": pytest.approx(4.5**0.5 / 2),
        "reward/f/mean": pytest.approx(4 / 3),
        "completion/length_mean": 3.0,
        "completion/length_max": 4.0,
        "completion/truncated_fraction": pytest.approx(1 / 3),
        "distillation/label_fraction": 0.0,
        "teacher/version_lag": 2.0,
    }


def test_without_rewards_a_distillation_step_says_nothing_of_them() -> None:
    metrics = build_distillation_step([group(completion(2), completion(2))]).metrics
    assert not [name for name in metrics if name.startswith(("reward", "advantage"))]


@pytest.mark.parametrize(
    "wrong",
    [
        group(completion(2), contexts=(TeacherContext(prompt_ids=PROMPT),), teachings=(None,)),
        group(completion(2), contexts=(TeacherContext(prompt_ids=PROMPT),) * 2),
        group(completion(2), teachings=(scores(2),)),
        group(completion(2, finish=FinishReason.ABORT)),
    ],
    ids=["nobody taught it", "too many contexts", "no contexts", "aborted"],
)
def test_a_group_that_cannot_be_trained_on_is_a_broken_promise(wrong: RolloutGroup) -> None:
    with pytest.raises(AssertionError, match="group 7"):
        build_distillation_step([wrong])
