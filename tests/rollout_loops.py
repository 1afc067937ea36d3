"""A loop over rollouts whose queue, workers and learner are fakes: they answer at once, and write down what happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from callbacks_for_tests import Diary
from dataset_loops import Watch
from fakes import completion, group, health, prompt, reward
from objectives import objective_of
from trl_ray.actors.rollout_worker import EvaluatedPrompt
from trl_ray.algorithms.batches.micro_batches import CutRules
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.config.runs.grpo_config import AsyncGRPOConfig
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.sinks import EventsFile, MetricsFile, Observer
from trl_ray.pipelines.callbacks.hooks import CallbackList
from trl_ray.pipelines.rollouts.agreement_check import Evidence
from trl_ray.pipelines.rollouts.preparation import Preparation
from trl_ray.pipelines.rollouts.rollout_loop import RolloutLoop
from trl_ray.pipelines.run.recording import Recorder
from trl_ray.pipelines.run.session import Opening
from trl_ray.pipelines.run.signals import Stop
from trl_ray.rewards.scoring import ScoredGroup
from trl_ray.runtime.local import LocalRuntime
from trl_ray.runtime.weights import WeightTransport
from trl_ray.types import ActorReport, Event, Metric, Reduce, StepResult, WeightVersion
from trl_ray.wire.group_payload import encode_group


def config(**changes: Any) -> AsyncGRPOConfig:
    """Two groups of two completions a step; the pull goes on beside the next step."""
    values: dict[str, Any] = {
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_staleness": 1,
        "save_steps": 0,
        "rollout": {"num_workers": 1},
        "runtime": {"kind": "local"},
    }
    return AsyncGRPOConfig(**{**values, **changes})


class Prompts:
    """As many prompts as two steps take; each is written down when it is asked for."""

    def __init__(self, log: list[str], num_left_out: int = 0) -> None:
        self._log, self.num_left_out = log, num_left_out

    def __len__(self) -> int:
        return 4

    def take(self, first: int, count: int) -> list[Any]:
        ordinals = range(first, first + count)
        self._log.extend(f"prompt {ordinal}" for ordinal in ordinals)
        return [prompt(ordinal) for ordinal in ordinals]

    def epochs_after(self, count: int) -> float:
        return count / len(self)

    def news(self) -> tuple[str, ...]:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {}


@dataclass(slots=True, eq=False)
class Actors:
    """All actors of a run; a pull takes until `may_pull` is set."""

    log: list[str]
    skips: frozenset[int] = frozenset()
    failed: Mapping[int, list[Event]] = field(default_factory=dict)
    """What the n-th call of `drain` tells."""
    on_step: Callable[[int], None] = lambda step: None
    restarts: int = 0
    poll_s: float = 0.0
    """What each call of the queue takes."""
    asked: int = 0
    """Calls of the queue; it is never idle."""
    delivers: bool = True
    """Whether the workers finish any group."""
    pull_fails: Exception | None = None
    may_pull: asyncio.Event = field(default_factory=asyncio.Event)
    may_save: asyncio.Event = field(default_factory=asyncio.Event)
    on_evaluate: Callable[[], Any] = lambda: asyncio.sleep(0)
    """Is waited for before held-out prompts are answered."""
    supervisor: Watch = field(default_factory=Watch)
    files: dict[int, Mapping[str, bytes]] = field(default_factory=dict)
    averages: bool = False
    """Whether there is a teacher to be saved with checkpoints."""
    adopted: dict[int, Mapping[str, str]] = field(default_factory=dict)
    admitted: int = 0
    step: int = 0
    drained: int = 0
    teachers: Any = None
    evidence: Evidence = field(default_factory=Evidence)
    sampled: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """What the learner finds on the tokens of age 0, by step."""
    weights: Any = None

    def __post_init__(self) -> None:
        self.may_pull.set()
        self.may_save.set()
        self.weights = WeightTransport(weight_check_ids=np.arange(3), weight_check_every=1, deadline_s=60)
        self.teachers = SimpleNamespace(save=self._save_average, checkpoint=None)

    @property
    def learner(self) -> Any:
        return SimpleNamespace(ask=self._ask_learner)

    async def _save_average(self, folder: Path) -> bool:
        self.log.append(f"average to {folder.name}")
        return self.averages

    @property
    def working(self) -> tuple[Any, ...]:
        async def call(method: str, share: Any, **kwargs: Any) -> list[EvaluatedPrompt]:
            self.log.append(f"{method} by version {self.step}")
            await self.on_evaluate()
            scored = ScoredGroup(rewards=(reward(1.0),))
            return [EvaluatedPrompt(prompt=each, completions=(completion(),), scored=scored) for each in share]

        return (SimpleNamespace(call=call),)

    async def ask_worker(self, handle: Any, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        return await handle.call(method, *args, **kwargs)

    async def ask_queue(self, method: str, **kwargs: Any) -> Any:
        self.asked += 1
        await asyncio.sleep(self.poll_s)
        while method == "take_stored" and self.delivers and self.admitted < 2 * kwargs["step"]:
            await asyncio.sleep(0)
        return getattr(self, f"_{method}", lambda **given: self.log.append(f"{method} {given.get('step', '')}"))(
            **kwargs
        )

    async def publish(self, *, step: int) -> WeightVersion:
        self.log.append(f"publish {step}")
        return WeightVersion(version=step, checksum="c")

    async def pull(self) -> None:
        self.log.append("pull begins")
        await self.may_pull.wait()
        if self.pull_fails is not None:
            raise self.pull_fails
        self.log.append("pull ends")

    async def drain(self) -> ActorReport:
        self.drained += 1
        return ActorReport(events=self.failed.get(self.drained, []))

    def _wait_for_slots(self, *, wait_s: float) -> int:
        return 4

    def _snapshot(self) -> LedgerSnapshot:
        live = {"ready": self.admitted - 2 * self.step}
        return LedgerSnapshot(
            issued=self.admitted,
            trained=2 * self.step,
            dropped={},
            live=live,
            fenced=0,
            reissued=0,
            step=self.step,
            version=self.step,
        )

    def _next_ordinal(self) -> int:
        return self.admitted

    def _admit(self, *, prompts: list[Any], version: int) -> None:
        self.admitted += len(prompts)
        self.log.append(f"admit {len(prompts)} at version {version}")

    def _take_stored(self, *, n: int, step: int, wait_s: float) -> list[bytes]:
        numbers = range(n * (step - 1), n * step) if self.delivers else ()
        return [encode_group(group(number, version=step - 1)) for number in numbers]

    def _trained(self, *, step: int) -> None:
        self.step = step
        self.log.append(f"trained {step}")

    def _skip(self, *, step: int) -> None:
        self.step = step
        self.log.append(f"skip {step}")

    def _slots(self) -> int:
        return 4

    def _health(self) -> Any:
        return replace(health(), progress=self.asked)

    def _describe_wait(self, *, n: int) -> str:
        return "rollout-0"

    async def _ask_learner(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "save":
            await self.may_save.wait()
            self.files[kwargs["step"]], self.adopted[kwargs["step"]] = kwargs["extra"], kwargs["adopt"]
            self.log.append(f"save {kwargs['step']}")
            Path(*args, f"step-{kwargs['step']}").mkdir()
            return None
        [batch] = args
        assert method == "step"
        self.on_step(batch.step)
        tokens = Metric(value=batch.num_valid_tokens, reduce=Reduce.SUM)
        skipped = batch.step in self.skips
        found = {f"agreement/age_0/{name}": Metric(value=v) for name, v in self.sampled.get(batch.step, {}).items()}
        metrics = {"tokens/trained": tokens, **found}
        return StepResult(version=batch.step, loss=0.5, grad_norm=1.0, lr=0.1, skipped=skipped, metrics=metrics)


class RolloutRun:
    """One loop, and what it left behind."""

    def __init__(
        self, path: Path, *, total: int = 4, callbacks: tuple[Any, ...] = (), left_out: int = 0, **changes: Any
    ) -> None:
        self._left_out = left_out
        self.path, self.log, self.stop = path / "run", list[str](), Stop()
        self.actors = Actors(self.log)
        self.diary = Diary(book=self.log)
        self._config, self._total = config(**changes), total
        self._callbacks = CallbackList([self.diary, *callbacks], args=self._config)

    def loop(self) -> RolloutLoop:
        directory = RunDirectory.create(self.path, overwrite=True)
        observer = Observer([MetricsFile(directory.metrics), EventsFile(directory.events)])
        prompts: Any = Prompts(self.log, self._left_out)
        plan = Preparation(
            config=self._config,
            prompts=prompts,
            eval_sets={"": (prompt(90),)},
            rewards=(),
            max_model_len=64,
            total_steps=self._total,
            weight_check_ids=np.arange(3, dtype=np.int32),
            first_check_ids=(),
            cut=CutRules(max_samples=4),
            objective=objective_of(self._config),
            pad_token_id=0,
        )
        opening = Opening(
            runtime=LocalRuntime(),
            directory=directory,
            observer=observer,
            checkpoint=None,
            step=0,
            resuming=False,
            callbacks=self._callbacks,
        )
        recorder = Recorder(directory=directory, observer=observer, max_age_at_use=1, start_step=0)
        actors: Any = self.actors
        return RolloutLoop(plan=plan, actors=actors, recorder=recorder, opening=opening, stop=self.stop)

    def go(self) -> RolloutRun:
        asyncio.run(asyncio.wait_for(self.loop().run(), timeout=60))
        return self

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]

    def logged(self, *begins: str) -> list[str]:
        """What was written down, of these kinds."""
        return [line for line in self.log if line.startswith(begins)]
