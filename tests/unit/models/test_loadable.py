"""What a learner could not load is refused without loading it, with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    GPTNeoXConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    Qwen2_5_VLConfig,
)

from tiny_models import build_tiny_model, build_tokenizer
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


def changed(model: str, folder: Path, **options: Any) -> ModelConfig:
    """A copy with other entries in config.json."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **options}), encoding="utf-8")
    return ModelConfig(model_name_or_path=str(folder))


def without(model: str, folder: Path, *names: str) -> ModelConfig:
    """A copy that lacks weights."""
    shutil.copytree(model, folder)
    kept = {name: weight for name, weight in load_file(folder / "model.safetensors").items() if name not in names}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(model_name_or_path=str(folder))


def test_weights_that_are_missing_are_told_from_headers(tmp_path: Path) -> None:
    tied, untied = build_tiny_model(tmp_path / "tied"), build_tiny_model(tmp_path / "untied", tied=False)
    lost = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(
        ModelError, match=rf"must hold every weight of its model, but 1 are missing, first \['{lost}'\]"
    ):
        check_loadable(without(tied, tmp_path / "a", lost))
    head = without(untied, tmp_path / "b", "lm_head.weight")
    with pytest.raises(ModelError, match=r"1 are missing, first \['lm_head\.weight'\]"):
        check_loadable(head)
    classifier = changed(str(tmp_path / "b"), tmp_path / "c", architectures=["Qwen2ForSequenceClassification"])
    with pytest.raises(ModelError, match=r"says that it is a Qwen2ForSequenceClassification"):
        check_loadable(classifier)
    # A tied head is the embeddings, and the names of a bare model have no prefix.
    check_loadable(without(tied, tmp_path / "d", "lm_head.weight"))
    weights = load_file(Path(tied) / "model.safetensors")
    bare = {name.removeprefix("model."): weight for name, weight in weights.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "d" / "model.safetensors", metadata={"format": "pt"})
    check_loadable(ModelConfig(model_name_or_path=str(tmp_path / "d")))


def test_weights_of_another_shape_are_told_from_headers(model: str, tmp_path: Path) -> None:
    told = r"model\.layers\.0\.mlp\.gate_proj\.weight is \[128, 128\], not \[64, 128\] \(and 5 more\)"
    with pytest.raises(ModelError, match=told):
        check_loadable(changed(model, tmp_path / "narrow", intermediate_size=64))


def test_models_whose_weights_are_read_into_others_pass(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=260, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    check_loadable(ModelConfig(model_name_or_path=str(tmp_path)))


def test_a_missing_file_of_several_is_told(model: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path, max_shard_size="200KB")
    options = ModelConfig(model_name_or_path=str(tmp_path))
    check_loadable(options)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[1].unlink()
    with pytest.raises(
        ModelError, match=rf"1 of the {len(files)} files of its weights are missing, first {files[1].name}"
    ):
        check_loadable(options)


def test_models_that_see_what_comes_after_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must name a decoder, .* type bart, which is an encoder and a decoder"):
        check_loadable(of_type(model, tmp_path / "bart", BartConfig()))
    for written in ("BertForMaskedLM", "BertLMHeadModel"):
        bert = of_type(model, tmp_path / written, BertConfig(architectures=[written]))
        with pytest.raises(ModelError, match=r"must name a decoder, .* type bert, which is an encoder, which sees"):
            check_loadable(bert)
    with pytest.raises(ModelError, match="must hold every weight"):  # a decoder, whose weights are looked at
        check_loadable(of_type(model, tmp_path / "decoder", BertConfig(is_decoder=True)))
    # Its configuration has the flag of decoders, too, and says false.
    check_loadable(of_type(model, tmp_path / "neox", GPTNeoXConfig(architectures=["GPTNeoXForCausalLM"])))


def test_code_of_a_models_own_asks_for_trust(model: str, tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    with pytest.raises(
        ModelError, match=r"^trust_remote_code must be true for .*/own, .* then set trust_remote_code=true"
    ):
        check_loadable(changed(model, tmp_path / "own", **own))


def test_an_adapter_of_another_kind_is_refused(model: str, tmp_path: Path) -> None:
    said = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": model}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ModelError, match=r"must be LoRA or DoRA, but is PROMPT_TUNING"):
        check_loadable(ModelConfig(model_name_or_path=str(tmp_path), use_peft=True))
