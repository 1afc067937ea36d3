"""Reads a written history and says what is wrong with it; it knows nothing of the package.

    history, one event a line --> lost, unexpected, duplicated, recovered (Jepsen's words), and illegal transitions

A timeline ends where the learner goes back to a checkpoint; the next one begins with the steps up to it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What a history showed."""

    violations: list[str] = field(default_factory=list)
    lost: int = 0
    """Issued, and neither trained nor dropped in the end."""
    unexpected: int = 0
    """Trained, and never admitted, sampled or committed so."""
    duplicated: int = 0
    """Trained twice in one timeline."""
    recovered: int = 0
    """Trained although nobody was told that the commit had arrived."""
    trained: int = 0
    events: int = 0

    def wrong(self, text: str) -> None:
        """One more violation; the first few are enough."""
        self.violations.append(text)


class Checker:
    """One pass over a history.

    Args:
        rules: the run's numbers: groups_per_step, capacity, max_age_at_use, max_attempts.
    """

    def __init__(self, rules: dict[str, Any]) -> None:
        self.rules = rules
        self.verdict = Verdict()
        self.names: dict[int, str] = {}
        self.samples: dict[int, dict[str, Any]] = {}
        self.leased: dict[tuple[int, int], dict[str, Any]] = {}
        self.youngest: dict[int, int] = {}
        self.checksums: dict[int, str] = {0: ""}
        self.learned: dict[int, list[dict[str, Any]]] = {}
        self.skipped: dict[int, int] = {}
        self.taken: dict[int, list[dict[str, Any]]] = {}
        self.acknowledged: dict[int, int] = {}
        self.told: set[tuple[int, int]] = set()
        self.step = 0
        self.restored = False
        self.failures: dict[int, int] = defaultdict(int)
        self.issued = 0

    def run(self, lines: Iterable[str]) -> Verdict:
        """Read every line."""
        for number, line in enumerate(lines, 1):
            event = json.loads(line)
            self.verdict.events = number
            self._now = event["t"]
            handler = getattr(self, f"_on_{event['e']}", None)
            if handler is not None:
                handler(event)
            if len(self.verdict.violations) >= 5:
                break
        return self.verdict

    def _wrong(self, text: str) -> None:
        self.verdict.wrong(f"t={self._now:.3f} step {self.step}: {text}")

    # ---- admission, leases, samples

    def _on_admitting(self, event: dict[str, Any]) -> None:
        """Asked for; whether it was heard is not known yet."""
        self.names.update((int(name.partition(":")[2]), name) for name in event["names"])

    def _on_admitted(self, event: dict[str, Any]) -> None:
        for name, group_id in zip(event["names"], event["ids"], strict=True):
            if name != f"0:{group_id}":
                self._wrong(f"prompt {name} became group {group_id}: one before it was issued twice, or never")

    def _on_sampled(self, event: dict[str, Any]) -> None:
        """An engine begins with a group."""
        key = (event["group"], event["attempt"])
        before = self.leased.get(key)
        if before is not None and before["run"] == event["run"]:
            self._wrong(f"group {key[0]}, attempt {key[1]}, was leased to {before['worker']} and to {event['worker']}")
        # A worker that hung may begin with an attempt that was given up meanwhile: its commit must be fenced.
        if event["prompt"] != f"0:{key[0]}":
            self._wrong(f"group {key[0]} was leased with the prompt {event['prompt']}")
        self.leased[key] = event
        self.youngest[key[0]] = max(event["attempt"], self.youngest.get(key[0], 0))
        self.samples[event["serial"]] = event

    def _on_finished(self, event: dict[str, Any]) -> None:
        """An engine is done: with which versions, of which weights."""
        self.samples[event["serial"]] |= {"versions": event["versions"], "cut_off": event["cut_off"]}

    def _on_told(self, event: dict[str, Any]) -> None:
        """A worker was answered."""
        key = (event["group"], event["attempt"])
        self.told.add(key)
        if event["kind"] == "commit" and event["outcome"] == "applied" and not event["drop"]:
            self.acknowledged[event["group"]] = event["attempt"]

    # ---- steps

    def _on_took(self, event: dict[str, Any]) -> None:
        step, groups = event["step"], event["groups"]
        if step in self.taken and self.taken[step] != groups:
            self._wrong(f"step {step} was taken as {self.taken[step]} and again as {groups}")
        self.taken[step] = groups
        if len(groups) != self.rules["groups_per_step"]:
            self._wrong(f"step {step} holds {len(groups)} groups")
        for group in groups:
            self._check_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        group_id, sample = group["group"], self.samples.get(group["serial"])
        if sample is None or (sample["group"], sample["attempt"]) != (group_id, group["attempt"]):
            self.verdict.unexpected += 1
            self._wrong(f"group {group_id} holds completions of another: {group}, sampled as {sample}")
            return
        if group["prompt"] != f"0:{group_id}" or group_id not in self.names:
            self.verdict.unexpected += 1
            self._wrong(f"group {group_id} has the prompt {group['prompt']}, admitted was {self.names.get(group_id)}")
        if sample.get("cut_off"):
            self._wrong(f"group {group_id} has nothing to learn, and is trained")
        if self.youngest.get(group_id, 0) > group["attempt"]:
            self._wrong(f"group {group_id} is trained as {group}, and attempt {self.youngest[group_id]} was leased")
        attempt = self.acknowledged.get(group_id, group["attempt"])
        if attempt != group["attempt"]:
            self._wrong(f"the commit of group {group_id}, attempt {attempt}, was acknowledged, yet another is trained")
        for version, checksum in sample["versions"]:
            if self.checksums.get(version) != checksum:
                self._wrong(
                    f"group {group_id} was sampled by weights {checksum!r} of version {version}, which are gone"
                )
        oldest = min(version for version, _ in sample["versions"])
        age = self.step - oldest
        if not 0 <= age <= self.rules["max_age_at_use"]:
            self._wrong(f"group {group_id} has the age {age}, allowed are {self.rules['max_age_at_use']}")

    def _on_learned(self, event: dict[str, Any]) -> None:
        """The learner has done a step: this is the truth about training."""
        step = event["step"]
        if step != self.step + 1:
            self._wrong(f"step {step} was learned after {self.step}")
        self.step = step
        self.checksums[step] = event["checksum"]
        if event["skipped"]:
            self.skipped[step] = len(event["groups"])
            return
        known = self._known()
        for group in event["groups"]:
            if group["group"] in known:
                self.verdict.duplicated += 1
                self._wrong(f"group {group['group']} was trained before in this timeline")
            if (group["group"], group["attempt"]) not in self.told:
                self.verdict.recovered += 1
        self.learned[step] = event["groups"]
        known.update(group["group"] for group in event["groups"])
        self.verdict.trained = len(known)

    _trained_ids: set[int] | None = None

    def _known(self) -> set[int]:
        if self._trained_ids is None:
            self._trained_ids = {g["group"] for groups in self.learned.values() for g in groups}
        return self._trained_ids

    def _on_balance(self, event: dict[str, Any]) -> None:
        """What the ledger says of itself, right after a step."""
        live, dropped = sum(event["live"].values()), sum(event["dropped"].values())
        if event["issued"] != event["trained"] + dropped + live:
            self._wrong(f"the balance is wrong: {event}")
        if event["step"] != self.step or event["trained"] != len(self._known()):
            self._wrong(
                f"{len(self._known())} groups are trained in {self.step} steps, the ledger says {event['trained']} in "
                f"{event['step']}"
            )
        if event["dropped"].get("numerics", 0) != sum(self.skipped.values()):
            self._wrong(f"steps {self.skipped} were skipped, the ledger dropped {event['dropped']}")
        if "stale" in event["dropped"] or (event["dropped"].get("end_of_run") and not event["final"]):
            self._wrong(f"nothing may be dropped so: {event['dropped']}")
        if not self.restored and live > self.rules["capacity"]:
            self._wrong(f"{live} groups are live, and there are {self.rules['capacity']} slots")
        if event["issued"] < self.issued:
            self._wrong(f"{self.issued} groups were issued, now {event['issued']}")
        self.issued = event["issued"]

    # ---- interruptions

    def _on_went_back(self, event: dict[str, Any]) -> None:
        """The learner is that of a checkpoint again: what came after it has never been."""
        self.step, self.restored = event["step"], True
        for book in (self.learned, self.skipped, self.checksums):
            for step in [step for step in book if step > self.step]:
                del book[step]
        self.taken.clear()
        self._trained_ids = None
        # Groups of weights that are gone are made anew, with another attempt.
        self.acknowledged.clear()

    def _on_power_cut(self, event: dict[str, Any]) -> None:
        """What was never safe, leases and admissions among it, may be given out again."""
        self.issued = 0
        self.leased.clear()
        self.youngest.clear()

    def _on_dropped(self, event: dict[str, Any]) -> None:
        if event["reason"] == "retries_exhausted" and event["attempt"] + 1 < self.rules["max_attempts"]:
            self._wrong(f"group {event['group']} was given up after {event['attempt'] + 1} attempts")
        if event["reason"] == "truncated":
            sample = self.leased.get((event["group"], event["attempt"]))
            if sample is not None and not sample.get("cut_off"):
                self._wrong(f"group {event['group']} was dropped as cut off, and is not")

    def _on_crashed(self, event: dict[str, Any]) -> None:
        self._wrong(f"the run broke down: {event['why']}")

    def _on_ended(self, event: dict[str, Any]) -> None:
        """Every group must have had its fate."""
        dropped, trained = sum(event["dropped"].values()), len(self._known())
        self.verdict.lost = max(0, event["issued"] - trained - dropped)
        if event["issued"] != trained + dropped or sum(event["live"].values()):
            self._wrong(f"{event['issued']} groups were issued, {trained} trained, {dropped} dropped; {event}")
        if event["step"] != event["goal"]:
            self._wrong(f"{event['goal']} steps were to be trained, {event['step']} were")


def check_history(lines: Iterable[str], rules: dict[str, Any]) -> Verdict:
    """What is wrong with a history."""
    return Checker(rules).run(lines)


def summary(verdicts: Iterable[Verdict]) -> Counter[str]:
    """All of them together."""
    total: Counter[str] = Counter()
    for each in verdicts:
        total["violations"] += len(each.violations)
        for name in ("lost", "unexpected", "duplicated", "recovered", "trained", "events"):
            total[name] += getattr(each, name)
    return total
