"""What a chat template is told of one row, besides its messages.

columns: tools, chat_template_kwargs ─ row_format ─► ChatFormat of the row (its values go before the run's)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trl_ray.data.chat.chat_rendering import ChatFormat
from trl_ray.data.chat.tool_schemas import Tool, check_tools
from trl_ray.data.validation import show
from trl_ray.errors import DataError

TOOLS = "tools"
"""The column with descriptions of the functions that a conversation may call."""
TEMPLATE_VALUES = "chat_template_kwargs"
"""The column with values that the chat template reads."""
TOLD_COLUMNS = (TOOLS, TEMPLATE_VALUES)
"""Columns that chat templates are told of."""


def row_format(
    chat: ChatFormat, columns: Mapping[str, Any], *, where: str, tools: Sequence[Tool] | None = None
) -> ChatFormat:
    """The run's format with what a row adds to it; `tools` are those of the row where they were read already.

    Raises:
        DataError: `chat_template_kwargs` is no object, or `tools` are not descriptions of functions.
    """
    if tools is None:
        tools = check_tools(columns.get(TOOLS), where=f"{where}, field {TOOLS!r}")
    values = columns.get(TEMPLATE_VALUES)
    if values is not None and not isinstance(values, Mapping):
        raise DataError(
            f"{where}, field {TEMPLATE_VALUES!r}, must be an object with values for the chat template, got "
            f"{show(values)}. Mend or remove the column."
        )
    own = {key: value for key, value in (values or {}).items() if value is not None}
    return replace(chat, tools=list(tools) or None, template_kwargs={**chat.template_kwargs, **own})
