"""The frames a connection between peers is made of: cut, measured, checked.

Owns: the frame layout, the limit on its length, the reading of a body from front to back. Must not know: what a frame says,
sockets, time.

A frame, little-endian::

    u32 length of all that follows the crc | u32 crc32c of the length and of all that follows it | u8 type | u8 version | body

Invariants: the length is checked before anything is kept; at most one frame is kept, and never more of it than has arrived.
Source: RELIABILITY H-8; docs/peer-protocol.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeVar

from crc32c import crc32c

__all__ = ["FRAME_HEADER_BYTES", "Body", "Frames", "ProtocolError", "encode_text", "frame"]

_VERSION = 1
_HEADER = struct.Struct("<IIBB")
_COVERED = struct.Struct("<IBB")
FRAME_HEADER_BYTES = _HEADER.size
_PREFIX_BYTES = 8  # length and crc, which the length does not count


class ProtocolError(Exception):
    """What the peer sent is not this protocol, or not ours to answer. The connection is over; nothing else is."""


def frame(kind: int, head: bytes, *payloads: bytes) -> list[bytes]:
    length = 2 + len(head)
    for payload in payloads:
        length += len(payload)
    crc = crc32c(head, crc32c(_COVERED.pack(length, kind, _VERSION)))
    for payload in payloads:
        crc = crc32c(payload, crc)
    return [_HEADER.pack(length, crc, kind, _VERSION) + head, *payloads]


_Said = TypeVar("_Said")


class Frames:
    """Cuts a stream into frames, checks each, and keeps at most one that is not complete yet."""

    __slots__ = ("_broken", "_partial", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._partial = bytearray()
        self._broken = False

    @property
    def kept_bytes(self) -> int:
        """Bytes of the frame that is not complete yet."""
        return len(self._partial)

    def receive(self, data: bytes, decode: Callable[[int, memoryview], _Said | None]) -> list[_Said]:
        """What the frames that ended within ``data`` say. Raises ``ProtocolError``, then and on every later call."""
        if self._broken:
            raise ProtocolError("the connection is over")
        self._broken = True
        said: list[_Said] = []
        start = 0
        if self._partial:
            start = self._complete(data)
            if self._frame_end(self._partial, 0) != len(self._partial):
                self._broken = False
                return said
            whole, self._partial = self._partial, bytearray()
            self._decode(memoryview(whole), 0, len(whole), decode, said)
        view, size = memoryview(data), len(data)
        while 0 < (end := self._frame_end(view, start)) <= size:
            self._decode(view, start, end, decode, said)
            start = end
        self._partial += view[start:]
        self._broken = False
        return said

    def _complete(self, data: bytes) -> int:
        """Move what the kept frame lacks from ``data`` to it; returns how much that was."""
        partial, taken = self._partial, 0
        if len(partial) < 4:
            taken = min(4 - len(partial), len(data))
            partial += data[:taken]
        end = self._frame_end(partial, 0)
        if end > 0:
            more = min(end - len(partial), len(data) - taken)
            partial += memoryview(data)[taken : taken + more]
            taken += more
        return taken

    def _frame_end(self, data: memoryview | bytearray, start: int) -> int:
        """Where the frame that begins at ``start`` ends, 0 when that is not known yet."""
        if start + 4 > len(data):
            return 0
        length = int.from_bytes(data[start : start + 4], "little")
        if not 2 <= length <= self.limit - _PREFIX_BYTES:
            raise ProtocolError(f"a frame of {length} bytes, {self.limit - _PREFIX_BYTES} are allowed")
        return start + _PREFIX_BYTES + length

    def _decode(
        self, view: memoryview, start: int, end: int, decode: Callable[[int, memoryview], _Said | None], said: list[_Said]
    ) -> None:
        _, crc, kind, version = _HEADER.unpack_from(view, start)
        if crc32c(view[start + _PREFIX_BYTES : end], crc32c(view[start : start + 4])) != crc:
            raise ProtocolError("a frame fails its checksum")
        if version != _VERSION:
            raise ProtocolError(f"a frame of type {kind} has version {version}: a newer release of ayder sent it")
        one = decode(kind, view[start + FRAME_HEADER_BYTES : end])
        if one is not None:
            said.append(one)


class Body:
    """Reads the variable parts of a body from front to back."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def take(self, count: int) -> memoryview:
        start, self._at = self._at, self._at + count
        if self._at > len(self._view):
            raise ProtocolError("a frame is shorter than what it says it holds")
        return self._view[start : self._at]

    def text(self, longest: int) -> str:
        length = self.take(2)
        size = length[0] | length[1] << 8
        if not 0 < size <= longest:
            raise ProtocolError(f"a text of {size} bytes where 1 to {longest} are allowed")
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise ProtocolError("a text is not UTF-8") from error

    @property
    def left(self) -> int:
        return len(self._view) - self._at

    def end(self) -> None:
        if self.left:
            raise ProtocolError(f"{self.left} bytes behind the end of a message")


def encode_text(value: str) -> bytes:
    encoded = value.encode()
    return len(encoded).to_bytes(2, "little") + encoded
