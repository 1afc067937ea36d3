"""Why rows are in no example, and what a user is told about all rows."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence

from trl_ray.data.chat.faithful_rendering import Finding, Unrendered

_SHOWN_ROWS = 10


class Untrained(enum.StrEnum):
    """Why nothing of a row is trained."""

    NO_TARGET = "no_target"
    """Nothing of it would be trained even if nothing were cut: no assistant turn, or a single token."""
    TRUNCATED = "truncated"
    """Only what the limits on lengths cut off would have been trained."""
    TOO_LONG = "too_long"
    """It is longer than `max_length`, and of its kind nothing may be cut off: a reward is read at the last token."""
    NO_PARTNER = "no_partner"
    """There is no other row whose completion it could be compared with, to estimate the KL."""


_REASONS = {
    Untrained.NO_TARGET: "have no token to train and are left out ({rows}): fill them or remove them.",
    Untrained.TRUNCATED: "have none within max_length and are left out ({rows}): raise max_length.",
    Untrained.TOO_LONG: "are longer than max_length and left out ({rows}): raise max_length.",
    Untrained.NO_PARTNER: "have no other row whose completion the KL needs and are left out ({rows}): add rows.",
}
_CUT = "are longer than max_length and cut ({rows})."
_DIVERGING = (
    "have a prompt that is tokenised differently when its completion follows ({rows}): end prompts at a token border, "
    "or take a template that renders a prompt alike in both cases."
)


_UNRENDERED = {
    Unrendered.MOVED_THOUGHT: "have thoughts that the chat template has no place for, and are trained with them in the "
    "content, between <think> and </think> ({rows})",
    Unrendered.EARLIER_THOUGHT: "have thoughts in earlier turns, which the chat template takes out, so that they are "
    "not trained ({rows}): set assistant_only_loss, which keeps them, or another chat_template",
    Unrendered.THOUGHT: "have thoughts that the chat template has no place for, and are trained without them ({rows}): "
    "set another chat_template",
    Unrendered.CONTENT: "have an answer beside tool calls that the chat template leaves out, so that it is not trained "
    "({rows}): set another chat_template",
    Unrendered.CONTEXT: "have a message that the chat template leaves out, so that the model does not see it ({rows}): "
    "set another chat_template, or move its text",
    Unrendered.CHANGED: "have a message that the chat template writes in other words ({rows}): look at it, or set "
    "another chat_template",
}


def report_rows(
    name: str,
    *,
    total: int,
    untrained: Mapping[int, Untrained],
    cut: Iterable[int],
    diverging: Iterable[int],
    findings: Mapping[int, Sequence[Finding]] | None = None,
) -> tuple[str, ...]:
    """One sentence for each thing to be known about the rows of a dataset; none when all is well."""
    told = [
        *((text, [row for row, why in untrained.items() if why is reason]) for reason, text in _REASONS.items()),
        (_CUT, list(cut)),
        (_DIVERGING, list(diverging)),
        *(_unrendered(kind, text, findings or {}) for kind, text in _UNRENDERED.items()),
    ]
    return tuple(
        f"{len(rows)} of {total} rows of {name} {text.format(rows=_numbers(rows))}" for text, rows in told if rows
    )


def _unrendered(kind: Unrendered, text: str, findings: Mapping[int, Sequence[Finding]]) -> tuple[str, list[int]]:
    found = [(row, finding) for row, several in findings.items() for finding in several if finding.kind is kind]
    if not found:
        return text, []
    first = found[0][1]
    rows = list(dict.fromkeys(row for row, _ in found))
    return f"{text}; first: message {first.message}, field {first.field!r}.", rows


def _numbers(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    more = len(rows) - _SHOWN_ROWS
    return f"row{'s' * (len(rows) != 1)} {shown}" + (f" and {more} more" if more > 0 else "")
