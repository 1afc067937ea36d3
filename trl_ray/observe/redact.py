"""Takes secrets out of options before they leave the machine or enter a file that people pass around.

{"hub": {"hf_token": "hf_x"}, "url": "https://me:pw@host"} -> {"hub": {"hf_token": "[removed]"}, "url": "https://[removed]@host"}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REMOVED = "[removed]"
_SECRET_WORDS = frozenset(
    {
        "apikey",
        "auth",
        "authorization",
        "cookie",
        "credential",
        "credentials",
        "key",
        "passphrase",
        "passwd",
        "password",
        "pat",
        "secret",
        "secrets",
        "token",
    }
)
_KNOWN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST_ENVIRONMENT_SECRET = 8


def redact(options: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy whose secrets read ``[removed]``.

    Removed are text values under names such as ``api_key`` or ``hf_token``, text in the shape of a known kind of
    token, users in URLs, and the values of environment variables with such names.
    """
    held = [value for name, value in os.environ.items() if _is_secret_name(name)]
    held = [value for value in held if len(value) >= _SHORTEST_ENVIRONMENT_SECRET]
    longest_first = sorted(held, key=len, reverse=True)
    return {str(name): _redact(str(name), value, longest_first) for name, value in options.items()}


def _redact(name: str, value: Any, held: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _redact(str(key), item, held) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(name, item, held) for item in value]
    if isinstance(value, str) and value:
        return REMOVED if _is_secret_name(name) else _redact_text(value, held)
    return value


def _redact_text(text: str, held: list[str]) -> str:
    for secret in held:
        text = text.replace(secret, REMOVED)
    return _USER_IN_URL.sub(REMOVED, _KNOWN_SHAPES.sub(REMOVED, text))


def _is_secret_name(name: str) -> bool:
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))
