"""A process reward model from Python: it learns which steps of a solution are right, on solutions that are made here.

    python examples/prm.py --model models/SmolLM2-135M-Instruct --steps 16 --output-dir runs/mine

The arguments are those of TRL's PRMTrainer. The checkpoint is a token classifier of transformers, and `reward_models`
of `trl-ray grpo` takes its folder: each step of a completion is rated, and the worst one counts.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from trl_ray import PRMConfig, PRMPipeline, RuntimeConfig
from trl_ray.config.sections import Schedule


def solutions(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as TRL reads them: `completions` are the steps, `labels` says of each whether it is right."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        total, *others = numbers = [rng.randint(1, 9) for _ in range(3)]
        steps, labels = [], []
        for number in others:
            right = rng.random() < 0.5
            after = total + number if right else rng.randint(30, 99)
            steps.append(f"{total} + {number} = {after}")
            labels.append(right)
            total += number
        prompt = [{"role": "user", "content": " + ".join(map(str, numbers)) + " = ?"}]
        rows.append({"prompt": prompt, "completions": steps, "labels": labels})
    return rows


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps")
    parser.add_argument("--output-dir", default="runs/prm-example", help="folder of the run; must be new")
    given = parser.parse_args()
    pipeline = PRMPipeline(
        model=given.model,
        args=PRMConfig(
            output_dir=given.output_dir,
            max_length=128,
            per_device_train_batch_size=8,
            max_steps=given.steps,
            logging_steps=1,
            learning_rate=5e-5,
            lr_scheduler_type=Schedule.CONSTANT,
            gradient_checkpointing=False,
            eval_steps=given.steps,
            runtime=RuntimeConfig(learner_num_cpus=2),
        ),
        train_dataset=solutions(128, seed=1),
        eval_dataset=solutions(16, seed=2),
    )
    output = pipeline.train()
    print(f"{output.steps} steps, held-out accuracy {output.metrics['eval/accuracy']:.3f}, report in {output.run_dir}")


if __name__ == "__main__":
    main()
