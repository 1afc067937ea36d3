"""Mends generation settings that came with a model and that transformers would refuse to save."""

from __future__ import annotations

from typing import Any, cast

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def mend_generation(model: object) -> None:
    """Let a model's generation settings be saved: many hold a temperature beside ``do_sample: false``.

    Sampling is what such settings describe, so that it is switched on; what is still invalid gives way to the special
    tokens alone. Nothing that is trained or sampled here depends on them.
    """
    settings: Any = getattr(model, "generation_config", None)  # classifiers have none
    if settings is None or _is_valid(settings):
        return
    settings.do_sample = True
    if not _is_valid(settings):
        kept = {name: getattr(settings, name, None) for name in _TOKENS}
        cast(Any, model).generation_config = type(settings)(**kept)


def _is_valid(settings: Any) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True
