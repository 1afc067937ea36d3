import json

import pytest

from trl_ray.config.sections import PromptConfig
from trl_ray.data.prompts.prompt_source import PromptSource, load_prompts
from trl_ray.errors import DataError, ModelError

TEMPLATE = (
    "{% if refuse %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ suffix }}"
)


class CharTokenizer:
    """One token per character; a template that writes ``<role>content`` and opens the assistant's turn."""

    def __init__(self, chat_template=TEMPLATE):
        self.chat_template = chat_template
        self.special_tokens_map = {}

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [([1] if add_special_tokens else []) + [ord(c) for c in t] for t in text]}


def load(rows, tokenizer=None, *, limit=None, seed=0, evaluation=False, **options):
    return load_prompts(
        PromptConfig(**options),
        tokenizer or CharTokenizer(),
        seed=seed,
        max_prompt_tokens=limit,
        dataset=rows,
        evaluation=evaluation,
    )


def decoded(prompt):
    return "".join(map(chr, prompt.token_ids))


def user(text):
    return [{"role": "user", "content": text}]


FIVE = [{"prompt": letter, "answer": i} for i, letter in enumerate("abcde")]


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    source = load(FIVE)
    epochs = [[source.prompt(5 * e + i).text for i in range(5)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list("abcde")] * 3
    assert epochs[0] != epochs[1]


def test_a_prompt_depends_on_its_ordinal_alone():
    first, second = load(FIVE), load(FIVE)
    forward = [first.prompt(i).prompt_id for i in range(20)]
    backward = [second.prompt(i).prompt_id for i in reversed(range(20))]
    assert forward == backward[::-1]


def test_the_seed_changes_the_order_and_no_shuffle_keeps_the_file_s():
    orders = [[load(FIVE, seed=s).prompt(i).text for i in range(5)] for s in range(6)]
    assert len(set(map(tuple, orders))) > 1
    assert [load(FIVE, shuffle_dataset=False).prompt(i).text for i in range(6)] == list("abcdea")


def test_the_prompt_id_names_epoch_and_row_and_columns_travel_along():
    prompt = load(FIVE, shuffle_dataset=False).prompt(7)
    assert (prompt.prompt_id, prompt.text, prompt.columns, prompt.messages) == ("1:2", "c", {"answer": 2}, None)


def test_evaluation_keeps_the_order_of_the_rows():
    assert [load(FIVE, evaluation=True).prompt(i).text for i in range(5)] == list("abcde")


def test_the_fingerprint_changes_with_a_row():
    assert load(FIVE).fingerprint == load(FIVE, seed=3).fingerprint != load(FIVE[:4]).fingerprint


def test_text_gets_the_tokenizer_s_special_tokens_and_a_rendered_conversation_does_not():
    assert load([{"prompt": "hi"}]).prompt(0).token_ids.tolist() == [1, ord("h"), ord("i")]
    assert decoded(load([{"prompt": user("hi")}]).prompt(0)) == "<user>hi<assistant>"


def test_the_system_prompt_comes_first_unless_the_row_has_one():
    rows = [{"prompt": user("hi")}, {"prompt": [{"role": "system", "content": "own"}, *user("ho")]}]
    source = load(rows, system_prompt="be brief", shuffle_dataset=False)
    assert decoded(source.prompt(0)) == "<system>be brief<user>hi<assistant>"
    assert decoded(source.prompt(1)) == "<system>own<user>ho<assistant>"
    assert source.prompt(0).messages[0] == {"role": "system", "content": "be brief"}


def test_a_conversation_that_ends_with_the_assistant_is_continued():
    rows = [{"prompt": [*user("hi"), {"role": "assistant", "content": "well"}]}]
    assert decoded(load(rows).prompt(0)) == "<user>hi<assistant>well"


def test_template_options_reach_the_template():
    source = load([{"prompt": user("hi")}], chat_template_kwargs={"suffix": "<think>"})
    assert decoded(source.prompt(0)).endswith("<assistant><think>")


def test_a_conversation_without_a_template_says_which_option_to_set():
    with pytest.raises(ModelError, match=r"chat template.*Set chat_template"):
        load([{"prompt": user("hi")}], CharTokenizer(chat_template=None))


def test_a_template_that_refuses_a_row_names_the_row():
    with pytest.raises(ModelError, match=r"Row 0 .*roles must alternate"):
        load([{"prompt": user("hi")}], chat_template_kwargs={"refuse": True})


def test_arrow_s_empty_keys_of_a_message_are_dropped():
    rows = [{"prompt": [{"role": "user", "content": "hi", "tool_calls": None}]}]
    assert load(rows).prompt(0).messages == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, r"Row 1 .*field 'prompt' must be text or a list of messages, got None"),
        ("", r"Row 1 .*must not be empty"),
        ("  \n", r"Row 1 .*must not be empty"),
        ("half a pair \ud800", r"Row 1 .*must be valid Unicode, character 12"),
        (7, r"got int 7"),
        ({"role": "user"}, r"must be text or a list of messages, got \{"),
    ],
)
def test_a_row_whose_prompt_is_no_text_is_named(bad, message):
    with pytest.raises(DataError, match=message):
        load([{"prompt": "fine"}, {"prompt": bad}])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], r"at least one message"),
        (["hi"], r"message 0 must be an object with role and content"),
        ([{"content": "hi"}], r"message 0 must have the key 'role'"),
        ([{"role": "user"}], r"must have the key 'content'"),
        ([{"role": "user", "content": None}], r"must have text as content, got None"),
        ([{"role": "usr", "content": "hi"}], r"got 'usr'. Did you mean 'user'"),
        ("plain", r"must be a list of messages as in the first row"),
    ],
)
def test_a_row_whose_conversation_is_broken_is_named(bad, message):
    with pytest.raises(DataError, match=rf"Row 1 .*{message}"):
        load([{"prompt": user("fine")}, {"prompt": bad}])


def test_a_missing_prompt_column_lists_the_columns_and_the_nearest():
    with pytest.raises(DataError, match=r"columns are promt, answer. Did you mean dataset_prompt_column=promt"):
        load([{"promt": "a", "answer": 1}])


def test_an_overlong_prompt_names_row_length_limit_and_remedy():
    with pytest.raises(DataError, match=r"Row 1 .*at most 4 tokens.*it has 6 \(2 of all.*lower max_completion_length"):
        load([{"prompt": "abc"}, {"prompt": "abcde"}, {"prompt": "abcdefg"}], limit=4)
    assert len(load([{"prompt": "abc"}], limit=4)) == 1


def test_a_system_prompt_for_plain_text_is_refused():
    with pytest.raises(DataError, match="system_prompt needs conversational prompts"):
        load(FIVE, system_prompt="be brief")


def test_a_column_without_a_json_form_is_named():
    with pytest.raises(DataError, match=r"Row 0 .*field 'image' must be text, a number.*got bytes"):
        load([{"prompt": "a", "image": b"\x89PNG"}])


def test_columns_become_json_values():
    import datetime

    import numpy as np

    row = {"prompt": "a", "x": np.float32(0.5), "y": np.arange(2), "day": datetime.date(2026, 1, 2), "t": (1, None)}
    columns = load([row]).prompt(0).columns
    assert json.loads(json.dumps(columns)) == {"x": 0.5, "y": [0, 1], "day": "2026-01-02", "t": [1, None]}
    assert load([row]).columns == ("x", "y", "day", "t")


def test_a_real_tokenizer_renders_and_encodes_the_same_text():
    from tiny_models import build_tokenizer

    tokenizer = build_tokenizer()
    prompt = load([{"prompt": user("hi")}, {"prompt": user("longer")}], tokenizer, shuffle_dataset=False).prompt(0)
    assert tokenizer.decode(prompt.token_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_negative_ordinal_and_no_rows_at_all_are_refused():
    with pytest.raises(IndexError, match="at least 0"):
        load(FIVE).prompt(-1)
    with pytest.raises(DataError, match="at least one row"):
        PromptSource(name="x", rows=[], seed=0, shuffle=True)
