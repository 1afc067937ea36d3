"""What becomes of one option that is none of ours: the entry of a table, and how its value is read.

(name, value) --ForeignOption.read--> {"rollout.max_model_len": 4096} | {} accepted without effect | None refused
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

Reading = Mapping[str, Any]
"""Our options, by dotted name, with their values."""


class Standing(enum.StrEnum):
    """What becomes of an option."""

    HONOURED = "honoured"
    ACCEPTED = "accepted"
    """Whatever it says, it asks for what happens anyway, or for nothing that is trained."""
    PARTLY = "accepted in part"
    """With values that ask for what happens anyway; others are refused."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignOption:
    """One option in the pipelines that have what it needs."""

    says: str
    """Why it is accepted without effect, or what to do instead, as a sentence."""
    accepts: tuple[Any, ...] = ()
    """Values that ask for what happens anyway."""
    accepts_all: bool = False
    """Whether every value does."""
    becomes: str | None = None
    """The option of ours that takes the value as it is; None is left out."""
    values: tuple[tuple[Any, Reading], ...] = ()
    """Values that stand for options of ours."""
    reads: Callable[[Any, Mapping[str, Any]], Reading | None] | None = None
    """For what a table cannot say: from the value and all that was given to options of ours; None refuses it."""
    needs: tuple[str, ...] = ()
    """Options that a configuration must have for this entry to stand."""

    @property
    def standing(self) -> Standing:
        """In a word."""
        if self.becomes is not None or self.reads is not None or any(reading for _, reading in self.values):
            return Standing.HONOURED
        if self.accepts_all:
            return Standing.ACCEPTED
        return Standing.PARTLY if self.accepts or self.values else Standing.REFUSED

    def read(self, value: Any, given: Mapping[str, Any]) -> Reading | None:
        """What a value stands for; empty where it asks for what happens anyway, None where it cannot be done.

        Args:
            value: of the option.
            given: all that was written, by name.
        """
        if self.accepts_all or any(is_same(value, accepted) for accepted in self.accepts):
            return {}
        for each, reading in self.values:
            if is_same(value, each):
                return reading
        if self.reads is not None:
            return self.reads(value, given)
        if self.becomes is None:
            return None
        return {} if value is None else {self.becomes: value}


def is_same(value: Any, accepted: Any) -> bool:
    """Whether a written value is the one meant: 0 is not false, and 1 is 1.0."""
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    return bool(value == accepted)


def standing_for(entries: tuple[ForeignOption, ...], known: Container[str]) -> ForeignOption | None:
    """The entry that holds in a configuration, None where none does.

    Args:
        entries: of one name, the special ones first.
        known: options of the configuration.
    """
    return next((entry for entry in entries if all(option in known for option in entry.needs)), None)
