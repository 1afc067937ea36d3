"""RLOO from Python: the run of configs/rloo/quickstart.yaml with two reward functions of one's own.

    python examples/rloo.py --model models/SmolLM2-135M-Instruct --steps 24 --output-dir runs/mine

The arguments are those of TRL's RLOOTrainer, and with its defaults so is the objective: a completion's reward, less
`beta` times its KL to the initial policy, is compared with the mean of its siblings.
"""

from __future__ import annotations

import argparse
import random
import re
from typing import Any

from trl_ray import RLOOConfig, RLOOPipeline, RolloutConfig
from trl_ray.config.sections import Schedule


def sums(count: int, seed: int = 42) -> list[dict[str, Any]]:
    """Rows as TRL reads them: `prompt` is a conversation, every other column goes to the reward functions."""
    rng = random.Random(seed)
    pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
    return [
        {"prompt": [{"role": "user", "content": f"{left} + {right} = ?"}], "answer": left + right}
        for left, right in pairs
    ]


def number_reward(completions: list[Any], **columns: Any) -> list[float]:
    """1 for nothing but a number."""
    return [1.0 if re.fullmatch(r"-?\d{1,9}", completion[0]["content"].strip()) else 0.0 for completion in completions]


def sum_reward(completions: list[Any], answer: list[int], **columns: Any) -> list[float | None]:
    """1 for the right number, 0 for a wrong one; None, which counts in no mean, where there is no number to judge."""
    found = [re.search(r"-?\d{1,9}", completion[0]["content"]) for completion in completions]
    return [
        None if match is None else float(int(match.group()) == wanted)
        for match, wanted in zip(found, answer, strict=True)
    ]


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps")
    parser.add_argument("--output-dir", default="runs/rloo-example", help="folder of the run; must be new")
    given = parser.parse_args()
    pipeline = RLOOPipeline(
        model=given.model,
        reward_funcs=[number_reward, sum_reward],
        args=RLOOConfig(
            output_dir=given.output_dir,
            reward_weights=[0.5, 0.5],
            num_generations=4,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_completion_length=16,
            max_steps=given.steps,
            logging_steps=1,
            learning_rate=1e-5,
            lr_scheduler_type=Schedule.CONSTANT,
            gradient_checkpointing=False,
            rollout=RolloutConfig(max_model_len=128, kv_cache_memory_gib=0.5),
        ),
        train_dataset=sums(512),
    )
    output = pipeline.train()
    print(f"{output.steps} steps, last mean reward {output.metrics['reward/mean']:.3f}, report in {output.run_dir}")


if __name__ == "__main__":
    main()
