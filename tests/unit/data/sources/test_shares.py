"""Parts of the datasets of a mixture: which rows are trained on, and which are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import SFTConfig
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.errors import ConfigError, DataError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two datasets, ``a`` with 10 rows and 4 held-out ones, ``b`` with 5 and 2; each row says where it is from."""
    for name, train, test in (("a", 10, 4), ("b", 5, 2)):
        for split, count in (("train", train), ("test", test)):
            (tmp_path / name).mkdir(exist_ok=True)
            rows = (json.dumps({"text": f"{name}-{split}-{number}"}) for number in range(count))
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


def texts(evaluation: bool = False, **options: Any) -> list[str]:
    rows = load_rows(build(SFTConfig, options), seed=3, evaluation=evaluation)
    return [row["text"] for row in rows.rows]


def rows_of(name: str, count: int, split: str = "train") -> list[str]:
    return [f"{name}-{split}-{number}" for number in range(count)]


def test_a_mixer_trains_the_first_rows_of_each_by_its_share_and_holds_out_all_test_rows(data: Path) -> None:
    options = {
        "dataset_mixer": {str(data / "a"): 0.35, str(data / "b"): 1.0},
        "dataset_splits": ["train", "test"],
    }
    assert texts(**options) == rows_of("a", 3) + rows_of("b", 5)
    assert texts(**options, evaluation=True) == rows_of("a", 4, "test") + rows_of("b", 2, "test")


def test_a_mixer_of_one_dataset_takes_its_share(data: Path) -> None:
    assert texts(dataset_mixer={str(data / "a"): 0.5}) == rows_of("a", 5)


def test_a_weight_of_a_mixture_is_a_share_drawn_by_its_seed_as_datasets_draws_it(data: Path) -> None:
    from datasets import Dataset

    mixture = {
        "seed": 7,
        "datasets": [{"id": str(data / "a"), "weight": 0.35}, {"id": str(data / "b"), "split": "train"}],
    }
    drawn = Dataset.from_list([{"text": text} for text in rows_of("a", 10)]).shuffle(seed=7)["text"][:3]
    assert texts(dataset_mixture=mixture) == [*drawn, *rows_of("b", 5)]
    assert drawn != rows_of("a", 3)


def test_rows_held_out_of_a_mixture_are_of_its_shares_and_are_not_trained_on(data: Path) -> None:
    mixture = {"datasets": [{"id": str(data / "a"), "weight": 0.4}, {"id": str(data / "b")}], "test_split_size": 3}
    whole = texts(dataset_mixture={key: value for key, value in mixture.items() if key == "datasets"})
    trained, held_out = texts(dataset_mixture=mixture), texts(dataset_mixture=mixture, evaluation=True)
    assert len(whole) == 9 and len(held_out) == 3
    assert sorted(trained + held_out) == sorted(whole)


@pytest.mark.parametrize(("option", "value", "count"), [("val_set_size", 0.2, 2), ("val_size", 3, 3)])
def test_a_validation_set_of_the_neighbours_is_held_out_of_the_rows(
    option: str, value: float, count: int, data: Path
) -> None:
    options = {"dataset_name": str(data / "a"), option: value}
    trained, held_out = texts(**options), texts(**options, evaluation=True)
    assert len(held_out) == count
    assert sorted(trained + held_out) == sorted(rows_of("a", 10))


def test_the_rows_of_a_share_are_named_by_their_number_in_the_dataset(data: Path) -> None:
    options = {"datasets": [{"path": str(data / "a"), "share": 0.35, "share_seed": 7}]}
    rows = load_rows(build(SFTConfig, options), seed=3)
    assert [f"a-train-{rows.origin(index).number}" for index in range(3)] == [row["text"] for row in rows.rows]
    assert rows.notes == (f"7 of 10 rows of {data / 'a'} are in no place of the mixture (share).",)


def test_a_share_that_leaves_nothing_is_refused(data: Path) -> None:
    with pytest.raises(DataError, match=r"must leave at least one of its 5 rows, 0.1 leaves none"):
        texts(datasets=[{"path": str(data / "b"), "share": 0.1}])


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        ({"share": 0.5, "weight": 1.0}, {}, "share must be left out with fraction or weight"),
        ({"share_seed": 3}, {}, "share must be set with share_seed=3"),
        ({"share": 0.5}, {"mixture_stopping": "all_exhausted"}, "share must be left out in datasets that are mixed"),
    ],
)
def test_a_share_stands_alone(entry: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SFTConfig, {"datasets": [{"path": "a", **entry}], **options})
