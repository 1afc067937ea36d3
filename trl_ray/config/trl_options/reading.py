"""Reads options that are none of ours into those that are, before a configuration is validated.

written values --read_foreign--> values in our names, and what cannot be done still under its own (validation finds it)
an option that is none --why_not--> what to do instead
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

from trl_ray.config.trl_options.dataset_entries_table import ENTRIES
from trl_ray.config.trl_options.foreign_option import ForeignOption, Reading, standing_for
from trl_ray.config.trl_options.frameworks_table import OPEN_R1, OPENRLHF, PRIME_RL, VERL
from trl_ray.config.trl_options.neighbours_table import AXOLOTL, FACTORY, HANDBOOK
from trl_ray.config.trl_options.table_rows import Rows
from trl_ray.config.trl_options.trainer_table import ENGINES, TEACHERS, TRAINERS
from trl_ray.config.trl_options.training_table import TRAINING

_TABLES: tuple[Rows, ...] = (
    *(TRAINING, TRAINERS, ENGINES, TEACHERS),
    *(FACTORY, AXOLOTL, HANDBOOK, ENTRIES),
    *(OPEN_R1, OPENRLHF, VERL, PRIME_RL),
)
_ENTRY = re.compile(r"\.\d+\.")
_BLOCKS = ("trl",)
"""Sections of axolotl's that hold options of the run."""
ABSENT = object()
"""Stands for a value that was not given."""


def names() -> frozenset[str]:
    """Every option that some table has."""
    return frozenset(name for table in _TABLES for name in table)


def is_known(name: str) -> bool:
    """Whether some table has an option of this name."""
    return any(name in table for table in _TABLES)


def entry_of(name: str, known: Container[str]) -> ForeignOption | None:
    """What holds for an option that is none of a configuration's; None where no table knows it.

    Args:
        name: of the option.
        known: options of the configuration.
    """
    written = _ENTRY.sub(".", name)
    entries = tuple(entry for table in _TABLES for entry in table.get(written, ()))
    found = standing_for(entries, known)
    if found is not None and found.becomes is not None and found.becomes not in known and "." not in found.becomes:
        # Another name of an option that is none of ours either.
        return entry_of(found.becomes, known)
    return found


def read_foreign(values: Mapping[str, Any], known: Container[str], *, of: str = "") -> dict[str, Any]:
    """The same options in our names.

    Args:
        values: as they were written.
        known: options of the configuration.
        of: the option that holds them, with a dot, where it is one that tables have rows for.

    Returns:
        What validation gets: options that ask for what happens anyway are gone, those that cannot be done, or that
        another option contradicts, stand where they stood.
    """
    values = _flat(values, known)
    read = {name: value for name, value in values.items() if name in known}
    for name, value in values.items():
        if name in known:
            continue
        reading = _reading(f"{of}{name}", value, values, known)
        if reading is None or _contradicted(reading, read):
            read[name] = value
            continue
        for path, item in reading.items():
            _put(read, path, item)
    return read


def _flat(values: Mapping[str, Any], known: Container[str]) -> Mapping[str, Any]:
    """What stands in a section of options of the run, beside the others; what is given twice stays where it is."""
    for name in _BLOCKS:
        block = values.get(name)
        if name not in known and isinstance(block, Mapping) and not set(block) & set(values):
            values = {**{key: value for key, value in values.items() if key != name}, **block}
    return values


def why_not(name: str, value: Any, known: Container[str], given: Mapping[str, Any]) -> str | None:
    """What to do instead, as a sentence; None where no table knows the option.

    Args:
        name: of an option that validation found unknown.
        value: that it was given, or `ABSENT`.
        known: options of the configuration.
        given: all that was written beside it.
    """
    entry = entry_of(name, known)
    if entry is None:
        return None
    reading = None if value is ABSENT else entry.read(value, given)
    if reading and all(path.partition(".")[0] in known for path in reading):
        # It could have been read, so another option was in the way.
        return f"Another option says it otherwise: {', '.join(reading)}. Remove one of the two."
    return entry.says


def _reading(name: str, value: Any, values: Mapping[str, Any], known: Container[str]) -> Reading | None:
    entry = entry_of(name, known)
    reading = None if entry is None else entry.read(value, values)
    if reading is None or any(path.partition(".")[0] not in known for path in reading):
        return None
    return reading


def _contradicted(reading: Reading, read: Mapping[str, Any]) -> bool:
    # Who leaves a value empty, says nothing.
    return any(found not in (ABSENT, None) and found != reading[path] for path, found in _found(reading, read))


def _found(reading: Reading, read: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path in reading:
        node: Any = read
        for part in path.split("."):
            node = _part(node, part)
        yield path, node


def _part(node: Any, name: str) -> Any:
    if isinstance(node, Mapping):
        return node.get(name, ABSENT)
    # Of a section that was built in Python, only what was written counts.
    return getattr(node, name) if name in getattr(node, "model_fields_set", ()) else ABSENT


def _put(read: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = read
    for depth, parent in enumerate(parents):
        child = node.get(parent, {})
        if not isinstance(child, Mapping):
            rest = ".".join([*parents[depth + 1 :], last])
            nested: dict[str, Any] = {}
            _put(nested, rest, value)
            node[parent] = child.replace(**nested)
            return
        node[parent] = dict(child)
        node = node[parent]
    node[last] = value
