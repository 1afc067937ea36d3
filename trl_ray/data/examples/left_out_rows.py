"""Why rows are in no example, and what a user is told about all rows."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trl_ray.data.chat.faithful_rendering import Finding, Unrendered
from trl_ray.data.validation import show_rows


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
    TIE = "tie"
    """Chosen and rejected are the same: there is nothing to prefer."""
    BAD_ROW = "bad_row"
    """It cannot be used, and `on_bad_row` is drop."""


_REASONS = {
    Untrained.NO_TARGET: "have no token to train and are left out ({rows}): fill them or remove them.",
    Untrained.TRUNCATED: "have none within max_length and are left out ({rows}): raise max_length.",
    Untrained.TOO_LONG: "are longer than max_length and left out ({rows}): raise max_length.",
    Untrained.NO_PARTNER: "have no other row whose completion the KL needs and are left out ({rows}): add rows.",
    Untrained.TIE: "prefer nothing, chosen and rejected being the same, and are left out ({rows}).",
    Untrained.BAD_ROW: "cannot be used and are left out, as on_bad_row=drop says ({rows}).",
}
_CUT = "are longer than max_length and cut ({rows})."
_EQUAL = "have answers that are the same once cut to max_length ({rows}), and prefer nothing: raise max_length."
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
    Unrendered.UNREAD: "have a message with a field that the chat template does not read, so that it is not trained "
    "({rows}): set another chat_template, or move it to the content",
}


class RowFindings(Mapping[int, Sequence[Finding]]):
    """What a chat template does not write, by row number; equal ones are kept once.

    Args:
        rows: [F] numbers, in order.
        codes: [F] for each which of `kinds` it is.
        kinds: what rows have.
    """

    def __init__(self, rows: NDArray[np.int64], codes: NDArray[np.int64], kinds: Sequence[tuple[Finding, ...]]) -> None:
        self._rows, self._codes, self._kinds = rows, codes, kinds

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows.tolist())

    def __getitem__(self, row: int) -> Sequence[Finding]:
        place = int(np.searchsorted(self._rows, row))
        if place == len(self._rows) or self._rows[place] != row:
            raise KeyError(row)
        return self._kinds[int(self._codes[place])]

    def without(self, kinds: Collection[str]) -> RowFindings:
        """The rows with the findings of other kinds."""
        others = [tuple(finding for finding in found if finding.kind not in kinds) for found in self._kinds]
        left = np.asarray([bool(found) for found in others], np.bool_)[self._codes] if others else self._rows > 0
        return RowFindings(self._rows[left], self._codes[left], others)

    def rows_of(self, kind: Unrendered) -> NDArray[np.int64]:
        """The numbers of the rows that have a finding of a kind, in order."""
        having = [any(finding.kind is kind for finding in found) for found in self._kinds]
        return self._rows[np.asarray(having, np.bool_)[self._codes]] if having else self._rows


def report_rows(
    name: str,
    *,
    total: int,
    untrained: Mapping[int, Untrained],
    cut: Iterable[int],
    diverging: Iterable[int],
    findings: RowFindings | None = None,
    equal: Iterable[int] = (),
) -> tuple[str, ...]:
    """One sentence for each thing to be known about the rows of a dataset; none when all is well."""
    told = [
        *((text, [row for row, why in untrained.items() if why is reason]) for reason, text in _REASONS.items()),
        (_CUT, list(cut)),
        (_EQUAL, list(equal)),
        (_DIVERGING, list(diverging)),
        *(_unrendered(kind, text, findings) for kind, text in _UNRENDERED.items() if findings),
    ]
    return tuple(
        f"{len(rows)} of {total} rows of {name} {text.format(rows=show_rows(rows))}" for text, rows in told if rows
    )


def _unrendered(kind: Unrendered, text: str, findings: RowFindings) -> tuple[str, list[int]]:
    rows = findings.rows_of(kind)
    if not len(rows):
        return text, []
    first = next(finding for finding in findings[int(rows[0])] if finding.kind is kind)
    return f"{text}; first: message {first.message}, field {first.field!r}.", rows.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """How many tokens the rows of a dataset had, and how many of them were lost; rows left out are in neither."""

    written: int = 0
    """Before anything was cut; the prompt of a pair counts with each of its answers."""
    cut: int = 0
    """Of these, beyond `max_length` or another limit on lengths."""
    targets: int = 0
    """To be trained, after the cut; counted where rows are packed."""
    unpacked: int = 0
    """Of the targets, lost to packing."""

    @property
    def cut_share(self) -> str:
        return _share(self.cut, self.written)

    @property
    def unpacked_share(self) -> str:
        return _share(self.unpacked, self.targets)


class Lost(enum.StrEnum):
    """What is counted of a stream, window after window; the values stand in checkpoints."""

    TOKENS = "tokens"
    CUT = "tokens_cut"
    TARGETS = "targets"
    UNPACKED = "targets_unpacked"
    EQUAL = "pairs_equal"


def report_losses(name: str, counts: Mapping[str, int]) -> tuple[str, ...]:
    """One sentence for each way in which a stream has lost tokens or preferences, of counts by `Lost`."""
    equal = counts.get(Lost.EQUAL, 0)
    tokens = TokenCounts(
        written=counts.get(Lost.TOKENS, 0),
        cut=counts.get(Lost.CUT, 0),
        targets=counts.get(Lost.TARGETS, 0),
        unpacked=counts.get(Lost.UNPACKED, 0),
    )
    pairs = (
        f"{equal} pairs of {name} have answers that are the same once cut to max_length, and prefer nothing: raise "
        "max_length."
    )
    return (*((pairs,) if equal else ()), *report_tokens(name, tokens))


def report_tokens(name: str, tokens: TokenCounts) -> tuple[str, ...]:
    """One sentence for each way in which tokens were lost; none when all are there."""
    found = []
    if tokens.cut:
        found.append(f"{tokens.cut_share} tokens of {name} are beyond max_length and cut off.")
    if tokens.unpacked:
        found.append(
            f"{tokens.unpacked_share} tokens to train of {name} are lost to packing, which tears rows: the first token "
            "of a piece has no context. Set packing_strategy=bfd to keep rows whole."
        )
    return tuple(found)


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})"
