"""What a teacher's answer must be before anything is trained on it.

    one answer for B completions = TeacherAnswer, their tokens one after the other, T of them
    check_answer: lengths, NaN, range, vocabulary, mass, agreement with itself --> split_answer --> TeacherScores x B

Every way to a teacher ends here: our own frames, servers of others, and teachers in this process. An error names
teacher, completion, token and field.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from trl_ray.config.teacher_options import PayloadDtype
from trl_ray.errors import TeacherError
from trl_ray.types import FloatArray, IntArray, TeacherQuestion, TeacherRequest, TeacherScores

_BLOCK = 65536
"""Log-probs checked together, so that they stay in the cache."""
_POSITIVE = 1e-3
"""How far above 0 a log-prob may come out of float32 sums over a vocabulary."""
_MASS = {PayloadDtype.FLOAT32: 1e-3, PayloadDtype.FLOAT16: 5e-3, PayloadDtype.BFLOAT16: 5e-2}
"""How far from 1 probabilities may sum: half a step of the format times at most about 10 nats of entropy, and more."""
_STEP = {PayloadDtype.FLOAT32: 1e-4, PayloadDtype.FLOAT16: 2.0**-10, PayloadDtype.BFLOAT16: 2.0**-7}
"""Relative rounding of one log-prob, generously."""
_AGREEMENT = 0.25
"""How far two computations of one log-prob may be apart, in nats: bfloat16 logits of 32 have steps of an eighth."""
_LARGEST_TOP_LOG_MASS = -1e-7
"""Where K tokens hold all the mass, the rest is taken for 1e-7."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherAnswer:
    """Scores of the T tokens of B completions, one after the other."""

    lengths: NDArray[np.int64]
    """[B] tokens of each completion."""
    logprobs: FloatArray
    """[T] as in `TeacherScores`."""
    top_ids: IntArray | None = None
    """[T, K]"""
    top_logprobs: FloatArray | None = None
    """[T, K]"""
    tail: FloatArray | None = None
    """[T]"""
    version: int | None = None


def width_of(requests: Sequence[TeacherRequest], question: TeacherQuestion) -> int:
    """K: the tokens that each place of an answer holds."""
    widths = {0 if request.support_ids is None else request.support_ids.shape[1] for request in requests}
    assert len(widths) == 1, f"requests of one batch ask about equally many tokens at each place, got {sorted(widths)}"
    return question.top_k + widths.pop()


def log_tail(top_logprobs: FloatArray) -> FloatArray:
    """Log of the mass that K tokens leave out.

    ln(1 - sum_k p_k), with ln(sum_k p_k) at most -1e-7, as TRL takes it.

    Args:
        top_logprobs: [..., K] natural log; -inf counts as nothing.

    Returns:
        [...]
    """
    mass = np.exp(top_logprobs.astype(np.float64)).sum(axis=-1)
    with np.errstate(divide="ignore"):
        log_mass = np.minimum(np.log(mass), _LARGEST_TOP_LOG_MASS)
    tail: FloatArray = np.log(-np.expm1(log_mass)).astype(np.float32)
    return tail


def tail_of(top_logprobs: FloatArray | None, *, tokens: int) -> FloatArray:
    """`log_tail` [T] of what was told [T, K]; no tokens, which is None, leave out everything."""
    return log_tail(np.zeros((tokens, 0), np.float32) if top_logprobs is None else top_logprobs)


def join_scores(scores: Sequence[TeacherScores]) -> TeacherAnswer:
    """Scores of one batch as one answer; the inverse of `split_answer`."""
    assert scores, "an answer holds at least one completion"
    assert len({each.version for each in scores}) == 1, "scores of one batch are of one version of the weights"
    return TeacherAnswer(
        lengths=np.array([len(each.logprobs) for each in scores], dtype=np.int64),
        logprobs=np.concatenate([each.logprobs for each in scores]),
        top_ids=_joined([each.top_ids for each in scores]),
        top_logprobs=_joined([each.top_logprobs for each in scores]),
        tail=_joined([each.tail for each in scores]),
        version=scores[0].version,
    )


def split_answer(answer: TeacherAnswer, *, teacher: str) -> list[TeacherScores]:
    """One `TeacherScores` for each completion, as views."""
    ends = np.cumsum(answer.lengths).tolist()
    pieces = [slice(end - length, end) for end, length in zip(ends, answer.lengths.tolist(), strict=True)]
    return [
        TeacherScores(
            teacher=teacher,
            version=answer.version,
            logprobs=answer.logprobs[piece],
            top_ids=None if answer.top_ids is None else answer.top_ids[piece],
            top_logprobs=None if answer.top_logprobs is None else answer.top_logprobs[piece],
            tail=None if answer.tail is None else answer.tail[piece],
        )
        for piece in pieces
    ]


def check_answer(
    answer: TeacherAnswer,
    *,
    teacher: str,
    requests: Sequence[TeacherRequest],
    question: TeacherQuestion,
    dtype: PayloadDtype = PayloadDtype.FLOAT32,
) -> None:
    """Refuse what cannot be the answer to these requests.

    Args:
        answer: to be checked.
        teacher: its name, for messages.
        requests: [B] in the order of the answer.
        question: what was asked.
        dtype: the coarsest format the log-probs have been in.

    Raises:
        TeacherError: another number of completions or tokens; a field that is missing or of another shape; NaN; a
            log-prob above 0, or -inf at a token of a completion; an id outside the vocabulary, or not the one asked
            about; probabilities that do not sum to 1; two different log-probs of one token.
    """
    _Check(answer=answer, teacher=teacher, requests=requests, question=question, dtype=dtype).run()


def _joined(arrays: Sequence[NDArray[np.generic] | None]) -> NDArray | None:  # type: ignore[type-arg]
    present = [array for array in arrays if array is not None]
    assert len(present) in {0, len(arrays)}, "scores of one batch have the same fields"
    return np.concatenate(present) if present else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Check:
    """`check_answer`, field by field."""

    answer: TeacherAnswer
    teacher: str
    requests: Sequence[TeacherRequest]
    question: TeacherQuestion
    dtype: PayloadDtype

    def run(self) -> None:
        self.shapes()
        self.sampled()
        if self.answer.top_ids is None or self.answer.top_logprobs is None:
            return
        self.vocabulary(self.answer.top_ids)
        self.supports(self.answer.top_ids)
        sampled_ids = np.concatenate([request.completion_ids for request in self.requests])
        for rows in self.blocks(self.answer.top_ids.shape[1]):
            self.masses(self.answer.top_logprobs, rows)
            self.agreement(self.answer.top_ids, self.answer.top_logprobs, sampled_ids, rows)

    def shapes(self) -> None:
        """Everything that can be wrong before a number is read."""
        answer, asked = self.answer, [len(request.completion_ids) for request in self.requests]
        if len(answer.lengths) != len(asked):
            self.fail("completions", f"must be {len(asked)}, got {len(answer.lengths)}")
        for index, (length, wanted) in enumerate(zip(answer.lengths.tolist(), asked, strict=True)):
            if length != wanted:
                self.fail(f"completion {index}, length", f"must be {wanted} tokens, got {length}")
        tokens, width = sum(asked), width_of(self.requests, self.question)
        top = (tokens, width) if width else None
        tail = (tokens,) if self.question.tail else None
        fields = {
            "logprobs": (answer.logprobs, (tokens,)),
            "top_ids": (answer.top_ids, top),
            "top_logprobs": (answer.top_logprobs, top),
            "tail": (answer.tail, tail),
        }
        for name, (array, shape) in fields.items():
            given = None if array is None else array.shape
            if given != shape:
                self.fail(name, f"must have shape {shape}, got {given}")

    def sampled(self) -> None:
        """Log-probs of the completions' own tokens, and the tail."""
        logprobs, tail = self.answer.logprobs, self.answer.tail
        # Both are NaN where one number is.
        if not (logprobs.max(initial=-np.inf) <= _POSITIVE and logprobs.min(initial=0) > -np.inf):
            token = int((~((logprobs <= _POSITIVE) & (logprobs > -np.inf))).argmax())
            self.fail_at(token, "logprobs", f"must be a finite number, at most 0, got {logprobs[token]}")
        if tail is not None and not tail.max(initial=-np.inf) <= _POSITIVE:
            token = int((~(tail <= _POSITIVE)).argmax())
            self.fail_at(token, "tail", f"must be at most 0, got {tail[token]}")

    def vocabulary(self, ids: IntArray) -> None:
        """A negative id is a huge one when its sign is read as a bit."""
        size = self.question.vocab_size
        if ids.view(np.uint32).max(initial=0) >= size:
            token = int(((ids < 0) | (ids >= size)).any(axis=1).argmax())
            wrong = ids[token][(ids[token] < 0) | (ids[token] >= size)][0]
            self.fail_at(token, "top_ids", f"must be ids of a vocabulary of {size}, got {wrong}")

    def supports(self, ids: IntArray) -> None:
        """Tokens that were asked about come back in their order."""
        end = 0
        for request in self.requests:
            start, end = end, end + len(request.completion_ids)
            if request.support_ids is None:
                continue
            wrong = (ids[start:end, self.question.top_k :] != request.support_ids).any(axis=1)
            if wrong.any():
                self.fail_at(start + int(wrong.argmax()), "top_ids", "must be those that were asked about, got others")

    def masses(self, logprobs: FloatArray, rows: slice) -> None:
        """No log-prob above 0 or NaN, and no more or less mass than 1."""
        block, slack = logprobs[rows], _MASS[self.dtype]
        if not block.max(initial=-np.inf) <= _POSITIVE:
            row, place = divmod(int((~(block <= _POSITIVE)).argmax()), block.shape[1])
            self.fail_at(rows.start + row, "top_logprobs", f"must be at most 0, got {block[row, place]}")
        probs = np.exp(block)
        # A product with ones is a sum over short rows at the speed of memory.
        mass: FloatArray = probs[:, 0] if block.shape[1] == 1 else probs @ np.ones(block.shape[1], dtype=np.float32)
        self.no_empty_place(block, mass, rows)
        wanted = "at most 1"
        excess = mass - 1
        if self.answer.tail is not None:
            wanted = "1 with the tail"
            mass = mass + np.exp(self.answer.tail[rows])
            excess = np.abs(mass - 1)
        if excess.max(initial=0) > slack:
            token = int(excess.argmax())
            self.fail_at(rows.start + token, "top_logprobs", f"must have a mass of {wanted}, got {mass[token]}")

    def no_empty_place(self, block: FloatArray, mass: FloatArray, rows: slice) -> None:
        """A place whose tokens are all -inf cannot be normalised over."""
        if mass.min(initial=1) > 0:
            return
        empty = (block == -np.inf).all(axis=1)
        if empty.any():
            self.fail_at(rows.start + int(empty.argmax()), "top_logprobs", "must hold a number, got none")

    def agreement(self, ids: IntArray, logprobs: FloatArray, sampled_ids: IntArray, rows: slice) -> None:
        """A token of the completion that stands among the K has the same log-prob in both places."""
        alone = self.answer.logprobs[rows, None]
        with np.errstate(over="ignore"):
            apart = np.abs(logprobs[rows] - alone) > _AGREEMENT + _STEP[self.dtype] * np.abs(alone)
        apart &= ids[rows] == sampled_ids[rows, None]
        if not apart.any():
            return
        # -inf stands for no token.
        apart &= logprobs[rows] > -np.inf
        if apart.any():
            row, place = divmod(int(apart.argmax()), apart.shape[1])
            among = logprobs[rows][row, place]
            self.fail_at(
                rows.start + row,
                "logprobs",
                f"must be that of the same token in top_logprobs, {among}, got {alone[row, 0]}",
            )

    def blocks(self, width: int) -> Iterator[slice]:
        """Rows whose K numbers each stay in the cache together."""
        step, total = max(1, _BLOCK // width), len(self.answer.logprobs)
        for start in range(0, total, step):
            yield slice(start, min(start + step, total))

    def fail_at(self, token: int, field: str, problem: str) -> NoReturn:
        """An error at the `token`-th of all tokens."""
        ends = np.cumsum(self.answer.lengths)
        completion = int(np.searchsorted(ends, token, side="right"))
        place = token - (int(ends[completion - 1]) if completion else 0)
        self.fail(f"completion {completion}, token {place}, {field}", problem)

    def fail(self, what: str, problem: str) -> NoReturn:
        raise TeacherError(
            f"teacher {self.teacher}: {what}: {problem}. Nothing is trained on this answer; check that the teacher "
            "is the model it is meant to be and that it is healthy."
        )
