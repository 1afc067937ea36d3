"""Measures what carries groups: ledger and journal in one process, the queue through Ray, and a restart's replay.

    ledger   admit -> lease -> report -> take -> trained -> release; payloads made before, nothing else
    ray      the same on Ray: driver, RolloutQueue and two RolloutWorkers; engines answer at once, learner at once
    replay   a journal of many groups, written in one go and opened again

    groups/s = groups trained / seconds; P groups a step, a checkpoint every --save-steps steps

The share of each call is its part of the seconds; of processes, how much of the time they had a CPU. Where other
processes want the CPUs too, groups per CPU second say more. Through Ray, completions are drawn once and then repeated,
while every group is encoded, sent, stored, read and decoded by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trl_ray.actors import rollout_queue, rollout_worker
from trl_ray.actors.rollout_queue import RolloutQueue
from trl_ray.actors.rollout_worker import RolloutWorker
from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules
from trl_ray.buffer.news import News, NewsKind
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.sections import GenerationConfig, ModelConfig, RolloutConfig, RuntimeConfig
from trl_ray.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    GroupTicket,
    Prompt,
    Reward,
    RolloutGroup,
    VersionSpan,
    WeightVersion,
)
from trl_ray.wire.group_payload import decode_group, encode_group, encode_prompt

CALLS = ("admit", "lease", "report", "take", "payload", "trained", "sync", "release", "checkpoint")
"""Of the ledger, whose share is told."""
WAIT_S = 2.0


class Stopwatch:
    """Seconds in the functions it was put around, by name; one in another counts for both."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return timed

    def watch(self, owner: Any, names: Sequence[str]) -> None:
        """Put it around functions of an object or module."""
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, self.around(name, getattr(owner, name)))


# What travels ------------------------------------------------------------------------------------------------------


def make_prompt(index: int, *, tokens: int) -> Prompt:
    """A conversation with one message, about four letters a token."""
    return Prompt(
        prompt_id=f"0:{index}",
        token_ids=np.arange(tokens, dtype=np.int32),
        messages=({"role": "user", "content": "what " * tokens},),
        columns={"answer": str(index)},
    )


def make_completions(*, count: int, tokens: int, version: int) -> tuple[Completion, ...]:
    """Completions of one group."""
    rng = np.random.default_rng(0)
    return tuple(
        Completion(
            token_ids=rng.integers(0, 50_000, tokens, dtype=np.int32),
            logprobs=rng.normal(size=tokens).astype(np.float32),
            versions=(VersionSpan(version=version, start=0, end=tokens),),
            finish_reason=FinishReason.STOP,
            text="so be " * (2 * tokens // 3),
        )
        for _ in range(count)
    )


def make_payload(args: argparse.Namespace) -> bytes:
    """One finished group as the journal stores it."""
    ticket = GroupTicket(group_id=0, attempt=0, prompt=make_prompt(0, tokens=args.prompt_length), admitted_at_version=0)
    completions = make_completions(count=args.completions, tokens=args.length, version=0)
    rewards = tuple(Reward(total=float(i), parts={"accuracy": float(i)}) for i in range(args.completions))
    return encode_group(RolloutGroup(ticket=ticket, completions=completions, rewards=rewards, worker="rollout-0"))


# The ledger alone --------------------------------------------------------------------------------------------------


def rules_of(args: argparse.Namespace) -> BufferRules:
    """Of the run that is measured."""
    return BufferRules(groups_per_step=args.groups_per_step, max_staleness=args.max_staleness, lease_s=60.0)


def run_ledger(store: DurableLedger, args: argparse.Namespace, payload: bytes, prompt: bytes, steps: int) -> None:
    """So many steps, with a checkpoint every `save_steps` and the one before made final, as pipelines do it."""
    p, saved = args.groups_per_step, 0
    for step in range(1, steps + 1):
        first, free, now = store.next_ordinal, store.slots.free, float(step)
        names = [f"0:{n}" for n in range(first, first + free)]
        store.admit(prompt_ids=names, prompts=[prompt] * free, version=step - 1, now=now)
        for worker in ("rollout-0", "rollout-1"):
            finish_leases(store, worker, count=-(-free // 2), version=step - 1, payload=payload, now=now)
        for group_id in store.take(count=p, step=step, now=now):
            store.payload(group_id)
        store.trained(step=step, now=now)
        store.release(step=step, wait_s=0.0, step_s=1.0)
        if args.save_steps and step % args.save_steps == 0:
            store.checkpoint(step=saved, saved=step)
            saved = step


def finish_leases(store: DurableLedger, worker: str, *, count: int, version: int, payload: bytes, now: float) -> None:
    """Lease, and commit what was leased, as many in a call as a worker would."""
    keys = store.lease(worker=worker, count=count, now=now, version=version)
    generated = [News(kind=NewsKind.GENERATED, group_id=key.group_id, attempt=key.attempt) for key in keys]
    store.report(news=generated, now=now)
    committed = [
        replace(each, kind=NewsKind.COMMITTED, min_version=version, max_version=version, payload=payload)
        for each in generated
    ]
    store.report(news=committed, now=now)


def measure_ledger(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Groups/s of ledger and journal, and the share of each call."""
    payload, prompt = make_payload(args), encode_prompt(make_prompt(0, tokens=args.prompt_length))
    store = DurableLedger(path=folder / "ledger", rules=rules_of(args), incarnation="one", now=0.0)
    watch = Stopwatch()
    watch.watch(store, CALLS)
    begin, cpu = time.perf_counter(), time.process_time()
    run_ledger(store, args, payload, prompt, args.steps)
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    store.close()
    groups = args.steps * args.groups_per_step
    shares = {f"ledger_share_{name}": watch.seconds[name] / seconds for name in CALLS}
    return {
        "payload_bytes": len(payload),
        "prompt_bytes": len(prompt),
        "ledger_groups": groups,
        **shares,
        "ledger_share_rest": 1 - sum(shares.values()) + shares["ledger_share_sync"],  # which is part of trained
        "ledger_groups_per_cpu_s": groups / cpu_s,
        "ledger_groups_per_s": groups / seconds,
    }


def measure_replay(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds to open the journal of many groups that no checkpoint has shortened yet."""
    payload = make_payload(args)[: args.replay_payload]
    prompt = encode_prompt(make_prompt(0, tokens=args.prompt_length))
    without = argparse.Namespace(**{**vars(args), "save_steps": 0})
    steps = -(-args.replay_groups // args.groups_per_step)
    path = folder / "replay"
    with contextlib.closing(DurableLedger(path=path, rules=rules_of(args), incarnation="one", now=0.0)) as store:
        run_ledger(store, without, payload, prompt, steps)
        before = store.snapshot()
    size = path.stat().st_size
    begin, cpu = time.perf_counter(), time.process_time()
    with contextlib.closing(DurableLedger(path=path, rules=rules_of(args), incarnation="one", now=0.0)) as store:
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
        assert store.snapshot() == before
    groups = steps * args.groups_per_step
    return {
        "replay_groups": groups,
        "replay_payload_bytes": len(payload),
        "replay_journal_mb": size / 1e6,
        "replay_cpu_s": cpu_s,
        "replay_s": seconds,
        "replay_groups_per_s": groups / seconds,
    }


# Through Ray -------------------------------------------------------------------------------------------------------


class InstantEngine:
    """An engine whose completions are there at once; it holds none back, so it has always room."""

    broken = None
    in_flight = 0

    def __init__(self, *, groups: int, completions: int, tokens: int) -> None:
        self.max_num_seqs = groups * completions
        self._completions = make_completions(count=completions, tokens=tokens, version=0)
        self.version = WeightVersion(version=0, checksum="")

    def submit(self, requests: Sequence[GenerationRequest]) -> list[Future[tuple[Completion, ...]]]:
        """Sampled by the version pulled last."""
        futures: list[Future[tuple[Completion, ...]]] = [Future() for _ in requests]
        versions = (VersionSpan(version=self.version.version, start=0, end=len(self._completions[0].token_ids)),)
        for future in futures:
            future.set_result(tuple(replace(each, versions=versions) for each in self._completions))
        return futures

    def close(self) -> None:
        """Nothing to free."""


class InstantWorker(RolloutWorker):
    """A rollout worker that generates in no time, and pulls a version by its number."""

    def __init__(self, *, groups: int, completions: int, tokens: int, **kwargs: Any) -> None:
        rollout_worker.open_engine = lambda **options: InstantEngine(  # type: ignore[assignment]
            groups=groups, completions=completions, tokens=tokens
        )
        super().__init__(**kwargs)

    async def use(self, version: int) -> None:
        """In place of `pull`."""
        self._engine.version = WeightVersion(version=version, checksum="")  # type: ignore[misc]

    def cpu_s(self) -> float:
        """CPU seconds of this process."""
        return time.process_time()


class TimedQueue(RolloutQueue):
    """A queue that knows what its process is busy with."""

    def __init__(self, **kwargs: Any) -> None:
        self.watch = Stopwatch()
        self.watch.watch(
            rollout_queue, ("encode_group", "decode_group", "encode_prompt", "decode_prompt", "encode_prompts")
        )
        super().__init__(**kwargs)
        self.watch.watch(self._store, CALLS)

    def busy(self) -> dict[str, float]:
        """CPU seconds of the process, and seconds by call."""
        return {"cpu": time.process_time(), **self.watch.seconds}


async def admit(queue: Any, args: argparse.Namespace, pulled: list[int], total: int) -> None:
    """As `RolloutLoop` does it."""
    while True:
        free = await ask(queue, "wait_for_slots", wait_s=WAIT_S)
        snapshot = await ask(queue, "snapshot")
        count = min(free, (total - snapshot.step) * args.groups_per_step - snapshot.live_total)
        if count <= 0:
            await asyncio.sleep(0.25 if free else 0)
            continue
        first = await ask(queue, "next_ordinal")
        prompts = [make_prompt(first + index, tokens=args.prompt_length) for index in range(count)]
        await ask(queue, "admit", prompts=prompts, version=pulled[0])


async def ask(handle: Any, method: str, **kwargs: Any) -> Any:
    """A call with a deadline."""
    return await handle.call(method, deadline_s=60.0, **kwargs)


async def train(queue: Any, workers: Sequence[Any], pulled: list[int], p: int, steps: range) -> None:
    """Take, learn nothing, let the workers pull."""
    for step in steps:
        while not await take(queue, p, step):
            pass
        await ask(queue, "trained", step=step)
        await asyncio.gather(*(ask(worker, "use", version=step) for worker in workers))
        pulled[0] = step
        await ask(queue, "release", step=step, wait_s=0.0, step_s=1.0)


async def take(queue: Any, p: int, step: int) -> Sequence[RolloutGroup]:
    """As the driver has them."""
    stored = await ask(queue, "take_stored", n=p, step=step, wait_s=WAIT_S)
    return [decode_group(payload) for payload in stored]


async def run_ray(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Groups/s through Ray, and what each process was busy with."""
    from trl_ray.runtime.cluster import RayRuntime
    from trl_ray.runtime.remote import plan_actors
    from trl_ray.runtime.runtime import Role

    rollout = RolloutConfig(num_workers=args.workers, num_cpus=0.0)
    config = RuntimeConfig(learner_num_cpus=0.0)
    runtime = RayRuntime(config, plan_actors(runtime=config, rollout=rollout, reward=None))
    try:
        queue = await runtime.spawn(
            Role.QUEUE,
            "rollout_queue",
            TimedQueue,
            journal_path=str(folder / "queue"),
            groups_per_step=args.groups_per_step,
            max_staleness=args.max_staleness,
            incarnation="one",
            lease_s=60.0,
            drop_zero_variance=False,
            mask_truncated=True,
            adaptive_slots=False,
        )
        workers = [
            await runtime.spawn(
                Role.ROLLOUT,
                f"rollout-{slot}",
                InstantWorker,
                slot=slot,
                groups=args.groups_per_step,
                completions=args.completions,
                tokens=args.length,
                name=f"rollout-{slot}",
                model=ModelConfig(model_name_or_path="none"),
                rollout=rollout,
                generation=GenerationConfig(num_generations=args.completions),
                seed=0,
                max_model_len=1 << 20,
                agreement=AgreementRule(ceiling=0.01, floor=0.01, is_exact=True),
                queue=queue,
                rewards=(),
            )
            for slot in range(args.workers)
        ]
        await asyncio.gather(*(ask(worker, "start") for worker in workers))
        return await measure_run(queue, workers, args)
    finally:
        await runtime.close()


async def measure_run(queue: Any, workers: Sequence[Any], args: argparse.Namespace) -> dict[str, float]:
    """Warm up, then measure."""
    pulled, total = [0], args.warmup + args.ray_steps
    admitting = asyncio.create_task(admit(queue, args, pulled, total + args.max_staleness + 1))
    try:
        await train(queue, workers, pulled, args.groups_per_step, range(1, args.warmup + 1))
        before, cpu, begin = await ask(queue, "busy"), time.process_time(), time.perf_counter()
        workers_before = await asyncio.gather(*(ask(worker, "cpu_s") for worker in workers))
        await train(queue, workers, pulled, args.groups_per_step, range(args.warmup + 1, total + 1))
        seconds = time.perf_counter() - begin
        after, driver = await ask(queue, "busy"), time.process_time() - cpu
        workers_after = await asyncio.gather(*(ask(worker, "cpu_s") for worker in workers))
    finally:
        admitting.cancel()
        await asyncio.gather(admitting, return_exceptions=True)
    groups = args.ray_steps * args.groups_per_step
    shares = {f"queue_share_{name}": (after[name] - before.get(name, 0.0)) / seconds for name in sorted(after)}
    return {
        "ray_groups": groups,
        **shares,
        "driver_share_cpu": driver / seconds,
        "workers_share_cpu": (sum(workers_after) - sum(workers_before)) / seconds,
        "ray_groups_per_cpu_s": groups
        / (after["cpu"] - before["cpu"] + driver + sum(workers_after) - sum(workers_before)),
        "ray_groups_per_s": groups / seconds,
    }


# -------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch(where: str | None) -> Iterator[Path]:
    """A folder for the journals, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="control-plane-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def caveats(args: argparse.Namespace) -> list[str]:
    """What could flatter or darken the figures."""
    load = os.getloadavg()[0]
    lines = [f"load_average: {load:.2f}", f"cores: {os.cpu_count()}"]
    if load > 0.5:
        lines.append("WARNING: the machine is busy; the figures are lower than they could be")
    if args.folder and str(args.folder).startswith("/dev/shm"):
        lines.append("WARNING: journals lie in memory, where waiting for the disk costs nothing")
    if args.save_steps == 0 or args.save_steps > args.steps:
        lines.append("WARNING: no checkpoint lies within the measured steps")
    lines.append("flatters: no rewards, no teachers, one payload for all groups of the ledger; a disk's cache is warm")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["ledger", "ray", "replay", "all"], default="all")
    parser.add_argument("--groups-per-step", type=int, default=64, help="P")
    parser.add_argument("--max-staleness", type=int, default=2)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200, help="of the ledger")
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--ray-steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10, help="steps through Ray before the clock starts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replay-groups", type=int, default=100_000)
    parser.add_argument("--replay-payload", type=int, default=256, help="bytes of a group in the replayed journal")
    parser.add_argument("--folder", help="where journals are written; default: the temporary folder")
    args = parser.parse_args(argv)
    if min(args.groups_per_step, args.completions, args.length, args.steps, args.ray_steps, args.workers) < 1:
        parser.error("sizes and counts must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    for line in caveats(args):
        print(line)
    found: dict[str, float] = {}
    with scratch(args.folder) as folder:
        if args.mode in ("replay", "all"):
            found |= measure_replay(args, folder)
        if args.mode in ("ledger", "all"):
            found |= measure_ledger(args, folder)
        if args.mode in ("ray", "all"):
            found |= asyncio.run(run_ray(args, folder))
    found["max_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, value in found.items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
