"""Measures distillation's buffer of generated completions against generating per micro-batch.

    per_micro_batch   the engine generates one micro-batch of completions at a time
    buffer_K          it generates those of K optimizer steps at once, then K steps train on them
    async             those of one step at once, one step ahead of the learner

    this process --spawns, one at a time--> one child per variant --its last line, JSON--> Measurement --> figures

All variants train on as many completions per optimizer step in the same micro-batches, with the same teacher, and each
actor has the same threads everywhere. A variant warms up for one generation batch (an asynchronous one for some
more) and is timed from the end of its last warm-up step to the end of its last measured one; `wait` is what the learner
waited for completions and their teacher, `learner` its own time, the rest publishing, pulling and bookkeeping. The
learning rate is next to nothing, so that the work of a step stays the same. The models have random weights and
all but never end a completion, so no variant waits for stragglers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
MARK = "measurement:"
BASELINE, ASYNC = "per_micro_batch", "async"
REAL_LAYERS, REAL_VOCAB = 30, 49152
PROMPT = "Number {number:04d}:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one child measures; travels to it as JSON."""

    variant: str
    buffer: int
    """Optimizer steps in one generation batch."""
    max_num_seqs: int
    max_staleness: int
    model: str
    teacher: str
    teacher_in_learner: bool
    batch: int
    """Completions of one optimizer step."""
    micro_batch: int
    max_tokens: int
    steps: int
    warmup: int
    """Generation batches, both."""
    engine: str
    kind: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one child found, per optimizer step, over the measured steps only."""

    step_s: float
    wait_s: float
    learner_s: float
    rest_s: float
    """Publishing, pulling, bookkeeping."""
    tokens_per_s: float
    """Trained."""
    worst_age: int
    """In generation batches."""
    start_s: float
    """From the first line of the run's log to the end of the warm-up."""


def build_model(folder: str, *, layers: int, seed: int) -> str:
    """SmolLM2-135M's shape with random weights, `layers` of its 30 layers and as much of its vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import build_tokenizer  # type: ignore[import-not-found]

    torch.manual_seed(seed)
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


def options(settings: Settings, folder: str) -> dict[str, Any]:
    """The configuration of the run that a child measures."""
    threads = settings.threads
    return {
        "model_name_or_path": settings.model,
        "teachers": [
            {
                "model_name_or_path": settings.teacher,
                "placement": "learner" if settings.teacher_in_learner else "actor",
                "num_cpus": threads,
            }
        ],
        "beta": 1.0,
        "loss_support": "teacher",
        "loss_top_k": 20,
        "gradient_checkpointing": False,
        "learning_rate": 1e-8,
        "lr_scheduler_type": "constant",
        # Of a distillation, each of which is as many optimizer steps as the buffer holds.
        "max_steps": settings.warmup + settings.steps + settings.max_staleness,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // settings.micro_batch,
        "generation_batch_size": settings.batch * settings.buffer,
        "max_staleness": settings.max_staleness,
        "adaptive_slots": False,
        "max_completion_length": settings.max_tokens,
        "shuffle_dataset": False,
        "save_steps": 0,
        "html_report": False,
        "log_completions": False,
        "output_dir": str(Path(folder, "run")),
        "rollout": {
            "engine": settings.engine,
            "num_cpus": threads,
            "max_num_seqs": settings.max_num_seqs,
            "max_model_len": 128 + settings.max_tokens,
            "kv_cache_memory_gib": 1.0,
        },
        "runtime": {
            "kind": settings.kind,
            "num_cpus": 3 * threads,
            "learner_num_cpus": threads,
        },
    }


def measure(settings: Settings) -> Measurement:
    """One run of `distill`, through its Python interface."""
    from trl_ray.config.load import build
    from trl_ray.config.runs.distill_config import DistillConfig
    from trl_ray.pipelines.distill import DistillPipeline

    prompts = [{"prompt": PROMPT.format(number=number)} for number in range(512)]
    with tempfile.TemporaryDirectory() as folder:
        config = build(DistillConfig, options(settings, folder))
        output = DistillPipeline(args=config, train_dataset=prompts).train()
        records = [json.loads(line) for line in (output.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert config.updates_per_step == settings.buffer, "a generation batch gives as many updates as the buffer holds"
    measured = records[settings.warmup : settings.warmup + settings.steps]
    end_of_warmup = records[settings.warmup - 1]["time"]
    updates = len(measured) * settings.buffer
    seconds = measured[-1]["time"] - end_of_warmup
    wait = sum(record["time/wait_s"] for record in measured)
    learner = sum(record["time/learner_s"] for record in measured)
    return Measurement(
        step_s=seconds / updates,
        wait_s=wait / updates,
        learner_s=learner / updates,
        rest_s=(seconds - wait - learner) / updates,
        tokens_per_s=sum(record["tokens/trained"] for record in measured) / seconds,
        worst_age=output.worst_age or 0,
        start_s=end_of_warmup - records[0]["time"] + records[0]["time/step_s"],
    )


def run_child(settings: Settings, *, timeout_s: float) -> Measurement:
    """Measure in a fresh process.

    Raises:
        SystemExit: the child failed; its output has been shown.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(dataclasses.asdict(settings))]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, timeout=timeout_s
        )
        output.seek(0)
        text = output.read()
    found = [line for line in text.splitlines() if line.startswith(MARK)]
    if process.returncode != 0 or not found:
        sys.stderr.write(text)
        raise SystemExit(
            f"{settings.variant} ended with {process.returncode} and no measurement; see its output above."
        )
    return Measurement(**json.loads(found[-1].removeprefix(MARK)))


def variants(args: argparse.Namespace, model: str, teacher: str) -> list[Settings]:
    """What is measured, the baseline first."""
    base = Settings(
        variant=BASELINE,
        buffer=1,
        max_num_seqs=args.micro_batch,
        max_staleness=0,
        model=model,
        teacher=teacher,
        teacher_in_learner=args.teacher_in_learner,
        batch=args.batch,
        micro_batch=args.micro_batch,
        max_tokens=args.max_tokens,
        steps=max(1, args.steps // 2),
        warmup=1,
        engine=args.engine,
        kind=args.kind,
        threads=args.threads,
    )
    buffers = [
        dataclasses.replace(
            base,
            variant=f"buffer_{size}",
            buffer=size,
            max_num_seqs=min(args.max_num_seqs, args.batch * size),
            steps=math.ceil(args.steps / size),
        )
        for size in args.buffers
    ]
    ahead = dataclasses.replace(
        base,
        variant=ASYNC,
        max_num_seqs=min(args.max_num_seqs, args.batch),
        max_staleness=1,
        steps=args.steps,
        warmup=3,
    )
    return [base, *buffers, ahead]


def figures(found: dict[str, Measurement]) -> dict[str, float]:
    """What is printed; `ratio` last: the baseline against the largest buffer."""
    values: dict[str, float] = {}
    for name, each in found.items():
        values[f"{name}_seconds_per_step"] = each.step_s
        values[f"{name}_wait_s"] = each.wait_s
        values[f"{name}_learner_s"] = each.learner_s
        values[f"{name}_rest_s"] = each.rest_s
        values[f"{name}_trained_tokens_per_s"] = each.tokens_per_s
    if BASELINE not in found:
        return values
    baseline = found[BASELINE]
    others = {name: each for name, each in found.items() if name != BASELINE}
    values |= {f"{name}_wait_ratio": baseline.wait_s / max(each.wait_s, 1e-3) for name, each in others.items()}
    values |= {f"{name}_ratio": baseline.step_s / each.step_s for name, each in others.items()}
    buffers = [name for name in others if name != ASYNC]
    if buffers:
        values["ratio"] = values[f"{buffers[-1]}_ratio"]
    return values


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of SmolLM2's 30; the vocabulary shrinks with them")
    parser.add_argument("--model", metavar="smollm2|PATH", help="a whole model, which is its own teacher, instead")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers and short runs: does everything turn?")
    parser.add_argument("--batch", type=int, default=32, help="completions of one optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="completions of one backward pass")
    parser.add_argument("--max-tokens", type=int, default=64, help="of one completion")
    parser.add_argument("--buffers", type=int, nargs="+", default=[1, 2, 4, 8], help="optimizer steps in a buffer")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="completions that the engine generates at once")
    parser.add_argument("--steps", type=int, default=8, help="measured optimizer steps; half as many per micro-batch")
    parser.add_argument("--teacher-in-learner", action="store_true", help="instead of an actor of its own")
    parser.add_argument("--engine", choices=["auto", "vllm", "transformers"], default="auto")
    parser.add_argument("--kind", choices=["ray", "local"], default="ray", help="of the runtime")
    parser.add_argument("--threads", type=int, default=1, help="of the learner, of the engine and of the teacher")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="measure just these")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one variant may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.batch % args.micro_batch:
        parser.error(f"--batch must be a multiple of --micro-batch, got {args.batch} and {args.micro_batch}")
    if min(args.steps, args.threads, args.max_tokens, *args.buffers) < 1:
        parser.error("--steps, --threads, --max-tokens and --buffers must be at least 1")
    args.buffers = sorted(set(args.buffers))
    if args.tiny:
        args.steps = min(args.steps, 4)
    return args


def resolve_models(args: argparse.Namespace, folder: str) -> tuple[str, str]:
    """Folders of student and teacher."""
    if args.model:
        path = SMOLLM2 if args.model == "smollm2" else Path(args.model)
        if not (path / "config.json").is_file():
            raise SystemExit(
                f"--model must be smollm2 or a model folder, but {path} holds no config.json. "
                f"Build SmolLM2 with: python examples/fetch_smollm2.py {SMOLLM2}"
            )
        return str(path), str(path)
    names = [str(Path(folder, name)) for name in ("student", "teacher")]
    for seed, name in enumerate(names):
        if args.tiny:
            sys.path.insert(0, str(ROOT / "tests"))
            from tiny_models import build_tiny_model

            build_tiny_model(name, seed=seed)
        else:
            build_model(name, layers=args.layers, seed=seed)
    return names[0], names[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; a child measures one variant and prints JSON."""
    args = parse(argv)
    if args.child:
        measured = measure(Settings(**json.loads(args.child)))
        print(f"\n{MARK}{json.dumps(dataclasses.asdict(measured))}", flush=True)
        return
    found: dict[str, Measurement] = {}
    with tempfile.TemporaryDirectory() as folder:
        for settings in variants(args, *resolve_models(args, folder)):
            if args.only and settings.variant not in args.only:
                continue
            each = found[settings.variant] = run_child(settings, timeout_s=args.timeout)
            print(
                f"{settings.variant}: {each.step_s:.2f} s/step (waits {each.wait_s:.2f}, learner {each.learner_s:.2f}, "
                f"rest {each.rest_s:.2f}), {each.tokens_per_s:.0f} trained tokens/s over "
                f"{settings.steps * settings.buffer} steps after {each.start_s:.0f} s of warm-up",
                flush=True,
            )
    for name, value in figures(found).items():
        print(f"{name}: {value:.3f}" if value < 100 else f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()
