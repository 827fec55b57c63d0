"""Drives one consensus module with real time, a real disk, real peers and real waiters.

Three tasks share it: the ticker says time passed, the persist loop makes promises durable, the apply loop makes the backlog of a
restart visible; the peers' streams call ``receive`` and ``next_append``. Owns no Raft rule, no byte format, no command.
Everything between two awaits is one atomic step, and after each ``advance`` does what follows from it.

The persist loop is where group commit happens, without a timer: what gathered while a block was being written is the next
block. It starts that next write before it answers for the one that just ended, so the disk works while answers leave.

Invariants: one append in flight (ADR 0003); nothing is applied, and so no answer leaves, before its append returned; applied
entries are exactly those at or below ``min(commit_index, persisted_index)``, in order; a message that promises something leaves
after the append that keeps the promise; whatever a task here raises ends the node.
Source: thesis 3.8, 6.4, 10.2.1; RELIABILITY R-6, D-1.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import trio

from ayder.entries import EntryKind, HardState, LogEntry, LogIndex, NodeId, Placement, Term
from ayder.errors import AyderError, ErrorCode
from ayder.raft.consensus import Consensus, Ready, Role
from ayder.raft.messages import AppendEntries, Message, Outbound
from ayder.raft.progress import ReadRange, SendSnapshot
from ayder.raft.writer_thread import WriterThread
from ayder.storage.interface import SegmentInfo, StorageFull

__all__ = ["Applier", "BlockSource", "Driver", "DriverLog", "Network"]

logger = logging.getLogger(__name__)

_REPLAY_CHUNK_BYTES = 4 << 20
_FULL_RETRY_S = 1.0
_MAX_FRESH_BYTES = 32 << 20
_MAX_UNWRITTEN_BYTES = 32 << 20


class BlockSource(Protocol):
    """Where the next block comes from, and who answers for it."""

    def take_block(self) -> bytes | None:
        """The payload of the next block, or ``None``; its waiters are kept under the index told to ``proposed``."""
        ...

    def proposed(self, entry: LogEntry) -> None:
        """The block just taken is this entry of the log."""
        ...

    def makes_room(self, index: LogIndex) -> bool:
        """Whether that block, which is in flight, does nothing but let disk space be given back."""
        ...

    def leadership_lost(self) -> None:
        """Blocks in flight may or may not be committed by another leader; those that gather surely will not be."""
        ...

    def progressed(self) -> None:
        """More is on this disk, or on those of others."""
        ...

    def refused(self, error: AyderError) -> None:
        """The block that was proposed last was surely not written, nor will it be."""
        ...

    def expire(self, now_ns: int) -> None:
        """Tell waiters whose time is up."""
        ...


class Applier(Protocol):
    """Who makes committed entries visible."""

    @property
    def applied_index(self) -> LogIndex:
        """The newest entry applied."""
        ...

    def apply(self, entry: LogEntry, placement: Placement) -> None:
        """Apply the next entry and answer its waiters. Sync."""
        ...


class Network(Protocol):
    """Who carries messages to the other members. Neither call waits."""

    def send(self, to: NodeId, message: Message) -> None:
        """Queue a message; it may be lost."""
        ...

    def wake(self, to: NodeId) -> None:
        """There may be something for ``next_append`` to give to this peer."""
        ...


class DriverLog(Protocol):
    """The part of a ``LogStore`` the driver uses."""

    def append(self, entries: tuple[LogEntry, ...], hard_state: HardState | None) -> list[Placement]:
        """Writer thread."""
        ...

    def release_reserve(self) -> bool:
        """Writer thread."""
        ...

    def idle(self) -> None:
        """Writer thread."""
        ...

    def read_entries(self, first: LogIndex, last: LogIndex, max_bytes: int) -> list[LogEntry]:
        """Worker thread."""
        ...

    def placement(self, index: LogIndex) -> Placement:
        """Memory; entries of unsealed segments."""
        ...

    def segments(self) -> list[SegmentInfo]:
        """Memory."""
        ...


class _Barrier:
    """A linearizable read that waits for its index."""

    __slots__ = ("index", "released")

    def __init__(self) -> None:
        self.index: LogIndex | None = None
        self.released = trio.Event()


class Driver:
    """See the module header. ``clock_ms`` is the wall clock, milliseconds since 1970."""

    def __init__(
        self,
        *,
        consensus: Consensus,
        log: DriverLog,
        source: BlockSource,
        applier: Applier,
        tick_s: float,
        clock_ms: Callable[[], int],
    ) -> None:
        self.consensus = consensus
        self._log = log
        self._source = source
        self._applier = applier
        self._tick_s = tick_s
        self._clock_ms = clock_ms
        self._wake = trio.Event()
        self._backlog = trio.Event()
        self._caught_up = trio.Event()
        self._fresh: deque[tuple[LogEntry, Placement]] = deque()
        """Entries written in this life that are not applied yet, newest last."""
        self._fresh_bytes = 0
        self._unwritten_bytes = 0
        self._written = trio.Event()
        self._reads: dict[object, _Barrier] = {}
        self._applied_enough: list[tuple[LogIndex, trio.Event]] = []
        self._standing: tuple[Term, Role, NodeId | None] = (0, Role.FOLLOWER, None)
        self._moved: trio.Event | None = None
        self.standing_changed: Callable[[], None] | None = None
        """Told when term, role or leader changed."""
        self.network: Network | None = None
        """``None`` while this node is the whole group."""
        self._quiet = trio.Event()
        self._ticked = False
        self._probing = False
        self.ready = False
        """Whether this node leads and has applied everything that was committed when it began to."""
        self.refuse_until_ns = 0
        """The last block found no room: new ones are not worth trying before this monotonic time. 0: there is room."""
        self.tick_lateness_s = 0.0
        self._too_far_behind: set[NodeId] = set()
        self.last_append_s = 0.0
        """How long the last write and sync took."""
        self.append_seconds: Callable[[float, int], None] | None = None
        """Told the duration of each append and its entry bytes (metrics)."""

    # -- for the broker -------------------------------------------------------------------------------------------
    def poke(self) -> None:
        """There may be something to write."""
        self._wake.set()

    async def wait_ready(self) -> None:
        """Until the log of the last life is applied."""
        await self._caught_up.wait()

    async def wait_moved(self) -> None:
        """Until something changed: who leads, what others hold, what is committed. The caller looks again, and bounds it."""
        self._moved = self._moved or trio.Event()
        await self._moved.wait()

    @property
    def alone(self) -> bool:
        """Whether this node is the whole group: then what it has applied is all there is, and reads need no round."""
        return self.network is None

    async def read_barrier(self) -> None:
        """Until a read may be served that sees everything acknowledged before this call (ReadIndex, thesis 6.4).

        Raises ``AyderError`` (not_leader) when this node does not lead, or ceased to before a majority confirmed it.
        """
        barrier = _Barrier()
        self._reads[barrier] = barrier
        try:
            self.consensus.read_index(barrier)
            self.advance()
            await barrier.released.wait()
        finally:
            self._reads.pop(barrier, None)
        if barrier.index is None:
            raise AyderError(ErrorCode.NOT_LEADER, "leadership was lost before a majority confirmed it", leader_url=None)
        if self._applier.applied_index < barrier.index:
            enough = trio.Event()
            self._applied_enough.append((barrier.index, enough))
            await enough.wait()

    # -- for the peers' streams -----------------------------------------------------------------------------------
    async def receive(self, peer: NodeId, message: Message) -> None:
        """A message arrived. Waits while more is received than the disk takes: that is the sender's backpressure."""
        if isinstance(message, AppendEntries):
            self._unwritten_bytes += sum(len(entry.payload) for entry in message.entries)
        self.consensus.step(message)
        self.advance()
        if self.network is not None and self.consensus.role is Role.LEADER:
            self.network.wake(peer)  # what it said may make room for more, or ask for another place
        self.poke()
        while self._backed_up():
            await self._written.wait()

    def _backed_up(self) -> bool:
        """Whether more was received than the disk takes. What comes twice counts twice, so once all is written it is zero."""
        if self.consensus.persisted_index == self.consensus.last_index:
            self._unwritten_bytes = 0
        return self._unwritten_bytes > _MAX_UNWRITTEN_BYTES

    def peer_lost(self, peer: NodeId) -> None:
        """The connection to a peer ended: what was under way to it may be lost."""
        self.consensus.peer_reset(peer)
        if self.network is not None:
            self.network.wake(peer)

    async def next_append(self, peer: NodeId) -> Message | None:
        """What the stream to this follower should send now; ``None``: wait to be woken."""
        while True:
            plan = self.consensus.next_append(peer)
            if isinstance(plan, ReadRange):
                read = partial(self._log.read_entries, plan.first, plan.last, plan.max_bytes)
                message = self.consensus.append_read(plan, await trio.to_thread.run_sync(read))
                if message is None:
                    continue  # the question was out of date by the time the disk answered
                return message
            if isinstance(plan, SendSnapshot):
                if peer not in self._too_far_behind:
                    self._too_far_behind.add(peer)
                    logger.error("a follower needs entries that are gone", extra={"peer": peer, "first_index": plan.first_index})
                return None
            return plan

    # -- tasks ----------------------------------------------------------------------------------------------------
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled; raises what ended it. Started when the tasks run, not when the node is ready."""
        self._writer = WriterThread("ayder-log-writer")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._persist_loop, name="persist loop")
                nursery.start_soon(self._apply_loop, name="apply loop")
                nursery.start_soon(self._ticker, name="ticker")
                if self.alone:
                    self.consensus.campaign()
                self.poke()
                task_status.started()
        finally:
            self._writer.stop()

    async def quiesce(self) -> None:
        """Until everything that was submitted is written and answered. Bounded by the caller."""
        self._quiet = trio.Event()
        self.poke()
        await self._quiet.wait()

    async def _ticker(self) -> None:
        due = trio.current_time() + self._tick_s
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            self.tick_lateness_s = now - due
            due = max(due + self._tick_s, now)
            self.consensus.tick()
            self.advance()
            self._wake_followers()
            self._source.expire(time.monotonic_ns())
            self._ticked = True
            self.poke()

    async def _persist_loop(self) -> None:
        while True:
            ready = self._next_ready()
            if ready is None:
                self._quiet.set()
                if self._ticked:
                    self._ticked = False
                    await self._writer.run(self._log.idle)
                await self._wake.wait()
                self._wake = trio.Event()
                continue
            await self._append_while_work_lasts(ready)

    async def _append_while_work_lasts(self, ready: Ready) -> None:
        started, job = time.perf_counter(), self._writer.start(self._append_call(ready))
        while True:
            try:
                placements = await job.wait()
            except StorageFull as full:
                await self._no_room(full)
                return
            self._measure(started, ready)
            self.refuse_until_ns = 0
            self.consensus.persisted()
            following = self._next_ready()
            if following is not None:
                started, job = time.perf_counter(), self._writer.start(self._append_call(following))
            self._take_fresh(ready.entries, placements)
            self._send(ready.messages)
            self.advance()
            if following is None:
                return
            ready = following

    def _take_fresh(self, entries: tuple[LogEntry, ...], placements: list[Placement]) -> None:
        """Entries are on disk; those they replaced are void."""
        fresh = self._fresh
        while entries and fresh and fresh[-1][0].index >= entries[0].index:
            self._fresh_bytes -= len(fresh.pop()[0].payload)
        fresh.extend(zip(entries, placements, strict=True))
        size = sum(len(entry.payload) for entry in entries)
        self._fresh_bytes += size
        if self._fresh_bytes > _MAX_FRESH_BYTES:  # far behind: the apply loop reads them back
            fresh.clear()
            self._fresh_bytes = 0
        self._unwritten_bytes -= min(size, self._unwritten_bytes)
        written, self._written = self._written, trio.Event()
        written.set()

    def _append_call(self, ready: Ready) -> Callable[[], list[Placement]]:
        log, entries, hard_state = self._log, ready.entries, ready.hard_state
        if self._probing or any(entry.kind is EntryKind.BLOCK and not self._source.makes_room(entry.index) for entry in entries):
            return lambda: log.append(entries, hard_state)

        def append_on_the_ballast() -> list[Placement]:
            try:
                return log.append(entries, hard_state)
            except StorageFull:
                if not log.release_reserve():
                    raise
                return log.append(entries, hard_state)

        return append_on_the_ballast

    def _next_ready(self) -> Ready | None:
        """The next thing to write. What needs no write is dealt with on the way."""
        consensus = self.consensus
        while True:
            if consensus.role is Role.LEADER and consensus.transfer_to is None:
                self._propose_next()
            ready = consensus.take_ready()
            if ready is None or ready.needs_write:
                assert ready is None or ready.snapshot is None, "a snapshot arrived, and this release does not install any"
                return ready
            consensus.persisted()
            self._send(ready.messages)

    def _propose_next(self) -> None:
        consensus = self.consensus
        payload = self._source.take_block()
        if payload is not None:
            self._source.proposed(consensus.propose(EntryKind.BLOCK, payload, self._clock_ms()))
            self._wake_followers()
        self._probing = payload is None and self.alone and 0 < self.refuse_until_ns <= time.monotonic_ns()
        if self._probing:  # nobody writes to a node that is not ready: it must find out itself that there is room again
            consensus.propose(EntryKind.NOOP, b"", self._clock_ms())

    async def _no_room(self, full: StorageFull) -> None:
        if not self.refuse_until_ns:
            logger.error("no room on the disk: writes are refused until there is some", extra={"reason": str(full)})
        self.refuse_until_ns = time.monotonic_ns() + int(_FULL_RETRY_S * 1e9)
        self.consensus.refused()
        if self.alone:  # elsewhere the block may be on its way to others: its outcome is not known yet
            self._source.refused(AyderError(ErrorCode.STORAGE_FULL, "the disk is full; nothing was written"))
        if not self.alone or self.consensus.role is not Role.LEADER:
            self.ready = self.ready and self.consensus.role is Role.LEADER
            await trio.sleep(_FULL_RETRY_S)

    def _measure(self, started: float, ready: Ready) -> None:
        self.last_append_s = time.perf_counter() - started
        if self.append_seconds is not None:
            self.append_seconds(self.last_append_s, sum(len(entry.payload) for entry in ready.entries))

    # -- what follows from a step ---------------------------------------------------------------------------------
    def advance(self) -> None:
        """Something changed: send what may leave, notice who leads, release reads, apply what is committed."""
        consensus = self.consensus
        self._notice_standing()
        if self.network is not None:
            self._send(consensus.take_messages())
            for read in consensus.take_reads():
                barrier = self._reads.get(read.token)
                if barrier is not None:
                    barrier.index = read.index
                    barrier.released.set()
        self.apply_committed()
        self._source.progressed()
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    def _send(self, messages: Iterable[Outbound]) -> None:
        for to, message in messages:
            assert self.network is not None, message
            self.network.send(to, message)

    def _wake_followers(self) -> None:
        if self.network is not None and self.consensus.role is Role.LEADER:
            for name in self.consensus.membership.everyone:
                if name != self.consensus.node_id:
                    self.network.wake(name)

    def _notice_standing(self) -> None:
        consensus = self.consensus
        standing = (consensus.current_term, consensus.role, consensus.leader_id)
        before, self._standing = self._standing, standing
        if standing == before:
            return
        if not self.alone:
            logger.info("standing", extra={"term": standing[0], "role": standing[1].value, "leader": standing[2]})
        if self.standing_changed is not None:
            self.standing_changed()
        self._wake_followers()
        if before[1] is Role.LEADER and (standing[0] != before[0] or standing[1] is not Role.LEADER):
            self.ready = False
            self._source.leadership_lost()

    def apply_committed(self) -> None:
        """Apply what is committed and at hand; leave the rest to the apply loop."""
        consensus, fresh, applier = self.consensus, self._fresh, self._applier
        limit = min(consensus.commit_index, consensus.persisted_index)
        while (index := applier.applied_index) < limit:
            while fresh and fresh[0][0].index <= index:
                self._fresh_bytes -= len(fresh.popleft()[0].payload)
            if not fresh or fresh[0][0].index != index + 1:
                self._backlog.set()
                return
            entry, placement = fresh.popleft()
            self._fresh_bytes -= len(entry.payload)
            applier.apply(entry, placement)
        if self._applied_enough:
            self._release_applied(applier.applied_index)
        if not self.ready and consensus.may_serve_reads and applier.applied_index == consensus.commit_index:
            self.ready = True
            self._caught_up.set()

    def _release_applied(self, applied_index: LogIndex) -> None:
        for index, enough in self._applied_enough:
            if index <= applied_index:
                enough.set()
        self._applied_enough = [one for one in self._applied_enough if one[0] > applied_index]

    async def _apply_loop(self) -> None:
        """Committed entries that memory does not hold (an earlier life's, or too many) are read back, a chunk at a time."""
        while True:
            await self._backlog.wait()
            self._backlog = trio.Event()
            consensus = self.consensus
            while (first := self._applier.applied_index + 1) <= (last := min(consensus.commit_index, consensus.persisted_index)):
                if self._fresh and self._fresh[0][0].index <= first:
                    break
                read = partial(self._log.read_entries, first, last, _REPLAY_CHUNK_BYTES)
                for entry in await trio.to_thread.run_sync(read):
                    if entry.index == self._applier.applied_index + 1:
                        self._applier.apply(entry, self._placement(entry.index))
                await trio.lowlevel.checkpoint()
            self.apply_committed()

    def _placement(self, index: LogIndex) -> Placement:
        """Where an entry of an earlier life lies; in a sealed segment the position does not matter, its footer knows."""
        try:
            return self._log.placement(index)
        except LookupError:
            holder = next(info for info in self._log.segments() if info.first_index <= index <= info.last_index)
            return Placement(holder.segment_id, 0)
