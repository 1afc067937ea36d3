"""A generated turn becomes a message; whatever is not wholly in the family's format stays content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import build_tokenizer
from trl_ray.data.chat.chat_rendering import ChatFormat, render_chat
from trl_ray.data.chat.tool_calls import ToolCallFormat, parse_turn, tool_call_format
from trl_ray.data.chat.training_templates import template_source

HERMES, LLAMA3, HARMONY, MISTRAL = ToolCallFormat
TOKENIZER = build_tokenizer()
TOKENIZER.bos_token = "<|endoftext|>"


def function(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(content: str, *calls: dict[str, Any], **extra: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extra, **({"tool_calls": list(calls)} if calls else {})}


def test_hermes_reads_thoughts_words_and_several_calls() -> None:
    text = (
        "<think>\nadd, then tell the time\n</think>\n\nOne moment.\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now"}\n</tool_call><|im_end|>\n'
    )
    wanted = said("One moment.", function("add", a=1), function("now"), reasoning_content="add, then tell the time")
    assert parse_turn(text, HERMES) == wanted


def test_a_closing_tag_inside_an_argument_ends_nothing() -> None:
    text = '<tool_call>\n{"name": "say", "arguments": {"text": "</tool_call>"}}\n</tool_call>'
    assert parse_turn(text, HERMES) == said("", function("say", text="</tool_call>"))


def test_arguments_written_as_json_text_become_an_object() -> None:
    text = '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert parse_turn(text, HERMES) == said("", function("add", a=1))


def test_llama3_reads_a_bare_object_and_a_built_in_call() -> None:
    assert parse_turn('{"name": "add", "parameters": {"a": 1}}<|eot_id|>', LLAMA3) == said("", function("add", a=1))
    built_in = '<|python_tag|>brave_search.call(query="who, \\"me\\"?", lang="en")<|eom_id|>'
    assert parse_turn(built_in, LLAMA3) == said("", function("brave_search", query='who, \\"me\\"?', lang="en"))


def test_harmony_reads_thoughts_answer_and_call() -> None:
    answer = "<|channel|>analysis<|message|>easy<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>"
    assert parse_turn(answer, HARMONY) == said("Two.", thinking="easy")
    call = (
        "<|channel|>analysis<|message|>ask<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
        '<|message|>{"a": 1}<|call|>'
    )
    assert parse_turn(call, HARMONY) == said("", function("add", a=1), thinking="ask")
    other_order = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
    assert parse_turn(other_order, HARMONY) == said("", function("add", a=1))


def test_mistral_reads_a_list_of_calls_and_named_calls() -> None:
    listed = 'Sure.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abc"}]</s>'
    assert parse_turn(listed, MISTRAL) == said("Sure.", function("add", a=1) | {"id": "abc"})
    named = '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[CALL_ID]x1[ARGS]{}</s>'
    assert parse_turn(named, MISTRAL) == said("", function("add", a=1), function("now") | {"id": "x1"})


@pytest.mark.parametrize(
    ("text", "form", "content"),
    [
        ("Hello.<|im_end|>", HERMES, "Hello."),
        (
            '<tool_call>\n{"name": "add", "arguments": {<|im_end|>',
            HERMES,
            '<tool_call>\n{"name": "add", "arguments": {',
        ),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', HERMES, None),
        ('<tool_call>{"arguments": {}}</tool_call>', HERMES, None),
        ('<tool_call>{"name": "add"}', HERMES, None),
        ('<tool_call>{"name": "add"}</tool_call> and more', HERMES, None),
        ("<think>\nnever ends", HERMES, None),
        ('{"name": "add", "parameters": {}} and more', LLAMA3, None),
        ('{"name": "Ada", "born": 1815}', LLAMA3, None),
        ("<|python_tag|>print(1)<|eom_id|>", LLAMA3, "<|python_tag|>print(1)"),
        ("Two.<|return|>", HARMONY, "Two."),
        (" to=functions.add<|channel|>commentary json<|message|>{broken<|call|>", HARMONY, None),
        ("<|channel|>commentary<|message|>{}<|call|>", HARMONY, None),
        ("[TOOL_CALLS] []", MISTRAL, None),
        ("[TOOL_CALLS]add{}", MISTRAL, None),
        (f'<tool_call>{{"name": "add", "arguments": {"[" * 9999}}}</tool_call>', HERMES, None),
        (f'<tool_call>{{"name": "add", "arguments": {{"a": {"1" * 9999}}}}}</tool_call>', HERMES, None),
        (f'<tool_call>{{"name": "add", "arguments": {json.dumps("[" * 99999)}}}</tool_call>', HERMES, None),
    ],
)
def test_what_is_not_wholly_in_the_format_is_content(text: str, form: ToolCallFormat, content: str | None) -> None:
    turn = parse_turn(text, form)
    assert "tool_calls" not in turn
    if content is None:
        stops = ("<|call|>",)
        content = next((text.removesuffix(stop) for stop in stops if text.endswith(stop)), text)
    assert turn == said(content)


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name":"f","arguments":{}}',
        "<think>",
        "</think>",
        "x",
        "[TOOL_CALLS]",
        "[",
        "<|channel|>final",
        "<|message|>",
        "<|start|>assistant",
        "to=functions.f",
        "<|call|>",
        "[ARGS]",
        "{",
        "}",
        "<|end|>",
        "<|python_tag|>f.call(",
    ]
)


@given(
    st.lists(PIECES, max_size=8).map(" ".join) | st.lists(PIECES, max_size=8).map("".join),
    st.sampled_from(ToolCallFormat),
)
def test_nothing_a_model_writes_is_an_error(text: str, form: ToolCallFormat) -> None:
    turn = parse_turn(text, form)
    assert turn["role"] == "assistant"
    assert isinstance(turn["content"], str)
    assert all(isinstance(call["function"]["arguments"], dict) for call in turn.get("tool_calls", []))


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen2_5", HERMES),
        ("qwen3", HERMES),
        ("qwen3_instruct_2507", HERMES),
        ("llama3_1", LLAMA3),
        ("llama3_2", LLAMA3),
        ("gptoss", HARMONY),
        ("chatml", None),
        ("llama3", None),
        ("gemma", None),
    ],
)
def test_the_format_is_found_by_rendering_a_call(family: str, form: ToolCallFormat | None) -> None:
    assert tool_call_format(TOKENIZER, ChatFormat(template=template_source(family))) == form


ARGUMENTS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=12),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    ),
    max_size=3,
)


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2", "gptoss"])
@settings(max_examples=25)
@given(arguments=ARGUMENTS)
def test_a_rendered_call_is_read_back_as_it_was(family: str, arguments: dict[str, Any]) -> None:
    chat = ChatFormat(template=template_source(family))
    turn = said("", function("probe", **{}) | {"function": {"name": "probe", "arguments": arguments}})
    rendered = render_chat(TOKENIZER, [{"role": "user", "content": "hi"}, turn], chat)
    ((start, stop),) = rendered.spans
    form = tool_call_format(TOKENIZER, chat)
    assert form is not None
    assert parse_turn(rendered.text[start:stop], form) == turn
