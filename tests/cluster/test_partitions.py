"""Cut links: what a leader without a majority took is nowhere to be seen, and who comes back does not disturb (H-3, H-12)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.cluster.local import Cluster
from tests.cluster.proxy import open_network
from tests.cluster.test_scenarios import create, linearizable, local, produce

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


async def test_h3_what_was_never_committed_is_seen_nowhere_and_undone(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        async with open_network(cluster.addresses, seed=3) as network:
            cluster.proxied = {names: link.port for names, link in network.links.items()}
            await trio.to_thread.run_sync(cluster.start)
            await trio.to_thread.run_sync(create, cluster)
            await trio.to_thread.run_sync(produce, cluster, ["kept"])
            deposed = await trio.to_thread.run_sync(cluster.wait_leader)
            others = [name for name in cluster.names if name != deposed]
            network.isolate([deposed])
            target = "/broker/topics/t/produce?partition=0&timeout_ms=300"
            reply = await trio.to_thread.run_sync(cluster.client(deposed).request, "POST", target, b"lonely")
            assert (reply.status, reply.json["outcome"]) == (504, "unknown"), reply
            assert await trio.to_thread.run_sync(local, cluster, deposed) == ["kept"], "it shows what is not committed"
            leader = await trio.to_thread.run_sync(cluster.wait_leader, others)
            reply = await trio.to_thread.run_sync(
                cluster.client(leader).request, "POST", "/broker/topics/t/produce?partition=0", b"winner"
            )
            assert (reply.status, reply.json["offset"]) == (200, 1), reply
            network.heal()
            await trio.to_thread.run_sync(cluster.wait_agreed)
            assert all(local(cluster, name) == ["kept", "winner"] for name in cluster.names)


async def test_h12_a_node_that_was_cut_off_does_not_depose_the_leader(tmp_path: Path) -> None:
    """Without pre-vote it would come back with a higher term and win or disturb."""
    with Cluster(tmp_path) as cluster:
        async with open_network(cluster.addresses, seed=12) as network:
            cluster.proxied = {names: link.port for names, link in network.links.items()}
            await trio.to_thread.run_sync(cluster.start)
            await trio.to_thread.run_sync(create, cluster)
            before = await trio.to_thread.run_sync(cluster.wait_agreed)
            leader = await trio.to_thread.run_sync(cluster.wait_leader)
            cut_off = next(name for name in cluster.names if name != leader)
            network.isolate([cut_off])
            await trio.to_thread.run_sync(produce, cluster, [f"m-{n}" for n in range(5)])
            await trio.sleep(4.0)  # time for two elections, if it held any
            lonely = await trio.to_thread.run_sync(cluster.standing, cut_off)
            assert lonely is not None
            assert (lonely.leader, lonely.term, lonely.ready) == (None, before.term, False)
            network.heal()
            after = await trio.to_thread.run_sync(cluster.wait_agreed)
            assert (after.leader, after.term) == (leader, before.term)
            assert await trio.to_thread.run_sync(linearizable, cluster) == await trio.to_thread.run_sync(local, cluster, cut_off)
