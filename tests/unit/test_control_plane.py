"""The benchmark of the control plane runs, and says what could flatter it."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "control_plane.py"


def test_ledger_and_replay_are_measured_and_what_could_flatter_comes_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("control_plane", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    small = ["--groups-per-step", "4", "--completions", "2", "--length", "3", "--steps", "6", "--save-steps", "8"]
    for mode in ("ledger", "replay"):
        script.main([*small, "--mode", mode, "--replay-groups", "40", "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    figures = dict(line.split(": ", 1) for line in lines)
    assert (figures["ledger_groups"], figures["replay_groups"]) == ("24.000", "40.000")
    assert float(figures["ledger_groups_per_s"]) > 0 and float(figures["replay_s"]) > 0
    shares = [float(value) for name, value in figures.items() if name.startswith("ledger_share")]
    assert sum(shares) - float(figures["ledger_share_sync"]) == pytest.approx(1.0, abs=0.01)
    assert "WARNING: no checkpoint lies within the measured steps" in lines
    assert lines[0].startswith("load_average")
    assert list(tmp_path.iterdir()) == []
