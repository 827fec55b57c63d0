"""Clients of the simulated cluster, their history, and the check that it is linearizable.

A client appends a unique value (and repeats it under the same key until it learns the outcome) or reads how long the log is. The
check is the O(n) one a log allows: positions are unique, in real-time order, a read sees everything acknowledged before it began
and nothing that was never committed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import attrs

from ayder.entries import LogIndex, NodeId
from ayder.errors import AyderError
from ayder.raft.consensus import ReadReady
from tests.sim.node import SimNode, State

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["Clients", "Operation"]


@attrs.define(slots=True, eq=False)
class Operation:
    """One call as its client sees it."""

    client: int
    number: int
    kind: str
    began: float
    ended: float = -1.0
    result: int = -1
    """Position of the value, or length read."""
    attempt: int = 0

    @property
    def payload(self) -> bytes:
        """What is appended: unique in the run."""
        return b"%d/%d" % (self.client, self.number)


class Clients:
    """All clients of a run."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self.history: list[Operation] = []
        self._reads: dict[NodeId, list[tuple[LogIndex, Operation, int, int]]] = {}
        self._leader_hint: dict[int, NodeId] = {}
        self._current: dict[int, Operation] = {}
        self.last_append_acked = -1.0

    def start(self, count: int) -> None:
        """Let them come one after the other."""
        for client in range(count):
            self._world.schedule(self._rng.uniform(0, 200), self._begin, client)

    # -- calling ------------------------------------------------------------------------------------------------------
    def _begin(self, client: int) -> None:
        kind = "read" if self._rng.random() < self._world.knobs.reads else "append"
        operation = Operation(client, len(self.history), kind, self._world.now)
        self.history.append(operation)
        self._current[client] = operation
        self._try(operation, 0)

    def _try(self, operation: Operation, attempt: int) -> None:
        """Send the call to whom the client takes for the leader; try again when nothing came back in time."""
        if operation.ended >= 0 or operation.attempt != attempt or self._current[operation.client] is not operation:
            return
        world, rng = self._world, self._rng
        operation.attempt += 1
        names = sorted(world.nodes)
        hint = self._leader_hint.get(operation.client)
        target = hint if hint is not None and rng.random() < 0.9 else rng.choice(names)
        patience = world.knobs.election_ms * rng.uniform(0.5, 2.5)
        world.schedule(world.network_delay(), self._arrive, target, operation, operation.attempt)
        world.schedule(patience, self._give_up, operation, operation.attempt)

    def _give_up(self, operation: Operation, attempt: int) -> None:
        if operation.ended >= 0 or operation.attempt != attempt:
            return
        self._leader_hint.pop(operation.client, None)
        if operation.kind == "append" and self._rng.random() < 0.15:  # outcome unknown for ever; a new client takes over
            self._world.schedule(0.0, self._begin, operation.client)
            return
        self._try(operation, attempt)

    def _arrive(self, target: NodeId, operation: Operation, attempt: int) -> None:
        node = self._world.nodes[target]
        if node.core is None:
            return
        if self._world.now < node.paused_until:
            node.calls.append(lambda: self._arrive(target, operation, attempt))
            return
        hint = node.core.leader_id
        if node.core.leadership is None:
            if hint is not None:
                self._leader_hint[operation.client] = hint
            if operation.ended < 0 and operation.attempt == attempt:
                self._world.schedule(self._world.knobs.election_ms * 0.2, self._try, operation, attempt)
            return
        self._leader_hint[operation.client] = target
        self._world.act(node, self._call, node, operation, attempt)

    def _call(self, node: SimNode, operation: Operation, attempt: int) -> None:
        if operation.kind == "append":
            node.propose(operation, operation.payload)
            return
        assert node.core is not None
        try:
            self.read(node, operation, attempt)
        except AyderError:
            return

    def read(self, node: SimNode, operation: Operation, attempt: int) -> None:
        """Ask for a linearizable read."""
        assert node.core is not None
        node.core.read_index((operation, attempt))

    # -- answers ------------------------------------------------------------------------------------------------------
    def appended(self, node: SimNode, operation: Operation, position: int | None) -> None:
        """The proposal of this operation was applied, or (``None``) overwritten: surely not done by this attempt."""
        if position is not None:
            self._world.schedule(self._world.network_delay(), self._answered, operation, position)

    def read_released(self, node: SimNode, read: ReadReady) -> None:
        """A read may be served when its index is applied."""
        operation, attempt = read.token  # type: ignore[misc]
        if read.index is None:
            return
        if node.state.applied_index >= read.index:
            self._world.schedule(self._world.network_delay(), self._answered, operation, len(node.state.values), attempt)
        else:
            self._reads.setdefault(node.name, []).append((read.index, operation, attempt, node.life))

    def applied(self, node: SimNode, state: State) -> None:
        """Serve the reads that waited for this."""
        waiting = self._reads.get(node.name)
        if not waiting:
            return
        later = [read for read in waiting if read[0] > state.applied_index and read[3] == node.life]
        for index, operation, attempt, life in waiting:
            if index <= state.applied_index and life == node.life:
                self._world.schedule(self._world.network_delay(), self._answered, operation, len(state.values), attempt)
        self._reads[node.name] = later

    def _answered(self, operation: Operation, result: int, attempt: int | None = None) -> None:
        if operation.ended >= 0 or (attempt is not None and attempt != operation.attempt):
            return
        operation.ended, operation.result = self._world.now, result
        if operation.kind == "append":
            self.last_append_acked = self._world.now
        if self._current[operation.client] is operation:
            self._world.schedule(self._rng.expovariate(1 / self._world.knobs.think_ms), self._begin, operation.client)

    # -- the check ----------------------------------------------------------------------------------------------------
    def check(self, values: list[bytes]) -> None:
        """The history against the final log. Raises ``AssertionError``."""
        done = [operation for operation in self.history if operation.ended >= 0]
        for operation in done:
            if operation.kind == "append":
                held = values[operation.result - 1] if 0 < operation.result <= len(values) else None
                assert held == operation.payload, ("an acknowledged append is lost or moved (L1, L2)", operation, held)
        assert len(set(values)) == len(values), "a key had two effects (L4)"
        self._check_order(done, len(values))

    def _check_order(self, done: list[Operation], length: int) -> None:
        """Real time: what ended before something began is not after it (L8, L9)."""
        ends = sorted((operation.ended, operation.result) for operation in done)
        floor, position = 0, 0
        for operation in sorted(done, key=lambda one: one.began):
            while position < len(ends) and ends[position][0] < operation.began:
                floor = max(floor, ends[position][1])
                position += 1
            assert operation.result <= length, ("a read saw what is not in the log (L6)", operation)
            if operation.kind == "append":
                assert operation.result > floor, ("an append is before one that ended before it began (L8)", operation, floor)
            else:
                assert operation.result >= floor, ("a stale read (L9)", operation, floor)
