"""The names that users import, their signatures, their options with defaults: a change shows in a golden file."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trl_ray
from trl_ray.config.base import Section
from trl_ray.errors import ConfigError
from trl_ray.pipelines.pipeline_registry import PIPELINES

GOLDEN = Path(__file__).parents[1] / "golden" / "public_names.txt"
NAMES = sorted(trl_ray._MODULE_OF)


def described(name: str) -> list[str]:
    """A name with its signature; a configuration with its options and their defaults."""
    found: Any = getattr(trl_ray, name)
    if inspect.isclass(found) and issubclass(found, Section):
        options = found.model_fields.items()
        return [name, *(f"    {option} = {_default(field)}" for option, field in options)]
    if inspect.isclass(found) and issubclass(found, Exception):
        return [f"{name}({', '.join(base.__name__ for base in found.__bases__)})"]
    if getattr(found, "_is_protocol", False):
        return [name, *(f"    {member}" for member in sorted(vars(found)) if not member.startswith("_"))]
    return [f"{name}{inspect.signature(found)}"]


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return f"{getattr(field.default_factory, '__name__', field.default_factory)}()"
    return json.dumps(field.default, default=str)


def test_names_signatures_and_defaults_are_those_of_the_golden_file() -> None:
    text = "\n".join(line for name in NAMES for line in described(name)) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "If it is meant: UPDATE_GOLDEN=1, and a line in CHANGELOG.md."


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(trl_ray.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {each.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for each in node.names}
    assert seen == trl_ray._MODULE_OF and set(NAMES) <= set(dir(trl_ray))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="PPOTrainer"):
        trl_ray.PPOTrainer  # noqa: B018


def test_trls_names_are_other_names_of_ours() -> None:
    for theirs, ours in trl_ray.TRL_NAMES.items():
        assert getattr(trl_ray, theirs) is getattr(trl_ray, ours) and theirs in dir(trl_ray)
    trainers = {pipeline.__name__ for pipeline in PIPELINES.values()}
    assert trainers == {ours for theirs, ours in trl_ray.TRL_NAMES.items() if theirs.endswith("Trainer")}
    # TRL's RewardConfig is of a reward model's run; here it says how rewards are computed.
    with pytest.raises(ConfigError, match=r"TRL's RewardConfig is RewardModelConfig here"):
        trl_ray.RewardConfig(output_dir="rm")  # type: ignore[call-arg]


def test_importing_the_package_and_its_options_imports_no_library_of_models() -> None:
    heavy = ("torch", "ray", "transformers")
    code = f"import sys, trl_ray; trl_ray.GRPOConfig; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"
