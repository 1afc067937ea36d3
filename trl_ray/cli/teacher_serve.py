"""`trl-ray teacher-serve`: a teacher of its own, asked over HTTP by runs on this machine or others.

    options --port bound--> model loaded --> TeacherService (aiohttp) --SIGTERM, SIGINT--> requests under way --> closed
                                                   '-- the teacher has a problem --> stopped, exit code 3

Exit codes: 0 told to stop; 2 the input was wrong; 3 the teacher failed; 130 interrupted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from aiohttp import web

from trl_ray.actors.teacher import Teacher
from trl_ray.config.load import apply_overrides, build, dump_yaml, read_yaml
from trl_ray.config.teacher_options import TeacherServeConfig
from trl_ray.engines.teacher_clients import SCORE_PATH
from trl_ray.engines.teacher_service import ServiceLimits, TeacherService
from trl_ray.errors import ConfigError, InterruptedRun, ResourceError, TeacherError
from trl_ray.models.policy_loading import load_model_config

_WATCH_S = 2.0
"""Between two looks at the teacher's health."""


def load_serve_config(path: str | None, overrides: Sequence[str]) -> TeacherServeConfig:
    """The options of a file, if there is one, and of the command line.

    Raises:
        ConfigError: whatever is wrong with them.
    """
    return build(TeacherServeConfig, apply_overrides(read_yaml(path) if path is not None else {}, overrides))


def describe_server(config: TeacherServeConfig) -> str:
    """What would be served.

    Raises:
        InputError: whatever the server itself would refuse before it loads the model.
    """
    token, vocab_size = read_token(config), model_vocabulary(config)
    lines = ["# resolved configuration", dump_yaml(config).rstrip(), "", "# plan"]
    lines += [
        f"teacher: {config.name}, {config.model_name_or_path} by {config.engine.value}, {vocab_size} tokens",
        f"endpoint: POST http://{_as_host(config.host)}:{config.port}{SCORE_PATH}",
        f"token: {'none' if token is None else 'that of ' + str(config.token_variable)}",
        f"at most: {config.max_requests_in_flight} requests at once, {config.max_tokens_per_request} tokens and "
        f"{config.max_body_mib:g} MiB each, {config.max_top_k} tokens at each place of an answer",
    ]
    return "\n".join(lines)


def serve_teacher(config: TeacherServeConfig) -> None:
    """Serve until told to stop.

    consumes: HTTP requests; produces: their answers; waits for: SIGTERM, SIGINT, or a problem of the teacher; unblocked
    by: each. What is under way then has `shutdown_s`; a second signal ends the process at once.

    Raises:
        InputError: the options cannot be used, the model cannot be loaded, or the port is taken.
        TeacherError: the teacher had a problem.
        InterruptedRun: it was stopped by SIGINT.
    """
    token, vocab_size = read_token(config), model_vocabulary(config)
    with closing(_bind(config)) as listening:
        teacher = Teacher(name=f"teacher-{config.name}", source=config.source, vocab_size=vocab_size)
        with closing(teacher):
            stopped_by = asyncio.run(_serve(teacher, config, token, listening))
    if stopped_by is signal.SIGINT:
        raise InterruptedRun(f"teacher {config.name} was interrupted; what was under way has been answered")
    print(f"teacher {config.name} was told to stop", flush=True)


def read_token(config: TeacherServeConfig) -> str | None:
    """The token that clients must send; None where none is asked for.

    Raises:
        ConfigError: its variable is not set, or holds what no header can.
    """
    if config.token_variable is None:
        return None
    token = os.environ.get(config.token_variable, "")
    if not token or not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"the environment variable {config.token_variable} must hold the token that clients send, in printable "
            f"ASCII, and {'holds something else' if token else 'is not set'}. Set it where the server starts."
        )
    return token


def model_vocabulary(config: TeacherServeConfig) -> int:
    """Entries of the model's vocabulary.

    Raises:
        ModelError: there is no such model.
    """
    return int(load_model_config(config.source.model).get_text_config().vocab_size)


def _bind(config: TeacherServeConfig) -> socket.socket:
    """Take the port before the model is loaded; nobody can connect yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ResourceError(
            f"{config.host}:{config.port} must be free to listen at, but is not: {error}. Choose another host or port."
        ) from error
    return bound


async def _serve(
    teacher: Teacher, config: TeacherServeConfig, token: str | None, listening: socket.socket
) -> signal.Signals:
    """Answer until a signal comes, and say which.

    Raises:
        TeacherError: the teacher had a problem.
    """
    limits = ServiceLimits(
        in_flight=config.max_requests_in_flight,
        body_bytes=int(config.max_body_mib * 2**20),
        tokens=config.max_tokens_per_request,
        top_k=config.max_top_k,
        timeout_s=config.timeout_s,
    )
    service = TeacherService(teacher, name=config.name, limits=limits, token=token)
    # A handler whose client has gone is cancelled, so that nothing is computed for nobody.
    runner = web.AppRunner(
        service.application(), access_log=None, handler_cancellation=True, shutdown_timeout=config.shutdown_s
    )
    await runner.setup()
    try:
        with _signals() as stop:
            await web.SockSite(runner, listening).start()
            host, port = listening.getsockname()[:2]
            print(f"teacher {config.name} is served at http://{_as_host(host)}:{port}", flush=True)
            return await _until_stopped(teacher, service, stop)
    finally:
        await runner.cleanup()


async def _until_stopped(
    teacher: Teacher, service: TeacherService, stop: asyncio.Future[signal.Signals]
) -> signal.Signals:
    """Wait for a signal, and look after the teacher meanwhile."""
    while not stop.done():
        await asyncio.wait([stop], timeout=_WATCH_S)
        # Nobody else asks for what it gathers.
        teacher.drain()
        problem = teacher.health().problem
        if problem is not None:
            service.give_up(problem)
            raise TeacherError(problem)
    return stop.result()


@contextmanager
def _signals() -> Iterator[asyncio.Future[signal.Signals]]:
    """The first signal that asks to stop; the second has its usual effect."""
    loop = asyncio.get_running_loop()
    came: asyncio.Future[signal.Signals] = loop.create_future()
    watched = (signal.SIGTERM, signal.SIGINT)

    def stop(which: signal.Signals) -> None:
        for each in watched:
            loop.remove_signal_handler(each)
        if not came.done():
            came.set_result(which)

    for each in watched:
        loop.add_signal_handler(each, stop, each)
    try:
        yield came
    finally:
        for each in watched:
            loop.remove_signal_handler(each)


def _as_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
