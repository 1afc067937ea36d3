"""Two ranks compute what one computes, for supervised objectives, plain torch and ZeRO; no Ray.

fixture: two processes run every case of supervised_ranks --> outcomes.pt --> compared with one rank here
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from supervised_ranks import STEPS, Outcome, arguments, flat, run_rank, update
from tiny_models import build_tiny_model
from trl_ray.actors.policy_learner import PolicyLearner
from trl_ray.types import Metric
from two_ranks import meeting_place, run_two_ranks

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


CASES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
    "reward": {"objective": "reward"},
    "prm": {"objective": "prm"},
    "dpo adapter": {"objective": "dpo", "model": {"use_peft": True}},
    "sft zero-3": {"objective": "sft", "deepspeed": zero(3)},
    "dpo zero-2": {"objective": "dpo", "deepspeed": zero(2)},
    "dpo zero-3": {"objective": "dpo", "deepspeed": zero(3)},
    "dpo precomputed zero-3": {"objective": "dpo-precomputed", "deepspeed": zero(3)},
    "dpo adapter zero-3": {"objective": "dpo", "deepspeed": zero(3), "model": {"use_peft": True}},
    "reward zero-3": {"objective": "reward", "deepspeed": zero(3)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


def meetings(directory: Path) -> list[tuple[str, str]]:
    """Of each case, before and after its checkpoint."""
    return [(meeting_place(directory), meeting_place(directory)) for _ in CASES]


@pytest.fixture(scope="module")
def outcomes(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Of all cases; the processes are started once, because they take seconds to load."""
    pytest.importorskip("deepspeed")
    directory = tmp_path_factory.mktemp("outcomes")
    run_two_ranks(run_rank, lambda: (model, str(directory), CASES, meetings(directory)))
    found: dict[str, Outcome] = torch.load(directory / "outcomes.pt", weights_only=False)
    return found


def alone(model: str, case: str) -> Outcome:
    """One rank of plain torch, whose updates are one micro-batch of eight."""
    options = {key: value for key, value in CASES[case].items() if key != "deepspeed"}
    objective = options.pop("objective")
    learner, outcome = PolicyLearner(**arguments(model, objective, **options)), Outcome()
    for step in STEPS:
        outcome.results.append(learner.step(update(objective, step, size=8)))
        outcome.evaluations.append(learner.evaluate(update(objective, 9, size=8)))
    outcome.weights = flat(learner)
    return outcome


def values(metrics: dict[str, Metric]) -> dict[str, float]:
    """Without who wins a pair while policy and reference are equal but for rounding."""
    return {name: metric.value for name, metric in metrics.items() if name != "rewards/accuracies"}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_whatever_their_shares(outcomes: dict[str, Outcome], model: str, case: str) -> None:
    found, expected = outcomes[case], alone(model, case)
    for one, other in zip(found.results, expected.results, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert values(dict(one.metrics)) == pytest.approx(values(dict(other.metrics)), rel=1e-3, abs=1e-4)
    assert found.weights is not None and expected.weights is not None
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_of_two_ranks_equals_that_of_one(outcomes: dict[str, Outcome], model: str, case: str) -> None:
    for one, other in zip(outcomes[case].evaluations, alone(model, case).evaluations, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert values(dict(one.metrics)) == pytest.approx(values(dict(other.metrics)), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dpo")])
def test_nan_on_one_rank_skips_the_update_on_both_and_names_the_row(outcomes: dict[str, Outcome], case: str) -> None:
    outcome = outcomes[case]
    assert outcome.skipped is not None and outcome.skipped.skipped and outcome.unchanged
    (warning,) = outcome.warnings
    assert warning["group_id"] == 7 and warning["sample"] == 1 and warning["rank"] in (0, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_resumes_bit_for_bit(outcomes: dict[str, Outcome], case: str) -> None:
    straight, resumed = outcomes[case].resumed
    assert (straight.loss, straight.grad_norm, straight.lr) == (resumed.loss, resumed.grad_norm, resumed.lr)
    found = outcomes[case].resumed_weights
    assert found is not None and torch.equal(found[0], found[1])
