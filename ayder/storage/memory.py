"""The log store's memory twin: the same contract without files, and a disk that can be told to fail.

Owns: an independent, plain implementation of ``LogStore`` for tests and simulation (lists and dictionaries, no index). Must not
know: the AOF; sharing code with it would make the conformance suite compare a thing with itself.

Durability is modelled by ``MemoryDisk``: what ``append`` wrote is *unsynced* until its sync step, and ``power_cut`` loses any
suffix of that. A store opened again on the same disk sees what was kept. Nothing survives the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from ayder.entries import HardState, LogEntry, LogIndex, NodeId, Placement, Term
from ayder.errors import CorruptLog, StoragePoisoned
from ayder.runs import Run
from ayder.storage.interface import RunEntry, RunRead, SegmentInfo, StorageFull

__all__ = ["MemoryDisk", "MemoryLogStore", "MemoryOptions"]

_FRAME_OVERHEAD = 48  # bytes an entry costs besides its payload, so that segments fill as they do on disk
_FIRST_POSITION = 64


@attrs.frozen(kw_only=True)
class MemoryOptions:
    """When the open segment is full."""

    segment_bytes: int = 64 << 20
    segment_blocks: int = 32_768


@attrs.define(slots=True, eq=False)
class _Segment:
    segment_id: int
    next_index: LogIndex
    frames: list[LogEntry | HardState] = attrs.field(factory=list)
    """What the disk holds, in the order it was written."""
    data: bytearray = attrs.field(factory=lambda: bytearray(_FIRST_POSITION))
    placed: dict[LogIndex, tuple[LogEntry, int]] = attrs.field(factory=dict)
    """Entries that still count, with the position of their payload."""
    runs: dict[int, list[RunEntry]] = attrs.field(factory=dict)
    blocks: int = 0
    sealed: bool = False
    compacted: bool = False

    def info(self) -> SegmentInfo:
        times = [entry.log_time_ms for entry, _ in self.placed.values()] or [0]
        first = min(self.placed, default=self.next_index)
        return SegmentInfo(
            self.segment_id, first, max(self.placed, default=0), len(self.data), self.sealed, min(times), max(times)
        )

    def cut(self, index: LogIndex) -> None:
        for void in [i for i in self.placed if i >= index]:
            del self.placed[void]
        if not self.placed:
            self.next_index = min(self.next_index, index)

    def place(self, entry: LogEntry) -> int:
        position = len(self.data) + _FRAME_OVERHEAD
        self.data += bytes(_FRAME_OVERHEAD) + entry.payload
        self.placed[entry.index] = (entry, position)
        self.blocks += 1
        return position


class MemoryDisk:
    """What is left when the process is gone. Tests reach in here to make it fail."""

    def __init__(self) -> None:
        self.segments: list[_Segment] = []
        self.unsynced = 0
        """Frames at the end of the newest segment whose sync has not returned."""
        self.fail_sync = False
        """The next sync fails; the store is poisoned."""
        self.full = False
        """Appends are refused."""

    def power_cut(self, keep: int = 0) -> None:
        """Lose the unsynced frames but the first ``keep``. The store on this disk must not be used any more."""
        lost = max(0, self.unsynced - keep)
        if lost:
            del self.segments[-1].frames[-lost:]
        self.unsynced = 0


class MemoryLogStore:
    """See ``LogStore``."""

    def __init__(self, disk: MemoryDisk, options: MemoryOptions) -> None:
        """Read the disk."""
        self._disk = disk
        self._options = options
        self._poisoned: str | None = None
        self.hard_state = HardState()
        self.last_index: LogIndex = 0
        disk.unsynced = 0
        for segment in disk.segments:
            if not segment.sealed:
                self._replay(segment)
            self.last_index = max(segment.placed, default=self.last_index)
        if not disk.segments:
            disk.segments.append(_Segment(1, 1))

    @classmethod
    def open(
        cls, path: Path | str | None = None, options: MemoryOptions | None = None, *,
        monotonic_ns: Callable[[], int] | None = None, node_id: NodeId = "node-1", cluster_id: str = "0" * 32,
        disk: MemoryDisk | None = None,
    ) -> MemoryLogStore:  # fmt: skip
        """A store on ``disk``, or on a new one. Path and clock are taken so that every backend opens alike, and not used."""
        del path, monotonic_ns
        store = cls(disk or MemoryDisk(), options or MemoryOptions())
        store.node_id = node_id
        store.cluster_id = cluster_id
        return store

    node_id: NodeId
    cluster_id: str

    def _replay(self, segment: _Segment) -> None:
        """What memory knew of the segment is built again from its frames; the runs come with ``note_run``."""
        segment.data = bytearray(_FIRST_POSITION)
        segment.placed.clear()
        segment.runs.clear()
        segment.blocks = 0
        for frame in segment.frames:
            if isinstance(frame, HardState):
                self.hard_state = frame
                continue
            for other in self._disk.segments:
                other.cut(frame.index)
            segment.place(frame)

    # -- memory ---------------------------------------------------------------------------------------------------
    @property
    def survives_restart(self) -> bool:
        """See ``LogStore.survives_restart``: the disk of this store is memory too."""
        return False

    @property
    def first_index(self) -> LogIndex:
        """See ``LogStore.first_index``."""
        first = self.last_index + 1
        expected = self._disk.segments[-1].segment_id
        for segment in reversed(self._disk.segments):
            if segment.compacted or segment.segment_id != expected:
                break
            first = min(segment.placed, default=first)
            expected -= 1
        return first

    @property
    def unsealed_first_index(self) -> LogIndex:
        """The oldest index in a segment that is not sealed; ``last_index + 1`` when those hold no entry."""
        unsealed = (segment for segment in self._disk.segments if not segment.sealed)
        return min((index for segment in unsealed for index in segment.placed), default=self.last_index + 1)

    def _find(self, index: LogIndex) -> tuple[_Segment, LogEntry, int]:
        for segment in reversed(self._disk.segments):
            if index in segment.placed:
                return segment, *segment.placed[index]
        raise LookupError(f"entry {index} is not in the log")

    def term_at(self, index: LogIndex) -> Term:
        """See ``LogStore.term_at``."""
        if index and not self.first_index <= index <= self.last_index:
            raise LookupError(f"entry {index} is not in {self.first_index}..{self.last_index}")
        return self._find(index)[1].term if index else 0

    def placement(self, index: LogIndex) -> Placement:
        """Where the payload of an entry in an unsealed segment lies. Raises ``LookupError`` for any other index."""
        segment, _, position = self._find(index)
        if segment.sealed:
            raise LookupError(f"entry {index} is not in an unsealed segment")
        return Placement(segment.segment_id, position)

    def segments(self) -> list[SegmentInfo]:
        """See ``LogStore.segments``."""
        return [segment.info() for segment in self._disk.segments]

    def note_run(self, segment_id: int, uid: int, entry: RunEntry) -> None:
        """See ``LogStore.note_run``."""
        for segment in self._disk.segments:
            if segment.segment_id == segment_id and not segment.sealed:
                segment.runs.setdefault(uid, []).append(entry)

    def forget_partition(self, uid: int) -> None:
        """See ``LogStore.forget_partition``."""
        for segment in self._disk.segments:
            if not segment.sealed:
                segment.runs.pop(uid, None)

    # -- writer ---------------------------------------------------------------------------------------------------
    def _check(self) -> None:
        if self._poisoned is not None:
            raise StoragePoisoned(self._poisoned)

    def append(self, entries: Sequence[LogEntry], hard_state: HardState | None) -> list[Placement]:
        """See ``LogStore.append``. Raises ``ValueError`` for entries that cannot follow the log."""
        self._check()
        self._check_follows(entries)
        if self._disk.full:
            raise StorageFull("the memory disk was told to be full")
        segment = self._disk.segments[-1]
        if len(segment.data) >= self._options.segment_bytes or segment.blocks >= self._options.segment_blocks:
            segment = _Segment(segment.segment_id + 1, self.last_index + 1, [self.hard_state])
            self._disk.segments.append(segment)
        frames: list[LogEntry | HardState] = [*([hard_state] if hard_state else []), *entries]
        segment.frames += frames
        self._disk.unsynced = len(frames)
        if self._disk.fail_sync:
            self._poisoned = "syncing the memory disk: told to fail"
            self._check()
        self._disk.unsynced = 0
        if hard_state is not None:
            self.hard_state = hard_state
        placements = []
        for entry in entries:
            for other in self._disk.segments:
                other.cut(entry.index)
            placements.append(Placement(segment.segment_id, segment.place(entry)))
            self.last_index = entry.index
        return placements

    def _check_follows(self, entries: Sequence[LogEntry]) -> None:
        if not entries:
            return
        first = entries[0].index
        if not 1 <= first <= self.last_index + 1:
            raise ValueError(f"entry {first} cannot follow entry {self.last_index}")
        if [entry.index for entry in entries] != list(range(first, first + len(entries))):
            raise ValueError("the entries of one append must be contiguous")
        if first <= self.last_index and first < self.unsealed_first_index:
            raise ValueError(f"entry {first} is in a sealed segment, so it was applied: it cannot be replaced")

    def release_reserve(self) -> bool:
        """See ``LogStore.release_reserve``: memory keeps no ballast."""
        return False

    def idle(self) -> None:
        """See ``LogStore.idle``."""
        self._check()

    def close(self) -> None:
        """See ``LogStore.close``."""
        try:
            if self._poisoned != "the store is closed":
                self._check()
        finally:
            self._poisoned = self._poisoned or "the store is closed"

    # -- worker ---------------------------------------------------------------------------------------------------
    def _sealed(self, segment_id: int) -> _Segment:
        self._check()
        for segment in self._disk.segments:
            if segment.segment_id == segment_id and segment.sealed:
                return segment
        raise LookupError(f"there is no sealed segment {segment_id}")

    def seal(self, segment_id: int, end_offsets: Mapping[int, int]) -> None:
        """See ``LogStore.seal``. Oldest first; raises ``ValueError`` otherwise."""
        self._check()
        unsealed = [segment for segment in self._disk.segments if not segment.sealed]
        if len(unsealed) < 2 or unsealed[0].segment_id != segment_id:
            raise ValueError(f"segment {segment_id} is not the oldest full one that is not sealed")
        segment = unsealed[0]
        segment.runs = {uid: runs for uid, runs in segment.runs.items() if uid in end_offsets}
        segment.sealed = True

    def read_entries(self, first: LogIndex, last: LogIndex, max_bytes: int) -> list[LogEntry]:
        """See ``LogStore.read_entries``. Raises ``LookupError`` for entries that are not in ``first_index..last_index``."""
        self._check()
        if not self.first_index <= first <= last <= self.last_index:
            raise LookupError(f"entries {first}..{last} are not within {self.first_index}..{self.last_index}")
        found: list[LogEntry] = []
        size = 0
        for index in range(first, last + 1):
            entry = self._find(index)[1]
            size += len(entry.payload)
            if found and size > max_bytes:
                break
            found.append(entry)
        return found

    def _runs(self, uid: int) -> Iterator[tuple[_Segment, RunEntry]]:
        self._check()
        for segment in list(self._disk.segments):
            for entry in list(segment.runs.get(uid, ())):
                yield segment, entry

    def read_runs(self, uid: int, offset: int, *, max_records: int, max_bytes: int) -> list[RunRead]:
        """See ``LogStore.read_runs``."""
        found: list[RunRead] = []
        records = size = 0
        for segment, entry in self._runs(uid):
            if entry.base_offset + entry.count <= offset:
                continue
            size += entry.length
            if found and size > max_bytes:
                break
            data = bytes(segment.data[entry.position : entry.position + entry.length])
            run = Run(data)
            run.verify()
            if run.uid != uid or run.count != entry.count:
                raise CorruptLog(f"found {run.count} records of partition {run.uid}, not {entry.count} of {uid}")
            found.append(RunRead(entry, data))
            records += entry.base_offset + entry.count - max(offset, entry.base_offset)
            if records >= max_records:
                break
        return found

    def find_run(self, uid: int, offset: int) -> RunEntry | None:
        """See ``LogStore.find_run``."""
        return next((entry for _, entry in self._runs(uid) if entry.base_offset + entry.count > offset), None)

    def find_time(self, uid: int, time_ms: int) -> RunEntry | None:
        """See ``LogStore.find_time``."""
        return next((entry for _, entry in self._runs(uid) if entry.log_time_ms >= time_ms), None)

    def find_bytes(self, uid: int, bytes_before: int) -> RunEntry | None:
        """See ``LogStore.find_bytes``."""
        found = None
        for _, entry in self._runs(uid):
            if entry.bytes_before > bytes_before:
                break
            found = entry
        return found

    def live_bytes(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """See ``LogStore.live_bytes``."""
        runs = _live(self._sealed(segment_id), log_starts)
        return sum(entry.length for entries in runs.values() for entry in entries)

    def drop_segment(self, segment_id: int) -> int:
        """See ``LogStore.drop_segment``."""
        segment = self._sealed(segment_id)
        self._disk.segments.remove(segment)
        return len(segment.data)

    def rewrite_segment(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """See ``LogStore.rewrite_segment``. Positions stay as they are: this disk can have holes."""
        segment = self._sealed(segment_id)
        before = sum(entry.length for entries in segment.runs.values() for entry in entries)
        segment.runs = _live(segment, log_starts)
        segment.compacted = True
        return before - self.live_bytes(segment_id, log_starts)

    def verify(self) -> list[str]:
        """See ``LogStore.verify``."""
        self._check()
        found = []
        for uid in {uid for segment in self._disk.segments for uid in segment.runs}:
            for segment, entry in self._runs(uid):
                try:
                    Run(bytes(segment.data[entry.position : entry.position + entry.length])).verify()
                except CorruptLog as error:
                    found.append(f"segment {segment.segment_id}, byte {entry.position}: {error}")
        return found


def _live(segment: _Segment, log_starts: Mapping[int, int]) -> dict[int, list[RunEntry]]:
    return {
        uid: [entry for entry in entries if entry.base_offset + entry.count > log_starts[uid]]
        for uid, entries in segment.runs.items()
        if uid in log_starts
    }
