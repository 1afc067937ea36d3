"""Parameters are given to engines as checkpoint files hold them, of every architecture."""

import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny_architectures import ARCHITECTURES, build_tiny_architecture, tiny_config
from trl_ray.engines.checkpoint_facts import is_recurrent
from trl_ray.engines.checkpoint_layout import CheckpointLayout, empty_model, in_checkpoint_layout

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "glm4_moe"]
BUFFERS = {"deepseek_v3": "e_score_correction_bias", "glm4_moe": "e_score_correction_bias"}
"""What files hold beside parameters: it is not trained, and engines keep it."""


@pytest.mark.parametrize("name", [*MIXTURES, "llama", "phi3", "gpt2", "gpt_neox", "falcon", "lfm2", "mamba2"])
def test_what_an_engine_is_given_is_what_the_files_hold_tensor_by_tensor(tmp_path, name):
    build_tiny_architecture(tmp_path, name)
    files = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layout = pickle.loads(pickle.dumps(CheckpointLayout.of(empty_model(model.config, trust_remote_code=False))))
    given = dict(in_checkpoint_layout(layout, model.named_parameters()))
    left_out = {key for key in files if name in BUFFERS and key.endswith(BUFFERS[name])}
    assert given.keys() == files.keys() - left_out
    for key, tensor in given.items():
        torch.testing.assert_close(tensor, files[key], rtol=0, atol=0)


def test_experts_are_taken_apart_without_a_copy():
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    [fused] = [p for n, p in model.named_parameters() if n.endswith("layers.0.mlp.experts.down_proj")]
    given = dict(in_checkpoint_layout(CheckpointLayout.of(model), model.named_parameters()))
    one = given["model.layers.0.block_sparse_moe.experts.2.w2.weight"]
    assert one.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_recurrent_layers_are_known_by_what_they_remember():
    def found(name):
        return is_recurrent(empty_model(tiny_config(name), trust_remote_code=False))

    recurrent = {
        *("lfm2", "lfm2_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "minimax", "olmo_hybrid", "recurrent_gemma"),
        *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba", "nemotron_h", "granitemoehybrid"),
    }
    assert {name for name in ARCHITECTURES if found(name)} == recurrent
