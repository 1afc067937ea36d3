"""`trl-ray teacher-serve` without a model: what it refuses before it starts, what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from fakes import health
from teacher_batches import VOCAB, make_requests, make_scores
from tiny_models import VOCAB_SIZE, build_tiny_model
from trl_ray.cli import teacher_serve
from trl_ray.cli.main import ExitCode, main
from trl_ray.cli.teacher_serve import load_serve_config
from trl_ray.config.load import dump_yaml
from trl_ray.config.teacher_options import PayloadDtype, PayloadIds, TeacherKind, TeacherServeConfig
from trl_ray.engines.teacher_clients import Chunking, FrameTeacher
from trl_ray.engines.teacher_transport import ServerAddress, TeacherServer
from trl_ray.errors import ConfigError
from trl_ray.types import Health, TeacherQuestion, TeacherRequest, TeacherScores
from trl_ray.wire.teacher_payload import encode_scores

QUESTION = TeacherQuestion(vocab_size=VOCAB, top_k=3)
REQUESTS = make_requests([4, 2])


class FakeTeacher:
    """Stands for the actor; `while_scoring` runs in the middle of each call."""

    made: ClassVar[list[FakeTeacher]] = []
    while_scoring: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, *, name: str, source: Any, vocab_size: int) -> None:
        self.name, self.source, self.vocab_size = name, source, vocab_size
        self.problem: str | None = None
        self.closed = 0
        FakeTeacher.made.append(self)

    async def score(
        self, requests: Sequence[TeacherRequest], question: TeacherQuestion, *, dtype: PayloadDtype, ids: PayloadIds
    ) -> Any:
        FakeTeacher.while_scoring()
        await asyncio.sleep(0)
        if self.problem is not None:
            await asyncio.Event().wait()
        return encode_scores(make_scores(requests, question), question=question, dtype=dtype, ids=ids)

    def health(self) -> Health:
        return health(problem=self.problem)

    def drain(self) -> None:
        """What it gathers is thrown away."""

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> list[FakeTeacher]:
    """Those that were made in place of real ones; the model has the vocabulary of the requests."""
    monkeypatch.setattr(teacher_serve, "Teacher", FakeTeacher)
    monkeypatch.setattr(teacher_serve, "model_vocabulary", lambda config: VOCAB)
    monkeypatch.setattr(teacher_serve, "_WATCH_S", 0.01)
    monkeypatch.setattr(FakeTeacher, "made", [])
    return FakeTeacher.made


class Asker:
    """Asks a server from a thread as soon as it has a port, and keeps what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> None:
        self.scores: list[TeacherScores] = []
        self.error: Exception | None = None
        self._then = then
        plain = teacher_serve.print if hasattr(teacher_serve, "print") else print

        def see(text: str, **options: Any) -> None:
            plain(text, **options)
            if found := re.search(r"served at (\S+)", text):
                threading.Thread(target=self._ask, args=(found[1],), daemon=True).start()

        monkeypatch.setattr(teacher_serve, "print", see, raising=False)

    def _ask(self, url: str) -> None:
        server = TeacherServer(teacher="ours", address=ServerAddress(url=url, max_attempts=1, timeout_s=20))
        try:
            self.scores = FrameTeacher(server, Chunking()).score(REQUESTS, QUESTION)
        except Exception as error:
            self.error = error
        finally:
            self._then()


def stop(by: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), by)


ARGUMENTS = ["teacher-serve", "model_name_or_path=x", "port=0"]


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, ExitCode.DONE), (signal.SIGINT, ExitCode.INTERRUPTED)])
def test_a_server_answers_until_a_signal_comes(
    teacher: list[FakeTeacher], monkeypatch: pytest.MonkeyPatch, by: signal.Signals, code: ExitCode
) -> None:
    asker = Asker(monkeypatch, stop(by))
    assert main([*ARGUMENTS, "name=big"]) == code
    assert asker.error is None and len(asker.scores) == 2
    [made] = teacher
    assert made.name == "teacher-big" and made.vocab_size == VOCAB and made.closed == 1
    assert made.source.kind is TeacherKind.EXTERNAL and made.source.model.model_name_or_path == "x"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_under_way_when_the_signal_comes_is_answered(
    teacher: list[FakeTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTeacher, "while_scoring", staticmethod(stop(signal.SIGTERM)))
    done = threading.Event()
    asker = Asker(monkeypatch, done.set)
    assert main(ARGUMENTS) == ExitCode.DONE
    assert done.wait(20)
    assert asker.error is None and len(asker.scores) == 2


def test_a_teacher_with_a_problem_ends_the_process_even_if_a_thread_hangs(
    teacher: list[FakeTeacher], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down() -> None:
        teacher[0].problem = "a pass hangs"

    codes: list[int] = []
    monkeypatch.setattr(FakeTeacher, "while_scoring", staticmethod(break_down))
    monkeypatch.setattr(os, "_exit", codes.append)
    done = threading.Event()
    asker = Asker(monkeypatch, done.set)
    main(ARGUMENTS)
    assert codes == [ExitCode.FAILED] and "a pass hangs" in capsys.readouterr().err
    # Whoever waited was told.
    assert done.wait(20) and "HTTP 500: a pass hangs" in str(asker.error)


def test_a_port_that_is_taken_is_wrong_input_found_before_the_model_is_loaded(
    teacher: list[FakeTeacher], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["teacher-serve", "model_name_or_path=x", f"port={port}"]) == ExitCode.WRONG_INPUT
    assert f"127.0.0.1:{port} must be free" in capsys.readouterr().err and teacher == []


@pytest.mark.parametrize("value", [None, "", "two\nlines", "sécret"])
def test_a_token_must_be_set_and_fit_into_a_header(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("TOKEN_OF_TEACHER", raising=False)
    if value is not None:
        monkeypatch.setenv("TOKEN_OF_TEACHER", value)
    config = TeacherServeConfig(model_name_or_path="x", token_variable="TOKEN_OF_TEACHER")
    with pytest.raises(ConfigError, match="TOKEN_OF_TEACHER must hold the token"):
        teacher_serve.read_token(config)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", ""])
def test_no_machine_but_this_one_is_served_without_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="token_variable must be set"):
        TeacherServeConfig(model_name_or_path="x", host=host)
    assert TeacherServeConfig(model_name_or_path="x", host=host, token_variable="T").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_this_machine_is_served_without_a_token(host: str) -> None:
    assert TeacherServeConfig(model_name_or_path="x", host=host).is_local


@pytest.mark.parametrize(
    "option", ["num_workers=2", "num_cpus=4.0", "payload_dtype=float16", "max_attempts=1", "placement=actor"]
)
def test_options_of_whoever_asks_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option.partition('=')[0]} must be left out"):
        load_serve_config(None, ["model_name_or_path=x", option])


def test_a_server_does_not_answer_for_another_server() -> None:
    with pytest.raises(ConfigError, match="server must be left out"):
        load_serve_config(None, ["server.url=http://10.0.0.5:1"])


def test_options_come_from_a_file_from_the_command_line_or_from_both(tmp_path: Any) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model_name_or_path: x\nport: 1\n")
    config = load_serve_config(str(path), ["port=2", "max_top_k=7"])
    assert (config.model_name_or_path, config.port, config.max_top_k) == ("x", 2, 7)
    path.write_text(dump_yaml(config))
    assert load_serve_config(str(path), []) == config
    with pytest.raises(ConfigError, match=r"'prt' is not an option here. Did you mean 'port'"):
        load_serve_config(None, ["prt=1"])


def test_a_dry_run_says_what_would_be_served_and_where(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKEN_OF_TEACHER", "secret")
    model = build_tiny_model(tmp_path / "tiny")
    options = [f"model_name_or_path={model}", 'host="::"', "port=81", "token_variable=TOKEN_OF_TEACHER"]
    assert main(["teacher-serve", "--dry-run", *options]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert f"{VOCAB_SIZE} tokens" in told and "POST http://[::]:81/v1/teacher/score" in told
    assert "token: that of TOKEN_OF_TEACHER" in told and "secret" not in told
    assert main(["teacher-serve", "model_name_or_path=/not/there", "--dry-run"]) == ExitCode.WRONG_INPUT
    assert "there is no such directory" in capsys.readouterr().err
