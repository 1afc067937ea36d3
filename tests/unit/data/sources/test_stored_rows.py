"""Many rows stay where they are stored, and are the same rows, with the same numbers, columns and errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from trl_ray.config.sections import DataConfig, DatasetConfig
from trl_ray.data.sources import dataset_files, row_sequences, stored_rows
from trl_ray.data.sources.dataset_loading import Rows, load_rows
from trl_ray.data.sources.row_sequences import FileRows, LibraryRows, RowSequence, content_key
from trl_ray.errors import DataError

ROWS: list[dict[str, Any]] = [{"prompt": f"p{n}", "answer": n} for n in range(7)]


@pytest.fixture(autouse=True)
def everything_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "LARGE_BYTES", 0)
    monkeypatch.setattr(stored_rows, "LARGE_ROWS", 1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def jsonl(path: Path, rows: Any = ROWS) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def table(path: Path) -> Path:
    if path.suffix == ".csv":
        path.write_text("prompt,answer\n" + "\n".join(f"p{n},{n}" for n in range(7)))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path), batch_size=2)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path.parent / "saved"))
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    return path


def load(name: object = None, *, in_memory: bool = False, dataset: object = None, **options: Any) -> Rows:
    given = {} if name is None else {"dataset_name": str(name)}
    return load_rows(DataConfig(**given, **options), seed=5, dataset=dataset, in_memory=in_memory)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "arrow"])
def test_rows_of_a_file_are_read_in_any_order(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{suffix}"
    found = load(jsonl(path) if suffix == "jsonl" else table(path))
    want = load(path, in_memory=True)
    assert isinstance(found.rows, FileRows)
    assert isinstance(want.rows, list)
    assert (found.columns, list(found.rows), len(found.rows)) == (want.columns, want.rows, 7)
    monkeypatch.setattr(row_sequences, "_READ_AHEAD", 2)
    for place in (0, 6, 1, 2, 3, 5, 5, 0, 4):
        assert found.rows[place] == want.rows[place], place
    with pytest.raises(IndexError):
        found.rows[7]


def test_rows_that_follow_each_other_are_read_from_one_opening_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load(jsonl(tmp_path / "a.jsonl")).rows
    opened: list[int] = []

    def counted(path: Path, start: int = 0) -> Any:
        opened.append(start)
        return dataset_files.read_file(path, start)

    monkeypatch.setattr(row_sequences, "read_file", counted)
    assert [found[n] for n in (0, 1, 3, 6)] == [ROWS[n] for n in (0, 1, 3, 6)]
    assert opened == [0]
    assert found[2] == ROWS[2]
    assert opened == [0, 2]


def test_a_share_that_is_drawn_is_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl")
    opened: list[int] = []

    def counted(path: Path, start: int = 0) -> Any:
        opened.append(start)
        return dataset_files.read_file(path, start)

    monkeypatch.setattr(row_sequences, "read_file", counted)
    sources = [DatasetConfig(path=str(path), share=0.8, share_seed=7)]
    drawn, held = load(datasets=sources), load(datasets=sources, in_memory=True)
    assert list(drawn.rows) == list(held.rows)
    assert list(drawn.rows) != ROWS[:5]
    assert len(opened) == 1
    assert row_sequences.content_key(drawn.rows) is not None


def test_a_forked_process_reads_for_itself(tmp_path: Path) -> None:
    found = load(jsonl(tmp_path / "a.jsonl")).rows
    assert found[2] == ROWS[2]
    child = os.fork()
    if not child:
        os._exit(0 if [found[n] for n in range(3, 7)] == ROWS[3:] else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert [found[n] for n in range(3, 7)] == ROWS[3:]


def test_columns_of_any_row_are_columns_of_the_file(tmp_path: Path) -> None:
    found = load(jsonl(tmp_path / "a.jsonl", [*ROWS, {"late": 1}]))
    assert found.columns == ("prompt", "answer", "late")


def test_a_file_is_looked_through_once_and_anew_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl")
    looked: list[Path] = []
    shape = stored_rows._shape

    def counted(path: Path) -> Any:
        looked.append(path)
        return shape(path)

    monkeypatch.setattr(stored_rows, "_shape", counted)
    assert [len(load(path).rows) for _ in range(2)] == [7, 7]
    assert len(looked) == 1
    os.utime(path, (0, 0))
    assert len(load(path).rows) == 7
    assert len(looked) == 1, "not the time counts, but the content"
    jsonl(path, [*ROWS[:-1], {"prompt": "other", "answer": 6}])
    assert load(path).rows[6] == {"prompt": "other", "answer": 6}
    assert len(looked) == 2
    for note in (tmp_path / "cache" / "trl_ray" / "files").iterdir():
        note.write_text("{")
    assert len(load(path).rows) == 7, "what cannot be read is looked for anew"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3 is broken at column 15"),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', "Row 1 of .* must be an object with columns"),
        ("a.csv", "prompt,answer\na,1\nb\n", "Row 1 of .* must have 2 fields"),
        ("a.parquet", "PAR1 and no more", "must be a whole parquet file"),
        ("a.jsonl", "\n", "must have at least one row"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_else(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    for in_memory in (True, False):
        with pytest.raises(DataError, match=message):
            load(path, in_memory=in_memory)


def test_renamed_and_chosen_columns_are_those_of_rows_in_memory(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl")
    options = {"column_mapping": {"prompt": "text", "answer": None}}
    found, want = (load(path, in_memory=in_memory, **options) for in_memory in (False, True))
    assert isinstance(found.rows, RowSequence)
    assert (found.columns, list(found.rows)) == (want.columns, want.rows)
    chosen = {"datasets": [{"path": str(path), "columns": ["answer"]}, {"path": str(path), "weight": 2.0}]}
    found, want = (load(in_memory=in_memory, **chosen) for in_memory in (False, True))
    assert list(found.rows) == list(want.rows)
    assert {"answer"} in [set(row) for row in found.rows]
    with pytest.raises(DataError, match="column_mapping must name columns of"):
        load(path, column_mapping={"promt": "text"})


def test_mixtures_and_held_out_parts_name_the_same_rows(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / "a.jsonl"), table(tmp_path / "b.parquet")]
    options = {"datasets": [{"path": str(path)} for path in paths], "test_split_size": 0.3}
    for evaluation in (False, True):
        found, want = (
            load_rows(DataConfig(**options), seed=5, evaluation=evaluation, in_memory=in_memory)
            for in_memory in (False, True)
        )
        assert list(found.rows) == list(want.rows)
        assert [found.where(n) for n in range(len(found.rows))] == [want.where(n) for n in range(len(want.rows))]


def test_rows_of_the_library_are_those_that_its_iteration_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    other = {"function": {"name": "g", "arguments": {"b": None}}}
    talk = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [one]}]} for one in (call, other)]
    monkeypatch.setattr(row_sequences, "_BUFFERED_ROWS", 2)
    for rows in (ROWS, talk, [{"ids": [1, 2]}, {"ids": [3]}, {"ids": []}]):
        given = datasets.Dataset.from_list(rows)
        for dataset in (given, given.with_format("numpy"), given.select(list(range(len(given)))[::-1])):
            found, want = (load(dataset=dataset, in_memory=in_memory) for in_memory in (False, True))
            assert isinstance(found.rows, LibraryRows)
            assert found.columns == want.columns
            for one, two in zip(found.rows, want.rows, strict=True):
                assert repr(one) == repr(two)
            assert repr(found.rows[1]) == repr(want.rows[1])
    shown = datasets.Dataset.from_list(ROWS).with_format(columns=["answer"])
    assert load(dataset=shown).columns == ("answer",)


def test_a_dataset_that_cannot_be_read_names_the_row(tmp_path: Path) -> None:
    import pyarrow

    class Damaged(datasets.Dataset):  # type: ignore[misc]
        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, slice) or key == 3:
                raise pyarrow.ArrowInvalid("torn\nmore")
            return super().__getitem__(key)

    given = datasets.Dataset.from_list(ROWS)
    given.__class__ = Damaged
    found = LibraryRows(given, name="d")
    assert found[2] == ROWS[2]
    with pytest.raises(DataError, match=r"d must be readable, reading stopped before row 3: torn\. Check it"):
        found[3]


def test_keys_follow_the_rows_through_every_change(tmp_path: Path) -> None:
    path, copy = jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl")
    assert content_key(load(path).rows) == content_key(load(copy).rows)
    keys = {
        content_key(load(path, **options).rows)
        for options in (
            {},
            {"column_mapping": {"prompt": "text"}},
            {"column_mapping": {"prompt": "title"}},
            {"test_split_size": 2},
            {"test_split_size": 3},
        )
    }
    keys.add(content_key(load(jsonl(tmp_path / "c.jsonl", ROWS[:6])).rows))
    keys.add(content_key(load(dataset=datasets.Dataset.from_list(ROWS)).rows))
    keys.add(content_key(load(datasets=[{"path": str(path)}, {"path": str(copy)}]).rows))
    keys.add(content_key(load(datasets=[{"path": str(copy)}, {"path": str(path)}]).rows))
    assert len(keys) == 9
    assert None not in keys
    assert row_sequences.array_key(np.arange(4)) != row_sequences.array_key(np.arange(4).reshape(2, 2))
