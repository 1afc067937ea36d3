"""Measures how much sooner asynchronous SDPO comes to what the synchronous run learns, where judging takes time.

    a model that reads what it is shown --SDPO, max_staleness 0--> held-out reward over wall time --\\ seconds until
                                        --SDPO, max_staleness 2--> held-out reward over wall time --/ the same reward

    this process --spawns, one at a time--> one child per seed and staleness --its last line, JSON--> Curve --> figures

The model has two layers and is trained here, in seconds, to go on as a text began: with as many vowels. The reward is a
completion's share of vowels, and whoever has enough of them is shown to the teacher of its siblings. So the teacher
knows better, and the student learns from it alone; no advantage enters the loss. A judge thinks for a while about
each group of training completions and answers at once for held-out ones. Everything else is the same in both runs. Time
runs from when all actors are ready, and evaluations count. Curves are means over seeds; both are asked when they first
reach the mean of the synchronous run's last evaluations.
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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "measurement:"
SYNC, ASYNC = "sync", "async"
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
TOKENS = 16
"""Of a completion, and letters of a word in the texts that the model is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one child measures; travels to it as JSON."""

    model: str
    max_staleness: int
    seed: int
    steps: int
    eval_steps: int
    eval_prompts: int
    groups: int
    """Of one optimizer step."""
    group_size: int
    pause_s: float
    """What the judge takes for one group."""
    reward_workers: int
    learning_rate: float
    threshold: float
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Held-out reward of one run, or the mean of several."""

    steps: list[int]
    seconds: list[float]
    """[evaluations] since all actors were ready."""
    rewards: list[float]
    """[evaluations]"""
    train_rewards: list[float]
    """[optimizer steps] of the completions that were trained on."""
    wait_share: float
    """Of the steps' time."""
    worst_age: int


def texts(count: int, *, seed: int) -> list[str]:
    """A number, then words of letters with as many vowels in all words of one text."""
    import random

    rng = random.Random(seed)
    found = []
    for _ in range(count):
        share = rng.uniform(0.05, 0.95)
        letters = [rng.choice(VOWELS if rng.random() < share else CONSONANTS) for _ in range(3 * TOKENS)]
        words = ["".join(letters[start : start + TOKENS]) for start in range(0, len(letters), TOKENS)]
        found.append(f"{rng.randrange(100):02d}: {' '.join(words)}")
    return found


def build_model(folder: str, *, updates: int, seed: int) -> str:
    """A two-layer model that goes on as a text began; its last loss is told on stderr."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import build_tokenizer, random_model  # type: ignore[import-not-found]

    torch.manual_seed(seed)
    tokenizer, model = build_tokenizer(), random_model(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=updates, pct_start=0.1)
    rows = torch.tensor(tokenizer(texts(32 * updates, seed=seed))["input_ids"])
    loss = torch.tensor(math.nan)
    model.train()
    for batch in rows.view(updates, 32, -1):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"the model goes on as a text began: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def judge(completions: list[str], pause_s: list[float], **columns: Any) -> list[float]:
    """The share of vowels, after a while."""
    time.sleep(max(pause_s))
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def options(settings: Settings, folder: str) -> dict[str, Any]:
    """The configuration of the run that a child measures."""
    return {
        "model_name_or_path": settings.model,
        "seed": settings.seed,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "num_generations": settings.group_size,
        "per_device_train_batch_size": settings.groups * settings.group_size,
        "max_completion_length": TOKENS,
        "max_staleness": settings.max_staleness,
        "success_reward_threshold": settings.threshold,
        # As the texts go on that the model knows: one word of a success, then the word to be written.
        "reprompt_template": "{prompt}{solution}{feedback}",
        "solution_template": "{successful_previous_attempt} ",
        "eval_steps": settings.eval_steps,
        "eval_num_prompts": settings.eval_prompts,
        "save_steps": 0,
        "html_report": False,
        "log_completions": False,
        "output_dir": str(Path(folder, "run")),
        "reward": {"num_workers": settings.reward_workers},
        "teacher": {"num_cpus": 0.5},
        "rollout": {
            "engine": settings.engine,
            "num_cpus": 0.5,
            "max_num_seqs": 128,
            "max_model_len": 256,
            "kv_cache_memory_gib": 0.2,
        },
        "runtime": {"num_cpus": 2},
    }


def measure(settings: Settings) -> Curve:
    """One run of `sdpo` on Ray, through its Python interface."""
    from trl_ray.config.load import build
    from trl_ray.config.runs.sdpo_config import SDPOConfig
    from trl_ray.pipelines.sdpo import SDPOPipeline

    with tempfile.TemporaryDirectory() as folder:
        config = build(SDPOConfig, options(settings, folder))
        pipeline = SDPOPipeline(
            args=config,
            reward_funcs=judge,
            train_dataset=[{"prompt": f"{number:02d}: ", "pause_s": settings.pause_s} for number in range(75)],
            eval_dataset=[{"prompt": f"{75 + number % 25:02d}: ", "pause_s": 0.0} for number in range(256)],
        )
        output = pipeline.train()
        events = [json.loads(line) for line in (output.run_dir / "events.jsonl").read_text().splitlines()]
        records = [json.loads(line) for line in (output.run_dir / "metrics.jsonl").read_text().splitlines()]
    ready = next(event["time"] for event in events if event["detail"].get("detail") == "all actors are ready")
    evaluations = [event for event in events if event["kind"] == "evaluated"]
    return Curve(
        steps=[int(event["detail"]["step"]) for event in evaluations],
        seconds=[event["time"] - ready for event in evaluations],
        rewards=[event["detail"]["eval/reward"] for event in evaluations],
        train_rewards=[record["reward/mean"] for record in records],
        wait_share=sum(r["time/wait_s"] for r in records) / sum(r["time/step_s"] for r in records),
        worst_age=output.worst_age or 0,
    )


def run_child(settings: Settings, *, timeout_s: float) -> Curve:
    """Measure in a fresh process.

    Raises:
        SystemExit: the child failed; its output has been shown.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
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
        raise SystemExit(f"the run ended with {process.returncode} and no measurement; its output is above.")
    return Curve(**json.loads(found[-1].removeprefix(MARK)))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, evaluation by evaluation."""

    def mean(columns: Sequence[Sequence[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*columns, strict=True)]

    return Curve(
        steps=curves[0].steps,
        seconds=mean([curve.seconds for curve in curves]),
        rewards=mean([curve.rewards for curve in curves]),
        train_rewards=mean([curve.train_rewards for curve in curves]),
        wait_share=sum(curve.wait_share for curve in curves) / len(curves),
        worst_age=max(curve.worst_age for curve in curves),
    )


def first_at(rewards: Sequence[float], axis: Sequence[float], target: float) -> float:
    """Where on the axis a curve first reaches a reward, on the line between two evaluations; NaN: never."""
    for index, reward in enumerate(rewards):
        if reward < target:
            continue
        if index == 0:
            return axis[0]
        part = (target - rewards[index - 1]) / (reward - rewards[index - 1])
        return axis[index - 1] + part * (axis[index] - axis[index - 1])
    return math.nan


def figures(found: dict[str, Curve], *, steps: int, last: int) -> dict[str, float]:
    """What is printed; `ratio` last: seconds of the synchronous run until its own result over those of the other."""
    values: dict[str, float] = {}
    sync = found[SYNC]
    target = sum(sync.rewards[-last:]) / last
    values["reward_at_start"] = sync.rewards[0]
    values["sync_result"] = target
    for name, curve in found.items():
        upto = sum(step <= steps for step in curve.steps)
        values[f"{name}_seconds"] = curve.seconds[upto - 1]
        values[f"{name}_held_out_reward"] = sum(curve.rewards[upto - last : upto]) / last
        values[f"{name}_wait_share"] = curve.wait_share
        values[f"{name}_worst_age"] = curve.worst_age
        values[f"{name}_steps_to_result"] = first_at(curve.rewards, curve.steps, target)
        values[f"{name}_seconds_to_result"] = first_at(curve.rewards, curve.seconds, target)
    if len(found) == 2:
        values["ratio_of_seconds_for_all_steps"] = values[f"{SYNC}_seconds"] / values[f"{ASYNC}_seconds"]
        values["ratio"] = values[f"{SYNC}_seconds_to_result"] / values[f"{ASYNC}_seconds_to_result"]
    return values


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, whose curves are averaged")
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of the synchronous run")
    parser.add_argument("--more-steps", type=int, default=5, help="further ones of the asynchronous run")
    parser.add_argument("--eval-steps", type=int, default=5)
    parser.add_argument("--eval-prompts", type=int, default=96)
    parser.add_argument("--last", type=int, default=2, help="evaluations whose mean is a run's result")
    parser.add_argument("--max-staleness", type=int, default=2)
    parser.add_argument("--groups", type=int, default=2, help="of one optimizer step")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument(
        "--pause", type=float, default=1.5, metavar="S", help="seconds that the judge takes for a group"
    )
    parser.add_argument("--reward-workers", type=int, default=4, help="groups that are judged at once, in both runs")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threshold", type=float, default=0.7, help="share of vowels that makes a success")
    parser.add_argument("--engine", choices=["auto", "vllm", "transformers"], default="transformers")
    parser.add_argument("--updates", type=int, default=300, help="of the model's own training")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps % args.eval_steps or args.more_steps % args.eval_steps:
        parser.error("--steps and --more-steps must be multiples of --eval-steps")
    if min(args.seeds, args.steps, args.max_staleness, args.last) < 1 or args.last > args.steps // args.eval_steps:
        parser.error("--seeds, --max-staleness: at least 1; --last: at most the evaluations after the first")
    return args


def run_all(args: argparse.Namespace, model: str) -> dict[str, Curve]:
    """The mean curve of both kinds; their runs take turns."""
    curves: dict[str, list[Curve]] = {SYNC: [], ASYNC: []}
    for seed in range(args.seeds):
        for name, found in curves.items():
            is_async = name == ASYNC
            settings = Settings(
                model=model,
                max_staleness=args.max_staleness if is_async else 0,
                seed=seed,
                steps=args.steps + (args.more_steps if is_async else 0),
                eval_steps=args.eval_steps,
                eval_prompts=args.eval_prompts,
                groups=args.groups,
                group_size=args.group_size,
                pause_s=args.pause,
                reward_workers=args.reward_workers,
                learning_rate=args.learning_rate,
                threshold=args.threshold,
                engine=args.engine,
            )
            curve = run_child(settings, timeout_s=args.timeout)
            found.append(curve)
            points = ", ".join(
                f"{reward:.3f} ({seconds:.0f} s)" for reward, seconds in zip(curve.rewards, curve.seconds, strict=True)
            )
            print(f"{name}, seed {seed}: {points}; oldest token {curve.worst_age} steps", flush=True)
    return {name: mean_curve(found) for name, found in curves.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; a child measures one run and prints JSON."""
    args = parse(argv)
    if args.child:
        curve = measure(Settings(**json.loads(args.child)))
        print(f"\n{MARK}{json.dumps(dataclasses.asdict(curve))}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(args, build_model(folder, updates=args.updates, seed=0))
    for name, value in figures(found, steps=args.steps, last=args.last).items():
        print(f"{name}: {value:.3f}" if value < 100 else f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()
