"""Rows that Python gave in forms other than a list or a `datasets.Dataset`, as sequences of dicts.

pandas.DataFrame, torch Dataset --given_rows--> Sequence of dicts          held-out streams --read once--> list
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from trl_ray.config.runs.streamed_config import StreamedRunConfig
from trl_ray.errors import ConfigError


class IndexedRows(Sequence[Any]):
    """The items of what has a length and is asked by number, as PyTorch's datasets are.

    Args:
        given: answers `len` and numbers from 0 on.
    """

    def __init__(self, given: Any) -> None:
        self._given = given

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._given[number] for number in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._given[place % len(self)]


def given_rows(given: Any, *, evaluation: bool = False) -> Any:
    """The same rows in a form that can be read; what can be already, and what cannot, as it was given.

    Args:
        given: a dataset, or several by name.
        evaluation: held-out rows, of which a stream is read to its end.
    """
    if isinstance(given, Mapping):
        return _mapped(given, evaluation=evaluation)
    if all(hasattr(given, name) for name in ("iloc", "columns", "to_dict")):  # a table of pandas
        rows = given.to_dict("records")
        return [{key: None if value != value else value for key, value in row.items()} for row in map(_plain, rows)]
    if hasattr(given, "__getitem__") and isinstance(given, Sized) and not isinstance(given, Iterable):
        return IndexedRows(given)
    if evaluation and is_stream(given):
        return list(given)
    return given


def _mapped(given: Mapping[Any, Any], *, evaluation: bool) -> Mapping[Any, Any]:
    found = {name: given_rows(rows, evaluation=evaluation) for name, rows in given.items()}
    return given if all(found[name] is rows for name, rows in given.items()) else found


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Numbers of NumPy as numbers, so that comparing one with itself is a truth."""
    return {str(key): value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}


def is_stream(given: object) -> bool:
    """Whether it is read from its start as often as wanted, and does not say how long it is."""
    return isinstance(given, Iterable) and not isinstance(given, Sized) and not isinstance(given, Iterator)


def check_stream(config: StreamedRunConfig, given: object) -> None:
    """Check that rows which do not say how many they are may be read while training goes on.

    Raises:
        ConfigError: they may not.
    """
    if not config.dataset_streaming and isinstance(given, Iterable) and not isinstance(given, Sized):
        raise ConfigError(
            f"dataset_streaming must be true for a dataset that does not say how long it is, got false with a "
            f"{type(given).__name__}. Set dataset_streaming=true and max_steps, or pass a datasets.Dataset or a list."
        )
