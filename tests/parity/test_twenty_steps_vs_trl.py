"""Twenty optimizer steps of whole pipelines and of TRL's trainers, on the same rows in the same order.

    rows --+--> SFTTrainer, DPOTrainer, RewardTrainer --log_history--+--> loss, norm, rate of every step
           +--> SFTPipeline, DPOPipeline, ... ---metrics.jsonl-------+

Both go on from what they made of the weights, so that a difference in any step is a difference in all that follow.
Rows are ragged, an update is several micro-batches, and the schedule warms up, decays and meets clipping.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import build_tiny_model, build_tokenizer, random_model
from trl_ray.config.load import build
from trl_ray.config.runs.dataset_config import DPOConfig, RewardModelConfig, SFTConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
]
STEPS, MICRO_BATCH, ACCUMULATION = 20, 3, 2
PER_STEP = MICRO_BATCH * ACCUMULATION
TOLERANCE = 1e-4
SHARED: dict[str, Any] = {
    "max_steps": STEPS,
    "seed": 7,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "weight_decay": 0.05,
    "max_grad_norm": 8.0,
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "max_length": 256,
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpan:
    """What every step of a run reported."""

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def words(rng: np.random.Generator, count: int) -> str:
    """`count` bytes, one token each."""
    return bytes(rng.choice(np.frombuffer(b"abcdefghij klmnop", np.uint8), count)).decode()


def texts(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"text": words(rng, int(size))} for size in rng.integers(2, 60, count)]


def conversations(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {
            "prompt": [{"role": "user", "content": words(rng, int(asked))}],
            "completion": [{"role": "assistant", "content": words(rng, int(answered))}],
        }
        for asked, answered in rng.integers(2, 40, (count, 2))
    ]


def pairs(count: int, *, chosen_size: int | None = None) -> list[dict[str, Any]]:
    """Preferences with prompts, chosen and rejected of all lengths, or chosen ones of one length."""
    rng = np.random.default_rng(2)
    return [
        {
            "prompt": words(rng, int(asked)),
            "chosen": words(rng, chosen_size or int(good)),
            "rejected": words(rng, int(bad)),
        }
        for asked, good, bad in rng.integers(1, 40, (count, 3))
    ]


def theirs(
    kind: str, model: str, rows: Sequence[Mapping[str, Any]], folder: Path, options: Mapping[str, Any]
) -> TrainingSpan:
    """TRL's trainer, on the CPU in float32, with rows in their order."""
    import trl
    from datasets import Dataset

    config = getattr(trl, f"{kind}Config")(
        **SHARED | dict(options),
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        fp16=False,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = getattr(trl, f"{kind}Trainer")(model=model, args=config, train_dataset=Dataset.from_list(list(rows)))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return TrainingSpan(
        losses=[entry["loss"] for entry in logs],
        grad_norms=[entry["grad_norm"] for entry in logs],
        learning_rates=[entry["learning_rate"] for entry in logs],
    )


def ours(pipeline: type[Any], config: type[Any], model: str, rows: Any, folder: Path, options: Any) -> TrainingSpan:
    """The pipeline as a user runs it, in this process."""
    local = {"output_dir": str(folder), "shuffle_dataset": False, "save_steps": 0, "html_report": False}
    args = build(config, {**SHARED, **local, **options, "runtime": {"kind": "local"}})
    output = pipeline(model=model, args=args, train_dataset=list(rows)).train()
    lines = [json.loads(line) for line in (output.run_dir / "metrics.jsonl").read_text().splitlines()]
    return TrainingSpan(
        losses=[line["loss"] for line in lines],
        grad_norms=[line["grad_norm"] for line in lines],
        learning_rates=[line["lr"] for line in lines],
    )


def assert_same(found: TrainingSpan, wanted: TrainingSpan) -> None:
    """At every step, and there was something to compare: the loss falls, gradients are clipped."""
    assert len(found.losses) == len(wanted.losses) == STEPS
    assert found.learning_rates == pytest.approx(wanted.learning_rates, rel=1e-9)
    assert found.losses == pytest.approx(wanted.losses, rel=0, abs=TOLERANCE)
    assert found.grad_norms == pytest.approx(wanted.grad_norms, rel=TOLERANCE)
    assert min(found.losses[-3:]) < found.losses[0] - 0.1
    assert max(found.grad_norms) > SHARED["max_grad_norm"], "clipping is part of what is compared"


SFT_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "texts": (texts, {}),
    "completions_of_conversations": (conversations, {"completion_only_loss": True}),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_supervised_fine_tuning_goes_the_way_of_trl_for_twenty_steps(case: str, model: str, tmp_path: Path) -> None:
    from trl_ray.pipelines.sft import SFTPipeline

    rows, options = SFT_CASES[case]
    # Two epochs, so that the order of the second is compared as well.
    data = rows(STEPS * PER_STEP // 2)
    wanted = theirs("SFT", model, data, tmp_path / "trl", {"shuffle_dataset": False, **options})
    assert_same(ours(SFTPipeline, SFTConfig, model, data, tmp_path / "run", options), wanted)


def test_packed_rows_go_the_way_of_trl_for_twenty_steps(model: str, tmp_path: Path) -> None:
    from trl_ray.pipelines.sft import SFTPipeline

    # TRL keeps examples of equal length in another order than ours; lengths that are all different leave no choice.
    # 20 rows of up to 5 pieces are walked through several times.
    rng = np.random.default_rng(3)
    data = [{"text": words(rng, int(size))} for size in rng.permutation(np.arange(3, 64))]
    options = {"packing": True, "packing_strategy": "bfd", "max_length": 64}
    wanted = theirs("SFT", model, data, tmp_path / "trl", {"shuffle_dataset": False, **options})
    assert_same(ours(SFTPipeline, SFTConfig, model, data, tmp_path / "run", options), wanted)


DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"learning_rate": 1e-4},
    "precomputed_reference": {"learning_rate": 1e-4, "precompute_ref_log_probs": True},
    "mixture_with_ld_alpha": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3], "ld_alpha": 0.4},
}


@pytest.mark.parametrize("case", DPO_CASES)
def test_preference_optimisation_goes_the_way_of_trl_for_twenty_steps(case: str, model: str, tmp_path: Path) -> None:
    from trl_ray.pipelines.preference import DPOPipeline

    options = DPO_CASES[case]
    # TRL takes the mean of its micro-batches' means; ours is the mean over the update however it is cut. They are one
    # where micro-batches are equal: for pairs, in number; for sft, whose mean is over tokens of chosen completions, in
    # these. So all have equally many pairs, and in the mixture chosen completions are of one length.
    data = pairs(STEPS * PER_STEP // 2, chosen_size=17 if "sft" in str(options) else None)
    wanted = theirs("DPO", model, data, tmp_path / "trl", options)
    cache = {"ref_log_probs_cache_dir": str(tmp_path / "cache")}
    assert_same(ours(DPOPipeline, DPOConfig, model, data, tmp_path / "run", {**options, **cache}), wanted)


def test_reward_modelling_goes_the_way_of_trl_for_twenty_steps(tmp_path: Path) -> None:
    from trl_ray.pipelines.reward_modelling import RewardPipeline

    # A head of its own, saved with the model: each side would draw another one.
    folder = str(tmp_path / "classifier")
    save_classifier(folder)
    data, options = pairs(STEPS * PER_STEP // 2), {"center_rewards_coefficient": 0.01}
    wanted = theirs("Reward", folder, data, tmp_path / "trl", options)
    assert_same(ours(RewardPipeline, RewardModelConfig, folder, data, tmp_path / "run", options), wanted)


def save_classifier(folder: str) -> None:
    """The tiny model with a random head for one reward."""
    from transformers import Qwen2ForSequenceClassification

    policy = random_model()
    policy.config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Qwen2ForSequenceClassification(policy.config)
    classifier.model.load_state_dict(policy.model.state_dict())
    classifier.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
