"""Checks every row before anything starts, and names the row, the field, the value and the remedy.

columns -- require_column --> check_prompt, check_message per row --> text, messages;  plain_columns --> JSON values
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from trl_ray.config.messages import nearest
from trl_ray.config.sections import ROLES
from trl_ray.errors import DataError
from trl_ray.types import Message

TEXT_PART = "text"
_SHOWN_ROWS = 10


def require_column(columns: Sequence[str], column: str, *, name: str, aliases: Sequence[str] = ()) -> None:
    """Check that the prompt column exists; `aliases` are other names of it, the likeliest first.

    Raises:
        DataError: lists the columns there are and offers the nearest.
    """
    if column in columns:
        return
    guess = next((alias for alias in aliases if alias in columns), None) or nearest(column, columns)
    fix = f"Did you mean dataset_prompt_column={guess}?" if guess else "Set dataset_prompt_column to one of them."
    raise DataError(f"{name} must have the prompt column {column!r}; its columns are {', '.join(columns)}. {fix}")


def check_prompt(value: object, *, where: str) -> str:
    """A prompt that is no list of messages.

    Raises:
        DataError: None, empty, or of another type.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} must be text or a list of messages, got {show(value)}. Mend or remove the row.")
    if not value.strip():
        raise DataError(f"{where} must not be empty, got {value!r}. Fill it or remove the row.")
    return check_unicode(value, where)


def check_message(message: object, where: str, *, roles: Collection[str] = ROLES) -> Message:
    """One message with a known role and text, without the keys that Arrow filled with None.

    Content in parts of text is joined to one text, as templates do that know parts.

    Raises:
        DataError: not an object, no role or content, an unknown role, content that is no text.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be an object with role and content, got {show(message)}.")
    # Arrow fills the keys that other rows have with None.
    clean = {str(key): value for key, value in message.items() if value is not None or key in ("role", "content")}
    for key in ("role", "content"):
        if key not in clean:
            raise DataError(f"{where} must have the key {key!r}, it has {', '.join(clean) or 'none'}. Mend the row.")
    role, content = clean["role"], clean["content"]
    if role not in roles:
        guess = nearest(role, roles) if isinstance(role, str) else None
        hint = f"Did you mean {guess!r}? " if guess else ""
        raise DataError(
            f"{where} must have one of the roles {', '.join(roles)}, got {role!r}. {hint}Mend the row, or say what it "
            f"stands for: role_mapping={{{role}: {guess or 'user'}}}."
        )
    if content is None and clean.get("tool_calls"):
        return clean
    if isinstance(content, (list, tuple)) and content and all(isinstance(part, Mapping) for part in content):
        content = clean["content"] = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} must have text as content, got {show(content)}. Mend or remove the row.")
    check_unicode(content, where)
    return clean


def _part(part: Mapping[str, Any], where: str) -> str:
    kind, text = part.get("type", TEXT_PART), part.get("text")
    if kind == TEXT_PART and isinstance(text, str):
        return text
    raise DataError(
        f"{where} must have parts of text alone, as this run trains on text, got one of type {kind!r}: {show(part)}. "
        "Remove the row, or the part where it says nothing."
    )


MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns that hold what no text can."""


def check_no_media(row: Mapping[str, Any], *, where: str) -> None:
    """Check that a row shows nothing but text; columns that are None, or empty, show nothing.

    Raises:
        DataError: names the column.
    """
    for column in MEDIA:
        value = row.get(column)
        if value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and not value):
            continue
        if isinstance(value, (list, tuple)) and all(item is None for item in value):
            continue
        raise DataError(
            f"{where}, field {column!r} must be empty, because this run trains on text and would leave it out without "
            f"a word, got {show(value)}. Take a text dataset, or remove the column: column_mapping={{{column}: null}}."
        )


def check_unicode(text: str, where: str) -> str:
    """The text itself.

    Raises:
        DataError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise DataError(
            f"{where} must be valid Unicode, character {error.start} is {text[error.start]!r}. Mend or remove the row."
        ) from error
    return text


def check_kind(prompt: str | tuple[Message, ...], first: str | tuple[Message, ...], *, where: str) -> None:
    """Check that text and conversations are not mixed: reward functions get one form or the other.

    Raises:
        DataError: this prompt is of another kind than the first row's.
    """
    if isinstance(prompt, str) != isinstance(first, str):
        names = ("text", "a list of messages")
        got, want = names[not isinstance(prompt, str)], names[not isinstance(first, str)]
        raise DataError(f"{where} must be {want} as in the first row, got {got}. Use one form for all rows.")


def check_length(length: int, limit: int | None, *, where: str, longer: int = 1) -> None:
    """Check that prompt and completion fit into the model.

    Raises:
        DataError: names the row, its tokens, the limit, and how many rows are too long.
    """
    if limit is not None and length > limit:
        raise DataError(
            f"{where} must have at most {limit} tokens so that max_completion_length more fit into the model, it has "
            f"{length} ({longer} of all rows are too long). Shorten or remove such rows, lower "
            "max_completion_length, or raise rollout.max_model_len as far as the model allows."
        )


def plain_columns(row: Mapping[str, Any], prompt_column: str, *, where: str) -> dict[str, Any]:
    """The other columns as JSON values, which is what reward functions receive.

    Raises:
        DataError: a value such as an image or bytes that has no JSON form.
    """
    return {str(key): _plain(value, f"{where}, field {key!r}") for key, value in row.items() if key != prompt_column}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist(), where)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise DataError(
        f"{where} must be text, a number, a list or an object, got {show(value)}. Remove or convert the column."
    )


def show(value: object) -> str:
    """A value as a message quotes it: short, with its type where that is not plain from the looks."""
    if value is None or isinstance(value, (list, dict, tuple)):
        return repr(value)[:80]
    return f"{type(value).__name__} {repr(value)[:80]}"


def show_rows(numbers: Sequence[int]) -> str:
    """Rows as a message names them; of many, the first ones and how many more there are."""
    shown = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
    more = len(numbers) - _SHOWN_ROWS
    return f"row{'s' * (len(numbers) != 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def count_longer(lengths: Sequence[int], limit: int) -> int:
    """How many rows have more than `limit` tokens."""
    return sum(length > limit for length in lengths)
