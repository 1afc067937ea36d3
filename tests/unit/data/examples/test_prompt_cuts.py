"""`max_prompt_length` cuts the beginnings of prompts before `max_length` cuts what is left."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SupervisedRunConfig
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, load_examples

TOKENIZER = build_tokenizer()  # a token per byte
END = TOKENIZER.eos_token_id
PAIR = {"prompt": "abcdef", "chosen": "yes", "rejected": "no"}


def load(config: SupervisedRunConfig, task: ExampleTask, rows: list[dict[str, Any]]) -> ExampleSet:
    return load_examples(config, TOKENIZER, task=task, dataset=rows)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return found


def shown(found: ExampleSet, index: int = 0) -> list[tuple[list[int], list[int]]]:
    """Context and answer of each sample; all of an answer is trained."""
    samples = found.examples[index].samples
    assert all(sample.loss_mask.all() for sample in samples)
    return [(sample.prompt_ids.tolist(), sample.completion_ids.tolist()) for sample in samples]


@pytest.mark.parametrize("config", [DPOConfig, CPOConfig])
def test_pairs_keep_the_end_of_their_prompt(config: type[SupervisedRunConfig]) -> None:
    found = load(config(max_prompt_length=2), ExampleTask.PAIRS, [PAIR])
    assert shown(found) == [(ids("ef"), [*ids("yes"), END]), (ids("ef"), [*ids("no"), END])]
    assert found.losses() == {"tokens beyond max_length": "8 of 19 (42.1%)"}
    assert found.cut_rows == (0,)
    # What is left is cut by max_length, at its end.
    short = load(config(max_prompt_length=2, max_length=4), ExampleTask.PAIRS, [PAIR])
    assert shown(short) == [(ids("ef"), ids("ye")), (ids("ef"), ids("no"))]
    assert short.losses()["tokens beyond max_length"] == "11 of 19 (57.9%)"
    whole = load(config(max_prompt_length=6), ExampleTask.PAIRS, [PAIR])
    assert shown(whole) == shown(load(config(), ExampleTask.PAIRS, [PAIR])) and whole.losses() == {}


def test_the_likelihood_of_a_prompt_is_that_of_what_is_kept() -> None:
    found = load(ORPOConfig(max_prompt_length=3), ExampleTask.LIKELIHOOD_PAIRS, [PAIR])
    assert shown(found)[2] == (ids("d"), ids("ef"))


def test_rated_answers_keep_the_end_of_their_prompts_and_so_do_mismatched_ones() -> None:
    rows = [
        {"prompt": "abcdef", "completion": "yes", "label": True},
        {"prompt": "ghij", "completion": "no", "label": False},
    ]
    found = load(KTOConfig(max_prompt_length=2), ExampleTask.UNPAIRED_WITH_KL, rows)
    assert shown(found) == [(ids("ef"), [*ids("yes"), END])]
    other = found.examples[0].mismatched
    assert other is not None and other.prompt_ids.tolist() == ids("ef")
    assert other.completion_ids.tolist() == [*ids("no"), END]
    assert found.losses() == {"tokens beyond max_length": "6 of 17 (35.3%)"}
