"""Our reward functions for mathematics against TRL's: the same scores and the same extra columns."""

import pytest
from trl.rewards import accuracy_rewards as trls

from trl_ray.rewards import mathematics as ours

SOLUTIONS = [r"\frac{1}{3}", r"$x^2 + 1$", "72", "no mathematics at all", r"$\{1, 2\}$", r"$10\text{ cm}$"]
ANSWERS = [
    r"My answer is \boxed{\frac{1}{3}}",
    r"My answer is \boxed{\frac{2}{6}}, and not \boxed{4}",
    r"<think>\boxed{\frac{1}{3}}</think> It is $\frac{1}{2}$",
    r"<think>it may be \boxed{72}, it may not",
    r"<think>a</think> b </think> \boxed{72}",
    r"\boxed{1 + x^2}",
    r"\boxed{\{2, 1\}}",
    r"The answer is \boxed{10}",
    "72",
    "",
    r"\boxed{\frac{1}{",
]
ROWS = [(answer, solution) for solution in SOLUTIONS for answer in ANSWERS]
MESSAGES = [[{"role": "assistant", "content": answer}] for answer, _ in ROWS]
WANTED = [solution for _, solution in ROWS]


class Columns(dict):
    """What a function hands to `log_extra`."""

    def __call__(self, name, values):
        self[name] = values


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward"])
def test_scores_and_extra_columns_are_those_of_trl(name):
    told, expected = Columns(), Columns()
    scores = getattr(ours, name)(completions=MESSAGES, solution=WANTED, log_extra=told, prompts=["p"] * len(WANTED))
    assert scores == getattr(trls, name)(completions=MESSAGES, solution=WANTED, log_extra=expected)
    assert set(scores) == {None, 0.0, 1.0}
    assert told == expected


def test_texts_are_scored_as_conversations_are():
    assert ours.accuracy_reward(completions=[answer for answer, _ in ROWS], solution=WANTED) == ours.accuracy_reward(
        completions=MESSAGES, solution=WANTED
    )


def test_other_ends_of_a_thought_may_be_named():
    texts = [r"<t>x</t> \boxed{2}", r"\boxed{2}"]
    assert ours.reasoning_accuracy_reward(texts, ["$2$", "$2$"], reasoning_delimiters=["</t>"]) == [1.0, 0.0]


def test_a_length_scales_the_score_along_half_a_cosine():
    lengths = [[0] * count for count in range(0, 3 * len(ROWS), 3)]
    keywords = {"completions": MESSAGES, "solution": WANTED, "completion_ids": lengths}
    scaled = ours.cosine_scaled_reward(max_len=100, min_value_wrong=-2.0)(**keywords)
    assert scaled == pytest.approx(trls.get_cosine_scaled_reward(max_len=100, min_value_wrong=-2.0)(**keywords))
    half = ours.cosine_scaled_reward(max_len=100)
    assert half([r"\boxed{2}", r"\boxed{3}"], ["$2$", "$2$"], completion_ids=[[0] * 50] * 2) == [0.75, -0.75]
    with pytest.raises(ValueError, match="max_len must be at least 1 token, got 0"):
        ours.cosine_scaled_reward(max_len=0)
