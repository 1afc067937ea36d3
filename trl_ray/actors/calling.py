"""Calls that outlast a restart of the actor they go to, and calls that carry what came up since the last one.

call_patiently: call --lost, late--> call --> answer
Outbox:         put(a), put(b), put(c) --> [a] in a call --answered--> [b, c] in a call --answered--> ...
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from trl_ray.errors import ActorLostError, DeadlineError, RunError, TrlRayError
from trl_ray.types import Handle

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_PAUSE_S = 0.05
"""Short beside what Ray takes to bring an actor back, as everybody who waits for one pays for it."""
_MOST = 64
"""Items of one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a caller waits."""

    deadline_s: float
    """Seconds for one try."""
    total_s: float
    """Seconds over all tries."""
    outlasts: tuple[type[RunError], ...] = (ActorLostError, DeadlineError)
    """What it tries again after."""


async def call_patiently(handle: Handle, method: str, patience: Patience, /, **kwargs: Any) -> Any:
    """Call an idempotent method, again and again while its actor is being restarted.

    Args:
        handle: the actor.
        method: must give the same answer when it is called twice: an answer may have been lost.
        patience: for one try and for all.

    Raises:
        ActorLostError, DeadlineError: of the last try, when patience has run out.
    """
    again = AsyncRetrying(
        retry=retry_if_exception_type(patience.outlasts),
        stop=stop_after_delay(patience.total_s),
        wait=wait_fixed(_PAUSE_S),
        sleep=asyncio.sleep,
        reraise=True,
    )
    return await again(handle.call, method, deadline_s=patience.deadline_s, **kwargs)


class Outbox(Generic[Item, Answer]):
    """Sends items in their order, one call at a time, and hands each item its own answer.

    An idle line sends at once, a busy one sends more at a time, so that nothing waits for company.

    NOTE: of one event loop.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]],
        launch: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Nothing is sent before the first `put`.

        Args:
            send: the call; answers in the order of the items.
            launch: makes a task of the loop that sends, so that whoever owns this can cancel it.
        """
        self._send, self._launch = send, launch
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._sending = False

    def put(self, item: Item) -> asyncio.Future[Answer]:
        """Send the item with the next call; await the answer, or leave it.

        Raises (when awaited):
            whatever the call raised that carried the item.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        # Whoever does not wait for the answer need not hear of the error: the next call meets it again.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting.append((item, future))
        if not self._sending:
            self._sending = True
            self._launch(self._run())
        return future

    async def _run(self) -> None:
        """Send while there is something.

        consumes: items. produces: answers. waits for: the answer to a call. unblocked by: the callee, or the
        patience of `send`.
        """
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
                await self._send_batch(batch)
        finally:
            self._sending = False
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()

    async def _send_batch(self, batch: Sequence[tuple[Item, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._send([item for item, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except TrlRayError as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        finally:
            for _, future in batch:
                future.cancel()
