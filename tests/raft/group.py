"""A few cores, disks that sync at once, and messages by hand: for tests that walk the paper."""

from __future__ import annotations

from typing import Any

from ayder.entries import EntryKind, HardState, LogEntry, NodeId
from ayder.raft.consensus import Consensus
from ayder.raft.messages import AppendEntries, Message, Outbound
from ayder.raft.progress import Limits, ReadRange
from tests.sim.disk import Disk

__all__ = ["Group", "entries", "make_disk"]


def entries(*terms: int) -> list[LogEntry]:
    """Entries 1, 2, 3 ... of these terms."""
    return [LogEntry(index, term, EntryKind.BLOCK, 0, b"%d.%d" % (term, index)) for index, term in enumerate(terms, 1)]


def make_disk(*terms: int, term: int | None = None, vote: NodeId | None = None) -> Disk:
    """A disk that holds entries of these terms, and a term and vote."""
    disk = Disk()
    disk.write(entries(*terms), HardState(max(terms, default=0) if term is None else term, vote), None, False)
    disk.sync()
    return disk


class Group:
    """Cores by name; ``sent`` is everything that left, in order."""

    def __init__(self, *names: NodeId, disks: dict[NodeId, Disk] | None = None, **arguments: Any) -> None:
        self.disks = {name: (disks or {}).get(name) or Disk() for name in names}
        self.cores = {
            name: Consensus(
                node_id=name, voters=names, election_ticks=10, heartbeat_ticks=3,
                **{"limits": Limits(), **arguments}, **self.disks[name].core_arguments(),
            )
            for name in names
        }  # fmt: skip
        self.sent: list[Outbound] = []

    def __getitem__(self, name: NodeId) -> Consensus:
        return self.cores[name]

    def work(self, name: NodeId) -> list[Outbound]:
        """Do what the core left to do; returns (and records) what it sent."""
        core, disk, sent = self.cores[name], self.disks[name], list[Outbound]()
        while True:
            before = len(sent)
            sent += core.take_messages()
            while (ready := core.take_ready()) is not None:
                if ready.needs_write:
                    disk.write(ready.entries, ready.hard_state, ready.snapshot, ready.repaired)
                    disk.sync()
                core.persisted()
                sent += ready.messages
            for peer in list(core.leadership.progress) if core.leadership else []:
                while (plan := core.next_append(peer)) is not None:
                    if isinstance(plan, ReadRange):
                        plan = core.append_read(plan, disk.read(plan.first, plan.last))
                    assert isinstance(plan, AppendEntries), plan
                    sent.append(Outbound(peer, plan))
            core.check_invariants()
            if len(sent) == before:
                break
        self.sent += sent
        return sent

    def step(self, name: NodeId, message: Message) -> list[Outbound]:
        """Deliver one message; returns what it led to."""
        self.cores[name].step(message)
        return self.work(name)

    def campaign(self, name: NodeId) -> list[Outbound]:
        """The election timeout of a node is over."""
        self.cores[name].campaign()
        return self.work(name)

    def run(self, *names: NodeId) -> None:
        """Deliver everything among these nodes (all by default) until nothing is under way."""
        inside = names or tuple(self.cores)
        queue, self.sent = self.sent, []
        for _ in range(200):
            for outbound in queue:
                if outbound.to in inside and outbound.message.sender in inside:
                    self.step(outbound.to, outbound.message)
            queue, self.sent = self.sent, []
            if not queue:
                return
        raise AssertionError("it does not come to rest")

    def elect(self, name: NodeId, *names: NodeId) -> None:
        """Make a node the leader with the help of these (all by default)."""
        for core in self.cores.values():
            core._silent_ticks = 10
        self.sent.clear()
        self.campaign(name)
        self.run(*names)
        assert self[name].leadership is not None, self[name]
