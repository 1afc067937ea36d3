"""From datasets to examples, ready for an update: read, checked, tokenised, cut, packed.

rows ─► record_reader.py ─► record ─► example_tasks.py: texts, tokens and samples of the task ─┬─► ExampleSet
                                      supervised_texts.py, pairs.py, steps.py                   └─► stream, by windows
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from trl_ray.config.example_options import PackingStrategy, SteppedExampleConfig, SupervisedExampleConfig
from trl_ray.config.messages import nearest
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.data.chat.faithful_rendering import Finding, Unrendered
from trl_ray.data.chat.training_templates import TemplateTokenizer, training_template
from trl_ray.data.examples.example_tasks import (
    ExampleDraft,
    FinishedExamples,
    Making,
    PairMaking,
    RatedMaking,
    ScoredMaking,
    StepMaking,
    SupervisedMaking,
)
from trl_ray.data.examples.left_out_rows import Untrained, report_rows
from trl_ray.data.examples.steps import StepRules, step_tokens
from trl_ray.data.examples.supervised_texts import SupervisedRules
from trl_ray.data.examples.tokenisation import ExampleTokenizer, TextRules, encode
from trl_ray.data.formats.record_reader import DatasetReader, reader_for
from trl_ray.data.formats.records import Record, first_said
from trl_ray.data.formats.transcripts import TextFormat
from trl_ray.data.sources.dataset_loading import Rows, load_rows, open_rows
from trl_ray.errors import ConfigError, DataError
from trl_ray.types import Example

_LOG = logging.getLogger(__name__)
BATCH_ROWS = 1000
"""Rows that are tokenised in one call."""


class ExampleTask(enum.StrEnum):
    """What an example is for: it decides which formats are read, and what the samples of an example are."""

    SUPERVISED = "supervised"
    """A text or an answer to learn: one sample, or the pieces of a packed row."""
    PAIRS = "pairs"
    """Chosen and rejected, of which the answers count (DPO, CPO)."""
    LIKELIHOOD_PAIRS = "likelihood_pairs"
    """The same, and the prompt as a third sample, trained from its second token on (ORPO)."""
    UNPAIRED = "unpaired"
    """One answer that is wanted or not (KTO without a KL)."""
    UNPAIRED_WITH_KL = "unpaired_with_kl"
    """The same, and the prompt with the answer to another one."""
    REWARD_PAIRS = "reward_pairs"
    """Chosen and rejected, each scored at its last token."""
    STEPS = "steps"
    """A solution in steps, each scored at its end."""


class DatasetTokenizer(ExampleTokenizer, TemplateTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that datasets need."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExampleSet:
    """All examples of a dataset, and what became of the rows that are in none."""

    name: str
    examples: tuple[Example, ...]
    untrained: Mapping[int, Untrained]
    """Why a row is in no example, by row number."""
    num_rows: int
    """Rows of the dataset, the untrained ones included."""
    cut_rows: tuple[int, ...] = ()
    """Rows that lost tokens to `max_length` and are trained all the same."""
    diverging_rows: tuple[int, ...] = ()
    """Rows whose prompt is tokenised differently when an answer follows."""
    findings: Mapping[int, Sequence[Finding]] = field(default_factory=dict)
    """What the chat template does not write as a row has it, by row number."""
    is_conversational: bool = False
    """Some of the rows are messages."""

    def __len__(self) -> int:
        """Examples."""
        return len(self.examples)

    def report(self) -> tuple[str, ...]:
        """One sentence for each thing a user should know about the rows; none when all is well."""
        return report_rows(
            self.name,
            total=self.num_rows,
            untrained=self.untrained,
            cut=self.cut_rows,
            diverging=self.diverging_rows,
            findings=self.findings,
        )

    def require_examples(self) -> None:
        """Check that there is something to train.

        Raises:
            DataError: every row is untrained; says why, by row.
        """
        if not self.examples:
            raise DataError(
                f"At least one row of {self.name} must have a token to train, and none has. "
                f"{' '.join(self.report()) or 'It has no row.'}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamedExample:
    """An example of a stream and where in the stream it stands."""

    example: Example
    window: int
    """Which window it is in, from 0: what `start_window` takes."""
    place: int
    """Which example of its window it is, from 0, after shuffling: how many to skip when resuming within a window."""
    next_row: int
    """Rows of the stream that are used up with this example and all before it; exact at the end of a window."""
    untrained: Mapping[Untrained, int] = field(default_factory=dict)
    """Rows since `start_window` that are in no example, counted by reason, up to the end of this window."""


def load_examples(
    config: SupervisedRunConfig,
    tokenizer: DatasetTokenizer,
    *,
    task: ExampleTask,
    dataset: object | None = None,
    evaluation: bool = False,
) -> ExampleSet:
    """All examples of the training or the held-out rows, in the order of the rows (of packed rows: of their making).

    What is wrong with the data is said here, before anything starts. The result depends on the arguments alone.

    Args:
        config: names the datasets and how they are read; a run of `task`.
        tokenizer: of the policy, its chat template set.
        task: what an example is.
        dataset: a `datasets.Dataset`, a `datasets.DatasetDict` or a list of dicts, instead of the named ones.
        evaluation: take the held-out split.

    Raises:
        DataError: there is no such dataset, it is empty, or a row cannot be used; names row and field.
        ModelError: the chat template is missing, refuses a row, or leaves out a tool or a call of it.
    """
    rows = load_rows(config, seed=config.seed, dataset=dataset, evaluation=evaluation)
    making = making_for(config, tokenizer, task=task, evaluation=evaluation)
    tokenised = _tokenise(_records(rows, config, making), making, tokenizer)
    finished = making.finish(tokenised.drafts, window=0)
    return ExampleSet(
        name=rows.name,
        examples=finished.examples,
        untrained=_all_untrained(tokenised, finished),
        num_rows=len(rows.rows),
        cut_rows=tuple(draft.row for draft in tokenised.drafts if draft.is_cut),
        diverging_rows=tuple(draft.row for draft in tokenised.drafts if draft.prompt_diverges),
        findings=tokenised.findings,
        is_conversational=tokenised.is_conversational,
    )


def stream_examples(
    config: SupervisedRunConfig,
    tokenizer: DatasetTokenizer,
    *,
    task: ExampleTask,
    dataset: object | None = None,
    start_window: int = 0,
    seed: int,
) -> Iterator[StreamedExample]:
    """The examples of one pass over a stream, window by window; rows are read when their window is asked for.

    A window is `stream_window` rows, tokenised, packed and (with `shuffle_dataset`) shuffled together. What it gives
    depends on the arguments and its rows alone, so that a resumed run passes `start_window` and skips `place` + 1
    examples. Rows of earlier windows are passed over without being tokenised.

    Args:
        config: as of `load_examples`.
        tokenizer: as of `load_examples`.
        task: what an example is.
        dataset: a `datasets.IterableDataset`, or anything else that can be iterated more than once.
        start_window: the first window to give.
        seed: of the order within windows; another one for each pass gives each its own order.

    Raises:
        DataError: at once, if there is no such dataset; when its row is reached, if one cannot be used.
        ModelError: see `load_examples`.
    """
    stream = open_rows(config, seed=config.seed, dataset=dataset, lazily=True)
    making = making_for(config, tokenizer, task=task, evaluation=False)
    first = next(stream.read(0), None)
    if first is None:
        raise DataError(f"A dataset must have at least one row, {stream.name} has none. Check the file or the split.")
    reader = _reader(first, config, making, name=stream.name, columns=None)

    def windows() -> Iterator[StreamedExample]:
        start = start_window * config.stream_window
        untrained: Counter[Untrained] = Counter()
        told: set[Unrendered] = set()
        rows = enumerate(stream.read(start), start=start)
        for window in itertools.count(start_window):
            taken = list(itertools.islice(rows, config.stream_window))
            if not taken:
                return
            records = (
                _PlacedRecord(row=n, where=f"row {n} of {stream.name}", record=reader.read(n, row)) for n, row in taken
            )
            tokenised = _tokenise(records, making, tokenizer)
            finished = making.finish(tokenised.drafts, window=window)
            untrained.update(_all_untrained(tokenised, finished).values())
            _warn_once(tokenised.findings, told, name=stream.name, total=len(taken))
            end = taken[-1][0] + 1
            yield from _placed(finished.examples, config, window, end=end, seed=seed, untrained=dict(untrained))

    return windows()


def _warn_once(findings: Mapping[int, Sequence[Finding]], told: set[Unrendered], *, name: str, total: int) -> None:
    """Say what the template does with rows of a stream, each kind in the first window that has it."""
    new = {row: [finding for finding in found if finding.kind not in told] for row, found in findings.items()}
    for sentence in report_rows(name, total=total, untrained={}, cut=(), diverging=(), findings=new):
        _LOG.warning("%s Later rows of the stream of which this holds are not told.", sentence)
    told |= {finding.kind for found in new.values() for finding in found}


def _placed(
    examples: Sequence[Example],
    config: SupervisedRunConfig,
    window: int,
    *,
    end: int,
    seed: int,
    untrained: Mapping[Untrained, int],
) -> Iterator[StreamedExample]:
    order = np.arange(len(examples))
    if config.shuffle_dataset:
        order = np.random.default_rng([seed, window]).permutation(len(examples))
    used = window * config.stream_window
    for place, index in enumerate(map(int, order)):
        used = min(end, used + examples[index].num_rows) if place + 1 < len(order) else end
        yield StreamedExample(example=examples[index], window=window, place=place, next_row=used, untrained=untrained)


def making_for(
    config: SupervisedRunConfig, tokenizer: DatasetTokenizer, *, task: ExampleTask, evaluation: bool
) -> Making:
    """The tokens and samples of a task under the rules of a configuration.

    Raises:
        ModelError: only what the assistant says is to be trained, and no template tells it apart.
        ConfigError: the step separator is no token.
    """
    rules = TextRules(
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        template_kwargs=config.chat_template_kwargs,
    )
    match task:
        case ExampleTask.SUPERVISED:
            return _supervised(config.part(SupervisedExampleConfig), tokenizer, rules, evaluation=evaluation)
        case ExampleTask.PAIRS | ExampleTask.LIKELIHOOD_PAIRS:
            likelihood = task is ExampleTask.LIKELIHOOD_PAIRS
            return PairMaking(tokenizer=tokenizer, rules=rules, likelihood=likelihood)
        case ExampleTask.UNPAIRED | ExampleTask.UNPAIRED_WITH_KL:
            mismatched = task is ExampleTask.UNPAIRED_WITH_KL
            return RatedMaking(tokenizer=tokenizer, rules=rules, mismatched=mismatched)
        case ExampleTask.REWARD_PAIRS:
            return ScoredMaking(tokenizer=tokenizer, rules=rules)
        case ExampleTask.STEPS:
            stepped = config.part(SteppedExampleConfig)
            step_rules = StepRules(
                max_length=rules.max_length,
                truncation_mode=rules.truncation_mode,
                template_kwargs=rules.template_kwargs,
                step_separator=stepped.step_separator,
                last_step_only=stepped.train_on_last_step_only and not evaluation,
                max_prompt_length=stepped.max_prompt_length,
                max_completion_length=stepped.max_completion_length,
            )
            return StepMaking(tokenizer=tokenizer, rules=step_rules, tokens=step_tokens(tokenizer, step_rules))


def _supervised(
    config: SupervisedExampleConfig, tokenizer: DatasetTokenizer, rules: TextRules, *, evaluation: bool
) -> SupervisedMaking:
    packs = config.packing
    if evaluation and config.eval_packing is not None:
        packs = config.eval_packing
    # What is split or wrapped is cut nowhere.
    cuts = not packs or config.packing_strategy is PackingStrategy.BFD
    template, located = None, False
    if config.assistant_only_loss and tokenizer.chat_template:
        found = training_template(tokenizer, template_kwargs=rules.template_kwargs)
        template, located = found.source, found.located
    return SupervisedMaking(
        tokenizer=tokenizer,
        rules=SupervisedRules(
            max_length=rules.max_length if cuts else None,
            truncation_mode=rules.truncation_mode,
            chat_template=template,
            locate_turns=located,
            template_kwargs=rules.template_kwargs,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
        ),
        packing=config.packing_strategy if packs else None,
        row_length=config.max_length if packs else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlacedRecord:
    """A record, its number in the dataset or mixture, and how messages name it."""

    row: int
    where: str
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tokenised:
    drafts: Sequence[ExampleDraft]
    untrained: Mapping[int, Untrained]
    findings: Mapping[int, Sequence[Finding]]
    is_conversational: bool


def _records(rows: Rows, config: SupervisedRunConfig, making: Making) -> Iterator[_PlacedRecord]:
    """All records; each source of a mixture has a format of its own, and numbers of its own in messages."""
    sources = {source.name: source for source in rows.sources or (rows,)}
    readers = {
        name: _reader(source.rows[0], config, making, name=name, columns=source.columns)
        for name, source in sources.items()
    }
    for index, row in enumerate(rows.rows):
        origin = rows.origin(index)
        record = readers[origin.name].read(origin.number, row)
        yield _PlacedRecord(row=index, where=f"row {origin.number} of {origin.name}", record=record)


def _reader(
    row: Mapping[str, object],
    config: SupervisedRunConfig,
    making: Making,
    *,
    name: str,
    columns: Sequence[str] | None,
) -> DatasetReader:
    return reader_for(
        row,
        name=name,
        columns=columns,
        accept=making.accept,
        text_format=_text_format(config.dataset_text_format),
        text_field=config.text_column,
    )


def _text_format(name: str | None) -> TextFormat | None:
    if name is None or name in list(TextFormat):
        return None if name is None else TextFormat(name)
    guess = nearest(name, list(TextFormat))
    raise ConfigError(
        f"dataset_text_format must be one of {', '.join(TextFormat)}, got {name!r}. "
        f"{f'Did you mean {guess}?' if guess else 'Leave it out to have it recognised.'}"
    )


def _tokenise(records: Iterable[_PlacedRecord], making: Making, tokenizer: ExampleTokenizer) -> _Tokenised:
    drafts: list[ExampleDraft] = []
    untrained: dict[int, Untrained] = {}
    findings: dict[int, Sequence[Finding]] = {}
    talks = False
    for batch in _batches(records, BATCH_ROWS):
        texts = [making.write(placed.record, where=placed.where) for placed in batch]
        tokens = iter(encode(tokenizer, [text for few in texts for text in few], masks=making.masks))
        for placed, few in zip(batch, texts, strict=True):
            talks = talks or not isinstance(first_said(placed.record), str)
            encoded = tuple(itertools.islice(tokens, len(few)))
            told = tuple(dict.fromkeys(finding for text in few for finding in text.findings))
            findings |= {placed.row: told} if told else {}
            found = making.read(placed.record, encoded, row=placed.row, where=placed.where)
            if isinstance(found, Untrained):
                untrained[placed.row] = found
            else:
                drafts.append(found)
    return _Tokenised(drafts=drafts, untrained=untrained, findings=findings, is_conversational=talks)


def _all_untrained(tokenised: _Tokenised, finished: FinishedExamples) -> dict[int, Untrained]:
    return dict(sorted({**tokenised.untrained, **finished.untrained}.items()))


Item = TypeVar("Item")


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
