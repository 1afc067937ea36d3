"""Adapters start as nothing, can be set aside, and travel as options and as folders."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tiny_models import build_tiny_model, build_tokenizer
from trl_ray.config.sections import ModelConfig, SharePrompt
from trl_ray.errors import ModelError
from trl_ray.models.adapters.adapter_config import adapter_options, lora_config
from trl_ray.models.adapters.lora import as_reference, has_adapter, save_adapter
from trl_ray.models.adapters.merging import merged_weights
from trl_ray.models.policy_loading import Policy, count_parameters, load_policy
from trl_ray.models.scoring.sample_scorer import SampleScorer
from trl_ray.models.scoring.scoring_module import ScoringModule

IDS = torch.tensor([[5, 6, 7, 8, 9, 250, 3, 40, 41, 77]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with biases and tied embeddings."""
    return build_tiny_model(tmp_path_factory.mktemp("adapters") / "tiny")


def options(path: str, **changes: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=path, use_peft=True, **{"gradient_checkpointing": False} | changes)


def adapted(path: str, **changes: Any) -> Policy:
    return load_policy(options(path, **changes))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def base_logits(path: str) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def move(policy: Policy, by: float = 0.05, seed: int = 1) -> Policy:
    """Change all that is trained, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
    return policy


def trained(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def saved(policy: Policy, folder: Path) -> str:
    folder.mkdir()
    save_adapter(policy, folder)
    return str(folder)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_new_adapter_changes_no_bit_of_the_outputs_and_is_all_that_is_trained(tiny: str) -> None:
    policy = adapted(tiny, lora_target_modules="all-linear")
    assert has_adapter(policy) and torch.equal(logits(policy), base_logits(tiny))
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(policy))
    assert len(trained(policy)) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_modules_to_save": ["norm"]}])
def test_with_the_adapter_aside_outputs_are_the_base_models_bit_for_bit(tiny: str, changes: dict[str, Any]) -> None:
    policy = move(adapted(tiny, **changes))
    before, own = trained(policy), logits(policy)
    assert not torch.allclose(own, base_logits(tiny), atol=1e-2)
    with as_reference(policy):
        assert torch.equal(logits(policy), base_logits(tiny))
    assert torch.equal(logits(policy), own) and same(trained(policy), before)
    with pytest.raises(ZeroDivisionError), as_reference(policy):
        1 / 0  # noqa: B018
    assert torch.equal(logits(policy), own) and same(trained(policy), before)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "lora_modules_to_save": ["norm"]}])
def test_the_reference_of_a_continued_adapter_is_the_adapter_it_started_from(
    tiny: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = move(adapted(tiny, **changes))
    start = saved(first, tmp_path / "start")
    policy = move(load_policy(options(start), with_reference=True), seed=2)
    checkpoint = saved(policy, tmp_path / "checkpoint")
    resumed = load_policy(options(start), path=checkpoint, with_reference=True)
    for each in (policy, resumed):
        own = logits(each)
        with as_reference(each):
            assert torch.equal(logits(each), logits(first))
        assert torch.equal(logits(each), own) and not torch.allclose(own, logits(first), atol=1e-2)
    assert same(trained(resumed), trained(policy)) and not any(".ref." in name for name in trained(policy))


def test_a_saved_adapter_is_read_back_bit_for_bit_and_by_peft(tiny: str, tmp_path: Path) -> None:
    policy = move(adapted(tiny, use_dora=True, lora_modules_to_save=["norm"]))
    folder = saved(policy, tmp_path / "adapter")
    assert sorted(path.name for path in Path(folder).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert same(trained(adapted(folder)), trained(policy))
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(policy))


def test_a_policy_that_is_not_trained_stays_frozen_when_its_adapter_is_set_aside(tiny: str, tmp_path: Path) -> None:
    start = saved(move(adapted(tiny)), tmp_path / "start")
    for with_reference in (False, True):
        policy = load_policy(options(start), trainable=False, with_reference=with_reference)
        with as_reference(policy):
            pass
        assert not trained(policy)


def test_an_adapter_finds_its_base_model_from_any_folder(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(tiny).parent)
    policy = adapted("./" + Path(tiny).name)
    monkeypatch.chdir(tmp_path)
    folder = saved(policy, tmp_path / "adapter")
    assert same(trained(adapted(folder)), trained(policy))


def test_weights_that_lie_elsewhere_are_saved_instead_of_the_policys_own(tiny: str, tmp_path: Path) -> None:
    policy = adapted(tiny)
    whole = {name: torch.full_like(weight, 0.5) for name, weight in trained(policy).items()}
    (tmp_path / "adapter").mkdir()
    save_adapter(policy, tmp_path / "adapter", whole)
    assert same(trained(adapted(str(tmp_path / "adapter"))), whole)


def test_a_new_adapters_weights_depend_on_the_seed_alone_and_leave_the_random_state(tiny: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = trained(load_policy(options(tiny), seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert same(one, trained(load_policy(options(tiny), seed=3)))
    assert not same(one, trained(load_policy(options(tiny), seed=4)))


def gradients(policy: Policy) -> dict[str, Tensor]:
    policy.train()
    policy(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_adapter_the_same_gradients(tiny: str) -> None:
    plain = gradients(move(adapted(tiny)))
    policy = move(adapted(tiny, gradient_checkpointing=True))
    assert policy.is_gradient_checkpointing
    recomputed = gradients(policy)
    assert len(plain) == len(trained(policy)) and same(plain, recomputed)


def test_disable_dropout_reaches_the_adapter(tiny: str) -> None:
    def probabilities(**changes: Any) -> set[float]:
        policy = load_policy(options(tiny, lora_dropout=0.5), **changes)
        return {module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout)}

    assert probabilities() == {0.0} and probabilities(disable_dropout=False) == {0.5}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changes", [{"lora_target_modules": ["lm_head"]}, {"lora_target_modules": ["embed_tokens"]}])
def test_adapters_on_head_and_embeddings_are_refused(tmp_path: Path, tied: bool, changes: dict[str, Any]) -> None:
    path = build_tiny_model(tmp_path / "m", tied=tied)
    with pytest.raises(ModelError, match=r"must have no low-rank adapter.*lora_modules_to_save trains them in full"):
        adapted(path, **changes)


ENDS = [
    pytest.param(False, ["embed_tokens", "lm_head"], 2, id="untied: both"),
    pytest.param(False, ["lm_head"], 1, id="untied: the head"),
    pytest.param(False, ["embed_tokens", "norm"], 2, id="untied: embeddings"),
    pytest.param(True, ["embed_tokens", "lm_head"], 1, id="tied: both"),
    pytest.param(True, ["lm_head"], 1, id="tied: the head alone is both"),
]


@pytest.mark.parametrize(("tied", "names", "count"), ENDS)
def test_embeddings_and_head_are_trained_beside_the_adapter_scored_merged_and_set_aside(
    tmp_path: Path, tied: bool, names: list[str], count: int
) -> None:
    path = build_tiny_model(tmp_path / "m", tied=tied)
    policy = adapted(path, lora_modules_to_save=names)
    whole = [name for name in trained(policy) if ".modules_to_save." in name and "layers" not in name]
    assert len(whole) == count and torch.equal(logits(policy), base_logits(path))
    scorer = SampleScorer(ScoringModule(policy, chunk_size=None), share_prompt=SharePrompt.NEVER, temperature=1.0)
    ids = IDS[0].numpy().astype(np.int32)

    def scored() -> Tensor:
        return torch.from_numpy(scorer.sequence_logprobs(ids))

    def expected(values: Tensor) -> Tensor:
        return values[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]

    assert torch.allclose(scored(), expected(base_logits(path)), atol=1e-5)
    move(policy)
    moved = expected(logits(policy))
    assert torch.allclose(scored(), moved, atol=1e-5)
    assert not torch.allclose(scored(), expected(base_logits(path)), atol=1e-2)
    with as_reference(policy):
        assert torch.allclose(scored(), expected(base_logits(path)), atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(path)
    plain.load_state_dict(dict(merged_weights(policy)), strict=not tied)
    assert torch.allclose(expected(logits(plain)), moved, atol=1e-4)
    folder = saved(policy, tmp_path / "adapter")
    again = load_policy(options(path, lora_modules_to_save=names), path=folder)
    assert torch.equal(logits(again), logits(policy)) and same(trained(again), trained(policy))
    by_peft = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(by_peft), logits(policy), atol=1e-5)


@pytest.mark.parametrize(("tied", "names", "count"), ENDS[:1] + ENDS[3:4])
def test_gradients_reach_embeddings_and_head_and_whole_weights_save_the_same_adapter(
    tmp_path: Path, tied: bool, names: list[str], count: int
) -> None:
    path = build_tiny_model(tmp_path / "m", tied=tied)
    policy = move(adapted(path, lora_modules_to_save=names))
    module = ScoringModule(policy, chunk_size=None)
    positions = torch.arange(IDS.shape[1])[None]
    logprobs = module(IDS, positions, None, torch.arange(9), IDS[0, 1:], 1.0)[0]
    logprobs.sum().backward()
    ends = {name: p for name, p in policy.named_parameters() if p.requires_grad and ".modules_to_save." in name}
    assert len(ends) == count and all(p.grad is not None and p.grad.abs().sum() > 0 for p in ends.values())
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, weights in ((first, None), (second, trained(policy))):
        folder.mkdir()
        save_adapter(policy, folder, weights)
    assert same(load_file(first / "adapter_model.safetensors"), load_file(second / "adapter_model.safetensors"))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("names", [EXPERTS, EXPERTS[1:]])
def test_experts_in_one_parameter_are_adapted_merged_saved_and_set_aside(tmp_path: Path, names: list[str]) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    path = str(tmp_path / "moe")
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    changes = {"lora_dropout": 0.0, "lora_target_modules": ["q_proj"], "lora_kwargs": {"target_parameters": names}}
    policy = adapted(path, **changes)
    assert torch.allclose(logits(policy), base_logits(path), atol=1e-6)
    move(policy)
    assert not torch.allclose(logits(policy), base_logits(path), atol=1e-2)
    with as_reference(policy):
        assert torch.allclose(logits(policy), base_logits(path), atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(path)
    merged = {name: weight.clone() for name, weight in merged_weights(policy)}
    assert [(name, weight.shape) for name, weight in merged.items()] == [
        (name, weight.shape) for name, weight in plain.named_parameters()
    ]
    plain.load_state_dict(merged)
    assert torch.allclose(logits(plain), logits(policy), atol=1e-4)
    again = load_policy(options(path, **changes), path=saved(policy, tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(policy)) and same(trained(again), trained(policy))


def test_new_rows_are_trained_beside_the_adapter(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m", tied=False)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(path)
    names = [name for name in trained(adapted(path)) if ".lora_" not in name]
    assert names == ["model.embed_tokens.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight"]


def test_target_modules_that_do_not_exist_are_refused(tiny: str) -> None:
    with pytest.raises(ModelError, match="lora_target_modules"):
        adapted(tiny, lora_target_modules=["nowhere"])


def test_a_layer_with_an_adapter_that_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    # GPT-2's layers are linear, though stored the other way round; its token embedding is the head.
    path = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=260, n_positions=32)).save_pretrained(path)
    assert has_adapter(adapted(str(path)))
    with pytest.raises(ModelError, match="beside linear layers"):
        adapted(str(path), lora_target_modules=["wpe"])


def test_a_missing_library_names_what_to_install(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install trl-ray\[peft\]"):
        adapted(tiny)


def test_a_lora_config_becomes_options_that_travel_and_give_it_back() -> None:
    given = LoraConfig(
        r=8,
        lora_alpha=24,
        lora_dropout=0.1,
        target_modules=["q_proj", "k_proj"],
        modules_to_save=["norm"],
        use_dora=True,
        rank_pattern={"q_proj": 2},
        exclude_modules=["v_proj"],
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    values = adapter_options(given)
    assert values["lora_r"] == 8 and values["lora_target_modules"] == ["k_proj", "q_proj"]
    config = ModelConfig(**yaml.safe_load(yaml.safe_dump(pickle.loads(pickle.dumps(values)))))
    assert lora_config(config).to_dict() == given.to_dict()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (IA3Config(), "must be a peft.LoraConfig, got IA3Config"),
        (LoraConfig(bias="all"), "bias must be 'none'"),
        (LoraConfig(trainable_token_indices=[5]), r"Set lora_modules_to_save=\[embed_tokens, lm_head\]"),
        (LoraConfig(lora_bias=True), "lora_bias must be false"),
        (LoraConfig(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights"),
    ],
)
def test_what_engines_cannot_be_given_is_refused(given: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        adapter_options(given)


def test_options_that_peft_does_not_know_are_refused() -> None:
    with pytest.raises(ModelError, match=r"lora_kwargs may hold .* got no_such_field"):
        lora_config(ModelConfig(use_peft=True, lora_kwargs={"no_such_field": 1}))
    for name, value in {"bias": "all", "lora_bias": True}.items():
        with pytest.raises(ModelError, match=f"{name} must be"):
            lora_config(ModelConfig(use_peft=True, lora_kwargs={name: value}))
    assert lora_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"])).target_modules == "all-linear"


@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "lora_modules_to_save": ["norm"]}])
def test_parameters_are_counted_without_making_them(tiny: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = adapted(tiny, **changes)
    counted = count_parameters(options(tiny, **changes))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    assert counted.base == sum(p.numel() for p in base.parameters())
    assert counted.adapter == counted.trained == sum(weight.numel() for weight in trained(policy).values())
    assert count_parameters(options(saved(policy, tmp_path / "adapter"))) == counted
    assert count_parameters(ModelConfig(model_name_or_path=tiny)).trained == counted.base


def test_a_damaged_or_foreign_adapter_is_told(tiny: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(saved(adapted(tiny), tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    first = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != first}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"missing: \['model"):
        adapted(str(folder))
    save_file(weights | {first: torch.zeros(1, 1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="of another shape"):
        adapted(str(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="adapter_model"):
        adapted(str(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="adapter_config"):
        adapted(str(folder))
