"""Faults that make sampler and learner two policies, planted one by one: each is told in words of its own."""

from dataclasses import replace

import pytest
import torch

from runs import PROMPTS, async_grpo, distill, events, grpo, lines, sdpo
from tiny_architectures import build_tiny_architecture
from tiny_models import build_tiny_model
from trl_ray.engines import sampling
from trl_ray.engines.transformers import TransformersBackend
from trl_ray.engines.vllm import VLLMBackend
from trl_ray.errors import AgreementError, RunError, WeightError
from trl_ray.models.scoring.scoring_module import ScoringModule
from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
from trl_ray.pipelines.distill import DistillPipeline
from trl_ray.pipelines.grpo import GRPOPipeline
from trl_ray.pipelines.rollouts.agreement_check import AgreementCheck
from trl_ray.pipelines.sdpo import SDPOPipeline

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def train(model, run, *, asynchronous=False, **changes):
    options = {"max_steps": 3, "runtime": {"max_restarts": 0}, **changes}
    make, pipeline = (async_grpo, AsyncGRPOPipeline) if asynchronous else (grpo, GRPOPipeline)
    return pipeline(args=make(model, run, **options), train_dataset=PROMPTS).train()


def plant_in_load(monkeypatch, spoil):
    """Have `spoil(backend, state before)` follow every load of the engine."""
    original = TransformersBackend.load

    def load(self, payload):
        before = {name: value.clone() for name, value in self._model.state_dict().items()}
        original(self, payload)
        spoil(self, before)

    monkeypatch.setattr(TransformersBackend, "load", load)


def plant_in_build(monkeypatch, spoil):
    """Have `spoil(model)` follow the engine's loading of its files."""
    original = TransformersBackend.build

    def build(self):
        limits = original(self)
        spoil(self._model)
        return limits

    monkeypatch.setattr(TransformersBackend, "build", build)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waits", "ahead"])
def test_a_sound_run_agrees_to_rounding(model, tmp_path, asynchronous):
    train(model, tmp_path / "run", asynchronous=asynchronous)
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert found[0]["agreement/age_0/abs_diff"] < 1e-5
    assert all(line.get("agreement/age_0/abs_diff", 0.0) < 1e-5 for line in found)
    assert found[0]["agreement/age_0/ess"] == pytest.approx(1.0, abs=1e-6)
    assert not [event for event in events(tmp_path / "run", "warning") if "cause" in event["detail"]]


def test_a_sound_run_in_bfloat16_gives_no_alarm(model, tmp_path):
    train(model, tmp_path / "run", dtype="bfloat16", learning_rate=1e-2)
    assert not [event for event in events(tmp_path / "run", "warning") if "cause" in event["detail"]]
    assert all(event["detail"]["agrees"] for event in events(tmp_path / "run", "canary"))


def test_pinned_weights(model, tmp_path, monkeypatch):
    plant_in_load(monkeypatch, lambda backend, before: backend._model.load_state_dict(before))
    with pytest.raises(RunError, match="are not computed with: the engine says what it said before the pull"):
        train(model, tmp_path / "run")


def test_stale_parts(model, tmp_path, monkeypatch):
    def spoil(backend, before):
        stale = {name: value for name, value in before.items() if ".mlp." in name}
        backend._model.load_state_dict(stale, strict=False)

    plant_in_load(monkeypatch, spoil)
    with pytest.raises(RunError, match="are not all computed with"):
        train(model, tmp_path / "run")


def test_stale_experts_of_vllm(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    if torch.cuda.is_available():
        pytest.skip("only CPU computes with packed experts")
    monkeypatch.setattr("trl_ray.engines.vllm.repack_experts", lambda model: None)
    with pytest.raises(WeightError, match=r"are not all computed with: engine and learner agreed before.*experts"):
        train(build_tiny_architecture(tmp_path / "model", "mixtral"), tmp_path / "run", rollout={"engine": "vllm"})


def test_pinned_weights_in_bfloat16_are_found_against_version_0_although_they_are_within_the_ceiling(
    model, tmp_path, monkeypatch
):
    plant_in_load(monkeypatch, lambda backend, before: backend._model.load_state_dict(before))
    train(model, tmp_path / "run", dtype="bfloat16", learning_rate=1e-4, max_steps=8)
    told = [event["detail"]["detail"] for event in events(tmp_path / "run", "warning")]
    assert any("the engine says what it said before the pull" in detail for detail in told)


def test_wrong_rope(model, tmp_path, monkeypatch):
    def slow(engine):
        for module in engine.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq *= 0.9

    plant_in_build(monkeypatch, slow)
    with pytest.raises(WeightError, match="The numerics differ: with the files"):
        train(model, tmp_path / "run")


def test_a_head_that_is_untied_in_the_engine_alone(tmp_path, monkeypatch):
    def untie(engine):
        engine.lm_head.weight = torch.nn.Parameter(engine.lm_head.weight.detach().clone())

    plant_in_build(monkeypatch, untie)
    tied = build_tiny_model(tmp_path / "tied", family="qwen2", tied=True)
    with pytest.raises(RunError, match=r"are not all computed with: engine and learner agreed before.*tied"):
        train(tied, tmp_path / "run")


def test_an_engine_that_computes_in_another_format_than_it_was_asked_for(model, tmp_path, monkeypatch):
    plant_in_build(monkeypatch, lambda engine: engine.to(torch.bfloat16))
    with pytest.raises(WeightError, match=r"The numerics differ: with the files.*dtype"):
        train(model, tmp_path / "run")


def test_a_layer_that_is_left_out(model, tmp_path, monkeypatch):
    def skip(engine):
        engine.model.layers[1].forward = lambda hidden_states, *given, **named: hidden_states

    plant_in_build(monkeypatch, skip)
    with pytest.raises(WeightError, match="The numerics differ: with the files"):
        train(model, tmp_path / "run")


def test_rope_that_is_wrong_beyond_some_length_alone(model, tmp_path, monkeypatch):
    original = TransformersBackend._score

    def score(self, ids):
        scores = original(self, ids)
        return scores + (0.5 if len(ids) > 100 else 0.0)

    monkeypatch.setattr(TransformersBackend, "_score", score)
    with pytest.raises(WeightError, match="text of 32 tokens agrees, one of 160 does not"):
        train(model, tmp_path / "run")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waits", "ahead"])
def test_dropout_left_on(model, tmp_path, monkeypatch, asynchronous):
    original = ScoringModule.__init__

    def drops(self, policy, **options):
        original(self, policy, **options)
        norm = policy.base_model.norm
        norm.register_forward_hook(lambda module, given, out: torch.dropout(out, 0.1, policy.training))

    monkeypatch.setattr(ScoringModule, "__init__", drops)
    with pytest.raises(AgreementError, match=r"two passes in training differ by .*: dropout is on"):
        train(model, tmp_path / "run", asynchronous=asynchronous)


def test_a_packed_row_that_is_not_what_its_sequences_are(model, tmp_path, monkeypatch):
    original = ScoringModule.forward

    def shifted(self, input_ids, position_ids, *others, **named):
        if self.policy.training and position_ids is not None:
            position_ids = position_ids * 2
        return original(self, input_ids, position_ids, *others, **named)

    monkeypatch.setattr(ScoringModule, "forward", shifted)
    with pytest.raises(AgreementError, match="numerics differ where sequences share a row"):
        train(model, tmp_path / "run")


@pytest.mark.parametrize(
    ("reshape", "words"),
    [
        (lambda logits: logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf), "tokens were left out"),
        (lambda logits: logits / 1.3, "sampling was reshaped: what was sampled came from another distribution"),
    ],
    ids=["top-k", "temperature"],
)
def test_sampling_that_is_reshaped_behind_the_runs_back(model, tmp_path, monkeypatch, reshape, words):
    def reshaped(logits, *given, **named):
        return sampling.processed_logprobs(reshape(logits.float()), *given, **named)

    monkeypatch.setattr("trl_ray.engines.transformers.processed_logprobs", reshaped)
    with pytest.raises(AgreementError, match=words):
        train(model, tmp_path / "run")


def learn(model, run, **changes):
    """A distillation in which the policy's own files teach it."""
    return distill(model, model, run, **changes)


def plant_late_sampling(monkeypatch, backend=TransformersBackend, **changes):
    """Have the engine sample otherwise than asked once it has pulled version 2, in a run that sees no fresh tokens."""
    monkeypatch.setattr(AgreementCheck, "_judge_sampled", lambda self, values, evidence: iter(()))
    original = backend.add

    def add(self, key, request):
        sampling = replace(request.sampling, **changes) if self._version >= 2 else request.sampling
        original(self, key, replace(request, sampling=sampling))

    monkeypatch.setattr(backend, "add", add)


@pytest.mark.parametrize(
    ("changes", "temperature", "words"),
    [
        ({"top_p": 0.7}, 1.0, "tokens were left out"),
        ({"min_p": 0.2}, 0.8, "tokens were left out"),
        ({"temperature": 1.3}, 1.0, "sampling was reshaped: what was sampled came from another distribution"),
        ({"repetition_penalty": 1.5}, 1.0, "sampling was reshaped"),
    ],
    ids=["top-p", "min-p", "temperature", "penalty"],
)
def test_sampling_that_is_reshaped_late_in_a_run_is_told_without_fresh_tokens(
    model, tmp_path, monkeypatch, changes, temperature, words
):
    plant_late_sampling(monkeypatch, **changes)
    options = {"max_staleness": 1, "max_steps": 9, "temperature": temperature}
    with pytest.raises(AgreementError, match=rf"an engine must say of tokens what it said.*{words}.*cause: sampling"):
        train(model, tmp_path / "run", asynchronous=True, **options)


@pytest.mark.long
def test_sampling_of_vllm_that_is_reshaped_late_in_a_run_at_a_temperature_of_its_own(model, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    # vLLM scores at temperature 1 alone: what it would say at 0.7 follows from its most probable tokens.
    plant_late_sampling(monkeypatch, VLLMBackend, top_p=0.7)
    options = {"max_staleness": 1, "max_steps": 9, "temperature": 0.7, "rollout": {"engine": "vllm"}}
    with pytest.raises(AgreementError, match=r"an engine must say of tokens.*after .*e-0. at .*tokens were left out"):
        train(model, tmp_path / "run", asynchronous=True, **options)


def test_sampling_that_is_reshaped_late_in_a_run_in_bfloat16_is_told_and_goes_on(model, tmp_path, monkeypatch):
    plant_late_sampling(monkeypatch, top_p=0.7)
    options = {"max_staleness": 1, "max_steps": 9, "dtype": "bfloat16"}
    train(model, tmp_path / "run", asynchronous=True, **options)
    told = [event["detail"] for event in events(tmp_path / "run", "warning")]
    assert "sampling" in [detail.get("cause") for detail in told]


TRUNCATED = {"top_p": 0.7, "top_k": 20, "min_p": 0.02, "temperature": 0.8}
PIPELINES = {grpo: GRPOPipeline, async_grpo: AsyncGRPOPipeline, sdpo: SDPOPipeline, learn: DistillPipeline}
ASKED = {
    "grpo": (grpo, {}),
    "sampler's": (grpo, {"old_logprobs": "sampler"}),
    "product": (grpo, {"old_logprobs": "sampler", "importance_sampling_level": "sequence_product"}),
    "sequence-mask": (grpo, {"vllm_importance_sampling_mode": "sequence_mask", "chunk_lm_head_size": 64}),
    "penalties": (grpo, {"repetition_penalty": 1.3, "min_tokens": 4, "generation_kwargs": {"bad_words": ["e"]}}),
    "packed": (grpo, {"share_prompt": "always", "generation_kwargs": {"typical_p": 0.9}}),
    "async": (async_grpo, {}),
    "sdpo": (sdpo, {"max_staleness": 1}),
    "distill": (learn, {"loss_support": "sampled"}),
}


@pytest.mark.parametrize(("make", "changes"), ASKED.values(), ids=ASKED)
def test_sampling_that_the_run_asked_to_reshape_leaves_ratios_at_one(model, tmp_path, make, changes):
    options = {"max_steps": 2, "runtime": {"max_restarts": 0}, **TRUNCATED, **changes}
    PIPELINES[make](args=make(model, tmp_path / "run", **options), train_dataset=PROMPTS).train()
    [first, _] = lines(tmp_path / "run" / "metrics.jsonl")
    assert first["agreement/age_0/abs_diff"] < 1e-5
    assert first.get("kl/sampler", 0.0) < 1e-9
    # The mean ratio of SDPO is that of the distilled tokens; distillation here has neither.
    ratio = first.get("importance/mean", first.get("self_distillation/is_ratio", 1.0 if make is learn else None))
    assert ratio == pytest.approx(1.0, abs=1e-5)
    assert first.get("importance/max", 1.0) == pytest.approx(1.0, abs=1e-3)
    assert first.get("clip/low", 0.0) == first.get("clip/high", 0.0) == 0.0
    warnings = [event["detail"] for event in events(tmp_path / "run", "warning")]
    assert not [detail for detail in warnings if "cause" in detail]
    assert any("top_p=0.7" in detail["detail"] for detail in warnings)
