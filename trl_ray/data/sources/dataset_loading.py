"""Finds rows wherever a dataset lives: the hub, a file, a folder, Python objects, a generator, or several of them.

dataset_name, or an entry of `datasets` ─┬─ reasoning_gym/<task>  ─► generated.py
                                         ├─ file                  ─► files.py
                                         ├─ folder                ─► datasets.load_from_disk / load_dataset
                                         └─ hub name              ─► datasets.load_dataset
an object from Python ────────────────── Dataset, DatasetDict, IterableDataset, list of dicts
                                                   │
                    RowStream: from any row on ◄───┘──► Rows: all at once; a mixture says where each came from
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.config.sections import DataConfig, DatasetConfig
from trl_ray.data.sources.arrow_rows import without_filled_arguments
from trl_ray.data.sources.dataset_files import FILE_TYPES, Row, read_file
from trl_ray.data.sources.generated import PREFIX, generated_rows
from trl_ray.data.sources.mixtures import Mixture, Source, mix
from trl_ray.data.validation import show
from trl_ray.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a row of a mixture was taken from."""

    name: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A dataset in memory: where it came from, its columns, its rows."""

    name: str
    columns: tuple[str, ...]
    """Of a mixture, the columns of any of its sources."""
    rows: Sequence[Row]
    sources: tuple[Rows, ...] = ()
    """What a mixture is made of."""
    mixture: Mixture | None = None

    def origin(self, index: int) -> Origin:
        """The dataset that a row came from, and its number there."""
        if self.mixture is None:
            return Origin(name=self.name, number=index)
        return Origin(
            name=self.mixture.sources[self.mixture.source_ids[index]].name,
            number=int(self.mixture.row_numbers[index]),
        )

    def where(self, index: int) -> str:
        """How messages name a row: by its number in the dataset that it came from."""
        origin = self.origin(index)
        return f"Row {origin.number} of {origin.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStream:
    """A dataset that is read while it is used."""

    name: str
    read: Callable[[int], Iterator[Row]]
    """The rows from a number on; may be called again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _MixedRows(Sequence[Row]):
    """The rows of a mixture by their place in it."""

    mixture: Mixture

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, place: Any) -> Any:
        return self.mixture[place].row


def load_rows(config: DataConfig, *, seed: int, dataset: object | None = None, evaluation: bool = False) -> Rows:
    """Read all rows of the training or the held-out split.

    `dataset` overrides `config.dataset_name` and `config.datasets`. `seed` only matters for generated tasks, and for
    the order in which a mixture draws from its datasets.

    Raises:
        DataError: there is no such dataset, split or task, it cannot be read, or it is empty.
    """
    if dataset is None and config.datasets:
        return _load_mixture(config, seed=seed, evaluation=evaluation)
    if dataset is not None and not isinstance(dataset, Mapping) and not hasattr(dataset, "__len__"):
        _require_rows(dataset)
        raise DataError(
            f"A dataset must have a length, because a resumed run continues at a row number; the given "
            f"{type(dataset).__name__} is a stream. Take as many rows as you need: "
            "datasets.Dataset.from_list(list(stream.take(n)))."
        )
    return _in_memory(open_rows(config, seed=seed, dataset=dataset, evaluation=evaluation))


def open_rows(
    config: DataConfig, *, seed: int, dataset: object | None = None, evaluation: bool = False, lazily: bool = False
) -> RowStream:
    """One dataset, to be read from any row on; with `lazily`, hub datasets are not downloaded as a whole.

    Raises:
        DataError: there is no such dataset, split or task, it cannot be read, or it is a mixture.
    """
    split = config.dataset_test_split if evaluation else config.dataset_train_split
    if dataset is not None:
        return _from_object(dataset, split)
    if config.datasets:
        raise DataError(
            "A mixture must be read before training: its order is drawn from the numbers of rows. Set "
            "dataset_streaming=false, or pass the streams as one, by datasets.interleave_datasets."
        )
    if config.dataset_name is None:
        raise DataError("A run needs rows: set dataset_name or datasets, or pass train_dataset. None was given.")
    source = DatasetConfig(path=config.dataset_name, name=config.dataset_config, kwargs=config.dataset_kwargs)
    return _from_name(source, split, seed=seed, evaluation=evaluation, lazily=lazily)


def _load_mixture(config: DataConfig, *, seed: int, evaluation: bool) -> Rows:
    if config.dataset_name is not None:
        raise DataError(
            f"dataset_name must be left out where datasets are named, got {config.dataset_name!r}. Add it to datasets, "
            "or remove one of the two."
        )
    parts = []
    for source in config.datasets:
        # What is trained on is not held out: evaluation has a split of its own.
        split = config.dataset_test_split if evaluation else source.split or config.dataset_train_split
        stream = _from_name(source, split, seed=seed, evaluation=evaluation, lazily=False)
        parts.append(_with_columns(_in_memory(stream), source.columns))
    names = [part.name for part in parts]
    parts = [
        part if names.count(part.name) == 1 else replace(part, name=f"{part.name} (datasets, entry {number})")
        for number, part in enumerate(parts)
    ]
    sources = [
        Source(name=part.name, rows=part.rows, weight=source.weight)
        for part, source in zip(parts, config.datasets, strict=True)
    ]
    mixture = mix(sources, seed=seed, stopping=config.mixture_stopping)
    return Rows(
        name=" + ".join(part.name for part in parts),
        columns=tuple(dict.fromkeys(column for part in parts for column in part.columns)),
        rows=_MixedRows(mixture=mixture),
        sources=tuple(parts),
        mixture=mixture,
    )


def _with_columns(rows: Rows, columns: Sequence[str] | None) -> Rows:
    if columns is None:
        return rows
    for column in columns:
        if column not in rows.columns:
            guess = nearest(column, rows.columns)
            raise DataError(
                f"{rows.name} must have the column {column!r}, which datasets.columns keeps; its columns are "
                f"{', '.join(rows.columns)}. {f'Did you mean {guess!r}?' if guess else 'Name others.'}"
            )
    kept = [{column: row[column] for column in columns if column in row} for row in rows.rows]
    return Rows(name=rows.name, columns=tuple(columns), rows=kept)


def _in_memory(stream: RowStream) -> Rows:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for number, row in enumerate(stream.read(0)):
        if not isinstance(row, Mapping):
            raise DataError(f"Row {number} of {stream.name} must be an object with columns, got {show(row)}. Mend it.")
        columns.update(dict.fromkeys(map(str, row)))
        rows.append(row)
    if not rows:
        raise DataError(f"A dataset must have at least one row, {stream.name} has none. Check the file or the split.")
    return Rows(name=stream.name, columns=tuple(columns), rows=rows)


def _from_name(source: DatasetConfig, split: str | None, *, seed: int, evaluation: bool, lazily: bool) -> RowStream:
    name = source.path
    if name.startswith(PREFIX):
        items = generated_rows(name, source.kwargs, seed=seed, held_out=evaluation)
        return RowStream(name=name, read=lambda start: map(items.__getitem__, range(start, len(items))))
    if source.kwargs:
        raise DataError(
            f"dataset_kwargs are options of a generated task ({PREFIX}<task>), got {source.kwargs!r} with "
            f"dataset_name={name!r}. Remove them."
        )
    if split is None:
        raise DataError(
            f"Evaluation needs held-out rows and {name} names no split for them. Set dataset_test_split, pass "
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
    return _from_hub(name, source.name, split, lazily=lazily)


def _beside(path: Path) -> str:
    files = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, files)
    return f"Did you mean {str(path.parent / guess)!r}?" if guess else "Check the path."


def _from_file(path: Path, split: str) -> RowStream:
    if split != "train":
        raise DataError(
            f"A single file has only the split 'train', got {split!r} of {path}. Put the splits into a folder "
            "(train.jsonl, test.jsonl) and name the folder."
        )
    return RowStream(name=str(path), read=lambda start: read_file(path, start))


def _from_hub(name: str, subset: str | None, split: str, *, lazily: bool) -> RowStream:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split, **({"streaming": True} if lazily else {}))
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
    return _from_object(loaded, split, name=name if subset is None else f"{name} ({subset})")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _require_rows(dataset: object) -> None:
    if isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        raise DataError(
            f"A dataset must be a name, a datasets.Dataset or a list of dicts, got {type(dataset).__name__}."
        )


def _from_object(dataset: object, split: str | None, *, name: str | None = None) -> RowStream:
    """Rows of a list of dicts, a `datasets` object, or one split of a dictionary of them."""
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise DataError(f"The dataset must have the split {split!r}, it has {sorted(map(str, dataset))}. Name one.")
        return _from_object(dataset[split], split, name=name)
    _require_rows(dataset)
    label = name or f"the given {type(dataset).__name__}"
    if isinstance(dataset, Iterator):
        raise DataError(
            f"A dataset must be one that can be read again from its start, {label} is used up by reading. Pass a list "
            "of dicts, or datasets.IterableDataset.from_generator."
        )
    return RowStream(name=label, read=lambda start: _guarded(dataset, label, start))


def _guarded(dataset: Any, name: str, start: int) -> Iterator[Row]:
    """The rows from `start` on; `datasets` reads its files only now, and tells of damage by many kinds of errors."""
    if type(dataset).__module__.partition(".")[0] != "datasets":
        yield from itertools.islice(dataset, start, None)
        return
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    number = start
    try:
        # What is kept as JSON is not filled.
        columns = {name for name, kind in (dataset.features or {}).items() if "Json(" not in repr(kind)}
        for row in dataset.skip(start) if start else dataset:
            yield {**row, **without_filled_arguments({key: row[key] for key in columns & row.keys()})}
            number += 1
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException, DatasetGenerationError) as error:
        cause = _first_line(error.__cause__ or error)
        raise DataError(f"{name} must be readable, reading stopped before row {number}: {cause}. Check it.") from error
