"""The options of datasets that are trained on directly, under TRL's argument names where TRL has the option.

StreamConfig             every pipeline: rows that are read while training goes on
ExampleConfig            every supervised pipeline: reading, length, streaming, evaluation
SupervisedExampleConfig  SFT: what is trained, packing
AnsweredExampleConfig    DPO, KTO, CPO, ORPO: how much of a prompt is kept
SteppedExampleConfig     PRM: separators, which steps
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from pydantic import Field

from trl_ray.config.base import FROM_STRING, Positive, Section


class TruncationMode(enum.StrEnum):
    """Which end of an example beyond `max_length` is kept."""

    KEEP_START = "keep_start"
    KEEP_END = "keep_end"


class PackingStrategy(enum.StrEnum):
    """How examples share rows; the values are TRL's `packing_strategy`."""

    BFD = "bfd"
    """Best fit decreasing: examples stay whole, what exceeds `max_length` is cut off."""
    BFD_SPLIT = "bfd_split"
    """Best fit decreasing; an example that exceeds `max_length` is split into pieces, no token is lost."""
    WRAPPED = "wrapped"
    """The examples in their order, cut where a row is full: every row but the last is full, no token is lost."""


class StreamConfig(Section):
    """How a stream is read: rows that do not say how many they are."""

    dataset_streaming: bool = False
    """Read and tokenise rows while training goes on, instead of before it; needs `max_steps`."""
    stream_window: Positive = 1000
    """Rows that are read, tokenised and shuffled together (and packed, where that is asked) when streaming."""


class ExampleConfig(StreamConfig):
    """How rows become examples, and how held-out ones are used."""

    max_length: Annotated[int, Field(ge=2)] | None = 1024
    """Tokens of an example, or of a packed row; None keeps all."""
    truncation_mode: Annotated[TruncationMode, FROM_STRING] = TruncationMode.KEEP_START
    """Which end of an example beyond `max_length` is kept."""
    dataset_text_format: str | None = None
    """How texts are written (chatml, llama2, ...); None recognises it, ``plain`` takes them as they are."""
    dataset_num_proc: Positive | None = None
    """Processes that tokenise rows before training; None: the driver alone. Many rows' tokens are kept for later
    starts, in the datasets library's cache folder."""
    per_device_eval_batch_size: Positive = 8
    """Examples in one micro-batch of one rank in evaluations."""
    include_for_metrics: list[Literal["inputs", "loss"]] = Field(default_factory=list)
    """What `compute_metrics` is given beside predictions and labels."""
    batch_eval_metrics: bool = False
    """Call `compute_metrics` after every batch, with `compute_result` true after the last, and keep no predictions."""
    eval_do_concat_batches: bool = True
    """Join the predictions of all batches into one array; false: a list of one for each."""

    @property
    def text_column(self) -> str:
        """The column of rows that are plain text."""
        return "text"


class SupervisedExampleConfig(ExampleConfig):
    """What SFT trains of a row."""

    completion_only_loss: bool | None = None
    """Train only what follows the prompt; None: where a row has a prompt."""
    assistant_only_loss: bool = False
    """Train only what the assistant says; needs conversations."""
    dataset_text_field: str = "text"
    """The column of rows that are plain text."""
    packing: bool = False
    """Fill rows of `max_length` tokens with examples, which do not see each other."""
    packing_strategy: Annotated[PackingStrategy, FROM_STRING] = PackingStrategy.BFD
    eval_packing: bool | None = None
    """Pack held-out examples as well; None does as `packing`."""

    @property
    def text_column(self) -> str:
        return self.dataset_text_field


class AnsweredExampleConfig(ExampleConfig):
    """What is kept of prompts whose answers are compared or rated."""

    max_prompt_length: Positive | None = None
    """Tokens of a prompt, the last ones are kept, before `max_length` cuts prompt and answer; None keeps all."""


class SteppedExampleConfig(ExampleConfig):
    """What a process reward model is trained on."""

    step_separator: str = "\n"
    """Ends every step; its last token carries the step's label."""
    train_on_last_step_only: bool = False
    """Only the last step's label counts in training; evaluation looks at all."""
    max_prompt_length: Positive | None = None
    """Tokens of the prompt, the last ones are kept; None keeps all."""
    max_completion_length: Positive | None = None
    """Tokens of all steps together; None keeps all."""
