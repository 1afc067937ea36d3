"""Whether sampler and learner compute the same: architectures x number formats x engines, at version 0 and later.

    tiny random model --> learner: publish --> engine: load, sample --> learner: step --> mean |difference| of age 0
                          ^------------------------ three updates ----------------------------'

python benchmarks/agreement_matrix.py [--models mixtral,gemma2] [--engines vllm] [--dtypes float32] [--again]

Each model has a process of its own, so that none of them can spoil another's engine. A cell is the mean |learner -
sampler| in nats over all sampled tokens, at version 0 and at version 3, and in brackets the same of a fixed text that
the engine scores. A model is `proved` where its cell is within the agreement rule, and an engine that had stayed at
version 0 would not be; what a run refuses before it starts is told in the words of the refusal.

Cells are kept in `results/agreement.jsonl` as they are measured, and are not measured again with the same versions of
torch, transformers and vLLM and the same configuration of the model; `results/agreement.md` is the table of all.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
UPDATES = 3
SEED = 0
ENGINES, DTYPES = ("transformers", "vllm"), ("float32", "bfloat16")
RULES = {"float32": (1e-3, 2e-4), "bfloat16": (0.2, 0.02)}
"""Largest mean |difference| in nats at version 0, and what later ones may always be: see `AgreementRule`."""
DEADLINE_S = 300.0
"""For one cell."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One model on one engine in one number format."""

    model: str
    engine: str
    dtype: str
    sampled: tuple[float, float] | None = None
    """Mean |difference| over sampled tokens at version 0 and after the updates, in nats."""
    scored: tuple[float, float] | None = None
    """The same over a fixed text."""
    stale: float | None = None
    """Mean |difference| over the fixed text that an engine would show which still ran version 0 after the updates."""
    problem: str | None = None
    """Why there are no figures."""
    measured_with: str = ""
    """Versions, seed and configuration: a cell with others is measured again."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells cells apart."""
        return self.model, self.engine, self.dtype

    @property
    def is_proved(self) -> bool:
        """Whether sampler and learner are one policy, and would be seen to be two."""
        if self.sampled is None or self.scored is None or self.stale is None:
            return False
        agrees = all(after <= self._limit(before) for before, after in (self.sampled, self.scored))
        return agrees and max(self.sampled[0], self.scored[0]) <= self._ceiling and self.raises_alarm

    @property
    def raises_alarm(self) -> bool:
        """Whether an engine that keeps old weights would be beyond the limit."""
        return self.stale is not None and self.scored is not None and self.stale > self._limit(self.scored[0])

    @property
    def _ceiling(self) -> float:
        return RULES[self.dtype][0]

    def _limit(self, before: float) -> float:
        ceiling, floor = RULES[self.dtype]
        return min(ceiling, max(floor, 4 * before))

    @property
    def verdict(self) -> str:
        """In a word, or in those of the refusal."""
        if self.sampled is None:
            return str(self.problem)
        return "proved" if self.is_proved else "WRONG"

    def __str__(self) -> str:
        return f"{self.model:20} {self.engine:13} {self.dtype:9} {self.figures} {self.verdict}"

    @property
    def figures(self) -> str:
        """At both versions, of sampled tokens and of the fixed text."""
        if self.sampled is None or self.scored is None:
            return ""
        before, after = zip(self.sampled, self.scored, strict=True)
        return (
            f"v0 {before[0]:.1e} ({before[1]:.1e})   v{UPDATES} {after[0]:.1e} ({after[1]:.1e})   "
            f"stale {self.stale:.1e}  "
        )


def cell_of(row: Mapping[str, Any]) -> Cell:
    """A cell from its JSON."""
    pairs = {name: tuple(row[name]) for name in ("sampled", "scored") if row[name] is not None}
    return Cell(**{**row, **pairs})


def measure(model: str, engine: str, dtype: str, folder: str, *, updates: int = UPDATES) -> Cell:
    """The figures of one model, which lies in a folder, or why there are none."""
    from trl_ray.errors import TrlRayError

    try:
        sampled, scored, stale = _measure(engine, dtype, folder, updates=updates)
    except TrlRayError as error:
        return Cell(model=model, engine=engine, dtype=dtype, problem=f"refused: {error}".replace(folder, model))
    except Exception as error:  # whatever a library does with an architecture that it cannot run is a finding
        problem = f"failed: {type(error).__name__}: {error}".replace("\n", " ")[:400]
        return Cell(model=model, engine=engine, dtype=dtype, problem=problem)
    return Cell(model=model, engine=engine, dtype=dtype, sampled=sampled, scored=scored, stale=stale)


def _measure(engine: str, dtype: str, folder: str, *, updates: int) -> tuple[Any, Any, float]:
    import numpy as np

    from trl_ray.actors.policy_learner import PolicyLearner
    from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch
    from trl_ray.config.losses.policy_options import LossConfig
    from trl_ray.config.sections import Dtype, ModelConfig, TrainingConfig
    from trl_ray.engines.factory import create_engine
    from trl_ray.models.loadable import check_loadable
    from trl_ray.models.runnable import check_runnable

    model = ModelConfig(model_name_or_path=folder, dtype=Dtype(dtype), gradient_checkpointing=False, bf16=False)
    check_loadable(model)
    check_runnable(model, engine, dtype=dtype)
    learner = PolicyLearner(
        model=model,
        training=TrainingConfig(learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0),
        loss=LossConfig(),
        total_updates=updates + 1,
    )
    text = np.frombuffer(b"Once upon a time there was a tokenizer that cut every word in two.", np.uint8)
    text = np.tile(text, 2).astype(np.int32)
    sampled, scored, sayings = [], [], []
    sampler = create_engine(engine, model=folder, dtype=dtype, max_model_len=256, max_num_seqs=16)
    try:
        for step in range(1, updates + 2):
            payload = learner.publish()
            assert payload is not None, "one rank publishes"
            sampler.load_weights(payload)
            said = sampler.score([text], deadline_s=300)[0]
            samples = _sample(sampler, step)
            sayings.append(said)
            learned = learner.weight_check(text).logprobs
            scored.append(float(np.abs(said - learned).mean()))
            stale = float(np.abs(sayings[0] - learned).mean())
            result = learner.step(train_batch(samples, step=step, rules=CutRules(max_samples=8)))
            sampled.append(result.metrics["agreement/age_0/abs_diff"].value)
    finally:
        sampler.close()
    return (sampled[0], sampled[-1]), (scored[0], scored[-1]), stale


def _sample(engine: Any, step: int) -> list[Any]:
    """Two completions of each of four prompts of different lengths, as samples with advantages of both signs."""
    import numpy as np

    from trl_ray.types import GenerationRequest, SamplingParams, TrainingSample

    prompts = [np.arange(3 + 20 * place, dtype=np.int32) * 7 % 250 for place in range(4)]
    requests = [
        GenerationRequest(
            request_id=str(place), prompt_ids=ids, n=2, sampling=SamplingParams(max_tokens=24), seed=step * 10 + place
        )
        for place, ids in enumerate(prompts)
    ]
    return [
        TrainingSample(
            group_id=place,
            prompt_ids=prompts[place],
            completion_ids=completion.token_ids,
            loss_mask=np.ones(len(completion.token_ids), np.bool_),
            sampler_logprobs=completion.logprobs,
            advantage=1.0 if index else -1.0,
            token_versions=np.full(len(completion.token_ids), step - 1, np.int32),
        )
        for place, future in enumerate(engine.submit(requests))
        for index, completion in enumerate(future.result(300))
    ]


def _of_one_model(model: str, engines: Sequence[str], dtypes: Sequence[str], said: str, results: Any) -> None:
    """In a process of its own: send the cells of one model."""
    words = os.open(said, os.O_WRONLY)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    from tiny_architectures import build_tiny_architecture

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_architecture(folder, model, seed=SEED)
        for engine in engines:
            for dtype in dtypes:
                results.send(measure(model, engine, dtype, folder))


def ask(model: str, engines: Sequence[str], dtypes: Sequence[str]) -> list[Cell]:
    """The cells of one model, from a process of its own."""
    context: Any = multiprocessing.get_context(_warm(engines))
    receiver, sender = context.Pipe(duplex=False)
    cells: list[Cell] = []
    with tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace") as said:
        process = context.Process(target=_of_one_model, args=(model, engines, dtypes, said.name, sender))
        process.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while receiver.poll(DEADLINE_S):
                cells.append(receiver.recv())
        process.kill()
        process.join()
        last = (said.read().strip().splitlines() or ["no word"])[-1]
    wanted = [(engine, dtype) for engine in engines for dtype in dtypes]
    problem = f"the process ended with {process.exitcode}: {last}"
    return cells + [
        Cell(model=model, engine=engine, dtype=dtype, problem=problem) for engine, dtype in wanted[len(cells) :]
    ]


def _warm(engines: Sequence[str]) -> str:
    """Import once what every process needs, and say how to start them: CUDA cannot be forked."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    import torch

    if torch.cuda.is_available():
        return "spawn"
    torch.set_num_threads(1)
    import trl_ray.actors.policy_learner
    import trl_ray.engines.transformers  # noqa: F401

    if "vllm" in engines and importlib.util.find_spec("vllm") is not None:
        from trl_ray.engines.vllm import prepare_environment

        prepare_environment(on_gpu=False)
        import vllm.v1.engine.llm_engine  # noqa: F401
    return "fork"


def circumstances(model: str) -> str:
    """What the figures of a model depend on, beside this repository's code."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_architectures import ARCHITECTURES

    digest = hashlib.sha256(repr(ARCHITECTURES[model]).encode()).hexdigest()[:8]
    return f"{versions()}, seed {SEED}, configuration {digest}"


def versions() -> str:
    """Of the libraries that compute."""
    installed = importlib.metadata.packages_distributions()  # vLLM for CPUs goes by another name
    found = []
    for module in ("torch", "transformers", "vllm"):
        names = installed.get(module)
        found.append(f"{module} {importlib.metadata.version(names[0])}" if names else f"no {module}")
    return ", ".join(found)


def read_cells(path: Path) -> dict[tuple[str, str, str], Cell]:
    """Those measured before, by key; of several with one key the last counts."""
    if not path.exists():
        return {}
    cells = [cell_of(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {cell.key: cell for cell in cells}


def write_results(cells: Mapping[tuple[str, str, str], Cell], order: Sequence[str], *, folder: Path) -> None:
    """Rows and table of all cells, in the order of the models."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [(model, engine, dtype) for model in order for engine in ENGINES for dtype in DTYPES]
    found = [cells[key] for key in keys if key in cells]
    rows = "".join(json.dumps(asdict(cell)) + "\n" for cell in found)
    (folder / "agreement.jsonl").write_text(rows, encoding="utf-8")
    (folder / "agreement.md").write_text(table(found), encoding="utf-8")


def table(cells: Sequence[Cell]) -> str:
    """The table in Markdown; refusals are told once, below it."""
    by_key = {cell.key: cell for cell in cells}
    columns = [(engine, dtype) for engine in ENGINES for dtype in DTYPES]
    reasons: dict[str, int] = {}
    lines = [
        "# Sampler and learner: mean |difference| in nats",
        "",
        f"{versions()}; tiny random models, seed {SEED}; sampled tokens at version 0 -> after {UPDATES} updates, and "
        "in brackets what an engine would show that had stayed at version 0.",
        f"Limits: float32 {RULES['float32'][0]:g} at version 0, then the larger of {RULES['float32'][1]:g} and 4 times "
        f"version 0; bfloat16 {RULES['bfloat16'][0]:g}, then the larger of {RULES['bfloat16'][1]:g} and 4 times "
        "version 0. Made by `python benchmarks/agreement_matrix.py`.",
        "",
        "| model | " + " | ".join(f"{engine} {dtype}" for engine, dtype in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for model in dict.fromkeys(cell.model for cell in cells):
        lines.append(
            f"| {model} | " + " | ".join(_entry(by_key.get((model, *column)), reasons) for column in columns) + " |"
        )
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _entry(cell: Cell | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return "not measured"
    if cell.sampled is None or cell.stale is None:
        reason = cell.verdict
        kind = "refused" if reason.startswith("refused: ") else "FAILED"
        return f"{kind} ({reasons.setdefault(reason.removeprefix('refused: '), len(reasons) + 1)})"
    wrong = "" if cell.is_proved else " WRONG"
    return f"{cell.sampled[0]:.0e} -> {cell.sampled[1]:.0e} ({cell.stale:.1g}){wrong}"


def complete(
    models: Sequence[str], engines: Sequence[str], dtypes: Sequence[str], *, order: Sequence[str], again: bool
) -> list[Cell]:
    """Measure what is missing of the cells that are asked for, and write results after every model."""
    cells = read_cells(RESULTS / "agreement.jsonl")
    for model in models:
        now = circumstances(model)
        for engine in engines:
            keys = {dtype: (model, engine, dtype) for dtype in dtypes}
            known = () if again else [key for key in keys.values() if key in cells and cells[key].measured_with == now]
            missing = [dtype for dtype, key in keys.items() if key not in known]
            if not missing:
                continue
            found = {cell.key: replace(cell, measured_with=now) for cell in ask(model, [engine], missing)}
            for cell in found.values():
                print(cell, flush=True)
            # Read again: another call may complete other columns meanwhile.
            cells = {**cells, **read_cells(RESULTS / "agreement.jsonl"), **found}
            write_results(cells, order, folder=RESULTS)
    return [cells[model, engine, dtype] for model in models for engine in engines for dtype in dtypes]


def main() -> None:
    """Complete the table and count."""
    sys.path.insert(0, str(ROOT / "tests"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="all", help="names of tests/tiny_architectures.py, or all")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    given = parser.parse_args()
    engines, dtypes = given.engines.split(","), given.dtypes.split(",")
    from tiny_architectures import ARCHITECTURES

    order = list(ARCHITECTURES)
    models = order if given.models == "all" else given.models.split(",")
    cells = complete(models, engines, dtypes, order=order, again=given.again)
    print(f"cells: {len(cells)}")
    print(f"proved: {sum(cell.is_proved for cell in cells)}")
    print(f"refused: {sum(str(cell.problem).startswith('refused: ') for cell in cells)}")
    print(f"wrong: {sum(cell.sampled is not None and not cell.is_proved for cell in cells)}")


if __name__ == "__main__":
    main()
