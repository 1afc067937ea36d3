"""One writer for a run directory, whatever became of the one before."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trl_ray.errors import ConfigError, RunError
from trl_ray.observe import run_lock
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.observe.run_lock import LOCK, LockTimes, RunLock, is_free, living_holder

FAST = LockTimes(beat=0.05, dead_after=0.4)
HOLDS = """
import sys, time
from trl_ray.observe.run_lock import RunLock
RunLock.hold(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def signed(folder: Path, **changes: Any) -> Path:
    """The lock as another node's process would have left it."""
    lock = RunLock.hold(folder)
    content = json.loads((folder / LOCK).read_text())
    lock.release()
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({**content, "token": "of another", **changes}))
    return folder / LOCK


def test_a_lock_is_held_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with RunLock.hold(run) as lock:
        lock.check()
        assert [each.name for each in run.iterdir()] == [LOCK]
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on host .* is writing it now"):
            RunLock.hold(run)
        lock.check()
    assert not (tmp_path / "a").exists()
    RunLock.hold(run).release()


def test_what_a_run_has_written_stays_when_the_lock_is_given_up(tmp_path: Path) -> None:
    with RunLock.hold(tmp_path / "run"):
        run = RunDirectory.create(tmp_path / "run")
    assert not (run.path / LOCK).exists() and run.metrics.exists()


def test_the_lock_of_another_process_is_refused_while_it_lives_and_taken_once_it_is_dead(tmp_path: Path) -> None:
    process = other_process(tmp_path)
    try:
        assert living_holder(tmp_path) is not None and not is_free(tmp_path)
        with pytest.raises(ConfigError, match=f"process {process.pid} on host"):
            RunLock.hold(tmp_path)
        os.kill(process.pid, signal.SIGSTOP)  # hung is not dead
        with pytest.raises(ConfigError, match=f"process {process.pid} on host"):
            RunLock.hold(tmp_path)
        process.send_signal(signal.SIGKILL)
        # A process that is dead and not yet waited for is a zombie; its pid is still there.
        end = time.monotonic() + 10
        while not is_free(tmp_path) and time.monotonic() < end:
            time.sleep(0.01)
        with RunLock.hold(tmp_path) as lock:
            assert lock.taken_from is not None and f"process {process.pid} " in lock.taken_from
    finally:
        process.kill()
        process.wait()


def test_a_pid_that_was_given_to_another_process_is_no_sign_of_life(tmp_path: Path) -> None:
    signed(tmp_path, born=1)
    with RunLock.hold(tmp_path) as lock:
        assert "is dead" in (lock.taken_from or "")


def test_a_node_that_gives_no_sign_of_life_loses_its_lock_and_one_that_does_keeps_it(tmp_path: Path) -> None:
    path = signed(tmp_path, host="node-7", boot="another")
    begin = time.monotonic()
    lock = RunLock.hold(tmp_path, times=FAST)
    assert 0.3 < time.monotonic() - begin < 5 and "node-7" in (lock.taken_from or "")
    assert "no sign of life" in (lock.taken_from or "")
    lock.release()

    path = signed(tmp_path, host="node-7", boot="another")
    alive = subprocess.Popen(
        [sys.executable, "-c", "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.05)", str(path)]
    )
    try:
        with pytest.raises(ConfigError, match="on host node-7"):
            RunLock.hold(tmp_path, times=LockTimes(beat=0.2, dead_after=5.0))
    finally:
        alive.kill()
        alive.wait()


@pytest.mark.parametrize("shift_s", [-3600, 3600])
def test_a_clock_that_jumped_does_not_keep_a_dead_node_alive(tmp_path: Path, shift_s: float) -> None:
    path = signed(tmp_path, boot="another")
    os.utime(path, (time.time() + shift_s, time.time() + shift_s))
    with RunLock.hold(tmp_path, times=FAST) as lock:
        assert lock.taken_from is not None


def test_signs_of_life_are_given_while_it_is_held(tmp_path: Path) -> None:
    with RunLock.hold(tmp_path, times=FAST):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.monotonic() + 5
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_who_has_lost_the_lock_is_told_before_it_writes_and_leaves_it_to_its_new_holder(tmp_path: Path) -> None:
    lock = RunLock.hold(tmp_path)
    content = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**content, "token": "other", "host": "node-9"}))
    with pytest.raises(RunError, match="node-9"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).unlink()


def away(*given: Any) -> bytes:
    raise OSError(errno.EIO, "the file server is away")


def test_a_lock_that_cannot_be_read_for_a_while_is_not_lost_and_one_that_is_gone_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLock.hold(tmp_path, times=LockTimes(beat=30.0, dead_after=60.0)) as lock:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", away)
            lock.check()
        content = (tmp_path / LOCK).read_bytes()
        (tmp_path / LOCK).write_bytes(content[:20])
        lock.check()
        (tmp_path / LOCK).unlink()
        with pytest.raises(RunError, match="nobody holds it now"):
            lock.check()


def test_a_lock_that_cannot_be_read_for_too_long_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        RunLock.hold(tmp_path, times=LockTimes(beat=0.05, dead_after=60.0)) as lock,
        monkeypatch.context() as patch,
    ):
        lock._seen = 0.0
        end = time.monotonic() + 5
        while not lock._seen and time.monotonic() < end:  # the beat reads it too
            time.sleep(0.01)
        patch.setattr(Path, "read_bytes", away)
        lock.check()
        lock._seen -= 30.0
        with pytest.raises(RunError, match=r"must be readable.*file server is away.*then resume"):
            lock.check()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 3}'])
def test_a_lock_that_names_nobody_and_is_held_by_nobody_is_taken(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.05)
    (tmp_path / LOCK).write_text(content)
    RunLock.hold(tmp_path).release()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_written_is_an_input_error_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder that can be written"):
        RunLock.hold(tmp_path / "file" / "run")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_an_input_error_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConfigError, match="No space left"):
        RunLock.hold(tmp_path / "run")
    assert not list(tmp_path.iterdir())
