"""Every option that TRL's commands take is honoured, accepted or refused with a reason; the page of them is current."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl")

import importlib.util

from trl_ray.config.trl_options.foreign_option import Standing
from trl_ray.config.trl_options.reading import entry_of
from trl_ray.errors import ConfigError

pytestmark = pytest.mark.parity

TOOL = Path(__file__).parents[2] / "tools" / "list_trl_options.py"
# TRL's default is what cannot be done here, or is done by naming something else.
NO_DEFAULT = {
    ("grpo", "output_dir"),
    # Of another objective, which `distill` is told by distillation_objective and loss_support.
    ("distill (IWOPDConfig)", "reverse_kl_top_1_mode"),
    ("distill (IWOPDConfig)", "max_length"),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("list_trl_options", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["list_trl_options"] = module
    spec.loader.exec_module(module)
    return module


def test_every_option_of_trl_has_a_standing_in_its_pipeline(tool: ModuleType) -> None:
    missing = {
        (pipeline, name)
        for pipeline, (theirs, own) in tool.CLASSES.items()
        for name in tool.names_of(theirs)
        if tool.listed(name, own) is None
    }
    assert missing == set()


def test_what_is_refused_says_what_to_do_in_a_sentence(tool: ModuleType) -> None:
    for theirs, own in tool.CLASSES.values():
        for name in tool.names_of(theirs):
            entry = None if name in own.model_fields else entry_of(name, own.model_fields)
            if entry is not None and entry.standing is not Standing.HONOURED:
                assert len(entry.says.split()) >= 3, name


def test_an_option_written_with_trls_own_default_loads(tool: ModuleType) -> None:
    refused = {}
    for pipeline, (theirs, own) in tool.CLASSES.items():
        for each in dataclasses.fields(theirs):
            if each.name in own.model_fields or (pipeline, each.name) in NO_DEFAULT:
                continue
            default: Any = each.default if each.default is not dataclasses.MISSING else each.default_factory()  # type: ignore[misc]
            try:
                own(**{each.name: default})
            except ConfigError as error:
                refused[pipeline, each.name] = str(error)
    assert refused == {}


def test_the_page_of_all_options_is_current(tool: ModuleType) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "Run: python tools/list_trl_options.py"
