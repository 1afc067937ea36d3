"""Warm processes are used like plain Python: the same arguments, files, signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from warm_processes import warm_python

pytestmark = pytest.mark.integration
# In short sleeps: a signal that comes just before Python begins to sleep is heard of after it.
WAITS = "import os, time; print(os.getpid(), flush=True); [time.sleep(0.05) for _ in range(1200)]"


@pytest.fixture(autouse=True)
def only_where_there_are_any() -> None:
    if warm_python() == sys.executable:
        pytest.skip("processes are forked on Linux only, and where tests see no GPU")


@pytest.fixture(params=["plain", "warm"])
def python(request: pytest.FixtureRequest) -> str:
    return sys.executable if request.param == "plain" else warm_python()


def test_it_has_torch_loaded_and_not_ray() -> None:
    code = "import sys; print(*(name in sys.modules for name in ('torch', 'trl_ray.actors.policy_learner', 'ray')))"
    loaded = {
        name: subprocess.run([name, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for name in (sys.executable, warm_python())
    }
    assert list(loaded.values()) == [["False"] * 3, ["True", "True", "False"]]


def test_a_script_gets_arguments_environment_folder_and_files(python: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("number = 5")
    (tmp_path / "script.py").write_text(
        "import beside, json, os, sys\n"
        "os.write(int(sys.argv[1]), sys.stdin.read().encode())\n"
        "environment = os.environ['GIVEN'], os.environ.get('OMP_NUM_THREADS')\n"
        "print(json.dumps([__name__, sys.argv, environment, os.getcwd(), beside.number]))\n"
    )
    read, write = os.pipe()
    environment = {"PATH": os.environ["PATH"], "GIVEN": "a b"}
    done = subprocess.run(
        [python, str(tmp_path / "script.py"), str(write), "two words"],
        input="said", pass_fds=[write], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    os.close(write)
    assert os.read(read, 100) == b"said"
    os.close(read)
    argv = [str(tmp_path / "script.py"), str(write), "two words"]
    assert json.loads(done.stdout) == ["__main__", argv, ["a b", None], str(tmp_path), 5]


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", -signal.SIGABRT, ""),
    ],
)
def test_it_ends_as_python_ends(python: str, code: str, status: int, says: str) -> None:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr.endswith(says) and bool(done.stderr) == bool(says)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_what_was_started_ends_the_process(python: str, number: signal.Signals) -> None:
    process = subprocess.Popen([python, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_it_is_in_no_process_group_of_the_tests() -> None:
    done = subprocess.run([warm_python(), "-c", "import os; print(os.getpid(), os.getpgrp())"], capture_output=True)
    pid, group = map(int, done.stdout.split())
    assert group == pid


def test_a_signal_that_is_ignored_is_ignored(python: str) -> None:
    code = "import os, signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)"
    shown = subprocess.run(
        [sys.executable, "-c", "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
         "os.execv(sys.argv[1], sys.argv[1:])", python, "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == "True\n"


def test_what_is_not_understood_runs_in_plain_python() -> None:
    code = "import sys; print(sys.flags.optimize, 'torch' in sys.modules)"
    done = subprocess.run([warm_python(), "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def test_a_client_that_is_gone_before_it_has_asked_harms_nobody() -> None:
    address = str(Path(warm_python()).with_name("server"))
    for said in (b"", b"\0" * 3, (100).to_bytes(8, "big"), (2).to_bytes(8, "big") + b"no"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            client.sendall(said)
    request = {"argv": ["-c", WAITS], "cwd": "/", "environment": {}, "ignored": [], "files": []}
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(len(data).to_bytes(8, "big") + data)
    done = subprocess.run([warm_python(), "-c", "import sys; print('torch' in sys.modules)"], capture_output=True)
    assert done.stdout == b"True\n"
