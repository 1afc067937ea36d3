"""What an engine said of tokens as it sampled them, against what it says of them before the next pull."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from trl_ray.actors.weight_proof import UNKNOWN, WeightProof, cooled_logprobs
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import ConfigError
from trl_ray.types import (
    Completion,
    FinishReason,
    FloatArray,
    IntArray,
    SamplingGap,
    TeacherQuestion,
    TeacherRequest,
    TeacherScores,
    VersionSpan,
    WeightCheck,
    WeightPayload,
    WeightVersion,
)

PROMPT = np.array([5, 6, 7], np.int32)


class Engine:
    """Says of token t, whatever it is, that its log-prob is -t / 8 given those before it; runs version 2."""

    starts_from_files, vocab_size = True, 9

    def __init__(self, *, refuses: bool = False) -> None:
        self.version = WeightVersion(version=2, checksum="c")
        self.refuses, self.scored, self.questions = refuses, list[IntArray](), list[TeacherQuestion]()

    def score(self, sequences: list[IntArray], *, deadline_s: float) -> list[FloatArray]:
        self.scored += sequences
        return [-sequence[1:].astype(np.float32) / 8 for sequence in sequences]

    def score_completions(
        self, requests: list[TeacherRequest], question: TeacherQuestion, *, deadline_s: float
    ) -> list[TeacherScores]:
        self.questions.append(question)
        if self.refuses and question.temperature != 1:
            raise ConfigError("the temperature must be 1")
        top = np.log(np.array([0.5, 0.5] + [1e-30] * 7, np.float32))
        return [
            TeacherScores(
                teacher="",
                version=2,
                logprobs=-request.completion_ids.astype(np.float32) / 8,
                top_logprobs=np.tile(top, (len(request.completion_ids), 1)) if question.top_k else None,
            )
            for request in requests
        ]


def sampled(tokens: list[int], *, versions: tuple[tuple[int, int, int], ...], told: float = 0.0) -> Completion:
    """A completion whose log-probs are what the engine will say, and `told` more."""
    ids = np.array(tokens, np.int32)
    return Completion(
        token_ids=ids,
        logprobs=(-ids / 8 + told).astype(np.float32),
        versions=tuple(VersionSpan(version=version, start=start, end=end) for version, start, end in versions),
        finish_reason=FinishReason.STOP,
        text="",
    )


def gap_of(engine: Engine, *completions: Completion, **options: Any) -> SamplingGap | None:
    """What the report of the pull of version 3 says, after the completions were noted."""
    options = {"temperature": 1.0, "config": AsyncGRPOConfig(max_staleness=1), **options}
    proof = WeightProof(
        cast(Any, engine),
        name="rollout-0",
        model=ModelConfig(model_name_or_path="none"),
        rule=AgreementRule.of(options["config"]),
        deadline_s=1.0,
        temperature=options["temperature"],
    )
    proof.note(options.get("prompt", PROMPT), completions)
    check = WeightCheck(token_ids=PROMPT, logprobs=np.array([-0.75, -0.875], np.float32), version=3)
    proof.look_before(check if options.get("checks", True) else None)
    engine.version = WeightVersion(version=3, checksum="c")
    payload = WeightPayload(identity=engine.version, manifest=(), buffer=np.zeros(0, np.uint8))
    return proof.prove(payload, check, begin=0.0).sampling


def test_the_tokens_of_the_weights_that_the_engine_has_are_compared_and_no_others() -> None:
    engine = Engine()
    gap = gap_of(
        engine,
        sampled([1, 2, 3, 4], versions=((1, 0, 2), (2, 2, 4)), told=0.25),
        sampled([1, 2], versions=((1, 0, 2),), told=9.0),
        sampled([4], versions=((2, 0, 1),), told=0.25),
    )
    assert gap is not None
    assert (gap.version, gap.tokens) == (2, 3)
    assert (gap.abs_diff, gap.diff) == pytest.approx((0.25, -0.25))
    # The newest first, each up to its last token of these weights.
    assert [each.tolist() for each in engine.scored[:2]] == [[5, 6, 7, 4], [5, 6, 7, 1, 2, 3, 4]]
    doubts = [1 - np.exp(0.25 - token / 8) for token in (3, 4, 4)]
    assert gap.doubt == pytest.approx(np.mean(doubts)) and gap.level == pytest.approx(0.25 / np.mean(doubts))


def test_an_engine_that_says_the_same_again_is_off_by_nothing() -> None:
    gap = gap_of(Engine(), sampled([1, 2, 3], versions=((2, 0, 3),)))
    assert gap is not None and (gap.tokens, gap.abs_diff) == (3, 0.0)


def test_samples_of_another_temperature_are_scored_at_that() -> None:
    engine = Engine()
    gap = gap_of(engine, sampled([1, 2, 3], versions=((1, 0, 1), (2, 1, 3)), told=-0.5), temperature=0.6)
    assert gap is not None and (gap.tokens, gap.diff) == (2, pytest.approx(0.5))
    assert engine.questions == [TeacherQuestion(vocab_size=9, temperature=0.6)]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_what_is_known_at_temperature_1_is_enough_for_another_where_little_is_left(temperature: float) -> None:
    p = np.array([[0.6, 0.3, 0.0999, 0.0001], [0.3, 0.3, 0.25, 0.15]])
    expected = np.log(p[:, 1] ** (1 / temperature) / (p ** (1 / temperature)).sum(axis=1))
    given = {"temperature": temperature, "vocab_size": 4}
    rows, whole = np.log(p), cooled_logprobs(np.log(p[:, 1]), np.log(p), tolerance=0.0, **given)
    assert whole == pytest.approx(expected)
    # Three of four: 0.0001 is at most 0.0001 * 0.0999 at T = 1/2, and 0.01 at T = 2, of 0.46 and 1.64.
    first, second = cooled_logprobs(rows[:, 1], rows[:, :3], tolerance=4e-3, **given)
    assert first == pytest.approx(expected[0], abs=4e-3) and second == UNKNOWN
    assert cooled_logprobs(rows[:, 1], rows[:, :3], tolerance=1e-9, **given).tolist() == [UNKNOWN, UNKNOWN]


def test_an_engine_that_scores_at_temperature_1_alone_is_asked_for_its_most_probable_tokens() -> None:
    engine = Engine(refuses=True)
    gap = gap_of(engine, sampled([1, 2, 3], versions=((2, 1, 3),)), temperature=0.5)
    assert [(each.temperature, each.top_k) for each in engine.questions] == [(0.5, 0), (1.0, 9)]
    # Two equal tokens are all there is: at any temperature each has half, which is -0.693 and not -t / 8.
    assert gap is not None and gap.tokens == 2
    assert gap.diff == pytest.approx((-2 / 4 - np.log(0.5) + 2 / 8 - 3 / 4 - np.log(0.5) + 3 / 8) / 2)


@pytest.mark.parametrize(
    "options",
    [{"config": GRPOConfig()}, {"checks": False}, {"prompt": np.full(512, 3, np.int32)}],
    ids=["waits", "no-check-due", "too-long-to-score"],
)
def test_nothing_is_compared_where_fresh_tokens_do_it_or_it_would_cost_too_much(options: dict[str, Any]) -> None:
    engine = Engine()
    assert gap_of(engine, sampled([1, 2, 3], versions=((2, 0, 3),)), **options) is None
    assert [each.tolist() for each in engine.scored] == [PROMPT.tolist()]


def test_a_few_hundred_tokens_are_enough() -> None:
    engine = Engine()
    gap = gap_of(engine, *(sampled([1] * 100, versions=((2, 0, 100),)) for _ in range(20)))
    assert gap is not None and gap.tokens == 300
    # Sequences that are read for it are bounded, too: of 500 tokens each, two.
    long = np.full(490, 3, np.int32)
    gap = gap_of(Engine(), *(sampled([1] * 10, versions=((2, 0, 10),)) for _ in range(20)), prompt=long)
    assert gap is not None and gap.tokens == 20
