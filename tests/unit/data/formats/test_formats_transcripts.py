import json

import pytest

from trl_ray.data.formats.transcripts import TextFormat, read_transcript, recognise
from trl_ray.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi, what is 1+1?"},
    {"role": "assistant", "content": "It is 2.\n\nReally."},
    {"role": "user", "content": "And <b>2+2</b>?"},
    {"role": "assistant", "content": "4"},
]


# Each writer is the documented layout of its format; what it writes must be read back exactly.
def chatml(messages):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def llama3(messages):
    turns = (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages)
    return "<|begin_of_text|>" + "".join(turns)


def zephyr(messages):
    return "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in messages)


def phi(messages):
    return "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages) + "<|endoftext|>"


def phi_without_line_breaks(messages):
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


def gemma(messages):
    names = {"user": "user", "assistant": "model"}
    turns = (f"<start_of_turn>{names[m['role']]}\n{m['content']}<end_of_turn>\n" for m in messages)
    return "<bos>" + "".join(turns)


def cohere(messages):
    names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}
    turn = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>{}<|END_OF_TURN_TOKEN|>"
    return "<BOS_TOKEN>" + "".join(turn.format(names[m["role"]], m["content"]) for m in messages)


def llama2(messages):
    first, text = "", ""
    for message in messages:
        if message["role"] == "system":
            first = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            text += f"<s>[INST] {first}{message['content']} [/INST]"
            first = ""
        else:
            text += f" {message['content']} </s>"
    return text


def mistral(messages):
    written = {
        "system": "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
        "user": "[INST] {} [/INST]",
        "assistant": " {}</s>",
    }
    return "<s>" + "".join(written[m["role"]].format(m["content"]) for m in messages)


def vicuna(messages):
    written = {"system": "{} ", "user": "USER: {} ", "assistant": "ASSISTANT: {}</s>"}
    return "".join(written[m["role"]].format(m["content"]) for m in messages)


def harmony(messages):
    written = {
        "system": "<|start|>system<|message|>{}<|end|>",
        "user": "<|start|>user<|message|>{}<|end|>",
        "assistant": "<|start|>assistant<|channel|>final<|message|>{}<|return|>",
    }
    return "".join(written[m["role"]].format(m["content"]) for m in messages)


WRITERS = [
    (TextFormat.CHATML, chatml),
    (TextFormat.LLAMA2, llama2),
    (TextFormat.LLAMA3, llama3),
    (TextFormat.MISTRAL, mistral),
    (TextFormat.VICUNA, vicuna),
    (TextFormat.ZEPHYR, zephyr),
    (TextFormat.GEMMA, gemma),
    (TextFormat.PHI, phi),
    (TextFormat.PHI, phi_without_line_breaks),
    (TextFormat.COHERE, cohere),
    (TextFormat.HARMONY, harmony),
]
# What invites the assistant to answer, after a user's turn.
INVITATIONS = {
    TextFormat.CHATML: "<|im_start|>assistant\n",
    TextFormat.LLAMA3: "<|start_header_id|>assistant<|end_header_id|>\n\n",
    TextFormat.VICUNA: "ASSISTANT:",
    TextFormat.ZEPHYR: "<|assistant|>\n",
    TextFormat.GEMMA: "<start_of_turn>model\n",
    TextFormat.COHERE: "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    TextFormat.HARMONY: "<|start|>assistant",
}


def messages_of(text, **options):
    return list(read_transcript(text, recognise(text, where="t"), where="t", **options))


@pytest.mark.parametrize(("kind", "write"), WRITERS)
def test_what_a_format_writes_is_recognised_and_read_back_exactly(kind, write):
    before = [] if kind is TextFormat.GEMMA else [SYSTEM]  # Gemma has no system
    text = write(before + TALK)
    assert recognise(text, where="t") is kind
    assert messages_of(text) == before + TALK
    assert write(messages_of(text)) == text


@pytest.mark.parametrize(("kind", "write"), WRITERS)
def test_a_conversation_without_a_system_and_an_invitation_to_answer_are_read(kind, write):
    text = write(TALK[:3])
    ended = text.removesuffix("<|endoftext|>") + INVITATIONS.get(
        kind, "<|assistant|>\n" if kind is TextFormat.PHI else ""
    )
    assert messages_of(ended) == TALK[:3]
    assert messages_of(ended.rstrip()) == TALK[:3]


ENDS = {
    chatml: "<|im_end|>\n",
    llama2: " </s>",
    llama3: "<|eot_id|>",
    mistral: "</s>",
    zephyr: "</s>\n",
    gemma: "<end_of_turn>\n",
    phi: "<|end|>\n<|endoftext|>",
    cohere: "<|END_OF_TURN_TOKEN|>",
    harmony: "<|return|>",
}


@pytest.mark.parametrize(("write", "end"), ENDS.items())
def test_an_answer_that_stops_without_its_end_is_refused_unless_that_is_allowed(write, end):
    whole = write(TALK)
    cut = whole.removesuffix(end)
    assert cut != whole
    with pytest.raises(DataError, match="the last one stops after '4'"):
        messages_of(cut)
    assert messages_of(cut, closed=False) == TALK


def test_vicuna_needs_no_end_of_an_answer():
    assert messages_of("USER: Hi ASSISTANT: Hello\nUSER: Bye ASSISTANT: See you") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]


def test_mistral_is_read_in_its_version_without_spaces():
    assert messages_of("<s>[INST]Hi[/INST]Hello</s>[INST]Bye[/INST]") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}
JSON = json.dumps(CALL["function"]["arguments"])


def test_chatml_thoughts_calls_and_tool_responses_become_keys_and_messages():
    call = f'<tool_call>\n{{"name": "add", "arguments": {JSON}}}\n</tool_call>'
    text = (
        "<|im_start|>user\nAdd.<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nI add.\n</think>\n\nWait.\n{call}\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n3<|im_end|>\n"
    )
    assert messages_of(text) == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Wait.", "reasoning_content": "I add.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "3"},
    ]


def test_harmony_gathers_thoughts_preamble_and_call_into_one_message():
    text = (
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>Add.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>I add.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{JSON}<|call|>"
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>3<|end|>"
        f"<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{JSON}<|call|>"
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>3<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Done.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>3<|return|>"
    )
    assert messages_of(text) == [
        {"role": "developer", "content": "# Instructions\n\nBe brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "thinking": "I add.", "content": "Wait.", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "thinking": "Done.", "content": "3"},
    ]


def test_a_users_words_beside_a_tool_response_stay_the_users():
    content = "See: <tool_response>\n3\n</tool_response>"
    assert messages_of(f"<|im_start|>user\n{content}<|im_end|>") == [{"role": "user", "content": content}]


def test_harmonys_calls_with_text_keep_it_and_a_preamble_before_an_answer_is_a_message_of_its_own():
    text = (
        "<|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>3<|return|>"
        "<|start|>assistant<|channel|>commentary to=functions.run<|message|>[1]<|call|>"
        "<|start|>assistant<|channel|>commentary to=functions.run<|message|>print(1)<|call|>"
    )
    first, second, *calls = messages_of(text)
    assert (first, second) == ({"role": "assistant", "content": "Wait."}, {"role": "assistant", "content": "3"})
    assert [call["tool_calls"][0]["function"]["arguments"] for call in calls] == ["[1]", "print(1)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<|start|>assistant<|channel|>analysis<|message|>a<|end|>"
            "<|start|>assistant<|channel|>analysis<|message|>b<|end|>",
            "one analysis message per answer at character 56",
        ),
        ("<|start|>user<|message|>", "a message with content at character 0"),
        ("<|im_start|>boss\nHi<|im_end|>\n", "must have a turn of one of system, user, assistant, tool, developer at"),
        (
            "<|im_start|>user\nHi<|im_end|>\nlost<|im_start|>user\nA<|im_end|>",
            "the start of a turn at character 30, got",
        ),
        ("<|im_start|>user\nHi\n<|im_start|>assistant\nA<|im_end|>", "the end of the turn before it at character 20"),
        ("<|im_start|>user\nHi<|im_start|>there<|im_end|>", "the end of the turn before it at character 19"),
        ("<|im_start|>user\nHi<|im_end|>\nlost", "the start of a turn at character 30, got 'lost'"),
        ("<|im_start|>assistant\n<tool_call>{</tool_call><|im_end|>", "JSON in <tool_call>, column 2 is broken"),
        ("<|im_start|>assistant\n<tool_call>{}</tool_call><|im_end|>", "an object with name and arguments"),
        (
            '<|im_start|>assistant\n<tool_call>{"name": "f"}</tool_call>more<|im_end|>',
            "nothing after its tool calls, got 'more'",
        ),
        ("[INST] a [/INST] b [INST] c [/INST] d</s>", "no marker inside a turn at character 19"),
        ("[INST] a [/INST][TOOL_CALLS] [{}]</s>", "no marker inside a turn at character 16, got '[TOOL_CALLS]"),
        ("[INST] a [/INST] b</s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT]", "the system's text in the first turn only"),
        ("USER: a ASSISTANT: b ASSISTANT: c", "the other speaker's turn at character 20"),
        ("<|start|>boss<|message|>Hi<|end|>", "a message of system, developer, user, assistant or a function"),
        ("<|start|>assistant<|channel|>inner<|message|>Hi<|end|>", "a channel analysis, commentary or final"),
        (
            "<|start|>assistant<|channel|>analysis<|message|>Hm<|end|>",
            "an answer or a tool call after the thoughts 'Hm'",
        ),
        ("<|start|>user<|message|>Hi<|start|>user<|message|>A<|end|>", "the end of the message before it"),
        ("<|start|>assistant<|channel|>commentary to=web<|message|>{}<|call|>", "a call to=functions.NAME"),
    ],
)
def test_text_that_breaks_its_format_is_refused_with_place_and_quote(text, message):
    with pytest.raises(DataError) as caught:
        messages_of(text)
    assert str(caught.value).startswith("t must")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "A story.",
        "if a < b: print('<b>')  # USER input",
        "two texts<|endoftext|>in one",
        "### Instruction:\nAdd.\n\n### Response:\n2",
        "\n\nHuman: Hi\n\nAssistant: Hello",
        "ASSISTANT: a USER: b",
    ],
)
def test_words_and_end_tokens_alone_make_no_template(text):
    assert recognise(text, where="t") is TextFormat.PLAIN


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("<|system|>Hi<|user|>there", "<|system|>"),
        ("<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Hi", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
        ("Look: <|im_start|>user\nHi<|im_end|>", "<|im_start|>"),
        ("<|im_start|>user<|im_sep|>Hi<|im_end|>", "<|im_start|>"),
        ("Answer: [INST] Hi [/INST]", "[INST]"),
    ],
)
def test_markers_of_no_known_format_are_refused_with_the_first_of_them(text, seen):
    with pytest.raises(DataError) as caught:
        recognise(text, where="Row 3 of toys, field 'text'")
    assert str(caught.value).startswith("Row 3 of toys, field 'text' must be plain text or written in one of chatml, ")
    assert f"has {seen!r} at character {text.index(seen)}" in str(caught.value)
