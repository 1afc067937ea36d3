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
from trl_ray.data.examples.example_set import ExampleTask, load_examples
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
    ("an empty prompt", SFT, [ANSWER, {**ANSWER, "prompt": " "}], ("Row 1", "field 'prompt'", "must not be empty")),
    (
        "an empty completion",
        SFT,
        [ANSWER, {**ANSWER, "completion": ""}],
        ("Row 1", "field 'completion'", "must not be empty"),
    ),
    (
        "an empty conversation",
        SFT,
        [TALK, {**TALK, "completion": []}],
        ("Row 1", "field 'completion'", "at least one message"),
    ),
    (
        "an empty message",
        SFT,
        [TALK, {**TALK, "completion": [{**A[0], "content": ""}]}],
        ("Row 1", "field 'completion', message 0"),
    ),
    (
        "an empty step",
        PRM,
        [STEPS, {**STEPS, "completions": ["a", " "]}],
        ("Row 1", "field 'completions', step 1", "must not be empty"),
    ),
    (
        "roles out of order",
        SFT,
        [TALK, {**TALK, "prompt": Q + Q}],
        ("Row 1", "field 'prompt'", "message 1 must be of assistant"),
    ),
    (
        "a completion of the user",
        SFT,
        [TALK, {**TALK, "completion": Q}],
        ("Row 1", "field 'completion'", "must start with the assistant"),
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
        [PAIR, {**PAIR, "rejected": "a"}],
        ("Row 1", "field 'rejected'", "must differ from 'chosen'"),
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
