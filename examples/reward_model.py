"""A reward model from Python: trained on pairs that are made here, then asked what it thinks of two answers.

    python examples/reward_model.py --model models/SmolLM2-135M-Instruct --steps 12 --output-dir runs/mine

The arguments are those of TRL's RewardTrainer. The checkpoint is a sequence classifier of transformers, and
`reward_models` of `trl-ray grpo` takes its folder.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_ray import RewardModelConfig, RewardPipeline, RuntimeConfig
from trl_ray.config.sections import Schedule


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as TRL reads them: a bare number is better than the same number in a sentence."""
    rng = random.Random(seed)
    numbers = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(count)]
    return [
        {
            "prompt": [{"role": "user", "content": f"{left} + {right} = ?"}],
            "chosen": [{"role": "assistant", "content": str(left + right)}],
            "rejected": [{"role": "assistant", "content": f"The answer is {left + right}."}],
        }
        for left, right in numbers
    ]


def rate(checkpoint: Path, row: dict[str, Any]) -> list[float]:
    """The rewards of a row's chosen and rejected answer, by nothing but transformers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    texts = [tokenizer.apply_chat_template(row["prompt"] + row[key], tokenize=False) for key in ("chosen", "rejected")]
    with torch.no_grad():
        return [model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item() for text in texts]


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
    parser.add_argument("--output-dir", default="runs/reward-example", help="folder of the run; must be new")
    given = parser.parse_args()
    held_out = pairs(16, seed=2)
    pipeline = RewardPipeline(
        model=given.model,
        args=RewardModelConfig(
            output_dir=given.output_dir,
            max_length=128,
            per_device_train_batch_size=8,
            max_steps=given.steps,
            logging_steps=1,
            learning_rate=2e-5,
            lr_scheduler_type=Schedule.CONSTANT,
            gradient_checkpointing=False,
            eval_steps=given.steps,
            runtime=RuntimeConfig(learner_num_cpus=2),
        ),
        train_dataset=pairs(96, seed=1),
        eval_dataset=held_out,
    )
    output = pipeline.train()
    print(f"{output.steps} steps, held-out accuracy {output.metrics['eval/accuracy']:.3f}, report in {output.run_dir}")
    chosen, rejected = rate(output.run_dir / "checkpoints" / f"step-{output.steps}", held_out[0])
    print(f"reward of the chosen answer {chosen:.3f}, of the rejected one {rejected:.3f}")


if __name__ == "__main__":
    main()
