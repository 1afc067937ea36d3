"""What can be checked is checked before anything is written: a refused run leaves no folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2_5_VLConfig

from dataset_runs import rows, values
from runs import PROMPTS
from runs import values as rollout_values
from tiny_models import build_tiny_model
from trl_ray.config.load import build
from trl_ray.errors import InputError
from trl_ray.pipelines.pipeline_registry import PIPELINES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def refused(name: str, model: str, output_dir: Path, **changes: Any) -> str:
    """The message of a run that must not start, neither for the dry run nor for itself."""
    kind: Any = PIPELINES[name]
    of_rollouts = name == "grpo"
    options = (rollout_values if of_rollouts else values)(model, output_dir, **changes)
    pipeline = kind(args=build(kind.config_class, options), train_dataset=PROMPTS if of_rollouts else rows(name, 12))
    with pytest.raises(InputError) as dry:
        pipeline.prepare()
    with pytest.raises(InputError) as caught:
        pipeline.train()
    assert not output_dir.exists() and str(dry.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "grpo"])
def test_a_model_that_cannot_be_trained(tmp_path: Path, model: str, name: str) -> None:
    shutil.copytree(model, tmp_path / "vl")
    Qwen2_5_VLConfig().save_pretrained(tmp_path / "vl")
    assert "qwen2_5_vl" in refused(name, str(tmp_path / "vl"), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation=flash_attention_2"),
        ({"optim": "adamw_8bit"}, "bitsandbytes"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "momentun"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs"),
        ({"ref_model_name_or_path": "/nowhere/at/all"}, "ref_model_name_or_path"),
        ({"resume_from_checkpoint": True}, "must exist"),
    ],
)
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_options_that_cannot_be_had(
    tmp_path: Path, model: str, name: str, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert says in refused(name, model, tmp_path / "run", **changes)
