"""One copy of a teacher as an actor: scores completions beside generation and training, and follows the policy.

    RolloutWorker -- score(requests, question) --> Teacher --> transformers | vLLM | server --> frame of scores
    learner -- publish --> pull --> live copies, ema blends (between two batches)       save, restore: the average

A teacher that follows the policy answers nobody before it has been given weights. It never retries: who asks does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trl_ray.actors.actor_log import ActorLog
from trl_ray.actors.teacher_scoring import AskedScoring, JoinedScoring, Scoring
from trl_ray.config.sections import Dtype, EngineChoice
from trl_ray.config.teacher_options import (
    PayloadDtype,
    PayloadIds,
    TeacherEngine,
    TeacherOptions,
    TeacherServerConfig,
    TeacherSource,
)
from trl_ray.engines.factory import create_engine
from trl_ray.engines.teacher_clients import teacher_client
from trl_ray.engines.thread import EngineThread
from trl_ray.errors import ModelError, TeacherError, WeightError
from trl_ray.models.companions.teacher_model import TeacherModel, load_teacher_model
from trl_ray.models.companions.teacher_weights import CopiedWeights, follow_policy
from trl_ray.models.policy_loading import find_source, max_positions
from trl_ray.types import (
    ActorReport,
    EventKind,
    Health,
    PullReport,
    TeacherQuestion,
    TeacherRequest,
    TeacherScores,
    WeightCheck,
    WeightPayload,
    steady_time,
)
from trl_ray.wire.teacher_payload import encode_scores

_MAX_MODEL_LEN = 2048
"""Where neither the options nor the model say how long a sequence may be."""
_MAX_SEQUENCES = 64
_ENGINE_CALLS = 16
"""Calls that stand in the engine's queue at once; it batches them by itself."""


class Teacher:
    """Scores completions.

    Protocol in use::

        teacher = Teacher(name="teacher-ema-0", source=source, vocab_size=32000)
        await teacher.restore(folder)               # an average, where a run goes on
        await teacher.pull(payload, check)         # after every published version, where it follows the policy
        frame = await teacher.score(requests, question)

    NOTE: calls to `score` may overlap; while weights change no pass runs, and each answer is of one version. A teacher
    with a problem must be replaced; calls that wait in it are not answered.
    """

    def __init__(
        self, *, name: str, source: TeacherSource, vocab_size: int, weight_check_tolerance: float | None = None
    ) -> None:
        """Load the model, start the engine or find the server; takes as long as reading weights does.

        Args:
            name: of the actor; scores bear the teacher's, `source.name`.
            source: whose weights it has, and how it is asked.
            vocab_size: entries of the vocabulary that student and teacher share.
            weight_check_tolerance: largest mean |difference| to the learner in nats, where its weights are the
                learner's; None takes 1e-3 in float32, else 0.2.

        Raises:
            ModelError: the model cannot be loaded, or there is no GPU for it.
            ConfigError: it knows fewer than `vocab_size` tokens, or the server's address cannot be used.
            EngineError: the engine cannot start.
        """
        self.name, self._source, self._options = name, source, source.options
        exact = source.model.dtype is Dtype.FLOAT32 and not source.model.bf16
        self._tolerance = weight_check_tolerance or (1e-3 if exact else 0.2)
        self._log = ActorLog(name)
        self._fed = asyncio.Event()
        self._model: TeacherModel | None = None
        self._weights: CopiedWeights | None = None
        self._joined: JoinedScoring | None = None
        self._scoring = self._open(vocab_size)

    async def score(
        self,
        requests: Sequence[TeacherRequest],
        question: TeacherQuestion,
        *,
        dtype: PayloadDtype | None = None,
        ids: PayloadIds | None = None,
    ) -> NDArray[np.uint8]:
        """What the teacher says, as a frame for `algorithms.teacher_payload.decode_scores`.

        consumes: one call; produces: one frame [bytes]; waits for: the first weights, then work under way; unblocked
        by: `pull` or `restore`, the end of that work, or `timeout_s`.

        Args:
            requests: [B] at least one, all with equally many given tokens.
            question: what is asked about each token.
            dtype: of log-probs on their way; None takes the option's.
            ids: of token ids on their way; None takes the option's.

        Raises:
            ConfigError: such a question cannot be answered.
            DataError: a request is empty, too long, or names unknown ids.
            TeacherError: no weights came in time, the computation failed or hung, or the server gave no good answer.
        """
        assert requests, "a teacher is asked about at least one completion"
        await self._await_weights()
        scores = await self._scoring.score(requests, question)
        return await asyncio.to_thread(
            encode_scores,
            scores,
            question=question,
            dtype=dtype or self._options.payload_dtype,
            ids=ids or self._options.payload_ids,
        )

    async def pull(self, payload: WeightPayload, check: WeightCheck | None = None) -> PullReport:
        """Follow the policy to a published version; an older one, and the same once more, change nothing.

        consumes: published weights; produces: what the teacher has now; waits for: the batch at hand; unblocked by: its
        end, or the deadline of a pass.

        Returns:
            Version and checksum of what was pulled last. Canary figures where the weights are now just those: always
            for a live teacher, for an average with its first version only.

        Raises:
            WeightError: they do not fit or were damaged, and the teacher has the weights it had; or the weight check
                failed.
            EngineError: a pass has hung.
        """
        assert self._joined is not None and self._weights is not None, f"{self.name} does not follow the policy"
        begin = steady_time()
        report = await self._joined.alone(lambda: self._take(payload, check, begin), name="pull")
        self._fed.set()
        return report

    async def save(self, folder: str) -> bool:
        """Write the average into a folder, which is made when missing.

        Returns:
            False where there is nothing to keep: the weights never change, or come from the learner.

        Raises:
            CheckpointError: it cannot be written, or there are no weights yet.
            EngineError: a pass has hung.
        """
        weights = self._weights
        if self._joined is None or weights is None:
            return False
        return await self._joined.alone(lambda: weights.save(folder), name="save")

    async def restore(self, folder: str) -> None:
        """Go on from the average in a folder; does nothing where there is nothing to keep.

        Raises:
            CheckpointError: it is missing or damaged, or of another model.
            EngineError: a pass has hung.
        """
        if self._joined is None or self._weights is None:
            return
        await self._joined.alone(lambda: self._restore(folder), name="restore")
        if self._weights.identity is not None:
            self._fed.set()

    def health(self) -> Health:
        """Answered while a pass runs; a pass that hangs is a problem."""
        identity = self._weights.identity if self._weights is not None else None
        return Health(
            pid=os.getpid(),
            progress=self._scoring.progress,
            busy_since=self._scoring.busy_since,
            version=identity.version if identity is not None else None,
            checksum=identity.checksum if identity is not None else None,
            problem=self._scoring.problem,
        )

    def drain(self) -> ActorReport:
        """Spans and warnings since the last call."""
        return replace(self._log.drain(), spans=self._scoring.spans())

    def close(self) -> None:
        """Stop; calls under way are not answered. May be called twice."""
        self._scoring.close()

    def _open(self, vocab_size: int) -> Scoring:
        options, external = self._options, self._source.external
        if external is not None:
            if external.server is not None:
                return self._ask_server(external.server)
            if external.engine is TeacherEngine.VLLM:
                return self._ask_engine(external)
        on_gpu = options.num_gpus > 0
        if on_gpu and not torch.cuda.is_available():
            raise ModelError(
                f"teacher {self._source.name}: num_gpus={options.num_gpus:g} needs a GPU, and there is none here. Set "
                "num_gpus=0."
            )
        model = load_teacher_model(self._source, device="cuda" if on_gpu else "cpu")
        model.check_vocabulary(vocab_size)
        self._model, self._weights = model, follow_policy(self._source, model.policy)
        self._joined = JoinedScoring(
            model,
            actor=self.name,
            teacher=self._source.name,
            max_tokens=options.max_tokens_per_batch,
            timeout_s=options.timeout_s,
        )
        return self._joined

    def _ask_server(self, server: TeacherServerConfig) -> Scoring:
        # One attempt: who asks this actor asks again, and counts.
        client = teacher_client(name=self._source.name, server=server, teacher=self._options.replace(max_attempts=1))
        return AskedScoring(client.score, actor=self.name, threads=server.max_concurrent_requests)

    def _ask_engine(self, options: TeacherOptions) -> Scoring:
        engine = open_teacher_engine(options)

        def ask(requests: Sequence[TeacherRequest], question: TeacherQuestion) -> list[TeacherScores]:
            scores = engine.score_completions(
                requests, question, deadline_s=options.timeout_s, teacher=self._source.name
            )
            # To the engine those of the checkpoint are version 0.
            return [replace(each, version=None) for each in scores]

        return AskedScoring(
            ask, actor=self.name, threads=_ENGINE_CALLS, broken=lambda: engine.broken, stop=engine.close
        )

    async def _await_weights(self) -> None:
        """Wait until there is anything to score with, for as long as a request may take."""
        if self._weights is None or self._weights.identity is not None:
            return
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._fed.wait()
        except TimeoutError:
            raise TeacherError(
                f"teacher {self._source.name} must be given weights before it scores, but {self.name} got none within "
                f"{self._options.timeout_s:g} s (timeout_s)."
            ) from None

    def _take(self, payload: WeightPayload, check: WeightCheck | None, begin: float) -> PullReport:
        """On the thread: follow, and prove it where that can be done."""
        assert self._model is not None and self._weights is not None and self._joined is not None
        is_first = self._weights.identity is None
        is_copy = self._weights.take(payload)
        identity = self._weights.identity
        assert identity is not None, "weights that were taken have a version"
        self._model.version = identity.version
        if is_first:
            self._tell_of_late_start(identity.version)
        mean = worst = None
        if is_copy and check is not None:
            mean, worst = self._compare(check, identity.version)
            # "not <=" so that NaN fails too.
            if not mean <= self._tolerance:
                problem = (
                    f"after pulling version {identity.version}, {self.name} must agree with the learner on the weight "
                    f"check within {self._tolerance:g} nats on average, but differs by {mean:.4g} (worst "
                    f"{worst:.4g}). It does not have the weights it reports."
                )
                self._joined.give_up(problem)
                raise WeightError(problem)
        return PullReport(
            version=identity.version,
            checksum=identity.checksum,
            seconds=steady_time() - begin,
            weight_check_mean=mean,
            weight_check_max=worst,
        )

    def _compare(self, check: WeightCheck, version: int) -> tuple[float, float]:
        """Mean and largest |difference| in nats."""
        assert self._model is not None
        if check.version != version:
            raise WeightError(f"a weight check of version {check.version} cannot prove version {version}.")
        request = TeacherRequest(prompt_ids=check.token_ids[:1], completion_ids=check.token_ids[1:])
        [scores] = self._model.score([request], TeacherQuestion(vocab_size=self._model.vocab_size))
        difference = np.abs(scores.logprobs.astype(np.float64) - check.logprobs)
        return float(difference.mean()), float(difference.max())

    def _restore(self, folder: str) -> None:
        """On the thread."""
        assert self._model is not None and self._weights is not None
        self._weights.restore(folder)
        if self._weights.identity is not None:
            self._model.version = self._weights.identity.version

    def _tell_of_late_start(self, version: int) -> None:
        """An average that begins later than training did has forgotten what was before."""
        if not self._source.keeps_average or version == 0:
            return
        detail = (
            f"its average begins at version {version}, as there was none to go on from; it is the policy itself now"
        )
        self._log.event(EventKind.WARNING, detail=detail)


def open_teacher_engine(options: TeacherOptions) -> EngineThread:
    """vLLM for a teacher on this machine, ready to score.

    Raises:
        ConfigError: vLLM is not installed.
        ModelError: the model cannot be read.
        EngineError: vLLM cannot start.
    """
    model = options.model
    source = find_source(model)
    overrides: dict[str, Any] = {"max_logprobs": -1}  # as many as a question asks for
    return create_engine(
        EngineChoice.VLLM,
        model=source.base,
        revision=source.revision,
        dtype=model.dtype.value,
        max_model_len=options.max_model_len or max_positions(model) or _MAX_MODEL_LEN,
        max_num_seqs=_MAX_SEQUENCES,
        hang_deadline_s=options.timeout_s,
        trust_remote_code=model.trust_remote_code,
        kv_cache_memory_bytes=int(options.kv_cache_memory_gib * (1 << 30)),
        gpu_memory_utilization=options.gpu_memory_utilization,
        # It only reads prompts: what graphs make faster is generating.
        enforce_eager=True,
        tensor_parallel_size=options.tensor_parallel_size,
        enable_prefix_caching=False,
        engine_kwargs=overrides | options.engine_kwargs,
    )
