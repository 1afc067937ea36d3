"""Where actors go: places reserved for all of them together, and anew when a node is lost for good.

plans --reserve--> one placement group: learner | rewards | ... | rollout workers, as many as there is room for
                   + one group for each further rollout worker, filled when a node has room
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from trl_ray.config.sections import RuntimeConfig
from trl_ray.errors import ResourceError, RunError
from trl_ray.runtime import waits
from trl_ray.runtime.remote import ActorPlan
from trl_ray.runtime.runtime import Role

_LOOK_S = 0.2
_FREED_S = 5.0
"""For Ray to notice that what ended actors held is free."""


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


def resources(query: str) -> dict[str, float]:
    """What the cluster has (``cluster_resources``) or has left (``available_resources``), by resource name."""
    answer: dict[str, float] = getattr(ray, query)()
    return answer


class Places:
    """The places of one run's actors.

    Args:
        plans: of all actors.
        config: says how places lie to each other, and how long they may be waited for.
    """

    def __init__(self, plans: Mapping[str, ActorPlan], config: RuntimeConfig) -> None:
        self._plans, self._config = plans, config
        self._group: PlacementGroup | None = None
        self._offsets: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._further: dict[tuple[str, int], PlacementGroup] = {}
        """Of rollout workers for which the group of all had no room."""

    def reserve(self) -> None:
        """Reserve a place for every actor, of rollout workers for as many as there is room for.

        Raises:
            ResourceError: the cluster is too small, or taken.
        """
        least = {key: replace(plan, count=plan.fewest or plan.count) for key, plan in self._plans.items()}
        shortage = missing_resources(least, resources("cluster_resources"))
        if shortage:
            raise ResourceError(f"the plan must fit the cluster, but it does not:\n{shortage}\nAsk for less.")
        if not self._lay_out({}):
            return
        config = self._config
        choices = list(self._ever_fewer({key: plan.count for key, plan in least.items()}))
        for fewer in choices:
            bundles = self._lay_out(fewer)
            self._group = placement_group(bundles, strategy=config.placement_strategy)
            patience_s = config.placement_timeout_s if fewer is choices[-1] else _FREED_S
            if self._group.wait(timeout_seconds=patience_s):
                return
            free = {name: resources("available_resources").get(name, 0.0) for name in ("CPU", "GPU")}
            self.remove()
        raise ResourceError(
            f"bundles {bundles} ({config.placement_strategy}) must become free within "
            f"{config.placement_timeout_s:g} s, but the cluster has {free} left. Stop what holds the rest, ask for "
            "less, or raise runtime.placement_timeout_s."
        )

    async def renew(self) -> None:
        """Where a place is lost, reserve all anew, with fewer rollout workers if need be; every actor was ended.

        Raises:
            RunError: not even one worker beside the others finds room in time.
        """
        if self._group is None or await asyncio.to_thread(self._is_whole, self._group):
            return
        begin = time.monotonic()
        while True:
            for fewer in self._ever_fewer({}):
                if await self._reserve_within(fewer, _FREED_S):
                    return
            if time.monotonic() - begin > self._config.placement_timeout_s:
                raise RunError(
                    "the actors must find room on the nodes that are left within "
                    f"{self._config.placement_timeout_s:g} s (runtime.placement_timeout_s), but bundles "
                    f"{self._lay_out({})} ({self._config.placement_strategy}) do not, even with one rollout worker. "
                    "Add a node, then resume."
                )

    async def _reserve_within(self, fewer: Mapping[str, int], seconds: float) -> bool:
        self.remove()
        group = self._group = placement_group(self._lay_out(fewer), strategy=self._config.placement_strategy)

        async def look() -> bool:
            return await asyncio.to_thread(self._is_whole, group)

        try:
            await waits.until(look, on="nodes with room", every_s=_LOOK_S, deadline_s=seconds)
        except TimeoutError:
            return False
        return True

    def _ever_fewer(self, least: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Counts of rollout workers, from all to the least, which the nodes that live can hold by their sum.

        Args:
            least: how many there must be, by plan; otherwise one.
        """
        alive = resources("cluster_resources")
        elastic = [plan for plan in self._plans.values() if plan.role is Role.ROLLOUT]
        most = max((plan.count for plan in elastic), default=1)
        lowest = max((least.get(plan.key, 1) for plan in elastic), default=1)
        for count in range(most, lowest - 1, -1):
            fewer = {plan.key: min(count, plan.count) for plan in elastic}
            wanted: dict[str, float] = {}
            for bundle in self._lay_out(fewer):
                for name, amount in bundle.items():
                    wanted[name] = wanted.get(name, 0.0) + amount
            if count == lowest or all(amount <= alive.get(name, 0.0) for name, amount in wanted.items()):
                yield fewer

    def _lay_out(self, fewer: Mapping[str, int]) -> list[dict[str, float]]:
        """The bundles of the group of all; also notes where those of each plan begin."""
        bundles: list[dict[str, float]] = []
        self._offsets, self._counts = {}, {}
        for key, plan in self._plans.items():
            if plan.bundle:
                self._offsets[key], self._counts[key] = len(bundles), fewer.get(key, plan.count)
                bundles += [plan.bundle] * self._counts[key]
        return bundles

    async def has_room(self, plan: ActorPlan, slot: int) -> bool:
        """Whether a place is on a node that lives; asks for one where the group of all has none for it."""
        if self._group is None or plan.key not in self._offsets:
            return True
        group, bundle = self._place(plan, slot)
        return await asyncio.to_thread(self._is_placed, group, bundle)

    def strategy(self, plan: ActorPlan, slot: int) -> Any:
        """How Ray is to schedule an actor."""
        if plan.key in self._offsets and self._group is not None:
            group, bundle = self._place(plan, slot)
            return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
        if plan.role is Role.QUEUE:
            # The journal lies in the run directory of the driver's node, so the queue must come back there.
            node = ray.get_runtime_context().get_node_id()
            return NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return "DEFAULT"

    def _place(self, plan: ActorPlan, slot: int) -> tuple[PlacementGroup, int]:
        assert self._group is not None
        if slot < self._counts[plan.key]:
            return self._group, self._offsets[plan.key] + slot
        if (plan.key, slot) not in self._further:
            self._further[plan.key, slot] = placement_group([plan.bundle])
        return self._further[plan.key, slot], 0

    def remove(self) -> None:
        """Give all places back."""
        groups = [*self._further.values(), *([] if self._group is None else [self._group])]
        self._further.clear()
        self._group = None
        for group in groups:
            remove_placement_group(group)

    def _is_whole(self, group: PlacementGroup) -> bool:
        return all(self._is_placed(group, bundle) for bundle in range(group.bundle_count))

    @staticmethod
    def _is_placed(group: PlacementGroup, bundle: int) -> bool:
        # Ray takes a lost bundle off its node, and gives it another one as soon as one has room.
        table = placement_group_table(group)
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        node = table["bundles_to_node_id"].get(bundle)
        return table["state"] != "PENDING" and any(each["NodeID"] == node and each["Alive"] for each in nodes)
