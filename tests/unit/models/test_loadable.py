"""What a learner could not load is refused without loading it, with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig, Qwen2_5_VLConfig

from tiny_models import build_tiny_model
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.loadable import check_loadable


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def of_type(model: str, folder: Path, config: PretrainedConfig) -> ModelConfig:
    """The folder of a model that calls itself another."""
    shutil.copytree(model, folder)
    config.save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(folder))


def test_models_that_load_pass_whatever_their_head(model: str) -> None:
    for num_labels in (None, 1, 2):
        check_loadable(ModelConfig(model_name_or_path=model), num_labels=num_labels)


def test_a_model_that_reads_images_is_refused_by_its_type(model: str, tmp_path: Path) -> None:
    options = of_type(model, tmp_path / "vl", Qwen2_5_VLConfig())
    with pytest.raises(ModelError, match=r"reads text alone, got .*/vl of the type qwen2_5_vl"):
        check_loadable(options)


@pytest.mark.parametrize("asked", ["flash_attention_2", "flash_attention_3", "nonsense"])
def test_an_attention_that_is_not_there_is_refused(model: str, asked: str) -> None:
    with pytest.raises(ModelError, match=rf"attn_implementation={asked} must be there .*set attn_implementation=sdpa"):
        check_loadable(ModelConfig(model_name_or_path=model, attn_implementation=asked))
    check_loadable(ModelConfig(model_name_or_path=model, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("options", "package"),
    [({"use_liger_kernel": True}, "liger-kernel"), ({"use_peft": True, "load_in_4bit": True}, "bitsandbytes")],
)
def test_a_library_that_is_not_there_is_refused(
    model: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"needs the package {package}, which is not installed"):
        check_loadable(ModelConfig(model_name_or_path=model, **options))


@pytest.mark.parametrize("kept", [0, 6, 5000])
def test_a_truncated_file_is_refused(model: str, tmp_path: Path, kept: int) -> None:
    shutil.copytree(model, tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or damaged"):
        check_loadable(ModelConfig(model_name_or_path=str(tmp_path / "torn")))


def test_an_adapter_that_does_not_fit_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match=r"the adapter must fit Qwen2ForCausalLM.*Check lora_target_modules"):
        check_loadable(ModelConfig(model_name_or_path=model, use_peft=True, lora_target_modules=["nowhere"]))
    options: list[dict[str, Any]] = [
        {},
        {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {"use_dora": True, "lora_kwargs": {"init_lora_weights": "orthogonal"}},
        {"lora_kwargs": {"init_lora_weights": "gaussian"}},
    ]
    for changes in options:
        for num_labels in (None, 1):
            check_loadable(ModelConfig(model_name_or_path=model, use_peft=True, **changes), num_labels=num_labels)
