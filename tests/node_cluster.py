"""Ray on several nodes in one machine: a head and raylets that can be killed, stopped and added.

    head (the driver, the queue)    raylet    raylet ...      each with CPUs of its own and a store of its own

A node is added from the main thread only: Ray installs signal handlers when it starts one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from trl_ray.runtime.cluster import NODE_LOSS_SETTINGS

_STORE_BYTES = 80 * 1024**2


class NodeCluster:
    """The nodes of one test module; started at once, and ended by `close`."""

    def __init__(self, *, head_cpus: float, environment: dict[str, Any]) -> None:
        """Start the head and join it.

        Args:
            head_cpus: CPUs beside the driver.
            environment: Ray's runtime environment of all workers.
        """
        import ray
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": head_cpus,
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_system_config": dict(NODE_LOSS_SETTINGS),
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)  # type: ignore[no-untyped-call]
        self._nodes: list[Any] = []
        ray.init(
            address=self._cluster.address,
            log_to_driver=False,
            configure_logging=False,
            logging_level="ERROR",
            runtime_env=environment,
        )

    def add(self, *, cpus: float) -> Any:
        """One more node."""
        node = self._cluster.add_node(num_cpus=cpus, object_store_memory=_STORE_BYTES)  # type: ignore[no-untyped-call]
        self._nodes.append(node)
        return node

    def keep(self, cpus: Sequence[float]) -> list[Any]:
        """Exactly such nodes beside the head: those that live and fit stay, others end or are added."""
        import ray

        alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}  # type: ignore[no-untyped-call]
        kept: list[Any] = []
        for node in list(self._nodes):
            fits = node.node_id in alive and len(kept) < len(cpus) and node._ray_params.num_cpus == cpus[len(kept)]
            if fits:
                kept.append(node)
            else:
                self.end(node)
        return kept + [self.add(cpus=each) for each in cpus[len(kept) :]]

    def end(self, node: Any) -> None:
        """Take a node out, dead or alive."""
        self.send(node, signal.SIGCONT)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)  # type: ignore[no-untyped-call]

    def node_of(self, bundle: int) -> Any:
        """The node, head apart, that holds a bundle of the placement group there is."""
        found = self.nodes_of_places()[bundle]
        return next(node for node in self._nodes if node.node_id == found)

    @staticmethod
    def nodes_of_places() -> list[str]:
        """The nodes of all bundles of the placement group there is."""
        from ray.util.placement_group import placement_group_table

        [table] = [table for table in placement_group_table().values() if table["state"] == "CREATED"]
        found = table["bundles_to_node_id"]
        return [found[bundle] for bundle in range(len(found))]

    @staticmethod
    def send(node: Any, number: signal.Signals) -> None:
        """A signal to a node's raylet; its actors get none."""
        for process in node.all_processes.get("raylet", []):
            if process.process.poll() is None:
                os.kill(process.process.pid, number)

    def close(self) -> None:
        """End everything."""
        import ray

        for node in self._nodes:
            self.send(node, signal.SIGCONT)
        ray.shutdown()
        self._cluster.shutdown()
