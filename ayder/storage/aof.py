"""The sealed append-only log: ``LogStore`` over a directory of segments.

Owns: the life of the directory while it is open: appending, rolling, the synced watermark, and which segments a reader sees. Must
not know: what commands mean, Trio, the clock (``monotonic_ns`` is handed in). Formats are in ``frame``, ``segment``, ``footer``
and ``meta``; starting is in ``recovery``, looking up in ``lookup``, sealing, removing and rewriting in ``upkeep``.

Invariants:

* One ``append`` is one write and one fdatasync, whatever it holds. A roll happens *before* it, never in the middle, so that a
  full disk refuses all of it or none. A segment may therefore exceed its limits by one append.
* Readers work on one immutable ``View`` of the segments (``lookup.Views``), in any thread.
* The watermark is written only after the sync of what it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs

from ayder.entries import HardState, LogEntry, LogIndex, NodeId, Placement, Term
from ayder.errors import CorruptLog
from ayder.storage import lookup, maintenance
from ayder.storage.files import NO_SPACE, REAL_FILES, Files, Poison
from ayder.storage.frame import FRAME_HEADER_BYTES, encode_hard_state, encode_header
from ayder.storage.handles import FileHandles, PageCache
from ayder.storage.interface import RunEntry, RunRead, SegmentInfo, StorageFull
from ayder.storage.lookup import View, Views, read_from
from ayder.storage.meta import META_FILE, DroppedSegments, MetaFile, MetaState, Watermark
from ayder.storage.recovery import Listing, Recovered, RecoveryReport, recover_log
from ayder.storage.sealed import SegmentReader
from ayder.storage.segment import SegmentHeader, SegmentWriter, UnsealedSegment
from ayder.storage.upkeep import Upkeep

__all__ = ["AofLogStore", "AofOptions"]

_Result = TypeVar("_Result")
_MAX_BUFFERS = 512  # writev takes 1024


@attrs.frozen(kw_only=True)
class AofOptions:
    """Settings of the AOF (``config.StorageConfig`` has limits and meanings)."""

    segment_bytes: int = 64 << 20
    segment_blocks: int = 32_768
    preallocate_bytes: int = 8 << 20
    watermark_interval_ms: int = 100
    reserve_bytes: int = 1 << 20


class AofLogStore:
    """See ``LogStore``."""

    def __init__(
        self, reader: SegmentReader, options: AofOptions, monotonic_ns: Callable[[], int], poison: Poison, meta: MetaFile,
        dropped: DroppedSegments,
    ) -> None:  # fmt: skip
        """Use ``open``."""
        self._reader = reader
        self._files = reader.files
        self._directory = reader.directory
        self._options = options
        self._monotonic_ns = monotonic_ns
        self._poison = poison
        self._meta = meta
        self._dropped = dropped
        self._interval_ns = options.watermark_interval_ms * 1_000_000
        self._marked_ns = monotonic_ns()
        self._closed = False
        self.report = RecoveryReport()
        """What opening found and did."""

    @classmethod
    def open(
        cls, path: Path | str, options: AofOptions | None = None, *, monotonic_ns: Callable[[], int], files: Files = REAL_FILES,
        node_id: NodeId = "node-1", cluster_id: str = "0" * 32,
    ) -> AofLogStore:  # fmt: skip
        """Open the log in directory ``path``, which is made if it is missing.

        ``node_id`` must be the one it was made with; ``cluster_id`` (32 hex digits) is used when it is made. ``monotonic_ns``
        spaces the watermark. Raises ``CorruptLog``, ``StorageFull``, ``StoragePoisoned``, ``OSError``.
        """
        directory = str(path)
        options = options or AofOptions()
        poison = Poison()
        files.mkdir(directory)
        names = files.listdir(directory)
        dropped = DroppedSegments.load(files, directory, names)
        listing = Listing.of(names, dropped)
        meta = cls._open_meta(files, directory, poison, listing, names, MetaState(node_id, cluster_id))
        reader = SegmentReader(files, directory, FileHandles(files, directory), PageCache())
        store = cls(reader, options, monotonic_ns, poison, meta, dropped)
        try:
            store._start(recover_log(reader, listing, dropped, meta.state))
        except BaseException:
            store._give_up()
            raise
        return store

    @staticmethod
    def _open_meta(
        files: Files, directory: str, poison: Poison, listing: Listing, names: list[str], identity: MetaState
    ) -> MetaFile:
        if META_FILE in names:
            meta = MetaFile.open(files, directory, poison)
            if meta.state.node_id != identity.node_id:
                meta.close()
                raise CorruptLog(f"{directory} belongs to node {meta.state.node_id!r}, this node is {identity.node_id!r}")
            return meta
        if listing.segments:
            raise CorruptLog(
                f"{directory}/{META_FILE} is missing and there are segments: what this disk once promised is unknown. "
                "Keep the directory as it is and restore a backup"
            )
        try:
            return MetaFile.create(files, directory, poison, identity)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise StorageFull(f"no room to begin a log in {directory}: {error}") from error
            raise

    def _give_up(self) -> None:
        """Opening failed: leave no descriptor behind."""
        self._meta.close()
        self._reader.handles.close()
        writer: SegmentWriter | None = getattr(self, "_writer", None)
        if writer is not None:
            writer.close()

    def _start(self, log: Recovered) -> None:
        self.report = log.report
        self._terms = log.terms
        self._hard_state = log.hard_state
        self._last_index = log.last_index
        self._views = Views(View(tuple(log.sealed), tuple(log.unsealed)))
        self._upkeep = Upkeep(self._reader, self._views, self._poison, self._dropped, self._terms, self._options.reserve_bytes)
        if log.unsealed:
            self._open = log.unsealed[-1]
            path = f"{self._directory}/{self._open.name}"
            fd = self._files.open(path)
            self._writer = SegmentWriter(
                self._files, self._poison, path, fd, self._open.tail, self._files.size(fd), self._options.preallocate_bytes
            )
        else:
            self._begin_segment(1, 0, 0)
        if self._meta.state.watermark != self._watermark():
            self._save_watermark(sync=True)
        self._upkeep.make_reserve()

    # -- memory ---------------------------------------------------------------------------------------------------
    @property
    def node_id(self) -> NodeId:
        """The node this directory belongs to."""
        return self._meta.state.node_id

    @property
    def cluster_id(self) -> str:
        """The cluster this directory belongs to, 32 hex digits, given when it was made."""
        return self._meta.state.cluster_id

    @property
    def survives_restart(self) -> bool:
        """See ``LogStore.survives_restart``."""
        return True

    @property
    def first_index(self) -> LogIndex:
        """See ``LogStore.first_index``."""
        return self._views.current.whole_from

    @property
    def last_index(self) -> LogIndex:
        """See ``LogStore.last_index``."""
        return self._last_index

    @property
    def unsealed_first_index(self) -> LogIndex:
        """The oldest index in a segment that is not sealed; ``last_index + 1`` when those hold no entry. Replay starts here."""
        return next((segment.start for segment in self._views.current.unsealed if segment.positions), self._last_index + 1)

    @property
    def hard_state(self) -> HardState:
        """See ``LogStore.hard_state``."""
        return self._hard_state

    def term_at(self, index: LogIndex) -> Term:
        """See ``LogStore.term_at``."""
        if index == 0:
            return 0
        if not self.first_index <= index <= self._last_index:
            raise LookupError(f"entry {index} is not in {self.first_index}..{self._last_index}")
        return self._terms.at(index)

    def placement(self, index: LogIndex) -> Placement:
        """Where the payload of an entry in an unsealed segment lies. Raises ``LookupError`` for any other index."""
        for segment in reversed(self._views.current.unsealed):
            if segment.start <= index <= segment.last_index:
                return Placement(segment.segment_id, segment.positions[index - segment.start] + FRAME_HEADER_BYTES)
        raise LookupError(f"entry {index} is not in an unsealed segment")

    def segments(self) -> list[SegmentInfo]:
        """See ``LogStore.segments``."""
        view = self._views.current
        return [*(segment.info() for segment in view.sealed), *(segment.info() for segment in view.unsealed)]

    def note_run(self, segment_id: int, uid: int, entry: RunEntry) -> None:
        """See ``LogStore.note_run``."""
        for segment in reversed(self._views.current.unsealed):
            if segment.segment_id == segment_id:
                segment.note_run(uid, entry)
                return

    def forget_partition(self, uid: int) -> None:
        """See ``LogStore.forget_partition``."""
        for segment in self._views.current.unsealed:
            segment.runs.pop(uid, None)

    # -- writer ---------------------------------------------------------------------------------------------------
    def append(self, entries: Sequence[LogEntry], hard_state: HardState | None) -> list[Placement]:
        """See ``LogStore.append``. Raises ``ValueError`` for entries that cannot follow the log."""
        self._poison.check()
        if entries:
            self._check_follows(entries)
        segment = self._open
        if segment.tail >= self._options.segment_bytes or segment.blocks >= self._options.segment_blocks:
            self._roll()
            segment = self._open
        chain = segment.tail_chain
        position = segment.tail
        buffers: list[bytes] = []
        if hard_state is not None:
            frame, chain = encode_hard_state(chain, self._last_index, hard_state)
            buffers.append(frame)
            position += len(frame)
        starts = []
        for entry in entries:
            payload = entry.payload
            header, chain = encode_header(chain, entry.index, entry.term, entry.log_time_ms, entry.kind, payload)
            buffers += (header, payload)
            starts.append(position)
            position += FRAME_HEADER_BYTES + len(payload)
        if buffers:
            self._writer.write(buffers if len(buffers) <= _MAX_BUFFERS else (b"".join(buffers),), position - segment.tail)
            self._take(segment, entries, starts, hard_state)
            segment.tail = position
            segment.tail_chain = chain
            self._mark_now_and_then()
        segment_id = segment.segment_id
        return [Placement(segment_id, start + FRAME_HEADER_BYTES) for start in starts]

    def _check_follows(self, entries: Sequence[LogEntry]) -> None:
        first = entries[0].index
        if not 1 <= first <= self._last_index + 1:
            raise ValueError(f"entry {first} cannot follow entry {self._last_index}")
        if len(entries) > 1 and any(entry.index != first + n for n, entry in enumerate(entries)):
            raise ValueError("the entries of one append must be contiguous")
        if first <= self._last_index and first < self._views.current.unsealed[0].start:
            raise ValueError(f"entry {first} is in a sealed segment, so it was applied: it cannot be replaced")

    def _take(self, segment: UnsealedSegment, entries: Sequence[LogEntry], starts: list[int], state: HardState | None) -> None:
        """Everything is on disk: let memory say so."""
        if state is not None:
            self._hard_state = state
        if not entries:
            return
        first = entries[0].index
        if first <= self._last_index:
            self._last_index = first - 1
            for other in self._views.current.unsealed:
                other.cut(first)
            self._terms.cut(first)
        for entry, start in zip(entries, starts, strict=True):
            segment.add(entry.index, start, entry.log_time_ms)
            self._terms.add(entry.index, entry.term)
        self._last_index = entries[-1].index

    def _roll(self) -> None:
        """Go on in a new segment. Everything in the old one is synced."""
        old = self._open
        writer = self._writer
        self._begin_segment(old.segment_id + 1, old.tail_chain, old.last_time_ms)
        writer.close()
        # Until this is on disk the new segment's loss could not be told from a roll that was never used.
        self._save_watermark(sync=True)

    def _begin_segment(self, segment_id: int, chain_in: int, log_time_ms: int) -> None:
        header = SegmentHeader(segment_id, self._last_index + 1, chain_in, self.cluster_id, log_time_ms)
        segment = UnsealedSegment(header)
        state, chain = encode_hard_state(header.seed, self._last_index, self._hard_state)
        prologue = header.encode() + state
        self._writer = SegmentWriter.create(
            self._files, self._poison, self._directory, segment.name, prologue, self._options.preallocate_bytes
        )
        segment.tail = len(prologue)
        segment.tail_chain = chain
        self._views.swap(lambda view: attrs.evolve(view, unsealed=(*view.unsealed, segment)))
        self._open = segment

    def _watermark(self) -> Watermark:
        segment = self._open
        return Watermark(segment.segment_id, segment.tail, self._last_index, segment.tail_chain)

    def _save_watermark(self, *, sync: bool) -> None:
        self._meta.save(attrs.evolve(self._meta.state, watermark=self._watermark()), sync=sync)
        self._marked_ns = self._monotonic_ns()

    def _mark_now_and_then(self) -> None:
        if self._monotonic_ns() - self._marked_ns >= self._interval_ns:
            self._save_watermark(sync=False)

    def release_reserve(self) -> bool:
        """See ``LogStore.release_reserve``."""
        return self._upkeep.give_reserve()

    def idle(self) -> None:
        """See ``LogStore.idle``."""
        self._poison.check()
        mark = self._meta.state.watermark
        if (mark.segment_id, mark.position) != (self._open.segment_id, self._open.tail):
            self._mark_now_and_then()

    def close(self) -> None:
        """See ``LogStore.close``. Every call but another ``close`` is refused after it."""
        if self._closed:
            return
        self._closed = True
        try:
            self._poison.check()
            if self._meta.state.watermark != self._watermark():
                self._save_watermark(sync=True)
        finally:
            self._poison.reason = self._poison.reason or "the store is closed"
            self._writer.close()
            self._meta.close()
            self._reader.handles.close()

    # -- worker: reading ------------------------------------------------------------------------------------------
    def read_entries(self, first: LogIndex, last: LogIndex, max_bytes: int) -> list[LogEntry]:
        """See ``LogStore.read_entries``. Raises ``LookupError`` for entries that are not in ``first_index..last_index``."""
        if not self.first_index <= first <= last <= self._last_index:
            raise LookupError(f"entries {first}..{last} are not within {self.first_index}..{self._last_index}")
        found: list[LogEntry] = []
        size = 0
        while first <= last and (not found or size < max_bytes):
            more = self._look(partial(read_from, self._reader, first, last, max_bytes - size))
            for entry in more:
                size += len(entry.payload)
                if found and size > max_bytes:
                    return found
                found.append(entry)
            first += len(more)
        return found

    def read_runs(self, uid: int, offset: int, *, max_records: int, max_bytes: int) -> list[RunRead]:
        """See ``LogStore.read_runs``."""
        return self._look(lambda view: lookup.read_runs(self._reader, view, uid, offset, max_records, max_bytes))

    def find_run(self, uid: int, offset: int) -> RunEntry | None:
        """See ``LogStore.find_run``."""
        return self._look(lambda view: lookup.find_run(view, uid, offset))

    def find_time(self, uid: int, time_ms: int) -> RunEntry | None:
        """See ``LogStore.find_time``."""
        return self._look(lambda view: lookup.find_time(view, uid, time_ms))

    def find_bytes(self, uid: int, bytes_before: int) -> RunEntry | None:
        """See ``LogStore.find_bytes``."""
        return self._look(lambda view: lookup.find_bytes(view, uid, bytes_before))

    def live_bytes(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """See ``LogStore.live_bytes``. Raises ``LookupError`` when there is no such sealed segment."""
        return self._look(lambda view: maintenance.live_bytes(view.sealed_segment(segment_id), log_starts))

    def _look(self, look: Callable[[View], _Result]) -> _Result:
        self._poison.check()
        return self._views.look(look)

    # -- worker: whole segments -----------------------------------------------------------------------------------
    def seal(self, segment_id: int, end_offsets: Mapping[int, int]) -> None:
        """See ``LogStore.seal``. Oldest first. Raises ``StorageFull`` (stays unsealed), ``ValueError``, ``StoragePoisoned``."""
        self._upkeep.seal(segment_id, end_offsets)

    def drop_segment(self, segment_id: int) -> int:
        """See ``LogStore.drop_segment``. Raises ``LookupError``, ``StorageFull``, ``StoragePoisoned``."""
        return self._upkeep.drop(segment_id)

    def rewrite_segment(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """See ``LogStore.rewrite_segment``. Raises ``LookupError``, ``StorageFull``, ``CorruptLog`` (the old file stays)."""
        return self._upkeep.rewrite(segment_id, log_starts)

    def verify(self) -> list[str]:
        """See ``LogStore.verify``."""
        return self._upkeep.verify()
