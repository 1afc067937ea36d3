import json

import pytest

from trl_ray.config.sections import DataConfig
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.data.sources.generated import generate
from trl_ray.errors import DataError

pytest.importorskip("reasoning_gym")
NAME = "reasoning_gym/chain_sum"
SMALL = {"size": 20, "min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 4}


def test_items_become_conversations_with_answer_task_and_json_metadata():
    row = generate(NAME, SMALL, seed=1, held_out=False)[0]
    assert set(row) == {"prompt", "answer", "task", "metadata"}
    assert row["prompt"][0]["role"] == "user"
    assert row["metadata"]["expression"] in row["prompt"][0]["content"]
    assert row["task"] == "chain_sum"
    assert json.loads(json.dumps(row)) == row


def test_the_same_seed_gives_the_same_items():
    assert generate(NAME, SMALL, seed=5, held_out=False) == generate(NAME, SMALL, seed=5, held_out=False)


def test_held_out_items_and_examples_never_appear_in_training():
    options = {**SMALL, "examples": 2}
    train = {row["prompt"][-1]["content"] for row in generate(NAME, options, seed=1, held_out=False)}
    test = generate(NAME, options, seed=1, held_out=True)
    shown = {turn["content"] for turn in test[0]["prompt"][:-1] if turn["role"] == "user"}
    asked = {row["prompt"][-1]["content"] for row in test}
    assert not train & asked and not train & shown and not shown & asked
    # Not one seed further: item i of seed 2 is item i + 1 of seed 1.
    assert len(train & {row["prompt"][-1]["content"] for row in generate(NAME, SMALL, seed=2, held_out=False)}) == 19


def test_examples_are_solved_turns_before_the_question():
    prompt = generate(NAME, {**SMALL, "examples": 1}, seed=1, held_out=False)[0]["prompt"]
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]
    left, sign, right = prompt[0]["content"].removesuffix(" =").split(": ")[1].split(" ")
    assert int(prompt[1]["content"]) == int(left) + (1 if sign == "+" else -1) * int(right)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reasoning_gym/chain_summ", {}, "Did you mean reasoning_gym/chain_sum?"),
        ("reasoning_gym/zzz", {}, "Its tasks: .*chain_sum"),
        (NAME, {"sise": 3}, "'sise'.*Its options: .*size"),
        (NAME, {"size": -1}, "size must be positive"),
        (NAME, {"examples": -1}, "whole number from 0, got -1"),
        (NAME, {"held_out_size": 0}, "whole number from 1, got 0"),
    ],
)
def test_an_unknown_task_or_option_is_explained(name, options, message):
    with pytest.raises(DataError, match=message):
        generate(name, options, seed=1, held_out=False)


def test_a_config_reaches_the_task():
    found = load_rows(DataConfig(dataset_name=NAME, dataset_kwargs=SMALL), seed=1)
    assert (len(found.rows), found.columns) == (20, ("prompt", "answer", "task", "metadata"))


def test_a_smaller_held_out_set_is_the_first_rows_of_the_larger_one_and_leaves_training_as_it_is():
    options = {**SMALL, "held_out_size": 3}
    assert generate(NAME, options, seed=1, held_out=True) == generate(NAME, SMALL, seed=1, held_out=True)[:3]
    assert generate(NAME, options, seed=1, held_out=False) == generate(NAME, SMALL, seed=1, held_out=False)


def rows_of(form, *, held_out=False, seed=1, **options):
    return generate(NAME, {**SMALL, "form": form, **options}, seed=seed, held_out=held_out)


def said(messages):
    assert [message["role"] for message in messages] == ["assistant"]
    return int(messages[0]["content"])


def answers(**options):
    return [int(row["answer"]) for row in generate(NAME, {**SMALL, **options}, seed=1, held_out=False)]


def test_completions_are_the_answers_to_the_same_prompts():
    prompts, rows = generate(NAME, SMALL, seed=1, held_out=False), rows_of("completions")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts]
    assert [said(row["completion"]) for row in rows] == answers()


@pytest.mark.parametrize("wrong", ["other", "near"])
def test_chosen_is_right_and_rejected_is_wrong_but_plausible(wrong):
    few = {"min_digits": 1, "max_digits": 1, "size": 60}  # many have the same answer
    rows, right = rows_of("preferences", wrong=wrong, **few), answers(**few)
    assert [said(row["chosen"]) for row in rows] == right
    rejected = [said(row["rejected"]) for row in rows]
    assert all(bad != good for bad, good in zip(rejected, right, strict=True))
    if wrong == "other":
        assert set(rejected) <= set(right)
    else:
        assert all(abs(bad - good) <= max(9, abs(good) // 10) for bad, good in zip(rejected, right, strict=True))


def test_every_other_rating_is_of_a_wrong_answer():
    rows, right = rows_of("ratings"), answers()
    assert [row["label"] for row in rows] == [True, False] * 10
    assert [said(row["completion"]) == good for row, good in zip(rows, right, strict=True)] == [True, False] * 10


def test_steps_are_running_totals_and_go_wrong_at_one_step_in_every_other_row():
    rows = rows_of("steps", min_terms=4, max_terms=4)
    finals = answers(min_terms=4, max_terms=4)
    for number, (row, final) in enumerate(zip(rows, finals, strict=True)):
        assert len(row["completions"]) == len(row["labels"]) == 3
        totals = [int(step.split(" = ")[1]) for step in row["completions"]]
        starts = [int(step.split(" ")[0]) for step in row["completions"]]
        assert starts[1:] == totals[:-1]
        holds = [eval(step.split(" = ")[0]) == total for step, total in zip(row["completions"], totals, strict=True)]
        assert all(row["labels"]) == (totals[-1] == final) == (number % 2 == 0)
        slip = row["labels"].index(False) if number % 2 else None
        assert holds == [place != slip for place in range(3)]
        assert row["labels"] == [slip is None or place < slip for place in range(3)]


@pytest.mark.parametrize("form", ["completions", "preferences", "ratings", "steps"])
def test_forms_are_the_same_for_the_same_seed_and_held_out_ones_are_others(form):
    assert rows_of(form) == rows_of(form) != rows_of(form, seed=2)
    asked = {row["prompt"][-1]["content"] for row in rows_of(form)}
    assert not asked & {row["prompt"][-1]["content"] for row in rows_of(form, held_out=True)}
    (first, *_) = rows_of(form, examples=1, question="{expression} =")
    assert [turn["role"] for turn in first["prompt"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NAME, {"form": "preference"}, "form of .* must be one of prompts, .*Did you mean preferences"),
        (NAME, {"form": "ratings", "wrong": "far"}, "wrong of .* must be one of other, near, longer, got 'far'"),
        ("reasoning_gym/letter_counting", {"form": "steps"}, "form=steps needs sums and differences"),
        (
            "reasoning_gym/spell_backward",
            {"form": "preferences", "wrong": "near"},
            "is no whole number.* Set wrong=other and a greater size",
        ),
    ],
)
def test_a_form_that_a_task_does_not_have_is_refused(name, options, message):
    with pytest.raises(DataError, match=message):
        generate(name, {"size": 3, **options}, seed=1, held_out=False)


def test_an_answer_that_is_longer_has_one_digit_too_many_and_so_has_a_wrong_step():
    pairs = generate(NAME, {**SMALL, "form": "preferences", "wrong": "longer"}, seed=1, held_out=False)
    for row in pairs:
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert wrong[:-1] == right and wrong[-1] in "123456789"
    solutions = generate(NAME, {**SMALL, "form": "steps", "wrong": "longer"}, seed=1, held_out=False)
    assert [row["labels"] for row in solutions[:2]] == [[True], [False]]
    left, sign, right, _, total = solutions[1]["completions"][0].split()
    assert int(total[:-1]) == int(left) + (int(right) if sign == "+" else -int(right))
