"""Rows that are tokenised already: token ids in the place of text, under the names that TRL's trainers give them.

    SFT      input_ids, and labels; or completion_mask and assistant_masks; or nothing else: all is trained
    reward   chosen_ids, rejected_ids

    row ─► TokenReader.read: ids within the vocabulary, lengths equal, masks of 0 and 1 ─► GivenTokens

They are cut, packed and counted as others are. Who has such columns by accident leaves them out by column_mapping.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_ray.data.examples.supervised_texts import IGNORED_LABEL, SupervisedRules
from trl_ray.data.formats.detection import FORMAT_COLUMNS, DatasetFormat, DatasetType, Form
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import BoolArray, IntArray

TEXT_IDS = ("input_ids",)
PAIR_IDS = ("chosen_ids", "rejected_ids")
_FORMER = {"chosen_ids": "chosen_input_ids", "rejected_ids": "rejected_input_ids"}
"""What columns were called before."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenTokens:
    """The token ids of a row."""

    sequences: tuple[IntArray, ...]
    """[T] each: a text; or chosen and rejected."""
    mask: BoolArray
    """[T] which tokens of the first may be trained."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReader:
    """Reads rows of tokens; it remembers nothing between rows."""

    name: str
    """Names the dataset in messages."""
    ids: tuple[str, ...]
    """The columns of token ids, `TEXT_IDS` or `PAIR_IDS`."""
    masks: tuple[str, ...]
    """The columns that say what is trained; `labels` alone, or masks all of which must be 1."""
    vocabulary: int
    """How many tokens there are."""
    told: tuple[str, ...] = ()

    @property
    def format(self) -> DatasetFormat:
        """What the rows are."""
        kind = DatasetType.LANGUAGE_MODELING if self.ids == TEXT_IDS else DatasetType.IMPLICIT_PREFERENCE
        return DatasetFormat(type=kind, form=Form.STANDARD, columns=self.ids)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the columns are read, a sentence each."""
        return self.told

    def read(self, number: int, row: Mapping[str, Any]) -> GivenTokens:
        """Row `number`.

        Raises:
            DataError: it is not what it must be; names row and field.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"Row {number} of {self.name} must be an object with columns, got {show(row)}. Mend it.")
        sequences = tuple(self._ids(number, row, column) for column in self.ids)
        ids = sequences[0]
        self._check_whole(number, row, len(ids))
        mask = np.ones(len(ids), np.bool_)
        for column in self.masks:
            mask &= self._mask(number, row, column, ids)
        return GivenTokens(sequences=sequences, mask=mask, columns=row)

    def _ids(self, number: int, row: Mapping[str, Any], column: str) -> IntArray:
        given = column if row.get(column) is not None else _FORMER.get(column, column)
        ids = self._integers(number, row, given)
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocabulary))
        if len(wrong):
            raise DataError(
                f"{self._at(number, given)} must hold tokens of the tokenizer, 0 to {self.vocabulary - 1}, got "
                f"{ids[wrong[0]]} at place {wrong[0]}. Take the tokenizer that made them, or mend the row."
            )
        return ids.astype(np.int32)

    def _mask(self, number: int, row: Mapping[str, Any], column: str, ids: IntArray) -> BoolArray:
        values = self._integers(number, row, column, length=len(ids))
        if column == "labels":
            trained = values != IGNORED_LABEL
            wrong = np.flatnonzero(trained & (values != ids))
            if len(wrong):
                raise DataError(
                    f"{self._at(number, column)} must be the token of input_ids at the same place, or {IGNORED_LABEL} "
                    f"where it is not trained, got {values[wrong[0]]} for {ids[wrong[0]]} at place {wrong[0]}. They "
                    "are not shifted; mend the row."
                )
            return np.asarray(trained)
        if not np.isin(values, (0, 1)).all():
            raise DataError(f"{self._at(number, column)} must hold 0 and 1, got {show(row[column])}. Mend the row.")
        return values.astype(np.bool_)

    def _check_whole(self, number: int, row: Mapping[str, Any], length: int) -> None:
        """Refuse padding, and sequences that share a row: nothing says so to the model."""
        wanted = {"attention_mask": np.ones(length, np.int64), "position_ids": np.arange(length)}
        for column, whole in wanted.items():
            if row.get(column) is not None:
                values = self._integers(number, row, column, length=length)
                if not np.array_equal(values, whole):
                    raise DataError(
                        f"{self._at(number, column)} must be that of one text without padding, got "
                        f"{show(row[column])}. Pass rows before they are padded or packed: padding_free, packing."
                    )
        lengths = row.get("seq_lengths")
        if lengths is not None and (not isinstance(lengths, (list, tuple, np.ndarray)) or len(lengths) > 1):
            raise DataError(
                f"{self._at(number, 'seq_lengths')} must be left out, got {show(lengths)}: texts that share "
                "a row would see each other. Pass rows before they are packed, and set packing=true."
            )

    def _integers(
        self, number: int, row: Mapping[str, Any], column: str, *, length: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        value = row.get(column)
        try:
            found = np.asarray(value if value is not None else "none")
        except ValueError:  # of unequal lengths
            found = np.asarray("none")
        is_empty = isinstance(value, (list, tuple, np.ndarray)) and not len(value)
        if not is_empty and (found.ndim != 1 or found.dtype.kind not in "iub"):
            raise DataError(
                f"{self._at(number, column)} must be a list of whole numbers, got "
                f"{show(value) if column in row else 'no such column'}. Fill it or remove the row."
            )
        if length is not None and len(found) != length:
            raise DataError(
                f"{self._at(number, column)} must be as long as {self.ids[0]}, {length}, got {len(found)}. Mend it."
            )
        return found.astype(np.int64)

    def _at(self, number: int, column: str) -> str:
        return f"Row {number} of {self.name}, field {column!r}"


def has_tokens(columns: Collection[str], ids: tuple[str, ...]) -> bool:
    """Whether a dataset has the columns of token ids that a task can take."""
    return all(column in columns or _FORMER.get(column) in columns for column in ids)


def token_reader(
    columns: Collection[str],
    *,
    ids: tuple[str, ...],
    rules: SupervisedRules | None,
    name: str,
    vocabulary: int,
) -> TokenReader:
    """How to read rows of tokens.

    What is trained is decided as in TRL: by `labels`; else by `assistant_masks`, and by `completion_mask` where
    `completion_only_loss` asks for it.

    Args:
        columns: of the dataset.
        ids: the columns of token ids that the task can take.
        rules: what is trained of texts; None for pairs.
        name: of the dataset.
        vocabulary: how many tokens there are.

    Raises:
        DataError: an option asks for a part of the rows, and no column tells it.
    """
    others = sorted(FORMAT_COLUMNS & set(columns) - {"labels"})
    names = (*ids, *(_FORMER[column] for column in ids if column in _FORMER))
    given = tuple(column for column in names if column in columns)
    told = (
        f"{name} is tokenised already: it is read from {', '.join(given)} and not from {', '.join(others)}. To have "
        f"that tokenised instead, set column_mapping={{{', '.join(f'{column}: null' for column in given)}}}.",
    )
    masks, notes = ((), ()) if rules is None else _masks(columns, rules, name)
    notes = (*(told if others else ()), *notes)
    return TokenReader(name=name, ids=ids, masks=masks, vocabulary=vocabulary, told=notes)


def _masks(columns: Collection[str], rules: SupervisedRules, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that say what is trained, and what to know of one that does not."""
    if "labels" in columns:
        return ("labels",), ()
    parts = rules.completion_only_loss
    if parts is None:
        parts = "prompt" in columns and "completion" in columns
    asked = {"completion_mask": parts, "assistant_masks": rules.assistant_only_loss or "assistant_masks" in columns}
    options = {"completion_mask": "completion_only_loss", "assistant_masks": "assistant_only_loss"}
    for column, is_asked in asked.items():
        if is_asked and column not in columns and getattr(rules, options[column]):
            raise DataError(
                f"{options[column]}=true needs the column {column!r} or 'labels' where rows are tokenised already, and "
                f"{name} has {', '.join(columns)}. Add it, or set {options[column]}=false."
            )
    found = tuple(column for column, is_asked in asked.items() if is_asked and column in columns)
    if "completion_mask" in columns and "completion_mask" not in found:
        return found, (
            f"The column 'completion_mask' of {name} is not read, as completion_only_loss is not true: prompts are "
            "trained as well. Set completion_only_loss=true to train what it marks.",
        )
    return found, ()
