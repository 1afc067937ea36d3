"""Reward functions for mathematics, in TRL's signature and with its scores, by the package math-verify.

solution --parse--> expressions of the solution --.
completion --parse (LaTeX, \\boxed first)---------+--verify--> 1.0 | 0.0;  None where the solution says nothing
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from trl_ray.rewards.functions import RewardFunction, text_of

LogExtra = Callable[[str, list[Any]], None]

NEEDS = "math-verify"
"""The package that compares expressions; `pip install "trl-ray[math]"` brings it."""
_PARSING_S, _VERIFYING_S = 10, 5
_UNPARSEABLE, _SKIPPED, _UNFINISHED = "[unparseable]", "[skipped]", "[incomplete reasoning]"
_DELIMITERS = ("</think>",)
_USUAL = (
    r"\boxed{\frac{1}{2}}",
    r"$x^2 - \sqrt{3}$",
    r"\boxed{(1, 2]}",
    r"\boxed{\{1, 2\}}",
    r"$\pi = 3.14\text{ cm}$",
    r"\boxed{10\%}",
)
_COSTLY = re.compile(
    r"[0-9]{12}|!|\\(?:sum|prod|o?i+nt|lim|[dt]?binom|choose|det|begin|mod|gcd|operatorname)"
    r"|\^\s*\{[^{}]*[\\^{]|\^\s*(?:\{[^{}]{4,}|\{?\s*-?[0-9]{3,}|[^{}\s]\s*\^)"
)
"""What takes long to compute: sums and their kin, factorials, large numbers, high and stacked powers."""
_MOST_CHARACTERS, _MOST_POWERS = 20_000, 40


def accuracy_reward(
    completions: list[Any], solution: list[str], log_extra: LogExtra | None = None, **columns: Any
) -> list[float | None]:
    """1 where the completion's answer equals the column `solution` as mathematics; None where that cannot be parsed.

    The answer must be LaTeX, ``\\boxed{...}`` before anything else. As TRL's `accuracy_reward`.
    """
    return _accuracy([text_of(completion) for completion in completions], solution, log_extra)


def reasoning_accuracy_reward(
    completions: list[Any],
    solution: list[str],
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: LogExtra | None = None,
    **columns: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the last end of a thought (``</think>``); 0 where the thought does not end.

    The first of the delimiters that occurs is the one that counts. As TRL's `reasoning_accuracy_reward`.
    """
    delimiters = _DELIMITERS if reasoning_delimiters is None else reasoning_delimiters
    answers = [_after_thought(text_of(completion), delimiters) for completion in completions]
    return _accuracy(answers, solution, log_extra)


def cosine_scaled_reward(
    *,
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> RewardFunction:
    """`accuracy_reward` scaled along half a cosine by the number of tokens L (arXiv 2502.03373, appendix C.1).

    ``low + (high - low) (1 + cos(pi min(L / max_len, 1))) / 2``. Correct: from `max_value_correct` at L = 0 down to
    `min_value_correct`; wrong: from `min_value_wrong` up to `max_value_wrong`. As TRL's `get_cosine_scaled_reward`.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1 token, got {max_len}")
    from_to = {True: (max_value_correct, min_value_correct), False: (min_value_wrong, max_value_wrong)}

    def cosine_scaled_reward(
        completions: list[Any], solution: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        scaled: list[float | None] = []
        for score, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            if score is None:
                scaled.append(None)
                continue
            start, end = from_to[score > 0]
            scaled.append(end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(len(ids) / max_len, 1.0))))
        return scaled

    return cosine_scaled_reward


def is_plain(text: str) -> bool:
    """Whether nothing in it takes long to compute. It is parsed as LaTeX, of which nothing is run as Python."""
    few = len(text) <= _MOST_CHARACTERS and text.count("^") <= _MOST_POWERS
    return few and _COSTLY.search(text) is None


def warm_up() -> None:
    """Parse what answers usually are: the parser's tables take a second at the first, and are kept.

    Processes that are forked afterwards have them.
    """
    for text in _USUAL:
        _compare(text, text)


def _after_thought(text: str, delimiters: Sequence[str]) -> str | None:
    delimiter = next((each for each in delimiters if each in text), None)
    return None if delimiter is None else text.rpartition(delimiter)[2]


def _accuracy(answers: Sequence[str | None], solution: Sequence[str], log_extra: LogExtra | None) -> list[float | None]:
    scores: list[float | None] = []
    golds: list[str] = []
    parsed: list[str] = []
    for answer, wanted in zip(answers, solution, strict=True):
        score, gold, found = (0.0, _UNFINISHED, _UNFINISHED) if answer is None else _compare(answer, wanted)
        scores.append(score)
        golds.append(gold)
        parsed.append(found)
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", golds)
        log_extra("answer_parsed", parsed)
    return scores


def _compare(answer: str, solution: str) -> tuple[float | None, str, str]:
    """The score, and both sides as they were understood."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # Its time limits are alarms, which only a main thread can set; elsewhere `reward.timeout_s` is the limit.
    alarms = threading.current_thread() is threading.main_thread()
    parsing_s, verifying_s = (_PARSING_S, _VERIFYING_S) if alarms else (None, None)
    gold = parse(solution, parsing_timeout=parsing_s)
    if not gold:
        return None, _UNPARSEABLE, _SKIPPED
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    found = parse(answer, extraction_config=[latex], extraction_mode="first_match", parsing_timeout=parsing_s)
    score = float(verify(gold, found, timeout_seconds=verifying_s))
    return score, str(gold), str(found) if found else _UNPARSEABLE
