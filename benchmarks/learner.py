"""Measures one optimizer step of the learner, and TRL's on the same completions: tokens trained on per second.

    samples (prompts 32-128 tokens, completions lognormal, 16-512) --+--> GRPOTrainer.train: one step \\  in turn,
                                                                     +--> PolicyLearner.step         /  in one process

Both start from the same weights, do forward, loss, backward, clipping and AdamW, and must agree on the gradient's
norm. What is not timed: loading, generation, rewards, and, in TRL's favour, padding the completions. Advantages are
all different from 0, so nothing can be skipped. TRL runs inside its own training loop, timed from `on_step_begin` to
`on_step_end`; our step is called in between, so that whatever else the machine does hits both alike.

The default model is SmolLM2-135M with fewer layers and a vocabulary that is smaller in proportion, so that the head is
to the layers what it is in the whole model; `--layers 30` is the real shape.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trl_ray.actors.policy_learner import PolicyLearner
    from trl_ray.types import TrainBatch, TrainingSample

ROOT = Path(__file__).resolve().parents[1]
GROUP_SIZE = 8
PROMPT_TOKENS = (32, 128)
COMPLETION_TOKENS = (16, 512)
MEDIAN, SIGMA = 128, 0.8
"""Of the lognormal lengths: a mean of 167 tokens after clipping, one completion in 24 at the limit."""
REAL_LAYERS, REAL_VOCAB = 30, 49152
LEARNING_RATE = 1e-6


@dataclass(slots=True, kw_only=True)
class Timings:
    """Of one system, step by step, the warm-up included."""

    seconds: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def median(self, warmup: int) -> float:
        """Seconds of a step after the warm-up."""
        return statistics.median(self.seconds[warmup:])


def make_samples(groups: int, *, vocab: int, seed: int) -> list[TrainingSample]:
    """Groups of completions with random tokens and advantages of mean 0."""
    from trl_ray.types import TrainingSample

    rng = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        prompt = rng.integers(0, vocab, rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1)).astype(np.int32)
        advantages = rng.normal(size=GROUP_SIZE)
        for advantage in advantages - advantages.mean():
            length = int(np.clip(rng.lognormal(np.log(MEDIAN), SIGMA), *COMPLETION_TOKENS))
            samples.append(
                TrainingSample(
                    group_id=group,
                    prompt_ids=prompt,
                    completion_ids=rng.integers(0, vocab, length).astype(np.int32),
                    loss_mask=np.ones(length, dtype=np.bool_),
                    sampler_logprobs=np.zeros(length, dtype=np.float32),
                    advantage=float(advantage),
                    min_version=0,
                )
            )
    return samples


def build_model(folder: str, *, layers: int) -> str:
    """SmolLM2-135M's shape with random weights and `layers` of its 30 layers."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import build_tokenizer  # type: ignore[import-not-found]

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=REAL_VOCAB * layers // REAL_LAYERS // 64 * 64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=259,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def make_learner(args: argparse.Namespace, model: str) -> PolicyLearner:
    """Ours, in this process."""
    from trl_ray.actors.policy_learner import PolicyLearner
    from trl_ray.config.losses.policy_options import LossConfig, LossType
    from trl_ray.config.sections import ModelConfig, Schedule, TrainingConfig

    return PolicyLearner(
        model=ModelConfig(
            model_name_or_path=model, dtype=args.dtype, gradient_checkpointing=args.gradient_checkpointing
        ),
        training=TrainingConfig(
            learning_rate=LEARNING_RATE,
            lr_scheduler_type=Schedule.CONSTANT,
            per_device_train_batch_size=args.micro_batch,
            max_tokens_per_micro_batch=args.max_tokens,
        ),
        # There is no sampler that differs from the policy here, so nothing to correct for.
        loss=LossConfig(loss_type=LossType.DAPO, beta=0.0, vllm_importance_sampling_correction=False),
        temperature=1.0,
        total_updates=args.warmup + args.steps,
        max_completion_length=COMPLETION_TOKENS[1],
    )


def make_batch(samples: Sequence[TrainingSample], args: argparse.Namespace, *, step: int) -> TrainBatch:
    """The same samples as the batch of some step."""
    from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch

    rules = CutRules(max_samples=None if args.max_tokens else args.micro_batch, max_tokens=args.max_tokens)
    return train_batch(samples, step=step, rules=rules)


def padded(samples: Sequence[TrainingSample], pad: int) -> dict[str, Any]:
    """TRL's form: prompts padded at the left, completions at the right."""
    import torch

    rows: dict[str, list[Any]] = {"prompt_ids": [], "prompt_mask": [], "completion_ids": [], "completion_mask": []}
    prompts = max(len(sample.prompt_ids) for sample in samples)
    completions = max(len(sample.completion_ids) for sample in samples)
    for sample in samples:
        before, after = prompts - len(sample.prompt_ids), completions - len(sample.completion_ids)
        rows["prompt_ids"].append(np.pad(sample.prompt_ids, (before, 0), constant_values=pad))
        rows["prompt_mask"].append(np.pad(np.ones_like(sample.prompt_ids), (before, 0)))
        rows["completion_ids"].append(np.pad(sample.completion_ids, (0, after), constant_values=pad))
        rows["completion_mask"].append(np.pad(np.ones_like(sample.completion_ids), (0, after)))
    inputs: dict[str, Any] = {name: torch.from_numpy(np.stack(values)).long() for name, values in rows.items()}
    inputs["advantages"] = torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def make_trainer(args: argparse.Namespace, model: str, folder: str, samples: Sequence[TrainingSample]) -> Any:
    """TRL's trainer, which finds the completions already there where it would generate and score them."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return dict(prepared)

    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        fp16=False,
        max_steps=args.warmup + args.steps,
        per_device_train_batch_size=args.trl_micro_batch,
        gradient_accumulation_steps=len(samples) // args.trl_micro_batch,
        num_generations=GROUP_SIZE,
        max_completion_length=COMPLETION_TOKENS[1],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=args.gradient_checkpointing,
        torch_compile=args.trl_compile,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": args.dtype},
    )
    never_asked: Any = lambda completions, **columns: [0.0] * len(completions)  # noqa: E731
    trainer: Any = Trainer(
        model=model,
        reward_funcs=never_asked,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "."}] * len(samples)),
    )
    prepared = padded(samples, trainer.processing_class.pad_token_id)
    return trainer


def measure(args: argparse.Namespace, model: str, folder: str) -> tuple[dict[str, Timings], list[TrainingSample]]:
    """Steps of both systems, in turn."""
    from transformers import AutoConfig, TrainerCallback

    vocab = AutoConfig.from_pretrained(model).vocab_size
    samples = make_samples(args.groups, vocab=vocab, seed=args.seed)
    learner = make_learner(args, model)
    ours, theirs = Timings(), Timings()

    def step() -> None:
        batch = make_batch(samples, args, step=learner.version + 1)
        started = time.perf_counter()
        result = learner.step(batch)
        ours.seconds.append(time.perf_counter() - started)
        ours.grad_norms.append(result.grad_norm)
        ours.losses.append(result.loss)
        print(f"trl_ray: {ours.seconds[-1]:.2f} s, gradient norm {result.grad_norm:.6f}", file=sys.stderr, flush=True)

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            theirs.seconds.append(time.perf_counter() - self.started)
            step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "grad_norm" in logs:
                theirs.grad_norms.append(float(logs["grad_norm"]))
                theirs.losses.append(float(logs["loss"]))
                print(
                    f"trl: {theirs.seconds[-1]:.2f} s, gradient norm {logs['grad_norm']}", file=sys.stderr, flush=True
                )

    if args.only == "trl_ray":
        for _ in range(args.warmup + args.steps):
            step()
        return {"trl_ray": ours}, samples
    trainer = make_trainer(args, model, folder, samples)
    trainer.add_callback(Watch())
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    return {"trl": theirs, "trl_ray": ours}, samples


def figures(found: dict[str, Timings], samples: Sequence[TrainingSample], warmup: int) -> dict[str, float]:
    """What is printed; `ratio` last."""
    trained = sum(len(sample.completion_ids) for sample in samples)
    total = trained + sum(len(sample.prompt_ids) for sample in samples)
    longest = max(len(s.prompt_ids) for s in samples) + max(len(s.completion_ids) for s in samples)
    values: dict[str, float] = {
        "completions": len(samples),
        "trained_tokens": trained,
        "total_tokens": total,
        "padding_share_of_trl": 1 - total / (longest * len(samples)),
    }
    for name, timings in found.items():
        values[f"{name}_seconds_per_step"] = timings.median(warmup)
        values[f"{name}_trained_tokens_per_s"] = trained / timings.median(warmup)
    if len(found) == 2:
        ours, theirs = found["trl_ray"].grad_norms[0], found["trl"].grad_norms[0]
        values["gradient_norm_difference"] = abs(ours - theirs) / theirs
        values["ratio"] = found["trl"].median(warmup) / found["trl_ray"].median(warmup)
    return values


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", metavar="PATH", help="a model folder instead of SmolLM2's shape")
    parser.add_argument("--layers", type=int, default=4, help="of SmolLM2's 30; the vocabulary shrinks with them")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--groups", type=int, default=8, help=f"of {GROUP_SIZE} completions in a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions per backward pass")
    parser.add_argument("--trl-micro-batch", type=int, default=4, help="the same for TRL; 4 is its fastest here")
    parser.add_argument("--max-tokens", type=int, help="cut ours by tokens instead")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="saves memory, costs time; both systems")
    parser.add_argument("--trl-compile", action="store_true", help="torch.compile for TRL's model")
    parser.add_argument("--only", choices=["trl_ray"], help="no TRL, no ratio")
    args = parser.parse_args(argv)
    if args.groups * GROUP_SIZE % args.trl_micro_batch:
        parser.error(f"--trl-micro-batch must divide {args.groups * GROUP_SIZE}, got {args.trl_micro_batch}")
    if args.steps < 1 or args.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or build_model(str(Path(folder, "model")), layers=args.layers)
        found, samples = measure(args, model, folder)
    for name, value in figures(found, samples, args.warmup).items():
        print(
            f"{name}: {value:.3g}"
            if value < 0.01
            else f"{name}: {value:.3f}"
            if value < 100
            else f"{name}: {value:.1f}"
        )


if __name__ == "__main__":
    main()
