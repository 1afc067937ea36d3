"""Measures how long a start takes until all rows are tokenised, and the memory it takes, against TRL's preparation.

    this process --rows, once--> Arrow folder --each system, in turn--> child: first start --> child: second start
                                                                        its last line, JSON --> figures

Both are handed the same memory-mapped `datasets.Dataset` of generated conversations, the same tokenizer and the same
number of processes, and both prepare for SFT with a `max_length` that no row reaches. Timed is what makes examples of
rows: `load_examples`, and the `_prepare_dataset` of TRL's SFTTrainer, whose model is a toy. Starting Python, imports
and loading the tokenizer are in neither. The tokens of some rows are compared: both must have made the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
MARK = "measurement:"
TRL, OURS = "trl", "trl_ray"
STARTS = ("first", "second")
MAX_LENGTH = 2048
COMPARED_ROWS = 100
GIB = 2**30
COMMON_WORDS = (
    "the of and to in is it you that he was for on are with as his they be at one have this from had by hot word "
    "but what some we can out other were all there when up use your how said an each she which do their time if"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one child measures; travels to it as JSON."""

    system: str
    tokenizer: str
    rows: str
    """The folder of the dataset."""
    cache: str
    processes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one child found."""

    seconds: float
    before_gib: float
    """Resident memory of the driver before the rows are touched."""
    peak_gib: float
    """The driver's highest resident memory, pages of mapped files included."""
    peak_private_gib: float
    """The highest without them: what cannot be given back to the system at once."""
    peak_children_gib: float
    """The highest sum over its child processes, where pages that they share count in each."""
    disk_gib: float
    """What the start left on disk."""
    tokens: int
    digest: str
    """Of the tokens of some rows."""
    dtype: str
    """Of tokens on disk."""
    place: str


def write_rows(folder: Path, *, rows: int, seed: int) -> None:
    """Conversations of two exchanges, about 560 tokens each, no two alike."""
    from datasets import Dataset

    def made() -> Iterator[dict[str, Any]]:
        draw, vocabulary = random.Random(seed), COMMON_WORDS.split()
        for number in range(rows):
            turns = [{"role": "system", "content": "You are a helpful assistant."}]
            for role, least, most in (("user", 30, 80), ("assistant", 140, 220)) * 2:
                words = draw.choices(vocabulary, k=draw.randrange(least, most))
                for place in range(0, len(words), 10):
                    words[place] += str(draw.randrange(1000))
                turns.append({"role": role, "content": f"{number}: {' '.join(words)}."})
            yield {"messages": turns}

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        Dataset.from_generator(made, cache_dir=scratch).save_to_disk(str(folder))


def status(pid: int | str = "self") -> dict[str, float]:
    """The lines of memory of a process's status, in GiB; none of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if line.startswith(("Vm", "Rss")))
    return {name: int(value.split()[0]) / 2**20 for name, _, value in pairs}


class Watch:
    """Looks at the memory of this process and of its children many times a second."""

    def __init__(self) -> None:
        self.private, self.children = status()["RssAnon"], 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.1):
            self.private = max(self.private, status().get("RssAnon", 0.0))
            self.children = max(self.children, sum(status(pid).get("VmRSS", 0.0) for pid in descendants()))


def descendants() -> list[str]:
    """All processes that this one has begun, and those that they have."""
    parents: dict[str, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[entry.name] = (entry / "stat").read_text().rpartition(")")[2].split()[1]
    found, wave = [], [str(os.getpid())]
    while wave := [pid for pid, parent in parents.items() if parent in wave]:
        found += wave
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def digest_of(ids: Sequence[Sequence[int]]) -> str:
    """A hash of token ids."""
    return hashlib.sha256(json.dumps([list(map(int, one)) for one in ids]).encode()).hexdigest()[:16]


def places_of(total: int) -> list[int]:
    """The rows whose tokens are compared, spread over all of them."""
    return list(range(0, total, max(1, total // COMPARED_ROWS)))


def measured(settings: Settings, prepare: Any, left: Path, look: Any) -> Measurement:
    """Time a preparation; `look` tells tokens, digest, dtype and place of what it gave."""
    before, disk = status()["VmRSS"], size_of(left)
    with Watch() as watch:
        begin = time.perf_counter()
        found = prepare()
        seconds = time.perf_counter() - begin
        peak = status()["VmHWM"]
    tokens, ids, dtype, place = look(found)
    return Measurement(
        seconds=seconds,
        before_gib=before,
        peak_gib=peak,
        peak_private_gib=watch.private,
        peak_children_gib=watch.children,
        disk_gib=max(0, size_of(left) - disk) / GIB,
        tokens=tokens,
        digest=digest_of(ids),
        dtype=dtype,
        place=place,
    )


def measure_ours(settings: Settings) -> Measurement:
    """A start of trl_ray up to its examples."""
    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    from trl_ray import SFTConfig
    from trl_ray.data.examples.example_set import ExampleTask, load_examples

    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    rows = datasets.load_from_disk(settings.rows)
    processes = settings.processes if settings.processes > 1 else None
    config = SFTConfig(max_length=MAX_LENGTH, dataset_num_proc=processes)

    def look(found: Any) -> tuple[int, list[Any], str, str]:
        samples = [found.examples[place].samples[0] for place in places_of(len(found))]
        ids = [np.concatenate([sample.prompt_ids, sample.completion_ids]) for sample in samples]
        return found.num_tokens, ids, str(ids[0].dtype), found.kept_in or "in memory"

    return measured(
        settings,
        lambda: load_examples(config, tokenizer, task=ExampleTask.SUPERVISED, dataset=rows),
        Path(settings.cache),
        look,
    )


def measure_trl(settings: Settings) -> Measurement:
    """A start of TRL's trainer up to its prepared dataset."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    rows = datasets.load_from_disk(settings.rows)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    toy = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes)
    found: list[Measurement] = []

    class Measured(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *args: Any, **options: Any) -> Any:
            def look(prepared: Any) -> tuple[int, list[Any], str, str]:
                tokens = sum(map(len, prepared.with_format("arrow")[:]["input_ids"])) if len(prepared) < 1e5 else 0
                chosen = [prepared[place]["input_ids"] for place in places_of(len(prepared))]
                return tokens, chosen, str(prepared.features["input_ids"].feature.dtype), "datasets' own cache"

            kept: list[Any] = []

            def prepare() -> Any:
                kept.append(SFTTrainer._prepare_dataset(self, *args, **options))
                return kept[0]

            found.append(measured(settings, prepare, Path(settings.rows), look))
            return kept[0]

    config = SFTConfig(
        output_dir=str(Path(settings.cache) / "trl"),
        max_length=MAX_LENGTH,
        dataset_num_proc=settings.processes if settings.processes > 1 else None,
        shuffle_dataset=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    Measured(model=LlamaForCausalLM(toy), args=config, train_dataset=rows, processing_class=tokenizer)
    return found[0]


def run_child(settings: Settings, timeout: float) -> Measurement:
    """Measure in a process of its own, whose peak memory is then that of this start alone."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"HF_DATASETS_CACHE": settings.cache, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--child", json.dumps(asdict(settings))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if done.returncode or line is None:
        raise SystemExit(f"The measurement of {settings.system} ended with code {done.returncode}: see above.")
    return Measurement(**json.loads(line.removeprefix(MARK)))


def report(found: Mapping[tuple[str, str], Measurement], rows: int) -> dict[str, float]:
    """What is printed of all measurements."""
    values: dict[str, float] = {"rows": rows}
    for (system, start), one in found.items():
        values[f"{system}_{start}_start_s"] = one.seconds
        if start == "first":
            values[f"{system}_rows_per_s"] = rows / one.seconds
            values[f"{system}_disk_gib"] = one.disk_gib
        values[f"{system}_{start}_before_rss_gib"] = one.before_gib
        values[f"{system}_{start}_peak_rss_gib"] = one.peak_gib
        values[f"{system}_{start}_peak_private_gib"] = one.peak_private_gib
        values[f"{system}_{start}_peak_children_gib"] = one.peak_children_gib
    for start in STARTS:
        if {(OURS, start), (TRL, start)} <= found.keys():
            ratio = found[TRL, start].seconds / found[OURS, start].seconds
            values["ratio" if start == "first" else "ratio_of_second_starts"] = ratio
    return values


def tell_conditions(args: argparse.Namespace, found: Mapping[tuple[str, str], Measurement], load: float) -> None:
    """What could flatter one side."""
    dtypes = {system: one.dtype for (system, _), one in found.items()}
    print(f"processes: {args.processes} each, on {os.cpu_count()} cores")
    print(f"tokens on disk: {', '.join(f'{system} {dtype}' for system, dtype in dtypes.items())}")
    print(f"load average: {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    print("page cache: the rows were read once before; what a first start wrote is likely to be in it at the second")
    print("one side only: trl_ray checks roles, contents and what the template leaves out; TRL writes labels as well")
    if args.processes < 2:
        print(
            "one process: trl_ray gives its tokenizer batches, which it spreads over all cores; TRL one text at a time"
        )
    if load > 0.5:
        print("WARNING: other processes ran beside the measurement", file=sys.stderr)
    digests = {one.digest for one in found.values()}
    if len(digests) > 1:
        print("WARNING: the systems did not make the same tokens: the figures are no comparison", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="dataset_num_proc of both")
    parser.add_argument("--tokenizer", default=str(SMOLLM2), metavar="FOLDER", help="with a chat template")
    parser.add_argument("--only", choices=[OURS, TRL], help="one system alone, no ratio")
    parser.add_argument("--folder", help="where rows and caches go, and are deleted; default: temporary files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one start may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rows < 1 or args.processes < 1:
        parser.error("--rows and --processes: at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; a child measures one start and prints JSON."""
    args = parse(argv)
    if args.child:
        settings = Settings(**json.loads(args.child))
        found_one = measure_trl(settings) if settings.system == TRL else measure_ours(settings)
        print(f"\n{MARK}{json.dumps(asdict(found_one))}", flush=True)
        return
    if not (Path(args.tokenizer) / "tokenizer.json").is_file():
        raise SystemExit(
            f"--tokenizer must be a folder with tokenizer.json, {args.tokenizer} is none. Build SmolLM2 with: "
            f"python examples/fetch_smollm2.py {SMOLLM2}"
        )
    load = os.getloadavg()[0]
    found: dict[tuple[str, str], Measurement] = {}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="tokenise-") as work:
        rows = Path(work, "rows")
        write_rows(rows, rows=args.rows, seed=args.seed)
        for system in (TRL, OURS) if args.only is None else (args.only,):
            cache = Path(work, system)
            cache.mkdir()
            for start in STARTS:
                settings = Settings(
                    system=system, tokenizer=args.tokenizer, rows=str(rows), cache=str(cache), processes=args.processes
                )
                found[system, start] = run_child(settings, args.timeout)
                print(f"{system}, {start} start: {found[system, start].place}", flush=True)
            shutil.rmtree(cache)
            for file in rows.glob("cache-*.arrow"):  # of TRL's maps
                file.unlink()
    tell_conditions(args, found, load)
    for name, value in report(found, args.rows).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
