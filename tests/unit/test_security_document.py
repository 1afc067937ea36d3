"""SECURITY.md claims nothing without a test that exists."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) >= 30
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
        assert not name or name in found, (file, name)


def test_the_threat_model_says_who_owns_a_cluster() -> None:
    assert "Whoever can submit to the Ray cluster owns it" in TEXT


def test_libraries_with_known_faults_are_too_old() -> None:
    """torch < 2.6 unpickles by default; vllm < 0.19 and ray < 2.52 have published faults (S19)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    least = {"torch": (2, 6), "vllm": (0, 19), "ray": (2, 52)}
    for library, version in least.items():
        [text] = {each for each in asked if re.match(rf"{library}(\[|[<>=])", each)}
        lowest = re.search(r">=([\d.]+)", text)
        assert lowest is not None and tuple(int(part) for part in lowest[1].split(".")[:2]) >= version, text
