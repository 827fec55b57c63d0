"""The sealed append-only log: ``LogStore`` over a directory of segments.

Owns: the life of the directory while it is open: appending, rolling, the synced watermark, and which segments a reader sees. Must
not know: what commands mean, Trio, the clock (``monotonic_ns`` is handed in). Formats are in ``frame``, ``segment``, ``footer``
and ``meta``; starting is in ``recovery``, looking up in ``lookup``, sealing and rewriting in ``maintenance``.

Invariants:

* One ``append`` is one write and one fdatasync, whatever it holds. A roll happens *before* it, never in the middle, so that a
  full disk refuses all of it or none. A segment may therefore exceed its limits by one append.
* A reader works on one immutable ``View``; whoever changes the list of segments swaps it under ``_lock``. A reader whose view was
  overtaken by a rewrite or a removal looks again.
* The watermark is written only after the sync of what it speaks of.

Threads as in ``interface``: the writer, workers and the event loop are real threads, hence the two locks: ``_lock`` for swapping
the view (writer's roll against a worker's seal), ``_maintenance`` so that seal, drop and rewrite come one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TypeVar

import attrs

from ayder.entries import HardState, LogEntry, LogIndex, NodeId, Placement, Term
from ayder.errors import CorruptLog
from ayder.storage import lookup, maintenance
from ayder.storage.files import NO_SPACE, REAL_FILES, Files, Poison
from ayder.storage.footer import Trailer
from ayder.storage.frame import FRAME_HEADER_BYTES, decode_entry, encode_hard_state, encode_header
from ayder.storage.handles import FileHandles, PageCache
from ayder.storage.interface import RunEntry, RunRead, SegmentInfo, StorageFull
from ayder.storage.lookup import View
from ayder.storage.meta import META_FILE, DroppedSegments, MetaFile, MetaState, Watermark
from ayder.storage.recovery import RESERVE_FILE, Listing, Recovered, RecoveryReport, recover_log
from ayder.storage.sealed import SealedSegment, SegmentReader
from ayder.storage.segment import SegmentHeader, SegmentWriter, UnsealedSegment

__all__ = ["AofLogStore", "AofOptions"]

_Result = TypeVar("_Result")
_MAX_BUFFERS = 512
_READ_AHEAD_BYTES = 64 << 10


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
        self._lock = Lock()
        self._maintenance = Lock()
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
            meta.close()
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

    def _start(self, log: Recovered) -> None:
        self.report = log.report
        self._terms = log.terms
        self._hard_state = log.hard_state
        self._last_index = log.last_index
        self._view = View(tuple(log.sealed), tuple(log.unsealed))
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
        self._first_index = self._whole_from()
        self._make_reserve()

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
    def first_index(self) -> LogIndex:
        """See ``LogStore.first_index``."""
        return self._first_index

    @property
    def last_index(self) -> LogIndex:
        """See ``LogStore.last_index``."""
        return self._last_index

    @property
    def unsealed_first_index(self) -> LogIndex:
        """The oldest index in a segment that is not sealed; ``last_index + 1`` when those hold no entry. Replay starts here."""
        return next((segment.start for segment in self._view.unsealed if segment.positions), self._last_index + 1)

    @property
    def hard_state(self) -> HardState:
        """See ``LogStore.hard_state``."""
        return self._hard_state

    def term_at(self, index: LogIndex) -> Term:
        """See ``LogStore.term_at``."""
        if index == 0:
            return 0
        if not self._first_index <= index <= self._last_index:
            raise LookupError(f"entry {index} is not in {self._first_index}..{self._last_index}")
        return self._terms.at(index)

    def placement(self, index: LogIndex) -> Placement:
        """Where the payload of an entry in an unsealed segment lies. Raises ``LookupError`` for any other index."""
        for segment in reversed(self._view.unsealed):
            if segment.start <= index <= segment.last_index:
                return Placement(segment.segment_id, segment.positions[index - segment.start] + FRAME_HEADER_BYTES)
        raise LookupError(f"entry {index} is not in an unsealed segment")

    def segments(self) -> list[SegmentInfo]:
        """See ``LogStore.segments``."""
        view = self._view
        return [*(segment.info() for segment in view.sealed), *(segment.info() for segment in view.unsealed)]

    def note_run(self, segment_id: int, uid: int, entry: RunEntry) -> None:
        """See ``LogStore.note_run``."""
        for segment in reversed(self._view.unsealed):
            if segment.segment_id == segment_id:
                segment.note_run(uid, entry)
                return

    def forget_partition(self, uid: int) -> None:
        """See ``LogStore.forget_partition``."""
        for segment in self._view.unsealed:
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
        if any(entry.index != first + n for n, entry in enumerate(entries)):
            raise ValueError("the entries of one append must be contiguous")
        sealed = self._view.sealed
        if first <= self._last_index and sealed and first <= sealed[-1].trailer.last_index:
            raise ValueError(f"entry {first} is in a sealed segment, so it was applied: it cannot be replaced")

    def _take(self, segment: UnsealedSegment, entries: Sequence[LogEntry], starts: list[int], hard_state: HardState | None) -> None:
        """Everything is on disk: let memory say so."""
        if hard_state is not None:
            self._hard_state = hard_state
        if not entries:
            return
        first = entries[0].index
        if first <= self._last_index:
            self._last_index = first - 1
            for other in self._view.unsealed:
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
        with self._lock:
            self._view = attrs.evolve(self._view, unsealed=(*self._view.unsealed, segment))
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

    def idle(self) -> None:
        """See ``LogStore.idle``."""
        self._poison.check()
        if self._meta.state.watermark.position != self._open.tail or self._meta.state.watermark.segment_id != self._open.segment_id:
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
    def _with_view(self, look: Callable[[View], _Result]) -> _Result:
        """Look; when a rewrite or a removal overtook the look, look again. Each time round one more such change is over."""
        while True:
            self._poison.check()
            view = self._view
            try:
                return look(view)
            except (CorruptLog, FileNotFoundError):
                if view is self._view:
                    raise

    def read_entries(self, first: LogIndex, last: LogIndex, max_bytes: int) -> list[LogEntry]:
        """See ``LogStore.read_entries``. Raises ``LookupError`` for entries that are not in ``first_index..last_index``."""
        if not self._first_index <= first <= last <= self._last_index:
            raise LookupError(f"entries {first}..{last} are not within {self._first_index}..{self._last_index}")
        found: list[LogEntry] = []
        size = 0
        while first <= last and (not found or size < max_bytes):
            more = self._with_view(lambda view, at=first, room=max_bytes - size: self._read_from(view, at, last, room))  # type: ignore[misc]
            for entry in more:
                size += len(entry.payload)
                if found and size > max_bytes:
                    return found
                found.append(entry)
            first += len(more)
        return found

    def _read_from(self, view: View, first: LogIndex, last: LogIndex, max_bytes: int) -> list[LogEntry]:
        """Entries of the segment that holds ``first``, as many as fit into one read of about ``max_bytes``."""
        name, positions, end = self._positions(view, first, last)
        start = positions[0]
        fits = len(positions)
        while fits > 1 and positions[fits - 1] - start > max(max_bytes, _READ_AHEAD_BYTES):
            fits = max(1, fits // 2)
        stop = positions[fits] if fits < len(positions) else end
        data = self._reader.read(name, stop - start, start)
        entries = []
        for number, position in enumerate(positions[:fits]):
            try:
                entry = decode_entry(data, position - start)
            except CorruptLog as error:
                raise CorruptLog(f"{self._directory}/{name}, byte {position}: {error}") from error
            if entry.index != first + number:
                raise LookupError(f"entry {first + number} was replaced while it was read")
            entries.append(entry)
        return entries

    def _positions(self, view: View, first: LogIndex, last: LogIndex) -> tuple[str, list[int], int]:
        """File name, positions of the frames of ``first..`` in the segment that holds it, and where the last of them ends at most."""
        for open_segment in reversed(view.unsealed):
            if open_segment.start <= first <= open_segment.last_index:
                at = first - open_segment.start
                positions = open_segment.positions[at : at + last - first + 2].tolist()
                end = positions.pop() if len(positions) > last - first + 1 else open_segment.tail
                return open_segment.name, positions, end
        for segment in reversed(view.sealed):
            trailer = segment.trailer
            if trailer.last_index and trailer.first_index <= first <= trailer.last_index:
                stop = min(last, trailer.last_index)
                return segment.name, [segment.position_of(i) for i in range(first, stop + 1)], segment.position_of(stop + 1)
        raise LookupError(f"entry {first} is in no segment")

    def read_runs(self, uid: int, offset: int, *, max_records: int, max_bytes: int) -> list[RunRead]:
        """See ``LogStore.read_runs``."""
        return self._with_view(lambda view: lookup.read_runs(self._reader, view, uid, offset, max_records, max_bytes))

    def find_run(self, uid: int, offset: int) -> RunEntry | None:
        """See ``LogStore.find_run``."""
        return self._with_view(lambda view: lookup.find_run(view, uid, offset))

    def find_time(self, uid: int, time_ms: int) -> RunEntry | None:
        """See ``LogStore.find_time``."""
        return self._with_view(lambda view: lookup.find_time(view, uid, time_ms))

    def find_bytes(self, uid: int, bytes_before: int) -> RunEntry | None:
        """See ``LogStore.find_bytes``."""
        return self._with_view(lambda view: lookup.find_bytes(view, uid, bytes_before))

    def live_bytes(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """See ``LogStore.live_bytes``. Raises ``LookupError`` when there is no such sealed segment."""
        return self._with_view(lambda view: maintenance.live_bytes(_sealed(view, segment_id), log_starts))

    def verify(self) -> list[str]:
        """See ``LogStore.verify``."""
        with self._maintenance:
            self._poison.check()
            view = self._view
            found = [damage for segment in view.sealed for damage in maintenance.verify_sealed(segment)]
            for segment in view.unsealed:
                path = f"{self._directory}/{segment.name}"
                found += maintenance.verify_unsealed(self._files, path, segment.tail)
            return found

    # -- worker: changing sealed segments ---------------------------------------------------------------------------
    def seal(self, segment_id: int, end_offsets: Mapping[int, int]) -> None:
        """See ``LogStore.seal``. Oldest first. Raises ``StorageFull`` (the segment stays as it is), ``ValueError``, ``StoragePoisoned``."""
        with self._maintenance:
            self._poison.check()
            view = self._view
            if len(view.unsealed) < 2 or view.unsealed[0].segment_id != segment_id:
                raise ValueError(f"segment {segment_id} is not the oldest full one that is not sealed")
            segment = view.unsealed[0]
            path = f"{self._directory}/{segment.name}"
            older = self._with_view(lambda view: view.sealed[-1].directory() if view.sealed else [])
            terms = self._terms.within(segment.start, segment.last_index)
            trailer, size = self._maintain(
                f"sealing {path}",
                lambda: maintenance.seal_file(self._files, path, segment, terms, end_offsets, older),
                lambda: self._unseal(path, segment.tail),
            )
            self._reader.handles.forget(segment.name)
            sealed = SealedSegment(self._reader, segment.name, trailer, size)
            self._swap(lambda view: View((*view.sealed, sealed), view.unsealed[1:]))

    def _unseal(self, path: str, tail: int) -> None:
        fd = self._files.open(path)
        try:
            self._files.ftruncate(fd, tail)
            self._files.fsync(fd)
        finally:
            self._files.close(fd)

    def drop_segment(self, segment_id: int) -> int:
        """See ``LogStore.drop_segment``. Raises ``LookupError`` when there is no such sealed segment."""
        with self._maintenance:
            segment = _sealed(self._view, segment_id)
            path = f"{self._directory}/{segment.name}"

            def remove() -> None:
                self._dropped.add(segment_id)
                self._files.unlink(path)
                self._files.fsync_dir(self._directory)

            self._maintain(f"removing {path}", remove, lambda: None)
            self._swap(lambda view: attrs.evolve(view, sealed=tuple(one for one in view.sealed if one is not segment)))
            self._reader.handles.forget(segment.name)
            self._make_reserve()
            return segment.size_bytes

    def rewrite_segment(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """See ``LogStore.rewrite_segment``. Raises ``LookupError``, ``StorageFull``, ``CorruptLog`` (the old file stays)."""
        with self._maintenance:
            segment = _sealed(self._view, segment_id)
            path = f"{self._directory}/{segment.name}"
            aside = path + ".tmp"

            def rewrite() -> tuple[Trailer, int]:
                result = maintenance.rewrite_into(self._files, aside, segment, log_starts)
                self._files.rename(aside, path)
                self._files.fsync_dir(self._directory)
                return result

            trailer, size = self._maintain(f"rewriting {path}", rewrite, lambda: self._files.unlink(aside))
            self._reader.handles.forget(segment.name)
            new = SealedSegment(self._reader, segment.name, trailer, size)
            self._swap(lambda view: attrs.evolve(view, sealed=tuple(new if one is segment else one for one in view.sealed)))
            self._make_reserve()
            return segment.size_bytes - size

    def _maintain(self, what: str, work: Callable[[], _Result], undo: Callable[[], None]) -> _Result:
        """Do ``work``; on a full disk undo it, give the reserve back and try once more. Raises ``StorageFull``, ``StoragePoisoned``."""
        self._poison.check()
        try:
            try:
                return work()
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                undo()
                if not self._give_reserve():
                    raise StorageFull(f"{what}: {error}") from error
            try:
                return work()
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                undo()
                raise StorageFull(f"{what}: {error}") from error
        except OSError as error:
            self._poison.raise_for(what, error)

    def _swap(self, change: Callable[[View], View]) -> None:
        with self._lock:
            self._view = change(self._view)
        self._first_index = self._whole_from()

    def _whole_from(self) -> LogIndex:
        """The first index from which no segment is missing or rewritten."""
        view = self._view
        first = view.unsealed[0].start if view.unsealed else self._last_index + 1
        expected = view.unsealed[0].segment_id - 1
        for segment in reversed(view.sealed):
            if segment.segment_id != expected or segment.trailer.compacted:
                break
            first = segment.trailer.first_index
            expected -= 1
        return first

    # -- the reserve ------------------------------------------------------------------------------------------------
    def _give_reserve(self) -> bool:
        """Free the ballast; whether there was any."""
        try:
            self._files.unlink(f"{self._directory}/{RESERVE_FILE}")
            self._files.fsync_dir(self._directory)
        except FileNotFoundError:
            return False
        return True

    def _make_reserve(self) -> None:
        """Have the ballast again if there is room. It holds nothing, so its loss matters to nobody and nothing is synced."""
        if not self._options.reserve_bytes:
            return
        path = f"{self._directory}/{RESERVE_FILE}"
        try:
            fd = self._files.open(path, create=True)
        except OSError:
            return  # it is there, or there is no room for a name
        try:
            self._files.fallocate(fd, 0, self._options.reserve_bytes)
        except OSError:
            self._files.unlink(path)
        finally:
            self._files.close(fd)


def _sealed(view: View, segment_id: int) -> SealedSegment:
    for segment in view.sealed:
        if segment.segment_id == segment_id:
            return segment
    raise LookupError(f"there is no sealed segment {segment_id}")
