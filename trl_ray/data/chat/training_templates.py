"""Finds the template with generation markers that renders what a model's own template renders.

    own template ──── render probes ─────┐
                                         ├─ same text? ─► TrainingTemplate ─► supervised.py, assistant_only_loss
    chat_templates/*.jinja ─ render ─────┘

Templates on the hub differ by a blank or a comment while they say the same, so sources are not compared: texts are, on
conversations that reach every branch. Some models' templates take thoughts out of earlier turns when the conversation
goes on. Training wants every turn as it was written, so for those the texts must agree wherever no earlier assistant
turn exists, and the training template must keep what it has rendered.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from trl_ray.data.chat.chat_rendering import (
    GENERATION_MARKER,
    ChatFormat,
    ChatTokenizer,
    encode_chat,
    own_template,
    render_chat,
)
from trl_ray.data.chat.turn_spans import added_tokens, locate_turns
from trl_ray.errors import ModelError
from trl_ray.types import Message

OWN = "own"
LOCATED = "located"
FAMILIES = (
    "chatml",
    "smollm2",
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "llama3",
    "llama3_1",
    "llama3_2",
    "gptoss",
    "gemma",
    "gemma3",
    "phi3",
    "phi3_5",
    "mistral",
    "zephyr",
    "cohere",
)


class TemplateTokenizer(ChatTokenizer, Protocol):
    """The part of a Hugging Face fast tokenizer that choosing a template needs."""

    def get_added_vocab(self) -> Mapping[str, int]:
        """Tokens outside the base vocabulary; those that end a turn are among them."""
        ...

    def decode(self, token_ids: Any) -> Any:
        """The text of some tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTemplate:
    """A template whose assistant turns are marked."""

    name: str
    """One of `FAMILIES`, `own`, or `located`: the tokenizer's own without markers, see `turn_spans`."""
    source: str
    keeps_thoughts: bool
    """Earlier turns keep their thoughts, which the model's own template takes out."""
    located: bool = False
    """The template has no markers, and the turns are found by `turn_spans`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    messages: tuple[Message, ...]
    tools: Sequence[Any] | None = None
    add_generation_prompt: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def has_earlier_answer(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages[:-1]) or (
            self.add_generation_prompt and self.messages[-1]["role"] == "assistant"
        )


@functools.cache
def template_source(name: str) -> str:
    """The source of the training template of a family.

    Raises:
        ModelError: there is no such family.
    """
    if name not in FAMILIES:
        raise ModelError(f"A training template must be one of {', '.join(FAMILIES)}, got {name!r}.")
    folder = importlib.resources.files("trl_ray.data") / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def training_template(
    tokenizer: TemplateTokenizer, *, template_kwargs: Mapping[str, Any] | None = None
) -> TrainingTemplate:
    """The template to train assistant turns with: the tokenizer's own if it is fit for it, else one of ours.

    Where none of ours renders the same text, the turns are found in what the own template renders.

    Raises:
        ModelError: there is no own template, or none of ours renders the same text and turns cannot be found; names the
            nearest, and a probe on which the two differ.
    """
    own = ChatFormat(template=own_template(tokenizer), template_kwargs=template_kwargs or {})
    calls_tools = supports_tool_calling(tokenizer, own)
    rewrites = calls_tools and not keeps_prefixes(tokenizer, own)
    if trains_stop_token(tokenizer, own) and not rewrites:
        return TrainingTemplate(name=OWN, source=own.template, keeps_thoughts=False)
    probes = [probe for probe in _probes() if not (rewrites and probe.has_earlier_answer())]
    wanted = [_text(tokenizer, own, probe) for probe in probes]
    nearest, fewest, example = "", len(probes) + 1, ""
    for name in FAMILIES:
        ours = replace(own, template=template_source(name))
        differing = [probe for probe, text in zip(probes, wanted, strict=True) if _text(tokenizer, ours, probe) != text]
        if not differing and not trains_stop_token(tokenizer, ours):
            raise ModelError(
                "The tokenizer must know what ends an assistant turn as one token. Its chat template "
                f"renders what {name} renders, but its added vocabulary has no token for the end of such a turn. Take "
                "the tokenizer that belongs to the model, or set another chat_template."
            )
        if not differing and (not rewrites or keeps_prefixes(tokenizer, ours)):
            return TrainingTemplate(name=name, source=ours.template, keeps_thoughts=rewrites)
        if differing and len(differing) < fewest:
            nearest, fewest, example = name, len(differing), _describe(differing[0])
    why = _why_not_located(tokenizer, own)
    if why is None:
        return TrainingTemplate(name=LOCATED, source=own.template, keeps_thoughts=rewrites, located=True)
    raise ModelError(
        "assistant_only_loss needs a chat template with {% generation %} markers around what the assistant writes, "
        "its end-of-turn token included. The tokenizer's own is not such a template, and no training template renders "
        f"the same text; the nearest is {nearest or 'none'}, which differs on {fewest} of {len(probes)} conversations, "
        f"for example {example or 'none'}. Nor can the turns be found in it: {why} "
        "Add the markers to a copy and set chat_template to its path, or set "
        "assistant_only_loss to False."
    )


def end_of_turn(tokenizer: TemplateTokenizer) -> str | None:
    """The token with which the tokenizer's own template ends an assistant's turn; None where it cannot be told."""
    try:
        chat = ChatFormat(template=own_template(tokenizer))
        found = locate_turns(tokenizer, (_user("Is it?"), _assistant("It is.")), chat)
    except ModelError:
        return None
    start, stop = found.spans[0]
    tokens = added_tokens(tokenizer).findall(found.text[start:stop].partition("It is.")[2])
    return str(tokens[-1]) if tokens else None


def _why_not_located(tokenizer: TemplateTokenizer, chat: ChatFormat) -> str | None:
    """Why the turns of the simplest conversations cannot be found in what a template renders; None where they can."""
    answers = ("It is.", "So it is.")
    turns = (_user("Is it?"), _assistant(answers[0]), _user("Is it so?"), _assistant(answers[1]))
    try:
        for messages in (turns[:2], turns):
            found = locate_turns(tokenizer, messages, chat)
            texts = [found.text[start:stop] for start, stop in found.spans]
            if [answer for answer, text in zip(answers, texts, strict=False) if text.count(answer) != 1]:
                return "a turn does not hold its content."
    except ModelError as error:
        return str(error)
    return None


def has_generation_markers(source: str) -> bool:
    """Whether a template marks what the model writes."""
    return GENERATION_MARKER.search(source) is not None


def supports_tool_calling(tokenizer: ChatTokenizer, chat: ChatFormat | None = None) -> bool:
    """Whether a template shows the name and arguments of a call and the tool's answer; many drop some silently."""
    chat = chat or ChatFormat(template=own_template(tokenizer))
    name, key, value, answer = "probe_name_4f1c", "probe_key_9d27", "probe_value_e803", "probe_answer_b65a"
    for arguments in ({key: value}, f'{{"{key}": "{value}"}}'):  # a few templates want the arguments as JSON text
        turns = (_user("hi"), _call(name, arguments), {"role": "tool", "name": name, "content": answer})
        text = _text(tokenizer, chat, _Probe(messages=turns))
        if text is not None:
            return all(word in text for word in (name, key, value, answer))
    return False


def keeps_prefixes(tokenizer: ChatTokenizer, chat: ChatFormat | None = None) -> bool:
    """Whether a call stays as it was rendered when the tool's answer follows; the tool loop appends tokens on that."""
    chat = chat or ChatFormat(template=own_template(tokenizer))
    for arguments in ({"a": 1}, '{"a": 1}'):
        turns = (_user("hi"), _call("add", arguments))
        before = _text(tokenizer, chat, _Probe(messages=turns))
        answered = (*turns, {"role": "tool", "name": "add", "content": "1"})
        after = _text(tokenizer, chat, _Probe(messages=answered, add_generation_prompt=True))
        if before is not None and after is not None:
            return after.startswith(before)
    return False


def trains_stop_token(tokenizer: TemplateTokenizer, chat: ChatFormat | None = None) -> bool:
    """Whether the token that ends an assistant turn is inside the markers; a model must learn to stop.

    It is a token of the added vocabulary, and the last in the mask but for white space.
    """
    chat = chat or ChatFormat(template=own_template(tokenizer))
    if not has_generation_markers(chat.template):
        return False
    # A turn follows, because the end of a turn is easily attributed to the next one.
    turns = (_user("hi"), _assistant("hello"), _user("more"))
    try:
        encoded = encode_chat(tokenizer, render_chat(tokenizer, turns, chat))
    except ModelError:
        return False
    added = set(tokenizer.get_added_vocab().values())
    written = [int(token) for token in encoded.token_ids[encoded.assistant_mask]]
    while written and not str(tokenizer.decode([written[-1]])).strip():
        if written[-1] in added:
            break
        written.pop()
    return bool(written) and written[-1] in added


def _text(tokenizer: ChatTokenizer, chat: ChatFormat, probe: _Probe) -> str | None:
    """What the template makes of a probe; None where it refuses it, which counts as an answer too."""
    values = {**chat.template_kwargs, **probe.template_kwargs}
    chat = ChatFormat(template=chat.template, tools=probe.tools, template_kwargs=values)
    try:
        return render_chat(tokenizer, probe.messages, chat, add_generation_prompt=probe.add_generation_prompt).text
    except ModelError:
        return None


def _probes() -> list[_Probe]:
    tools = (
        _tool("add", "Adds.", {"a": {"type": "integer", "description": "first"}, "b": {"type": "string"}}),
        _tool("now", "The time.", {}),
    )
    system, question, answer = (
        {"role": "system", "content": " Be brief.\n"},
        _user(" What\n is it? "),
        _assistant("It. "),
    )
    call, result = _call("add", {"a": 1, "b": 'ü"<'}), {"role": "tool", "name": "add", "content": "2"}
    several = {**call, "content": "Wait.", "tool_calls": [*call["tool_calls"], *call["tool_calls"]]}
    thinking = _assistant("<think>\nhm\n</think>\n\nIt is.")
    reasoning = {**answer, "reasoning_content": "hm"}
    conversations: list[tuple[Message, ...]] = [
        (question,),
        (system, question),
        ({**system, "role": "developer"}, question),
        ({**system, "content": ""}, question, answer),
        (question, answer),
        (system, question, answer),
        (question, thinking),
        (question, reasoning),
        (question, call),
        (question, several),
        (question, answer, question),
        (system, question, answer, question, answer),
        (question, thinking, question, thinking),
        (question, call, result),
        (question, call, result, answer),
        (question, several, result, result, answer, question),
        (system, question, answer, system, question),
        (question, question),
    ]
    probes = [_Probe(messages=messages) for messages in conversations]
    headed = [replace(probe, add_generation_prompt=True) for probe in probes if probe.messages[-1] is not answer]
    quick = [replace(probe, template_kwargs={"enable_thinking": False}) for probe in headed[:2]]
    return [*probes, *headed, *quick, *(replace(probe, tools=tools) for probe in [*probes, *headed])]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _call(name: str, arguments: object) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _tool(name: str, description: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": dict(properties), "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _describe(probe: _Probe) -> str:
    roles = ", ".join(str(message["role"]) for message in probe.messages)
    extras = [
        word for word, given in (("tools", probe.tools), ("a generation prompt", probe.add_generation_prompt)) if given
    ]
    return f"the turns {roles}" + (f" with {' and '.join(extras)}" if extras else "")
