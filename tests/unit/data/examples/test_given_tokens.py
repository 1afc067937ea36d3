"""Rows that are tokenised already are trained as they are, as far as TRL's columns say, and are checked first."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import DPOConfig, RewardModelConfig, SFTConfig, SupervisedRunConfig
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, load_examples, stream_examples
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.errors import DataError

TOKENIZER = build_tokenizer()  # 260 tokens
SFT, REWARD = ExampleTask.SUPERVISED, ExampleTask.REWARD_PAIRS
IDS = [10, 11, 12, 13]


def load(rows: Any, config: SupervisedRunConfig | None = None, task: ExampleTask = SFT) -> ExampleSet:
    return load_examples(config or SFTConfig(), TOKENIZER, task=task, dataset=rows)


def trained(found: ExampleSet, index: int = 0) -> tuple[list[int], list[int]]:
    """The tokens of an example, and those of them that are targets."""
    (sample,) = found.examples[index].samples
    return [*sample.prompt_ids, *sample.completion_ids], sample.completion_ids[sample.loss_mask].tolist()


@pytest.mark.parametrize(
    ("columns", "options", "targets"),
    [
        ({}, {}, [11, 12, 13]),
        ({"labels": [-100, -100, 12, 13]}, {}, [12, 13]),
        ({"labels": IDS}, {}, [11, 12, 13]),
        # Labels win over masks.
        ({"labels": [-100, 11, -100, -100], "assistant_masks": [0, 0, 0, 1]}, {}, [11]),
        ({"assistant_masks": [1, 0, 1, 0]}, {}, [12]),
        ({"assistant_masks": [1, 0, 1, 0]}, {"assistant_only_loss": True}, [12]),
        ({"completion_mask": [0, 0, 1, 1]}, {"completion_only_loss": True}, [12, 13]),
        ({"completion_mask": [0, 0, 1, 1], "prompt": "p", "completion": "c"}, {}, [12, 13]),
        ({"completion_mask": [0, 0, 1, 1], "prompt": "p", "completion": "c"}, {"completion_only_loss": False},
         [11, 12, 13]),
        # As in TRL: nothing asks for the mask.
        ({"completion_mask": [0, 0, 1, 1]}, {}, [11, 12, 13]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 0, 1]}, {"completion_only_loss": True}, [13]),
        ({"attention_mask": [1, 1, 1, 1], "position_ids": [0, 1, 2, 3], "seq_lengths": [4]}, {}, [11, 12, 13]),
    ],
)  # fmt: skip
def test_labels_and_masks_say_what_is_trained(
    columns: dict[str, Any], options: dict[str, Any], targets: list[int]
) -> None:
    row = {"input_ids": IDS, **columns}
    for rows in ([row], datasets.Dataset.from_list([row]), datasets.Dataset.from_list([row]).with_format("numpy")):
        found = load(rows, SFTConfig(**options))
        assert trained(found) == (IDS, targets)
        assert found.tokens.written == 4


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_they_are_cut_as_texts_are(truncation_mode: str) -> None:
    config = SFTConfig(max_length=3, truncation_mode=truncation_mode)
    rows = [{"input_ids": IDS, "labels": [-100, 11, 12, 13]}, {"input_ids": IDS, "labels": [-100, -100, -100, 13]},
            {"input_ids": [1], "labels": [1]}, {"input_ids": [], "labels": []}]  # fmt: skip
    found = load(rows, config)
    if truncation_mode == "keep_start":
        assert trained(found) == ([10, 11, 12], [11, 12])
        assert found.untrained == {1: Untrained.TRUNCATED, 2: Untrained.NO_TARGET, 3: Untrained.NO_TARGET}
    else:
        assert trained(found) == ([11, 12, 13], [12, 13])
        assert trained(found, 1) == ([11, 12, 13], [13])
        assert found.untrained == {2: Untrained.NO_TARGET, 3: Untrained.NO_TARGET}
    assert found.cut_rows[0] == 0


def test_they_are_packed_as_texts_are() -> None:
    config = SFTConfig(packing=True, packing_strategy="wrapped", max_length=3)
    found = load([{"input_ids": IDS}, {"input_ids": [20, 21]}], config)
    pieces = [[*sample.prompt_ids, *sample.completion_ids] for one in found.examples for sample in one.samples]
    assert pieces == [[10, 11, 12], [20, 21]]  # 13 alone has no context


def test_they_are_what_the_tokenizer_makes_of_the_texts() -> None:
    texts = [{"text": "some text"}, {"text": "other"}]
    want = load(texts)
    given = load([{"input_ids": TOKENIZER(row["text"] + TOKENIZER.eos_token)["input_ids"]} for row in texts])
    for index in range(2):
        assert trained(given, index) == trained(want, index)


def test_pairs_for_a_reward_model_may_be_tokens() -> None:
    for names in (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")):
        row = {names[0]: [5, 6, 7], names[1]: [5, 8], "margin": 0.5}
        (example,) = load([row], RewardModelConfig(), REWARD).examples
        chosen, rejected = example.samples
        assert [sample.prompt_ids.tolist() for sample in example.samples] == [[5], [5]]
        assert chosen.completion_ids.tolist() == [6, 7, TOKENIZER.eos_token_id]
        assert rejected.completion_ids.tolist() == [8, TOKENIZER.eos_token_id]
        assert chosen.label is not None
        assert chosen.label.margin == 0.5
        (note,) = load([{**row, "chosen": "a", "rejected": "b"}], RewardModelConfig(), REWARD).notes
        assert f"column_mapping={{{names[0]}: null, {names[1]}: null}}" in note
    same = {"chosen_ids": [5, 6], "rejected_ids": [5, 6]}
    assert load([same, row], RewardModelConfig(), REWARD).untrained == {0: Untrained.TIE}


def test_a_stream_takes_them() -> None:
    config = SFTConfig(dataset_streaming=True, max_steps=1)
    (one,) = stream_examples(config, TOKENIZER, task=SFT, dataset=[{"input_ids": IDS}], seed=0)
    assert one.example.samples[0].completion_ids.tolist() == IDS[1:]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": [1, 260]}, "field 'input_ids' must hold tokens of the tokenizer, 0 to 259, got 260 at place 1"),
    ({"input_ids": [-1, 1]}, "field 'input_ids' must hold tokens of the tokenizer, 0 to 259, got -1 at place 0"),
    ({"input_ids": None}, "field 'input_ids' must be a list of whole numbers, got None"),
    ({"input_ids": [1.5, 2]}, "field 'input_ids' must be a list of whole numbers"),
    ({"input_ids": "12"}, "field 'input_ids' must be a list of whole numbers"),
    ({"input_ids": [[1, 2], [3, 4]]}, "field 'input_ids' must be a list of whole numbers"),
    ({"input_ids": [1, 2], "labels": [1]}, "field 'labels' must be as long as input_ids, 2, got 1"),
    ({"input_ids": [1, 2], "labels": None}, "field 'labels' must be a list of whole numbers, got None"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "got 2 for 1 at place 0. They are not shifted"),
    ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "must be that of one text without padding"),
    ({"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 0]}, "must be that of one text without padding"),
    ({"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [1, 1]}, "would see each other"),
    ({"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": 3}, "must be left out, got int 3"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_row_of_tokens_is_named_and_may_be_dropped(row: dict[str, Any], message: str) -> None:
    good = {"input_ids": IDS, **({"labels": IDS} if "labels" in row else {})}
    with pytest.raises(DataError) as caught:
        load([good, row])
    assert "Row 1 of the given list" in str(caught.value)
    assert message in str(caught.value)
    assert load([good, row], SFTConfig(on_bad_row="drop")).untrained == {1: Untrained.BAD_ROW}


def test_a_mask_must_hold_zeros_and_ones() -> None:
    with pytest.raises(DataError, match="field 'assistant_masks' must hold 0 and 1"):
        load([{"input_ids": IDS, "assistant_masks": [0, 1, 2, 1]}])
    found = load([{"input_ids": IDS, "assistant_masks": np.array([False, False, True, True])}])
    assert trained(found) == (IDS, [12, 13])


def test_what_an_option_asks_for_must_be_told_by_a_column() -> None:
    with pytest.raises(DataError, match="assistant_only_loss=true needs the column 'assistant_masks' or 'labels'"):
        load([{"input_ids": IDS}], SFTConfig(assistant_only_loss=True))
    with pytest.raises(DataError, match="completion_only_loss=true needs the column 'completion_mask' or 'labels'"):
        load([{"input_ids": IDS}], SFTConfig(completion_only_loss=True))


def test_what_is_not_read_is_said() -> None:
    (note,) = load([{"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}]).report()
    assert "'completion_mask' of the given list is not read" in note
    assert "Set completion_only_loss=true" in note
    (note,) = load([{"input_ids": IDS, "text": "abc"}]).report()
    assert "is tokenised already: it is read from input_ids and not from text." in note
    rows = [{"input_ids": IDS, "text": "abc"}]
    as_text = load(rows, SFTConfig(column_mapping={"input_ids": None}))
    assert trained(as_text) == trained(load([{"text": "abc"}]))


def test_tasks_that_take_no_tokens_say_what_they_need() -> None:
    with pytest.raises(DataError, match="must have the columns of a format"):
        load([{"input_ids": IDS}], DPOConfig(), ExampleTask.PAIRS)
