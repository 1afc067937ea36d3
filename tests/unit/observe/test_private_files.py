"""What a run writes is its owner's alone, or its group's where the folder is one that a group shares (S20)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from trl_ray.observe.private_files import loose_token
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_files import JsonLines, atomic_write_json
from trl_ray.observe.run_lock import LOCK, RunLock


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """The permissions of everything in a folder, and its own."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) & 0o777 for path in (folder, *folder.rglob("*"))}


def write_run(path: Path) -> dict[str, int]:
    with RunLock.hold(path):
        run = RunDirectory.create(path)
        run.write_config("a: 1\n")
        run.write_ledger({})
        JsonLines(run.path / "new.jsonl").close()
        atomic_write_json(run.completions / "x.json", {})
        return modes(path)


def test_a_run_is_its_owners_alone_whatever_the_umask_lets_through(tmp_path: Path, umask: int) -> None:
    found = write_run(tmp_path / "run")
    folders = {"run", "completions", "checkpoints"}
    assert found == {name: 0o700 if name in folders else 0o600 for name in found}
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "trace.jsonl", "new.jsonl", "x.json", LOCK} < found.keys()


def test_in_a_folder_that_a_group_shares_the_group_gets_what_the_umask_gives_it(tmp_path: Path, umask: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2770)
    found = write_run(shared / "run")
    folders = {"run", "completions", "checkpoints"}
    assert found == {name: (0o770 if name in folders else 0o660) & ~umask for name in found}


def test_a_folder_that_was_there_keeps_its_mode_and_what_is_in_it_is_private(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    found = write_run(tmp_path / "run")
    assert found.pop("run") == 0o755 and set(found.values()) == {0o600, 0o700}


@pytest.mark.parametrize(("mode", "is_loose"), [(0o600, False), (0o400, False), (0o644, True), (0o660, True)])
def test_a_token_that_others_may_read_is_told(tmp_path: Path, mode: int, is_loose: bool) -> None:
    token = tmp_path / "auth_token"
    environment = {"RAY_AUTH_TOKEN_PATH": str(token)}
    assert loose_token(environment) is None
    token.write_text("secret")
    token.chmod(mode)
    told = loose_token(environment)
    assert (told is not None) == is_loose
    assert told is None or (f"chmod 600 {token}" in told and f"{mode:04o}" in told and "secret" not in told)
