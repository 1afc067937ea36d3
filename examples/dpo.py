"""Preference optimisation (DPO) from Python, on pairs that are made here.

    python examples/dpo.py --model models/SmolLM2-135M-Instruct --steps 12 --output-dir runs/mine

The arguments are those of TRL's DPOTrainer. Chosen and rejected share one computation of their prompt, and the
reference is asked once, before training, so that it takes no memory afterwards.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from trl_ray import DPOConfig, DPOPipeline, RuntimeConfig
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


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
    parser.add_argument("--output-dir", default="runs/dpo-example", help="folder of the run; must be new")
    given = parser.parse_args()
    pipeline = DPOPipeline(
        model=given.model,
        args=DPOConfig(
            output_dir=given.output_dir,
            max_length=128,
            beta=0.1,
            precompute_ref_log_probs=True,
            ref_log_probs_cache_dir=str(Path(given.output_dir) / "reference"),
            per_device_train_batch_size=8,
            max_steps=given.steps,
            logging_steps=1,
            learning_rate=5e-6,
            lr_scheduler_type=Schedule.CONSTANT,
            gradient_checkpointing=False,
            eval_steps=given.steps,
            runtime=RuntimeConfig(learner_num_cpus=2),
        ),
        train_dataset=pairs(96, seed=1),
        eval_dataset=pairs(16, seed=2),
    )
    output = pipeline.train()
    accuracy = output.metrics["eval/rewards/accuracies"]
    print(f"{output.steps} steps, held-out accuracy {accuracy:.3f}, report in {output.run_dir}")


if __name__ == "__main__":
    main()
