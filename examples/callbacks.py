"""Callbacks from Python: one that keeps the best checkpoint and ends training on a plateau, one that watches the speed.

    python examples/callbacks.py --model models/SmolLM2-135M-Instruct --output-dir runs/mine

A callback is any object with hooks of transformers' TrainerCallback. It runs here, in the driver; the learner is a Ray
actor. YAML names the same class: `callbacks: [{path: "examples/callbacks.py:Plateau", kwargs: {patience: 3}}]`.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from trl_ray import RuntimeConfig, SFTConfig, SFTPipeline
from trl_ray.pipelines.callbacks.hooks import TrainerControl, TrainerState


class Plateau:
    """Saves when the held-out loss falls, and ends training when it has not for `patience` evaluations."""

    def __init__(self, patience: int = 2) -> None:
        self.patience, self.best, self.worse = patience, float("inf"), 0

    def on_evaluate(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **payload: Any
    ) -> None:
        """See the class."""
        loss = metrics["eval_loss"]
        self.worse = 0 if loss < self.best else self.worse + 1
        control.should_save = loss < self.best and state.global_step > 0
        control.should_training_stop = self.worse >= self.patience
        self.best = min(self.best, loss)

    def state_dict(self) -> dict[str, Any]:
        """Goes into checkpoints, so that a resumed run goes on counting."""
        return {"best": self.best, "worse": self.worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.best, self.worse = state["best"], state["worse"]


class Speed:
    """Prints tokens per second; a coroutine, as one that writes to a service would be."""

    async def on_log(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, float], **payload: Any
    ) -> None:
        """See the class."""
        speed = logs.get("throughput/trained_tokens_per_s")
        if speed is not None:  # an evaluation's line has none
            print(f"step {state.global_step}/{state.max_steps}: {speed:.0f} tokens/s")


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as TRL reads them."""
    rng = random.Random(seed)
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(count)]
    return [{"prompt": f"{left} + {right} = ", "completion": str(left + right)} for left, right in pairs]


def main() -> None:
    """Train, and say where it ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps, at most")
    parser.add_argument("--output-dir", default="runs/callbacks-example", help="folder of the run; must be new")
    given = parser.parse_args()
    pipeline = SFTPipeline(
        model=given.model,
        args=SFTConfig(
            output_dir=given.output_dir,
            max_length=64,
            per_device_train_batch_size=8,
            max_steps=given.steps,
            logging_steps=1,
            learning_rate=2e-5,
            gradient_checkpointing=False,
            eval_steps=4,
            save_steps=0,
            runtime=RuntimeConfig(learner_num_cpus=2),
        ),
        train_dataset=sums(256, seed=1),
        eval_dataset=sums(32, seed=2),
        callbacks=[Plateau(patience=2), Speed()],
    )
    output = pipeline.train()
    print(f"{output.steps} steps, held-out loss {output.metrics['eval/loss']:.3f}, report in {output.run_dir}")


if __name__ == "__main__":
    main()
