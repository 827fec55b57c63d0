"""The read side: pages of records from memory when they are there, from disk in a worker when they are not.

Owns: what a page holds and where it ends, where a reader starts, who waits for the next record. Must not know: HTTP, encodings,
how anything is written.

A page is a list of slices of runs, nothing is copied or decoded to make one. Reads serve applied records only, so what a page
showed once is there for ever (until retention), after any crash (RELIABILITY C-1, C-2, D-3).

Invariants: a page is contiguous; ``next_offset`` never passes a record that is not in it; a page holds at least one record when
there is any at or after the start; the event loop never touches the disk.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from functools import partial

import attrs
import trio

from ayder.broker import Broker
from ayder.errors import AyderError, CorruptLog, ErrorCode
from ayder.partition import Partition
from ayder.run_cache import CachedRun, RunCache
from ayder.runs import Run, merge_runs
from ayder.storage.interface import RunRead

__all__ = ["Fetcher", "Page", "Slice", "coalesce"]

logger = logging.getLogger(__name__)

_READ_AHEAD_RECORDS = 1000
_READ_AHEAD_BYTES = 256 << 10
_COLD_READERS = 2
_SMALL_RUN_RECORDS = 100


class Slice:
    """Records ``first..last-1`` of a run."""

    __slots__ = ("cached", "first", "last")

    def __init__(self, cached: CachedRun, first: int, last: int) -> None:
        self.cached = cached
        self.first = first
        self.last = last


@attrs.define(slots=True, eq=False)
class Page:
    """Consecutive records of one partition, and the partition's bounds when they were read."""

    uid: int
    start_offset: int
    next_offset: int
    log_start_offset: int
    high_watermark: int
    slices: list[Slice]

    @property
    def count(self) -> int:
        """Records in the page."""
        return self.next_offset - self.start_offset if self.slices else 0

    @property
    def truncated(self) -> bool:
        """Whether more is there to read now."""
        return self.next_offset < self.high_watermark


class Fetcher:
    """Reads for everyone. Memory bounded by the two caches; at most a few cold reads run at a time."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._read_cache = RunCache(broker.config.storage.read_cache_bytes)
        self._limiter = trio.CapacityLimiter(_COLD_READERS)
        self.cold_reads = 0
        """Reads that went to the disk since start (metrics)."""

    def from_memory(self, partition: Partition, offset: int, limit: int, max_bytes: int) -> Page | None:
        """A page if all of it is in memory, else ``None``. An offset at or beyond the end gives an empty page."""
        start = max(offset, partition.log_start_offset)
        end = partition.next_offset
        page = Page(partition.uid, start, start, partition.log_start_offset, end, [])
        uid, tail, read = partition.uid, self._broker.tail, self._read_cache
        at, bytes_left = start, max_bytes
        stop = min(end, start + limit)
        while at < stop:
            cached = tail.find(uid, at) or read.find(uid, at, touch=True)
            if cached is None:
                return None
            piece, bytes_left = _cut(cached, at, stop, bytes_left, first_of_page=at == start)
            if piece is None:
                break
            page.slices.append(piece)
            at = cached.base_offset + piece.last
            if bytes_left <= 0:
                break
        page.next_offset = at
        return page

    async def fetch(self, partition: Partition, offset: int, limit: int, max_bytes: int) -> Page:
        """A page, from memory or from disk.

        Raises ``AyderError``: storage_damaged where the disk lost what it held, topic_not_found when the topic went meanwhile.
        """
        while True:
            page = self.from_memory(partition, offset, limit, max_bytes)
            if page is None:
                start = max(offset, partition.log_start_offset)
                runs = await self._read(partition, start, limit, max_bytes)
                page = self._page_of(partition, runs, start, limit, max_bytes)
            if page is not None:
                return page

    async def _read(self, partition: Partition, start: int, limit: int, max_bytes: int) -> list[CachedRun]:
        """Runs from the disk, read by a worker; none where retention took what was asked for."""
        self.cold_reads += 1
        read = partial(
            self._broker.store.read_runs,
            partition.uid,
            start,
            max_records=max(limit, _READ_AHEAD_RECORDS),
            max_bytes=max(max_bytes, _READ_AHEAD_BYTES),
        )
        try:
            return await trio.to_thread.run_sync(lambda: coalesce(read()), limiter=self._limiter)
        except CorruptLog as damage:
            if partition.log_start_offset > start or not self.is_live(partition):
                return []
            logger.error("a record cannot be read", extra={"partition": partition.uid, "offset": start, "reason": str(damage)})
            raise _lost(start) from damage

    def _page_of(self, partition: Partition, runs: list[CachedRun], asked: int, limit: int, max_bytes: int) -> Page | None:
        """What was read as a page; ``None`` when retention overtook all of it: read again where the log now begins."""
        log_start, end = partition.log_start_offset, partition.next_offset
        start = max(asked, log_start)
        page = Page(partition.uid, start, start, log_start, end, [])
        at, stop, bytes_left = start, min(end, start + limit), max_bytes
        full = False
        for cached in runs:
            self._read_cache.add(partition.uid, cached)
            if full or at >= stop or not cached.base_offset <= at < cached.end_offset:
                continue
            piece, bytes_left = _cut(cached, at, stop, bytes_left, first_of_page=at == start)
            if piece is None:
                full = True
                continue
            page.slices.append(piece)
            at = cached.base_offset + piece.last
            full = bytes_left <= 0
        if at == start < stop:
            if not self.is_live(partition):
                raise AyderError(ErrorCode.TOPIC_NOT_FOUND, "the topic was deleted while it was read")
            if log_start <= asked:
                raise _lost(start)
            return None
        page.next_offset = at
        return page

    async def wait_for_records(self, partition: Partition, offset: int, deadline: float) -> None:
        """Until the partition has a record at ``offset``, or the deadline (``trio.current_time``), or the topic is deleted."""
        with trio.move_on_at(deadline):
            while partition.next_offset <= offset and self.is_live(partition) and not self._broker.shutting_down:
                await self._broker.grown(partition.uid).wait()

    def is_live(self, partition: Partition) -> bool:
        """Whether the partition's topic still exists."""
        return self._broker.state.catalogue.partition(partition.uid) is partition

    async def offset_at_time(self, partition: Partition, time_ms: int) -> int:
        """The first offset whose log time is at or after ``time_ms``; the end when all are older. Exact to one run."""
        find = partial(self._broker.store.find_time, partition.uid, time_ms)
        end = partition.next_offset  # before the look-up: what comes during it is found, or is read from here
        entry = await trio.to_thread.run_sync(find, limiter=self._limiter)
        if entry is None:
            return end
        return max(entry.base_offset, partition.log_start_offset)


def _lost(offset: int) -> AyderError:
    return AyderError(ErrorCode.STORAGE_DAMAGED, f"offset {offset} is retained but the log does not hold it", offset=offset)


def coalesce(reads: list[RunRead]) -> list[CachedRun]:
    """What was read, with neighbouring small runs made one: a page then costs by its records, not by how they were produced."""
    cached: list[CachedRun] = []
    small: list[tuple[RunRead, Run]] = []

    def merge() -> None:
        if len(small) > 1:
            data = merge_runs([(run, read.entry.log_time_ms) for read, run in small])
            first = small[0][0].entry
            cached.append(CachedRun(first.base_offset, Run(data).count, first.log_time_ms, data, 0, len(data)))
        elif small:
            cached.append(_cached(small[0][0]))
        small.clear()

    for read in reads:
        run = Run(read.data)
        if run.flags or run.count > _SMALL_RUN_RECORDS:
            merge()
            cached.append(_cached(read))
            continue
        if small and small[-1][0].entry.base_offset + small[-1][1].count != read.entry.base_offset:
            merge()
        small.append((read, run))
    merge()
    return cached


def _cached(read: RunRead) -> CachedRun:
    entry = read.entry
    return CachedRun(entry.base_offset, entry.count, entry.log_time_ms, read.data, 0, len(read.data))


def _cut(cached: CachedRun, at: int, stop: int, bytes_left: int, *, first_of_page: bool) -> tuple[Slice | None, int]:
    """The part of a run from offset ``at`` that fits: (slice or None, bytes left after it)."""
    first = at - cached.base_offset
    last = min(cached.count, stop - cached.base_offset)
    weight_until = cached.run.weight_until
    before = weight_until(first)
    weight = weight_until(last) - before
    if weight <= bytes_left:
        return Slice(cached, first, last), bytes_left - weight
    fitting = first + bisect_right(range(first + 1, last + 1), before + bytes_left, key=weight_until)
    if fitting == first:
        if not first_of_page:
            return None, 0
        fitting = first + 1
    return Slice(cached, first, fitting), bytes_left - (weight_until(fitting) - before)
