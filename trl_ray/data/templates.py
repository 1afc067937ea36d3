"""Turns a conversation into the text a model continues, and says clearly when it cannot.

messages -- with_system_prompt --> messages -- render --> text -- tokenizer --> token ids [P]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from trl_ray.errors import ModelError
from trl_ray.types import Message


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any

    def __call__(self, text: Any, *, add_special_tokens: bool) -> Any:
        """Encode one text or a list of texts; the result holds ``input_ids``."""
        ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render a conversation with the chat template."""
        ...


def require_chat_template(tokenizer: Tokenizer, *, where: str) -> None:
    """Check that conversational prompts can be rendered at all.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer must have a chat template because the prompts of {where} are conversations, and it has "
            "none. Set chat_template to the path of a jinja file, take an instruction-tuned model, or make the "
            "prompt column plain text."
        )


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """Put `system_prompt` first unless the conversation brings a system or developer message of its own."""
    if system_prompt is None or messages[0]["role"] in {"system", "developer"}:
        return tuple(messages)
    return ({"role": "system", "content": system_prompt}, *messages)


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, template_kwargs: Mapping[str, Any], where: str) -> str:
    """The conversation as text, ready for the assistant to go on.

    A conversation that ends with the assistant is continued where it stops; any other gets the header of a new
    assistant turn, TRL's rule.

    Raises:
        ModelError: the template refuses the conversation; names the row given in `where`.
    """
    unfinished = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not unfinished,
            continue_final_message=unfinished,
            **template_kwargs,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(
            f"The chat template must accept every prompt, but it refused {where} with "
            f"{type(error).__name__}: {error}. Change the row's messages, chat_template_kwargs "
            f"({dict(template_kwargs)!r}), system_prompt, or set another chat_template."
        ) from error
    return str(text)
