"""Datasets as objects of every kind: the rows that are trained are those of a list, or the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch.utils.data

import dataset_runs
from runs import PROMPTS, grpo
from tiny_models import build_tiny_model
from trl_ray.errors import ConfigError, DataError
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.run.given_rows import IndexedRows, given_rows

ROWS = dataset_runs.rows("sft", 12)


class Indexed(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, place: int) -> Any:
        return ROWS[place]


class Streamed(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def trained(plan: Any) -> list[list[int]]:
    return [[*sample.prompt_ids, *sample.completion_ids] for each in plan.train.examples for sample in each.samples]


@pytest.mark.parametrize(
    "given",
    [
        datasets.Dataset.from_list(ROWS),
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
        datasets.Dataset.from_list(ROWS).with_format("torch"),
        tuple(ROWS),
        pd.DataFrame(ROWS),
        Indexed(),
        torch.utils.data.Subset(Indexed(), range(12)),
    ],
    ids=["Dataset", "DatasetDict", "torch format", "tuple", "pandas", "torch Dataset", "torch Subset"],
)
def test_rows_are_those_of_a_list(given: Any, model: str, tmp_path: Path) -> None:
    expected = dataset_runs.pipeline("sft", model, tmp_path / "list", inputs={"train_dataset": ROWS}).prepare()
    made = dataset_runs.pipeline(
        "sft", model, tmp_path / "run", inputs={"train_dataset": given, "eval_dataset": given}, eval_steps=2
    )
    plan = made.prepare()
    assert trained(plan) == trained(expected)
    assert [len(found.examples) for found in plan.held_out.values()] == [12]


@pytest.mark.parametrize("given", [datasets.Dataset.from_list(ROWS).to_iterable_dataset(), Streamed()])
def test_a_stream_is_streamed_where_the_steps_are_counted_and_read_where_it_is_held_out(
    given: Any, model: str, tmp_path: Path
) -> None:
    inputs = {"train_dataset": given, "eval_dataset": given}
    made = dataset_runs.pipeline("sft", model, tmp_path / "run", inputs=inputs, max_steps=2, eval_steps=2)
    assert made.config.dataset_streaming and len(made.prepare().held_out[""].examples) == 12
    assert made.train().steps == 2
    with pytest.raises(ConfigError, match=r"dataset_streaming=true and max_steps"):
        dataset_runs.pipeline("sft", model, tmp_path / "all", inputs=inputs, max_steps=-1).prepare()


def test_what_is_used_up_by_reading_is_told(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got false with a generator"):
        dataset_runs.pipeline("sft", model, tmp_path / "a", inputs={"train_dataset": (row for row in ROWS)}).prepare()
    prompts = GRPOPipeline(args=grpo(model, tmp_path / "b"), train_dataset=(row for row in PROMPTS))
    with pytest.raises(DataError, match=r"datasets\.Dataset\.from_list\(list\(stream\.take\(n\)\)\)"):
        prompts.prepare()


def test_prompts_come_from_tables_and_torch_datasets_too(model: str, tmp_path: Path) -> None:
    table = pd.DataFrame([{**row, "answer": number} for number, row in enumerate(PROMPTS)])
    plan = GRPOPipeline(args=grpo(model, tmp_path / "run", eval_steps=2), train_dataset=table, eval_dataset=table)
    made = plan.prepare()
    assert len(made.prompts) == len(PROMPTS) and made.prompts.prompt(3).columns["answer"] in range(len(PROMPTS))


def test_holes_of_a_table_are_nothing_and_arrays_are_lists() -> None:
    table = pd.DataFrame({"text": ["a", None], "number": [1.0, np.nan], "ids": [np.array([1, 2]), np.array([3])]})
    assert given_rows(table) == [
        {"text": "a", "number": 1.0, "ids": [1, 2]},
        {"text": None, "number": None, "ids": [3]},
    ]
    assert given_rows({"a": table, "b": ROWS})["b"] is ROWS


def test_items_by_number_are_a_sequence() -> None:
    rows = IndexedRows(Indexed())
    assert rows[1:3] == ROWS[1:3] and rows[-1] == ROWS[-1] and list(rows) == ROWS
    with pytest.raises(IndexError):
        rows[12]
