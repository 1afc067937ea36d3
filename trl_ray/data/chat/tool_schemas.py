"""Checks the `tools` column: descriptions of functions that a model may call.

Their parameters are JSON schemas, or what people write as such (``float``, ``dict``, ``required: true``): templates
write them down as they are, and refuse what they cannot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trl_ray.data.json_text import parse_json
from trl_ray.data.validation import show
from trl_ray.errors import DataError

_OR_LEAVE_OUT = ", or call the column otherwise where it is none of tools: column_mapping={tools: functions}."
Tool = Mapping[str, Any]
"""``{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}``"""


def check_tools(value: object, *, where: str) -> tuple[Tool, ...]:
    """The tools of one row; None and blank text are none.

    JSON text is read, and keys that Arrow filled with None are left out.

    Raises:
        DataError: not a list of descriptions of functions with names.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} must be a list of tools or JSON text of one, column {error.colno} is broken: {error.msg}, "
                f"got {show(value)}. Mend the row."
            ) from error
    if isinstance(value, Mapping) and {"function", "name"} & set(value):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where} must be a list of tools, got {show(value)}. Wrap it in [ ]{_OR_LEAVE_OUT}")
    return tuple(_check_tool(without_none(tool), f"{where}, tool {i}") for i, tool in enumerate(value))


def read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object: JSON text (OpenAI's form) is read, None and blank text are no arguments.

    What is None inside the arguments was given as such and is kept; other keys that hold None are left out. Text that
    is not the JSON of an object stays text, for functions that take it.
    """
    if isinstance(call.get("function"), Mapping):
        rest = without_none({key: value for key, value in call.items() if key != "function"})
        return {**rest, "function": read_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            read = parse_json(arguments) if arguments.strip() else {}
        except json.JSONDecodeError:
            read = None
        arguments = read if isinstance(read, Mapping) else arguments
    rest = {key: without_none(value) for key, value in call.items() if value is not None and key != "arguments"}
    return {**rest, "arguments": {} if arguments is None else arguments}


def without_none(value: Any) -> Any:
    """The value without the keys, at any depth, that hold None: Arrow gives every row the keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


def _check_tool(tool: object, where: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise DataError(
            f"{where} must be an object that describes a function, got {show(tool)}. Mend the row{_OR_LEAVE_OUT}"
        )
    if "function" in tool and tool.get("type", "function") != "function":
        raise DataError(f"{where} must have the type 'function', got {tool['type']!r}. Mend the row.")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} must have a function with a name, got {show(function)}. Mend the row.")
    return tool
