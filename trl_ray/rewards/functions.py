"""Reward functions that ship with the package, in TRL's signature.

    f(prompts, completions, completion_ids, **columns) -> [G] float | None

`completions` are strings, or one-message conversations when the prompts are conversations, without special tokens. A
function may also name `trainer_state` (global_step, max_steps, epoch), and `raw_prompts` and `raw_completions`: [G]
texts as the model reads and writes them, special tokens and all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_ray.rewards.answer_guard import guard_modules, guard_sympy

RewardFunction = Callable[..., Any]
"""Returns a list of G numbers or None, or an awaitable of one."""

_BARE_INTEGER = re.compile(r"[+-]?[0-9]{1,50}")
_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])"
_INTEGER = re.compile(rf"-?(?:{_GROUPED}|[0-9]{{1,50}})")
_ANSWER = re.compile(rf"[+-]?(?:{_GROUPED}|[0-9]{{1,50}})(?:\.0+)?")
_GSM8K = "####"
"""Stands before the final answer in the solutions of GSM8K."""
_THINK = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, whether it is a string or a conversation of one or more messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def whole_number(value: Any) -> int | None:
    """The whole number that an answer is: a number, text of one, a solution that ends with ``#### 72``; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return int(value) if value == value // 1 else None  # infinity is no whole number either: its remainder is NaN
    if not isinstance(value, str):
        return None
    text = value.rpartition(_GSM8K)[2].strip()
    return int(text.partition(".")[0].replace(",", "")) if _ANSWER.fullmatch(text) else None


def _wanted(value: Any) -> int:
    number = whole_number(value)
    if number is None:
        raise ValueError(f"answer must be a whole number, text of one, or end with '#### 72', got {value!r}")
    return number


def answer_problem(columns: Mapping[str, Any]) -> str | None:
    """What is wrong with the column `answer` of a row, of which a number is wanted; None is no answer, and allowed."""
    value = columns.get("answer")
    if value is None or whole_number(value) is not None:
        return None
    return (
        f"field 'answer' must be a whole number, text of one, or end with '#### 72', got {str(value)[:80]!r}. Mend the "
        "row, or take a reward function that can tell (exact_answer compares text)."
    )


def task_problem(columns: Mapping[str, Any]) -> str | None:
    """What is wrong with the columns of a generated task's row, whose own score is wanted."""
    kinds: dict[str, type] = {"task": str, "metadata": Mapping}
    wrong = next((column for column, kind in kinds.items() if not isinstance(columns.get(column), kind)), None)
    if wrong is None:
        return None
    return (
        f"field {wrong!r} must be that of a generated task, got {str(columns.get(wrong))[:80]!r}. Take rows of "
        "reasoning_gym/<task>, or another reward function."
    )


def exact_answer(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 where the completion is exactly the column `answer`, white space around it aside; None without an answer."""
    return [
        None if wanted is None else float(text_of(completion).strip() == str(wanted).strip())
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def arithmetic(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """Half for nothing but an integer, the other half when it is the one in the column `answer`."""
    texts = [text_of(completion).strip() for completion in completions]
    return [_arithmetic(text, wanted) for text, wanted in zip(texts, answer, strict=True)]


def _arithmetic(text: str, wanted: Any) -> float | None:
    if wanted is None:
        return None
    if not _BARE_INTEGER.fullmatch(text):
        return 0.0
    return 1.0 if int(text) == _wanted(wanted) else 0.5


def last_number(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 where the last integer of the completion is the one in the column `answer`, whatever stands around it.

    Thousands may be set apart by commas; an answer may be a solution that ends with ``#### 72``, as those of GSM8K.
    """
    found = [_INTEGER.findall(text_of(completion)) for completion in completions]
    return [
        None if wanted is None else float(bool(numbers) and int(numbers[-1].replace(",", "")) == _wanted(wanted))
        for numbers, wanted in zip(found, answer, strict=True)
    ]


def think_format(completions: list[Any], raw_prompts: list[str] | None = None, **columns: Any) -> list[float]:
    """1 where the completion opens with exactly one ``<think>...</think>``, as TRL's `think_format_reward`.

    Where the chat template opens the thought, the completion goes on from there.
    """
    opened = [prompt.rstrip().endswith("<think>") for prompt in raw_prompts or [""] * len(completions)]
    texts = [f"{'<think>' * begun}{text_of(completion)}" for completion, begun in zip(completions, opened, strict=True)]
    return [1.0 if _THINK.match(text) else 0.0 for text in texts]


def soft_overlong(*, max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """The length penalty of DAPO (arXiv 2503.14476, equation 13) for L tokens, maximum M and cache C.

    0 while ``L <= M - C``, then falling linearly ``(M - C - L) / C`` to -1 at M, -1 beyond.
    """
    if not 0 < soft_punish_cache <= max_completion_len:
        raise ValueError(
            "soft_punish_cache must be above 0 and at most max_completion_len, "
            f"got {soft_punish_cache} and {max_completion_len}"
        )

    def soft_overlong(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        start = max_completion_len - soft_punish_cache
        return [max(-1.0, min(0.0, (start - len(ids)) / soft_punish_cache)) for ids in completion_ids]

    return soft_overlong


def reasoning_gym(
    prompts: list[Any],
    completions: list[Any],
    task: list[str],
    answer: list[Any],
    metadata: list[Any],
    **columns: Any,
) -> list[float]:
    """The task's own score in [0, 1], of the text inside the last ``<answer>`` tag or else of the whole completion.

    An answer at which the scorer raises is wrong (0), unless the row's own answer makes it raise too.
    """
    scores = []
    for i, completion in enumerate(completions):
        prompt = prompts[i]
        entry = {
            "question": prompt if isinstance(prompt, str) else prompt[-1]["content"],
            "answer": answer[i],
            "metadata": metadata[i],
        }
        scores.append(_score(task[i], answer_of(completion), entry))
    return scores


def answer_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """What `reasoning_gym` scores of a completion."""
    text = text_of(completion)
    tagged = _ANSWER_TAG.findall(text)
    return str(tagged[-1] if tagged else text).strip()


def load_scorer(columns: Mapping[str, Any]) -> None:
    """Load what `reasoning_gym` needs for a row, so that it is there when the row's completions come."""
    _scorer(columns["task"])


def _score(task: str, text: str, entry: Mapping[str, Any]) -> float:
    score = _scorer(task)
    try:
        return float(score(text, entry))
    except Exception:  # what the model wrote may make a scorer raise anything
        score(str(entry["answer"]), entry)  # raises where the row is to blame
        return 0.0


@functools.cache
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    import reasoning_gym as package

    # Several scorers would run what the model wrote as Python.
    guard_modules(package.__name__)
    guard_sympy()
    score: Callable[[str, Mapping[str, Any]], float] = package.create_dataset(task, size=1, seed=0).score_answer
    return score
