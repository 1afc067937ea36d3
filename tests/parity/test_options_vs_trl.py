"""The options of all pipelines are TRL's, with TRL's defaults but for those that README.md lists with a reason."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import trl
from trl.experimental.async_grpo import AsyncGRPOConfig as TRLAsyncGRPOConfig
from trl.experimental.cpo import CPOConfig as TRLCPOConfig
from trl.experimental.iw_opd import IWOPDConfig as TRLIWOPDConfig
from trl.experimental.orpo import ORPOConfig as TRLORPOConfig
from trl.experimental.sdpo import SDPOConfig as TRLSDPOConfig
from trl.trainer.base_config import _BaseConfig as TRLBaseConfig

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
OURS: dict[type[Any], type[Section]] = {
    trl.SFTConfig: SFTConfig,
    trl.DPOConfig: DPOConfig,
    trl.KTOConfig: KTOConfig,
    trl.RewardConfig: RewardModelConfig,
    trl.GRPOConfig: GRPOConfig,
    trl.RLOOConfig: RLOOConfig,
    trl.DistillationConfig: DistillConfig,
    TRLAsyncGRPOConfig: AsyncGRPOConfig,
    TRLSDPOConfig: SDPOConfig,
    TRLIWOPDConfig: DistillConfig,
    TRLCPOConfig: CPOConfig,
    TRLORPOConfig: ORPOConfig,
    trl.ModelConfig: SFTConfig,
    trl.ScriptArguments: SFTConfig,
    TRLBaseConfig: PRMConfig,
}
CALLED: dict[type[Any], str] = {each: each.__name__ for each in OURS} | {
    TRLBaseConfig: "PRMConfig"
}  # TRL 1.16 has no PRMConfig any more
SAME_IN_OTHER_WORDS: dict[str, tuple[Any, Any]] = {
    "eval_steps": (0, None),
    "report_to": ([], "none"),
    "min_p": (0.0, None),
    **dict.fromkeys(
        ("lr_scheduler_kwargs", "model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "dataset_kwargs"),
        ({}, None),
    ),
}
"""What stands here for TRL's value, and means the same."""


def defaults_of(config: type[Any]) -> dict[str, Any]:
    """Of a dataclass, as it is declared."""
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


def differences(theirs: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Option, our default and TRL's, where they differ and mean something else."""
    expected, own = defaults_of(theirs), own_defaults(OURS[theirs])
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
    classes = set(CALLED.values())
    runs = classes - {"ModelConfig", "ScriptArguments"}
    found: dict[str, dict[str, tuple[Any, Any]]] = {name: {} for name in classes}
    for option, where, here, there, _why in rows:
        for name in runs if where == "all" else where.split(", "):
            found[name][option] = (json.loads(here), json.loads(there))
    return found


@pytest.mark.parametrize("theirs", OURS, ids=CALLED.get)
def test_defaults_are_trls_but_for_those_that_the_readme_lists(theirs: type[Any]) -> None:
    assert differences(theirs) == listed()[CALLED[theirs]]


def test_all_options_of_all_pipelines_are_compared() -> None:
    # Of each pipeline, the options that bear TRL's name; the numbers only grow.
    shared = {CALLED[each]: len(defaults_of(each).keys() & OURS[each].model_fields.keys()) for each in OURS}
    assert all(count >= 27 for name, count in shared.items() if name not in {"ModelConfig", "ScriptArguments"}), shared


def test_a_default_that_differs_without_a_row_in_the_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPOConfig.model_fields["num_train_epochs"], "default", 1.0)
    assert differences(trl.DPOConfig)["num_train_epochs"] == (1.0, 3.0)
