"""Rows of other tools are trained as they stand: what the template can render is nobody else's to refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import DPOConfig, PRMConfig, RewardModelConfig, SFTConfig, SupervisedRunConfig
from trl_ray.data.chat.training_templates import template_source
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, load_examples, stream_examples
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.errors import ConfigError, DataError

TOKENIZER = build_tokenizer()  # a token per byte
END = "<|im_end|>"


def load(
    rows: list[dict[str, Any]],
    *,
    config: SupervisedRunConfig | None = None,
    task: ExampleTask = ExampleTask.SUPERVISED,
    tokenizer: Any = TOKENIZER,
) -> ExampleSet:
    return load_examples(config or SFTConfig(), tokenizer, task=task, dataset=rows)


def ids(text: str, tokenizer: Any = TOKENIZER) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def of(found: ExampleSet, index: int = 0, sample: int = 0) -> tuple[list[int], list[int]]:
    """All ids of a sample, and those that are trained."""
    one = found.examples[index].samples[sample]
    return [*one.prompt_ids.tolist(), *one.completion_ids.tolist()], one.completion_ids[one.loss_mask].tolist()


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{END}\n"


ORDERS = {
    "user after user": ("user", "user", "assistant"),
    "assistant first": ("assistant", "user", "assistant"),
    "two assistants": ("user", "assistant", "assistant"),
    "system in the middle": ("user", "assistant", "system", "user", "assistant"),
    "tool after user": ("user", "tool", "assistant"),
    "user last": ("user", "assistant", "user"),
}


@pytest.mark.parametrize("roles", ORDERS.values(), ids=ORDERS.keys())
def test_messages_may_follow_each_other_as_the_template_allows(roles: tuple[str, ...]) -> None:
    rows = [{"messages": [says(role, f"{role}{number}") for number, role in enumerate(roles)]}]
    whole = "".join(turn(role, f"{role}{number}") for number, role in enumerate(roles))
    assert of(load(rows)) == (ids(whole), ids(whole)[1:])
    alone = load(rows, config=SFTConfig(assistant_only_loss=True))
    answers = "".join(f"assistant{n}{END}\n" for n, role in enumerate(roles) if role == "assistant")
    assert of(alone) == (ids(whole), ids(answers))


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([says("user", "a"), says("user", "b")], [says("assistant", "c")]),
        ([says("system", "a")], [says("assistant", "c")]),
        ([says("user", "a"), says("assistant", "b")], [says("assistant", "c")]),
        ([says("user", "a")], [says("tool", "b"), says("assistant", "c")]),
        ([says("user", "a")], [says("assistant", "b"), says("tool", "c")]),
        ([says("user", "a")], [says("assistant", "b"), says("user", "c"), says("assistant", "d")]),
    ],
)
def test_prompts_and_completions_may_be_of_any_order(prompt: list[Any], completion: list[Any]) -> None:
    first = f"<|im_start|>{'assistant' if completion[0]['role'] == 'assistant' else ''}"
    before = "".join(turn(m["role"], m["content"]) for m in prompt) + first
    after = "".join(turn(m["role"], m["content"]) for m in completion).removeprefix(first)
    if completion[0]["role"] == "assistant":  # the header of the answer is the prompt's
        before, after = before + "\n", after.removeprefix("\n")
    assert of(load([{"prompt": prompt, "completion": completion}])) == (ids(before + after), ids(after))
    pair = {"prompt": prompt, "chosen": completion, "rejected": [says("assistant", "no")]}
    chosen, _ = of(load([pair], config=DPOConfig(), task=ExampleTask.PAIRS))
    assert chosen == ids(before + after)


@pytest.mark.parametrize("empty", ["user", "assistant", "tool", "system"])
def test_messages_may_be_empty(empty: str) -> None:
    roles = ("system", "user", "assistant", "tool", "assistant")
    rows = [{"messages": [says(role, "" if role == empty else "x") for role in roles]}]
    whole = "".join(turn(role, "" if role == empty else "x") for role in roles)
    assert of(load(rows)) == (ids(whole), ids(whole)[1:])


def test_texts_may_be_empty_where_something_is_left_to_train() -> None:
    assert of(load([{"prompt": "q", "completion": ""}])) == (ids("q" + END), ids(END))
    assert of(load([{"prompt": "", "completion": "ab"}])) == (ids("ab" + END), ids("b" + END))
    found = load([{"text": "ab"}, {"text": ""}])
    assert dict(found.untrained) == {1: Untrained.NO_TARGET}  # an end token that nothing predicts
    pairs = load([{"prompt": "q", "chosen": "", "rejected": "b"}], config=DPOConfig(), task=ExampleTask.PAIRS)
    assert (of(pairs, sample=0)[1], of(pairs, sample=1)[1]) == (ids(END), ids("b" + END))
    alpaca = load([{"instruction": "q", "input": "", "output": ""}])
    assert of(alpaca)[1] == ids(f"{END}\n")


def test_content_in_parts_of_text_is_the_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    rows = [{"messages": [says("user", parts), says("assistant", [{"type": "text", "text": "c"}])]}]
    whole = turn("user", "ab") + turn("assistant", "c")
    assert of(load(rows)) == (ids(whole), ids(whole)[1:])
    with pytest.raises(DataError, match=r"Row 0 .*message 0 must have parts of text alone.* got one of type 'image'"):
        load([{"messages": [says("user", [{"type": "image"}, *parts]), says("assistant", "c")]}])


def test_columns_and_keys_that_are_empty_in_some_rows_are_taken() -> None:
    rows = [
        {"messages": [says("user", "q", weight=None), says("assistant", "a", weight=1)], "images": None, "tools": None},
        {"messages": [says("user", "q"), says("assistant", "a")], "images": [], "tools": "[]", "image": None},
        {"messages": [says("user", "q"), says("assistant", "a")], "images": [None], "tools": []},
    ]
    whole = turn("user", "q") + turn("assistant", "a")
    found = load(rows)
    assert [of(found, index) for index in range(3)] == [(ids(whole), ids(whole)[1:])] * 3


@pytest.mark.parametrize("column", ["image", "images", "video", "audio"])
def test_images_in_a_text_run_are_one_message_that_says_how_many_and_how_to_go_on(column: str) -> None:
    row = {"prompt": [says("user", "q")], "completion": [says("assistant", "a")], column: None}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", column: [{"bytes": b"x", "path": None}]}
    with pytest.raises(DataError) as caught:
        load([row, {**row, column: ["x.png"]}, {**row, column: [{"bytes": b"x", "path": None}]}])
    message = str(caught.value)
    assert "2 of 3 rows cannot be used. 2 rows (1, 2): Row 1 of the given list, field" in message
    assert f"field '{column}' must be empty, because this run trains on text" in message
    assert f"column_mapping={{{column}: null}}" in message
    with pytest.raises(DataError, match=f"Row 0 of the given list, field '{column}' must be empty"):
        load([pair], config=DPOConfig(), task=ExampleTask.PAIRS)
    without = SFTConfig(column_mapping={column: None})
    assert len(load([row, {**row, column: ["x.png"]}], config=without)) == 2
    assert len(load([row, {**row, column: ["x.png"]}], config=SFTConfig(on_bad_row="drop"))) == 1


QWEN = build_tokenizer()
QWEN.chat_template = template_source("qwen2_5")
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "dict",
            "properties": {
                "city": {"type": "any", "required": True},
                "days": {"type": "int"},
                "least": {"type": "float"},
            },
            "required": True,
        },
    },
}


def test_function_calls_as_hermes_writes_them_are_trained_word_for_word() -> None:
    call = '<tool_call>\n{"arguments": {"city": "Rome"}, "name": "weather"}\n</tool_call>'
    answer = '<tool_response>\n{"days": 3}\n</tool_response>'
    shared = [
        {"from": "system", "value": "You call functions."},
        {"from": "human", "value": "How is it in Rome?"},
        {"from": "gpt", "value": call},
        {"from": "tool", "value": answer},
        {"from": "gpt", "value": "Fine."},
    ]
    row = {"id": "1", "conversations": shared, "tools": json.dumps([SCHEMA]), "category": "x"}
    found = load([row], config=SFTConfig(assistant_only_loss=True, max_length=4096), tokenizer=QWEN)
    whole, trained = of(found)
    assert trained == ids(f"{call}{END}\nFine.{END}\n")
    text = QWEN.decode(whole)
    for part in ('"type": "any", "required": true', '"type": "int"', '"type": "float"', '"required": true', answer):
        assert part in text


def test_tools_may_be_missing_in_some_rows_and_be_written_loosely() -> None:
    talk = [says("user", "q"), says("assistant", "a")]
    rows = [{"messages": talk, "tools": [SCHEMA]}, {"messages": talk, "tools": None}, {"messages": talk}]
    found = load(rows, tokenizer=QWEN, config=SFTConfig(max_length=None, assistant_only_loss=True))
    assert [of(found, index)[1] for index in range(3)] == [ids(f"a{END}\n")] * 3
    assert ['"weather"' in QWEN.decode(of(found, index)[0]) for index in range(3)] == [True, False, False]


TALK = [says("user", "q"), says("assistant", "a \"quoted\" 'word'")]
WRITTEN = {
    "JSON": json.dumps(TALK),
    "JSON, indented": json.dumps(TALK, indent=2),
    "JSON, twice": json.dumps(json.dumps(TALK)),
    "Python": str(TALK),
    "Python with None": str([{**message, "name": None} for message in TALK]),
    "NumPy": "[" + "\n ".join(str(message) for message in TALK) + "]",
    "NumPy array": f"array([{', '.join(map(str, TALK))}], dtype=object)",
    "wrapped": json.dumps({"messages": TALK}),
    "ShareGPT": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": TALK[1]["content"]}]),
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN.keys())
def test_messages_that_a_table_holds_as_text_are_messages(written: str) -> None:
    want = of(load([{"messages": TALK}]))
    assert of(load([{"messages": written}])) == want
    if "{'messages'" not in written:
        assert of(load([{"conversations": written}])) == want


@pytest.mark.parametrize("dump", [json.dumps, str])
def test_prompts_and_answers_that_a_table_holds_as_text_are_messages(dump: Any) -> None:
    ask, say, other = TALK[:1], TALK[1:], [says("assistant", "b")]
    want = of(load([{"prompt": ask, "completion": say}]))
    assert of(load([{"prompt": dump(ask), "completion": dump(say)}])) == want
    assert of(load([{"prompt": dump(ask), "completion": json.dumps(say[0])}])) == want
    for row in (
        {"prompt": ask, "chosen": say, "rejected": other},
        {"chosen": ask + say, "rejected": ask + other},
    ):
        for config, task in ((DPOConfig(), ExampleTask.PAIRS), (RewardModelConfig(), ExampleTask.REWARD_PAIRS)):
            table = {column: dump(value) for column, value in row.items()}
            for sample in (0, 1):
                asked = load([table], config=config, task=task)
                assert of(asked, sample=sample) == of(load([row], config=config, task=task), sample=sample)


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_messages_as_text_that_are_cut_off_are_refused_and_other_text_is_text(column: str) -> None:
    row = {"prompt": "q", "completion": "a"} if column == "prompt" else {}
    for broken in (json.dumps(TALK)[:-3], str(TALK)[:-9]):
        with pytest.raises(DataError, match=rf"Row 0 .*field '{column}' must be a list of messages"):
            load([{**row, column: broken}])
    with pytest.raises(DataError, match=r"Row 0 of the given list, field 'messages' must be a list of messages"):
        load([{"messages": "just text"}])


def test_text_that_only_mentions_messages_stays_text_and_so_does_what_is_told_to_be_plain() -> None:
    for prompt in (f"{json.dumps(TALK)} is JSON", '{"a": 1}', "[1, 2]", 'x = [{"role": "user"}]', '[{"role": 1}]'):
        whole, trained = of(load([{"prompt": prompt, "completion": "a"}]))
        assert (whole, trained) == (ids(f"{prompt}a{END}"), ids(f"a{END}"))
    plain = SFTConfig(dataset_text_format="plain")
    dumped = json.dumps(TALK)
    assert of(load([{"prompt": dumped, "completion": "a"}], config=plain))[0] == ids(f"{dumped}a{END}")


def test_speakers_have_many_names_and_a_run_may_add_its_own() -> None:
    want = of(load([{"messages": [says("user", "q"), says("assistant", "a")]}]))
    for user, assistant in (("human", "gpt"), ("User", "AI"), ("human", "chatbot"), ("user", "model")):
        assert of(load([{"messages": [says(user, "q"), says(assistant, "a")]}])) == want
        assert of(load([{"conversations": [{"from": user, "value": "q"}, {"from": assistant, "value": "a"}]}])) == want
    own = SFTConfig(role_mapping={"Client": "user", "agent": "assistant"})
    rows = [{"messages": [says("Client", "q"), says("agent", "a")]}]
    assert of(load(rows, config=own)) == want
    with pytest.raises(DataError, match=r"one of the roles system, .*got 'Client'.*role_mapping=\{Client: user\}"):
        load(rows)
    shared = [{"conversations": [{"from": "Client", "value": "q"}, {"from": "agent", "value": "a"}]}]
    assert of(load(shared, config=own)) == want
    with pytest.raises(DataError, match=r"from one of .*got 'Client'.*role_mapping=\{Client: user\}"):
        load(shared)
    itself = SFTConfig(role_mapping={"critic": "critic"})  # the template knows it
    talk = [{"messages": [says("user", "q"), says("critic", "c"), says("assistant", "a")]}]
    assert of(load(talk, config=itself))[0] == ids(turn("user", "q") + turn("critic", "c") + turn("assistant", "a"))
    with pytest.raises(ConfigError, match="role_mapping must map speakers to system"):
        SFTConfig(role_mapping={"bot": "asistant"})


def test_arrows_empty_keys_do_not_hide_who_speaks() -> None:
    rows = [{"messages": [{"from": None, "value": None, **says("user", "q")}, {"from": "gpt", "value": "a"}]}]
    assert of(load(rows))[0] == ids(turn("user", "q") + turn("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "q", "answer": "a"}, {"question": "prompt", "answer": "completion"}),
        ({"prompt": "q", "response": "a"}, {"response": "completion"}),
        ({"instruction": "q", "response": "a"}, {"instruction": "prompt", "response": "completion"}),
    ],
)
def test_columns_of_other_names_are_refused_with_the_mapping_that_helps(
    row: dict[str, Any], mapping: dict[str, str | None]
) -> None:
    told = "column_mapping={" + ", ".join(f"{theirs}: {ours}" for theirs, ours in mapping.items()) + "}"
    with pytest.raises(DataError) as caught:
        load([row])
    assert told in str(caught.value)
    assert of(load([row], config=SFTConfig(column_mapping=mapping))) == (ids("qa" + END), ids("a" + END))


def test_a_mapping_must_name_columns_and_give_each_a_name_of_its_own() -> None:
    row = {"prompt": "q", "question": "r", "completion": "a"}
    with pytest.raises(
        DataError, match=r"column_mapping must name columns of the given list, got 'questoin'.*'question'"
    ):
        load([row], config=SFTConfig(column_mapping={"questoin": "prompt"}))
    both = r"'prompt' and 'question' both are 'prompt'. Leave one out: column_mapping=\{prompt: null\}"
    with pytest.raises(DataError, match=both):
        load([row], config=SFTConfig(column_mapping={"question": "prompt"}))
    chosen = SFTConfig(column_mapping={"question": "prompt", "prompt": None})
    assert of(load([row], config=chosen)) == (ids("ra" + END), ids("a" + END))


def test_a_stream_is_read_by_the_same_mapping() -> None:
    config = SFTConfig(
        column_mapping={"question": "prompt", "answer": "completion"}, dataset_streaming=True, max_steps=1
    )
    rows = [{"question": "q", "answer": "a"}]
    (one,) = stream_examples(config, TOKENIZER, task=ExampleTask.SUPERVISED, dataset=rows, seed=0)
    assert one.example.samples[0].prompt_ids.tolist() == ids("q")
    with pytest.raises(DataError, match="column_mapping must name columns of the given list, got 'question'"):
        stream_examples(config, TOKENIZER, task=ExampleTask.SUPERVISED, dataset=[{"text": "a"}], seed=0)


LEARNT = [
    ({"text": "t", "instruction": "q", "input": "", "output": "a"}, "t" + END, "text", "instruction, output"),
    ({"text": "t", "messages": [says("user", "q")]}, turn("user", "q"), "messages", "text"),
    ({"prompt": "q", "completion": "a", "text": "t"}, "qa" + END, "prompt", "text"),
    ({"prompt": "q", "completion": "a", "messages": [says("user", "r")]}, "qa" + END, "prompt", "messages"),
]


@pytest.mark.parametrize(("row", "whole", "read", "unread"), LEARNT)
def test_of_several_columns_that_could_be_learnt_trls_choice_is_and_the_others_are_named(
    row: dict[str, Any], whole: str, read: str, unread: str
) -> None:
    found = load([row])
    assert of(found)[0] == ids(whole)
    (note,) = found.report()
    assert note.startswith(f"the given list is read from {read}")
    assert f"; {unread} could be learnt as well and are not." in note
    assert f"column_mapping={{{read}: null}}" in note
    assert of(
        load(
            [row],
            config=SFTConfig(column_mapping={read: None, "completion": None} if read == "prompt" else {read: None}),
        )
    )[0] != ids(whole)


def test_a_column_that_an_option_names_is_read_whatever_others_there_are() -> None:
    row = {"body": "b", "prompt": "q", "completion": "a", "messages": [says("user", "q")], "text": "t"}
    assert of(load([row], config=SFTConfig(dataset_text_field="body")))[0] == ids("b" + END)
    chatml = {**row, "body": turn("user", "u") + turn("assistant", "v")}
    told = SFTConfig(dataset_text_field="body", assistant_only_loss=True)
    assert of(load([chatml], config=told))[1] == ids(f"v{END}\n")


SYSTEM = {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}


def test_a_question_beside_two_answers_is_refused_until_it_is_said_what_it_is() -> None:
    dpo = {"config": DPOConfig(), "task": ExampleTask.PAIRS}
    for row in (SYSTEM, {**SYSTEM, "chosen": "The a", "rejected": "The b"}):
        told = r"Row 0 .*field 'question' must stand in what .*\{question: prompt, system: system\}"
        with pytest.raises(DataError, match=told):
            load([row], **dpo)
    turns = {"trajectory": [says("user", "q")], "task": "Coding", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"field 'trajectory' must stand in .*column_mapping=\{trajectory: prompt\}"):
        load([turns], **dpo)
    named = DPOConfig(column_mapping={"trajectory": "prompt"})
    assert of(load([turns], config=named, task=ExampleTask.PAIRS))[1] == ids(f"a{END}\n")
    messages = {
        **SYSTEM,
        "chosen": [says("user", "x"), says("assistant", "a")],
        "rejected": [says("user", "x"), says("assistant", "b")],
    }
    with pytest.raises(DataError, match=r"Row 0 .*field 'question' must stand in what"):
        load([messages], **dpo)
    begins = {"question": "q", "chosen": "q a", "rejected": "q b"}
    assert of(load([begins], **dpo)) == (ids("q a" + END), ids(" a" + END))
    mapped = DPOConfig(column_mapping={"question": "prompt", "system": None})
    assert of(load([SYSTEM], config=mapped, task=ExampleTask.PAIRS)) == (ids("qa" + END), ids("a" + END))


def test_a_system_column_that_is_named_begins_the_conversation() -> None:
    config = DPOConfig(column_mapping={"question": "prompt", "system": "system"})
    found = load([SYSTEM, {**SYSTEM, "system": ""}], config=config, task=ExampleTask.PAIRS)
    asked = turn("user", "q") + "<|im_start|>assistant\n"
    assert of(found) == (ids(turn("system", "s") + asked + f"a{END}\n"), ids(f"a{END}\n"))
    assert of(found, index=1, sample=1) == (ids(asked + f"b{END}\n"), ids(f"b{END}\n"))
    talk = {"setting": "s", "messages": [says("user", "q"), says("assistant", "a")]}
    told = SFTConfig(column_mapping={"setting": "system"})
    whole = turn("system", "s") + turn("user", "q") + turn("assistant", "a")
    assert of(load([talk], config=told))[0] == ids(whole)
    with pytest.raises(DataError, match="must not begin with a system message beside a column for it"):
        load([{**talk, "messages": [says("system", "other"), *talk["messages"]]}], config=told)
    with pytest.raises(DataError, match="'system' must have a prompt or messages that it can begin"):
        load([{"setting": "s", "text": "t"}], config=told)


def test_steps_and_labels_that_a_table_holds_as_text_are_lists() -> None:
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}
    steps: dict[str, Any] = {"config": PRMConfig(), "task": ExampleTask.STEPS}
    want = load([row], **steps).examples[0].samples[0]
    for dump in (json.dumps, str):
        table = {"prompt": "q", "completions": dump(row["completions"]), "labels": dump(row["labels"])}
        got = load([table], **steps).examples[0].samples[0]
        assert got.completion_ids.tolist() == want.completion_ids.tolist()
        assert got.label is not None and got.label.steps is not None
        assert got.label.steps.tolist() == [True, False]


def test_a_prompt_of_text_before_messages_of_the_assistant_is_the_users() -> None:
    row = {"prompt": "q", "chosen": [says("assistant", "a")], "rejected": [says("assistant", "b")]}
    asked = turn("user", "q") + "<|im_start|>assistant\n"
    found = load([row], config=DPOConfig(), task=ExampleTask.PAIRS)
    assert of(found) == (ids(asked + f"a{END}\n"), ids(f"a{END}\n"))
    assert of(load([{"prompt": "q", "completion": [says("assistant", "a")]}]))[1] == ids(f"a{END}\n")
    question = {"question": "q", "chosen": row["chosen"], "rejected": row["rejected"]}
    with pytest.raises(DataError, match=r"column_mapping=\{question: prompt\}"):
        load([question], config=DPOConfig(), task=ExampleTask.PAIRS)
    mapped = DPOConfig(column_mapping={"question": "prompt"})
    assert of(load([question], config=mapped, task=ExampleTask.PAIRS)) == of(found)


def test_answers_that_say_their_prompt_again_are_refused_with_the_option_that_helps() -> None:
    ask = [says("user", "q")]
    row = {"prompt": ask, "chosen": [*ask, says("assistant", "a")], "rejected": [*ask, says("assistant", "b")]}
    with pytest.raises(DataError, match=r"field 'chosen' must go on from its prompt.*column_mapping=\{prompt: null\}"):
        load([row], config=DPOConfig(), task=ExampleTask.PAIRS)
    without = DPOConfig(column_mapping={"prompt": None})
    assert of(load([row], config=without, task=ExampleTask.PAIRS))[1] == ids(f"a{END}\n")


def test_lists_of_roles_and_contents_and_single_messages_are_messages() -> None:
    want = of(load([{"messages": [says("user", "q"), says("assistant", "a")]}]))
    columns = {"role": ["user", "assistant"], "content": ["q", "a"], "name": None}
    assert of(load([{"messages": columns}])) == want
    assert of(load([{"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}])) == want
    pair = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    found = load([pair], config=DPOConfig(), task=ExampleTask.PAIRS)
    whole = turn("user", "q") + turn("assistant", "a")
    assert of(found) == (ids(whole), ids(f"a{END}\n"))


@pytest.mark.parametrize(
    "row",
    [
        {"system": "s", "prompt": "q", "completion": "a"},
        {"system": "s", "messages": [says("user", "q"), says("assistant", "a")]},
        {"context": "s", "prompt": "q", "completion": "a"},
    ],
)
def test_what_a_column_says_that_nobody_reads_is_counted(row: dict[str, Any]) -> None:
    column = next(iter(row))
    silent = {**row, column: " "}
    found = load([silent, row, row])
    assert found.report() == (
        f"2 of 3 rows of the given list have a text in the column '{column}', which is not trained: map it to what it "
        f"is, as in column_mapping={{{column}: system}}, which begins conversations with it, or to null.",
    )
    mapped = load([silent, row, row], config=SFTConfig(column_mapping={column: "system"}))
    assert mapped.report() == ()
    assert of(mapped, index=1)[0][: len(ids(turn("system", "s")))] == ids(turn("system", "s"))
    assert load([silent, row], config=SFTConfig(column_mapping={column: None})).report() == ()


def test_a_dataset_of_another_task_says_which_columns_to_leave_out() -> None:
    row = {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(DataError, match=r"read it as prompt_completion .* set column_mapping=\{label: null\}"):
        load([row])
    assert of(load([row], config=SFTConfig(column_mapping={"label": None})))[1] == ids("a" + END)
