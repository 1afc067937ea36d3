"""Tokenizers that are longer than the embedding: rows for all, the same ones wherever the model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tiny_models import build_tiny_model, build_tokenizer
from trl_ray.config.reward_model_options import RewardModelOptions
from trl_ray.config.sections import EngineChoice, ModelConfig
from trl_ray.engines.checkpoint_facts import read_facts
from trl_ray.engines.factory import create_engine
from trl_ray.errors import ModelError
from trl_ray.models.adapters.lora import save_adapter
from trl_ray.models.adapters.merging import export_merged, merged_weights
from trl_ray.models.companions.reference import check_reference
from trl_ray.models.policy_loading import load_policy, load_shape, load_tokenizer
from trl_ray.models.scoring.reward_model import find_reward_model
from trl_ray.models.vocabulary import missing_rows, names_tokenizer, num_tokens
from trl_ray.models.weight_payload import export_weights
from trl_ray.pipelines.run.model_notes import model_notes
from trl_ray.types import GenerationRequest, SamplingParams

# 260 tokens, and the embedding has as many rows; with two more 262, and the next multiple of 64 is 320.
ROWS, GROWN = 260, 320


def longer_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("</tool>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("fitting"), tied=False)


@pytest.fixture(scope="module")
def longer(fitting: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer was given two tokens and saved again, as one forgets to resize."""
    folder = tmp_path_factory.mktemp("longer")
    shutil.copytree(fitting, folder, dirs_exist_ok=True)
    longer_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_row_for_each_token_in_multiples_of_64_and_none_where_all_have_one() -> None:
    assert num_tokens(longer_tokenizer()) == 262
    assert missing_rows(longer_tokenizer(), ROWS) == GROWN
    assert missing_rows(longer_tokenizer(), 262) is None
    assert missing_rows(build_tokenizer(), 512) is None, "a padded vocabulary is fine"


def test_policy_and_reference_get_the_same_new_rows_and_keep_the_old_ones(longer: str, fitting: str) -> None:
    model = ModelConfig(model_name_or_path=longer)
    policy, reference = load_policy(model), load_policy(model, trainable=False)
    plain = AutoModelForCausalLM.from_pretrained(fitting)
    for find in ("get_input_embeddings", "get_output_embeddings"):
        mine, other, old = (getattr(each, find)().weight for each in (policy, reference, plain))
        assert mine.shape == (GROWN, 128)
        assert torch.equal(mine, other)
        assert torch.equal(mine[:ROWS], old)
        assert mine[ROWS:].abs().sum() > 0
    assert policy.config.vocab_size == load_shape(model, load_tokenizer(model)).vocab_size == GROWN


def test_the_global_random_state_is_left_alone(longer: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_policy(ModelConfig(model_name_or_path=longer))
    assert torch.equal(torch.rand(1), expected)


def test_a_checkpoint_has_the_rows_and_goes_on_with_them(longer: str, tmp_path: Path) -> None:
    model = ModelConfig(model_name_or_path=longer)
    policy = load_policy(model)
    with torch.no_grad():
        policy.get_input_embeddings().weight[261] = 7.0  # type: ignore[no-untyped-call]
    policy.save_pretrained(tmp_path)
    again = load_policy(model, path=str(tmp_path))
    assert torch.equal(again.get_input_embeddings().weight, policy.get_input_embeddings().weight)  # type: ignore[no-untyped-call]


def test_the_engine_takes_the_learners_weights_and_generates_the_new_tokens(longer: str) -> None:
    policy = load_policy(ModelConfig(model_name_or_path=longer), trainable=False)
    with torch.no_grad():
        policy.get_output_embeddings().weight.zero_()[261] = 1.0  # type: ignore[no-untyped-call]
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=longer))
    engine = create_engine(
        EngineChoice.TRANSFORMERS, model=longer, dtype="float32", max_model_len=64, max_num_seqs=2, tokenizer=tokenizer
    )
    try:
        engine.load_weights(export_weights(merged_weights(policy), version=1))
        request = GenerationRequest(
            request_id="a",
            prompt_ids=np.array([5, 260], dtype=np.int32),
            n=1,
            sampling=SamplingParams(max_tokens=3, temperature=0.0),
            seed=0,
        )
        (completion,) = engine.submit([request])[0].result(timeout=60.0)
    finally:
        engine.close()
    with torch.no_grad():
        best = int(policy(input_ids=torch.tensor([[5, 260]])).logits[0, -1].argmax())
    assert completion.token_ids[0] == best


def test_only_an_engine_that_is_given_a_tokenizer_grows(longer: str) -> None:
    """A teacher's engine is never fed weights: it keeps those of the files, whatever its tokenizer has."""
    kept = read_facts(longer, dtype="float32", trust_remote_code=False)
    assert (kept.vocab_size, kept.grown, num_tokens(kept.tokenizer)) == (ROWS, False, 262)
    given = load_tokenizer(ModelConfig(model_name_or_path=longer))
    grown = read_facts(longer, dtype="float32", trust_remote_code=False, tokenizer=given)
    assert (grown.vocab_size, grown.grown) == (GROWN, True)


def test_an_adapter_stands_on_the_same_rows_and_its_merged_model_has_them(longer: str, tmp_path: Path) -> None:
    model = ModelConfig(model_name_or_path=longer, use_peft=True)
    policy = load_policy(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(policy, folder)
    load_tokenizer(model).save_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(export_merged(folder, tmp_path / "merged"))
    assert torch.equal(merged.get_input_embeddings().weight, policy.get_input_embeddings().weight)  # type: ignore[no-untyped-call]
    facts = read_facts(str(tmp_path / "merged"), dtype="float32", trust_remote_code=False)
    assert (facts.vocab_size, facts.grown) == (GROWN, False)


def test_the_template_of_another_tokenizer_brings_its_tokens_and_its_end(fitting: str, tmp_path: Path) -> None:
    other = longer_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}</tool>"
    other.eos_token = "</tool>"
    other.save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=fitting, chat_template=str(tmp_path))
    tokenizer, policy = load_tokenizer(model), load_policy(model)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert ids == [*tokenizer.encode("a", add_special_tokens=False), 261]
    assert tokenizer.eos_token_id == policy.config.eos_token_id == 261
    assert policy.generation_config.eos_token_id == [261, 258]
    assert policy.config.vocab_size == GROWN


@pytest.mark.parametrize("line", ["", "{# one #}\n"])
def test_a_template_may_be_given_itself(line: str, fitting: str, tmp_path: Path) -> None:
    text = line + "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    (tmp_path / "chat.jinja").write_text(text)
    inline, in_file = (
        load_tokenizer(ModelConfig(model_name_or_path=fitting, chat_template=given))
        for given in (text, str(tmp_path / "chat.jinja"))
    )
    message = [{"role": "user", "content": "a"}]
    assert inline.apply_chat_template(message, tokenize=False) == "<a>"
    assert inline.chat_template == in_file.chat_template == text
    with pytest.raises(ModelError, match=r"must be a template, a readable file or a tokenizer, got missing\.jinja"):
        load_tokenizer(ModelConfig(model_name_or_path=fitting, chat_template="missing.jinja"))


def test_a_padding_token_is_that_of_the_checkpoint(fitting: str) -> None:
    tokenizer, policy = (
        load(ModelConfig(model_name_or_path=fitting, pad_token="!")) for load in (load_tokenizer, load_policy)
    )
    assert tokenizer.pad_token == "!" and tokenizer.eos_token != "!"
    assert policy.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("!")
    assert model_notes(ModelConfig(model_name_or_path=fitting, pad_token="!"), tokenizer) == ()
    # Of another model's recipe: its own is kept, and that is said.
    other = ModelConfig(model_name_or_path=fitting, pad_token="<none>")
    kept = load_tokenizer(other).pad_token
    assert kept == load_tokenizer(ModelConfig(model_name_or_path=fitting)).pad_token
    [note] = model_notes(other, load_tokenizer(other))
    assert note.startswith(f"pad_token='<none>' is no token of the tokenizer, which keeps {kept!r}")


def test_a_template_file_a_folder_and_a_name_are_told_apart(fitting: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("x")
    assert names_tokenizer(str(tmp_path)) and names_tokenizer("org/some-model-1.5") and names_tokenizer("gpt2")
    assert not names_tokenizer(str(file)) and not names_tokenizer("missing.jinja")
    assert not names_tokenizer("{{ messages }}") and not names_tokenizer("/no/such/file")
    with pytest.raises(ModelError, match="chat_template must be a template's file, or a tokenizer that has a template"):
        load_tokenizer(ModelConfig(model_name_or_path=fitting, chat_template=str(tmp_path)))


def test_a_reference_without_a_row_for_each_token_is_refused_before_the_start(longer: str, fitting: str) -> None:
    from trl_ray.config.losses.preference_options import PreferenceLossConfig

    model = ModelConfig(model_name_or_path=longer, ref_model_name_or_path=fitting)
    with pytest.raises(ModelError, match=r"must know all 262 tokens of the policy, but .* has 260"):
        check_reference(model, PreferenceLossConfig())


def test_a_reference_has_the_rows_that_loading_gives_it(longer: str, tmp_path: Path) -> None:
    from trl_ray.config.losses.preference_options import PreferenceLossConfig

    check_reference(ModelConfig(model_name_or_path=longer, ref_model_name_or_path=longer), PreferenceLossConfig())
    # Without a tokenizer it is loaded with the rows that its files have.
    shutil.copytree(longer, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    bare = ModelConfig(model_name_or_path=longer, ref_model_name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match=r"must know all 262 tokens of the policy, but .* has 260"):
        check_reference(bare, PreferenceLossConfig())


def test_a_reward_model_without_a_row_for_each_token_is_refused_before_the_start(tmp_path: Path) -> None:
    from tiny_reward_models import build_reward_model

    folder = build_reward_model(tmp_path / "reward")
    longer_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match=r"a row for each of the 262 ids of its tokenizer, but .* has 260"):
        find_reward_model(RewardModelOptions(model_name_or_path=folder))
