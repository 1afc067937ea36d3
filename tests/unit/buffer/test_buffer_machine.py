"""The buffer under random interleavings, failures, restarts and power cuts, against a model of the world around it.

    model: learner (step, version), engines (pulled version), what the current timeline trained, the checkpoint
    rules: everything a prompt source, worker, supervisor, learner or power cut may do, in any order

The model knows nothing of slots or overtaking: it only measures the age of every token at use.
HYPOTHESIS_PROFILE=thorough runs many more examples.
"""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import HELD, BufferRules, LeaseKey, Outcome, State
from trl_ray.errors import JournalError

WORKERS = st.sampled_from(["a", "b", "c"])


class World(RuleBasedStateMachine):
    """One run, its interruptions included."""

    @initialize(
        p=st.integers(1, 3), s=st.integers(0, 2), w=st.integers(1, 4), reuse=st.booleans(), adaptive=st.booleans()
    )
    def begin(self, p: int, s: int, w: int, reuse: bool, adaptive: bool) -> None:
        self.rules = BufferRules(
            groups_per_step=p,
            max_staleness=s,
            max_look_ahead=w,
            max_attempts=2,
            lease_s=10.0,
            reuse_finished=reuse,
            adaptive_slots=adaptive,
        )
        # In memory where that is possible: a checkpoint waits for its disk, and here that proves nothing.
        self.folder = Path(tempfile.mkdtemp(prefix="buffer-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.path = self.folder / "journal"
        self.names = (f"run-{n}" for n in itertools.count())
        self.now = 0.0
        self.step = self.version = self.pulled = self.released = 0
        self.versions = {0: 0}
        self.min_versions: dict[int, int] = {}
        self.trained: dict[int, int] = {}
        self.held: list[tuple[LeaseKey, int]] = []
        self.saved_step = 0
        self.durable_end = self.base_end = 0
        self.restored = False
        self.incarnation = next(self.names)
        self.store = self.open(self.path)

    def open(self, path: Path, resume_from_step: int | None = None) -> DurableLedger:
        return DurableLedger(
            path=path,
            rules=self.rules,
            incarnation=self.incarnation,
            now=self.now,
            resume_from_step=resume_from_step,
        )

    def tick(self, seconds: float = 0.01) -> float:
        self.now += seconds
        return self.now

    # ---- prompt source and workers

    @rule(share=st.floats(0, 1), again=st.booleans())
    def admit(self, share: float, again: bool) -> None:
        count = round(share * self.store.slots.free)
        first = self.store.next_ordinal
        names = [f"0:{n}" for n in range(first, first + count)]
        blobs = [name.encode() for name in names]
        for _ in range(1 + again):
            ids = self.store.admit(prompt_ids=names, prompts=blobs, version=self.version, now=self.tick())
            assert ids == list(range(first, first + count))

    @rule(worker=WORKERS, count=st.integers(1, 4))
    def lease(self, worker: str, count: int) -> None:
        keys = self.store.lease(worker=worker, count=count, now=self.tick())
        assert [key.group_id for key in keys] == sorted(key.group_id for key in keys)
        # The engine runs the version it pulled last, and may pull younger ones before it is done.
        self.held.extend((key, self.pulled) for key in keys)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), keep=st.booleans(), action=st.sampled_from(["generated", "commit", "commit", "drop", "fail"]))
    def work(self, data: st.DataObject, keep: bool, action: str) -> None:
        """A worker reports on an attempt it was once given, in time or late, and perhaps again afterwards."""
        index = data.draw(st.integers(0, len(self.held) - 1))
        key, start = self.held[index]
        if not keep:
            del self.held[index]
        name = {"group_id": key.group_id, "attempt": key.attempt, "now": self.tick()}
        if action == "generated":
            self.store.generated(**name)
        elif action == "fail":
            self.store.fail(**name, because="engine died")
        elif action == "drop":
            self.store.drop(**name, reason="zero_variance", because="all equal")
        else:
            self.commit(key, start)

    def commit(self, key: LeaseKey, start: int) -> None:
        arguments = {
            "group_id": key.group_id,
            "attempt": key.attempt,
            "min_version": start,
            "max_version": max(start, self.pulled),
            "payload": b"%d/%d" % (key.group_id, key.attempt),
            "now": self.tick(),
        }
        if self.store.commit(**arguments) is Outcome.APPLIED:
            self.min_versions[key.group_id] = start
            assert self.store.commit(**arguments) is Outcome.REPEATED

    @rule(worker=WORKERS)
    def lose_worker(self, worker: str) -> None:
        self.store.lose_worker(worker=worker, now=self.tick())

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.store.expire(now=self.tick(seconds))

    @precondition(lambda self: self.held)
    @rule(worker=WORKERS)
    def renew(self, worker: str) -> None:
        keys = [(key.group_id, key.attempt) for key, _ in self.held]
        self.store.renew(worker=worker, keys=keys, now=self.tick())

    # ---- learner

    @rule(ahead=st.integers(1, 2))
    def take(self, ahead: int) -> None:
        step = self.step + ahead
        if ahead == 2 and not self.store.ledger.groups_of(step - 1):
            return
        assert self.store.drop_stale(now=self.tick()) == []
        taken = self.store.take(count=self.rules.groups_per_step, step=step, now=self.tick())
        assert len(taken) in (0, self.rules.groups_per_step)
        assert taken == self.store.take(count=self.rules.groups_per_step, step=step, now=self.tick())

    @precondition(lambda self: self.store.ledger.groups_of(self.step + 1))
    @rule(lost_answer=st.booleans())
    def train(self, lost_answer: bool) -> None:
        self.step += 1
        for group_id in self.store.ledger.groups_of(self.step):
            assert group_id not in self.trained, f"group {group_id} is trained twice in one timeline"
            age = self.version - self.min_versions[group_id]
            assert 0 <= age <= self.rules.max_age_at_use, f"group {group_id} has the age {age} at use"
            assert self.store.payload(group_id).startswith(b"%d/" % group_id)
            self.trained[group_id] = self.step
        self.version += 1
        self.versions[self.step] = self.version
        for _ in range(1 + lost_answer):
            self.store.trained(step=self.step, now=self.tick())

    @precondition(lambda self: self.store.ledger.groups_of(self.step + 1))
    @rule()
    def skip(self) -> None:
        """The weights stay, and are published under the next version."""
        self.step += 1
        self.version += 1
        self.versions[self.step] = self.version
        self.store.skip(step=self.step, now=self.tick())

    @precondition(lambda self: self.released < self.step)
    @rule(data=st.data(), wait_s=st.sampled_from([0.0, 0.5]))
    def pull_and_release(self, data: st.DataObject, wait_s: float) -> None:
        self.released = data.draw(st.integers(self.released + 1, self.step))
        self.pulled = self.versions[self.released]
        self.store.release(step=self.released, wait_s=wait_s, step_s=1.0)

    # ---- whole rounds: single rules alone would seldom get as far as a trained step

    @rule(stragglers=st.sets(st.integers(0, 4), max_size=2))
    def workers_are_busy(self, stragglers: set[int]) -> None:
        """Every slot is filled and leased; all but a few stragglers are finished."""
        self.admit(share=1.0, again=False)
        self.lease(worker="a", count=100)
        pending, self.held = self.held, []
        for index, (key, start) in enumerate(pending):
            if index in stragglers:
                self.held.append((key, start))
            else:
                self.commit(key, start)

    @rule(steps=st.integers(1, 4))
    def learner_is_busy(self, steps: int) -> None:
        """Trains what is ready, and pulls nothing."""
        for _ in range(steps):
            self.take(ahead=1)
            if self.store.ledger.groups_of(self.step + 1):
                self.train(lost_answer=False)

    @rule(rounds=st.integers(1, 4), stragglers=st.sets(st.integers(0, 4), max_size=2))
    def the_run_goes_well(self, rounds: int, stragglers: set[int]) -> None:
        for _ in range(rounds):
            self.workers_are_busy(stragglers)
            self.learner_is_busy(steps=2)
            self.pull_everything()

    def pull_everything(self) -> None:
        if self.released < self.step:
            self.released, self.pulled = self.step, self.version
            self.store.release(step=self.step, wait_s=0.0, step_s=1.0)

    # ---- checkpoints and interruptions

    @precondition(lambda self: self.step > self.saved_step)
    @rule()
    def checkpoint(self) -> None:
        self.saved_step = self.step
        self.store.checkpoint(step=self.step)
        self.durable_end = self.base_end = self.store.journal.end

    def back_to_checkpoint(self) -> None:
        self.step = self.released = self.saved_step
        self.version = self.pulled = self.versions[self.step]
        self.trained = {group: step for group, step in self.trained.items() if step <= self.step}
        self.restored = True

    @precondition(lambda self: self.step > self.saved_step)
    @rule()
    def learner_is_lost(self) -> None:
        self.back_to_checkpoint()
        mark = next(self.names)
        assert self.store.restore(step=self.step, version=self.version, mark=mark, now=self.tick())
        assert not self.store.restore(step=self.step, version=self.version, mark=mark, now=self.tick())

    @rule(torn=st.integers(0, 40))
    def queue_is_killed(self, torn: int) -> None:
        """The process dies, perhaps while it writes a record that it never answered."""
        before = self.store.ledger.to_state()
        offset = [record.offset for record in self.store.journal.records()][-1]
        self.store.close()
        data = self.path.read_bytes()
        torn = min(torn, len(data) - offset - 1)
        self.path.write_bytes(data + data[offset : offset + torn])
        self.store = self.open(self.path)
        assert self.store.journal.truncated_bytes == torn
        after = self.store.ledger.to_state()
        for entry in (*before["live"], *after["live"]):
            entry.pop("expires_at", None)
        assert before == after

    @precondition(lambda self: self.step > self.saved_step)
    @rule(data=st.data())
    def power_is_cut_and_the_job_submitted_again(self, data: st.DataObject) -> None:
        self.store.close()
        whole = self.path.read_bytes()
        cut = data.draw(st.integers(self.durable_end, len(whole)))
        self.path.write_bytes(whole[:cut])
        if cut < len(whole):
            self.held.clear()
        self.back_to_checkpoint()
        self.incarnation = next(self.names)
        self.store = self.open(self.path, resume_from_step=self.saved_step)

    @rule(data=st.data())
    def any_prefix_of_the_journal_is_a_legal_state(self, data: st.DataObject) -> None:
        whole = self.path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        copy = self.folder / "copy"
        copy.write_bytes(whole[:cut])
        try:
            store = self.open(copy, resume_from_step=0)
        except JournalError:
            assert cut < self.base_end or self.saved_step > 0, "only a cut snapshot may be refused"
        else:
            store.check()
            store.close()

    # ---- what must always hold

    @invariant()
    def everything_balances(self) -> None:
        self.store.check()
        snapshot = self.store.snapshot()
        assert snapshot.balanced
        assert (snapshot.step, snapshot.version) == (self.step, self.version)
        assert snapshot.trained == len(self.trained)
        assert "stale" not in snapshot.dropped

    @invariant()
    def slots_are_never_overdrawn(self) -> None:
        if not self.restored:
            assert self.store.slots.in_use <= self.rules.capacity

    @invariant()
    def some_transition_is_enabled(self) -> None:
        store, live = self.store, self.store.snapshot().live
        horizon = store.slots.horizon
        issued = [g for g in store.ledger.holders() if store.ledger.state_of(g) is State.ISSUED]
        untaken = sum(live.values()) - live[State.TAKEN]
        p = self.rules.groups_per_step
        assert (
            store.slots.free > 0
            or any(horizon is None or g <= horizon for g in issued)
            or any(live[state] for state in HELD)
            or live[State.TAKEN]
            or self.released < self.step
            or (untaken >= p and not store.waiting_on(count=p))
        ), f"nothing can move: {live}"

    def teardown(self) -> None:
        """A world without further faults trains three more steps, and then every group is accounted for."""
        if not hasattr(self, "store"):
            return
        try:
            self.run_on_without_faults()
        finally:
            self.store.close()
            shutil.rmtree(self.folder)

    def run_on_without_faults(self) -> None:
        goal = self.step + 3
        for _ in range(100):
            if self.step == goal:
                break
            self.time_passes(11.0)
            self.admit(share=1.0, again=False)
            for key in self.store.lease(worker="a", count=100, now=self.tick()):
                self.commit(key, self.pulled)
            self.take(ahead=1)
            if self.store.ledger.groups_of(self.step + 1):
                self.train(lost_answer=False)
            self.pull_everything()
            self.everything_balances()
        assert self.step == goal, "a world without faults must go on"
        self.store.finish(now=self.tick())
        snapshot = self.store.snapshot()
        assert sum(snapshot.live.values()) == 0
        assert snapshot.issued == len(self.trained) + sum(snapshot.dropped.values())


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=4 * settings().max_examples,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
