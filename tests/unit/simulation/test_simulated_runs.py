"""A few simulated runs; with --long all planted bugs and a whole day.  (More: tests/simulation/simulate.py)"""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from simulation.faults import DENSE, FaultPlan
from simulation.history_checker import Verdict, check_history
from simulation.planted_bugs import BUGS
from simulation.simulate import judged, scene_of, seeds_to_find
from simulation.simulated_run import Scene

RULES = {"groups_per_step": 1, "capacity": 2, "max_age_at_use": 1, "max_attempts": 3}
FOUND_AT_ONCE = ["payloads of ready groups are deleted", "commits are not written down"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_faults_of_every_kind_leave_every_group_trained_once_or_dropped(seed: int) -> None:
    played, verdict = judged(replace(scene_of(seed), hours=0.15))
    assert verdict.violations == []
    assert verdict.trained > 0
    assert sum(played.faults.values()) > 10


def test_one_seed_is_one_history() -> None:
    scene = Scene(seed=4, plan=DENSE, hours=0.1)
    histories = [judged(scene)[0].history for _ in range(2)]
    assert histories[0] == histories[1]
    assert histories[0] != judged(replace(scene, seed=5))[0].history


@pytest.mark.parametrize("name", FOUND_AT_ONCE)
def test_a_planted_bug_is_found(name: str) -> None:
    assert seeds_to_find(name, 3) is not None


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in BUGS if name not in FOUND_AT_ONCE])
def test_every_planted_bug_is_found_within_200_seeds(name: str) -> None:
    assert seeds_to_find(name, 200) is not None


@pytest.mark.long
def test_a_day_takes_less_than_a_minute_and_nothing_is_wrong() -> None:
    begin = time.process_time()
    played, verdict = judged(Scene(seed=1, plan=FaultPlan(), hours=24))
    assert time.process_time() - begin < 60
    assert verdict.violations == []
    assert played.simulated_s > 24 * 3600
    assert sum(played.faults.values()) > 1000


@pytest.mark.long
def test_thousands_of_faults_leave_no_violation() -> None:
    faults = 0
    for seed in range(100, 1000):
        played, verdict = judged(scene_of(seed))
        assert verdict.violations == [], f"seed {seed}"
        faults += sum(played.faults.values())
        if faults > 50_000:
            return
    raise AssertionError(f"only {faults} faults")


# ---- the checker, on histories written by hand


class Story:
    """A history in short: one group a step, by default without a fault."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, event: str, **facts: Any) -> "Story":
        self.lines.append(json.dumps({"e": event, "t": float(len(self.lines)), **facts}))
        return self

    def sampled(self, group: int, *, attempt: int = 0, serial: int | None = None, version: int = 0) -> "Story":
        serial = group if serial is None else serial
        self.say("admitting", names=[f"0:{group}"])
        self.say("sampled", group=group, attempt=attempt, serial=serial, prompt=f"0:{group}", worker="rollout-0", run=1)
        checksum = "" if version == 0 else f"w{version}"
        return self.say("finished", serial=serial, versions=[[version, checksum]], cut_off=False)

    def learned(self, step: int, group: int, *, attempt: int = 0, serial: int | None = None) -> "Story":
        serial = group if serial is None else serial
        groups = [{"group": group, "attempt": attempt, "serial": serial, "prompt": f"0:{group}"}]
        self.say("took", step=step, groups=groups)
        return self.say("learned", step=step, skipped=False, checksum=f"w{step}", groups=groups)

    def ended(self, **changes: Any) -> "Story":
        facts = {"issued": 2, "dropped": {}, "live": {}, "step": 2, "goal": 2} | changes
        return self.say("ended", **facts)

    def verdict(self) -> Verdict:
        return check_history(self.lines, RULES)


def test_a_faultless_history_has_nothing_wrong() -> None:
    verdict = Story().sampled(0).learned(1, 0).sampled(1, version=1).learned(2, 1).ended().verdict()
    assert (verdict.violations, verdict.trained, verdict.recovered) == ([], 2, 2)


def test_a_group_that_is_neither_trained_nor_dropped_is_lost() -> None:
    verdict = Story().sampled(0).learned(1, 0).sampled(1, version=1).learned(2, 1).ended(issued=3).verdict()
    assert verdict.lost == 1
    assert "3 groups were issued, 2 trained, 0 dropped" in verdict.violations[0]


def test_a_group_that_is_trained_twice_is_duplicated_unless_the_learner_went_back() -> None:
    twice = Story().sampled(0).learned(1, 0).sampled(0, attempt=1, serial=9).learned(2, 0, attempt=1, serial=9)
    assert twice.verdict().duplicated == 1
    back = Story().sampled(0).learned(1, 0).say("went_back", step=0).learned(1, 0)
    back.sampled(1, version=1).learned(2, 1).ended()
    assert (back.verdict().duplicated, back.verdict().violations) == (0, [])


@pytest.mark.parametrize(
    ("story", "words"),
    [
        (Story().learned(1, 0), "holds completions of another"),
        (Story().sampled(0).learned(1, 0, attempt=1), "holds completions of another"),
        (Story().sampled(0).sampled(0), "was leased to rollout-0 and to rollout-0"),
        (Story().sampled(0).sampled(0, attempt=1, serial=5).learned(1, 0), "attempt 1 was leased"),
        (Story().sampled(0).learned(1, 0).learned(3, 0), "step 3 was learned after 1"),
        (Story().sampled(0, version=7).learned(1, 0), "which are gone"),
        (Story().sampled(0).sampled(1).sampled(2).learned(1, 0).learned(2, 1).learned(3, 2), "has the age 2"),
        (Story().say("admitted", ids=[4], names=["0:3"]), "prompt 0:3 became group 4"),
        (Story().say("crashed", why="KeyError"), "the run broke down: KeyError"),
        (Story().say("dropped", group=1, attempt=0, reason="retries_exhausted"), "given up after 1 attempts"),
    ],
)
def test_illegal_transitions_are_named_even_if_the_end_is_right(story: Story, words: str) -> None:
    assert any(words in violation for violation in story.verdict().violations)
