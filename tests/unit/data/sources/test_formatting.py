"""Texts in the place of rows, whatever the rows are."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from trl_ray.config.sections import DataConfig
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.data.sources.formatting import formatted_rows
from trl_ray.data.sources.row_sequences import content_key
from trl_ray.errors import DataError

ROWS = [{"q": "one", "messages": []}, {"q": "two", "messages": []}]


def shout(row: dict[str, Any]) -> str:
    return str(row["q"]).upper()


@pytest.mark.parametrize(
    "rows",
    [ROWS, Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset()],
    ids=lambda r: type(r).__name__,
)
def test_rows_have_the_text_and_nothing_else(rows: Any) -> None:
    found = formatted_rows(rows, shout, column="text")
    assert list(found) == [{"text": "ONE"}, {"text": "TWO"}]
    assert isinstance(found, IterableDataset) == isinstance(rows, IterableDataset)


def test_a_function_that_gives_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="must give the text of one row, got a list"):
        formatted_rows(ROWS, lambda row: [row["q"]], column="text")  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match="formatting_func must take every row, but: KeyError"):
        formatted_rows(ROWS, lambda row: str(row["answer"]), column="text")


def test_many_rows_become_texts_when_they_are_read_and_keep_a_key(monkeypatch):
    import datasets

    monkeypatch.setattr("trl_ray.data.sources.stored_rows.LARGE_ROWS", 2)
    made = []

    def text(row):
        made.append(row["a"])
        return f"<{row['a']}>"

    def keyed(row):
        return f"<{row['a']}>"

    given = datasets.Dataset.from_list([{"a": n} for n in range(4)])
    found = formatted_rows(given, text, column="text")
    assert made == []
    rows = load_rows(DataConfig(), seed=0, dataset=found, in_memory=False)
    assert (rows.columns, rows.rows[2], list(rows.rows)[1]) == (("text",), {"text": "<2>"}, {"text": "<1>"})
    keys = [content_key(formatted_rows(given, make, column="text")) for make in (keyed, keyed, lambda row: "x")]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] is not None


def test_a_row_that_the_function_refuses_ends_the_reading_of_many_rows_as_of_few(monkeypatch):
    import datasets

    given = datasets.Dataset.from_list([{"a": n} for n in range(4)])
    monkeypatch.setattr("trl_ray.data.sources.stored_rows.LARGE_ROWS", 2)
    with pytest.raises(DataError, match="formatting_func must take every row, but: KeyError"):
        list(formatted_rows(given, lambda row: row["b"], column="text"))
