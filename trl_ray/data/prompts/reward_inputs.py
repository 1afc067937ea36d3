"""What a reward model reads of a prompt and a completion: text through its own tokenizer and chat template.

    Prompt + Completion --conversation: chat template--┐
                        --text: joined, ended----------┴─► token ids [T], the last max_length of them ─► RatedText
                        --in steps: each ended by the separator-─► positions [S] of the separators' last tokens

The policy's token ids are of no use here: another model has another vocabulary and another template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_ray.config.reward_model_options import RewardModelKind, StepFormat
from trl_ray.data.chat.chat_rendering import ChatFormat, own_template
from trl_ray.data.chat.faithful_rendering import FaithfulChat, Finding, render_faithfully
from trl_ray.data.chat.row_format import row_format
from trl_ray.data.examples.step_parser import split_steps
from trl_ray.data.examples.steps import StepRules, step_tokens
from trl_ray.data.examples.tokenisation import ExampleTokenizer, Text, encode
from trl_ray.errors import ModelError
from trl_ray.types import Completion, FinishReason, IntArray, Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingRules:
    """How a reward model wants its texts."""

    kind: RewardModelKind
    """SEQUENCE or STEPS."""
    append_eos: bool = True
    step_format: StepFormat = StepFormat.AUTO
    step_separator: str = "\n"
    max_length: int | None = None
    """Tokens; None keeps all."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RatedText:
    """One completion with its prompt, ready to be rated."""

    token_ids: IntArray
    """[T]"""
    positions: IntArray
    """[S] of the tokens that steps are rated at, counting up; empty where the whole is rated."""
    num_cut: int
    """Tokens that were cut off the beginning."""


class RewardReader:
    """Turns prompts and completions into what one reward model reads."""

    def __init__(self, tokenizer: ExampleTokenizer, rules: ReadingRules) -> None:
        """Ask the tokenizer for the tokens that every solution needs.

        Raises:
            ConfigError: it makes no token of the step separator.
        """
        self._tokenizer, self._rules = tokenizer, rules
        separated = StepRules(step_separator=rules.step_separator)
        self._steps = step_tokens(tokenizer, separated) if rules.kind is RewardModelKind.STEPS else None

    def check(self, prompt: Prompt) -> None:
        """See that prompts like this one can be read at all.

        Raises:
            ModelError: it is a conversation and the tokenizer has no chat template, or one that refuses it.
        """
        if prompt.messages is None:
            return
        if not self._tokenizer.chat_template:
            raise ModelError(
                "its tokenizer must have a chat template because the prompts are conversations, and it has none. Save "
                "the tokenizer with one, or make the prompt column plain text."
            )
        self._render(prompt, (*prompt.messages, {"role": "assistant", "content": "1"}))

    def findings(self, prompt: Prompt) -> tuple[Finding, ...]:
        """What its chat template does not write of a prompt as the row has it."""
        if prompt.messages is None:
            return ()
        return self._faithful(prompt, (*prompt.messages, {"role": "assistant", "content": "1"})).findings

    def read(self, prompt: Prompt, completion: Completion) -> RatedText:
        """What the model reads of one completion.

        Raises:
            ModelError: the chat template refuses the conversation.
        """
        if self._rules.kind is RewardModelKind.STEPS:
            ids, positions = self._in_steps(prompt, completion)
        else:
            ids, positions = self._whole(prompt, completion), np.empty(0, np.int32)
        kept = len(ids) if self._rules.max_length is None else min(len(ids), self._rules.max_length)
        cut = len(ids) - kept
        return RatedText(token_ids=ids[cut:], positions=positions[positions >= cut] - cut, num_cut=cut)

    def _whole(self, prompt: Prompt, completion: Completion) -> IntArray:
        if prompt.messages is not None:
            return self._encode(self._render(prompt, _answered(prompt.messages, completion.text)))
        # With the special tokens that the tokenizer adds, none of them twice, as reward models are trained on texts.
        ids = encode(self._tokenizer, [Text(text=f"{prompt.text}{completion.text}")])[0].token_ids
        end = self._tokenizer.eos_token_id
        finished = completion.finish_reason is FinishReason.STOP
        if self._rules.append_eos and finished and end is not None and not (len(ids) and ids[-1] == end):
            ids = np.append(ids, np.int32(end))
        return ids

    def _in_steps(self, prompt: Prompt, completion: Completion) -> tuple[IntArray, IntArray]:
        """Prompt, then each step followed by the separator, each encoded by itself as in training."""
        assert self._steps is not None, "steps are read for process reward models only"
        pieces = [self._before_steps(prompt, self._steps.start)]
        positions, length = [], len(pieces[0])
        for step in split_steps(completion.text, self._rules.step_format):
            piece = np.append(self._encode(step), self._steps.separator).astype(np.int32)
            pieces.append(piece)
            length += len(piece)
            positions.append(length - 1)
        return np.concatenate(pieces), np.asarray(positions, np.int32)

    def _before_steps(self, prompt: Prompt, start: int | None) -> IntArray:
        if prompt.messages is not None:
            return self._encode(self._render(prompt, prompt.messages, answers=True))
        ids = self._encode(str(prompt.text))
        return ids if start is None or ids[:1].tolist() == [start] else np.append(np.int32(start), ids)

    def _render(self, prompt: Prompt, messages: Sequence[Message], *, answers: bool = False) -> str:
        return self._faithful(prompt, messages, answers=answers).rendered.text

    def _faithful(self, prompt: Prompt, messages: Sequence[Message], *, answers: bool = False) -> FaithfulChat:
        """As reward models are trained on conversations: thoughts that their template has no place for are kept."""
        unfinished = messages[-1]["role"] == "assistant"
        return render_faithfully(
            self._tokenizer,
            messages,
            self._format(prompt),
            add_generation_prompt=answers and not unfinished,
            continue_final_message=answers and unfinished,
            where="a conversation to be rated",
        )

    def _format(self, prompt: Prompt) -> ChatFormat:
        chat = ChatFormat(template=own_template(self._tokenizer), template_kwargs=self._rules.template_kwargs)
        return row_format(chat, prompt.columns, where=f"prompt {prompt.prompt_id}")

    def _encode(self, text: str) -> IntArray:
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _answered(messages: Sequence[Message], answer: str) -> tuple[Message, ...]:
    """The conversation with the answer, which goes on where the assistant's last turn stopped."""
    last = messages[-1]
    if last["role"] != "assistant":
        return (*messages, {"role": "assistant", "content": answer})
    return (*messages[:-1], {**last, "content": f"{last.get('content') or ''}{answer}"})
