"""Hands weights from the learner to the engines through the object store, and proves what arrived.

    learner.publish --> object store (one copy per node) --> worker.pull --> version, checksum, weight check
        `publish`              shared memory, zero copy            `pull`     must be those of the learner

With actors in one process the same two calls pass the payload itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trl_ray.errors import AnswerLostError, LearnerLostError, WeightError
from trl_ray.runtime.runtime import ActorHandle
from trl_ray.types import FloatArray, IntArray, PullReport, WeightCheck, WeightVersion


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Published:
    """One published set of weights: where it lies and how to prove it."""

    identity: WeightVersion
    shared: Any
    """Stands for the payload in a call to another actor."""
    check: WeightCheck | None
    """The learner's log-probs of the weight-check prompt, when this version is to be proved by them."""


class WeightTransport:
    """Publishes and pulls; remembers the newest published set.

    Protocol in use::

        transport = WeightTransport(weight_check_ids=ids, weight_check_every=1, deadline_s=600)
        published = await transport.publish(learner, step=3)
        report = await transport.pull(worker)       # raises when the worker does not run just these
    """

    def __init__(
        self,
        *,
        weight_check_ids: IntArray,
        weight_check_every: int,
        deadline_s: float,
        first_check_ids: Sequence[IntArray] = (),
    ) -> None:
        """Set up; publishes nothing.

        Args:
            weight_check_ids: [T] the fixed prompt.
            weight_check_every: steps between proofs by weight check, the first set included; 0 never.
            deadline_s: for each call.
            first_check_ids: further prompts [T] that the first set is proved with: what they show does not depend on
                the weights.
        """
        self._weight_check_ids, self._weight_check_every = weight_check_ids, weight_check_every
        self._deadline_s, self._first_check_ids = deadline_s, tuple(first_check_ids)
        self._initial_logprobs: FloatArray | None = None
        self._baseline: float | None = None
        self.newest: Published | None = None

    async def publish(self, learner: ActorHandle, *, step: int) -> Published:
        """Take the learner's weights; they stay in the object store, owned by the caller, whatever dies.

        Raises:
            ActorLostError, DeadlineError: of the learner.
        """
        shared = await learner.call_shared("publish", deadline_s=self._deadline_s)
        identity: WeightVersion = await learner.call("identity", deadline_s=self._deadline_s)
        check: WeightCheck | None = None
        if self._weight_check_every and (self.newest is None or step % self._weight_check_every == 0):
            is_first = self.newest is None
            asked = {"further": self._first_check_ids, "asks_training": True} if is_first else {}
            check = await learner.call("weight_check", self._weight_check_ids, deadline_s=self._deadline_s, **asked)
            check = self._with_memory(check)
        self.newest = Published(identity=identity, shared=shared, check=check)
        return self.newest

    def _with_memory(self, check: WeightCheck) -> WeightCheck:
        """With what was seen at version 0."""
        if check.version == 0:
            self._initial_logprobs = check.logprobs
        return replace(check, initial_logprobs=self._initial_logprobs, baseline=self._baseline)

    def showed_at_first(self, mean: float) -> None:
        """Remember by how much an engine is off at version 0; of several engines that which is off most."""
        self._baseline = max(mean, self._baseline or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What was seen at version 0, for checkpoints; JSON values."""
        initial = self._initial_logprobs
        return {
            "initial_logprobs": None if initial is None else [float(value) for value in initial],
            "baseline": self._baseline,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        initial = state.get("initial_logprobs")
        self._initial_logprobs = None if initial is None else np.asarray(initial, dtype=np.float32)
        self._baseline = state.get("baseline")

    async def pull(self, worker: ActorHandle) -> PullReport:
        """Have a worker load the newest weights.

        Raises:
            WeightError: they did not fit, were damaged, failed the weight check, or are not what the worker reports.
            EngineError, ActorLostError, DeadlineError: the worker must be replaced.
            LearnerLostError: the weights were lost with the learner's node.
        """
        assert self.newest is not None, "weights must be published before they are pulled"
        published = self.newest
        try:
            report: PullReport = await worker.call(
                "pull", published.shared, published.check, deadline_s=self._deadline_s
            )
        except AnswerLostError as error:
            # They lie on the learner's node, and the worker is none the worse for it.
            raise LearnerLostError(f"the weights that {worker.name} was to pull are lost: {error}") from None
        if (report.version, report.checksum) != (published.identity.version, published.identity.checksum):
            raise WeightError(
                f"{worker.name} must run {published.identity} after its pull, but reports version {report.version} "
                f"with checksum {report.checksum}."
            )
        return report
