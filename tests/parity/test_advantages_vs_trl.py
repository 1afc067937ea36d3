"""Advantages equal those that TRL's own trainers compute, from rewards with gaps, weights, clipping and KL.

The oracle is `_generate_and_score_completions` of TRL's GRPOTrainer and RLOOTrainer themselves, on a stand-in for the
trainer whose generation, rewards and log-probs are given: everything from rewards to advantages is TRL's code.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossInputs, StepTotals, sample_tokens
from trl_ray.algorithms.policy.group_samples import BuiltStep, RewardRules, build_step
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.config.load import build
from trl_ray.config.losses.advantage_options import AdvantageConfig
from trl_ray.config.losses.policy_options import LossConfig
from trl_ray.config.runs.grpo_config import RLOOConfig
from trl_ray.types import (
    Completion,
    FinishReason,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    SampleScores,
    VersionSpan,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
GROUPS, SIZE, FUNCTIONS, LENGTH = 5, 4, 3, 6
ROWS = GROUPS * SIZE
WEIGHTS = (1.0, 0.5, -2.0)
EOS, PAD = 9, 0
NONE = np.nan
TOLERANCE = 1e-6
"""TRL computes Bessel's factor n / (n - 1) in float32, everything else in the type of the rewards: float64 here."""


def rewards() -> np.ndarray:
    """[ROWS, FUNCTIONS] with every kind of gap: part of a row, a row, all but one of a group, a group, equal groups."""
    values = np.random.default_rng(0).normal(size=(ROWS, FUNCTIONS)).astype(np.float32).astype(np.float64)
    values[0, 1] = NONE
    values[1] = NONE
    values[4:7] = NONE  # group 1: one completion has scores
    values[8:12] = [0.1, 0.7, 0.2]  # group 2: all equal
    values[12:16, 2] = NONE  # group 3: a function abstains on all
    values[13:16, 1] = NONE  # and another on all but one
    return values


def lengths() -> np.ndarray:
    """[ROWS] tokens of each completion."""
    return np.random.default_rng(1).integers(1, LENGTH + 1, size=ROWS)


def logprobs(seed: int) -> np.ndarray:
    """[ROWS, LENGTH]"""
    return -np.random.default_rng(seed).gamma(2.0, size=(ROWS, LENGTH)).astype(np.float32)


def completion_ids() -> list[list[int]]:
    """Every third is cut off: it does not end with EOS."""
    return [[3] * (n - 1) + [7 if row % 3 == 0 else EOS] for row, n in enumerate(lengths().tolist())]


def trl_trainer(trainer: str, values: np.ndarray, weights: Sequence[float], **options: Any) -> SimpleNamespace:
    """What the method asks of its trainer."""
    ids = completion_ids()
    generated: tuple[Any, ...] = ([[1, 2]] * ROWS, ids, ["text"] * ROWS)
    if trainer == "grpo":
        generated = ([[1, 2]] * ROWS, ids, None, ["text"] * ROWS, None, {}, None, None)
    models = {"policy": torch.from_numpy(logprobs(2)), "reference": torch.from_numpy(logprobs(3))}
    policy, reference = (
        SimpleNamespace(training=True, is_gradient_checkpointing=False, name=name) for name in ("policy", "reference")
    )
    width = int(lengths().max())
    base = {
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), process_index=0, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "model": policy,
        "ref_model": reference,
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "_generate": lambda prompts: generated,
        "_tokenizer": SimpleNamespace(pad_token_id=PAD),
        "eos_token_ids": [EOS],
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "args": SimpleNamespace(
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            per_device_train_batch_size=ROWS,
            gradient_checkpointing_kwargs=None,
        ),
        "num_iterations": 1,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "beta": 0.0,
        "_get_per_token_logps_and_entropies": lambda model, *a, **k: (models[model.name][:, :width], None, None),
        "_calculate_rewards": lambda *a: torch.from_numpy(values.copy()),
        "num_generations": SIZE,
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "normalize_advantages": False,
        "reward_clip_range": None,
        "reward_weights": torch.tensor(weights, dtype=torch.float64),
        "reward_funcs": [None] * FUNCTIONS,
        "reward_func_names": [f"f{k}" for k in range(FUNCTIONS)],
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "log_multimodal": False,
    }
    return SimpleNamespace(**{**base, **options})


def trl_advantages(
    trainer: str, values: np.ndarray, weights: Sequence[float] = WEIGHTS, **options: Any
) -> tuple[np.ndarray, dict[str, float]]:
    """[ROWS] and the metrics of TRL's method."""
    import trl

    chosen = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[trainer]
    stand_in = trl_trainer(trainer, values, weights, **options)
    output = chosen._generate_and_score_completions(stand_in, [{"prompt": "p"}] * ROWS)
    return output["advantages"].numpy(), {key: each[0] for key, each in stand_in._metrics["train"].items()}


def groups(values: np.ndarray, weights: Sequence[float] = WEIGHTS) -> list[RolloutGroup]:
    """The same step as our rollout workers hand it over: totals are what a reward worker adds up."""
    made = []
    for number in range(GROUPS):
        rows = range(number * SIZE, (number + 1) * SIZE)
        made.append(
            RolloutGroup(
                ticket=GroupTicket(
                    group_id=number,
                    attempt=0,
                    prompt=Prompt(prompt_id=f"0:{number}", token_ids=np.array([1, 2], np.int32)),
                    admitted_at_version=0,
                ),
                completions=tuple(completion(row) for row in rows),
                rewards=tuple(reward(values[row], weights) for row in rows),
                worker="w",
            )
        )
    return made


def completion(row: int) -> Completion:
    ids = completion_ids()[row]
    return Completion(
        token_ids=np.array(ids, np.int32),
        logprobs=logprobs(4)[row, : len(ids)],
        versions=(VersionSpan(version=0, start=0, end=len(ids)),),
        finish_reason=FinishReason.STOP if ids[-1] == EOS else FinishReason.LENGTH,
        text="text",
    )


def reward(row: np.ndarray, weights: Sequence[float]) -> Reward:
    parts = {f"f{k}": None if np.isnan(value) else float(value) for k, value in enumerate(row)}
    scored = [w * value for w, value in zip(weights, parts.values(), strict=True) if value is not None]
    return Reward(total=sum(scored) if scored else None, parts=parts)


def scores(built: BuiltStep) -> list[SampleScores]:
    """Of the samples of a draft: 0 where nothing is trained, as the learner gives them."""
    answers = []
    for row, sample in enumerate(built.samples):
        policy, reference = (
            np.where(sample.loss_mask, logprobs(seed)[row, : len(sample.loss_mask)], 0).astype(np.float32)
            for seed in (2, 3)
        )
        answers.append(SampleScores(logprobs=policy, entropy=np.zeros_like(policy), reference_logprobs=reference))
    return answers


def ours(
    values: np.ndarray, weights: Sequence[float] = WEIGHTS, *, beta: float = 0.0, **options: Any
) -> tuple[np.ndarray, BuiltStep]:
    """[ROWS] as the loop computes them."""
    rules = RewardRules(reward_weights=tuple(weights), beta=beta, max_completion_length=LENGTH)
    given = {"config": build(AdvantageConfig, options), "rules": rules}
    built = build_step(groups(values, weights), **given)
    if beta:
        built = build_step(groups(values, weights), **given, scores=scores(built))
    return np.concatenate(built.advantages), built


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process gathers nothing."""
    for module in ("grpo_trainer", "rloo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.gather", lambda x: x)
        monkeypatch.setattr(f"trl.trainer.{module}.gather_object", lambda x: x)


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_with_gaps_in_the_rewards(scale: str, weights: tuple[float, ...]) -> None:
    expected, metrics = trl_advantages("grpo", rewards(), weights, scale_rewards=scale)
    values, built = ours(rewards(), weights, scale_rewards=scale)
    np.testing.assert_allclose(values, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert np.abs(expected).max() > 0.5
    assert built.metrics["reward/mean"].value == pytest.approx(metrics["reward"], rel=1e-9)
    for k in range(FUNCTIONS):
        assert built.metrics[f"reward/f{k}/mean"].value == pytest.approx(metrics[f"rewards/f{k}/mean"], rel=1e-9)


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1.0, 1.0)])
def test_several_objectives_normalised_before_they_are_summed(weights: tuple[float, ...]) -> None:
    expected, _ = trl_advantages("grpo", rewards(), weights, multi_objective_aggregation="normalize_then_sum")
    values, _ = ours(rewards(), weights, multi_objective_aggregation="normalize_then_sum")
    np.testing.assert_allclose(values, expected, rtol=TOLERANCE, atol=TOLERANCE)
    summed, _ = ours(rewards(), weights)
    assert np.abs(values - summed).max() > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("bounds", [None, (-0.5, 0.8)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_rloo_with_gaps_clipping_and_the_kl_in_the_reward(
    beta: float, bounds: tuple[float, float] | None, normalize: bool, mask_truncated: bool
) -> None:
    options = {
        "reward_clip_range": bounds,
        "normalize_advantages": normalize,
        "mask_truncated_completions": mask_truncated,
    }
    expected, metrics = trl_advantages("rloo", rewards(), beta=beta, **options)
    values, built = ours(rewards(), beta=beta, advantage_baseline="leave_one_out", scale_rewards="none", **options)
    # TRL adds the KL up in float32.
    tolerance = 1e-5 if beta else TOLERANCE
    np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance)
    assert np.abs(expected).max() > 0.5
    assert built.metrics["reward/mean"].value == pytest.approx(metrics["reward"], rel=1e-9)
    if beta:
        assert built.metrics["kl/ref"].value == pytest.approx(metrics["kl"], rel=1e-5)
    fraction = built.metrics["advantage/zero_std_fraction"].value
    # TRL does not count a group in which nobody or one has a score: its deviation is NaN there.
    assert fraction == pytest.approx(metrics["frac_reward_zero_std"] + 1 / GROUPS)


def test_the_defaults_of_rloo_are_those_of_trl() -> None:
    import trl

    theirs = {name: field.default for name, field in trl.RLOOConfig.__dataclass_fields__.items()}
    mine = RLOOConfig()
    names = (
        *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "repetition_penalty"),
        *("reward_weights", "reward_clip_range", "normalize_advantages", "mask_truncated_completions"),
        *("beta", "epsilon", "epsilon_high", "num_iterations", "learning_rate"),
        *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    )
    assert {name: getattr(mine, name) for name in names} == {name: theirs[name] for name in names}


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_loss_of_the_defaults_of_rloo_and_its_gradient(shift: float) -> None:
    """TRL has the mean of the micro-batch; here a step of two micro-batches, of which the other is as large."""
    import trl

    config = build(RLOOConfig, {"num_generations": SIZE, "per_device_train_batch_size": ROWS})
    step_advantages, built = ours(rewards(), advantage_baseline="leave_one_out", scale_rewards="none")
    kept = torch.arange(LENGTH) < torch.from_numpy(lengths())[:, None]
    old = torch.from_numpy(logprobs(2))
    noise = torch.from_numpy(np.random.default_rng(5).normal(size=(ROWS, LENGTH)).astype(np.float32))
    policy = (old + shift * noise).requires_grad_()
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (policy, torch.zeros_like(policy), None),
        aux_loss_enabled=False,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    given = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": kept.long(),
        "old_logps": (old * kept).sum(1),
        "advantages": torch.from_numpy(step_advantages).float(),
    }
    expected = trl.RLOOTrainer._compute_loss(stand_in, None, given)
    wanted = torch.autograd.grad(expected, policy)[0]

    samples = [
        replace(sample, old_logprobs=old[row, : len(sample.loss_mask)].numpy())
        for row, sample in enumerate(built.samples)
    ]
    flat = policy.detach()[kept].requires_grad_()
    inputs = LossInputs(
        tokens=sample_tokens(samples),
        scores=TokenLogprobs(logprobs=flat, entropy=torch.zeros_like(flat)),
        reference_logprobs=None,
        micro_batch_tokens=int(kept.sum()),
        totals=StepTotals(num_valid_tokens=2 * int(kept.sum()), num_samples=2 * ROWS, num_micro_batches=2),
    )
    loss = PolicyLoss(config=config.part(LossConfig), max_completion_length=config.max_completion_length)(inputs).loss
    gradient = torch.autograd.grad(loss, flat)[0]
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, wanted[kept] / 2, rtol=1e-5, atol=1e-7)
