"""Training templates render, on hundreds of conversations, the very text of the models' own templates TRL ships.

Each of ours is compared with the original (text) and with TRL's training version of it (text and generation spans).
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest

from tiny_models import build_tokenizer
from trl_ray.data.chat.chat_rendering import ChatFormat, RenderedChat, render_chat
from trl_ray.data.chat.training_templates import LOCATED, OWN, template_source, training_template
from trl_ray.data.chat.turn_spans import locate_turns
from trl_ray.errors import ModelError

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]

MARKED = ("qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "phi3_5", "cohere")
SHIPPED = (*MARKED, "qwen2_5", "gptoss", "llama3_1", "llama3_2")
STOPS = ["<|eot_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "</s>", "<|END_OF_TURN_TOKEN|>"]


def message(role: str, content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(*names: str) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "arguments": {"a": place, "b": 'ü"<'}}}
        for place, name in enumerate(names)
    ]


TURNS = [
    message("user", " Hi \n there "),
    message("system", "Be brief. "),
    message("developer", "Obey."),
    message("assistant", "Hello! "),
    message("assistant", "", tool_calls=call("mul")),
    message("assistant", "Calling.", tool_calls=call("mul", "add")),
    message("assistant", None, tool_calls=call("mul")),
    message("assistant", "", tool_calls=[{"name": "flat", "arguments": {"q": 1}}]),
    {"role": "assistant", "thinking": "let me", "tool_calls": call("mul")},
    message("assistant", "<think>\nhm\n</think>\n\nyes"),
    message("assistant", "yes", reasoning_content="hm"),
    message("assistant", "yes", thinking="hm"),
    message("tool", "6", name="mul"),
    message("tool", {"x": 1}),
]
USER, SYSTEM, _, HELLO, CALL, *_ = TURNS
CONVERSATIONS = [
    *([turn] for turn in TURNS),
    *(list(pair) for pair in itertools.product(TURNS, repeat=2)),
    *([USER, *pair] for pair in itertools.product(TURNS, repeat=2)),
    [SYSTEM, USER, HELLO, USER],
    [USER, HELLO, USER, HELLO, USER],
    [USER, CALL, TURNS[-2], HELLO, USER, HELLO],
    [USER, TURNS[5], TURNS[-2], TURNS[-2], HELLO],
]
TYPES: dict[str, Any] = {
    "a": {"type": "integer", "description": "first", "default": 3},
    "b": {"type": "string", "enum": ["x", "y"], "default": "x"},
    "c": {"type": "array", "items": {"type": "number"}, "nullable": True},
    "d": {"type": ["string", "null"]},
    "e": {"oneOf": [{"type": "string", "default": "q"}, {"type": "number", "description": "n"}], "default": "r"},
    "f": {"type": "object", "properties": {"g": {"type": "boolean"}, "h": {"type": "string"}}, "required": ["g"]},
    "i": {"type": "array", "items": {"type": "object", "properties": {"z": {"type": "string"}}}},
    "j": {"type": "string", "nullable": True},
    "k": {"type": "array"},
    "l": {},
    "m": {"oneOf": [{"type": "object"}, {"type": "string"}]},
    "n": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}},
    "o": {"type": "object"},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "mul",
            "description": "Multiply.",
            "parameters": {"type": "object", "properties": TYPES, "required": ["a"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "Time.", "parameters": {"type": "object"}}},
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"header": True},
    {"tools": TOOLS},
    {"tools": TOOLS, "header": True, "values": {"enable_thinking": False, "reasoning_effort": "low"}},
]
TOKENIZER = build_tokenizer()
TOKENIZER.add_tokens(STOPS, special_tokens=True)
TOKENIZER.bos_token = "<|endoftext|>"


def trl_template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def rendered(
    source: str, conversation: list[dict[str, Any]], *, tools: Any = None, header: bool = False, values: Any = None
) -> RenderedChat | None:
    chat = ChatFormat(template=source, tools=tools, template_kwargs=values or {})
    try:
        return render_chat(TOKENIZER, conversation, chat, add_generation_prompt=header)
    except ModelError:
        return None


def text(found: RenderedChat | None) -> str | None:
    return None if found is None else found.text


@pytest.mark.parametrize("family", SHIPPED)
def test_the_text_is_that_of_the_models_own_template(family: str) -> None:
    ours, original = template_source(family), trl_template(family)
    accepted = 0
    for conversation, setting in itertools.product(CONVERSATIONS, SETTINGS):
        theirs = text(rendered(original, conversation, **setting))
        assert text(rendered(ours, conversation, **setting)) == theirs, (conversation, setting)
        accepted += theirs is not None
    assert accepted >= 20


@pytest.mark.parametrize("family", [*MARKED, "qwen3"])
def test_text_and_spans_are_those_of_trls_training_template(family: str) -> None:
    ours, training = template_source(family), trl_template(f"{family}_training")
    marked = 0
    for conversation, setting in itertools.product(CONVERSATIONS, SETTINGS):
        theirs = rendered(training, conversation, **setting)
        assert rendered(ours, conversation, **setting) == theirs, (conversation, setting)
        marked += theirs is not None and bool(theirs.spans)
    assert marked >= 20


@pytest.mark.parametrize(("family", "header"), [("qwen2_5", "\n"), ("gptoss", "<|start|>assistant")])
def test_spans_lack_only_the_part_of_trls_that_the_generation_prompt_already_holds(family: str, header: str) -> None:
    ours, training = template_source(family), trl_template(f"{family}_training")
    for conversation, setting in itertools.product(CONVERSATIONS, SETTINGS):
        our, their = rendered(ours, conversation, **setting), rendered(training, conversation, **setting)
        assert text(our) == text(their)
        if our is None or their is None:
            continue
        for (start, stop), (their_start, their_stop) in zip(our.spans, their.spans, strict=True):
            assert (our.text[their_start:start], stop) == (header, their_stop)


@pytest.mark.parametrize("family", [*SHIPPED, "qwen3"])
def test_the_original_finds_its_training_template(family: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(STOPS, special_tokens=True)
    tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", trl_template(family)
    found = training_template(tokenizer)
    assert (found.name, found.keeps_thoughts) == (family, family == "qwen3")


# Families without a template of ours: their turns are found in what their own template renders.
FOUND = (
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "glm4moe",
    "lfm2",
    "lfm2_v2",
    "nemotron_3_5_lightning",
    "nemotron_3_nano",
    "nemotron_3_super",
    "nemotron_3_ultra",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
)
# These have markers of their own or no training version.
OTHERS = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "lfm2_2_5", "lfm2_2_5_v2", "muse_glimmer")
MORE_STOPS = ["<|user|>", "<|observation|>", "<turn|>", "<|tool_response>", "<|eot|>", "<|eom|>", "<think>", "</think>"]
MORE_STOPS += ["<\uff5cend\u2581of\u2581sentence\uff5c>", "<|END_RESPONSE|>"]
ASKED, ANSWERED = message("user", "Is it?"), message("assistant", "It is.")
THOUGHT = message("assistant", "So it is.", reasoning_content="hm")
CALLED, RESULT = message("assistant", "", tool_calls=call("mul")), message("tool", "6", name="mul")
TALKS = [
    [ASKED, ANSWERED],
    [message("system", "Be brief."), ASKED, ANSWERED],
    [ASKED, ANSWERED, ASKED, message("assistant", "No.")],
    [ASKED, THOUGHT],
    [ASKED, CALLED],
    [ASKED, CALLED, RESULT, ANSWERED],
]


def found_tokenizer(family: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([*STOPS, *MORE_STOPS], special_tokens=True)
    tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", trl_template(family)
    return tokenizer


@pytest.mark.parametrize("family", [*FOUND, *OTHERS])
def test_a_family_without_a_training_template_is_not_taken_for_another(family: str) -> None:
    found = training_template(found_tokenizer(family))
    assert found.name in (LOCATED, OWN)
    assert found.source == trl_template(family)


@pytest.mark.parametrize("family", FOUND)
def test_turns_that_are_found_are_trls_but_for_what_the_generation_prompt_holds(family: str) -> None:
    tokenizer, chat = found_tokenizer(family), ChatFormat(template=trl_template(family))
    training = ChatFormat(template=trl_template(f"{family}_training"))
    compared = 0
    for talk in TALKS:
        try:
            theirs = render_chat(tokenizer, talk, training)
            # Where the row's thought has no place in the template, ours puts it into the content.
            ours = locate_turns(tokenizer, talk, chat)
        except ModelError:
            continue
        assert ours.text == theirs.text, talk
        for (start, stop), (their_start, their_stop) in zip(ours.spans, theirs.spans, strict=True):
            header = ours.text[their_start:start]
            assert stop == their_stop
            before = talk[: max(i for i, turn in enumerate(talk) if turn["role"] == "assistant")]
            opened = render_chat(tokenizer, before, chat, add_generation_prompt=True).text
            assert start >= their_start and (not header or header in opened)
        compared += 1
    assert compared >= 3
