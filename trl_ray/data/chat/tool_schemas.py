"""Checks the `tools` column: descriptions of functions that a model may call, as JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.data.validation import show
from trl_ray.errors import DataError

Tool = Mapping[str, Any]
"""``{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}``"""

JSON_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


def check_tools(value: object, *, where: str) -> tuple[Tool, ...]:
    """The tools of one row; None and blank text are none.

    JSON text is read, and keys that Arrow filled with None are left out.

    Raises:
        DataError: not a list of function descriptions, a name twice, or parameters that are no JSON schema.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} must be a list of tools or JSON text of one, column {error.colno} is broken: {error.msg}, "
                f"got {show(value)}. Mend the row."
            ) from error
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where} must be a list of tools, got {show(value)}. Wrap it in [ ].")
    tools = tuple(_check_tool(without_none(tool), f"{where}, tool {i}") for i, tool in enumerate(value))
    names = [tool.get("function", tool)["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where} must name every tool once, got {name!r} {names.count(name)} times. Rename one.")
    return tools


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
            read = json.loads(arguments) if arguments.strip() else {}
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
        raise DataError(f"{where} must be an object that describes a function, got {show(tool)}. Mend the row.")
    if "function" in tool and tool.get("type", "function") != "function":
        raise DataError(f"{where} must have the type 'function', got {tool['type']!r}. Mend the row.")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} must have a function with a name, got {show(function)}. Mend the row.")
    if "parameters" in function:
        _check_schema(function["parameters"], f"{where} ({function['name']}), parameters")
    return tool


def _check_schema(schema: object, where: str) -> None:
    if isinstance(schema, bool):  # `true` admits everything: a schema by the standard
        return
    if not isinstance(schema, Mapping):
        raise DataError(f"{where} must be a JSON schema, got {show(schema)}. Mend the row.")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, (list, tuple)) else [kinds]:
        if kind not in JSON_TYPES:
            guess = nearest(kind, JSON_TYPES) if isinstance(kind, str) else None
            hint = f"Did you mean {guess!r}?" if guess else "Mend the row."
            raise DataError(f"{where} must have one of the types {', '.join(JSON_TYPES)}, got {kind!r}. {hint}")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise DataError(f"{where} must have an object as properties, got {show(properties)}. Mend the row.")
    for name, part in properties.items():
        _check_schema(part, f"{where}.{name}")
    if "items" in schema:
        _check_schema(schema["items"], f"{where}[]")
    required = schema.get("required", [])
    if not isinstance(required, (list, tuple)) or not all(isinstance(name, str) for name in required):
        raise DataError(f"{where} must have a list of names as required, got {show(required)}. Mend the row.")
    unknown = [name for name in required if properties and name not in properties]
    if unknown:
        raise DataError(f"{where} must describe the required {unknown[0]!r}; it has {', '.join(properties)}.")
