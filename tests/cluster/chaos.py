"""The run: clients at work, faults one after the other, then peace; at the end everything is read from every node and judged.

Owns: which faults, when, and what makes a run worth something. Must not know: what clients send, the rules.

Every fault is survivable: a majority is up and connected again when it is over. A seed fixes what clients send and the order and
lengths of faults, not how the two meet.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import attrs
import trio

from tests.chaos.checker import Anomaly
from tests.chaos.history import Completion, Produce, Receipt, Recorder
from tests.chaos.operations import LogOperations
from tests.chaos.workload import read_everything, set_up_topics
from tests.cluster.clients import LOCAL, STARTS, ClusterTraffic, read_locally
from tests.cluster.judge import check_cluster, nodes_agree, one_leader_a_term
from tests.cluster.local import Cluster
from tests.cluster.proxy import Network, open_network

__all__ = ["FAULTS", "SHORT", "Findings", "run_chaos"]

CALM_DOWN_S = 60.0
PRODUCE_TIMEOUT_MS = 2000
SHORT = ("kill followers", "kill leader", "kill all", "pause leader", "isolate leader", "ghost and noise")
"""The faults of the short form, in this order."""


@attrs.define
class Findings:
    """What a run did, and what was wrong."""

    anomalies: list[Anomaly]
    faults: dict[str, int]
    elections: int
    acknowledged_records: int
    acknowledged_while_broken: int
    operations: int
    unknown: int
    refused: int
    redirects: int
    local_reads: int
    answered_by: dict[str, int]
    flipped_bytes: int
    ghosts: int
    statuses: dict[int, int]
    longest_silence_s: float
    """Between two acknowledged writes."""
    seconds: float

    def check_worth(self) -> None:
        """A run that proved nothing fails."""
        assert self.acknowledged_records >= 1000 and self.acknowledged_while_broken >= 100, self
        assert self.unknown + self.refused >= 1 and self.elections >= 3, self
        assert self.redirects >= 1 and self.local_reads >= 100 and len(self.answered_by) >= 2, self


def run_chaos(
    directory: Path, *, seed: int, faults: Sequence[str] | None = None, seconds: float = 0.0, size: int = 3, clients: int = 12
) -> Findings:
    """These faults in this order, or any until ``seconds`` are over. History, data and logs stay in the directory."""
    settings = {"http__default_produce_timeout_ms": PRODUCE_TIMEOUT_MS, "logging__level": "info"}
    with Cluster(directory, size, **settings) as cluster:
        return trio.run(_Run(cluster, seed, faults, seconds, clients).run, directory)


class _Run:
    def __init__(self, cluster: Cluster, seed: int, faults: Sequence[str] | None, seconds: float, clients: int) -> None:
        self._cluster = cluster
        self._seed = seed
        self._faults = faults
        self._seconds = seconds
        self._clients = clients
        self._chance = random.Random(seed)
        self._network = Network({})
        self._process_event: Callable[[str], None] = lambda _what: None
        self._done: dict[str, int] = {}
        self._broken: list[tuple[int, int]] = []
        """Stretches of the history during which something was broken."""

    async def run(self, directory: Path) -> Findings:
        started = time.monotonic()
        with contextlib.closing(Recorder(directory / "history.jsonl")) as recorder:
            async with open_network(self._cluster.addresses, self._seed) as self._network:
                self._cluster.proxied = {names: link.port for names, link in self._network.links.items()}
                self._process_event = recorder.process
                traffic = ClusterTraffic(recorder, self._seed, self._cluster.client_ports)
                await trio.to_thread.run_sync(self._cluster.start)
                traffic.port = self._cluster.client_ports[await self._leader()]
                await set_up_topics(traffic)
                await self._under_load(traffic, started)
                anomalies = await self._peace(traffic)
        return self._findings(recorder, traffic, anomalies, started)

    async def _under_load(self, traffic: ClusterTraffic, started: float) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(self._clients):
                nursery.start_soon(traffic.client, number)
            for name in self._cluster.names:
                nursery.start_soon(traffic.local_reader, name)
            await trio.sleep(0.5)
            for fault in self._plan(started):
                traffic.recorder.process(fault)
                begun = len(traffic.recorder.events)
                await FAULTS[fault](self)
                self._broken.append((begun, len(traffic.recorder.events)))
                traffic.recorder.process("over")
                self._done[fault] = self._done.get(fault, 0) + 1
                await self._leader()
                await trio.sleep(self._chance.uniform(0.1, 0.8))
            await trio.sleep(0.5)
            traffic.stopping = True
            nursery.cancel_scope.deadline = trio.current_time() + CALM_DOWN_S
        assert not nursery.cancel_scope.cancelled_caught, "clients did not come to an end"

    def _plan(self, started: float) -> Sequence[str] | _Until:
        return self._faults if self._faults is not None else _Until(started + self._seconds, self._chance)

    async def _peace(self, traffic: ClusterTraffic) -> list[Anomaly]:
        """Heal, agree, read all of every node, judge."""
        self._network.heal()
        await trio.to_thread.run_sync(self._cluster.wait_agreed, CALM_DOWN_S)
        traffic.port = self._cluster.client_ports[await self._leader()]
        await read_everything(traffic)
        held = {name: await read_locally(traffic, name) for name in self._cluster.names}
        return [
            *check_cluster(traffic.recorder.events),
            *nodes_agree(held),
            *one_leader_a_term(self._cluster.leaders_by_term()),
        ]

    # -- parts of faults --------------------------------------------------------------------------------------------
    async def _leader(self) -> str:
        return await trio.to_thread.run_sync(self._cluster.wait_leader)

    async def _followers(self) -> list[str]:
        leader = await self._leader()
        others = [name for name in self._cluster.names if name != leader]
        return self._chance.sample(others, self._chance.randint(1, (len(self._cluster.names) - 1) // 2))

    async def _pause_s(self, least: float, most: float) -> None:
        await trio.sleep(self._chance.uniform(least, most))

    async def _start(self, names: Sequence[str]) -> None:
        await trio.sleep(0.1)  # answers of the life before are taken down
        for name in names:
            self._process_event(STARTS + name)
        await trio.to_thread.run_sync(self._cluster.start, *names)

    # -- faults -----------------------------------------------------------------------------------------------------
    async def kill_followers(self) -> None:
        """SIGKILL of a minority that does not lead; it comes back."""
        names = await self._followers()
        self._cluster.kill(*names)
        await self._pause_s(0.1, 1.5)
        await self._start(names)

    async def kill_leader(self) -> None:
        """SIGKILL of the leader; writes go on before it is back."""
        leader = await self._leader()
        self._cluster.kill(leader)
        await self._leader()
        await self._pause_s(0.2, 1.0)
        await self._start([leader])

    async def kill_all(self) -> None:
        """SIGKILL of all at once."""
        self._cluster.kill()
        await self._start(self._cluster.names)

    async def pause_leader(self) -> None:
        """SIGSTOP of the leader for longer than an election takes; it wakes up as one that was deposed."""
        leader = await self._leader()
        self._cluster.pause(leader)
        await trio.sleep(3.0)
        self._cluster.resume(leader)

    async def isolate_leader(self) -> None:
        """Clients reach the leader and the others; these do not reach each other."""
        leader = await self._leader()
        self._network.isolate([leader])
        await self._others_lead(leader)
        await self._pause_s(0.5, 2.0)
        self._network.heal()

    async def one_way(self) -> None:
        """What the leader says does not arrive; what it hears does."""
        leader = await self._leader()
        for name in self._cluster.names:
            if name != leader:
                self._network.cut(leader, name)
        await self._pause_s(1.5, 3.0)
        self._network.heal()

    async def bridge(self) -> None:
        """Two halves that only one node reaches both of."""
        names = self._chance.sample(self._cluster.names, len(self._cluster.names))
        half = len(names) // 2
        for one in names[:half]:
            for other in names[half + 1 :]:
                self._network.cut(one, other)
                self._network.cut(other, one)
        await self._pause_s(1.0, 3.0)
        self._network.heal()

    async def slow_links(self) -> None:
        """Each piece is late."""
        for link in self._network.links.values():
            link.delay_s = self._chance.uniform(0.0, 0.05)
        await self._pause_s(1.0, 2.0)
        self._network.heal()

    async def ghost_and_noise(self) -> None:
        """Old bytes on old connections after new ones were made, and flipped bits."""
        leader = await self._leader()
        async with trio.open_nursery() as nursery:
            for (source, _), link in self._network.links.items():
                if source == leader:
                    nursery.start_soon(link.ghost, self._chance.uniform(0.2, 0.6), self._chance.uniform(0.3, 1.0))
        for link in self._network.links.values():
            link.flip(2)
        await self._pause_s(0.5, 1.0)

    async def _others_lead(self, deposed: str) -> None:
        others = [name for name in self._cluster.names if name != deposed]
        await trio.to_thread.run_sync(self._cluster.wait_leader, others)

    # -- what came of it --------------------------------------------------------------------------------------------
    def _findings(self, recorder: Recorder, traffic: ClusterTraffic, anomalies: list[Anomaly], started: float) -> Findings:
        log = LogOperations(recorder.events)
        produced = [operation for operation in log.all if isinstance(operation.action, Produce)]
        receipts = list(log.acknowledged())
        broken = sum(any(a < (one.completed or 0) < b for a, b in self._broken) for one, _, _ in receipts)
        times = [e.at_ns for e in recorder.events if isinstance(e, Completion) and isinstance(e.result, Receipt)]
        return Findings(
            anomalies=anomalies,
            faults=self._done,
            elections=len(self._cluster.leaders_by_term()),
            acknowledged_records=sum(len(action.records) for _, action, receipt in receipts if not receipt.duplicate),
            acknowledged_while_broken=broken,
            operations=sum(not operation.client.startswith(LOCAL) for operation in log.all),
            unknown=sum(operation.outcome == "unknown" for operation in produced),
            refused=sum(operation.outcome == "refused" and operation.status in (0, 503) for operation in produced),
            redirects=traffic.redirects,
            local_reads=traffic.local_reads,
            answered_by=dict(traffic.answered_by),
            flipped_bytes=sum(link.flipped_bytes for link in self._network.links.values()),
            ghosts=sum(link.ghosts for link in self._network.links.values()),
            statuses=dict(sorted(traffic.statuses.items())),
            longest_silence_s=round(max((b - a for a, b in itertools.pairwise(times)), default=0) / 1e9, 2),
            seconds=round(time.monotonic() - started, 1),
        )


FAULTS: dict[str, Callable[[_Run], Awaitable[None]]] = {
    "kill followers": _Run.kill_followers,
    "kill leader": _Run.kill_leader,
    "kill all": _Run.kill_all,
    "pause leader": _Run.pause_leader,
    "isolate leader": _Run.isolate_leader,
    "one way": _Run.one_way,
    "bridge": _Run.bridge,
    "slow links": _Run.slow_links,
    "ghost and noise": _Run.ghost_and_noise,
}


class _Until:
    """Faults by chance until a moment of the monotonic clock."""

    def __init__(self, deadline: float, chance: random.Random) -> None:
        self._deadline, self._chance = deadline, chance

    def __iter__(self) -> _Until:
        return self

    def __next__(self) -> str:
        if time.monotonic() >= self._deadline:
            raise StopIteration
        return self._chance.choice(list(FAULTS))
