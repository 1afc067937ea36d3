"""Layouts: what a row holds, who sees whom, and where each token is predicted."""

from __future__ import annotations

import numpy as np
import pytest

from trl_ray.algorithms.batches.layout import AttentionKind, Layout, Segment, build_layout
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


def _layout(
    samples: list[TrainingSample], share: SharePrompt, attention: AttentionKind = AttentionKind.MASKED
) -> Layout:
    layout = build_layout(samples, share=share, hidden_size=64, attention=attention)
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
    for attention in AttentionKind:
        nothing = [_sample(0, [1], [])]
        assert build_layout(nothing, share=SharePrompt.AUTO, hidden_size=64, attention=attention) is None


def test_auto_shares_long_prompts_and_not_when_it_may_not() -> None:
    group = [_sample(0, list(range(1, 40)), [5, 6, 7]) for _ in range(8)]
    assert _layout(group, SharePrompt.AUTO).input_ids.shape == (1, 39 + 16)
    assert _layout(group, SharePrompt.AUTO, AttentionKind.CAUSAL).input_ids.shape == (8, 39 + 2)
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
        _layout([_sample(0, [], [1])], share)


GROUPS = [
    _sample(0, [1, 2], [11, 12, 13]),
    _sample(1, [4], [31]),
    _sample(0, [1, 2], [21]),
    _sample(0, [1, 2], [41, 42], [False, False]),
]


def test_segments_are_one_row_without_padding_that_holds_each_prompt_once() -> None:
    layout = _layout(GROUPS, SharePrompt.AUTO, AttentionKind.SEGMENTS)
    assert layout.input_ids.tolist() == [[1, 2, 11, 12, 4]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert layout.segments == (Segment(prompt=2, bodies=(2,)), Segment(prompt=1, bodies=()))
    # In the order of the samples, wherever their groups lie: group 0 has its last sample after group 1.
    assert layout.targets.tolist() == [11, 12, 13, 31, 21]
    assert layout.predictors.tolist() == [1, 2, 3, 4, 1]
    assert layout.mask is None


def test_segments_repeat_the_prompt_when_it_may_not_be_shared() -> None:
    layout = _layout(GROUPS, SharePrompt.NEVER, AttentionKind.SEGMENTS)
    assert layout.input_ids.tolist() == [[1, 2, 11, 12, 4, 1, 2]]
    assert layout.segments is not None
    assert [segment.prompt for segment in layout.segments] == [2, 1, 2]


def test_where_only_positions_tell_sequences_apart_each_begins_at_0_in_one_row() -> None:
    layout = _layout(GROUPS, SharePrompt.AUTO, AttentionKind.RESTARTS)
    assert layout.input_ids.tolist() == [[1, 2, 11, 12, 4, 1, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1]]
    assert layout.predictors.tolist() == [1, 2, 3, 4, 6]
    assert layout.mask is None and layout.segments is None
