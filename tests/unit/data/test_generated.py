import json

import pytest

from trl_ray.config.sections import DataConfig
from trl_ray.data.generated import generate
from trl_ray.data.loading import load_rows
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
    ],
)
def test_an_unknown_task_or_option_is_explained(name, options, message):
    with pytest.raises(DataError, match=message):
        generate(name, options, seed=1, held_out=False)


def test_a_config_reaches_the_task():
    found = load_rows(DataConfig(dataset_name=NAME, dataset_kwargs=SMALL), seed=1)
    assert (len(found.rows), found.columns) == (20, ("prompt", "answer", "task", "metadata"))
