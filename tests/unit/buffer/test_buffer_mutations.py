"""The bound and exactly-once training, each shown to break when the rule that upholds it is broken.

An adversary samples as early and trains as late as the buffer lets it; every test runs it against the true code
(the bound holds, and is reached) and against a mutant (the bound is broken).
"""

from pathlib import Path
from typing import Any

import pytest

from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules, ChangeKind, Outcome
from trl_ray.buffer.ledger import Ledger
from trl_ray.buffer.slots import AdmissionSlots


class Adversary:
    """Fills every slot at once with the oldest weights, and pulls new ones only when nothing else can be done."""

    def __init__(self, path: Path, **rules: Any) -> None:
        self.rules = BufferRules(**rules)
        self.store = DurableLedger(path=path, rules=self.rules, incarnation="one", now=0.0)
        self.step = self.pulled = self.worst_age = 0
        self.sampled_at: dict[int, int] = {}
        self.trained: list[int] = []

    def admit(self) -> None:
        first, count = self.store.next_ordinal, self.store.slots.free
        names = [f"0:{n}" for n in range(first, first + count)]
        self.store.admit(prompt_ids=names, prompts=[b""] * count, version=self.step, now=0.0)

    def sample(self, withhold: int | None = None) -> None:
        """Everything that may be leased is finished with the pulled weights; `withhold` stays with its worker."""
        for key in self.store.lease(worker="w", count=99, now=0.0):
            self.sampled_at[key.group_id] = self.pulled
            if key.group_id != withhold:
                self.commit(key.group_id, key.attempt)

    def commit(self, group_id: int, attempt: int) -> Outcome:
        version = self.sampled_at[group_id]
        return self.store.commit(
            group_id=group_id, attempt=attempt, min_version=version, max_version=version, payload=b"", now=0.0
        )

    def train(self) -> bool:
        taken = self.store.take(count=self.rules.groups_per_step, step=self.step + 1, now=0.0)
        if taken:
            self.worst_age = max([self.worst_age, *(self.step - self.sampled_at[g] for g in taken)])
            self.trained += taken
            self.step += 1
            self.store.trained(step=self.step, now=0.0)
        return bool(taken)

    def skip(self) -> None:
        self.step += 1
        self.store.take(count=self.rules.groups_per_step, step=self.step, now=0.0)
        self.store.skip(step=self.step, now=0.0)

    def pull(self) -> None:
        self.pulled = self.step
        self.store.release(step=self.step, wait_s=0.0, step_s=1.0)

    def run(self, rounds: int) -> int:
        for _ in range(rounds):
            self.admit()
            self.sample()
            if not self.train():
                self.pull()
        return self.worst_age


@pytest.mark.parametrize(("p", "s"), [(1, 0), (1, 2), (2, 1), (3, 2)])
def test_the_adversary_reaches_max_staleness_and_never_passes_it(tmp_path: Path, p: int, s: int) -> None:
    adversary = Adversary(tmp_path / "j", groups_per_step=p, max_staleness=s)
    assert adversary.run(40) == s
    assert adversary.step > 10


@pytest.mark.parametrize(("p", "s"), [(1, 0), (1, 2), (2, 1), (3, 2)])
def test_freeing_slots_when_a_step_is_trained_breaks_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, p: int, s: int
) -> None:
    true_trained = Ledger.trained

    def trained_and_released(self: Ledger, *, step: int, now: float) -> Outcome:
        outcome = true_trained(self, step=step, now=now)
        self.release(step=step)
        return outcome

    monkeypatch.setattr(Ledger, "trained", trained_and_released)
    assert Adversary(tmp_path / "j", groups_per_step=p, max_staleness=s).run(40) > s


def skipped_first(path: Path) -> int:
    adversary = Adversary(path, groups_per_step=1, max_staleness=1)
    adversary.admit()
    adversary.sample()
    adversary.skip()
    return adversary.run(10)


def test_a_skipped_step_leaves_the_bound_in_place(tmp_path: Path) -> None:
    assert skipped_first(tmp_path / "j") == 1


def test_freeing_the_slots_of_a_skipped_step_before_the_pull_breaks_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_skip = Ledger.skip

    def skipped_and_released(self: Ledger, *, step: int, now: float) -> Outcome:
        outcome = true_skip(self, step=step, now=now)
        self.release(step=step)
        return outcome

    monkeypatch.setattr(Ledger, "skip", skipped_and_released)
    assert skipped_first(tmp_path / "j") > 1


def overtaken_for_ever(path: Path) -> int:
    """The worker of group 0 finishes only when nothing else can be taken any more."""
    adversary = Adversary(path, groups_per_step=2, max_staleness=1, max_look_ahead=3)
    adversary.admit()
    adversary.sample(withhold=0)
    for _ in range(6):
        while adversary.train():
            pass
        adversary.pull()
        adversary.admit()
        adversary.sample()
    adversary.commit(0, 0)
    while adversary.train():
        pass
    assert 0 in adversary.trained
    return adversary.worst_age


def test_a_straggler_is_overtaken_only_as_often_as_max_look_ahead_allows(tmp_path: Path) -> None:
    assert overtaken_for_ever(tmp_path / "j") <= (4 + 3 - 2) // 2


def test_counting_overtakes_per_step_instead_of_per_life_breaks_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_take = Ledger.take

    def forgetful(self: Ledger, **arguments: Any) -> list[int]:
        for entry in self._live.values():
            entry.overtaken = 0
        return true_take(self, **arguments)

    monkeypatch.setattr(Ledger, "take", forgetful)
    assert overtaken_for_ever(tmp_path / "j") > (4 + 3 - 2) // 2


def restored_far_back(path: Path, **rules: Any) -> int:
    """Five steps are undone, which leaves more live groups than slots; then the adversary goes on."""
    adversary = Adversary(path, groups_per_step=1, max_staleness=1, **rules)
    adversary.run(12)
    adversary.store.restore(step=0, version=0, mark="lost", now=0.0)
    adversary.step = adversary.pulled = adversary.worst_age = 0
    return adversary.run(40)


@pytest.mark.parametrize("reuse", [False, True])
def test_the_bound_holds_after_a_restore_with_more_groups_than_slots(tmp_path: Path, reuse: bool) -> None:
    assert restored_far_back(tmp_path / "j", reuse_finished=reuse) == 1


def test_leasing_beyond_the_horizon_after_a_restore_breaks_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdmissionSlots, "horizon", None)
    assert restored_far_back(tmp_path / "j", reuse_finished=False) > 1


def revived_drop(path: Path) -> int:
    """Two groups are dropped ahead of a finished one, and a restore brings them back in front of it."""
    adversary = Adversary(path, groups_per_step=1, max_staleness=1)
    adversary.admit()
    for key in adversary.store.lease(worker="w", count=2, now=0.0):
        adversary.store.drop(
            group_id=key.group_id, attempt=key.attempt, reason="zero_variance", because="equal", now=0.0
        )
    adversary.admit()
    adversary.sample()
    adversary.train()
    adversary.store.restore(step=0, version=0, mark="lost", now=0.0)
    adversary.step = adversary.pulled = adversary.worst_age = 0
    return adversary.run(20)


def test_a_finished_group_that_falls_back_behind_revived_ones_is_not_trained_too_old(tmp_path: Path) -> None:
    assert revived_drop(tmp_path / "j") == 1


def test_keeping_every_finished_group_at_a_restore_breaks_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "_usable", lambda self, entry, position: entry.min_version is not None)
    assert revived_drop(tmp_path / "j") > 1


def test_without_the_fence_a_late_attempt_of_the_lost_timeline_would_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late_commit_after_a_restore(path: Path) -> Outcome:
        adversary = Adversary(path, groups_per_step=1, max_staleness=1)
        adversary.admit()
        adversary.sample(withhold=0)
        adversary.store.restore(step=0, version=0, mark="lost", now=0.0)
        adversary.store.lease(worker="w2", count=1, now=0.0)
        adversary.sampled_at[0] = 99  # weights that no longer exist
        return adversary.commit(0, 0)

    assert late_commit_after_a_restore(tmp_path / "true") is Outcome.FENCED
    monkeypatch.setattr(Ledger, "_held", lambda self, group_id, attempt: self._live.get(group_id))
    assert late_commit_after_a_restore(tmp_path / "mutant") is Outcome.APPLIED


def test_slots_follow_every_drop_and_release_and_a_missed_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adversary = Adversary(tmp_path / "j", groups_per_step=1, max_staleness=1)
    adversary.run(10)
    adversary.store.check()
    true_drain = Ledger.drain_changes
    monkeypatch.setattr(
        Ledger, "drain_changes", lambda self: [c for c in true_drain(self) if c.kind is not ChangeKind.RELEASED]
    )
    adversary.run(4)
    with pytest.raises(AssertionError, match="hold slots"):
        adversary.store.check()
