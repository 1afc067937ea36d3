"""What the self-teacher is shown: the prompt again, with a sibling's success and with feedback (SDPO).

    rewards [G], feedback [G] --rules--> a demonstration, feedback, both or nothing for each completion
    prompt + solution + feedback --templates--> text --chat template, tokenizer--> the last max_reprompt_len tokens

A pure function over one group. The construction is that of https://arxiv.org/abs/2601.20802 as TRL's SDPO trainer makes
it; the teacher then scores the student's completion behind the new prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np

from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.config.losses.literal_templates import fill
from trl_ray.data.chat.chat_rendering import ChatFormat
from trl_ray.data.chat.faithful_rendering import render_faithfully
from trl_ray.data.chat.row_format import row_format
from trl_ray.data.chat.turn_spans import TurnTokenizer
from trl_ray.data.prompts.prompt_tokens import encode_prompts
from trl_ray.errors import DataError
from trl_ray.types import IntArray, Message, Prompt, Reward, TeacherContext

FEEDBACK_COLUMN = "privileged_context"
"""The dataset column with feedback; what is no text, or blank, is none."""
FEEDBACK_EXTRA = "feedback"
"""The extra column under which reward functions (`log_extra`) and environments say what was wrong."""

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


class DecodingTokenizer(TurnTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that reprompts need."""

    @property
    def pad_token_id(self) -> Any:
        """Its id, or None."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """The text of some tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attempt:
    """One completion of a group, as far as reprompts look at it."""

    token_ids: IntArray
    """[L]"""
    reward: float | None
    """In total, weighted; None is never a success."""
    feedback: Any = None
    """What the row, a reward function or an environment has to say of it; what is no text, or blank, is none."""


def reprompt_group(
    prompt: Prompt,
    attempts: Sequence[Attempt],
    *,
    config: RepromptConfig,
    tokenizer: DecodingTokenizer,
    chat: ChatFormat,
) -> tuple[TeacherContext, ...]:
    """Make the contexts [G] in which the teacher sees one group.

    A completion for which there is nothing to show is not distilled and keeps the student's own prompt; so much of
    each prompt as `max_reprompt_len` allows is kept.

    Args:
        prompt: of the group. Of a conversation, all messages but the last are kept, and the last one's text becomes the
            ``prompt`` of the template; of a plain text it is all of it.
        attempts: [G] the completions in their order.
        config: the rules and templates.
        tokenizer: of the policy.
        chat: how conversations are rendered, as for the student's prompts.

    Raises:
        DataError: a conversation does not end with the user's turn.
        ModelError: the chat template refuses the new conversation.
    """
    return tuple(_context(prompt, attempts, index, config, tokenizer, chat) for index in range(len(attempts)))


def has_feedback(feedback: object) -> TypeGuard[str]:
    """Whether there is a text that says anything."""
    return isinstance(feedback, str) and feedback.strip() != ""


def gather_feedback(prompt: Prompt, reward: Reward) -> str | None:
    """What the row and the reward functions have to say of one completion, a line each; None where nobody says any."""
    said = (prompt.columns.get(FEEDBACK_COLUMN), reward.extra.get(FEEDBACK_EXTRA))
    return "\n".join(text for text in said if has_feedback(text)) or None


def require_user_turn(prompt: Prompt) -> None:
    """Check that hints can be put into a prompt: a conversation's last turn must be the user's.

    Raises:
        DataError: it is another's.
    """
    role = None if prompt.messages is None else prompt.messages[-1]["role"]
    if role not in {None, "user"}:
        raise DataError(
            f"prompts of self-distillation must end with the user's turn, into which hints are written, but prompt "
            f"{prompt.prompt_id} ends with one of role {role!r}. Remove what follows the user's last message."
        )


def _demonstration(index: int, attempts: Sequence[Attempt], config: RepromptConfig) -> int | None:
    """The first success of the group that this completion's teacher may be shown."""
    if not config.use_successful_as_teacher:
        return None
    successes = (
        other
        for other, attempt in enumerate(attempts)
        if _is_success(attempt, config) and not (config.dont_reprompt_on_self_success and other == index)
    )
    return next(successes, None)


def _is_success(attempt: Attempt, config: RepromptConfig) -> bool:
    return attempt.reward is not None and attempt.reward >= config.success_reward_threshold


def _context(
    prompt: Prompt,
    attempts: Sequence[Attempt],
    index: int,
    config: RepromptConfig,
    tokenizer: DecodingTokenizer,
    chat: ChatFormat,
) -> TeacherContext:
    said = attempts[index].feedback
    demonstration = _demonstration(index, attempts, config)
    wanted = config.include_environment_feedback and not (
        config.environment_feedback_only_without_solution and demonstration is not None
    )
    uses_feedback = wanted and has_feedback(said)
    solution = feedback = ""
    if demonstration is not None:
        text = _text(attempts[demonstration], config, tokenizer)
        solution = fill(config.solution_template, {"successful_previous_attempt": text})
    if uses_feedback:
        feedback = fill(config.feedback_template, {"feedback_raw": said})
    # A teacher that is shown no more than the student has nothing to teach.
    is_distilled = demonstration is not None or uses_feedback
    token_ids = _tokens(prompt, solution, feedback, config, tokenizer, chat) if is_distilled else prompt.token_ids
    kept = token_ids[-config.max_reprompt_len :]
    return TeacherContext(
        prompt_ids=kept,
        is_distilled=is_distilled,
        demonstration=demonstration,
        has_feedback=has_feedback(said),
        uses_feedback=uses_feedback,
        num_cut=len(token_ids) - len(kept),
    )


def _text(attempt: Attempt, config: RepromptConfig, tokenizer: DecodingTokenizer) -> str:
    """A demonstration in words."""
    ids = [token for token in attempt.token_ids.tolist() if token != tokenizer.pad_token_id]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return _THINKING.sub("", text).strip() if config.remove_thinking_from_demonstration else text


def _tokens(
    prompt: Prompt,
    solution: str,
    feedback: str,
    config: RepromptConfig,
    tokenizer: DecodingTokenizer,
    chat: ChatFormat,
) -> IntArray:
    """The whole new prompt."""

    def rewritten(text: str) -> str:
        return fill(config.reprompt_template, {"prompt": text, "solution": solution, "feedback": feedback})

    if prompt.messages is None:
        assert prompt.text is not None, f"prompt {prompt.prompt_id} is neither a conversation nor a text"
        return encode_prompts(tokenizer, [rewritten(prompt.text)])[0]
    require_user_turn(prompt)
    message = {"role": "user", "content": rewritten(_content(prompt.messages[-1]))}
    where = f"the teacher's form of prompt {prompt.prompt_id}"
    rendered = render_faithfully(
        tokenizer,
        [*prompt.messages[:-1], message],
        row_format(chat, prompt.columns, where=where),
        add_generation_prompt=True,
        where=where,
    ).rendered
    # A rendered template writes its special tokens itself.
    return np.asarray(tokenizer(rendered.text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def _content(message: Message) -> str:
    """A message in words; images and the like have none."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")
