"""A rollout worker between a fake engine, queue, reward worker and teacher."""

import asyncio
from concurrent.futures import Future

import numpy as np

from fakes import FakeHandle, completion, reward, until
from trl_ray.actors import rollout_worker
from trl_ray.actors.rollout_worker import RolloutWorker
from trl_ray.config.runs.agreement_rule import AgreementRule
from trl_ray.config.sections import GenerationConfig, ModelConfig, RolloutConfig
from trl_ray.errors import EngineError
from trl_ray.types import (
    ScoredGroup,
    WeightVersion,
)
from trl_ray.wire.group_payload import decode_group
from trl_ray.wire.worker_news import GroupFailed, GroupGenerated, finished_group

G = 2


class FakeEngine:
    """Holds requests until a test finishes them; two groups fit."""

    def __init__(self, *, max_num_seqs=2 * G):
        self.max_num_seqs, self.version, self.broken = max_num_seqs, WeightVersion(version=-1, checksum=""), None
        self.batches, self.running, self.loaded = [], {}, []
        self.check = np.array([-1.0, -2.0], np.float32)
        self.load_error, self.wrong_version = None, None

    @property
    def in_flight(self):
        return sum(request.n for request, _ in self.running.values())

    def submit(self, requests):
        if self.broken:
            raise EngineError(self.broken)
        self.batches.append(list(requests))
        futures = [Future() for _ in requests]
        self.running |= {
            request.request_id: (request, future) for request, future in zip(requests, futures, strict=True)
        }
        return futures

    def finish(self, request_id):
        request, future = self.running.pop(request_id)
        future.set_result(tuple(completion() for _ in range(request.n)))

    def fail(self, problem):
        self.broken, running, self.running = problem, self.running, {}
        for _, future in running.values():
            future.set_exception(EngineError(problem))

    def pause(self):
        pass

    def resume(self):
        pass

    def load_weights(self, payload):
        if self.load_error:
            raise self.load_error
        self.version = self.wrong_version or payload.identity

    def score(self, sequences, *, deadline_s):
        return [self.check]

    def close(self):
        pass


class FakeQueue(FakeHandle):
    """Leases what a test puts there, a long-poll like the real one."""

    def __init__(self, *tickets):
        super().__init__(name="queue")
        self.waiting = list(tickets)
        self.answers = {"lease": self.lease, "report": self.report}

    async def lease(self, *, worker, capacity, holding, wait_s, version):
        if not self.waiting:
            await asyncio.sleep(0.01)
        taken, self.waiting = self.waiting[:capacity], self.waiting[capacity:]
        return taken

    async def report(self, *, news):
        """Each piece of news as a call of its own: ``generated``, ``commit`` (the group that was sent), ``fail``."""
        return [await self.tell(each) for each in news]

    async def tell(self, news):
        key = {"group_id": news.group_id, "attempt": news.attempt}
        if isinstance(news, GroupGenerated):
            return await self.call("generated", deadline_s=1, **key)
        if isinstance(news, GroupFailed):
            told = {"detail": news.detail, "exhausted": news.exhausted} | ({"drop": news.drop} if news.drop else {})
            return await self.call("fail", deadline_s=1, **key, **told)
        group = decode_group(news.payload)
        assert news == finished_group(group)
        return await self.call("commit", deadline_s=1, group=group)


class Letters:
    """A tokenizer of one letter per token."""

    chat_template = None
    pad_token_id = None

    def __call__(self, texts, **options):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(token) for token in token_ids)


class Stage:
    """A worker and everything around it."""

    def __init__(
        self,
        monkeypatch,
        *tickets,
        scored=None,
        seed=1,
        rewarded=True,
        teaching=None,
        teachers=None,
        lease_s=40_000.0,
        generation=None,
        raw=False,
        **engine,
    ):
        self.engine, self.queue = FakeEngine(**engine), FakeQueue(*tickets)
        scored = scored or ScoredGroup(rewards=(reward(0.0), reward(1.0)))
        self.reward = FakeHandle(name="reward-0", answers={"score": scored})
        monkeypatch.setattr(rollout_worker, "open_engine", lambda **options: self.engine)
        monkeypatch.setattr(rollout_worker, "load_tokenizer", lambda model: Letters())
        # Whatever must be woken by something else than time passing waits for too long then.
        monkeypatch.setattr(rollout_worker, "_POLL_S", 3600.0)
        self.worker = RolloutWorker(
            name="rollout-0",
            model=ModelConfig(model_name_or_path="none"),
            rollout=RolloutConfig(lease_s=lease_s),
            generation=GenerationConfig(**{"num_generations": G, "num_generations_eval": 1, **(generation or {})}),
            seed=seed,
            max_model_len=64,
            agreement=AgreementRule(ceiling=0.01, floor=0.01, is_exact=True),
            queue=self.queue,
            rewards=(self.reward,) if rewarded else (),
            teaching=teaching,
            teachers=teachers,
            scores_raw_texts=raw,
        )

    def play(self, *acts):
        """Start the worker and wait for one condition after the other; a callable that answers None is an act."""

        async def run():
            await self.worker.start()
            for act in acts:
                if act() is not None:
                    await until(act)
            self.worker.close()

        asyncio.run(run())

    def ledger_calls(self):
        """Calls that change the ledger."""
        return [call.method for call in self.queue.calls if call.method not in ("lease", "report", "pulled")]


def evaluated(stage, *prompts):
    async def run():
        task = asyncio.create_task(stage.worker.evaluate(prompts, seed=7))
        await until(lambda: stage.engine.in_flight == sum(each.given_ids is None for each in prompts))
        for request_id in list(stage.engine.running):
            stage.engine.finish(request_id)
        return await task

    return asyncio.run(run())
