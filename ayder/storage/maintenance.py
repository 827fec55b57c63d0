"""What happens to a segment after it is full: sealing, rewriting without its dead runs, checking every byte of it.

Owns: the bytes written for that and their order. Must not know: the view of the log and who reads it (``aof.py`` swaps it).

Order is everything here. Sealing: footer after the frames, cut to length, fsync; *then* the trailer that makes it count, fsync.
Rewriting: a complete sealed file aside, fsync, rename, fsync of the directory. A crash in between leaves the old state.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence

import attrs
from crc32c import crc32c

from ayder.commands import BLOCK_HEADER_BYTES, BLOCK_VERSION, COMMAND_HEADER_BYTES, RUN
from ayder.entries import LogIndex, Term
from ayder.errors import CorruptLog
from ayder.runs import Run
from ayder.storage.files import Files, write_exactly
from ayder.storage.footer import COMPACTED, RUNS, TRAILER_BYTES, Trailer, encode_parts
from ayder.storage.frame import FRAME_HEADER_BYTES, Frame, encode_header, scan_frames
from ayder.storage.run_index import PackedRuns
from ayder.storage.sealed import PartitionEnd, SealedSegment
from ayder.storage.segment import SEGMENT_HEADER_BYTES, SegmentHeader, UnsealedSegment

__all__ = ["live_bytes", "rewrite_into", "seal_file", "verify_sealed", "verify_unsealed"]

_NEVER = -1
_BLOCK_HEADER = struct.Struct("<B3xI")
_COMMAND_HEADER = struct.Struct("<BBHI")
assert (_BLOCK_HEADER.size, _COMMAND_HEADER.size) == (BLOCK_HEADER_BYTES, COMMAND_HEADER_BYTES)

BASE, COUNT, BEFORE, TIME, POSITION, LENGTH = range(6)


def seal_file(
    files: Files, path: str, segment: UnsealedSegment, terms: Sequence[tuple[LogIndex, Term]], end_offsets: Mapping[int, int],
    older: Sequence[PartitionEnd],
) -> tuple[Trailer, int]:  # fmt: skip
    """Give a full segment its footer. Returns the trailer and the file's size. Raises ``OSError``."""
    runs, directory = _index_of(dict(segment.runs.items()), end_offsets, older)
    blocks = array("q")
    for number, position in enumerate(segment.positions):
        blocks.append(segment.start + number)
        blocks.append(position)
    header = segment.header
    starts = array("q", (word for start in terms for word in start))
    parts, places = encode_parts((blocks.tobytes(), starts.tobytes(), runs, directory), segment.tail, segment.tail_chain)
    trailer = Trailer(
        header.segment_id, 0, segment.start, segment.last_index, terms[0][1] if terms else 0, terms[-1][1] if terms else 0,
        segment.first_time_ms, segment.last_time_ms, segment.tail, places,
        header.chain_in, segment.tail_chain, segment.tail_chain, header.cluster_id,
    )  # fmt: skip
    fd = files.open(path)
    try:
        end = segment.tail + len(parts)
        write_exactly(files, fd, parts, segment.tail)
        files.ftruncate(fd, end)
        files.fsync(fd)
        write_exactly(files, fd, trailer.encode(), end)
        files.fsync(fd)
    finally:
        files.close(fd)
    return trailer, end + TRAILER_BYTES


def _index_of(runs: dict[int, bytearray], end_offsets: Mapping[int, int], older: Sequence[PartitionEnd]) -> tuple[bytes, bytes]:
    """The RUNS and DIRECTORY parts: runs of live partitions only, and for each of those where it stands at the segment's end."""
    before = {end.uid: end for end in older}
    packed: list[bytes | bytearray] = []
    directory = array("q")
    first = 0
    for uid in sorted(end_offsets):
        mine = runs.get(uid, b"")
        table = PackedRuns(mine)
        old = before.get(uid)
        last_bytes, last_time = (old.last_bytes_before, old.last_time_ms) if old else (_NEVER, _NEVER)
        if table.count:
            last = table.entry(table.count - 1)
            last_bytes, last_time = last.bytes_before, last.log_time_ms
        directory.extend((uid, end_offsets[uid], first, table.count, last_bytes, last_time))
        packed.append(mine)
        first += table.count
    return b"".join(packed), directory.tobytes()


def live_bytes(segment: SealedSegment, log_starts: Mapping[int, int]) -> int:
    """See ``LogStore.live_bytes``."""
    words = segment.part(RUNS)
    total = 0
    for end, first in _live_parts(segment, words, log_starts):
        total += sum(words[6 * first + LENGTH : 6 * (end.first_run + end.runs) : 6].tolist())
    return total


def _live_parts(segment: SealedSegment, words: memoryview, log_starts: Mapping[int, int]) -> Iterator[tuple[PartitionEnd, int]]:
    """(directory element, number of its first live entry) of each partition with retained runs here."""
    for end in segment.directory():
        log_start = log_starts.get(end.uid)
        if log_start is None or not end.runs:
            continue
        first = end.first_run
        stop = first + end.runs
        while first < stop and words[6 * first + BASE] + words[6 * first + COUNT] <= log_start:
            first += 1
        if first < stop:
            yield end, first


# -- rewriting ------------------------------------------------------------------------------------------------------
@attrs.define(slots=True)
class _Rewritten:
    """What has been put into the new file so far."""

    seed: int
    position: int = SEGMENT_HEADER_BYTES
    blocks: array[int] = attrs.field(factory=lambda: array("q"))
    terms: array[int] = attrs.field(factory=lambda: array("q"))
    moved: dict[int, int] = attrs.field(factory=dict)
    """Old position of a run → new one."""

    def block(self, frame: Frame, kept: list[tuple[int, bytes]]) -> bytes:
        """The frame again with the kept commands only; each is (old position of its run, command with its header)."""
        payload = b"".join((_BLOCK_HEADER.pack(BLOCK_VERSION, len(kept)), *(command for _, command in kept)))
        header, crc = encode_header(self.seed, frame.index, frame.term, frame.log_time_ms, frame.kind, payload)
        at = self.position + FRAME_HEADER_BYTES + _BLOCK_HEADER.size
        for old, command in kept:
            self.moved[old] = at + _COMMAND_HEADER.size
            at += len(command)
        self.blocks.extend((frame.index, self.position))
        if not self.terms or self.terms[-1] != frame.term:
            self.terms.extend((frame.index, frame.term))
        self.seed = crc
        self.position = at
        return header + payload


def rewrite_into(files: Files, path: str, segment: SealedSegment, log_starts: Mapping[int, int]) -> tuple[Trailer, int]:
    """Write to the new file ``path`` the segment without its dead runs, and fsync. Returns trailer and size.

    Raises ``OSError``, ``CorruptLog`` (a run to keep does not verify: the old file stays).
    """
    old = segment.trailer
    words = segment.part(RUNS)
    live = list(_live_parts(segment, words, log_starts))
    wanted = sorted(
        (words[6 * i + POSITION], words[6 * i + LENGTH]) for end, first in live for i in range(first, end.first_run + end.runs)
    )
    header = SegmentHeader(old.segment_id, old.first_index, old.chain_in, old.cluster_id, old.first_time_ms, COMPACTED)
    new = _Rewritten(header.seed)
    fd = files.open(path, create=True)
    try:
        write_exactly(files, fd, header.encode(), 0)
        for data, at in _kept_frames(segment, wanted, new):
            write_exactly(files, fd, data, at)
        trailer, parts = _rewritten_trailer(segment, words, live, log_starts, new)
        write_exactly(files, fd, parts + trailer.encode(), new.position)
        files.fsync(fd)
    finally:
        files.close(fd)
    return trailer, new.position + len(parts) + TRAILER_BYTES


def _kept_frames(segment: SealedSegment, wanted: list[tuple[int, int]], new: _Rewritten) -> Iterator[tuple[bytes, int]]:
    """The new frames and where they go, in order, one in memory at a time."""
    nth = 0
    for frame in _frames(segment):
        stop = frame.position + FRAME_HEADER_BYTES + frame.length
        mine = nth
        while nth < len(wanted) and wanted[nth][0] < stop:
            nth += 1
        if nth == mine:
            continue
        data = segment.read(FRAME_HEADER_BYTES + frame.length, frame.position)
        kept = [(position, _run_command(segment, data, frame.position, position, size)) for position, size in wanted[mine:nth]]
        at = new.position
        yield new.block(frame, kept), at


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


def _rewritten_trailer(
    segment: SealedSegment,
    words: memoryview,
    live: list[tuple[PartitionEnd, int]],
    log_starts: Mapping[int, int],
    new: _Rewritten,
) -> tuple[Trailer, bytes]:
    runs = array("q")
    kept: dict[int, tuple[int, int]] = {}
    for end, first in live:
        kept[end.uid] = (len(runs) // 6, end.first_run + end.runs - first)
        for i in range(first, end.first_run + end.runs):
            entry = words[6 * i : 6 * i + 6].tolist()
            entry[POSITION] = new.moved[entry[POSITION]]
            runs.extend(entry)
    directory = array("q")
    for end in segment.directory():
        if end.uid in log_starts:
            first, count = kept.get(end.uid, (0, 0))
            directory.extend((end.uid, end.end_offset, first, count, end.last_bytes_before, end.last_time_ms))
    datas = (new.blocks.tobytes(), new.terms.tobytes(), runs.tobytes(), directory.tobytes())
    parts, places = encode_parts(datas, new.position, new.seed)
    flags = segment.trailer.flags | COMPACTED
    return attrs.evolve(segment.trailer, flags=flags, frames_end=new.position, parts=places, own_chain=new.seed), parts


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
