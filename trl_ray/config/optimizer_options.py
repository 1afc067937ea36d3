"""The optimizers by transformers' names, and what is written of them: ``optim`` and ``optim_args``."""

from __future__ import annotations

import enum
from typing import Any


class Optim(enum.StrEnum):
    """The optimizers, by transformers' names; `muon` is torch's."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    ADAFACTOR = "adafactor"
    SGD = "sgd"
    ADAGRAD = "adagrad"
    RMSPROP = "rmsprop"
    MUON = "muon"
    """Muon for the matrices of the layers, AdamW for embeddings, head, biases and norms."""
    ADAMW_8BIT = "adamw_8bit"
    ADAMW_BNB_8BIT = "adamw_bnb_8bit"
    PAGED_ADAMW_32BIT = "paged_adamw_32bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    ADEMAMIX = "ademamix"
    ADEMAMIX_8BIT = "ademamix_8bit"
    PAGED_ADEMAMIX_32BIT = "paged_ademamix_32bit"
    PAGED_ADEMAMIX_8BIT = "paged_ademamix_8bit"
    LION_32BIT = "lion_32bit"
    LION_8BIT = "lion_8bit"
    PAGED_LION_32BIT = "paged_lion_32bit"
    PAGED_LION_8BIT = "paged_lion_8bit"
    RMSPROP_BNB = "rmsprop_bnb"
    RMSPROP_BNB_32BIT = "rmsprop_bnb_32bit"
    RMSPROP_BNB_8BIT = "rmsprop_bnb_8bit"

    @property
    def is_adamw(self) -> bool:
        """Whether it is torch's AdamW."""
        return self in (Optim.ADAMW_TORCH, Optim.ADAMW_TORCH_FUSED)

    @property
    def is_of_bitsandbytes(self) -> bool:
        """Whether the library bitsandbytes has it."""
        return any(part in self.value for part in ("bit", "bnb", "paged", "ademamix"))

    @property
    def needs_whole_matrices(self) -> bool:
        """Whether an update of one number depends on where in its matrix it stands, so that no flat shard will do."""
        return self in (Optim.ADAFACTOR, Optim.MUON)


_OPTIM_REFUSED = {
    "galore": "it projects the gradients of chosen layers. Train an adapter (use_peft), or take adamw_8bit.",
    "apollo": "it projects the gradients of chosen layers. Train an adapter (use_peft), or take adamw_8bit.",
    "adalomo": "it updates weights in the backward pass, before gradients are summed over ranks. Take adafactor.",
    "lomo": "it updates weights in the backward pass, before gradients are summed over ranks. Take adafactor.",
    "schedule_free": "its weights differ between training and sampling. Take adamw_torch_fused with "
    "lr_scheduler_type=constant_with_warmup.",
    "adamw_torch_": "it is of another library or device. Take adamw_torch_fused, or adamw_8bit.",
    "adamw_anyprecision": "it is of another library. Take adamw_torch_fused, or adamw_8bit.",
    "grokadamw": "it is of another library. Take adamw_torch_fused.",
    "stable_adamw": "it is of another library. Take adamw_torch_fused.",
}
"""By how transformers' names begin: why it is not here, and what to take."""


def read_optim(value: Any) -> Any:
    """Say of an optimizer of transformers' that is not here why."""
    name = value.value if isinstance(value, enum.Enum) else value
    if not isinstance(name, str) or name in set(Optim):
        return value
    for start, why in _OPTIM_REFUSED.items():
        if name.startswith(start):
            raise ValueError(f"must be an optimizer that can be had here, got {name!r}: {why}")
    return value


def read_optim_args(value: Any) -> Any:
    """TRL's text ``name=value,name=value`` as a mapping, its values as numbers, true and false where they are such."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.replace(" ", "").split(",") if pair]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise ValueError(f"must be written name=value,name=value, got {value!r}: {wrong[0]!r} has no value. Give it.")
    return {name: _read_value(text) for name, _, text in pairs}


def _read_value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
