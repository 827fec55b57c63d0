"""What happens to a segment after it is full: sealing, rewriting without its dead runs, checking every byte of it.

Owns: the bytes written for that and their order. Must not know: the view of the log and who reads it (``aof.py`` swaps it).

Order is everything here. Sealing: footer after the frames, cut to length, fsync; *then* the trailer that makes it count, fsync.
Rewriting: a complete sealed file aside, fsync, rename, fsync of the directory. A crash in between leaves the old state.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import attrs
from crc32c import crc32c

from ayder.commands import BLOCK_HEADER_BYTES, BLOCK_VERSION, COMMAND_HEADER_BYTES, RUN
from ayder.entries import LogIndex, Term
from ayder.errors import CorruptLog
from ayder.runs import Run
from ayder.storage.files import Files, write_exactly
from ayder.storage.footer import COMPACTED, RUNS, TRAILER_BYTES, FooterWriter, Part, Trailer
from ayder.storage.frame import FRAME_HEADER_BYTES, Frame, encode_header, scan_frames
from ayder.storage.run_index import PackedRuns
from ayder.storage.sealed import PartitionEnd, SealedSegment
from ayder.storage.segment import SEGMENT_HEADER_BYTES, SegmentHeader, UnsealedSegment

__all__ = ["live_bytes", "rewrite_into", "seal_file", "verify_sealed", "verify_unsealed"]

_NEVER = (-1, -1)
_AT_ONCE = 4096
_BLOCK_HEADER = struct.Struct("<B3xI")
_COMMAND_HEADER = struct.Struct("<BBHI")
assert (_BLOCK_HEADER.size, _COMMAND_HEADER.size) == (BLOCK_HEADER_BYTES, COMMAND_HEADER_BYTES)

BASE, COUNT, BEFORE, TIME, POSITION, LENGTH = range(6)


def seal_file(
    files: Files, path: str, segment: UnsealedSegment, terms: Sequence[tuple[LogIndex, Term]], end_offsets: Mapping[int, int],
    older: Sequence[PartitionEnd],
) -> tuple[Trailer, int]:  # fmt: skip
    """Give a full segment its footer. Returns the trailer and the file's size. Raises ``OSError``."""
    fd = files.open(path)
    try:
        parts = FooterWriter(partial(write_exactly, files, fd), segment.tail, segment.tail_chain)
        parts.add(_block_index(segment))
        parts.add([array("q", (word for start in terms for word in start)).tobytes()])
        runs = segment.runs.copy()
        parts.add(runs.get(uid, b"") for uid in sorted(end_offsets))
        parts.add([_directory(runs, end_offsets, older)])
        files.ftruncate(fd, parts.position)
        files.fsync(fd)
        trailer = _sealed_trailer(segment, terms, parts.parts)
        write_exactly(files, fd, trailer.encode(), parts.position)
        files.fsync(fd)
    finally:
        files.close(fd)
    return trailer, parts.position + TRAILER_BYTES


def _sealed_trailer(segment: UnsealedSegment, terms: Sequence[tuple[LogIndex, Term]], parts: tuple[Part, ...]) -> Trailer:
    header, chain = segment.header, segment.tail_chain
    return Trailer(
        header.segment_id, 0, segment.start, segment.last_index, terms[0][1] if terms else 0, terms[-1][1] if terms else 0,
        segment.first_time_ms, segment.last_time_ms, segment.tail, parts, header.chain_in, chain, chain, header.cluster_id,
    )  # fmt: skip


def _block_index(segment: UnsealedSegment) -> Iterator[bytes]:
    for at in range(0, len(segment.positions), _AT_ONCE):
        blocks = array("q")
        for number, position in enumerate(segment.positions[at : at + _AT_ONCE], segment.start + at):
            blocks.extend((number, position))
        yield blocks.tobytes()


def _directory(runs: Mapping[int, bytearray], end_offsets: Mapping[int, int], older: Sequence[PartitionEnd]) -> bytes:
    """For every live partition, where its runs are and where it stands at the segment's end."""
    before = {end.uid: (end.last_bytes_before, end.last_time_ms) for end in older}
    directory = array("q")
    first = 0
    for uid in sorted(end_offsets):
        table = PackedRuns(runs.get(uid, b""))
        last_bytes, last_time = before.get(uid, _NEVER)
        if table.count:
            last = table.entry(table.count - 1)
            last_bytes, last_time = last.bytes_before, last.log_time_ms
        directory.extend((uid, end_offsets[uid], first, table.count, last_bytes, last_time))
        first += table.count
    return directory.tobytes()


def live_bytes(segment: SealedSegment, log_starts: Mapping[int, int]) -> int:
    """See ``LogStore.live_bytes``."""
    total = 0
    for end in segment.directory():
        log_start = log_starts.get(end.uid)
        if log_start is None or end.end_offset <= log_start:
            continue
        for words in segment.slices(RUNS, end.first_run, end.runs):
            total += sum(words[6 * _first_live(words, 0, len(words) // 6, log_start) + LENGTH :: 6])
    return total


def _first_live(words: memoryview, first: int, stop: int, log_start: int) -> int:
    """Number of the first of the entries ``first..stop-1`` that ends above ``log_start``; ``stop`` when there is none."""
    return bisect_right(range(stop), log_start, lo=first, key=lambda i: words[6 * i + BASE] + words[6 * i + COUNT])


# -- rewriting ------------------------------------------------------------------------------------------------------
@attrs.define(slots=True)
class _Rewritten:
    """What has been put into the new file so far."""

    seed: int
    runs: memoryview
    """The old RUNS part."""
    live: list[tuple[PartitionEnd, int]]
    """(directory element, number of its first live entry) of each partition with retained runs."""
    moved: array[int]
    """New position of each run of the old part; 0 where it is not kept."""
    position: int = SEGMENT_HEADER_BYTES
    blocks: array[int] = attrs.field(factory=lambda: array("q"))
    terms: array[int] = attrs.field(factory=lambda: array("q"))

    @classmethod
    def of(cls, segment: SealedSegment, log_starts: Mapping[int, int], seed: int) -> _Rewritten:
        words = segment.part(RUNS)
        live = []
        for end in segment.directory():
            log_start = log_starts.get(end.uid)
            if log_start is not None and end.end_offset > log_start:
                stop = end.first_run + end.runs
                if (first := _first_live(words, end.first_run, stop, log_start)) < stop:
                    live.append((end, first))
        return cls(seed, words, live, array("q", bytes(len(words) // 6 * 8)))

    def wanted(self) -> list[int]:
        """Numbers of the runs to keep, in the order of the file."""
        numbers = (i for end, first in self.live for i in range(first, end.first_run + end.runs))
        return sorted(numbers, key=lambda i: self.runs[6 * i + POSITION])

    def block(self, frame: Frame, kept: Sequence[int], commands: Sequence[bytes]) -> bytes:
        """The frame again with the kept commands only, each with its header; ``kept`` numbers their runs."""
        payload = b"".join((_BLOCK_HEADER.pack(BLOCK_VERSION, len(kept)), *commands))
        header, crc = encode_header(self.seed, frame.index, frame.term, frame.log_time_ms, frame.kind, payload)
        at = self.position + FRAME_HEADER_BYTES + BLOCK_HEADER_BYTES
        for i, command in zip(kept, commands, strict=True):
            self.moved[i] = at + COMMAND_HEADER_BYTES
            at += len(command)
        self.blocks.extend((frame.index, self.position))
        if not self.terms or self.terms[-1] != frame.term:
            self.terms.extend((frame.index, frame.term))
        self.seed = crc
        self.position = at
        return header + payload

    def entries(self) -> Iterator[bytes]:
        """The new RUNS part."""
        for end, first in self.live:
            found = array("q", self.runs[6 * first : 6 * (end.first_run + end.runs)])
            found[POSITION::6] = self.moved[first : end.first_run + end.runs]
            yield found.tobytes()

    def directory(self, segment: SealedSegment, log_starts: Mapping[int, int]) -> bytes:
        """The new DIRECTORY part: every partition that still lives."""
        kept = {end.uid: end.first_run + end.runs - first for end, first in self.live}
        directory = array("q")
        at = 0
        for end in segment.directory():
            if end.uid in log_starts:
                count = kept.get(end.uid, 0)
                directory.extend((end.uid, end.end_offset, at, count, end.last_bytes_before, end.last_time_ms))
                at += count
        return directory.tobytes()


def rewrite_into(files: Files, path: str, segment: SealedSegment, log_starts: Mapping[int, int]) -> tuple[Trailer, int]:
    """Write to the new file ``path`` the segment without its dead runs, and fsync. Returns trailer and size.

    Raises ``OSError``, ``CorruptLog`` (a run to keep does not verify: the old file stays).
    """
    old = segment.trailer
    header = SegmentHeader(old.segment_id, old.first_index, old.chain_in, old.cluster_id, old.first_time_ms, COMPACTED)
    new = _Rewritten.of(segment, log_starts, header.seed)
    fd = files.open(path, create=True)
    try:
        write_exactly(files, fd, header.encode(), 0)
        for data, at in _kept_frames(segment, new):
            write_exactly(files, fd, data, at)
        parts = FooterWriter(partial(write_exactly, files, fd), new.position, new.seed)
        for chunks in ([new.blocks.tobytes()], [new.terms.tobytes()], new.entries(), [new.directory(segment, log_starts)]):
            parts.add(chunks)
        flags = old.flags | COMPACTED
        trailer = attrs.evolve(old, flags=flags, frames_end=new.position, parts=parts.parts, own_chain=new.seed)
        write_exactly(files, fd, trailer.encode(), parts.position)
        files.fsync(fd)
    finally:
        files.close(fd)
    return trailer, parts.position + TRAILER_BYTES


def _kept_frames(segment: SealedSegment, new: _Rewritten) -> Iterator[tuple[bytes, int]]:
    """The new frames and where they go, in order, one in memory at a time."""
    wanted = new.wanted()
    nth = 0
    for frame in _frames(segment):
        stop = frame.position + FRAME_HEADER_BYTES + frame.length
        mine = nth
        while nth < len(wanted) and new.runs[6 * wanted[nth] + POSITION] < stop:
            nth += 1
        if nth > mine:
            data = segment.read(FRAME_HEADER_BYTES + frame.length, frame.position)
            kept = wanted[mine:nth]
            commands = [
                _run_command(segment, data, frame.position, new.runs[6 * i + POSITION], new.runs[6 * i + LENGTH]) for i in kept
            ]
            at = new.position
            yield new.block(frame, kept, commands), at


def _frames(segment: SealedSegment) -> Iterator[Frame]:
    """The frames of a sealed segment, each verified. Raises ``CorruptLog`` when the chain breaks before its end."""
    t = segment.trailer
    header = SegmentHeader.decode(segment.read(SEGMENT_HEADER_BYTES, 0))
    if header is None:
        raise CorruptLog(f"{segment.name}: the header fails its checksum")
    end = SEGMENT_HEADER_BYTES
    for frame, _ in scan_frames(segment.read, SEGMENT_HEADER_BYTES, t.frames_end, header.seed):
        yield frame
        end = frame.position + FRAME_HEADER_BYTES + frame.length
    if end != t.frames_end:
        raise CorruptLog(f"{segment.name}: the frame at byte {end} fails its checksum")


def _run_command(segment: SealedSegment, data: bytes, frame_position: int, position: int, length: int) -> bytes:
    """The command whose body is the run at ``position`` of the file, checked, with its header."""
    at = position - frame_position
    start = at - _COMMAND_HEADER.size
    if start < FRAME_HEADER_BYTES or _COMMAND_HEADER.unpack_from(data, start)[::3] != (RUN, length):
        raise CorruptLog(f"{segment.name}: no run command of {length} bytes ends in a run at byte {position}")
    Run(data[at : at + length]).verify()
    return data[start : at + length]


# -- checking -------------------------------------------------------------------------------------------------------
def verify_sealed(segment: SealedSegment) -> list[str]:
    """A sentence for each damage in a sealed segment."""
    found = []
    try:
        last = None
        for frame in _frames(segment):
            last = frame.crc
        if last is not None and last != segment.trailer.own_chain:
            found.append(f"{segment.name}: the frames end with another checksum than the trailer says")
    except (CorruptLog, OSError) as error:
        found.append(str(error))
    for number, where in enumerate(segment.trailer.parts):
        try:
            data = segment.read(where.length, where.position)
        except (CorruptLog, OSError) as error:
            found.append(str(error))
            continue
        if crc32c(data) != where.crc:
            found.append(f"{segment.name}: footer part {number} fails its checksum")
    try:
        if Trailer.decode(segment.read(TRAILER_BYTES, segment.size_bytes - TRAILER_BYTES)) != segment.trailer:
            found.append(f"{segment.name}: the trailer is not what it was when the store was opened")
    except (CorruptLog, OSError) as error:
        found.append(str(error))
    return found


def verify_unsealed(files: Files, path: str, tail: int) -> list[str]:
    """A sentence for each damage before ``tail`` (which was synced) of a segment that is not sealed."""
    fd = files.open(path, write=False)
    end = SEGMENT_HEADER_BYTES
    try:
        header = SegmentHeader.decode(files.pread(fd, SEGMENT_HEADER_BYTES, 0))
        if header is None:
            return [f"{path}: the header fails its checksum"]
        for frame, _ in scan_frames(lambda length, at: files.pread(fd, length, at), end, tail, header.seed):
            end = frame.position + FRAME_HEADER_BYTES + frame.length
    except CorruptLog as error:
        return [f"{path}: {error}"]
    finally:
        files.close(fd)
    return [] if end == tail else [f"{path}: the frame at byte {end} fails its checksum"]
