"""Preference optimisation on single rated answers (KTO) from Python, on rows that are made here.

    python examples/kto.py --model models/SmolLM2-135M-Instruct --steps 12 --output-dir runs/mine

The arguments are those of TRL's KTOTrainer: no pairs are needed, only thumbs up or down.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from trl_ray import KTOConfig, KTOPipeline, RuntimeConfig
from trl_ray.config.sections import Schedule


def ratings(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as TRL reads them: `label` is true for a bare number, false for one in a sentence."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        left, right, good = rng.randint(10, 99), rng.randint(10, 99), rng.random() < 0.5
        answer = str(left + right) if good else f"The answer is {left + right}."
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{left} + {right} = ?"}],
                "completion": [{"role": "assistant", "content": answer}],
                "label": good,
            }
        )
    return rows


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
    parser.add_argument("--output-dir", default="runs/kto-example", help="folder of the run; must be new")
    given = parser.parse_args()
    pipeline = KTOPipeline(
        model=given.model,
        args=KTOConfig(
            output_dir=given.output_dir,
            max_length=128,
            beta=0.1,
            per_device_train_batch_size=8,
            max_steps=given.steps,
            logging_steps=1,
            learning_rate=5e-6,
            lr_scheduler_type=Schedule.CONSTANT,
            gradient_checkpointing=False,
            eval_steps=given.steps,
            runtime=RuntimeConfig(learner_num_cpus=2),
        ),
        train_dataset=ratings(96, seed=1),
        eval_dataset=ratings(24, seed=2),
    )
    output = pipeline.train()
    print(f"{output.steps} steps, held-out loss {output.metrics['eval/loss']:.3f}, report in {output.run_dir}")


if __name__ == "__main__":
    main()
