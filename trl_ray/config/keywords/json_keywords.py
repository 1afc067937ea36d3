"""Keywords of a library that are written as JSON, as a command line has them.

'{"top_p": 0.9}' --read_json--> {"top_p": 0.9}
"""

from __future__ import annotations

import json
from typing import Any


def read_json(option: str, held: Any) -> Any:
    """What a text that begins as a JSON object holds; anything else as it is.

    Raises:
        ValueError: the text is no JSON.
    """
    if not isinstance(held, str) or not held.lstrip().startswith("{"):
        return held
    try:
        return json.loads(held)
    except ValueError as error:
        raise ValueError(f"{option} must be a mapping, or one written as JSON, got {held!r}: {error}.") from None
