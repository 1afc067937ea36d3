"""The run directory: where each file of a run lies, how a run gets one, and how resuming rewinds it.

RUN_DIR/
  config.yaml       resolved options               ledger.json      state of the sample ledger
  metrics.jsonl     one line per optimizer step    journal.bin      the ledger's journal
  events.jsonl      what happened to whom          completions/     step-000012.parquet
  trace.jsonl       spans of the actors            checkpoints/     step-12/
  journal.bin.payloads/   groups that may be trained yet
  .config.yaml      the options once more, by which an edit of them is known
  report.html       drawn from all of the above    run.lock         who writes it now

Whoever changes a directory holds its lock first (run_lock.py). Who may read: private_files.py.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from trl_ray.errors import ConfigError
from trl_ray.observe.private_files import file_mode, make_folder, usable_path
from trl_ray.observe.run_files import atomic_write_json, atomic_write_text, cut_json_lines, writing
from trl_ray.observe.run_lock import LOCK

_FILES = (
    *("config.yaml", ".config.yaml", "metrics.jsonl", "events.jsonl", "trace.jsonl", "ledger.json", "journal.bin"),
    "report.html",
)
_FOLDERS = ("completions", "checkpoints", "journal.bin.payloads", "model", "wandb", "tensorboard", "mlflow")
# A folder with one of these was made by a run; nothing else is ever overwritten.
_MARKS = ("metrics.jsonl", "events.jsonl")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run. Make one with `create` (a new run) or `open_existing` (resume, report)."""

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, overwrite: bool = False) -> RunDirectory:
        """Make the layout in a new or empty folder.

        With `overwrite` the files of an earlier run are deleted first; folders that hold anything but a run, and files
        that are not part of the layout, are left alone.

        Raises:
            ConfigError: the folder is in use, is no folder, or cannot be written; nothing was changed then.
        """
        run = cls.check_free(path, overwrite=overwrite)
        try:
            run._clear()
            for folder in (run.path, run.completions, run.checkpoints):
                make_folder(folder)
            for file in (run.metrics, run.events, run.trace):
                file.touch(mode=file_mode(run.path))
        except OSError as error:
            raise ConfigError(
                f"output_dir must be a folder that can be written, got {str(run.path)!r}: {error.strerror or error}. "
                "Choose another output_dir or fix the permissions."
            ) from error
        return run

    @classmethod
    def check_free(cls, path: str | os.PathLike[str], *, overwrite: bool = False) -> RunDirectory:
        """What `create` would refuse, without making anything.

        Raises:
            ConfigError: the folder is in use or is no folder.
        """
        run = cls(usable_path(path))
        run._refuse_if_in_use(overwrite=overwrite)
        return run

    @classmethod
    def open_existing(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """The directory of a run that was started before, however little of it is there.

        Raises:
            ConfigError: there is no run in `path`.
        """
        run = cls(usable_path(path))
        if not run.path.exists():
            raise ConfigError(f"A run directory must exist, got {str(run.path)!r}, which does not. Check the path.")
        if not run._is_run():
            raise ConfigError(
                f"A run directory must hold {' or '.join(_MARKS)}, got {str(run.path)!r}, which does not. "
                "Give the output_dir of a run that was started before."
            )
        return run

    @property
    def config(self) -> Path:
        """The resolved options; load again to the same run."""
        return self.path / "config.yaml"

    @property
    def recorded_config(self) -> Path | None:
        """The options as the run wrote them down itself; None where it was begun by an earlier release."""
        path = self.path / ".config.yaml"
        return path if path.is_file() else None

    @property
    def metrics(self) -> Path:
        """One line per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Actors lost and restarted, versions published and pulled, drops, warnings."""
        return self.path / "events.jsonl"

    @property
    def trace(self) -> Path:
        """Spans of the actors' timelines."""
        return self.path / "trace.jsonl"

    @property
    def ledger(self) -> Path:
        """Where every group is."""
        return self.path / "ledger.json"

    @property
    def journal(self) -> Path:
        """The ledger's journal."""
        return self.path / "journal.bin"

    @property
    def completions(self) -> Path:
        """Folder with one parquet file per step."""
        return self.path / "completions"

    @property
    def checkpoints(self) -> Path:
        """Folder with one folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.path / "report.html"

    def completions_file(self, step: int) -> Path:
        """The completions that step trained on."""
        return self.completions / f"step-{step:06d}.parquet"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint written after `step`."""
        return self.checkpoints / f"step-{step}"

    def write_config(self, text: str) -> None:
        """Save the resolved options (YAML text) atomically; twice, so that it is known when one is edited."""
        atomic_write_text(self.path / ".config.yaml", text)
        atomic_write_text(self.config, text)

    def write_ledger(self, summary: object) -> None:
        """Save the ledger's snapshot (mapping or dataclass): a reader sees one step's numbers or the next one's."""
        atomic_write_json(self.ledger, summary)

    def truncate_after(self, step: int) -> None:
        """Forget metrics and completions of steps after `step`, which a resumed run trains again.

        Events and trace are kept: they say what really happened, twice if it happened twice.

        Raises:
            RunError: a file cannot be written.
        """
        cut_json_lines(self.metrics, lambda record: int(record.get("step", 0)) <= step)
        for file in self.completions.glob("*.parquet"):
            match = re.fullmatch(r"(?:step|eval(?:-.+)?)-(\d+)", file.stem)
            if match and int(match[1]) > step:
                with writing(file):
                    file.unlink()

    def _is_run(self) -> bool:
        return any((self.path / mark).is_file() for mark in _MARKS)

    def _refuse_if_in_use(self, *, overwrite: bool) -> None:
        if not self.path.exists():
            self._refuse_if_it_cannot_be_made()
            return
        if not self.path.is_dir():
            raise ConfigError(f"output_dir must be a folder, got the file {str(self.path)!r}. Choose another.")
        if all(LOCK in each.name for each in self.path.iterdir()):
            self._refuse_if_it_cannot_be_made()
            return
        if not self._is_run():
            raise ConfigError(
                f"output_dir must be new, empty, or the directory of an earlier run, got {str(self.path)!r}, which "
                "holds other files. Choose another output_dir."
            )
        if not overwrite:
            raise ConfigError(
                f"output_dir must be new or empty, got {str(self.path)!r}, which holds a run. Choose "
                f"another, delete that run with overwrite_output_dir=true, or continue it: trl-ray resume {self.path}"
            )

    def _refuse_if_it_cannot_be_made(self) -> None:
        above = next(each for each in (self.path, *self.path.parents) if each.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(
                f"output_dir must be a folder that can be written, got {str(self.path)!r}: nothing can be made "
                f"in {above}. Choose another output_dir or fix the permissions."
            )

    def _clear(self) -> None:
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        # What a run that went on with a new journal has left aside.
        for path in (*(self.path / name for name in _FOLDERS), *self.path.glob("journal.bin*.left*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
