"""A stream as an endless, repeatable sequence of prompts: read as they are asked for, from any place on.

    RowStream ─ stream_window rows ─ make_prompts ─► window ─ permutation(seed, epoch, window) ─► Prompt, Prompt, ...
                     ^ the next one, or from the start again                                          │
                     └──────────────────── an ordinal beyond the window ◄─────────────────────────────┘

What is held is one window. A checkpoint keeps where one began, and a resumed run goes on from there to the ordinal that
its ledger names: what was issued and not trained comes from the ledger, what was not issued from here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.example_options import StreamConfig
from trl_ray.data.prompts.prompt_making import MadePrompts, PromptRules, make_prompts, readers_of
from trl_ray.data.prompts.prompt_source import PromptSource
from trl_ray.data.sources.dataset_files import Row
from trl_ray.data.sources.dataset_loading import Rows, RowStream, open_rows
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import Prompt

TOLD_ONCE = "Later rows of the stream of which this holds are not told."


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlace:
    """Where a window of a stream begins; goes into checkpoints."""

    ordinal: int = 0
    """Of its first prompt."""
    epoch: int = 0
    """Passes over the stream that are complete."""
    window: int = 0
    left_out: int = 0
    """Rows before it that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Window:
    """The prompts of some rows, in the order in which they are given."""

    place: PromptPlace
    source: PromptSource | None
    """None: all its rows are dropped."""
    num_left_out: int
    """Rows of it that cannot be used."""
    notes: tuple[str, ...]
    """What a user should know of its rows, a sentence each."""
    order: NDArray[np.int64]
    is_last: bool
    """Whether the stream ends with it."""
    fingerprint: str
    """Hex digest over its prompts and their columns."""

    @property
    def end(self) -> int:
        """The ordinal behind its last prompt."""
        return self.place.ordinal + len(self.order)

    @property
    def next(self) -> PromptPlace:
        """Where the window behind it begins."""
        place = self.place
        return PromptPlace(
            ordinal=self.end,
            epoch=place.epoch + self.is_last,
            window=0 if self.is_last else place.window + 1,
            left_out=place.left_out + self.num_left_out,
        )

    def prompt(self, ordinal: int) -> Prompt:
        assert self.source is not None, "a window without prompts ends where it begins"
        assert ordinal >= self.place.ordinal, "prompts of a window begin at its place"
        index = int(self.order[ordinal - self.place.ordinal])
        return self.source.row_prompt(index, epoch=self.place.epoch, ordinal=ordinal)


@dataclass(slots=True, kw_only=True, eq=False)
class _Reader:
    """How far a stream is read; whoever reads on does so with a copy, which counts once it is through; mutable."""

    held: _Window
    marks: list[_Window]
    """Windows from the one on of which prompts may be asked for again; more than one while prompts are issued."""
    ahead: tuple[int, Iterator[Row]] | None
    """The number of the next row, and the rows from there on."""
    length: int | None
    """Prompts of one pass, once the first is complete."""
    told: set[str]
    """Kinds of things that the user knows of the rows."""
    news: list[str]

    def take_note(self, window: _Window) -> None:
        """Know what a window that was opened tells of the stream."""
        if window.is_last and not window.place.epoch:
            self.length = window.end
        new = {kind: note for note in reversed(window.notes) if (kind := _kind(note)) not in self.told}
        self.told |= new.keys()
        self.news += [f"{note} {TOLD_ONCE}" for note in reversed(new.values())]


class PromptStream:
    """Prompts by ordinal, which are asked for in order; when the stream ends it is read again from its start.

    Every window is a permutation of its rows that depends on (seed, epoch, window) alone::

        stream = open_prompts(rules, StreamConfig(dataset_streaming=True), seed=42, dataset=dataset)
        stream.take(0, 4)                # the first four prompts
        stream.take(4, 4)                # those after them; earlier ones can be had again from `head` on

    Args:
        rows: the stream.
        rules: what rows are made into prompts by.
        window_rows: rows that are read and shuffled together.
        seed: of the permutations.
        shuffle: False keeps the order of the stream.
        check: sees whether the prompts of a window can be used.

    Raises:
        InputError: the stream is empty, or a row of its first window cannot be used.
    """

    def __init__(
        self,
        rows: RowStream,
        rules: PromptRules,
        *,
        window_rows: int,
        seed: int,
        shuffle: bool,
        check: Callable[[PromptSource], None] = lambda source: None,
    ) -> None:
        self.name = rows.name
        self._rows, self._rules, self._window_rows = rows, rules, window_rows
        self._seed, self._shuffle, self._check = seed, shuffle, check
        first, ahead = self._read(PromptPlace(), None)
        if not first.rows:
            raise DataError(f"A dataset must have at least one row, {self.name} has none. Check the file or the split.")
        self._readers = readers_of(replace(first, sources=rows.sources()), rules)
        made = make_prompts(first, rules, self._readers)
        self._first = made.first
        self.head = self._source(made)
        """The first window, which is known before training."""
        held = self._window(PromptPlace(), made, self.head, is_last=ahead is None)
        self._head_fingerprint = held.fingerprint
        told = set(map(_kind, self.head.notes))
        self._reader = _Reader(held=held, marks=[held], ahead=ahead, length=None, told=told, news=[])
        self._reader.take_note(held)
        self._turn = 0
        """Of whoever began to read last."""

    # What is known before training.

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the first rows, which every prompt has."""
        return self.head.columns

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the first rows, a sentence each."""
        return tuple(f"{note} {TOLD_ONCE}" for note in self.head.notes)

    # What is read as training goes on.

    @property
    def num_left_out(self) -> int:
        """Rows read so far that cannot be used, where such rows are dropped."""
        return self._reader.held.next.left_out

    def news(self) -> tuple[str, ...]:
        """What a user should know of rows that were read since the last call, but for kinds of things told already."""
        news, self._reader.news = tuple(self._reader.news), []
        return news

    def epochs_after(self, count: int) -> float:
        """Passes over the stream that are complete after so many prompts."""
        return float(count // length) if (length := self._reader.length) else 0.0

    def take(self, first: int, count: int) -> list[Prompt]:
        """The prompts at `count` ordinals from `first` on; those before `first` are never asked for again.

        A call that is overtaken by another one, or by `load_state_dict`, changes nothing: a session that has ended may
        have left a thread behind that reads.

        Raises:
            InputError: a row cannot be used or read; nothing is passed over, and it may be asked for again.
        """
        turn, reader = self._begin()
        if first < reader.held.place.ordinal:
            self._go_to(reader, [mark.place for mark in reader.marks if mark.place.ordinal <= first][-1])
        prompts = [self._next(reader, ordinal) for ordinal in range(first, first + count)]
        begun = [mark for mark in reader.marks if mark.place.ordinal <= first]
        reader.marks = reader.marks[len(begun) - 1 :]
        self._end(turn, reader)
        return prompts

    def first(self, count: int) -> list[Prompt]:
        """The first prompts, as many as there are; no more rows than these need are read."""
        turn, reader = self._begin()
        windows = [reader.held]
        while windows[-1].end < count and not windows[-1].is_last:
            windows.append(self._open(reader, windows[-1].next))
        self._end(turn, reader)
        every = (window.prompt(ordinal) for window in windows for ordinal in range(window.place.ordinal, window.end))
        return list(itertools.islice(every, count))

    def _begin(self) -> tuple[int, _Reader]:
        """Whose turn it is from now on, and a reader of its own."""
        self._turn += 1
        now = self._reader
        reader = replace(now, marks=list(now.marks), told=set(now.told), news=list(now.news))
        now.ahead = None  # one iterator is for one reader; who comes after an error reads from the window's start
        return self._turn, reader

    def _end(self, turn: int, reader: _Reader) -> None:
        if turn == self._turn:
            self._reader = reader

    def _next(self, reader: _Reader, ordinal: int) -> Prompt:
        while ordinal >= reader.held.end:
            reader.held = self._open(reader, reader.held.next)
            reader.marks.append(reader.held)
        return reader.held.prompt(ordinal)

    def _go_to(self, reader: _Reader, place: PromptPlace) -> None:
        reader.ahead = None
        reader.held = self._open(reader, place)
        reader.marks = [*(mark for mark in reader.marks if mark.place.ordinal < place.ordinal), reader.held]

    def _open(self, reader: _Reader, place: PromptPlace) -> _Window:
        """The window that begins there.

        Raises:
            InputError: one of its rows cannot be used and may not be dropped, or it has none.
        """
        rows, reader.ahead = self._read(place, reader.ahead)
        if not rows.rows:
            raise DataError(
                f"A stream must give the same rows whenever it is read, but {self.name} has no row {rows.start} where "
                f"it had one before, in pass {place.epoch} over it. Pass one that can be read again from its start."
            )
        made = make_prompts(
            rows,
            self._rules,
            self._readers,
            first=self._first,
            columns=self.columns,
            # The first window had prompts, and has them in every pass: there is no pass without any.
            may_be_empty=place.window > 0,
        )
        source = self._source(made) if made.rows else None
        window = self._window(place, made, source, is_last=reader.ahead is None)
        reader.take_note(window)
        return window

    def _read(
        self, place: PromptPlace, before: tuple[int, Iterator[Row]] | None
    ) -> tuple[Rows, tuple[int, Iterator[Row]] | None]:
        """The rows of a window, and what is ahead of them; None where the stream ends.

        Args:
            place: of the window.
            before: what was ahead of the window that was read last.
        """
        start = place.window * self._window_rows
        rows = before[1] if before is not None and before[0] == start else self._rows.read(start)
        taken = list(itertools.islice(rows, self._window_rows))
        for number, row in enumerate(taken, start=start):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"Row {number} of {self.name} must be an object with columns, got {show(row)}. Mend it."
                )
        columns = dict.fromkeys(str(column) for row in taken for column in row)
        # One row further, so that the last window is known to be it.
        ahead = list(itertools.islice(rows, 1))
        origins = tuple(self._rows.origin(start + index) for index in range(len(taken)))
        window = Rows(name=self.name, columns=tuple(columns), rows=taken, start=start, origins=origins)
        return window, (start + len(taken), itertools.chain(ahead, rows)) if ahead else None

    def _source(self, made: MadePrompts) -> PromptSource:
        source = PromptSource(
            name=self.name,
            rows=made.rows,
            seed=self._seed,
            shuffle=False,
            completions=self._rules.completions,
            num_left_out=made.num_left_out,
            notes=made.notes,
            numbers=made.numbers,
        )
        self._check(source)
        return source

    def _window(self, place: PromptPlace, made: MadePrompts, source: PromptSource | None, *, is_last: bool) -> _Window:
        order = np.arange(len(made.rows))
        if self._shuffle:
            order = np.random.default_rng([self._seed, place.epoch, place.window]).permutation(len(made.rows))
        return _Window(
            place=place,
            source=source,
            num_left_out=made.num_left_out,
            notes=made.notes,
            order=order,
            is_last=is_last,
            fingerprint="no prompts" if source is None else f"{source.fingerprint}-{source.columns_fingerprint}",
        )

    # What goes into checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Where a window began whose prompts may not all be issued, and what tells its rows from others, as JSON."""
        mark = self._reader.marks[0]
        return {
            "head": self._head_fingerprint,
            "window_rows": self._window_rows,
            "place": asdict(mark.place),
            "window": mark.fingerprint,
            "length": self._reader.length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, where this is the stream that it is of, as far as its rows are looked at.

        Raises:
            DataError: it is another one; says what differs.
        """
        if "head" not in state:
            raise DataError("a dataset then and a stream now")
        if state["head"] != self._head_fingerprint:
            raise DataError(f"the first {len(self.head)} prompts of the stream are not those that it began with")
        place = PromptPlace(**state["place"])
        turn, reader = self._begin()
        reader.length, reader.marks = state["length"], []
        self._go_to(reader, place)
        self._end(turn, reader)
        if reader.held.fingerprint != state["window"]:
            raise DataError(f"the rows of the stream from row {place.window * self._window_rows} on are other ones now")


def _kind(sentence: str) -> str:
    """A sentence without what differs from window to window."""
    told = re.sub(r"\([^)]*\)", "()", sentence).partition(", got ")[0]
    return re.sub(r"\brows?\b", "rows", re.sub(r"\d+", "#", told))


def open_prompts(
    rules: PromptRules,
    options: StreamConfig,
    *,
    seed: int,
    dataset: object | None = None,
    evaluation: bool = False,
    check: Callable[[PromptSource], None] = lambda source: None,
) -> PromptStream:
    """Open a stream of prompts; its first window is read, and told of as a dataset would be.

    Args:
        rules: of the run; their configuration names the dataset, its split and its prompt column.
        options: of the stream.
        seed: of the permutations.
        dataset: a `datasets.IterableDataset`, or anything else that can be iterated more than once.
        evaluation: take the held-out split, in its own order.
        check: sees whether the prompts of a window can be used.

    Raises:
        InputError: there is no such dataset, it is empty, or a row of the first window cannot be used.
    """
    config = rules.config
    return PromptStream(
        open_rows(config, seed=seed, dataset=dataset, evaluation=evaluation, lazily=True),
        rules,
        window_rows=options.stream_window,
        seed=seed,
        shuffle=config.shuffle_dataset and not evaluation,
        check=check,
    )
