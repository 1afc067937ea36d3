"""A dataset as an endless, repeatable sequence of prompts that can be entered at any ordinal.

    PromptConfig -- load_rows --> Rows -- check, template, tokenise --> PromptSource
    PromptSource.prompt(ordinal):  ordinal -> (epoch, place) -> row = permutation(seed, epoch)[place] -> Prompt
                                   (seed, ordinal) -> with the dataset's completion, or without

Nothing is remembered between calls, so a resumed run asks for the next ordinal and gets what it would have got.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.messages import nearest
from trl_ray.config.sections import PromptConfig
from trl_ray.data.bad_rows import BadRows
from trl_ray.data.examples.tokenisation import ExampleTokenizer
from trl_ray.data.formats.detection import Form
from trl_ray.data.prompts.given_completions import (
    GivenCompletions,
    require_completions,
)
from trl_ray.data.prompts.prompt_drafts import ColumnCheck, PromptLoading, PromptRow
from trl_ray.data.prompts.prompt_notes import prompt_notes
from trl_ray.data.prompts.prompt_rows import prompt_readers
from trl_ray.data.prompts.prompt_tokens import encode_prompts
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import IntArray, Prompt


class PromptSource:
    """Prompts by ordinal: ordinal o is place ``o % len`` of epoch ``o // len``.

    Every epoch is a permutation of all rows that depends on (seed, epoch) alone::

        source = load_prompts(config, tokenizer, seed=42, max_prompt_tokens=512)
        source.prompt(0).prompt_id       # "0:17": epoch 0, row 17 of the dataset
        source.prompt(len(source))       # the first of epoch 1
    """

    def __init__(
        self,
        *,
        name: str,
        rows: Sequence[PromptRow],
        seed: int,
        shuffle: bool,
        completions: GivenCompletions | None = None,
        num_left_out: int = 0,
        num_cut: int = 0,
        notes: tuple[str, ...] = (),
    ) -> None:
        if not rows:
            raise DataError(f"A dataset must have at least one row, {name} has none.")
        self.name = name
        self.notes = notes
        """What a user should know of the rows, a sentence each."""
        self.num_left_out = num_left_out
        """Rows that cannot be used, where such rows are dropped."""
        self.num_cut = num_cut
        """Prompts of which `max_prompt_length` cut tokens off."""
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._completions = completions
        self._order: tuple[int, NDArray[np.int64]] = (0, self._permutation(0))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that reward functions receive, in the order they first appear."""
        return tuple(dict.fromkeys(key for row in self._rows for key in row.columns))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest over the token ids of all rows: tells a resumed run that its dataset has changed."""
        digest = hashlib.sha256()
        for row in self._rows:
            for ids in (row.token_ids, *(() if row.given is None else (row.given.prompt_ids, row.given.token_ids))):
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()

    @cached_property
    def columns_fingerprint(self) -> str:
        """Hex digest over what reward functions receive of all rows."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps(row.columns, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        given = (len(row.given.prompt_ids) for row in self._rows if row.given is not None)
        return max(*(len(row.token_ids) for row in self._rows), *given, 0)

    def require_values(self, column: str, allowed: Sequence[str], *, option: str) -> None:
        """Check that a column names one of several things in every row.

        Args:
            column: of the rows.
            allowed: what it may say.
            option: which names the column, for the message.

        Raises:
            DataError: names the first row that says something else, and the nearest of what it may say.
        """
        for row in self._rows:
            value = row.columns.get(column)
            if not isinstance(value, str) or value not in allowed:
                guess = nearest(value, allowed) if isinstance(value, str) else None
                raise DataError(
                    f"{row.where}, field {column!r} ({option}), must be one of {', '.join(allowed)}, "
                    f"got {show(value)}. {f'Did you mean {guess!r}?' if guess else 'Mend or remove the row.'}"
                )

    def count_missing(self, column: str) -> int:
        """How many rows have no value in a column."""
        return sum(row.columns.get(column) is None for row in self._rows)

    def prompt(self, ordinal: int) -> Prompt:
        """The prompt at `ordinal`, counted from 0 over all epochs."""
        if ordinal < 0:
            raise IndexError(f"An ordinal must be at least 0, got {ordinal}.")
        epoch, place = divmod(ordinal, len(self._rows))
        if self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        index = int(self._order[1][place])
        row = self._rows[index]
        given = row.given if self._completions is not None and self._completions.takes(ordinal) else None
        return Prompt(
            prompt_id=f"{epoch}:{index}",
            token_ids=row.token_ids if given is None else given.prompt_ids,
            messages=row.messages,
            text=row.text,
            columns=row.columns,
            given_ids=None if given is None else given.token_ids,
        )

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._rows))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))


def load_prompts(
    config: PromptConfig,
    tokenizer: ExampleTokenizer,
    *,
    seed: int,
    max_prompt_tokens: int | None,
    dataset: object | None = None,
    evaluation: bool = False,
    completions: GivenCompletions | None = None,
    max_prompt_length: int | None = None,
    check_columns: ColumnCheck | None = None,
) -> PromptSource:
    """Load, check and tokenise every row; whatever is wrong with the data is said here, before anything starts.

    Args:
        config: names the dataset, its split and its prompt column.
        tokenizer: of the policy, its chat template set.
        seed: of the epochs' permutations and of generated tasks.
        max_prompt_tokens: what the model holds minus max_completion_length; None does not check.
        dataset: a `datasets.Dataset`, a `datasets.DatasetDict` or a list of dicts, instead of dataset_name.
        evaluation: take the held-out split, in its own order.
        completions: prompts of which a share comes with the dataset's completion; None: none does.
        max_prompt_length: of longer prompts the last tokens are kept; messages and texts stay whole.
        check_columns: says what is wrong with a row's other columns.

    Raises:
        DataError: there is no such dataset, it is empty, or a row cannot be used; names row and field.
        ModelError: conversational prompts and no chat template, or one that refuses a row.
    """
    rows = load_rows(config, seed=seed, dataset=dataset, evaluation=evaluation)
    readers = prompt_readers(rows, config, completion_column=None if completions is None else completions.column)
    for source in rows.sources or (rows,):
        if completions is not None:
            require_completions(source, completions.column, added=readers[source.name].columns)
    bad = BadRows(config.on_bad_row)
    loading = PromptLoading(config=config, tokenizer=tokenizer, completions=completions, check=check_columns, bad=bad)
    drafts = loading.drafts(rows, readers)
    if not drafts:
        bad.settle(total=len(rows.rows))
    standard = isinstance(drafts[0].prompt, str)
    if config.system_prompt is not None and standard:
        raise DataError(
            f"system_prompt needs conversational prompts, those of {rows.name} are plain text that is taken as it "
            "stands, as there is no chat template or the dataset's completions are taught. Write it into the "
            "text, make each prompt a list of messages, or remove system_prompt."
        )
    texts = [draft.text for draft in drafts]
    token_ids = encode_prompts(tokenizer, texts) if standard else _encode_rendered(tokenizer, texts)
    given = loading.given(drafts, Form.STANDARD if standard else Form.CONVERSATIONAL)
    # Of the prompt's last tokens, as many as are wanted.
    kept = slice(None) if max_prompt_length is None else slice(-max_prompt_length, None)
    every = dict.fromkeys(column for draft in drafts for column in draft.columns)
    ready = [
        PromptRow(
            token_ids=ids[kept],
            given=None if (row := given.get(draft.place)) is None else replace(row, prompt_ids=row.prompt_ids[kept]),
            messages=None if isinstance(draft.prompt, str) else draft.prompt,
            text=draft.prompt if isinstance(draft.prompt, str) else None,
            columns={column: draft.columns.get(column) for column in every},
            where=draft.where,
        )
        for draft, ids in zip(drafts, token_ids, strict=True)
    ]
    loading.check_lengths(drafts, ready, max_prompt_tokens)
    bad.settle(total=len(rows.rows))
    ready = [row for draft, row in zip(drafts, ready, strict=True) if draft.place not in bad.places]
    shuffle = config.shuffle_dataset and not evaluation
    cut = [len(ids) - len(ids[kept]) for ids in token_ids]
    return PromptSource(
        name=rows.name,
        rows=ready,
        seed=seed,
        shuffle=shuffle,
        completions=completions,
        num_left_out=len(bad.places),
        num_cut=sum(map(bool, cut)),
        notes=(*rows.notes, *bad.report(), *prompt_notes(rows.name, drafts, ready, cut, sum(map(len, token_ids)))),
    )


def _encode_rendered(tokenizer: ExampleTokenizer, texts: Sequence[str]) -> list[IntArray]:
    """Token ids ``[P]`` of each; a template writes its special tokens itself."""
    return [np.asarray(ids, np.int32) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
