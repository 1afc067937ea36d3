"""Two DeepSpeed ranks compute what one rank of plain torch computes, in every ZeRO stage; no Ray.

fixture: two processes run every case of deepspeed_ranks --> outcomes.pt --> compared with one rank of plain torch here
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspeed_ranks import Outcome, build, finish, run_rank, train
from tiny_models import build_tiny_model
from trl_ray.config.sections import Dtype
from trl_ray.models.backends.ranks import SOLO
from two_ranks import meeting_place, run_two_ranks

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.integration, pytest.mark.slow]

TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
SMALL = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}
STAGES = {f"zero-{stage}": {"deepspeed": {"zero_optimization": {"stage": stage}}} for stage in range(4)}
OTHERS: dict[str, dict[str, Any]] = {
    "torch": {},
    "zero-1-overlap": {"deepspeed": {"zero_optimization": {"stage": 1, "overlap_comm": True}}},
    "zero-2-offload": {"deepspeed": {"zero_optimization": OFFLOAD, "optimizer": TORCH_ADAM}},
    "zero-3-small-buckets": {"deepspeed": {"zero_optimization": SMALL}},
}
HALVES: dict[str, dict[str, Any]] = {
    f"zero-{stage}-bf16": {"deepspeed": {"zero_optimization": {"stage": stage}}, "dtype": Dtype.BFLOAT16}
    for stage in (2, 3)
}
SHARDED = [case for case, options in (STAGES | OTHERS | HALVES).items() if options]
Outcomes = dict[str, dict[str, Outcome]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="qwen2", tied=True, seed=0)


@pytest.fixture(scope="module")
def outcomes(model: str, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of all cases; the processes are started once, because they take seconds to load."""
    directory = tmp_path_factory.mktemp("outcomes")
    cases = tuple((STAGES | OTHERS | HALVES).items())
    run_two_ranks(run_rank, lambda: (meeting_place(directory), model, str(directory), cases))
    found: Outcomes = torch.load(directory / "outcomes.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def expected(model: str) -> Outcome:
    """One rank of plain torch, whose updates are one micro-batch of eight."""
    return train(build(model, SOLO), size=8)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.rates == expected.rates
    for norms, (norm,) in zip(found.norms, expected.norms, strict=True):
        assert norms[0] == norms[1] == pytest.approx(norm, rel=1e-4)
    assert found.names == expected.names
    assert found.weights is not None and expected.weights is not None
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-5)


def test_the_updates_move_the_weights_by_more_than_the_tolerance(model: str, expected: Outcome) -> None:
    assert expected.weights is not None
    start = finish(build(model, SOLO), Outcome()).weights
    assert start is not None and float((expected.weights - start).abs().max()) > 1e-3
    assert all(norm > 0.5 for (norm,) in expected.norms), "gradients are clipped at 0.5"


def test_eight_micro_batches_on_one_rank_equal_one_of_eight(model: str, expected: Outcome) -> None:
    found = train(build(model, SOLO), size=1)
    found.norms = [[norm, norm] for (norm,) in found.norms]
    assert_equal(found, expected)


@pytest.mark.parametrize("case", STAGES | OTHERS)
def test_two_ranks_of_four_micro_batches_equal_one_rank(outcomes: Outcomes, expected: Outcome, case: str) -> None:
    assert_equal(outcomes[case]["plain"], expected)


@pytest.mark.parametrize("case", STAGES)
def test_ranks_with_an_empty_micro_batch_and_passes_without_gradient_equal_one_rank(
    outcomes: Outcomes, expected: Outcome, case: str
) -> None:
    assert_equal(outcomes[case]["unequal"], expected)


@pytest.mark.parametrize("case", ["zero-1", "zero-3"])
def test_gradient_checkpointing_changes_nothing(outcomes: Outcomes, expected: Outcome, case: str) -> None:
    assert_equal(outcomes[case]["checkpointed"], expected)


@pytest.mark.parametrize("case", SHARDED)
def test_a_skipped_update_leaves_weights_and_optimizer_bit_for_bit(outcomes: Outcomes, case: str) -> None:
    assert outcomes[case]["skip"].unchanged == [True, True, True]


@pytest.mark.parametrize("case", SHARDED)
def test_the_norm_of_a_gradient_that_is_nan_on_one_rank_is_nan_on_both(outcomes: Outcomes, case: str) -> None:
    finite, poisoned = outcomes[case]["skip"].skipped_norms
    assert finite[0] == finite[1] and finite[0] > 0
    assert all(norm != norm for norm in poisoned)


@pytest.mark.parametrize("case", SHARDED)
def test_nothing_of_a_skipped_update_is_in_the_next_one(outcomes: Outcomes, case: str) -> None:
    found, expected = outcomes[case]["skip"], outcomes[case]["without"]
    assert (found.losses, found.norms) == (expected.losses, expected.norms)
    assert found.weights is not None and expected.weights is not None
    assert torch.equal(found.weights, expected.weights)


@pytest.mark.parametrize("case", SHARDED)
def test_the_schedule_moves_in_skipped_updates_too(outcomes: Outcomes, case: str) -> None:
    # Linear over 10 updates after 2 of warm-up: the first update is number 0, the second one made is number 4.
    assert outcomes[case]["skip"].rates == pytest.approx([0.0, 1e-2 * (1 - (4 - 2) / (10 - 2))])


@pytest.mark.parametrize("case", STAGES | OTHERS | HALVES)
def test_a_checkpoint_resumes_bit_for_bit(outcomes: Outcomes, case: str) -> None:
    straight, resumed = outcomes[case]["straight"], outcomes[case]["resumed"]
    assert resumed.losses == straight.losses[1:]
    assert resumed.norms == straight.norms[1:]
    assert resumed.rates == straight.rates[1:]
    assert straight.weights is not None and resumed.weights is not None
    assert torch.equal(straight.weights, resumed.weights)


@pytest.mark.parametrize("case", HALVES)
def test_bfloat16_weights_follow_the_float32_ones(outcomes: Outcomes, expected: Outcome, case: str) -> None:
    found = outcomes[case]["plain"]
    assert found.weights is not None and expected.weights is not None
    assert found.weights.dtype == torch.bfloat16
    # Weights are below 1; bfloat16 keeps 8 bits of them.
    torch.testing.assert_close(found.weights.float(), expected.weights, rtol=0, atol=2**-8)
