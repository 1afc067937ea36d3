"""Gathers what is wrong with rows, so that all of it is told at once, or the rows are left out and counted.

for each row: with bad.guard(origin, place): ...  ─ DataError, ModelError ─► kind: rows, first message
bad.settle(total) ─┬─ stop ─► one error: every kind, with its first row
                   └─ drop ─► bad.places are left out, bad.report() says why
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trl_ray.config.sections import OnBadRow
from trl_ray.errors import DataError, InputError, ModelError

_SHOWN_ROWS = 10
_DROP = "Mend or remove such rows, or set on_bad_row=drop: then they are left out and counted."


@dataclass(slots=True, kw_only=True)
class _Kind:
    """Rows with which the same is wrong."""

    first: InputError
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Their numbers by dataset."""

    @property
    def count(self) -> int:
        return sum(map(len, self.rows.values()))


class BadRows:
    """The rows of one dataset, or of a window of a stream, that cannot be used; mutable, one for each pass."""

    def __init__(self, policy: OnBadRow) -> None:
        self._policy = policy
        self._kinds: dict[str, _Kind] = {}
        self.places: set[int] = set()
        """Places of the rows in the dataset or mixture."""

    @contextmanager
    def guard(self, *, name: str, number: int, place: int) -> Iterator[None]:
        """Note what is raised about a row and go on behind the block.

        Args:
            name: of the dataset that the row came from.
            number: of the row there.
            place: of the row in the dataset or mixture.
        """
        try:
            yield
        except (DataError, ModelError) as error:
            self.note(error, name=name, number=number, place=place)

    def note(self, error: InputError, *, name: str, number: int, place: int) -> None:
        """Note what is wrong with a row; see `guard`."""
        kind = self._kinds.setdefault(_kind_of(str(error)), _Kind(first=error))
        kind.rows.setdefault(name, []).append(number)
        self.places.add(place)

    def settle(self, *, total: int, may_be_all: bool = False) -> None:
        """See whether the rows may be left out.

        Args:
            total: rows, bad and good.
            may_be_all: they may even where there is no other row: a window of a stream has others behind it.

        Raises:
            DataError, ModelError: there are bad rows and they may not, or there is no other row; says what is wrong
                with all of them.
        """
        if not self.places or (self._policy is OnBadRow.DROP and (may_be_all or len(self.places) < total)):
            return
        kinds = list(self._kinds.values())
        error = ModelError if all(isinstance(kind.first, ModelError) for kind in kinds) else DataError
        if len(kinds) == 1 and (kinds[0].count == 1 or kinds[0].count == total):
            hint = f" {_DROP}" if self._policy is OnBadRow.STOP and kinds[0].count < total else ""
            raise error(f"{kinds[0].first}{hint}") from kinds[0].first
        raise error(f"{len(self.places)} of {total} rows cannot be used. {' '.join(self.report())} {_DROP}") from kinds[
            0
        ].first

    def report(self) -> tuple[str, ...]:
        """A sentence for each kind: how many rows, which, and what is wrong with the first."""
        return tuple(
            f"{kind.count} row{'s' * (kind.count != 1)} ({_numbers(kind.rows)}): {kind.first}"
            for kind in self._kinds.values()
        )


def _kind_of(message: str) -> str:
    """A message without what differs from row to row: numbers, what was given, quoted names other than of fields."""
    told = message.partition(", got ")[0]
    told = re.sub(r"(?<!field )(?<!fields )(?<!and )'[^']*'", "'...'", told)
    return re.sub(r"\d+", "#", told)


def _numbers(rows: dict[str, list[int]]) -> str:
    parts = []
    for name, numbers in rows.items():
        shown = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
        more = len(numbers) - _SHOWN_ROWS
        of = f" of {name}" if len(rows) > 1 else ""
        parts.append(shown + (f" and {more} more" if more > 0 else "") + of)
    return "; ".join(parts)
