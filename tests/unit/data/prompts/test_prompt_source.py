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
        ({"text": "user"}, r"must be text or a list of messages, got \{"),
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


def test_a_system_prompt_for_plain_text_is_refused_where_nothing_renders_the_two():
    with pytest.raises(DataError, match="system_prompt needs conversational prompts"):
        load(FIVE, CharTokenizer(chat_template=None), system_prompt="be brief")


def test_texts_after_a_system_prompt_are_the_users_messages_and_that_is_told():
    source = load([{"problem": "q"}] * 2, system_prompt="be brief", dataset_prompt_column="problem")
    assert decoded(source.prompt(0)) == "<system>be brief<user>q<assistant>"
    assert source.prompt(0).messages == ({"role": "system", "content": "be brief"}, *user("q"))
    assert any("2 of 2 prompts of the given list are texts" in note for note in source.notes)
    assert decoded(load([{"problem": "q"}], dataset_prompt_column="problem").prompt(0)) == "\x01q"


def test_a_column_without_a_json_form_is_named():
    with pytest.raises(DataError, match=r"Row 0 .*field 'picture' must be text, a number.*got bytes"):
        load([{"prompt": "a", "picture": b"\x89PNG"}])


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


def chat_of(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, contents, strict=False)]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("named", [False, True])
def test_a_conversation_is_a_prompt_up_to_the_assistants_last_turn_which_is_its_completion(column, named):
    rows = [
        {column: chat_of("q", "gold")},
        {column: chat_of("q", "a", "r", "gold")},
        {column: chat_of("q", "a", "r")},
    ]
    options = {"dataset_prompt_column": column} if named else {}
    source = load(rows, shuffle_dataset=False, **options)
    assert [decoded(source.prompt(ordinal)) for ordinal in range(3)] == [
        "<user>q<assistant>",
        "<user>q<assistant>a<user>r<assistant>",
        "<user>q<assistant>a<user>r<assistant>",
    ]
    gold = [{"role": "assistant", "content": "gold"}]
    assert [source.prompt(ordinal).columns["completion"] for ordinal in range(3)] == [gold, gold, None]
    assert source.notes == (
        "2 of 3 rows of the given list are conversations that end with an answer: the prompt is what stands before the "
        "assistant's last turn.",
    )


def test_a_sharegpt_conversation_is_a_prompt_too_and_its_system_text_begins_it():
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "gold"}]
    source = load([{"conversations": shared, "system": "s"}], shuffle_dataset=False)
    assert decoded(source.prompt(0)) == "<system>s<user>q<assistant>"
    written = load([{"messages": json.dumps(chat_of("q", "gold"))}], shuffle_dataset=False)
    assert decoded(written.prompt(0)) == "<user>q<assistant>"
    with pytest.raises(DataError, match="must have a message before the answer"):
        load([{"messages": chat_of("q", "a")[1:]}])


def test_a_prompt_that_ends_with_the_assistant_is_gone_on_with_and_said():
    source = load([{"prompt": [*user("q"), {"role": "assistant", "content": "begun"}]}])
    assert decoded(source.prompt(0)) == "<user>q<assistant>begun"
    assert source.notes == (
        "1 of 1 prompts of the given list end with a message of the assistant, which completions go on from. Remove it "
        "where it is the answer.",
    )


@pytest.mark.parametrize("dump", [json.dumps, str])
def test_a_prompt_that_a_table_holds_as_text_is_a_conversation(dump):
    assert decoded(load([{"prompt": dump(user("q"))}]).prompt(0)) == "<user>q<assistant>"
    assert decoded(load([{"q": dump(user("q"))}], dataset_prompt_column="q").prompt(0)) == "<user>q<assistant>"
    with pytest.raises(DataError, match="this text is a list of messages that cannot be read"):
        load([{"prompt": dump(user("q"))[:-2]}])


def test_prompts_may_be_of_any_order_and_speakers_have_many_names():
    rows = [{"prompt": [{"role": "human", "content": "a"}, {"role": "user", "content": ""}]}]
    assert decoded(load(rows).prompt(0)) == "<user>a<user><assistant>"
    assert decoded(load([{"prompt": [{"role": "system", "content": "a"}]}]).prompt(0)) == "<system>a<assistant>"
    own = load([{"prompt": [{"role": "client", "content": "a"}]}], role_mapping={"client": "user"})
    assert decoded(own.prompt(0)) == "<user>a<assistant>"


def test_columns_are_mapped_and_a_system_column_begins_the_prompt():
    mapping = {"question": "prompt", "setting": "system", "id": None}
    source = load([{"question": "q", "setting": "s", "id": 1, "answer": 2}], column_mapping=mapping)
    assert decoded(source.prompt(0)) == "<system>s<user>q<assistant>"
    assert source.prompt(0).columns == {"answer": 2}
    assert source.notes == ()
    unread = load([{"prompt": user("q"), "system": "s"}, {"prompt": user("r"), "system": ""}])
    assert unread.notes == (
        "1 of 2 rows of the given list have a text in the column 'system', with which no prompt begins: "
        "column_mapping={system: system} makes it the first message.",
    )
    with pytest.raises(DataError, match="Did you mean dataset_prompt_column=question"):
        load([{"question": "q", "answer": 2}])


def test_bad_prompts_are_told_together_or_left_out_and_counted():
    rows = [{"prompt": "a"}, {"prompt": None}, {"prompt": user("q")}, {"prompt": "b"}, {"prompt": "long"}]
    with pytest.raises(DataError) as caught:
        load(rows, limit=4)
    message = str(caught.value)
    assert message.startswith(
        "3 of 5 rows cannot be used. 1 row (1): Row 1 of the given list, field 'prompt' must be text"
    )
    assert "1 row (2): Row 2 of the given list, field 'prompt' must be text as in the first row" in message
    assert "1 row (4): Row 4 of the given list must have at most 4 tokens" in message
    source = load(rows, limit=4, on_bad_row="drop", shuffle_dataset=False)
    assert [source.prompt(ordinal).text for ordinal in range(3)] == ["a", "b", "a"]
    assert (source.num_left_out, len(source.notes)) == (3, 3)
    with pytest.raises(DataError, match="field 'images' must be empty"):
        load([{"prompt": "a", "images": ["x.png"]}])


def test_what_limits_cut_off_prompts_is_counted_in_tokens():
    source = load_prompts(
        PromptConfig(),
        CharTokenizer(),
        seed=0,
        max_prompt_tokens=None,
        max_prompt_length=3,
        dataset=[{"prompt": "abcd"}, {"prompt": "e"}],
    )
    assert source.notes == (  # a start token and the characters: 5 and 2
        "2 of 7 (28.6%) tokens of the prompts of the given list are beyond max_prompt_length and cut off their "
        "beginnings, in 1 rows.",
    )
    assert source.num_cut == 1
    assert sorted(prompt.num_cut for prompt in source.take(0, 2)) == [0, 2]
