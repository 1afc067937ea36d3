"""Tokens, masks and dropped rows of pairs, rated answers and scored pairs equal those of TRL's trainers and collators.

The oracles are `_prepare_dataset` of DPOTrainer, KTOTrainer and RewardTrainer, on stand-ins for the trainers, and
their collators.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tiny_models import build_tokenizer
from trl_ray.config.example_options import TruncationMode
from trl_ray.config.runs.dataset_config import DPOConfig, KTOConfig, RewardModelConfig
from trl_ray.data.chat.training_templates import template_source
from trl_ray.data.examples.example_set import ExampleTask, load_examples
from trl_ray.types import TrainingSample

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]

Rows = list[dict[str, Any]]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Takes "ab" for one token, so that tokens can merge across the border of prompt and answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate([*symbols, "ab"])}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


TINY, MERGING = build_tokenizer(), merging_tokenizer()
QWEN = build_tokenizer()
QWEN.chat_template = template_source("qwen3")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
EXPLICIT: Rows = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "five"},
    {"prompt": "a prompt that fills it all", "chosen": "x", "rejected": "a much longer answer than that"},
    {"prompt": "ca", "chosen": "bd", "rejected": "c"},
    {"prompt": "a", "chosen": "b", "rejected": "bb, and so on, and on"},
]
IMPLICIT: Rows = [
    {"chosen": "2+2= 4", "rejected": "2+2= five"},
    {"chosen": "hello there", "rejected": "hello you, how are you today?"},
]
CHATS: Rows = [
    {"prompt": [user("hi")], "chosen": [assistant("hello ü")], "rejected": [assistant("go")]},
    {
        "prompt": [user("hi"), assistant("yes?"), user("well, this one is longer")],
        "chosen": [assistant("so")],
        "rejected": [assistant("x"), user("y"), assistant("z")],
    },
]
IMPLICIT_CHATS: Rows = [
    {"chosen": [user("hi"), assistant("hello")], "rejected": [user("hi"), assistant("no")]},
    {
        "chosen": [user("hi"), assistant("a"), user("b"), assistant("yes")],
        "rejected": [user("hi"), assistant("a"), user("b"), assistant("another answer")],
    },
]
TOOLS: Rows = [
    {**CHATS[0], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
    {**CHATS[1], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
]
PAIRS = pytest.mark.parametrize(
    ("rows", "tokenizer"),
    [
        (EXPLICIT, TINY),
        (EXPLICIT, MERGING),
        (IMPLICIT, TINY),
        (CHATS, TINY),
        (IMPLICIT_CHATS, TINY),
        (TOOLS, QWEN),
    ],
    ids=["explicit", "merging", "implicit", "chats", "implicit-chats", "tools"],
)


def prepared(trainer: str, rows: Rows, tokenizer: Any, max_length: int | None, mode: str, **state: Any) -> list[Any]:
    """The rows that TRL's trainer makes and keeps."""
    import trl
    from datasets import Dataset

    config = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode=mode, per_device_train_batch_size=1000
    )
    numbered = Dataset.from_list([{**row, "number": i} for i, row in enumerate(rows)])
    stand_in = SimpleNamespace(_tokenizer=tokenizer, **state)
    return list(getattr(trl, trainer)._prepare_dataset(stand_in, numbered, tokenizer, config, "train"))


def collated(batch: dict[str, Any], row: int, prefix: str = "") -> tuple[list[int], list[int]]:
    """Ids without padding, and the completion mask."""
    there = batch[f"{prefix}attention_mask"][row].bool()
    return batch[f"{prefix}input_ids"][row][there].tolist(), batch[f"{prefix}completion_mask"][row][there].tolist()


def laid_out(sample: TrainingSample) -> tuple[list[int], list[int]]:
    """The same of a sample; TRL's mask counts a first token that nothing predicts, and so does the label's length."""
    mask = [0] * len(sample.prompt_ids) + sample.loss_mask.astype(int).tolist()
    if sample.label is not None and sample.label.length is not None:
        mask[0] = 1
        assert sample.label.length == sum(mask)
    return [*sample.prompt_ids.tolist(), *sample.completion_ids.tolist()], mask


@PAIRS
@pytest.mark.parametrize("max_length", [None, 30, 12])
@pytest.mark.parametrize("mode", TruncationMode)
def test_pairs_equal_trls(rows: Rows, tokenizer: Any, max_length: int | None, mode: TruncationMode) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    theirs = prepared("DPOTrainer", rows, tokenizer, max_length, mode)
    config = DPOConfig(max_length=max_length, truncation_mode=mode)
    ours = load_examples(config, tokenizer, task=ExampleTask.PAIRS, dataset=rows)
    assert [example.row for example in ours.examples] == [row["number"] for row in theirs]
    if not theirs:
        return
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)(theirs)
    for place, example in enumerate(ours.examples):
        for side, sample in enumerate(example.samples):
            assert laid_out(sample) == collated(batch, side * len(theirs) + place)


@PAIRS
@pytest.mark.parametrize("max_length", [None, 50, 12])
def test_pairs_that_are_unpaired_equal_trls(rows: Rows, tokenizer: Any, max_length: int | None) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    state = {"calculate_KL": True, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    theirs = prepared("KTOTrainer", rows, tokenizer, max_length, "keep_start", **state)
    config = KTOConfig(max_length=max_length)
    ours = load_examples(config, tokenizer, task=ExampleTask.UNPAIRED_WITH_KL, dataset=rows)
    if len({row["number"] for row in theirs}) < 2:
        return  # TRL lets one row be its own partner
    batch = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=max_length)(theirs)
    order = sorted(range(len(theirs)), key=lambda i: (theirs[i]["number"], not theirs[i]["label"]))
    assert len(ours.examples) == len(order)
    for example, i in zip(ours.examples, order, strict=True):
        assert example.row == theirs[i]["number"]
        assert example.samples[0].label is not None
        assert example.samples[0].label.desirable == theirs[i]["label"]
        assert laid_out(example.samples[0]) == collated(batch, i)
        assert example.mismatched is not None
        assert laid_out(example.mismatched) == collated(batch, i, "KL_")


def test_rated_rows_equal_trls_ring_and_all() -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    rows: Rows = [
        {"prompt": f"question {i}{'!' * i}", "completion": "answer" * (i + 1), "label": i % 3 == 0} for i in range(7)
    ]
    state = {"calculate_KL": True, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    theirs = prepared("KTOTrainer", rows, TINY, 16, "keep_start", **state)
    batch = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=16)(theirs)
    ours = load_examples(KTOConfig(max_length=16), TINY, task=ExampleTask.UNPAIRED_WITH_KL, dataset=rows)
    assert [example.row for example in ours.examples] == [row["number"] for row in theirs] == list(range(6))
    for place, example in enumerate(ours.examples):
        assert example.mismatched is not None
        assert laid_out(example.samples[0]) == collated(batch, place)
        assert laid_out(example.mismatched) == collated(batch, place, "KL_")
        assert example.samples[0].label is not None and example.samples[0].label.desirable == batch["label"][place]


@PAIRS
@pytest.mark.parametrize("max_length", [None, 60, 30])
def test_scored_pairs_equal_trls(rows: Rows, tokenizer: Any, max_length: int | None) -> None:
    marked = [{**row, "margin": 0.5 * i} for i, row in enumerate(rows)]
    theirs = prepared("RewardTrainer", marked, tokenizer, max_length, "keep_start")
    ours = load_examples(
        RewardModelConfig(max_length=max_length), tokenizer, task=ExampleTask.REWARD_PAIRS, dataset=marked
    )
    assert [example.row for example in ours.examples] == [row["number"] for row in theirs]
    for example, row in zip(ours.examples, theirs, strict=True):
        for sample, ids in zip(example.samples, (row["chosen_ids"], row["rejected_ids"]), strict=True):
            read = np.concatenate([sample.prompt_ids, sample.completion_ids])
            assert read.tolist() == [*ids, tokenizer.eos_token_id]
            assert sample.loss_mask.tolist() == [False] * (len(sample.loss_mask) - 1) + [True]
            assert sample.label is not None and sample.label.margin == row["margin"]
