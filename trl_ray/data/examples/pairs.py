"""Turns preferences into samples: pairs to be compared by likelihood, rated answers, pairs to be scored.

    prompt, prompt + chosen, prompt + rejected ─ encode ─► the prompt's tokens: as far as all of them agree
                                                           answers: what follows ─ cut ─► TrainingSample each

    compared (DPO, CPO)    [prompt | chosen] [prompt | rejected]              trained: the answers
    with likelihood (ORPO) the same, and [first token | rest of the prompt]   trained: the rest as well
    rated (KTO)            [prompt | answer], [prompt | another row's answer]
    scored (reward)        [what both begin with | rest, end token]           "trained": the end token, a stand-in; the
                                                                              score is read at the token before it

Borders, end-of-sequence tokens and cuts are those of TRL's trainers (and, of what is compared or rated, of earlier ones
whose `max_prompt_length` cuts prompts first): with `keep_start` a row whose prompt fills
`max_length` is left out; of what is scored, nothing is cut and longer rows are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_ray.data.examples.given_tokens import GivenTokens
from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.record_writer import Writer, is_muted
from trl_ray.data.examples.tokenisation import Encoded, ExampleTokenizer, Text, TextRules, common_prefix_length
from trl_ray.data.formats.records import PreferencePair, Record, UnpairedPreference
from trl_ray.data.validation import show
from trl_ray.errors import DataError
from trl_ray.types import BoolArray, IntArray, SampleLabel, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What follows a prompt, not cut."""

    token_ids: IntArray
    """``[L]``"""
    heard: BoolArray
    """``[L]``, False where a message has the weight 0: the model reads such tokens and does not learn them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """A prompt and what was answered to it, as tokens; of these the prompt is cut, where it has a limit of its own."""

    row: int
    prompt_ids: IntArray
    """``[P]``"""
    prompt_heard: BoolArray
    """``[P]``, False where a message has the weight 0: for who trains prompts as well."""
    answers: tuple[Answer, ...]
    prompt_cut: int
    """Tokens that were cut off the prompt's beginning."""
    prompt_diverges: bool
    """The prompt alone is tokenised differently from the prompt before its answers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairSamples:
    """The samples of a row, and what became of its tokens."""

    row: int
    samples: tuple[TrainingSample, ...]
    num_tokens: int
    """Of prompt and answer, for both answers, before they were cut."""
    cut_tokens: int
    is_equal: bool
    """The answers are the same as far as they were kept."""
    prompt_diverges: bool


def write_pair(pair: PreferencePair, tokenizer: ExampleTokenizer, rules: TextRules, *, where: str) -> tuple[Text, ...]:
    """Prompt, prompt + chosen, prompt + rejected; nothing where both answers are the same.

    See `Writer` for what is raised.
    """
    if pair.is_tie:
        return ()
    writer = Writer(record=pair, tokenizer=tokenizer, rules=rules, where=where)
    answers = (writer.answered(pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
    return (writer.prompt(pair.prompt), *answers)


def write_rated(
    rated: UnpairedPreference, tokenizer: ExampleTokenizer, rules: TextRules, *, where: str
) -> tuple[Text, ...]:
    """Prompt, prompt + completion; see `Writer` for what is raised."""
    writer = Writer(record=rated, tokenizer=tokenizer, rules=rules, where=where)
    return (writer.prompt(rated.prompt), writer.answered(rated.prompt, rated.completion))


def write_scored(
    pair: PreferencePair, tokenizer: ExampleTokenizer, rules: TextRules, *, where: str
) -> tuple[Text, ...]:
    """Prompt + chosen, prompt + rejected, or nothing; see `write_pair`.

    Raises:
        DataError: a message of an answer has the weight 0: an answer is scored as a whole.
    """
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        for place, message in enumerate(() if isinstance(answer, str) else answer):
            if is_muted(message, f"{where}, field {name!r}, message {place} of the answer"):
                raise DataError(
                    f"{where}, field {name!r}, message {place} of the answer, must not have the weight 0: a reward "
                    "model scores an answer as a whole. Remove weight and train, or the message."
                )
    return write_pair(pair, tokenizer, rules, where=where)[1:]


def compare(encoded: Sequence[Encoded], rules: TextRules, *, row: int) -> Comparison:
    """The tokens of a prompt alone, and of the prompt with each answer, taken apart where they part."""
    prompt_ids = encoded[0].token_ids
    shared = min(common_prefix_length(prompt_ids, whole.token_ids) for whole in encoded[1:])
    start = rules.num_cut_off_prompt(shared)
    return Comparison(
        row=row,
        prompt_ids=encoded[1].token_ids[start:shared],
        prompt_heard=_heard(encoded[1])[start:shared],
        prompt_cut=start,
        answers=tuple(
            Answer(token_ids=whole.token_ids[shared:], heard=_heard(whole)[shared:]) for whole in encoded[1:]
        ),
        prompt_diverges=shared < len(prompt_ids),
    )


def _heard(whole: Encoded) -> BoolArray:
    return np.ones(len(whole.token_ids), np.bool_) if whole.muted_mask is None else ~whole.muted_mask


def read_pair(encoded: Sequence[Encoded], rules: TextRules, *, row: int, likelihood: bool) -> PairSamples | Untrained:
    """Chosen and rejected, and with `likelihood` the prompt as it stands before the chosen answer.

    Where a prompt has a single token, there is nothing in it to train and no third sample.
    """
    if not encoded or np.array_equal(encoded[1].token_ids, encoded[2].token_ids):
        return Untrained.TIE
    found = compare(encoded, rules, row=row)
    samples = []
    for answer in found.answers:
        sample = answer_sample(found.prompt_ids, answer, rules, group_id=row)
        if isinstance(sample, Untrained):
            return sample
        samples.append(sample)
    prompt_ids = samples[0].prompt_ids
    start = rules.kept(len(found.prompt_ids) + len(found.answers[0].token_ids)).start
    heard = found.prompt_heard[start:][1 : len(prompt_ids)]
    if likelihood and heard.any():
        samples.append(_sample(prompt_ids[:1], prompt_ids[1:], heard, group_id=row, label=None))
    lengths = [len(found.prompt_ids) + len(answer.token_ids) for answer in found.answers]
    return PairSamples(
        row=row,
        samples=tuple(samples),
        num_tokens=sum(lengths) + 2 * found.prompt_cut,
        cut_tokens=sum(map(rules.num_cut, lengths)) + 2 * found.prompt_cut,
        is_equal=same_tokens(samples[0], samples[1]),
        prompt_diverges=found.prompt_diverges,
    )


def same_tokens(first: TrainingSample, second: TrainingSample) -> bool:
    """Whether two samples are one sequence."""
    one, other = (np.concatenate([sample.prompt_ids, sample.completion_ids]) for sample in (first, second))
    return np.array_equal(one, other)


def answer_sample(
    prompt_ids: IntArray, answer: Answer, rules: TextRules, *, group_id: int, desirable: bool | None = None
) -> TrainingSample | Untrained:
    """A prompt ``[P]`` and an answer, cut, what is heard of the answer trained; or why nothing of it is.

    Where no token of the prompt is kept, the answer's first one stands in for it: nothing predicts it, but it counts
    in `label.length`.
    """
    length = len(prompt_ids) + len(answer.token_ids)
    if length < 2 or not answer.heard.any():
        return Untrained.NO_TARGET
    kept = rules.kept(length)
    context = prompt_ids[kept.start : kept.stop]
    part = slice(max(0, kept.start - len(prompt_ids)), max(0, kept.stop - len(prompt_ids)))
    ids, heard = answer.token_ids[part], answer.heard[part]
    counted = None
    if not len(context):
        context, counted = ids[:1], int(heard.sum())
        ids, heard = ids[1:], heard[1:]
    if not heard.any():
        return Untrained.TRUNCATED
    label = None if desirable is None and counted is None else SampleLabel(desirable=desirable, length=counted)
    return _sample(context, ids, heard, group_id=group_id, label=label)


def whole_answer(prompt_ids: IntArray, answer: Answer, *, group_id: int, desirable: bool) -> TrainingSample:
    """A prompt ``[P]`` and a rated answer ``[L]``, not cut: what `answer_sample` is made of."""
    label = SampleLabel(desirable=desirable)
    return _sample(prompt_ids, answer.token_ids, answer.heard, group_id=group_id, label=label)


def mismatched_sample(prompt_ids: IntArray, answer: Answer, rules: TextRules, *, group_id: int) -> TrainingSample:
    """A prompt with the answer to another one; where nothing of the answer is trained, its mask says so."""
    sample = answer_sample(prompt_ids, answer, rules, group_id=group_id)
    if not isinstance(sample, Untrained):
        return sample
    length = len(prompt_ids) + len(answer.token_ids)
    ids = np.concatenate([prompt_ids, answer.token_ids])[rules.kept(length)]
    return _sample(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.bool_), group_id=group_id, label=None)


def _sample(
    prompt_ids: IntArray, answer_ids: IntArray, heard: BoolArray, *, group_id: int, label: SampleLabel | None
) -> TrainingSample:
    return TrainingSample(
        group_id=group_id, prompt_ids=prompt_ids, completion_ids=answer_ids, loss_mask=heard, label=label
    )


def read_scored(
    encoded: Sequence[Encoded], rules: TextRules, *, row: int, end_id: int, margin: float | None
) -> PairSamples | Untrained:
    """Chosen and rejected as sequences that are scored at their last token; they share what both begin with.

    Args:
        encoded: prompt + chosen, prompt + rejected.
        rules: `max_length` is the longest that is taken; nothing is cut.
        row: becomes the group.
        end_id: the token that stands in for the one after the last.
        margin: by how much chosen should win; None: nobody says.
    """
    wholes = [whole.token_ids for whole in encoded]
    if not all(map(len, wholes)):
        return Untrained.NO_TARGET
    if not wholes or np.array_equal(wholes[0], wholes[1]):
        return Untrained.TIE
    if rules.max_length is not None and max(map(len, wholes)) > rules.max_length:
        return Untrained.TOO_LONG
    shared = max(1, common_prefix_length(*wholes))
    label = None if margin is None else SampleLabel(margin=margin)
    samples = []
    for ids in wholes:
        rest = np.append(ids[shared:], np.int32(end_id))
        mask = np.zeros(len(rest), np.bool_)
        mask[-1] = True
        samples.append(
            TrainingSample(group_id=row, prompt_ids=ids[:shared], completion_ids=rest, loss_mask=mask, label=label)
        )
    return PairSamples(
        row=row,
        samples=tuple(samples),
        num_tokens=sum(map(len, wholes)),
        cut_tokens=0,
        is_equal=False,
        prompt_diverges=False,
    )


def margin_of(record: Record | GivenTokens, *, where: str) -> float | None:
    """The `margin` column; None where there is none.

    Raises:
        DataError: it is no finite number; names `where`.
    """
    if "margin" not in record.columns:
        return None
    value = record.columns["margin"]
    try:  # a table of text holds numbers as text
        number = math.nan if isinstance(value, (bool, np.bool_)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}, field 'margin', must be a finite number, got {show(value)}. Mend or remove the row.")
    return number
