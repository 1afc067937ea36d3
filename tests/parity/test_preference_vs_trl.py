"""Losses of preferences give the values, gradients and metrics of TRL's DPO, KTO, CPO and ORPO trainers.

Both get the same padded rows: ragged lengths, a gap in a mask, an empty prompt. TRL stacks chosen rows over rejected
ones; here the two of a pair stand side by side.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ray.algorithms.batches.sequences import TokenSequences, sequence_logprobs
from trl_ray.algorithms.head.logprobs import TokenLogprobs
from trl_ray.algorithms.loss import LossOutput
from trl_ray.algorithms.preference.paired_preference import preference_loss
from trl_ray.algorithms.preference.reference_free import cpo_loss, orpo_loss
from trl_ray.algorithms.preference.unpaired_preference import kl_estimate, unpaired_loss
from trl_ray.config.losses.loss_section import LossSection
from trl_ray.config.losses.preference_options import (
    DIFFERENCE_OF_SCORES,
    SMOOTHED,
    SORTING,
    CPOLossConfig,
    FDivergence,
    ORPOLossConfig,
    PreferenceLossConfig,
    PreferenceLossType,
    UnpairedLossConfig,
)
from trl_ray.types import Metric

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
WIDTH = 9
VOCABULARY = 7
ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    unwrap_model=lambda model: model,
)
"""An accelerator with one process."""


class Module(torch.nn.Module):
    """What TRL asks about a model before it calls it."""

    is_gradient_checkpointing = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """P pairs as 2P padded rows: all chosen ones, then all rejected ones."""

    completion_mask: Tensor
    """[2P, WIDTH]"""
    policy: Tensor
    """[2P, WIDTH - 1] log-probs of the tokens after the first; 0 where nothing is trained; wants a gradient."""
    reference: Tensor
    """[2P, WIDTH - 1]"""
    sum_squared_probs: Tensor
    """[2P, WIDTH - 1]"""

    @property
    def kept(self) -> Tensor:
        return self.completion_mask[:, 1:].bool()

    @property
    def num_pairs(self) -> int:
        return len(self.policy) // 2

    @property
    def interleaved(self) -> Tensor:
        """[2P] rows, the two of a pair side by side."""
        return torch.arange(2 * self.num_pairs).view(2, -1).T.reshape(-1)


PROMPTS = [2, 0, 3, 1]
CHOSEN = [3, 5, 1, 6]
REJECTED = [5, 2, 1, 3]


def rows(*, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    starts, lengths = torch.tensor(PROMPTS * 2)[:, None], torch.tensor(CHOSEN + REJECTED)[:, None]
    positions = torch.arange(WIDTH)
    mask = ((positions >= starts) & (positions < starts + lengths)).long()
    mask[3, 3] = 0  # a token in the middle that is not the policy's own
    shape = (len(mask), WIDTH - 1)
    reference = -3 * torch.rand(shape, generator=generator, dtype=dtype)
    policy = reference + scale * torch.randn(shape, generator=generator, dtype=dtype)
    squares = 0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=dtype)
    kept = mask[:, 1:]
    return Rows(
        completion_mask=mask,
        policy=(policy.clamp(max=-0.01) * kept).requires_grad_(),
        reference=reference * kept,
        sum_squared_probs=squares,
    )


def head_outputs(logprobs: Tensor, squares: Tensor) -> SimpleNamespace:
    """What TRL's fused head answers."""
    return SimpleNamespace(
        log_probs=logprobs,
        log_sum_sq_probs=squares.log(),
        entropy=1 + squares,
        mean_logits=torch.zeros_like(logprobs),
        is_top1=squares > 0.5,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    value: float
    gradient: Tensor
    metrics: Mapping[str, float]


def trl_dpo(data: Rows, config: PreferenceLossConfig) -> Result:
    from trl import DPOTrainer

    ids = torch.zeros_like(data.completion_mask)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": data.completion_mask}
    stub = SimpleNamespace(
        accelerator=ALONE,
        aux_loss_enabled=False,
        args=SimpleNamespace(discopop_tau=config.discopop_tau, gradient_checkpointing_kwargs=None),
        beta=config.beta,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        f_divergence_type=config.f_divergence_type.value,
        label_smoothing=config.label_smoothing,
        ld_alpha=config.ld_alpha,
        loss_types=[kind.value for kind in config.loss_type],
        loss_weights=config.loss_weights or [1.0] * len(config.loss_type),
        model=Module(),
        precompute_ref_logps=False,
        ref_model=lambda **_: head_outputs(data.reference, data.sum_squared_probs),
        use_weighting=config.use_weighting,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    value = DPOTrainer._compute_loss(
        stub, lambda **_: head_outputs(data.policy * data.kept, data.sum_squared_probs), inputs, return_outputs=False
    )
    return Result(
        value=value.item(),
        gradient=torch.autograd.grad(value, data.policy)[0],
        metrics={name: values[-1] for name, values in stub._metrics["train"].items()},
    )


def sequences(kept: Tensor) -> TokenSequences:
    """Of rows [B, T] of which `kept` is trained on."""
    return TokenSequences(sample_index=kept.nonzero()[:, 0], num_sequences=len(kept))


def of_pairs(data: Rows, config: PreferenceLossConfig, pairs: slice = slice(None)) -> LossOutput:
    order = data.interleaved.view(-1, 2)[pairs].reshape(-1)
    kept = data.kept[order]
    tokens = sequences(kept)
    scores = TokenLogprobs(
        logprobs=data.policy[order][kept],
        entropy=1 + data.sum_squared_probs[order][kept],
        sum_squared_probs=data.sum_squared_probs[order][kept],
        top1=data.sum_squared_probs[order][kept] > 0.5,
    )
    return preference_loss(
        tokens,
        scores,
        config,
        lengths=data.completion_mask[order].sum(1),
        reference=sequence_logprobs(data.reference[order][kept], tokens, ld_alpha=config.ld_alpha),
        num_pairs=data.num_pairs,
        num_chosen_tokens=int(data.kept[: data.num_pairs].sum()),
    )


def result(output: LossOutput, leaf: Tensor) -> Result:
    return Result(
        value=output.loss.item(),
        gradient=torch.autograd.grad(output.loss, leaf)[0],
        metrics={name: metric.value for name, metric in output.metrics.items()},
    )


def our_dpo(data: Rows, config: PreferenceLossConfig) -> Result:
    return result(of_pairs(data, config), data.policy)


def assert_same(ours: Result, theirs: Result, what: object = "", *, metrics: set[str] | None = None) -> None:
    assert ours.value == pytest.approx(theirs.value, rel=1e-5, abs=1e-8), what
    close = functools.partial(torch.testing.assert_close, msg=lambda text: f"{what}: {text}")
    close(ours.gradient, theirs.gradient, rtol=1e-5, atol=1e-7)
    assert bool(theirs.gradient.any()), what
    for name in ours.metrics.keys() & theirs.metrics.keys() if metrics is None else metrics:
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-5, abs=1e-8), f"{what}: {name}"


PAIR_METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}
TYPES = list(PreferenceLossType)
DIVERGENCES = [(kind, 0.5) for kind in FDivergence] + [
    (FDivergence.ALPHA_DIVERGENCE, alpha) for alpha in (-0.5, 0.0, 1.0, 1.7)
]
NOT_WEIGHED_BY_TRL = SORTING | {PreferenceLossType.SFT, PreferenceLossType.HINGE}
"""The first two are refused; the others fail, since TRL multiplies the weights in place."""


def smoothing(kind: PreferenceLossType) -> float:
    return 0.2 if kind in SMOOTHED else 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("kind", TYPES)
def test_every_loss_of_dpos_family_is_that_of_trl(kind: PreferenceLossType, beta: float, dtype: torch.dtype) -> None:
    config = PreferenceLossConfig(loss_type=(kind,), beta=beta, label_smoothing=smoothing(kind))
    data = rows(dtype=dtype)
    ours, theirs = our_dpo(data, config), trl_dpo(data, config)
    assert_same(ours, theirs, kind, metrics=PAIR_METRICS | {"entropy", "mean_token_accuracy"})
    assert 0 < ours.metrics["rewards/accuracies"] < 1


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
@pytest.mark.parametrize("kind", sorted(DIFFERENCE_OF_SCORES))
def test_every_f_divergence_is_that_of_trl(kind: PreferenceLossType, divergence: FDivergence, alpha: float) -> None:
    config = PreferenceLossConfig(
        loss_type=(kind,),
        label_smoothing=smoothing(kind),
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        beta=0.3,
    )
    data = rows(dtype=torch.float32)  # TRL's alpha_divergence knows no float64
    assert_same(our_dpo(data, config), trl_dpo(data, config), config, metrics=PAIR_METRICS)


def test_the_exponent_of_alpha_divergence_is_held_where_trl_holds_it() -> None:
    config = PreferenceLossConfig(
        loss_type="hinge", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=-40.0, beta=1e-30
    )
    data = rows(dtype=torch.float32, seed=3)
    ours = our_dpo(data, config)
    assert_same(ours, trl_dpo(data, config), metrics=PAIR_METRICS)
    assert (ours.gradient[data.kept] == 0).any()


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", TYPES)
def test_tokens_beyond_the_shorter_completion_count_as_in_trl(kind: PreferenceLossType, ld_alpha: float) -> None:
    config = PreferenceLossConfig(loss_type=(kind,), label_smoothing=smoothing(kind), ld_alpha=ld_alpha)
    data = rows()
    ours = our_dpo(data, config)
    assert_same(ours, trl_dpo(data, config), kind, metrics=PAIR_METRICS)
    if kind is not PreferenceLossType.SFT:
        plain = our_dpo(data, config.replace(ld_alpha=None)).value
        assert (ours.value == pytest.approx(plain)) is (ld_alpha == 1)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in NOT_WEIGHED_BY_TRL])
def test_pairs_are_weighed_by_their_probability_as_in_trl(kind: PreferenceLossType) -> None:
    config = PreferenceLossConfig(loss_type=(kind,), label_smoothing=smoothing(kind), use_weighting=True, ld_alpha=0.5)
    data = rows()
    assert_same(our_dpo(data, config), trl_dpo(data, config), kind, metrics=PAIR_METRICS)


def test_mixtures_are_weighed_as_in_trl() -> None:
    for config in (
        PreferenceLossConfig(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
        PreferenceLossConfig(loss_type=("aot", "ipo", "robust"), label_smoothing=0.1),
        PreferenceLossConfig(loss_type=("hinge", "sft"), loss_weights=(0.0, 2.0), f_divergence_type="js_divergence"),
    ):
        data = rows()
        assert_same(our_dpo(data, config), trl_dpo(data, config), config, metrics=PAIR_METRICS)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in SORTING])
def test_a_cut_into_micro_batches_changes_neither_loss_nor_gradient(kind: PreferenceLossType) -> None:
    config = PreferenceLossConfig(loss_type=(kind,), label_smoothing=smoothing(kind), ld_alpha=0.5)
    config = config.replace(use_weighting=kind not in NOT_WEIGHED_BY_TRL)
    data = rows()
    parts = [of_pairs(data, config, pairs) for pairs in (slice(0, 1), slice(1, 4))]
    value = parts[0].loss + parts[1].loss
    gradient = torch.autograd.grad(value, data.policy)[0]
    assert_same(Result(value=value.item(), gradient=gradient, metrics={}), trl_dpo(data, config), kind, metrics=set())


def test_weighing_the_hinge_fails_in_trl_whose_value_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PreferenceLossConfig(loss_type="hinge", use_weighting=True)
    data = rows()
    with pytest.raises(RuntimeError, match="inplace operation"):
        trl_dpo(data, config)
    relu = torch.relu
    monkeypatch.setattr(torch, "relu", lambda x: relu(x) * 1)  # what is changed in place is not relu's own output then
    assert_same(our_dpo(data, config), trl_dpo(data, config), metrics=PAIR_METRICS)


def test_weighing_the_likelihood_by_pairs_fails_in_trl_but_for_a_single_pair() -> None:
    config = PreferenceLossConfig(loss_type="sft", use_weighting=True)
    data = rows()
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(data, config)
    single = Rows(
        **{
            name: getattr(data, name)[[0, 4]].detach()
            for name in ("completion_mask", "policy", "reference", "sum_squared_probs")
        }
    )
    single.policy.requires_grad_()
    assert_same(our_dpo(single, config), trl_dpo(single, config), metrics=PAIR_METRICS)


def test_options_carry_the_names_and_defaults_of_trl() -> None:
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    for ours, theirs in (
        (PreferenceLossConfig, DPOConfig),
        (UnpairedLossConfig, KTOConfig),
        (CPOLossConfig, CPOConfig),
        (ORPOLossConfig, ORPOConfig),
    ):
        known = theirs.__dataclass_fields__
        for name in ours.model_fields.keys() - {"loss_type", *LossSection.model_fields}:
            assert getattr(ours(), name) == known[name].default, f"{theirs.__name__}.{name}"
    assert list(PreferenceLossConfig().loss_type) == DPOConfig.__dataclass_fields__["loss_type"].default_factory()
    assert UnpairedLossConfig().loss_type == KTOConfig.__dataclass_fields__["loss_type"].default
    assert CPOLossConfig().loss_type == CPOConfig.__dataclass_fields__["loss_type"].default


GOOD = torch.tensor([True, False, False, True, True, False, True, False])
KTO_METRICS = {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}


def trl_kto(data: Rows, config: UnpairedLossConfig, good: Tensor, kl: tuple[Tensor, Tensor]) -> Result:
    from trl import KTOTrainer

    ids = torch.zeros_like(data.completion_mask)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": data.completion_mask,
        "label": good,
        "ref_logps": data.reference.sum(1),
        "ref_KL_logps": kl[1],
    }
    stub = SimpleNamespace(
        accelerator=ALONE,
        aux_loss_enabled=False,
        beta=config.beta,
        calculate_KL=config.needs_kl,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        loss_type=config.loss_type.value,
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: kl[0],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    value = KTOTrainer._compute_loss(
        stub, lambda **_: head_outputs(data.policy * data.kept, data.sum_squared_probs), inputs, return_outputs=False
    )
    return Result(
        value=value.item(),
        gradient=torch.autograd.grad(value, data.policy)[0],
        metrics={name: values[-1] for name, values in stub._metrics["train"].items()},
    )


def our_kto(
    data: Rows, config: UnpairedLossConfig, good: Tensor, kl: float | None, part: slice = slice(None)
) -> LossOutput:
    kept = data.kept[part]
    return unpaired_loss(
        sequences(kept),
        TokenLogprobs(logprobs=data.policy[part][kept], entropy=1 + data.sum_squared_probs[part][kept]),
        config,
        reference=data.reference[part].sum(1),
        desirable=good[part],
        num_completions=len(data.policy),
        kl=kl,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [1.5, -1.5])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("good", [GOOD, torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)])
def test_both_losses_of_single_completions_are_those_of_trl(
    good: Tensor, loss_type: str, shift: float, dtype: torch.dtype
) -> None:
    config = UnpairedLossConfig(loss_type=loss_type, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    data = rows(dtype=dtype)
    reference_kl = torch.linspace(-9, -4, 8, dtype=dtype)
    policy_kl = reference_kl + torch.linspace(-1, 1, 8, dtype=dtype) + shift
    theirs = trl_kto(data, config, good, (policy_kl, reference_kl))
    kl = kl_estimate(policy_kl, reference_kl) if config.needs_kl else None
    assert kl is None or kl == pytest.approx(max(0.0, shift))
    ours = result(our_kto(data, config, good, kl), data.policy)
    names = {name for name in KTO_METRICS if bool(good.any() if name.endswith("chosen") else (~good).any())}
    assert_same(ours, theirs, metrics=names | {"entropy"} | ({"kl"} if config.needs_kl else set()))


def test_a_cut_changes_nothing_where_the_kl_is_that_of_the_update() -> None:
    config = UnpairedLossConfig(undesirable_weight=0.7)
    data = rows()
    kl = (torch.full((8,), -3.0, dtype=torch.float64), torch.full((8,), -4.0, dtype=torch.float64))
    parts = [our_kto(data, config, GOOD, 1.0, part) for part in (slice(0, 3), slice(3, 8))]
    value = parts[0].loss + parts[1].loss
    ours = Result(value=value.item(), gradient=torch.autograd.grad(value, data.policy)[0], metrics={})
    assert_same(ours, trl_kto(data, config, GOOD, kl), metrics=set())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """P pairs with logits of a model, chosen rows over rejected ones."""

    ids: Tensor
    """[2P, WIDTH]"""
    attention: Tensor
    """[2P, WIDTH]"""
    labels: Tensor
    """[2P, WIDTH] -100 outside of completions."""
    logits: Tensor
    """[2P, WIDTH, VOCABULARY]; wants a gradient."""

    def logprobs(self) -> Tensor:
        """[2P, WIDTH - 1] of the tokens after the first."""
        return self.logits[:, :-1].log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]


def texts(dtype: torch.dtype) -> Texts:
    generator = torch.Generator().manual_seed(5)
    starts = torch.tensor([2, 1, 3, 1] * 2)[:, None]
    lengths = torch.tensor(CHOSEN + REJECTED)[:, None]
    positions = torch.arange(WIDTH)
    ids = torch.randint(VOCABULARY, (8, WIDTH), generator=generator)
    ids = torch.where(positions < starts, ids[[0, 1, 2, 3] * 2], ids)
    attention = (positions < starts + lengths).long()
    # The prompts of a pair are one text, so a model has one opinion on them.
    logits = 2 * torch.randn(8, WIDTH, VOCABULARY, generator=generator, dtype=dtype)
    logits = torch.where((positions < starts)[..., None], logits[[0, 1, 2, 3] * 2], logits)
    labels = torch.where((positions >= starts) & attention.bool(), ids, -100)
    return Texts(ids=ids, attention=attention, labels=labels, logits=logits.requires_grad_())


def trl_reference_free(trainer: Any, data: Texts, options: dict[str, Any]) -> Result:
    batch = {
        "concatenated_input_ids": data.ids,
        "concatenated_attention_mask": data.attention,
        "concatenated_labels": data.labels,
    }
    stub = SimpleNamespace(
        accelerator=ALONE,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=lambda *args, **kwargs: batch,
        get_batch_logps=trainer.get_batch_logps,
        **options,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(stub, name, functools.partial(getattr(trainer, name), stub))
    halves = {"chosen_labels": data.labels[:4]}
    value, metrics = trainer.get_batch_loss_metrics(
        stub, lambda *args, **kwargs: SimpleNamespace(logits=data.logits), halves
    )
    return Result(value=value.item(), gradient=torch.autograd.grad(value, data.logits)[0], metrics=metrics)


def our_reference_free(data: Texts, config: CPOLossConfig | ORPOLossConfig, pairs: slice = slice(None)) -> LossOutput:
    order = torch.arange(8).view(2, -1).T[pairs].reshape(-1)
    logprobs, trained = data.logprobs(), data.labels[:, 1:] != -100
    in_prompt = ~trained & data.attention[:, 1:].bool()
    likelihood = trained | in_prompt if isinstance(config, ORPOLossConfig) else trained
    chosen = order[::2]
    totals = {"num_pairs": 4, "num_likelihood_tokens": int(likelihood[:4].sum())}
    tokens, of_completions = sequences(trained[order]), logprobs[order][trained[order]]
    if isinstance(config, CPOLossConfig):
        return cpo_loss(tokens, of_completions, config, **totals)
    return orpo_loss(tokens, of_completions, logprobs[chosen][in_prompt[chosen]], config, **totals)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.25])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2, "cpo_alpha": 0.0},
        {"loss_type": "hinge"},
        {"loss_type": "ipo", "beta": 0.5},
        {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.1, "label_smoothing": 0.1, "cpo_alpha": 0.3},
        {"loss_type": "alphapo", "beta": 2.0},
    ],
)
def test_cpo_and_simpo_are_those_of_trl(options: dict[str, Any], alpha: float, dtype: torch.dtype) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOLossConfig(**options, alpha=alpha)
    resolved = CPOConfig(output_dir="unused", report_to=[], bf16=False, **options, alpha=alpha)
    names = ("beta", "label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma", "alpha")
    data = texts(dtype)
    theirs = trl_reference_free(CPOTrainer, data, {name: getattr(resolved, name) for name in names})
    ours = result(our_reference_free(data, config), data.logits)
    nll = {"nll_loss"} if config.nll_weight else set()
    assert ours.metrics.keys() == PAIR_METRICS | nll
    assert_same(ours, theirs, options, metrics=PAIR_METRICS | nll)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orpo_is_that_of_trl(dtype: torch.dtype) -> None:
    from trl.experimental.orpo import ORPOTrainer

    config = ORPOLossConfig(beta=0.6)
    data = texts(dtype)
    theirs = trl_reference_free(ORPOTrainer, data, {"beta": config.beta})
    ours = result(our_reference_free(data, config), data.logits)
    extra = {"nll_loss", "log_odds_chosen", "log_odds_ratio"}
    assert_same(ours, theirs, metrics=PAIR_METRICS | extra)


@pytest.mark.parametrize("prompts", [False, True])
def test_losses_without_a_reference_do_not_depend_on_the_cut(prompts: bool) -> None:
    data = texts(torch.float64)

    def loss(pairs: slice) -> Tensor:
        return our_reference_free(data, ORPOLossConfig() if prompts else CPOLossConfig(), pairs).loss

    whole = torch.autograd.grad(loss(slice(None)), data.logits)[0]
    cut = torch.autograd.grad(loss(slice(0, 3)) + loss(slice(3, 4)), data.logits)[0]
    torch.testing.assert_close(cut, whole)


def test_metrics_are_joined_over_micro_batches_by_their_pairs() -> None:
    config = PreferenceLossConfig()
    output = of_pairs(rows(), config, slice(0, 3))
    metric: Metric = output.metrics["rewards/margins"]
    assert metric.weight == 3
