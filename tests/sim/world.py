"""A whole simulated run: clock, nodes, network, nemesis, clients; a safety phase, then a phase in which the cluster must recover.

One generator per part, all from the seed; no set is iterated, no real clock read, so a seed is one run for ever (on one version
of the code). Time is simulated milliseconds.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable
from typing import Any

import attrs

from ayder.entries import NodeId
from ayder.raft.membership import Membership
from ayder.raft.messages import Message
from tests.sim.clients import Clients
from tests.sim.knobs import Knobs
from tests.sim.nemesis import Nemesis
from tests.sim.network import Network
from tests.sim.node import Crash, SimNode
from tests.sim.oracle import Oracle

__all__ = ["Failure", "Outcome", "World", "run_seed"]


class Failure(AssertionError):
    """A run broke a rule: the message has seed, knobs, time and the rule."""


@attrs.frozen
class Outcome:
    """What a run was."""

    trace: int
    simulated_ms: float
    events: int
    appends: int
    reads: int
    elections: int
    crashes: int
    damages: int
    snapshots: int
    changes: int


class World:
    """See the module header."""

    def __init__(self, seed: int, knobs: Knobs | None = None, node_class: type[SimNode] = SimNode) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.knobs = knobs or Knobs.draw(random.Random(f"knobs {seed}"))
        self.now = 0.0
        self.trace = 0
        self.events = 0
        self.crashes = 0
        self._heap: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._sequence = 0
        self.tick_ms = self.knobs.election_ms / 10
        founders = tuple(f"n{number}" for number in range(1, self.knobs.nodes + 1))
        spares = tuple(f"s{number}" for number in range(1, self.knobs.spares + 1))
        self.names: list[NodeId] = [*founders, *spares]
        self.network = Network(random.Random(f"network {seed}"), self.knobs, self.schedule, self.deliver, lambda: self.now)
        self.oracle = Oracle(self)
        self.nemesis = Nemesis(self, random.Random(f"nemesis {seed}"))
        self.clients = Clients(self, random.Random(f"clients {seed}"))
        self.nodes = {name: node_class(self, name, founders if name in founders else ()) for name in self.names}

    # -- time and events ----------------------------------------------------------------------------------------------
    def schedule(self, delay: float, call: Callable[..., Any], *arguments: Any) -> None:
        """Run ``call`` later."""
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay, self._sequence, call, arguments))

    def run_until(self, end: float, stop: Callable[[], bool] | None = None) -> bool:
        """Work off events until ``end``, or until ``stop`` says so (then ``True``)."""
        heap = self._heap
        while heap and heap[0][0] <= end:
            self.now, _, call, arguments = heapq.heappop(heap)
            self.events += 1
            call(*arguments)
            if stop is not None and self.events % 16 == 0 and stop():
                return True
        self.now = end
        return stop is not None and stop()

    def act(self, node: SimNode, call: Callable[..., Any], *arguments: Any) -> None:
        """One step of one node, with everything it leads to there; the node may die in the middle."""
        if node.core is None:
            return
        try:
            call(*arguments)
            node.pump()
        except Crash:
            self.crash(node)

    def note(self, *facts: Any) -> None:
        """Into the trace."""
        self.trace = zlib.crc32(f"{self.now:.3f} {facts}".encode(), self.trace)

    def deliver(self, to: NodeId, message: Message) -> None:
        """The network's door."""
        self.nodes[to].receive(message)

    def network_delay(self) -> float:
        """Between a client and a node."""
        return self.rng.expovariate(1 / self.knobs.delay_ms)

    def disk_latency(self) -> float:
        """How long a write and its sync take."""
        knobs = self.knobs
        if knobs.stall and not self.network.quiet and self.rng.random() < knobs.stall:
            return self.rng.uniform(1, 20) * knobs.election_ms
        latency = self.rng.expovariate(1 / knobs.disk_ms) + 0.1
        return min(latency, knobs.election_ms / 10) if self.network.quiet else latency

    # -- nodes --------------------------------------------------------------------------------------------------------
    def crash(self, node: SimNode) -> None:
        """Kill a node with its page cache; maybe its disk rots; it comes back after a while."""
        if node.core is None:
            return
        self.crashes += 1
        self.note("crash", node.name)
        node.crash(rot=self.may_rot(node) and self.rng.random() < self.knobs.rot)
        self.schedule(self.rng.uniform(20, 800), self.restart, node, node.life)

    def restart(self, node: SimNode, life: int) -> None:
        """After a crash."""
        if node.core is None and node.life == life:
            self.act_start(node)

    def act_start(self, node: SimNode) -> None:
        """A node begins; it may die before it got anywhere."""
        node.start()
        self.act(node, lambda: None)

    def may_rot(self, node: SimNode) -> bool:
        """Only a minority of any configuration may be damaged at a time, as the promise says."""
        if self.nemesis.over or self.knobs.spares:
            return False
        rotten = [name for name in self.names if self.nodes[name].disk.damaged or name == node.name]
        return 2 * len(rotten) < len(self.names)

    def current_leader(self) -> NodeId | None:
        """Who leads in the newest term."""
        leaders = [(node.core.current_term, name) for name, node in self.nodes.items() if node.core and node.core.leadership]
        return max(leaders)[1] if leaders else None

    def leader_elected(self, node: SimNode) -> None:
        """The oracle saw an election won."""
        self.note("leader", node.name)
        self.nemesis.leader_elected(node)

    # -- the run ------------------------------------------------------------------------------------------------------
    def run(self) -> Outcome:
        """Both phases and the last checks. Raises ``Failure``."""
        try:
            for node in self.nodes.values():
                self.schedule(self.rng.uniform(0, 50), self.act_start, node)
            self.clients.start(self.knobs.clients)
            self.nemesis.start()
            self.schedule(500, self._check_logs)
            self.run_until(self.knobs.safety_ms)
            self._recover()
            self._check_at_rest()
        except Exception as error:  # an assertion of the core or the oracle, or a crash of the code under test
            raise Failure(f"seed {self.seed} at {self.now:.1f} ms: {error!r}\n{self.knobs}") from error
        return self._outcome()

    def _check_logs(self) -> None:
        self.oracle.check_logs()
        self.schedule(500, self._check_logs)

    def _recover(self) -> None:
        """R-17: a connected, undamaged majority suffices, whatever the others do."""
        self.nemesis.over = True
        self.network.heal()
        self.network.quiet = True
        membership = self._newest_membership()
        core = self._choose_core(membership)
        for name in core:
            node = self.nodes[name]
            node.paused_until = min(node.paused_until, self.now)
            node.effects_left = -1
            if node.core is None:
                self.act_start(node)
            else:
                self.act(node, node.wake, node.life)
            if node.core is not None and node.core._open is not None:  # who hangs on a stalled disk is not up: the stall is over
                self.schedule(self.disk_latency(), node.synced, node.life, node.core, node.core._open)
        self._harass([name for name in self.names if name not in core], core)
        began, timeout = self.now, 2 * self.knobs.election_ms
        acked = self.clients.last_append_acked
        recovered = self.run_until(began + 10 * timeout, lambda: self._recovered(core, began, acked))
        if not recovered:
            raise AssertionError("R-17: no recovery", core, [self.nodes[name] for name in self.names])
        elections = self.oracle.elections
        self.run_until(self.now + 7 * timeout)
        assert self.oracle.elections <= elections + 1, ("R-17: no peace", self.oracle.elections - elections)

    def _newest_membership(self) -> Membership:
        """The newest configuration that any running or stopped node may act on."""
        found = []
        for name in self.names:
            node = self.nodes[name]
            if node.core is None:
                self.act_start(node)
            assert node.core is not None
            found.append((node.core.last_term, node.core.last_index, name))
        best = self.nodes[max(found)[2]].core
        assert best is not None
        return best.membership

    def _choose_core(self, membership: Membership) -> list[NodeId]:
        """Everybody, or (where no change of members may be half done) an undamaged majority."""
        if self.knobs.heal_all or self.knobs.spares or self.knobs.nodes < 3:
            return list(self.names)
        able = [name for name in membership.all_voters if not self.nodes[name].disk.damaged]
        self.rng.shuffle(able)
        return sorted(able[: len(membership.all_voters) // 2 + 1])

    def _harass(self, outsiders: list[NodeId], core: list[NodeId]) -> None:
        """Those outside the core hear or speak one way only, or stand still now and then."""
        for name in outsiders:
            way = self.rng.choice(("deaf", "mute", "half", "pausing", "flapping", "flapping"))
            for other in self.names:
                if way == "deaf" or (way == "half" and self.rng.random() < 0.5):
                    self.network.cut(other, name)
                if way == "mute" or (way == "half" and self.rng.random() < 0.5):
                    self.network.cut(name, other)
            if way == "pausing":
                self._pausing(self.nodes[name])
            if way == "flapping":
                self._flapping(name, True)

    def _flapping(self, name: NodeId, cut: bool) -> None:
        for other in self.names:
            for link in ((name, other), (other, name)):
                (self.network.cut if cut else self.network.mend)(*link)
        self.schedule(self.rng.uniform(2, 4 if cut else 2) * self.knobs.election_ms, self._flapping, name, not cut)

    def _pausing(self, node: SimNode) -> None:
        node.pause(self.now + self.rng.uniform(1, 5) * self.knobs.election_ms)
        self.schedule(self.rng.uniform(2, 8) * self.knobs.election_ms, self._pausing, node)

    def _recovered(self, core: list[NodeId], began: float, acked: float) -> bool:
        """One leader that everyone in the core follows (if it is one of them), and writes are committed again."""
        leader = self.current_leader()
        if leader is None or self.clients.last_append_acked <= max(acked, began + self.knobs.election_ms):
            return False
        if leader not in core:
            return True
        term = self.nodes[leader].core.current_term  # type: ignore[union-attr]
        members = self.nodes[leader].core.membership.everyone  # type: ignore[union-attr]
        cores = [self.nodes[name].core for name in core if name in members]
        return all(core is not None and core.current_term == term and core.leader_id == leader for core in cores)

    def _check_at_rest(self) -> None:
        """The log of the furthest node against what clients were told."""
        self.oracle.check_logs()
        furthest = max(self.nodes.values(), key=lambda node: node.state.applied_index)
        self.clients.check(furthest.state.values)

    def _outcome(self) -> Outcome:
        done = [operation for operation in self.clients.history if operation.ended >= 0]
        appends = sum(operation.kind == "append" for operation in done)
        return Outcome(
            trace=self.trace,
            simulated_ms=self.now,
            events=self.events,
            appends=appends,
            reads=len(done) - appends,
            elections=self.oracle.elections,
            crashes=self.crashes,
            damages=self.oracle.damage_seen,
            snapshots=sum(node.disk.snapshot is not None for node in self.nodes.values()),
            changes=sum(entry[1].startswith(b"\x01") for entry in self.oracle.committed.values()),
        )


def run_seed(seed: int, node_class: type[SimNode] = SimNode, knobs: Knobs | None = None) -> Outcome:
    """One run. Raises ``Failure``."""
    return World(seed, knobs, node_class).run()
