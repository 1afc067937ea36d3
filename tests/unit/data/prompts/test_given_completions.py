"""The dataset's own completions: which prompts get one, its tokens as SFT would make them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from tiny_models import build_tokenizer
from trl_ray.config.sections import PromptConfig
from trl_ray.data.examples.supervised_texts import SupervisedRules, SupervisedSample
from trl_ray.data.formats.transcripts import TextFormat
from trl_ray.data.prompts.given_completions import GivenCompletions
from trl_ray.data.prompts.prompt_source import PromptSource, load_prompts
from trl_ray.errors import DataError, ModelError
from whole_datasets import read_records, tokenize_record

TOKENIZER = build_tokenizer()
TEXTS = [{"prompt": "two plus two is", "completion": " four"}, {"prompt": "a", "completion": "b<|im_end|>"}]
TALKS = [
    {
        "prompt": [{"role": "user", "content": "two plus two?"}],
        "completion": [{"role": "assistant", "content": "four"}],
    },
    {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "completion": [
            {"role": "assistant", "content": "ho"},
            {"role": "user", "content": "hi again"},
            {"role": "assistant", "content": "ho again"},
        ],
    },
]


def given(*, share: float = 1.0, seed: int = 0, max_tokens: int = 100, column: str = "completion") -> GivenCompletions:
    return GivenCompletions(column=column, share=share, seed=seed, max_tokens=max_tokens)


def load(
    rows: Sequence[dict[str, Any]],
    completions: GivenCompletions | None,
    *,
    limit: int | None = None,
    max_prompt_length: int | None = None,
    tokenizer: Any = TOKENIZER,
    **options: Any,
) -> PromptSource:
    return load_prompts(
        PromptConfig(shuffle_dataset=False, **options),
        tokenizer,
        seed=0,
        max_prompt_tokens=limit,
        dataset=list(rows),
        completions=completions,
        max_prompt_length=max_prompt_length,
    )


@pytest.mark.parametrize("rows", [TEXTS, TALKS], ids=["texts", "conversations"])
@pytest.mark.parametrize("bare_prompt", [False, True], ids=["same", "another"])
def test_prompt_and_completion_are_the_tokens_that_sft_trains_on(rows: Any, bare_prompt: bool) -> None:
    tokenizer = build_tokenizer()
    if bare_prompt:
        # As templates do that open a thought only where an answer is to be written.
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>{% endif")
        assert "<think>" in tokenizer.chat_template
    source = load(rows, given(), tokenizer=tokenizer)
    records = list(read_records(rows, name="x", text_format=TextFormat.PLAIN))
    for index, record in enumerate(records):
        sample = tokenize_record(record, tokenizer, SupervisedRules(), row=index, name="x")  # type: ignore[arg-type]
        assert isinstance(sample, SupervisedSample)
        prompt = source.prompt(index)
        assert prompt.given_ids is not None
        np.testing.assert_array_equal(prompt.token_ids, sample.token_ids[~sample.loss_mask])
        np.testing.assert_array_equal(prompt.given_ids, sample.token_ids[sample.loss_mask])
        assert prompt.given_ids.dtype == np.int32


def test_a_text_ends_with_one_end_of_sequence_token_and_a_conversation_as_its_template_says() -> None:
    def said(source: PromptSource, ordinal: int) -> str:
        return str(TOKENIZER.decode(source.prompt(ordinal).given_ids))

    texts, talks = load(TEXTS, given()), load(TALKS, given())
    assert [said(texts, i) for i in range(2)] == [" four<|im_end|>", "b<|im_end|>"]
    assert said(talks, 0) == "four<|im_end|>\n"


def test_a_system_prompt_stands_before_the_prompt_of_a_given_completion_too() -> None:
    source = load(TALKS, given(), system_prompt="be kind")
    assert TOKENIZER.decode(source.prompt(0).token_ids).startswith("<|im_start|>system\nbe kind<|im_end|>\n")
    assert TOKENIZER.decode(source.prompt(0).given_ids) == "four<|im_end|>\n"


def test_a_long_completion_keeps_its_first_tokens() -> None:
    assert TOKENIZER.decode(load(TEXTS, given(max_tokens=3)).prompt(0).given_ids) == " fo"


def test_who_gets_a_completion_depends_on_seed_and_ordinal_alone_and_the_share_holds() -> None:
    def mask(share: float, seed: int = 0, count: int = 2000) -> list[bool]:
        source = load(TEXTS, given(share=share, seed=seed))
        return [source.prompt(ordinal).given_ids is not None for ordinal in range(count)]

    quarter = mask(0.25)
    # Three standard deviations of a fair draw.
    assert abs(sum(quarter) / 2000 - 0.25) < 3 * (0.25 * 0.75 / 2000) ** 0.5
    source = load(TEXTS, given(share=0.25))
    assert [source.prompt(ordinal).given_ids is not None for ordinal in reversed(range(2000))][::-1] == quarter
    assert mask(0.25, seed=1) != quarter
    # Whoever gets one at a small share gets one at a larger share.
    assert all(more or not less for less, more in zip(quarter, mask(0.5), strict=True))
    assert not any(mask(0.0, count=100))
    assert all(mask(1.0, count=100))
    # The draw of each ordinal is its own: rows do not keep theirs from epoch to epoch.
    assert {tuple(quarter[start : start + 2]) for start in range(0, 2000, 2)} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }


def test_a_prompt_without_one_is_as_if_there_were_none() -> None:
    plain, mixed = load(TEXTS, None), load(TEXTS, given(share=0.5))
    for ordinal in range(20):
        if mixed.prompt(ordinal).given_ids is None:
            np.testing.assert_array_equal(mixed.prompt(ordinal).token_ids, plain.prompt(ordinal).token_ids)
    assert plain.fingerprint != mixed.fingerprint
    other = [{**TEXTS[0], "completion": " five"}, TEXTS[1]]
    assert load(other, given(share=0.5)).fingerprint != mixed.fingerprint
    assert load(other, None).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completions": "b"}], r"completion column 'completion'.*mean dataset_completion_column=comp"),
        ([TEXTS[0], {"prompt": "a", "completion": None}], r"Row 1 .*field 'completion' must be given, got None"),
        (
            [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}],
            r"Row 0 .*'completion' must be text",
        ),
        ([{**TALKS[0], "completion": "four"}], r"Row 0 .*'completion' must be a list of messages"),
        ([TALKS[1], {**TALKS[0], "completion": TALKS[0]["prompt"]}], r"Row 1 .*must have a message of the assistant"),
    ],
)
def test_a_row_without_a_usable_completion_is_named(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(rows, given())


def test_the_column_may_have_another_name() -> None:
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": 3}]
    assert TOKENIZER.decode(load(rows[:1], given(column="answer")).prompt(0).given_ids) == "b<|im_end|>"
    with pytest.raises(DataError, match=r"Row 1 .*field 'answer'"):
        load(rows, given(column="answer"))


def test_a_completion_that_adds_nothing_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match=r"Row 0 .*message 1, it leaves out the field 'content'"):
        load(TALKS[:1], given(), tokenizer=tokenizer)
    # A tokenizer that has no token for what the template renders.
    tokenizer.chat_template = "{{ messages | map(attribute='content') | join }}"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    silent = {**TALKS[0], "completion": [{"role": "assistant", "content": "\u200b"}]}
    with pytest.raises(DataError, match=r"Row 0 .*field 'completion', must add at least one token"):
        load([silent], given(), tokenizer=tokenizer)


def test_of_long_prompts_the_last_tokens_are_kept_and_the_words_stay_whole() -> None:
    source = load(TEXTS, given(share=0.5), max_prompt_length=6, limit=6)
    for ordinal in (0, 2, 4, 6, 8):
        prompt = source.prompt(ordinal)
        assert (TOKENIZER.decode(prompt.token_ids), prompt.text) == ("two is", "two plus two is")
    assert {source.prompt(ordinal).given_ids is None for ordinal in (0, 2, 4, 6, 8)} == {True, False}
    assert (TOKENIZER.decode(source.prompt(1).token_ids), source.longest) == ("a", 6)
    talks = load(TALKS, None, max_prompt_length=3)
    assert len(talks.prompt(0).token_ids) == 3
    assert talks.prompt(0).messages == ({"role": "user", "content": "two plus two?"},)
    with pytest.raises(DataError, match="at most 5 tokens"):
        load(TEXTS, None, max_prompt_length=6, limit=5)


def test_a_column_that_must_name_one_of_several_is_checked_row_by_row() -> None:
    rows = [{"prompt": "a", "who": "maths"}, {"prompt": "b", "who": "code"}]
    load(rows, None).require_values("who", ["code", "maths"], option="teacher_column")
    for wrong, message in (("mahts", r"got str 'mahts'. Did you mean 'maths'"), (None, "got None"), (3, "got int 3")):
        source = load([rows[0], {"prompt": "b", "who": wrong}], None)
        with pytest.raises(
            DataError, match=rf"Row 1 .*field 'who' \(teacher_column\), must be one of code, maths.*{message}"
        ):
            source.require_values("who", ["code", "maths"], option="teacher_column")


def test_the_answer_of_a_conversation_is_its_completion_and_no_part_of_its_prompt() -> None:
    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in TALKS[:1]]
    source, want = load(rows, given()), load(TALKS[:1], given())
    np.testing.assert_array_equal(source.prompt(0).token_ids, want.prompt(0).token_ids)
    np.testing.assert_array_equal(source.prompt(0).given_ids, want.prompt(0).given_ids)
    on_policy = load(rows, None).prompt(0)
    assert TOKENIZER.decode(on_policy.token_ids) == "<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\n"
    assert on_policy.given_ids is None


def test_completions_that_a_table_holds_as_text_are_messages_and_cut_tokens_are_counted() -> None:
    row = {"prompt": TALKS[0]["prompt"], "completion": str(TALKS[0]["completion"])}
    assert TOKENIZER.decode(load([row], given()).prompt(0).given_ids) == "four<|im_end|>\n"
    (note,) = load(TEXTS[:1], given(max_tokens=3)).notes
    assert note.startswith(
        "3 of 6 (50.0%) tokens of the completions of the given list are beyond max_completion_length"
    )
