"""Chat templates of model families that have no markers, written from the documented formats, and their tokens.

Family: template, the tokens that the tokenizer knows ─► what is trained of one conversation, turn by turn
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tiny_models import build_tokenizer

USER: dict[str, Any] = {"role": "user", "content": "Is it?"}
YES: dict[str, Any] = {"role": "assistant", "content": "Yes."}
MORE: dict[str, Any] = {"role": "user", "content": "And so?"}
NO: dict[str, Any] = {"role": "assistant", "content": "No."}
TALK = (USER, YES, MORE, NO)
THOUGHTFUL = (USER, {**YES, "reasoning_content": "hm"}, MORE, {**NO, "reasoning_content": "ha"})
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT: dict[str, Any] = {"role": "tool", "name": "add", "content": "2"}
TOOL_TALK = (USER, CALL, RESULT, YES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A template, and what is trained of `TALK`, `THOUGHTFUL` and `TOOL_TALK` (None: it has no place for calls)."""

    template: str
    tokens: tuple[str, ...]
    talk: tuple[str, str]
    thoughtful: tuple[str, str]
    tools: tuple[str, str] | None = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per byte, and one for each of the family's."""
        made = build_tokenizer()
        made.add_tokens([AddedToken(token, special=True) for token in self.tokens])
        made.bos_token, made.eos_token = "<|endoftext|>", "<|im_end|>"
        made.chat_template = self.template
        return made


def _folded(end: str) -> tuple[str, str]:
    """What is trained where a template has no place for thoughts."""
    return (f"<think>\nhm\n</think>\n\nYes.{end}", f"<think>\nha\n</think>\n\nNo.{end}")


def chatml(system: str, calls: str = "", thoughts: str = "", header: str = "") -> str:
    """ChatML with a default system turn, and what is between header and content, behind it, and in the next header."""
    return (
        "{%- if messages[0].role != 'system' and '" + system + "' -%}"
        "{{- '<|im_start|>system\n" + system + "<|im_end|>\n' -}}{%- endif -%}"
        "{%- for turn in messages -%}"
        "{%- if turn.role == 'assistant' -%}"
        "{{- '<|im_start|>assistant\n' -}}" + thoughts + "{{- turn.content or '' -}}" + calls + "{{- '<|im_end|>\n' -}}"
        "{%- elif turn.role == 'tool' -%}"
        "{{- '<|im_start|>user\n<tool_response>\n' + turn.content + '\n</tool_response><|im_end|>\n' -}}"
        "{%- else -%}{{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n" + header + "' -}}{%- endif -%}"
    )


_HERMES = (
    "{%- for call in turn.tool_calls or [] -%}{{- '\n' if turn.content or not loop.first -}}"
    "{{- '<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) "
    "+ '\n</tool_call>' -}}{%- endfor -%}"
)
_HERMES_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
_PARAMETERS = (
    "{%- for call in turn.tool_calls or [] -%}{{- '<tool_call>\n<function=' + call.function.name + '>\n' -}}"
    "{%- for name, value in call.function.arguments | items -%}"
    "{{- '<parameter=' + name + '>\n' ~ value ~ '\n</parameter>\n' -}}{%- endfor -%}"
    "{{- '</function>\n</tool_call>' -}}{%- endfor -%}"
)
_PARAMETER_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
# Thoughts of the turns after the last question alone, as Qwen 3.5 writes them.
_LATE_THOUGHTS = (
    "{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last -%}"
    "{%- set ns = namespace(asked=-1) -%}"
    "{%- for other in messages -%}{%- if other.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if loop.index0 > ns.asked -%}"
    "{{- '<think>\n' + (turn.reasoning_content or '') + '\n</think>\n\n' -}}{%- endif -%}"
)
_KEPT_THOUGHTS = (
    "{{- '<think>\n' + turn.reasoning_content + '\n</think>\n' if turn.reasoning_content else '<think></think>' -}}"
)
_DEEPSEEK_END = "<\uff5cend▁of▁sentence\uff5c>"
_DEEPSEEK = (
    "{{- bos_token -}}{%- for turn in messages -%}"
    "{%- if turn.role == 'user' -%}{{- '<\uff5cUser\uff5c>' + turn.content -}}"
    "{%- elif turn.role == 'assistant' and turn.content is none -%}"
    "{{- '<\uff5cAssistant\uff5c><\uff5ctool▁calls▁begin\uff5c>' -}}{%- for call in turn.tool_calls -%}"
    "{{- '<\uff5ctool▁call▁begin\uff5c>' + call.type + '<\uff5ctool▁sep\uff5c>' + call.function.name + '\n```json\n' + "
    "call.function.arguments + '\n```<\uff5ctool▁call▁end\uff5c>' -}}{%- endfor -%}"
    "{{- '<\uff5ctool▁calls▁end\uff5c><\uff5cend▁of▁sentence\uff5c>' -}}"
    "{%- elif turn.role == 'assistant' -%}"
    "{{- ('' if loop.index0 and loop.previtem.role == 'tool' else '<\uff5cAssistant\uff5c>') + "
    "turn.content.split('</think>')[-1] + '<\uff5cend▁of▁sentence\uff5c>' -}}"
    "{%- elif turn.role == 'tool' -%}"
    "{{- '<\uff5ctool▁outputs▁begin\uff5c><\uff5ctool▁output▁begin\uff5c>' + turn.content + "
    "'<\uff5ctool▁output▁end\uff5c><\uff5ctool▁outputs▁end\uff5c>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' -%}"
    "{{- '<\uff5cAssistant\uff5c>HEADER' -}}{%- endif -%}"
)
_DEEPSEEK_CALL = (
    "<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>function<\uff5ctool▁sep\uff5c>add\n"
    '```json\n{"a": 1}\n```<\uff5ctool▁call▁end\uff5c>'
    "<\uff5ctool▁calls▁end\uff5c><\uff5cend▁of▁sentence\uff5c>"
)

FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        template=chatml("You are a helpful assistant."),
        tokens=(),
        talk=("Yes.<|im_end|>\n", "No.<|im_end|>\n"),
        thoughtful=_folded("<|im_end|>\n"),
    ),
    "qwen2_5_math": Family(
        template=chatml(r"Please reason step by step, and put your final answer within \\boxed{}.", _HERMES),
        tokens=(),
        talk=("Yes.<|im_end|>\n", "No.<|im_end|>\n"),
        thoughtful=_folded("<|im_end|>\n"),
        tools=(_HERMES_CALL + "<|im_end|>\n", "Yes.<|im_end|>\n"),
    ),
    "lfm2": Family(
        template="{{- bos_token -}}" + chatml("", "{{- turn.tool_calls | tojson if turn.tool_calls -}}"),
        tokens=(),
        talk=("Yes.<|im_end|>\n", "No.<|im_end|>\n"),
        thoughtful=_folded("<|im_end|>\n"),
        tools=(
            '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]<|im_end|>\n',
            "Yes.<|im_end|>\n",
        ),
    ),
    "qwen3_5": Family(
        template=chatml("", _PARAMETERS, _LATE_THOUGHTS, header="<think>\n"),
        tokens=("<think>", "</think>"),
        talk=("\n</think>\n\nYes.<|im_end|>\n", "\n</think>\n\nNo.<|im_end|>\n"),
        thoughtful=("hm\n</think>\n\nYes.<|im_end|>\n", "ha\n</think>\n\nNo.<|im_end|>\n"),
        tools=(f"\n</think>\n\n{_PARAMETER_CALL}<|im_end|>\n", "\n</think>\n\nYes.<|im_end|>\n"),
    ),
    "nemotron_3": Family(
        template=chatml("", _PARAMETERS, _KEPT_THOUGHTS, header="<think>\n"),
        tokens=("<think>", "</think>"),
        talk=("<think></think>Yes.<|im_end|>\n", "<think></think>No.<|im_end|>\n"),
        thoughtful=("<think>\nhm\n</think>\nYes.<|im_end|>\n", "<think>\nha\n</think>\nNo.<|im_end|>\n"),
        tools=(f"<think></think>{_PARAMETER_CALL}<|im_end|>\n", "<think></think>Yes.<|im_end|>\n"),
    ),
    "phi_4": Family(
        template=(
            "{%- for turn in messages -%}{{- '<|im_start|>' + turn.role + '<|im_sep|>' + turn.content + '<|im_end|>' "
            "-}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}"
        ),
        tokens=("<|im_sep|>",),
        talk=("Yes.<|im_end|>", "No.<|im_end|>"),
        thoughtful=_folded("<|im_end|>"),
    ),
    "mistral_v3": Family(
        template=(
            "{{- bos_token -}}{%- for turn in messages -%}"
            "{%- if turn.role == 'user' -%}{{- '[INST] ' + turn.content + '[/INST]' -}}"
            "{%- elif turn.tool_calls -%}{{- '[TOOL_CALLS] ' + (turn.tool_calls | map(attribute='function') | list | "
            "tojson) + '</s>' -}}"
            "{%- elif turn.role == 'assistant' -%}{{- ' ' + turn.content | trim + '</s>' -}}"
            "{%- else -%}{{- '[TOOL_RESULTS] {\"content\": ' + turn.content + '}[/TOOL_RESULTS]' -}}{%- endif -%}"
            "{%- endfor -%}"
        ),
        tokens=("</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        talk=("Yes.</s>", "No.</s>"),
        thoughtful=_folded("</s>"),
        tools=('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>', "Yes.</s>"),
    ),
    "cohere_2": Family(
        template=(
            "{{- bos_token -}}{%- for turn in messages -%}{%- if turn.role == 'assistant' -%}"
            "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' + turn.content + "
            "'<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}{%- else -%}"
            "{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + turn.content + '<|END_OF_TURN_TOKEN|>' -}}{%- endif -%}"
            "{%- endfor -%}{%- if add_generation_prompt -%}"
            "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' -}}{%- endif -%}"
        ),
        tokens=("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "<|CHATBOT_TOKEN|>"),
        talk=("Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "No.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        thoughtful=_folded("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    ),
    "deepseek_v3": Family(
        template=_DEEPSEEK.replace("HEADER", ""),
        tokens=(_DEEPSEEK_END,),
        talk=("Yes." + _DEEPSEEK_END, "No." + _DEEPSEEK_END),
        thoughtful=_folded(_DEEPSEEK_END),
        tools=(_DEEPSEEK_CALL, "Yes." + _DEEPSEEK_END),
    ),
    "deepseek_r1_distill": Family(
        template=_DEEPSEEK.replace("HEADER", "<think>\n"),
        tokens=(_DEEPSEEK_END,),
        talk=("Yes." + _DEEPSEEK_END, "No." + _DEEPSEEK_END),
        thoughtful=_folded(_DEEPSEEK_END),
        tools=(_DEEPSEEK_CALL, "Yes." + _DEEPSEEK_END),
    ),
    "glm4_moe": Family(
        template=(
            "{{- '[gMASK]<sop>' -}}{%- set ns = namespace(asked=-1) -%}"
            "{%- for turn in messages -%}{%- if turn.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}"
            "{%- endfor -%}{%- for turn in messages -%}"
            "{%- if turn.role == 'user' -%}{{- '<|user|>\n' + turn.content -}}"
            "{%- elif turn.role == 'tool' -%}"
            "{{- '<|observation|>\n<tool_response>\n' + turn.content + '\n</tool_response>' -}}"
            "{%- else -%}{{- '<|assistant|>\n<think>' -}}"
            "{{- turn.reasoning_content if turn.reasoning_content and loop.index0 > ns.asked -}}{{- '</think>' -}}"
            "{{- '\n' + turn.content if turn.content -}}"
            "{%- for call in turn.tool_calls or [] -%}{{- '\n<tool_call>' + call.function.name + '\n' -}}"
            "{%- for name, value in call.function.arguments.items() -%}"
            "{{- '<arg_key>' + name + '</arg_key>\n<arg_value>' ~ value ~ '</arg_value>\n' -}}{%- endfor -%}"
            "{{- '</tool_call>' -}}{%- endfor -%}{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
        ),
        tokens=("<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        talk=("\n<think></think>\nYes.<|user|>", "\n<think></think>\nNo.<|user|>"),
        thoughtful=("\n<think>hm</think>\nYes.<|user|>", "\n<think>ha</think>\nNo.<|user|>"),
        tools=(
            "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
            "<|observation|>",
            "\n<think></think>\nYes.<|user|>",
        ),
    ),
    "gemma_4": Family(
        template=(
            "{{- bos_token -}}{%- for turn in messages -%}"
            "{%- if turn.role == 'tool' -%}{{- 'response:' + turn.name + '{' + turn.content + '}<tool_response|>' -}}"
            "{%- else -%}{%- set goes_on = loop.index0 and loop.previtem.role == 'tool' -%}"
            "{{- '' if goes_on else '<|turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' -}}"
            "{{- '<|channel>thought\n' + turn.reasoning_content + '\n<channel|>' if turn.reasoning_content -}}"
            "{{- turn.content | trim -}}"
            "{%- for call in turn.tool_calls or [] -%}{{- '<|tool_call>call:' + call.function.name + '{' -}}"
            "{%- for name, value in call.function.arguments | items -%}{{- name ~ ':' ~ value -}}{%- endfor -%}"
            "{{- '}<tool_call|>' -}}{%- endfor -%}"
            "{{- '<|tool_response>' if turn.tool_calls else '<turn|>\n' -}}{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{- '<|turn>model\n' -}}{%- endif -%}"
        ),
        tokens=("<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>"),
        talk=("Yes.<turn|>\n", "No.<turn|>\n"),
        thoughtful=("<|channel>thought\nhm\n<channel|>Yes.<turn|>\n", "<|channel>thought\nha\n<channel|>No.<turn|>\n"),
        tools=("<|tool_call>call:add{a:1}<tool_call|><|tool_response>", "Yes.<turn|>\n"),
    ),
}
