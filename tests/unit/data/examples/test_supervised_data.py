"""Records become tokens and targets: what is trained, what is cut, and which rows are left out and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from packed_rows import rows_of
from tiny_models import build_tokenizer
from trl_ray.config.example_options import TruncationMode
from trl_ray.data.chat.training_templates import template_source, training_template
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.packing import pack
from trl_ray.data.examples.supervised_texts import (
    SupervisedRecord,
    SupervisedRules,
    SupervisedSample,
    as_training_sample,
)
from trl_ray.data.examples.tokenisation import common_prefix_length
from trl_ray.data.formats.record_reader import reader_for
from trl_ray.data.formats.records import Document, PromptCompletion
from trl_ray.data.formats.transcripts import TextFormat
from trl_ray.errors import ConfigError, DataError, ModelError
from whole_datasets import SupervisedData, tokenize_record, tokenize_records

TOKENIZER = build_tokenizer()
END = 258  # <|im_end|>
RULES = SupervisedRules(chat_template=template_source("chatml"))
ASSISTANT = replace(RULES, assistant_only_loss=True)
USER: dict[str, Any] = {"role": "user", "content": "q"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(columns: dict[str, Any], number: int = 7, text_field: str = "text") -> SupervisedRecord:
    """A row as the record that reading makes of it."""
    told = TextFormat.PLAIN  # or a text that ends with <|im_end|> would be taken for a transcript
    reader = reader_for(columns, name="data.jsonl", text_field=text_field, text_format=told)
    record = reader.read(number, columns)
    assert isinstance(record, (Document, PromptCompletion))
    return record


def tokenize(columns: dict[str, Any], rules: SupervisedRules) -> SupervisedSample | Untrained:
    return tokenize_record(read(columns), TOKENIZER, rules, row=7, name="data.jsonl")


def tokenize_all(rows: list[dict[str, Any]], rules: SupervisedRules = RULES) -> SupervisedData:
    return tokenize_records([read(row, i) for i, row in enumerate(rows)], TOKENIZER, rules, name="d")


def sample(record: dict[str, Any], rules: SupervisedRules = RULES) -> SupervisedSample:
    found = tokenize(record, rules)
    assert isinstance(found, SupervisedSample)
    return found


def trained(found: SupervisedSample) -> str:
    """The text of the targets; every byte is a token."""
    return str(TOKENIZER.decode(found.token_ids[found.loss_mask].tolist()))


def text(found: SupervisedSample) -> str:
    return str(TOKENIZER.decode(found.token_ids.tolist()))


def test_plain_text_ends_with_the_end_token_and_all_but_its_first_token_is_trained() -> None:
    found = sample({"text": "abc"})
    assert (text(found), trained(found)) == ("abc<|im_end|>", "bc<|im_end|>")
    assert found.labels().tolist() == [-100, *found.token_ids[1:].tolist()]
    assert found.row == 7


def test_an_end_token_that_is_there_is_not_added_again() -> None:
    assert text(sample({"text": "abc<|im_end|>"})) == "abc<|im_end|>"


def test_another_text_column_is_read_when_it_is_named() -> None:
    for row in ({"body": "abc"}, {"body": "abc", "text": "not this"}):
        assert read(row, text_field="body") == Document(content="abc")
    with pytest.raises(DataError, match=r"Row 7 of data.jsonl, field 'body' must be given, got None"):
        read({"body": None}, text_field="body")


def test_of_prompt_and_completion_only_the_completion_is_trained_unless_told_otherwise() -> None:
    record = {"prompt": "2+2=", "completion": "4"}
    assert trained(sample(record)) == "4<|im_end|>"
    assert trained(sample(record, replace(RULES, completion_only_loss=True))) == "4<|im_end|>"
    assert trained(sample(record, replace(RULES, completion_only_loss=False))) == "+2=4<|im_end|>"


def test_a_conversational_completion_is_trained_after_the_assistants_header() -> None:
    found = sample({"prompt": [USER], "completion": [ANSWER]})
    assert text(found) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert trained(found) == "a<|im_end|>\n"
    assert not found.prompt_diverges


def test_a_conversation_is_trained_whole_or_in_the_assistants_turns() -> None:
    record = {"messages": [USER, ANSWER, USER, ANSWER]}
    assert trained(sample(record)) == text(sample(record)).removeprefix("<|im_start|>")
    assert trained(sample(record, ASSISTANT)) == "a<|im_end|>\na<|im_end|>\n"


def test_assistant_only_and_completion_only_together_train_the_assistants_part_of_the_completion() -> None:
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, {**ANSWER, "content": "b"}]}
    assert trained(sample(record, ASSISTANT)) == "a<|im_end|>\nb<|im_end|>\n"
    assert (
        trained(sample(record, replace(ASSISTANT, completion_only_loss=False))) == "a<|im_end|>\n" * 2 + "b<|im_end|>\n"
    )


def test_a_prompt_that_is_rendered_differently_alone_is_reported_and_the_completion_begins_where_they_part() -> None:
    # The header asks for thoughts, which the finished turn does not show.
    thinking = replace(RULES, chat_template=template_source("chatml").replace("assistant\\n' -", "assistant\\n#' -"))
    found = sample({"prompt": [USER], "completion": [ANSWER]}, thinking)
    assert found.prompt_diverges
    assert trained(found) == "a<|im_end|>\n"


def test_tools_and_template_values_of_a_row_reach_the_template() -> None:
    rules = replace(RULES, chat_template="{{ tools[0].name }}-{{ mood }}-{{ messages[0].content }}")
    rules = replace(rules, template_kwargs={"mood": "calm"})
    record = {"messages": [USER], "tools": [{"name": "add"}]}
    assert text(sample(record, rules)) == "add-calm-q"
    as_text = {**record, "tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": "glad"}}
    assert text(sample(as_text, rules)) == "add-glad-q"


def test_tools_and_template_values_of_a_checked_record_reach_the_template() -> None:
    rules = replace(RULES, chat_template="{{ tools[0].name }}-{{ mood }}-{{ messages[0].content }}")
    record = Document(content=(USER,), tools=({"name": "add"},), columns={"chat_template_kwargs": {"mood": "glad"}})
    found = tokenize_record(record, TOKENIZER, rules, row=7, name="data.jsonl")
    assert isinstance(found, SupervisedSample)
    assert text(found) == "add-glad-q"


def test_truncation_keeps_the_start_or_the_end_and_counts_what_it_cuts() -> None:
    start = sample({"text": "abcdef"}, replace(RULES, max_length=3))
    assert (text(start), trained(start), start.cut_tokens) == ("abc", "bc", 4)
    end = sample({"text": "abcdef"}, replace(RULES, max_length=3, truncation_mode=TruncationMode.KEEP_END))
    assert (text(end), trained(end), end.cut_tokens) == ("ef<|im_end|>", "f<|im_end|>", 4)
    whole = sample({"text": "ab"}, replace(RULES, max_length=3))
    assert (text(whole), whole.cut_tokens) == ("ab<|im_end|>", 0)


def test_rows_with_nothing_to_train_are_left_out_and_told_by_number_and_reason() -> None:
    records = [
        {"prompt": "ab", "completion": "c"},
        {"prompt": "abcd", "completion": "e"},
        {"messages": [USER]},
        {"text": "<|im_end|>"},
        {"prompt": "abc", "completion": "defg"},
    ]
    data = tokenize_all(records[:2] + records[4:], replace(RULES, max_length=4))
    assert [found.row for found in data.samples] == [0, 2]
    assert data.untrained == {1: Untrained.TRUNCATED}
    assert data.report() == (
        "1 of 3 rows of d have none within max_length and are left out (row 1): raise max_length.",
        "1 of 3 rows of d are longer than max_length and cut (row 2).",
    )
    empty = tokenize_all([records[3], {"text": "ab"}, records[3]])
    assert empty.untrained == {0: Untrained.NO_TARGET, 2: Untrained.NO_TARGET}
    assert empty.report() == (
        "2 of 3 rows of d have no token to train and are left out (rows 0, 2): fill them or remove them.",
    )
    silent = tokenize_all([records[2]], ASSISTANT)
    assert silent.untrained == {0: Untrained.NO_TARGET}


def test_a_long_list_of_rows_is_cut_short_in_the_report() -> None:
    data = tokenize_all([{"text": "<|im_end|>"}] * 12)
    assert "(rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more)" in data.report()[0]


def test_samples_pack_into_rows_whose_targets_have_a_context() -> None:
    data = tokenize_all([{"text": "abcd"}, {"text": "e"}, {"text": "fg"}])
    lengths = [len(found.token_ids) for found in data.samples]
    packing = pack(lengths, max_length=5, strategy="bfd_split")
    assert lengths == [5, 2, 3]
    masks = [row.gather_targets([found.loss_mask for found in data.samples]) for row in rows_of(packing)]
    assert [mask.tolist() for mask in masks] == [[False, True, True, True, True], [False, True, True, False, True]]
    assert sum(int(mask.sum()) for mask in masks) == sum(int(found.loss_mask.sum()) for found in data.samples)


def test_a_tokenizers_own_template_serves_with_the_training_template_found_for_it() -> None:
    rules = SupervisedRules(assistant_only_loss=True, chat_template=training_template(TOKENIZER).source)
    assert trained(sample({"messages": [USER, ANSWER]}, rules)) == "a<|im_end|>\n"
    assert text(sample({"messages": [USER, ANSWER]}, SupervisedRules())) == text(sample({"messages": [USER, ANSWER]}))


@pytest.mark.parametrize(
    ("record", "rules", "message"),
    [
        ({"messages": [{**USER, "content": "\udc80"}]}, RULES, r"Row 7 of data.jsonl, field 'messages', message 0"),
        ({"text": "a"}, ASSISTANT, r"assistant_only_loss needs conversations, and row 7 of data.jsonl is text: 'a'"),
        ({"messages": [USER], "tools": "[{"}, RULES, r"Row 7 of data.jsonl, field 'tools' must be a list of tools"),
        (
            {"messages": [USER], "chat_template_kwargs": "mood"},
            RULES,
            r"row 7 of data.jsonl, field 'chat_template_kwargs', must be an object",
        ),
        (
            {"messages": [USER], "chat_template_kwargs": {"mood": "\udc80"}},
            replace(RULES, chat_template="{{ mood }}{{ messages[0].content }}"),
            r"row 7 of data.jsonl must be text that can be written as UTF-8, and character 0",
        ),
    ],
)
def test_a_bad_record_is_named_by_row_and_field(record: dict[str, Any], rules: SupervisedRules, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(record, rules)


def test_a_sample_begins_its_completion_at_the_first_target() -> None:
    found = sample({"prompt": "2+2=", "completion": "4"})
    made = as_training_sample(found.token_ids, found.loss_mask, group_id=3)
    assert (TOKENIZER.decode(made.prompt_ids), TOKENIZER.decode(made.completion_ids)) == ("2+2=", "4<|im_end|>")
    assert (made.group_id, made.loss_mask.tolist()) == (3, [True, True])
    assert np.shares_memory(made.completion_ids, found.token_ids)


def test_a_record_the_template_refuses_is_named() -> None:
    rules = replace(RULES, chat_template=template_source("mistral"))
    result = {"role": "tool", "name": "add", "content": "2"}
    with pytest.raises(ModelError, match=r"refused row 7 of data.jsonl with TemplateError: User and assistant must"):
        tokenize({"messages": [USER, {**ANSWER, "tool_calls": [CALL]}, result, ANSWER]}, rules)


@pytest.mark.parametrize(
    ("record", "family", "left_out"),
    [
        ({"messages": [USER], "tools": [{"function": {"name": "add"}}]}, "chatml", "the tool 'add' of row 7"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "add"}]}]}, "chatml", "the call of 'add' of row 7"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL, {"function": {"name": "now"}}]}]},
            "gptoss",
            "the call of 'now' of row 7",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}]},
            "gptoss",
            "the call of 'add' of row 7",
        ),
    ],
)
def test_tools_and_calls_that_the_template_leaves_out_are_told(
    record: dict[str, Any], family: str, left_out: str
) -> None:
    rules = replace(RULES, chat_template=template_source(family))
    with pytest.raises(ModelError, match=left_out):
        tokenize(record, rules)


def test_tools_and_calls_that_the_template_renders_are_taken() -> None:
    rules = replace(ASSISTANT, chat_template=template_source("qwen2_5"))
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    found = sample({"messages": [USER, {**ANSWER, "tool_calls": [CALL, CALL]}], "tools": [tool]}, rules)
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert trained(found) == f"a{call}{call}<|im_end|>\n"


def test_a_start_token_is_added_to_texts_and_not_to_what_a_template_has_written() -> None:
    from tokenizers.processors import TemplateProcessing

    starting = build_tokenizer()
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    for row, starts in (({"text": "ab"}, True), ({"messages": [USER, ANSWER]}, False)):
        found = tokenize_record(read(row), starting, RULES, row=7, name="d")
        assert isinstance(found, SupervisedSample)
        assert bool(found.token_ids[0] == 256) is starts


def test_a_length_without_room_for_a_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length must be at least 2 or None, got 1"):
        SupervisedRules(max_length=1)


def test_the_common_prefix_ends_at_the_first_difference_or_the_shorter_end() -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    assert common_prefix_length(ids, np.array([1, 2, 4, 3], dtype=np.int32)) == 2
    assert common_prefix_length(ids, np.array([1, 2], dtype=np.int32)) == 2
    assert common_prefix_length(ids[:0], ids) == 0
