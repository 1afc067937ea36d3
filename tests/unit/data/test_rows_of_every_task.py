"""The same conversations in every task that reads rows: what the model reads and what it learns of them, by ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import DPOConfig, KTOConfig, ORPOConfig, PRMConfig, RewardModelConfig, SFTConfig
from trl_ray.config.sections import PromptConfig
from trl_ray.data.chat.training_templates import template_source
from trl_ray.data.examples.example_set import ExampleTask, load_examples
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.prompts.given_completions import GivenCompletions
from trl_ray.data.prompts.prompt_source import load_prompts
from trl_ray.errors import DataError
from trl_ray.types import TrainingSample

PLAIN = build_tokenizer()  # a token per byte; ChatML
QWEN = build_tokenizer()
QWEN.chat_template = template_source("qwen2_5")
END = "<|im_end|>"
HEADER = "<|im_start|>assistant\n"
Row = dict[str, Any]
Ids = tuple[list[int], list[int]]


def says(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{END}\n"


def ids(text: str) -> list[int]:
    found: list[int] = PLAIN.encode(text, add_special_tokens=False)
    return found


def of(sample: TrainingSample) -> tuple[list[int], list[int]]:
    """All ids of a sample, and those that are trained."""
    whole = [*sample.prompt_ids.tolist(), *sample.completion_ids.tolist()]
    return whole, sample.completion_ids[sample.loss_mask].tolist()


def examples(task: ExampleTask, config: Any, rows: list[Row], tokenizer: Any) -> list[list[Ids]]:
    found = load_examples(config, tokenizer, task=task, dataset=rows)
    return [[of(sample) for sample in example.samples] for example in found.examples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How a task takes a prompt, and what it makes of it: whole ids and trained ids of each sample."""

    row: Callable[[Any], Row]
    read: Callable[[list[Row], Any], list[Ids]]
    expected: Callable[[str], list[tuple[str, str]]]
    """Of the prompt's text, as far as the header of the answer."""


def prompts(rows: list[Row], tokenizer: Any, **options: Any) -> list[Ids]:
    config = PromptConfig(shuffle_dataset=False, **options)
    source = load_prompts(config, tokenizer, seed=0, max_prompt_tokens=None, dataset=rows)
    return [(source.prompt(place).token_ids.tolist(), []) for place in range(len(source))]


def given(rows: list[Row], tokenizer: Any) -> list[Ids]:
    completions = GivenCompletions(column="completion", share=1.0, seed=0, max_tokens=999)
    source = load_prompts(
        PromptConfig(shuffle_dataset=False),
        tokenizer,
        seed=0,
        max_prompt_tokens=None,
        dataset=rows,
        completions=completions,
    )
    made = []
    for place in range(len(source)):
        prompt = source.prompt(place)
        assert prompt.given_ids is not None
        made.append(([*prompt.token_ids.tolist(), *prompt.given_ids.tolist()], prompt.given_ids.tolist()))
    return made


def first(task: ExampleTask, config: Any) -> Callable[[list[Row], Any], list[Ids]]:
    return lambda rows, tokenizer: examples(task, config, rows, tokenizer)[0]


LONG = {"max_length": None}
YES, NO = [says("assistant", "yes")], [says("assistant", "no")]
ANSWER = f"yes{END}\n"
TASKS = {
    "rl": Task(row=lambda p: {"prompt": p}, read=prompts, expected=lambda text: [(text, "")]),
    "distill": Task(
        row=lambda p: {"prompt": p, "completion": YES}, read=given, expected=lambda text: [(text + ANSWER, ANSWER)]
    ),
    "sft": Task(
        row=lambda p: {"prompt": p, "completion": YES},
        read=first(ExampleTask.SUPERVISED, SFTConfig(**LONG)),
        expected=lambda text: [(text + ANSWER, ANSWER)],
    ),
    "dpo": Task(
        row=lambda p: {"prompt": p, "chosen": YES, "rejected": NO},
        read=first(ExampleTask.PAIRS, DPOConfig(**LONG)),
        expected=lambda text: [(text + ANSWER, ANSWER), (f"{text}no{END}\n", f"no{END}\n")],
    ),
    "orpo": Task(
        row=lambda p: {"prompt": p, "chosen": YES, "rejected": NO},
        read=first(ExampleTask.LIKELIHOOD_PAIRS, ORPOConfig(max_length=1 << 20)),
        expected=lambda text: [
            (text + ANSWER, ANSWER),
            (f"{text}no{END}\n", f"no{END}\n"),
            (text, text.removeprefix("<|im_start|>")),
        ],
    ),
    "kto": Task(
        row=lambda p: {"prompt": p, "completion": YES, "label": True},
        read=lambda rows, tokenizer: examples(
            ExampleTask.UNPAIRED_WITH_KL, KTOConfig(**LONG), [*rows, *rows], tokenizer
        )[0],
        expected=lambda text: [(text + ANSWER, ANSWER)],
    ),
    "reward": Task(
        row=lambda p: {"prompt": p, "chosen": YES, "rejected": NO},
        read=first(ExampleTask.REWARD_PAIRS, RewardModelConfig(**LONG)),
        expected=lambda text: [(text + ANSWER + END, END), (f"{text}no{END}\n{END}", END)],
    ),
    "steps": Task(
        row=lambda p: {"prompt": p, "completions": ["yes"], "labels": [True]},
        read=first(ExampleTask.STEPS, PRMConfig(**LONG)),
        expected=lambda text: [(f"{text}yes\n{END}", END)],
    ),
}
Q = says("user", "q")
TALKS: dict[str, tuple[list[Row], str]] = {
    "user after user": ([Q, says("user", "r")], turn("user", "q") + turn("user", "r")),
    "assistant first": ([says("assistant", "a"), Q], turn("assistant", "a") + turn("user", "q")),
    "two assistants": (
        [Q, says("assistant", "a"), says("assistant", "b"), Q],
        turn("user", "q") + turn("assistant", "a") + turn("assistant", "b") + turn("user", "q"),
    ),
    "system in the middle": (
        [Q, says("assistant", "a"), says("system", "s"), Q],
        turn("user", "q") + turn("assistant", "a") + turn("system", "s") + turn("user", "q"),
    ),
    "tool after user": ([Q, says("tool", "t")], turn("user", "q") + turn("tool", "t")),
    "empty texts": ([says("system", ""), says("user", "")], turn("system", "") + turn("user", "")),
    "parts of text": (
        [says("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        turn("user", "ab"),
    ),
    "weights": (
        [says("user", "q", weight=None), says("assistant", "a", weight=1), says("user", "q", train=True)],
        turn("user", "q") + turn("assistant", "a") + turn("user", "q"),
    ),
    "other speakers": (
        [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
        turn("system", "s") + turn("user", "q"),
    ),
    "keys of other rows": (
        [{**Q, "tool_calls": None, "name": None, "thinking": None}],
        turn("user", "q"),
    ),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("task", TASKS)
def test_a_conversation_is_asked_as_it_stands(task: str, talk: str) -> None:
    messages, text = TALKS[talk]
    made = TASKS[task].read([TASKS[task].row(messages)], PLAIN)
    assert made == [(ids(whole), ids(trained)) for whole, trained in TASKS[task].expected(text + HEADER)]


@pytest.mark.parametrize("dump", [json.dumps, str], ids=["JSON", "Python"])
@pytest.mark.parametrize("task", TASKS)
def test_a_conversation_that_a_table_holds_as_text_is_one(task: str, dump: Callable[[Any], str]) -> None:
    made = TASKS[task].read([TASKS[task].row(dump([Q]))], PLAIN)
    assert made == [(ids(whole), ids(trained)) for whole, trained in TASKS[task].expected(turn("user", "q") + HEADER)]


@pytest.mark.parametrize("task", TASKS)
def test_columns_that_are_empty_change_nothing(task: str) -> None:
    plain = TASKS[task].row([Q])
    made = TASKS[task].read([{**plain, "images": None, "tools": None, "chat_template_kwargs": None}], PLAIN)
    assert made == TASKS[task].read([plain], PLAIN)
    assert TASKS[task].read([{**plain, "images": [], "tools": "[]", "image": None}], PLAIN) == made


SCHEMA = {
    "name": "weather",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "any", "required": True}, "days": {"type": "int"}, "least": {"type": "float"}},
        "required": True,
    },
}
CALL = '<tool_call>\n{"arguments": {"city": "Rome"}, "name": "weather"}\n</tool_call>'


@pytest.mark.parametrize("task", TASKS)
def test_tools_and_calls_as_hermes_writes_them_are_read_word_for_word(task: str) -> None:
    talk = [
        {"from": "human", "value": "How is it?"},
        {"from": "gpt", "value": CALL},
        {"from": "tool", "value": '{"days": 3}'},
    ]
    row = {**TASKS[task].row(talk), "tools": json.dumps([SCHEMA])}
    for whole, _ in TASKS[task].read([row], QWEN):
        text = QWEN.decode(whole)
        for part in ('"type": "any", "required": true', '"type": "int"', '"required": true}', CALL, '{"days": 3}'):
            assert part in text


@pytest.mark.parametrize("arguments", [{"x": 1, "y": None}, '{"x": 1, "y": null}'], ids=["object", "JSON"])
@pytest.mark.parametrize("task", TASKS)
def test_arguments_of_calls_are_objects_and_keep_what_is_null(task: str, arguments: Any) -> None:
    call = {"type": "function", "id": None, "function": {"name": "f", "arguments": arguments}}
    talk = [Q, says("assistant", None, tool_calls=[call]), says("tool", "2")]
    for whole, _ in TASKS[task].read([TASKS[task].row(talk)], QWEN):
        assert '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": null}}\n</tool_call>' in QWEN.decode(whole)


@pytest.mark.parametrize("task", TASKS)
def test_values_of_a_row_reach_the_chat_template(task: str) -> None:
    made = build_tokenizer()
    made.chat_template = "{{- mood -}}" + str(PLAIN.chat_template)
    row = {**TASKS[task].row([Q]), "chat_template_kwargs": {"mood": "?"}}
    for whole, _ in TASKS[task].read([row], made):
        assert made.decode(whole).startswith("?<|im_start|>user\nq")


@pytest.mark.parametrize("task", TASKS)
def test_images_are_refused_in_one_message(task: str) -> None:
    with pytest.raises(DataError, match=r"Row 0 of the given list, field 'images' must be empty, because this run"):
        TASKS[task].read([{**TASKS[task].row([Q]), "images": ["x.png"]}], PLAIN)


# Words and columns of other tools


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "do", "input": "it", "output": "a"},
        {"instruction": "do\n\nit", "input": "", "output": "a"},
        {"conversations": [{"from": "human", "value": "do\n\nit"}, {"from": "gpt", "value": "a"}]},
        {"messages": [says("user", "do\n\nit"), says("assistant", "a")]},
    ],
)
def test_prompts_are_found_in_rows_of_other_tools(row: Row) -> None:
    assert prompts([row], PLAIN) == [(ids(turn("user", "do\n\nit") + HEADER), [])]
    assert given([row], PLAIN)[0][1] == ids(f"a{END}\n")
    rated = {**row, "label": 1}
    found = examples(ExampleTask.UNPAIRED, KTOConfig(loss_type="apo_zero_unpaired", max_length=None), [rated], PLAIN)
    assert found == [[(ids(turn("user", "do\n\nit") + f"{HEADER}a{END}\n"), ids(f"a{END}\n"))]]


@pytest.mark.parametrize(
    ("row", "mapping", "text"),
    [
        ({"question": "q", "answer": "a"}, {"question": "prompt"}, "q"),
        ({"query": "q", "response": "a"}, {"query": "prompt"}, "q"),
        ({"system": "s", "question": "q"}, {"system": "system", "question": "prompt"},
         turn("system", "s") + turn("user", "q") + HEADER),
    ],
)  # fmt: skip
def test_columns_are_mapped_and_the_option_is_named(row: Row, mapping: dict[str, str], text: str) -> None:
    with pytest.raises(DataError, match=r"dataset_prompt_column=(question|query)"):
        prompts([row], PLAIN)
    assert prompts([row], PLAIN, column_mapping=mapping) == [(ids(text), [])]


def test_an_input_beside_an_instruction_that_was_named_alone_is_told() -> None:
    config = PromptConfig(dataset_prompt_column="instruction")
    rows = [{"instruction": "do", "input": text, "output": "a"} for text in ("it", "")]
    source = load_prompts(config, PLAIN, seed=0, max_prompt_tokens=None, dataset=rows)
    (note,) = source.notes
    assert "1 of 2 rows" in note and "'input'" in note and "leave dataset_prompt_column" in note


@pytest.mark.parametrize(("label", "wanted"), [(True, True), (0, False), (1.0, True), ("False", False), ("+", True)])
def test_a_label_may_be_written_in_many_ways(label: Any, wanted: bool) -> None:
    row = {"prompt": "q", "completion": "a", "label": label}
    found = load_examples(KTOConfig(), PLAIN, task=ExampleTask.UNPAIRED, dataset=[row])
    sample_label = found.examples[0].samples[0].label
    assert sample_label is not None and sample_label.desirable is wanted
    steps = {"prompt": "q", "completions": ["a"], "labels": [label]}
    found = load_examples(PRMConfig(), PLAIN, task=ExampleTask.STEPS, dataset=[steps])
    sample_label = found.examples[0].samples[0].label
    assert sample_label is not None and sample_label.steps is not None and sample_label.steps.tolist() == [wanted]


@pytest.mark.parametrize("task", [ExampleTask.PAIRS, ExampleTask.LIKELIHOOD_PAIRS, ExampleTask.REWARD_PAIRS])
def test_ties_are_left_out_and_counted(task: ExampleTask) -> None:
    config = {ExampleTask.PAIRS: DPOConfig, ExampleTask.LIKELIHOOD_PAIRS: ORPOConfig}.get(task, RewardModelConfig)
    rows = [{"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    found = load_examples(config(), PLAIN, task=task, dataset=rows)
    assert dict(found.untrained) == {0: Untrained.TIE} and len(found.examples) == 1


def test_a_conversation_with_a_label_and_no_answer_is_named() -> None:
    rows = [{"messages": [Q, *YES], "label": True}, {"messages": [Q], "label": True}]
    with pytest.raises(DataError, match=r"Row 1 of the given list, field 'messages' must end with the answer"):
        load_examples(KTOConfig(), PLAIN, task=ExampleTask.UNPAIRED, dataset=rows)


def test_steps_go_on_from_the_assistants_words_as_they_do_where_a_model_rates_them() -> None:
    row = {"prompt": [Q, says("assistant", "So: ")], "completions": ["yes"], "labels": [True]}
    text = f"{turn('user', 'q')}{HEADER}So: yes\n{END}"
    assert TASKS["steps"].read([row], PLAIN) == [(ids(text), ids(END))]
