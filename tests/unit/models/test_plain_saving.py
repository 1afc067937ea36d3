"""What a run does not use, its checkpoints do not import."""

import sys
from pathlib import Path

import pytest

from tiny_models import random_model
from trl_ray.models.checkpoint import begin_checkpoint, finish_checkpoint


def test_a_checkpoint_without_deepspeed_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    begin_checkpoint(tmp_path, step=1)
    path = finish_checkpoint(tmp_path, step=1, model=model, trainer_state={})
    assert "deepspeed" not in sys.modules
    assert (Path(path) / "model.safetensors").is_file()
