import re

import pytest

from trl_ray.data.formats.detection import DatasetType, Form, detect
from trl_ray.data.formats.record_reader import reader_for
from trl_ray.data.formats.records import (
    Document,
    PreferencePair,
    PromptCompletion,
    PromptOnly,
    SteppedSolution,
    UnpairedPreference,
)
from trl_ray.data.formats.transcripts import TextFormat
from trl_ray.errors import DataError
from whole_datasets import read_records

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SFT = (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION)
DPO = (DatasetType.PREFERENCE, DatasetType.IMPLICIT_PREFERENCE)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def read(*rows, **options):
    return list(read_records(rows, name="toys", **options))


def refusal(*rows, **options):
    with pytest.raises(DataError) as caught:
        read(*rows, **options)
    return str(caught.value)


Q, A, B = [user("q")], [assistant("a")], [assistant("b")]

FORMATS = [
    ({"text": "t"}, Document(content="t"), DatasetType.LANGUAGE_MODELING),
    ({"messages": Q + A}, Document(content=(*Q, *A)), DatasetType.LANGUAGE_MODELING),
    ({"prompt": "q"}, PromptOnly(prompt="q"), DatasetType.PROMPT_ONLY),
    ({"prompt": Q}, PromptOnly(prompt=tuple(Q)), DatasetType.PROMPT_ONLY),
    ({"prompt": "q", "completion": "a"}, PromptCompletion(prompt="q", completion="a"), DatasetType.PROMPT_COMPLETION),
    (
        {"prompt": Q, "completion": A},
        PromptCompletion(prompt=tuple(Q), completion=tuple(A)),
        DatasetType.PROMPT_COMPLETION,
    ),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        PreferencePair(prompt="q", chosen="a", rejected="b"),
        DatasetType.PREFERENCE,
    ),
    (
        {"prompt": Q, "chosen": A, "rejected": B},
        PreferencePair(prompt=tuple(Q), chosen=tuple(A), rejected=tuple(B)),
        DatasetType.PREFERENCE,
    ),
    (
        {"chosen": "1+1=2", "rejected": "1+1=3"},
        PreferencePair(prompt="1+1=", chosen="2", rejected="3"),
        DatasetType.IMPLICIT_PREFERENCE,
    ),
    (
        {"chosen": Q + A, "rejected": Q + B},
        PreferencePair(prompt=tuple(Q), chosen=tuple(A), rejected=tuple(B)),
        DatasetType.IMPLICIT_PREFERENCE,
    ),
    (
        {"prompt": "q", "completion": "a", "label": 0},
        UnpairedPreference(prompt="q", completion="a", label=False),
        DatasetType.UNPAIRED_PREFERENCE,
    ),
    (
        {"prompt": Q, "completion": A, "label": True},
        UnpairedPreference(prompt=tuple(Q), completion=tuple(A), label=True),
        DatasetType.UNPAIRED_PREFERENCE,
    ),
    (
        {"prompt": "q", "completions": ["s", "t"], "labels": [True, 0]},
        SteppedSolution(prompt="q", steps=("s", "t"), labels=(True, False)),
        DatasetType.STEPWISE_SUPERVISION,
    ),
    (
        {"prompt": Q, "completions": ["s"], "labels": [1]},
        SteppedSolution(prompt=tuple(Q), steps=("s",), labels=(True,)),
        DatasetType.STEPWISE_SUPERVISION,
    ),
]


@pytest.mark.parametrize(("row", "record", "kind"), FORMATS)
def test_every_format_is_detected_in_both_forms_and_read_into_its_record(row, record, kind):
    assert read(row, row) == [record, record]
    found = reader_for(row, name="toys").format
    conversational = isinstance(next(iter(row.values())), list)
    assert found.type is kind
    assert found.form is (Form.CONVERSATIONAL if conversational else Form.STANDARD)


def test_extra_columns_and_tools_go_along():
    (record,) = read({"prompt": Q, "answer": 4, "tools": [TOOL]})
    assert record == PromptOnly(prompt=tuple(Q), tools=(TOOL,), columns={"answer": 4})


def test_a_table_of_text_writes_its_labels_as_words_or_digits():
    labels = ["true", "False", "1", "0"]
    records = read(*({"prompt": "q", "completion": "a", "label": label} for label in labels))
    assert [record.label for record in records] == [True, False, True, False]


def test_rows_are_read_one_by_one_so_that_a_stream_without_end_will_do():
    def stream():
        number = 0
        while True:
            yield {"text": f"t{number}"}
            number += 1

    records = read_records(stream(), name="toys")
    assert [next(records).content for _ in range(3)] == ["t0", "t1", "t2"]


def test_what_the_caller_accepts_settles_which_columns_are_meant():
    row = {"prompt": "q", "prompt_id": 3, "messages": Q + A}
    assert read(row, accept=SFT) == [Document(content=(*Q, *A), columns={"prompt": "q", "prompt_id": 3})]
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}, accept=(DatasetType.PROMPT_ONLY,)) == [
        PromptOnly(prompt="q", columns={"chosen": "a", "rejected": "b"})
    ]
    assert "prompt_only (prompt)" in refusal(row)
    assert "language_modeling (messages)" in refusal(row)


def test_a_text_prompt_beside_conversations_must_be_what_they_start_with():
    row = {"prompt": "q", "chosen": Q + A, "rejected": Q + B}
    expected = PreferencePair(prompt=tuple(Q), chosen=tuple(A), rejected=tuple(B))
    assert read(row, accept=DPO) == [expected]
    assert refusal({**row, "prompt": "other"}).startswith("Row 0 of toys, field 'prompt' must be a message that")


@pytest.mark.parametrize(
    ("row", "accept", "parts"),
    [
        ({"promt": "q", "completion": "a"}, SFT, ("Is 'promt' meant to be 'prompt'?", "columns are promt, completion")),
        ({"prompt": "q", "chosen": "a"}, DPO, ("lacks 'rejected'",)),
        ({"prompt": "q", "chosen": "a", "reject": "b"}, DPO, ("Is 'reject' meant to be 'rejected'?",)),
        ({"prompt": "q", "completions": ["s"]}, tuple(DatasetType), ("lacks 'labels'",)),
        (
            {"id": 1, "system_prompt": "s", "question": "q", "response": "a"},
            SFT,
            ("column_mapping={question: prompt, response: completion, system_prompt: system}.",),
        ),
        ({"instruction": "q", "context": "", "response": "a"}, SFT, ("{context: input, response: output}.",)),
        ({"prompt": "q", "response": "a", "system": "s"}, SFT, ("{response: completion, system: system}.",)),
        (
            {"qid": 1, "question": "q", "response_j": "a", "response_k": "b"},
            DPO,
            ("response_j: chosen, response_k: rej",),
        ),
        ({"inputs": "q", "targets": "a", "task": "t"}, SFT, ("{inputs: prompt, targets: completion}.",)),
        ({"query": "q", "answers": "a", "tools": "[]"}, SFT, ("{query: prompt, answers: completion}.",)),
        ({"input": "q", "preferred_output": "a", "non_preferred_output": "b"}, DPO, ("preferred_output: chosen",)),
        ({"a": 1}, SFT, ("Its columns are a", "language_modeling (text)", "conversations (ShareGPT)")),
        ({"prompt": "q"}, SFT, ("one of the formats language_modeling, prompt_completion", "make it prompt_only")),
        ({"prompt": "q", "completion": "a", "label": True}, SFT, ("make it unpaired_preference",)),
    ],
)
def test_columns_of_no_format_or_of_several_are_refused_with_what_is_missing(row, accept, parts):
    message = refusal(row, accept=accept)
    assert message.count("\n") == 0
    for part in parts:
        assert part in message


def with_second(first, **changes):
    """A good row 0 and a row 1 that differs from it in some fields."""
    return first, {**first, **changes}


TEXTS = {"prompt": "q", "completion": "a"}
TALKS = {"prompt": Q, "completion": A}
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
STEPS = {"prompt": "q", "completions": ["s", "t"], "labels": [True, False]}
LABELLED = {"prompt": "q", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (with_second(TEXTS, prompt=None), "field 'prompt' must be given, got None"),
        (with_second(TEXTS, prompt=7), "field 'prompt' must be text, as this dataset is standard, got int 7"),
        (with_second(TEXTS, prompt=Q), "field 'prompt' must be text, as this dataset is standard"),
        (with_second(TALKS, completion="a"), "field 'completion' must be a list of messages, as this dataset is conv"),
        (with_second(TALKS, completion=[]), "field 'completion' must have at least one message"),
        (with_second(TALKS, prompt=[{"role": "usr", "content": "q"}]), "got 'usr'. Did you mean 'user'?"),
        (with_second(TALKS, prompt=[user(["q"])]), "field 'prompt', message 0 must have text as content, got ['q']"),
        (with_second(TALKS, prompt=[{"role": "user"}]), "field 'prompt', message 0 must have the key 'content'"),
        (with_second(TALKS, completion=Q), "field 'completion' must have a message of the assistant, got 'user'"),
        (with_second(PAIR, tools={"f": "name"}), "field 'tools' must be a list of tools, got {'f': 'name'}"),
        (with_second(TEXTS, tools=[TOOL]), "field 'tools' must be empty, because text has no place for tools"),
        (with_second({"chosen": "xa", "rejected": "xb"}, rejected="y"), "must start with the prompt they share"),
        (with_second(LABELLED, label="yes"), "field 'label' must be true or false (or 1 or 0), got str 'yes'"),
        (with_second(LABELLED, label=-1), "field 'label' must be true or false (or 1 or 0), got int -1"),
        (with_second(STEPS, labels=[True]), "field 'labels' must have one label per step, got 1 labels for 2 steps"),
        (with_second(STEPS, labels=[True, 2]), "field 'labels', step 1 must be true or false (or 1 or 0), got int 2"),
        (with_second(STEPS, completions="s"), "field 'completions' must be a list with one entry per step"),
        (with_second(STEPS, completions=["s", ""]), "field 'completions', step 1 must not be empty"),
        (with_second(TEXTS, prompt="\ud800"), "field 'prompt' must be valid Unicode"),
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_field(rows, message):
    got = refusal(*rows)
    assert got.startswith("Row 1 of toys, field")
    assert message in got
    assert got.count("\n") == 0


def test_a_row_without_a_column_of_the_first_is_refused():
    assert refusal({"text": "t"}, {"messages": Q}).startswith(
        "Row 1 of toys, field 'text' must be given, got no such column."
    )


def test_an_empty_dataset_and_a_row_that_is_no_object_are_refused():
    assert refusal() == "A dataset must have at least one row, toys has none. Check the file or the split."
    assert refusal("text").startswith("Row 0 of toys must be an object")
    assert refusal({"text": "t"}, "text").startswith("Row 1 of toys must be an object")


def test_texts_with_markers_stay_texts_when_told_to():
    row = {"text": "<|im_start|>user\nhi<|im_end|>\n"}
    assert read(row, text_format=TextFormat.PLAIN) == [Document(content=row["text"])]


def test_a_text_dataset_prints_as_its_format():
    assert str(detect(["text"], {"text": "t"}, name="toys")) == "standard language_modeling"
    assert re.fullmatch(r"\w+ \w+", str(reader_for(PAIR, name="toys").format))
