"""Reads messages that a table of text holds as text: JSON, or what Python and NumPy print.

    '[{"role": "user", ...}]'          JSON, encoded once or twice
    "[{'role': 'user', ...}]"          repr of a list: what pandas writes into CSV files        ─► [{role, ...}]
    "[{'role': ...}\\n {'role': ...}]"  repr of an array: the same of rows that came from Parquet

Text that only begins like this and goes on otherwise is text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from trl_ray.data.json_text import parse_json
from trl_ray.data.validation import show
from trl_ray.errors import DataError

_BEGINS = re.compile(r"\s*(?:array\()?\"?\s*\[?\s*\{")
_SPEAKS = re.compile(r"\\?[\"'](?:role|from)\\?[\"']\s*:\s*(?:None|null|\\?[\"']\w*\\?[\"'])")
_WRAPPERS = ("messages", "conversations")
_ARRAY = re.compile(r"\barray\((?P<list>\[.*?\])(?:, dtype=\w+)?\)", re.DOTALL)


def read_messages(value: Any, *, where: str) -> Any:
    """The messages that a text spells; any other value as it is.

    Raises:
        DataError: the text is a list of messages that is broken or cut off.
    """
    if not isinstance(value, str) or not (_BEGINS.match(value) and _SPEAKS.search(value)):
        return value
    found, problem = _parsed(value)
    if problem is not None:
        raise DataError(
            f"{where} must be a list of messages or text without roles, and this text is a list of messages that "
            f"cannot be read: {problem}, got {show(value)}. Write it as JSON, mend or remove the row, or set "
            "dataset_text_format=plain where it is meant as text."
        )
    return value if found is None else found


def read_list(value: Any) -> Any:
    """The list that a text spells, for columns that hold nothing but lists; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = _loaded(value)
    return found if isinstance(found, list) else value


def _parsed(value: str) -> tuple[list[Any] | None, str | None]:
    """The messages, or None where it is something else; and what is wrong with it where it is broken."""
    found = _loaded(value)
    if isinstance(found, str):
        return _parsed(found)
    if isinstance(found, Mapping):
        found = next((found[key] for key in _WRAPPERS if key in found), [found])
    if isinstance(found, (list, tuple)):
        spoken = found and all(isinstance(item, Mapping) and {"role", "from"} & set(item) for item in found)
        return (list(found) if spoken else None), None
    return None, _problem(value)


def _loaded(value: str) -> Any:
    """What JSON or Python says the text is; None where neither can say."""
    try:
        return parse_json(value)
    except json.JSONDecodeError:
        pass
    plain = _ARRAY.sub(lambda match: match["list"], value.strip())
    for text in (plain, re.sub(r"\}\s+\{", "}, {", plain)):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _problem(value: str) -> str | None:
    """What is wrong with it; None where a whole list is followed by something else, so that it is a text."""
    try:
        json.JSONDecoder().raw_decode(value.lstrip())
    except json.JSONDecodeError as error:
        return f"column {error.colno}: {error.msg}"
    except (ValueError, RecursionError):
        return "nested too deeply, or a number of too many digits"
    return None
