"""The policy objective gives the values and gradients of TRL's GRPO and RLOO losses, in float64.

Both get the same padded rows: ragged lengths, one row masked out, one without a score. Where TRL's own numbers depend
on how an update is cut, the test states the difference and holds ours against a computation by hand.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossInputs, SampleTokens, StepTotals
from trl_ray.algorithms.policy.policy_loss import PolicyLoss
from trl_ray.algorithms.policy.policy_terms import sampler_correction
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.policy_options import CLIPPED, LossConfig, LossType
from trl_ray.types import Metric

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
MAX_LENGTH = 9
TARGET = 1.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Padded rows of a micro-batch."""

    policy: Tensor
    """[B, T]"""
    entropy: Tensor
    """[B, T]"""
    old: Tensor
    """[B, T] of the policy before the first update."""
    sampler: Tensor
    """[B, T]"""
    reference: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T] 1 where a token is trained on."""
    advantages: Tensor
    """[B]"""

    @property
    def kept(self) -> Tensor:
        return self.mask.bool()


def rows(lengths: Sequence[int], *, seed: int = 0) -> Rows:
    """Random ones; the third row has no score, and within the first one a token is not the policy's own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(lengths), 6, generator=generator, dtype=torch.float64)

    old = -3 * torch.rand(len(lengths), 6, generator=generator, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    mask[0, 1] = 0
    advantages = noise(1.5)[:, 0]
    advantages[2] = 0.0
    return Rows(
        policy=old + noise(0.3),
        entropy=noise(1.0).abs(),
        old=old,
        sampler=old + noise(0.4),
        reference=old + noise(0.3),
        mask=mask,
        advantages=advantages,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """How an update is cut, and whose log-probs are taken for the old policy."""

    accumulation: int = 1
    num_items: int | None = None
    """Trained tokens of the whole generation batch; None: of this micro-batch."""
    per_generation: int = 1
    """TRL's steps_per_generation, in micro-batches."""
    last_entropy: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """A loss with its gradients by the log-probs and the entropies [B, T]."""

    value: float
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Any]


def trl_stub(config: LossConfig, cut: Cut) -> SimpleNamespace:
    """As much of a GRPOTrainer as its loss looks at."""
    from trl import GRPOTrainer

    return SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=config.top_entropy_quantile,
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        importance_sampling_level=config.importance_sampling_level.value,
        beta=config.beta,
        args=SimpleNamespace(
            **{name: getattr(config, name) for name in LossConfig.model_fields}, steps_per_generation=cut.per_generation
        ),
        loss_type=config.loss_type.value,
        epsilon_low=config.epsilon,
        epsilon_high=config.upper_epsilon,
        use_vllm=config.corrects_for_sampler,
        vllm_importance_sampling_correction=config.corrects_for_sampler,
        vllm_importance_sampling_mode=config.vllm_importance_sampling_mode.value,
        vllm_importance_sampling_clip_min=config.vllm_importance_sampling_clip_min,
        vllm_importance_sampling_clip_max=config.vllm_importance_sampling_clip_max,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=cut.accumulation,
        max_completion_length=MAX_LENGTH,
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            reduce=lambda x, reduction: x,
            gather=lambda x: x,
            pad_across_processes=lambda x, dim, pad_index: x,
        ),
        entropy_coef=config.entropy_coef,
        use_adaptive_entropy=config.use_adaptive_entropy,
        _entropy_bonus_enabled=config.has_entropy_bonus,
        _last_world_entropy=cut.last_entropy,
        _entropy_window_stats=None,
        _metrics={"train": defaultdict(list)},
        get_high_entropy_mask=lambda *args: GRPOTrainer.get_high_entropy_mask(stub_accelerator(), *args),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )


def stub_accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda x: x, pad_across_processes=lambda x, dim, pad_index: x)
    )


@functools.cache
def trl_importance_code() -> CodeType:
    """The statements of TRL's generation step that compute the factor, on their own."""
    from trl import GRPOTrainer

    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions)))
    (block,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and any(
            isinstance(part, ast.Assign) and getattr(part.targets[0], "id", "") == "per_token_logps_diff"
            for part in node.body
        )
    )
    return compile(ast.Module(body=[block], type_ignores=[]), "trl", "exec")


def trl_importance_ratio(data: Rows, config: LossConfig) -> Tensor:
    """TRL's factor [B, T] or [B, 1]."""
    names = {
        "self": trl_stub(config, Cut()),
        "old_per_token_logps": data.old,
        "sampling_per_token_logps": data.sampler,
        "completion_mask": data.mask,
        "tool_mask": None,
        "torch": torch,
        "math": math,
    }
    exec(trl_importance_code(), names)
    ratio = names["vllm_importance_sampling_ratio"]
    assert isinstance(ratio, Tensor)
    return ratio


def trl_loss(data: Rows, config: LossConfig, cut: Cut | None = None) -> Result:
    """What TRL's trainer computes for one micro-batch."""
    from trl import GRPOTrainer

    cut = cut or Cut()
    logprobs, entropy = data.policy.clone().requires_grad_(), data.entropy.clone().requires_grad_()
    stub = trl_stub(config, cut)
    stub._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, entropy, None)
    ids = torch.zeros_like(data.mask)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": data.mask,
        "advantages": data.advantages,
        "old_per_token_logps": data.sampler if config.old_logprobs.value == "sampler" else data.old,
        "sampling_per_token_logps": data.sampler,
        "ref_per_token_logps": data.reference,
        "num_items_in_batch": torch.tensor(float(cut.num_items or data.mask.sum())),
    }
    if config.corrects_for_sampler:
        inputs["importance_sampling_ratio"] = trl_importance_ratio(data, config)
    value = GRPOTrainer._compute_loss(stub, None, inputs)
    return Result(
        value=value.item(), **_gradients(value, logprobs, entropy), metrics={"stub": stub, **stub._metrics["train"]}
    )


def _gradients(value: Tensor, logprobs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, [logprobs, entropy], allow_unused=True)
    names = ("logprobs", "entropy")
    return {
        name: torch.zeros_like(logprobs) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }


def entropy_mask(data: Rows, config: LossConfig) -> Tensor | None:
    """[B, T] TRL's own, of one micro-batch."""
    from trl import GRPOTrainer

    if config.top_entropy_quantile == 1:
        return None
    return GRPOTrainer.get_high_entropy_mask(
        stub_accelerator(), data.entropy, data.mask, 1 - config.top_entropy_quantile
    )


def our_inputs(data: Rows, config: LossConfig, totals: StepTotals | None = None) -> LossInputs:
    kept, mask = data.kept, entropy_mask(data, config)
    counts = data.mask.sum(1)
    surrogate_mask = None if mask is None else mask[kept]
    return LossInputs(
        tokens=SampleTokens(
            sample_index=torch.repeat_interleave(torch.arange(len(counts)), counts),
            sampler_logprobs=data.sampler[kept],
            advantages=torch.repeat_interleave(data.advantages, counts),
            num_sequences=len(counts),
            old_logprobs=data.old[kept],
            surrogate_mask=surrogate_mask,
        ),
        scores=TokenLogprobs(logprobs=data.policy[kept].requires_grad_(), entropy=data.entropy[kept].requires_grad_()),
        reference_logprobs=data.reference[kept],
        micro_batch_tokens=int(counts.sum()),
        totals=totals
        or StepTotals(
            num_valid_tokens=int(counts.sum()),
            num_samples=len(counts),
            num_micro_batches=1,
            num_surrogate_tokens=None if surrogate_mask is None else int(surrogate_mask.sum()),
        ),
    )


def our_loss(data: Rows, config: LossConfig, totals: StepTotals | None = None) -> Result:
    inputs = our_inputs(data, config, totals)
    output = PolicyLoss(config=config, max_completion_length=MAX_LENGTH)(inputs)
    flat = _gradients(output.loss, inputs.logprobs, inputs.entropy)
    gradients = {name: torch.zeros_like(data.policy).masked_scatter(data.kept, value) for name, value in flat.items()}
    return Result(value=output.loss.item(), **gradients, metrics=dict(output.metrics))


def assert_same(ours: Result, theirs: Result, what: object) -> None:
    assert ours.value == pytest.approx(theirs.value, rel=1e-5, abs=1e-9), what
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-8, msg=lambda text: f"{what}: {text}")
    close(ours.logprobs, theirs.logprobs)
    close(ours.entropy, theirs.entropy)


LEVELS = ["token", "sequence"]
MODES = [None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
SWITCHES: dict[str, list[dict[str, Any]]] = {
    "clip": [{}, {"epsilon_high": 0.28}, {"epsilon_high": 0.28, "delta": 1.4}],
    "off-policy mask": [{}, {"off_policy_mask_threshold": 0.05}],
    "entropy mask": [{}, {"top_entropy_quantile": 0.4}],
    "bonus": [{}, {"entropy_coef": 0.1}],
    "kl": [{}, {"beta": 0.3}, {"beta": 0.3, "use_bias_correction_kl": False}],
    "old": [{}, {"old_logprobs": "sampler"}],
}


def combinations(loss_type: str) -> Iterator[dict[str, Any]]:
    clips = SWITCHES["clip"]
    if LossType(loss_type) not in CLIPPED:
        clips = [{"epsilon_high": 1.05}] if loss_type == "cispo" else [{}]
    for parts in itertools.product(clips, *list(SWITCHES.values())[1:]):
        yield {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", [kind.value for kind in LossType])
def test_every_combination_of_options_has_the_value_and_gradients_of_trl(
    loss_type: str, level: str, mode: str | None
) -> None:
    if loss_type == "vespo" and (level == "sequence" or (mode or "").startswith("sequence")):
        pytest.skip("refused, by TRL with a warning and an error")
    data = rows([3, 6, 1, 4, 0, 5])
    for options in combinations(loss_type):
        if "old_logprobs" in options and mode is not None:
            continue  # nothing to correct
        options |= {"loss_type": loss_type, "importance_sampling_level": level}
        options["vllm_importance_sampling_correction"] = mode is not None
        if mode is not None:
            bounds = {"vllm_importance_sampling_clip_max": 1.3, "vllm_importance_sampling_clip_min": 0.7}
            options |= {"vllm_importance_sampling_mode": mode, **bounds}
        config = LossConfig(**options)
        ours, theirs = our_loss(data, config), trl_loss(data, config)
        assert_same(ours, theirs, options)


@pytest.mark.parametrize("clip_max", [1.3, None])
@pytest.mark.parametrize("clip_min", [0.8, None])
@pytest.mark.parametrize("mode", MODES[1:])
def test_importance_weights_are_those_of_trl(mode: str, clip_min: float | None, clip_max: float | None) -> None:
    if mode.endswith("truncate") and clip_min is clip_max is None:
        pytest.skip("refused by both")
    config = LossConfig(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=clip_min,
        vllm_importance_sampling_clip_max=clip_max,
    )
    data = rows([3, 6, 1, 4, 0, 5])
    wanted = trl_importance_ratio(data, config).expand_as(data.policy)[data.kept]
    weight = sampler_correction(our_inputs(data, config), config).weight
    assert weight is not None
    torch.testing.assert_close(weight, wanted)
    assert len(set(weight.tolist())) > 2


def totals_of(parts: Sequence[Rows], *, masks: Sequence[Tensor] | None = None) -> StepTotals:
    return StepTotals(
        num_valid_tokens=sum(int(part.mask.sum()) for part in parts),
        num_samples=sum(len(part.advantages) for part in parts),
        num_micro_batches=len(parts),
        num_surrogate_tokens=None if masks is None else sum(int(mask.sum()) for mask in masks),
    )


@pytest.mark.parametrize("loss_type", [kind.value for kind in LossType])
def test_accumulated_over_micro_batches_the_loss_is_that_of_trl(loss_type: str) -> None:
    config = LossConfig(loss_type=loss_type, beta=0.3, epsilon_high=1.5 if loss_type == "cispo" else None)
    parts = [rows([3, 6, 1, 4], seed=1), rows([6, 6, 2, 0], seed=2), rows([1, 2, 6, 5], seed=3)]
    totals = totals_of(parts)
    cut = Cut(accumulation=3, num_items=totals.num_valid_tokens, per_generation=3)
    for number, part in enumerate(parts):
        assert_same(our_loss(part, config, totals), trl_loss(part, config, cut), number)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "dr_grpo", "luspo", "bnpo"])
def test_in_a_ragged_last_window_the_loss_is_that_of_trl(loss_type: str) -> None:
    # a generation batch of three micro-batches, of which the last update gets only two
    config = LossConfig(loss_type=loss_type)
    parts = [rows([3, 6, 1, 4], seed=1), rows([6, 6, 2, 0], seed=2)]
    cut = Cut(accumulation=2, num_items=99, per_generation=3)
    for number, part in enumerate(parts):
        assert_same(our_loss(part, config, totals_of(parts)), trl_loss(part, config, cut), number)


def test_in_a_ragged_last_window_token_means_are_exact_where_trl_estimates_the_number_of_tokens() -> None:
    # TRL takes 2/3 of the tokens of the generation batch for those of its last two micro-batches.
    config = LossConfig(loss_type="dapo")
    parts = [rows([3, 6, 1, 4], seed=1), rows([6, 6, 2, 0], seed=2)]
    tokens = [int(part.mask.sum()) for part in parts]
    assert tokens == [13, 13]
    cut = Cut(accumulation=2, num_items=26 + 7, per_generation=3)
    for part in parts:
        ours, theirs = our_loss(part, config, totals_of(parts)), trl_loss(part, config, cut)
        assert ours.value == pytest.approx(theirs.value * (33 * 2 / 3) / 26)


def test_the_entropy_bonus_is_the_mean_over_the_update_where_trl_takes_the_mean_of_micro_batch_means() -> None:
    config = LossConfig(entropy_coef=0.5)
    parts = [rows([3, 6, 1, 4], seed=1), rows([1, 2, 1, 0], seed=2)]
    totals, plain = totals_of(parts), LossConfig()
    assert [int(part.mask.sum()) for part in parts] == [13, 4]
    entropies = [part.entropy[part.kept] for part in parts]
    cut = Cut(accumulation=2, num_items=17, per_generation=2)
    ours = sum(our_loss(part, plain, totals).value - our_loss(part, config, totals).value for part in parts)
    theirs = sum(trl_loss(part, plain, cut).value - trl_loss(part, config, cut).value for part in parts)
    assert ours == pytest.approx(0.5 * float(torch.cat(entropies).sum()) / 17)
    assert theirs == pytest.approx(0.5 * float(entropies[0].mean() + entropies[1].mean()) / 2)
    assert ours != pytest.approx(theirs, rel=1e-3)


def test_with_a_mask_the_bonus_is_the_mean_over_the_tokens_of_the_update_that_are_kept() -> None:
    config, plain = (LossConfig(entropy_coef=coef, top_entropy_quantile=0.4) for coef in (0.5, 0.0))
    parts = [rows([3, 6, 1, 4], seed=1), rows([1, 2, 1, 0], seed=2)]
    masks = [entropy_mask(part, config) for part in parts]
    kept = [part.entropy[mask] for part, mask in zip(parts, masks, strict=True) if mask is not None]
    totals = totals_of(parts, masks=[mask for mask in masks if mask is not None])
    assert [len(one) for one in kept] == [5, 2]
    ours = sum(our_loss(part, plain, totals).value - our_loss(part, config, totals).value for part in parts)
    assert ours == pytest.approx(0.5 * float(torch.cat(kept).sum()) / 7)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("last_entropy", [0.9, TARGET, 9.0])
@pytest.mark.parametrize("entropy_scale", [0.5, 4.0])
def test_the_adaptive_bonus_is_applied_and_moved_as_trl_does(
    share: float, last_entropy: float, entropy_scale: float
) -> None:
    config = LossConfig(
        use_adaptive_entropy=True,
        entropy_coef=0.1,
        entropy_coef_delta=0.06,
        entropy_coef_min=0.05,
        entropy_coef_max=0.15,
        entropy_target=TARGET,
        top_entropy_quantile=share,
    )
    data = rows([3, 6, 1, 4])
    data = replace(data, entropy=data.entropy * entropy_scale)
    loss = PolicyLoss(config=config, max_completion_length=MAX_LENGTH)
    loss.load_state_dict({"entropy_coef": 0.1, "last_entropy": last_entropy})
    inputs = our_inputs(data, config)
    output = loss(inputs)
    ours = Result(value=output.loss.item(), **_gradients(output.loss, inputs.logprobs, inputs.entropy), metrics={})
    theirs = trl_loss(data, config, Cut(last_entropy=last_entropy))
    assert ours.value == pytest.approx(theirs.value, rel=1e-6)
    torch.testing.assert_close(ours.entropy, theirs.entropy[data.kept])
    assert bool(theirs.entropy.any()) is (last_entropy <= TARGET)
    added = loss.after_update(output.metrics)
    stub = theirs.metrics["stub"]
    assert added["entropy_coef"].value == pytest.approx(stub.entropy_coef)
    state = loss.state_dict()
    assert state["entropy_coef"] in (0.05, 0.15)
    assert state["last_entropy"] == pytest.approx(stub._last_world_entropy)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("loss_type", "names"),
    [
        ("dapo", {"clip/low": "clip_ratio/low_mean", "clip/high": "clip_ratio/high_mean"}),
        ("cispo", {"clip/high": "cispo_clip_ratio"}),
        ("sapo", {}),
    ],
)
def test_fractions_clipped_kl_and_entropy_are_those_of_trl(loss_type: str, names: dict[str, str], level: str) -> None:
    # TRL's KL is told with the ratio multiplied in; ours is the plain estimate, so the ratio is left out here.
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=0.05,
        epsilon_high=1.02 if loss_type == "cispo" else None,
        beta=0.1,
        use_bias_correction_kl=False,
    )
    # No masked row: over completions TRL counts it as one that is not clipped, and here it has no tokens to count.
    data = rows([3, 6, 2, 4, 5], seed=2)
    ours, theirs = our_loss(data, config), trl_loss(data, config)
    for name, other in {**names, "kl/ref": "kl", "entropy": "entropy"}.items():
        assert ours.metrics[name].value == pytest.approx(theirs.metrics[other][0], rel=1e-5), name
        assert ours.metrics[name].value > 0
    assert {name for name in ours.metrics if name.startswith("clip/")} == {n for n in names if n.startswith("clip/")}


def test_the_weight_of_vespo_is_told_as_trl_does() -> None:
    config = LossConfig(loss_type="vespo")
    data = rows([3, 6, 2, 4, 5])
    told: Metric = our_loss(data, config).metrics["vespo/phi_seq_mean"]
    assert told.value == pytest.approx(trl_loss(data, config).metrics["vespo/phi_seq_mean"][0])
    assert told.weight == 5


@pytest.mark.parametrize("epsilon_high", [None, 0.5])
def test_with_the_ratio_of_whole_completions_the_loss_is_that_of_trls_rloo(epsilon_high: float | None) -> None:
    from trl import RLOOTrainer

    config = LossConfig(
        loss_type="grpo",
        importance_sampling_level="sequence_product",
        epsilon_high=epsilon_high,
        vllm_importance_sampling_correction=False,
    )
    data = rows([3, 6, 1, 4, 0, 5])
    logprobs, entropy = data.policy.clone().requires_grad_(), data.entropy.clone()
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropy, None),
        aux_loss_enabled=False,
        epsilon_low=config.epsilon,
        epsilon_high=config.upper_epsilon,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(data.mask)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": data.mask,
        "advantages": data.advantages,
        "old_logps": (data.old * data.mask).sum(1),
    }
    value = RLOOTrainer._compute_loss(stub, None, inputs)
    ours = our_loss(data, config)
    # A row without trained tokens has ratio 1 there, hence a loss of -A without gradient; here it has none.
    masked = -data.advantages[4].item() / 6
    assert masked != 0
    assert ours.value == pytest.approx(value.item() - masked, rel=1e-6)
    torch.testing.assert_close(ours.logprobs, torch.autograd.grad(value, logprobs)[0], rtol=1e-6, atol=1e-9)


def test_options_carry_the_names_and_defaults_of_trl() -> None:
    from trl import GRPOConfig

    known = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    ours = {"old_logprobs", "kl_estimator", "kl_placement", *LossSection.model_fields}
    config = LossConfig()
    different = {
        name: (getattr(config, name), known[name])
        for name in LossConfig.model_fields.keys() - ours
        if getattr(config, name) != known[name]
    }
    assert different == {"vllm_importance_sampling_mode": ("token_truncate", "sequence_mask")}
