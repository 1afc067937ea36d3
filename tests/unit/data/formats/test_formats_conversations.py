import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ray.config.sections import DataConfig
from trl_ray.data.chat.tool_schemas import check_tools
from trl_ray.data.formats.conversations import check_completion, check_messages
from trl_ray.data.formats.shared_prompts import shared_prompt
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.errors import DataError


def said(*roles):
    return [{"role": role, "content": role} for role in roles]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def test_a_completion_has_a_message_of_the_assistant_and_may_have_others_in_any_order():
    for completion in ([CALL, *said("tool", "assistant")], [CALL, *said("tool")], said("assistant", "assistant")):
        check_completion(said("user"), completion, where="m")
    with pytest.raises(DataError, match="m must have a message of the assistant, got 'user', 'tool'"):
        check_completion(said("system"), said("user", "tool"), where="m")
    with pytest.raises(DataError, match=r"m must go on from its prompt, got all of the prompt again \(2\)"):
        check_completion(said("system", "user"), said("system", "user", "assistant"), where="m")


def test_an_assistant_may_be_silent_and_needs_no_content_when_it_calls_or_thinks():
    calls = check_messages([CALL, {"role": "assistant", "tool_calls": CALL["tool_calls"]}], where="m")
    assert [message["content"] for message in calls] == ["", ""]
    check_messages([{"role": "assistant", "content": "", "thinking": "hm"}], where="m")
    (thinks,) = check_messages([{"role": "assistant", "content": None, "reasoning_content": "hm"}], where="m")
    assert thinks["content"] == ""
    (silent,) = check_messages([{"role": "assistant", "content": ""}], where="m")
    assert silent == {"role": "assistant", "content": ""}
    with pytest.raises(DataError, match="message 0 must have text as content, got None"):
        check_messages([{"role": "assistant", "content": None}], where="m")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"x": 1, "y": None, "z": {"k": None}}, {"x": 1, "y": None, "z": {"k": None}}),
        ('{"x": 1, "y": null}', {"x": 1, "y": None}),
        (" {} ", {}),
        ("", {}),
        (None, {}),
        ("rm -r", "rm -r"),
        ("[1]", "[1]"),
    ],
)
def test_arguments_are_objects_and_what_is_null_in_them_is_kept(given, read):
    for call in ({"id": None, "function": {"name": "f", "arguments": given}}, {"name": "f", "arguments": given}):
        (message,) = check_messages([{"role": "assistant", "content": None, "tool_calls": [call]}], where="m")
        function = {"name": "f", "arguments": read}
        assert message["tool_calls"] == [{"function": function} if "function" in call else function]


def test_arguments_that_arrow_filled_in_are_left_out_of_calls(tmp_path):
    def talk(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}

    rows = [talk({"x": 1, "z": {"k": 1}}), talk({"y": 2})]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "a.parquet")
    for source in (made, str(tmp_path / "a.parquet")):
        given = source if isinstance(source, datasets.Dataset) else None
        config = DataConfig(dataset_name=None if given is not None else source)
        found = load_rows(config, seed=0, dataset=given).rows
        calls = [check_messages(row["messages"], where="m")[1]["tool_calls"] for row in found]
        assert [call["function"]["arguments"] for (call,) in calls] == [{"x": 1, "z": {"k": 1}}, {"y": 2}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_calls": "f"}, "must have a list as tool_calls"),
        ({"tool_calls": [{"function": {}}]}, "tool call 0 must name its function"),
        ({"role": "user"}, "must be the assistant's to call tools, got role 'user'"),
    ],
)
def test_a_tool_call_that_is_none_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        check_messages([{**CALL, **change}], where="m")


def tool(**parameters):
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


GOOD = tool(
    type="object",
    properties={"x": {"type": ["integer", "null"]}, "y": {"type": "array", "items": {"type": "string"}}},
    required=["x"],
)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"properties": {"x": {"type": "int", "required": True}, "y": {"type": "float"}}},
        {"type": "dict", "properties": {"x": {"type": "any"}}, "required": ["x", "z"]},
        {"type": "array", "items": "string"},
        {"x": "a number, optional"},
        {"required": True},
    ],
)
def test_parameters_are_taken_as_they_are_written_down(schema):
    given = tool(**schema)
    assert check_tools([given, given], where="t") == (given, given)
    assert check_tools(given, where="t") == (given,)


def test_tools_are_read_from_lists_and_from_json_without_arrows_none():
    filled = {**GOOD, "strict": None}
    assert check_tools([filled], where="t") == (GOOD,)
    assert check_tools(json.dumps([GOOD]), where="t") == (GOOD,)
    assert check_tools([{"name": "bare", "parameters": {}}], where="t") == ({"name": "bare", "parameters": {}},)
    assert check_tools(None, where="t") == check_tools("", where="t") == check_tools([], where="t") == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{", "t must be a list of tools or JSON text of one, column 3 is broken"),
        ("{}", "t must be a list of tools, got {}"),
        ([7], "t, tool 0 must be an object that describes a function, got int 7"),
        ([{"type": "function", "function": {}}], "t, tool 0 must have a function with a name"),
        ([{"type": "retrieval", "function": {"name": "f"}}], "must have the type 'function', got 'retrieval'"),
    ],
)
def test_what_is_no_tool_is_refused_with_its_place(tools, message):
    with pytest.raises(DataError) as caught:
        check_tools(tools, where="t")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is red", "The sky is"),
        ("ab", "abc", "a"),
        ("x", "y", ""),
        (" a", "ba", ""),
        ("a ", "b", ""),
    ],
)
def test_the_shared_prompt_of_two_texts_ends_before_the_space_where_they_part(chosen, rejected, prompt):
    assert shared_prompt(chosen, rejected).prompt == prompt


@given(prompt=st.text("ab ", max_size=6), chosen=st.text("ab ", min_size=1), rejected=st.text("ab ", min_size=1))
def test_a_split_pair_puts_together_what_it_took_apart_and_leaves_no_answer_empty(prompt, chosen, rejected):
    chosen, rejected = prompt + chosen, prompt + rejected
    split = shared_prompt(chosen, rejected)
    assert (split.prompt + split.chosen, split.prompt + split.rejected) == (chosen, rejected)
    assert split.chosen
    assert split.rejected


def test_a_conversation_that_goes_on_keeps_the_answer_on_both_sides():
    short, long = said("user", "assistant"), said("user", "assistant", "user", "assistant")
    split = shared_prompt(short, long)
    assert (split.prompt, split.chosen, split.rejected) == (long[:1], short[1:], long[1:])
