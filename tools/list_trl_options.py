"""Writes docs/trl-options.md: every option of TRL and transformers, and what becomes of it.

    python tools/list_trl_options.py            needs TRL, of which it reads the classes

TRL's dataclasses --+--> honoured | accepted | refused, with a sentence --> docs/trl-options.md
our configurations -+
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import trl
from transformers import TrainingArguments
from trl.experimental.async_grpo import AsyncGRPOConfig as TRLAsyncGRPOConfig
from trl.experimental.cpo import CPOConfig as TRLCPOConfig
from trl.experimental.iw_opd import IWOPDConfig as TRLIWOPDConfig
from trl.experimental.orpo import ORPOConfig as TRLORPOConfig
from trl.experimental.sdpo import SDPOConfig as TRLSDPOConfig

from trl_ray.config.base import Section
from trl_ray.config.runs.dataset_config import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
)
from trl_ray.config.runs.distill_config import DistillConfig
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig, RLOOConfig
from trl_ray.config.runs.sdpo_config import SDPOConfig
from trl_ray.config.trl_options.foreign_option import ForeignOption, Standing
from trl_ray.config.trl_options.reading import entry_of

PAGE = Path(__file__).parents[1] / "docs" / "trl-options.md"
CLASSES: Mapping[str, tuple[type[Any], type[Section]]] = {
    "sft": (trl.SFTConfig, SFTConfig),
    "dpo": (trl.DPOConfig, DPOConfig),
    "kto": (trl.KTOConfig, KTOConfig),
    "cpo": (TRLCPOConfig, CPOConfig),
    "orpo": (TRLORPOConfig, ORPOConfig),
    "reward": (trl.RewardConfig, RewardModelConfig),
    "prm": (TrainingArguments, PRMConfig),
    "grpo": (trl.GRPOConfig, GRPOConfig),
    "rloo": (trl.RLOOConfig, RLOOConfig),
    "async-grpo": (TRLAsyncGRPOConfig, AsyncGRPOConfig),
    "sdpo": (TRLSDPOConfig, SDPOConfig),
    "distill": (trl.DistillationConfig, DistillConfig),
    "distill (IWOPDConfig)": (TRLIWOPDConfig, DistillConfig),
}
"""Of each pipeline TRL's class and ours; TRL 1.16 has no PRMConfig, so that `prm` is held to transformers' options."""
EVERYWHERE = (trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig)
"""TRL's scripts read them beside each of these."""


INTRODUCTION = (
    "Written by `tools/list_trl_options.py` from TRL 1.16's classes (with ModelConfig, ScriptArguments and",
    "DatasetMixtureConfig) and the tables in `trl_ray/config/trl_options/`. *honoured*: it does here what it does",
    "there, or is read into an option that does. *accepted*: whatever it says asks for what happens anyway, or for",
    "nothing that is trained. *accepted in part*: with the values listed; others are refused with what to do instead.",
    "*refused*: with none.",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What becomes of one option in one pipeline."""

    standing: Standing
    text: str


def names_of(theirs: type[Any]) -> Iterator[str]:
    """The options that TRL's command takes for a class."""
    yield from dict.fromkeys(each.name for kind in (theirs, *EVERYWHERE) for each in dataclasses.fields(kind))


def listed(name: str, own: type[Section]) -> Listed | None:
    """What becomes of it; None where no table says so."""
    if name in own.model_fields:
        return Listed(standing=Standing.HONOURED, text="")
    entry = entry_of(name, own.model_fields)
    return None if entry is None else Listed(standing=entry.standing, text=_text(entry))


def _text(entry: ForeignOption) -> str:
    if entry.becomes is not None:
        return f"read into `{entry.becomes}`"
    values = ", ".join(f"`{_word(value)}`" for value in (*entry.accepts, *(value for value, _ in entry.values)))
    return f"{f'{values}; otherwise: ' if values else ''}{entry.says}".replace("|", "\\|")


def _word(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value) or '""'


def page() -> str:
    """The whole page."""
    found = {
        (name, pipeline): listed(name, own) for pipeline, (theirs, own) in CLASSES.items() for name in names_of(theirs)
    }
    by_option: dict[str, dict[Listed, list[str]]] = {}
    for (name, pipeline), what in found.items():
        if what is not None:
            by_option.setdefault(name, {}).setdefault(what, []).append(pipeline)
    counts = Counter(what.standing for what in found.values() if what is not None)
    weakest = Counter(max((each.standing for each in ways), key=list(Standing).index) for ways in by_option.values())
    rows = [
        f"| `{name}` | {'all' if len(ways) == 1 and len(pipelines) == len(CLASSES) else ', '.join(pipelines)} "
        f"| {what.standing} | {what.text} |"
        for name, ways in sorted(by_option.items())
        for what, pipelines in ways.items()
    ]
    return "\n".join(
        [
            "# Options of TRL and what becomes of them",
            "",
            *INTRODUCTION,
            "",
            f"| | {' | '.join(Standing)} |",
            "|---|---|---|---|---|",
            f"| options, each by its weakest standing | {' | '.join(str(weakest[each]) for each in Standing)} |",
            f"| options of a pipeline | {' | '.join(str(counts[each]) for each in Standing)} |",
            "",
            "| option | in | | |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
