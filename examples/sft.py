"""Supervised fine-tuning from Python, on rows that are made here.

    python examples/sft.py --model models/SmolLM2-135M-Instruct --steps 16 --output-dir runs/mine

The arguments are those of TRL's SFTTrainer; the learner is a Ray actor, and the rows of the next step are tokenised
while it trains.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from trl_ray import RuntimeConfig, SFTConfig, SFTPipeline
from trl_ray.config.sections import Schedule


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as TRL reads them: only `completion` is trained, `prompt` is what it answers."""
    rng = random.Random(seed)
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(count)]
    return [
        {
            "prompt": [{"role": "user", "content": f"{left} + {right} = ?"}],
            "completion": [{"role": "assistant", "content": str(left + right)}],
        }
        for left, right in pairs
    ]


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps")
    parser.add_argument("--output-dir", default="runs/sft-example", help="folder of the run; must be new")
    given = parser.parse_args()
    pipeline = SFTPipeline(
        model=given.model,
        args=SFTConfig(
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
        train_dataset=sums(256, seed=1),
        eval_dataset=sums(32, seed=2),
    )
    output = pipeline.train()
    print(f"{output.steps} steps, held-out loss {output.metrics['eval/loss']:.3f}, report in {output.run_dir}")


if __name__ == "__main__":
    main()
