"""Texts in the place of rows, whatever the rows are."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from trl_ray.data.sources.formatting import formatted_rows
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
