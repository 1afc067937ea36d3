"""The options of all pipelines are TRL's, with TRL's defaults but for those that README.md lists with a reason."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

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

pytestmark = pytest.mark.parity

README = Path(__file__).parents[2] / "README.md"
# TRL's class, where it is (loaded by the tests, because TRL loads vLLM with it), and ours.
OURS: dict[str, tuple[str, type[Section]]] = {
    "SFTConfig": ("trl", SFTConfig),
    "DPOConfig": ("trl", DPOConfig),
    "KTOConfig": ("trl", KTOConfig),
    "RewardConfig": ("trl", RewardModelConfig),
    "GRPOConfig": ("trl", GRPOConfig),
    "RLOOConfig": ("trl", RLOOConfig),
    "DistillationConfig": ("trl", DistillConfig),
    "AsyncGRPOConfig": ("trl.experimental.async_grpo", AsyncGRPOConfig),
    "SDPOConfig": ("trl.experimental.sdpo", SDPOConfig),
    "IWOPDConfig": ("trl.experimental.iw_opd", DistillConfig),
    "CPOConfig": ("trl.experimental.cpo", CPOConfig),
    "ORPOConfig": ("trl.experimental.orpo", ORPOConfig),
    "ModelConfig": ("trl", SFTConfig),
    "ScriptArguments": ("trl", SFTConfig),
    # TRL 1.16 has no PRMConfig any more.
    "_BaseConfig": ("trl.trainer.base_config", PRMConfig),
}
SAME_IN_OTHER_WORDS: dict[str, tuple[Any, Any]] = {
    "eval_steps": (0, None),
    "report_to": ([], "none"),
    "min_p": (0.0, None),
    **dict.fromkeys(
        (
            "lr_scheduler_kwargs",
            "optim_args",
            "model_init_kwargs",
            "generation_kwargs",
            "chat_template_kwargs",
            "dataset_kwargs",
        ),
        ({}, None),
    ),
}
"""What stands here for TRL's value, and means the same."""


def defaults_of(theirs: str) -> dict[str, Any]:
    """Of one of TRL's classes, as it is declared."""
    config = getattr(importlib.import_module(OURS[theirs][0]), theirs)
    return {
        each.name: each.default if each.default is not dataclasses.MISSING else each.default_factory()  # type: ignore[misc]
        for each in dataclasses.fields(config)
        if each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
    }


def own_defaults(config: type[Section]) -> dict[str, Any]:
    """Of one of our configurations."""
    defaults = {name: each.get_default(call_default_factory=True) for name, each in config.model_fields.items()}
    return {name: _plain(value) for name, value in defaults.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def differences(theirs: str) -> dict[str, tuple[Any, Any]]:
    """Option, our default and TRL's, where they differ and mean something else."""
    expected, own = defaults_of(theirs), own_defaults(OURS[theirs][1])
    return {
        name: (own[name], value)
        for name, value in expected.items()
        if name in own and own[name] != value and SAME_IN_OTHER_WORDS.get(name) != (own[name], value)
    }


def listed() -> dict[str, dict[str, tuple[Any, Any]]]:
    """What the table of README.md says, by TRL's class."""
    text = README.read_text(encoding="utf-8")
    section = text.partition("### Defaults that are not TRL's")[2].partition("\n| exit code")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| `(.+?)` \| `(.+?)` \| (.+) \|$", section, re.MULTILINE)
    classes = {each if each != "_BaseConfig" else "PRMConfig" for each in OURS}
    runs = classes - {"ModelConfig", "ScriptArguments"}
    found: dict[str, dict[str, tuple[Any, Any]]] = {name: {} for name in classes}
    for option, where, here, there, _why in rows:
        for name in runs if where == "all" else where.split(", "):
            found[name][option] = (json.loads(here), json.loads(there))
    return found


@pytest.mark.parametrize("theirs", OURS)
def test_defaults_are_trls_but_for_those_that_the_readme_lists(theirs: str) -> None:
    assert differences(theirs) == listed()["PRMConfig" if theirs == "_BaseConfig" else theirs]


def test_all_options_of_all_pipelines_are_compared() -> None:
    # Of each pipeline, the options that bear TRL's name; the numbers only grow.
    shared = {each: len(defaults_of(each).keys() & OURS[each][1].model_fields.keys()) for each in OURS}
    assert all(count >= 27 for name, count in shared.items() if name not in {"ModelConfig", "ScriptArguments"}), shared


def test_a_default_that_differs_without_a_row_in_the_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPOConfig.model_fields["num_train_epochs"], "default", 1.0)
    assert differences("DPOConfig")["num_train_epochs"] == (1.0, 3.0)
