"""Answers that are programs: none of them runs, each is a wrong answer, and the next one is scored as ever (S05)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_ray.rewards import functions
from trl_ray.rewards.answer_guard import evaluate, guard_sympy
from trl_ray.rewards.functions import reasoning_gym

package = pytest.importorskip("reasoning_gym")

EVALUATING_TASKS = (
    *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "puzzle24", "countdown"),
    *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
)
TOUCH = "__import__('pathlib').Path({canary!r}).touch()"
HOSTILE = (
    TOUCH,
    f"[{TOUCH}]",
    f"({TOUCH}, 24)[1]",
    f"24 if {TOUCH} is None else 0",
    f"[x for x in [{TOUCH}]]",
    f"(lambda: {TOUCH})()",
    f"abs({TOUCH} or 24)",
    "open({canary!r}, 'w')",
    "exec(\"open({canary!r}, 'w')\")",
    "eval(\"open({canary!r}, 'w')\")",
    "S(\"open({canary!r}, 'w')\")",
    "sympify(\"open({canary!r}, 'w')\")",
    "sin(\"open({canary!r}, 'w')\")",
    "Symbol(\"open({canary!r}, 'w')\")",
    "Function(\"open({canary!r}, 'w')\")(1)",
    "lambdify((), \"open({canary!r}, 'w')\")()",
    "Symbol('x').__class__.__init__.__globals__['__builtins__']['open']({canary!r}, 'w')",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', {canary!r}])",
    "getattr(Integer(24), '__class__')",
    "globals()",
    "(24).__class__",
    "x.diff.__globals__",
    "print(24, file=open({canary!r}, 'w'))",
    "breakpoint()",
    "exit()",
    "f\"{{open({canary!r}, 'w')}}\"",
    "'a' * 10**10",
    "9" * 100_000,
    "(" * 5000 + "24" + ")" * 5000,
    "[" * 100 + "]" * 100,
    "-" * 19_000 + "1",
    "1 << 10**12",
    "24\0",
    "\ud800",
    "",
)


def _group(task: str, completions: list[str]) -> dict[str, Any]:
    row = package.create_dataset(task, size=1, seed=3)[0]
    count = len(completions)
    columns = {"prompts": row["question"], "task": task, "answer": row["answer"], "metadata": row["metadata"]}
    return {"completions": completions, **{name: [value] * count for name, value in columns.items()}}


@pytest.mark.parametrize("task", EVALUATING_TASKS)
def test_hostile_answers_are_wrong_run_nothing_and_leave_the_next_score_as_it_was(task: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    right = package.create_dataset(task, size=1, seed=3)[0]["answer"]
    hostile = [text.replace("{canary!r}", repr(str(canary))).replace("{{", "{").replace("}}", "}") for text in HOSTILE]
    [before] = reasoning_gym(**_group(task, [right]))
    scores = reasoning_gym(**_group(task, [*hostile, right]))
    assert not canary.exists()
    # countdown gives 0.05, puzzle24 and others 0.01 for any attempt.
    assert max(scores[:-1]) <= 0.05 and scores[-1] == before == 1.0


def test_an_answer_at_which_the_scorer_raises_is_wrong_and_a_row_at_which_it_raises_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def score(text: str, entry: dict[str, Any]) -> float:
        return 1 / len(entry["metadata"]["numbers"]) * float(int(text) == int(entry["answer"]))

    monkeypatch.setattr(functions, "_scorer", lambda task: score)
    group = {"prompts": ["q"] * 2, "task": ["any"] * 2, "answer": ["3"] * 2, "completions": ["three", "3"]}
    assert reasoning_gym(**group, metadata=[{"numbers": [3]}] * 2) == [0.0, 1.0]
    with pytest.raises(KeyError, match="numbers"):
        reasoning_gym(**group, metadata=[{}] * 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a', 'b']", ["a", "b"]),
        ("[[0, 1], [1, 0]]", [[0, 1], [1, 0]]),
        ("(1 + 2) * 3 // 2", 4),
        ("0x1f << 2", 124),
        ("[1] + [2]", [1, 2]),
        ("~5 & 0b11", 2),
        ("1/2", 0.5),
    ],
)
def test_literals_and_arithmetic_are_what_python_makes_of_them(text: str, value: object) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [("f()", "Call"), ("2 ** 10 ** 9", "at most 1048576 bits"), ("'a' * 9", "of numbers"), ("x", "Name")],
)
def test_all_else_is_refused_with_words(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(text)


def test_sympy_still_reads_mathematics() -> None:
    import sympy

    guard_sympy()
    x = sympy.Symbol("x")
    found = sympy.parse_expr("2*x**2 + sin(x)/3 - C", local_dict={"x": x})
    assert found == 2 * x**2 + sympy.sin(x) / 3 - sympy.Symbol("C")
    assert sympy.parse_expr("(5 - 1) * 6") == 24
    assert str(sympy.parse_expr("f(x) + max(1, 2)")) == "f(x) + 2"
    assert sympy.parse_expr("expand((x + 1)**2)") == x**2 + 2 * x + 1
    assert sympy.sympify("pi*E") == sympy.pi * sympy.E
