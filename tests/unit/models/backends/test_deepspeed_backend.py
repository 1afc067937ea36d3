"""The DeepSpeed back end on one rank: same numbers as plain torch, and state that fits or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed_ranks import Learner, Outcome, build, finish, resume, state_bits, train, update
from tiny_models import build_tiny_model
from trl_ray.errors import CheckpointError, ConfigError
from trl_ray.models.backends.ranks import SOLO, Ranks, free_address, join_ranks, leave_ranks

pytest.importorskip("deepspeed")
STAGES = range(4)


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"), family="llama", tied=False)


@pytest.fixture(scope="module")
def expected(model: str) -> Outcome:
    return train(build(model, SOLO), size=4)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A group of one; every test meets anew, as a learner does that restarts in its process."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # and gone afterwards: other libraries would think of a launcher
    yield join_ranks(rank=0, size=1, address=free_address(), device=torch.device("cpu"), timeout_s=30.0)
    leave_ranks()


@pytest.mark.parametrize("stage", STAGES)
def test_updates_equal_those_of_plain_torch(model: str, ranks: Ranks, expected: Outcome, stage: int) -> None:
    found = train(build(model, ranks, deepspeed=zero(stage)), size=4)
    assert found.names == expected.names
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.rates == expected.rates
    assert [norm for (norm,) in found.norms] == pytest.approx([norm for (norm,) in expected.norms], rel=1e-4)
    assert found.weights is not None and expected.weights is not None
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("optim", "stage"), [("sgd", 1), ("sgd", 3), ("muon", 0), ("adafactor", 0)])
def test_other_optimizers_move_weights_as_with_plain_torch_and_go_on_bit_for_bit(
    model: str, ranks: Ranks, tmp_path: Path, optim: str, stage: int
) -> None:
    def make(path: str) -> Learner:
        return build(path, ranks, deepspeed=zero(stage), optim=optim)

    expected = Outcome()
    plain = build(model, SOLO, optim=optim)
    for step in (1, 2):
        update(plain, step, expected)
    straight, resumed = resume(make, model, tmp_path)
    assert straight.weights is not None and resumed.weights is not None
    torch.testing.assert_close(straight.weights, finish(plain, expected).weights, rtol=0, atol=1e-5)
    assert torch.equal(resumed.weights, straight.weights) and resumed.rates == straight.rates[1:]


@pytest.mark.parametrize(("stage", "in_step", "splits"), [(0, False, False), (1, False, False), (2, True, False)])
def test_only_sharded_gradients_make_ranks_wait_in_every_pass(
    model: str, ranks: Ranks, stage: int, in_step: bool, splits: bool
) -> None:
    backend = build(model, ranks, deepspeed=zero(stage)).backend
    assert (backend.in_step, backend.shards_weights) == (in_step, splits)


def test_stage_three_shards_weights_and_shows_them_whole(model: str, ranks: Ranks) -> None:
    learner = build(model, ranks, deepspeed=zero(3, stage3_param_persistence_threshold=0))
    assert learner.backend.in_step and learner.backend.shards_weights
    assert all(parameter.numel() == 0 for parameter in learner.module.parameters())
    found, expected = finish(learner, Outcome()), finish(build(model, SOLO), Outcome())
    assert found.names == expected.names
    assert found.weights is not None and expected.weights is not None
    assert torch.equal(found.weights, expected.weights)


def test_reduced_gradients_do_not_linger_in_the_buffers_of_stage_three(model: str, ranks: Ranks) -> None:
    learner = build(model, ranks, deepspeed=zero(3))
    for finish_update in (learner.backend.update, learner.backend.discard):
        scores = learner.scorer.score(_some_samples())
        assert scores is not None
        learner.backend.backward(scores.logprobs.sum(), is_last=True)
        assert learner.backend.reduce() > 0
        shards = learner.backend._gradient_shards()  # type: ignore[attr-defined]
        assert any(shard.any() for shard in shards)
        finish_update()
        assert not any(shard.any() for shard in shards)


def _some_samples() -> Any:
    from deepspeed_ranks import samples

    return samples(1)[:2]


def test_a_key_that_deepspeed_does_not_know_is_a_wrong_input(model: str, ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match="reduce_buket_size"):
        build(model, ranks, deepspeed=zero(2, reduce_buket_size=5))


def updated(model: str, ranks: Ranks, deepspeed: dict[str, Any] | None) -> Learner:
    learner = build(model, ranks, deepspeed=deepspeed)
    update(learner, 1, Outcome())
    update(learner, 2, Outcome())
    return learner


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_and_learning_rate_come_back_bit_for_bit(
    model: str, ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    first = updated(model, ranks, zero(stage))
    state = first.backend.save_state(tmp_path)
    second = build(model, ranks, deepspeed=zero(stage))
    second.backend.load_state(tmp_path, state)
    bits = state_bits(first.backend)
    assert bits and all(map(torch.equal, bits, state_bits(second.backend)))
    assert second.backend.learning_rate == first.backend.learning_rate != build(model, SOLO).backend.learning_rate


def test_stage_zero_goes_on_from_plain_torch(model: str, ranks: Ranks, tmp_path: Path) -> None:
    first = updated(model, SOLO, None)
    second = build(model, ranks, deepspeed=zero(0))
    second.backend.load_state(tmp_path, first.backend.save_state(tmp_path))
    assert all(map(torch.equal, state_bits(first.backend), state_bits(second.backend)))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"zero_stage": 1, "num_ranks": 1, "bf16": False}, "'zero_stage': 1"),
        ({"zero_stage": 2, "num_ranks": 4, "bf16": False}, "'num_ranks': 4"),
        ({"zero_stage": 2, "num_ranks": 1, "bf16": True}, "'bf16': True"),
        (None, "'zero_stage': 0"),
    ],
)
def test_state_of_another_stage_or_number_of_ranks_says_what_to_do(
    model: str, ranks: Ranks, tmp_path: Path, written: dict[str, Any] | None, message: str
) -> None:
    backend = updated(model, ranks, zero(2)).backend
    state = backend.save_state(tmp_path)
    if written is None:
        del state["deepspeed"]
    else:
        state["deepspeed"] = written
    with pytest.raises(CheckpointError, match=message) as caught:
        backend.load_state(tmp_path, state)
    assert "number of ranks" in str(caught.value) and "model_name_or_path" in str(caught.value)


def test_missing_truncated_or_foreign_shards_are_told_with_their_rank(model: str, ranks: Ranks, tmp_path: Path) -> None:
    backend = updated(model, ranks, zero(1)).backend
    state = backend.save_state(tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    saved = torch.load(file, weights_only=True)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="rank 0 met"):
        backend.load_state(tmp_path, state)
    torch.save(saved | {"sizes": [1, 2]}, file)
    with pytest.raises(CheckpointError, match=r"shards have \[1, 2\] elements"):
        backend.load_state(tmp_path, state)
    file.unlink()
    with pytest.raises(CheckpointError, match="rank 0 met FileNotFoundError"):
        backend.load_state(tmp_path, state)


def test_a_folder_that_cannot_be_written_is_told(model: str, ranks: Ranks, tmp_path: Path) -> None:
    backend = build(model, ranks, deepspeed=zero(1)).backend
    with pytest.raises(CheckpointError, match="rank 0 met"):
        backend.save_state(tmp_path / "not" / "there")
