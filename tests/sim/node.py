"""A simulated node: the real consensus core, a disk, a small state machine, and what a driver does around them.

The driver part is written plainly, one method a duty, so that a mutant can break exactly one of them.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import attrs

from ayder.entries import EntryKind, LogEntry, LogIndex, NodeId
from ayder.errors import AyderError
from ayder.raft.consensus import Consensus, Ready, Role
from ayder.raft.membership import Membership
from ayder.raft.messages import AppendEntries, Message, Outbound, RequestVote, Snapshot, SnapshotMeta
from ayder.raft.progress import Limits, ReadRange, SendSnapshot
from tests.sim.disk import Disk

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["Crash", "SimNode", "State"]


class Crash(Exception):
    """The node dies here, in the middle of a step."""


@attrs.define(slots=True, eq=False)
class State:
    """What the log means: a list of values, each appended once however often its key was sent."""

    applied_index: LogIndex = 0
    applied_term: int = 0
    log_time_ms: int = 0
    digest: int = 0
    values: list[bytes] = attrs.field(factory=list)
    positions: dict[bytes, int] = attrs.field(factory=dict)

    def copy(self) -> State:
        """For a snapshot."""
        return State(
            self.applied_index, self.applied_term, self.log_time_ms, self.digest, list(self.values), dict(self.positions)
        )

    def apply(self, entry: LogEntry) -> int:
        """The position of the entry's value (1 is the first), 0 for an entry without one."""
        assert entry.index == self.applied_index + 1, (entry, self.applied_index)
        assert entry.log_time_ms >= self.log_time_ms, ("log time goes back", entry, self.log_time_ms)
        self.applied_index, self.applied_term, self.log_time_ms = entry.index, entry.term, entry.log_time_ms
        self.digest = zlib.crc32(b"%d %d " % (entry.index, entry.term) + entry.payload, self.digest)
        if entry.kind is not EntryKind.BLOCK:
            return 0
        position = self.positions.get(entry.payload)
        if position is None:
            self.values.append(entry.payload)
            position = self.positions[entry.payload] = len(self.values)
        return position


class SimNode:
    """One node of the cluster; ``core`` is ``None`` while it is down."""

    def __init__(self, world: World, name: NodeId, founders: tuple[NodeId, ...]) -> None:
        self.world = world
        self.name = name
        self.founders = founders
        self.disk = Disk()
        self.core: Consensus | None = None
        self.state = State()
        self.life = 0
        self.paused_until = 0.0
        self.queued: list[Message] = []
        self.calls: list[Any] = []
        """What clients sent meanwhile."""
        self.waiting: dict[LogIndex, tuple[int, Any]] = {}
        """Index of a proposal: its term and the client operation that waits for it."""
        self.clock_offset_ms = 0
        self.rate = world.rng.uniform(0.99, 1.01)
        self.effects_left = -1
        """Effects until the node dies in the middle of a step; -1: it does not."""
        self.acked: tuple[int, LogIndex] = (0, 0)
        """Highest (term, index) this disk ever acknowledged."""
        self.contact: dict[NodeId, float] = {}
        self.led_since = 0.0
        self.facts: tuple[Any, ...] = ()
        """What the oracle looked at last."""
        self.configured = (0, 0.0)
        """The configuration it leads in, and since when."""
        self.reading: set[NodeId] = set()

    # -- life ---------------------------------------------------------------------------------------------------------
    @property
    def up(self) -> bool:
        """Whether it runs (paused counts as running)."""
        return self.core is not None

    def start(self) -> None:
        """Read the disk and begin."""
        assert self.core is None
        knobs, rng = self.world.knobs, self.world.rng
        self.life += 1
        self.effects_left = -1
        self.core = self.make_core(
            node_id=self.name,
            voters=self.founders,
            election_ticks=10,
            heartbeat_ticks=2,
            spread=lambda n: rng.randrange(n),
            limits=Limits(
                max_append_entries=knobs.batch,
                max_append_bytes=1 << 16,
                max_inflight_appends=knobs.inflight,
                cache_bytes=rng.choice((0, 200, 100_000)),
                catch_up_entries=8,
            ),
            **self.disk.core_arguments(),
        )
        snapshot = self.disk.snapshot
        self.state = self.restored(snapshot) if snapshot else State()
        for entry in self.disk.entries[-1:]:
            self.core.observe_log_time(entry.log_time_ms)
        self.world.oracle.started(self)
        self.world.schedule(rng.uniform(0, self.world.tick_ms), self.tick, self.life)

    def make_core(self, **arguments: Any) -> Consensus:
        """The core under test."""
        return Consensus(**arguments)

    def restored(self, snapshot: Snapshot) -> State:
        """The state a snapshot holds."""
        state: Any = snapshot.data
        assert isinstance(state, State)
        return state.copy()

    def crash(self, *, rot: bool = False) -> None:
        """The process and the page cache are gone."""
        if self.core is None:
            return
        self.core = None
        self.waiting.clear()
        self.queued.clear()
        self.calls.clear()
        self.reading.clear()
        self.paused_until = 0.0
        self.disk.power_cut(self.world.rng, torn=self.world.knobs.torn, rot=rot)

    def tick(self, life: int) -> None:
        """Time passes."""
        if life != self.life or self.core is None:
            return
        world = self.world
        world.schedule(world.tick_ms * self.rate, self.tick, life)
        if world.now >= self.paused_until:
            world.act(self, self.core.tick)
            if self.core is not None:
                world.oracle.ticked(self, self.core)

    def receive(self, message: Message) -> None:
        """A message arrived."""
        if self.core is None:
            return
        if self.world.now < self.paused_until:
            self.queued.append(message)
            return
        self.contact[message.sender] = self.world.now
        self.world.act(self, self.step, message)

    def step(self, message: Message) -> None:
        """Hand the message to the core; a pre-vote changes nothing that lasts (R-11)."""
        core = self.core
        assert core is not None
        before = (core.current_term, core.voted_for)
        core.step(message)
        if isinstance(message, RequestVote) and message.pre_vote:
            assert before == (core.current_term, core.voted_for), ("R-11", self, message)

    def pause(self, until: float) -> None:
        """Stand still; what arrives waits."""
        self.paused_until = max(self.paused_until, until)
        self.world.schedule(until - self.world.now, self.wake, self.life)

    def wake(self, life: int) -> None:
        """Everything that arrived meanwhile is handled at once."""
        if life != self.life or self.core is None or self.world.now < self.paused_until:
            return
        queued, self.queued = self.queued, []
        calls, self.calls = self.calls, []
        doings: list[Any] = [lambda message=message: self.receive(message) for message in queued] + calls
        if self.world.rng.random() < 0.5:
            doings = calls + doings[: len(queued)]  # clients first
        for doing in doings:
            doing()

    # -- after every step ---------------------------------------------------------------------------------------------
    def pump(self) -> None:
        """Do everything the core left to do."""
        core = self.core
        assert core is not None
        while True:
            self.world.oracle.stepped(self, core)
            for outbound in core.take_messages():
                self.send(outbound)
            self.persist(core)
            self.world.oracle.stepped(self, core)
            self.replicate(core)
            self.apply(core)
            for read in core.take_reads():
                self.world.clients.read_released(self, read)
            if not core._now and (core._lead is None or not core._lead.outbox):
                break
        if self.waiting and core.role is not Role.LEADER:
            self.waiting.clear()  # unknown: the clients run into their timeout
        self.world.oracle.stepped(self, core)
        core.check_invariants()

    def effect(self) -> None:
        """Between any two effects the node may die."""
        if self.effects_left >= 0:
            self.effects_left -= 1
            if self.effects_left < 0:
                raise Crash

    def send(self, outbound: Outbound) -> None:
        """Onto the network."""
        self.effect()
        self.world.oracle.sends(self, outbound)
        self.world.network.send(outbound.to, outbound.message)

    def persist(self, core: Consensus) -> None:
        """At most one write under way; a hand-out without one is closed at once."""
        while core._open is None:
            ready = core.take_ready()
            if ready is None:
                return
            self.effect()
            if ready.needs_write:
                self.disk.write(ready.entries, ready.hard_state, ready.snapshot, ready.repaired)
                self.world.schedule(self.world.disk_latency(), self.synced, self.life, core, ready)
                self.before_sync(ready)
                return
            self.written(core, ready)

    def before_sync(self, ready: Ready) -> None:
        """Nothing leaves while the write is under way."""

    def synced(self, life: int, core: Consensus, ready: Ready) -> None:
        """The sync returned, or failed."""
        if life != self.life or self.core is not core or core._open is not ready:
            return
        if self.world.now < self.paused_until:
            self.world.schedule(self.paused_until - self.world.now + 0.1, self.synced, life, core, ready)
            return
        knobs = self.world.knobs
        if knobs.fsync_error and not self.world.network.quiet and self.world.rng.random() < knobs.fsync_error:
            self.sync_failed(core, ready)
            return
        self.disk.sync()
        self.world.act(self, self.written, core, ready)

    def sync_failed(self, core: Consensus, ready: Ready) -> None:
        """Nobody knows what the disk holds: the node halts (S-2)."""
        self.disk.forget_write(self.world.rng)
        self.world.crash(self)

    def written(self, core: Consensus, ready: Ready) -> None:
        """What the hand-out promised is kept now: count it, then let its messages go."""
        if ready.snapshot is not None:
            self.state = self.restored(ready.snapshot)
        if ready.repaired:
            self.world.oracle.repaired(self)
        core.persisted()
        self.world.oracle.stepped(self, core)
        for outbound in ready.messages:
            self.send(outbound)

    def replicate(self, core: Consensus) -> None:
        """Every follower's stream takes what it can."""
        if core.leadership is None:
            return
        for peer in list(core.leadership.progress):
            while (peer not in self.reading) and (work := core.next_append(peer)) is not None:
                self.serve_stream(core, peer, work)
                if core.leadership is None:
                    return

    def serve_stream(self, core: Consensus, peer: NodeId, work: AppendEntries | ReadRange | SendSnapshot) -> None:
        """One piece of work of the stream to ``peer``."""
        if isinstance(work, AppendEntries):
            self.send(Outbound(peer, work))
        elif isinstance(work, ReadRange):
            self.reading.add(peer)
            entries = self.disk.read(work.first, work.last)
            self.world.schedule(self.world.rng.uniform(0, 3), self.read_back, self.life, core, work, entries)
        else:
            snapshot = self.disk.snapshot
            assert snapshot is not None, (self, work)
            message = core.snapshot_message(work, snapshot)
            if message is not None:
                self.send(Outbound(peer, message))

    def read_back(self, life: int, core: Consensus, asked: ReadRange, entries: list[LogEntry]) -> None:
        """The disk answered a stream."""
        if life == self.life and self.core is core:
            self.reading.discard(asked.peer)
            self.world.act(self, self.send_read, core, asked, entries)

    def send_read(self, core: Consensus, asked: ReadRange, entries: list[LogEntry]) -> None:
        """Send what was read, if it is still wanted."""
        message = core.append_read(asked, entries)
        if message is not None:
            self.send(Outbound(asked.peer, message))

    # -- the state machine --------------------------------------------------------------------------------------------
    def apply_limit(self, core: Consensus) -> LogIndex:
        """Apply what is committed and on this disk."""
        return min(core.commit_index, core.persisted_index)

    def apply(self, core: Consensus) -> None:
        """Apply, answer, and now and then take a snapshot."""
        state, limit = self.state, self.apply_limit(core)
        while state.applied_index < limit:
            index = state.applied_index + 1
            entry = core.log._recent.get(index) or self.disk.read(index, index)[0]
            self.effect()
            position = self.applied(state, entry)
            self.world.oracle.applied(self, entry, state)
            waiter = self.waiting.pop(index, None)
            if waiter is not None:
                self.world.clients.appended(self, waiter[1], position if waiter[0] == entry.term else None)
            newest = self.disk.snapshot
            if state.applied_index - (newest.meta.index if newest else 0) >= self.world.knobs.snapshot_every:
                self.take_snapshot(core)
        self.world.clients.applied(self, state)

    def applied(self, state: State, entry: LogEntry) -> int:
        """Apply one entry."""
        return state.apply(entry)

    def take_snapshot(self, core: Consensus) -> None:
        """The state as it is, and the configuration that held there."""
        self.effect()
        state = self.state
        meta = SnapshotMeta(state.applied_index, state.applied_term, core.membership_at(state.applied_index), state.log_time_ms)
        data: Any = state.copy()
        self.disk.checkpoint(Snapshot(meta, data), self.world.knobs.keep_behind)
        core.log_compacted(meta.index)

    # -- what clients and admins ask ----------------------------------------------------------------------------------
    def propose(self, operation: Any, payload: bytes) -> bool:
        """A client wants to append. ``False``: surely not done."""
        core = self.core
        assert core is not None
        try:
            entry = core.propose(EntryKind.BLOCK, payload, int(self.world.now) + self.clock_offset_ms)
        except AyderError:
            return False
        self.waiting[entry.index] = (entry.term, operation)
        return True

    def administer(self, action: str, target: NodeId) -> bool:
        """Change the membership or hand over; ``False``: refused."""
        core = self.core
        assert core is not None
        try:
            if action == "transfer":
                core.transfer_leadership(target)
            else:
                change = {"add": core.add_learner, "promote": core.promote, "remove": core.remove}[action]
                change(target, int(self.world.now) + self.clock_offset_ms)
        except AyderError:
            return False
        return True

    def membership(self) -> Membership | None:
        """The configuration this node believes in."""
        return self.core.membership if self.core else None

    def __repr__(self) -> str:
        return f"{self.name}#{self.life}[{self.core!r} applied={self.state.applied_index} disk={self.disk.last_index}]"
