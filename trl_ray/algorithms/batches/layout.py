"""How samples become model inputs, such that nothing is computed twice and little is padding.

    segments  [ p p p a a b b b c q q d d ]                 one row, no padding; prompt p once for a, b, c
    restarts  [ p p p a a | p p p b b b | p p p c | ... ]   one row, no padding; each sample begins anew at position 0
    shared    [ p p p a a b b b c q q d d . ]               rows of whole groups with a dense mask, evened out
    padded    [ p p p a a . ] [ p p p b b b ] [ ... ]       one row per sample

Which of them it can be is a matter of what the model's attention can be told; the first is the fastest by far. Where
a prompt is shared, positions of each completion go on from it, and a token sees its own prompt and its own completion
only (tree attention of depth one). The last token of a completion predicts nothing that is trained on, so it is no
input; a completion without a trained token is left out altogether.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trl_ray.config.sections import SharePrompt
from trl_ray.types import IntArray, TrainingSample

ROW_TOKENS = 256
"""Groups share a row up to this length: long enough to even out lengths, short for an attention that is dense."""
MAX_SHARED_ROW = 4096
"""AUTO shares no prompt in rows longer than this: their masks alone would take T * T bytes each."""
Ints = NDArray[np.int64]


class AttentionKind(enum.StrEnum):
    """What a model's attention can be told of who sees whom."""

    CAUSAL = "causal"
    """Nothing: rows are plainly causal and padded at the right."""
    MASKED = "masked"
    """A dense mask per row, which costs attention over all pairs of tokens of the row."""
    RESTARTS = "restarts"
    """Sequences begin where positions start again at 0 (fused kernels for rows of several sequences)."""
    SEGMENTS = "segments"
    """The segments of the row: prompts and their completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A prompt and the completions that go on from it, as they follow each other in a row."""

    prompt: int
    """Tokens."""
    bodies: tuple[int, ...]
    """Tokens of each completion, all > 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Model inputs of a micro-batch, R rows of T tokens, and where its N trained tokens are predicted."""

    input_ids: Tensor
    """[R, T] int64, right-padded with 0."""
    position_ids: Tensor
    """[R, T] int64"""
    mask: Tensor | None
    """[R, 1, T, T] bool, True where row token i sees token j; None: plain causal (padding is at the right), or told by
    segments or positions."""
    segments: tuple[Segment, ...] | None
    """What the one row is made of, for attention of kind SEGMENTS."""
    predictors: Tensor
    """[N] int64 index into the R*T hidden states of the token before each trained token, in sample order."""
    targets: Tensor
    """[N] int64 ids of the trained tokens."""
    lengths: Tensor
    """[R, T] float32 tokens of the sequence a token belongs to, prompt and whole completion; of several that share it,
    their mean; 1 for padding."""

    def to(self, device: torch.device | str) -> Layout:
        """The same on another device."""
        return Layout(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            segments=self.segments,
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            lengths=self.lengths.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """A prompt with the completions (of samples numbered `samples`) that follow it."""

    prompt: IntArray
    samples: tuple[int, ...]
    bodies: tuple[IntArray, ...]
    """Input tokens of each completion: all before its last trained one."""

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(body) for body in self.bodies)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to add to attention scores, for attention written out in matrix products."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def build_layout(
    samples: Sequence[TrainingSample], *, share: SharePrompt, hidden_size: int, attention: AttentionKind
) -> Layout | None:
    """Lay samples out as model inputs.

    Args:
        samples: of one micro-batch.
        share: AUTO takes the layout that costs less.
        hidden_size: H of the model, for weighing linear layers against attention.
        attention: what the model's attention can be told.

    Returns:
        None when not a single token is trained on.
    """
    bodies = [_body(sample) for sample in samples]
    trained = [index for index, body in enumerate(bodies) if body is not None]
    if not trained:
        return None
    for index in trained:
        assert len(samples[index].prompt_ids) > 0, "the first completion token needs a prompt token that predicts it"
    single = [_block(samples, bodies, [index]) for index in trained]
    # Neither kind can be told that completions see one prompt but not each other.
    if share is SharePrompt.NEVER or attention in {AttentionKind.CAUSAL, AttentionKind.RESTARTS}:
        grouped = single
    else:
        grouped = [_block(samples, bodies, group) for group in _by_group(samples, trained)]
    match attention:
        case AttentionKind.SEGMENTS | AttentionKind.RESTARTS:
            rows = [grouped]
        case AttentionKind.CAUSAL | AttentionKind.MASKED:
            # A dense mask makes attention pay for all pairs of a row, so that sharing does not always save work.
            rows = [[block] for block in single]
            shared = pack_rows(grouped)
            if grouped is not single and (share is SharePrompt.ALWAYS or _pays(shared, rows, hidden_size)):
                rows = shared
    return _assemble(samples, rows, attention)


def input_length(sample: TrainingSample) -> int | None:
    """Completion tokens that are model inputs; None where not even the prompt is, as nothing is trained on."""
    trained = np.flatnonzero(sample.loss_mask)
    return int(trained[-1]) if trained.size else None


def _body(sample: TrainingSample) -> IntArray | None:
    """Completion tokens that must be inputs: those before the last trained one; None without a trained one."""
    length = input_length(sample)
    return None if length is None else sample.completion_ids[:length]


def _block(samples: Sequence[TrainingSample], bodies: Sequence[IntArray | None], indices: Sequence[int]) -> _Block:
    parts = tuple(body for body in (bodies[index] for index in indices) if body is not None)
    return _Block(prompt=samples[indices[0]].prompt_ids, samples=tuple(indices), bodies=parts)


def _by_group(samples: Sequence[TrainingSample], indices: Iterable[int]) -> list[list[int]]:
    """Sample numbers by prompt: same group and, to be sure, same tokens."""
    groups: dict[tuple[int, bytes], list[int]] = {}
    for index in indices:
        key = (samples[index].group_id, samples[index].prompt_ids.tobytes())
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def pack_rows(blocks: Sequence[_Block], *, row_tokens: int = ROW_TOKENS) -> list[list[_Block]]:
    """Spread blocks over rows of nearly equal length (longest first, each onto the shortest row so far)."""
    longest = max(row_tokens, *(block.length for block in blocks))
    rows: list[list[_Block]] = [[] for _ in range(-(-sum(block.length for block in blocks) // longest))]
    lengths = [0] * len(rows)
    for block in sorted(blocks, key=lambda block: -block.length):
        shortest = lengths.index(min(lengths))
        rows[shortest].append(block)
        lengths[shortest] += block.length
    return rows


def _length(rows: Sequence[Sequence[_Block]]) -> int:
    return max(sum(block.length for block in row) for row in rows)


def _pays(shared: Sequence[Sequence[_Block]], padded: Sequence[Sequence[_Block]], hidden_size: int) -> bool:
    """Whether the shared layout needs fewer multiplications.

    A token costs 12 H^2 in the linear layers of a block and 4 T H in its attention, half of it where attention is
    plainly causal; divided by 2 H.
    """
    long, short = _length(shared), _length(padded)
    if long > MAX_SHARED_ROW:
        return False
    return len(shared) * long * (6 * hidden_size + 2 * long) < len(padded) * short * (6 * hidden_size + short)


def _assemble(samples: Sequence[TrainingSample], rows: Sequence[Sequence[_Block]], attention: AttentionKind) -> Layout:
    height, width = len(rows), _length(rows)
    ids = np.zeros((height, width), np.int64)
    # Padding counts on: positions that start again would be taken for the next of several packed sequences.
    positions = np.tile(np.arange(width), (height, 1))
    # Which prompt a token belongs to (-1 for padding), and which completion of it (0 for the prompt itself).
    block_of, part_of = np.full((height, width), -1, np.int64), np.zeros((height, width), np.int64)
    lengths = np.ones((height, width), np.float32)
    predictors: dict[int, Ints] = {}
    for r, row in enumerate(rows):
        start = 0
        for number, block in enumerate(row):
            end = start + block.length
            ids[r, start:end] = np.concatenate([block.prompt, *block.bodies])
            block_of[r, start:end] = number
            last_of_prompt = start + len(block.prompt) - 1
            positions[r, start : last_of_prompt + 1] = np.arange(len(block.prompt))
            at = last_of_prompt + 1
            whole = [len(block.prompt) + len(samples[sample].completion_ids) for sample in block.samples]
            # A shared prompt is embedded once, so that its noise cannot have the length of each completion.
            lengths[r, start:at] = np.mean(whole)
            for part, (sample, body) in enumerate(zip(block.samples, block.bodies, strict=True), start=1):
                part_of[r, at : at + len(body)] = part
                lengths[r, at : at + len(body)] = whole[part - 1]
                positions[r, at : at + len(body)] = len(block.prompt) + np.arange(len(body))
                # The token before predicts: the prompt's last one stands before the first of each of its completions.
                before = np.concatenate([[last_of_prompt], np.arange(at, at + len(body))])
                predictors[sample] = r * width + before[np.flatnonzero(samples[sample].loss_mask)]
                at += len(body)
            start = end
    packed = attention in {AttentionKind.SEGMENTS, AttentionKind.RESTARTS}
    # Rows of one sequence are right under plain causal attention, for which there are fused kernels.
    plain = packed or all(len(row) == 1 and len(row[0].bodies) == 1 for row in rows)
    # Rows may have been filled longest first; losses want the tokens sample by sample.
    order = sorted(predictors)
    targets = [samples[index].completion_ids[samples[index].loss_mask] for index in order]
    return Layout(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        mask=None if plain else _tree_mask(torch.from_numpy(block_of), torch.from_numpy(part_of)),
        segments=_segments(rows[0]) if attention is AttentionKind.SEGMENTS else None,
        predictors=torch.from_numpy(np.concatenate([predictors[index] for index in order])),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        lengths=torch.from_numpy(lengths),
    )


def _segments(row: Sequence[_Block]) -> tuple[Segment, ...]:
    return tuple(
        Segment(prompt=len(block.prompt), bodies=tuple(len(body) for body in block.bodies if len(body)))
        for block in row
    )


def _tree_mask(block_of: Tensor, part_of: Tensor) -> Tensor:
    """[R, 1, T, T] from the block and part of each token [R, T]."""
    width = block_of.shape[1]
    sees = block_of[:, :, None] == block_of[:, None, :]
    sees &= (part_of[:, None, :] == 0) | (part_of[:, :, None] == part_of[:, None, :])
    # Padding, too, sees the tokens of padding before it: a row without any would give NaN.
    return (sees & torch.ones(width, width, dtype=torch.bool).tril_()).unsqueeze(1)
