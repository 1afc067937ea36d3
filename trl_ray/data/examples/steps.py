"""Turns solutions in steps into samples whose steps are scored where they end.

    prompt   step 0 \\n   step 1 \\n   .          tokens; "." is a stand-in for the token after the last
                    ^label 0    ^label 1          what a score is read at: the last token of each separator
             . . . .   T  . . . .  T              `loss_mask`: the token after it, for the token before a trained one
                                                  is where the layout reads

The prompt's last tokens and the steps' first ones are kept where limits cut; a step whose separator is cut off is not
scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_ray.data.examples.left_out_rows import Untrained
from trl_ray.data.examples.record_writer import Writer
from trl_ray.data.examples.tokenisation import Encoded, ExampleTokenizer, Text, TextRules, encode
from trl_ray.data.formats.records import SteppedSolution
from trl_ray.errors import ConfigError
from trl_ray.types import SampleLabel, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRules(TextRules):
    """How steps are separated, which are scored, and how much is kept."""

    step_separator: str = "\n"
    last_step_only: bool = False
    """Score the last step alone."""
    max_completion_length: int | None = None
    """Tokens of all steps, the first are kept; None keeps all."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepSample:
    """The sample of a row, and whether tokens of it were cut off."""

    row: int
    sample: TrainingSample
    num_tokens: int
    """Up to the last label, before anything was cut."""
    cut_tokens: int


def write_steps(
    solution: SteppedSolution, tokenizer: ExampleTokenizer, rules: StepRules, *, where: str
) -> tuple[Text, ...]:
    """The prompt and each step; steps are tokenised one by one, so that a separator is always the same tokens.

    After a prompt that ends with the assistant's words the steps go on from them, as where a model rates completions.
    A prompt of text begins with the beginning-of-sequence token where the tokenizer adds one, and with no other
    special token; see `Writer` for what is raised.
    """
    writer = Writer(record=solution, tokenizer=tokenizer, rules=rules, where=where)
    prompt = solution.prompt
    written = writer.text(prompt, special_tokens=False) if isinstance(prompt, str) else writer.opened(prompt)
    return (written, *(writer.text(step, special_tokens=False) for step in solution.steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """The tokens that every solution needs, asked of the tokenizer once."""

    separator: tuple[int, ...]
    start: int | None
    """Put before a prompt of text; None where the tokenizer adds none."""
    end: int
    """Stands in for the token after the last."""


def step_tokens(tokenizer: ExampleTokenizer, rules: StepRules) -> StepTokens:
    """The tokens of the separator, and those that begin and end a sequence.

    Raises:
        ConfigError: the separator is no token at all, so that there is nothing to read a score at.
    """
    probe = [Text(text=rules.step_separator, special_tokens=False), Text(text="a")]
    separator, text = (tuple(map(int, found.token_ids)) for found in encode(tokenizer, probe))
    if not separator:
        raise ConfigError(
            f"step_separator must have at least one token, got {rules.step_separator!r}. Take a text that the "
            "tokenizer keeps."
        )
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_start = start is not None and text[:1] == (int(start),)
    return StepTokens(
        separator=separator, start=int(start) if adds_start else None, end=separator[-1] if end is None else int(end)
    )


def read_steps(
    solution: SteppedSolution, encoded: Sequence[Encoded], rules: StepRules, tokens: StepTokens, *, row: int
) -> StepSample | Untrained:
    """The tokens of the texts that `write_steps` wrote, separated, cut, and labelled where steps end."""
    start = [tokens.start] if tokens.start is not None and isinstance(solution.prompt, str) else []
    prompt = np.concatenate([np.asarray(start, np.int32), encoded[0].token_ids])
    steps = [np.append(step.token_ids, tokens.separator).astype(np.int32) for step in encoded[1:]]
    ends = np.cumsum([len(step) for step in steps]) - 1
    rated = np.asarray(solution.labels, np.bool_)
    if rules.last_step_only:
        ends, rated = ends[-1:], rated[-1:]
    full = len(prompt) + int(ends[-1]) + 1
    prompt = prompt[rules.num_cut_off_prompt(len(prompt)) :]
    answer = np.concatenate(steps)[: rules.max_completion_length]
    kept = rules.kept(len(prompt) + len(answer))
    ids = np.concatenate([prompt, answer])[kept]
    places = ends + len(prompt) - kept.start
    scored = (places >= 0) & (places < len(ids))
    if not scored.any():
        return Untrained.TRUNCATED
    ids = np.append(ids, np.int32(tokens.end))
    context = max(1, len(prompt) - kept.start)
    mask = np.zeros(len(ids), np.bool_)
    mask[places[scored] + 1] = True
    sample = TrainingSample(
        group_id=row,
        prompt_ids=ids[:context],
        completion_ids=ids[context:],
        loss_mask=mask[context:],
        label=SampleLabel(steps=rated[scored]),
    )
    return StepSample(row=row, sample=sample, num_tokens=full, cut_tokens=max(0, full - (len(ids) - 1)))
