"""What the work of samples is estimated by, and how pieces of work are spread over micro-batches and ranks.

    samples --piece_of--> Piece --pack: longest first onto the least loaded--> Bin x k --deal--> ranks

Work is counted in tokens as the layout lays them out (`layout.py`): a prompt once for all its completions in
a micro-batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trl_ray.algorithms.batches.layout import input_length
from trl_ray.config.sections import SharePrompt
from trl_ray.types import TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRules:
    """What a micro-batch may hold, and what its work is estimated by."""

    max_samples: int | None = None
    """Completions in one micro-batch, at most; None: any number. Not looked at where whole examples are cut."""
    max_examples: int | None = None
    """Whole examples in one micro-batch, at most; None: any number. Looked at only where these are cut."""
    max_tokens: int | None = None
    """Tokens of model input in one micro-batch, at most. A sample or example that is longer gets one of its own."""
    ranks: int = 1
    """The micro-batches are made to be dealt out to this many ranks evenly."""
    share: SharePrompt = SharePrompt.AUTO
    """NEVER counts a group's prompt once per completion."""
    padded: bool = False
    """The model's attention cannot be told where sequences begin: every row counts as long as the longest."""
    hidden_size: int = 1024
    """H; a pair of tokens in attention costs 2 H where a token costs 12 H^2 in the linear layers of a block."""
    head_share: float = 0.25
    """Work of a trained token in the head, forward and backward twice, over that of a token in all blocks:
    V / (9 H layers)."""

    def __post_init__(self) -> None:
        assert self.max_samples is None or self.max_samples >= 1, "a micro-batch holds at least one completion"
        assert self.max_examples is None or self.max_examples >= 1, "a micro-batch holds at least one example"
        assert self.max_tokens is None or self.max_tokens >= 1, "a micro-batch holds at least one token"
        assert self.ranks >= 1, "there is at least one rank"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Samples that stay together: an example, a group or a part of one. Those without a trained token take no room."""

    members: tuple[int, ...]
    """Places in the list that is cut; ascending."""
    keys: tuple[tuple[int, bytes] | None, ...]
    """Which prompt it is, if it may be shared; None for a sample that is no input."""
    prompts: tuple[int, ...]
    bodies: tuple[int, ...]
    trained: int
    whole: bool = False
    """An example: it is never torn and counts as one."""

    @property
    def count(self) -> int:
        """What it counts against the limit of a micro-batch."""
        return 1 if self.whole else len(self.members)

    def part(self, places: Sequence[int], trained: Sequence[int]) -> Piece:
        """Some of the members, with their numbers of trained tokens."""
        return Piece(
            members=tuple(self.members[i] for i in places),
            keys=tuple(self.keys[i] for i in places),
            prompts=tuple(self.prompts[i] for i in places),
            bodies=tuple(self.bodies[i] for i in places),
            trained=sum(trained[self.members[i]] for i in places),
        )


@dataclass(slots=True, kw_only=True)
class Bin:
    """A micro-batch that is being filled."""

    rules: CutRules
    pieces: list[Piece] = field(default_factory=list)
    cost: float = 0.0
    tokens: int = 0
    _rows: int = 0
    _longest: int = 0
    _count: int = 0
    _prompts: set[tuple[int, bytes]] = field(default_factory=set)

    def fits(self, piece: Piece) -> bool:
        """Whether it can be added; an empty bin takes a single sample or example of any length."""
        # What is longer than the budget by itself would fit nowhere.
        if not self.pieces and piece.count == 1:
            return True
        rules = self.rules
        limit = rules.max_examples if piece.whole else rules.max_samples
        if limit is not None and self._count + piece.count > limit:
            return False
        return rules.max_tokens is None or self.size_with(piece) <= rules.max_tokens

    def size_with(self, piece: Piece) -> int:
        """Tokens of model input once it is added."""
        if self.rules.padded:
            rows = [p + b for key, p, b in zip(piece.keys, piece.prompts, piece.bodies, strict=True) if key]
            # Every row is filled up to the longest, so that one long text makes all others dear.
            return (self._rows + len(rows)) * max([self._longest, *rows])
        return self.tokens + _tokens(piece, self.rules, self._prompts)

    def add(self, piece: Piece) -> None:
        """Put it in."""
        rows = [p + b for key, p, b in zip(piece.keys, piece.prompts, piece.bodies, strict=True) if key]
        self.tokens = self.size_with(piece)
        self.cost += _cost(piece, self.rules, self._prompts)
        self._prompts.update(key for key in piece.keys if key)
        self._rows += len(rows)
        self._longest = max([self._longest, *rows])
        self._count += piece.count
        self.pieces.append(piece)


def _tokens(piece: Piece, rules: CutRules, known: Iterable[tuple[int, bytes]] = ()) -> int:
    """Tokens of model input; prompts that are `known` are there already."""
    if rules.share is SharePrompt.NEVER:
        return sum(p + b for key, p, b in zip(piece.keys, piece.prompts, piece.bodies, strict=True) if key)
    new = {key: p for key, p in zip(piece.keys, piece.prompts, strict=True) if key and key not in known}
    return sum(new.values()) + sum(piece.bodies)


def _cost(piece: Piece, rules: CutRules, known: Iterable[tuple[int, bytes]] = ()) -> float:
    """Work in tokens: linear layers, attention (pairs of tokens), head."""
    # Only completions: each of their tokens sees the whole prompt and, on average, half of its own completion.
    pairs = sum(b * (p + b / 2) for p, b in zip(piece.prompts, piece.bodies, strict=True))
    # 2 H for a pair against 12 H^2 for a token makes a pair worth 1 / (6 H) tokens.
    return _tokens(piece, rules, known) + pairs / (6 * rules.hidden_size) + rules.head_share * piece.trained


def piece_of(
    samples: Sequence[TrainingSample], members: Sequence[int], trained: Sequence[int], *, whole: bool = False
) -> Piece:
    """The samples at some places of a list as one piece; `trained` counts the tokens of all of the list."""
    chosen = [samples[member] for member in members]
    lengths = [input_length(sample) for sample in chosen]
    inputs = list(zip(chosen, lengths, strict=True))
    return Piece(
        members=tuple(members),
        keys=tuple(None if length is None else prompt_key(sample) for sample, length in inputs),
        prompts=tuple(0 if length is None else len(sample.prompt_ids) for sample, length in inputs),
        bodies=tuple(length or 0 for length in lengths),
        trained=sum(trained[member] for member in members),
        whole=whole,
    )


def prompt_key(sample: TrainingSample) -> tuple[int, bytes]:
    """The same for samples that may share their prompt: same group and, to be sure, same tokens."""
    return sample.group_id, sample.prompt_ids.tobytes()


def split_piece(piece: Piece, size: int, trained: Sequence[int]) -> list[Piece]:
    """Pieces of at most `size` samples, of nearly equal numbers of them."""
    count = -(-len(piece.members) // size)
    if count == 1:
        return [piece]
    return [piece.part(places.tolist(), trained) for places in np.array_split(np.arange(len(piece.members)), count)]


def pack(pieces: Sequence[Piece], rules: CutRules, trained: Sequence[int]) -> list[Bin]:
    """The fewest bins, in multiples of the ranks, that the longest-first rule can do with."""
    count = rules.ranks * max(1, -(-fewest(pieces, rules) // rules.ranks))
    # The bound is only one from below; the rule may need more, and then one more for every rank.
    while True:
        bins = _fill(pieces, rules, trained, count)
        if bins is not None:
            return bins
        assert count < sum(piece.count for piece in pieces) + rules.ranks, "everything fits a bin of its own"
        count += rules.ranks


def fewest(pieces: Sequence[Piece], rules: CutRules) -> int:
    """No fewer bins than this can do."""
    limit = rules.max_examples if any(piece.whole for piece in pieces) else rules.max_samples
    by_count = 1 if limit is None else -(-sum(piece.count for piece in pieces) // limit)
    if rules.max_tokens is None:
        return by_count
    prompts: dict[tuple[int, bytes], int] = {}
    for piece in pieces:
        prompts |= {key: p for key, p in zip(piece.keys, piece.prompts, strict=True) if key}
    once = sum(prompts.values())
    each = sum(sum(piece.prompts) for piece in pieces)
    tokens = (each if rules.padded or rules.share is SharePrompt.NEVER else once) + sum(
        sum(piece.bodies) for piece in pieces
    )
    # What is longer than the budget and cannot be torn fills one bin however long it is.
    sizes = [size for piece in pieces for size in _smallest_sizes(piece, rules)]
    excess = sum(max(0, size - rules.max_tokens) for size in sizes)
    return max(by_count, -(-max(tokens - excess, 1) // rules.max_tokens))


def _smallest_sizes(piece: Piece, rules: CutRules) -> list[int]:
    """Tokens of model input of each thing in a piece that cannot be torn."""
    if piece.whole:
        return [Bin(rules=rules).size_with(piece)]
    return [p + b for p, b in zip(piece.prompts, piece.bodies, strict=True)]


def _fill(pieces: Sequence[Piece], rules: CutRules, trained: Sequence[int], count: int) -> list[Bin] | None:
    """Longest first onto the least loaded bin with room; what fits nowhere is halved. None when even that fails."""
    bins = [Bin(rules=rules) for _ in range(count)]
    # No two pieces share a member, so pieces themselves are never compared.
    waiting = [(-_cost(piece, rules), piece.members, piece) for piece in pieces]
    heapq.heapify(waiting)
    while waiting:
        piece = heapq.heappop(waiting)[-1]
        room = [one for one in bins if one.fits(piece)]
        if room:
            min(room, key=lambda one: one.cost).add(piece)
        elif piece.count > 1:
            for half in split_piece(piece, -(-len(piece.members) // 2), trained):
                heapq.heappush(waiting, (-_cost(half, rules), half.members, half))
        else:
            return None
    return bins


def assign_to_ranks(costs: Sequence[float], ranks: int, *, equal: bool) -> list[list[int]]:
    """Places [R][...] of items, dealt largest first to the rank with the least work so far.

    With `equal` no rank gets more than its share of the number of items. Ascending within a rank.
    """
    most = -(-len(costs) // ranks) if equal else len(costs)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    # Equal work goes by place, so that the same batch is always dealt out alike.
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        rank = min((r for r in range(ranks) if len(hands[r]) < most), key=lambda r: (loads[r], len(hands[r]), r))
        hands[rank].append(place)
        loads[rank] += costs[place]
    return [sorted(hand) for hand in hands]
