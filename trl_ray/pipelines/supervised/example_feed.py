"""Which examples each step trains on, so that a resumed run takes the very same ones.

    ExampleSet --permutation(seed, epoch)--> ShuffledFeed.take(step)       any step, at any time
    stream --read, tokenise, pack a window--> StreamFeed.take(step)        one step after the other

`take` is called on a thread of its own while the step before is trained, so a stream is read and tokenised meanwhile.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trl_ray.data.examples.example_set import StreamedExample
from trl_ray.errors import DataError
from trl_ray.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlace:
    """Where in a stream a step ends; goes into checkpoints."""

    epoch: int = 0
    """Passes over the stream that are complete."""
    window: int = 0
    taken: int = 0
    """Examples of the window that are used up."""
    untrained: Mapping[str, int] = field(default_factory=dict)
    """Rows of all windows before it that are in no example, by reason."""
    losses: Mapping[str, int] = field(default_factory=dict)
    """What all windows before it have lost, by `Lost`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fed:
    """The examples of one step."""

    examples: tuple[Example, ...]
    epoch: float
    """Passes over the dataset that are done after the step."""
    place: StreamPlace | None = None
    """None where the number of the step says it all."""
    untrained: Mapping[str, int] | None = None
    """Rows met so far that are in no example, by reason; None where they were counted before training."""
    losses: Mapping[str, int] = field(default_factory=dict)
    """What the windows met so far have lost, by `Lost`; nothing where it was counted before training."""


class Feed(Protocol):
    """Gives the examples of steps."""

    def take(self, step: int) -> Fed:
        """The examples of a step, counted from 1; steps are taken in order."""
        ...


class ShuffledFeed:
    """A whole dataset; every epoch in an order of its own, whose last step may have fewer examples.

    Args:
        examples: in the order of the dataset.
        per_step: examples of one step.
        seed: with the epoch, it decides on the order.
        shuffle: False takes the order of the dataset in every epoch.
    """

    def __init__(self, examples: Sequence[Example], *, per_step: int, seed: int, shuffle: bool) -> None:
        assert examples, "a feed has examples"
        self._examples, self._per_step, self._seed, self._shuffle = examples, per_step, seed, shuffle
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take every example once."""
        return math.ceil(len(self._examples) / self._per_step)

    def take(self, step: int) -> Fed:
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        places = self._epoch(epoch)[number * self._per_step : (number + 1) * self._per_step]
        return Fed(examples=tuple(self._examples[place] for place in places), epoch=step / self.steps_per_epoch)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self._examples))
            if self._shuffle:
                order = np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
            self._order = (epoch, order)
        return self._order[1]


OpenStream = Callable[[int, int], Iterator[StreamedExample]]
"""(epoch, start_window) -> the examples of that pass from there on."""


class StreamFeed:
    """A stream that is read as training needs it, again from its start when it ends.

    Args:
        open_stream: begins a pass.
        per_step: examples of one step.
        place: where to go on.
    """

    def __init__(self, open_stream: OpenStream, *, per_step: int, place: StreamPlace) -> None:
        self._open, self._per_step = open_stream, per_step
        self._items = self._walk(place)

    def take(self, step: int) -> Fed:
        """See `Feed`; examples of two passes may meet in one step.

        Raises:
            DataError: of a row of the stream, or of a stream without a single example.
        """
        del step
        taken = list(itertools.islice(self._items, self._per_step))
        last = taken[-1]
        return Fed(
            examples=tuple(item.example for item in taken),
            epoch=float(last.place.epoch),
            place=last.place,
            untrained=last.counts.untrained,
            losses=last.counts.losses,
        )

    def _walk(self, start: StreamPlace) -> Iterator[_Streamed]:
        epoch, window, skip = start.epoch, start.window, start.taken
        # What was left out: before the pass was opened; in it, up to the window before and to the end of this one.
        opened, before, here = _Counts.of(start.untrained, start.losses), _Counts(), _Counts()
        while True:
            current = None
            for streamed in self._open(epoch, window):
                if streamed.window != current:
                    current = streamed.window
                    before = _Counts.of(streamed.untrained_before, streamed.losses_before)
                    here = _Counts.of(streamed.untrained, streamed.losses)
                if streamed.window > window or streamed.place >= skip:
                    kept = opened + before
                    place = StreamPlace(
                        epoch=epoch,
                        window=streamed.window,
                        taken=streamed.place + 1,
                        untrained=dict(kept.untrained),
                        losses=dict(kept.losses),
                    )
                    yield _Streamed(example=streamed.example, place=place, counts=opened + here)
            if current is None and window == 0:
                raise DataError(
                    "A stream must give at least one example, this one gives none: no row has a token to train within "
                    "max_length. Check the rows, or raise max_length."
                )
            opened, before, here = opened + here, _Counts(), _Counts()
            epoch, window, skip = epoch + 1, 0, 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Counts:
    """What a stream has left out."""

    untrained: Mapping[str, int] = field(default_factory=dict)
    losses: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, untrained: Mapping[Any, int], losses: Mapping[Any, int]) -> _Counts:
        """The same with names as plain text."""
        named = ({str(name): count for name, count in counts.items()} for counts in (untrained, losses))
        return cls(untrained=next(named), losses=next(named))

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            untrained=Counter(self.untrained) + Counter(other.untrained),
            losses=Counter(self.losses) + Counter(other.losses),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Streamed:
    """One example of a stream, the place after it, and what is left out up to the end of its window."""

    example: Example
    place: StreamPlace
    counts: _Counts


def place_of(state: Mapping[str, Any] | None) -> StreamPlace:
    """The place that a checkpoint kept; the start where it kept none."""
    return StreamPlace(**state) if state else StreamPlace()


def state_of(place: StreamPlace | None) -> dict[str, Any] | None:
    """As JSON values."""
    return None if place is None else asdict(place)
