"""What a log store promises: the one contract the AOF and its memory twin both keep.

Owns: the protocol and the plain values it speaks in. Must not know: files, Trio, what a command means. Everything here is
synchronous; who may call what from which thread is said at each method:

* *memory*: answers from memory, never blocks; any thread, in practice the event loop;
* *writer*: blocks on the disk; only the writer thread calls it, one call at a time;
* *worker*: blocks on the disk; any worker thread, several at once.

Invariants: what ``append`` returned for is on disk for good; after any ``OSError`` from a write or a sync the store is poisoned
(``StoragePoisoned`` from every later call) except where ``StorageFull`` says that nothing was written; a segment is sealed once
and never changes after, except that ``rewrite_segment`` replaces it atomically by one with the same retained runs.
Source: RELIABILITY S-1 … S-4, S-9; thesis 3.8, 10.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import attrs

from ayder.entries import HardState, LogEntry, LogIndex, Placement, Term

__all__ = ["CheckpointStore", "LogStore", "RunEntry", "RunRead", "SegmentInfo", "StorageFull"]


class StorageFull(Exception):
    """The disk has no room for this block. Nothing of it was written: the operation surely did not happen."""


class RunEntry(NamedTuple):
    """Where a run of consecutive records of one partition lies: the unit of the offset index (48 bytes in a footer)."""

    base_offset: int
    """Offset of the run's first record, assigned when the run was applied."""
    count: int  # type: ignore[assignment]  # hides tuple.count, which has no use here
    bytes_before: int
    """Record bytes (values + keys) the partition had ever taken before this run: differences say what a range weighs."""
    log_time_ms: int
    position: int
    """Byte position of the run in its segment's file."""
    length: int
    """Bytes of the run as stored, from its CRC on (``runs.py``)."""


class RunRead(NamedTuple):
    """A run read back: its index entry and its bytes, CRC verified."""

    entry: RunEntry
    data: bytes


@attrs.frozen(slots=True)
class SegmentInfo:
    """What is known of one segment without touching its file."""

    segment_id: int
    first_index: LogIndex
    last_index: LogIndex
    """0 for a segment without entries."""
    size_bytes: int
    sealed: bool
    first_time_ms: int
    last_time_ms: int


class LogStore(Protocol):
    """The Raft log with the records in it, and the index from (partition, offset) to runs."""

    # -- memory ---------------------------------------------------------------------------------------------------
    @property
    def survives_restart(self) -> bool:
        """Whether what ``append`` returned for is still there after the process ended: what a receipt may claim (D-1)."""
        ...

    @property
    def first_index(self) -> LogIndex:
        """The oldest index from which the log is whole; ``last_index + 1`` when it is empty."""
        ...

    @property
    def last_index(self) -> LogIndex:
        """The newest index on disk; 0 when there is none."""
        ...

    @property
    def hard_state(self) -> HardState:
        """Term and vote as they stand on disk."""
        ...

    def term_at(self, index: LogIndex) -> Term:
        """The term of an entry in ``first_index..last_index`` (0 for index 0). Raises ``LookupError`` outside."""
        ...

    def segments(self) -> list[SegmentInfo]:
        """All segments, oldest first; the last one is open."""
        ...

    def note_run(self, segment_id: int, uid: int, entry: RunEntry) -> None:
        """The run at ``entry`` was applied. Ignored for a sealed segment, whose footer knows already. Event loop only."""
        ...

    def forget_partition(self, uid: int) -> None:
        """The topic was deleted: drop what memory holds of this partition's index. Event loop only."""
        ...

    # -- writer ---------------------------------------------------------------------------------------------------
    def append(self, entries: Sequence[LogEntry], hard_state: HardState | None) -> list[Placement]:
        """Write and fdatasync. Entries are contiguous; a suffix that starts at or below ``last_index`` is replaced.

        Rolls to a new segment *between* entries when the open one is full. Returns one placement an entry.
        Raises ``StorageFull`` (nothing was written) or ``StoragePoisoned`` (nobody knows; the node must exit).
        """
        ...

    def release_reserve(self) -> bool:
        """The disk is full and what must be written makes room: give back the ballast. False when there is none left."""
        ...

    def idle(self) -> None:
        """Nothing to append for a while: persist the synced watermark if it moved (at most every watermark interval)."""
        ...

    def close(self) -> None:
        """Final sync and watermark. The store takes nothing after it."""
        ...

    # -- worker ---------------------------------------------------------------------------------------------------
    def seal(self, segment_id: int, end_offsets: Mapping[int, int]) -> None:
        """Close a full segment for good: footer (block index, offset index), cut to length, fsync file and directory.

        Every entry in it must have been applied (its runs noted). ``end_offsets`` gives, for every live partition, the
        next offset at the end of this segment: it makes look-ups a bisection over segments.
        """
        ...

    def read_entries(self, first: LogIndex, last: LogIndex, max_bytes: int) -> list[LogEntry]:
        """Entries ``first..last``, at least one, cut at ``max_bytes``; CRC verified (``CorruptLog``)."""
        ...

    def read_runs(self, uid: int, offset: int, *, max_records: int, max_bytes: int) -> list[RunRead]:
        """The run that holds ``offset`` (or the next one after it) and those that follow, in offset order.

        Stops when the runs hold ``max_records`` records from ``offset`` on or their data exceeds ``max_bytes`` (at least one
        run is returned if there is any at or after ``offset``). Raises ``CorruptLog`` when a run fails its CRC.
        """
        ...

    def find_run(self, uid: int, offset: int) -> RunEntry | None:
        """The index entry of the run that holds ``offset``, or of the first after it; ``None`` beyond the end."""
        ...

    def find_time(self, uid: int, time_ms: int) -> RunEntry | None:
        """The first run whose log time is >= ``time_ms``; ``None`` when all are older."""
        ...

    def find_bytes(self, uid: int, bytes_before: int) -> RunEntry | None:
        """The last run whose ``bytes_before`` is <= the given value: where a partition's size limit falls."""
        ...

    def live_bytes(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """Bytes of runs in a sealed segment that are still retained. Partitions missing from ``log_starts`` are deleted."""
        ...

    def drop_segment(self, segment_id: int) -> int:
        """Remove a sealed segment without retained runs; directory fsynced. Returns bytes freed."""
        ...

    def rewrite_segment(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """Replace a sealed segment by one without its dead runs: written aside, fsync, rename, fsync directory.

        Returns bytes freed.
        """
        ...

    def verify(self) -> list[str]:
        """Read every byte and check every checksum. Returns a sentence for each damage found."""
        ...


class CheckpointStore(Protocol):
    """Captured states of the state machine, each at one log index; worker threads only."""

    def newest(self) -> tuple[LogIndex, bytes] | None:
        """The newest checkpoint that verifies; a damaged one is passed over (and reported by ``damaged``)."""
        ...

    def write(self, index: LogIndex, state: bytes) -> None:
        """Write aside, fsync, rename, fsync directory; older ones beyond the two newest go."""
        ...
