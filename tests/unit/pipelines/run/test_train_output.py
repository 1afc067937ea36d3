"""What `train()` gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from trl_ray.pipelines.run.session import TrainOutput


def test_steps_without_a_loss_count_in_the_mean_and_lines_without_one_do_not(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 0.0}\n{"loss": 0.0}\n{"eval/loss": 9}\n{"loss": 0.3}\n')
    output = TrainOutput(steps=3, run_dir=tmp_path, metrics={}, ledger=cast(Any, None), model=tmp_path)
    assert output.training_loss == pytest.approx(0.1)
