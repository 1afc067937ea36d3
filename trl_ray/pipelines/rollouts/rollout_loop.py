"""The loop of pipelines that train on rollouts: three tasks around the queue.  (How a datum walks: ARCHITECTURE.md)

dataset -> _admit -> RolloutQueue -> rollout workers -> rewards, teachers -> RolloutQueue -> _train -> learner
             ^                                                                                 |
             +----------------- release, once the weights are pulled <------------- publish ---+

_admit   consumes: free slots, prompts.  produces: tickets.      waits for: a slot.
         unblocked by: release, and drops.
_train   consumes: P ready groups.       produces: weights, a metrics line.   waits for: ready groups.
         unblocked by: commits of rollout workers.                            (its steps: step_loop.py)
pull     consumes: published weights.    produces: freed slots.  waits for: every working worker.
         unblocked by: their answers, or their replacement.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from trl_ray.algorithms.policy.group_samples import BuiltStep
from trl_ray.buffer.entry import LedgerSnapshot
from trl_ray.buffer.journal_reach import LEDGER_COPY
from trl_ray.config.runs.rollout_config import RolloutRunConfig
from trl_ray.config.sections import RuntimeKind
from trl_ray.errors import AgreementError, InputError, StallError
from trl_ray.models.companions.teacher_rules import FOLDER
from trl_ray.pipelines.rollouts.agreement_check import AgreementCheck
from trl_ray.pipelines.rollouts.evaluation import SHARE_TRIES, evaluate, held_out_loss
from trl_ray.pipelines.rollouts.evaluation_numbers import prediction_of
from trl_ray.pipelines.rollouts.failures_in_a_row import FailuresInARow
from trl_ray.pipelines.rollouts.objective import with_metrics
from trl_ray.pipelines.rollouts.preparation import OBJECTIVE_STATE, PROMPTS, Preparation
from trl_ray.pipelines.rollouts.rollout_actors import RolloutActors
from trl_ray.pipelines.rollouts.stall_clock import StallClock
from trl_ray.pipelines.rollouts.updates import Updated, prepare_step, train_on
from trl_ray.pipelines.run.early_stopping import EarlyStopping
from trl_ray.pipelines.run.going_back import RunOrigin
from trl_ray.pipelines.run.learner_actors import under_watch
from trl_ray.pipelines.run.own_metrics import computed_metrics
from trl_ray.pipelines.run.recording import Recorder, StepTimes
from trl_ray.pipelines.run.session import Opening
from trl_ray.pipelines.run.signals import Stop, StopRequested, unless
from trl_ray.pipelines.run.step_loop import StepLoop, TrainedStep
from trl_ray.runtime import waits
from trl_ray.types import EventKind, Metric, Prompt, RolloutGroup, StepResult, steady_time
from trl_ray.wire.group_payload import decode_group

AGREEMENT = "agreement.json"
"""In checkpoints: what sampler and learner showed at version 0."""
BEST = "best.json"
"""In checkpoints: the best evaluation so far."""
_POLL_S = 2.0
_SAY_WAITING_S = 30.0
_STOP_PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trained(TrainedStep):
    groups: Sequence[RolloutGroup]
    built: BuiltStep
    staleness: Mapping[str, Metric]
    version: int
    times: StepTimes


class RolloutLoop(StepLoop[_Trained]):
    """Trains on rollouts; evaluates before a step's line, which has the numbers in it.

    Its `actors` are started; for the rest see `StepLoop`.
    """

    _plan: Preparation
    _config: RolloutRunConfig
    _recorder: Recorder

    def __init__(
        self, *, plan: Preparation, actors: RolloutActors, recorder: Recorder, opening: Opening, stop: Stop
    ) -> None:
        stopping = EarlyStopping.of(plan.config)
        if opening.checkpoint is not None and (kept := Path(opening.checkpoint) / BEST).is_file():
            stopping.load_state_dict(json.loads(kept.read_text(encoding="utf-8")))
        super().__init__(
            plan=plan,
            recorder=recorder,
            opening=opening,
            stopping=stopping,
            can_evaluate=plan.config.evaluates,
            stop=stop,
        )
        self._actors, self._failures = actors, FailuresInARow(plan.config)
        # Groups that a resumed run found may be of versions that it makes anew, with other weights.
        found = (self.step > 0 or opening.resuming) and plan.config.slot_bounds.max_staleness > 0
        first_judged = self.step + 1 + (plan.config.max_age_at_use + 1 if found else 0)
        self._agreement = AgreementCheck(plan.config, first_step=first_judged)
        self._restore_agreement(opening.checkpoint)
        self._pulling: asyncio.Task[None] | None = None
        self._gave_up_pull = False
        """The run is to end, and workers may be without the newest weights."""
        self._unreadable: InputError | None = None
        """What is wrong with the next rows of a stream."""

    def _restore_agreement(self, checkpoint: str | None) -> None:
        file = None if checkpoint is None else Path(checkpoint) / AGREEMENT
        if file is not None and file.is_file():
            state = json.loads(file.read_text(encoding="utf-8"))
            self._agreement.load_state_dict(state["sampled"])
            self._actors.weights.load_state_dict(state["weights"])

    def _epoch_after(self, step: int) -> float:
        """Passes over the prompts once so many steps are trained."""
        return self._plan.prompts.epochs_after(step * self._config.groups_per_step)

    async def run(self) -> None:
        plan = self._plan
        # Before the first prompt is admitted: callbacks may take their time, or refuse.
        await self._begin(
            epoch=self._epoch_after(self.step),
            num_train_epochs=math.ceil(
                # Nobody knows how long a stream is.
                self._config.num_train_epochs if plan.steps_per_epoch is None else self._epoch_after(plan.total_steps)
            ),
            can_stop_epoch=False,
        )
        try:
            beside = () if self._opening.only_evaluates else (self._admit(),)
            await under_watch(self._actors.supervisor, self._train(), *beside)
        finally:
            if self._pulling is not None:
                self._pulling.cancel()
                await asyncio.gather(self._pulling, return_exceptions=True)

    async def _admit(self) -> None:
        """Keeps the slots charged, and issues no more groups than the remaining steps need.

        Where the next rows of a stream cannot be used it issues no more: what is issued may be trained first.
        """
        config = self._config
        while True:
            free: int = await self._actors.ask_queue("wait_for_slots", wait_s=_POLL_S)
            snapshot = await self._actors.ask_queue("snapshot")
            remaining = (self._plan.total_steps - snapshot.step) * config.groups_per_step
            count = min(free, remaining - snapshot.live_total)
            if count <= 0:
                await waits.pause(0.25 if free else 0)
                continue
            first: int = await self._actors.ask_queue("next_ordinal")
            try:
                chosen = await self._read(first, count)
            except InputError as error:
                self._unreadable = error
                await asyncio.Event().wait()
            await self._actors.ask_queue("admit", prompts=chosen, version=self._recorder.pulled_version)

    async def _read(self, first: int, count: int) -> list[Prompt]:
        """The prompts to issue; on actors a stream is read beside the loop, which must go on answering."""
        prompts = self._plan.prompts
        if self._config.dataset_streaming and self._config.runtime.kind is RuntimeKind.RAY:
            chosen = await asyncio.to_thread(prompts.take, first, count)
        else:
            chosen = prompts.take(first, count)
        for sentence in prompts.news():
            self._recorder.say(EventKind.WARNING, "data", detail=sentence)
        return chosen

    async def _end_unread(self) -> None:
        """End the run where the next rows of a stream cannot be used, once what was issued before them is trained."""
        if self._unreadable is None:
            return
        snapshot = await self._actors.ask_queue("snapshot")
        if snapshot.live_total >= self._config.groups_per_step:
            return
        if not self.step:
            raise self._unreadable
        await self._save_last()
        raise type(self._unreadable)(
            f"{self._unreadable} {self.step} steps were trained before it and are kept; once it is mended, go on "
            f"with: trl-ray resume {self._recorder.directory.path}"
        ) from self._unreadable

    async def _train_step(self, step: int) -> _Trained:
        begin = steady_time()
        groups = await self._take(step)
        taken = steady_time()
        staleness = self._recorder.check_staleness(step, groups)
        updated = self._agree(step, await self._optimize(step, groups))
        trained = steady_time()
        await self._settle(step, updated.result)
        version = await self._publish(step, wait_s=taken - begin, step_s=trained - begin)
        return _Trained(
            epoch=self._epoch_after(step),
            result=updated.result,
            groups=groups,
            built=updated.built,
            staleness=staleness,
            version=version,
            times=StepTimes(begin=begin, taken=taken, trained=trained, published=steady_time()),
        )

    async def _report(self, trained: _Trained) -> None:
        await self._drain()
        snapshot, slots = await self._balance(), await self._actors.ask_queue("slots")
        line = self._recorder.line(
            groups=trained.groups,
            built=trained.built,
            result=trained.result,
            times=trained.times,
            version=trained.version,
            snapshot=snapshot,
            slots=slots,
            staleness=trained.staleness,
        )
        await self._callbacks.logged(line)
        evaluated = await self._evaluate_in_time() if self._evaluation_is_due else {}
        self._recorder.step(
            self.step, line=line, groups=trained.groups, built=trained.built, snapshot=snapshot, evaluated=evaluated
        )

    async def _balance(self) -> LedgerSnapshot:
        snapshot: LedgerSnapshot = await self._actors.ask_queue("snapshot")
        return snapshot.with_bad_rows(self._plan.prompts.num_left_out)

    async def _take(self, step: int) -> list[RolloutGroup]:
        """Wait for the groups of one step; say who is waited for, and give up when nothing moves any more."""
        config = self._config
        clock = asyncio.get_running_loop().time
        began = said = clock()
        stall = StallClock(began)
        while True:
            groups = await self._ask_for_groups(step)
            if groups:
                self._failures.next_step()
                return groups
            await self._drain()
            await self._heed_stop()
            await self._end_unread()
            if self._pulling is not None and self._pulling.done():
                self._pulling.result()
            snapshot: LedgerSnapshot = await self._actors.ask_queue("snapshot")
            now = clock()
            still_s = stall.still_for(snapshot.live, restarts=self._actors.restarts, now=now)
            if still_s > config.runtime.stall_deadline_s:
                raise StallError(
                    f"step {step} needs {config.groups_per_step} groups, but nothing has moved for {still_s:.0f} s "
                    f"(runtime.stall_deadline_s): {await self._culprits()}. Resume from the checkpoint."
                )
            if now - said > _SAY_WAITING_S:
                said = now
                self._recorder.say(
                    EventKind.WAITING, "learner", step=step, seconds=round(now - began, 1), on=await self._culprits()
                )

    async def _ask_for_groups(self, step: int) -> list[RolloutGroup]:
        """What the queue has for a step, or nothing, within the time of a poll."""
        asking = self._actors.ask_queue("take_stored", n=self._config.groups_per_step, step=step, wait_s=_POLL_S)
        try:
            stored: list[bytes] = await unless(self._stop, asking)
        except StopRequested:
            await self._heed_stop()
            raise
        return [decode_group(payload) for payload in stored]

    async def _culprits(self) -> str:
        named: str = await self._actors.ask_queue("describe_wait", n=self._config.groups_per_step)
        return named

    async def _optimize(self, step: int, groups: list[RolloutGroup]) -> Updated:
        plan, ask_learner = self._plan, self._actors.learner.ask
        prepared = await prepare_step(
            groups, step=step, objective=plan.objective, cut=plan.cut, ask_learner=ask_learner
        )
        observed = plan.objective.observe(groups)
        for warning in observed.warnings:
            self._recorder.say(EventKind.WARNING, "driver", step=step, detail=warning)
        prepared = replace(prepared, built=with_metrics(prepared.built, observed.metrics))
        await plan.objective.show(self._callbacks, groups, prepared.samples, pad_token_id=plan.pad_token_id)
        return await train_on(
            prepared, step=step, config=self._config, objective=plan.objective, cut=plan.cut, ask_learner=ask_learner
        )

    def _agree(self, step: int, updated: Updated) -> Updated:
        """See whether sampler and learner are one policy, before anything of the step is published.

        Raises:
            AgreementError: they are not, and the run stops for it.
        """
        agreement = self._agreement.observe(step, updated.result, self._actors.evidence)
        for breach in agreement.breaches:
            if breach.stops:
                raise AgreementError(
                    f"step {step}: {breach.detail} (cause: {breach.cause}; rollout.on_disagreement=warn goes on.)"
                )
            self._recorder.say(EventKind.WARNING, "learner", step=step, cause=breach.cause.value, detail=breach.detail)
        return replace(updated, result=replace(updated.result, metrics=agreement.metrics))

    async def _settle(self, step: int, result: StepResult) -> None:
        """Tell the ledger what became of the groups of this step."""
        await self._actors.ask_queue("skip" if result.skipped else "trained", step=step)
        if result.skipped:
            self._recorder.skipped(step, what="groups")

    async def _publish(self, step: int, *, wait_s: float, step_s: float) -> int:
        """Publish, and pull beside the next step; a pull must have ended before the next one begins.

        When the run is to end, it is not kept by a worker that does not pull.
        """
        try:
            await self._pulled_in_time()
            identity = await self._actors.publish(step=step)
            pulling = self._pull(step, identity.version, wait_s, step_s)
            self._pulling = asyncio.create_task(pulling, name=f"pull {step}")
            if self._config.slot_bounds.max_staleness == 0:
                await self._pulled_in_time()
        except StopRequested:
            return step
        return identity.version

    async def _pull(self, step: int, version: int, wait_s: float, step_s: float) -> None:
        await self._actors.pull()
        self._recorder.pulled_version = version
        await self._actors.ask_queue("release", step=step, wait_s=wait_s, step_s=step_s)

    async def _pulled(self) -> None:
        """Until the workers hold the weights that were published last."""
        if self._pulling is not None:
            # Whoever waits may be given up, and another one wait after it.
            await asyncio.shield(self._pulling)

    async def _pulled_in_time(self) -> None:
        """As `_pulled`, but a run that is to end waits for no worker that hangs or is being replaced.

        Raises:
            StopRequested: that was so.
        """
        try:
            await unless(self._stop, self._pulled(), patience_s=_STOP_PATIENCE_S)
        except StopRequested:
            if self._pulling is not None:
                self._pulling.cancel()
            self._pulling, self._gave_up_pull = None, True
            raise

    async def _drain(self) -> None:
        """Write down what the actors have to tell, and stop when rewards or teachers fail without end."""
        report = await self._actors.drain()
        self._recorder.report(report)
        self._failures.count(report.events)

    async def _evaluate(self) -> Mapping[str, float]:
        if self._gave_up_pull:
            raise StopRequested
        await self._pulled()
        numbers: dict[str, float] = {}
        for name, prompts in self._plan.eval_sets.items():
            numbers |= await self._evaluate_set(name, prompts)
        await self._judge(numbers)
        return numbers

    async def _evaluate_set(self, name: str, prompts: Sequence[Prompt]) -> dict[str, float]:
        begin, plan, config = steady_time(), self._plan, self._config
        evaluation = await evaluate(self._actors, prompts, seed=config.seed, deadline_s=config.runtime.step_deadline_s)
        for reason in evaluation.lost:
            self._recorder.say(EventKind.WARNING, "evaluation", detail=f"part of it was asked again: {reason}")
        if missing := len(prompts) - len(evaluation.answers):
            detail = f"{missing} of {len(prompts)} prompts are missing: whoever was asked was lost, {SHARE_TRIES} times"
            self._recorder.say(EventKind.WARNING, "evaluation", detail=detail)
        held_out = await held_out_loss(
            evaluation.answers,
            step=self.step,
            objective=plan.objective,
            cut=plan.cut,
            ask_learner=self._actors.learner.ask,
        )
        own = {}
        if plan.compute_metrics is not None and evaluation.answers:
            own = await computed_metrics(plan.compute_metrics, prediction_of(evaluation.answers), config)
        seconds = steady_time() - begin
        return self._recorder.evaluated(self.step, evaluation.answers, held_out, seconds, name=name, own=own)

    async def _write_checkpoint(self, path: Path) -> None:
        """Also of teachers that are averages; then let the journal forget what it no longer needs."""
        snapshot = await self._balance()
        kept = {
            "ledger.json": snapshot.to_json(),
            OBJECTIVE_STATE: self._plan.objective.state_dict(),
            PROMPTS: self._plan.prompts_state(),
            AGREEMENT: {"sampled": self._agreement.state_dict(), "weights": self._actors.weights.state_dict()},
        }
        if self._can_evaluate:
            kept[BEST] = self._stopping.state_dict()
        extra = {name: json.dumps(state).encode() for name, state in kept.items()} | self._callbacks.files()
        step, teachers = self.step, self._actors.teachers
        extra |= RunOrigin.of(self._config).file()
        extra[LEDGER_COPY] = await self._actors.ask_queue("ledger_copy", step=step)
        beside = path.with_name(f"{FOLDER}-{step}.tmp")
        adopt = {FOLDER: str(beside)} if await teachers.save(beside) else {}
        await self._actors.learner.ask(
            "save", str(path.parent), step=step, extra=extra, adopt=adopt, **self._save_options
        )
        teachers.checkpoint = str(path)
        # One checkpoint behind, so that a run whose newest checkpoint is damaged can go back to the one before.
        if self._saved != step:
            await self._actors.ask_queue("checkpoint", step=self._saved, saved=step)

    async def _save_last(self) -> None:
        with suppress(StopRequested):
            await self._pulled_in_time()
        await super()._save_last()
