"""Python processes that have torch and transformers loaded when they begin, because they are forked from one that has.

    test, or Ray's node ──starts──► client ──arguments, environment, open files──► server: imports once
                                      │ passes signals on, ends as it ends  ◄────────── fork: runs what was asked for

What a process of a tiny model costs is its imports, five seconds of a core, and the suite starts hundreds. All else is
as without it: a process has a pid, files and a life of its own, and Ray's workers run Ray's script; Ray is not imported
before the fork. What is asked in a way that is not understood here, or when there is no server, runs in plain Python.
Which imports a process makes cannot be seen here: tests of that start plain Python.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress

PRELOADED = (
    "trl_ray.actors.policy_learner",
    "trl_ray.actors.rollout_worker",
    "trl_ray.actors.teacher",
    "trl_ray.actors.reward_model_worker",
    "trl_ray.engines.transformers",
    "trl_ray.models.backends.torch_backend",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "accelerate",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "peft",
)
_NUMBER = 8
"""Bytes of a size, a pid or a status on the wire."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HIGH = 512
"""Received files wait above this number for the one they get."""


def warm_python() -> str:
    """The path of an executable that is used like Python's; started once in a process of pytest, and ended with it.

    Plain Python where tests see GPUs, because a fork cannot use what its parent has touched, and away from Linux.
    """
    global _executable
    if _executable is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        _executable = _start() if hidden and hasattr(os, "pidfd_open") else sys.executable
    return _executable


_executable: str | None = None


def _start() -> str:
    import atexit
    import shutil
    import subprocess
    import tempfile
    import time

    folder = tempfile.mkdtemp(prefix="tw-", dir="/tmp")
    address, executable = f"{folder}/server", f"{folder}/python"
    with open(executable, "w") as file:
        file.write(f'#!/bin/sh\nexec {sys.executable} -S -E {os.path.abspath(__file__)} run {address} "$@"\n')
    os.chmod(executable, 0o755)
    with open(f"{folder}/log", "w") as log:
        command = [sys.executable, __file__, "serve", address]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    deadline = time.monotonic() + 180
    while not os.path.exists(address):
        with open(f"{folder}/log") as log:
            assert server.poll() is None and time.monotonic() < deadline, log.read()
        time.sleep(0.02)
    return executable


# ---- the client: begins in a hundredth of a second -------------------------------------------------------------------


def become(address: str, arguments: list[str]) -> None:
    """Run the arguments in a fork of the server at an address and end as it ends; in plain Python if that fails."""
    if arguments[:1] == ["-B"]:  # how the parent of a multiprocessing child says PYTHONDONTWRITEBYTECODE
        arguments = arguments[1:]
    try:
        if not understood(arguments):
            raise OSError("not for the server")
        files = open_files()
        request = {"argv": arguments, "cwd": os.getcwd(), "environment": dict(os.environ), "files": files}
        request["ignored"] = ignored = [number for number in _PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
        data = json.dumps(request).encode()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        socket.send_fds(connection, [len(data).to_bytes(_NUMBER, "big")], files)
        connection.sendall(data)
        pid = int.from_bytes(connection.recv(_NUMBER), "big")
        if pid == 0:
            raise OSError("the server is gone")
    except OSError:
        os.execv(sys.executable, [sys.executable, *arguments])
    # A signal that comes between two waits must end the next one: it writes to a pipe that is waited for as well.
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    for number in _PASSED_ON:
        if number not in ignored:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
    for file in files:
        os.close(file)
    while connection not in select.select([connection, woken], [], [])[0]:
        os.read(woken, 64)
    answer = connection.recv(_NUMBER)
    status = int.from_bytes(answer, "big", signed=True) if answer else -signal.SIGKILL
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def understood(arguments: list[str]) -> bool:
    """Whether `run` does with them what Python does."""
    return bool(arguments) and (arguments[0] in ("-c", "-m") or not arguments[0].startswith("-"))


def open_files() -> list[int]:
    """Numbers of the files that a child of this process would inherit."""

    def inherited(number: int) -> bool:
        try:
            return os.get_inheritable(number)
        except OSError:  # the one through which the folder is read
            return False

    return [number for number in sorted(map(int, os.listdir("/proc/self/fd"))) if inherited(number)]


# ---- the server ------------------------------------------------------------------------------------------------------


class Server:
    """Forks for every client until the process that started it is gone."""

    def __init__(self, address: str, *, owner: int) -> None:
        import selectors

        self._owner = owner
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{address}-to-be")
        self._listener.listen(64)
        os.rename(f"{address}-to-be", address)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._clients: dict[int, socket.socket] = {}

    def serve(self) -> list[str]:
        """Returns in a fork only: the arguments it has to run."""
        while os.getppid() == self._owner:
            for key, _ in self._selector.select(timeout=5.0):
                arguments = key.data(key.fileobj)
                if arguments is not None:
                    return arguments
        os._exit(0)

    def _accept(self, listener: socket.socket) -> list[str] | None:
        client = listener.accept()[0]
        files, request = receive(client)
        if request is None:
            for file in files:
                os.close(file)
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            for other in (self._selector, self._listener, client, *self._clients.values()):
                other.close()
            for process in self._clients:
                os.close(process)
            return begin(request, files)
        for file in files:
            os.close(file)
        process = os.pidfd_open(pid)
        self._clients[process] = client
        self._selector.register(process, 1, lambda _: self._ended(process, pid))
        self._selector.register(client, 1, lambda _: self._abandoned(client, pid))
        with suppress(OSError):  # a client that is gone already is told of by the selector
            client.sendall(pid.to_bytes(_NUMBER, "big"))
        return None

    def _abandoned(self, client: socket.socket, pid: int) -> None:
        """A client was killed, which was meant for its process."""
        if client in self._clients.values():  # both may have ended at once
            self._selector.unregister(client)
            os.kill(pid, signal.SIGKILL)

    def _ended(self, process: int, pid: int) -> None:
        client = self._clients.pop(process)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._selector.unregister(process)
        os.close(process)
        with suppress(KeyError):  # an abandoned one is unregistered already
            self._selector.unregister(client)
        with suppress(OSError):
            client.sendall(status.to_bytes(_NUMBER, "big", signed=True))
        client.close()


def receive(client: socket.socket) -> tuple[list[int], dict | None]:
    """The files of a client and what it asks for; None if it is gone before it has said so."""
    files: list[int] = []
    try:
        client.settimeout(30.0)
        header, files, _, _ = socket.recv_fds(client, _NUMBER, 250)
        size, data = int.from_bytes(header, "big"), b""
        while len(data) < size and (more := client.recv(size - len(data))):
            data += more
        return files, json.loads(data)
    except (OSError, ValueError):
        return files, None


def begin(request: dict, files: list[int]) -> list[str]:
    """Take over what the client was started with, in the fork; returns the arguments."""
    import fcntl

    import numpy as np
    import torch

    waiting = [fcntl.fcntl(file, fcntl.F_DUPFD, _HIGH) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(waiting, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    # Ray ends a worker's process group with it, and the server's is that of the tests.
    os.setsid()
    # As the client was started, not as the server was: a shell lets what it runs in the background ignore SIGINT.
    for number in _PASSED_ON:
        usual = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"], RAY_RUNTIME_ENV_HOOK="warm_processes.with_warm_workers")
    sys.modules["warm_processes"] = sys.modules["__main__"]
    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return request["argv"]


def with_warm_workers(runtime_env: dict | None) -> dict:
    """What a driver tells Ray of its workers; Ray asks for it in every fork that starts or joins a cluster."""
    return {"py_executable": str(_executable)} | (runtime_env or {})


def run(arguments: list[str], path: list[str]) -> None:
    """What Python does with these arguments; `path` is what it finds modules in beside PYTHONPATH and the script."""
    import runpy

    more = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first, *rest = arguments
    if first == "-m":
        sys.argv[:], sys.path[:] = rest, [os.getcwd(), *more, *path]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:], sys.path[:] = ["-c", *rest[1:]], ["", *more, *path]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:], sys.path[:] = arguments, [os.path.dirname(os.path.abspath(first)), *more, *path]
        runpy.run_path(first, run_name="__main__")


def finish(arguments: list[str], path: list[str]) -> None:
    """Run, then end as Python ends, but for taking the loaded modules apart, which takes longer than loading Ray."""
    import atexit
    import threading

    status, interrupted = 0, False
    try:
        run(arguments, path)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def main() -> None:
    import gc
    import importlib

    role, address, *arguments = sys.argv[1:]
    if role == "run":
        become(address, arguments)
    global _executable
    _executable = f"{os.path.dirname(address)}/python"
    owner = os.getppid()
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [entry for entry in sys.path[1:] if entry not in given]
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    assert "ray" not in sys.modules, "Ray reads its settings from the environment when it is imported"
    gc.freeze()
    sys.stdout.flush()
    finish(Server(address, owner=owner).serve(), path)


if __name__ == "__main__":
    main()
