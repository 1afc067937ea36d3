"""The dataset's own completions of prompts, tokenised as SFT would, and which prompts they stand in for.

prompt, completion --RecordReader--> record --as SFT--> texts --> tokens of the prompt and of the whole
                                                                   what they share | the rest = given_ids [L]
(seed, ordinal) --> a random number --> the dataset's completion, or one that the student samples
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_ray.config.messages import nearest
from trl_ray.config.sections import ROLES, PromptConfig
from trl_ray.data.chat.row_format import TOLD_COLUMNS
from trl_ray.data.examples.supervised_texts import SupervisedRules, write_supervised
from trl_ray.data.examples.tokenisation import Encoded, ExampleTokenizer, Text, common_prefix_length
from trl_ray.data.formats.detection import DatasetFormat, DatasetType, Form
from trl_ray.data.formats.foreign_formats import to_messages
from trl_ray.data.formats.records import PromptCompletion, RecordReader, Said
from trl_ray.data.formats.written_messages import read_messages
from trl_ray.data.sources.dataset_loading import Origin, Rows
from trl_ray.errors import DataError
from trl_ray.types import IntArray

_STREAM = 0x67697665
"""Keeps these random numbers apart from others of the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenCompletions:
    """Where completions come from that the student does not sample."""

    column: str
    """Text, or messages where prompts are conversations."""
    share: float
    """Of prompts that get the dataset's completion, between 0 and 1: 1 - lmbda."""
    seed: int
    max_tokens: int
    """Tokens L of a completion; the first ones are kept."""

    def __post_init__(self) -> None:
        assert 0 <= self.share <= 1 and self.max_tokens >= 1, f"a share and at least one token: {self}"

    def takes(self, ordinal: int) -> bool:
        """Whether the prompt at an ordinal gets the dataset's completion: a function of (seed, ordinal) alone."""
        return bool(np.random.default_rng([self.seed, ordinal, _STREAM]).random() >= 1 - self.share)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenRow:
    """A prompt and the dataset's completion of it, as SFT would see them."""

    prompt_ids: IntArray
    """[P] what stands before the completion: the prompt's own tokens, unless they merge with it at the border."""
    token_ids: IntArray
    """[L] the end of the turn, or the end-of-sequence token, included where it was not cut off."""
    num_cut: int = 0
    """Tokens that were cut off the completion's end."""
    num_cut_off_prompt: int = 0
    """Tokens that were cut off the prompt's beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAnswer:
    """A prompt and the value of the completion column beside it."""

    prompt: Said
    """The system prompt inserted."""
    completion: Any
    origin: Origin
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other ones, of which a chat template is told some."""

    @property
    def where(self) -> str:
        """How messages name the row."""
        return f"Row {self.origin.number} of {self.origin.name}"


def write_given(
    answer: GivenAnswer, form: Form, completions: GivenCompletions, *, config: PromptConfig, tokenizer: ExampleTokenizer
) -> tuple[Text, ...]:
    """The texts of a prompt and of the prompt with its completion, as SFT would write them.

    Args:
        answer: of a row.
        form: of all rows.
        completions: which column, and how much of it.
        config: the prompt column, and what the chat template is told.
        tokenizer: of the policy, its chat template set.

    Raises:
        DataError: there is no completion, or one that does not go on where its prompt stops; names row and field.
        ModelError: the chat template refuses a row.
    """
    rules = SupervisedRules(template_kwargs=config.chat_template_kwargs)
    reader = _reader(answer.origin.name, form, config, completions)
    completion = _spoken(answer, completions, config)
    told = {} if isinstance(answer.prompt, str) else {key: answer.columns.get(key) for key in TOLD_COLUMNS}
    record = reader.read(answer.origin.number, {**told, "prompt": answer.prompt, "completion": completion})
    assert isinstance(record, PromptCompletion)
    return write_supervised(record, tokenizer, rules, where=answer.where)


def _spoken(answer: GivenAnswer, completions: GivenCompletions, config: PromptConfig) -> Any:
    value = read_messages(answer.completion, where=f"{answer.where}, field {completions.column!r}")
    converted = to_messages({"completion": value}, where=answer.where, role_mapping=config.role_mapping)
    return converted["completion"]


def read_given(encoded: Sequence[Encoded], completions: GivenCompletions, *, where: str) -> GivenRow:
    """The tokens of the two texts that `write_given` wrote.

    Raises:
        DataError: the completion adds no token to its prompt.
    """
    prompt, whole = (text.token_ids for text in encoded)
    # Nothing predicts the first token.
    border = max(1, common_prefix_length(prompt, whole))
    if border >= len(whole):
        raise DataError(
            f"{where}, field {completions.column!r}, must add at least one token to its prompt, it adds none. Mend or "
            "remove the row."
        )
    rest = whole[border:]
    return GivenRow(
        prompt_ids=whole[:border],
        token_ids=rest[: completions.max_tokens],
        num_cut=max(0, len(rest) - completions.max_tokens),
    )


def require_completions(rows: Rows, column: str, *, added: Collection[str] = ()) -> None:
    """Check that there is a column with completions, or one that was `added`.

    Raises:
        DataError: offers the nearest.
    """
    if column not in rows.columns and column not in added:
        guess = nearest(column, rows.columns)
        raise DataError(
            f"{rows.name} must have the completion column {column!r} because lmbda is below 1; its columns are "
            f"{', '.join(rows.columns)}. "
            f"{f'Did you mean dataset_completion_column={guess}?' if guess else 'Name one of them, or set lmbda=1.'}"
        )


def _reader(name: str, form: Form, config: PromptConfig, completions: GivenCompletions) -> RecordReader:
    columns = ("prompt", "completion")
    return RecordReader(
        name=name,
        format=DatasetFormat(type=DatasetType.PROMPT_COMPLETION, form=form, columns=columns),
        written={"prompt": config.dataset_prompt_column, "completion": completions.column},
        roles=(*ROLES, *config.role_mapping.values()),
    )
