"""What a row holds is what the model is given to go on from, or the user is told; the same for what judges read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from fakes import completion
from family_templates import FAMILIES
from tiny_models import build_tokenizer
from trl_ray.config.losses.distillation_options import RepromptConfig
from trl_ray.config.reward_model_options import RewardModelKind
from trl_ray.config.sections import DatasetConfig, PromptConfig
from trl_ray.data.chat.chat_rendering import ChatFormat
from trl_ray.data.chat.training_templates import template_source
from trl_ray.data.prompts.given_completions import GivenCompletions
from trl_ray.data.prompts.prompt_source import PromptSource, load_prompts
from trl_ray.data.prompts.reprompts import Attempt, reprompt_group
from trl_ray.data.prompts.reward_inputs import ReadingRules, RewardReader
from trl_ray.errors import DataError, ModelError
from trl_ray.types import Prompt

PLAIN = build_tokenizer()  # a token per byte; ChatML
QWEN = build_tokenizer()
QWEN.chat_template = template_source("qwen2_5")
BOS, EOS = "<|endoftext|>", "<|im_end|>"
HEADER = "<|im_start|>assistant\n"


def load(
    rows: list[dict[str, Any]], tokenizer: Any = PLAIN, completions: GivenCompletions | None = None, **options: Any
) -> PromptSource:
    config = PromptConfig(shuffle_dataset=False, **options)
    return load_prompts(config, tokenizer, seed=0, max_prompt_tokens=None, dataset=rows, completions=completions)


def texts(source: PromptSource, tokenizer: Any = PLAIN) -> list[str]:
    return [tokenizer.decode(source.prompt(place).token_ids.tolist()) for place in range(len(source))]


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{EOS}\n"


def wrapped(single: str) -> Any:
    made = build_tokenizer()
    made.bos_token = BOS
    tokens = [(token, made.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return made


# Begin and end of sequence


@pytest.mark.parametrize(
    ("single", "before"), [("$A", ""), (f"{BOS} $A", BOS), (f"$A {EOS}", ""), (f"{BOS} $A {EOS}", BOS)]
)
def test_a_text_begins_once_and_is_not_ended_before_its_answer(single: str, before: str) -> None:
    made = wrapped(single)
    assert texts(load([{"prompt": "a"}, {"prompt": f"{BOS}a"}], made), made) == [f"{before}a", f"{BOS}a"]
    assert texts(load([{"prompt": f"a{EOS}"}], made), made) == [f"{before}a{EOS}"]


def test_what_a_self_teacher_and_a_judge_read_begins_once_too() -> None:
    made = wrapped(f"{BOS} $A {EOS}")
    prompt = Prompt(prompt_id="0:0", token_ids=np.zeros(1, np.int32), text=f"{BOS}q")
    attempts = [
        Attempt(token_ids=np.asarray(made.encode(t, add_special_tokens=False), np.int32), reward=r)
        for t, r in (("a", 0.0), ("b", 1.0))
    ]
    config = RepromptConfig(reprompt_template="{prompt}{solution}", solution_template="+{successful_previous_attempt}")
    (first, _) = reprompt_group(prompt, attempts, config=config, tokenizer=made, chat=ChatFormat(template=""))
    assert made.decode(first.prompt_ids.tolist()) == f"{BOS}q+b"
    read = RewardReader(made, ReadingRules(kind=RewardModelKind.SEQUENCE)).read(prompt, completion("b"))
    assert made.decode(read.token_ids.tolist()) == f"{BOS}qb{EOS}"
    steps = RewardReader(made, ReadingRules(kind=RewardModelKind.STEPS)).read(prompt, completion("b"))
    assert made.decode(steps.token_ids.tolist()) == f"{BOS}qb\n"


# Tools and values for the template

TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


def test_a_rows_tools_are_in_its_prompt() -> None:
    ask = [says("user", "q")]
    rows = [{"prompt": ask, "tools": tools} for tools in ([TOOL], json.dumps([TOOL]), None, [], "")]
    shown = texts(load(rows, QWEN), QWEN)
    assert [json.dumps(TOOL) in text for text in shown] == [True, True, False, False, False]
    assert shown[2] == shown[3] == shown[4]
    assert all(text.endswith(f"{turn('user', 'q')}{HEADER}") for text in shown)


def test_reward_functions_get_the_tools_as_they_came() -> None:
    assert load([{"prompt": [says("user", "q")], "tools": [TOOL]}], QWEN).prompt(0).columns == {"tools": [TOOL]}


def test_tools_that_a_template_does_not_write_are_no_reason_to_go_on() -> None:
    with pytest.raises(ModelError, match=r"leaves out the tool 'weather' of Row 0 .*field 'tools'"):
        load([{"prompt": [says("user", "q")], "tools": [TOOL]}])
    for tools in (3, ["weather"]):
        with pytest.raises(DataError, match=r"Row 0 .*field 'tools'.* must be .*column_mapping=\{tools: functions\}"):
            load([{"prompt": [says("user", "q")], "tools": tools}], QWEN)


def test_tools_beside_a_prompt_of_text_are_told() -> None:
    (note,) = load([{"prompt": "q", "tools": [TOOL]}, {"prompt": "q", "tools": None}]).notes
    assert "1 of 2 rows" in note and "'tools'" in note and "list of messages" in note


def test_a_rows_values_for_the_template_go_before_the_runs() -> None:
    made = build_tokenizer()
    made.chat_template = "{{ messages[0].content }}{{ mood }}{{ tone }}"
    rows = [
        {"prompt": [says("user", "q")], "chat_template_kwargs": {"mood": "!", "tone": None}},
        {"prompt": [says("user", "q")], "chat_template_kwargs": None},
    ]
    assert texts(load(rows, made, chat_template_kwargs={"mood": "?", "tone": "."}), made) == ["q!.", "q?."]
    with pytest.raises(DataError, match=r"Row 0 .*'chat_template_kwargs', must be an object"):
        load([{"prompt": [says("user", "q")], "chat_template_kwargs": "x"}], made)


def test_the_datasets_own_completion_is_told_of_the_same_tools() -> None:
    rows = [{"prompt": [says("user", "q")], "completion": [says("assistant", "a")], "tools": [TOOL]}]
    given = GivenCompletions(column="completion", share=1.0, seed=0, max_tokens=99)
    prompt = load(rows, QWEN, given).prompt(0)
    assert QWEN.decode(prompt.token_ids.tolist()) == texts(load(rows, QWEN), QWEN)[0]
    assert prompt.given_ids is not None and QWEN.decode(prompt.given_ids.tolist()) == f"a{EOS}\n"


def test_a_self_teacher_and_a_judge_are_told_of_the_same_tools() -> None:
    columns = {"tools": [TOOL], "chat_template_kwargs": {"x": 1}}
    prompt = Prompt(prompt_id="0:0", token_ids=np.zeros(1, np.int32), messages=(says("user", "q"),), columns=columns)
    config = RepromptConfig(reprompt_template="{prompt}{solution}", solution_template="+{successful_previous_attempt}")
    attempts = [Attempt(token_ids=np.asarray(QWEN.encode(t), np.int32), reward=r) for t, r in (("a", 0.0), ("b", 1.0))]
    chat = ChatFormat(template=str(QWEN.chat_template))
    (first, _) = reprompt_group(prompt, attempts, config=config, tokenizer=QWEN, chat=chat)
    text = QWEN.decode(first.prompt_ids.tolist())
    assert json.dumps(TOOL) in text and text.endswith(f"{turn('user', 'q+b')}{HEADER}")
    read = RewardReader(QWEN, ReadingRules(kind=RewardModelKind.SEQUENCE)).read(prompt, completion("b"))
    text = QWEN.decode(read.token_ids.tolist())
    assert json.dumps(TOOL) in text and text.endswith(f"{turn('user', 'q')}{turn('assistant', 'b')}")


# Thoughts, calls, results, names

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}


def test_thoughts_without_a_place_are_put_into_the_content_and_told() -> None:
    talk = [says("user", "q"), says("assistant", "a", reasoning_content="why"), says("user", "r")]
    source = load([{"prompt": talk}, {"prompt": talk[:1]}])
    answer = turn("assistant", "<think>\nwhy\n</think>\n\na")
    assert texts(source)[0] == f"{turn('user', 'q')}{answer}{turn('user', 'r')}{HEADER}"
    (note,) = source.notes
    assert "1 of 2 prompts" in note and "in the content" in note
    assert note.endswith("(row 0); first: message 1, field 'reasoning_content'.")


def test_thoughts_that_a_template_takes_out_of_earlier_turns_are_told_for_the_model_does_not_read_them() -> None:
    made = FAMILIES["deepseek_r1_distill"].tokenizer()
    made.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = [says("user", "q"), says("assistant", "<think>\nwhy\n</think>\n\na"), says("user", "r")]
    source = load([{"prompt": talk}], made)
    assert "why" not in texts(source, made)[0]
    (note,) = source.notes
    assert "thoughts in earlier turns" in note and "(row 0); first: message 1, field 'content'" in note


@pytest.mark.parametrize("arguments", [{"x": 1, "y": None}, '{"x": 1, "y": null}'])
def test_calls_are_written_alike_whether_their_arguments_are_json_or_an_object(arguments: Any) -> None:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}}
    talk = [says("user", "q"), says("assistant", None, tool_calls=[call]), says("tool", "2")]
    shown = texts(load([{"prompt": talk}], QWEN), QWEN)[0]
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": null}}\n</tool_call>' in shown
    assert "<tool_response>\n2\n</tool_response>" in shown


def test_calls_that_a_template_does_not_write_are_no_reason_to_go_on() -> None:
    talk = [says("user", "q"), says("assistant", "", tool_calls=[CALL]), says("tool", "2")]
    with pytest.raises(ModelError, match=r"leaves out the call of 'f' of Row 0 .*field 'tool_calls'"):
        load([{"prompt": talk}])


def test_a_result_that_a_template_does_not_write_is_told() -> None:
    made = build_tokenizer()
    made.chat_template = (
        "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    source = load([{"prompt": [says("user", "q"), says("tool", "2"), says("user", "r")]}], made)
    (note,) = source.notes
    assert "leaves out" in note and note.endswith("(row 0); first: message 1, field 'content'.")


def test_rows_of_several_datasets_that_a_template_changes_are_each_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        row = {"prompt": [says("user", "q", mood="glad"), says("user", "r", mood="sad")]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    sources = [DatasetConfig(path=str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")]
    config = PromptConfig(shuffle_dataset=False, datasets=sources)
    (note,) = load_prompts(config, PLAIN, seed=0, max_prompt_tokens=None).notes
    assert note.startswith("2 of 2 prompts") and "(rows 0, 1)" in note


@pytest.mark.parametrize("key", ["name", "mood", "images", "think"])
def test_a_field_of_a_message_that_a_template_does_not_read_is_told_once_with_how_many(key: str) -> None:
    rows = [{"prompt": [says("user", "q", **{key: "Ann"}), says("user", "r", **{key: "Bob"})]}] * 3
    (note,) = load(rows).notes
    assert "3 of 3 prompts" in note and "does not read" in note
    assert note.endswith(f"(rows 0, 1, 2); first: message 0, field {key!r}.") or f"field {key!r}" in note


def test_a_field_that_a_template_reads_is_as_it_should_be() -> None:
    made = build_tokenizer()
    made.chat_template = "{% for m in messages %}<{{ m.name or m.role }}>{{ m.content }}{% endfor %}"
    source = load([{"prompt": [says("user", "q", name="Ann")]}], made)
    assert (texts(source, made), source.notes) == (["<Ann>q"], ())


def test_weights_of_a_prompts_messages_are_nothing_to_be_told() -> None:
    source = load([{"prompt": [says("user", "q", weight=0), says("assistant", "a", train=False), says("user", "r")]}])
    assert source.notes == ()


def test_images_in_a_message_are_refused() -> None:
    with pytest.raises(DataError, match=r"message 0 must have parts of text alone.*type 'image'"):
        load([{"prompt": [says("user", [{"type": "image"}, {"type": "text", "text": "q"}])]}])
    assert texts(load([{"prompt": [says("user", [{"type": "text", "text": "q"}])]}])) == [turn("user", "q") + HEADER]


def test_a_prompt_that_goes_on_from_the_assistants_words_keeps_all_it_holds() -> None:
    talk = [says("user", "q"), says("assistant", "a", reasoning_content="why"), says("assistant", "so")]
    shown = texts(load([{"prompt": talk}]))[0]
    assert "why" in shown and shown.endswith(f"{HEADER}so")


def test_what_a_judges_own_template_leaves_out_is_known_and_thoughts_stay() -> None:
    judge = build_tokenizer()
    judge.chat_template = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    reader = RewardReader(judge, ReadingRules(kind=RewardModelKind.SEQUENCE))
    talk = (
        says("system", "s"),
        says("user", "q", name="Ann"),
        says("assistant", "a", reasoning_content="why"),
        says("user", "r"),
    )
    prompt = Prompt(prompt_id="0:0", token_ids=np.zeros(1, np.int32), messages=talk)
    told = [(finding.kind.value, finding.message, finding.field) for finding in reader.findings(prompt)]
    assert told == [("moved_thought", 2, "reasoning_content"), ("context", 0, "content"), ("unread", 1, "name")]
    text = judge.decode(reader.read(prompt, completion("b")).token_ids.tolist())
    assert text == "<user>q<assistant><think>\nwhy\n</think>\n\na<user>r<assistant>b"
    assert reader.findings(Prompt(prompt_id="0:0", token_ids=np.zeros(1, np.int32), text="q")) == ()
