"""The end of a sealed segment: four parts in checksummed pages, and a trailer of fixed size that says where they are.

Owns: the footer's bytes, both ways. Must not know: how look-ups use it (``sealed.py``), who seals (``upkeep.py``).

Parts, each an array of fixed-size elements of little-endian signed 64-bit words:

* ``BLOCKS``: index, position of each frame that is still part of the log, ascending;
* ``TERMS``: first index, term, one element for each change of term;
* ``RUNS``: the entries of the offset index (``run_index.py``), grouped by partition in the directory's order;
* ``DIRECTORY``: one element for every partition alive when the segment was sealed, ascending by uid: uid, end_offset, number of
  the first entry in RUNS, number of entries, last_bytes_before, last_time_ms. The last two carry on from older segments where the
  partition has no run here (-1: never had one), so that every column but the two in the middle grows from segment to segment.

A part is cut into pages of 4096 bytes: up to 4092 bytes of whole elements, zeros, and the CRC-32C of all that, started with a
*salt* (the segment's last frame checksum plus part and page number) so that a page is valid only where it was written. The last
page of a part ends with its elements and their checksum. A look-up reads and verifies pages, never whole parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import attrs
from crc32c import crc32c

from ayder.errors import CorruptLog

__all__ = [
    "BLOCKS", "COMPACTED", "DIRECTORY", "ELEMENT_BYTES", "RUNS", "TERMS", "TRAILER_BYTES", "FooterWriter", "Part", "Trailer",
    "decode_page", "page_of", "page_span",
]  # fmt: skip

FORMAT_VERSION = 1
COMPACTED = 1
"""Flag of a segment that was rewritten with its retained runs only: not part of the readable Raft log."""

BLOCKS, TERMS, RUNS, DIRECTORY = range(4)
ELEMENT_BYTES = (16, 16, 48, 48)

_MAGIC = int.from_bytes(b"AYTR", "little")
_PAGE_BYTES = 4096
_PAGE_ROOM = _PAGE_BYTES - 4
_PIECE_PAGES = 64
_TRAILER = struct.Struct("<IHHQQQQQqqQ" + "QQII" * 4 + "III16sQ")
TRAILER_BYTES = _TRAILER.size + 4
assert TRAILER_BYTES == 208


class Part(NamedTuple):
    """Where a part of the footer lies."""

    position: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs
    """Elements, not bytes."""
    crc: int
    """Of the part's bytes, pages and their checksums and all."""
    length: int


@attrs.frozen(slots=True)
class Trailer:
    """The last ``TRAILER_BYTES`` of a sealed segment."""

    segment_id: int
    flags: int
    first_index: int
    """Of an empty segment: the index the log went on with after it."""
    last_index: int
    """0 for a segment without entries."""
    first_term: int
    last_term: int
    first_time_ms: int
    last_time_ms: int
    frames_end: int
    parts: tuple[Part, ...]
    chain_in: int
    """Checksum of the log's last frame before this segment."""
    chain_out: int
    """Checksum of the log's last frame in this segment, as it was before any rewriting."""
    own_chain: int
    """Checksum of the last frame that is in the file."""
    cluster_id: str

    @property
    def compacted(self) -> bool:
        """Whether frames and runs were left out."""
        return bool(self.flags & COMPACTED)

    def encode(self) -> bytes:
        """The bytes at the end of the file."""
        body = _TRAILER.pack(
            _MAGIC, FORMAT_VERSION, self.flags, self.segment_id, self.first_index, self.last_index,
            self.first_term, self.last_term, self.first_time_ms, self.last_time_ms, self.frames_end,
            *(field for part in self.parts for field in part),
            self.chain_in, self.chain_out, self.own_chain, bytes.fromhex(self.cluster_id), 0,
        )  # fmt: skip
        return body + crc32c(body).to_bytes(4, "little")

    @classmethod
    def decode(cls, data: bytes) -> Trailer | None:
        """The trailer, or ``None`` when the bytes are none. Raises ``CorruptLog`` for a newer format."""
        if len(data) != TRAILER_BYTES or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            return None
        fields = _TRAILER.unpack_from(data)
        if fields[0] != _MAGIC:
            return None
        if fields[1] != FORMAT_VERSION:
            raise CorruptLog(f"segment {fields[3]} has footer version {fields[1]}, this release reads {FORMAT_VERSION}")
        parts = tuple(Part(*fields[at : at + 4]) for at in range(11, 27, 4))
        first_index, last_index, first_term, last_term, first_time, last_time, frames_end = fields[4:11]
        return cls(
            fields[3], fields[2], first_index, last_index, first_term, last_term, first_time, last_time, frames_end, parts,
            fields[27], fields[28], fields[29], fields[30].hex(),
        )  # fmt: skip


def _salt(own_chain: int, part: int, page: int) -> int:
    return (own_chain + (part << 28) + page) & 0xFFFFFFFF


class FooterWriter:
    """Writes the four parts one after the other, a piece at a time: an index of many megabytes is never in memory twice."""

    def __init__(self, write: Callable[[bytes, int], None], position: int, own_chain: int) -> None:
        """``write(data, position)`` puts bytes into the file; the parts begin at ``position``."""
        self._write = write
        self._own_chain = own_chain
        self.position = position
        """Where the next part begins."""
        self.parts: tuple[Part, ...] = ()

    def add(self, chunks: Iterable[bytes | bytearray]) -> None:
        """Write the next part, whose elements are those of the chunks, each of which holds whole elements."""
        part = len(self.parts)
        start = self.position
        size = crc = page = 0
        waiting = bytearray()
        step = _PAGE_ROOM - _PAGE_ROOM % ELEMENT_BYTES[part]
        for chunk in chunks:
            waiting += chunk
            size += len(chunk)
            if len(waiting) > _PIECE_PAGES * step:
                # One page is kept back: the last one of a part is laid out differently.
                pages = (len(waiting) - 1) // step
                crc = self._put(_paged(waiting, pages, step, part, page, self._own_chain), crc)
                del waiting[: pages * step]
                page += pages
        pages = -(-len(waiting) // step)
        crc = self._put(_paged(waiting, pages, step, part, page, self._own_chain), crc)
        self.parts += (Part(start, size // ELEMENT_BYTES[part], crc, self.position - start),)

    def _put(self, data: bytes, crc: int) -> int:
        if data:
            self._write(data, self.position)
            self.position += len(data)
        after: int = crc32c(data, crc)
        return after


def _paged(data: bytearray, pages: int, step: int, part: int, first_page: int, own_chain: int) -> bytes:
    """That many pages from the front of ``data``; a short one is the last of its part."""
    found = []
    for number in range(pages):
        body = bytes(data[number * step : (number + 1) * step])
        if len(data) > (number + 1) * step:
            body = body.ljust(_PAGE_ROOM, b"\0")
        found.append(body + crc32c(body, _salt(own_chain, part, first_page + number)).to_bytes(4, "little"))
    return b"".join(found)


def page_of(part: int, element: int) -> int:
    """Number of the page that holds an element."""
    return element // (_PAGE_ROOM // ELEMENT_BYTES[part])


def page_span(where: Part, part: int, page: int) -> tuple[int, int, int]:
    """Of a page: position, length, and the number of its first element."""
    per_page = _PAGE_ROOM // ELEMENT_BYTES[part]
    first = page * per_page
    left = where.count - first
    return where.position + page * _PAGE_BYTES, _PAGE_BYTES if left > per_page else left * ELEMENT_BYTES[part] + 4, first


def decode_page(data: bytes, part: int, page: int, own_chain: int) -> memoryview:
    """The words of a page. Raises ``CorruptLog`` when it does not verify."""
    room = len(data) - 4
    if room < 0 or crc32c(memoryview(data)[:room], _salt(own_chain, part, page)) != int.from_bytes(data[room:], "little"):
        raise CorruptLog(f"page {page} of footer part {part} fails its checksum")
    return memoryview(data)[: room - room % ELEMENT_BYTES[part]].cast("q")
