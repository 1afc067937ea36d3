"""Has engines and teachers pull what the learner has published, and holds nobody for one that cannot.

newest published --pull--> rollout workers, teachers      lost: reported       late: set aside, catches up by itself
        weight checks --> Evidence
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from trl_ray.errors import ActorLostError, DeadlineError, EngineError, LearnerLostError, WeightError
from trl_ray.pipelines.rollouts.agreement_check import Evidence
from trl_ray.pipelines.rollouts.teacher_actors import TeacherActors
from trl_ray.pipelines.run.learner_actors import Emit
from trl_ray.runtime import waits
from trl_ray.runtime.runtime import ActorHandle, Role
from trl_ray.runtime.supervision import Supervisor
from trl_ray.runtime.weights import Published, WeightTransport
from trl_ray.types import Event, EventKind, PullReport, SamplingGap, TrainingGap

_CONTROL_S = 60.0


class WeightPulls:
    """Rollout workers with current weights, and how they come by them.

    Args:
        weights: hands out what was published.
        teachers: those that follow the policy pull as well.
        supervisor: is told who is lost.
        emit: takes events.
        patience_s: what a worker may take longer than others without being set aside.
        deadline_s: for one pull, as it is told.
    """

    def __init__(
        self,
        *,
        weights: WeightTransport,
        teachers: TeacherActors,
        supervisor: Supervisor,
        emit: Emit,
        patience_s: float,
        deadline_s: float,
    ) -> None:
        self._weights, self._teachers, self._supervisor = weights, teachers, supervisor
        self._emit_event, self._patience_s, self._deadline_s = emit, patience_s, deadline_s
        self._checked: dict[str, PullReport] = {}
        self._sampled: dict[str, SamplingGap] = {}
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._aside: set[str] = set()
        """Workers whose pull takes so much longer than others' that nobody waits for it."""
        self.working: dict[str, ActorHandle] = {}
        """Rollout workers that hold current weights, by name."""

    def evidence(self, training: TrainingGap | None) -> Evidence:
        """What the newest weight checks of working engines have shown, beside what the learner's own has."""
        reports = [report for name, report in self._checked.items() if name in self.working]
        means = [report.weight_check_mean for report in reports if report.weight_check_mean is not None]
        own = [report.own_files_mean for report in reports if report.own_files_mean is not None]
        return Evidence(
            weights=max(means, default=None),
            own_files=max(own, default=None),
            training=training,
            sampling=tuple(gap for name, gap in self._sampled.items() if name in self.working),
        )

    async def pull(self) -> None:
        """Have every working rollout worker and every teacher pull the newest weights, side by side.

        Nobody waits for those that cannot, which are replaced meanwhile, nor for a worker that takes far longer than
        another one: it catches up by itself.

        Raises:
            LearnerLostError: the weights were lost with the learner's node.
        """
        handles = (*self.working.values(), *self._teachers.following)
        for handle in handles:
            if handle.name not in self._pulls:
                work = self._pull_newest(handle)
                self._pulls[handle.name] = asyncio.create_task(work, name=f"pull of {handle.name}")
        pulls = {handle.name: self._pulls[handle.name] for handle in handles}
        with waits.told(f"{', '.join(pulls)} to pull weights", self._deadline_s):
            await self._all_but_late(pulls)
        for pull in pulls.values():
            if pull.done():
                pull.result()

    async def _all_but_late(self, pulls: Mapping[str, asyncio.Task[None]]) -> None:
        """Wait for pulls; those of workers that are late when another one has long pulled are set aside."""
        loop, patience_s = asyncio.get_running_loop(), self._patience_s
        begin, slowest_s, pending = loop.time(), 0.0, set(pulls.values())
        while pending:
            done, _ = await waits.first(pending, on="pulls", deadline_s=patience_s)
            pending -= done
            taken_s = loop.time() - begin
            slowest_s = taken_s if done else slowest_s
            pulled = any(pulls[name].done() for name in self.working if name in pulls)
            if not pulled or taken_s < max(patience_s, 2 * slowest_s):
                continue
            for name in [name for name, pull in pulls.items() if pull in pending and name in self.working]:
                self._aside.add(name)
                del self.working[name]
                pending.discard(pulls[name])
                detail = "the run goes on without it until it has pulled the newest weights"
                self._emit(EventKind.WAITING, "driver", on=f"{name}.pull", seconds=round(taken_s, 1), detail=detail)

    async def refit(self, handle: ActorHandle) -> None:
        """Give a fresh worker the newest weights, then work; weights published meanwhile are pulled too."""
        pulled: Published | None = None
        while pulled is not self._weights.newest:
            pulled = self._weights.newest
            await self._pull_one(handle)
        # Before it starts: weights published during that call must reach it before their step's slots are released.
        self.working[handle.name] = handle
        await handle.call("start", deadline_s=_CONTROL_S)

    async def _pull_one(self, handle: ActorHandle) -> None:
        report = await self._weights.pull(handle)
        version, seconds = report.version, round(report.seconds, 4)
        self._emit(EventKind.WEIGHTS_PULLED, handle.name, version=version, checksum=report.checksum, seconds=seconds)
        # Kept over pulls that found no tokens to compare, of which there may be some between two steps.
        if report.sampling is not None:
            self._sampled[handle.name] = report.sampling
        if report.weight_check_mean is None:
            return
        agrees = report.disagreement is None
        proof = {"mean": report.weight_check_mean, "max": report.weight_check_max, "agrees": agrees}
        self._emit(EventKind.WEIGHT_CHECK, handle.name, version=version, **proof)
        if report.disagreement is not None:
            self._emit(EventKind.WARNING, handle.name, detail=report.disagreement)
        self._checked[handle.name] = report
        if version == 0:
            self._weights.showed_at_first(report.weight_check_mean)

    async def _pull_newest(self, handle: ActorHandle) -> None:
        """Have a worker or teacher pull until it has the newest weights, and report it lost when it cannot."""
        pull, name = self._teachers.follow if handle.role is Role.TEACHER else self._pull_one, handle.name
        try:
            pulled: Published | None = None
            while pulled is not self._weights.newest:
                pulled = self._weights.newest
                await self._supervisor.while_alive(name, pull(handle))
        except LearnerLostError:
            if name not in self._aside:  # else nobody waits, and the learner's loss is found by others
                raise
        except (WeightError, EngineError, ActorLostError, DeadlineError) as error:
            if isinstance(error, WeightError):
                self._emit(EventKind.WEIGHT_CHECK, name, agrees=False, detail=str(error))
            # At once: whoever asks next must not be given one that is known to be lost.
            self.working.pop(name, None)
            self._supervisor.report(name, str(error))
        else:
            if name in self._aside:
                self.working[name] = handle
        finally:
            self._aside.discard(name)
            self._pulls.pop(name, None)

    async def close(self) -> None:
        """End what is under way."""
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)

    def _emit(self, kind: EventKind, actor: str, /, **detail: object) -> None:
        self._emit_event(Event.now(kind, actor, **detail))
