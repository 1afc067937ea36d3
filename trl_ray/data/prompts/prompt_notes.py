"""What a user should know of the prompts of a dataset: a sentence for each kind of thing, with how many rows and which.

drafts, rows, how many tokens were cut ─► prompt_notes ─► sentences
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trl_ray.data.chat.faithful_rendering import Finding, Unrendered
from trl_ray.data.chat.row_format import TOOLS
from trl_ray.data.formats.detection import SYSTEM_TEXTS
from trl_ray.data.prompts.prompt_drafts import PromptDraft, PromptRow
from trl_ray.data.validation import show_rows

_UNRENDERED = {
    Unrendered.MOVED_THOUGHT: "thoughts that the chat template has no place for: the model reads them in the content, "
    "between <think> and </think>",
    Unrendered.EARLIER_THOUGHT: "thoughts in earlier turns, which the chat template takes out, so that the model does "
    "not read them: put them into the content, or set another chat_template",
    Unrendered.THOUGHT: "thoughts that the chat template has no place for, so that the model does not read them: set "
    "another chat_template",
    Unrendered.CONTENT: "an answer beside tool calls that the chat template leaves out, so that the model does not "
    "read it: set another chat_template",
    Unrendered.CONTEXT: "a message that the chat template leaves out, so that the model does not read it: set another "
    "chat_template, or move its text",
    Unrendered.CHANGED: "a message that the chat template writes in other words: look at it, or set another "
    "chat_template",
    Unrendered.UNREAD: "a message with a field that the chat template does not read, so that the model does not know "
    "it: set another chat_template, or move it to the content",
}


def prompt_notes(
    name: str, drafts: Sequence[PromptDraft], rows: Sequence[PromptRow], cut: Sequence[int], total: int
) -> Iterator[str]:
    """The sentences about one dataset; none when all is well.

    Args:
        name: of the dataset.
        drafts: of all rows that could be read.
        rows: those that prompts are made of.
        cut: tokens that `max_prompt_length` cut off each draft.
        total: tokens of all drafts before that.
    """
    yield from _about_columns(name, drafts)
    begun = sum(row.messages is not None and row.messages[-1]["role"] == "assistant" for row in rows)
    if begun:
        yield (
            f"{begun} of {len(drafts)} prompts of {name} end with a message of the assistant, which completions go on "
            "from. Remove it where it is the answer."
        )
    yield from _about_template(name, drafts)
    yield from _about_lengths(name, rows, cut, total)


def _about_columns(name: str, drafts: Sequence[PromptDraft]) -> Iterator[str]:
    split = sum(draft.is_split for draft in drafts)
    if split:
        yield (
            f"{split} of {len(drafts)} rows of {name} are conversations that end with an answer: the prompt is what "
            "stands before the assistant's last turn."
        )
    asked = sum(draft.is_asked for draft in drafts)
    if asked:
        yield (
            f"{asked} of {len(drafts)} prompts of {name} are texts: each is the user's message after system_prompt, "
            "rendered by the chat template."
        )
    for column in SYSTEM_TEXTS:
        count = sum(isinstance(text := draft.columns.get(column), str) and bool(text.strip()) for draft in drafts)
        if count:
            yield (
                f"{count} of {len(drafts)} rows of {name} have a text in the column {column!r}, with which no prompt "
                f"begins: column_mapping={{{column}: system}} makes it the first message."
            )
    beside = sum(
        isinstance(text := draft.columns.get("input"), str) and bool(text.strip()) and text not in draft.text
        for draft in drafts
    )
    if beside:
        yield (
            f"{beside} of {len(drafts)} rows of {name} have a text in the column 'input', which stands in no prompt. "
            "Where instruction and input are one prompt, leave dataset_prompt_column and column_mapping out."
        )
    unseen = sum(isinstance(draft.prompt, str) and bool(draft.columns.get(TOOLS)) for draft in drafts)
    if unseen:
        yield (
            f"{unseen} of {len(drafts)} rows of {name} have {TOOLS!r}, for which prompts of plain text have no place, "
            "so that the model does not know them. Make each prompt a list of messages."
        )


def _about_template(name: str, drafts: Sequence[PromptDraft]) -> Iterator[str]:
    found = {draft.place: draft.findings for draft in drafts if draft.findings}
    return unrendered_notes(found, what=f"{len(drafts)} prompts of {name}")


def unrendered_notes(findings: Mapping[int, Sequence[Finding]], *, what: str) -> Iterator[str]:
    """A sentence for each kind of thing that a chat template does not write as rows have it.

    Args:
        findings: by number of the row.
        what: all rows that were looked at, such as ``10 prompts of the dataset``.
    """
    for kind, text in _UNRENDERED.items():
        found = [(row, finding) for row, several in findings.items() for finding in several if finding.kind is kind]
        if found:
            first = found[0][1]
            rows = list(dict.fromkeys(row for row, _ in found))
            yield (
                f"{len(rows)} of {what} have {text} ({show_rows(rows)}); first: message {first.message}, field "
                f"{first.field!r}."
            )


def _about_lengths(name: str, rows: Sequence[PromptRow], cut: Sequence[int], total: int) -> Iterator[str]:
    if any(cut):
        yield (
            f"{sum(cut)} of {total} ({sum(cut) / total:.1%}) tokens of the prompts of {name} are beyond "
            f"max_prompt_length and cut off their beginnings, in {sum(map(bool, cut))} rows."
        )
    given = [row.given for row in rows if row.given is not None]
    lost = sum(row.num_cut for row in given)
    if lost:
        whole = sum(len(row.token_ids) for row in given) + lost
        yield (
            f"{lost} of {whole} ({lost / whole:.1%}) tokens of the completions of {name} are beyond "
            f"max_completion_length and cut off, in {sum(row.num_cut > 0 for row in given)} rows."
        )
