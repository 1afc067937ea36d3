"""Answers that are programs, run for real: what they try fails and is gone with the group (S06-S08).

attack (Python source) --> a function that runs what the model wrote --> Sandbox(lifetime=group) --> nothing happened
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trl_ray.rewards.reward_registry import RewardSpec, make_spec
from trl_ray.rewards.sandbox import Sandbox
from trl_ray.rewards.sandbox_messages import Lifetime
from trl_ray.rewards.scoring import GroupInput
from trl_ray.types import RewardErrorKind, ScoredGroup

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are Linux's")


def run_code(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
    """What no reward function should do: runs each completion as Python in its own process."""
    said = []
    for completion in completions:
        space: dict[str, Any] = {"said": None}
        try:
            exec(completion, space)
        except Exception as error:
            space["said"] = f"{type(error).__name__}: {error}"
        said.append(space["said"])
    log_extra("said", said)
    return [float("right" in completion) for completion in completions]


@pytest.fixture(scope="module")
def missing() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def box(missing: dict[str, str]) -> Iterator[Sandbox]:
    os.environ["TRL_RAY_TEST_API_KEY"] = "sk-canary"
    made = Sandbox(
        functions=[make_spec(run_code)],
        weights=None,
        timeout_s=20.0,
        lifetime=Lifetime.GROUP,
        on_ready=missing.update,
    )
    try:
        assert made.start() is None
        yield made
    finally:
        made.close()
        del os.environ["TRL_RAY_TEST_API_KEY"]


def score(made: Sandbox, *texts: str, **columns: Any) -> ScoredGroup:
    group = {"prompt": "q", "completions": list(texts), "completion_ids": [[1]] * len(texts), "columns": columns}
    return made.score(GroupInput(json.dumps(group)), size=len(texts))


def in_other_namespaces() -> set[str]:
    """Processes that are not in this process's pid namespace: those of groups, while they live.

    Other test processes have groups as well: only those below this process count, and those that nobody has any more.
    """
    found, own = set(), os.readlink("/proc/self/ns/pid")
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/pid") != own and (above := ancestors(entry))[-1:] != ["gone"]:
                found |= {entry} if str(os.getpid()) in above or len(above) == 1 else set()
        except OSError:
            continue
    return found


def ancestors(entry: str) -> list[str]:
    """Of a process, from its parent to the first of all; `gone` at the end where one ended meanwhile."""
    above = []
    while entry not in ("0", "1"):
        try:
            entry = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            return [*above, "gone"]
        above.append(entry)
    return above


def holding(text: str) -> set[str]:
    """Processes with `text` in their command line."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if text.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.add(entry)
        except OSError:
            continue
    return found


# Each is told `canary` (a path that must not come to be), `secret` (a file that must not be read), `worker` (the pid of
# whoever would be attacked) and `port` (a server); it sets `said` to what it got.
REFUSED = {
    "read a file of the user's": "said = open(secret).read()",
    "read /etc/shadow": "said = open('/etc/shadow').read()",
    "list home": "import os; said = os.listdir(os.path.dirname(secret))",
    "write anywhere": "open(canary, 'w').write('x')",
    "write to /tmp": "open('/tmp/' + canary.replace('/', '_'), 'w')",
    "write to shared memory": "open('/dev/shm/' + canary.replace('/', '_'), 'w')",
    "append to a file of the user's": "open(secret, 'a').write('x')",
    "remove a file of the user's": "import os; os.remove(secret)",
    "rename a file of the user's": "import os; os.rename(secret, canary)",
    "link to a file of the user's": "import os; os.link(secret, 'here'); said = open('here').read()",
    "follow a link to a file of the user's": "import os; os.symlink(secret, 'here'); said = open('here').read()",
    "connect to a server": "import socket; socket.create_connection(('127.0.0.1', port), 2)",
    "send a datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "listen": "import socket; socket.socket().bind(('127.0.0.1', 0))",
    "talk to a server of this machine by file": "import socket; socket.socket(socket.AF_UNIX).connect('/run/x.sock')",
    "ask for a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:%d/' % port, timeout=2)",
    "read the worker's environment": "said = open('/proc/%d/environ' % worker).read()",
    "read the environment of the one that forked it": (
        "import os; said = open('/proc/%d/environ' % (os.getppid() or worker)).read()"
    ),
    "write the worker's memory": "open('/proc/%d/mem' % worker, 'r+b')",
    "kill the worker": "import os; os.kill(worker, 9)",
    "trace the worker": (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.ptrace(16, worker, 0, 0) < 0: raise OSError(ctypes.get_errno(), 'ptrace')"
    ),
    "read the worker's memory": (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.process_vm_readv(worker, None, 0, None, 0, 0) < 0: raise OSError(ctypes.get_errno(), 'readv')"
    ),
    "make a namespace": (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x10000000) < 0: raise OSError(ctypes.get_errno(), 'unshare')"
    ),
    "mount": (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.mount(b'none', b'/mnt', b'tmpfs', 0, None) < 0: raise OSError(ctypes.get_errno(), 'mount')"
    ),
    "leave shared memory behind": (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.shmget(0, 4096, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'shmget')"
    ),
    "chroot": "import os; os.chroot('.')",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); bytearray(2**43)",
    "fill the disk": "f = open('f', 'wb')\nfor _ in range(200): f.write(b'x' * 2**20)",
    "take all descriptors": "kept = [open('/dev/null') for _ in range(10**5)]",
    "eat memory": "said = len(bytearray(2**40))",
    "recurse for ever": "def f(): f()\nf()",
}


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[dict[str, Any]]:
    secret = tmp_path / "secret"
    secret.write_text("token-canary")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {
            "canary": str(tmp_path / "canary"),
            "secret": str(secret),
            "worker": os.getpid(),
            "port": server.getsockname()[1],
        }
        with pytest.raises(BlockingIOError):
            server.accept()


def attack(source: str, targets: dict[str, Any]) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in targets.items()) + source


def test_what_an_answer_must_not_do_is_refused(box: Sandbox, targets: dict[str, Any]) -> None:
    attacks = [attack(source, targets) for source in REFUSED.values()]
    scored = score(box, *attacks, "right")
    assert scored.failure is None
    said = [str(reward.extra["said"]) for reward in scored.rewards]
    refusals = (
        "Permission",
        "FileNotFound",
        "ProcessLookup",
        "NotADirectory",
        "OSError",
        "Memory",
        "Recursion",
        "URLError",
    )
    got_through = {name: text for name, text in zip(REFUSED, said, strict=False) if not text.startswith(refusals)}
    # Where it gets through, that is the group's own, which the end of this test and the next one look at.
    got_through.pop("write to shared memory", None)
    assert got_through == {"raise its limits": "ValueError: not allowed to raise maximum limit"}
    assert scored.rewards[-1].total == 1.0
    assert not Path(targets["canary"]).exists() and Path(targets["secret"]).read_text() == "token-canary"
    for folder in ("/tmp", "/dev/shm"):
        assert not Path(folder, targets["canary"].replace("/", "_")).exists()


USES_SHARED_MEMORY = """
import errno, multiprocessing, os
from concurrent.futures import ProcessPoolExecutor

found = os.listdir("/dev/shm")
queue = multiprocessing.Queue()
process = multiprocessing.Process(target=queue.put, args=(7,))
process.start()
got = queue.get(timeout=10)
process.join()
with ProcessPoolExecutor(2) as pool, multiprocessing.Pool(2) as other:
    sums = [*pool.map(abs, [-1, -2]), *other.map(abs, [-3])]
try:
    with open("/dev/shm/trl-ray-canary", "wb") as file:
        for _ in range(17):
            file.write(bytes(2**20))
except OSError as error:
    said = [found, got, sums, errno.errorcode[error.errno]]
"""


def test_shared_memory_is_the_group_s_own_and_bounded_and_holds_queues_and_pools_of_processes(
    box: Sandbox, missing: dict[str, str]
) -> None:
    if missing or not Path("/dev/shm").is_dir():
        pytest.skip(f"not all walls stand here: {missing}")
    for _ in range(2):
        scored = score(box, USES_SHARED_MEMORY)
        assert scored.failure is None
        assert scored.rewards[0].extra["said"] == [[], 7, [1, 2, 3], "ENOSPC"]
    assert not Path("/dev/shm/trl-ray-canary").exists()


def test_its_environment_is_an_allow_list_wherever_it_looks(box: Sandbox) -> None:
    look = (
        "import os\n"
        "said = repr(dict(os.environ))\n"
        "try: said += repr([open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit()])\n"
        "except PermissionError: pass"
    )
    said = score(box, look).rewards[0].extra["said"]
    assert "canary" not in said and "'PATH'" in said
    assert not any(word in said for word in ("TOKEN", "KEY", "AWS_", "WANDB", "HF_"))


def test_it_sees_no_processes_but_its_own(box: Sandbox, missing: dict[str, str]) -> None:
    if missing:
        pytest.skip(f"not all walls stand here: {missing}")
    said = score(box, "import os; said = [p for p in os.listdir('/proc') if p.isdigit()]").rewards[0].extra["said"]
    assert said == ["1"]


def test_what_it_starts_ends_with_the_group(box: Sandbox, tmp_path: Path) -> None:
    mark = f"{tmp_path}-mark"
    daemon = (
        "import os, subprocess, sys, time\n"
        f"nap = [sys.executable, '-S', '-c', 'import time; time.sleep(600)', {mark!r}]\n"
        "subprocess.Popen(nap); subprocess.Popen(nap, start_new_session=True)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.execv(nap[0], nap)\n"
        "    os._exit(0)\n"
        "time.sleep(0.3); said = len(os.listdir('/proc'))"
    )
    scored = score(box, daemon)
    assert scored.failure is None
    assert holding(mark) == set() and in_other_namespaces() == set()


def test_a_fork_bomb_is_bounded_and_gone(box: Sandbox, missing: dict[str, str]) -> None:
    if "number of processes" in missing:
        pytest.skip(f"not all walls stand here: {missing}")
    bomb = (
        "import os, time\n"
        "made = 0\n"
        "try:\n"
        "    for _ in range(1000):\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(600)\n"
        "        made += 1\n"
        "except OSError:\n"
        "    pass\n"
        "said = made"
    )
    scored = score(box, bomb)
    assert scored.failure is None and 0 < int(scored.rewards[0].extra["said"]) <= 304
    assert in_other_namespaces() == set()


def test_a_scorer_that_an_answer_replaces_is_itself_again_for_the_next_group(box: Sandbox) -> None:
    forge = (
        "import sys, gc\n"
        "from trl_ray.rewards import functions, scoring\n"
        "scoring.check_values = lambda name, returned, size: [9.0] * size\n"
        "functions.exact_answer = lambda **columns: [9.0]\n"
        "open('left', 'w').write('x'); said = 'done'"
    )
    assert score(box, forge).rewards[0].total == 9.0  # its own group is all that it reaches
    after = score(box, "import os; said = os.listdir('.')", "right")
    assert [reward.total for reward in after.rewards] == [0.0, 1.0] and after.rewards[0].extra["said"] == []


FLOOD = """
import os
for fd in range(3, 30):
    try: os.write(fd, {})
    except OSError: pass
"""


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("import ctypes; ctypes.string_at(0)", RewardErrorKind.CRASH, "SIGSEGV"),
        ("import os; os._exit(3)", RewardErrorKind.CRASH, "exit code 3"),
        ("import sys; sys.exit(3)", RewardErrorKind.CRASH, "sys.exit with 3"),
        (
            "import sys; sys.setrecursionlimit(10**9)\no = []\nfor _ in range(10**6): o = [o]\nrepr(o)",
            RewardErrorKind.CRASH,
            "SIGSEGV",
        ),
        (
            FLOOD.format("(lambda b: len(b).to_bytes(8, 'big') + b)(b'{\"nonce\": \"guess\"}')"),
            RewardErrorKind.CRASH,
            "forged",
        ),
        (FLOOD.format("(2**50).to_bytes(8, 'big')"), RewardErrorKind.CRASH, "announced a reply of"),
        (FLOOD.format("(10**6).to_bytes(8, 'big') + b'[' * 10**6"), RewardErrorKind.CRASH, "not JSON"),
    ],
)
def test_a_process_that_ends_or_lies_fails_its_group_alone(
    box: Sandbox, source: str, kind: RewardErrorKind, says: str
) -> None:
    pid = box.pid
    failure = score(box, source).failure
    assert failure is not None and (failure.kind, failure.function) == (kind, "run_code")
    assert says in failure.detail
    assert score(box, "right").rewards[0].total == 1.0 and box.pid == pid


def test_what_never_ends_is_killed_at_its_deadline_and_the_functions_are_not_loaded_anew() -> None:
    made = Sandbox(functions=[make_spec(run_code)], weights=None, timeout_s=0.7, lifetime=Lifetime.GROUP)
    try:
        assert made.start() is None
        pid = made.pid
        for source in (
            "while True: pass",
            "import time; time.sleep(600)",
            "import signal, time\nfor n in {1, 2, 3, 14, 15}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(600)",
            "9 ** 9 ** 9",
        ):
            begin = time.monotonic()
            failure = score(made, source).failure
            assert failure is not None and failure.kind is RewardErrorKind.TIMEOUT
            assert "must return within 0.7 s" in failure.detail and time.monotonic() - begin < 3
            assert made.pid == pid and in_other_namespaces() == set()
        assert score(made, "right").rewards[0].total == 1.0
    finally:
        made.close()


def test_all_walls_stand_where_the_kernel_has_them(box: Sandbox, missing: dict[str, str]) -> None:
    """Root on Linux 6.14 or newer, as this project's own checks run; elsewhere an event names what is missing."""
    status = Path("/proc/self/status").read_text()
    may_mount = int(status.partition("CapEff:")[2].split()[0], 16) >> 21 & 1
    if not may_mount or tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 14):
        pytest.skip("some walls need CAP_SYS_ADMIN or Linux 6.14")
    assert missing == {}


# Loaded before the walls look for a user: so they find one even where Python itself lies in root's home.
OF_ANOTHER_USER = """
import asyncio, os, tempfile
from trl_ray.rewards.jail import namespaces

namespaces.own_user = lambda needed, **given: 0x70001234

def look(completions, log_extra, **columns):
    home = os.environ["HOME"]
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("x")
    with open(os.path.join(home, "mine"), "w") as file:
        file.write("x")
    log_extra("said", [[os.getuid(), home == os.environ["TMPDIR"] == os.getcwd(), os.listdir(home)]])
    return [1.0]
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its user")
def test_a_group_with_a_user_of_its_own_reaches_its_folder_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(OF_ANOTHER_USER)
    spec = make_spec(f"{tmp_path / 'other.py'}:look")
    made = Sandbox(functions=[spec], weights=None, timeout_s=20.0, lifetime=Lifetime.GROUP)
    try:
        scored = score(made, "x")
        assert scored.failure is None
        assert scored.rewards[0].extra["said"] == [0x70001234, True, ["mine"]]
    finally:
        made.close()


# What torch sums before the fork starts OpenMP's threads, which a fork lacks and would wait for.
COMPUTES_WHEN_LOADED = """
import os
{}

def computed():
    return [({}), os.environ["OMP_NUM_THREADS"]]

loaded = computed()

def grade(completions, log_extra, **columns):
    log_extra("said", [loaded + computed()])
    return [1.0]
"""


@pytest.mark.parametrize(
    ("imports", "computes"),
    [
        ("", "2e6"),
        pytest.param("import torch", "(torch.ones(1000, 1000) + 1).sum().item()", marks=pytest.mark.long),
    ],
    ids=["environment", "torch"],
)
def test_what_computes_when_functions_are_loaded_does_so_again_for_every_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imports: str, computes: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (tmp_path / "sums.py").write_text(COMPUTES_WHEN_LOADED.format(imports, computes))
    spec = RewardSpec(name="grade", reference=f"{tmp_path / 'sums.py'}:grade")
    made = Sandbox(functions=[spec], weights=None, timeout_s=10.0, lifetime=Lifetime.GROUP)
    try:
        scored = score(made, "x")
        assert scored.failure is None
        assert scored.rewards[0].extra["said"] == [2e6, "1", 2e6, "1"]
    finally:
        made.close()
