"""Measures SFT and DPO against TRL: tokens per second and peak memory, same model, same rows.

    --task sft   ragged texts: TRL's best setting against ours
    --task dpo   pairs with a precomputed reference, and the memory that a reference model costs
    --scout      every setting of each side, a short run of each: which is the best?

    this process --spawns, in turn--> one child per contender and round --its last line, JSON--> figures

An optimizer step trains the whole data set, so every step of every contender is the same work whatever its
micro-batches are, and all must report the same loss and gradient norm: padding, packing and sharing of prompts may
change neither. Timed is what lies between the ends of two steps. Tokens are those of the data: each text once; for
a pair prompt + chosen and prompt + rejected; never padding. Peak memory is the process's resident memory at its
highest until the last step ends, less what it takes before it loads the model. Ours runs as users run it: the pipeline
with `runtime.kind=local`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
MARK = "measurement:"
TRL, OURS = "trl", "trl_ray"
SFT, DPO = "sft", "dpo"
LEARNING_RATE = 1e-5
MEDIAN_TOKENS, SIGMA, MIN_TOKENS = 110, 1.0, 16
"""Of the lognormal lengths of texts."""
PROMPT_TOKENS, ANSWER_TOKENS, PAIR_SIGMA = 60, 70, 0.7
"""The same of prompts and of both answers."""
COMMON_WORDS = (
    "the of and to in is it you that he was for on are with as his they be at one have this from had by hot word "
    "but what some we can out other were all there when up use your how said an each she which do their time if"
)
"""One token each in most vocabularies."""

SETTINGS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    (SFT, TRL): {
        "padding-free-2": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 2},
        "packed": {"packing": True, "per_device_train_batch_size": 1},
        "packed-eager": {"packing": True, "per_device_train_batch_size": 1, "attn_implementation": "eager"},
        "padding-free-4": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
        "padded-1": {"per_device_train_batch_size": 1},
        "padded-4": {"per_device_train_batch_size": 4},
        "padded-4-by-length": {"per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"},
    },
    (SFT, OURS): {
        "tokens": {"max_tokens_per_micro_batch": 1024},
        "packed": {"packing": True, "per_device_train_batch_size": 1},
        "examples-8": {"per_device_train_batch_size": 8},
    },
    (DPO, TRL): {
        "pairs-1": {"per_device_train_batch_size": 1},
        "pairs-2": {"per_device_train_batch_size": 2},
        "pairs-4": {"per_device_train_batch_size": 4},
        "padding-free-4": {"per_device_train_batch_size": 4, "padding_free": True},
    },
    (DPO, OURS): {
        # The fastest is `tokens`, by a few per cent; this one takes a fifth less memory.
        "pairs-1": {"per_device_train_batch_size": 1},
        "tokens": {"max_tokens_per_micro_batch": 1024},
        "pairs-4": {"per_device_train_batch_size": 4},
    },
}
"""What `--scout` tries; the first of each is what is measured without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one child measures; travels to it as JSON."""

    task: str
    system: str
    setting: str
    model: str
    rows: int
    max_length: int
    shrink: int
    """Texts have this many times fewer words: a byte-level tokenizer makes several tokens of each."""
    warmup: int
    steps: int
    threads: int
    gradient_checkpointing: bool
    precompute: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one child found."""

    seconds: tuple[float, ...]
    """Of each measured step."""
    cpu_seconds: tuple[float, ...]
    """The same of all threads together: a busy machine changes it less."""
    tokens: float
    """Of one step."""
    peak_bytes: float
    """On top of what the process takes before the model is loaded."""
    baseline_bytes: float
    loss: float
    """Of the first step; all contenders must agree on it and on the gradient's norm."""
    grad_norm: float


class Watch:
    """The process's highest resident memory and its CPU time, ten times a second, from a thread of its own."""

    def __init__(self) -> None:
        self.baseline = self._read("VmRSS")
        self._seen: list[tuple[float, float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _read(name: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1]) * 1024
        raise SystemExit(f"/proc/self/status holds no {name}: memory is measured on Linux only.")

    def _watch(self) -> None:
        while not self._done.is_set():
            self._seen.append((time.time(), self._read("VmHWM"), time.process_time()))
            self._done.wait(0.1)

    def measurement(self, ends: Sequence[float], warmup: int, **told: float) -> Measurement:
        """From when each step ended, in seconds since the epoch, and from what the system told of the first one."""
        self._done.set()
        self._thread.join()
        moments, peaks, cpu = np.array(self._seen).T
        return Measurement(
            seconds=tuple(np.diff(ends)[warmup - 1 :].tolist()),
            cpu_seconds=tuple(np.diff(np.interp(ends, moments, cpu))[warmup - 1 :].tolist()),
            peak_bytes=float(peaks[moments <= ends[-1]].max()) - self.baseline,
            baseline_bytes=self.baseline,
            **told,
        )


def texts(rng: np.random.Generator, settings: Settings, count: int, median: float, sigma: float) -> list[str]:
    """Random words; their numbers are the quantiles of a lognormal distribution, in random order."""
    quantiles = [statistics.NormalDist().inv_cdf((place + 0.5) / count) for place in range(count)]
    longest = settings.max_length * (0.5 if settings.task == DPO else 1.0)
    sizes = np.clip(median * np.exp(sigma * rng.permutation(quantiles)), MIN_TOKENS, longest - 8) / settings.shrink
    return [" ".join(rng.choice(COMMON_WORDS.split(), max(1, int(size)))) for size in sizes]


def rows(settings: Settings) -> list[dict[str, str]]:
    """The data set, which every optimizer step trains as a whole."""
    rng, count = np.random.default_rng(settings.seed), settings.rows
    if settings.task == SFT:
        return [{"text": text} for text in texts(rng, settings, count, MEDIAN_TOKENS, SIGMA)]
    prompts = texts(rng, settings, count, PROMPT_TOKENS, PAIR_SIGMA)
    chosen = texts(rng, settings, count, ANSWER_TOKENS, PAIR_SIGMA)
    rejected = texts(rng, settings, count, ANSWER_TOKENS, PAIR_SIGMA)
    return [
        {"prompt": asked, "chosen": f" {good}", "rejected": f" {bad}"}
        for asked, good, bad in zip(prompts, chosen, rejected, strict=True)
    ]


def common_options(settings: Settings) -> dict[str, Any]:
    """What both sides are told alike."""
    options: dict[str, Any] = {
        "max_length": settings.max_length,
        "max_steps": settings.warmup + settings.steps,
        "seed": settings.seed,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "logging_steps": 1,
        **SETTINGS[settings.task, settings.system][settings.setting],
    }
    if settings.task == DPO:
        options["precompute_ref_log_probs"] = settings.precompute
    return options


def make_trainer(settings: Settings, folder: str) -> Any:
    """TRL's trainer, whose optimizer step takes all there is in an epoch."""
    import trl
    from datasets import Dataset

    options = common_options(settings)
    init: dict[str, Any] = {"dtype": "float32"}
    if "attn_implementation" in options:
        init["attn_implementation"] = options.pop("attn_implementation")
    if settings.task == SFT:
        options["shuffle_dataset"] = False
    options.setdefault("train_sampling_strategy", "sequential")
    name = {SFT: "SFT", DPO: "DPO"}[settings.task]
    config = getattr(trl, f"{name}Config")(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        fp16=False,
        # An epoch ends an update, however many micro-batches it has, so this is "all of them".
        gradient_accumulation_steps=settings.rows,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs=init,
        **options,
    )
    return getattr(trl, f"{name}Trainer")(
        model=settings.model, args=config, train_dataset=Dataset.from_list(rows(settings))
    )


def measure_trl(settings: Settings) -> Measurement:
    """TRL's trainer in this process."""
    # Before the baseline, so that no library counts as memory of training.
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import TrainerCallback

    ends: list[float] = []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.time())

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, folder)
        trainer.add_callback(Steps())
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first = logs[0]
    told = {"tokens": first["num_tokens"], "loss": first["loss"], "grad_norm": first["grad_norm"]}
    return watch.measurement(ends, settings.warmup, **told)


def measure_ours(settings: Settings) -> Measurement:
    """The pipeline in this process."""
    # Before the baseline: what a local run imports only once it needs it.
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import trl_ray.actors.policy_learner  # noqa: F401
    from trl_ray.config.load import build
    from trl_ray.config.runs.dataset_config import DPOConfig, SFTConfig
    from trl_ray.pipelines.preference import DPOPipeline
    from trl_ray.pipelines.sft import SFTPipeline

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **common_options(settings),
            "output_dir": str(Path(folder, "run")),
            "gradient_accumulation_steps": settings.rows,
            "shuffle_dataset": False,
            "save_steps": 0,
            "html_report": False,
            "runtime": {"kind": "local", "learner_threads": settings.threads},
        }
        if settings.task == DPO:
            options["ref_log_probs_cache_dir"] = str(Path(folder, "cache"))
        pipeline: Any = {SFT: SFTPipeline, DPO: DPOPipeline}[settings.task]
        config: Any = {SFT: SFTConfig, DPO: DPOConfig}[settings.task]
        output = pipeline(model=settings.model, args=build(config, options), train_dataset=rows(settings)).train()
        lines = [json.loads(line) for line in (output.run_dir / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    told = {"tokens": first["tokens/seen"], "loss": first["loss"], "grad_norm": first["grad_norm"]}
    return watch.measurement([line["time"] for line in lines], settings.warmup, **told)


@contextlib.contextmanager
def two_outputs() -> Iterator[None]:
    """What libraries print goes to stderr, so that stdout ends with the measurement."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def run_child(settings: Settings, timeout_s: float) -> Measurement:
    """Measure in a fresh process.

    Raises:
        SystemExit: the child failed or took too long; its output has been shown.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(dataclasses.asdict(settings))]
    name = f"{settings.task} {settings.system} {settings.setting}"
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, timeout=timeout_s
            )
            ended = f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"took longer than {timeout_s:.0f} s"
        output.seek(0)
        text = output.read()
    found = [line for line in text.splitlines() if line.startswith(MARK)]
    if not found:
        sys.stderr.write(text)
        raise SystemExit(f"{name} {ended} and gave no measurement; its output is above.")
    values = json.loads(found[-1].removeprefix(MARK))
    for key in ("seconds", "cpu_seconds"):
        values[key] = tuple(values[key])
    measurement = Measurement(**values)
    seconds, cpu_seconds = statistics.median(measurement.seconds), statistics.median(measurement.cpu_seconds)
    print(
        f"{name}{'' if settings.task == SFT or settings.precompute else ', reference model in memory'}: "
        f"{seconds:.2f} s a step ({cpu_seconds:.2f} s of CPU), {measurement.tokens / seconds:.1f} tokens/s, "
        f"{measurement.peak_bytes / 2**20:.0f} MiB over {measurement.baseline_bytes / 2**20:.0f}; "
        f"loss {measurement.loss:.6f}, gradient norm {measurement.grad_norm:.6f}",
        flush=True,
    )
    return measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One system in one setting, over all rounds."""

    rounds: tuple[Measurement, ...]

    @property
    def tokens_per_s(self) -> float:
        """Of the median step."""
        seconds = [one for found in self.rounds for one in found.seconds]
        return self.rounds[0].tokens / statistics.median(seconds)

    @property
    def cpu_seconds(self) -> float:
        """Of the median step."""
        return statistics.median([one for found in self.rounds for one in found.cpu_seconds])

    @property
    def peak_mib(self) -> float:
        """The lowest of the rounds': what else happens only adds."""
        return min(found.peak_bytes for found in self.rounds) / 2**20


def in_turn(contenders: Mapping[str, Settings], rounds: int, timeout_s: float) -> dict[str, Contender]:
    """Every contender once, then again, so that a busy moment of the machine does not fall on one alone."""
    found: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, settings in contenders.items():
            found[name].append(run_child(settings, timeout_s))
    return {name: Contender(rounds=tuple(values)) for name, values in found.items()}


def scout(base: Settings, timeout_s: float) -> dict[str, str]:
    """The fastest setting of each side, by a short run of each."""
    best = {}
    for system in (TRL, OURS):
        settings = {
            name: dataclasses.replace(base, system=system, setting=name, warmup=1, steps=1)
            for name in SETTINGS[base.task, system]
        }
        found = in_turn(settings, 1, timeout_s)
        print(f"gradient norms of {base.task} differ by {difference(found):.1e} among settings of {system}")
        best[system] = max(found, key=lambda name: found[name].tokens_per_s)
        print(f"fastest {base.task} setting of {system}: {best[system]}", flush=True)
    return best


def measured(base: Settings, best: Mapping[str, str], rounds: int, timeout_s: float) -> dict[str, Contender]:
    """Both sides in turn; for DPO then, once, with a reference model in memory."""
    both = {system: dataclasses.replace(base, system=system, setting=best[system]) for system in (TRL, OURS)}
    found = in_turn(both, rounds, timeout_s)
    if base.task == DPO:
        holding = {f"{name}_reference_model": dataclasses.replace(one, precompute=False) for name, one in both.items()}
        found |= in_turn(holding, 1, timeout_s)
    return found


def difference(found: Mapping[str, Contender]) -> float:
    """The largest relative difference between gradient norms of the first step: what padding or packing spoils."""
    norms = [one.rounds[0].grad_norm for one in found.values()]
    return (max(norms) - min(norms)) / min(norms)


def figures(task: str, found: Mapping[str, Contender]) -> dict[str, float]:
    """What is printed of one task."""
    values = {f"{task}_tokens_per_step": found[OURS].rounds[0].tokens}
    for name, one in found.items():
        values[f"{task}_{name}_tokens_per_s"] = one.tokens_per_s
        values[f"{task}_{name}_cpu_seconds_per_step"] = one.cpu_seconds
        values[f"{task}_{name}_peak_mib"] = one.peak_mib
    values[f"{task}_gradient_norm_difference"] = difference(found)
    values[f"{task}_memory_saved"] = 1 - found[OURS].peak_mib / found[TRL].peak_mib
    if task == DPO:
        for name in (TRL, OURS):
            reference = found[f"{name}_reference_model"].peak_mib
            values[f"{task}_memory_saved_vs_{name}_reference_model"] = 1 - found[OURS].peak_mib / reference
    values[f"{task}_ratio_of_cpu_time"] = found[TRL].cpu_seconds / found[OURS].cpu_seconds
    values[f"{task}_ratio"] = found[OURS].tokens_per_s / found[TRL].tokens_per_s
    return values


def resolve_model(name: str, folder: str) -> str:
    """The folder of the model: SmolLM2, a random two-layer model built now, or a path."""
    if name == "tiny":
        build = "import sys, tiny_models; tiny_models.build_tiny_model(sys.argv[1])"
        path = Path(folder, "tiny")
        # In a process of its own: this one stays small, for a child's peak memory begins with that of its parent.
        subprocess.run([sys.executable, "-c", build, str(path)], check=True, cwd=ROOT / "tests")
        return str(path)
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
    parser.add_argument("--task", choices=[SFT, DPO, "both"], default="both")
    parser.add_argument("--model", default="smollm2", metavar="smollm2|tiny|PATH")
    parser.add_argument("--quick", action="store_true", help="the tiny model, one round: does everything still run?")
    parser.add_argument("--scout", action="store_true", help="try all settings first, and measure the fastest")
    parser.add_argument("--texts", type=int, default=16, help="rows of SFT's data set, which every step trains")
    parser.add_argument("--pairs", type=int, default=8, help="rows of DPO's")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1, help="measured steps in a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="saves memory, costs time; both systems")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one process may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.steps, args.warmup, args.rounds, args.texts, args.threads) < 1 or args.pairs < 4 or args.pairs % 4:
        parser.error("--steps, --warmup, --rounds, --texts, --threads: at least 1; --pairs: a multiple of 4")
    if args.quick:
        args.model, args.rounds, args.max_length = "tiny", 1, min(args.max_length, 512)
    return args


def run_task(args: argparse.Namespace, task: str, model: str) -> dict[str, float]:
    """Everything about one task."""
    base = Settings(
        task=task,
        system=OURS,
        setting="tokens",
        model=model,
        rows=args.texts if task == SFT else args.pairs,
        max_length=args.max_length,
        shrink=6 if args.model == "tiny" else 1,
        warmup=args.warmup,
        steps=args.steps,
        threads=args.threads,
        gradient_checkpointing=args.gradient_checkpointing,
        precompute=task == DPO,
        seed=args.seed,
    )
    best = {system: next(iter(SETTINGS[task, system])) for system in (TRL, OURS)}
    if args.scout:
        best = scout(base, args.timeout)
    return figures(task, measured(base, best, args.rounds, args.timeout))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; a child measures one contender and prints JSON."""
    args = parse(argv)
    if args.child:
        settings = Settings(**json.loads(args.child))
        with two_outputs():
            import torch

            torch.set_num_threads(settings.threads)
            found = measure_trl(settings) if settings.system == TRL else measure_ours(settings)
        print(f"\n{MARK}{json.dumps(dataclasses.asdict(found))}", flush=True)
        return
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = resolve_model(args.model, folder)
        for task in (SFT, DPO) if args.task == "both" else (args.task,):
            values |= run_task(args, task, model)
    for name, value in values.items():
        print(f"{name}: {value:.2e}" if "difference" in name else f"{name}: {value:.3f}")
    ratios = [value for name, value in values.items() if name.endswith("_ratio")]
    print(f"ratio: {min(ratios):.3f}")


if __name__ == "__main__":
    main()
