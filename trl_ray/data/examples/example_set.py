"""From datasets to examples, ready for an update: read, checked, tokenised, cut, packed.

rows ─► row_tokenisation.py: records, texts, tokens ─► TokenTable ─► example_tasks.py: finish ─┬─► ExampleSet
                                                                                             └─► stream, by windows
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trl_ray.config.example_options import PackingStrategy, SteppedExampleConfig, SupervisedExampleConfig
from trl_ray.config.runs.dataset_config import SupervisedRunConfig
from trl_ray.config.sections import OnBadRow
from trl_ray.data.bad_rows import BadRows
from trl_ray.data.chat.faithful_rendering import Unrendered
from trl_ray.data.chat.training_templates import TemplateTokenizer, training_template
from trl_ray.data.examples.example_tasks import (
    FinishedExamples,
    Making,
    PairMaking,
    RatedMaking,
    ScoredMaking,
    StepMaking,
    SupervisedMaking,
)
from trl_ray.data.examples.left_out_rows import Lost, RowFindings, TokenCounts, Untrained, report_rows, report_tokens
from trl_ray.data.examples.placed_records import reader_of, readers_for, report_unread
from trl_ray.data.examples.row_tokenisation import RowTokeniser
from trl_ray.data.examples.steps import StepRules, step_tokens
from trl_ray.data.examples.supervised_texts import SupervisedRules
from trl_ray.data.examples.token_cache import tokenised
from trl_ray.data.examples.token_table import RowState, TokenTable
from trl_ray.data.examples.tokenisation import ExampleTokenizer, TextRules
from trl_ray.data.sources.dataset_loading import Origin, load_rows, open_rows
from trl_ray.errors import DataError, ModelError
from trl_ray.types import Example

_LOG = logging.getLogger(__name__)
TOLD_ONCE = "Later rows of the stream of which this holds are not told."


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
    examples: Sequence[Example]
    """Made when they are asked for: of many rows, ask for some at a time."""
    untrained: Mapping[int, Untrained]
    """Why a row is in no example, by row number."""
    num_rows: int
    """Rows of the dataset, the untrained ones included."""
    cut_rows: tuple[int, ...] = ()
    """Rows that lost tokens to `max_length` and are trained all the same."""
    diverging_rows: tuple[int, ...] = ()
    """Rows whose prompt is tokenised differently when an answer follows."""
    findings: RowFindings | None = None
    """What the chat template does not write as a row has it, by row number."""
    is_conversational: bool = False
    """Some of the rows are messages."""
    equal_rows: tuple[int, ...] = ()
    """Pairs whose answers differ only beyond `max_length`; they are trained all the same."""
    tokens: TokenCounts = field(default_factory=TokenCounts)
    """Before and after cuts."""
    num_tokens: int = 0
    """Of all examples, which is what an epoch takes."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the rows were chosen."""
    kept_in: str | None = None
    """Where its tokens are on disk, and whether they were there; None where they are in memory alone."""

    def __len__(self) -> int:
        """Examples."""
        return len(self.examples)

    def report(self) -> tuple[str, ...]:
        """One sentence for each thing a user should know about the rows; none when all is well."""
        rows = report_rows(
            self.name,
            total=self.num_rows,
            untrained=self.untrained,
            cut=self.cut_rows,
            diverging=self.diverging_rows,
            findings=self.findings,
            equal=self.equal_rows,
        )
        return (*self.notes, *rows, *report_tokens(self.name, self.tokens))

    def news(self, told: set[str]) -> tuple[str, ...]:
        """What `report` says of rows, but for kinds that are told already; all that are here are told then."""
        reasons = {reason for reason in Untrained if reason not in told}
        findings = None if self.findings is None else self.findings.without(told)
        new = {
            "cut": self.cut_rows if "cut" not in told else (),
            "diverging": self.diverging_rows if "diverging" not in told else (),
            "equal": self.equal_rows if "equal" not in told else (),
        }
        untrained = {row: reason for row, reason in self.untrained.items() if reason in reasons}
        told |= {kind for kind, rows in new.items() if rows} | {str(reason) for reason in untrained.values()}
        told |= {str(kind) for kind in Unrendered if findings is not None and len(findings.rows_of(kind))}
        return report_rows(self.name, total=self.num_rows, untrained=untrained, findings=findings, **new)

    def counts(self) -> dict[str, int]:
        """What of the rows is lost, in numbers that can be added."""
        return {
            Lost.TOKENS: self.tokens.written,
            Lost.CUT: self.tokens.cut,
            Lost.TARGETS: self.tokens.targets,
            Lost.UNPACKED: self.tokens.unpacked,
            Lost.EQUAL: len(self.equal_rows),
        }

    def losses(self) -> dict[str, int | str]:
        """What of the rows is not trained, in numbers; nothing where all is."""
        found: dict[str, int | str] = {
            f"rows left out ({reason})": count for reason, count in sorted(Counter(self.untrained.values()).items())
        }
        if self.equal_rows:
            found["pairs equal after cutting"] = len(self.equal_rows)
        if self.tokens.cut:
            found["tokens beyond max_length"] = self.tokens.cut_share
        if self.tokens.unpacked:
            found["tokens lost to packing"] = self.tokens.unpacked_share
        return found

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
    losses: Mapping[str, int] = field(default_factory=dict)
    """Tokens and pairs since `start_window` that are lost, by `Lost`, up to the end of this window."""


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
    rows = load_rows(config, seed=config.seed, dataset=dataset, evaluation=evaluation, in_memory=False)
    making = making_for(config, tokenizer, task=task, evaluation=evaluation)
    readers = readers_for(rows, config, making)
    tokeniser = RowTokeniser(making=making, tokenizer=tokenizer, readers=readers, origin=rows.origin)
    kept = tokenised(rows, tokeniser, processes=config.dataset_num_proc)
    bad = _settled(kept.table, rows.origin, config.on_bad_row)
    return _example_set(
        kept.table,
        making.finish(kept.table, window=0),
        name=rows.name,
        bad=bad,
        notes=(
            *rows.notes,
            *(note for reader in readers.values() for note in reader.notes),
            *kept.notes,
            *report_unread(
                kept.table.column("unread"),
                rows.name,
                told=[column for reader in readers.values() for column in reader.format.unread],
            ),
            *bad.report(),
        ),
        kept_in=kept.place,
    )


def _settled(
    table: TokenTable, origin: Callable[[int], Origin], policy: OnBadRow, *, may_be_all: bool = False
) -> BadRows:
    """The rows of a table that cannot be used, where they may be left out.

    Raises:
        DataError, ModelError: they may not; or a row cannot even be read.
    """
    bad = BadRows(policy)
    for place, state, problem in table.problems():
        if state is RowState.BROKEN:
            raise DataError(problem)
        error = ModelError(problem) if state is RowState.BAD_MODEL else DataError(problem)
        number = table.start + place
        bad.note(error, name=origin(number).name, number=origin(number).number, place=number)
    bad.settle(total=len(table), may_be_all=may_be_all)
    return bad


def _example_set(
    table: TokenTable,
    finished: FinishedExamples,
    *,
    name: str,
    bad: BadRows,
    notes: tuple[str, ...] = (),
    kept_in: str | None = None,
) -> ExampleSet:
    untrained = {**table.untrained(), **dict.fromkeys(bad.places, Untrained.BAD_ROW), **finished.untrained}
    return ExampleSet(
        name=name,
        examples=finished.examples,
        untrained=dict(sorted(untrained.items())),
        num_rows=len(table),
        cut_rows=table.where("cut_tokens"),
        diverging_rows=table.where("prompt_diverges"),
        equal_rows=table.where("is_equal"),
        tokens=TokenCounts(
            written=table.total("num_tokens"),
            cut=table.total("cut_tokens"),
            targets=finished.targets,
            unpacked=finished.unpacked,
        ),
        num_tokens=finished.num_tokens,
        notes=notes,
        findings=table.findings(),
        is_conversational=bool(table.column("is_conversational").any()),
        kept_in=kept_in,
    )


def stream_examples(
    config: SupervisedRunConfig,
    tokenizer: DatasetTokenizer,
    *,
    task: ExampleTask,
    dataset: object | None = None,
    start_window: int = 0,
    seed: int,
    told: set[str] | None = None,
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
        told: kinds of things that the user knows of the rows; others are logged in the first window that has them, and
            put there.

    Raises:
        DataError: at once, if there is no such dataset; when its row is reached, if one cannot be used.
        ModelError: see `load_examples`.
    """
    windows = stream_windows(config, tokenizer, task=task, dataset=dataset, start_window=start_window)
    known = set[str]() if told is None else told

    def examples() -> Iterator[StreamedExample]:
        untrained, losses = Counter[Untrained](), Counter[str]()
        for window, found in enumerate(windows, start=start_window):
            untrained.update(found.untrained.values())
            losses.update(found.counts())
            for sentence in found.news(known):
                _LOG.warning("%s %s", sentence, TOLD_ONCE)
            end = window * config.stream_window + found.num_rows
            left_out, lost = dict(untrained), dict(losses)
            for place, example, used in _ordered(found.examples, config, window, end=end, seed=seed):
                yield StreamedExample(
                    example=example, window=window, place=place, next_row=used, untrained=left_out, losses=lost
                )

    return examples()


def stream_windows(
    config: SupervisedRunConfig,
    tokenizer: DatasetTokenizer,
    *,
    task: ExampleTask,
    dataset: object | None = None,
    start_window: int = 0,
) -> Iterator[ExampleSet]:
    """The windows of one pass over a stream, each a set of examples of its own; see `stream_examples`."""
    stream = open_rows(config, seed=config.seed, dataset=dataset, lazily=True)
    making = making_for(config, tokenizer, task=task, evaluation=False)
    if next(stream.read(0), None) is None:
        raise DataError(f"A dataset must have at least one row, {stream.name} has none. Check the file or the split.")
    readers = {
        part.name: reader_of(enumerate(part.read(0)), config, making, name=part.name, columns=None)
        for part in stream.parts or (stream,)
    }
    tokeniser = RowTokeniser(making=making, tokenizer=tokenizer, readers=readers, origin=stream.origin)
    known = [column for reader in readers.values() for column in reader.format.unread]
    reading = tuple(note for reader in readers.values() for note in reader.notes)

    def windows() -> Iterator[ExampleSet]:
        start = start_window * config.stream_window
        rows = enumerate(stream.read(start), start=start)
        for window in itertools.count(start_window):
            taken = dict(itertools.islice(rows, config.stream_window))
            if not taken:
                return
            table = TokenTable(tokeniser.table(taken, list(taken)), start=next(iter(taken)))
            # Where all rows are bad from the first one on, it is the options that are wrong: said at once.
            bad = _settled(table, stream.origin, config.on_bad_row, may_be_all=window > 0)
            unread = report_unread(table.column("unread"), stream.name, told=known)
            notes = (*reading, *unread, *bad.report())
            yield _example_set(table, making.finish(table, window=window), name=stream.name, bad=bad, notes=notes)

    return windows()


def _ordered(
    examples: Sequence[Example], config: SupervisedRunConfig, window: int, *, end: int, seed: int
) -> Iterator[tuple[int, Example, int]]:
    """The place of each example of a window, the example, and the rows that are used up with it."""
    order = np.arange(len(examples))
    if config.shuffle_dataset:
        order = np.random.default_rng([seed, window]).permutation(len(examples))
    used = window * config.stream_window
    for place, index in enumerate(map(int, order)):
        example = examples[index]
        used = min(end, used + example.num_rows) if place + 1 < len(order) else end
        yield place, example, used


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
        max_prompt_length=getattr(config, "max_prompt_length", None),
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
                max_prompt_length=rules.max_prompt_length,
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
