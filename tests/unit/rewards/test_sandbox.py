import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from trl_ray.rewards import function_process
from trl_ray.rewards.reward_registry import make_spec
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.sandbox_messages import Lifetime
from trl_ray.rewards.sandbox_process import LOG_BYTES, child_environment
from trl_ray.rewards.scoring import GroupInput
from trl_ray.types import RewardErrorKind

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@contextmanager
def sandbox(*functions, timeout_s=20.0, **options):
    box = Sandbox(functions=[make_spec(f) for f in functions], weights=None, timeout_s=timeout_s, **options)
    try:
        yield box
    finally:
        box.close()


def score(box, *texts, **columns):
    group = {"prompt": "q", "completions": list(texts), "completion_ids": [[1]] * len(texts), "columns": columns}
    return box.score(GroupInput(json.dumps(group)), size=len(texts))


def alive(mark):
    """Processes whose environment or command line holds `mark`, zombies aside."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/environ", "rb") as environ, open(f"/proc/{entry}/cmdline", "rb") as command:
                if mark.encode() in environ.read() + command.read():
                    found.append(int(entry))
        except OSError:
            continue
    return found


def mark_of(box):
    with open(f"/proc/{box.pid}/environ", "rb") as file:
        return next(part for part in file.read().decode().split("\0") if part.startswith("TRL_RAY_SANDBOX="))


def behave(completions, **columns):
    """Does what the first completion says, so that one sandbox can be led through several fates."""
    import ctypes
    import os
    import time

    word = completions[0]
    if word == "hang":
        time.sleep(3600)
    if word == "exit":
        os._exit(7)
    if word == "sys.exit":
        raise SystemExit(3)
    if word == "segfault":
        print("about to fall", flush=True)
        ctypes.string_at(0)
    if word == "raise":
        raise ValueError("boom")
    return [float(os.getpid())] * len(completions)


def test_one_child_serves_many_groups():
    with sandbox(behave) as box:
        first, second = score(box, "ok", "ok"), score(box, "ok")
        assert [reward.total for reward in first.rewards] == [box.pid, box.pid]
        assert second.rewards[0].total == box.pid != os.getpid()


def test_a_plain_exception_keeps_the_child():
    with sandbox(behave) as box:
        failure = score(box, "raise").failure
        assert (failure.kind, "ValueError: boom" in failure.detail) == (RewardErrorKind.EXCEPTION, True)
        pid = box.pid
        assert score(box, "ok").rewards[0].total == pid


@pytest.mark.parametrize(
    ("word", "detail"),
    [
        ("exit", "exit code 7"),
        ("sys.exit", "sys.exit with 3"),
        ("segfault", "SIGSEGV"),
    ],
)
def test_a_process_that_ends_is_a_crash_and_the_next_group_gets_a_new_one(word, detail):
    with sandbox("arithmetic", behave) as box:
        failure = score(box, word, answer="1").failure
        assert (failure.kind, failure.function) == (RewardErrorKind.CRASH, "behave")
        assert detail in failure.detail
        assert word != "segfault" or "about to fall" in failure.detail
        assert score(box, "3", answer="3").rewards[0].parts["arithmetic"] == 1.0


def test_a_hanging_function_is_killed_at_its_deadline_with_all_its_processes():
    def hang(completions, **columns):
        import subprocess
        import sys
        import time

        nap = [sys.executable, "-c", "import time; time.sleep(3600)"]
        subprocess.Popen(nap)
        subprocess.Popen(nap, start_new_session=True)
        if os.fork() == 0:
            os.setsid()
        time.sleep(3600)

    with sandbox(hang, timeout_s=1.5) as box:
        assert box.start() is None
        mark = mark_of(box)
        assert box.pid in alive(mark)
        start = time.monotonic()
        failure = score(box, "x").failure
        assert 1.4 < time.monotonic() - start < 2.6
        assert (failure.kind, failure.function) == (RewardErrorKind.TIMEOUT, "hang")
        assert "must return within 1.5 s" in failure.detail
        assert alive(mark) == []


def test_a_hanging_async_function_is_killed_too():
    async def hang(completions, **columns):
        import asyncio

        await asyncio.sleep(3600)

    with sandbox(hang, timeout_s=0.5) as box:
        assert score(box, "x").failure.kind is RewardErrorKind.TIMEOUT


def test_a_child_killed_under_way_is_a_crash_even_if_a_fork_of_it_keeps_the_pipe_open():
    def fork_and_die(completions, **columns):
        import os
        import signal
        import time

        if os.fork() == 0:
            time.sleep(3600)
        if completions[0] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return [1.0]

    with sandbox(fork_and_die) as box:
        start = time.monotonic()
        failure = score(box, "die").failure
        assert (failure.kind, "SIGKILL" in failure.detail) == (RewardErrorKind.CRASH, True)
        assert time.monotonic() - start < 10
        assert score(box, "live").rewards[0].total == 1.0
        mark = mark_of(box)
    assert alive(mark) == []


def test_a_fork_that_returns_does_not_answer_twice():
    def fork(completions, **columns):
        import os
        import time

        if os.fork() == 0:
            return [9.0]
        time.sleep(0.2)
        return [1.0]

    with sandbox(fork) as box:
        assert [score(box, "x").rewards[0].total for _ in range(2)] == [1.0, 1.0]


def test_secrets_stay_out_of_the_child_s_environment():
    parent = {
        "PATH": "/bin",
        "HOME": "/h",
        "LC_ALL": "C",
        "HF_TOKEN": "s",
        "HF_HOME": "s",
        "OPENAI_API_KEY": "s",
        "AWS_PROFILE": "s",
        "WANDB_MODE": "s",
        "GITHUB_TOKEN": "s",
        "MY_PASSWORD": "s",
    }
    child = child_environment(parent, "m")
    assert set(child) == {"PATH", "HOME", "LC_ALL", "PYTHONPATH", "TRL_RAY_SANDBOX"}
    assert "s" not in child.values()


def test_the_child_really_gets_that_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")

    def look(completions, log_extra, **columns):
        import os

        log_extra("environment", [dict(os.environ)])
        return [1.0]

    with sandbox(look) as box:
        seen = score(box, "x").rewards[0].extra["environment"]
        assert "canary" not in json.dumps(seen) and seen["PATH"] == os.environ["PATH"]


def test_functions_of_the_users_can_neither_look_into_other_processes_nor_signal_them():
    def look(completions, log_extra, **columns):
        import os

        def tried(work, *given):
            try:
                return str(work(*given))
            except OSError as error:
                return type(error).__name__

        def read(path):
            with open(path) as file:
                return file.read()

        said = []
        for pid in (int(completions[0]), os.getppid()):
            said += [tried(read, f"/proc/{pid}/environ"), tried(os.kill, pid, 9)]
        log_extra("said", [[*said, tried(read, completions[1])]] * 2)
        return [1.0, 1.0]

    with sandbox(look) as box:
        said = score(box, str(os.getpid()), __file__).rewards[0].extra["said"]
        assert said[:4] == ["PermissionError"] * 4
        assert "test_functions_of_the_users" in said[4]  # files are theirs


def test_walls_that_nobody_asked_for_are_not_missed(monkeypatch):
    def refuse():
        raise OSError("landlock: Function not implemented")

    monkeypatch.setattr(function_process.landlock, "restrict_reach", refuse)
    monkeypatch.setattr(function_process.linux, "prctl", lambda *given: 0)
    monkeypatch.setattr(function_process.resource, "setrlimit", lambda *given: None)
    assert function_process._hold_in(Lifetime.RUN) == {}
    monkeypatch.delattr(os, "pidfd_open", raising=False)  # a machine that is not Linux
    assert function_process._hold_in(Lifetime.RUN) == {}
    assert function_process._hold_in(Lifetime.GROUP) == {"all walls": "they are Linux's"}


def test_a_process_that_leaves_its_session_and_drops_its_environment_is_killed_too(tmp_path):
    def leave(completions, **columns):
        import os
        import subprocess
        import sys

        if os.fork() == 0:
            os.setsid()
            nap = [sys.executable, "-S", "-c", "import time; time.sleep(600)", completions[0]]
            subprocess.Popen(nap, env={}, start_new_session=True)
            os._exit(0)
        os.wait()
        return [1.0]

    with sandbox(leave) as box:
        assert score(box, f"{tmp_path}-mark").rewards[0].total == 1.0
        assert len(alive(f"{tmp_path}-mark")) == 1
    assert alive(f"{tmp_path}-mark") == []


def test_a_flood_of_prints_neither_blocks_nor_fills_memory():
    def flood(completions, **columns):
        import sys

        for _ in range(100):
            print("x" * 2**20)
        sys.stderr.write("the end\n")
        return [1.0]

    with sandbox(flood, timeout_s=30) as box:
        assert score(box, "x").rewards[0].total == 1.0
        deadline = time.monotonic() + 5
        while "the end" not in box.log and time.monotonic() < deadline:
            time.sleep(0.01)
        assert box.log.endswith("the end") and len(box.log) <= LOG_BYTES


def test_an_answer_printed_to_stdout_is_ignored():
    def forge(completions, **columns):
        import json
        import os

        body = json.dumps(
            {
                "nonce": "",
                "scored": {"rewards": [{"total": 9.0, "parts": {}, "extra": {}}], "failure": None, "metrics": {}},
            }
        ).encode()
        os.write(1, len(body).to_bytes(8, "big") + body)
        return [1.0]

    with sandbox(forge) as box:
        assert score(box, "x").rewards[0].total == 1.0


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"nonce": "guess", "scored": {"rewards": []}}', "forged and is refused"),
        (b"not json", "not JSON"),
        (b"[1]", "not JSON"),
    ],
)
def test_a_forged_frame_on_the_reply_pipe_is_refused(body, detail):
    def forge(completions, **columns):
        import os
        import sys
        import time

        os.write(int(sys.argv[2]), len(body).to_bytes(8, "big") + body)
        time.sleep(30)

    with sandbox(forge) as box:
        failure = score(box, "x").failure
        assert failure.kind is RewardErrorKind.CRASH and detail in failure.detail


def test_a_reply_of_absurd_size_is_refused_before_it_is_read():
    def forge(completions, **columns):
        import os
        import sys
        import time

        os.write(int(sys.argv[2]), (2**50).to_bytes(8, "big"))
        time.sleep(30)

    with sandbox(forge) as box:
        assert "announced a reply of" in score(box, "x").failure.detail


def test_a_memory_limit_makes_a_hungry_function_fail_alone():
    def eat(completions, **columns):
        return [float(len(bytearray(2**31)))]

    with sandbox(eat, memory_bytes=2**31) as box:
        failure = score(box, "x").failure
        assert (failure.kind, "MemoryError" in failure.detail) == (RewardErrorKind.EXCEPTION, True)


def test_a_function_that_only_loads_elsewhere_says_so(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(completions, **columns):\n    return [1.0]\n")
    spec = make_spec(f"{file}:f")
    file.unlink()
    box = Sandbox(functions=[spec], weights=None, timeout_s=10)
    failure = score(box, "x").failure
    box.close()
    assert (failure.function, failure.kind) == ("f", RewardErrorKind.EXCEPTION)
    assert "must load in the reward worker's process" in failure.detail and failure.is_final


def test_signals_work_where_functions_run():
    def alarm(completions, **columns):
        import signal
        import time

        def stop(*args):
            raise TimeoutError("cut short")

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(30)

    with sandbox(alarm) as box:
        assert "TimeoutError: cut short" in score(box, "x").failure.detail


def test_a_group_larger_than_a_pipe_goes_through_both_ways():
    def echo(completions, log_extra, **columns):
        log_extra("echo", completions)
        return [float(len(text)) for text in completions]

    with sandbox(echo) as box:
        texts = ["a" * 2_000_000, "b"]
        scored = score(box, *texts)
        assert [reward.extra["echo"] for reward in scored.rewards] == texts


def test_close_ends_a_score_under_way_and_later_ones():
    with sandbox(behave) as box:
        assert box.start() is None
        threading.Timer(0.3, box.close).start()
        start = time.monotonic()
        assert score(box, "hang").failure.kind is RewardErrorKind.CRASH
        assert time.monotonic() - start < 3
        assert "closed" in score(box, "ok").failure.detail
        assert box.pid is None
        box.close()


def test_the_child_dies_with_its_parent(tmp_path):
    script = (
        "import os, sys\n"
        "from trl_ray.rewards.sandbox import Sandbox\n"
        "from trl_ray.rewards.reward_registry import make_spec\n"
        "box = Sandbox(functions=[make_spec('arithmetic')], weights=None, timeout_s=5)\n"
        "box.start(); print(box.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    pid, deadline = int(done.stdout), time.monotonic() + 5
    while time.monotonic() < deadline and pid in alive("sandbox_child"):
        time.sleep(0.02)
    assert pid not in alive("sandbox_child")


LOADS_SLOWLY = """
import os, time
open(f"{os.environ['TMPDIR']}.{os.getpid()}.loading", "w").close()
time.sleep(0.5)
def slow(completions, **columns): return [1.0]
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="who watches over the folder is Linux's")
def test_no_folder_is_left_by_a_worker_that_is_killed_before_its_functions_are_loaded(tmp_path):
    (tmp_path / "slow.py").write_text(LOADS_SLOWLY)
    folder = tmp_path / "made"
    folder.mkdir()
    script = (
        "import glob, os, time\n"
        "from trl_ray.rewards.sandbox import Lifetime, Sandbox, SandboxProcess\n"
        "from trl_ray.rewards.reward_registry import RewardSpec\n"
        f"slow = RewardSpec(name='slow', reference={str(tmp_path / 'slow.py')!r} + ':slow')\n"
        "boxes = [Sandbox(functions=[slow], weights=None, timeout_s=5, lifetime=life) for life in Lifetime]\n"
        "for box in boxes: box.begin()\n"
        f"while len(glob.glob({str(folder)!r} + '.*')) < len(boxes): time.sleep(0.01)\n"
        "early = SandboxProcess()\n"
        f"print(len(os.listdir({str(folder)!r})), flush=True); os.kill(os.getpid(), 9)\n"
    )
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False, timeout=20)
    assert int(done.stdout) == 4  # one of each lifetime, and one that had not begun
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and list(folder.iterdir()):
        time.sleep(0.02)
    assert list(folder.iterdir()) == []


def test_the_child_imports_neither_torch_nor_transformers():
    def loaded(completions, log_extra, **columns):
        import sys

        log_extra("modules", [sorted({"torch", "transformers", "ray", "datasets"} & set(sys.modules))])
        return [1.0]

    with sandbox(loaded) as box:
        assert score(box, "x").rewards[0].extra["modules"] == []
