import pytest

from trl_ray.rewards.functions import (
    arithmetic,
    exact_answer,
    last_number,
    reasoning_gym,
    soft_overlong,
    text_of,
    think_format,
    whole_number,
)
from trl_ray.rewards.reward_registry import row_check


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_arithmetic_gives_half_for_a_bare_integer_and_half_for_the_right_one():
    texts = ["7", " 7\n", "+7", "8", "-7", "7.", "The answer is 7", "", "\u0667", "9" * 60]
    assert arithmetic(completions=texts, answer=["7"] * 10) == [1, 1, 1, 0.5, 0.5, 0, 0, 0, 0, 0]
    assert arithmetic(completions=chat("7", "x"), answer=["7", "7"]) == [1, 0]
    assert arithmetic(completions=["7"], answer=[None]) == [None]


def test_last_number_reads_the_last_integer_and_abstains_without_an_answer():
    texts = ["7 + 5 = 12", "12, as 7 + 5", "none", "-3", "12"]
    assert last_number(completions=texts, answer=["12", "12", "12", -3, None]) == [1, 0, 0, 1, None]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("72", 72),
        (72, 72),
        (72.0, 72),
        (" -3 ", -3),
        ("72.00", 72),
        ("1,234", 1234),
        ("Half of 48 is <<48/2=24>>24.\n#### 72", 72),
        ("so\n#### 57,500\n", 57500),
        ("#### -5", -5),
        ("72 clips", None),
        ("#### about 72", None),
        ("1,23", None),
        (0.5, None),
        (float("inf"), None),
        (float("nan"), None),
        (True, None),
        (["72"], None),
        ("", None),
    ],
)
def test_answers_are_whole_numbers_however_they_are_written(answer, number):
    assert whole_number(answer) == number
    if number is not None:
        texts = [f"It is {number}.", f"It is {number:,}.", f"It is {number + 1}.", "nothing"]
        assert last_number(completions=texts, answer=[answer] * 4) == [1, 1, 0, 0]
        assert arithmetic(completions=[str(number), str(number + 1)], answer=[answer] * 2) == [1, 0.5]
    else:
        with pytest.raises(ValueError, match="answer must be a whole number"):
            last_number(completions=["1"], answer=[answer])
    check = row_check(["last_number", "think_format"])
    problem = check({"answer": answer})
    assert (problem is None) == (number is not None)
    assert problem is None or problem.endswith("The reward function last_number asks for it.")


def test_rows_are_checked_for_what_the_functions_read_and_nothing_else():
    assert row_check(["last_number"])({"answer": None}) is None  # it abstains
    assert row_check(["exact_answer", "think_format"])({"answer": "Paris"}) is None
    assert row_check([lambda completions, answer: [0.0]])({"answer": "Paris"}) is None
    assert row_check(["arithmetic"])({"solution": "Paris"}) is None  # told by the columns
    good = {"task": "chain_sum", "answer": "3", "metadata": {}}
    assert row_check(["reasoning_gym"])(good) is None
    assert "field 'metadata' must be that of a generated task" in row_check(["reasoning_gym"])(
        {**good, "metadata": "x"}
    )


def test_exact_answer_ignores_white_space_around_and_abstains_without_an_answer():
    assert exact_answer(completions=[" Paris\n", "paris", "x"], answer=["Paris", "Paris", None]) == [1, 0, None]


def test_think_format_wants_one_thought_at_the_start():
    good, late, twice, open_ = "<think>a\nb</think>c", "x<think>a</think>", "<think><think>a</think>", "<think>a"
    assert think_format(completions=chat(good, late, twice, open_)) == [1, 0, 0, 0]


def test_soft_overlong_falls_from_0_at_the_cache_to_minus_1_at_the_maximum():
    punish = soft_overlong(max_completion_len=10, soft_punish_cache=4)
    assert punish(completion_ids=[[0] * n for n in (0, 6, 7, 9, 10, 50)]) == [0, 0, -0.25, -0.75, -1, -1]
    with pytest.raises(ValueError, match="soft_punish_cache"):
        soft_overlong(max_completion_len=10, soft_punish_cache=11)


def test_reasoning_gym_scores_with_the_task_s_own_rule_and_reads_answer_tags():
    pytest.importorskip("reasoning_gym")
    given = {"prompts": ["2 + 1 ="] * 3, "task": ["chain_sum"] * 3, "answer": ["3"] * 3, "metadata": [{}] * 3}
    scores = reasoning_gym(completions=["3", "so <answer> 3 </answer>.", "4"], **given)
    assert scores[:2] == [1, 1] and scores[2] < 1


def test_the_text_of_several_messages_is_joined():
    assert text_of([{"content": "a"}, {"content": None}, {"content": "b"}]) == "ab"
