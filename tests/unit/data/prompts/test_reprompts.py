"""Each rule of the self-teacher's prompt, on a group of three completions with a byte-level tokenizer."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.data.chat.chat_rendering import ChatFormat
from trl_ray.data.prompts.reprompts import Attempt, gather_feedback, reprompt_group, require_user_turn
from trl_ray.errors import ConfigError, DataError
from trl_ray.types import Message, Prompt, Reward, TeacherContext

Contexts = tuple[TeacherContext, ...]

TOKENIZER = build_tokenizer()
CHAT = ChatFormat(template=CHAT_TEMPLATE)
PAD = 256 + SPECIAL_TOKENS.index("<|pad|>")
END = 256 + SPECIAL_TOKENS.index("<|im_end|>")
# Short templates, so that a whole prompt can be read.
SHORT = {"reprompt_template": "{prompt}{solution}{feedback}!", "solution_template": "+{successful_previous_attempt}"}
SHORT["feedback_template"] = "-{feedback_raw}"


def ids(text: str) -> np.ndarray:
    return np.array(TOKENIZER(text)["input_ids"], np.int32)


def reprompt(
    rewards: list[float | None],
    *,
    messages: tuple[Message, ...] | None = None,
    texts: tuple[str, ...] = ("a", "b", "c"),
    feedback: tuple[Any, ...] = (None, None, None),
    **options: Any,
) -> Contexts:
    """Prompt "q" and completions "a", "b" and "c"."""
    prompt = Prompt(prompt_id="0:0", token_ids=ids("q"), messages=messages, text=None if messages else "q")
    attempts = [
        Attempt(token_ids=ids(text), reward=reward, feedback=said)
        for text, reward, said in zip(texts, rewards, feedback, strict=True)
    ]
    config = RepromptConfig(**SHORT | options)
    return reprompt_group(prompt, attempts, config=config, tokenizer=TOKENIZER, chat=CHAT)


def shown(group: Contexts) -> list[str]:
    return [TOKENIZER.decode(context.prompt_ids) for context in group]


def demonstrations(group: Contexts) -> list[int | None]:
    return [context.demonstration for context in group]


def mask(group: Contexts) -> list[bool]:
    return [context.is_distilled for context in group]


def test_the_first_success_of_a_sibling_is_shown() -> None:
    group = reprompt([0, 1, 1])
    assert demonstrations(group) == [1, 2, 1]
    assert shown(group) == ["q+b!", "q+c!", "q+b!"]
    assert mask(group) == [True, True, True]


def test_the_only_success_has_nothing_to_be_shown_and_keeps_its_prompt() -> None:
    group = reprompt([0, 1, 0])
    assert demonstrations(group) == [1, None, 1]
    assert shown(group) == ["q+b!", "q", "q+b!"]
    assert mask(group) == [True, False, True]


def test_a_success_may_be_its_own_demonstration_if_that_is_allowed() -> None:
    assert demonstrations(reprompt([0, 1, 1], dont_reprompt_on_self_success=False)) == [1, 1, 1]


def test_a_success_is_a_reward_at_the_threshold_or_above() -> None:
    assert demonstrations(reprompt([0.5, 0.49, None], success_reward_threshold=0.5)) == [None, 0, 0]
    assert demonstrations(reprompt([-1, -2, None], success_reward_threshold=-1)) == [None, 0, 0]


def test_successes_are_not_shown_if_they_are_not_wanted() -> None:
    group = reprompt([1, 1, 1], use_successful_as_teacher=False)
    assert demonstrations(group) == [None, None, None]
    assert mask(group) == [False, False, False]


def test_feedback_is_shown_if_it_is_wanted_and_says_anything() -> None:
    feedback = ("late", " \n", 7)
    assert shown(reprompt([0, 0, 0], feedback=feedback)) == ["q", "q", "q"]
    group = reprompt([0, 0, 0], feedback=feedback, include_environment_feedback=True)
    assert shown(group) == ["q-late!", "q", "q"]
    assert mask(group) == [True, False, False]


def test_feedback_joins_a_demonstration_or_stands_back_behind_it() -> None:
    both: dict[str, Any] = {"feedback": ("late", "good", "odd"), "include_environment_feedback": True}
    assert shown(reprompt([0, 1, 0], **both)) == ["q+b-late!", "q-good!", "q+b-odd!"]
    alone = reprompt([0, 1, 0], **both, environment_feedback_only_without_solution=True)
    assert shown(alone) == ["q+b!", "q-good!", "q+b!"]


def test_braces_in_prompt_demonstration_and_feedback_are_left_alone() -> None:
    group = reprompt(
        [0, 1, 0], texts=("", "{prompt} {0} {{", ""), feedback=("{x}", None, None), include_environment_feedback=True
    )
    assert shown(group)[0] == "q+{prompt} {0} {{-{x}!"


def test_special_tokens_and_padding_are_no_part_of_a_demonstration() -> None:
    prompt = Prompt(prompt_id="0:0", token_ids=ids("q"), text="q")
    attempts = [
        Attempt(token_ids=ids("a"), reward=0),
        Attempt(token_ids=np.array([*ids("b"), PAD, *ids("c"), END, PAD], np.int32), reward=1),
    ]
    group = reprompt_group(prompt, attempts, config=RepromptConfig(**SHORT), tokenizer=TOKENIZER, chat=CHAT)
    assert shown(group)[0] == "q+bc!"


class Letters:
    """A tokenizer of one letter per token, whose padding is a letter like any other."""

    chat_template = None
    special_tokens_map: ClassVar[dict[str, str]] = {}
    pad_token_id = ord("_")

    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in each] for each in text]}

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(token) for token in token_ids)


def test_padding_is_left_out_even_if_the_tokenizer_would_write_it() -> None:
    prompt = Prompt(prompt_id="0:0", token_ids=np.array([ord("q")], np.int32), text="q")
    attempts = [
        Attempt(token_ids=np.array([ord(letter) for letter in text], np.int32), reward=reward)
        for text, reward in (("a", 0.0), ("b_c_", 1.0))
    ]
    group = reprompt_group(prompt, attempts, config=RepromptConfig(**SHORT), tokenizer=Letters(), chat=CHAT)
    assert Letters().decode(group[0].prompt_ids.tolist()) == "q+bc!"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("<think>x\ny</think> b ", "b"),
        ("<think>x</think>b<think>z</think>", "b"),
        ("<think>x<think>y</think>b</think>", "b</think>"),
        ("<think>never closed b", "<think>never closed b"),
        (" b ", "b"),
    ],
)
def test_thinking_is_removed_where_it_is_closed(text: str, without: str) -> None:
    texts = ("a", text, "c")
    assert shown(reprompt([0, 1, 0], texts=texts, remove_thinking_from_demonstration=True))[0] == f"q+{without}!"
    assert shown(reprompt([0, 1, 0], texts=texts))[0] == f"q+{text}!"


def test_of_a_conversation_only_the_last_message_changes() -> None:
    messages = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "t"},
    )
    text = shown(reprompt([0, 1, 0], messages=messages))[0]
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"
        "<|im_start|>user\nt+b!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_of_content_in_parts_the_texts_are_joined_by_a_space() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
    text = shown(reprompt([0, 1, 0], messages=({"role": "user", "content": parts},)))[0]
    assert text == "<|im_start|>user\none two+b!<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_that_does_not_end_with_the_user_is_refused_when_hints_are_to_be_written() -> None:
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "I"})
    with pytest.raises(DataError, match="prompt 0:0 ends with one of role 'assistant'"):
        reprompt([0, 1, 0], messages=messages)
    assert shown(reprompt([0, 0, 0], messages=messages)) == ["q", "q", "q"]
    with pytest.raises(DataError, match="prompt 1:7"):
        require_user_turn(Prompt(prompt_id="1:7", token_ids=ids("q"), messages=messages))
    require_user_turn(Prompt(prompt_id="1:7", token_ids=ids("q"), text="q"))


def test_the_last_tokens_of_a_prompt_are_kept() -> None:
    group = reprompt([0, 1, 0], texts=("a", "bcd", "e"), max_reprompt_len=4)
    assert shown(group) == ["bcd!", "q", "bcd!"]
    assert [context.num_cut for context in group] == [2, 0, 2]


def test_contexts_say_what_is_in_them() -> None:
    group = reprompt([0, 1, None], feedback=("late", "", "odd"), include_environment_feedback=True, max_reprompt_len=6)
    assert demonstrations(group) == [1, None, 1]
    assert [context.has_feedback for context in group] == [True, False, True]
    assert [context.uses_feedback for context in group] == [True, False, True]
    assert [context.num_cut > 0 for context in group] == [True, False, True]
    unused = reprompt([0, 0, 0], feedback=("late", None, None))
    assert [context.has_feedback for context in unused] == [True, False, False]
    assert not any(context.uses_feedback for context in unused)


def test_feedback_is_what_the_row_says_and_then_what_was_logged() -> None:
    def gathered(row: Any, logged: Any) -> str | None:
        prompt = Prompt(prompt_id="0:0", token_ids=ids("q"), columns={"privileged_context": row, "feedback": "no"})
        return gather_feedback(prompt, Reward(total=0.0, parts={}, extra={"feedback": logged}))

    assert gathered(" late", "odd") == " late\nodd"
    assert (gathered("late", "  "), gathered(3, "odd"), gathered(None, ["odd"])) == ("late", "odd", None)
    plain = Prompt(prompt_id="0:0", token_ids=ids("q"))
    assert gather_feedback(plain, Reward(total=0.0, parts={})) is None


def test_a_template_with_unknown_fields_is_refused() -> None:
    for template in ("{prompt}{answer}", "{prompt.x}", "{", "{0}"):
        with pytest.raises(ConfigError, match="reprompt_template must have no other fields"):
            RepromptConfig(reprompt_template=template)
