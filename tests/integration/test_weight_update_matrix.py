import numpy as np
import pytest
import torch

from tiny_architectures import build_tiny_architecture, random_architecture
from tiny_models import FAMILIES, build_tiny_model, random_model
from trl_ray.engines.factory import create_engine
from trl_ray.models.scoring.segment_attention import heed_soft_cap
from trl_ray.models.weight_payload import export_weights

pytestmark = pytest.mark.integration
SEQUENCE = np.frombuffer(b"Once upon a time there was a tokenizer.", dtype=np.uint8).astype(np.int32)


def updated_error(kind, path, new):
    """Largest |engine - transformers| over the scores of SEQUENCE after an update to the weights of a new model."""
    heed_soft_cap(new)
    engine = create_engine(kind, model=path, dtype="float32", max_model_len=256, max_num_seqs=4)
    try:
        before = engine.score([SEQUENCE], deadline_s=60)[0]
        engine.load_weights(export_weights(list(new.named_parameters()), version=1))
        after = engine.score([SEQUENCE], deadline_s=60)[0]
    finally:
        engine.close()
    ids = torch.tensor(SEQUENCE[None].astype(np.int64))
    with torch.no_grad():
        expected = new(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
    assert np.abs(before - expected).max() > 1  # Old and new weights cannot be mistaken for each other.
    return np.abs(after - expected).max()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_an_updated_engine_scores_like_the_new_weights(kind, family, tied, tmp_path):
    if kind == "vllm":
        pytest.importorskip("vllm")
    path = build_tiny_model(tmp_path, family=family, tied=tied)
    assert updated_error(kind, path, random_model(family=family, tied=tied, seed=1)) < 1e-3


# A sample; benchmarks/agreement_matrix.py has the whole table.
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("transformers", name) for name in ("mixtral", "gpt_oss", "deepseek_v3", "gemma2", "lfm2", "mamba2")),
        *(("vllm", name) for name in ("mixtral", "gpt_oss")),
    ],
)
def test_an_updated_engine_of_another_architecture_scores_like_the_new_weights(kind, name, tmp_path):
    if kind == "vllm":
        pytest.importorskip("vllm")
    path = build_tiny_architecture(tmp_path, name)
    assert updated_error(kind, path, random_architecture(name, seed=1)) < 1e-3


@pytest.mark.parametrize(("name", "mended"), [("mixtral", "repack_experts"), ("gpt_oss", "reload_written_past")])
def test_without_loading_experts_anew_an_update_on_cpu_would_be_wrong(tmp_path, monkeypatch, name, mended):
    pytest.importorskip("vllm")
    if torch.cuda.is_available():
        pytest.skip("only CPU computes with packed experts")
    monkeypatch.setattr(f"trl_ray.engines.vllm.{mended}", lambda *given: None)
    path = build_tiny_architecture(tmp_path, name)
    assert updated_error("vllm", path, random_architecture(name, seed=1)) > 0.1


def test_without_packing_the_tied_head_anew_an_update_on_cpu_would_be_wrong(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    if torch.cuda.is_available():
        pytest.skip("only CPU computes with a packed copy of the head")
    monkeypatch.setattr("trl_ray.engines.vllm.repack_tied_heads", lambda model: None)
    path = build_tiny_model(tmp_path, family="qwen2", tied=True)
    assert updated_error("vllm", path, random_model(family="qwen2", tied=True, seed=1)) > 1
