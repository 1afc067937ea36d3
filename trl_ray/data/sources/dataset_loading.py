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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trl_ray.config.messages import nearest
from trl_ray.config.sections import DataConfig, DatasetConfig, MixtureStopping
from trl_ray.data.sources.arrow_rows import without_filled_arguments
from trl_ray.data.sources.column_names import check_mapping, rename
from trl_ray.data.sources.dataset_files import FILE_TYPES, Row, is_data_file, read_file
from trl_ray.data.sources.generated import PREFIX, generated_rows
from trl_ray.data.sources.mixed_streams import drawn_rows, joined_rows
from trl_ray.data.sources.mixtures import Mixture, Share, Source, hold_out, join, mix
from trl_ray.data.sources.row_sequences import ChangedRows, RowSequence, array_key, combined_key, content_key
from trl_ray.data.sources.stored_rows import StoredRows, is_large, is_stored, stored_dataset, stored_file
from trl_ray.data.validation import show
from trl_ray.errors import DataError

_REMEMBERED_ORIGINS = 100_000
"""Rows of a mixture of streams of which it is known where they came from: more than a window has."""
_HELD_OUT = "test"
"""The split that is held out where none is named, as in TRL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a row of a mixture was taken from."""

    name: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A dataset, in memory or where it is stored: where it came from, its columns, its rows."""

    name: str
    columns: tuple[str, ...]
    """Of a mixture, the columns of any of its sources."""
    rows: Sequence[Row]
    sources: tuple[Rows, ...] = ()
    """What a mixture, or a part of a dataset, is made of."""
    mixture: Mixture | None = None
    start: int = 0
    """Of a window of a stream, the number of its first row."""
    origins: tuple[Origin, ...] = ()
    """Of a window of a mixture of streams, where each row came from."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the rows were chosen, a sentence each."""

    def origin(self, index: int) -> Origin:
        """The dataset that a row came from, and its number there."""
        if self.origins:
            return self.origins[index]
        if self.mixture is None:
            return Origin(name=self.name, number=self.start + index)
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
    stored: Callable[[], StoredRows] | None = None
    """The same rows where they are stored, by number; None where they are few, or are not stored."""
    parts: tuple[RowStream, ...] = ()
    """What a mixture is made of."""
    drawn: Mapping[int, Origin] = field(default_factory=dict)
    """Of a mixture, where the rows came from that were read last."""

    def origin(self, number: int) -> Origin:
        """The dataset that a row came from, and its number there; of a mixture, one of the rows that were read last."""
        return self.drawn.get(number, Origin(name=self.name, number=number))

    def sources(self) -> tuple[Rows, ...]:
        """The parts of a mixture, of each its first row alone: by its columns it is known how to read the others."""
        firsts = [(part, list(itertools.islice(part.read(0), 1))) for part in self.parts]
        return tuple(
            Rows(name=part.name, columns=tuple(map(str, rows[0])) if rows else (), rows=rows) for part, rows in firsts
        )


@dataclass(frozen=True, kw_only=True)
class _MixedRows(RowSequence):
    """The rows of a mixture by their place in it."""

    mixture: Mixture

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, place: Any) -> Any:
        return self.mixture[place].row

    def content_key(self) -> str | None:
        mixture = self.mixture
        places = np.stack([mixture.source_ids, mixture.row_numbers])
        keys = [content_key(source.rows) for source in mixture.sources]
        return combined_key(array_key(places), *(source.name for source in mixture.sources), *keys)


def load_rows(
    config: DataConfig,
    *,
    seed: int,
    dataset: object | None = None,
    evaluation: bool = False,
    in_memory: bool = True,
) -> Rows:
    """Read all rows of the training or the held-out split; with `test_split_size` the latter is a part of the former.

    `dataset` overrides `config.dataset_name` and `config.datasets`. `seed` only matters for generated tasks, and for
    the order in which a mixture draws from its datasets. Where they need not be `in_memory`, many rows stay in their
    file or in Arrow's memory map; they are quick to read in order only.

    Raises:
        DataError: there is no such dataset, split or task, it cannot be read, or it is empty.
    """
    size = config.test_split_size
    if dataset is None:
        return _load_named(config, seed=seed, evaluation=evaluation, test_split_size=size, in_memory=in_memory)
    if size is not None and not evaluation:
        raise DataError(
            f"test_split_size must be left out where rows are passed as an object, got {size:g}. Split them with "
            "Dataset.train_test_split, and pass the two parts as train_dataset and eval_dataset."
        )
    if not isinstance(dataset, Mapping) and not hasattr(dataset, "__len__"):
        _require_rows(dataset)
        raise DataError(
            f"A dataset must have a length, because a resumed run continues at a row number; the given "
            f"{type(dataset).__name__} is a stream. Take as many rows as you need: "
            "datasets.Dataset.from_list(list(stream.take(n)))."
        )
    return _alone(_open(config, seed=seed, dataset=dataset, evaluation=evaluation), config, in_memory=in_memory)


def _alone(stream: RowStream, config: DataConfig, *, in_memory: bool) -> Rows:
    """One dataset, its columns renamed."""
    rows = _whole(stream, in_memory=in_memory)
    check_mapping(config.column_mapping, rows.columns, name=rows.name)
    return _renamed(rows, config)


def _renamed(rows: Rows, config: DataConfig) -> Rows:
    mapping = config.column_mapping
    if not mapping:
        return rows
    named = _changed(
        rows,
        lambda index, row: rename(row, mapping, where=rows.where(index)),
        told=f"column_mapping {list(mapping.items())} of {rows.name}",
    )
    columns = dict.fromkeys(mapping.get(column, column) for column in rows.columns)
    return replace(rows, rows=named, columns=tuple(column for column in columns if column is not None))


def _changed(rows: Rows, change: Callable[[int, Row], Row], *, told: str) -> Sequence[Row]:
    """Rows in memory at once, others when they are read."""
    if isinstance(rows.rows, RowSequence):
        return ChangedRows(rows=rows.rows, change=change, told=told)
    return [change(index, row) for index, row in enumerate(rows.rows)]


def _load_named(
    config: DataConfig, *, seed: int, evaluation: bool, test_split_size: float | None, in_memory: bool
) -> Rows:
    if test_split_size is not None:
        whole = _load_named(config, seed=seed, evaluation=False, test_split_size=None, in_memory=in_memory)
        mixture = whole.mixture or join([Source(name=whole.name, rows=whole.rows)])
        part = hold_out(mixture, size=test_split_size, seed=seed)[evaluation]
        notes = () if evaluation else whole.notes  # said once
        parts = whole.sources or (whole,)
        return replace(whole, rows=_MixedRows(mixture=part), mixture=part, notes=notes, sources=parts)
    if config.datasets:
        return _load_mixture(config, seed=seed, evaluation=evaluation, in_memory=in_memory)
    return _alone(_open(config, seed=seed, evaluation=evaluation), config, in_memory=in_memory)


def open_rows(
    config: DataConfig, *, seed: int, dataset: object | None = None, evaluation: bool = False, lazily: bool = False
) -> RowStream:
    """One dataset, to be read from any row on; with `lazily`, hub datasets are not downloaded as a whole.

    Raises:
        DataError: there is no such dataset, split or task, it cannot be read, it is a mixture, or a part of it is to be
            held out.
    """
    if lazily and config.test_split_size is not None:
        raise DataError(
            f"test_split_size must be left out with dataset_streaming=true, got {config.test_split_size:g}: a stream "
            "does not say which rows are still to come. Name a split by dataset_test_split, or pass eval_dataset."
        )
    stream, mapping = (
        _open(config, seed=seed, dataset=dataset, evaluation=evaluation, lazily=lazily),
        config.column_mapping,
    )
    first = next(stream.read(0), None) if mapping and not stream.parts else None
    if not isinstance(first, Mapping):
        return stream
    check_mapping(mapping, tuple(first), name=stream.name)

    def read(start: int) -> Iterator[Row]:
        for number, row in enumerate(stream.read(start), start=start):
            yield rename(row, mapping, where=f"Row {number} of {stream.name}")

    return RowStream(name=stream.name, read=read)


def _open(
    config: DataConfig, *, seed: int, dataset: object | None = None, evaluation: bool = False, lazily: bool = False
) -> RowStream:
    split = config.dataset_test_split if evaluation else config.dataset_train_split
    if dataset is not None:
        return _from_object(dataset, split)
    if config.datasets:
        return _mixed_stream(config, seed=seed, evaluation=evaluation)
    if config.dataset_name is None:
        raise DataError("A run needs rows: set dataset_name or datasets, or pass train_dataset. None was given.")
    source = DatasetConfig(
        path=config.dataset_name,
        name=config.dataset_config,
        data_files=config.data_files,
        kwargs=config.dataset_kwargs,
    )
    return _from_name(source, split, seed=seed, evaluation=evaluation, lazily=lazily)


def _mixed_stream(config: DataConfig, *, seed: int, evaluation: bool) -> RowStream:
    """Several datasets that are read while they are used, mixed as `_load_mixture` mixes them."""
    _check_alone(config)
    counted = [source.path for source in config.datasets if source.fraction is not None or source.share is not None]
    if counted:
        raise DataError(
            f"fraction and share must be left out with dataset_streaming=true, got them for {', '.join(counted)}: a "
            "stream does not say how many rows it has. Set weight, or dataset_streaming=false."
        )
    split = config.dataset_test_split if evaluation else None
    parts = [
        _named_columns(
            _from_name(
                source,
                split if evaluation else source.split or config.dataset_train_split,
                seed=seed,
                evaluation=evaluation,
                lazily=True,
            ),
            source.columns,
            config,
        )
        for source in config.datasets
    ]
    names = [part.name for part in parts]
    parts = [
        part if names.count(part.name) == 1 else replace(part, name=f"{part.name} (datasets, entry {number})")
        for number, part in enumerate(parts)
    ]
    weights = [source.weight for source in config.datasets]
    drawn: dict[int, Origin] = {}

    def read(start: int) -> Iterator[Row]:
        reads = [part.read for part in parts]
        if config.mixture_stopping is None and all(weight is None for weight in weights):
            rows = joined_rows(reads)
        else:
            stopping = config.mixture_stopping or MixtureStopping.FIRST_EXHAUSTED
            shares = [1.0 if weight is None else weight for weight in weights]
            rows = drawn_rows(reads, [part.name for part in parts], weights=shares, seed=seed, stopping=stopping)
        for place, each in enumerate(rows):
            if place >= start:
                drawn[place] = Origin(name=parts[each.source].name, number=each.number)
                drawn.pop(place - _REMEMBERED_ORIGINS, None)
                yield each.row

    return RowStream(name=" + ".join(part.name for part in parts), read=read, parts=tuple(parts), drawn=drawn)


def _named_columns(stream: RowStream, columns: Sequence[str] | None, config: DataConfig) -> RowStream:
    """A part of a mixture with the columns that it keeps, under the names that they have here."""
    if columns is None and not config.column_mapping:
        return stream

    def read(start: int) -> Iterator[Row]:
        for number, row in enumerate(stream.read(start), start=start):
            if columns is not None and isinstance(row, Mapping):
                if missing := [column for column in columns if column not in row]:
                    raise DataError(
                        f"Row {number} of {stream.name} must have the column {missing[0]!r}, which datasets.columns "
                        f"keeps; its columns are {', '.join(map(str, row))}. Name others."
                    )
                row = {column: row[column] for column in columns}
            yield rename(row, config.column_mapping, where=f"Row {number} of {stream.name}")

    return RowStream(name=stream.name, read=read)


def _check_alone(config: DataConfig) -> None:
    if config.dataset_name is not None:
        raise DataError(
            f"dataset_name must be left out where datasets are named, got {config.dataset_name!r}. Add it to datasets, "
            "or remove one of the two."
        )


def _load_mixture(config: DataConfig, *, seed: int, evaluation: bool, in_memory: bool) -> Rows:
    _check_alone(config)
    parts = []
    for source in config.datasets:
        # What is trained on is not held out: evaluation has a split of its own.
        split = config.dataset_test_split if evaluation else source.split or config.dataset_train_split
        stream = _from_name(source, split, seed=seed, evaluation=evaluation, lazily=False)
        parts.append(_with_columns(_whole(stream, in_memory=in_memory), source.columns))
    everywhere = dict.fromkeys(column for part in parts for column in part.columns)
    check_mapping(config.column_mapping, tuple(everywhere), name=" + ".join(part.name for part in parts))
    parts = [_renamed(part, config) for part in parts]
    names = [part.name for part in parts]
    parts = [
        part if names.count(part.name) == 1 else replace(part, name=f"{part.name} (datasets, entry {number})")
        for number, part in enumerate(parts)
    ]
    mixture = _mixed(parts, config, seed=seed, evaluation=evaluation)
    return Rows(
        name=" + ".join(part.name for part in parts),
        columns=tuple(dict.fromkeys(column for part in parts for column in part.columns)),
        rows=_MixedRows(mixture=mixture),
        sources=tuple(parts),
        mixture=mixture,
        notes=tuple(
            f"{count} of {len(part.rows)} rows of {part.name} are in no place of the mixture ({_reason(config)})."
            for part in parts
            if (count := mixture.unused().get(part.name, 0))
        ),
    )


def _mixed(parts: Sequence[Rows], config: DataConfig, *, seed: int, evaluation: bool) -> Mixture:
    """Joined whole, unless shares are asked for."""
    fractions = [source.fraction for source in config.datasets if source.fraction is not None]
    weights = [source.weight for source in config.datasets]
    sources = [
        Source(name=part.name, rows=part.rows, weight=1.0 if weight is None else weight)
        for part, weight in zip(parts, weights, strict=True)
    ]
    shares = [None if each.share is None else Share(size=each.share, seed=each.share_seed) for each in config.datasets]
    if any(share is not None for share in shares) and not evaluation:
        return join(sources, shares=shares)
    if config.mixture_stopping is None and all(weight is None for weight in weights):
        return join(sources, fractions=fractions or None)
    return mix(sources, seed=seed, stopping=config.mixture_stopping or MixtureStopping.FIRST_EXHAUSTED)


def _reason(config: DataConfig) -> str:
    if any(source.fraction is not None for source in config.datasets):
        return "fraction"
    if any(source.share is not None for source in config.datasets):
        return "share"
    stopping = config.mixture_stopping or MixtureStopping.FIRST_EXHAUSTED
    return f"weight and mixture_stopping={stopping}; all_exhausted_without_replacement takes every row once"


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
    kept = _changed(
        rows,
        lambda _, row: {column: row[column] for column in columns if column in row},
        told=f"columns {list(columns)}",
    )
    return Rows(name=rows.name, columns=tuple(columns), rows=kept)


def _whole(stream: RowStream, *, in_memory: bool) -> Rows:
    if stream.stored is not None and not in_memory:
        stored = stream.stored()
        if len(stored.rows):
            return Rows(name=stream.name, columns=stored.columns, rows=stored.rows)
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
        if Path(name).is_file():
            raise DataError(
                f"Evaluation needs held-out rows and {name} names no split for them. Set dataset_test_split with a "
                "folder, or test_split_size to hold out a part of the file, pass eval_dataset, or set eval_steps to 0."
            )
        split = _HELD_OUT
    if source.data_files is not None or source.data_dir is not None:
        return _from_hub(source, split, lazily=lazily)
    path = Path(name)
    if path.is_file():
        return _from_file(path, split)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        from datasets import load_from_disk

        return _from_object(load_from_disk(name), split, name=name)
    if is_data_file(path):
        raise DataError(f"dataset_name must be a file that exists, got {name!r}: no such file. {_beside(path)}")
    return _from_hub(source, split, lazily=lazily)


def _beside(path: Path) -> str:
    if {"*", "?", "["} & set(str(path)):
        return f"Name several files by their kind: dataset_name=json (or csv, parquet) with data_files={str(path)!r}."
    files = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, files)
    return f"Did you mean {str(path.parent / guess)!r}?" if guess else "Check the path."


def _from_file(path: Path, split: str) -> RowStream:
    if split != "train":
        raise DataError(
            f"A single file has only the split 'train', got {split!r} of {path}. Put the splits into a folder "
            "(train.jsonl, test.jsonl) and name the folder."
        )
    stored = partial(stored_file, path) if is_large(path) else None
    return RowStream(name=str(path), read=lambda start: read_file(path, start), stored=stored)


def _from_hub(source: DatasetConfig, split: str, *, lazily: bool) -> RowStream:
    import datasets

    name, subset = source.path, source.name
    chosen = {"data_dir": source.data_dir, "data_files": source.data_files, "streaming": lazily or None}
    options = {key: value for key, value in chosen.items() if value is not None}
    try:
        loaded = datasets.load_dataset(name, subset, split=split, **options)
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
    parts = (subset, source.data_dir, source.data_files)
    told = ", ".join(str(part) for part in parts if part is not None)
    return _from_object(loaded, split, name=f"{name} ({told})" if told else name)


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
            option = "Set test_split_size, or name one: dataset_test_split." if split == _HELD_OUT else "Name one."
            raise DataError(f"The dataset must have the split {split!r}, it has {sorted(map(str, dataset))}. {option}")
        return _from_object(dataset[split], split, name=name)
    _require_rows(dataset)
    label = name or ("the rows" if isinstance(dataset, RowSequence) else f"the given {type(dataset).__name__}")
    if isinstance(dataset, Iterator):
        raise DataError(
            f"A dataset must be one that can be read again from its start, {label} is used up by reading. Pass a list "
            "of dicts, or datasets.IterableDataset.from_generator."
        )
    stored = partial(stored_dataset, dataset, name=label) if is_stored(dataset) else None
    return RowStream(name=label, read=lambda start: _guarded(dataset, label, start), stored=stored)


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
