"""A dataset as an endless, repeatable sequence of prompts that can be entered at any ordinal.

    PromptConfig -- load_rows --> Rows -- make_prompts --> PromptSource
    PromptSource.prompt(ordinal):  ordinal -> (epoch, place) -> row = permutation(seed, epoch)[place] -> Prompt
                                   (seed, ordinal) -> with the dataset's completion, or without

Nothing is remembered between calls, so a resumed run asks for the next ordinal and gets what it would have got.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.messages import nearest
from trl_ray.config.sections import PromptConfig
from trl_ray.data.examples.tokenisation import ExampleTokenizer
from trl_ray.data.prompts.given_completions import GivenCompletions
from trl_ray.data.prompts.prompt_drafts import ColumnCheck, PromptRow
from trl_ray.data.prompts.prompt_making import PromptRules, make_prompts, readers_of
from trl_ray.data.sources.dataset_loading import load_rows
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import Prompt


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
        notes: tuple[str, ...] = (),
        numbers: Sequence[int] | None = None,
    ) -> None:
        if not rows:
            raise DataError(f"A dataset must have at least one row, {name} has none.")
        self.name = name
        self.notes = notes
        """What a user should know of the rows, a sentence each."""
        self.num_left_out = num_left_out
        """Rows that cannot be used, where such rows are dropped."""
        self._rows = rows
        self._numbers = range(len(rows)) if numbers is None else numbers
        self._seed = seed
        self._shuffle = shuffle
        self._completions = completions
        self._order: tuple[int, NDArray[np.int64]] = (0, self._permutation(0))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def head(self) -> PromptSource:
        """The prompts that are known before training: all."""
        return self

    @property
    def num_cut(self) -> int:
        """Prompts of which `max_prompt_length` cut tokens off."""
        return sum(row.num_cut > 0 for row in self._rows)

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
        return self.row_prompt(int(self._order[1][place]), epoch=epoch, ordinal=ordinal)

    def row_prompt(self, index: int, *, epoch: int, ordinal: int) -> Prompt:
        """The prompt of one row, counted from 0, as the one at `ordinal`."""
        row = self._rows[index]
        given = row.given if self._completions is not None and self._completions.takes(ordinal) else None
        return Prompt(
            prompt_id=f"{epoch}:{self._numbers[index]}",
            token_ids=row.token_ids if given is None else given.prompt_ids,
            messages=row.messages,
            text=row.text,
            columns=row.columns,
            given_ids=None if given is None else given.token_ids,
            num_cut=row.num_cut if given is None else given.num_cut_off_prompt,
        )

    def take(self, first: int, count: int) -> list[Prompt]:
        """The prompts at `count` ordinals from `first` on."""
        return [self.prompt(ordinal) for ordinal in range(first, first + count)]

    def epochs_after(self, count: int) -> float:
        """Passes over the rows that so many prompts are."""
        return count / len(self._rows)

    def news(self) -> tuple[str, ...]:
        """What a user should know of rows that were read since the last call: nothing, all are known."""
        return ()

    # What goes into checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What tells these rows from others, as JSON values."""
        return {"rows": len(self), "prompts": self.fingerprint, "columns": self.columns_fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See that these are the rows of a saved state.

        Raises:
            DataError: they are other ones; says what differs.
        """
        now = self.state_dict()
        if "rows" not in state:
            raise DataError("a stream then and a dataset now")
        differing = [what for what in now if state[what] != now[what]]
        if differing:
            raise DataError(f"{state['rows']} rows then and {now['rows']} now, with other {' and '.join(differing)}")

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
    rules = PromptRules(
        config=config,
        tokenizer=tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_prompt_length=max_prompt_length,
        completions=completions,
        check_columns=check_columns,
    )
    rows = load_rows(config, seed=seed, dataset=dataset, evaluation=evaluation)
    made = make_prompts(rows, rules, readers_of(rows, rules))
    return PromptSource(
        name=rows.name,
        rows=made.rows,
        seed=seed,
        shuffle=config.shuffle_dataset and not evaluation,
        completions=completions,
        num_left_out=made.num_left_out,
        notes=(*rows.notes, *made.notes),
    )
