"""A dataset as an endless, repeatable sequence of prompts that can be entered at any ordinal.

    PromptConfig -- load_rows --> Rows -- check, template, tokenise --> PromptSource
    PromptSource.prompt(ordinal):  ordinal -> (epoch, place) -> row = permutation(seed, epoch)[place] -> Prompt
                                   (seed, ordinal) -> with the dataset's completion, or without

Nothing is remembered between calls, so a resumed run asks for the next ordinal and gets what it would have got.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.messages import nearest
from trl_ray.config.sections import PromptConfig
from trl_ray.data.chat.chat_rendering import ChatFormat, own_template, render_chat
from trl_ray.data.chat.tool_schemas import read_call
from trl_ray.data.examples.tokenisation import ExampleTokenizer
from trl_ray.data.prompts.given_completions import GivenCompletions, GivenRow, given_rows
from trl_ray.data.sources.dataset_loading import Rows, load_rows
from trl_ray.data.validation import (
    check_kind,
    check_length,
    check_prompt,
    count_longer,
    plain_columns,
    require_column,
    show,
)
from trl_ray.errors import DataError
from trl_ray.types import IntArray, Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptRow:
    """One checked and tokenised row of a dataset."""

    token_ids: IntArray
    """[P] chat template applied."""
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    given: GivenRow | None = None
    """The dataset's completion, where prompts may come with one."""


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
    ) -> None:
        if not rows:
            raise DataError(f"A dataset must have at least one row, {name} has none.")
        self.name = name
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

    @property
    def fingerprint(self) -> str:
        """Hex digest over the token ids of all rows: tells a resumed run that its dataset has changed."""
        digest = hashlib.sha256()
        for row in self._rows:
            for ids in (row.token_ids, *(() if row.given is None else (row.given.prompt_ids, row.given.token_ids))):
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
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
        for index, row in enumerate(self._rows):
            value = row.columns.get(column)
            if not isinstance(value, str) or value not in allowed:
                guess = nearest(value, allowed) if isinstance(value, str) else None
                raise DataError(
                    f"Row {index} of {self.name}, field {column!r} ({option}), must be one of {', '.join(allowed)}, "
                    f"got {show(value)}. {f'Did you mean {guess!r}?' if guess else 'Mend or remove the row.'}"
                )

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

    Raises:
        DataError: there is no such dataset, it is empty, or a row cannot be used; names row and field.
        ModelError: conversational prompts and no chat template, or one that refuses a row.
    """
    rows = load_rows(config, seed=seed, dataset=dataset, evaluation=evaluation)
    for source in rows.sources or (rows,):
        require_column(source.columns, config.dataset_prompt_column, name=source.name)
    prompts = _checked_prompts(rows, config)
    texts = [_as_text(prompt, tokenizer, config, rows.where(i)) for i, prompt in enumerate(prompts)]
    # A rendered template writes its special tokens itself.
    standard = isinstance(prompts[0], str)
    token_ids = [np.asarray(ids, np.int32) for ids in tokenizer(texts, add_special_tokens=standard)["input_ids"]]
    # Of the prompt's last tokens, as many as are wanted.
    kept = slice(None) if max_prompt_length is None else slice(-max_prompt_length, None)
    token_ids = [ids[kept] for ids in token_ids]
    given: Sequence[GivenRow | None] = [None] * len(token_ids)
    if completions is not None:
        found = given_rows(rows, prompts, completions, config=config, tokenizer=tokenizer)
        given = [replace(row, prompt_ids=row.prompt_ids[kept]) for row in found]
        _check_lengths(rows, [row.prompt_ids[kept] for row in found], max_prompt_tokens)
    _check_lengths(rows, token_ids, max_prompt_tokens)
    ready = [
        PromptRow(
            token_ids=ids,
            given=given[i],
            messages=None if isinstance(prompt, str) else prompt,
            text=prompt if isinstance(prompt, str) else None,
            columns=plain_columns(row, config.dataset_prompt_column, where=rows.where(i)),
        )
        for i, (row, prompt, ids) in enumerate(zip(rows.rows, prompts, token_ids, strict=True))
    ]
    shuffle = config.shuffle_dataset and not evaluation
    return PromptSource(name=rows.name, rows=ready, seed=seed, shuffle=shuffle, completions=completions)


def _checked_prompts(rows: Rows, config: PromptConfig) -> list[str | tuple[Message, ...]]:
    """Every row's prompt, all text or all conversations, the system prompt inserted."""
    column = config.dataset_prompt_column
    prompts: list[str | tuple[Message, ...]] = []
    for index, row in enumerate(rows.rows):
        where = f"{rows.where(index)}, field {column!r}"
        prompt = check_prompt(row.get(column), where=where)
        check_kind(prompt, prompts[0] if prompts else prompt, where=where)
        if not isinstance(prompt, str):
            prompt = with_system_prompt(tuple(map(_with_read_calls, prompt)), config.system_prompt)
        prompts.append(prompt)
    if config.system_prompt is not None and isinstance(prompts[0], str):
        raise DataError(
            f"system_prompt needs conversational prompts, those of {rows.name} are plain text. Write it into the "
            "text, make each prompt a list of messages, or remove system_prompt."
        )
    return prompts


def _with_read_calls(message: Message) -> Message:
    calls = message.get("tool_calls")
    read = isinstance(calls, (list, tuple)) and all(isinstance(call, Mapping) for call in calls)
    return {**message, "tool_calls": [read_call(call) for call in calls]} if calls and read else message


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """Put `system_prompt` first unless the conversation brings a system or developer message of its own."""
    if system_prompt is None or messages[0]["role"] in {"system", "developer"}:
        return tuple(messages)
    return ({"role": "system", "content": system_prompt}, *messages)


def _as_text(prompt: str | tuple[Message, ...], tokenizer: ExampleTokenizer, config: PromptConfig, where: str) -> str:
    """A text, ready to be continued: by a new turn, or where the assistant's last one stops (TRL's rule)."""
    if isinstance(prompt, str):
        return prompt
    unfinished = prompt[-1]["role"] == "assistant"
    return render_chat(
        tokenizer,
        prompt,
        ChatFormat(template=own_template(tokenizer), template_kwargs=config.chat_template_kwargs),
        add_generation_prompt=not unfinished,
        continue_final_message=unfinished,
        where=where,
    ).text


def _check_lengths(rows: Rows, token_ids: Sequence[IntArray], limit: int | None) -> None:
    lengths = [len(ids) for ids in token_ids]
    for index, length in enumerate(lengths):
        if length == 0:
            raise DataError(f"{rows.where(index)} must have at least one token after tokenisation, it has none.")
        if limit is not None and length > limit:
            check_length(length, limit, where=rows.where(index), longer=count_longer(lengths, limit))
