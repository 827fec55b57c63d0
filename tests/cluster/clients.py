"""What clients do to a cluster: the mix of ``tests/chaos/workload.py``, sent to any node, redirects followed, all of it recorded.

Owns: which node is asked, what a redirect and a lost answer mean. Must not know: whether an answer was right, who breaks what.

A call and the redirects it follows are one operation: a redirect says that nothing happened. Reads of a node's own state
(``consistency=local``) are recorded under the client name ``local NODE``, because other rules hold for them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import trio

from tests.chaos.history import FinalPartition, Read, Recorder, Result
from tests.chaos.http_client import Connection, NotSent, Unanswered
from tests.chaos.workload import TOPICS, Traffic, _Client, _page, _read_partition

__all__ = ["LOCAL", "STARTS", "ClusterTraffic", "read_locally"]

LOCAL = "local "
STARTS = "starts "
"""A process event of the history: this node begins a new life."""
CALL_S = 8.0
_MAX_HOPS = 6
_PAUSE_S = 0.05


class ClusterTraffic(Traffic):
    """The clients of one run. ``ports``: where clients reach each node."""

    def __init__(self, recorder: Recorder, seed: int, ports: Mapping[str, int]) -> None:
        super().__init__(recorder, seed, "")
        self.ports = dict(ports)
        self.names = {port: name for name, port in ports.items()}
        self.answered_by: Counter[str] = Counter()
        """Calls that were answered 200, by node."""
        self.redirects = 0
        self.local_reads = 0
        self.serving.set()

    async def client(self, number: int) -> None:
        """One client, until ``stopping``."""
        await _ClusterClient(self, f"c{number}", random.Random(f"{self.seed}-{number}")).run()

    async def local_reader(self, name: str) -> None:
        """Reads what one node holds, until ``stopping``. Silence is no failure: the node may be dead."""
        connection, chance = Connection(), random.Random(f"{self.seed} {name}")
        while not self.stopping:
            await trio.sleep(chance.uniform(0.02, 0.1))
            topic = chance.choice(("bulk", "bulk", "trimmed"))
            partition = chance.randrange(TOPICS[topic])
            await self._read_locally(
                connection, name, topic, partition, max(0, self.ends[topic, partition] - chance.randrange(200))
            )
        await connection.close()

    async def _read_locally(self, connection: Connection, name: str, topic: str, partition: int, offset: int) -> None:
        op = self.recorder.invoke(LOCAL + name, Read(topic, partition, offset))
        target = f"/broker/topics/{topic}/{partition}/records?encoding=b64&limit=100&consistency=local&offset={offset}"
        try:
            reply = await connection.request(self.ports[name], "GET", target, seconds=CALL_S)
        except (NotSent, Unanswered) as error:
            self.recorder.complete(op, "unknown", detail=str(error))
            return
        if reply.status == 200 and reply.headers.get("ayder-node") == name:
            self.local_reads += 1
            self.recorder.complete(op, "ok", status=200, result=_page(reply.json))
        else:
            self.recorder.complete(op, "refused", status=reply.status)


class _ClusterClient(_Client):
    """Asks the node that answered last; now and then, and when that one is silent, another one."""

    def __init__(self, traffic: ClusterTraffic, name: str, chance: random.Random) -> None:
        super().__init__(traffic, name, chance)
        self._cluster = traffic
        self._port = chance.choice(list(traffic.ports.values()))

    async def _call(
        self, action: Any, method: str, target: str, decode: Callable[[Any], Result], body: bytes = b"",
        headers: Mapping[str, str] | None = None, connection: Connection | None = None,
    ) -> tuple[str, Result | None]:  # fmt: skip
        if self._chance.random() < 0.05:
            self._port = self._elsewhere()
        if method == "GET":
            target += "&redirect=1"
        op = self._recorder.invoke(self._name, action)
        port = self._port
        for _ in range(_MAX_HOPS):
            try:
                reply = await (connection or self._connection).request(port, method, target, body, headers, CALL_S)
            except NotSent:
                port = self._port = self._elsewhere()
                await trio.sleep(_PAUSE_S)
                continue
            except Unanswered as error:
                self._recorder.complete(op, "unknown", detail=str(error))
                self._port = self._elsewhere()
                return "unknown", None
            assert reply.headers.get("ayder-node") == self._cluster.names[port], reply
            if reply.status in (307, 308):
                assert reply.json["outcome"] == "not_applied", reply
                self._cluster.redirects += 1
                port = self._port = urlsplit(reply.headers["location"]).port or 0
                continue
            self._cluster.statuses[reply.status] += 1
            if reply.status == 200:
                self._cluster.answered_by[self._cluster.names[port]] += 1
            elif reply.status == 503:
                self._port = self._elsewhere()
                await trio.sleep(_PAUSE_S)
            return self._completed(op, reply, decode)
        self._recorder.complete(op, "refused", detail="no node took it")
        return "not sent", None

    def _elsewhere(self) -> int:
        return self._chance.choice([port for port in self._cluster.ports.values() if port != self._port])


async def read_locally(traffic: ClusterTraffic, name: str) -> dict[tuple[str, int], FinalPartition]:
    """Everything one node holds, by topic and partition."""
    connection = _LocalConnection()
    try:
        return {
            (topic, partition): await _read_partition(connection, traffic.ports[name], topic, partition, {})
            for topic, partitions in TOPICS.items()
            for partition in range(partitions)
        }
    finally:
        await connection.close()


class _LocalConnection(Connection):
    """Asks each node for what it holds itself."""

    async def request(self, port: int, method: str, target: str, *rest: Any, **named: Any) -> Any:
        return await super().request(port, method, f"{target}&consistency=local", *rest, **named)
