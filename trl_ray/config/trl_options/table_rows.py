"""Short ways to write the rows of the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trl_ray.config.trl_options.foreign_option import ForeignOption, Reading

Rows = Mapping[str, tuple[ForeignOption, ...]]
"""By name; where a name has several entries, the first whose needs are met holds."""


def always(says: str, *needs: str) -> tuple[ForeignOption, ...]:
    """Whatever it says, it asks for what happens anyway, or for nothing that is trained."""
    return (ForeignOption(says=says, accepts_all=True, needs=needs),)


def only(*accepts: Any, says: str, needs: tuple[str, ...] = ()) -> tuple[ForeignOption, ...]:
    """These values ask for what happens anyway; about others, what to do instead."""
    return (ForeignOption(says=says, accepts=accepts, needs=needs),)


def never(says: str, *needs: str) -> tuple[ForeignOption, ...]:
    """No value can be honoured; what to do instead."""
    return (ForeignOption(says=says, needs=needs),)


def renamed(becomes: str, says: str = "", needs: tuple[str, ...] = ()) -> tuple[ForeignOption, ...]:
    """An option of ours under another name."""
    root, dot, _ = becomes.partition(".")
    return (ForeignOption(says=says or f"Set {becomes}.", becomes=becomes, needs=(*needs, *([root] if dot else []))),)


def by_value(
    values: Mapping[Any, Reading], *, says: str, needs: tuple[str, ...] = (), nothing: tuple[Any, ...] = ()
) -> tuple[ForeignOption, ...]:
    """Some values stand for options of ours, `nothing` for none; about others, what to do instead."""
    return (ForeignOption(says=says, accepts=nothing, values=tuple(values.items()), needs=needs),)


def read_by(
    reads: Callable[[Any, Mapping[str, Any]], Reading | None], *, says: str, needs: tuple[str, ...] = ()
) -> tuple[ForeignOption, ...]:
    """A function reads it."""
    return (ForeignOption(says=says, reads=reads, needs=needs),)
