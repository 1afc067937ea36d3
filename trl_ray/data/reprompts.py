"""What the self-teacher is shown: the prompt again, with a sibling's success and with feedback (SDPO).

    rewards [G], feedback [G] --rules--> a demonstration, feedback, both or nothing for each completion
    prompt + solution + feedback --templates--> text --chat template, tokenizer--> the last max_reprompt_len tokens

A pure function over one group. The construction is that of https://arxiv.org/abs/2601.20802 as TRL's SDPO trainer makes
it; the teacher then scores the student's completion behind the new prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from trl_ray.algorithms.self_distillation_diagnostics import SelfDistillationGroup
from trl_ray.config.distillation import RepromptConfig
from trl_ray.data.chat_rendering import ChatFormat, ChatTokenizer, render_chat
from trl_ray.errors import DataError
from trl_ray.types import BoolArray, FloatArray, IntArray, Message, Prompt

FEEDBACK_COLUMN = "privileged_context"
"""The dataset column with feedback; what is no text, or blank, is none."""

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


class DecodingTokenizer(ChatTokenizer, Protocol):
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
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Rewards by function, for metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What one completion's teacher is shown."""

    demonstration: int | None = None
    """Which completion of the group, counted from 0."""
    uses_feedback: bool = False

    @property
    def any(self) -> bool:
        """Whether the teacher is shown more than the student: only then is there something to distil."""
        return self.demonstration is not None or self.uses_feedback


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherPrompt:
    """The context in which the teacher sees one completion."""

    token_ids: IntArray
    """[P] the student's own prompt where there are no hints; at most max_reprompt_len."""
    hints: Hints
    num_cut: int = 0
    """Tokens cut off its head."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RepromptedGroup:
    """The teacher's side of one group."""

    prompts: tuple[TeacherPrompt, ...]
    """[G]"""
    facts: SelfDistillationGroup
    """For metrics and diagnostics of the step."""

    @property
    def mask(self) -> BoolArray:
        """[G] True where a completion is distilled."""
        return np.array([prompt.hints.any for prompt in self.prompts], dtype=np.bool_)


def reprompt_group(
    prompt: Prompt,
    attempts: Sequence[Attempt],
    *,
    config: RepromptConfig,
    tokenizer: DecodingTokenizer,
    chat: ChatFormat,
) -> RepromptedGroup:
    """Make the teacher's prompts for one group.

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
    hints = [_hints(index, attempts, config) for index in range(len(attempts))]
    prompts = tuple(_teacher_prompt(prompt, attempts, i, hints[i], config, tokenizer, chat) for i in range(len(hints)))
    facts = SelfDistillationGroup(
        rewards=_numbers([attempt.reward for attempt in attempts]),
        has_success=any(_is_success(attempt, config) for attempt in attempts),
        num_demonstrated=sum(each.demonstration is not None for each in hints),
        num_with_feedback=sum(has_feedback(attempt.feedback) for attempt in attempts),
        num_feedback_used=sum(each.uses_feedback for each in hints),
        num_distilled=sum(each.any for each in hints),
        num_cut=sum(each.num_cut > 0 for each in prompts),
        parts={
            name: _numbers([attempt.parts.get(name) for attempt in attempts])
            for name in dict.fromkeys(name for attempt in attempts for name in attempt.parts)
        },
    )
    return RepromptedGroup(prompts=prompts, facts=facts)


def has_feedback(feedback: object) -> bool:
    """Whether there is a text that says anything."""
    return isinstance(feedback, str) and feedback.strip() != ""


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


def _hints(index: int, attempts: Sequence[Attempt], config: RepromptConfig) -> Hints:
    """The first success of the group, and feedback where it is wanted."""
    demonstration = None
    if config.use_successful_as_teacher:
        successes = (
            other
            for other, attempt in enumerate(attempts)
            if _is_success(attempt, config) and not (config.dont_reprompt_on_self_success and other == index)
        )
        demonstration = next(successes, None)
    wanted = config.include_environment_feedback and not (
        config.environment_feedback_only_without_solution and demonstration is not None
    )
    return Hints(demonstration=demonstration, uses_feedback=wanted and has_feedback(attempts[index].feedback))


def _is_success(attempt: Attempt, config: RepromptConfig) -> bool:
    return attempt.reward is not None and attempt.reward >= config.success_reward_threshold


def _teacher_prompt(
    prompt: Prompt,
    attempts: Sequence[Attempt],
    index: int,
    hints: Hints,
    config: RepromptConfig,
    tokenizer: DecodingTokenizer,
    chat: ChatFormat,
) -> TeacherPrompt:
    if hints.any:
        solution = feedback = ""
        if hints.demonstration is not None:
            solution = config.solution_template.format(
                successful_previous_attempt=_text(attempts[hints.demonstration], config, tokenizer)
            )
        if hints.uses_feedback:
            feedback = config.feedback_template.format(feedback_raw=attempts[index].feedback)
        token_ids = _tokens(prompt, solution, feedback, config, tokenizer, chat)
    else:
        token_ids = prompt.token_ids
    kept = token_ids[-config.max_reprompt_len :]
    return TeacherPrompt(token_ids=kept, hints=hints, num_cut=len(token_ids) - len(kept))


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
        return config.reprompt_template.format(prompt=text, solution=solution, feedback=feedback)

    if prompt.messages is None:
        assert prompt.text is not None, f"prompt {prompt.prompt_id} is neither a conversation nor a text"
        return np.asarray(tokenizer(rewritten(prompt.text))["input_ids"], dtype=np.int32)
    require_user_turn(prompt)
    message = {"role": "user", "content": rewritten(_content(prompt.messages[-1]))}
    rendered = render_chat(
        tokenizer,
        [*prompt.messages[:-1], message],
        chat,
        add_generation_prompt=True,
        where=f"the teacher's form of prompt {prompt.prompt_id}",
    )
    # A rendered template writes its special tokens itself.
    return np.asarray(tokenizer(rendered.text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def _content(message: Message) -> str:
    """A message in words; images and the like have none."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")


def _numbers(values: Sequence[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float32)
