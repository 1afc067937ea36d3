"""What each task makes of records: which formats it reads, the texts it needs, the samples of an example.

    record ─ write ─► texts ─ (all of a batch are tokenised at once) ─► read ─► ExampleDraft ─ finish ─► examples
                                                                          └──► or why there is nothing to train

`write` and `read` look at one row alone; `finish` sees a whole dataset, or a window of a stream, because rows are
packed and completions change places among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import numpy as np

from trl_ray.config.example_options import PackingStrategy
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.packing import PackedPiece, pack
from trl_ray.data.examples.pairs import (
    Comparison,
    PairSamples,
    answer_sample,
    compare,
    margin_of,
    mismatched_sample,
    read_pair,
    read_scored,
    same_tokens,
    write_pair,
    write_rated,
    write_scored,
)
from trl_ray.data.examples.steps import StepRules, StepTokens, read_steps, write_steps
from trl_ray.data.examples.supervised_texts import (
    SupervisedRules,
    SupervisedSample,
    as_training_sample,
    read_supervised,
    write_supervised,
)
from trl_ray.data.examples.tokenisation import Encoded, ExampleTokenizer, Text, TextRules
from trl_ray.data.formats.detection import DatasetType
from trl_ray.data.formats.records import (
    Document,
    PreferencePair,
    PromptCompletion,
    Record,
    SteppedSolution,
    UnpairedPreference,
)
from trl_ray.types import BoolArray, Example, TrainingSample

_PAIRED = frozenset({DatasetType.PREFERENCE, DatasetType.IMPLICIT_PREFERENCE})
_WINDOW_SHIFT = 32
"""Groups of packed rows are numbered by piece; those of window w begin at w * 2^32, which no window reaches."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExampleDraft:
    """What `read` made of one row, whatever the task."""

    row: int
    content: Any
    """For `finish` of the same task."""
    num_tokens: int = 0
    """Of all its sequences, before anything was cut."""
    cut_tokens: int = 0
    """Of these, how many limits on lengths cut off."""
    is_equal: bool = False
    """Its answers differ only beyond what was kept."""
    prompt_diverges: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether tokens were cut off."""
        return self.cut_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinishedExamples:
    """The examples of a dataset or of a window, and what was left out at last."""

    examples: tuple[Example, ...]
    untrained: Mapping[int, Untrained]
    targets: int = 0
    """Tokens to train before rows were packed; 0 where they are not."""
    unpacked: int = 0
    """Of these, how many packing lost."""


class Making(Protocol):
    """The tokens and samples of one task; all methods are functions of their arguments."""

    @property
    def accept(self) -> frozenset[DatasetType]:
        """The formats that it can use."""
        ...

    @property
    def masks(self) -> bool:
        """Whether it needs to know which tokens the assistant wrote."""
        ...

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """The texts of one row.

        Raises:
            DataError, ModelError: the row cannot be used; names it.
        """
        ...

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """What the tokens of its texts make of it."""
        ...

    def finish(self, drafts: Sequence[ExampleDraft], *, window: int) -> FinishedExamples:
        """The examples of all rows."""
        ...


Kind = TypeVar("Kind")


def _of_kind(record: Record, kind: type[Kind]) -> Kind:
    assert isinstance(record, kind), "readers are told which formats are accepted"
    return record


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedMaking:
    """Texts and answers to learn; packed, where there is a strategy for it."""

    tokenizer: ExampleTokenizer
    rules: SupervisedRules
    packing: PackingStrategy | None = None
    row_length: int | None = None
    """Tokens of a packed row."""

    accept = frozenset({DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION})

    @property
    def masks(self) -> bool:
        """Only where the assistant's turns alone are trained."""
        return self.rules.assistant_only_loss

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """The prompt, where there is one, and the whole."""
        assert isinstance(record, (Document, PromptCompletion)), "readers are told which formats are accepted"
        return write_supervised(record, self.tokenizer, self.rules, where=where)

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """A `SupervisedSample`."""
        assert isinstance(record, (Document, PromptCompletion)), "readers are told which formats are accepted"
        found = read_supervised(record, encoded, self.rules, row=row)
        if isinstance(found, Untrained):
            return found
        return ExampleDraft(
            row=row,
            content=found,
            num_tokens=len(found.token_ids) + found.cut_tokens,
            cut_tokens=found.cut_tokens,
            prompt_diverges=found.prompt_diverges,
        )

    def finish(self, drafts: Sequence[ExampleDraft], *, window: int) -> FinishedExamples:
        """One example per row, or per packed row."""
        samples: list[SupervisedSample] = [draft.content for draft in drafts]
        if self.packing is not None:
            return self._packed(samples, window)
        examples = (
            Example(
                row=sample.row,
                samples=(as_training_sample(sample.token_ids, sample.loss_mask, group_id=sample.row),),
            )
            for sample in samples
        )
        return FinishedExamples(examples=tuple(examples), untrained={})

    def _packed(self, samples: Sequence[SupervisedSample], window: int) -> FinishedExamples:
        assert self.packing is not None and self.row_length is not None, "packed rows have a length"
        lengths = [len(sample.token_ids) for sample in samples]
        packing = pack(lengths, max_length=self.row_length, strategy=self.packing)
        group, trained, examples = window << _WINDOW_SHIFT, set[int](), []
        for row in packing.rows:
            pieces = [piece for piece in row.pieces if _targets(samples[piece.example], piece).any()]
            if not pieces:
                continue
            examples.append(
                Example(
                    row=samples[pieces[0].example].row,
                    samples=tuple(
                        as_training_sample(
                            samples[piece.example].token_ids[piece.start : piece.stop],
                            _targets(samples[piece.example], piece),
                            group_id=group + number,
                        )
                        for number, piece in enumerate(pieces)
                    ),
                    num_rows=len(pieces),
                )
            )
            group += len(pieces)
            trained.update(piece.example for piece in pieces)
        lost = {sample.row: Untrained.TRUNCATED for i, sample in enumerate(samples) if i not in trained}
        targets = sum(int(sample.loss_mask.sum()) for sample in samples)
        kept = sum(int(sample.loss_mask.sum()) for example in examples for sample in example.samples)
        return FinishedExamples(examples=tuple(examples), untrained=lost, targets=targets, unpacked=targets - kept)


def _targets(sample: SupervisedSample, piece: PackedPiece) -> BoolArray:
    """The targets of a piece: nothing predicts its first token."""
    mask = sample.loss_mask[piece.start : piece.stop]
    if not mask[0]:
        return mask
    mask = mask.copy()
    mask[0] = False
    return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMaking:
    """Chosen and rejected, compared by their likelihood."""

    tokenizer: ExampleTokenizer
    rules: TextRules
    likelihood: bool
    """Train the prompt as well, as a third sample."""

    accept = _PAIRED
    masks = False

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """Prompt, prompt + chosen, prompt + rejected."""
        return write_pair(_of_kind(record, PreferencePair), self.tokenizer, self.rules, where=where)

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """The samples of a pair."""
        return _pair_draft(read_pair(encoded, self.rules, row=row, likelihood=self.likelihood))

    def finish(self, drafts: Sequence[ExampleDraft], *, window: int) -> FinishedExamples:
        """One example per pair."""
        return _one_per_row(drafts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredMaking:
    """Chosen and rejected, each scored at its last token."""

    tokenizer: ExampleTokenizer
    rules: TextRules

    accept = _PAIRED
    masks = False

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """Prompt + chosen, prompt + rejected."""
        return write_scored(_of_kind(record, PreferencePair), self.tokenizer, self.rules, where=where)

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """The samples of a pair, with its margin."""
        end, margin = self.tokenizer.eos_token_id, margin_of(record, where=where)
        return _pair_draft(
            read_scored(encoded, self.rules, row=row, end_id=0 if end is None else int(end), margin=margin)
        )

    def finish(self, drafts: Sequence[ExampleDraft], *, window: int) -> FinishedExamples:
        """One example per pair."""
        return _one_per_row(drafts)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMaking:
    """Solutions whose steps are scored."""

    tokenizer: ExampleTokenizer
    rules: StepRules
    tokens: StepTokens

    accept = frozenset({DatasetType.STEPWISE_SUPERVISION})
    masks = False

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """The prompt and each step."""
        return write_steps(_of_kind(record, SteppedSolution), self.tokenizer, self.rules, where=where)

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """One sample."""
        found = read_steps(_of_kind(record, SteppedSolution), encoded, self.rules, self.tokens, row=row)
        if isinstance(found, Untrained):
            return found
        return ExampleDraft(row=row, content=(found.sample,), num_tokens=found.num_tokens, cut_tokens=found.cut_tokens)

    def finish(self, drafts: Sequence[ExampleDraft], *, window: int) -> FinishedExamples:
        """One example per solution."""
        return _one_per_row(drafts)


def _pair_draft(found: PairSamples | Untrained) -> ExampleDraft | Untrained:
    if isinstance(found, Untrained):
        return found
    return ExampleDraft(
        row=found.row,
        content=found.samples,
        num_tokens=found.num_tokens,
        cut_tokens=found.cut_tokens,
        is_equal=found.is_equal,
        prompt_diverges=found.prompt_diverges,
    )


def _one_per_row(drafts: Sequence[ExampleDraft]) -> FinishedExamples:
    return FinishedExamples(
        examples=tuple(Example(row=draft.row, samples=draft.content) for draft in drafts), untrained={}
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rated:
    """A rated answer: its tokens before and after they are cut."""

    row: int
    found: Comparison
    sample: TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedMaking:
    """Rated answers; a pair counts as two, the wanted one first."""

    tokenizer: ExampleTokenizer
    rules: TextRules
    mismatched: bool
    """Give each prompt the answer to another one as well."""

    accept = _PAIRED | {DatasetType.UNPAIRED_PREFERENCE}
    masks = False

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """The prompt, and the prompt with each answer."""
        if isinstance(record, PreferencePair):
            return write_pair(record, self.tokenizer, self.rules, where=where)
        return write_rated(_of_kind(record, UnpairedPreference), self.tokenizer, self.rules, where=where)

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """One rated answer, or two of which the first is wanted."""
        if not encoded or (len(encoded) > 2 and np.array_equal(encoded[1].token_ids, encoded[2].token_ids)):
            return Untrained.TIE
        labels = (True, False) if isinstance(record, PreferencePair) else (_of_kind(record, UnpairedPreference).label,)
        rated: list[_Rated] = []
        reason = Untrained.NO_TARGET
        for lane, (label, whole) in enumerate(zip(labels, encoded[1:], strict=True)):
            found = compare((encoded[0], whole), row=row)
            sample = answer_sample(
                found.prompt_ids, found.answers[0], self.rules, group_id=2 * row + lane, desirable=label
            )
            if isinstance(sample, Untrained):
                reason = sample
            else:
                rated.append(_Rated(row=row, found=found, sample=sample))
        if not rated:
            return reason
        lengths = [len(each.found.prompt_ids) + len(each.found.answers[0].token_ids) for each in rated]
        return ExampleDraft(
            row=row,
            content=tuple(rated),
            num_tokens=sum(lengths),
            cut_tokens=sum(map(self.rules.num_cut, lengths)),
            is_equal=len(rated) > 1 and same_tokens(rated[0].sample, rated[1].sample),
            prompt_diverges=any(each.found.prompt_diverges for each in rated),
        )

    def finish(self, drafts: Sequence[ExampleDraft], *, window: int) -> FinishedExamples:
        """One example per rated answer; the answer of a predecessor, in a ring, is the mismatched one."""
        everything: list[_Rated] = [rated for draft in drafts for rated in draft.content]
        if not self.mismatched:
            examples = tuple(Example(row=rated.row, samples=(rated.sample,)) for rated in everything)
            return FinishedExamples(examples=examples, untrained={})
        rows = {draft.row for draft in drafts}
        if len(rows) < 2:
            return FinishedExamples(examples=(), untrained=dict.fromkeys(rows, Untrained.NO_PARTNER))
        # Of pairs first all wanted answers, then all others (TRL's order), lest a prompt get its own other answer.
        lanes = zip_longest(*(draft.content for draft in drafts))
        ring: list[_Rated] = [rated for lane in lanes for rated in lane if rated is not None]
        partners = {id(rated.sample): _predecessor(ring, place) for place, rated in enumerate(ring)}
        examples = tuple(
            Example(
                row=rated.row,
                samples=(rated.sample,),
                mismatched=mismatched_sample(
                    rated.found.prompt_ids,
                    partners[id(rated.sample)].found.answers[0],
                    self.rules,
                    group_id=rated.sample.group_id,
                ),
            )
            for rated in everything
        )
        return FinishedExamples(examples=examples, untrained={})


def _predecessor(ring: Sequence[_Rated], place: int) -> _Rated:
    """The nearest one before it, in a ring, that is of another row; there is one."""
    return next(ring[place - back] for back in range(1, len(ring)) if ring[place - back].row != ring[place].row)
