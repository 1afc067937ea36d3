"""Two ranks with a teacher compute what one computes, plain torch and ZeRO; no Ray.

fixture: two processes run every case of taught_ranks --> outcomes.pt --> compared with one rank here
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from taught_ranks import STEPS, Outcome, arguments, flat, run_rank, update
from tiny_models import build_tiny_model
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.types import Metric
from two_ranks import meeting_place, run_two_ranks

pytestmark = [pytest.mark.integration, pytest.mark.slow]
PEFT = {"use_peft": True, "lora_dropout": 0.0}


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


CASES: dict[str, dict[str, Any]] = {
    "full live": {"objective": "full", "kind": "live"},
    "sampled ema": {"objective": "sampled", "kind": "ema"},
    "said": {"objective": "said"},
    "full live zero-3": {"objective": "full", "kind": "live", "deepspeed": zero(3)},
    "topk live zero-3": {"objective": "topk", "kind": "live", "deepspeed": zero(3)},
    "topk ema zero-2": {"objective": "topk", "kind": "ema", "deepspeed": zero(2)},
    "blend ema zero-3": {"objective": "blend", "kind": "ema", "deepspeed": zero(3)},
    "sampled base adapter zero-3": {"objective": "sampled", "kind": "base", "deepspeed": zero(3), "model": PEFT},
    "full factors zero-3": {"objective": "full", "kind": "ema", "deepspeed": zero(3), "model": PEFT},
    "topk product zero-3": {
        "objective": "topk",
        "kind": "ema",
        "average": "product",
        "deepspeed": zero(3),
        "model": PEFT,
    },
    "union external zero-3": {"objective": "union", "kind": "external", "deepspeed": zero(3)},
    "said zero-3": {"objective": "said", "deepspeed": zero(3)},
    "sdpo said zero-2": {"objective": "sdpo said", "deepspeed": zero(2)},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The student's, and a teacher's that is another."""
    student = build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)
    return student, build_tiny_model(tmp_path_factory.mktemp("other"), family="llama", seed=3)


def meetings(directory: Path) -> list[tuple[str, str]]:
    """Of each case, before and after its checkpoint."""
    return [(meeting_place(directory), meeting_place(directory)) for _ in CASES]


@pytest.fixture(scope="module")
def outcomes(models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Of all cases; the processes are started once, because they take seconds to load."""
    pytest.importorskip("deepspeed")
    directory = tmp_path_factory.mktemp("outcomes")
    run_two_ranks(run_rank, lambda: (*models, str(directory), CASES, meetings(directory)))
    found: dict[str, Outcome] = torch.load(directory / "outcomes.pt", weights_only=False)
    return found


def alone(models: tuple[str, str], case: str) -> Outcome:
    """One rank of plain torch, whose updates are one micro-batch."""
    options = {key: value for key, value in CASES[case].items() if key != "deepspeed"}
    objective, (student, other) = options.pop("objective"), models
    learner, outcome = PolicyLearner(**arguments(student, objective, other=other, **options)), Outcome()
    for step in STEPS:
        outcome.results.append(learner.step(update(objective, step, size=8, other=other)))
        outcome.evaluations.append(learner.evaluate(update(objective, 9, size=8, other=other)))
    outcome.weights = flat(learner)
    return outcome


def values(metrics: dict[str, Metric]) -> dict[str, float]:
    """Without the one that is a mean over micro-batches."""
    return {name: metric.value for name, metric in metrics.items() if name != "importance/ess"}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_whatever_their_shares(
    outcomes: dict[str, Outcome], models: tuple[str, str], case: str
) -> None:
    found, expected = outcomes[case], alone(models, case)
    for one, other in zip(found.results, expected.results, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
        assert values(dict(one.metrics)) == pytest.approx(values(dict(other.metrics)), rel=1e-3, abs=1e-4)
    for evaluated, other_one in zip(found.evaluations, expected.evaluations, strict=True):
        assert evaluated.loss == pytest.approx(other_one.loss, rel=1e-4, abs=1e-5)
    assert found.weights is not None and expected.weights is not None
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_resumes_bit_for_bit(outcomes: dict[str, Outcome], case: str) -> None:
    straight, resumed = outcomes[case].resumed
    assert (straight.loss, straight.grad_norm, straight.lr) == (resumed.loss, resumed.grad_norm, resumed.lr)
    found = outcomes[case].resumed_weights
    assert found is not None and torch.equal(found[0], found[1])


@pytest.mark.parametrize("case", ["said", "said zero-3"])
def test_a_teachers_nan_on_one_rank_skips_the_update_on_both(outcomes: dict[str, Outcome], case: str) -> None:
    outcome = outcomes[case]
    assert outcome.skipped is not None and outcome.skipped.skipped and outcome.unchanged
