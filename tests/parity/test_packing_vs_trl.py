"""Packed rows and labels equal those TRL's own functions make, where TRL's are right, and differ where it is told.

The oracles are `pack_dataset` and `SFTTrainer._prepare_dataset` themselves, the latter on a stand-in for the trainer.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from packed_rows import rows_of
from tiny_models import build_tokenizer
from trl_ray.config.example_options import TruncationMode
from trl_ray.data.chat.training_templates import template_source
from trl_ray.data.examples.packing import pack
from trl_ray.data.examples.supervised_texts import SupervisedRules
from trl_ray.data.formats.records import Document, PromptCompletion
from trl_ray.data.formats.transcripts import TextFormat
from whole_datasets import SupervisedData, read_records, tokenize_records

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]

TOKENIZER = build_tokenizer()
TEXTS = [{"text": "abc"}, {"text": "a longer text, to be cut"}, {"text": "ends<|im_end|>"}, {"text": "é"}]
PAIRS = [
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": "a prompt that fills it all", "completion": "x"},
    {"prompt": "a", "completion": "b<|im_end|>"},
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


TURNS = [
    {"prompt": [user("hi")], "completion": [assistant("hello ü")]},
    {
        "prompt": [user("hi"), assistant("yes?"), user("well")],
        "completion": [assistant("so"), user("x"), assistant("y")],
    },
]
CHATS = [
    {"messages": [user("hi"), assistant("hello")]},
    {"messages": [user("hi"), assistant("é"), user("and?"), assistant("then")]},
]


def trl_rows(rules: SupervisedRules, records: list[dict[str, Any]], template: str | None) -> list[dict[str, list[int]]]:
    """Ids and labels of TRL's trainer."""
    from datasets import Dataset
    from trl import SFTTrainer

    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=rules.assistant_only_loss,
        max_length=rules.max_length,
        truncation_mode=str(rules.truncation_mode),
        shuffle_dataset=False,
    )
    completion_only = rules.completion_only_loss
    trainer = SimpleNamespace(
        _tokenizer=TOKENIZER,
        chat_template=template,
        completion_only_loss="prompt" in records[0] if completion_only is None else completion_only,
    )
    prepared = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(records), TOKENIZER, args, False, None, "train")
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in prepared]


def without_first(labels: list[int]) -> list[int]:
    """TRL keeps a label on the first token; its loss shifts it away."""
    return [-100, *labels[1:]]


def our_data(records: list[dict[str, Any]], rules: SupervisedRules) -> SupervisedData:
    read = read_records(records, name="train", text_format=TextFormat.PLAIN)
    kept = [record for record in read if isinstance(record, Document | PromptCompletion)]
    return tokenize_records(kept, TOKENIZER, rules, name="train")


def our_rows(rules: SupervisedRules, records: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    data = our_data(records, rules)
    return [{"input_ids": found.token_ids.tolist(), "labels": found.labels().tolist()} for found in data.samples]


def trl_template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("records", [TEXTS, PAIRS, TURNS, CHATS], ids=["texts", "pairs", "turns", "chats"])
@pytest.mark.parametrize("completion_only", [None, True, False])
@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("mode", TruncationMode)
def test_ids_and_labels_equal_trls(
    records: list[dict[str, Any]], completion_only: bool | None, max_length: int | None, mode: TruncationMode
) -> None:
    rules = SupervisedRules(completion_only_loss=completion_only, max_length=max_length, truncation_mode=mode)
    theirs = [{**row, "labels": without_first(row["labels"])} for row in trl_rows(rules, records, None)]
    # A row that only has its first token to train has nothing to train: TRL keeps it.
    theirs = [row for row in theirs if set(row["labels"]) != {-100}]
    assert our_rows(rules, records) == theirs


@pytest.mark.parametrize("records", [TURNS, CHATS], ids=["turns", "chats"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_instruct_2507"])
def test_assistant_only_labels_equal_trls(records: list[dict[str, Any]], family: str) -> None:
    rules = SupervisedRules(assistant_only_loss=True, chat_template=template_source(family))
    theirs = trl_rows(rules, records, trl_template(f"{family}_training"))
    assert our_rows(rules, records) == theirs
    assert any(label != -100 for row in theirs for label in row["labels"])


def test_qwen2_5_labels_equal_trls_but_for_the_line_end_of_the_header_which_the_prompt_already_holds() -> None:
    rules = SupervisedRules(assistant_only_loss=True, chat_template=template_source("qwen2_5"))
    newline = TOKENIZER("\n")["input_ids"][0]
    theirs = trl_rows(rules, CHATS, trl_template("qwen2_5_training"))
    for our, their in zip(our_rows(rules, CHATS), theirs, strict=True):
        assert our["input_ids"] == their["input_ids"]
        extra = [place for place, label in enumerate(their["labels"]) if label != our["labels"][place]]
        turns = sum(label == newline for label in our["labels"])  # each turn ends with one that both train
        assert len(extra) == turns
        assert {their["labels"][place] for place in extra} == {newline}
        assert {our["labels"][place] for place in extra} == {-100}


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("seed", range(3))
def test_packed_rows_equal_trls(strategy: str, seed: int) -> None:
    from datasets import Dataset
    from trl import pack_dataset

    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 50, size=200)
    ids = [np.arange(length) + 1000 * example for example, length in enumerate(lengths)]
    dataset = Dataset.from_dict({"input_ids": [row.tolist() for row in ids]})
    theirs = pack_dataset(dataset, 32, strategy)
    packing = pack(lengths, max_length=32, strategy=strategy)
    ours = [row.gather(ids).tolist() for row in rows_of(packing)]
    if strategy == "wrapped":
        assert ours == theirs["input_ids"]
        return
    # Among equally long pieces TRL's sort has no order, so which of them stands where may differ; the layout may not.
    assert [np.diff(row.boundaries()).tolist() for row in rows_of(packing)] == theirs["seq_lengths"]
    assert sorted(token for row in ours for token in row) == sorted(
        token for row in theirs["input_ids"] for token in row
    )


def test_positions_and_labels_of_a_packed_row_equal_those_of_trls_padding_free_collator() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rules = SupervisedRules()
    records = [*PAIRS, {"prompt": "one", "completion": " more"}]
    data = our_data(records, rules)
    ids, masks = [found.token_ids for found in data.samples], [found.loss_mask for found in data.samples]
    row = rows_of(pack([len(found) for found in ids], max_length=100, strategy="bfd"))[0]
    whole = [
        {"input_ids": ids[piece.example].tolist(), "labels": data.samples[piece.example].labels().tolist()}
        for piece in row.pieces
    ]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(whole)
    assert row.gather(ids).tolist() == theirs["input_ids"][0].tolist()
    assert row.positions().tolist() == theirs["position_ids"][0].tolist()
    assert row.boundaries().tolist() == theirs["cu_seq_lens_q"].tolist()
    assert row.piece_ids().tolist() == theirs["seq_idx"][0].tolist()
    assert np.where(row.gather_targets(masks), row.gather(ids), -100).tolist() == theirs["labels"][0].tolist()
