"""A leader that was deposed and does not know it yet: it may refuse, it must not tell what is no longer so (C-4, G-4, R-13).

It is paused and cut off from its peers; when it wakes up it takes itself for the leader until an election timeout of its own
clock has passed. All that time clients ask it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cluster.local import Cluster
from tests.cluster.proxy import open_network

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

QUESTIONS: dict[str, Callable[[Any], bool]] = {
    "/broker/groups/g": lambda said: said["partitions"][0]["committed_offset"] == 3,
    "/broker/groups": lambda said: len(said["groups"]) == 2,
    "/broker/topics/t": lambda said: said["partitions"][0]["high_watermark"] == 6,
    "/broker/topics": lambda said: {topic["topic"] for topic in said["topics"]} == {"t", "newer"},
    "/broker/topics/newer": lambda said: True,
    "/broker/topics/t/0/records?offset=5": lambda said: said["count"] == 1,
    "/broker/topics/newer/0/records?offset=0": lambda said: said["count"] == 0,
    "/broker/consume/t/g/0": lambda said: said["committed_offset"] == 3 and said["count"] == 2,
}


def post(cluster: Cluster, path: str, body: dict[str, object], among: list[str]) -> None:
    reply = cluster.client(cluster.wait_leader(among)).request("POST", path, json.dumps(body).encode())
    assert reply.status == 200, reply


def fill(cluster: Cluster, names: list[str]) -> None:
    for name in ("t",):
        post(cluster, "/broker/topics", {"name": name, "partitions": 1}, names)
    for _ in range(5):
        post(cluster, "/broker/topics/t/produce?partition=0", {}, names)
    post(cluster, "/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 1}, names)


def change(cluster: Cluster, others: list[str]) -> None:
    post(cluster, "/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 3}, others)
    post(cluster, "/broker/commit", {"topic": "t", "group": "h", "partition": 0, "offset": 0}, others)
    post(cluster, "/broker/topics/t/produce?partition=0", {}, others)
    post(cluster, "/broker/topics", {"name": "newer", "partitions": 1}, others)


def ask(cluster: Cluster, deposed: str) -> tuple[Counter[int], list[str]]:
    """What it answers until it knows; returns the statuses and what was wrong."""
    statuses: Counter[int] = Counter()
    wrong = []
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and cluster.client(deposed).request("GET", "/ready").json["role"] == "leader":
        for question, right in QUESTIONS.items():
            reply = cluster.client(deposed).request("GET", question)
            statuses[reply.status] += 1
            if reply.status != 503 and not (reply.status == 200 and right(reply.json)):
                wrong.append(f"{question}: {reply.status} {reply.body.decode()[:200]}")
    return statuses, wrong


async def test_a_deposed_leader_tells_nothing_old(tmp_path: Path) -> None:
    with Cluster(tmp_path, http__default_produce_timeout_ms=200) as cluster:
        async with open_network(cluster.addresses, seed=1) as network:
            cluster.proxied = {names: link.port for names, link in network.links.items()}
            await trio.to_thread.run_sync(cluster.start)
            deposed = await trio.to_thread.run_sync(cluster.wait_leader)
            await trio.to_thread.run_sync(fill, cluster, [deposed])
            others = [name for name in cluster.names if name != deposed]
            network.isolate([deposed])
            cluster.pause(deposed)
            await trio.to_thread.run_sync(change, cluster, others)
            cluster.resume(deposed)
            statuses, wrong = await trio.to_thread.run_sync(ask, cluster, deposed)
            assert wrong == []
            assert statuses[503] >= 5, f"it did not take itself for the leader long enough: {statuses}"
            network.heal()
            await trio.to_thread.run_sync(cluster.wait_agreed)
