"""Fills templates of a configuration with texts of data, none of which is read as a template itself.

"{prompt}{feedback}!" + {"prompt": "{feedback}", ...} --> "{feedback}...!"
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIELD = re.compile(r"\{\{|\}\}|\{(?P<name>[A-Za-z_]\w*)\}|(?P<stray>[{}][^{}]*\}?)")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each ``{name}`` replaced by its value, and each doubled brace by one, in one pass.

    Raises:
        ValueError: a field of another name, with an attribute, an index or a format, or a single brace.
    """

    def replaced(match: re.Match[str]) -> str:
        if match["stray"] is not None:
            raise ValueError(f"{match['stray']!r} is no field")
        name = match["name"]
        if name is None:
            return match[0][0]
        if name not in values:
            raise ValueError(f"{name!r}")
        return values[name]

    return _FIELD.sub(replaced, template)
