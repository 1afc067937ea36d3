"""Actors on Ray: connect or start, reserve, spawn, and translate Ray's failures into ours.

probe the address --> ray.init --> places for all (placement.py) --> actors in them
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import ray
from ray.actor import ActorHandle as RawHandle
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from trl_ray import errors
from trl_ray.config.sections import RuntimeConfig
from trl_ray.errors import (
    ActorLostError,
    AnswerLostError,
    ClusterLostError,
    DeadlineError,
    ResourceError,
    RunError,
    StartError,
    TrlRayError,
)
from trl_ray.runtime import waits
from trl_ray.runtime.cluster_watch import Part, parts_of_cluster, watch_cluster
from trl_ray.runtime.placement import Places
from trl_ray.runtime.ray_processes import kill_own_raylets
from trl_ray.runtime.ray_thread import in_ray_thread, leave_ray_behind
from trl_ray.runtime.remote import HEALTH_GROUP, ActorPlan, remote_class
from trl_ray.runtime.runtime import ActorHandle, Role

NODE_LOSS_SETTINGS: Mapping[str, int] = MappingProxyType(
    {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 3,
        "kill_worker_timeout_milliseconds": 1000,
    }
)
"""Ray's own settings where Ray is started here: a lost node is noticed within 5 s rather than 65, and a process that
hangs is gone a second after it was told to go. A cluster that others start gets them by
``ray start --head --system-config='{"health_check_period_ms": 500, ...}'``; see the README."""
_END_S = 10.0
_LOOK_S = 0.005
"""Between two looks at whether an answer that is not fetched is there."""
_CLOSE_S = 15.0
_CLOSE_LOST_S = 1.0
"""Calls to a control store that is gone end with the process."""
_LOG = logging.getLogger(__name__)


class RayHandle:
    """A Ray actor behind the common face; can be sent to other actors."""

    def __init__(self, name: str, role: Role, raw: RawHandle[Any], *, is_async: bool) -> None:
        self._name, self._role, self._raw, self._is_async = name, role, raw, is_async

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as plain bytes.

        A handle that Ray can see among the arguments of a constructor makes it warn that the actor may not be able to
        restart. Ours live as long as the driver, which holds every handle until it ends the actor.
        """
        return _handle_of, (self._name, self._role, pickle.dumps(self._raw), self._is_async)

    @property
    def name(self) -> str:
        """The actor's name."""
        return self._name

    @property
    def role(self) -> Role:
        """What the actor does."""
        return self._role

    @property
    def raw(self) -> RawHandle[Any]:
        """Ray's own handle."""
        return self._raw

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        ref = self._submit(method, args, kwargs)
        try:
            return await waits.answer(_as_future(ref), on=f"{self._name}.{method}", deadline_s=deadline_s)
        except RayError as error:
            raise self._translate(error, method) from None

    async def call_shared(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> ray.ObjectRef[Any]:
        """See `ActorHandle`; the answer stays in the object store, one copy per node.

        The driver owns the answer of a method, so it outlives the actor that made it, though not the node.
        """
        ref = self._submit(method, args, kwargs)

        async def is_ready() -> bool:
            ready, _ = ray.wait([ref], timeout=0, fetch_local=False)
            return bool(ready)

        await waits.until(is_ready, on=f"{self._name}.{method}", every_s=_LOOK_S, deadline_s=deadline_s)
        return ref

    def _submit(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ray.ObjectRef[Any]:
        bound = getattr(self._raw, method)
        if method == "health" and not self._is_async:
            bound = bound.options(concurrency_group=HEALTH_GROUP)
        ref: ray.ObjectRef[Any] = bound.remote(*args, **kwargs)
        return ref

    def _translate(self, error: BaseException, method: str) -> TrlRayError:
        where = f"{self._name}.{method}"
        # As itself, or as what kept Ray from calling the method.
        if isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError):
            return AnswerLostError(f"{where} needs an answer that was lost with its node: {_last_line(error)}")
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, TrlRayError):
                return type(cause)(*cause.args)
            return RunError(f"{where} raised {type(cause).__name__}: {cause}\n{error}")
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raised = _raised_by_constructor(error)
            return raised or StartError(f"{self._name} could not start: {_last_line(error)}")
        if isinstance(error, RayActorError):
            return ActorLostError(f"{self._name} died during {method} ({type(error).__name__}): {_last_line(error)}")
        return ActorLostError(f"{where} could not be completed by Ray ({type(error).__name__}): {_last_line(error)}")


def _handle_of(name: str, role: Role, raw: bytes, is_async: bool) -> RayHandle:
    """What `RayHandle.__reduce__` made; the bytes come from this run's own driver."""
    return RayHandle(name, role, pickle.loads(raw), is_async=is_async)


def _raised_by_constructor(error: BaseException) -> TrlRayError | None:
    """What an actor's constructor raised on purpose, of which Ray keeps the text alone; its messages have one line."""
    kind, _, message = _last_line(error).partition(": ")
    found = getattr(errors, kind.removeprefix(f"{errors.__name__}."), None)
    if not message or not isinstance(found, type) or not issubclass(found, TrlRayError):
        return None
    return found(message)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no detail"


def _as_future(ref: ray.ObjectRef[Any]) -> asyncio.Future[Any]:
    return asyncio.wrap_future(ref.future())


def _probe(address: str, timeout_s: float) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ResourceError(f"runtime.address must be host:port or auto, got {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise ResourceError(
            f"runtime.address must be a running Ray cluster, but {address} does not answer ({error}). "
            "Start one with `ray start --head`, or leave runtime.address out to start Ray here."
        ) from None


def connect(config: RuntimeConfig) -> bool:
    """Join the cluster the configuration names, or start Ray on this machine.

    In the main thread Ray would take the handler of SIGTERM; elsewhere it says that it does not, which nobody needs to
    know.

    Returns:
        True when Ray was started here and must be stopped at the end.

    Raises:
        ResourceError: the address does not answer, or the cluster refuses us.
    """
    if ray.is_initialized():
        return False
    logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in record.getMessage())
    # A driver of `ray job submit` finds the cluster that runs it in RAY_ADDRESS.
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address is None:
        settings = dict(NODE_LOSS_SETTINGS)
        ray.init(address="local", num_cpus=config.num_cpus, include_dashboard=False, _system_config=settings, **quiet)
        return True
    if address != "auto" and not address.startswith("http"):
        _probe(address, config.connect_timeout_s)
    try:
        ray.init(address="auto" if address.startswith("http") else address, **quiet)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ResourceError(
            f"runtime.address={address} must be a running cluster that accepts us: {_last_line(error)}. "
            "With token authentication, set RAY_AUTH_MODE=token and the cluster's token."
        ) from None
    return False


def _parts(*, is_ours: bool) -> tuple[Part, ...]:
    """The processes of Ray's that this driver cannot be without; a Ray client is told of them by its server."""
    client: Any = ray.util.client.ray
    if client.is_connected():
        return ()
    context, list_nodes = ray.get_runtime_context(), cast(Any, ray.nodes)
    own = next(node for node in list_nodes() if node["NodeID"] == context.get_node_id())
    raylet = (own["NodeManagerAddress"], int(own["NodeManagerPort"]))
    return parts_of_cluster(gcs=context.gcs_address, raylet=raylet, is_ours=is_ours)


class RayRuntime:
    """Makes Ray actors inside one placement group."""

    def __init__(self, config: RuntimeConfig, plans: Mapping[str, ActorPlan]) -> None:
        """Connect and reserve.

        Raises:
            ResourceError: the cluster does not answer, is too small, or is taken.
        """
        self._plans = plans
        self._handles: list[RayHandle] = []
        self._is_lost = False
        self._started_ray = connect(config)
        self._places = Places(plans, config)
        self._parts = _parts(is_ours=self._started_ray)
        try:
            self._places.reserve()
        except BaseException:
            self._disconnect()
            raise

    @classmethod
    async def open(cls, config: RuntimeConfig, plans: Mapping[str, ActorPlan]) -> Self:
        """As the constructor, beside the event loop; what a caller that is cancelled waits for no more is undone.

        Raises:
            ResourceError: see the constructor.
        """
        return await in_ray_thread(lambda: cls(config, plans), undo=lambda runtime: runtime._close())

    async def spawn(
        self, role: Role, name: str, cls: type, /, *, slot: int = 0, plan: str | None = None, **kwargs: Any
    ) -> ActorHandle:
        chosen = self._plans[plan or role]
        options: dict[str, Any] = {"scheduling_strategy": self._places.strategy(chosen, slot)}
        raw: RawHandle[Any] = remote_class(cls, chosen).options(**options).remote(**kwargs)  # type: ignore[assignment]
        handle = RayHandle(name, role, raw, is_async=chosen.is_async)
        self._handles.append(handle)
        return handle

    async def kill(self, handle: ActorHandle) -> None:
        assert isinstance(handle, RayHandle)
        if self.survives(handle.role):
            ray.kill(handle.raw, no_restart=False)
        else:
            await self.end(handle)

    async def end(self, handle: ActorHandle) -> None:
        """Returns when the process is gone, so that its files and CPUs are free again."""
        assert isinstance(handle, RayHandle)
        ray.kill(handle.raw, no_restart=True)
        if handle in self._handles:
            self._handles.remove(handle)
        try:
            await handle.call("health", deadline_s=_END_S)
        except (ActorLostError, DeadlineError):
            return

    async def has_room(self, role: Role, *, slot: int = 0) -> bool:
        [plan, *_] = [plan for plan in self._plans.values() if plan.role is role]
        return await self._places.has_room(plan, slot)

    async def renew(self) -> None:
        await self._places.renew()

    def survives(self, role: Role) -> bool:
        return all(plan.survives for plan in self._plans.values() if plan.role is role)

    async def watch(self, say: Callable[[str], None]) -> None:
        try:
            await watch_cluster(self._parts, say=say)
        except ClusterLostError:
            self._is_lost = True
            raise

    async def close(self) -> None:
        """What Ray does not answer to, and what fails in it, is left to the end of the process: the run is over."""
        try:
            async with asyncio.timeout(_CLOSE_LOST_S if self._is_lost else _CLOSE_S):
                await in_ray_thread(self._close)
        except TimeoutError:
            _LOG.warning("Ray did not end in time; its processes end with this one")
            if self._is_lost and self._started_ray:
                kill_own_raylets()
        except Exception as error:
            leave_ray_behind()
            _LOG.warning("Ray could not be ended in order (%s: %s)", type(error).__name__, error)

    def _close(self) -> None:
        while self._handles:
            ray.kill(self._handles.pop().raw, no_restart=True)
        self._disconnect()

    def _disconnect(self) -> None:
        self._places.remove()
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False
