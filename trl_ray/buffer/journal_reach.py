"""How far back a journal reaches, found out on a copy; and the ledger's copies in checkpoints, for when it does not.

journal.bin ─ copied, replayed ─► JournalReach ─ covers(step)? ─► the run goes on with its journal
checkpoint/ledger_copy.json ─────────────────────────────────────► the run goes on with a new one
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ray.buffer.durable import DurableLedger
from trl_ray.buffer.entry import BufferRules
from trl_ray.buffer.ledger import Ledger
from trl_ray.errors import CheckpointError, JournalError

LEDGER_COPY = "ledger_copy.json"
"""In checkpoints: the ledger as it was then."""
_FORMAT = 1
_ANY_RULES = BufferRules(groups_per_step=1, max_staleness=0, reuse_finished=False)


class _Replay(DurableLedger):
    """What a journal says, without a word of who goes on with it; payloads stay where they are."""

    def _enter(self, rules: BufferRules, incarnation: str, now: float, step: int | None, version: int | None) -> None:
        return

    def _move_payloads_out_of_the_journal(self) -> None:
        return

    def _forget_payloads(self) -> None:
        return


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JournalReach:
    """Which steps a run can go back to with its journal."""

    problem: str | None = None
    """Why it is of no use; None: it is whole."""
    ledger: Mapping[str, Any] | None = None
    """The ledger's state; None where nothing is recorded."""
    is_unknown: bool = False
    """There was no room to look; its owner will."""

    @property
    def is_empty(self) -> bool:
        """Whether it is certain that no group is recorded."""
        return self.ledger is None and self.problem is None and not self.is_unknown

    def covers(self, step: int) -> bool:
        """Whether the ledger can be taken back to `step`."""
        if self.ledger is None:
            return self.is_unknown or (self.problem is None and step == 0)
        try:
            Ledger.from_state(self.ledger, rules=_ANY_RULES).restore(step=step, version=None, now=0.0)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        if self.ledger is None:
            return self.problem or "it is empty or missing"
        return f"it reaches from step {self.ledger['oldest_restorable']} to step {self.ledger['step']}"


def journal_reach(path: str | Path) -> JournalReach:
    """Read a journal as its owner would, and change nothing.

    Args:
        path: of the journal, which may be missing.
    """
    if not Path(path).is_file():
        return JournalReach()
    try:
        with tempfile.TemporaryDirectory(prefix="trl_ray-journal-") as folder:
            copy = Path(folder) / Path(path).name
            shutil.copyfile(path, copy)
            return _reach(copy, of=Path(path))
    except OSError:
        return JournalReach(is_unknown=True)


def _reach(copy: Path, *, of: Path) -> JournalReach:
    try:
        replay = _Replay(path=copy, rules=_ANY_RULES, incarnation="", now=0.0)
    except JournalError as error:
        # A file system that refuses says something of the copy, and nothing of the journal.
        refused = isinstance(error.__cause__, OSError)
        return JournalReach(is_unknown=refused, problem=None if refused else str(error).replace(str(copy), str(of)))
    with closing(replay):
        return JournalReach(ledger=replay.ledger.to_state() if replay.ledger.issued else None)


def write_copy(copy: Mapping[str, Any]) -> bytes:
    """The content of `LEDGER_COPY`."""
    return json.dumps({"format": _FORMAT, **copy}, separators=(",", ":")).encode()


def read_copy(path: str | Path) -> Mapping[str, Any]:
    """The inverse of `write_copy`.

    Raises:
        CheckpointError: it cannot be read, or is of another version.
    """
    try:
        copy = json.loads(Path(path).read_bytes())
        known = isinstance(copy, dict) and copy["format"] == _FORMAT
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} must be readable, but: {error!r}. Use another checkpoint.") from error
    if not known:
        raise CheckpointError(f"{path} must be of format {_FORMAT}, and is not. Use another checkpoint.")
    return {key: value for key, value in copy.items() if key != "format"}


def groups_again(copy: Mapping[str, Any]) -> list[int]:
    """The groups that were on their way when a copy was made: a run that goes on from it generates them again."""
    return sorted(int(entry["group_id"]) for entry in copy["ledger"]["live"])
