"""Architectures that are refused before a run starts, each with a sentence."""

import json

import pytest

from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ModelError
from trl_ray.models.runnable import PROVED, check_runnable, unproved_notes


def model(tmp_path, kind, *, dtype="float32", **options):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **options}))
    return ModelConfig(model_name_or_path=str(tmp_path), dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "engine", "words"),
    [
        ("phimoe", "transformers", "by lot in training"),
        ("phimoe", "vllm", "by lot in training"),
        ("hrm_text", "transformers", "rounding alone makes them two policies"),
        ("lfm2", "vllm", "conv_dim"),
        ("recurrent_gemma", "vllm", "no such model"),
        ("mamba", "vllm", "no kernel"),
        ("qwen3_next", "vllm", "needs bfloat16 on a CPU, got float32"),
    ],
)
def test_what_sampler_and_learner_compute_differently_is_refused(tmp_path, kind, engine, words):
    with pytest.raises(ModelError, match=f"(?s)must be one policy.*{kind}.*{words}"):
        check_runnable(model(tmp_path, kind), engine)


@pytest.mark.parametrize(
    ("kind", "engine", "options"),
    [
        ("lfm2", "transformers", {}),
        ("deepseek_v3", "vllm", {}),
        ("deepseek_v3", "vllm", {"on_gpu": True}),
        ("gpt_neox", "vllm", {}),
        ("qwen3_next", "vllm", {"dtype": "bfloat16"}),
        ("mixtral", "vllm", {}),
        ("gpt_oss", "vllm", {}),
    ],
)
def test_what_another_engine_or_format_computes_alike_is_not(tmp_path, kind, engine, options):
    check_runnable(model(tmp_path, kind), engine, **options)


def test_a_model_that_mixes_number_formats_is_computed_in_float32_alone(tmp_path):
    with pytest.raises(ModelError, match=r"xlstm they cannot be computed in bfloat16.*Set dtype=float32"):
        check_runnable(model(tmp_path, "xlstm", dtype="bfloat16"), "transformers")
    check_runnable(model(tmp_path, "xlstm"), "transformers")


def test_a_head_that_vllm_would_not_read_is_refused(tmp_path):
    with pytest.raises(ModelError, match="takes the embedding for the head"):
        check_runnable(model(tmp_path, "cohere", tie_word_embeddings=False), "vllm")
    check_runnable(model(tmp_path, "cohere", tie_word_embeddings=True), "vllm")


@pytest.mark.parametrize(("kind", "method"), [("gpt_oss", "mxfp4"), ("llama", "fp8")])
def test_vllm_is_not_given_plain_weights_for_the_quantised_ones_of_its_files(tmp_path, kind, method):
    quantised = {"quantization_config": {"quant_method": method}}
    with pytest.raises(ModelError, match=rf"quantised weights of the files \({method}\).*dequantize=True"):
        check_runnable(model(tmp_path, kind, **quantised), "vllm")
    check_runnable(model(tmp_path, kind, **quantised), "transformers")


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_no_engine_is_given_plain_weights_for_those_that_stay_quantised(tmp_path, engine):
    stored = model(tmp_path, "llama", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"keep the quantised weights of the files \(bitsandbytes\).*load_in_4bit"):
        check_runnable(stored, engine)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_plain_files_that_the_learner_quantises_are_run(tmp_path, engine):
    model(tmp_path, "llama")
    check_runnable(ModelConfig(model_name_or_path=str(tmp_path), load_in_4bit=True, use_peft=True), engine)


def test_an_architecture_that_nobody_proved_is_told(tmp_path):
    assert unproved_notes(model(tmp_path, "llama"), "vllm") == ()
    assert unproved_notes(model(tmp_path, "gptj"), "transformers") == ()
    [note] = unproved_notes(model(tmp_path, "gptj"), "vllm")
    assert "not proved for a gptj on vllm" in note
    assert "gptj" not in PROVED
    [note] = unproved_notes(model(tmp_path, "gpt_neo"), "transformers")
    assert "not proved for a gpt_neo on transformers" in note
