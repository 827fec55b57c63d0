"""One Raft entry (or one hard state) as bytes in a segment, and the scan that finds where a chain of them ends.

Owns: the frame layout and the verdict "valid or not". Must not know: files, segments, what a payload means.

A frame names the checksum of the frame before it (``seed``) and its own checksum covers that name: a frame is valid only in the
history it was written into, so a stale suffix can never continue a new tail. Layout, little-endian, 48 bytes and the payload::

    u32 magic "AYFR" | u32 crc32c of all that follows | u32 seed | u32 payload length | u64 index | u64 term
    i64 log_time_ms | u8 kind | u8 version | u16 0 | u32 0 | payload

Source: RELIABILITY S-1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from crc32c import crc32c

from ayder.entries import EntryKind, HardState, LogEntry
from ayder.errors import CorruptLog

__all__ = ["FRAME_HEADER_BYTES", "HARD_STATE", "Frame", "decode_entry", "decode_hard_state", "encode_hard_state",
           "encode_header", "frame_fields", "scan_frames"]  # fmt: skip

FRAME_MAGIC = int.from_bytes(b"AYFR", "little")
FRAME_VERSION = 1
HARD_STATE = 128
"""Kind of a frame that holds term and vote; the other kinds are ``EntryKind``."""

_HEADER = struct.Struct("<IIIIQQqBBHI")
_BEFORE = struct.Struct("<II")
_COVERED = struct.Struct("<IIQQqBBHI")
FRAME_HEADER_BYTES = _HEADER.size
assert FRAME_HEADER_BYTES == 48

_KINDS = frozenset((*EntryKind, HARD_STATE))
_SCAN_CHUNK = 1 << 20
_pack_before = _BEFORE.pack
_pack_covered = _COVERED.pack


class Frame(NamedTuple):
    """A valid frame met by the scan."""

    position: int
    kind: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs
    term: int
    log_time_ms: int
    length: int
    """Bytes of the payload."""
    crc: int


def encode_header(seed: int, index: int, term: int, log_time_ms: int, kind: int, payload: bytes) -> tuple[bytes, int]:
    """The 48 bytes before ``payload``, and the frame's checksum: the seed of the next frame."""
    covered = _pack_covered(seed, len(payload), index, term, log_time_ms, kind, FRAME_VERSION, 0, 0)
    crc: int = crc32c(payload, crc32c(covered))
    return _pack_before(FRAME_MAGIC, crc) + covered, crc


def encode_hard_state(seed: int, last_index: int, state: HardState) -> tuple[bytes, int]:
    """A whole frame with term and vote, and its checksum."""
    payload = b"" if state.voted_for is None else state.voted_for.encode()
    header, crc = encode_header(seed, last_index, state.term, 0, HARD_STATE, payload)
    return header + payload, crc


def decode_hard_state(term: int, payload: bytes) -> HardState:
    """The hard state a frame of that term and payload holds."""
    return HardState(term, payload.decode() or None)


def frame_fields(data: bytes | memoryview, at: int) -> tuple[int, ...]:
    """The header's fields as stored: magic, crc, seed, length, index, term, log time, kind, version, 0, 0. Nothing verified."""
    return _HEADER.unpack_from(data, at)


def decode_entry(data: bytes, at: int) -> LogEntry:
    """The entry whose frame starts at ``at`` of ``data``. Raises ``CorruptLog`` when it fails its checksum."""
    if at + FRAME_HEADER_BYTES > len(data):
        raise CorruptLog("a frame's header is cut off")
    magic, crc, _, length, index, term, time_ms, kind, version, _, _ = _HEADER.unpack_from(data, at)
    stop = at + FRAME_HEADER_BYTES + length
    if magic != FRAME_MAGIC or stop > len(data) or crc32c(memoryview(data)[at + 8 : stop]) != crc:
        raise CorruptLog("a frame fails its checksum")
    _check_known(kind, version, at)
    return LogEntry(index, term, EntryKind(kind), time_ms, data[at + FRAME_HEADER_BYTES : stop])


def _check_known(kind: int, version: int, position: int) -> None:
    """A valid frame that this release does not understand must stop it: skipping one would be silent loss."""
    if version != FRAME_VERSION or kind not in _KINDS:
        raise CorruptLog(
            f"the frame at byte {position} has kind {kind}, version {version}: a newer release of ayder wrote it, start that one"
        )


def scan_frames(pread: Callable[[int, int], bytes], position: int, end: int, seed: int) -> Iterator[tuple[Frame, bytes]]:
    """The longest valid chain from ``position`` on, as (frame, payload of a hard state or empty).

    ``pread(length, position)`` reads; ``end`` is the file's length; ``seed`` is what the first frame must name. Stops at the
    first frame that is not valid. Raises ``CorruptLog`` for a valid frame of an unknown kind or version.
    """
    chunk = b""
    view = memoryview(chunk)
    base = position
    unpack = _HEADER.unpack_from
    while True:
        at = position - base
        if at + FRAME_HEADER_BYTES > len(chunk):
            chunk = pread(min(_SCAN_CHUNK, end - position), position)
            view, base, at = memoryview(chunk), position, 0
            if len(chunk) < FRAME_HEADER_BYTES:
                return
        magic, crc, named, length, index, term, time_ms, kind, version, _, _ = unpack(chunk, at)
        if magic != FRAME_MAGIC or named != seed:
            return
        size = FRAME_HEADER_BYTES + length
        if at + size > len(chunk):
            if position + size > end:
                return
            chunk = pread(min(max(size, _SCAN_CHUNK), end - position), position)
            view, base, at = memoryview(chunk), position, 0
            if len(chunk) < size:
                return
        if crc32c(view[at + 8 : at + size]) != crc:
            return
        if version != FRAME_VERSION or kind not in _KINDS:
            _check_known(kind, version, position)
        payload = chunk[at + FRAME_HEADER_BYTES : at + size] if kind == HARD_STATE else b""
        yield Frame(position, kind, index, term, time_ms, length, crc), payload
        seed = crc
        position += size
