"""Answers that are mathematics: which are computed together, and what becomes of those that would never end."""

from __future__ import annotations

import functools
import json

import pytest

from trl_ray.errors import ConfigError
from trl_ray.rewards import mathematics
from trl_ray.rewards.mathematics import is_plain
from trl_ray.rewards.reward_registry import make_spec, plain_rule, warm_up
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.sandbox_messages import Lifetime
from trl_ray.rewards.scoring import GroupInput


@pytest.mark.parametrize(
    "text",
    [
        r"The answer is \boxed{\frac{1}{3}}.",
        r"so $x^2 + y^{12} - \sqrt{3}$ and \boxed{x^{-1}}",
        r"\boxed{(1, 2] \cup [3, \infty)}",
        r"\boxed{1{,}234}",
        r"<think>2 < 3</think> \boxed{e^{2x}}",
    ],
)
def test_usual_answers_need_no_process_of_their_own(text: str) -> None:
    assert is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{9^{9^{9}}}",
        r"\boxed{9^9^9}",
        r"\boxed{2^{123456}}",
        r"\boxed{2^{10000 x}}",
        r"\boxed{2^1234}",
        r"\boxed{100!}",
        r"\boxed{\sum_{n=1}^{99} n}",
        r"\boxed{\int x dx}",
        r"\boxed{\begin{pmatrix}1\end{pmatrix}}",
        "1" * 12,
        "x" * 20_001,
        "x^2 " * 41,
    ],
)
def test_what_may_take_long_gets_one(text: str) -> None:
    assert not is_plain(text)


def test_a_group_is_scored_behind_walls_and_a_tower_of_powers_costs_nobody_else() -> None:
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{2}{6}}", "no answer"]
    group = {
        "prompt": "q",
        "completions": texts,
        "completion_ids": [[1]] * 4,
        "columns": {"solution": r"$\frac{1}{3}$"},
    }
    spec = make_spec("accuracy_reward")
    box = Sandbox(functions=[spec], weights=None, timeout_s=30.0, lifetime=Lifetime.GROUP)
    try:
        box.start()
        scored = box.score(GroupInput(json.dumps(group)), size=4)
    finally:
        box.close()
    assert scored.failure is None
    assert [reward.total for reward in scored.rewards] == [1.0, 0.0, 1.0, 0.0]


def test_in_a_partial_they_are_made_ready_and_sorted_as_outside_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[str] = []
    monkeypatch.setattr(mathematics, "warm_up", lambda: warmed.append("up"))
    given = functools.partial(mathematics.reasoning_accuracy_reward, reasoning_delimiters=["</thought>"])
    warm_up(given)
    assert warmed == ["up"] and plain_rule(given) is mathematics.is_plain
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="reasoning_accuracy_reward needs the package math-verify"):
            make_spec(given)
