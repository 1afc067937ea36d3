"""Splitting and renaming of rows, and what a row is, against TRL's data functions and chat templates."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from trl_ray.config.sections import DataConfig
from trl_ray.data.formats.detection import Form
from trl_ray.data.formats.foreign_formats import to_messages
from trl_ray.data.formats.record_reader import reader_for
from trl_ray.data.formats.shared_prompts import shared_prompt
from trl_ray.data.formats.transcripts import TextFormat, read_transcript, recognise
from trl_ray.data.sources.dataset_loading import load_rows
from whole_datasets import read_records

pytestmark = pytest.mark.parity
trl = pytest.importorskip("trl", reason="the reference is TRL")

Row = dict[str, Any]
TEXT = st.text("ab ", max_size=8)
TALK = st.lists(st.builds(lambda text: {"role": "user", "content": text}, st.sampled_from("abc")), max_size=5)


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


@given(shared=TEXT, chosen=TEXT, rejected=TEXT)
def test_the_prompt_that_texts_share_is_trls(shared: str, chosen: str, rejected: str) -> None:
    row = {"chosen": shared + chosen, "rejected": shared + rejected}
    # Where nothing is shared, TRL's answer depends on the last character.
    assume(row["chosen"][:1] == row["rejected"][:1] != "")
    assert dataclasses.asdict(shared_prompt(**row)) == trl.extract_prompt(row)


@given(shared=TALK, chosen=TALK, rejected=TALK)
def test_the_prompt_that_conversations_share_is_trls(shared: list[Row], chosen: list[Row], rejected: list[Row]) -> None:
    row = {"chosen": shared + chosen, "rejected": shared + rejected}
    assume(row["chosen"][:1] == row["rejected"][:1] != [])
    assert dataclasses.asdict(shared_prompt(**row)) == trl.extract_prompt(row)


SHAREGPT: list[Row] = [
    {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "id": 1},
    {"conversations": [user("q"), assistant("a")]},
    {"prompt": [{"from": "user", "value": "q"}], "completion": [{"from": "assistant", "value": "a"}]},
    {"chosen": [{"from": "assistant", "value": "a"}], "rejected": [assistant("b")]},
    {"messages": [user("q"), assistant("a")]},
    {"prompt": "q"},
]


@pytest.mark.parametrize("row", SHAREGPT)
def test_rows_with_speakers_become_trls_messages(row: Row) -> None:
    assert to_messages(row, where="row") == trl.maybe_convert_to_chatml(copy.deepcopy(row))


ROWS: list[Row] = [
    {"text": "t"},
    {"messages": [user("q"), assistant("a")]},
    {"prompt": "q"},
    {"prompt": [user("q")], "completion": [assistant("a")]},
    {"chosen": "xa", "rejected": "xb"},
    {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    {"prompt": [user("q")], "completion": [assistant("a")], "label": True},
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_conversational_when_trl_says_so(row: Row) -> None:
    found = reader_for(row, name="toys").format
    assert (found.form is Form.CONVERSATIONAL) == trl.is_conversational(row)


def test_calls_that_went_through_arrow_have_their_own_arguments_only() -> None:
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"y": 2})
    ]
    rows = [{"messages": [user("q"), {"role": "assistant", "tool_calls": [call]}]} for call in calls]
    through = Dataset.from_list(rows)
    assert through[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    # Only where rows come from is known whether None was filled in: JSON may say null.
    records = read_records(load_rows(DataConfig(), seed=0, dataset=through).rows, name="toys")
    assert [record.content[1]["tool_calls"] for record in records] == [[call] for call in calls]  # type: ignore[union-attr]


def test_rows_that_went_through_arrow_are_read_without_the_none_it_fills_in() -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    talk = [user("q"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}, assistant("a")]
    rows = [{"messages": talk, "tools": [tool]}, {"messages": [user("q"), assistant("a")], "tools": None}]
    with_tools, without = read_records(Dataset.from_list(rows), name="toys")
    assert with_tools.tools == (tool,)
    assert without.tools == ()
    assert without.content == (user("q"), assistant("a"))  # type: ignore[union-attr]
    assert with_tools.content[1] == {"role": "assistant", "content": "", "tool_calls": [call]}  # type: ignore[union-attr]


PLAIN_TALK = [user("Hi"), assistant("Hello"), user("And?"), assistant("Bye.")]
TEMPLATES = [
    ("qwen2_5_training", TextFormat.CHATML, True),
    ("qwen3_training", TextFormat.CHATML, True),
    ("llama3", TextFormat.LLAMA3, True),
    ("gemma", TextFormat.GEMMA, False),
    ("phi3", TextFormat.PHI, True),
    ("cohere", TextFormat.COHERE, True),
]
TOKENS = {"bos_token": "", "eos_token": "<|endoftext|>"}


def render(template: str, messages: list[Row], **variables: Any) -> str:
    folder = Path(trl.__file__).parent / "chat_templates"
    source = (folder / f"{template}.jinja").read_text(encoding="utf-8")
    texts, _ = render_jinja_template(conversations=[messages], chat_template=source, **TOKENS, **variables)
    return str(texts[0])


@pytest.mark.parametrize(("template", "kind", "system"), TEMPLATES)
@pytest.mark.parametrize("invited", [False, True])
def test_what_trls_chat_templates_write_is_read_back(
    template: str, kind: TextFormat, system: bool, invited: bool
) -> None:
    talk = PLAIN_TALK[:3] if invited else PLAIN_TALK
    messages = [{"role": "system", "content": "Be brief."}, *talk] if system else talk
    text = render(template, messages, add_generation_prompt=invited)
    assert recognise(text, where="row") is kind
    assert list(read_transcript(text, kind, where="row")) == messages


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def test_thoughts_and_tool_calls_of_qwen3_are_read_back() -> None:
    messages = [
        user("Add."),
        assistant("Wait.", reasoning_content="I add.", tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        assistant("7", reasoning_content="Done."),
    ]
    assert list(read_transcript(render("qwen3", messages), TextFormat.CHATML, where="row")) == messages


def test_thoughts_and_tool_calls_of_gpt_oss_are_read_back() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        user("Add."),
        {"role": "assistant", "content": "", "thinking": "I add.", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "3"},
    ]
    text = render("gptoss", messages)
    system, developer, *rest = read_transcript(text, TextFormat.HARMONY, where="row")
    assert system["role"] == "system"
    assert developer["role"] == "developer"
    assert developer["content"].startswith("# Instructions\n\nBe brief.")
    # The template writes a tool's answer as JSON.
    assert rest == [*messages[1:3], {**messages[3], "content": '"3"'}]
    (last,) = read_transcript(
        render("gptoss", [user("q"), assistant("a", thinking="hm")]), TextFormat.HARMONY, where="r"
    )[-1:]
    assert last == assistant("a", thinking="hm")
