"""A segment that is not sealed yet: its header, what memory knows of its entries and runs, and the writer of the open one.

Owns: the 64-byte header, the in-memory block and offset index of unsealed segments, and the write + fdatasync of the log. Must
not know: other segments, who decides to roll or seal.

A frame may replace entries: one with an index at or below the last one makes the older suffix void *by standing after it in the
chain*, so replacing a suffix is an append like any other and cannot be half done by a crash; nothing is cut but torn tails.

Header, little-endian: u32 magic "AYSG" | u16 version | u16 flags | u64 segment_id | u64 next_index | u32 chain_in | u32 0
| 16 bytes cluster id | i64 log_time_ms | u32 0 | u32 crc32c of the 60 bytes before. The first frame's seed is this crc.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import attrs
from crc32c import crc32c

from ayder.errors import CorruptLog
from ayder.storage.files import NO_SPACE, Files, Poison
from ayder.storage.interface import RunEntry, SegmentInfo, StorageFull
from ayder.storage.run_index import PackedRuns, pack_entry

__all__ = ["SEGMENT_HEADER_BYTES", "SegmentHeader", "SegmentWriter", "UnsealedSegment", "segment_id_of", "segment_name"]

FORMAT_VERSION = 1
_MAGIC = int.from_bytes(b"AYSG", "little")
_HEADER = struct.Struct("<IHHQQI4x16sq4x")
SEGMENT_HEADER_BYTES = _HEADER.size + 4
assert SEGMENT_HEADER_BYTES == 64
_UNLIMITED = 1 << 62


def segment_name(segment_id: int) -> str:
    """The file's name."""
    return f"seg-{segment_id:016x}.log"


def segment_id_of(name: str) -> int | None:
    """The id a file name holds; ``None`` when it is not a segment's name."""
    middle = name[4:-4]
    if len(name) != 24 or not name.startswith("seg-") or not name.endswith(".log") or set(middle) - set("0123456789abcdef"):
        return None
    return int(middle, 16)


@attrs.frozen(slots=True)
class SegmentHeader:
    """The first 64 bytes of a segment."""

    segment_id: int
    next_index: int
    """The index after the log's last one when the segment was begun."""
    chain_in: int
    """Checksum of the log's last frame before this segment; 0 for the first segment."""
    cluster_id: str
    log_time_ms: int = 0
    """Newest log time before this segment."""
    flags: int = 0

    def encode(self) -> bytes:
        """The bytes on disk; the last four are the checksum, which seeds the first frame."""
        body = _HEADER.pack(
            _MAGIC, FORMAT_VERSION, self.flags, self.segment_id, self.next_index, self.chain_in, bytes.fromhex(self.cluster_id),
            self.log_time_ms,
        )  # fmt: skip
        return body + crc32c(body).to_bytes(4, "little")

    @property
    def seed(self) -> int:
        """What the first frame names."""
        return int.from_bytes(self.encode()[-4:], "little")

    @classmethod
    def decode(cls, data: bytes) -> SegmentHeader | None:
        """The header, or ``None`` when it does not verify. Raises ``CorruptLog`` for a newer format."""
        if len(data) < SEGMENT_HEADER_BYTES or crc32c(data[:60]) != int.from_bytes(data[60:64], "little"):
            return None
        magic, version, flags, segment_id, next_index, chain_in, cluster, time_ms = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            return None
        if version != FORMAT_VERSION:
            raise CorruptLog(f"segment {segment_id} has format version {version}, this release reads {FORMAT_VERSION}")
        return cls(segment_id, next_index, chain_in, cluster.hex(), time_ms, flags)


class UnsealedSegment:
    """What memory holds of a segment that is not sealed. Written by the writer thread and (runs) the event loop, read by all.

    Every method that readers call takes what it needs in one step under the interpreter's lock (a slice, a list of items).
    """

    generation = 0  # the file has its name from the beginning until it is sealed

    __slots__ = ("blocks", "first_time_ms", "header", "last_time_ms", "name", "positions", "runs", "segment_id", "start", "tail",
                 "tail_chain")  # fmt: skip

    def __init__(self, header: SegmentHeader) -> None:
        self.header = header
        self.segment_id = header.segment_id
        self.name = segment_name(header.segment_id)
        self.start = header.next_index
        """Index of the entry at ``positions[0]``."""
        self.positions = array("Q")
        self.runs: dict[int, bytearray] = {}
        self.tail = SEGMENT_HEADER_BYTES
        """End of the last synced frame."""
        self.tail_chain = header.seed
        self.blocks = 0
        """Frames of entries in the file, replaced ones too."""
        self.first_time_ms = header.log_time_ms
        self.last_time_ms = header.log_time_ms

    @property
    def last_index(self) -> int:
        """Index of the last entry in it; 0 when it has none."""
        count = len(self.positions)
        return self.start + count - 1 if count else 0

    def add(self, index: int, position: int, log_time_ms: int) -> None:
        """An entry was written; it goes on after the last one (``cut`` comes before a replacing one)."""
        if not self.positions:
            self.start = index
            self.first_time_ms = log_time_ms
        self.positions.append(position)
        self.blocks += 1
        self.last_time_ms = log_time_ms

    def cut(self, index: int) -> None:
        """Entries from ``index`` on are void."""
        del self.positions[max(0, index - self.start) :]
        if not self.positions:
            self.start = min(self.start, index)

    def note_run(self, uid: int, entry: RunEntry) -> None:
        """See ``LogStore.note_run``."""
        packed = self.runs.get(uid)
        if packed is None:
            packed = self.runs[uid] = bytearray()
        packed += pack_entry(entry)

    def table(self, uid: int) -> PackedRuns | None:
        """The runs of a partition; ``None`` when it has none here."""
        packed = self.runs.get(uid)
        return PackedRuns(packed) if packed else None

    def info(self) -> SegmentInfo:
        """See ``LogStore.segments``."""
        return SegmentInfo(self.segment_id, self.start, self.last_index, self.tail, False, self.first_time_ms, self.last_time_ms)


class SegmentWriter:
    """Appends to the open segment. Writer thread only."""

    __slots__ = ("_files", "_poison", "_step", "allocated", "fd", "path", "tail")

    def __init__(self, files: Files, poison: Poison, path: str, fd: int, tail: int, allocated: int, step: int) -> None:
        self._files = files
        self._poison = poison
        self._step = step
        self.path = path
        self.fd = fd
        self.tail = tail
        self.allocated = allocated if step else _UNLIMITED

    @classmethod
    def create(cls, files: Files, poison: Poison, directory: str, name: str, prologue: bytes, step: int) -> SegmentWriter:
        """A new file that begins with ``prologue``, durable with its name.

        Raises ``StorageFull`` (and leaves no file) or ``StoragePoisoned``.
        """
        path = f"{directory}/{name}"
        try:
            fd = files.open(path, create=True)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise StorageFull(f"no room for {path}: {error}") from error
            poison.raise_for(f"creating {path}", error)
        try:
            writer = cls(files, poison, path, fd, 0, 0, step)
            writer.allocate(len(prologue))
            writer.put([prologue], len(prologue))
            files.fsync(fd)
            files.fsync_dir(directory)
        except BaseException as error:
            files.close(fd)
            if isinstance(error, StorageFull):
                cls._remove(files, poison, directory, path)
            elif isinstance(error, OSError):
                poison.raise_for(f"creating {path}", error)
            raise
        return writer

    @staticmethod
    def _remove(files: Files, poison: Poison, directory: str, path: str) -> None:
        try:
            files.unlink(path)
            files.fsync_dir(directory)
        except OSError as error:
            poison.raise_for(f"removing {path}", error)

    def write(self, buffers: Sequence[bytes], length: int) -> None:
        """Put the buffers at the tail and make them durable. Raises ``StorageFull`` (nothing there) or ``StoragePoisoned``."""
        if self.tail + length > self.allocated:
            self.allocate(length)
        self.put(buffers, length)
        try:
            self._files.fdatasync(self.fd)
        except OSError as error:
            self._poison.raise_for(f"syncing {self.path}", error)

    def put(self, buffers: Sequence[bytes], length: int) -> None:
        """Write without syncing; the tail moves on."""
        try:
            written = self._files.pwritev(self.fd, buffers, self.tail)
        except OSError as error:
            if error.errno not in NO_SPACE:
                self._poison.raise_for(f"writing {self.path}", error)
            self._cut_back(error)
        if written != length:
            self._cut_back(OSError(f"{written} of {length} bytes were written"))
        self.tail += length

    def allocate(self, length: int) -> None:
        """Have room for ``length`` bytes at the tail, in steps where the disk is large enough. Raises ``StorageFull``."""
        if not self._step:
            return
        needed = self.tail + length
        rounded = -(-needed // self._step) * self._step
        if self._extend(rounded) is None:
            return
        error = self._extend(needed)  # nearly full: do without what a step would take ahead
        if error is not None:
            raise StorageFull(f"no room for {length} bytes in {self.path}: {error}") from error

    def _extend(self, end: int) -> OSError | None:
        try:
            self._files.fallocate(self.fd, self.tail, end - self.tail)
        except OSError as error:
            if error.errno in NO_SPACE:
                return error
            # The file system cannot: let the file grow by writing. A broken disk will say so again at the write.
            self.allocated = _UNLIMITED
            return None
        self.allocated = end
        return None

    def _cut_back(self, error: OSError) -> None:
        """Undo a write that did not fit: ``StorageFull`` when the file is as before, ``StoragePoisoned`` when nobody knows."""
        try:
            self._files.ftruncate(self.fd, self.tail)
            self._files.fsync(self.fd)
        except OSError as second:
            self._poison.raise_for(f"cutting {self.path} back after a failed write ({error})", second)
        if self._step:
            self.allocated = self.tail
        raise StorageFull(f"no room in {self.path}: {error}") from error

    def close(self) -> None:
        """Give the descriptor back."""
        self._files.close(self.fd)
