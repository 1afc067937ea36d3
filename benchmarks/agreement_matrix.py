"""Whether sampler and learner compute the same: architectures x number formats x engines, at version 0 and later.

    tiny random model --> learner: publish --> engine: load, sample --> learner: step --> mean |difference| of age 0
                          ^------------------------ three updates ----------------------------'

python benchmarks/agreement_matrix.py [--models mixtral,gemma2] [--engines vllm] [--dtypes float32]

Each model has a process of its own, so that none of them can spoil another's engine. A cell is the mean |learner -
sampler| in nats over all sampled tokens, at version 0 and at version 3, and in brackets the same of a fixed text that
the engine scores. A model is `proved` where its cell is within the agreement rule; what a run refuses before it starts
is told in the words of the refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
UPDATES = 3
ENGINES, DTYPES = ("transformers", "vllm"), ("float32", "bfloat16")
RULES = {"float32": (1e-3, 2e-4), "bfloat16": (0.2, 0.02)}
"""Largest mean |difference| in nats at version 0, and what later ones may always be: see `AgreementRule`."""
_MARK = "agreement: "


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
    problem: str | None = None
    """Why there are no figures."""

    @property
    def is_proved(self) -> bool:
        """Whether sampler and learner are one policy."""
        if self.sampled is None or self.scored is None:
            return False
        ceiling, floor = RULES[self.dtype]
        return all(
            before <= ceiling and after <= min(ceiling, max(floor, 4 * before))
            for before, after in (self.sampled, self.scored)
        )

    def __str__(self) -> str:
        if self.sampled is None or self.scored is None:
            return f"{self.model:16} {self.engine:13} {self.dtype:9} {self.problem}"
        before, after = zip(self.sampled, self.scored, strict=True)
        verdict = "proved" if self.is_proved else "WRONG"
        return (
            f"{self.model:16} {self.engine:13} {self.dtype:9} v0 {before[0]:.1e} ({before[1]:.1e})   "
            f"v{UPDATES} {after[0]:.1e} ({after[1]:.1e})   {verdict}"
        )


def measure(model: str, engine: str, dtype: str, folder: str, *, updates: int = UPDATES) -> Cell:
    """The figures of one model, which lies in a folder, or why there are none."""
    from trl_ray.errors import TrlRayError

    try:
        sampled, scored = _measure(engine, dtype, folder, updates=updates)
    except TrlRayError as error:
        return Cell(model=model, engine=engine, dtype=dtype, problem=f"refused: {error}".replace(folder, model))
    except Exception as error:  # whatever a library does with an architecture that it cannot run is a finding
        problem = f"failed: {type(error).__name__}: {error}".replace("\n", " ")[:400]
        return Cell(model=model, engine=engine, dtype=dtype, problem=problem)
    return Cell(model=model, engine=engine, dtype=dtype, sampled=sampled, scored=scored)


def _measure(engine: str, dtype: str, folder: str, *, updates: int) -> tuple[Any, Any]:
    import numpy as np

    from trl_ray.actors.policy_learner import PolicyLearner
    from trl_ray.algorithms.batches.micro_batches import CutRules, train_batch
    from trl_ray.config.losses.policy_options import LossConfig
    from trl_ray.config.sections import Dtype, ModelConfig, TrainingConfig
    from trl_ray.engines.factory import create_engine
    from trl_ray.models.runnable import check_runnable

    model = ModelConfig(model_name_or_path=folder, dtype=Dtype(dtype), gradient_checkpointing=False, bf16=False)
    check_runnable(model, engine, dtype=dtype)
    learner = PolicyLearner(
        model=model,
        training=TrainingConfig(learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0),
        loss=LossConfig(),
        total_updates=updates + 1,
    )
    text = np.frombuffer(b"Once upon a time there was a tokenizer that cut every word in two.", np.uint8)
    text = np.tile(text, 2).astype(np.int32)
    sampled, scored = [], []
    sampler = create_engine(engine, model=folder, dtype=dtype, max_model_len=256, max_num_seqs=16)
    try:
        for step in range(1, updates + 2):
            payload = learner.publish()
            assert payload is not None, "one rank publishes"
            sampler.load_weights(payload)
            said = sampler.score([text], deadline_s=300)[0]
            samples = _sample(sampler, step)
            scored.append(float(np.abs(said - learner.weight_check(text).logprobs).mean()))
            result = learner.step(train_batch(samples, step=step, rules=CutRules(max_samples=8)))
            sampled.append(result.metrics["agreement/age_0/abs_diff"].value)
    finally:
        sampler.close()
    return (sampled[0], sampled[-1]), (scored[0], scored[-1])


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


def _of_one_model(model: str, engines: Sequence[str], dtypes: Sequence[str]) -> None:
    """In a process of its own: print the cells of one model as JSON."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    from tiny_architectures import build_tiny_architecture

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_architecture(folder, model)
        for engine in engines:
            for dtype in dtypes:
                print(_MARK + json.dumps(asdict(measure(model, engine, dtype, folder))), flush=True)


def _ask(model: str, engines: Sequence[str], dtypes: Sequence[str]) -> list[Cell]:
    """The cells of one model, from a process of its own."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ}
    options = ["--engines", ",".join(engines), "--dtypes", ",".join(dtypes)]
    done = subprocess.run(
        [sys.executable, __file__, "--one", model, *options], capture_output=True, text=True, env=environment
    )
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    cells = [Cell(**json.loads(line)) for line in lines]
    wanted = [(engine, dtype) for engine in engines for dtype in dtypes]
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    lost = [
        Cell(model=model, engine=engine, dtype=dtype, problem=f"the process ended with {done.returncode}: {last}")
        for engine, dtype in wanted[len(cells) :]
    ]
    return cells + lost


def main() -> None:
    """Print the table."""
    sys.path.insert(0, str(ROOT / "tests"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="all", help="names of tests/tiny_architectures.py, or all")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    engines, dtypes = given.engines.split(","), given.dtypes.split(",")
    if given.one:
        _of_one_model(given.one, engines, dtypes)
        return
    from tiny_architectures import ARCHITECTURES

    models = list(ARCHITECTURES) if given.models == "all" else given.models.split(",")
    cells: list[Cell] = []
    for model in models:
        found = _ask(model, engines, dtypes)
        cells += found
        for cell in found:
            print(cell, flush=True)
    print(f"cells: {len(cells)}")
    print(f"proved: {sum(cell.is_proved for cell in cells)}")
    print(f"wrong: {sum(cell.sampled is not None and not cell.is_proved for cell in cells)}")


if __name__ == "__main__":
    main()
