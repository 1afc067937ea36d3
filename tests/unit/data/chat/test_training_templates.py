"""Training templates render what models' own templates render, mark what the model writes, and are found by that."""

from __future__ import annotations

import importlib.resources
from typing import Any

import pytest
from jinja2 import nodes
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from tiny_models import build_tokenizer
from trl_ray.data.chat.chat_rendering import ChatFormat, RenderedChat, encode_chat, own_template, render_chat
from trl_ray.data.chat.training_templates import (
    FAMILIES,
    LOCATED,
    OWN,
    has_generation_markers,
    keeps_prefixes,
    supports_tool_calling,
    template_source,
    training_template,
    trains_stop_token,
)
from trl_ray.errors import ModelError

STOPS = ("<|eot_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "</s>", "<|END_OF_TURN_TOKEN|>")
WITH_TOOLS = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2", "gptoss")

HI: dict[str, Any] = {"role": "user", "content": "hi"}
HELLO: dict[str, Any] = {"role": "assistant", "content": "hello"}

# Public documented templates of models whose originals no test dependency ships.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('only user and assistant') }}"
    "{% endif %}{% endfor %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A template that shows thoughts in the last turn only, as Qwen3's does.
FORGETFUL = template_source("qwen3").replace(
    "{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') -}}",
    "{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') if loop.last else text -}}",
)


def tokenizer(template: str, *, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """One token per byte, and one for each stop of the families."""
    made = build_tokenizer()
    made.add_tokens([AddedToken(token, special=True) for token in STOPS])
    made.bos_token, made.eos_token = "<|endoftext|>", eos
    made.chat_template = template
    return made


def unmarked(source: str) -> str:
    return source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def test_every_template_file_is_a_family_and_every_family_has_one() -> None:
    folder = importlib.resources.files("trl_ray.data") / "chat_templates"
    assert {file.name.removesuffix(".jinja") for file in folder.iterdir()} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_trains_the_stop_token_and_keeps_prefixes_and_is_its_own_training_template(family: str) -> None:
    made = tokenizer(template_source(family))
    assert trains_stop_token(made)
    assert training_template(made).name == OWN
    tool = {"type": "function", "function": {"name": "probe_name", "description": "probe_words", "parameters": {
        "type": "object", "properties": {"probe_key": {"type": "string"}}}}}  # fmt: skip
    chat = ChatFormat(template=template_source(family), tools=[tool])
    text = render_chat(made, [{"role": "user", "content": "hi"}], chat).text
    renders_tools = all(word in text for word in ("probe_name", "probe_words", "probe_key"))
    assert supports_tool_calling(made) == renders_tools == (family in WITH_TOOLS)
    if family in WITH_TOOLS:
        assert keeps_prefixes(made)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_is_found_by_what_it_renders_not_by_its_source(family: str) -> None:
    found = training_template(tokenizer(unmarked(template_source(family)) + "{# no marker #}"))
    assert (found.name, found.keeps_thoughts) == (family, False)
    assert has_generation_markers(found.source)


@pytest.mark.parametrize(("original", "family"), [(ZEPHYR, "zephyr"), (MISTRAL, "mistral"), (SMOLLM2, "smollm2")])
def test_the_training_template_of_a_published_template_is_found(original: str, family: str) -> None:
    assert training_template(tokenizer(original)).name == family


def test_a_template_that_forgets_thoughts_gets_one_that_keeps_them() -> None:
    own = tokenizer(unmarked(FORGETFUL))
    assert template_source("qwen3") != FORGETFUL
    assert not keeps_prefixes(own)
    found = training_template(own)
    assert (found.name, found.keeps_thoughts) == ("qwen3", True)


def test_markers_do_not_save_a_template_that_forgets_thoughts() -> None:
    assert training_template(tokenizer(FORGETFUL)).name == "qwen3"


def test_one_different_blank_in_the_text_is_another_template_whose_turns_are_found_in_it() -> None:
    own = tokenizer(unmarked(template_source("chatml")).replace("assistant\\n", "assistant \\n"))
    found = training_template(own)
    assert (found.name, found.located, found.source) == (LOCATED, True, own.chat_template)


def test_a_template_that_does_not_render_turns_one_by_one_is_refused_with_the_nearest_family() -> None:
    own = tokenizer(unmarked(template_source("chatml")).replace("turn.content", "turn.content | upper"))
    with pytest.raises(
        ModelError,
        match=r"no training template renders the same text; the nearest is chatml, .* turns .*"
        "Nor can the turns be found in it: .* does not render its content",
    ):
        training_template(own)


def test_a_stop_token_the_tokenizer_does_not_know_is_told() -> None:
    own = build_tokenizer()
    own.bos_token = "<|endoftext|>"
    own.chat_template = unmarked(template_source("gemma"))
    with pytest.raises(ModelError, match="renders what gemma renders, but its added vocabulary has no token"):
        training_template(own)


def test_markers_that_leave_the_stop_token_out_do_not_train_it() -> None:
    late = template_source("chatml").replace(
        "{%- generation -%}{{- turn.content + '<|im_end|>\\n' -}}{%- endgeneration -%}",
        "{%- generation -%}{{- turn.content -}}{%- endgeneration -%}{{- '<|im_end|>\\n' -}}",
    )
    assert has_generation_markers(late)
    assert not trains_stop_token(tokenizer(late))
    assert training_template(tokenizer(late)).name == "chatml"


def test_spans_hold_what_the_model_writes_and_nothing_else() -> None:
    chat = ChatFormat(template=template_source("llama3"))
    rendered = render_chat(tokenizer(""), [HI, HELLO, HI, HELLO], chat)
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == ["hello<|eot_id|>"] * 2


def test_thoughts_before_a_final_answer_of_gptoss_are_trained_with_the_header_between() -> None:
    chat = ChatFormat(template=template_source("gptoss"))
    rendered = render_chat(tokenizer(""), [HI, {**HELLO, "thinking": "hm"}], chat)
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == [
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>hello<|return|>"
    ]


def test_the_mask_covers_every_token_of_a_character_and_no_token_outside() -> None:
    encoded = encode_chat(tokenizer(""), RenderedChat(text="aé", spans=((1, 2),)))
    assert encoded.assistant_mask.tolist() == [False, True, True]  # é is two bytes, two tokens
    empty = encode_chat(tokenizer(""), RenderedChat(text="ab", spans=((1, 1),)))
    assert not empty.assistant_mask.any()


def test_templates_are_rendered_in_a_sandbox() -> None:
    chat = ChatFormat(template="{{ messages.__class__.__mro__ }}{% generation %}{% endgeneration %}")
    with pytest.raises(ModelError, match="SecurityError"):
        render_chat(tokenizer(""), [HI], chat)
    with pytest.raises(ModelError, match="SecurityError"):
        render_chat(tokenizer(""), [HI], ChatFormat(template="{{ messages.append(1) }}"))


def test_markers_stand_outside_macros_where_their_place_in_the_text_is_known() -> None:
    for family in FAMILIES:
        environment = _compile_jinja_template(template_source(family)).environment
        tree = environment.parse(template_source(family))
        inside = [block for macro in tree.find_all(nodes.Macro) for block in macro.find_all(nodes.CallBlock)]
        assert inside == [], family


def test_of_several_templates_the_default_is_taken_and_none_is_an_error() -> None:
    made = tokenizer("x")
    made.chat_template = {"tool_use": "a", "default": "b"}
    assert own_template(made) == "b"
    made.chat_template = None
    with pytest.raises(ModelError, match="must have a chat template"):
        own_template(made)
    with pytest.raises(ModelError, match=r"one of chatml, .*, got 'qwen9'"):
        template_source("qwen9")
