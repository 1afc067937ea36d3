"""A head or a raylet that is gone ends the run by name; one that is only away for a moment does not."""

import asyncio
import socket
import time

import pytest

from trl_ray.errors import ClusterLostError
from trl_ray.runtime import cluster_watch
from trl_ray.runtime.cluster_watch import Part, parts_of_cluster, watch_cluster


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_watch, "_INTERVAL_S", 0.02)


def listener(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def part(server: socket.socket, *, patience_s: float) -> Part:
    return Part(what="the head", address=server.getsockname(), patience_s=patience_s)


def test_a_part_that_stays_away_ends_the_run_by_name_after_its_patience_and_is_told_before() -> None:
    server, told = listener(), list[str]()
    watched = part(server, patience_s=0.2)
    server.close()
    with pytest.raises(ClusterLostError, match=r"the head must answer at 127.0.0.1:\d+ .* has not for 0\.\d s"):
        asyncio.run(asyncio.wait_for(watch_cluster((watched,), say=told.append), 10))
    [line] = told
    assert line.startswith("the head does not answer (") and line.endswith("the run ends if it has not in 0.2 s")


def test_a_part_that_comes_back_in_time_is_told_and_the_run_goes_on() -> None:
    server, told = listener(), list[str]()
    watched = part(server, patience_s=30)
    server.close()

    async def main() -> None:
        task = asyncio.create_task(watch_cluster((watched,), say=told.append))
        while not told:
            await asyncio.sleep(0.01)
        with listener(watched.address[1]):
            while len(told) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not task.done()
        task.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert told[1].startswith("the head answers again, after 0.")


def test_a_driver_whose_loop_is_held_again_and_again_loses_nobody_who_takes_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_watch, "_CONNECT_S", 0.05)
    monkeypatch.setattr(cluster_watch, "_INTERVAL_S", 0.001)
    told = list[str]()

    async def main() -> None:
        with listener() as server:
            task = asyncio.create_task(watch_cluster((part(server, patience_s=0.1),), say=told.append))
            for _ in range(15):
                time.sleep(0.06)  # as a step in this process does
                for _ in range(3):
                    await asyncio.sleep(0)
            assert not task.done()
            task.cancel()

    asyncio.run(main())
    assert told == []


def test_a_refusal_says_nothing_of_the_time_for_which_the_loop_was_held_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, probes = list[str](), list[None]()

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def connect(address: tuple[str, int], timeout: float) -> socket.socket:
            probes.append(None)
            if len(probes) > 2:
                return socket.socket()
            if len(probes) == 2:
                loop.call_soon_threadsafe(time.sleep, 0.4)
            raise ConnectionRefusedError

        monkeypatch.setattr(cluster_watch.socket, "create_connection", connect)
        watched = Part(what="the head", address=("127.0.0.1", 1), patience_s=0.3)
        task = asyncio.create_task(watch_cluster((watched,), say=told.append))
        while len(told) < 2 and not task.done():
            await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert told[1].startswith("the head answers again, after 0.")


def test_a_head_that_others_keep_alive_is_waited_for_as_long_as_ray_lets_the_driver_live() -> None:
    def patience(**given: object) -> tuple[float, ...]:
        return tuple(each.patience_s for each in parts_of_cluster(gcs="[::1]:6379", raylet=("h", 2), **given))

    assert patience(is_ours=True) == (2.0, 2.0)
    assert patience(is_ours=False, environ={}) == (45.0, 2.0)
    assert patience(is_ours=False, environ={"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}) == (90.0, 2.0)
    assert parts_of_cluster(gcs="[::1]:6379", raylet=("h", 2), is_ours=True)[0].address == ("::1", 6379)
