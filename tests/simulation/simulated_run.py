"""A whole run on a virtual clock: the package's queue, workers, actors and supervisor; engines, learner, network and
disk are simulated. One seed is one history.

    admit, train (as `RolloutLoop` does) -> RolloutActors, Supervisor -> RolloutQueue, RolloutWorker -> SimulatedEngine
    faults: calls; deaths of worker, queue, learner, driver; power cuts -> history.jsonl -> history_checker
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulation.faults import FaultPlan, Faults
from simulation.simulated_disk import KilledError, SimulatedDisk
from simulation.simulated_runtime import SimulatedHandle, SimulatedRuntime
from simulation.virtual_time import WedgedError, run_virtually
from trl_ray.actors import rollout_worker
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.runs.grpo_config import GRPOConfig
from trl_ray.config.sections import GenerationConfig, ModelConfig
from trl_ray.config.slot_bounds import SlotBounds
from trl_ray.errors import ActorLostError, DataError, DeadlineError, EngineError, LearnerLostError, TrlRayError
from trl_ray.pipelines.rollouts.rollout_actors import ActorArguments, RolloutActors
from trl_ray.pipelines.run.learner_actors import under_watch
from trl_ray.runtime.runtime import Role
from trl_ray.types import (
    ActorReport,
    Completion,
    EventKind,
    FinishReason,
    GenerationRequest,
    Health,
    Prompt,
    VersionSpan,
    WeightPayload,
    WeightVersion,
)
from trl_ray.wire.group_payload import decode_group
from trl_ray.wire.worker_news import GroupFinished

G = 2
_STUCK_S = 4000.0
"""A run without a step for this long is wedged; the longest outage it must live through is far shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One run."""

    seed: int
    plan: FaultPlan
    hours: float
    step_s: float = 20.0
    """Seconds the learner needs for a step."""
    generate_s: float = 12.0
    """Seconds an engine needs for a group, on average."""
    save_steps: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a run left behind."""

    rules: dict[str, Any]
    history: list[str]
    faults: dict[str, int]
    simulated_s: float


class SimulatedEngine:
    """Generates after a while; may hang, break, refuse, or cut its completions off."""

    max_num_seqs = 3 * G

    def __init__(self, run: SimulatedRun, worker: str) -> None:
        self._run, self._worker = run, worker
        self.version = WeightVersion(version=-1, checksum="")
        self.broken: str | None = None
        self._running: dict[int, tuple[Future[Any], list[tuple[int, str]]]] = {}

    @property
    def in_flight(self) -> int:
        return G * len(self._running)

    def submit(self, requests: Sequence[GenerationRequest]) -> list[Future[tuple[Completion, ...]]]:
        if self.broken:
            raise EngineError(self.broken)
        faults = self._run.faults
        if any(faults.happens(faults.plan.refusals, "refused group") for _ in requests):
            raise DataError("a prompt must fit the engine")
        return [self._begin(request) for request in requests]

    def _begin(self, request: GenerationRequest) -> Future[tuple[Completion, ...]]:
        run, future, serial = self._run, Future[Any](), next(self._run.serials)
        group_id, attempt = (int(part) for part in request.request_id.split("."))
        ordinal = int(request.prompt_ids[0])
        run.say(
            "sampled",
            group=group_id,
            attempt=attempt,
            serial=serial,
            prompt=f"0:{ordinal}",
            worker=self._worker,
            run=run.number,
        )
        self._running[serial] = (future, [(self.version.version, self.version.checksum)])
        seconds = run.faults.rng.expovariate(1 / run.scene.generate_s)
        asyncio.get_running_loop().call_later(1 + seconds, self._finish, serial)
        return future

    def _finish(self, serial: int) -> None:
        if serial not in self._running or self.broken:
            return
        future, versions = self._running.pop(serial)
        if future.done():
            return  # its worker has given up
        faults = self._run.faults
        cut_off = faults.happens(faults.plan.cut_off, "cut-off group")
        self._run.say("finished", serial=serial, versions=versions, cut_off=cut_off)
        reason = FinishReason.LENGTH if cut_off else FinishReason.STOP
        spans = tuple(
            VersionSpan(version=version, start=index, end=index + 1) for index, (version, _) in enumerate(versions)
        )
        one = Completion(
            token_ids=np.full(len(spans), serial, dtype=np.int32),
            logprobs=np.zeros(len(spans), dtype=np.float32),
            versions=spans,
            finish_reason=reason,
            text=str(serial),
        )
        future.set_result((one,) * G)

    def fail(self, why: str) -> None:
        """The engine is broken, and whatever runs in it fails."""
        self.broken, running, self._running = why, self._running, {}
        for future, _ in running.values():
            if not future.done():
                future.set_exception(EngineError(why))

    def load_weights(self, payload: WeightPayload) -> None:
        self.version = payload.identity
        for _, versions in self._running.values():
            versions.append((payload.identity.version, payload.identity.checksum))

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None:
        self._running.clear()


class SimulatedLearner:
    """Counts its steps; what it has trained on is the truth that the ledger is held against."""

    def __init__(self, run: SimulatedRun, checkpoint: int) -> None:
        self._run = run
        self.step_done = checkpoint
        self.checksum = run.checkpoints[checkpoint]

    async def step(self, *, step: int, groups: list[dict[str, Any]]) -> bool:
        """Train; whether the numbers were finite."""
        scene, faults = self._run.scene, self._run.faults
        await asyncio.sleep(scene.step_s * (0.5 + faults.rng.random()))
        assert step == self.step_done + 1
        skipped = faults.happens(faults.plan.skips, "skipped step")
        self.step_done, self.checksum = step, f"{self._run.number}.{next(self._run.serials)}"
        self._run.say("learned", step=step, skipped=skipped, checksum=self.checksum, groups=groups)
        return not skipped

    def save(self) -> str:
        """What a checkpoint of this step brings back."""
        return self.checksum

    def publish(self) -> WeightPayload:
        return WeightPayload(identity=self.identity(), manifest=(), buffer=np.zeros(0, np.uint8))

    def identity(self) -> WeightVersion:
        return WeightVersion(version=self.step_done, checksum=self.checksum)

    def health(self) -> Health:
        return Health(pid=id(self), progress=self.step_done, busy_since=None)

    def drain(self) -> ActorReport:
        return ActorReport()


class SimulatedRun:
    """Plays a scene and writes its history."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        rng = random.Random(scene.seed)
        self.rules = SlotBounds(
            groups_per_step=rng.choice([1, 2, 4]),
            max_staleness=rng.choice([0, 1, 2]),
            max_look_ahead=rng.choice([1, 3]),
        )
        self.max_attempts = rng.choice([2, 4])
        self.adaptive = rng.random() < 0.5
        self.faults, self.disk = Faults(scene.plan, rng), SimulatedDisk(rng)
        self.journal = folder / "journal.bin"
        self.history: list[str] = []
        self.serials = itertools.count(1)
        self.number = 0
        self.checkpoints = {0: ""}
        self.pulled = 0
        self.stepped_at = 0.0
        self.queue_broken: str | None = None

    # ---- history

    def say(self, event: str, /, **facts: Any) -> None:
        """One line of history."""
        now = asyncio.get_running_loop().time()
        self.history.append(json.dumps({"e": event, "t": round(now - 1_000_000.0, 4), **facts}))

    def _heard(self, handle: SimulatedHandle, method: str, kwargs: dict[str, Any], answer: Any) -> None:
        if method == "admit":
            self.say("admitted", ids=answer, names=[prompt.prompt_id for prompt in kwargs["prompts"]])
        elif method == "report":
            for news, outcome in zip(kwargs["news"], answer, strict=True):
                finished = isinstance(news, GroupFinished)
                kind = "commit" if finished else "other"
                drop = finished and news.all_cut_off
                self.say("told", group=news.group_id, attempt=news.attempt, kind=kind, outcome=outcome, drop=drop)
        elif method == "drain" and handle.role is Role.QUEUE:
            for event in answer.events:
                if event.kind is EventKind.GROUP_DROPPED:
                    detail = event.detail
                    self.say("dropped", group=detail["group_id"], attempt=detail["attempt"], reason=detail["reason"])

    # ---- actors

    def _make(self, role: Role, name: str, cls: type, /, **kwargs: Any) -> Any:
        if role is Role.LEARNER:
            return SimulatedLearner(self, int(kwargs["checkpoint"]))
        if role is Role.QUEUE:
            try:
                return RolloutQueue(**kwargs, clock=asyncio.get_running_loop().time)
            except KilledError:
                raise
            except Exception as error:
                self.queue_broken = f"{type(error).__name__}: {error}"
                raise
        engine = SimulatedEngine(self, name)
        rollout_worker.open_engine, kept = lambda **options: engine, rollout_worker.open_engine
        try:
            worker = cls(**kwargs)
        finally:
            rollout_worker.open_engine = kept
        return worker

    def _arguments(self, *, checkpoint: int, resuming: bool, incarnation: str, config: GRPOConfig) -> ActorArguments:
        return ActorArguments(
            learner={"checkpoint": str(checkpoint)},
            queue={
                "journal_path": str(self.journal),
                "groups_per_step": self.rules.groups_per_step,
                "max_staleness": self.rules.max_staleness,
                "max_look_ahead": self.rules.max_look_ahead,
                "max_attempts": self.max_attempts,
                "lease_s": config.rollout.lease_s,
                "drop_zero_variance": False,
                "mask_truncated": True,
                "adaptive_slots": self.adaptive,
                "resume_from_step": checkpoint if resuming else None,
                "resume_version": checkpoint if resuming else None,
                "incarnation": incarnation,
            },
            rollout={
                "model": ModelConfig(model_name_or_path="none"),
                "rollout": config.rollout,
                "generation": GenerationConfig(num_generations=G),
                "seed": self.scene.seed,
                "max_model_len": 64,
                "agreement": AgreementRule(ceiling=1.0, floor=1.0, is_exact=False),
            },
            reward=None,
        )

    # ---- the run

    async def play(self) -> Played:
        """Sessions, one after the other, until the last step is trained."""
        loop = asyncio.get_running_loop()
        begin = self.stepped_at = loop.time()
        end = begin + 3600 * self.scene.hours
        self.disk.kill_share = self.scene.plan.writes
        config = GRPOConfig(
            rollout={"num_workers": 2, "canary_every": 0, "lease_s": 60.0, "engine": "transformers"},
            runtime={"max_restarts": 1_000_000, "health_interval_s": 8.0, "health_deadline_s": 15.0},
        )
        resuming, at = False, 0
        with self.disk.installed():
            while True:
                self.number += 1
                session = Session(self, config, checkpoint=at, resuming=resuming, end=end)
                try:
                    ended = await session.run()
                except (TrlRayError, AssertionError, KeyError, ValueError, TypeError, WedgedError) as error:
                    self.say("crashed", why=f"{type(error).__name__}: {error}; queue: {self.queue_broken}")
                    break
                finally:
                    await session.close()
                if ended:
                    break
                resuming, at = True, self._choose_checkpoint()
                self.say("went_back", step=at)
        counts = {**self.faults.counts, "killed write": self.disk.kills, "power cut": self.disk.cuts}
        return Played(
            rules={
                "groups_per_step": self.rules.groups_per_step,
                "capacity": self.rules.capacity,
                "max_age_at_use": self.rules.max_age_at_use,
                "max_attempts": self.max_attempts,
            },
            history=self.history,
            faults={kind: count for kind, count in counts.items() if count},
            simulated_s=loop.time() - begin,
        )

    def _choose_checkpoint(self) -> int:
        newest, *older = sorted(self.checkpoints, reverse=True)
        damaged = older and self.faults.happens(self.scene.plan.damaged_checkpoints, "damaged checkpoint")
        at = older[0] if damaged else newest
        self.checkpoints = {step: saved for step, saved in self.checkpoints.items() if step <= at}
        return at


class Session:
    """From a checkpoint to the end, or to the loss of the learner or driver."""

    def __init__(self, run: SimulatedRun, config: GRPOConfig, *, checkpoint: int, resuming: bool, end: float) -> None:
        self._run, self._config, self._end = run, config, end
        self.step = self._saved = checkpoint
        self.runtime = SimulatedRuntime(run.faults, run._make, run._heard)
        self._arguments = run._arguments(
            checkpoint=checkpoint, resuming=resuming, incarnation=f"job-{run.number}", config=config
        )
        self.actors = RolloutActors(
            runtime=self.runtime,
            config=config,
            arguments=self._arguments,
            weight_check_ids=np.zeros(2, np.int32),
            emit=lambda event: None,
        )
        self._pulling: asyncio.Task[None] | None = None
        self._goal: int | None = None
        self._ended = False
        run.pulled = checkpoint

    async def run(self) -> bool:
        """Whether training came to its end; False when it must go on from a checkpoint."""
        watch = asyncio.create_task(self._watch())
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
                return False
            return await work
        except LearnerLostError:
            return False
        except (ActorLostError, DeadlineError):
            # A run whose patience with an actor ends says so, and is submitted again.
            self._run.faults.counts["patience ended"] += 1
            return False
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _work(self) -> bool:
        await self.actors.start()
        try:
            await under_watch(self.actors.supervisor, self._train(), self._admit())
        finally:
            if self._pulling is not None:
                self._pulling.cancel()
                await asyncio.gather(self._pulling, return_exceptions=True)
        return True

    async def close(self) -> None:
        await self.runtime.close()

    async def _ask(self, method: str, **kwargs: Any) -> Any:
        return await self.actors.ask_queue(method, **kwargs)

    # ---- as RolloutLoop does it

    @property
    def goal(self) -> int:
        """The last step: a few after the time is over, when faults have ended."""
        now = asyncio.get_running_loop().time()
        if self._goal is None and now >= self._end:
            self._run.faults.active = False
            self._run.disk.kill_share = 0.0
            self._goal = self.step + 3
        return self._goal if self._goal is not None else 1 << 30

    async def _admit(self) -> None:
        rules = self._run.rules
        while True:
            free = await self._ask("wait_for_slots", wait_s=10.0)
            snapshot = await self._ask("snapshot")
            count = min(free, (self.goal - snapshot.step) * rules.groups_per_step - snapshot.live_total)
            if count <= 0:
                await asyncio.sleep(0.25 if free else 0)
                continue
            first = await self._ask("next_ordinal")
            prompts = [
                Prompt(prompt_id=f"0:{n}", token_ids=np.array([n], np.int32), text="say", columns={})
                for n in range(first, first + count)
            ]
            self._run.say("admitting", names=[prompt.prompt_id for prompt in prompts])
            await self._ask("admit", prompts=prompts, version=self._run.pulled)

    async def _train(self) -> None:
        while self.step < self.goal:
            await self._train_step(self.step + 1)
        self.step_done = True
        if self._pulling is not None:
            await self._pulling
        snapshot = await self._ask("finish")
        await self._ask("check")
        self._say_balance("ended", snapshot, goal=self.step)

    async def _train_step(self, step: int) -> None:
        groups = await self._take(step)
        trained = await self.actors.learner.ask("step", step=step, groups=groups)
        await self._ask("trained" if trained else "skip", step=step)
        self.step = step
        self._run.stepped_at = asyncio.get_running_loop().time()
        await self._publish(step)
        await self.actors.drain()
        snapshot: LedgerSnapshot = await self._ask("snapshot")
        self._say_balance("balance", snapshot, final=self._goal is not None)
        if step % self._run.scene.save_steps == 0:
            await self._save(step)

    async def _take(self, step: int) -> list[dict[str, Any]]:
        while True:
            stored = await self._ask("take_stored", n=self._run.rules.groups_per_step, step=step, wait_s=10.0)
            if stored:
                break
            if self._pulling is not None and self._pulling.done():
                self._pulling.result()
        groups = [decode_group(payload) for payload in stored]
        facts = [
            {
                "group": group.ticket.group_id,
                "attempt": group.ticket.attempt,
                "serial": int(group.completions[0].token_ids[0]),
                "prompt": group.ticket.prompt.prompt_id,
            }
            for group in groups
        ]
        self._run.say("took", step=step, groups=facts)
        return facts

    async def _publish(self, step: int) -> None:
        if self._pulling is not None:
            await self._pulling
        identity = await self.actors.publish(step=step)
        self._pulling = asyncio.create_task(self._pull(step, identity.version))
        if self._run.rules.max_staleness == 0:
            await self._pulling

    async def _pull(self, step: int, version: int) -> None:
        await self.actors.pull()
        self._run.pulled = version
        await self._ask("release", step=step, wait_s=self._run.faults.rng.random(), step_s=10.0)

    async def _save(self, step: int) -> None:
        checksum = await self.actors.learner.ask("save")
        kept = sorted(self._run.checkpoints)[-1:]
        self._run.checkpoints = {each: self._run.checkpoints[each] for each in kept} | {step: checksum}
        self._run.say("saved", step=step)
        await self._ask("checkpoint", step=self._saved, saved=step)
        self._saved = step

    def _say_balance(self, event: str, snapshot: LedgerSnapshot, **facts: Any) -> None:
        self._run.say(
            event,
            issued=snapshot.issued,
            trained=snapshot.trained,
            dropped=dict(snapshot.dropped),
            live=dict(snapshot.live),
            step=snapshot.step,
            **facts,
        )

    # ---- what goes wrong

    async def _watch(self) -> None:
        """Ends when the driver dies; raises when nothing moves any more."""
        plan, faults = self._run.scene.plan, self._run.faults
        loop = asyncio.get_running_loop()
        kinds = {
            "worker": plan.worker_every_s,
            "queue": plan.queue_every_s,
            "learner": plan.learner_every_s,
            "driver": plan.driver_every_s,
        }
        due = {kind: loop.time() + faults.pause_s(mean) for kind, mean in kinds.items() if mean > 0}
        while True:
            await asyncio.sleep(1.0)
            if self._run.queue_broken is not None:
                raise WedgedError(f"the queue cannot be rebuilt: {self._run.queue_broken}")
            if loop.time() - self._run.stepped_at > _STUCK_S:
                raise WedgedError(f"no step for {_STUCK_S:.0f} s: {await self._why()}")
            for kind in [kind for kind, at in due.items() if at <= loop.time() and faults.active]:
                due[kind] = loop.time() + faults.pause_s(kinds[kind])
                if kind == "driver":
                    return self._lose_driver()
                self._lose(kind)

    async def _why(self) -> str:
        with suppress(TrlRayError, TimeoutError):
            return str(await self._ask("describe_wait", n=self._run.rules.groups_per_step))
        return "the queue does not answer"

    def _lose_driver(self) -> None:
        faults = self._run.faults
        faults.counts["driver killed"] += 1
        for process in list(self.runtime.processes):
            process.end()
        if faults.rng.random() < 0.5:
            self._run.disk.cut_power(self._run.journal)
            self._run.say("power_cut")

    def _lose(self, kind: str) -> None:
        faults, rng = self._run.faults, self._run.faults.rng
        processes = self.runtime.of({"worker": Role.ROLLOUT, "queue": Role.QUEUE, "learner": Role.LEARNER}[kind])
        if not processes:
            return
        process = rng.choice(processes)
        how = rng.choice(["killed", "hangs", "breaks"] if kind == "worker" else ["killed", "killed", "hangs"])
        faults.counts[f"{kind} {how}"] += 1
        if how == "killed":
            process.kill()
        elif how == "hangs":
            process.hang(rng.choice([3.0, 40.0, 200.0]))
        else:
            process.instance._engine.fail("no step finished")


def play(scene: Scene, folder: Path) -> Played:
    """Play a scene from its beginning."""
    run = SimulatedRun(scene, folder)
    return run_virtually(run.play, seed=scene.seed)


def quieter(plan: FaultPlan, factor: float) -> FaultPlan:
    """The same with fewer faults of every kind."""
    return replace(
        plan,
        calls=plan.calls * factor,
        worker_every_s=plan.worker_every_s / factor,
        queue_every_s=plan.queue_every_s / factor,
    )
