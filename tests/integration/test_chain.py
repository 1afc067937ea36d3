"""SFT, then a reward model from its checkpoint, then GRPO of that checkpoint with that reward model, on tiny models.

build_tiny_model -> sft -+-> reward -+-> grpo        every arrow is a checkpoint folder
                         +-> prm ----+
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from dataset_runs import train, weights
from runs import assert_balanced, grpo, ledger, lines
from tiny_models import build_tiny_model
from trl_ray.data.examples.step_parser import split_steps
from trl_ray.pipelines.grpo import GRPOPipeline

pytestmark = pytest.mark.integration
SFT_STEPS, REWARD_STEPS, GRPO_STEPS = 60, 10, 12
PROMPTS = [{"prompt": f"count {number}: "} for number in range(9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What the first two links left behind."""

    base: str
    sft: Path
    """The run that both reward models and GRPO start from."""
    reward: Path
    prm: Path

    @property
    def policy(self) -> str:
        return checkpoint(self.sft, SFT_STEPS)


def checkpoint(run: Path, step: int) -> str:
    return str(run / "checkpoints" / f"step-{step}")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    base = build_tiny_model(folder / "tiny")
    made = Chain(base=base, sft=folder / "sft", reward=folder / "reward", prm=folder / "prm")
    # Some answers have two lines, so that what GRPO samples has steps for the process reward model.
    answers = [{"prompt": f"count {n % 9}: ", "completion": "one\ntwo" if n % 2 else "three"} for n in range(48)]
    train("sft", base, made.sft, max_steps=SFT_STEPS, learning_rate=3e-3, inputs={"train_dataset": answers})
    options: dict[str, Any] = {"max_steps": REWARD_STEPS, "learning_rate": 1e-3, "eval_steps": REWARD_STEPS}
    pairs = [{"prompt": f"count {n % 9}: ", "chosen": "three", "rejected": "one\ntwo"} for n in range(40)]
    train("reward", made.policy, made.reward, inputs={"train_dataset": pairs, "eval_dataset": pairs[:8]}, **options)
    rated = [{"completions": ["three"], "labels": [False]}, {"completions": ["one", "two"], "labels": [False, True]}]
    steps = [{"prompt": f"count {n % 9}: ", **rated[n % 2]} for n in range(40)]
    train("prm", made.policy, made.prm, inputs={"train_dataset": steps, "eval_dataset": steps[:8]}, **options)
    return made


@pytest.fixture(scope="module")
def rewarded(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GRPO with the reward model alone."""
    run = tmp_path_factory.mktemp("grpo") / "run"
    judge = {"model_name_or_path": checkpoint(chain.reward, REWARD_STEPS), "name": "judge"}
    config = grpo(chain.policy, run, reward_funcs=[], reward_models=[judge], max_steps=GRPO_STEPS, learning_rate=3e-4)
    GRPOPipeline(args=config, train_dataset=PROMPTS).train()
    return run


def completions(run: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((run / "completions").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def distance(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Between the weights that both have: heads differ."""
    shared = [name for name in first.keys() & second.keys() if name.startswith("model.")]
    assert len(shared) > 20
    return float(np.sqrt(sum(np.square(first[name] - second[name]).sum() for name in shared)))


@pytest.mark.parametrize(("link", "step"), [("reward", REWARD_STEPS), ("prm", REWARD_STEPS)])
def test_a_reward_model_starts_from_the_body_of_the_sft_checkpoint_not_of_the_base(
    chain: Chain, link: str, step: int
) -> None:
    base, sft = load_file(Path(chain.base) / "model.safetensors"), weights(chain.sft, SFT_STEPS)
    rated = weights(getattr(chain, link), step)
    assert 0 < distance(rated, sft) < 0.5 * distance(rated, base)


def test_both_reward_models_learn_what_their_rows_say(chain: Chain) -> None:
    for run in (chain.reward, chain.prm):
        assert lines(run / "metrics.jsonl")[-1]["eval/accuracy"] == 1.0
        assert_balanced(run, trained=ledger(run)["issued"])


def test_the_mean_reward_rises_and_its_part_is_named_after_the_reward_model(rewarded: Path) -> None:
    assert_balanced(rewarded, trained=4 * GRPO_STEPS)
    metrics = lines(rewarded / "metrics.jsonl")
    assert len(metrics) == GRPO_STEPS
    assert all(line["reward/judge/mean"] == pytest.approx(line["reward/mean"], abs=1e-6) for line in metrics)
    rewards = [line["reward/judge/mean"] for line in metrics]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2


def test_every_reward_is_what_transformers_computes_for_the_text(chain: Chain, rewarded: Path) -> None:
    folder = checkpoint(chain.reward, REWARD_STEPS)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = completions(rewarded)
    assert len(rows) == 16 * GRPO_STEPS
    finished = {row["finish_reason"] for row in rows}
    for row in rows:
        ends = tokenizer.eos_token if row["finish_reason"] == "stop" else ""
        ids = tokenizer(row["prompt"] + row["completion"] + ends, return_tensors="pt")
        with torch.no_grad():
            expected = model(**ids).logits.item()
        assert row["reward/judge"] == pytest.approx(expected, abs=1e-4), row
    assert "stop" in finished, "no completion ended: the end of a text was never rated"


def test_a_process_reward_model_rates_by_its_worst_step_beside_the_reward_model(chain: Chain, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", checkpoint(chain.prm, REWARD_STEPS)
    models = [
        {"model_name_or_path": folder, "name": "steps"},
        {"model_name_or_path": checkpoint(chain.reward, REWARD_STEPS), "name": "judge", "weight": 0.5},
    ]
    config = grpo(chain.policy, run, reward_funcs=[], reward_models=models, max_steps=2, max_completion_length=12)
    GRPOPipeline(args=config, train_dataset=PROMPTS).train()
    assert_balanced(run, trained=8)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = 0
    for row in completions(run):
        steps = split_steps(row["completion"])
        longest = max(longest, len(steps))
        expected = worst_step(model, tokenizer, row["prompt"], steps)
        if expected is None:
            assert row["reward/steps"] is None
            continue
        assert row["reward/steps"] == pytest.approx(expected, abs=1e-4), row
        assert row["reward"] == pytest.approx(row["reward/steps"] + 0.5 * row["reward/judge"], abs=1e-6)
    assert longest >= 2, "no completion had two steps: the worst of several was never taken"
    assert json.loads((run / "ledger.json").read_text())["balanced"]


def worst_step(model: Any, tokenizer: Any, prompt: str, steps: tuple[str, ...]) -> float | None:
    """P(right) of the worst step, each read at the line end after it."""
    ids, places = list(tokenizer(prompt)["input_ids"]), []
    for step in steps:
        ids += tokenizer(step + "\n")["input_ids"]
        places.append(len(ids) - 1)
    if not places:
        return None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]  # [T, 2]
    return float(logits.softmax(-1)[places, 1].min())
