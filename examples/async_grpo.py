"""Asynchronous GRPO from Python: the run of configs/async-grpo/quickstart.yaml with a reward function of one's own.

    python examples/async_grpo.py --model models/SmolLM2-135M-Instruct --steps 24 --output-dir runs/mine

The arguments are those of TRL's GRPOTrainer; what differs is that generation runs ahead of training, in Ray actors.
"""

from __future__ import annotations

import argparse
import random
import re
from typing import Any

from trl_ray import AsyncGRPOConfig, AsyncGRPOPipeline, RolloutConfig
from trl_ray.config.sections import Schedule


def sums(count: int, seed: int = 42) -> list[dict[str, Any]]:
    """Rows as TRL reads them: `prompt` is a conversation, every other column goes to the reward function."""
    rng = random.Random(seed)
    pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
    return [
        {"prompt": [{"role": "user", "content": f"{left} + {right} = ?"}], "answer": left + right}
        for left, right in pairs
    ]


def number_reward(completions: list[Any], answer: list[int], **columns: Any) -> list[float]:
    """Half for nothing but a number, the other half when it is the right one.

    It is sent to the reward workers as it stands here, and runs there in a child process with a deadline.
    """
    texts = [completion[0]["content"].strip() for completion in completions]
    return [
        (1.0 if int(text) == wanted else 0.5) if re.fullmatch(r"-?\d{1,9}", text) else 0.0
        for text, wanted in zip(texts, answer, strict=True)
    ]


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps")
    parser.add_argument("--output-dir", default="runs/async-grpo-example", help="folder of the run; must be new")
    given = parser.parse_args()
    pipeline = AsyncGRPOPipeline(
        model=given.model,
        reward_funcs=number_reward,
        args=AsyncGRPOConfig(
            output_dir=given.output_dir,
            num_generations=8,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_completion_length=16,
            max_steps=given.steps,
            logging_steps=1,
            max_staleness=2,
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
