"""Each answer is evaluated in a process of its own: what one does is no other's business (S05, S06)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from trl_ray.rewards.lone_answers import is_plain
from trl_ray.rewards.reward_registry import Scorer, make_spec
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.sandbox_messages import Lifetime
from trl_ray.rewards.scoring import GroupInput
from trl_ray.types import RewardErrorKind, ScoredGroup

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")

LATER = {"bonus": 0.0}


def grade(completions: list[str], answer: list[str], log_extra: Any, log_metric: Any, **columns: Any) -> list[Any]:
    """Evaluates answers as verl's and others' graders did: the value of `grade_it`, after running each as Python."""
    scores = []
    for text, wanted in zip(completions, answer, strict=True):
        space: dict[str, Any] = {"LATER": LATER, "value": text}
        if not is_plain(text):
            exec(text, space)
        log_metric("seen", 1.0)
        scores.append(None if space["value"] is None else float(space["value"] == wanted) + LATER["bonus"])
    log_extra("length", [len(text) for text in completions])
    return scores


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    spec = replace(make_spec(grade), scorer=Scorer.EVALUATOR)
    made = Sandbox(functions=[spec], weights=None, timeout_s=20.0, lifetime=Lifetime.GROUP)
    try:
        assert made.start() is None
        yield made
    finally:
        made.close()


def score(made: Sandbox, *texts: str) -> ScoredGroup:
    group = {
        "prompt": "q",
        "completions": list(texts),
        "completion_ids": [[1]] * len(texts),
        "columns": {"answer": "4"},
    }
    return made.score(GroupInput(json.dumps(group)), size=len(texts))


def test_an_answer_that_replaces_the_grader_is_graded_so_alone(box: Sandbox) -> None:
    poison = "LATER['bonus'] = 5.0; value = 'x'"
    scored = score(box, poison, "4", "value = '4' #_", "3", poison)
    assert [reward.total for reward in scored.rewards] == [5.0, 1.0, 1.0, 0.0, 5.0]
    assert score(box, "4", "value = '4' #_").rewards[1].total == 1.0


def test_answers_that_end_their_process_or_never_end_are_wrong_and_counted(box: Sandbox) -> None:
    texts = (
        "import os; os._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "while True: _ = 1",
        "x = bytearray(2**40) #_",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.fork(); value = '4'",
        "import subprocess; subprocess.run(['true']); value = '4'",
        "import os; os.kill(os.getppid(), 9); value = '4'",
        "import os; [os.write(fd, b'{}') for fd in range(3, 20)]; value = '4'",
        "4",
    )
    scored = score(box, *texts)
    assert scored.failure is None
    assert [reward.total for reward in scored.rewards] == [0.0] * 9 + [1.0]
    assert scored.metrics["grade/answers_stopped"] == 9.0
    assert [reward.extra["length"] for reward in scored.rewards][-1] == 1


def test_none_abstains_and_what_is_logged_is_joined(box: Sandbox) -> None:
    scored = score(box, "value = None #_", "4", "value = '4' #__")
    assert [reward.total for reward in scored.rewards] == [None, 1.0, 1.0]
    assert [reward.extra["length"] for reward in scored.rewards] == [15, 1, 15]
    assert scored.metrics == {"seen": 1.0}


def test_an_answer_that_is_stopped_counts_as_an_empty_one() -> None:
    def penalise(completions: list[Any], **columns: Any) -> list[float]:
        if "os" in completions[0]:
            import os

            os._exit(0)
        return [-1.0 if not completion else 1.0 for completion in completions]

    spec = replace(make_spec(penalise), scorer=Scorer.EVALUATOR)
    made = Sandbox(functions=[spec], weights=None, timeout_s=20.0, lifetime=Lifetime.GROUP)
    try:
        assert [reward.total for reward in score(made, "os._exit(0)", "fine()").rewards] == [-1.0, 1.0]
    finally:
        made.close()


def test_a_grader_that_raises_at_every_answer_fails_the_group(box: Sandbox) -> None:
    failure = score(box, "raise KeyError('row_')", "raise KeyError('row_')").failure
    assert failure is not None and failure.kind is RewardErrorKind.EXCEPTION and "KeyError: 'row_'" in failure.detail


@pytest.mark.parametrize(
    "text",
    ["42", "(5 - 1) * 6", "2*x**3 + sin(x)/3 + C", "[[1, 0], [0, 1]]", "['a', 'b']", "x = 4", "so, 3. Then 4!", "x^2"],
)
def test_what_calls_nothing_and_grows_by_little_needs_no_process(text: str) -> None:
    assert is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        *("exit()", "f (x)", "(f)(x)", "a[0](1)", "'f'(1)", "__import__", "f{x}", "\\frac{1}{2}", "a" * 501),
        *("9**9**9", "9^9^9", "9**999", "(9**9)**9**9", "2**x", "1 << 9", "'a' * 9", "9 * 'a'", "1" * 16),
        *(
            "sin(x)(y)",
            "lambda: 0\\",
            "a\tb",
            "exec\n('x')",
            "print\u00a0(1)",
            "2**(9)",
            "a[0] = 5",
            "a.b = 5",
            "a[0] += 5",
        ),
    ],
)
def test_all_else_gets_one(text: str) -> None:
    assert not is_plain(text)
