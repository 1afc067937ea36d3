"""Solutions in steps as samples: where steps are scored, what limits keep, by ids computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tiny_models import build_tokenizer
from trl_ray.config.example_options import TruncationMode
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.steps import StepRules, StepSample, read_steps, step_tokens, write_steps
from trl_ray.data.examples.tokenisation import encode
from trl_ray.data.formats.records import SteppedSolution
from trl_ray.errors import ConfigError

TOKENIZER = build_tokenizer()  # a token per byte
END = 258
SOLUTION = SteppedSolution(prompt="pq", steps=("ab", "c"), labels=(True, False))
RULES = StepRules(step_separator="\n")


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def made(solution: SteppedSolution, rules: StepRules, tokenizer: Any = TOKENIZER) -> StepSample | Untrained:
    texts = write_steps(solution, tokenizer, rules, where="row 0 of d")
    return read_steps(solution, encode(tokenizer, texts), rules, step_tokens(tokenizer, rules), row=5)


def sample(solution: SteppedSolution = SOLUTION, rules: StepRules = RULES, tokenizer: Any = TOKENIZER) -> StepSample:
    found = made(solution, rules, tokenizer)
    assert isinstance(found, StepSample)
    return found


def read_at(found: StepSample) -> list[tuple[str, bool]]:
    """The text up to the token that each score is read at, and its label; the layout reads before a trained token."""
    both = np.concatenate([found.sample.prompt_ids, found.sample.completion_ids])
    places = np.flatnonzero(found.sample.loss_mask) + len(found.sample.prompt_ids)
    assert found.sample.label is not None and found.sample.label.steps is not None
    return [
        (str(TOKENIZER.decode(both[:place])), bool(label))
        for place, label in zip(places, found.sample.label.steps, strict=True)
    ]


def test_a_step_is_scored_at_the_last_token_of_its_separator() -> None:
    found = sample()
    assert found.sample.prompt_ids.tolist() == ids("pq")
    assert found.sample.completion_ids.tolist() == [*ids("ab\nc\n"), END]
    assert found.sample.loss_mask.tolist() == [False, False, False, True, False, True]
    assert read_at(found) == [("pqab\n", True), ("pqab\nc\n", False)]
    assert (found.row, found.sample.group_id, found.cut_tokens) == (5, 5, 0)


def test_a_separator_of_several_tokens_is_scored_at_its_last() -> None:
    assert read_at(sample(rules=replace(RULES, step_separator="<>"))) == [("pqab<>", True), ("pqab<>c<>", False)]


def test_only_the_last_step_is_scored_when_asked_for() -> None:
    assert read_at(sample(rules=replace(RULES, last_step_only=True))) == [("pqab\nc\n", False)]
    cut = made(SOLUTION, replace(RULES, last_step_only=True, max_completion_length=4))
    assert cut is Untrained.TRUNCATED


def test_limits_keep_the_end_of_the_prompt_and_the_start_of_the_steps() -> None:
    found = sample(rules=replace(RULES, max_prompt_length=1, max_completion_length=4))
    assert read_at(found) == [("qab\n", True)]
    assert found.sample.completion_ids.tolist() == [*ids("ab\nc"), END]
    assert found.cut_tokens > 0
    assert read_at(sample(rules=replace(RULES, max_length=5))) == [("pqab\n", True)]
    assert made(SOLUTION, replace(RULES, max_length=4)) is Untrained.TRUNCATED
    assert made(SOLUTION, replace(RULES, max_length=2)) is Untrained.TRUNCATED


def test_the_end_is_kept_where_that_is_asked_for_and_a_first_token_stands_in_for_the_prompt() -> None:
    keep_end = replace(RULES, truncation_mode=TruncationMode.KEEP_END)
    assert read_at(sample(rules=replace(keep_end, max_length=6))) == [("qab\n", True), ("qab\nc\n", False)]
    found = sample(rules=replace(keep_end, max_length=3))
    assert (found.sample.prompt_ids.tolist(), read_at(found)) == (ids("\n"), [("\n", True), ("\nc\n", False)])


def test_a_start_token_comes_first_where_the_tokenizer_adds_one_and_is_cut_with_the_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    starting = build_tokenizer()
    starting.bos_token = "<|endoftext|>"
    assert sample(tokenizer=starting).sample.prompt_ids.tolist() == ids("pq"), "it has one and does not add it"
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    assert sample(tokenizer=starting).sample.prompt_ids.tolist() == [256, *ids("pq")]
    short = sample(rules=replace(RULES, max_prompt_length=2), tokenizer=starting)
    assert short.sample.prompt_ids.tolist() == ids("pq")


def test_a_conversational_prompt_is_rendered_with_the_header_of_the_answer() -> None:
    talk = replace(SOLUTION, prompt=({"role": "user", "content": "q"},))
    assert sample(talk).sample.prompt_ids.tolist() == ids("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")


def test_a_separator_without_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="step_separator must have at least one token, got ''"):
        step_tokens(TOKENIZER, replace(RULES, step_separator=""))
