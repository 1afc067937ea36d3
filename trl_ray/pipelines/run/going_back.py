"""Where a run goes on from, found out before anything is cut: the checkpoint, and the ledger that goes with it.

find_return ─ checkpoints verified, journal replayed on a copy ─► Return      (reads only, before anything is started)
leave_aside ─ younger checkpoints aside, the journal too where it is of no use ─► what is told     (before the actors)
RunDirectory.truncate_after ─ metrics and completions of steps that are trained again    (once the actors are there)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_ray.buffer.journal_reach import LEDGER_COPY, JournalReach, groups_again, journal_reach, read_copy
from trl_ray.config.runs.run_config import RunConfig
from trl_ray.config.sections import ModelConfig
from trl_ray.errors import CheckpointError, ConfigError, JournalError
from trl_ray.models.checkpoint import (
    checkpoint_step,
    free_name,
    latest_checkpoint,
    leave_after,
    list_checkpoints,
    verify_checkpoint,
)
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import parse_json, read_json_lines, to_json, writing

ORIGIN_FILE = "origin.json"
"""In checkpoints: what they are of."""
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a user asked for beside going on."""

    given: str | bool | None = None
    """A checkpoint, or the run directory; True is that too."""
    at: int | None = None
    """The step of the checkpoint to go back to; None: the newest that can be used."""
    new_journal: bool = False
    """Go on with the checkpoint's own copy of the ledger, whatever the journal says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrigin:
    """What wrote a checkpoint: a run goes on from its own alone, whatever lies in the folder of its checkpoints."""

    pipeline: str
    model: str | None
    """`model_name_or_path`: not compared itself, as a model given in Python gets another folder each time."""

    @classmethod
    def of(cls, config: RunConfig) -> RunOrigin:
        """That of a run."""
        return cls(pipeline=config.pipeline, model=config.part(ModelConfig).model_name_or_path)

    def file(self) -> dict[str, bytes]:
        """By its name in a checkpoint."""
        return {ORIGIN_FILE: to_json({"pipeline": self.pipeline}).encode()}

    def check(self, checkpoint: Path) -> None:
        """Of a verified checkpoint; those of earlier versions do not say what wrote them.

        Raises:
            CheckpointError: it is of another pipeline, or its model is of another shape.
        """
        for what, mine, found in (
            ("pipeline", {"pipeline": self.pipeline}, _read_json(checkpoint / ORIGIN_FILE)),
            ("model", _read_json(Path(self.model or "") / "config.json"), _read_json(checkpoint / "config.json")),
        ):
            named = [name for name in ("pipeline", *_SHAPE) if name in mine and name in found]
            if differs := [name for name in named if mine[name] != found[name]]:
                told = ", ".join(f"{name} {mine[name]} and not {found[name]}" for name in differs)
                raise CheckpointError(
                    f"{checkpoint} must be of this run, whose {what} has {told}. Use another checkpoint. "
                    f"{_new_run(str(checkpoint))}"
                )


def _read_json(file: Path) -> dict[str, Any]:
    found = parse_json(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Return:
    """What a session starts from."""

    checkpoint: str | None = None
    """None: nothing was trained yet."""
    step: int = 0
    problems: tuple[str, ...] = ()
    """Why younger checkpoints cannot be used."""
    forgets: str | None = None
    """Why the journal is left and the checkpoint's own copy of the ledger used; None: it is not."""

    @property
    def ledger_copy(self) -> str | None:
        """The file that stands for the journal."""
        if self.forgets is None or self.checkpoint is None:
            return None
        return str(Path(self.checkpoint) / LEDGER_COPY)


def resolve(wish: Wish, output_dir: str, *, within: int | None) -> Wish:
    """The wish with the step of the checkpoint, once it is certain that there is one.

    Args:
        wish: of the user.
        output_dir: of the run.
        within: how many of the newest checkpoints the run's journal reaches back to; None: it has none.

    Raises:
        ConfigError: it is none of the run's, or older than the run can go back to, or the run has no journal.
        CheckpointError: it is damaged.
    """
    directory = RunDirectory.open_existing(output_dir)
    if wish.new_journal and within is None:
        raise ConfigError(
            "new_journal must be false for a run that trains on a dataset: it keeps no journal, its checkpoints say "
            "what was trained. Leave it out."
        )
    if wish.at == 0:
        return wish
    given: str | bool | Path = directory.checkpoint(wish.at) if wish.at is not None else (wish.given or True)
    path = Path(directory.path if given is True else str(given)).expanduser().absolute()
    if path == directory.path:
        return wish
    known = list_checkpoints(directory.checkpoints)
    if path not in known:
        raise ConfigError(
            f"resume_from_checkpoint must be true or a checkpoint of the run in output_dir, which has "
            f"{', '.join(each.name for each in known) or 'none'} in {directory.checkpoints}; got {given}. For a "
            f"new run from its weights set model_name_or_path={given}."
        )
    step = checkpoint_step(path)
    if within is not None and path not in known[-within:] and not wish.new_journal:
        raise ConfigError(
            f"resume_from_checkpoint must be one of the last {within} checkpoints here, as the ledger's journal "
            f"reaches no further back, got {path.name} of {known[-1].name}. To go on without the journal: trl-ray "
            f"resume {directory.path} --from-checkpoint {step} --new-journal. For a new run from its weights set "
            f"model_name_or_path={given}."
        )
    verify_checkpoint(path)
    return replace(wish, at=step)


def find_return(
    directory: RunDirectory,
    *,
    origin: RunOrigin,
    wish: Wish = Wish(),
    has_journal: bool = False,
    before: Return | None = None,
) -> Return:
    """The youngest checkpoint that verifies and that the ledger can be taken back to; changes nothing.

    Args:
        directory: of the run.
        origin: what its checkpoints are of.
        wish: of the user.
        has_journal: whether the run keeps a ledger in a journal.
        before: what this process's last session started from, which has left the journal in order.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
        JournalError: the journal does not reach back to the only ones that can be used; says what is left.
    """
    found = _checkpoint(directory, wish, origin)
    in_order = before is not None and before.forgets is None and not found.problems
    if not has_journal or (in_order and not wish.new_journal):
        return found
    if wish.new_journal:
        return _with_copy(directory, found, "new_journal was asked for")
    reach = journal_reach(directory.journal)
    if reach.is_empty and _has_copy(found) and (why := _not_begun(directory, before)):
        return _with_copy(directory, found, why)
    if reach.covers(found.step):
        return found
    if reach.problem is None and reach.ledger is not None and found.step < reach.ledger["step"]:
        # The journal is whole: what it has forgotten is in the checkpoint, and nothing is lost that was not anyway.
        return _with_copy(directory, found, f"the journal does not reach back to step {found.step}: {reach}")
    raise _useless(directory, found, reach)


def _checkpoint(directory: RunDirectory, wish: Wish, origin: RunOrigin) -> Return:
    if wish.at == 0:
        return Return()
    if wish.at is not None:
        path = directory.checkpoint(wish.at)
        verify_checkpoint(path)
        origin.check(path)
        return Return(checkpoint=str(path), step=wish.at)
    found = latest_checkpoint(directory.checkpoints, check=origin.check)
    if found.path is None and found.problems:
        raise CheckpointError(
            f"A run must go on from a checkpoint that is whole, and none in {directory.checkpoints} is: "
            f"{' '.join(found.problems)} Nothing was changed: metrics, events and completions are as they were. "
            "Restore a checkpoint from a copy, or begin a new run in another output_dir."
        )
    step = 0 if found.path is None else checkpoint_step(found.path)
    return Return(checkpoint=found.path, step=step, problems=found.problems)


def _not_begun(directory: RunDirectory, before: Return | None) -> str | None:
    """Why a journal that holds nothing is no loss: it was left for a new one, which was not begun; None: it is one."""
    if before is not None and before.forgets is not None:
        return before.forgets
    left = sorted(each.name for each in directory.path.glob(f"{directory.journal.name}.left*"))
    if not left:
        return None
    return f"an earlier start left the journal aside ({', '.join(left)}) and ended before it had begun another"


def _has_copy(found: Return) -> bool:
    return found.checkpoint is not None and (Path(found.checkpoint) / LEDGER_COPY).is_file()


def _with_copy(directory: RunDirectory, found: Return, why: str) -> Return:
    if found.checkpoint is not None:
        if not _has_copy(found):
            raise JournalError(
                f"To go on without the journal, {found.checkpoint} must hold {LEDGER_COPY}, and does not: it was "
                f"written by an earlier version. ({why}) Nothing was changed. {_new_run(found.checkpoint)}"
            )
        read_copy(Path(found.checkpoint) / LEDGER_COPY)
    return Return(checkpoint=found.checkpoint, step=found.step, problems=found.problems, forgets=why)


def _useless(directory: RunDirectory, found: Return, reach: JournalReach) -> JournalError:
    path, where = directory.path, "the beginning" if found.checkpoint is None else Path(found.checkpoint).name
    if found.checkpoint is None or _has_copy(found):
        way = (
            f"Restore the journal from a copy, or go on without it: trl-ray resume {path} --from-checkpoint "
            f"{found.step} --new-journal, which generates the groups again that were on their way then."
        )
    else:
        way = _new_run(found.checkpoint)
    bad = "".join(f" ({problem})" for problem in found.problems)
    return JournalError(
        f"The journal {directory.journal} must know what step {found.step} had trained to go on from {where}, and it "
        f"does not: {reach}. {where} itself can be used.{bad} Nothing was changed. {way}"
    )


def _new_run(checkpoint: str) -> str:
    return f"Begin a new run from its weights: model_name_or_path={checkpoint}."


def leave_aside(directory: RunDirectory, back: Return) -> list[str]:
    """Rename what a run that goes on from there does not go on with, and tell of it; nothing is deleted.

    Checkpoints that are younger are left aside, damaged ones too: counted among those to keep they would be kept in
    the place of good ones.

    Raises:
        RunError: a file cannot be renamed.
    """
    told = [f"a checkpoint cannot be used: {problem}" for problem in back.problems]
    if back.checkpoint is None:
        told.append("there is no checkpoint to go on from: training begins anew, at step 0")
    with writing(directory.checkpoints):
        left = leave_after(directory.checkpoints, step=back.step)
    if left:
        told.append(f"checkpoints after step {back.step} are left aside: {', '.join(Path(each).name for each in left)}")
    if back.forgets is not None:
        with writing(directory.journal):
            told.append(_leave_journal(directory, back))
    return told


def _leave_journal(directory: RunDirectory, back: Return) -> str:
    lines = read_json_lines(directory.metrics)
    last = max((int(line.get("step", 0)) for line in lines), default=back.step)
    again = [] if back.ledger_copy is None else groups_again(read_copy(back.ledger_copy))
    kept = ""
    for each in (directory.journal, directory.journal.with_name(f"{directory.journal.name}.payloads")):
        if each.exists():
            aside = free_name(each)
            os.replace(each, aside)
            kept = f"; the old one is kept as {aside.name}" if each == directory.journal else kept
    steps = f"steps {back.step + 1} to {last} are trained again, " if last > back.step else ""
    named = f" ({', '.join(map(str, again))})" if again else ""
    return (
        f"a new journal is begun from the ledger of step {back.step}, because {back.forgets}: {steps}{len(again)} "
        f"groups that were on their way then{named} are generated again{kept}"
    )
