"""Classifiers give transformers' own logits in every layout, and their checkpoints load with transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    OPTConfig,
    PreTrainedModel,
)

from tiny_models import build_tiny_model
from trl_ray.algorithms.loss import LossNeeds
from trl_ray.config.sections import Dtype, ModelConfig, SharePrompt
from trl_ray.errors import ModelError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.adapters.merging import export_merged, merged_weights
from trl_ray.models.checkpoint import begin_checkpoint, finish_checkpoint
from trl_ray.models.policy_loading import load_policy
from trl_ray.models.scoring import segment_attention
from trl_ray.models.scoring.classifier import (
    ClassifierModule,
    check_classifier,
    count_classifier_parameters,
    load_classifier,
    load_classifier_tokenizer,
)
from trl_ray.models.scoring.head import class_head
from trl_ray.models.scoring.sample_scorer import ClassScores, SampleScorer
from trl_ray.types import TrainingSample

EOS, PAD = 258, 259
AUTO: dict[int, Any] = {1: AutoModelForSequenceClassification, 2: AutoModelForTokenClassification}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model with tied embeddings."""
    return build_tiny_model(tmp_path_factory.mktemp("classifier") / "tiny")


def config(path: str, **changes: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=path, **{"gradient_checkpointing": False} | changes)


def adapter_config(path: str, **changes: Any) -> ModelConfig:
    return config(path, use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=["q_proj", "v_proj"], **changes)


def sequence(group: int, prompt: list[int], completion: list[int]) -> TrainingSample:
    """Read at the last token; one more follows that stands for it."""
    return marked(group, prompt, [*completion, EOS], [len(completion)])


def marked(group: int, prompt: list[int], completion: list[int], places: list[int]) -> TrainingSample:
    """Read before each of some places of the completion."""
    mask = np.zeros(len(completion), dtype=np.bool_)
    mask[places] = True
    return TrainingSample(
        group_id=group,
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        loss_mask=mask,
    )


PAIRS = [
    sequence(0, [5, 6, 7], [8, 9, EOS]),
    sequence(0, [5, 6, 7], [11, EOS]),
    sequence(1, [30], [40, 41, 42, 43, EOS]),
    sequence(1, [30], [44]),
]
SOLUTIONS = [marked(0, [5, 6, 7], [8, 9, 10, 11, 12, EOS], [2, 5]), marked(1, [30, 31], [40, 41, EOS], [1, 2])]


def scorer(model: PreTrainedModel, *, bf16: bool = False, share: SharePrompt = SharePrompt.ALWAYS) -> SampleScorer:
    return SampleScorer(ClassifierModule(model, bf16=bf16), share_prompt=share, temperature=1.0)


def logits(model: PreTrainedModel, samples: list[TrainingSample], **options: Any) -> Tensor:
    scores = scorer(model, **options).score(samples)
    assert isinstance(scores, ClassScores)
    return scores.logits


def padded(samples: list[TrainingSample], pad: int = PAD) -> dict[str, Tensor]:
    """The tokens of sequences as transformers takes them, padded at the right."""
    rows = [[*sample.prompt_ids.tolist(), *sample.completion_ids[:-1].tolist()] for sample in samples]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


@torch.no_grad()
def transformers_logits(model: Any, samples: list[TrainingSample]) -> Tensor:
    """[B, 1] of a padded batch of sequences, proved to be those of single ones."""
    batch = model.eval()(**padded(samples)).logits
    for row, sample in zip(batch, samples, strict=True):
        torch.testing.assert_close(model(**padded([sample])).logits[0], row, rtol=1e-4, atol=1e-4)
    return batch


@torch.no_grad()
def transformers_steps(model: Any, samples: list[TrainingSample]) -> Tensor:
    """[N, 2] of solutions, one by one."""
    found = []
    for sample in samples:
        places = len(sample.prompt_ids) + np.flatnonzero(sample.loss_mask) - 1
        found.append(model.eval()(**padded([sample])).logits[0, places])
    return torch.cat(found)


def move(model: PreTrainedModel) -> PreTrainedModel:
    """Change all that is trained, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def save(model: PreTrainedModel, directory: Path, source: ModelConfig) -> str:
    begin_checkpoint(directory, step=1)
    tokenizer = load_classifier_tokenizer(source)
    return finish_checkpoint(directory, step=1, model=model, trainer_state={}, tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("share", list(SharePrompt))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_layout_gives_transformers_logits(
    tmp_path: Path, family: str, share: SharePrompt, attention: str
) -> None:
    path = build_tiny_model(tmp_path, family=family)
    reward = move(load_classifier(config(path, attn_implementation=attention), num_labels=1))
    assert scorer(reward, share=share).can_share is (share is not SharePrompt.NEVER)
    torch.testing.assert_close(
        logits(reward, PAIRS, share=share), transformers_logits(reward, PAIRS), rtol=1e-4, atol=1e-4
    )
    steps = move(load_classifier(config(path, attn_implementation=attention), num_labels=2))
    found = logits(steps, SOLUTIONS, share=share)
    assert found.shape == (4, 2) and found.dtype == torch.float32
    torch.testing.assert_close(found, transformers_steps(steps, SOLUTIONS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_checkpoint_gives_the_same_logits_in_transformers_and_here(
    tmp_path: Path, tiny: str, num_labels: int
) -> None:
    model = move(load_classifier(config(tiny), num_labels=num_labels))
    samples = PAIRS if num_labels == 1 else SOLUTIONS
    expected = logits(model, samples).detach()
    path = save(model, tmp_path, config(tiny))
    theirs, info = AUTO[num_labels].from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = transformers_logits(theirs, samples) if num_labels == 1 else transformers_steps(theirs, samples)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = load_classifier(config(path), num_labels=num_labels, seed=9)
    assert torch.equal(logits(again, samples), expected)
    assert torch.equal(logits(load_classifier(config(tiny), num_labels=num_labels, path=path), samples), expected)
    written = json.loads((Path(path) / "config.json").read_text())
    ending = "ForSequenceClassification" if num_labels == 1 else "ForTokenClassification"
    assert written["architectures"][0].endswith(ending) and written["pad_token_id"] == PAD
    assert written.get("problem_type") is None
    if num_labels == 2:
        assert theirs.config.id2label == {0: "wrong", 1: "right"}


def _without_padding_token(path: Path, *, start: bool) -> str:
    """A model whose tokenizer pads with the end of the sequence, with or without another special token."""
    build_tiny_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    kept = {"<|im_end|>", "<|im_start|>"} if start else {"<|im_end|>"}
    for entry in content["added_tokens"]:
        entry["special"] = entry["content"] in kept
    file.write_text(json.dumps(content))
    tokenizer_config = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer_config["pad_token"] = tokenizer.eos_token
    tokenizer_config.pop("added_tokens_decoder", None)
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    model_config = json.loads((path / "config.json").read_text()) | {"pad_token_id": EOS}
    (path / "config.json").write_text(json.dumps(model_config))
    return str(path)


def test_the_end_of_a_sequence_is_read_where_another_token_can_pad(tmp_path: Path) -> None:
    source = config(_without_padding_token(tmp_path / "model", start=True))
    model = move(load_classifier(source, num_labels=1))
    assert model.config.pad_token_id == load_classifier_tokenizer(source).pad_token_id == 257
    ended, other = logits(model, [sequence(0, [5, 6], [8, EOS]), sequence(0, [5, 6], [8])])
    assert ended != other
    path = save(model, tmp_path, source)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.pad_token_id == 257 and load_classifier_tokenizer(config(path)).pad_token_id == 257
    theirs = AUTO[1].from_pretrained(path)
    with torch.no_grad():
        batch = theirs(**padded(PAIRS, pad=257)).logits
    torch.testing.assert_close(logits(model, PAIRS), batch, rtol=1e-4, atol=1e-4)


def test_sequences_are_read_where_transformers_reads_them_when_only_their_end_can_pad(tmp_path: Path) -> None:
    source = config(_without_padding_token(tmp_path / "model", start=False))
    model = move(load_classifier(source, num_labels=1))
    assert model.config.pad_token_id == EOS
    samples = [*PAIRS, sequence(2, [5, EOS], [EOS, EOS]), sequence(3, [EOS], [EOS])]
    with torch.no_grad():
        batch = model.eval()(**padded(samples, pad=EOS)).logits
    torch.testing.assert_close(logits(model, samples), batch, rtol=1e-4, atol=1e-4)


def test_a_new_head_comes_from_its_seed_alone(tiny: str) -> None:
    def head(seed: int, drawn: int, **changes: Any) -> Tensor:
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        weight: Any = class_head(load_classifier(config(tiny, **changes), num_labels=2, seed=seed)).weight
        assert torch.equal(before, torch.get_rng_state())
        return weight.detach().float()

    assert torch.equal(head(3, 1), head(3, 2)) and not torch.equal(head(3, 1), head(4, 1))
    assert 0.15 < float(head(3, 1).std()) < 0.25  # initializer_range of the tiny models is 0.2
    torch.testing.assert_close(head(3, 1, dtype=Dtype.BFLOAT16), head(3, 1), rtol=1e-2, atol=1e-2)


def test_weights_other_than_a_new_head_must_be_there(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "language")
    reward = save(load_classifier(config(path), num_labels=1), tmp_path, config(path))
    for folder, name in ((path, "model.norm.weight"), (reward, "score.weight")):
        file = Path(folder) / "model.safetensors"
        weights = load_file(file)
        del weights[name]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=name):
            load_classifier(config(folder), num_labels=1)


def test_a_classifier_of_another_kind_is_refused(tmp_path: Path, tiny: str) -> None:
    reward = save(load_classifier(config(tiny), num_labels=1), tmp_path / "reward", config(tiny))
    with pytest.raises(ModelError, match="num_labels 2"):
        load_classifier(config(reward), num_labels=2)
    with pytest.raises(ModelError, match="num_labels 2"):
        count_classifier_parameters(config(reward), num_labels=2)
    three = AUTO[1].from_pretrained(tiny, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="of num_labels 3"):
        load_classifier(config(str(tmp_path / "three")), num_labels=1)


def test_a_family_without_such_a_classifier_is_refused(tmp_path: Path) -> None:
    OPTConfig(
        vocab_size=260, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    ).save_pretrained(tmp_path)
    for ask in (load_classifier, count_classifier_parameters):
        with pytest.raises(ModelError, match="ForTokenClassification of the model type opt"):
            ask(config(str(tmp_path)), num_labels=2)
    assert count_classifier_parameters(config(str(tmp_path)), num_labels=1).base > 260 * 16


@pytest.mark.parametrize("use_peft", [False, True])
def test_gathered_weights_are_saved_where_the_models_own_are_split(tmp_path: Path, tiny: str, use_peft: bool) -> None:
    source = adapter_config(tiny) if use_peft else config(tiny)
    model = move(load_classifier(source, num_labels=1))
    expected = logits(model, PAIRS).detach()
    whole = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.data = parameter.data[:0] if parameter.requires_grad else parameter.data
    begin_checkpoint(tmp_path, step=1)
    path = finish_checkpoint(tmp_path, step=1, model=model, trainer_state={}, weights=whole)
    again = load_classifier(source, num_labels=1, path=path, seed=5)
    assert torch.equal(logits(again, PAIRS), expected)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_an_adapter_trains_the_head_and_its_checkpoint_loads_with_peft(
    tmp_path: Path, tiny: str, num_labels: int
) -> None:
    peft = pytest.importorskip("peft")
    model = move(load_classifier(adapter_config(tiny), num_labels=num_labels))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name.startswith("score.modules_to_save") for name in trained)
    assert any(name.startswith("score") for name in trained)
    samples = PAIRS if num_labels == 1 else SOLUTIONS
    expected = logits(model, samples).detach()
    path = save(model, tmp_path, adapter_config(tiny))
    assert not (Path(path) / "model.safetensors").exists()
    again = load_classifier(adapter_config(tiny), num_labels=num_labels, path=path, seed=7)
    assert torch.equal(logits(again, samples), expected)
    kinds = {1: peft.AutoPeftModelForSequenceClassification, 2: peft.AutoPeftModelForTokenClassification}
    theirs = kinds[num_labels].from_pretrained(path, num_labels=num_labels)
    theirs.config.pad_token_id = PAD
    compare = transformers_logits if num_labels == 1 else transformers_steps
    torch.testing.assert_close(compare(theirs, samples), expected, rtol=1e-4, atol=1e-4)
    merged = AUTO[num_labels].from_pretrained(export_merged(path, tmp_path / "merged"))
    assert merged.config.pad_token_id == PAD
    torch.testing.assert_close(compare(merged, samples), expected, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in merged_weights(model)]
    assert names == [name for name, _ in merged.named_parameters()]


def test_all_linear_leaves_the_head_to_be_trained_in_full(tiny: str) -> None:
    pytest.importorskip("peft")
    changes = {"lora_target_modules": ["all-linear"], "lora_modules_to_save": ["norm"]}
    model = load_classifier(config(tiny, use_peft=True, **changes), num_labels=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.modules_to_save.default.weight" in trained and "model.norm.modules_to_save.default.weight" in trained
    assert not any(name.startswith("score") and "lora" in name for name in trained)


def test_a_language_models_adapter_is_refused_because_it_has_no_such_head(tmp_path: Path, tiny: str) -> None:
    pytest.importorskip("peft")
    save_adapter(load_policy(adapter_config(tiny)), tmp_path)
    with pytest.raises(ModelError, match="must hold the head"):
        load_classifier(adapter_config(str(tmp_path)), num_labels=1)


def test_gradient_checkpointing_and_sharing_give_the_gradients_of_single_sequences(tiny: str) -> None:
    gradients = []
    for checkpointing, share in ((False, SharePrompt.NEVER), (True, SharePrompt.ALWAYS)):
        model = load_classifier(config(tiny, gradient_checkpointing=checkpointing), num_labels=1)
        logits(model, PAIRS, share=share).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_logits_are_float32_under_autocast_and_of_half_precision_weights(tiny: str) -> None:
    model = load_classifier(config(tiny), num_labels=1)
    plain, cast = logits(model, PAIRS).detach(), logits(model, PAIRS, bf16=True).detach()
    half = logits(load_classifier(config(tiny, dtype=Dtype.BFLOAT16), num_labels=1), PAIRS).detach()
    assert cast.dtype == half.dtype == torch.float32
    assert 0 < float((plain - cast).abs().mean()) < 0.1 * float(plain.abs().mean())
    assert 0 < float((plain - half).abs().mean()) < 0.2 * float(plain.abs().mean())


def test_dropout_is_off_unless_it_is_wanted(tiny: str) -> None:
    off = load_classifier(config(tiny), num_labels=2)
    on = load_classifier(config(tiny), num_labels=2, disable_dropout=False)
    assert off.training and torch.equal(logits(off, SOLUTIONS), logits(off, SOLUTIONS))
    assert not torch.equal(logits(on, SOLUTIONS), logits(on, SOLUTIONS))  # of the head: the tiny models have no other
    assert torch.equal(logits(on.eval(), SOLUTIONS), logits(off, SOLUTIONS))
    frozen = load_classifier(config(tiny), num_labels=2, trainable=False)
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())


def test_attention_that_mixes_segments_up_is_found_by_the_logits(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_classifier(config(tiny), num_labels=1)
    weight: Any = class_head(model).weight
    weight.data.mul_(1e-4)  # however small they are
    assert scorer(model).can_share
    right = segment_attention.segment_attention

    def wrong(*args: Any, segments: Any = None, **kwargs: Any) -> Any:
        return right(*args, **kwargs)

    monkeypatch.setitem(
        segment_attention.AttentionInterface._global_mapping, segment_attention.SEGMENT_ATTENTION, wrong
    )
    assert scorer(model, share=SharePrompt.AUTO).can_share is False
    with pytest.raises(ModelError, match="of its logits in a shared row"):
        scorer(model)


def test_a_model_that_computes_its_logits_otherwise_is_refused(tiny: str) -> None:
    model = load_classifier(config(tiny), num_labels=2)
    check_classifier(model)
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits + 1.0
        return output

    model.forward = forward  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="computes them otherwise"):
        check_classifier(model)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_parameters_are_counted_without_loading(tiny: str, num_labels: int) -> None:
    count = count_classifier_parameters(config(tiny), num_labels=num_labels)
    model = load_classifier(config(tiny), num_labels=num_labels)
    assert (count.base, count.trained) == (model.num_parameters(), model.num_parameters())
    language = AutoModelForCausalLM.from_pretrained(tiny).num_parameters()  # its head is tied
    assert count.base == language + (128 if num_labels == 1 else 258)
    pytest.importorskip("peft")
    adapted = count_classifier_parameters(adapter_config(tiny), num_labels=num_labels)
    loaded = load_classifier(adapter_config(tiny), num_labels=num_labels)
    assert adapted.trained == sum(p.numel() for p in loaded.parameters() if p.requires_grad)


def test_questions_to_language_heads_are_no_questions_to_classifiers(tiny: str) -> None:
    made = scorer(load_classifier(config(tiny), num_labels=1))
    with pytest.raises(AssertionError, match="no log-probs"):
        made.sequence_logprobs(np.array([5, 6, 7], dtype=np.int32))
    with pytest.raises(AssertionError, match="no log-probs"):
        made.logprobs(PAIRS)
    needs = LossNeeds(top1=True)
    module = ClassifierModule(load_classifier(config(tiny), num_labels=1))
    noted = SampleScorer(module, share_prompt=SharePrompt.AUTO, temperature=0.5, needs=needs).score(PAIRS)
    plain = made.score(PAIRS)
    assert isinstance(noted, ClassScores) and isinstance(plain, ClassScores)
    assert torch.equal(noted.logits, plain.logits)
    assert made.score([marked(0, [5], [6], [])]) is None
