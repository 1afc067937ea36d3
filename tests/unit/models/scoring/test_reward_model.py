"""Reward models: what each row is worth alone, whatever stands beside it; steps by hand; folders that cannot rate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
)

from tiny_models import build_tiny_model, build_tokenizer
from tiny_reward_models import build_reward_model, random_reward_model
from trl_ray.config.losses.reward_modelling_options import StepAggregation
from trl_ray.config.reward_model_options import RewardModelKind, RewardModelOptions
from trl_ray.errors import ModelError
from trl_ray.models.scoring.reward_model import (
    RewardModel,
    count_reward_parameters,
    find_reward_model,
    load_reward_model,
)

ROWS = [np.array(row, np.int32) for row in ([5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [258, 0], [2, 2, 258])]
NOWHERE = [np.empty(0, np.int32)] * len(ROWS)


def options(path, **changes):
    return RewardModelOptions(model_name_or_path=str(path), **changes)


def opened(path, **changes):
    chosen = options(path, **changes)
    return load_reward_model(chosen, find_reward_model(chosen))


def alone(path, rows=ROWS):
    """What transformers itself says of each row by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(row).long()[None]).logits.item() for row in rows]


@pytest.mark.parametrize("pad", [259, 258, None], ids=["its own", "the end of sequence", "none"])
def test_a_row_is_worth_what_transformers_says_of_it_alone_whatever_stands_beside_it(tmp_path, pad):
    path = build_reward_model(tmp_path, pad=pad)
    model = opened(path)
    expected = alone(path)
    assert model.rate(ROWS, NOWHERE) == pytest.approx(expected, abs=1e-5)
    assert model.rate(ROWS[2:], NOWHERE[2:]) == pytest.approx(expected[2:], abs=1e-5)
    assert len({round(value, 3) for value in expected}) == len(ROWS)


def test_without_padding_in_its_configuration_a_row_is_read_at_its_last_token_whatever_that_is():
    model = RewardModel(random_reward_model(pad=None), kind=RewardModelKind.SEQUENCE, aggregation=StepAggregation.MIN)
    rows = [np.array([7, token], np.int32) for token in (0, 1, 2)]
    one_by_one = [model.rate([row], NOWHERE[:1])[0] for row in rows]
    assert model.rate([*rows, np.arange(5, dtype=np.int32)], NOWHERE[:4])[:3] == pytest.approx(one_by_one, abs=1e-5)


def test_a_capped_attention_rates_as_it_was_trained(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
        config = Gemma2Config(
            **sizes,
            vocab_size=260,
            num_attention_heads=2,
            num_key_value_heads=2,
            query_pre_attn_scalar=1,
            attn_logit_softcapping=0.5,
            initializer_range=0.5,
            pad_token_id=0,
            num_labels=1,
        )
        Gemma2ForSequenceClassification(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)

    def rated(attention):
        raw = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=attention)
        with torch.no_grad():
            return raw(input_ids=torch.from_numpy(ROWS[0]).long()[None]).logits.item()

    assert abs(rated("sdpa") - rated("eager")) > 1e-3, "sdpa leaves the cap out"
    assert opened(tmp_path).rate(ROWS[:1], NOWHERE[:1]) == pytest.approx([rated("eager")], abs=1e-5)


def test_autocast_computes_in_bfloat16_and_answers_numbers(tmp_path):
    path = build_reward_model(tmp_path)
    exact, rough = opened(path).rate(ROWS, NOWHERE), opened(path, bf16=True).rate(ROWS, NOWHERE)
    assert rough == pytest.approx(exact, abs=0.5) and rough != exact


@pytest.mark.parametrize(
    ("how", "combine"), [("min", min), ("product", np.prod), ("mean", np.mean), ("last", lambda steps: steps[-1])]
)
def test_steps_are_read_at_their_positions_and_become_one_reward(tmp_path, how, combine):
    path = build_reward_model(tmp_path, labels=2)
    positions = [np.array(places, np.int32) for places in ([0, 2], [0], [1, 3, 6], [], [2])]
    raw = AutoModelForTokenClassification.from_pretrained(path)
    expected = []
    for row, places in zip(ROWS, positions, strict=True):
        with torch.no_grad():
            wrong, right = raw(input_ids=torch.from_numpy(row).long()[None]).logits[0].T.double().numpy()
        rated = 1 / (1 + np.exp(wrong - right))
        expected.append(float(combine(rated[places])) if len(places) else None)
    got = opened(path, aggregation=how).rate(ROWS, positions)
    assert [value is None for value in got] == [False, False, False, True, False]
    assert [value for value in got if value is not None] == pytest.approx(
        [value for value in expected if value is not None], abs=1e-6
    )
    assert opened(path).rate(ROWS[3:4], positions[3:4]) == [None]


def test_kind_length_and_size_are_known_before_the_weights_are_read(tmp_path):
    rated = options(build_reward_model(tmp_path / "rm"))
    stepped = options(build_reward_model(tmp_path / "prm", labels=2), max_length=100)
    found = find_reward_model(rated)
    assert (found.kind, found.max_length, found.adapter) == (RewardModelKind.SEQUENCE, 512, None)
    assert count_reward_parameters(rated, found) == sum(p.numel() for p in random_reward_model().parameters())
    found = find_reward_model(stepped)
    assert (found.kind, found.max_length) == (RewardModelKind.STEPS, 100)


def changed(path: Path, **changes) -> str:
    """The same folder with another config.json; None removes a key."""
    file = path / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(path)


def broken(tmp_path: Path, name: str) -> RewardModelOptions:
    folder = tmp_path / "it"
    if name == "a causal language model":
        return options(build_tiny_model(folder))
    if name == "a causal language model called a classifier":
        return options(build_tiny_model(folder), kind="sequence")
    if name == "no folder":
        return options(tmp_path / "nope")
    if name == "three labels":
        return options(build_reward_model(folder, num_labels=3))
    if name == "one label of steps":
        return options(build_reward_model(folder, labels=2, num_labels=1))
    build_reward_model(folder)
    match name:
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "no tokenizer":
            for file in folder.glob("token*"):
                file.unlink()
        case "no architecture":
            changed(folder, architectures=None)
        case "the other kind":
            return options(folder, kind="steps")
        case "longer than the model":
            return options(folder, max_length=513)
    return options(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a causal language model", r"sequence classifier with 1 label.*Qwen2ForCausalLM.*trl-ray reward"),
        ("a causal language model called a classifier", "Qwen2ForCausalLM"),
        ("no folder", "no such directory"),
        ("three labels", "num_labels=1 to be a reward.*has 3"),
        ("one label of steps", "num_labels=2 to be a reward.*has 1"),
        ("no weights", "must hold weights"),
        ("no tokenizer", "must hold the model's tokenizer"),
        ("no architecture", "set kind"),
        ("the other kind", "kind must be sequence.*got steps"),
        ("longer than the model", "512 positions, got 513"),
    ],
)
def test_what_cannot_rate_is_refused_by_name_before_its_weights_are_read(tmp_path, name, says):
    with pytest.raises(ModelError, match=rf"(?s)reward model (it|nope): .*{says}"):
        find_reward_model(broken(tmp_path, name))


def test_a_folder_without_the_head_it_promises_is_refused_rather_than_drawn_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    path = build_reward_model(tmp_path / "rm")
    file = tmp_path / "rm" / "model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"reward model rm: .*1 are missing.*score\.weight"):
        opened(path)


def adapter(tmp_path: Path, *, labels: int, base: str) -> str:
    """An adapter with a head of its own beside a language model, drawn at random, as PEFT saves it."""
    import peft

    task = {1: "SEQ_CLS", 2: "TOKEN_CLS"}[labels]
    auto = {1: AutoModelForSequenceClassification, 2: AutoModelForTokenClassification}[labels]
    config = peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft.get_peft_model(auto.from_pretrained(base, num_labels=labels), config).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("labels", [1, 2])
def test_an_adapter_beside_a_language_model_is_merged_with_its_head(tmp_path, labels):
    peft = pytest.importorskip("peft")
    base = build_tiny_model(tmp_path / "base")
    folder = adapter(tmp_path, labels=labels, base=base)
    auto = {1: AutoModelForSequenceClassification, 2: AutoModelForTokenClassification}[labels]
    raw = peft.PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=labels), folder).eval()
    row = np.array([5, 6, 7, 258], np.int32)
    with torch.no_grad():
        logits = raw(input_ids=torch.from_numpy(row).long()[None]).logits[0]
    wanted = logits[0].item() if labels == 1 else logits[-1].softmax(-1)[1].item()
    assert opened(folder).rate([row, row[:2]], [np.array([3]), np.array([1])])[0] == pytest.approx(wanted, abs=1e-5)


def test_an_adapter_is_read_at_the_last_token_even_where_its_language_model_pads_with_that(tmp_path):
    peft = pytest.importorskip("peft")
    base = build_tiny_model(tmp_path / "base")
    changed(tmp_path / "base", pad_token_id=258)
    folder = adapter(tmp_path, labels=1, base=base)
    raw = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    raw.config.pad_token_id = None  # of a row alone, transformers then reads the last token
    row = np.array([5, 6, 258], np.int32)
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(raw, folder).eval()(input_ids=torch.from_numpy(row).long()[None])
    rated = opened(folder).rate([row, ROWS[2]], NOWHERE[:2])
    assert rated[0] == pytest.approx(wanted.logits.item(), abs=1e-5)


def test_an_adapter_for_something_else_is_refused(tmp_path):
    pytest.importorskip("peft")
    folder = adapter(tmp_path, labels=1, base=build_tiny_model(tmp_path / "base"))
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "CAUSAL_LM"}))
    with pytest.raises(ModelError, match="SEQ_CLS or TOKEN_CLS, its task_type is CAUSAL_LM"):
        find_reward_model(options(folder))
