"""`max_prompt_length`: of prompts whose answers are compared or rated, the last tokens are kept."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_models import build_tokenizer
from trl_ray.config.load import build
from trl_ray.config.runs.config_registry import CONFIGS
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, load_examples

TOKENIZER = build_tokenizer()  # a token per byte
END = TOKENIZER.eos_token
PAIR = {"prompt": "0123456789", "chosen": "yes", "rejected": "no"}
TASKS = {
    "dpo": ExampleTask.PAIRS,
    "cpo": ExampleTask.PAIRS,
    "orpo": ExampleTask.LIKELIHOOD_PAIRS,
    "kto": ExampleTask.UNPAIRED,
}


def load(pipeline: str, *rows: dict[str, Any], **options: Any) -> ExampleSet:
    config: Any = build(CONFIGS[pipeline], options)
    return load_examples(config, TOKENIZER, task=TASKS[pipeline], dataset=[*rows])


def texts(found: ExampleSet) -> list[tuple[str, str]]:
    """Context and what is trained, of every sample."""
    samples = [sample for example in found.examples for sample in example.samples]
    return [
        (
            str(TOKENIZER.decode(sample.prompt_ids.tolist())),
            str(TOKENIZER.decode(sample.completion_ids[sample.loss_mask].tolist())),
        )
        for sample in samples
    ]


@pytest.mark.parametrize("pipeline", ["dpo", "cpo"])
def test_of_a_pairs_prompt_the_last_tokens_are_kept_and_the_rest_is_counted(pipeline: str) -> None:
    found = load(pipeline, PAIR, {**PAIR, "prompt": "9"}, max_prompt_length=4)
    assert texts(found)[:2] == [("6789", f"yes{END}"), ("6789", f"no{END}")]
    assert texts(found)[2][0] == "9"
    # 6 of 10, for each of the two answers.
    assert found.tokens.cut == 12 and found.cut_rows == (0,)


def test_the_length_of_the_whole_is_cut_after_the_prompt() -> None:
    found = load("dpo", PAIR, max_prompt_length=4, max_length=6)
    assert texts(found) == [("6789", "ye"), ("6789", "no")]
    kept = load("dpo", PAIR, max_prompt_length=4, max_length=6, truncation_mode="keep_end")
    assert texts(kept) == [("89", f"yes{END}"), ("789", f"no{END}")]


def test_a_likelihood_is_that_of_the_kept_prompt() -> None:
    assert texts(load("orpo", PAIR, max_prompt_length=4))[2] == ("6", "789")


def test_prompts_of_rated_answers_are_cut_as_well() -> None:
    rated = {"prompt": "0123456789", "completion": "yes", "label": True}
    found = load("kto", rated, max_prompt_length=4, loss_type="apo_zero_unpaired")
    assert texts(found) == [("6789", f"yes{END}")]
    assert found.tokens.cut == 6


def test_without_it_prompts_are_whole() -> None:
    assert texts(load("dpo", PAIR))[0] == ("0123456789", f"yes{END}")


def test_the_answer_of_another_row_follows_the_kept_prompt() -> None:
    rows = [
        {"prompt": "abcdef", "completion": "yes", "label": True},
        {"prompt": "ghij", "completion": "no", "label": False},
    ]
    config: Any = build(CONFIGS["kto"], {"max_prompt_length": 2})
    found = load_examples(config, TOKENIZER, task=ExampleTask.UNPAIRED_WITH_KL, dataset=rows)
    other = found.examples[0].mismatched
    assert other is not None
    assert TOKENIZER.decode(other.prompt_ids.tolist()) == "ef"
    assert TOKENIZER.decode(other.completion_ids.tolist()) == f"no{END}"
    assert found.losses() == {"tokens beyond max_length": "6 of 17 (35.3%)"}
