"""From the bytes of a log directory to what the store knows: which segments are sealed, what the others hold, where the log ends.

Owns: the recovery rules (docs/storage-format.md lists them). Must not know: threads, how anything is appended.

The rules in short. A sealed segment is believed by its trailer. An unsealed one is scanned: the longest valid chain counts. Bytes
after it in the *newest* segment are a torn tail (cut) unless the synced watermark or a newer segment proves that more had been
synced there: then the disk has lost what it promised, and the node refuses to start (``CorruptLog``) without changing anything.
Everything a crash can leave half done is finished or taken back here, and doing it again changes nothing.
Source: RELIABILITY S-1, R-16; PAR (FAST'18).
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from functools import partial

import attrs

from ayder.entries import HardState, LogIndex, Term
from ayder.errors import CorruptLog
from ayder.storage.files import remove_if_there
from ayder.storage.footer import TRAILER_BYTES, Trailer
from ayder.storage.frame import FRAME_HEADER_BYTES, HARD_STATE, decode_hard_state, scan_frames
from ayder.storage.meta import DROPPED_FILE, META_FILE, DroppedSegments, MetaState
from ayder.storage.sealed import SealedSegment, SegmentReader
from ayder.storage.segment import SEGMENT_HEADER_BYTES, SegmentHeader, UnsealedSegment, segment_id_of, segment_name

__all__ = ["RESERVE_FILE", "Listing", "Recovered", "RecoveryReport", "TermStarts", "recover_log"]

RESERVE_FILE = "reserve"

_ADVICE = (
    "Nothing was changed. Bytes that had been synced are lost, so the log is not cut there: keep this directory as it is and "
    "start on a restored backup, or on a copy of it whose loss you accept"
)


@attrs.define(slots=True)
class RecoveryReport:
    """What opening the directory found and did, for the log of the node."""

    torn_bytes: int = 0
    """Bytes after the last valid frame that were cut."""
    scanned_frames: int = 0
    warnings: list[str] = attrs.field(factory=list)


class TermStarts:
    """Where each term begins in the log. Written by the writer thread; any thread reads.

    Readers bisect ``_starts`` and then look into ``_terms``: so terms come first when growing and go last when shrinking.
    """

    __slots__ = ("_starts", "_terms")

    def __init__(self) -> None:
        self._starts: list[LogIndex] = []
        self._terms: list[Term] = []

    def add(self, index: LogIndex, term: Term) -> None:
        """The entry after the last one has this term."""
        if not self._terms or self._terms[-1] != term:
            self._terms.append(term)
            self._starts.append(index)

    def cut(self, index: LogIndex) -> None:
        """Entries from ``index`` on are void."""
        while self._starts and self._starts[-1] >= index:
            self._starts.pop()
            self._terms.pop()

    def at(self, index: LogIndex) -> Term:
        """The term of an entry that exists. Raises ``LookupError`` before the first."""
        i = bisect_right(self._starts, index) - 1
        if i < 0:
            raise LookupError(f"entry {index} is not in the log")
        return self._terms[i]

    def within(self, first: LogIndex, last: LogIndex) -> list[tuple[LogIndex, Term]]:
        """(first index, term) for each term in ``first..last``."""
        found = [(start, term) for start, term in zip(self._starts, self._terms, strict=False) if first < start <= last]
        return [(first, self.at(first)), *found] if first <= last else []


@attrs.define(slots=True)
class Recovered:
    """The log as the directory tells it."""

    sealed: list[SealedSegment] = attrs.field(factory=list)
    unsealed: list[UnsealedSegment] = attrs.field(factory=list)
    terms: TermStarts = attrs.field(factory=TermStarts)
    hard_state: HardState = HardState()
    last_index: LogIndex = 0
    report: RecoveryReport = attrs.field(factory=RecoveryReport)


@attrs.define(slots=True)
class Listing:
    """The names in a log directory, told apart."""

    segments: list[int] = attrs.field(factory=list)
    """Ids, ascending."""
    leftovers: list[str] = attrs.field(factory=list)
    """What interrupted work left behind; it goes once the log has been recovered."""
    strangers: list[str] = attrs.field(factory=list)

    @classmethod
    def of(cls, names: list[str], dropped: DroppedSegments) -> Listing:
        """Sort the names out."""
        listing = cls()
        for name in sorted(names):
            segment_id = segment_id_of(name)
            if name.endswith(".tmp") or (segment_id is not None and segment_id in dropped):
                listing.leftovers.append(name)
            elif segment_id is not None:
                listing.segments.append(segment_id)
            elif name not in (META_FILE, DROPPED_FILE, RESERVE_FILE):
                listing.strangers.append(name)
        return listing


def recover_log(reader: SegmentReader, listing: Listing, dropped: DroppedSegments, meta: MetaState) -> Recovered:
    """Read all segments; when they are whole, finish what was interrupted. Raises ``CorruptLog`` (nothing was changed)."""
    return _Recovery(reader, dropped, meta).run(listing)


class _Recovery:
    """One pass over the segments, oldest first."""

    def __init__(self, reader: SegmentReader, dropped: DroppedSegments, meta: MetaState) -> None:
        self._reader = reader
        self._files = reader.files
        self._directory = reader.directory
        self._dropped = dropped
        self._meta = meta
        self._mark = meta.watermark
        self._log = Recovered()
        self._chain = 0
        """Checksum of the log's last frame so far."""
        self._floor = 1
        """The lowest index that a frame of an unsealed segment may replace."""
        self._void_from = 0
        """From here to where the unsealed segments begin, entries stood in a sealed segment, and are void; 0: there are none."""

    def run(self, listing: Listing) -> Recovered:
        ids = listing.segments
        self._check_sequence(ids)
        newest = ids[-1] if ids else 0
        leftovers = list(listing.leftovers)
        for segment_id in ids:
            try:
                if self._take_sealed(segment_id, newest) or self._take_unsealed(segment_id):
                    continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise self._lost(segment_id, f"it cannot be read ({error})") from error
            if segment_id != newest or self._mark.segment_id >= segment_id:
                raise self._lost(segment_id, "the segment's beginning fails its checksum")
            leftovers.append(segment_name(segment_id))  # a roll that did not get as far as being used
        if not self._log.unsealed and (self._mark.segment_id or self._log.sealed):
            raise self._lost(newest, "the open segment is missing")
        if self._void_from:
            raise self._lost(newest, f"entries from {self._void_from} on were replaced, and the new ones are missing")
        self._finish(leftovers)
        self._log.report.warnings += [f"{self._directory}/{name} is not part of the log: ignored" for name in listing.strangers]
        return self._log

    def _finish(self, leftovers: list[str]) -> None:
        """The log is whole: only now is anything changed. What a stopped process left in the page cache is made durable."""
        # Names first: a segment may only go once the list that says so is surely there.
        self._files.fsync_dir(self._directory)
        if self._log.sealed:
            # Its trailer may have been written by a process that was killed before the sync; the next seal will rely on it. Older
            # ones were synced before this one was begun.
            self._sync(self._log.sealed[-1].name)
        if self._log.unsealed:
            self._cut_tail(self._log.unsealed[-1])
        for name in leftovers:
            remove_if_there(self._files, f"{self._directory}/{name}")  # making a new meta file took its own leftover away
            self._log.report.warnings.append(f"{self._directory}/{name} was left by interrupted work: removed")
        if leftovers:
            self._files.fsync_dir(self._directory)

    def _lost(self, segment_id: int, what: str) -> CorruptLog:
        mark = self._mark
        return CorruptLog(
            f"{self._directory}/{segment_name(segment_id)}: {what}. Synced up to entry {mark.index} at least (segment "
            f"{mark.segment_id}, byte {mark.position}); entries after {self._log.last_index} cannot be read. {_ADVICE}"
        )

    def _check_sequence(self, ids: list[int]) -> None:
        previous = 0
        for segment_id in ids:
            if not self._dropped.covers(previous + 1, segment_id - 1):
                raise self._lost(previous + 1, "a segment is missing that was not removed by retention")
            previous = segment_id
        if previous < self._mark.segment_id:
            raise self._lost(self._mark.segment_id, "the newest segment is missing")

    # -- sealed ---------------------------------------------------------------------------------------------------
    def _take_sealed(self, segment_id: int, newest: int) -> bool:
        if segment_id == newest:
            return False
        name = segment_name(segment_id)
        fd = self._files.open(f"{self._directory}/{name}", write=False)
        try:
            size = self._files.size(fd)
            data = self._files.pread(fd, TRAILER_BYTES, size - TRAILER_BYTES) if size >= TRAILER_BYTES else b""
        finally:
            self._files.close(fd)
        trailer = Trailer.decode(data)
        if trailer is None:
            return False
        if self._log.unsealed:
            damaged = self._log.unsealed[-1].segment_id
            raise self._lost(damaged, "a newer segment is sealed, so this one was, and its trailer is damaged")
        if trailer.segment_id != segment_id or trailer.cluster_id != self._meta.cluster_id:
            raise self._lost(segment_id, f"the file is segment {trailer.segment_id} of cluster {trailer.cluster_id}")
        self._follow(segment_id, trailer.chain_in)
        self._chain = trailer.chain_out
        segment = SealedSegment(self._reader, name, trailer, size)
        if trailer.last_index and not trailer.compacted:
            for index, term in segment.terms():
                self._log.terms.add(index, term)
        self._log.last_index = trailer.last_index or trailer.first_index - 1
        self._log.sealed.append(segment)
        return True

    def _gap_before(self, segment_id: int) -> bool:
        return segment_id - 1 in self._dropped

    def _follow(self, segment_id: int, chain_in: int) -> None:
        """The segment continues the log at the frame where the one before it ends."""
        if not self._gap_before(segment_id) and self._chain != chain_in:
            raise self._lost(segment_id - 1, "its last valid frame is not the one that the next segment continues")

    # -- unsealed -------------------------------------------------------------------------------------------------
    def _take_unsealed(self, segment_id: int) -> bool:
        fd = self._files.open(f"{self._directory}/{segment_name(segment_id)}", write=False)
        try:
            segment = self._scan(fd, segment_id)
        finally:
            self._files.close(fd)
        if segment is None:
            return False
        self._log.unsealed.append(segment)
        return True

    def _scan(self, fd: int, segment_id: int) -> UnsealedSegment | None:
        """Replay the frames of a file; ``None`` when it has no valid beginning (header and hard state)."""
        header = SegmentHeader.decode(self._files.pread(fd, SEGMENT_HEADER_BYTES, 0))
        if header is None:
            return None
        if header.segment_id != segment_id or header.cluster_id != self._meta.cluster_id:
            raise self._lost(segment_id, f"the file is segment {header.segment_id} of cluster {header.cluster_id}")
        segment = UnsealedSegment(header)
        size = self._files.size(fd)
        ends_at_mark = self._mark.segment_id != segment_id
        log = self._log
        pread = partial(self._files.pread, fd)
        for frame, payload in scan_frames(pread, SEGMENT_HEADER_BYTES, size, header.seed):
            if segment.tail == SEGMENT_HEADER_BYTES:
                self._follow(segment_id, header.chain_in)
                if frame.kind != HARD_STATE:
                    raise self._lost(segment_id, "the segment does not begin with the hard state")
                self._begin_at(segment_id, header.next_index - 1)
            if frame.kind == HARD_STATE:
                log.hard_state = decode_hard_state(frame.term, payload)
            else:
                self._replay(segment, frame.index, frame.term, frame.position, frame.log_time_ms)
            segment.tail = frame.position + FRAME_HEADER_BYTES + frame.length
            segment.tail_chain = frame.crc
            log.report.scanned_frames += 1
            if segment.tail == self._mark.position and frame.crc == self._mark.chain:
                ends_at_mark = True
        if segment.tail == SEGMENT_HEADER_BYTES:
            return None
        if not ends_at_mark:
            raise self._lost(segment_id, f"the frame at byte {segment.tail} fails its checksum")
        self._chain = segment.tail_chain
        return segment

    def _begin_at(self, segment_id: int, last_index: LogIndex) -> None:
        """The log reached ``last_index`` when this segment was begun.

        A sealed segment before it may know fewer entries: those that a *later* segment replaced were void when it was sealed.
        """
        log = self._log
        if not log.unsealed and not self._gap_before(segment_id):
            self._floor = log.last_index + 1
            self._void_from = self._floor if last_index > log.last_index else 0
        elif log.unsealed and last_index != log.last_index:
            raise self._lost(segment_id, f"it begins after entry {last_index}, the one before it ends with {log.last_index}")
        log.last_index = last_index

    def _replay(self, segment: UnsealedSegment, index: int, term: int, position: int, log_time_ms: int) -> None:
        log = self._log
        if index <= log.last_index:
            if index < self._floor:
                raise self._lost(segment.segment_id, f"the frame at byte {position} replaces entry {index} of a sealed segment")
            for other in (*log.unsealed, segment):
                other.cut(index)
            log.terms.cut(index)
            if index <= self._void_from:
                self._void_from = 0
        elif index != log.last_index + 1:
            raise self._lost(segment.segment_id, f"entry {index} at byte {position} follows entry {log.last_index}")
        segment.add(index, position, log_time_ms)
        log.terms.add(index, term)
        log.last_index = index

    def _sync(self, name: str) -> None:
        fd = self._files.open(f"{self._directory}/{name}")
        try:
            self._files.fsync(fd)
        finally:
            self._files.close(fd)

    def _cut_tail(self, segment: UnsealedSegment) -> None:
        """Make sure that nothing stands after the last valid frame but the zeros of preallocation."""
        fd = self._files.open(f"{self._directory}/{segment.name}")
        try:
            torn = self._junk_after(fd, segment.tail)
            if torn:
                self._files.ftruncate(fd, segment.tail)
                self._log.report.torn_bytes += torn
            # A valid frame may have been read from the page cache, its writer killed before the sync. It counts now: sync it.
            self._files.fsync(fd)
        finally:
            self._files.close(fd)

    def _junk_after(self, fd: int, position: int) -> int:
        size = self._files.size(fd)
        last = position
        at = position
        while at < size:
            chunk = self._files.pread(fd, 1 << 20, at)
            if not chunk:
                break
            if chunk.count(0) != len(chunk):
                last = at + len(chunk.rstrip(b"\0"))
            at += len(chunk)
        return last - position
