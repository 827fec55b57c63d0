"""What a log directory knows about itself besides the log: who it belongs to, how far it is surely synced, what was dropped.

Owns: the file ``meta`` (two slots) and the file ``dropped``. Must not know: segments' contents.

``meta``: the *synced watermark* tells rot from a torn tail: bytes before it had been synced, so if they do not verify the disk
has lost them. It may lag, it is never ahead. Two slots of 512 bytes at 0 and 4096; unsynced saves only ever go to the slot that
is not the last synced one, so a valid slot always exists, however a write is torn. Layout of a slot, little-endian::

    u32 magic "AYMT" | u16 version | u16 flags (1 = damaged) | u64 sequence | u64 incarnation | u64 segment_id | u64 position
    u64 index | u32 chain | u8 node id length | 3 zero bytes | 16 bytes cluster id | 128 bytes node id | zeros | u32 crc32c at 508

``dropped``: the ids of removed segments as ranges, written before the file goes, so that a gap in the sequence is either known or
damage: u32 magic "AYDR" | u32 crc32c of all that follows | u16 version | u16 0 | u32 count | per range u64 first, u64 last.
Source: RELIABILITY S-1, R-16.
"""

from __future__ import annotations

import struct

import attrs
from crc32c import crc32c

from ayder.errors import CorruptLog
from ayder.storage.files import NO_SPACE, Files, Poison, replace_file, write_exactly

__all__ = ["DROPPED_FILE", "META_FILE", "DroppedSegments", "MetaFile", "MetaState", "Watermark"]

META_FILE = "meta"
DROPPED_FILE = "dropped"
FORMAT_VERSION = 1

_META_MAGIC = int.from_bytes(b"AYMT", "little")
_DROPPED_MAGIC = int.from_bytes(b"AYDR", "little")
_SLOT = struct.Struct("<IHHQQQQQIB3x16s128s")
_SLOT_BYTES = 512
_SLOT_STEP = 4096
_DAMAGED = 1
_NODE_ID_BYTES = 128


@attrs.frozen(slots=True)
class Watermark:
    """All frames that end at or before ``position`` of that segment (and all older segments) are on disk."""

    segment_id: int = 0
    """0: nothing yet."""
    position: int = 0
    index: int = 0
    """The log's last index there."""
    chain: int = 0
    """Checksum of the frame that ends there."""


@attrs.frozen(slots=True)
class MetaState:
    """One slot's content."""

    node_id: str
    cluster_id: str
    """32 hexadecimal digits."""
    incarnation: int = 1
    damaged: bool = False
    watermark: Watermark = Watermark()


def _encode_slot(state: MetaState, sequence: int) -> bytes:
    mark = state.watermark
    node_id = state.node_id.encode()
    body = _SLOT.pack(
        _META_MAGIC, FORMAT_VERSION, _DAMAGED if state.damaged else 0, sequence, state.incarnation,
        mark.segment_id, mark.position, mark.index, mark.chain, len(node_id), bytes.fromhex(state.cluster_id), node_id,
    )  # fmt: skip
    body = body.ljust(_SLOT_BYTES - 4, b"\0")
    return body + crc32c(body).to_bytes(4, "little")


def _decode_slot(data: bytes) -> tuple[int, MetaState] | None:
    """(sequence, state), or ``None`` when the slot does not verify. Raises ``CorruptLog`` for a newer format."""
    if len(data) < _SLOT_BYTES or crc32c(data[: _SLOT_BYTES - 4]) != int.from_bytes(data[-4:], "little"):
        return None
    magic, version, flags, sequence, incarnation, *place, chain, length, cluster, node = _SLOT.unpack_from(data)
    if magic != _META_MAGIC:
        return None
    if version != FORMAT_VERSION:
        raise CorruptLog(f"the log directory has format version {version}, this release reads {FORMAT_VERSION}")
    segment_id, position, index = place
    mark = Watermark(segment_id, position, index, chain)
    return sequence, MetaState(node[:length].decode(), cluster.hex(), incarnation, bool(flags & _DAMAGED), mark)


class MetaFile:
    """The open ``meta`` file. Writer thread only."""

    def __init__(
        self, files: Files, directory: str, poison: Poison, fd: int, state: MetaState, sequence: int, stable: int
    ) -> None:
        self._files = files
        self._directory = directory
        self._poison = poison
        self._fd = fd
        self._sequence = sequence
        self._stable = stable
        self.state = state

    @classmethod
    def create(cls, files: Files, directory: str, poison: Poison, state: MetaState) -> MetaFile:
        """Write the first slot, durably, and open the file. Raises ``OSError``."""
        replace_file(files, directory, META_FILE, _encode_slot(state, 1).ljust(_SLOT_STEP + _SLOT_BYTES, b"\0"))
        return cls(files, directory, poison, files.open(f"{directory}/{META_FILE}"), state, 1, 0)

    @classmethod
    def open(cls, files: Files, directory: str, poison: Poison) -> MetaFile:
        """Open what ``create`` made. Raises ``CorruptLog`` when no slot verifies, ``FileNotFoundError`` when there is no file."""
        path = f"{directory}/{META_FILE}"
        fd = files.open(path)
        try:
            slots = [_decode_slot(files.pread(fd, _SLOT_BYTES, slot * _SLOT_STEP)) for slot in (0, 1)]
            found = [(slot[0], number, slot[1]) for number, slot in enumerate(slots) if slot is not None]
            if not found:
                raise CorruptLog(
                    f"{path}: neither copy of the node's identity and synced watermark verifies, so what this disk once promised "
                    "is unknown. Keep the directory as it is and restore a backup, or join the cluster again under a new node id"
                )
            sequence, stable, state = max(found, key=lambda slot: slot[0])
            # What was read may still be only in the page cache of a machine that lost its writer, not its power.
            files.fsync(fd)
        except BaseException:
            files.close(fd)
            raise
        return cls(files, directory, poison, fd, state, sequence, stable)

    def save(self, state: MetaState, *, sync: bool) -> None:
        """Write ``state`` to the slot that may be lost; ``sync`` makes it the one to rely on. Raises ``StoragePoisoned``."""
        slot = 1 - self._stable
        try:
            write_exactly(self._files, self._fd, _encode_slot(state, self._sequence + 1), slot * _SLOT_STEP)
            if sync:
                self._files.fsync(self._fd)
        except OSError as error:
            if error.errno in NO_SPACE and not sync:
                return  # an older watermark is a weaker statement, not a wrong one
            self._poison.raise_for(f"writing {self._directory}/{META_FILE}", error)
        self._sequence += 1
        self.state = state
        if sync:
            self._stable = slot

    def close(self) -> None:
        """Give the descriptor back; nothing is written."""
        self._files.close(self._fd)


class DroppedSegments:
    """Ids of segments that were removed on purpose."""

    def __init__(self, files: Files, directory: str, ranges: list[tuple[int, int]]) -> None:
        self._files = files
        self._directory = directory
        self._ranges = ranges

    @classmethod
    def load(cls, files: Files, directory: str, names: list[str]) -> DroppedSegments:
        """Read the file if it is among ``names``. Raises ``CorruptLog`` when it does not verify."""
        if DROPPED_FILE not in names:
            return cls(files, directory, [])
        path = f"{directory}/{DROPPED_FILE}"
        fd = files.open(path, write=False)
        try:
            data = files.pread(fd, files.size(fd), 0)
        finally:
            files.close(fd)
        magic = _DROPPED_MAGIC.to_bytes(4, "little")
        if len(data) < 16 or data[:4] != magic or crc32c(data[8:]) != int.from_bytes(data[4:8], "little"):
            raise CorruptLog(
                f"{path} fails its checksum: it lists the segments that retention removed, and without it a missing segment "
                "cannot be told from a removed one. Keep the directory as it is and restore a backup"
            )
        version, _, count = struct.unpack_from("<HHI", data, 8)
        if version != FORMAT_VERSION or len(data) != 16 + 16 * count:
            raise CorruptLog(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")
        words = memoryview(data)[16:].cast("Q").tolist()
        return cls(files, directory, list(zip(words[::2], words[1::2], strict=True)))

    def __contains__(self, segment_id: int) -> bool:
        return any(first <= segment_id <= last for first, last in self._ranges)

    def covers(self, first: int, last: int) -> bool:
        """Whether every id in ``first..last`` was dropped (an empty range is)."""
        return first > last or any(low <= first and last <= high for low, high in self._ranges)

    def add(self, segment_id: int) -> None:
        """Write down that the segment is about to go; durable on return. Raises ``OSError``."""
        if segment_id in self:
            return
        ranges: list[tuple[int, int]] = []
        for first, last in sorted([*self._ranges, (segment_id, segment_id)]):
            if ranges and ranges[-1][1] + 1 == first:
                ranges[-1] = (ranges[-1][0], last)
            else:
                ranges.append((first, last))
        body = struct.pack("<HHI", FORMAT_VERSION, 0, len(ranges)) + b"".join(struct.pack("<QQ", *item) for item in ranges)
        head = _DROPPED_MAGIC.to_bytes(4, "little") + crc32c(body).to_bytes(4, "little")
        replace_file(self._files, self._directory, DROPPED_FILE, head + body)
        self._ranges = ranges
