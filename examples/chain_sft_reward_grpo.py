"""Three pipelines in a row: SFT, a reward model that starts from its weights, and GRPO with that reward model.

    python examples/chain_sft_reward_grpo.py --model models/SmolLM2-135M-Instruct --output-dir runs/chain
    python examples/chain_sft_reward_grpo.py --tiny --output-dir runs/chain-tiny        # half a minute, a random model

    model --SFT--> OUTPUT_DIR/sft --reward--> OUTPUT_DIR/reward
                        |                         | rates every completion
                        +---------GRPO------------+--> OUTPUT_DIR/grpo

Each arrow is a run with a directory of its own. What they hand on is a checkpoint, a folder that transformers reads.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from trl_ray import (
    GRPOConfig,
    GRPOPipeline,
    RewardModelConfig,
    RewardModelOptions,
    RewardPipeline,
    RolloutConfig,
    RuntimeConfig,
    SFTConfig,
    SFTPipeline,
    TrainOutput,
)
from trl_ray.config.sections import EngineChoice, RuntimeKind, Schedule

NAME = "short_answers"
"""What the reward model is called in metrics."""


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Sums to ask, with a short answer and one that says the same at length."""
    rng = random.Random(seed)
    pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(count)]
    return [
        {
            "prompt": [{"role": "user", "content": f"{left} + {right} = ?"}],
            "short": [{"role": "assistant", "content": str(left + right)}],
            "long": [{"role": "assistant", "content": f"The sum of {left} and {right} is {left + right}."}],
        }
        for left, right in pairs
    ]


def train_sft(model: str, folder: Path, shared: dict[str, Any], steps: int) -> TrainOutput:
    """Teach both ways of answering, so that there is something to choose from."""
    rows = questions(8 * steps, seed=1)
    pipeline = SFTPipeline(
        model=model,
        args=SFTConfig(output_dir=str(folder), max_steps=steps, max_length=128, **shared),
        train_dataset=[
            {"prompt": row["prompt"], "completion": row["short" if number % 2 else "long"]}
            for number, row in enumerate(rows)
        ],
    )
    return pipeline.train()


def train_reward(model: str, folder: Path, shared: dict[str, Any], steps: int) -> TrainOutput:
    """Teach that short answers are better; the body is the policy's, the head is new."""
    pairs = [
        {"prompt": row["prompt"], "chosen": row["short"], "rejected": row["long"]}
        for row in questions(8 * steps + 16, seed=2)
    ]
    pipeline = RewardPipeline(
        model=model,
        args=RewardModelConfig(output_dir=str(folder), max_steps=steps, max_length=128, eval_steps=steps, **shared),
        train_dataset=pairs[16:],
        eval_dataset=pairs[:16],
    )
    return pipeline.train()


def train_grpo(
    model: str, judge: str, folder: Path, shared: dict[str, Any], rollout: RolloutConfig, steps: int
) -> TrainOutput:
    """Train the policy on what the reward model thinks of its completions."""
    pipeline = GRPOPipeline(
        model=model,
        args=GRPOConfig(
            output_dir=str(folder),
            reward_models=[RewardModelOptions(model_name_or_path=judge, name=NAME)],
            num_generations=4,
            max_completion_length=24,
            max_steps=steps,
            rollout=rollout,
            **{**shared, "per_device_train_batch_size": 16},
        ),
        train_dataset=[{"prompt": row["prompt"]} for row in questions(64, seed=3)],
    )
    return pipeline.train()


def random_model(model: str, folder: Path) -> str:
    """Two narrow layers with random weights, and the tokenizer of `model`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def checkpoint(output: TrainOutput) -> str:
    """The folder of a run's last weights."""
    return str(output.run_dir / "checkpoints" / f"step-{output.steps}")


def main() -> None:
    """Run the chain, and say what came of each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each part")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/chain"), help="must be new")
    parser.add_argument("--tiny", action="store_true", help="a random model, in this process, without vLLM")
    given = parser.parse_args()
    folder: Path = given.output_dir
    runtime = RuntimeConfig(kind=RuntimeKind.LOCAL) if given.tiny else RuntimeConfig(learner_num_cpus=1)
    engine = EngineChoice.TRANSFORMERS if given.tiny else EngineChoice.AUTO
    rollout = RolloutConfig(engine=engine, max_model_len=128, kv_cache_memory_gib=0.5)
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "learning_rate": 3e-3 if given.tiny else 1e-5,
        "lr_scheduler_type": Schedule.CONSTANT,
        "runtime": runtime,
    }
    model = random_model(given.model, folder / "model") if given.tiny else given.model
    sft = train_sft(model, folder / "sft", shared, given.steps)
    reward = train_reward(checkpoint(sft), folder / "reward", shared, given.steps)
    grpo = train_grpo(checkpoint(sft), checkpoint(reward), folder / "grpo", shared, rollout, given.steps)
    print(f"SFT: loss {sft.metrics['loss']:.3f}")
    print(f"reward model: held-out accuracy {reward.metrics['eval/accuracy']:.3f}")
    print(f"GRPO: mean reward {grpo.metrics[f'reward/{NAME}/mean']:.3f}; report in {grpo.run_dir}")


if __name__ == "__main__":
    main()
