"""Measures trl_ray's GRPO: against TRL's GRPOTrainer, asynchronous against synchronous, and its own overhead.

    --mode trl             TRL's trainer, then AsyncGRPOPipeline: same model, prompts, reward, batch, threads
    --mode async-vs-sync   AsyncGRPOPipeline, then GRPOPipeline, with a reward function that takes a second
    --mode orchestration   AsyncGRPOPipeline alone: the share of a step that is neither waiting nor learning
    --mode all             the three, one after the other

    this process --spawns, one at a time--> one child per system --its last line, JSON--> Measurement --> figures

Every system runs in a process of its own and alone. Each warms up, then is timed over whole optimizer steps: from
the end of the last warm-up step to the end of the last measured one. Tokens counted are those under the loss mask
(completion tokens, the end-of-sequence token included). The asynchronous pipeline is asked for more steps than are
measured, so that generation runs ahead during all of them: a buffer that empties at the end would flatter it.
The learning rate is next to nothing, so that all systems sample from the same policy throughout: at a real one the
completions get shorter as the model learns, and whoever learns a step later would count more tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "async-grpo" / "quickstart.yaml"
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
MARK = "measurement:"
TRL, ASYNC, SYNC = "trl", "async-grpo", "grpo"
THREADS = 2
GROUP_SIZE = 8
PROMPTS_PER_STEP = 8
STALENESS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one child measures; travels to it as JSON."""

    system: str
    model: str
    dtype: str
    steps: int
    warmup: int
    micro_batch: int
    max_tokens: int
    learning_rate: float
    gradient_checkpointing: bool
    reward_sleep_s: float
    reward_workers: int
    max_staleness: int
    learner_threads: int
    rollout_threads: int
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one child found, over the measured steps only."""

    steps: int
    seconds: float
    tokens: float
    """Trained on."""
    completions: int
    reward: float
    """Mean over the measured steps."""
    start_s: float
    """From the start of the process to the end of the warm-up."""
    other_share: float | None = None
    """Of the steps' time that was neither waiting for groups, learning, nor publishing."""
    wait_share: float | None = None
    publish_share: float | None = None
    worst_age: int | None = None

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens per second."""
        return self.tokens / self.seconds

    @property
    def completions_per_s(self) -> float:
        """Trained completions per second."""
        return self.completions / self.seconds

    @property
    def step_s(self) -> float:
        """Seconds per optimizer step."""
        return self.seconds / self.steps


def rows(count: int) -> list[dict[str, Any]]:
    """The main job's prompts, in the order in which every system meets them."""
    from trl_ray.config.load import load_config
    from trl_ray.config.runs.grpo_config import AsyncGRPOConfig
    from trl_ray.data.sources.generated import generate

    config = load_config(AsyncGRPOConfig, QUICKSTART)
    assert config.dataset_name is not None, f"{QUICKSTART} must name its dataset"
    options = {**config.dataset_kwargs, "size": count}
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    return [
        {"prompt": [*system, *row["prompt"]], "answer": row["answer"]}
        for row in generate(config.dataset_name, options, seed=config.seed, held_out=False)
    ]


def make_reward(sleep_s: float) -> Any:
    """The shipped `arithmetic` reward in TRL's signature, with a pause that stands for a slow judge or sandbox."""
    from trl_ray.rewards.functions import arithmetic

    def scored(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
        return arithmetic(completions=completions, answer=answer)

    def judged(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
        time.sleep(sleep_s)
        return arithmetic(completions=completions, answer=answer)

    return judged if sleep_s else scored


def measure_trl(settings: Settings) -> Measurement:
    """TRL's synchronous trainer with transformers' generate, on the CPU."""
    began = time.time()
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(THREADS)
    ends: list[float] = []
    tokens: list[float] = []
    rewards: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "completions/mean_length" in logs:
                ends.append(time.time())
                tokens.append(logs["completions/mean_length"] * GROUP_SIZE * PROMPTS_PER_STEP)
                rewards.append(logs["reward"])

    total = settings.warmup + settings.steps
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            fp16=False,
            max_steps=total,
            seed=42,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=GROUP_SIZE * PROMPTS_PER_STEP // settings.micro_batch,
            num_generations=GROUP_SIZE,
            max_completion_length=settings.max_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            beta=0.0,
            loss_type="dapo",
            gradient_checkpointing=settings.gradient_checkpointing,
            shuffle_dataset=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            log_completions=False,
            # `dtype` is that of the weights, for both systems; autocast is off in both.
            model_init_kwargs={"dtype": settings.dtype},
        )
        trainer = GRPOTrainer(
            model=settings.model,
            reward_funcs=make_reward(settings.reward_sleep_s),
            args=args,
            train_dataset=Dataset.from_list(rows(total * PROMPTS_PER_STEP)),
            callbacks=[Watch()],
        )
        trainer.train()
    first = settings.warmup
    return Measurement(
        steps=settings.steps,
        seconds=ends[total - 1] - ends[first - 1],
        tokens=sum(tokens[first:total]),
        completions=settings.steps * GROUP_SIZE * PROMPTS_PER_STEP,
        start_s=ends[first - 1] - began,
        reward=sum(rewards[first:total]) / settings.steps,
    )


def measure_trl_ray(settings: Settings) -> Measurement:
    """One of trl_ray's pipelines on Ray actors, through its Python interface."""
    began = time.time()
    from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
    from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
    from trl_ray.pipelines.grpo import GRPOPipeline

    is_async = settings.system == ASYNC
    lead = settings.max_staleness if is_async else 0
    total = settings.warmup + settings.steps + lead
    options: dict[str, Any] = {
        "dtype": settings.dtype,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_steps": total,
        "seed": 42,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": GROUP_SIZE * PROMPTS_PER_STEP // settings.micro_batch,
        "num_generations": GROUP_SIZE,
        "max_completion_length": settings.max_tokens,
        "beta": 0.0,
        "loss_type": "dapo",
        "shuffle_dataset": False,
        "save_steps": 0,
        "html_report": False,
        "rollout": {
            "engine": settings.engine,
            "num_cpus": settings.rollout_threads,
            "max_num_seqs": 64,
            "max_model_len": 256,
            "kv_cache_memory_gib": 0.5,
        },
        "runtime": {
            "num_cpus": settings.rollout_threads + 1,
            "learner_num_cpus": 1.0,
            "learner_threads": settings.learner_threads,
        },
        "reward": {"num_workers": settings.reward_workers},
    }
    with tempfile.TemporaryDirectory() as folder:
        options["output_dir"] = str(Path(folder, "run"))
        args: Any = AsyncGRPOConfig(max_staleness=lead, **options) if is_async else GRPOConfig(**options)
        pipeline = (AsyncGRPOPipeline if is_async else GRPOPipeline)(
            model=settings.model,
            reward_funcs=make_reward(settings.reward_sleep_s),
            args=args,
            train_dataset=rows(total * PROMPTS_PER_STEP),
        )
        # The progress lines are ours; the last line of stdout belongs to the parent.
        output = pipeline.train()
        lines = (output.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    measured = records[settings.warmup : settings.warmup + settings.steps]
    start, end = records[settings.warmup - 1]["time"], measured[-1]["time"]
    whole = sum(record["time/step_s"] for record in measured)

    def share(key: str) -> float:
        return float(sum(record[key] for record in measured) / whole)

    return Measurement(
        steps=settings.steps,
        seconds=end - start,
        tokens=sum(record["tokens/trained"] for record in measured),
        completions=settings.steps * GROUP_SIZE * PROMPTS_PER_STEP,
        start_s=start - began,
        reward=sum(record["reward/mean"] for record in measured) / settings.steps,
        other_share=share("time/other_s"),
        wait_share=share("time/wait_s"),
        publish_share=share("time/publish_s"),
        worst_age=output.worst_age,
    )


def run_child(settings: Settings) -> Measurement:
    """Measure in a fresh process.

    Raises:
        SystemExit: the child failed; its output has been shown.
    """
    # TRL's one process gets all threads; a Ray actor gets those of its role, whatever stands here.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(dataclasses.asdict(settings))]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        output.seek(0)
        text = output.read()
    found = [line for line in text.splitlines() if line.startswith(MARK)]
    if process.returncode != 0 or not found:
        sys.stderr.write(text)
        raise SystemExit(f"{settings.system} ended with {process.returncode} and no measurement; its output is above.")
    return Measurement(**json.loads(found[-1].removeprefix(MARK)))


def show(name: str, settings: Settings, found: Measurement) -> None:
    """One line for people."""
    extra = ""
    if found.wait_share is not None and found.publish_share is not None and found.other_share is not None:
        extra = (
            f"; learner waits {found.wait_share:.0%}, publishes {found.publish_share:.1%}, "
            f"other {found.other_share:.1%}; oldest token {found.worst_age} steps"
        )
    print(
        f"{name}: {found.step_s:.2f} s/step, {found.tokens_per_s:.1f} trained tokens/s over {found.steps} steps "
        f"after {settings.warmup} of warm-up ({found.start_s:.0f} s); mean reward {found.reward:.3f}{extra}",
        flush=True,
    )


def against_trl(base: Settings, only: str | None) -> dict[str, float]:
    """Trained tokens per second of both systems, and the ratio."""
    figures: dict[str, float] = {}
    found: dict[str, Measurement] = {}
    for system, name in ((TRL, "trl"), (ASYNC, "trl_ray")):
        if only in (None, system):
            settings = dataclasses.replace(base, system=system)
            found[name] = run_child(settings)
            show(name, settings, found[name])
            figures[f"{name}_seconds_per_step"] = found[name].step_s
            figures[f"{name}_trained_completions_per_s"] = found[name].completions_per_s
            figures[f"{name}_trained_tokens_per_s"] = found[name].tokens_per_s
    if len(found) == 2:
        ours, theirs = found["trl_ray"], found["trl"]
        figures["completions_ratio"] = ours.completions_per_s / theirs.completions_per_s
        figures["ratio"] = ours.tokens_per_s / theirs.tokens_per_s
    return figures


def async_against_sync(base: Settings, only: str | None) -> dict[str, float]:
    """Steps per second of both pipelines with a slow reward, and the ratio."""
    figures: dict[str, float] = {}
    for system, name in ((ASYNC, "async"), (SYNC, "sync")):
        if only in (None, system):
            settings = dataclasses.replace(base, system=system)
            found = run_child(settings)
            show(name, settings, found)
            figures[f"{name}_seconds_per_step"] = found.step_s
    if len(figures) == 2:
        figures["async_vs_sync_ratio"] = figures["sync_seconds_per_step"] / figures["async_seconds_per_step"]
    return figures


def orchestration(base: Settings) -> dict[str, float]:
    """The share of a step that is neither generation and rewards (the learner waits for them) nor learning."""
    settings = dataclasses.replace(base, system=ASYNC)
    found = run_child(settings)
    show("trl_ray", settings, found)
    assert found.other_share is not None and found.publish_share is not None
    return {
        "orchestration_seconds_per_step": found.step_s,
        "orchestration_publish_share": found.publish_share,
        "orchestration_other_share": found.other_share,
        "orchestration_share": found.publish_share + found.other_share,
    }


def resolve_model(name: str, folder: str) -> str:
    """The folder of the model: SmolLM2, a random two-layer model built now, or a path."""
    if name == "tiny":
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny_models import build_tiny_model  # type: ignore[import-not-found]

        return str(build_tiny_model(Path(folder, "tiny")))
    path = SMOLLM2 if name == "smollm2" else Path(name)
    if not (path / "config.json").is_file():
        raise SystemExit(
            f"--model must be smollm2, tiny or a model folder, but {path} holds no config.json. "
            f"Build SmolLM2 with: python examples/fetch_smollm2.py {SMOLLM2}"
        )
    return str(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", choices=["trl", "async-vs-sync", "orchestration", "all"], default="all")
    parser.add_argument("--model", default="smollm2", metavar="smollm2|tiny|PATH")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="measured optimizer steps")
    parser.add_argument("--warmup", type=int, default=3, metavar="M", help="steps before them, at least 1")
    parser.add_argument("--only", choices=[TRL, ASYNC, SYNC], help="measure just this one, without a ratio")
    parser.add_argument("--micro-batch", type=int, default=32, help="completions per backward pass, both systems")
    parser.add_argument("--max-tokens", type=int, default=16, help="longest completion")
    parser.add_argument("--learning-rate", type=float, default=1e-8, help="both systems; see the module")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="saves memory, costs time; both systems")
    parser.add_argument("--max-staleness", type=int, default=STALENESS)
    parser.add_argument("--reward-sleep", type=float, default=1.0, metavar="S", help="seconds, async-vs-sync only")
    parser.add_argument("--reward-workers", type=int, default=1, help="async-vs-sync only")
    parser.add_argument("--learner-threads", type=int, default=1)
    parser.add_argument("--rollout-threads", type=int, default=1)
    parser.add_argument("--engine", choices=["auto", "vllm", "transformers"], default="vllm")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warmup < 1:
        parser.error("--steps and --warmup must be at least 1: the warm-up's end is where the clock starts")
    if GROUP_SIZE * PROMPTS_PER_STEP % args.micro_batch:
        parser.error(f"--micro-batch must divide {GROUP_SIZE * PROMPTS_PER_STEP}")
    return args


def run_modes(args: argparse.Namespace, model: str) -> Mapping[str, float]:
    """Everything the command line asks for; `ratio`, the figure that counts, comes last."""
    base = Settings(
        system=ASYNC,
        model=model,
        dtype=args.dtype,
        steps=args.steps,
        warmup=args.warmup,
        micro_batch=args.micro_batch,
        max_tokens=args.max_tokens,
        learning_rate=args.learning_rate,
        gradient_checkpointing=args.gradient_checkpointing,
        reward_sleep_s=0.0,
        reward_workers=1,
        max_staleness=args.max_staleness,
        learner_threads=args.learner_threads,
        rollout_threads=args.rollout_threads,
        engine=args.engine,
    )
    figures: dict[str, float] = {}
    if args.mode in ("orchestration", "all"):
        figures |= orchestration(base)
    if args.mode in ("async-vs-sync", "all"):
        slow = dataclasses.replace(base, reward_sleep_s=args.reward_sleep, reward_workers=args.reward_workers)
        figures |= async_against_sync(slow, args.only)
    if args.mode in ("trl", "all"):
        figures |= against_trl(base, args.only)
    if args.mode == "async-vs-sync" and "async_vs_sync_ratio" in figures:
        figures["ratio"] = figures["async_vs_sync_ratio"]
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; a child measures one system and prints JSON."""
    args = parse(argv)
    if args.child:
        settings = Settings(**json.loads(args.child))
        found = measure_trl(settings) if settings.system == TRL else measure_trl_ray(settings)
        print(f"\n{MARK}{json.dumps(dataclasses.asdict(found))}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = run_modes(args, resolve_model(args.model, folder))
    for name, value in figures.items():
        print(f"{name}: {value:.3f}" if value < 100 else f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()
