"""What each task makes of records: which formats it reads, the texts it needs, the samples of an example.

    record ─ write ─► texts ─ (all of a batch are tokenised at once) ─► read ─► ExampleDraft ─► TokenTable ─ finish ─┐
                                                                          └──► or why nothing is trained    examples ◄─┘

`write` and `read` look at one row alone; `finish` sees a whole dataset, or a window of a stream, because rows are
packed and completions change places among them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from trl_ray.config.example_options import PackingStrategy
from trl_ray.data.examples.given_tokens import PAIR_IDS, TEXT_IDS, GivenTokens, TokenReader, token_reader
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.made_examples import PackedExamples, RatedExamples, RowExamples
from trl_ray.data.examples.packing import pack
from trl_ray.data.examples.pairs import (
    PairSamples,
    answer_sample,
    compare,
    margin_of,
    read_pair,
    read_scored,
    same_tokens,
    whole_answer,
    write_pair,
    write_rated,
    write_scored,
)
from trl_ray.data.examples.steps import StepRules, StepTokens, read_steps, write_steps
from trl_ray.data.examples.supervised_texts import (
    SupervisedRules,
    SupervisedSample,
    as_training_sample,
    cut_supervised,
    read_supervised,
    write_supervised,
)
from trl_ray.data.examples.token_table import TokenTable
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
from trl_ray.types import Example, TrainingSample

_PAIRED = frozenset({DatasetType.PREFERENCE, DatasetType.IMPLICIT_PREFERENCE})
_WINDOW_SHIFT = 32
"""Groups of packed rows are numbered by piece; those of window w begin at w * 2^32, which no window reaches."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExampleDraft:
    """What `read` made of one row, whatever the task."""

    row: int
    samples: tuple[TrainingSample, ...]
    """For `finish` of the same task; of rated answers, not cut."""
    num_tokens: int
    """Of all its sequences, before anything was cut."""
    cut_tokens: int
    """Of these, how many limits on lengths cut off."""
    kept_tokens: int
    """Of its examples, as they are trained."""
    is_equal: bool = False
    """Its answers differ only beyond what was kept."""
    prompt_diverges: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinishedExamples:
    """The examples of a dataset or of a window, and what was left out at last."""

    examples: Sequence[Example]
    untrained: Mapping[int, Untrained]
    num_tokens: int = 0
    """Of all examples."""
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

    def finish(self, table: TokenTable, *, window: int) -> FinishedExamples:
        """The examples of all rows."""
        ...


@runtime_checkable
class TakesTokens(Protocol):
    """A task that has a use for rows that are tokenised already."""

    token_columns: tuple[str, ...]
    """The columns of their token ids."""

    def token_reader(self, columns: Collection[str], *, name: str) -> TokenReader:
        """How to read a dataset that has them."""
        ...

    def take(self, given: GivenTokens, *, row: int, where: str) -> ExampleDraft | Untrained:
        """What a row makes."""
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
    token_columns = TEXT_IDS

    @property
    def masks(self) -> bool:
        """Only where the assistant's turns alone are trained."""
        return self.rules.assistant_only_loss

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """The prompt, where there is one, and the whole."""
        assert isinstance(record, (Document, PromptCompletion)), "readers are told which formats are accepted"
        return write_supervised(record, self.tokenizer, self.rules, where=where)

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """One sample."""
        assert isinstance(record, (Document, PromptCompletion)), "readers are told which formats are accepted"
        return self._draft(read_supervised(record, encoded, self.rules, row=row), row)

    def token_reader(self, columns: Collection[str], *, name: str) -> TokenReader:
        """Of `input_ids`, with what is trained of them."""
        vocabulary = len(cast("Sized", self.tokenizer))
        return token_reader(columns, ids=self.token_columns, rules=self.rules, name=name, vocabulary=vocabulary)

    def take(self, given: GivenTokens, *, row: int, where: str) -> ExampleDraft | Untrained:
        """One sample."""
        return self._draft(cut_supervised(given.sequences[0], given.mask, self.rules, row=row), row)

    def _draft(self, found: SupervisedSample | Untrained, row: int) -> ExampleDraft | Untrained:
        if isinstance(found, Untrained):
            return found
        return ExampleDraft(
            row=row,
            samples=(as_training_sample(found.token_ids, found.loss_mask, group_id=row),),
            num_tokens=len(found.token_ids) + found.cut_tokens,
            cut_tokens=found.cut_tokens,
            kept_tokens=len(found.token_ids),
            prompt_diverges=found.prompt_diverges,
        )

    def finish(self, table: TokenTable, *, window: int) -> FinishedExamples:
        """One example per row, or per packed row."""
        if self.packing is None:
            return _one_per_row(table)
        assert self.row_length is not None, "packed rows have a length"
        kept = table.kept
        packing = pack(table.column("kept_tokens")[kept], max_length=self.row_length, strategy=self.packing)
        examples = PackedExamples(table, packing, first_group=window << _WINDOW_SHIFT)
        lost = np.setdiff1d(np.arange(len(kept)), examples.trained)
        return FinishedExamples(
            examples=examples,
            untrained=dict.fromkeys(table.numbers(kept[lost]), Untrained.TRUNCATED),
            num_tokens=examples.num_tokens,
            targets=table.total("num_targets"),
            unpacked=examples.unpacked,
        )


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

    def finish(self, table: TokenTable, *, window: int) -> FinishedExamples:
        """One example per pair."""
        return _one_per_row(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredMaking:
    """Chosen and rejected, each scored at its last token."""

    tokenizer: ExampleTokenizer
    rules: TextRules

    accept = _PAIRED
    masks = False
    token_columns = PAIR_IDS

    def token_reader(self, columns: Collection[str], *, name: str) -> TokenReader:
        """Of both answers, each with its prompt."""
        vocabulary = len(cast("Sized", self.tokenizer))
        return token_reader(columns, ids=self.token_columns, rules=None, name=name, vocabulary=vocabulary)

    def take(self, given: GivenTokens, *, row: int, where: str) -> ExampleDraft | Untrained:
        """The samples of a pair, with its margin."""
        wholes = [Encoded(token_ids=ids) for ids in given.sequences]
        return self._draft(wholes, margin_of(given, where=where), row)

    def write(self, record: Record, *, where: str) -> tuple[Text, ...]:
        """Prompt + chosen, prompt + rejected."""
        return write_scored(_of_kind(record, PreferencePair), self.tokenizer, self.rules, where=where)

    def read(self, record: Record, encoded: Sequence[Encoded], *, row: int, where: str) -> ExampleDraft | Untrained:
        """The samples of a pair, with its margin."""
        return self._draft(encoded, margin_of(record, where=where), row)

    def _draft(self, encoded: Sequence[Encoded], margin: float | None, row: int) -> ExampleDraft | Untrained:
        end = self.tokenizer.eos_token_id
        return _pair_draft(
            read_scored(encoded, self.rules, row=row, end_id=0 if end is None else int(end), margin=margin)
        )

    def finish(self, table: TokenTable, *, window: int) -> FinishedExamples:
        """One example per pair."""
        return _one_per_row(table)


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
        return ExampleDraft(
            row=row,
            samples=(found.sample,),
            num_tokens=found.num_tokens,
            cut_tokens=found.cut_tokens,
            kept_tokens=_num_tokens((found.sample,)),
        )

    def finish(self, table: TokenTable, *, window: int) -> FinishedExamples:
        """One example per solution."""
        return _one_per_row(table)


def _pair_draft(found: PairSamples | Untrained) -> ExampleDraft | Untrained:
    if isinstance(found, Untrained):
        return found
    return ExampleDraft(
        row=found.row,
        samples=found.samples,
        num_tokens=found.num_tokens,
        cut_tokens=found.cut_tokens,
        kept_tokens=_num_tokens(found.samples),
        is_equal=found.is_equal,
        prompt_diverges=found.prompt_diverges,
    )


def _num_tokens(samples: Sequence[TrainingSample]) -> int:
    """Tokens of all samples, the prompts of each one included."""
    return sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples)


def _one_per_row(table: TokenTable) -> FinishedExamples:
    return FinishedExamples(examples=RowExamples(table), untrained={}, num_tokens=table.total("kept_tokens"))


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
            found = compare((encoded[0], whole), self.rules, row=row)
            prompt, answer, group = found.prompt_ids, found.answers[0], 2 * row + lane
            sample = answer_sample(prompt, answer, self.rules, group_id=group, desirable=label)
            if isinstance(sample, Untrained):
                reason = sample
            else:
                uncut = whole_answer(prompt, answer, group_id=group, desirable=label)
                rated.append(
                    _Rated(
                        uncut=uncut,
                        sample=sample,
                        prompt_cut=found.prompt_cut,
                        prompt_diverges=found.prompt_diverges,
                    )
                )
        if not rated:
            return reason
        lengths = [len(each.uncut.prompt_ids) + len(each.uncut.completion_ids) for each in rated]
        return ExampleDraft(
            row=row,
            samples=tuple(each.uncut for each in rated),
            num_tokens=sum(lengths) + (prompts := sum(each.prompt_cut for each in rated)),
            cut_tokens=sum(map(self.rules.num_cut, lengths)) + prompts,
            kept_tokens=_num_tokens([each.sample for each in rated]),
            is_equal=len(rated) > 1 and same_tokens(rated[0].sample, rated[1].sample),
            prompt_diverges=any(each.prompt_diverges for each in rated),
        )

    def finish(self, table: TokenTable, *, window: int) -> FinishedExamples:
        """One example per rated answer; the answer of a predecessor, in a ring, is the mismatched one."""
        if self.mismatched and len(table.kept) < 2:
            lonely = dict.fromkeys(table.numbers(table.kept), Untrained.NO_PARTNER)
            return FinishedExamples(examples=(), untrained=lonely)
        examples = RatedExamples(table, self.rules, mismatched=self.mismatched)
        return FinishedExamples(examples=examples, untrained={}, num_tokens=table.total("kept_tokens"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rated:
    """A rated answer before and after it is cut."""

    uncut: TrainingSample
    sample: TrainingSample
    prompt_cut: int
    prompt_diverges: bool
