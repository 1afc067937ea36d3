"""Reads rows from wherever a dataset lives: the hub, a file, a folder, Python objects, or a generator.

DataConfig.dataset_name ─┬─ reasoning_gym/<task>  ─► generated.py
                         ├─ file .json .jsonl .csv .parquet
                         ├─ folder                ─► datasets.load_from_disk / load_dataset
                         └─ hub name              ─► datasets.load_dataset        ─► Rows
an object from Python ─── Dataset, DatasetDict, list of dicts ────────────────────┘
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.config.sections import DataConfig
from trl_ray.data.generated import PREFIX, generate
from trl_ray.errors import DataError

Row = Mapping[str, Any]
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A dataset in memory: where it came from, its columns, its rows."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]


def load_rows(config: DataConfig, *, seed: int, dataset: object | None = None, evaluation: bool = False) -> Rows:
    """Read all rows of the training or the held-out split.

    `dataset` overrides `config.dataset_name`. `seed` only matters for generated tasks.

    Raises:
        DataError: there is no such dataset, split or task, it cannot be read, or it is empty.
    """
    split = config.dataset_test_split if evaluation else config.dataset_train_split
    name = config.dataset_name
    if dataset is not None:
        found = _from_object(dataset, split)
    elif name is None:
        raise DataError("A run needs prompts: set dataset_name, or pass train_dataset. Neither was given.")
    elif name.startswith(PREFIX):
        rows = generate(name, config.dataset_kwargs, seed=seed, held_out=evaluation)
        found = _rows(name, rows)
    else:
        found = _from_name(name, config, split)
    if not found.rows:
        raise DataError(f"A dataset must have at least one row, {found.name} has none. Check the file or the split.")
    return found


def _from_name(name: str, config: DataConfig, split: str | None) -> Rows:
    if config.dataset_kwargs:
        raise DataError(
            f"dataset_kwargs are options of a generated task ({PREFIX}<task>), got {config.dataset_kwargs!r} with "
            f"dataset_name={name!r}. Remove them."
        )
    if split is None:
        raise DataError(
            f"Evaluation needs held-out prompts and {name} names no split for them. Set dataset_test_split, pass "
            "eval_dataset, or set eval_steps to 0."
        )
    path = Path(name)
    if path.is_file():
        return _from_file(path, split)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        from datasets import load_from_disk

        return _from_object(load_from_disk(name), split, name=name)
    if path.suffix in FILE_TYPES:
        raise DataError(f"dataset_name must be a file that exists, got {name!r}: no such file. {_beside(path)}")
    return _from_hub(name, config.dataset_config, split)


def _beside(path: Path) -> str:
    files = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, files)
    return f"Did you mean {str(path.parent / guess)!r}?" if guess else "Check the path."


def _from_hub(name: str, subset: str | None, split: str) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except (OSError, ConnectionError) as error:
        raise DataError(
            f"dataset_name must be a hub dataset within reach, a file ({', '.join(FILE_TYPES)}), a folder, or "
            f"{PREFIX}<task>, got {name!r}: no such file or hub dataset ({_first_line(error)}). Check the name, the "
            "network and, for a gated dataset, the access token."
        ) from error
    except ValueError as error:  # also what an unknown subset or split is
        raise DataError(
            f"dataset_config and dataset_train_split / dataset_test_split must exist in {name}, got {subset!r} and "
            f"{split!r}: {_first_line(error)}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = _first_line(error.__cause__ or error)
        raise DataError(f"{name} must be readable: {cause}. Check its files.") from error
    return _from_object(loaded, split, name=name)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _from_file(path: Path, split: str) -> Rows:
    if split != "train":
        raise DataError(
            f"A single file has only the split 'train', got {split!r} of {path}. Put the splits into a folder "
            "(train.jsonl, test.jsonl) and name the folder."
        )
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"A dataset file must end in {', '.join(FILE_TYPES)}, got {str(path)!r}. Convert it.")
    try:
        return _rows(str(path), reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text: {error.reason}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} must be readable: {error}.") from error


def _read_json(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        hint = "One object per line is .jsonl: rename the file." if error.msg == "Extra data" else "Mend the file."
        raise DataError(
            f"{path} must be a JSON list of objects, line {error.lineno} column {error.colno}: {error.msg}. {hint}"
        ) from error
    if not isinstance(content, list):
        raise DataError(f"{path} must be a JSON list of objects, got a {type(content).__name__}. Wrap it in [ ].")
    return content


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.strip()
            if not line:
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path} must hold one JSON object per line, line {number} is broken at column {error.colno}: "
                    f"{error.msg}, got {line[:80]!r}. Mend or delete the line."
                ) from error
    return rows


def _read_csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return list(csv.DictReader(file, strict=True))
        except csv.Error as error:
            raise DataError(f"{path} must be a comma-separated table: {error}. Mend the file.") from error


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} must be a whole parquet file: {_first_line(error)}. Write it anew.") from error
    return rows


def _from_object(dataset: object, split: str | None, *, name: str | None = None) -> Rows:
    """Rows of a list of dicts, a `datasets.Dataset`, or one split of a `datasets.DatasetDict`."""
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise DataError(f"The dataset must have the split {split!r}, it has {sorted(map(str, dataset))}. Name one.")
        return _from_object(dataset[split], split, name=name)
    label = name or f"the given {type(dataset).__name__}"
    if isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        raise DataError(
            f"A dataset must be a name, a datasets.Dataset or a list of dicts, got {type(dataset).__name__}."
        )
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"A dataset must have a length, because a resumed run continues at a row number; {label} is a stream. "
            "Take as many rows as you need: datasets.Dataset.from_list(list(stream.take(n)))."
        )
    return _rows(label, list(dataset))


def _rows(name: str, rows: Sequence[Any]) -> Rows:
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"Row {number} of {name} must be an object with columns, got {type(row).__name__} {str(row)[:80]!r}."
            )
        columns.update(dict.fromkeys(map(str, row)))
    return Rows(name=name, columns=tuple(columns), rows=rows)
