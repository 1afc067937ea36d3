"""What a reward model reads: its own template, the end of what ended, steps by themselves, the last tokens that fit."""

import numpy as np
import pytest
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from fakes import completion
from tiny_models import build_tokenizer
from trl_ray.config.reward_model_options import RewardModelKind
from trl_ray.data.prompts.reward_inputs import ReadingRules, RewardReader
from trl_ray.errors import ConfigError, ModelError
from trl_ray.types import FinishReason, Prompt

EOS = 258
QUESTION = {"role": "user", "content": "2+2?"}


def text_prompt(text="ab"):
    return Prompt(prompt_id="0:0", token_ids=np.arange(2, dtype=np.int32), text=text)


def chat_prompt(*messages):
    return Prompt(prompt_id="0:0", token_ids=np.arange(2, dtype=np.int32), messages=messages or (QUESTION,))


def reader(tokenizer=None, *, kind=RewardModelKind.SEQUENCE, **rules):
    return RewardReader(tokenizer or build_tokenizer(), ReadingRules(kind=kind, **rules))


def written(text):
    """A byte-level tokenizer's ids of a text that may hold special tokens."""
    return build_tokenizer()(text)["input_ids"]


def test_a_text_is_read_with_its_completion_and_the_end_where_it_ended():
    read = reader().read(text_prompt(), completion("cd"))
    assert read.token_ids.tolist() == [*written("abcd"), EOS] and read.token_ids.dtype == np.int32
    assert (read.num_cut, len(read.positions)) == (0, 0)


def test_a_completion_that_was_cut_off_gets_no_end_and_none_gets_two():
    cut_off = completion("cd", finish=FinishReason.LENGTH)
    assert reader().read(text_prompt(), cut_off).token_ids.tolist() == written("abcd")
    ended = reader().read(text_prompt(), completion("cd<|im_end|>"))
    assert ended.token_ids.tolist() == [*written("abcd"), EOS]
    assert reader(append_eos=False).read(text_prompt(), completion("cd")).token_ids.tolist() == written("abcd")


def test_a_text_has_the_special_tokens_that_its_tokenizer_adds():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    assert reader(tokenizer).read(text_prompt(), completion("cd")).token_ids.tolist() == [256, *written("abcd"), EOS]


def test_a_conversation_is_rendered_by_the_reward_models_own_template_not_the_policys():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}{{ mood }}"
    read = reader(tokenizer, template_kwargs={"mood": "!"}).read(chat_prompt(), completion("4"))
    assert read.token_ids.tolist() == written("[user|2+2?][assistant|4]!")


def test_an_answer_goes_on_where_the_assistant_had_stopped():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
    prompt = chat_prompt(QUESTION, {"role": "assistant", "content": "It is "})
    read = reader(tokenizer).read(prompt, completion("4"))
    assert read.token_ids.tolist() == written("[user|2+2?][assistant|It is 4]")


def test_the_last_tokens_are_kept_and_what_was_cut_is_told():
    read = reader(max_length=3).read(text_prompt(), completion("cd"))
    assert (read.token_ids.tolist(), read.num_cut) == ([*written("cd"), EOS], 2)


def test_each_step_is_ended_by_the_separator_and_read_at_its_last_token():
    steps = reader(kind=RewardModelKind.STEPS, step_separator="\n\n")
    read = steps.read(text_prompt("Q:"), completion("one\ntwo\n"))
    assert read.token_ids.tolist() == written("Q:one\n\ntwo\n\n")
    assert read.positions.tolist() == [6, 11]


def test_a_cut_solution_loses_the_steps_whose_separators_are_gone():
    steps = reader(kind=RewardModelKind.STEPS, max_length=5)
    read = steps.read(text_prompt("Q:"), completion("one\ntwo"))
    # Q : o n e \n t w o \n
    assert read.token_ids.tolist() == written("\ntwo\n") and read.positions.tolist() == [0, 4]
    read = reader(kind=RewardModelKind.STEPS, max_length=4).read(text_prompt("Q:"), completion("one\ntwo"))
    assert (read.positions.tolist(), read.num_cut) == ([3], 6)


def test_a_conversation_in_steps_has_the_header_of_the_answer_before_them():
    steps = reader(kind=RewardModelKind.STEPS)
    before = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert steps.read(chat_prompt(), completion("4")).token_ids.tolist() == written(f"{before}4\n")
    unfinished = chat_prompt(QUESTION, {"role": "assistant", "content": "Add."})
    begun = before + "Add."
    assert steps.read(unfinished, completion("4")).token_ids.tolist() == written(f"{begun}4\n")


def test_an_empty_completion_has_no_steps():
    read = reader(kind=RewardModelKind.STEPS).read(text_prompt("Q:"), completion(" "))
    assert (read.token_ids.tolist(), len(read.positions)) == (written("Q:"), 0)


def test_a_separator_that_is_no_token_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ConfigError, match="step_separator"):
        reader(tokenizer, kind=RewardModelKind.STEPS, step_separator="\n")


def test_conversations_need_a_template_that_takes_them_and_texts_none():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    reader(tokenizer).check(text_prompt())
    with pytest.raises(ModelError, match="must have a chat template"):
        reader(tokenizer).check(chat_prompt())
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(ModelError, match="no system, please"):
        reader(tokenizer).check(chat_prompt())
