"""Actors on Ray: connect or start, reserve, spawn, and translate Ray's failures into ours.

probe the address --> ray.init --> compare plan and cluster --> placement group --> actors in their bundles
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
from collections.abc import Mapping
from typing import Any, Self

import ray
from ray.actor import ActorHandle as RawHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from trl_ray.config.sections import RuntimeConfig
from trl_ray.errors import ActorLostError, DeadlineError, ResourceError, RunError, TrlRayError
from trl_ray.runtime.ray_thread import in_ray_thread
from trl_ray.runtime.remote import HEALTH_GROUP, ActorPlan, remote_class
from trl_ray.runtime.runtime import ActorHandle, Role

_END_S = 10.0


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
            # asyncio.wait_for would swallow a cancellation that arrives together with the answer.
            async with asyncio.timeout(deadline_s):
                return await _as_future(ref)
        except (TimeoutError, RayError) as error:
            raise self._translate(error, method, deadline_s) from None

    async def call_shared(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> ray.ObjectRef[Any]:
        """See `ActorHandle`; the answer stays in the object store, one copy per node.

        The driver owns the answer of a method, so it outlives the actor that made it.
        """
        ref = self._submit(method, args, kwargs)
        ready, _ = await asyncio.to_thread(ray.wait, [ref], timeout=deadline_s, fetch_local=False)
        if not ready:
            raise self._translate(TimeoutError(), method, deadline_s)
        return ref

    def _submit(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ray.ObjectRef[Any]:
        bound = getattr(self._raw, method)
        if method == "health" and not self._is_async:
            bound = bound.options(concurrency_group=HEALTH_GROUP)
        ref: ray.ObjectRef[Any] = bound.remote(*args, **kwargs)
        return ref

    def _translate(self, error: BaseException, method: str, deadline_s: float) -> TrlRayError:
        where = f"{self._name}.{method}"
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, TrlRayError):
                return type(cause)(*cause.args)
            return RunError(f"{where} raised {type(cause).__name__}: {cause}\n{error}")
        if isinstance(error, (TimeoutError, GetTimeoutError)):
            return DeadlineError(f"{where} must answer within {deadline_s:g} s, but did not.")
        if isinstance(error, RayActorError):
            return ActorLostError(f"{self._name} died during {method} ({type(error).__name__}): {_last_line(error)}")
        return ActorLostError(f"{where} could not be completed by Ray ({type(error).__name__}): {_last_line(error)}")


def _handle_of(name: str, role: Role, raw: bytes, is_async: bool) -> RayHandle:
    """What `RayHandle.__reduce__` made; the bytes come from this run's own driver."""
    return RayHandle(name, role, pickle.loads(raw), is_async=is_async)


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
        ray.init(address="local", num_cpus=config.num_cpus, include_dashboard=False, **quiet)
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


def missing_resources(plans: Mapping[str, ActorPlan], available: Mapping[str, float]) -> str | None:
    """A table of wanted and available resources, or None when the plan fits."""
    lines, short = [], False
    for resource in ("CPU", "GPU"):
        wanted = sum(plan.count * plan.bundle.get(resource, 0.0) for plan in plans.values())
        have = available.get(resource, 0.0)
        short |= wanted > have
        if wanted:
            parts = ", ".join(
                f"{plan.key} {plan.count} x {plan.bundle[resource]:g}"
                for plan in plans.values()
                if resource in plan.bundle
            )
            lines.append(f"  {resource}: wants {wanted:g} ({parts}), the cluster has {have:g}")
    return "\n".join(lines) if short else None


def _resources(query: str) -> dict[str, float]:
    """What the cluster has (``cluster_resources``) or has left (``available_resources``), by resource name."""
    answer: dict[str, float] = getattr(ray, query)()
    return answer


class RayRuntime:
    """Makes Ray actors inside one placement group."""

    def __init__(self, config: RuntimeConfig, plans: Mapping[str, ActorPlan]) -> None:
        """Connect and reserve.

        Raises:
            ResourceError: the cluster does not answer, is too small, or is taken.
        """
        self._plans = plans
        self._handles: list[RayHandle] = []
        self._started_ray = connect(config)
        self._group: PlacementGroup | None = None
        try:
            self._offsets, bundles = self._layout()
            shortage = missing_resources(plans, _resources("cluster_resources"))
            if shortage:
                raise ResourceError(f"the plan must fit the cluster, but it does not:\n{shortage}\nAsk for less.")
            if bundles:
                self._group = self._reserve(bundles, config)
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
        options: dict[str, Any] = {"scheduling_strategy": self._placement(chosen, slot)}
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

    def survives(self, role: Role) -> bool:
        return all(plan.survives for plan in self._plans.values() if plan.role is role)

    async def close(self) -> None:
        await in_ray_thread(self._close)

    def _close(self) -> None:
        while self._handles:
            ray.kill(self._handles.pop().raw, no_restart=True)
        self._disconnect()

    def _disconnect(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def _layout(self) -> tuple[dict[str, int], list[dict[str, float]]]:
        """Where each plan's bundles begin in the placement group, and the bundles."""
        offsets: dict[str, int] = {}
        bundles: list[dict[str, float]] = []
        for key, plan in self._plans.items():
            if plan.bundle:
                offsets[key] = len(bundles)
                bundles += [plan.bundle] * plan.count
        return offsets, bundles

    def _reserve(self, bundles: list[dict[str, float]], config: RuntimeConfig) -> PlacementGroup:
        group: PlacementGroup = placement_group(bundles, strategy=config.placement_strategy)
        if not group.wait(timeout_seconds=config.placement_timeout_s):
            free = {name: _resources("available_resources").get(name, 0.0) for name in ("CPU", "GPU")}
            remove_placement_group(group)
            raise ResourceError(
                f"bundles {bundles} ({config.placement_strategy}) must become free within "
                f"{config.placement_timeout_s:g} s, but the cluster has {free} left. Stop what holds the rest, ask for "
                "less, or raise runtime.placement_timeout_s."
            )
        return group

    def _placement(self, plan: ActorPlan, slot: int) -> Any:
        if plan.key in self._offsets and self._group is not None:
            return PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=self._offsets[plan.key] + slot
            )
        if plan.role is Role.QUEUE:
            # The journal lies in the run directory of the driver's node, so the queue must come back there.
            node = ray.get_runtime_context().get_node_id()
            return NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return "DEFAULT"
