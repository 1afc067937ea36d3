"""Hands weights from the learner to the engines through the object store, and proves what arrived.

    learner.publish --> object store (one copy per node) --> worker.pull --> version, checksum, weight check
        `publish`              shared memory, zero copy            `pull`     must be those of the learner

With actors in one process the same two calls pass the payload itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_ray.errors import WeightError
from trl_ray.runtime.runtime import ActorHandle
from trl_ray.types import IntArray, PullReport, WeightCheck, WeightVersion


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

    def __init__(self, *, weight_check_ids: IntArray, weight_check_every: int, deadline_s: float) -> None:
        """Set up; publishes nothing.

        Args:
            weight_check_ids: [T] the fixed prompt.
            weight_check_every: steps between proofs by weight check, the first set included; 0 never.
            deadline_s: for each call.
        """
        self._weight_check_ids, self._weight_check_every = weight_check_ids, weight_check_every
        self._deadline_s = deadline_s
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
            check = await learner.call("weight_check", self._weight_check_ids, deadline_s=self._deadline_s)
        self.newest = Published(identity=identity, shared=shared, check=check)
        return self.newest

    async def pull(self, worker: ActorHandle) -> PullReport:
        """Have a worker load the newest weights.

        Raises:
            WeightError: they did not fit, were damaged, failed the weight check, or are not what the worker reports.
            EngineError, ActorLostError, DeadlineError: the worker must be replaced.
        """
        assert self.newest is not None, "weights must be published before they are pulled"
        published = self.newest
        report: PullReport = await worker.call("pull", published.shared, published.check, deadline_s=self._deadline_s)
        if (report.version, report.checksum) != (published.identity.version, published.identity.checksum):
            raise WeightError(
                f"{worker.name} must run {published.identity} after its pull, but reports version {report.version} "
                f"with checksum {report.checksum}."
            )
        return report
