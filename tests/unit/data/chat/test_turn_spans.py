"""The assistant's turns are found in the rendering of templates without markers: contents, calls, thoughts, ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from family_templates import CALL, FAMILIES, NO, RESULT, TALK, THOUGHTFUL, TOOL_TALK, USER, YES, Family, chatml
from trl_ray.data.chat.chat_rendering import ChatFormat, encode_chat, render_chat
from trl_ray.data.chat.faithful_rendering import render_faithfully
from trl_ray.data.chat.training_templates import LOCATED, training_template
from trl_ray.data.chat.turn_spans import locate_turns
from trl_ray.errors import ModelError

NAMES = tuple(FAMILIES)


def trained(family: Family, messages: Sequence[Any]) -> tuple[str, ...]:
    """What the tokens of the assistant mask say, turn by turn, and nothing else of the text."""
    tokenizer = family.tokenizer()
    found = render_faithfully(tokenizer, messages, ChatFormat(template=family.template), locate=True).rendered
    encoded = encode_chat(tokenizer, found)
    pieces = tuple(found.text[start:stop] for start, stop in found.spans)
    assert tokenizer.decode(encoded.token_ids[encoded.assistant_mask].tolist()) == "".join(pieces)
    return pieces


@pytest.mark.parametrize("name", NAMES)
def test_contents_and_ends_of_turns_are_trained_and_nothing_else(name: str) -> None:
    assert trained(FAMILIES[name], TALK) == FAMILIES[name].talk


@pytest.mark.parametrize("name", NAMES)
def test_every_turns_thoughts_are_trained_where_the_family_writes_them_or_in_the_content(name: str) -> None:
    assert trained(FAMILIES[name], THOUGHTFUL) == FAMILIES[name].thoughtful


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].tools])
def test_calls_are_trained_up_to_the_token_that_hands_over_to_the_tool(name: str) -> None:
    assert trained(FAMILIES[name], TOOL_TALK) == FAMILIES[name].tools


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_templates_own_but_for_the_end_that_glm_writes_into_the_next_turn(name: str) -> None:
    family = FAMILIES[name]
    chat = ChatFormat(template=family.template)
    plain = render_chat(family.tokenizer(), TALK, chat).text
    found = locate_turns(family.tokenizer(), TALK, chat).text
    if name == "qwen3_5":  # it takes the empty block of thoughts out of earlier turns, training keeps it
        plain = plain.replace("assistant\nYes.", "assistant\n<think>\n\n</think>\n\nYes.")
    assert found == plain + ("<|user|>" if name == "glm4_moe" else "")


@pytest.mark.parametrize("name", NAMES)
def test_a_family_without_markers_is_trained_with_its_own_template(name: str) -> None:
    found = training_template(FAMILIES[name].tokenizer())
    expected = ("mistral", False) if name == "mistral" else (LOCATED, True)
    assert (found.name, found.located) == expected


def test_another_default_system_prompt_is_no_reason_to_refuse() -> None:
    family = Family(template=chatml("You are Ann."), tokens=(), talk=("", ""), thoughtful=("", ""))
    assert training_template(family.tokenizer()).located
    assert trained(family, TALK) == ("Yes.<|im_end|>\n", "No.<|im_end|>\n")


def test_a_template_without_a_generation_prompt_has_headers_all_the_same() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    assert trained(Family(template=source, tokens=(), talk=("", ""), thoughtful=("", "")), TALK) == (
        "Yes.<|im_end|>",
        "No.<|im_end|>",
    )


def test_what_ends_a_conversation_is_no_part_of_the_last_turn() -> None:
    source = chatml("") + "{% if not add_generation_prompt %}{{ bos_token }}{% endif %}"
    assert trained(Family(template=source, tokens=(), talk=("", ""), thoughtful=("", "")), TALK)[1] == "No.<|im_end|>\n"


def test_an_answer_that_looks_like_the_generation_prompt_is_trained_whole() -> None:
    for content in ("<think", "<|im_start|>assistant\n", "<", "\n"):
        said = {"role": "assistant", "content": content + "x"}
        assert trained(FAMILIES["deepseek_r1_distill"], (USER, said)) == (
            content + "x" + "<\uff5cend▁of▁sentence\uff5c>",
        )


def test_a_question_may_be_the_last_and_an_assistant_the_first() -> None:
    family = FAMILIES["qwen2"]
    assert trained(family, (USER, YES, USER)) == ("Yes.<|im_end|>\n",)
    assert trained(family, (YES, USER, NO)) == ("Yes.<|im_end|>\n", "No.<|im_end|>\n")
    assert trained(family, (USER,)) == ()


@pytest.mark.parametrize("name", NAMES)
def test_messages_in_any_order_are_told_apart(name: str) -> None:
    first, second = FAMILIES[name].talk
    # Behind another answer GLM has no token to end the first with; what opens the next one is not trained.
    open_end = first.removesuffix("<|user|>")
    assert trained(FAMILIES[name], (USER, YES, NO)) == (open_end, second)
    assert trained(FAMILIES[name], (USER, USER, YES)) == (first,)
    silent = {**YES, "content": ""}
    assert trained(FAMILIES[name], (USER, silent, USER, NO))[1] == second
    assert trained(FAMILIES[name], (USER, silent, USER, NO))[0] in (
        first.replace("Yes.", ""),
        "\n<think></think><|user|>",
    )


def test_calls_beside_text_and_several_calls_are_one_turn() -> None:
    several = {**CALL, "content": "Wait.", "tool_calls": CALL["tool_calls"] * 2}
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert trained(FAMILIES["qwen2_5_math"], (USER, several, RESULT, RESULT, YES)) == (
        f"Wait.\n{written}\n{written}<|im_end|>\n",
        "Yes.<|im_end|>\n",
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "does not render its content"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "writes no token of the added vocabulary"),
        ("{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}", "message 1"),
        (
            "{% for m in messages %}{{ messages | length if m.role != 'user' }}{{ m.content }}<|im_end|>{% endfor %}",
            "message [13]",
        ),
    ],
)
def test_turns_that_cannot_be_told_apart_are_refused_with_the_reason(template: str, why: str) -> None:
    family = Family(template=template, tokens=(), talk=("", ""), thoughtful=("", ""))
    with pytest.raises(ModelError, match=f"(?s)in one piece.*{why}.*assistant_only_loss"):
        locate_turns(family.tokenizer(), TALK, ChatFormat(template=template), where="row 3 of d")
