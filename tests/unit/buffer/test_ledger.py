"""The ledger by hand: each test walks a few groups and counts."""

import json

import pytest

from trl_ray.buffer.entry import BufferRules, ChangeKind, LeaseKey, Outcome, State
from trl_ray.buffer.ledger import Ledger
from trl_ray.types import DropReason


def make(groups: int = 0, **rules: object) -> Ledger:
    settings: dict[str, object] = {"groups_per_step": 2, "max_staleness": 1, "lease_s": 10.0, **rules}
    ledger = Ledger(BufferRules(**settings))  # type: ignore[arg-type]
    ledger.issue(count=groups, version=0, now=0.0)
    return ledger


def finish(ledger: Ledger, *group_ids: int, version: int = 0) -> None:
    """Bring issued groups to ready; every other issued group stays issued."""
    keys = {key.group_id: key for key in ledger.lease(worker="w", count=100, now=0.0)}
    for group_id, key in keys.items():
        if group_id in group_ids:
            commit(ledger, key, version=version)


def commit(ledger: Ledger, key: LeaseKey, version: int = 0) -> Outcome:
    return ledger.commit(group_id=key.group_id, attempt=key.attempt, min_version=version, max_version=version, now=1.0)


def train(ledger: Ledger, step: int, count: int = 2) -> list[int]:
    taken = ledger.take(count=count, step=step, now=2.0)
    ledger.trained(step=step, now=2.0)
    return taken


def test_a_group_walks_every_state_and_the_balance_holds_at_each() -> None:
    ledger = make(groups=1, groups_per_step=1)
    seen = [ledger.state_of(0)]
    key = ledger.lease(worker="w", count=1, now=0.0)[0]
    for move in (
        lambda: None,
        lambda: ledger.generated(group_id=0, attempt=0, now=1.0),
        lambda: ledger.scored(group_id=0, attempt=0, now=1.0),
        lambda: commit(ledger, key),
        lambda: ledger.take(count=1, step=1, now=1.0),
        lambda: ledger.trained(step=1, now=1.0),
    ):
        move()
        ledger.check()
        seen.append(ledger.state_of(0))
    assert seen == [*State][:7]
    assert ledger.snapshot().trained == 1
    assert ledger.version == 1


def test_groups_are_leased_oldest_first_and_only_once() -> None:
    ledger = make(groups=3)
    assert [k.group_id for k in ledger.lease(worker="a", count=2, now=0.0)] == [0, 1]
    assert [k.group_id for k in ledger.lease(worker="b", count=2, now=0.0)] == [2]
    assert ledger.lease(worker="c", count=2, now=0.0) == []


def test_a_repeated_commit_is_a_no_op_that_says_so() -> None:
    ledger = make(groups=1)
    key = ledger.lease(worker="w", count=1, now=0.0)[0]
    assert [commit(ledger, key) for _ in range(3)] == [Outcome.APPLIED, Outcome.REPEATED, Outcome.REPEATED]
    assert ledger.fenced == 0


def test_a_late_attempt_is_fenced_counted_and_ignored() -> None:
    ledger = make(groups=1)
    late = ledger.lease(worker="slow", count=1, now=0.0)[0]
    assert ledger.expire(now=10.0) == [0]
    key = ledger.lease(worker="quick", count=1, now=11.0)[0]
    assert (key.group_id, key.attempt) == (0, 1)
    assert commit(ledger, late) is Outcome.FENCED
    assert commit(ledger, key) is Outcome.APPLIED
    assert ledger.fenced == 1
    ledger.check()


def test_a_commit_of_a_group_that_was_never_issued_or_leased_is_fenced() -> None:
    ledger = make(groups=1)
    assert commit(ledger, LeaseKey(group_id=7, attempt=0, version=0)) is Outcome.FENCED
    assert commit(ledger, LeaseKey(group_id=0, attempt=0, version=0)) is Outcome.FENCED


def test_a_lease_expires_at_its_time_and_not_before_and_renewing_moves_it() -> None:
    ledger = make(groups=2)
    ledger.lease(worker="w", count=2, now=0.0)
    assert ledger.expire(now=9.9) == []
    assert ledger.renew(worker="w", keys=[(0, 0), (0, 5), (9, 0)], now=5.0) == 1
    assert ledger.expire(now=10.0) == [1]
    assert ledger.expire(now=15.0) == [0]


def test_a_worker_can_renew_only_its_own_leases() -> None:
    ledger = make(groups=1)
    ledger.lease(worker="a", count=1, now=0.0)
    assert ledger.renew(worker="b", keys=[(0, 0)], now=5.0) == 0


def test_losing_a_worker_issues_its_groups_again_and_leaves_those_of_others() -> None:
    ledger = make(groups=4)
    ledger.lease(worker="a", count=2, now=0.0)
    ledger.lease(worker="b", count=1, now=0.0)
    ledger.generated(group_id=0, attempt=0, now=1.0)
    assert ledger.lose_worker(worker="a", now=1.0) == [0, 1]
    states = [ledger.state_of(g) for g in range(4)]
    assert states == [State.ISSUED, State.ISSUED, State.LEASED, State.ISSUED]
    assert ledger.reissued == 2


def test_a_group_is_tried_max_attempts_times_and_then_dropped() -> None:
    ledger = make(groups=1, max_attempts=3)
    outcomes = []
    for _ in range(3):
        key = ledger.lease(worker="w", count=1, now=0.0)[0]
        failed = {"group_id": 0, "attempt": key.attempt, "because": "engine died", "now": 1.0}
        outcomes += [ledger.fail(**failed), ledger.fail(**failed)]  # type: ignore[arg-type]
    assert outcomes == [Outcome.APPLIED, Outcome.REPEATED] * 3
    assert ledger.snapshot().dropped == {"retries_exhausted": 1}
    assert ledger.snapshot().live["issued"] == 0
    kinds = [change.kind for change in ledger.drain_changes()]
    assert kinds == [ChangeKind.REISSUED, ChangeKind.REISSUED, ChangeKind.DROPPED]
    ledger.check()


def test_a_worker_may_drop_its_own_attempt_once() -> None:
    ledger = make(groups=1)
    drop = {"group_id": 0, "attempt": 0, "reason": DropReason.ZERO_VARIANCE, "because": "equal", "now": 1.0}
    assert ledger.drop(**drop) is Outcome.FENCED  # type: ignore[arg-type]
    ledger.lease(worker="w", count=1, now=0.0)
    assert ledger.drop(**drop) is Outcome.APPLIED  # type: ignore[arg-type]
    assert ledger.drop(**drop) is Outcome.REPEATED  # type: ignore[arg-type]
    assert ledger.snapshot().dropped == {"zero_variance": 1}


def test_without_looking_ahead_the_oldest_live_groups_must_all_be_ready() -> None:
    ledger = make(groups=4)
    finish(ledger, 1, 2, 3)
    assert ledger.take(count=2, step=1, now=2.0) == []
    commit(ledger, LeaseKey(group_id=0, attempt=0, version=0))
    assert ledger.take(count=2, step=1, now=2.0) == [0, 1]


def test_a_dropped_straggler_does_not_hold_the_others_up() -> None:
    ledger = make(groups=3)
    finish(ledger, 1, 2)
    ledger.drop(group_id=0, attempt=0, reason=DropReason.REWARD_FAILED, because="x", now=1.0)
    assert ledger.take(count=2, step=1, now=2.0) == [1, 2]


def test_max_look_ahead_counts_overtakes_over_the_whole_life_of_a_straggler() -> None:
    # W = 4 allows 3 overtakes: the first step uses 2, so the second may not use 2 more.
    ledger = make(groups=6, max_look_ahead=4, max_staleness=2)
    finish(ledger, 1, 2, 3, 4, 5)
    assert train(ledger, 1) == [1, 2]
    assert ledger.take(count=2, step=2, now=2.0) == []
    commit(ledger, LeaseKey(group_id=0, attempt=0, version=0))
    assert ledger.take(count=2, step=2, now=2.0) == [0, 3]


def test_taking_the_same_step_again_answers_the_same_groups() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1, 2, 3)
    assert ledger.take(count=2, step=1, now=2.0) == [0, 1]
    assert ledger.take(count=2, step=1, now=3.0) == [0, 1]
    ledger.trained(step=1, now=3.0)
    assert ledger.take(count=2, step=1, now=3.0) == [0, 1]
    assert ledger.trained(step=1, now=3.0) is Outcome.REPEATED
    assert ledger.snapshot().trained == 2


def test_steps_are_taken_and_finished_in_order() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1, 2, 3)
    with pytest.raises(AssertionError, match="step 1 is next, got 2"):
        ledger.take(count=2, step=2, now=2.0)
    with pytest.raises(AssertionError, match="step 1 was not"):
        ledger.trained(step=1, now=2.0)


def test_the_next_step_may_be_taken_while_one_is_being_trained() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1, 2, 3)
    assert ledger.take(count=2, step=1, now=2.0) == [0, 1]
    assert ledger.take(count=2, step=2, now=2.0) == [2, 3]
    ledger.trained(step=1, now=2.0)
    assert ledger.groups_of(2) == [2, 3]


def test_slots_stay_charged_from_trained_until_release() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1)
    train(ledger, 1)
    assert ledger.holders() == [0, 1, 2, 3]
    assert ledger.release(step=1) is Outcome.APPLIED
    assert ledger.release(step=1) is Outcome.REPEATED
    assert ledger.holders() == [2, 3]
    with pytest.raises(AssertionError, match="Only finished steps"):
        ledger.release(step=2)


def test_a_skipped_step_drops_its_groups_and_their_slots_wait_for_the_release_all_the_same() -> None:
    ledger = make(groups=2)
    finish(ledger, 0, 1)
    ledger.take(count=2, step=1, now=2.0)
    assert ledger.skip(step=1, now=2.0) is Outcome.APPLIED
    assert ledger.skip(step=1, now=2.0) is Outcome.REPEATED
    assert (ledger.step, ledger.version) == (1, 1)
    assert ledger.snapshot().dropped == {"numerics": 2}
    assert ledger.holders() == [0, 1]
    ledger.release(step=1)
    assert ledger.holders() == []


def test_a_checkpoint_forgets_settled_groups_and_keeps_the_counts() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1)
    train(ledger, 1)
    assert ledger.checkpoint(step=1) == []  # their slots are still charged
    ledger.release(step=1)
    assert ledger.checkpoint(step=1) == [0, 1]
    assert ledger.state_of(0) is None
    assert commit(ledger, LeaseKey(group_id=0, attempt=0, version=0)) is Outcome.FENCED
    assert ledger.snapshot().trained == 2
    ledger.check()


def test_restoring_makes_live_again_what_was_trained_or_dropped_after_the_checkpoint() -> None:
    ledger = make(groups=6, max_staleness=2)
    finish(ledger, 0, 1, 2, 3)
    train(ledger, 1)
    ledger.drop(group_id=4, attempt=0, reason=DropReason.REWARD_FAILED, because="x", now=2.0)
    train(ledger, 2)
    assert (ledger.snapshot().trained, ledger.snapshot().dropped) == (4, {"reward_failed": 1})
    ledger.restore(step=1, version=None, now=3.0)
    ledger.check()
    snapshot = ledger.snapshot()
    assert (snapshot.step, snapshot.version, snapshot.trained, snapshot.dropped) == (1, 1, 2, {})
    # 2 and 3 were sampled by version 0 and are ready again; 4 was dropped and 5 was leased: issued again.
    states = [ledger.state_of(g) for g in range(2, 6)]
    assert states == [State.READY, State.READY, State.ISSUED, State.ISSUED]
    assert [(k.group_id, k.attempt) for k in ledger.lease(worker="w", count=9, now=4.0)] == [(4, 1), (5, 1)]
    assert ledger.take(count=2, step=2, now=5.0) == [2, 3]


def test_restoring_issues_again_what_weights_of_the_lost_timeline_sampled() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1)
    train(ledger, 1)
    ledger.checkpoint(step=1)
    commit(ledger, LeaseKey(group_id=2, attempt=0, version=0), version=1)
    commit(ledger, LeaseKey(group_id=3, attempt=0, version=0), version=2)
    ledger.restore(step=1, version=None, now=3.0)
    assert [ledger.state_of(2), ledger.state_of(3)] == [State.READY, State.ISSUED]
    assert commit(ledger, LeaseKey(group_id=3, attempt=0, version=0)) is Outcome.FENCED


def test_restoring_issues_again_a_finished_group_that_would_be_too_old_when_its_turn_comes() -> None:
    # P=1, S=0. Group 0 is dropped while step 1 is prepared, so group 1 trains at step 1. Back at step 0 both are
    # live and group 1 is trained second: its tokens of version 0 would be one version old then.
    ledger = make(groups=1, groups_per_step=1, max_staleness=0)
    ledger.lease(worker="w", count=1, now=0.0)
    ledger.drop(group_id=0, attempt=0, reason=DropReason.ZERO_VARIANCE, because="x", now=0.0)
    ledger.issue(count=1, version=0, now=0.0)
    finish(ledger, 1)
    assert train(ledger, 1, count=1) == [1]
    ledger.restore(step=0, version=None, now=3.0)
    assert [ledger.state_of(0), ledger.state_of(1)] == [State.ISSUED, State.ISSUED]


def test_with_reuse_finished_off_every_group_after_the_checkpoint_is_issued_again() -> None:
    ledger = make(groups=2, reuse_finished=False)
    finish(ledger, 0, 1)
    train(ledger, 1)
    ledger.restore(step=0, version=None, now=3.0)
    assert ledger.snapshot().live["issued"] == 2


def test_a_checkpoint_proves_its_step_even_when_the_ledger_had_not_heard_of_it() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1)
    ledger.take(count=2, step=1, now=2.0)
    ledger.restore(step=1, version=None, now=3.0)
    assert ledger.snapshot().trained == 2


@pytest.mark.parametrize("step", [0, 3])
def test_steps_that_are_forgotten_or_unknown_cannot_be_restored(step: int) -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1, 2, 3)
    train(ledger, 1)
    ledger.release(step=1)
    ledger.checkpoint(step=1)
    with pytest.raises(ValueError, match=r"must lie in \[1, 1\]"):
        ledger.restore(step=step, version=None, now=3.0)


def test_a_skipped_step_is_undone_like_any_other() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1, 2, 3)
    ledger.take(count=2, step=1, now=2.0)
    ledger.skip(step=1, now=2.0)
    train(ledger, 2)
    ledger.restore(step=2, version=None, now=3.0)
    assert (ledger.step, ledger.version, ledger.snapshot().dropped) == (2, 2, {"numerics": 2})
    ledger.restore(step=0, version=None, now=3.0)
    assert (ledger.step, ledger.version, ledger.snapshot().dropped) == (0, 0, {})


def test_the_end_of_a_run_drops_the_rest_and_a_longer_run_takes_it_back() -> None:
    ledger = make(groups=4)
    finish(ledger, 0, 1, 2)
    train(ledger, 1)
    assert ledger.finish(now=3.0) == [2, 3]
    assert ledger.snapshot().dropped == {"end_of_run": 2}
    assert sum(ledger.snapshot().live.values()) == 0
    ledger.restore(step=1, version=None, now=4.0)
    assert [ledger.state_of(2), ledger.state_of(3)] == [State.READY, State.ISSUED]


def test_a_ready_group_beyond_the_bound_is_dropped_as_an_alarm() -> None:
    ledger = make(groups=4, groups_per_step=1, max_staleness=1)
    finish(ledger, 0, 1, 2, 3)
    train(ledger, 1, count=1)
    assert ledger.drop_stale(now=2.0) == []
    train(ledger, 2, count=1)
    assert ledger.drop_stale(now=2.0) == [2, 3]
    assert ledger.snapshot().dropped == {"stale": 2}


def test_waiting_on_names_the_groups_and_their_holders() -> None:
    ledger = make(groups=3)
    ledger.lease(worker="rollout-1", count=2, now=7.0)
    commit(ledger, LeaseKey(group_id=0, attempt=0, version=0))
    waiting = ledger.waiting_on(count=3)
    assert [(w.group_id, w.state, w.worker, w.since) for w in waiting] == [
        (1, State.LEASED, "rollout-1", 7.0),
        (2, State.ISSUED, None, 0.0),
    ]


def test_the_state_survives_json_exactly() -> None:
    ledger = make(groups=5, max_staleness=2)
    finish(ledger, 0, 1, 2)
    train(ledger, 1)
    ledger.drop(group_id=3, attempt=0, reason=DropReason.TRUNCATED, because="x", now=2.0)
    ledger.release(step=1)
    ledger.checkpoint(step=1)
    state = json.loads(json.dumps(ledger.to_state()))
    again = Ledger.from_state(state, rules=ledger.rules)
    again.check()
    assert again.to_state() == ledger.to_state()
    assert again.snapshot() == ledger.snapshot()


def test_the_check_finds_a_group_that_vanished() -> None:
    ledger = make(groups=2)
    del ledger._live[1]
    with pytest.raises(AssertionError, match="issued 2 must equal"):
        ledger.check()
    assert not ledger.snapshot().balanced


@pytest.mark.parametrize(
    "wrong", [{"groups_per_step": 0}, {"max_look_ahead": 0}, {"max_attempts": 0}, {"lease_s": 0.0}]
)
def test_rules_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BufferRules(**{"groups_per_step": 1, "max_staleness": 0, **wrong})  # type: ignore[arg-type]
