"""The agreement table: what is measured again, and what counts as proved."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("agreement_matrix", ROOT / "benchmarks" / "agreement_matrix.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


script: Any = load_script()


def cell(model: str = "llama", engine: str = "vllm", dtype: str = "bfloat16", **figures: Any) -> Any:
    sound = {"sampled": (0.01, 0.03), "scored": (0.01, 0.03), "stale": 1.0}
    return script.Cell(model=model, engine=engine, dtype=dtype, **{**sound, **figures})


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        # bfloat16 may be 4 times what it was at version 0: 0.04.
        ({}, "proved"),
        ({"sampled": (0.01, 0.041)}, "WRONG"),
        ({"scored": (0.01, 0.041)}, "WRONG"),
        # The floor is 0.02, the ceiling 0.2.
        ({"sampled": (1e-4, 0.019), "scored": (1e-4, 0.019)}, "proved"),
        ({"sampled": (0.21, 0.1)}, "WRONG"),
        # Old weights would not be found.
        ({"stale": 0.03}, "WRONG"),
        ({"sampled": None, "scored": None, "stale": None, "problem": "refused: so it is"}, "refused: so it is"),
    ],
)
def test_a_cell_is_proved_within_the_rule_alone(figures: dict[str, Any], verdict: str) -> None:
    assert cell(**figures).verdict == verdict
    assert cell(**figures).is_proved == (verdict == "proved")


def test_what_was_measured_with_the_same_versions_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str, tuple[str, ...]]] = []

    def ask(model: str, engines: Sequence[str], dtypes: Sequence[str]) -> list[Any]:
        [engine] = engines
        asked.append((model, engine, tuple(dtypes)))
        return [cell(model, engine, dtype) for dtype in dtypes]

    monkeypatch.setattr(script, "ask", ask)
    monkeypatch.setattr(script, "RESULTS", tmp_path)

    def complete(*dtypes: str, again: bool = False) -> None:
        found = script.complete(["llama"], ["vllm"], dtypes, order=["llama", "qwen2"], again=again)
        assert [each.dtype for each in found] == list(dtypes)

    complete("bfloat16")
    complete("float32", "bfloat16")
    complete("float32", "bfloat16")
    assert asked == [("llama", "vllm", ("bfloat16",)), ("llama", "vllm", ("float32",))]
    complete("bfloat16", again=True)
    monkeypatch.setattr(script, "versions", lambda: "torch 99")
    complete("bfloat16")
    assert asked[2:] == [("llama", "vllm", ("bfloat16",))] * 2
    assert {each.dtype for each in script.read_cells(tmp_path / "agreement.jsonl").values()} == {"float32", "bfloat16"}


def test_the_table_tells_a_refusal_once_and_what_is_not_measured() -> None:
    refused = {"sampled": None, "scored": None, "stale": None, "problem": "refused: no kernel"}
    text = script.table([cell(dtype="float32", **refused), cell(dtype="bfloat16", **refused), cell("qwen2")])
    assert "| llama | not measured | not measured | refused (1) | refused (1) |" in text
    assert "| qwen2 | not measured | not measured | not measured | 1e-02 -> 3e-02 (1) |" in text
    assert text.count("no kernel") == 1
