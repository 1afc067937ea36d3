"""The catalogue of bad rows: each is one message that names the row, the field or what is missing, and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import (
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedRunConfig,
)
from trl_ray.data.examples.example_set import ExampleTask, load_examples, stream_examples
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.errors import InputError

TOKENIZER = build_tokenizer()
Q: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
A: list[dict[str, Any]] = [{"role": "assistant", "content": "a"}]
B: list[dict[str, Any]] = [{"role": "assistant", "content": "b"}]
ANSWER = {"prompt": "q", "completion": "a"}
TALK = {"prompt": Q, "completion": A}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RATED = {"prompt": "q", "completion": "a", "label": True}
STEPS = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SFT, DPO, KTO = (SFTConfig(), "supervised"), (DPOConfig(), "pairs"), (KTOConfig(), "unpaired_with_kl")
REWARD, PRM, ORPO = (RewardModelConfig(), "reward_pairs"), (PRMConfig(), "steps"), (ORPOConfig(), "likelihood_pairs")
Run = tuple[SupervisedRunConfig, str]


def said(run: Run, rows: list[dict[str, Any]]) -> str:
    """The one message that loading these rows gives."""
    config, task = run
    with pytest.raises(InputError) as caught:
        load_examples(config, TOKENIZER, task=ExampleTask(task), dataset=rows).require_examples()
    return str(caught.value)


CATALOGUE: list[tuple[str, Run, list[dict[str, Any]], tuple[str, ...]]] = [
    (
        "a missing column",
        SFT,
        [{"prompt": "q", "id": 3}],
        ("its columns make it prompt_only", "prompt, completion lacks 'completion'"),
    ),
    (
        "a misnamed column",
        DPO,
        [{"prompt": "q", "choosen": "a", "rejected": "b"}],
        ("Is 'choosen' meant to be 'chosen'?",),
    ),
    ("a column of another task", KTO, [ANSWER], ("lacks 'label'",)),
    ("pairs for process rewards", PRM, [PAIR], ("must have one of the formats stepwise_supervision",)),
    (
        "a column that a later row lacks",
        DPO,
        [PAIR, {"prompt": "q", "chosen": "a"}],
        ("Row 1", "field 'rejected'", "no such column"),
    ),
    ("None", KTO, [RATED, {**RATED, "completion": None}], ("Row 1", "field 'completion'", "got None")),
    (
        "an empty conversation",
        SFT,
        [TALK, {**TALK, "completion": []}],
        ("Row 1", "field 'completion'", "at least one message"),
    ),
    (
        "an empty step",
        PRM,
        [STEPS, {**STEPS, "completions": ["a", " "]}],
        ("Row 1", "field 'completions', step 1", "must not be empty"),
    ),
    (
        "a completion of the user",
        SFT,
        [TALK, {**TALK, "completion": Q}],
        ("Row 1", "field 'completion'", "must have a message of the assistant"),
    ),
    ("text among messages", SFT, [TALK, ANSWER], ("Row 1", "field 'prompt'", "must be a list of messages")),
    (
        "messages among texts",
        REWARD,
        [PAIR, {"prompt": Q, "chosen": A, "rejected": B}],
        ("Row 1", "field 'prompt'", "must be text"),
    ),
    (
        "nothing to prefer",
        ORPO,
        [{**PAIR, "rejected": "a"}],
        ("1 of 1 rows", "prefer nothing, chosen and rejected being the same", "(row 0)"),
    ),
    (
        "no shared prompt",
        DPO,
        [{"chosen": "xa", "rejected": "xb"}, {"chosen": "a", "rejected": "b"}],
        ("Row 1", "'chosen' and 'rejected'", "share nothing"),
    ),
    ("a label that is none", KTO, [RATED, {**RATED, "label": "good"}], ("Row 1", "field 'label'", "true or false")),
    (
        "step labels of the wrong length",
        PRM,
        [STEPS, {**STEPS, "labels": [True]}],
        ("Row 1", "field 'labels'", "got 1 labels for 2 steps"),
    ),
    ("tools in text", SFT, [{**ANSWER, "tools": [TOOL]}], ("Row 0", "field 'tools'", "text has no place for tools")),
    ("broken tools", SFT, [{**TALK, "tools": "[{"}], ("Row 0", "field 'tools'", "column 3 is broken")),
    (
        "tools that the template leaves out",
        SFT,
        [{**TALK, "tools": [TOOL]}],
        ("leaves out the tool 'add' of row 0", "field 'tools'", "Set a chat_template"),
    ),
    (
        "a call that the template leaves out",
        DPO,
        [{"prompt": Q, "chosen": [{**A[0], "tool_calls": [TOOL]}], "rejected": B}],
        ("the call of 'add' of row 0", "field 'tool_calls'"),
    ),
    ("half a character", SFT, [{"text": "a"}, {"text": "a\ud800"}], ("Row 1", "field 'text'", "character 1")),
    (
        "all truncated away",
        (DPOConfig(max_length=2), "pairs"),
        [{**PAIR, "prompt": "qq"}] * 2,
        ("2 of 2 rows", "(rows 0, 1)", "raise max_length"),
    ),
    (
        "all answers truncated away",
        (SFTConfig(max_length=2), "supervised"),
        [{**ANSWER, "prompt": "qq"}],
        ("1 of 1 rows", "(row 0)", "raise max_length"),
    ),
    (
        "all steps truncated away",
        (PRMConfig(max_completion_length=1), "steps"),
        [STEPS],
        ("1 of 1 rows", "(row 0)", "raise max_length"),
    ),
    (
        "all labels masked",
        (SFTConfig(assistant_only_loss=True), "supervised"),
        [{"messages": Q}],
        ("1 of 1 rows", "no token to train", "(row 0)"),
    ),
    (
        "text where roles are needed",
        (SFTConfig(assistant_only_loss=True), "supervised"),
        [{"text": "a"}],
        ("row 0", "assistant_only_loss needs conversations"),
    ),
    ("a row that is no object", SFT, [ANSWER, 7], ("Row 1", "must be an object with columns, got int 7")),  # type: ignore[list-item]
]


@pytest.mark.parametrize(
    ("run", "rows", "parts"), [entry[1:] for entry in CATALOGUE], ids=[entry[0] for entry in CATALOGUE]
)
def test_a_bad_row_is_one_message_that_says_where_and_what(
    run: Run, rows: list[dict[str, Any]], parts: tuple[str, ...]
) -> None:
    message = said(run, rows)
    assert "\n" not in message
    for part in parts:
        assert part in message


BAD = [
    ANSWER,
    {**ANSWER, "prompt": None},
    {**ANSWER, "completion": 7},
    {**ANSWER, "prompt": None},
    {"prompt": "r", "completion": "b"},
]


def test_all_bad_rows_are_told_by_kind_with_the_first_of_each() -> None:
    message = said(SFT, BAD)
    assert message == (
        "3 of 5 rows cannot be used. "
        "2 rows (1, 3): Row 1 of the given list, field 'prompt' must be given, got None. Fill it or remove the row. "
        "1 row (2): Row 2 of the given list, field 'completion' must be text, as this dataset is standard, got int 7. "
        "Use one form for all rows, or remove the row. "
        "Mend or remove such rows, or set on_bad_row=drop: then they are left out and counted."
    )
    assert said(SFT, BAD[:2]).endswith(
        "Fill it or remove the row. Mend or remove such rows, or set on_bad_row=drop: "
        "then they are left out and counted."
    )


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for() -> None:
    found = load_examples(SFTConfig(on_bad_row="drop"), TOKENIZER, task=ExampleTask.SUPERVISED, dataset=BAD)
    ids = [(one.samples[0].prompt_ids.tolist(), one.samples[0].completion_ids.tolist()) for one in found.examples]
    end = TOKENIZER.eos_token_id
    assert ids == [([*TOKENIZER.encode(q)], [*TOKENIZER.encode(a), end]) for q, a in (("q", "a"), ("r", "b"))]
    assert all(one.samples[0].loss_mask.tolist() == [True, True] for one in found.examples)
    assert dict(found.untrained) == dict.fromkeys((1, 2, 3), Untrained.BAD_ROW)
    first, second, total = found.report()
    assert first.startswith("2 rows (1, 3): Row 1 of the given list, field 'prompt' must be given")
    assert second.startswith("1 row (2): Row 2")
    assert total == (
        "3 of 5 rows of the given list cannot be used and are left out, as on_bad_row=drop says (rows 1, 2, 3)."
    )


def test_a_dataset_of_bad_rows_alone_is_refused_though_they_may_be_dropped() -> None:
    drop = (SFTConfig(on_bad_row="drop"), "supervised")
    assert said(drop, [ANSWER, {**ANSWER, "prompt": None}][1:]).startswith("Row 0 of the given list, field 'prompt'")


@pytest.mark.parametrize("bad", [{"messages": None}, {"messages": "no list"}, {"text": None}, {"messages": [7]}])
def test_what_a_first_bad_row_is_like_says_nothing_of_the_others(bad: dict[str, Any]) -> None:
    rows = [bad, {"messages": Q + A}, {"messages": Q + B}]
    found = load_examples(SFTConfig(on_bad_row="drop"), TOKENIZER, task=ExampleTask.SUPERVISED, dataset=rows)
    assert [one.row for one in found.examples] == [1, 2]
    with pytest.raises(InputError, match=r"^Row 0 of the given list, field 'messages'"):
        load_examples(SFTConfig(), TOKENIZER, task=ExampleTask.SUPERVISED, dataset=rows)


def test_rows_that_the_template_refuses_are_bad_rows_too() -> None:
    strict = build_tokenizer()
    strict.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + str(
        strict.chat_template
    )
    rows = [{"messages": Q + A}, {"messages": A}, {"messages": Q + B}, {"messages": B}]
    with pytest.raises(InputError, match=r"2 of 4 rows cannot be used\. 2 rows \(1, 3\): .*refused row 1 .*: no"):
        load_examples(SFTConfig(), strict, task=ExampleTask.SUPERVISED, dataset=rows)
    config = SFTConfig(on_bad_row="drop")
    assert [one.row for one in load_examples(config, strict, task=ExampleTask.SUPERVISED, dataset=rows).examples] == [
        0,
        2,
    ]


def test_a_stream_drops_bad_rows_window_by_window_and_counts_them() -> None:
    config = SFTConfig(on_bad_row="drop", dataset_streaming=True, stream_window=3, max_steps=1, shuffle_dataset=False)
    streamed = list(stream_examples(config, TOKENIZER, task=ExampleTask.SUPERVISED, dataset=BAD, seed=0))
    assert [(one.example.row, one.untrained) for one in streamed] == [
        (0, {Untrained.BAD_ROW: 2}),
        (4, {Untrained.BAD_ROW: 3}),
    ]
    stop = config.replace(on_bad_row="stop")
    with pytest.raises(InputError, match=r"2 of 3 rows cannot be used\. 1 row \(1\): .* 1 row \(2\): "):
        list(stream_examples(stop, TOKENIZER, task=ExampleTask.SUPERVISED, dataset=BAD, seed=0))


def test_a_later_window_of_bad_rows_alone_is_counted_and_passed_over() -> None:
    config = SFTConfig(on_bad_row="drop", dataset_streaming=True, stream_window=2, max_steps=1, shuffle_dataset=False)
    broken = {**ANSWER, "prompt": None}
    rows = [ANSWER, broken, broken, broken, ANSWER, ANSWER]

    def streamed(config: SFTConfig, rows: list[dict[str, Any]], start: int = 0) -> list[Any]:
        given = {"task": ExampleTask.SUPERVISED, "dataset": rows, "start_window": start, "seed": 0}
        return list(stream_examples(config, TOKENIZER, **given))

    assert [(one.example.row, one.window, one.untrained) for one in streamed(config, rows)] == [
        (0, 0, {Untrained.BAD_ROW: 1}),
        (4, 2, {Untrained.BAD_ROW: 3}),
        (5, 2, {Untrained.BAD_ROW: 3}),
    ]
    assert [one.example.row for one in streamed(config, rows, start=1)] == [4, 5]
    with pytest.raises(InputError, match=r"Row 0 of the given list, field 'prompt'"):
        streamed(config, rows[2:4])
    with pytest.raises(InputError, match=r"cannot be used|Row 2"):
        streamed(config.replace(on_bad_row="stop"), [ANSWER, ANSWER, broken, broken])


TIE = {**PAIR, "rejected": "a"}


@pytest.mark.parametrize("run", [DPO, REWARD, ORPO, KTO])
@pytest.mark.parametrize(
    "rows",
    [
        [TIE, PAIR, {**PAIR, "prompt": "r"}],
        [{"prompt": Q, "chosen": A, "rejected": A}, *({"prompt": Q, "chosen": A, "rejected": B} for _ in range(2))],
        [{"chosen": "xa", "rejected": "xa"}, *({"chosen": "x a", "rejected": "x b"} for _ in range(2))],
        [{"chosen": Q + A, "rejected": Q + A}, *({"chosen": Q + A, "rejected": Q + B} for _ in range(2))],
        [{"chosen": Q, "rejected": Q}, *({"chosen": Q + A, "rejected": Q + B} for _ in range(2))],
    ],
)
def test_ties_are_left_out_and_counted_and_the_other_pairs_are_trained(run: Run, rows: list[dict[str, Any]]) -> None:
    config, task = run
    found = load_examples(config, TOKENIZER, task=ExampleTask(task), dataset=rows)
    assert dict(found.untrained) == {0: Untrained.TIE}
    assert {one.row for one in found.examples} == {1, 2}
    assert "1 of 3 rows of the given list prefer nothing, chosen and rejected being the same" in found.report()[0]
    alone = load_examples(config, TOKENIZER, task=ExampleTask(task), dataset=rows[1:])
    assert [
        [(sample.completion_ids.tolist(), sample.loss_mask.tolist()) for sample in one.samples]
        for one in found.examples
    ] == [
        [(sample.completion_ids.tolist(), sample.loss_mask.tolist()) for sample in one.samples]
        for one in alone.examples
    ]


def test_answers_that_are_told_apart_by_blanks_which_the_template_strips_are_ties() -> None:
    strips = build_tokenizer()
    strips.chat_template = str(strips.chat_template).replace("message['content']", "message['content'].strip()")
    rows = [
        {"prompt": Q, "chosen": A, "rejected": [{**A[0], "content": "a "}]},
        {"prompt": Q, "chosen": A, "rejected": B},
    ]
    for config, task in (DPO, REWARD, ORPO, KTO):
        found = load_examples(config, strips, task=ExampleTask(task), dataset=[*rows, rows[1]])
        assert dict(found.untrained) == {0: Untrained.TIE}


def test_pairs_that_the_cut_makes_equal_and_the_tokens_that_it_costs_are_told() -> None:
    rows = [{"prompt": "q", "chosen": "abcX", "rejected": "abcY"}, PAIR]
    found = load_examples(DPOConfig(max_length=4), TOKENIZER, task=ExampleTask.PAIRS, dataset=rows)
    assert len(found) == 2  # they are trained all the same: losses may hold more than the comparison
    assert found.equal_rows == (0,)
    # q a b c X end, twice, of which 4 are kept; q a end and q b end.
    assert (found.tokens.written, found.tokens.cut) == (18, 4)
    assert found.report()[1:] == (
        "1 of 2 rows of the given list have answers that are the same once cut to max_length (row 0), and prefer "
        "nothing: raise max_length.",
        "4 of 18 (22.2%) tokens of the given list are beyond max_length and cut off.",
    )
    rated = load_examples(KTOConfig(max_length=4), TOKENIZER, task=ExampleTask.UNPAIRED_WITH_KL, dataset=rows)
    assert (rated.equal_rows, rated.tokens.written, rated.tokens.cut) == ((0,), 18, 4)


def test_what_packing_tears_off_is_told_in_tokens_that_would_have_been_trained() -> None:
    rows = [{"text": "abcd"}, {"text": "ef"}]
    config = SFTConfig(packing=True, packing_strategy="wrapped", max_length=4)
    found = load_examples(config, TOKENIZER, task=ExampleTask.SUPERVISED, dataset=rows)
    # abcd | end ef end: of abcd end four have a context, of ef end two; the first end begins a piece.
    assert (found.tokens.targets, found.tokens.unpacked, found.tokens.cut) == (6, 1, 0)
    assert found.report() == (
        "1 of 6 (16.7%) tokens to train of the given list are lost to packing, which tears rows: the first token of a "
        "piece has no context. Set packing_strategy=bfd to keep rows whole.",
    )
    whole = load_examples(SFTConfig(packing=True, max_length=16), TOKENIZER, task=ExampleTask.SUPERVISED, dataset=rows)
    assert whole.report() == ()
