"""Layouts: what a row holds, who sees whom, and where each token is predicted."""

from __future__ import annotations

import numpy as np
import pytest

from trl_ray.algorithms.layout import Layout, build_layout
from trl_ray.config.sections import SharePrompt
from trl_ray.types import TrainingSample


def _sample(group: int, prompt: list[int], completion: list[int], mask: list[bool] | None = None) -> TrainingSample:
    return TrainingSample(
        group_id=group,
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        loss_mask=np.ones(len(completion), dtype=bool) if mask is None else np.array(mask, dtype=bool),
        sampler_logprobs=np.zeros(len(completion), dtype=np.float32),
        advantage=1.0,
        min_version=0,
    )


def _layout(samples: list[TrainingSample], share: SharePrompt, **options: bool) -> Layout:
    layout = build_layout(samples, share=share, hidden_size=64, **options)
    assert layout is not None
    return layout


def test_a_group_becomes_one_row_with_its_prompt_once() -> None:
    samples = [_sample(0, [1, 2], [11, 12, 13]), _sample(0, [1, 2], [21, 22])]
    layout = _layout(samples, SharePrompt.ALWAYS)
    assert layout.input_ids.tolist() == [[1, 2, 11, 12, 21]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert layout.targets.tolist() == [11, 12, 13, 21, 22]
    assert layout.predictors.tolist() == [1, 2, 3, 1, 4]
    assert layout.mask is not None
    assert layout.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_groups_in_one_row_do_not_see_each_other() -> None:
    samples = [_sample(0, [1, 2, 3], [11, 12]), _sample(1, [4], [21, 22])]
    layout = _layout(samples, SharePrompt.ALWAYS)
    assert layout.input_ids.tolist() == [[1, 2, 3, 11, 4, 21]]
    assert layout.mask is not None
    assert not layout.mask[0, 0, 4:, :4].any() and layout.mask[0, 0, 5].tolist() == [False] * 4 + [True] * 2


def test_unshared_rows_are_plainly_causal() -> None:
    samples = [_sample(0, [1, 2], [11, 12, 13]), _sample(0, [1, 2], [21, 22])]
    layout = _layout(samples, SharePrompt.NEVER)
    assert layout.mask is None
    assert layout.input_ids.tolist() == [[1, 2, 11, 12], [1, 2, 21, 0]]
    assert layout.predictors.tolist() == [1, 2, 3, 5, 6]


def test_only_what_leads_to_a_trained_token_is_an_input() -> None:
    samples = [
        _sample(0, [1], [11, 12, 13, 14], [True, False, True, False]),
        _sample(0, [1], [21, 22], [False, False]),
        _sample(0, [1], []),
    ]
    layout = _layout(samples, SharePrompt.ALWAYS)
    assert layout.input_ids.tolist() == [[1, 11, 12]]
    assert layout.targets.tolist() == [11, 13] and layout.predictors.tolist() == [0, 2]


def test_nothing_to_train_on_is_no_layout() -> None:
    assert build_layout([_sample(0, [1], [])], share=SharePrompt.AUTO, hidden_size=64) is None


def test_auto_shares_long_prompts_and_not_when_it_may_not() -> None:
    group = [_sample(0, list(range(1, 40)), [5, 6, 7]) for _ in range(8)]
    assert _layout(group, SharePrompt.AUTO).input_ids.shape == (1, 39 + 16)
    assert _layout(group, SharePrompt.AUTO, can_share=False).input_ids.shape == (8, 39 + 2)
    assert _layout(group[:1], SharePrompt.AUTO).mask is None


def test_rows_are_filled_evenly() -> None:
    samples = [_sample(g, [1] * (100 + 10 * g), [5, 6]) for g in range(10) for _ in range(2)]
    layout = _layout(samples, SharePrompt.ALWAYS)
    needed = sum(100 + 10 * g + 2 for g in range(10))
    assert layout.input_ids.shape[0] == 6
    assert layout.input_ids.numel() < 1.15 * needed


@pytest.mark.parametrize("share", [SharePrompt.ALWAYS, SharePrompt.NEVER])
def test_an_empty_prompt_is_refused(share: SharePrompt) -> None:
    with pytest.raises(AssertionError, match="prompt token"):
        build_layout([_sample(0, [], [1])], share=share, hidden_size=64)
