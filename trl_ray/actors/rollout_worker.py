"""Generates groups: pulls tickets as its engine has room, has them scored and taught, and commits them.

    RolloutQueue.lease --> RolloutWorker --> Engine (thread), or the dataset --> completions
                                                                                     |
    RolloutQueue.commit <-- Teaching.teach <------ RewardWorker.score <--------------+    (generation of others goes on)

A worker that asks only for what it can start balances the load by itself: a faster engine asks more often.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trl_ray.actors.actor_log import ActorLog
from trl_ray.actors.calling import Outbox, Patience, call_patiently
from trl_ray.actors.dataset_completions import given_completions
from trl_ray.actors.pending_scores import ask_for_scores
from trl_ray.actors.teaching import Taught, TeacherFailure, TeacherSeat, Teaching, TeachingPlan
from trl_ray.actors.weight_proof import MOST_PROBABLE, WeightProof
from trl_ray.buffer.entry import Outcome
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.sections import GenerationConfig, ModelConfig, RolloutConfig
from trl_ray.data.prompts.reprompts import DecodingTokenizer
from trl_ray.engines.factory import create_engine
from trl_ray.engines.sampling import reshapes
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import ActorLostError, DataError, DeadlineError, EngineError, RunError, TrlRayError
from trl_ray.models.policy_loading import config_changes, find_source, load_tokenizer
from trl_ray.rewards.scoring import RawTexts
from trl_ray.types import (
    ActorReport,
    Completion,
    DropReason,
    EventKind,
    GenerationRequest,
    GroupTicket,
    Handle,
    Health,
    Prompt,
    PullReport,
    Reward,
    RewardErrorKind,
    RewardFailure,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
    TeacherContext,
    TeacherScores,
    WeightCheck,
    WeightPayload,
    steady_time,
)
from trl_ray.wire.worker_news import GroupFailed, GroupGenerated, WorkerNews, finished_group

_POLL_S = 5.0
CALL = Patience(deadline_s=30.0, total_s=120.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluatedPrompt:
    """One held-out prompt, answered, scored and taught."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    scored: ScoredGroup
    contexts: tuple[TeacherContext, ...] = ()
    """As in `RolloutGroup`; empty with a `teacher_failure`."""
    teachings: tuple[TeacherScores | None, ...] = ()
    """As in `RolloutGroup`; empty with a `teacher_failure`."""
    teacher_failure: TeacherFailure | None = None

    def as_group(self, group_id: int) -> RolloutGroup:
        """The same as a group, of which samples can be made; rewards that failed are missing."""
        ticket = GroupTicket(group_id=group_id, attempt=0, prompt=self.prompt, admitted_at_version=0)
        return RolloutGroup(
            ticket=ticket,
            completions=self.completions,
            rewards=self.scored.rewards or _unscored(len(self.completions)).rewards,
            worker="evaluation",
            contexts=self.contexts,
            teachings=self.teachings,
        )


class RolloutWorker:
    """One inference engine and the loop that keeps it busy.

    Protocol in use::

        worker = RolloutWorker(name="rollout-0", ...)
        await worker.pull(payload, check)      # weights first
        await worker.start()                    # then work, until `close`

    NOTE: a worker that has a problem drops all its work and never touches the ledger again; its leases are given to
    others.
    """

    def __init__(
        self,
        *,
        name: str,
        model: ModelConfig,
        rollout: RolloutConfig,
        generation: GenerationConfig,
        seed: int,
        max_model_len: int,
        agreement: AgreementRule,
        queue: Handle,
        rewards: Sequence[Handle],
        teaching: TeachingPlan | None = None,
        teachers: Mapping[str, Sequence[Handle]] | None = None,
        scores_raw_texts: bool = False,
        evaluates_with_policy: bool = False,
    ) -> None:
        """Start the engine; takes as long as loading the model does.

        Args:
            name: as events name it.
            model: the policy.
            rollout: options of the engine and of leases.
            generation: how completions are sampled.
            seed: of the samples, together with the group's number.
            max_model_len: tokens of prompt and completion together.
            agreement: how far engine and learner may be apart.
            queue: where groups come from and go to.
            rewards: reward workers; without any, completions are not scored.
            teaching: what to do about teachers; None is nothing.
            teachers: the copies of each teacher, the default one first; only where actors are asked.
            scores_raw_texts: tell reward workers what prompts and completions are with their special tokens.
            evaluates_with_policy: the held-out loss compares log-probs with the sampler's, which must be the policy's
                where sampling is reshaped.

        Raises:
            ModelError, EngineError: the policy cannot be loaded.
        """
        self._name, self._model, self._queue, self._rewards = name, model, queue, tuple(rewards)
        self._rollout, self._generation, self._seed = rollout, generation, seed
        self._sampling = sampling_params(generation)
        self._eval_sampling = held_out_params(generation, of_policy=evaluates_with_policy)
        if rollout.engine_kwargs.get("logits_processors"):  # nobody knows what they do
            self._sampling = replace(self._sampling, policy_logprobs=True)
            self._eval_sampling = replace(self._eval_sampling, policy_logprobs=evaluates_with_policy)
        top_k = teaching.question.top_k if teaching is not None and teaching.asks is TeacherSeat.OWN_ENGINE else None
        if agreement.is_ahead and generation.temperature != 1:
            top_k = max(top_k or 0, MOST_PROBABLE)
        self._engine = open_engine(
            model=model,
            rollout=rollout,
            max_model_len=max_model_len,
            seed=seed,
            max_logprobs=top_k,
        )
        self._proof = WeightProof(
            self._engine,
            name=name,
            model=model,
            rule=agreement,
            deadline_s=rollout.hang_deadline_s,
            temperature=generation.temperature,
        )
        self._teaching = None if teaching is None else self._open_teaching(teaching, teachers or {})
        self._scores_raw_texts = scores_raw_texts
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: dict[tuple[int, int], float] = {}
        self._outbox = Outbox(self._report, lambda work: self._launch(work, name=f"{name} reports"))
        self._scoring = [0] * len(self._rewards)
        self._loop_task: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        # Shorter than a lease, so that it is renewed while nothing else happens.
        self._poll_s = min(_POLL_S, rollout.lease_s / 4)
        self._problem: str | None = None
        self._progress = 0
        self._log = ActorLog(name)

    @cached_property
    def _tokenizer(self) -> DecodingTokenizer:
        return load_tokenizer(self._model)

    def _open_teaching(self, plan: TeachingPlan, teachers: Mapping[str, Sequence[Handle]]) -> Teaching:
        return Teaching(
            plan,
            teachers=teachers if plan.asks is TeacherSeat.ACTORS else {},
            tokenizer=None if plan.reprompt is None else self._tokenizer,
            engine=self._engine if plan.asks is TeacherSeat.OWN_ENGINE else None,
        )

    async def start(self) -> None:
        """Begin to lease and generate."""
        if self._loop_task is None:
            self._loop_task = self._launch(self._work(), name=f"{self._name} work")

    async def pull(self, payload: WeightPayload, check: WeightCheck | None = None) -> PullReport:
        """Replace the engine's weights; requests in flight go on under the new ones.

        Raises:
            WeightError: the weights do not fit, were damaged, or the weight check failed.
            EngineError: loading failed half-way.
            DeadlineError: the weight check was not scored in time.
        """
        begin = steady_time()
        try:
            await asyncio.to_thread(self._proof.look_before, check)
            await asyncio.to_thread(self._load, payload)
            report = await asyncio.to_thread(self._proof.prove, payload, check, begin=begin)
        except RunError as error:
            self._give_up(str(error))
            raise
        self._progress += 1
        self._log.span("pull", begin)
        if self._loop_task is not None:
            # The poll for groups that is under way told of older weights.
            told = self._ask("pulled", worker=self._name, version=report.version)
            self._launch(told, name=f"{self._name} tells of its pull")
        return report

    async def evaluate(self, prompts: Sequence[Prompt], *, seed: int) -> list[EvaluatedPrompt]:
        """Answer, score and teach held-out prompts, beside the work in flight.

        A teacher that fails is a warning among the events of `drain`.

        Raises:
            EngineError: the engine failed.
        """
        count = self._generation.completions_per_held_out_prompt
        requests = [
            replace(
                self._request(f"eval-{seed}-{index}", prompt, n=count, seed=_mix(seed, index)),
                sampling=self._eval_sampling,
            )
            for index, prompt in enumerate(prompts)
        ]
        # Beside the leased groups: the engine shares its steps out among all that it holds.
        futures = self._complete(prompts, requests)
        results = [await asyncio.wrap_future(future) for future in futures]
        # Held-out completions took room that the loop may be waiting for.
        self._room.set()
        return await asyncio.gather(
            *(self._judge(prompt, result) for prompt, result in zip(prompts, results, strict=True))
        )

    async def _judge(self, prompt: Prompt, completions: tuple[Completion, ...]) -> EvaluatedPrompt:
        """Reward of a held-out prompt's completions, and teaching where it is all that is learnt."""
        scored = await self._score(prompt, completions)
        evaluated = EvaluatedPrompt(prompt=prompt, completions=completions, scored=scored)
        if self._teaching is None or self._teaching.reprompts:
            return evaluated
        rewards = scored.rewards or _unscored(len(completions)).rewards
        taught = await self._teaching.teach(prompt, completions, rewards)
        if taught.failure is not None:
            detail = f"held-out prompt {prompt.prompt_id} stays without a teacher: {taught.failure}"
            self._log.event(EventKind.WARNING, detail=detail)
        return replace(evaluated, contexts=taught.contexts, teachings=taught.teachings, teacher_failure=taught.failure)

    def health(self) -> Health:
        """Answer a probe."""
        identity = self._engine.version
        return Health(
            pid=os.getpid(),
            progress=self._progress,
            busy_since=min(self._in_flight.values(), default=None),
            version=identity.version,
            checksum=identity.checksum,
            problem=self._problem or self._engine.broken,
        )

    def drain(self) -> ActorReport:
        """Hand over the events and spans gathered since the last call."""
        return self._log.drain()

    def close(self) -> None:
        """Stop working and free the engine."""
        for task in self._tasks:
            task.cancel()
        self._engine.close()

    async def _work(self) -> None:
        """The worker's loop.

        consumes: tickets of the queue. produces: one `_finish` task per ticket.
        waits for: room in the engine, then tickets. unblocked by: a generated group, an admission to the queue.
        """
        renewed = time.monotonic()
        while True:
            # Cleared before looking: room that comes after the look ends the wait at once.
            self._room.clear()
            capacity = self._capacity()
            if capacity == 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._room.wait()
            else:
                # What it holds goes along: groups in an answer that got lost are issued again at once.
                tickets: list[GroupTicket] = await self._ask(
                    "lease",
                    worker=self._name,
                    capacity=capacity,
                    holding=list(self._in_flight),
                    wait_s=self._poll_s,
                    version=self._engine.version.version,
                )
                self._begin(tickets)
            if self._in_flight and time.monotonic() - renewed > self._rollout.lease_s / 4:
                await self._ask("renew", worker=self._name, keys=list(self._in_flight))
                renewed = time.monotonic()

    def _capacity(self) -> int:
        """Groups that the engine can start now; at least one while it is idle."""
        generating = self._engine.in_flight
        free = (self._engine.max_num_seqs - generating) // self._generation.num_generations
        # A group of more completions than the engine takes at once must start some time; the rest waits inside.
        return max(free, 1 if generating == 0 else 0)

    def _begin(self, tickets: Sequence[GroupTicket]) -> None:
        """Give all tickets of one lease to the engine together, so that the batch is the same in every run."""
        requests = [
            self._request(
                f"{ticket.group_id}.{ticket.attempt}",
                ticket.prompt,
                n=self._generation.num_generations,
                seed=_mix(self._seed, ticket.group_id, draw=ticket.draw),
            )
            for ticket in tickets
        ]
        now = steady_time()
        futures = self._complete([ticket.prompt for ticket in tickets], requests)
        for ticket, future in zip(tickets, futures, strict=True):
            # Noted before anything is awaited, so that the next lease already names it.
            self._in_flight[ticket.group_id, ticket.attempt] = now
            self._launch(self._finish(ticket, future), name=f"group {ticket.group_id}")

    def _complete(
        self, prompts: Sequence[Prompt], requests: Sequence[GenerationRequest]
    ) -> list[Future[tuple[Completion, ...]]]:
        """Completions for each prompt: the dataset's where it has one, the others from the engine, all at once."""
        # Nobody samples a given completion; with the engine's version it ages like those that are sampled beside it.
        version = self._engine.version.version
        asked = [request for prompt, request in zip(prompts, requests, strict=True) if prompt.given_ids is None]
        sampled = iter(self._submit(asked))
        return [
            next(sampled)
            if prompt.given_ids is None
            else given_completions(prompt.given_ids, n=request.n, version=version, tokenizer=self._tokenizer)
            for prompt, request in zip(prompts, requests, strict=True)
        ]

    def _submit(self, requests: Sequence[GenerationRequest]) -> list[Future[tuple[Completion, ...]]]:
        """All requests at once; where the engine refuses one of them, each by itself, and that one fails alone."""
        try:
            return self._engine.submit(requests) if requests else []
        except DataError as error:
            if len(requests) > 1:
                return [future for request in requests for future in self._submit([request])]
            refused: Future[tuple[Completion, ...]] = Future()
            refused.set_exception(error)
            return [refused]

    async def _finish(self, ticket: GroupTicket, future: Future[tuple[Completion, ...]]) -> None:
        """Wait for one group's completions, have them scored and taught, commit or fail."""
        try:
            await self._walk(ticket, future)
        except (DataError, EngineError) as error:
            # An engine that works, or a ledger, refused this one: nobody else is concerned.
            if self._engine.broken is not None:
                raise
            self._room.set()
            await self._outbox.put(
                GroupFailed(
                    group_id=ticket.group_id, attempt=ticket.attempt, detail=str(error), drop=DropReason.REFUSED
                )
            )
        finally:
            self._in_flight.pop((ticket.group_id, ticket.attempt), None)

    async def _walk(self, ticket: GroupTicket, future: Future[tuple[Completion, ...]]) -> None:
        began = self._in_flight[ticket.group_id, ticket.attempt]
        completions = await asyncio.wrap_future(future)
        self._proof.note(ticket.prompt.token_ids, completions)
        # From here on the engine is free for others: this group is scored while the next one is generated.
        self._room.set()
        spans = [self._log.span("generate", began)]
        self._outbox.put(GroupGenerated(group_id=ticket.group_id, attempt=ticket.attempt))
        scored = await self._score(ticket.prompt, completions)
        if self._rewards:
            spans.append(self._log.span("score", spans[-1].end))
        if scored.failure is not None:
            failure = scored.failure
            detail = f"reward {failure.function} ({failure.kind}): {failure.detail}"
            await self._give_back(ticket, detail, DropReason.REWARD_FAILED)
            return
        taught = await self._teach(ticket.prompt, completions, scored.rewards)
        if self._teaching is not None:
            spans.append(self._log.span("teach", spans[-1].end))
        if taught.failure is not None:
            await self._give_back(ticket, str(taught.failure), DropReason.TEACHER_FAILED)
            return
        group = RolloutGroup(
            ticket=ticket,
            completions=completions,
            rewards=scored.rewards,
            worker=self._name,
            spans=tuple(spans),
            metrics={**scored.metrics, **taught.metrics},
            contexts=taught.contexts,
            teachings=taught.teachings,
        )
        await self._outbox.put(finished_group(group))
        self._progress += 1

    async def _give_back(self, ticket: GroupTicket, detail: str, exhausted: DropReason) -> None:
        """Give a group back whose rewards or teacher failed: that never becomes a reward of 0, or a group untaught."""
        await self._outbox.put(
            GroupFailed(group_id=ticket.group_id, attempt=ticket.attempt, detail=detail, exhausted=exhausted)
        )

    async def _teach(self, prompt: Prompt, completions: tuple[Completion, ...], rewards: Sequence[Reward]) -> Taught:
        return Taught() if self._teaching is None else await self._teaching.teach(prompt, completions, rewards)

    async def _score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        """Score on the reward worker with the least to do, waiting out its queue; without any there are no totals.

        A worker that does not answer any more fails the group: the engine is none the worse for it.
        """
        if not self._rewards:
            return _unscored(len(completions))
        index = min(range(len(self._rewards)), key=self._scoring.__getitem__)
        handle = self._rewards[index]
        self._scoring[index] += 1
        try:
            raw = {"raw": self._raw_texts(prompt, completions)} if self._scores_raw_texts else {}
            return await ask_for_scores(handle, prompt, completions, key=uuid.uuid4().hex, patience=CALL, **raw)
        except (ActorLostError, DeadlineError) as error:
            detail = f"{handle.name} must answer within {CALL.total_s:g} s, it did not: {error}"
            failure = RewardFailure(function=handle.name, kind=RewardErrorKind.CRASH, detail=detail)
            told = {"function": failure.function, "kind": failure.kind.value, "detail": detail}
            self._log.event(EventKind.REWARD_FAILED, **told, prompt_id=prompt.prompt_id)
            return ScoredGroup(failure=failure)
        finally:
            self._scoring[index] -= 1

    def _raw_texts(self, prompt: Prompt, completions: Sequence[Completion]) -> RawTexts:
        ids = [prompt.token_ids, *(completion.token_ids for completion in completions)]
        first, *others = (str(self._tokenizer.decode(each.tolist(), skip_special_tokens=False)) for each in ids)
        return RawTexts(prompt=first, completions=tuple(others))

    async def _report(self, news: Sequence[WorkerNews]) -> list[Outcome]:
        outcomes: list[Outcome] = await self._ask("report", news=news)
        return outcomes

    async def _ask(self, method: str, /, **kwargs: Any) -> Any:
        # A worker that cannot finish its groups must not renew its leases on them.
        if self._engine.broken is not None:
            raise EngineError(self._engine.broken)
        return await call_patiently(self._queue, method, CALL, **kwargs)

    def _launch(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Turn whatever a task fails with into a problem that the next probe reports."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        # Nobody awaits these tasks, so that an error that is not kept here is lost.
        if error is not None:
            self._give_up(str(error) if isinstance(error, TrlRayError) else f"{type(error).__name__}: {error}")

    def _give_up(self, problem: str) -> None:
        """Answer probes only: what is in flight may hold wrong tokens, and is about to be issued again."""
        # The first problem is the cause; those after it follow from it.
        self._problem = self._problem or problem
        for task in self._tasks:
            task.cancel()

    def _request(self, request_id: str, prompt: Prompt, *, n: int, seed: int) -> GenerationRequest:
        return GenerationRequest(
            request_id=request_id, prompt_ids=prompt.token_ids, n=n, sampling=self._sampling, seed=seed
        )

    def _load(self, payload: WeightPayload) -> None:
        self._engine.pause()
        self._engine.load_weights(payload)
        self._engine.resume()


def open_engine(
    *, model: ModelConfig, rollout: RolloutConfig, max_model_len: int, seed: int, max_logprobs: int | None = None
) -> EngineThread:
    """The engine that the options ask for, ready to generate, and to score with as many as `max_logprobs`."""
    source = find_source(model)
    return create_engine(
        rollout.engine,
        model=source.base,  # adapters arrive merged
        revision=source.revision,
        tokenizer=load_tokenizer(model),
        config_changes=config_changes(model),
        dtype=(rollout.dtype or model.dtype).value,
        max_model_len=max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        hang_deadline_s=rollout.hang_deadline_s,
        seed=seed,
        trust_remote_code=model.trust_remote_code,
        kv_cache_memory_bytes=int(rollout.kv_cache_memory_gib * (1 << 30)),
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        tensor_parallel_size=rollout.tensor_parallel_size,
        max_logprobs=max_logprobs,
        engine_kwargs=rollout.engine_kwargs,
    )


def sampling_params(generation: GenerationConfig) -> SamplingParams:
    """The engine's view of the generation options; log-probs are what the learner computes."""
    params = SamplingParams(
        max_tokens=generation.max_completion_length,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        stop=tuple(generation.stop),
        min_tokens=generation.min_tokens,
        fields=generation.engine_fields,
    )
    return replace(params, policy_logprobs=reshapes(params))


def held_out_params(generation: GenerationConfig, *, of_policy: bool = False) -> SamplingParams:
    """The same for held-out prompts, which may have a temperature of their own.

    Args:
        generation: the options.
        of_policy: log-probs are those of training; else of the distribution that is drawn from, whose entropy is told.
    """
    params, own = sampling_params(generation), generation.eval_temperature
    params = replace(params, policy_logprobs=params.policy_logprobs and of_policy)
    if own is None:
        return params
    if own > 0:
        return replace(params, temperature=own)
    # One token to choose from: engines divide by a temperature, and 0 is none.
    return replace(params, temperature=1.0, top_k=1, top_p=1.0, min_p=0.0)


def mean_reward(rewards: Sequence[Reward]) -> float | None:
    """Mean of the totals that exist; None when there are none."""
    totals = [reward.total for reward in rewards if reward.total is not None]
    return sum(totals) / len(totals) if totals else None


def _unscored(count: int) -> ScoredGroup:
    """What is known of completions that nobody rewards."""
    return ScoredGroup(rewards=tuple(Reward(total=None, parts={}) for _ in range(count)))


def _mix(seed: int, index: int, *, draw: int = 0) -> int:
    """A seed for one group: equal for every attempt and every restart, distinct between groups and draws."""
    return (seed * 1_000_003 + index * 7_919 + draw * 15_485_863 + 17) % (1 << 31)
