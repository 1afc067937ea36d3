"""Reads JSON that others wrote, which may be broken in more ways than the library has an error for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(text: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says.

    Args:
        text: of a row, or of a model.
        pairs: makes an object of its keys and values; None makes a `dict`.

    Raises:
        json.JSONDecodeError: it is broken, nested too deeply, or has a number of too many digits.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise json.JSONDecodeError("a number of too many digits", text, 0) from None
        raise
