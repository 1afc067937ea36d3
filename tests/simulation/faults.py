"""What goes wrong, and how often: drawn from one seed, counted by kind."""

from __future__ import annotations

import enum
import random
from collections import Counter
from dataclasses import dataclass


class Fate(enum.StrEnum):
    """What becomes of one call."""

    FINE = "fine"
    LOST_REQUEST = "lost request"
    LOST_REPLY = "lost reply"
    LATE_REPLY = "late reply"
    LATE_REQUEST = "late request"
    """It arrives long after its caller has given up."""
    REPEATED_REQUEST = "repeated request"
    """It arrives again, long after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Shares of calls, and seconds between events (mean; 0 is never)."""

    calls: float = 0.02
    """Of calls that are lost, late or repeated."""
    probes: float = 0.0005
    """The same of health probes, each of which costs an actor its life."""
    pulls: float = 0.02
    """The same of weight pulls, whose callers wait long."""
    worker_every_s: float = 200.0
    """Deaths, hangs and broken engines of rollout workers."""
    queue_every_s: float = 300.0
    """Deaths and hangs of the queue."""
    learner_every_s: float = 2000.0
    driver_every_s: float = 2500.0
    """Deaths of the driver with all its actors; half of them cut the power."""
    writes: float = 0.001
    """Of the queue's writes that end in its death."""
    damaged_checkpoints: float = 0.15
    """Of resumes that go back to the checkpoint before the newest."""
    skips: float = 0.03
    """Of steps whose numbers are not finite."""
    refusals: float = 0.01
    """Of groups that an engine refuses."""
    no_room: float = 0.1
    """Of looks for a place for a worker."""
    cut_off: float = 0.03
    """Of groups whose completions are all cut off."""


QUIET = FaultPlan(
    calls=0,
    probes=0,
    pulls=0,
    worker_every_s=0,
    queue_every_s=0,
    learner_every_s=0,
    driver_every_s=0,
    writes=0,
    skips=0,
    refusals=0,
    cut_off=0,
    no_room=0,
)
DENSE = FaultPlan(
    calls=0.15, probes=0.003, worker_every_s=50, queue_every_s=60, learner_every_s=500, driver_every_s=600, writes=0.01,
)  # fmt: skip

STORM = FaultPlan(
    calls=0.35, probes=0.01, worker_every_s=15, queue_every_s=25, learner_every_s=300, driver_every_s=300, writes=0.02,
)  # fmt: skip


class Faults:
    """Draws faults and counts them; `stop` ends them, so that a run can come to its end."""

    def __init__(self, plan: FaultPlan, rng: random.Random) -> None:
        self.plan, self.rng = plan, rng
        self.counts: Counter[str] = Counter()
        self.active = True

    def happens(self, share: float, kind: str) -> bool:
        """Whether something with this share happens now."""
        if not self.active or share <= 0 or self.rng.random() >= share:
            return False
        self.counts[kind] += 1
        return True

    def fate(self, role: str, method: str) -> Fate:
        """Of one call."""
        # What costs an actor its life when it is lost is lost less often.
        probe = role == "learner" or method in ("health", "start")
        share = self.plan.probes if probe else self.plan.pulls if method == "pull" else self.plan.calls
        if not self.active or share <= 0 or self.rng.random() >= share:
            return Fate.FINE
        fates = [Fate.LOST_REQUEST, Fate.LOST_REPLY, Fate.LATE_REPLY, Fate.LATE_REQUEST, Fate.REPEATED_REQUEST]
        # Only the queue's calls are idempotent by contract.
        fate = self.rng.choice(fates if role == "queue" else fates[:3])
        self.counts[fate.value] += 1
        return fate

    def pause_s(self, mean: float) -> float:
        """Seconds to the next event of a kind."""
        return self.rng.expovariate(1 / mean)
