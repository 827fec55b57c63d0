"""From (partition, offset) to runs and from indexes to entries, across all segments of one view of the log.

Owns: the view, the bisection over segments, the reading of runs and entries. Must not know: who appends, seals or removes.

Over sealed segments every column of the dense directory grows with the segment's number, so the segment that holds an offset, a
time or a byte count is found by bisection; a partition may have no runs in many segments in a row, and those are jumped over.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from threading import Lock
from typing import TypeVar

import attrs

from ayder.entries import LogEntry, LogIndex
from ayder.errors import CorruptLog
from ayder.runs import Run
from ayder.storage.frame import decode_entry
from ayder.storage.interface import RunEntry, RunRead
from ayder.storage.run_index import BASE_OFFSET, RunTable, first_after, first_at_time, last_at_bytes
from ayder.storage.sealed import PagedRuns, SealedSegment, SegmentReader
from ayder.storage.segment import UnsealedSegment

__all__ = ["View", "Views", "find_bytes", "find_run", "find_time", "read_from", "read_runs"]

_Result = TypeVar("_Result")

Segment = SealedSegment | UnsealedSegment

_GAP_BYTES = 16 << 10
"""Runs closer than this are read together: cheaper than another system call."""
_TOGETHER_BYTES = 1 << 20
_READ_AHEAD_BYTES = 64 << 10


@attrs.frozen(slots=True)
class View:
    """The segments at one moment, oldest first. The last unsealed one is open."""

    sealed: tuple[SealedSegment, ...] = ()
    unsealed: tuple[UnsealedSegment, ...] = ()

    @property
    def whole_from(self) -> LogIndex:
        """The first index from which no segment is missing or rewritten."""
        first = self.unsealed[0].start
        expected = self.unsealed[0].segment_id - 1
        for segment in reversed(self.sealed):
            if segment.segment_id != expected or segment.trailer.compacted:
                break
            first = segment.trailer.first_index
            expected -= 1
        return first

    def sealed_segment(self, segment_id: int) -> SealedSegment:
        """That segment. Raises ``LookupError`` when there is none or it is not sealed."""
        for segment in self.sealed:
            if segment.segment_id == segment_id:
                return segment
        raise LookupError(f"there is no sealed segment {segment_id}")


class Views:
    """The current view, shared by all threads.

    The lock is for real threads: the writer's roll and a worker's seal each build the next view from the current one, and
    without it the slower one would bring back what the faster one changed. Readers take the current view in one step.
    """

    __slots__ = ("_lock", "current")

    def __init__(self, view: View) -> None:
        self._lock = Lock()
        self.current = view

    def swap(self, change: Callable[[View], View]) -> None:
        """Replace the current view by a changed one."""
        with self._lock:
            self.current = change(self.current)

    def look(self, look: Callable[[View], _Result]) -> _Result:
        """Look at the current view; when a rewrite or a removal overtook the look and spoiled it, look again.

        Each time round one more such change is over, and they come one at a time, so this ends.
        """
        while True:
            view = self.current
            try:
                return look(view)
            except (CorruptLog, FileNotFoundError):
                if view is self.current:
                    raise


def _sealed_table(segment: SealedSegment, uid: int) -> PagedRuns | None:
    """The runs of a partition in a sealed segment; ``None`` when there are none."""
    end = segment.partition(uid)
    return PagedRuns(segment, end.first_run, end.runs) if end and end.runs else None


def _end_offset(segment: SealedSegment, uid: int) -> int:
    end = segment.partition(uid)
    return end.end_offset if end else 0


def _last_time(segment: SealedSegment, uid: int) -> int:
    end = segment.partition(uid)
    return end.last_time_ms if end else -1


def _last_bytes(segment: SealedSegment, uid: int) -> int:
    end = segment.partition(uid)
    return end.last_bytes_before if end else -1


def _open_tables(view: View, uid: int) -> list[tuple[UnsealedSegment, RunTable]]:
    return [(segment, table) for segment in view.unsealed if (table := segment.table(uid)) is not None]


def _runs_from(view: View, uid: int, offset: int) -> Iterator[tuple[Segment, RunEntry]]:
    tables = _open_tables(view, uid)
    if not tables or tables[0][1].word(0, BASE_OFFSET) > offset:
        yield from _sealed_runs_from(view.sealed, uid, offset)
    for segment, table in tables:
        for i in range(first_after(table, offset), table.count):
            yield segment, table.entry(i)


def _sealed_runs_from(sealed: tuple[SealedSegment, ...], uid: int, offset: int) -> Iterator[tuple[SealedSegment, RunEntry]]:
    k = bisect_right(sealed, offset, key=lambda segment: _end_offset(segment, uid))
    while k < len(sealed):
        segment = sealed[k]
        table = _sealed_table(segment, uid)
        if table is not None:
            for i in range(first_after(table, offset), table.count):
                yield segment, table.entry(i)
        k = bisect_right(sealed, _end_offset(segment, uid), lo=k + 1, key=lambda segment: _end_offset(segment, uid))


def find_run(view: View, uid: int, offset: int) -> RunEntry | None:
    """See ``LogStore.find_run``."""
    return next((entry for _, entry in _runs_from(view, uid, offset)), None)


def find_time(view: View, uid: int, time_ms: int) -> RunEntry | None:
    """See ``LogStore.find_time``."""
    sealed = view.sealed
    k = bisect_left(sealed, time_ms, key=lambda segment: _last_time(segment, uid))
    while k < len(sealed):
        table = _sealed_table(sealed[k], uid)
        if table is not None and (i := first_at_time(table, time_ms)) < table.count:
            return table.entry(i)
        end = _end_offset(sealed[k], uid)
        k = bisect_right(sealed, end, lo=k + 1, key=lambda segment: _end_offset(segment, uid))
    for _, open_table in _open_tables(view, uid):
        if (i := first_at_time(open_table, time_ms)) < open_table.count:
            return open_table.entry(i)
    return None


def find_bytes(view: View, uid: int, bytes_before: int) -> RunEntry | None:
    """See ``LogStore.find_bytes``."""
    for _, open_table in reversed(_open_tables(view, uid)):
        if (i := last_at_bytes(open_table, bytes_before)) >= 0:
            return open_table.entry(i)
    sealed = view.sealed
    k = min(bisect_right(sealed, bytes_before, key=lambda segment: _last_bytes(segment, uid)), len(sealed) - 1)
    while k >= 0:
        table = _sealed_table(sealed[k], uid)
        if table is not None and (i := last_at_bytes(table, bytes_before)) >= 0:
            return table.entry(i)
        if k == 0 or not (end := _end_offset(sealed[k - 1], uid)):
            return None
        # The segment in which the partition grew to where it stood before this one.
        k = bisect_left(sealed, end, hi=k, key=lambda segment: _end_offset(segment, uid))
    return None


def read_runs(reader: SegmentReader, view: View, uid: int, offset: int, max_records: int, max_bytes: int) -> list[RunRead]:
    """See ``LogStore.read_runs``."""
    chosen: list[tuple[Segment, RunEntry]] = []
    records = size = 0
    for segment, entry in _runs_from(view, uid, offset):
        size += entry.length
        if chosen and size > max_bytes:
            break
        chosen.append((segment, entry))
        records += entry.base_offset + entry.count - max(offset, entry.base_offset)
        if records >= max_records:
            break
    found: list[RunRead] = []
    at = 0
    while at < len(chosen):
        stop = _together(chosen, at)
        found += _read_together(reader, chosen[at][0], uid, [entry for _, entry in chosen[at:stop]])
        at = stop
    return found


def _together(chosen: list[tuple[Segment, RunEntry]], at: int) -> int:
    """Where the group of neighbouring runs that starts at ``at`` ends."""
    segment, first = chosen[at]
    end = first.position + first.length
    for stop in range(at + 1, len(chosen)):
        other, entry = chosen[stop]
        near = end <= entry.position <= end + _GAP_BYTES
        if other is not segment or not near or entry.position + entry.length - first.position > _TOGETHER_BYTES:
            return stop
        end = entry.position + entry.length
    return len(chosen)


def _read_together(reader: SegmentReader, segment: Segment, uid: int, entries: list[RunEntry]) -> list[RunRead]:
    start = entries[0].position
    data = reader.read(segment, entries[-1].position + entries[-1].length - start, start)
    return [RunRead(entry, _verified(reader, segment, uid, entry, data, entry.position - start)) for entry in entries]


def _verified(reader: SegmentReader, segment: Segment, uid: int, entry: RunEntry, together: bytes, at: int) -> bytes:
    data = together[at : at + entry.length]
    try:
        run = Run(data)
        run.verify()
        if run.uid != uid or run.count != entry.count:
            raise CorruptLog(f"found {run.count} records of partition {run.uid}, not {entry.count} of {uid}")
    except CorruptLog as error:
        raise CorruptLog(f"{reader.directory}/{segment.name}, byte {entry.position}: {error}") from error
    return data


# -- entries --------------------------------------------------------------------------------------------------------
def read_from(reader: SegmentReader, first: LogIndex, last: LogIndex, max_bytes: int, view: View) -> list[LogEntry]:
    """Entries ``first..last`` of the one segment that holds ``first``, as many as fit into one read of about ``max_bytes``."""
    segment, positions, end = _positions(view, first, last)
    start = positions[0]
    fits = len(positions)
    while fits > 1 and positions[fits - 1] - start > max(max_bytes, _READ_AHEAD_BYTES):
        fits = max(1, fits // 2)
    data = reader.read(segment, (positions[fits] if fits < len(positions) else end) - start, start)
    entries = []
    for number, position in enumerate(positions[:fits]):
        try:
            entry = decode_entry(data, position - start)
        except CorruptLog as error:
            raise CorruptLog(f"{reader.directory}/{segment.name}, byte {position}: {error}") from error
        if entry.index != first + number:
            raise LookupError(f"entry {first + number} was replaced while it was read")
        entries.append(entry)
    return entries


def _positions(view: View, first: LogIndex, last: LogIndex) -> tuple[Segment, list[int], int]:
    """The segment with ``first``, positions of the frames of ``first..last`` in it, where the last ends at most."""
    for unsealed in reversed(view.unsealed):
        if unsealed.start <= first <= unsealed.last_index:
            at = first - unsealed.start
            positions = unsealed.positions[at : at + last - first + 2].tolist()
            end = positions.pop() if len(positions) > last - first + 1 else unsealed.tail
            return unsealed, positions, end
    for segment in reversed(view.sealed):
        trailer = segment.trailer
        if trailer.last_index and trailer.first_index <= first <= trailer.last_index:
            stop = min(last, trailer.last_index)
            return segment, [segment.position_of(i) for i in range(first, stop + 1)], segment.position_of(stop + 1)
    raise LookupError(f"entry {first} is in no segment")
