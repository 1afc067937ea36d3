"""Keywords of a library that are written as JSON, as a command line has them.

'{"top_p": 0.9}' --held_keywords--> {"top_p": 0.9}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def held_keywords(values: Any, option: str) -> Mapping[str, Any]:
    """What an option of a configuration holds before it is validated, also as JSON; nothing where it is no mapping.

    Raises:
        ValueError: it is a text that begins as a JSON object and is none.
    """
    held = values.get(option) if isinstance(values, Mapping) else None
    if isinstance(held, str) and held.lstrip().startswith("{"):
        held = _read_json(option, held)
    return held if isinstance(held, Mapping) else {}


def _read_json(option: str, held: str) -> Any:
    try:
        return json.loads(held)
    except ValueError as error:
        raise ValueError(f"{option} must be a mapping, or one written as JSON, got {held!r}: {error}.") from None
