import copy
import json

import pytest

from trl_ray.data.formats.detection import DatasetType
from trl_ray.data.formats.foreign_formats import to_messages
from trl_ray.data.formats.record_reader import reader_for
from trl_ray.data.formats.records import Document, PreferencePair, PromptCompletion, PromptOnly, UnpairedPreference
from trl_ray.data.formats.transcripts import TextFormat
from trl_ray.errors import DataError
from whole_datasets import read_records


def read(*rows, **options):
    return list(read_records(rows, name="toys", **options))


def refusal(*rows, **options):
    with pytest.raises(DataError) as caught:
        read(*rows, **options)
    return str(caught.value)


def turn(speaker, text):
    return {"from": speaker, "value": text}


Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
SYSTEM = {"role": "system", "content": "s"}


PAIRED = (DatasetType.PREFERENCE, DatasetType.IMPLICIT_PREFERENCE)
RATED = (*PAIRED, DatasetType.UNPAIRED_PREFERENCE)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [turn("human", "q"), turn("gpt", "a")]},
        {"conversations": [turn("user", "q"), turn("assistant", "a")]},
        {"conversations": [Q, A]},
        {"messages": [turn("human", "q"), turn("model", "a")]},
        {"conversations": ["q", "a"]},
        {"messages": [{"input": "q", "output": "a"}]},
        {"conversations": [{"human": "q", "assistant": "a"}]},
    ],
)
def test_sharegpt_becomes_messages(row):
    assert read({**row, "id": 1}) == [Document(content=(Q, A), columns={"id": 1})]


def test_sharegpts_system_column_and_function_calls_become_messages():
    tool = {"name": "add", "parameters": {}}
    row = {
        "conversations": [
            turn("human", "q"),
            turn("function_call", '{"name": "add", "arguments": {"x": 1}}'),
            turn("observation", "3"),
            turn("gpt", "a"),
        ],
        "system": "s",
        "tools": '[{"name": "add", "parameters": {}}]',
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    (record,) = read(row)
    assert record.tools == (tool,)
    assert record.content == (
        SYSTEM,
        Q,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        A,
    )


@pytest.mark.parametrize("content", [None, ""])
def test_a_call_as_openai_once_wrote_it_is_a_tool_call(content):
    function = {"name": "add", "parameters": {}}
    call = {"role": "assistant", "content": content, "function_call": {"name": "add", "arguments": '{"x": 1}'}}
    answer = {"role": "function", "name": "add", "content": "2"}
    [record] = read({"messages": [Q, call, answer, A], "functions": [function]})
    assert record.tools == (function,)
    called = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    assert record.content == (
        Q,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "name": "add", "content": "2"},
        A,
    )


def test_speakers_in_preference_columns_are_renamed_too():
    row = {"prompt": [turn("human", "q")], "chosen": [turn("gpt", "a")], "rejected": [turn("gpt", "b")]}
    assert read(row) == [PreferencePair(prompt=(Q,), chosen=(A,), rejected=(B,))]


def test_conversion_leaves_the_callers_rows_alone():
    row = {"conversations": [turn("human", "q")], "system": "s"}
    before = copy.deepcopy(row)
    to_messages(row, where="r")
    assert row == before


def test_alpaca_becomes_a_conversational_prompt_and_completion():
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7},
        {"instruction": "q", "input": "", "output": "a", "id": 8},
        {"instruction": "q", "output": "a", "system": "s", "history": [["q", "b"]], "id": 9},
    ]
    asked = {"role": "user", "content": "Add.\n\n1 2"}
    answer = {"role": "assistant", "content": "3"}
    assert read(*rows) == [
        PromptCompletion(prompt=(asked,), completion=(answer,), columns={"id": 7}),
        PromptCompletion(prompt=(Q,), completion=(A,), columns={"id": 8}),
        PromptCompletion(prompt=(SYSTEM, Q, B, Q), completion=(A,), columns={"id": 9}),
    ]


def chatml(*messages):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


INVITED = chatml(Q) + "<|im_start|>assistant\n"


def test_a_ranking_of_alpacas_joins_instruction_and_input():
    row = {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "system": "s"}
    expected = PreferencePair(prompt=(SYSTEM, Q), chosen=(A,), rejected=(B,))
    assert read(row, accept=PAIRED) == [expected]
    more = ({"role": "user", "content": "q\n\nwith"},)
    [found] = read({**row, "input": "with", "system": None}, accept=PAIRED)
    assert found.prompt == more
    assert refusal({**row, "chosen": None}, accept=PAIRED).startswith("Row 0 of toys, field 'chosen' must not be empty")


def test_a_conversation_beside_a_label_is_an_answer_that_it_rates():
    row = {"messages": [SYSTEM, Q, A], "label": True, "id": 7}
    expected = UnpairedPreference(prompt=(SYSTEM, Q), completion=(A,), label=True, columns={"id": 7})
    assert read(row, accept=RATED) == [expected]
    assert read({**row, "messages": [turn("system", "s"), turn("human", "q"), turn("gpt", "a")]}, accept=RATED) == [
        expected
    ]
    assert "must end with the answer of the assistant" in refusal({**row, "messages": [Q]}, accept=RATED)
    # For who learns texts, a label is a column like others.
    assert read(row, accept=(DatasetType.LANGUAGE_MODELING,)) == [
        Document(content=(SYSTEM, Q, A), columns={"label": True, "id": 7})
    ]


def test_answers_that_are_the_json_of_calls_call_the_tools_beside_them():
    tool = {"name": "look", "description": "d", "parameters": {"city": {"type": "str"}}}
    row = {"prompt": "q", "completion": '[{"name": "look", "arguments": {"city": "x"}}]', "tools": [tool]}
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "x"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    expected = PromptCompletion(prompt=(Q,), completion=(answer,), tools=(tool,))
    assert read(row) == read({**row, "tools": json.dumps([tool])}) == [expected]
    # Whatever is no call of these tools is text, which has no place for them.
    for other in (
        "[1, 2]",
        "x",
        '[{"name": "other", "arguments": {}}]',
        '[{"name": "look", "score": 1}]',
        "[]",
        '[{"name": ["look"]}]',
        "[" * 99999,
    ):
        assert "text has no place for tools" in refusal({**row, "completion": other})
        assert read({**row, "completion": other, "tools": None})[0].completion == other


def test_messages_of_a_tree_are_told_to_be_texts_of_their_own():
    row = {"message_id": "2", "parent_id": "1", "text": "hi", "role": "prompter"}
    told = reader_for(row, name="toys", accept=(DatasetType.LANGUAGE_MODELING,)).notes
    assert len(told) == 1 and told[0].startswith("The rows of toys are messages of a tree (parent_id)")
    assert reader_for({"text": "hi", "role": "x"}, name="toys").notes == ()


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"text": chatml(SYSTEM, Q, A)}, Document(content=(SYSTEM, Q, A))),
        ({"prompt": INVITED}, PromptOnly(prompt=(Q,))),
        ({"prompt": INVITED, "completion": "a"}, PromptCompletion(prompt=(Q,), completion=(A,))),
        ({"prompt": INVITED, "completion": "a<|im_end|>\n"}, PromptCompletion(prompt=(Q,), completion=(A,))),
        ({"prompt": chatml(Q), "completion": chatml(A)}, PromptCompletion(prompt=(Q,), completion=(A,))),
        (
            {"prompt": INVITED, "chosen": "a<|im_end|>", "rejected": "b<|im_end|>"},
            PreferencePair(prompt=(Q,), chosen=(A,), rejected=(B,)),
        ),
        ({"chosen": chatml(Q, A), "rejected": chatml(Q, B)}, PreferencePair(prompt=(Q,), chosen=(A,), rejected=(B,))),
        (
            {"prompt": INVITED, "completion": "a<|im_end|>", "label": False},
            UnpairedPreference(prompt=(Q,), completion=(A,), label=False),
        ),
    ],
)
def test_texts_of_every_column_are_read_into_messages(row, record):
    assert read(row, row) == [record, record]


def test_llama2_and_mistral_are_one_way_of_writing_where_they_cannot_be_told_apart():
    long = "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a </s>"
    assert read({"text": long}, {"text": "<s>[INST] q [/INST] a </s>"}) == [
        Document(content=(SYSTEM, Q, A)),
        Document(content=(Q, A)),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ({"text": chatml(Q)}, {"text": "plain"}),
            "Row 1 of toys, field 'text' must be written as chatml, as the first row is, got plain: str 'plain'",
        ),
        (({"text": "plain"}, {"text": chatml(Q)}), "Row 1 of toys, field 'text' must be written as plain"),
        (({"prompt": "q", "completion": "<|assistant|>a"},), "Row 0 of toys, field 'completion' must be plain text or"),
        (({"text": "<|foo|>"},), "Row 0 of toys, field 'text' must be plain text or written in one of"),
        (
            ({"prompt": INVITED, "completion": ""},),
            "Row 0 of toys, field 'completion' must go on from where the prompt",
        ),
        (
            ({"prompt": chatml(Q), "completion": "a"},),
            "Row 0 of toys, field 'completion' must have the start of a turn",
        ),
        (
            ({"conversations": [turn("hooman", "q")]},),
            "message 0 must be from one of system, developer, user, assistant, tool, human",
        ),
        (({"conversations": [turn("hooman", "q")]},), "got 'hooman'. Did you mean 'human'?"),
        (
            ({"conversations": [turn("function_call", "{")]},),
            "message 0 must have the JSON of a function call, column 2",
        ),
        (
            ({"conversations": [turn("function_call", "[" * 99999)]},),
            "message 0 must have the JSON of a function call, column 1 is broken: nested too deeply",
        ),
        (({"conversations": [turn("function_call", "{}")]},), "message 0 must have a function call with a name"),
        (({"conversations": None},), "Row 0 of toys, field 'conversations' must be a list of messages, got None"),
        (
            ({"conversations": [turn("human", None)]},),
            "field 'conversations', message 0 must have text as content, got None",
        ),
        (
            ({"conversations": [], "messages": []},),
            "they have both 'conversations' and 'messages'. Leave one out: column_mapping={conv",
        ),
        (({"instruction": "q", "output": None},), "Row 0 of toys, field 'output' must not be empty, got None"),
        (({"instruction": 3, "output": "a"},), "Row 0 of toys, field 'instruction' must be text, got int 3"),
        (({"instruction": "q", "output": "a", "history": ["q"]},), "field 'history', entry 0 must be a pair"),
    ],
)
def test_foreign_rows_that_are_broken_or_mixed_are_refused_by_row_and_field(rows, message):
    assert message in refusal(*rows)


def test_alpaca_columns_beside_a_prompt_are_just_columns():
    row = {"prompt": "q", "completion": "a", "instruction": "i", "output": "o"}
    assert read(row, accept=(DatasetType.PROMPT_COMPLETION,)) == [
        PromptCompletion(prompt="q", completion="a", columns={"instruction": "i", "output": "o"})
    ]


def test_a_text_format_that_is_named_is_taken_for_every_row():
    assert read({"text": chatml(Q, A)}, text_format=TextFormat.CHATML) == [Document(content=(Q, A))]
    assert "must be written as phi" in refusal({"text": chatml(Q, A)}, text_format=TextFormat.PHI)
