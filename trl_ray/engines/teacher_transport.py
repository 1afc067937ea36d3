"""One HTTP exchange with a teacher's server that ends: with an answer that could be read, or with a named error.

    post: body ─► connect, send, read ─► read(content) ─► answer
                     │ no connection, no answer in time, 5xx, an answer that cannot be true: again, after a delay
                     │ any other status but 200: at once
                     └─► TeacherError

An attempt as a whole has a deadline: when it passes, the socket is shut down, whatever the server was dripping.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socket import SHUT_RDWR, socket
from typing import TypeVar
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from trl_ray.engines.retry_delays import doubling_delays
from trl_ray.errors import ConfigError, TeacherError

AnswerT = TypeVar("AnswerT")

_SHOWN = 300
"""Characters of a server's own words in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    """Where a teacher's server is, and how it is asked."""

    url: str
    """http or https, host, port, and a path in front of all others where there is one."""
    token: str | None = field(default=None, repr=False)
    """Sent as ``Authorization: Bearer``."""
    timeout_s: float = 120.0
    """For one attempt, from connecting to the last byte."""
    max_attempts: int = 3
    retry_delay_s: float = 0.5
    """Before the second attempt; doubled before each further one, up to 10 s."""
    max_response_bytes: int = 2**30


class _Failed(Exception):
    """An attempt that may be repeated."""


class TeacherServer:
    """The server of one teacher; may be asked from many threads at once.

    Args:
        teacher: its name, for messages.
        address: where it is.
        sleep: waits between two attempts.

    Raises:
        ConfigError: the address or the token cannot be used.
    """

    def __init__(self, *, teacher: str, address: ServerAddress, sleep: Callable[[float], None] = time.sleep) -> None:
        self.teacher = teacher
        self._address = address
        self._sleep = sleep
        self._parts = urlsplit(address.url)
        if self._parts.scheme not in {"http", "https"} or not self._parts.hostname or self._parts.query:
            raise ConfigError(
                f"the url of teacher {teacher} must be like http://10.0.0.5:8000, got {address.url!r}. Correct it."
            )
        if address.token is not None and not (address.token.isascii() and address.token.isprintable()):
            raise ConfigError(
                f"the token of teacher {teacher} must be printable ASCII, got something else. Check the variable "
                "it is read from, e.g. for a line break at the end."
            )

    def post(
        self, path: str, body: bytes | memoryview, *, media_type: str, read: Callable[[bytes], AnswerT]
    ) -> AnswerT:
        """Send `body` and make an answer of what comes back.

        Args:
            path: below the address.
            body: sent as it is.
            media_type: of the body.
            read: makes the answer; raises TeacherError if it cannot be true.

        Raises:
            TeacherError: there was no answer that could be read in `max_attempts`, or the server refused the request.
        """
        again = Retrying(
            retry=retry_if_exception_type(_Failed),
            stop=stop_after_attempt(self._address.max_attempts),
            wait=doubling_delays(self._address.retry_delay_s),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            answer: AnswerT = again(self._answer, path, body, media_type, read)
        except _Failed as error:
            raise TeacherError(
                f"teacher {self.teacher}: must answer at {self._address.url}{path}, but failed "
                f"{self._address.max_attempts} times, at last: {error} Check that its server runs, or raise timeout_s "
                "or max_attempts."
            ) from error
        return answer

    def _answer(
        self, path: str, body: bytes | memoryview, media_type: str, read: Callable[[bytes], AnswerT]
    ) -> AnswerT:
        content = self._attempt(path, body, media_type)
        try:
            return read(content)
        except TeacherError as error:
            raise _Failed(str(error)) from error

    def _attempt(self, path: str, body: bytes | memoryview, media_type: str) -> bytes:
        """The content of an answer with status 200."""
        headers = {"Content-Type": media_type, "Connection": "close"}
        if self._address.token is not None:
            headers["Authorization"] = f"Bearer {self._address.token}"
        connection = self._connection()
        try:
            connection.connect()
            with self._deadline(connection.sock):
                connection.request("POST", self._parts.path.rstrip("/") + path, body=body, headers=headers)
                response = connection.getresponse()
                content = self._content(response)
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"{type(error).__name__}: {error}.") from error
        finally:
            connection.close()
        if response.status == http.client.OK:
            return content
        words = content[:_SHOWN].decode("utf-8", "replace")
        if response.status >= http.client.INTERNAL_SERVER_ERROR:
            raise _Failed(f"HTTP {response.status}: {words}.")
        raise _refusal(self.teacher, f"{self._address.url}{path}", response.status, words)

    def _connection(self) -> http.client.HTTPConnection:
        host, port, timeout = self._parts.hostname, self._parts.port, self._address.timeout_s
        assert host is not None, "checked when made"
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=timeout)

    @contextmanager
    def _deadline(self, connected: socket) -> Iterator[None]:
        """Shut the socket down when time is up; a socket's own timeout begins anew with every byte."""
        passed = threading.Event()

        def shut_down() -> None:
            passed.set()
            with suppress(OSError):
                connected.shutdown(SHUT_RDWR)

        timer = threading.Timer(self._address.timeout_s, shut_down)
        timer.daemon = True
        timer.start()
        late = f"no answer within {self._address.timeout_s} s"
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            if passed.is_set() or isinstance(error, TimeoutError):
                raise TimeoutError(late) from error
            raise
        finally:
            timer.cancel()
        # A socket that was shut down looks like one whose server had finished.
        if passed.is_set():
            raise TimeoutError(late)

    def _content(self, response: http.client.HTTPResponse) -> bytes:
        limit = self._address.max_response_bytes
        if response.length is not None and response.length <= limit:
            # Without a number, http.client notices when fewer bytes come than were announced.
            return response.read()
        content = b"" if response.length is not None else response.read(limit + 1)
        if response.length is not None or len(content) > limit:
            raise http.client.HTTPException(f"more than {limit} bytes in an answer")
        return content


def _refusal(teacher: str, url: str, status: int, words: str) -> TeacherError:
    hints = {401: "Check its token.", 403: "Check its token.", 404: "Check url and protocol."}
    hint = hints.get(status, "Check url, protocol, and what the server allows.")
    return TeacherError(
        f"teacher {teacher}: {url} must answer with HTTP 200, but refused the request with {status}: {words!r}. {hint}"
    )
