"""Quantised checkpoints are trained and saved as plain weights, or refused before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tiny_models import VOCAB_SIZE, build_tiny_model, build_tokenizer
from trl_ray.config.sections import ModelConfig
from trl_ray.engines.transformers import TransformersEngine
from trl_ray.errors import ModelError
from trl_ray.models.loadable import check_loadable
from trl_ray.models.policy_loading import load_policy
from trl_ray.models.weight_payload import export_weights

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_BLOCK = 64


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_tiny_model(tmp_path_factory.mktemp("dense"), family="llama", tied=False))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    config = Qwen3MoeConfig(**_SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def says(folder: Path, **quantisation: Any) -> str:
    """A folder whose configuration says that its weights are quantised."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "quantization_config": quantisation}), encoding="utf-8")
    return str(folder)


def in_fp8(source: Path, folder: Path) -> str:
    """A copy whose projections are stored as 8-bit floats with a scale of 0.5 for each block."""
    shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() == 2 and "proj" in name:
            blocks = [-(-size // _BLOCK) for size in weight.shape]
            stored |= {name: (weight / 0.5).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full(blocks, 0.5)}
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return says(folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[_BLOCK, _BLOCK])


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_eight_bit_floats_are_trained_and_saved_as_plain_weights(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(kind)
    options = ModelConfig(model_name_or_path=in_fp8(source, tmp_path / "fp8"))
    check_loadable(options)
    policy = load_policy(options)
    name = next(name for name, _ in policy.named_parameters() if "q_proj" in name)
    expected = (load_file(source / "model.safetensors")[name] / 0.5).to(torch.float8_e4m3fn).float() * 0.5
    trained = policy.get_parameter(name)
    assert trained.dtype == torch.float32 and torch.equal(trained, expected)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-3)
    policy.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(load_file(source / "model.safetensors"))
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for key, parameter in policy.named_parameters():
        assert torch.equal(parameter, again.get_parameter(key)), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learner_and_engine_hold_eight_bit_floats_alike_and_positions_in_full(
    dtype: str, dense: Path, tmp_path: Path
) -> None:
    name = in_fp8(dense, tmp_path / "fp8")
    policy = load_policy(ModelConfig(model_name_or_path=name, dtype=dtype), trainable=False)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=getattr(torch, dtype))
    buffers = dict(policy.named_buffers())
    assert buffers
    for key, buffer in plain.named_buffers():
        assert buffers[key].dtype == buffer.dtype and torch.equal(buffers[key], buffer), key
    engine = TransformersEngine(model=name, dtype=dtype, max_model_len=32, max_num_seqs=1)
    ids = np.array([5, 6, 7, 8], dtype=np.int32)
    try:
        [before] = engine.score([ids], deadline_s=60.0)
        with torch.no_grad():
            logits = policy(input_ids=torch.from_numpy(ids).long()[None]).logits[0, :-1].float()
            expected = logits.log_softmax(-1).gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0]
            assert np.allclose(before, expected.numpy(), atol=1e-5)
            policy.get_output_embeddings().weight.zero_()  # type: ignore[no-untyped-call]
        engine.load_weights(export_weights(policy.named_parameters(), version=1))
        [after] = engine.score([ids], deadline_s=60.0)
    finally:
        engine.close()
    assert np.allclose(after, -np.log(VOCAB_SIZE), atol=1e-5)


def test_four_bit_experts_of_gpt_oss_are_trained_and_saved_as_plain_weights(tmp_path: Path) -> None:
    folder = tmp_path / "oss"
    GptOssForCausalLM(GptOssConfig(**_SMALL, num_local_experts=2, num_experts_per_tok=1)).save_pretrained(folder)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, rows, columns = weight.shape
            stored[f"{name}_blocks"] = torch.randint(0, 255, (count, columns, rows // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.full((count, columns, rows // 32), 120, dtype=torch.uint8)
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    options = ModelConfig(model_name_or_path=says(folder, quant_method="mxfp4"))
    check_loadable(options)
    policy = load_policy(options)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    policy.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for key, parameter in policy.named_parameters():
        assert torch.equal(parameter, again.get_parameter(key)), key


@pytest.mark.parametrize(
    ("quantisation", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    ],
)
def test_other_quantised_weights_are_refused_or_ask_for_their_library(
    dense: Path, quantisation: dict[str, Any], method: str, tmp_path: Path
) -> None:
    shutil.copytree(dense, tmp_path / "stored")
    name = says(tmp_path / "stored", **quantisation)
    if method != "bitsandbytes":
        for use_peft in (False, True):
            with pytest.raises(ModelError, match=rf"they are quantised \({method}\), which can neither be trained nor"):
                check_loadable(ModelConfig(model_name_or_path=name, use_peft=use_peft))
        return
    with pytest.raises(ModelError, match=rf"they are quantised \({method}\)\. Set use_peft=true"):
        check_loadable(ModelConfig(model_name_or_path=name))
    with pytest.raises(ModelError, match=rf"is quantised \({method}\), and its weights must be readable here, but: "):
        check_loadable(ModelConfig(model_name_or_path=name, use_peft=True))
