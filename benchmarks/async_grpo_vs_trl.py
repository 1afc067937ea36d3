"""Measures trl_ray's GRPO: against TRL's GRPOTrainer, asynchronous against synchronous, and its own overhead.

    --mode trl             TRL's trainer, then AsyncGRPOPipeline: same model, prompts, reward, batch, threads
    --mode async-vs-sync   AsyncGRPOPipeline, then GRPOPipeline, with a reward function that takes a second
    --mode skip            AsyncGRPOPipeline with rewards that differ, then with rewards that are all equal
    --mode orchestration   AsyncGRPOPipeline alone: the share of a step that is neither waiting nor learning
    --mode all             the four, one after the other

    this process --spawns, one at a time--> one child per system --its last line, JSON--> Measurement --> figures

Every system runs in a process of its own and alone. Each warms up, then is timed over whole optimizer steps: from
the end of the last warm-up step to the end of the last measured one. Tokens counted are those under the loss mask
(completion tokens, the end-of-sequence token included). The asynchronous pipeline is asked for more steps than are
measured, so that generation runs ahead during all of them: a buffer that empties at the end would flatter it.
The learning rate is next to nothing, so that all systems sample from the same policy throughout: at a real one the
completions get shorter as the model learns, and whoever learns a step later would count more tokens.

Where all completions of a group have the same reward there is nothing to learn, and trl_ray skips their backward pass;
TRL does not. So the reward is a hash of the completion's text: it differs within every group. What the skip is worth is
`skip_gain`, and no part of `ratio`: above `MAX_ZERO_STD` of groups without differences there is no `ratio`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "async-grpo" / "quickstart.yaml"
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
MARK = "measurement:"
TRL, ASYNC, SYNC = "trl", "async-grpo", "grpo"
VARIED, ARITHMETIC = "varied", "arithmetic"
MAX_ZERO_STD = 0.1
"""Of the groups may have equal rewards where two systems are compared."""
MIN_ZERO_STD = 0.9
"""Of the groups must have them where `skip_gain` is the whole gain."""
MAX_HEAD_START = 0.1
"""Of the measured groups may have been generated before the clock started."""
QUIET_LOAD = 0.5
"""Processes that others may have running, on average over a minute."""
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
    reward: str
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
    zero_std_fraction: float
    """Of the groups, those in which all rewards are equal; mean over the measured steps."""
    start_s: float
    """From the start of the process to the end of the warm-up."""
    other_share: float | None = None
    """Of the steps' time that was neither waiting for groups, learning, nor publishing."""
    wait_share: float | None = None
    publish_share: float | None = None
    worst_age: int | None = None
    head_start: float | None = None
    """Of the measured groups, those that lay ready before the clock started and were not replaced by others."""

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


def varied(completions: Sequence[Any]) -> list[float | None]:
    """A hash of each completion's text in [0, 1): unlike texts have unlike rewards, for every system and always.

    24 bits, which float32 holds exactly: no system rounds two of them to one.
    """
    from trl_ray.rewards.functions import text_of

    digests = [hashlib.sha256(text_of(completion).encode()).digest() for completion in completions]
    return [int.from_bytes(digest[:3], "big") / 2**24 for digest in digests]


def make_reward(reward: str, sleep_s: float) -> Any:
    """`varied` or the shipped `arithmetic` in TRL's signature; a pause stands for a slow judge or sandbox."""
    from trl_ray.rewards.functions import arithmetic

    def scored(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
        if sleep_s:
            time.sleep(sleep_s)
        return varied(completions) if reward == VARIED else arithmetic(completions=completions, answer=answer)

    return scored


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
    zero_std: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "completions/mean_length" in logs:
                ends.append(time.time())
                tokens.append(logs["completions/mean_length"] * GROUP_SIZE * PROMPTS_PER_STEP)
                rewards.append(logs["reward"])
                zero_std.append(logs["frac_reward_zero_std"])

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
            reward_funcs=make_reward(settings.reward, settings.reward_sleep_s),
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
        zero_std_fraction=sum(zero_std[first:total]) / settings.steps,
    )


def measure_trl_ray(settings: Settings) -> Measurement:
    """One of trl_ray's pipelines on Ray actors, through its Python interface."""
    began = time.time()
    from trl_ray.config.runs.grpo_config import AsyncGRPOConfig, GRPOConfig
    from trl_ray.pipelines.async_grpo import AsyncGRPOPipeline
    from trl_ray.pipelines.grpo import GRPOPipeline

    is_async = settings.system == ASYNC
    max_staleness = settings.max_staleness if is_async else 0
    total = settings.warmup + settings.steps + max_staleness
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
        args: Any = AsyncGRPOConfig(max_staleness=max_staleness, **options) if is_async else GRPOConfig(**options)
        pipeline = (AsyncGRPOPipeline if is_async else GRPOPipeline)(
            model=settings.model,
            reward_funcs=make_reward(settings.reward, settings.reward_sleep_s),
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
        zero_std_fraction=sum(record["advantage/zero_std_fraction"] for record in measured) / settings.steps,
        other_share=share("time/other_s"),
        wait_share=share("time/wait_s"),
        publish_share=share("time/publish_s"),
        worst_age=output.worst_age,
        head_start=head_start(records, settings),
    )


def head_start(records: Sequence[Mapping[str, float]], settings: Settings) -> float:
    """By how much fewer groups lie ready after the measured steps than before, as a share of the measured groups.

    Args:
        records: lines of metrics.jsonl, one per step.
        settings: which of them are measured.
    """
    before = records[settings.warmup - 1]["queue/ready"]
    after = records[settings.warmup + settings.steps - 1]["queue/ready"]
    return max(0.0, before - after) / (settings.steps * PROMPTS_PER_STEP)


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


@dataclass(frozen=True, slots=True)
class Findings:
    """What has been measured so far, and what a reader must know before believing it."""

    figures: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def measure(self, name: str, settings: Settings, *, signal: bool = True) -> Measurement:
        """Run a child and show what it found under `name`; `signal` says whether rewards are meant to differ."""
        found = run_child(settings)
        show(name, settings, found)
        self.figures[f"{name}_zero_std_fraction"] = found.zero_std_fraction
        if found.head_start is not None:
            self.figures[f"{name}_head_start"] = found.head_start
        for problem in doubts(name, found, signal=signal):
            self.warn(problem)
        return found

    def warn(self, problem: str) -> None:
        """Say it at once; it is said again before the figures."""
        print(f"WARNING: {problem}", flush=True)
        self.warnings.append(problem)


def doubts(name: str, found: Measurement, *, signal: bool) -> list[str]:
    """Why a measurement is not the one that was meant."""
    problems, share = [], found.zero_std_fraction
    if signal and share > MAX_ZERO_STD:
        problems.append(
            f"{name}: all rewards are equal in {share:.0%} of the groups, at most {MAX_ZERO_STD:.0%} may be so. "
            "trl_ray skips their backward pass and TRL does not: this is no comparison, and gives no `ratio`."
        )
    if not signal and share < MIN_ZERO_STD:
        problems.append(
            f"{name}: all rewards are equal in only {share:.0%} of the groups, at least {MIN_ZERO_STD:.0%} should be: "
            "this model earns the arithmetic reward, and `skip_gain` is less than the whole gain."
        )
    if (found.head_start or 0.0) > MAX_HEAD_START:
        problems.append(
            f"{name}: {found.head_start:.0%} of the groups were generated before the clock started, at most "
            f"{MAX_HEAD_START:.0%} may be. Raise --steps."
        )
    return problems


def ratio_name(name: str, *found: Measurement) -> str:
    """`name` where all of `found` had to learn, else another, so that nobody takes it for the figure."""
    is_fair = all(measured.zero_std_fraction <= MAX_ZERO_STD for measured in found)
    return name if is_fair else f"{name}_not_comparable"


def show(name: str, settings: Settings, found: Measurement) -> None:
    """One line for people."""
    extra = "; skips no backward pass" if settings.system == TRL else ""
    if found.wait_share is not None and found.publish_share is not None and found.other_share is not None:
        extra = (
            f"; skips the backward pass of {found.zero_std_fraction:.0%} of the groups, "
            f"waits {found.wait_share:.0%}, publishes {found.publish_share:.1%}, "
            f"other {found.other_share:.1%}; oldest token {found.worst_age} steps"
        )
    print(
        f"{name}: {found.step_s:.2f} s/step, {found.tokens_per_s:.1f} trained tokens/s over {found.steps} steps "
        f"after {settings.warmup} of warm-up ({found.start_s:.0f} s); "
        f"mean reward {found.reward:.3f} ({settings.reward}){extra}",
        flush=True,
    )


def against_trl(findings: Findings, base: Settings, only: str | None) -> None:
    """Trained tokens per second of both systems, and the ratio."""
    figures = findings.figures
    found: dict[str, Measurement] = {}
    for system, name in ((TRL, "trl"), (ASYNC, "trl_ray")):
        if only in (None, system):
            found[name] = findings.measure(name, dataclasses.replace(base, system=system))
            figures[f"{name}_seconds_per_step"] = found[name].step_s
            figures[f"{name}_trained_completions_per_s"] = found[name].completions_per_s
            figures[f"{name}_trained_tokens_per_s"] = found[name].tokens_per_s
    if len(found) == 2:
        ours, theirs = found["trl_ray"], found["trl"]
        figures[ratio_name("completions_ratio", ours, theirs)] = ours.completions_per_s / theirs.completions_per_s
        figures[ratio_name("ratio", ours, theirs)] = ours.tokens_per_s / theirs.tokens_per_s


def async_against_sync(findings: Findings, base: Settings, only: str | None) -> None:
    """Steps per second of both pipelines with a slow reward, and the ratio."""
    found: dict[str, Measurement] = {}
    for system, name in ((ASYNC, "async"), (SYNC, "sync")):
        if only in (None, system):
            found[name] = findings.measure(name, dataclasses.replace(base, system=system))
            findings.figures[f"{name}_seconds_per_step"] = found[name].step_s
    if len(found) == 2:
        name = ratio_name("async_vs_sync_ratio", *found.values())
        findings.figures[name] = found["sync"].step_s / found["async"].step_s


def skip(findings: Findings, base: Settings) -> None:
    """Steps per second without anything to learn over those with it: what skipping the backward pass is worth."""
    signal = findings.measure("skip_signal", dataclasses.replace(base, system=ASYNC, reward=VARIED))
    none = findings.measure("skip_no_signal", dataclasses.replace(base, system=ASYNC, reward=ARITHMETIC), signal=False)
    findings.figures["skip_signal_seconds_per_step"] = signal.step_s
    findings.figures["skip_no_signal_seconds_per_step"] = none.step_s
    findings.figures["skip_gain"] = signal.step_s / none.step_s


def orchestration(findings: Findings, base: Settings) -> None:
    """The share of a step that is neither generation and rewards (the learner waits for them) nor learning."""
    found = findings.measure("orchestration", dataclasses.replace(base, system=ASYNC))
    assert found.other_share is not None and found.publish_share is not None
    findings.figures["orchestration_seconds_per_step"] = found.step_s
    findings.figures["orchestration_publish_share"] = found.publish_share
    findings.figures["orchestration_other_share"] = found.other_share
    findings.figures["orchestration_share"] = found.publish_share + found.other_share


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
    parser.add_argument("--mode", choices=["trl", "async-vs-sync", "skip", "orchestration", "all"], default="all")
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
    parser.add_argument(
        "--reward",
        choices=[VARIED, ARITHMETIC],
        default=VARIED,
        help="a hash of the text; or the quickstart's, which an untrained model earns nothing of. --mode skip has both",
    )
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


def run_modes(findings: Findings, args: argparse.Namespace, model: str) -> None:
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
        reward=args.reward,
        reward_sleep_s=0.0,
        reward_workers=1,
        max_staleness=args.max_staleness,
        learner_threads=args.learner_threads,
        rollout_threads=args.rollout_threads,
        engine=args.engine,
    )
    if args.mode in ("orchestration", "all"):
        orchestration(findings, base)
    if args.mode in ("skip", "all"):
        skip(findings, base)
    if args.mode in ("async-vs-sync", "all"):
        slow = dataclasses.replace(base, reward_sleep_s=args.reward_sleep, reward_workers=args.reward_workers)
        async_against_sync(findings, slow, args.only)
    if args.mode in ("trl", "all"):
        against_trl(findings, base, args.only)
    if args.mode == "async-vs-sync" and "async_vs_sync_ratio" in findings.figures:
        findings.figures["ratio"] = findings.figures["async_vs_sync_ratio"]


def machine_problems(args: argparse.Namespace, *, load: float) -> list[str]:
    """What would flatter one side, or blur both, whatever is measured."""
    problems = []
    ours = args.learner_threads + args.rollout_threads
    if ours != THREADS:
        problems.append(f"trl_ray has {ours} threads and TRL {THREADS}: the ratio is not that of equal means.")
    if load > QUIET_LOAD:
        problems.append(f"the machine is busy (load average {load:.1f}, quiet is {QUIET_LOAD} or less).")
    return problems


def conditions(args: argparse.Namespace, *, load: float) -> dict[str, str]:
    """What could flatter one side, of the machine and of both systems' settings."""
    return {
        "model": args.model,
        "dtype": args.dtype,
        "gradient_checkpointing": "on" if args.gradient_checkpointing else "off",
        "reward": args.reward,
        "cores": str(os.cpu_count()),
        "trl_threads": str(THREADS),
        "trl_ray_threads": f"{args.learner_threads} learner + {args.rollout_threads} rollout",
        "load_average_start": f"{load:.2f}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; a child measures one system and prints JSON."""
    args = parse(argv)
    if args.child:
        settings = Settings(**json.loads(args.child))
        found = measure_trl(settings) if settings.system == TRL else measure_trl_ray(settings)
        print(f"\n{MARK}{json.dumps(dataclasses.asdict(found))}", flush=True)
        return
    load = os.getloadavg()[0]
    said, findings = conditions(args, load=load), Findings()
    for problem in machine_problems(args, load=load):
        findings.warn(problem)
    with tempfile.TemporaryDirectory() as folder:
        run_modes(findings, args, resolve_model(args.model, folder))
    load = os.getloadavg()[0]
    said["load_average_end"] = f"{load:.2f}"
    if load > THREADS + QUIET_LOAD:
        findings.warn(f"the machine got busy (load average {load:.1f}, of which {THREADS} are the benchmark's own).")
    for problem in findings.warnings:
        print(f"WARNING: {problem}")
    for name, text in said.items():
        print(f"{name}: {text}")
    for name, value in findings.figures.items():
        print(f"{name}: {value:.3f}" if value < 100 else f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()
