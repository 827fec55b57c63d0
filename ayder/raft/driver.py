"""Drives one consensus module with real time, a real disk and real waiters.

Three tasks share it: the ticker says time passed, the persist loop makes promises durable, the apply loop makes the backlog of a
restart visible. Owns no Raft rule, no byte format, no command. Everything between two awaits is one atomic step.

The persist loop is where group commit happens, without a timer: what gathered while a block was being written is the next
block. It starts that next write before it answers for the one that just ended, so the disk works while answers leave.

Invariants: one append in flight (ADR 0003); nothing is applied, and so no answer leaves, before its append returned; applied
entries are exactly those at or below ``min(commit_index, persisted_index)``, in order; whatever a task here raises ends the
node. Source: thesis 3.8, 10.2.1; RELIABILITY R-6, D-1.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from ayder.entries import EntryKind, HardState, LogEntry, LogIndex, Placement
from ayder.errors import AyderError, ErrorCode
from ayder.raft.consensus import Consensus, Ready, Role
from ayder.raft.writer_thread import WriterThread
from ayder.storage.interface import SegmentInfo, StorageFull

__all__ = ["Applier", "BlockSource", "Driver", "DriverLog"]

logger = logging.getLogger(__name__)

_REPLAY_CHUNK_BYTES = 4 << 20
_FULL_RETRY_S = 1.0


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
        self._quiet = trio.Event()
        self._ticked = False
        self._probing = False
        self.ready = False
        """Whether this node leads and has applied everything that was committed when it began to."""
        self.refuse_until_ns = 0
        """The last block found no room: new ones are not worth trying before this monotonic time. 0: there is room."""
        self.tick_lateness_s = 0.0
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

    # -- tasks ----------------------------------------------------------------------------------------------------
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled; raises what ended it. Started when the tasks run, not when the node is ready."""
        self._writer = WriterThread("ayder-log-writer")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._persist_loop, name="persist loop")
                nursery.start_soon(self._apply_loop, name="apply loop")
                nursery.start_soon(self._ticker, name="ticker")
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
            self._fresh.extend(zip(ready.entries, placements, strict=True))
            self.apply_committed()
            if following is None:
                return
            ready = following

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
        consensus = self.consensus
        if consensus.role is Role.LEADER:
            payload = self._source.take_block()
            if payload is not None:
                self._source.proposed(consensus.propose(EntryKind.BLOCK, payload, self._clock_ms()))
            self._probing = payload is None and 0 < self.refuse_until_ns <= time.monotonic_ns()
            if self._probing:  # nobody writes to a node that is not ready: it must find out itself that there is room again
                consensus.propose(EntryKind.NOOP, b"", self._clock_ms())
        return consensus.take_ready()

    async def _no_room(self, full: StorageFull) -> None:
        if not self.refuse_until_ns:
            logger.error("no room on the disk: writes are refused until there is some", extra={"reason": str(full)})
        self.refuse_until_ns = time.monotonic_ns() + int(_FULL_RETRY_S * 1e9)
        self.consensus.refused()
        self._source.refused(AyderError(ErrorCode.STORAGE_FULL, "the disk is full; nothing was written"))
        if self.consensus.role is not Role.LEADER:
            self.ready = False
            await trio.sleep(_FULL_RETRY_S)

    def _measure(self, started: float, ready: Ready) -> None:
        self.last_append_s = time.perf_counter() - started
        if self.append_seconds is not None:
            self.append_seconds(self.last_append_s, sum(len(entry.payload) for entry in ready.entries))

    def apply_committed(self) -> None:
        """Apply what is committed and at hand; leave the rest to the apply loop."""
        fresh, applier, commit_index = self._fresh, self._applier, self.consensus.commit_index
        while fresh and fresh[0][0].index <= commit_index:
            entry, placement = fresh[0]
            if entry.index != applier.applied_index + 1:
                self._backlog.set()
                return
            fresh.popleft()
            applier.apply(entry, placement)
        if not self.ready and self.consensus.may_serve_reads and applier.applied_index == commit_index:
            self.ready = True
            self._caught_up.set()

    async def _apply_loop(self) -> None:
        """Entries that are committed but were written in an earlier life are read back and applied, a chunk at a time."""
        while True:
            await self._backlog.wait()
            self._backlog = trio.Event()
            last = self._fresh[0][0].index - 1
            while (first := self._applier.applied_index + 1) <= last:
                entries = await trio.to_thread.run_sync(self._log.read_entries, first, last, _REPLAY_CHUNK_BYTES)
                for entry in entries:
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
