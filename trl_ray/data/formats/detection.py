"""Which of TRL's dataset formats a dataset has, told from its columns and its first row, never guessed.

    columns ─► types whose columns are all there ─► the largest of them ─► the accepted one ─► DatasetFormat
    first row ─► text or messages? ──────────────────────────────────────────────────────────────────┘

    language_modeling       text or messages             preference             prompt, chosen, rejected
    prompt_only             prompt                       implicit_preference    chosen, rejected
    prompt_completion       prompt, completion           unpaired_preference    prompt, completion, label
                                                         stepwise_supervision   prompt, completions, labels

All other columns go along. `tools` describes functions, and only conversations may have it. Where a dataset can be
learnt in several ways, a column that an option names wins, then prompt and completion, messages, text (TRL's order).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ray.config.messages import nearest
from trl_ray.data.validation import show
from trl_ray.errors import DataError


class DatasetType(enum.StrEnum):
    """What a row is there for."""

    LANGUAGE_MODELING = "language_modeling"
    PROMPT_ONLY = "prompt_only"
    PROMPT_COMPLETION = "prompt_completion"
    PREFERENCE = "preference"
    IMPLICIT_PREFERENCE = "implicit_preference"
    """The prompt is the shared beginning of `chosen` and `rejected`."""
    UNPAIRED_PREFERENCE = "unpaired_preference"
    STEPWISE_SUPERVISION = "stepwise_supervision"


class Form(enum.StrEnum):
    """How a row writes what is said."""

    STANDARD = "standard"
    """As text."""
    CONVERSATIONAL = "conversational"
    """As a list of messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFormat:
    """A type in one of its two forms, and the columns it is read from."""

    type: DatasetType
    form: Form
    columns: tuple[str, ...]
    unread: tuple[str, ...] = ()
    """Columns of another format that the dataset has as well, and that is not read."""

    def __str__(self) -> str:
        return f"{self.form} {self.type}"


_COLUMNS: tuple[tuple[DatasetType, tuple[str, ...]], ...] = (
    (DatasetType.LANGUAGE_MODELING, ("text",)),
    (DatasetType.LANGUAGE_MODELING, ("messages",)),
    (DatasetType.PROMPT_ONLY, ("prompt",)),
    (DatasetType.PROMPT_COMPLETION, ("prompt", "completion")),
    (DatasetType.PREFERENCE, ("prompt", "chosen", "rejected")),
    (DatasetType.IMPLICIT_PREFERENCE, ("chosen", "rejected")),
    (DatasetType.UNPAIRED_PREFERENCE, ("prompt", "completion", "label")),
    (DatasetType.STEPWISE_SUPERVISION, ("prompt", "completions", "labels")),
)
_KNOWN = frozenset(column for _, fields in _COLUMNS for column in fields)
FORMAT_COLUMNS = _KNOWN | {"conversations"}
"""Columns that say something wherever they are."""
# What can be learnt as a whole, in the order of preference.
_LEARNT = (("prompt", "completion"), ("messages",), ("text",))
_INSTRUCTIONS = ("instruction", "output")
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        *("question", "instruction", "query", "problem", "input", "user", "human", "context", "input_text"),
        *("trajectory", "problem_statement", "original_question", "inputs"),
    ),
    "completion": (
        *("answer", "response", "output", "solution", "target", "assistant", "reply", "answers", "long_answer"),
        *("output_text", "generation", "targets"),
    ),
    "chosen": (
        *("chosen_response", "response_chosen", "accepted", "preferred", "better", "winner", "preferred_output"),
        "response_j",
    ),
    "rejected": (
        *("rejected_response", "response_rejected", "dispreferred", "worse", "loser", "non_preferred_output"),
        "response_k",
    ),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "contents", "trajectory"),
    "text": ("content", "body", "document", "article"),
    "label": ("rating", "is_good", "is_preferred", "thumbs_up", "kto_tag", "desirable", "is_desirable"),
    "completions": ("steps",),
    "labels": ("ratings", "step_labels"),
}
"""What columns are called elsewhere; only ever offered in messages."""
QUESTIONS = (
    "question",
    "questions",
    "instruction",
    "query",
    "problem",
    "input",
    "user",
    "user_prompt",
    "user_input",
    "human",
    "context",
    "request",
    "task",
)
"""Columns that hold what is asked where there is no prompt."""
SYSTEM_TEXTS = ("system", "system_prompt", "system_message")
SPEECH = (*SYSTEM_TEXTS, "history", "instruction", "context", "input", "question", "query")
"""Columns that are likely to hold a part of what was said, and that no format reads."""
# Whoever has one of these without its partners has mistyped or lost a column.
_PARTNERED = ("completion", "chosen", "rejected", "completions")
ALL_TYPES = frozenset(DatasetType)


def detect(
    columns: Iterable[str],
    row: Mapping[str, Any],
    *,
    name: str,
    accept: Collection[DatasetType] = ALL_TYPES,
    told: str | None = None,
) -> DatasetFormat:
    """The format of a dataset from its columns and its first row.

    `accept` holds what the caller can use, `told` the column that an option names, which wins over all others.

    A text prompt beside conversational `chosen` and `rejected` repeats what these start with, so that such a dataset is
    an implicit preference, TRL's rule. Whether the prompt really is in there is checked row by row.

    Raises:
        DataError: columns are missing, several formats fit, or the one that fits is not accepted.
    """
    columns = tuple(columns)
    kind, fields = _type_of(columns, name, accept, told)
    form = Form.CONVERSATIONAL if fields == ("messages",) else form_of(row.get(fields[0]))
    if kind is DatasetType.PREFERENCE and form is Form.STANDARD:
        sides = {form_of(row.get(side)) for side in ("chosen", "rejected")}
        if sides == {Form.CONVERSATIONAL}:
            if DatasetType.IMPLICIT_PREFERENCE not in accept:
                raise _not_accepted(name, [DatasetType.IMPLICIT_PREFERENCE], accept)
            kind, form = DatasetType.IMPLICIT_PREFERENCE, Form.CONVERSATIONAL
    others = (*_LEARNT, _INSTRUCTIONS) if fields in _LEARNT else ()
    unread = [column for other in others if set(other) <= set(columns) for column in other if column not in fields]
    return DatasetFormat(type=kind, form=form or Form.STANDARD, columns=fields, unread=tuple(dict.fromkeys(unread)))


def form_of(value: object) -> Form | None:
    """Text is standard, a list conversational, anything else neither."""
    if isinstance(value, str):
        return Form.STANDARD
    return Form.CONVERSATIONAL if isinstance(value, (list, tuple)) else None


def _type_of(
    columns: tuple[str, ...], name: str, accept: Collection[DatasetType], told: str | None
) -> tuple[DatasetType, tuple[str, ...]]:
    if told in columns and DatasetType.LANGUAGE_MODELING in accept:
        return DatasetType.LANGUAGE_MODELING, (str(told),)
    present = [(kind, fields) for kind, fields in _COLUMNS if set(fields) <= set(columns)]
    largest = [(kind, fields) for kind, fields in present if not any(set(fields) < set(other) for _, other in present)]
    used = {field for _, fields in largest for field in fields}
    lone = [column for column in _PARTNERED if column in columns and column not in used]
    usable = [(kind, fields) for kind, fields in largest if kind in accept]
    if not usable or lone:
        # Who only wants prompts takes them from a dataset of any kind.
        prompts = [(kind, fields) for kind, fields in present if kind is DatasetType.PROMPT_ONLY]
        if set(accept) == {DatasetType.PROMPT_ONLY} and prompts:
            return prompts[0]
        if not largest or lone:
            raise _missing(name, columns, accept)
        raise _not_accepted(name, [kind for kind, _ in largest], accept, columns)
    preferred = next((fields for fields in _LEARNT if fields in [other for _, other in usable]), None)
    if preferred is not None and all(fields in _LEARNT for _, fields in usable):
        return next(found for found in usable if found[1] == preferred)
    if len(usable) > 1:
        readings = " or ".join(f"{kind} ({', '.join(fields)})" for kind, fields in usable)
        raise DataError(
            f"The columns of {name} must mean one thing, they can be read as {readings}. Leave out the columns that "
            f"are not meant: column_mapping={{{usable[-1][1][-1]}: null}}."
        )
    return usable[0]


def _not_accepted(
    name: str, found: Collection[DatasetType], accept: Collection[DatasetType], columns: tuple[str, ...] = ()
) -> DataError:
    lack = _lack(columns, accept)
    remedy = lack.hint or _fewer(found, accept) or "Take another dataset, or add the columns that it lacks."
    return DataError(
        f"{name} must have one of the formats {', '.join(_in_order(accept))}, its columns make it "
        f"{' and '.join(found)}{lack.text}. {remedy}"
    )


def _fewer(found: Collection[DatasetType], accept: Collection[DatasetType]) -> str:
    """What to leave out of a dataset to read it as an accepted format; blank where that is no remedy."""
    for _, more in ((kind, fields) for kind, fields in _COLUMNS if kind in found):
        for kind, fields in ((kind, fields) for kind, fields in _COLUMNS if kind in accept and set(fields) < set(more)):
            extra = ", ".join(f"{column}: null" for column in more if column not in fields)
            return f"To read it as {kind} ({', '.join(fields)}), set column_mapping={{{extra}}}."
    return ""


def _missing(name: str, columns: tuple[str, ...], accept: Collection[DatasetType]) -> DataError:
    lack = _lack(columns, accept)
    formats = "; ".join(f"{kind} ({', '.join(fields)})" for kind, fields in _COLUMNS if kind in accept)
    return DataError(
        f"{name} must have the columns of a format: {formats}; or of a foreign one: conversations (ShareGPT), "
        f"instruction, input, output (Alpaca). Its columns are {', '.join(columns) or 'none'}{lack.text}. "
        f"{lack.hint or 'Say which columns hold them: column_mapping={THEIRS: OURS}.'}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lack:
    """What is missing of the format that the columns come closest to; blank where they do not come close to any."""

    text: str
    hint: str


def _lack(columns: tuple[str, ...], accept: Collection[DatasetType]) -> _Lack:
    wanted = [fields for kind, fields in _COLUMNS if kind in accept]
    # The format of which most columns are there, then the one with the fewest missing.
    closest = max(wanted, key=lambda fields: _closeness(fields, columns))
    missing = [field for field in closest if field not in columns]
    others = [column for column in columns if column not in _KNOWN]
    guesses = {field: guess for field in missing if (guess := _guess(field, others)) is not None}
    hint = " ".join(f"Is {guess!r} meant to be {field!r}?" for field, guess in guesses.items())
    if hint:
        hint += f" Set column_mapping={{{_mapping(guesses, columns)}}}."
    begun = missing and (len(missing) < len(closest) or hint)
    return _Lack(text=f"; {', '.join(closest)} lacks {', '.join(map(repr, missing))}" if begun else "", hint=hint)


def _mapping(guesses: Mapping[str, str], columns: tuple[str, ...]) -> str:
    """What to map, with what else the columns say: of the system, or beside an instruction as Alpaca's input."""
    found = {guess: field for field, guess in guesses.items()}
    inputs = next((column for column in ("input", "context") if column in columns and column not in found), None)
    if found.get("instruction") == "prompt" and inputs is not None and "completion" in found.values():
        # Alpaca's columns join the two.
        answer = next(column for column, field in found.items() if field == "completion")
        found = {inputs: "input", answer: "output"}
    elif {"prompt", "completion"} & {*found.values(), *columns}:
        found |= {column: "system" for column in SYSTEM_TEXTS if column in columns}
    return ", ".join(f"{column}: {field}" for column, field in found.items())


def _guess(field: str, others: Collection[str]) -> str | None:
    """The column that is likely to be meant by a format's, from how it is called elsewhere or nearly so."""
    called = next((alias for alias in _ALIASES.get(field, ()) if alias in others), None)
    return called or nearest(field, others)


def _closeness(fields: tuple[str, ...], columns: tuple[str, ...]) -> tuple[int, int]:
    there = sum(field in columns for field in fields)
    others = [column for column in columns if column not in _KNOWN]
    almost = sum(field not in columns and _guess(field, others) is not None for field in fields)
    return there + almost, there - len(fields)


def _in_order(kinds: Collection[DatasetType]) -> list[DatasetType]:
    return [kind for kind in DatasetType if kind in kinds]


def check_form(value: object, form: Form, *, where: str) -> None:
    """Check that a field is text or messages as the first row's was.

    Raises:
        DataError: it is the other, or neither.
    """
    if form_of(value) is form:
        return
    wanted = {Form.STANDARD: "text", Form.CONVERSATIONAL: "a list of messages"}[form]
    raise DataError(
        f"{where} must be {wanted}, as this dataset is {form}, got {show(value)}. Use one form for all rows, or "
        "remove the row."
    )
