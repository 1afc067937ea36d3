"""The dataset's own completions of prompts, tokenised as SFT would, and which prompts they stand in for.

prompt, completion --RecordReader--> record --as SFT--> texts --> tokens of the prompt and of the whole
                                                                   what they share | the rest = given_ids [L]
(seed, ordinal) --> a random number --> the dataset's completion, or one that the student samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_ray.config.messages import nearest
from trl_ray.config.sections import PromptConfig
from trl_ray.data.examples.supervised_texts import SupervisedRules, write_supervised
from trl_ray.data.examples.tokenisation import ExampleTokenizer, Text, common_prefix_length, encode
from trl_ray.data.formats.detection import DatasetFormat, DatasetType, Form
from trl_ray.data.formats.records import PromptCompletion, RecordReader, Said
from trl_ray.data.sources.dataset_loading import Rows
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


def given_rows(
    rows: Rows,
    prompts: Sequence[Said],
    completions: GivenCompletions,
    *,
    config: PromptConfig,
    tokenizer: ExampleTokenizer,
) -> list[GivenRow]:
    """Tokenise every row's completion.

    Args:
        rows: of the dataset.
        prompts: theirs, the system prompt inserted.
        completions: which column, and how much of it.
        config: the prompt column, and what the chat template is told.
        tokenizer: of the policy, its chat template set.

    Raises:
        DataError: a row without a completion, or with one that does not go on where its prompt stops; names row and
            field.
        ModelError: the chat template refuses a row.
    """
    for source in rows.sources or (rows,):
        _require_column(source, completions.column)
    form = Form.STANDARD if isinstance(prompts[0], str) else Form.CONVERSATIONAL
    rules = SupervisedRules(template_kwargs=config.chat_template_kwargs)
    texts: list[Text] = []
    for index, (row, prompt) in enumerate(zip(rows.rows, prompts, strict=True)):
        origin = rows.origin(index)
        reader = _reader(origin.name, form, config, completions)
        record = reader.read(origin.number, {"prompt": prompt, "completion": row.get(completions.column)})
        assert isinstance(record, PromptCompletion)
        texts += write_supervised(record, tokenizer, rules, where=rows.where(index))
    tokens = [encoded.token_ids for encoded in encode(tokenizer, texts)]
    pairs = zip(tokens[::2], tokens[1::2], strict=True)
    return [_given_row(prompt, whole, completions, rows.where(index)) for index, (prompt, whole) in enumerate(pairs)]


def _require_column(rows: Rows, column: str) -> None:
    if column not in rows.columns:
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
    )


def _given_row(prompt: IntArray, whole: IntArray, completions: GivenCompletions, where: str) -> GivenRow:
    # Nothing predicts the first token.
    border = max(1, common_prefix_length(prompt, whole))
    if border >= len(whole):
        raise DataError(
            f"{where}, field {completions.column!r}, must add at least one token to its prompt, it adds none. Mend or "
            "remove the row."
        )
    return GivenRow(prompt_ids=whole[:border], token_ids=whole[border : border + completions.max_tokens])
