"""What a row holds is what is trained, or the user is told: thoughts, calls, texts as they stand, muted messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from family_templates import FAMILIES, chatml
from tiny_models import build_tokenizer
from trl_ray.config.runs.dataset_config import DPOConfig, SFTConfig
from trl_ray.data.chat.training_templates import template_source
from trl_ray.data.examples.example_set import ExampleSet, ExampleTask, load_examples, stream_examples
from trl_ray.errors import DataError, ModelError

QUESTION: dict[str, Any] = {"role": "user", "content": "q"}
THOUGHT: dict[str, Any] = {"role": "assistant", "content": "yes", "reasoning_content": "because"}
QWEN3 = template_source("qwen3").replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# As the models' own: thoughts of the turns after the last question alone.
FORGETFUL = QWEN3.replace(
    "{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') -}}",
    "{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') if loop.last else text -}}",
)


def tokenizer(template: str, *tokens: str) -> PreTrainedTokenizerFast:
    made = build_tokenizer()
    made.add_tokens([token for token in tokens if token], special_tokens=True)
    made.bos_token, made.chat_template = "<|endoftext|>", template
    return made


def load(
    rows: Sequence[dict[str, Any]], made: Any, *, task: Any = ExampleTask.SUPERVISED, **options: Any
) -> ExampleSet:
    config = (SFTConfig if task is ExampleTask.SUPERVISED else DPOConfig)(model_name_or_path="m", **options)
    return load_examples(config, made, task=task, dataset=list(rows))


def texts(found: ExampleSet, made: Any, *, lane: int = 0) -> list[tuple[str, str]]:
    """Of each example: all of its text, and what of it is trained."""
    shown = []
    for example in found.examples:
        sample = example.samples[lane]
        trained = sample.completion_ids[sample.loss_mask]
        whole = made.decode([*sample.prompt_ids.tolist(), *sample.completion_ids.tolist()])
        shown.append((whole, made.decode(trained.tolist())))
    return shown


def only(rows: Sequence[dict[str, Any]], made: Any, **options: Any) -> tuple[str, str]:
    (found,) = texts(load(rows, made, **options), made)
    return found


# Thoughts

THINKING_ROWS = {
    "reasoning_content": {"messages": [QUESTION, THOUGHT]},
    "thinking": {"messages": [QUESTION, {"role": "assistant", "content": "yes", "thinking": "because"}]},
    "content": {"messages": [QUESTION, {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nyes"}]},
    "completion": {"prompt": [QUESTION], "completion": [THOUGHT]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "<think>\nbecause\n</think>\n\nyes"},
        ]
    },
    "text": {
        "text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\nbecause\n</think>\n\nyes<|im_end|>\n"
    },
}
IGNORING = {
    "chatml": template_source("chatml"),
    "smollm2": template_source("smollm2"),
    "qwen2_5": template_source("qwen2_5"),
    "qwen3_instruct_2507": template_source("qwen3_instruct_2507"),
    "deepseek_r1_distill": FAMILIES["deepseek_r1_distill"].template,
    "qwen3": QWEN3,
}


@pytest.mark.parametrize("form", THINKING_ROWS)
@pytest.mark.parametrize("family", IGNORING)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_a_thought_is_trained_before_its_answer_wherever_the_row_keeps_it(
    family: str, form: str, assistant_only: bool
) -> None:
    made = tokenizer(IGNORING[family], "<\uff5cend▁of▁sentence\uff5c>")
    whole, trained = only([THINKING_ROWS[form]], made, assistant_only_loss=assistant_only)
    end = "<\uff5cend▁of▁sentence\uff5c>" if family == "deepseek_r1_distill" else "<|im_end|>\n"
    said = "<think>\nbecause\n</think>\n\nyes" + end
    assert whole.endswith(said)
    if (family, form) == ("deepseek_r1_distill", "completion"):  # its generation prompt opens the thought
        said = said.removeprefix("<think>\n")
    assert trained == said if assistant_only else trained.endswith(said)
    assert whole.count("because") == 1


def test_a_thought_that_is_moved_into_the_content_is_told_once_with_the_rows_and_the_field() -> None:
    made = tokenizer(template_source("chatml"))
    rows = [{"messages": [QUESTION, THOUGHT]}, {"messages": [QUESTION, {**THOUGHT, "reasoning_content": None}]}]
    (told,) = load([*rows, rows[0]], made).report()
    assert "2 of 3 rows" in told and "thoughts" in told
    assert "(rows 0, 2); first: message 1, field 'reasoning_content'." in told
    assert load([{"messages": [QUESTION, THOUGHT]}], tokenizer(QWEN3)).report() == ()
    assert load([THINKING_ROWS["content"]], made).report() == ()


def test_thoughts_that_a_template_takes_out_of_earlier_turns_are_told_and_assistant_only_loss_keeps_them() -> None:
    rows = [{"messages": [QUESTION, THOUGHT, QUESTION, {**THOUGHT, "reasoning_content": "so"}]}]
    made = tokenizer(FORGETFUL)
    found = load(rows, made)
    assert "because" not in texts(found, made)[0][0]
    (told,) = found.report()
    assert "1 of 1 rows" in told and "earlier turns" in told and "(row 0)" in told
    kept = load(rows, made, assistant_only_loss=True)
    assert texts(kept, made)[0][1] == (
        "<think>\nbecause\n</think>\n\nyes<|im_end|>\n<think>\nso\n</think>\n\nyes<|im_end|>\n"
    )
    assert kept.report() == ()


def test_a_thought_beside_a_call_that_the_template_has_no_place_for_is_told() -> None:
    made = FAMILIES["mistral_v3"].tokenizer()
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = [QUESTION, {**THOUGHT, "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    found = load([{"messages": [*talk, {"role": "assistant", "content": "a"}]}], made, assistant_only_loss=True)
    assert texts(found, made)[0][1] == '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]</s>a</s>'
    (told,) = found.report()
    assert "trained without them (row 0)" in told and "message 1, field 'reasoning_content'" in told


def test_both_answers_of_a_pair_keep_their_thoughts() -> None:
    made = tokenizer(template_source("smollm2"))
    rows = [{"prompt": [QUESTION], "chosen": [THOUGHT], "rejected": [{**THOUGHT, "reasoning_content": "no reason"}]}]
    found = load(rows, made, task=ExampleTask.PAIRS)
    assert [texts(found, made, lane=lane)[0][1] for lane in (0, 1)] == [
        "<think>\nbecause\n</think>\n\nyes<|im_end|>\n",
        "<think>\nno reason\n</think>\n\nyes<|im_end|>\n",
    ]
    assert "(row 0); first: message 1, field 'reasoning_content'." in found.report()[0]


def test_a_stream_tells_each_kind_once(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer(template_source("chatml"))
    config = SFTConfig(model_name_or_path="m", dataset_streaming=True, max_steps=1, stream_window=1)
    rows = [{"messages": [QUESTION, THOUGHT]}] * 3
    examples = list(stream_examples(config, made, task=ExampleTask.SUPERVISED, dataset=rows, seed=0))
    assert len(examples) == 3
    (told,) = [record.message for record in caplog.records]
    assert "1 of 1 rows" in told and "(row 0)" in told and "field 'reasoning_content'" in told


# Other contents


def test_a_message_that_the_template_leaves_out_is_told_with_its_row() -> None:
    deaf = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    answer = {"role": "assistant", "content": "a"}
    rows = [{"messages": [QUESTION, answer]}, {"messages": [{"role": "system", "content": "s"}, QUESTION, answer]}]
    (told,) = load(rows, tokenizer(deaf)).report()
    assert "1 of 2 rows" in told and "(row 1)" in told and "first: message 0, field 'content'" in told


def test_tool_results_that_the_template_leaves_out_are_told() -> None:
    source = chatml("", "{{- turn.tool_calls | tojson if turn.tool_calls -}}").replace(
        "' + turn.content + '\n</tool", "\n</tool"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "secret"}]
    (told,) = load([{"messages": [*talk, {"role": "assistant", "content": "a"}]}], tokenizer(source)).report()
    assert "(row 0)" in told and "first: message 2, field 'content'" in told


def test_an_answer_beside_calls_that_the_template_leaves_out_is_told() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = [QUESTION, {"role": "assistant", "content": "Wait.", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    made = tokenizer(template_source("llama3_1"), "<|eot_id|>")
    (told,) = load([{"messages": [*talk, {"role": "assistant", "content": "a"}]}], made).report()
    assert "beside tool calls" in told and "first: message 1, field 'content'" in told


def test_an_answer_or_arguments_that_no_template_key_renders_are_refused_with_row_and_field() -> None:
    made = tokenizer("{{ messages[0].content }}<|im_end|>")
    with pytest.raises(ModelError, match=r"row 0 of .*, message 1, it leaves out the field 'content'"):
        load([{"messages": [QUESTION, {"role": "assistant", "content": "a"}]}], made)
    made = tokenizer(chatml("", "{{- turn.tool_calls[0].function.name if turn.tool_calls -}}"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    with pytest.raises(ModelError, match=r"row 0 of .*, message 1, it leaves out the field 'tool_calls'"):
        load([{"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}], made)


def test_a_content_that_the_template_cuts_by_its_words_is_told() -> None:
    made = tokenizer(chatml("").replace("turn.content or ''", "turn.content.split('###')[0]"))
    (told,) = load([{"messages": [QUESTION, {"role": "assistant", "content": "a ### b"}]}], made).report()
    assert "in other words" in told and "first: message 1, field 'content'" in told


# Calls

WRITTEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": null}}\n</tool_call>'


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("arguments", [{"a": 1, "b": None}, '{"a": 1, "b": null}'], ids=["object", "text"])
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_arguments_are_trained_as_an_object_with_its_nulls_however_they_are_given(family: str, arguments: Any) -> None:
    made = tokenizer(template_source(family))
    _, trained = only([{"messages": [QUESTION, call(arguments)]}], made, assistant_only_loss=True)
    assert trained.removeprefix("<think>\n\n</think>\n\n") == WRITTEN_CALL + "<|im_end|>\n"


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    made = tokenizer(template_source("qwen2_5"))
    _, trained = only([{"messages": [QUESTION, call(arguments)]}], made, assistant_only_loss=True)
    assert trained == '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>\n'


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_a_template_that_wants_json_text_and_no_content_gets_them(arguments: Any) -> None:
    made = FAMILIES["deepseek_v3"].tokenizer()
    _, trained = only([{"messages": [QUESTION, call(arguments)]}], made, assistant_only_loss=True)
    assert trained == (FAMILIES["deepseek_v3"].tools or ("",))[0]


# Texts in the model's own markup

STANDING = {
    "chatml": ("smollm2", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n", "a<|im_end|>\n"),
    "qwen": ("qwen2_5", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>", "a<|im_end|>"),
    "dated": (
        "llama3_2",
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 1 Jan 2025\n\n"
        "s<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>",
        "a<|eot_id|>",
    ),
    "harmony": (
        "gptoss",
        "<|start|>system<|message|>You are Ann.<|end|><|start|>user<|message|>q<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
        "<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
    ),
    "gemma": (
        "gemma",
        "<start_of_turn>user\nq  <end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n",
        "a<end_of_turn>\n",
    ),
}
STOPS = ("<|eot_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "</s>")


@pytest.mark.parametrize("name", STANDING)
@pytest.mark.parametrize("begin", [False, True])
def test_a_text_in_the_models_own_markup_is_trained_as_it_stands_with_one_begin_token(name: str, begin: bool) -> None:
    family, text, answer = STANDING[name]
    made = tokenizer(template_source(family), *STOPS)
    bos = "<|endoftext|>" if "bos_token" in template_source(family) else ""
    given = bos + text if begin else text
    if name == "dated":  # the text begins with the token that Llama's texts begin with, or not at all
        made.bos_token = "<|begin_of_text|>"
        bos, given = "<|begin_of_text|>", "<|begin_of_text|>" + text if begin else text
    whole, trained = only([{"text": given}], made, assistant_only_loss=True)
    assert whole == bos + text
    assert trained == answer
    assert only([{"text": given}], made)[0] == bos + text


def test_a_text_that_lacks_the_last_line_end_of_its_template_is_not_given_one() -> None:
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    made = tokenizer(template_source("chatml"))
    assert only([{"text": text}], made, assistant_only_loss=True) == (text, "a<|im_end|>")
    assert only([{"text": text + "\n"}], made, assistant_only_loss=True) == (text + "\n", "a<|im_end|>\n")


def test_prompt_and_completion_in_the_models_own_markup_stand_as_they_are_and_the_answer_is_trained() -> None:
    made = tokenizer(template_source("smollm2"))
    prompt, answer = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>\n"
    for row in ({"prompt": prompt, "completion": answer}, {"prompt": prompt, "completion": "a"}):
        assert only([row], made) == (prompt + answer, answer)
    split = {"prompt": prompt.removesuffix("<|im_start|>assistant\n"), "completion": "<|im_start|>assistant\n" + answer}
    assert only([split], made) == (prompt + answer, answer)
    pair = {"chosen": prompt + answer, "rejected": prompt + "b<|im_end|>\n"}
    found = load([pair], made, task=ExampleTask.PAIRS)
    assert [texts(found, made, lane=lane)[0] for lane in (0, 1)] == [
        (prompt + answer, answer),
        (prompt + "b<|im_end|>\n", "b<|im_end|>\n"),
    ]


def test_a_text_in_another_markup_is_written_as_the_template_does() -> None:
    made = tokenizer(template_source("gemma"), *STOPS)
    whole, trained = only([{"text": STANDING["chatml"][1]}], made, assistant_only_loss=True)
    assert whole == "<|endoftext|><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
    assert trained == "a<end_of_turn>\n"


# Weights


def weighted(**more: Any) -> list[dict[str, Any]]:
    first = {"role": "assistant", "content": "first", **more}
    return [QUESTION, first, {"role": "user", "content": "r"}, {"role": "assistant", "content": "second"}]


MUTED_ROWS = {
    "weight": {"messages": weighted(weight=0)},
    "train": {"messages": weighted(train=False)},
    "prompt": {"prompt": [QUESTION], "completion": weighted(weight=0.0)[1:]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "first", "weight": 0},
            {"from": "human", "value": "r"},
            {"from": "gpt", "value": "second", "weight": 1},
        ]
    },
}


@pytest.mark.parametrize("form", MUTED_ROWS)
@pytest.mark.parametrize(
    "template", [template_source("chatml"), chatml("", ""), QWEN3], ids=["marked", "plain", "qwen3"]
)
def test_a_message_of_weight_zero_is_context_and_not_trained(form: str, template: str) -> None:
    made = tokenizer(template)
    whole, trained = only([MUTED_ROWS[form]], made, assistant_only_loss=True)
    assert "first" in whole
    assert trained.removeprefix("<think>\n\n</think>\n\n") == "second<|im_end|>\n"
    _, heard = only([MUTED_ROWS[form]], made)
    assert "first" not in heard and heard.endswith("second<|im_end|>\n") and "<|im_start|>user\nr<|im_end|>" in heard


def test_a_question_of_weight_zero_is_not_trained_where_all_else_is() -> None:
    rows = [{"messages": [*weighted(), {**QUESTION, "train": False}, {"role": "assistant", "content": "third"}]}]
    whole, trained = only(rows, tokenizer(template_source("chatml")))
    muted = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nthird"
    assert muted in whole
    assert trained == whole.removeprefix("<|im_start|>").replace(muted, "<|im_start|>assistant\nthird")


def test_weights_of_one_and_absent_ones_change_nothing_and_others_are_refused() -> None:
    made = tokenizer(template_source("chatml"))
    plain = only([{"messages": weighted()}], made, assistant_only_loss=True)
    for more in ({"weight": 1}, {"train": True}, {"weight": None}):
        assert only([{"messages": weighted(**more)}], made, assistant_only_loss=True) == plain
    for more in ({"weight": 0.5}, {"train": "no"}):
        with pytest.raises(DataError, match=r"row 0 of .*, message 1, field '(weight|train)', must be 0 or 1"):
            load([{"messages": weighted(**more)}], made)
    silent = [{**message, "weight": 0} for message in weighted()]
    with pytest.raises(DataError, match="must have a token to train"):
        load([{"messages": silent}], made, assistant_only_loss=True).require_examples()


# Begin and end tokens


@pytest.mark.parametrize("text", ["abc", "<|endoftext|>abc", "abc<|im_end|>", "<|endoftext|>abc<|im_end|>"])
def test_a_text_that_brings_its_begin_and_end_tokens_has_each_once(text: str) -> None:
    made = tokenizer(template_source("chatml"))
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 256), ("<|im_end|>", 258)]
    )
    rows = [{"text": text}, {"prompt": text.partition("c")[0], "completion": "c" + text.partition("c")[2]}]
    for row in rows:
        found = load([row], made, dataset_text_format="plain").examples[0].samples[0]
        ids = [*found.prompt_ids.tolist(), *found.completion_ids.tolist()]
        assert ids == made("abc")["input_ids"]
    assert json.loads(json.dumps(made("abc")["input_ids"]))[0::4] == [256, 258]


def test_tokens_that_a_text_repeats_itself_are_kept() -> None:
    made = tokenizer(template_source("chatml"))
    found = load([{"text": "<|endoftext|><|endoftext|>abc"}], made, dataset_text_format="plain").examples[0].samples[0]
    assert found.prompt_ids.tolist() == [256]
    assert found.completion_ids.tolist()[0] == 256
