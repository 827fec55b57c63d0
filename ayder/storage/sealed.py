"""A sealed segment as readers see it: its trailer in memory, everything else read by page when asked for.

Owns: look-ups in one sealed file. Must not know: other segments, how the file came to be.
Memory per segment is the trailer only; pages are shared through a byte-bounded cache, so memory does not grow with history.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple, Protocol

import attrs

from ayder.errors import CorruptLog
from ayder.storage import footer
from ayder.storage.files import Files, pread_exactly
from ayder.storage.footer import BLOCKS, DIRECTORY, ELEMENT_BYTES, RUNS, TERMS, Trailer
from ayder.storage.handles import FileHandles, PageCache
from ayder.storage.interface import RunEntry, SegmentInfo

__all__ = ["PagedRuns", "PartitionEnd", "SealedSegment", "SegmentReader", "StoredSegment"]

_generations = count(1)
_PAGES_AT_ONCE = 64


class StoredSegment(Protocol):
    """Anything with a file of its own."""

    @property
    def name(self) -> str:
        """The file's name."""
        ...

    @property
    def generation(self) -> int:
        """Tells apart the files that had this name one after the other (``handles.py``)."""
        ...


@attrs.frozen(slots=True)
class SegmentReader:
    """What all sealed segments of a store read through."""

    files: Files
    directory: str
    handles: FileHandles
    pages: PageCache

    def read(self, segment: StoredSegment, length: int, position: int) -> bytes:
        """Bytes of its file. Raises ``CorruptLog`` when it is too short, ``FileNotFoundError`` when it is gone."""
        with self.handles.borrow(segment.name, segment.generation) as fd:
            try:
                return pread_exactly(self.files, fd, length, position)
            except EOFError as error:
                raise CorruptLog(f"{self.directory}/{segment.name}: {error}") from error
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise CorruptLog(f"{self.directory}/{segment.name}, byte {position}: {error}") from error


class PartitionEnd(NamedTuple):
    """An element of the directory (``footer.py``)."""

    uid: int
    end_offset: int
    first_run: int
    runs: int
    last_bytes_before: int
    last_time_ms: int


class SealedSegment:
    """One sealed file. Worker threads, several at once."""

    __slots__ = ("_reader", "generation", "name", "segment_id", "size_bytes", "trailer")

    def __init__(self, reader: SegmentReader, name: str, trailer: Trailer, size_bytes: int) -> None:
        self._reader = reader
        self.generation = next(_generations)  # a rewritten segment is another one to the page cache
        self.name = name
        self.trailer = trailer
        self.segment_id = trailer.segment_id
        self.size_bytes = size_bytes

    def info(self) -> SegmentInfo:
        """See ``LogStore.segments``."""
        t = self.trailer
        return SegmentInfo(t.segment_id, t.first_index, t.last_index, self.size_bytes, True, t.first_time_ms, t.last_time_ms)

    def read(self, length: int, position: int) -> bytes:
        """Bytes of the file."""
        return self._reader.read(self, length, position)

    def page(self, part: int, element: int) -> tuple[memoryview, int]:
        """The verified page that holds an element, as words, and the number of the page's first element."""
        where = self.trailer.parts[part]
        number = footer.page_of(part, element)
        position, length, first = footer.page_span(where, part, number)
        key = (self.generation, position)
        page = self._reader.pages.get(key)
        if page is None:
            page = self._decode(self.read(length, position), part, number, position)
            self._reader.pages.put(key, page)
        return page, first

    def element(self, part: int, i: int) -> list[int]:
        """The words of element ``i`` of a part."""
        page, first = self.page(part, i)
        words = ELEMENT_BYTES[part] >> 3
        return page[words * (i - first) : words * (i - first + 1)].tolist()

    def word(self, part: int, i: int, field: int) -> int:
        """One word of element ``i``."""
        page, first = self.page(part, i)
        return page[(ELEMENT_BYTES[part] >> 3) * (i - first) + field]

    def slices(self, part: int, first: int, count: int) -> Iterator[memoryview]:
        """The words of ``count`` elements from ``first`` on, some pages at a time, each page verified, the cache left alone."""
        where = self.trailer.parts[part]
        words = ELEMENT_BYTES[part] >> 3
        stop = first + count
        while first < stop:
            number = footer.page_of(part, first)
            last = min(footer.page_of(part, stop - 1), number + _PAGES_AT_ONCE - 1)
            position = footer.page_span(where, part, number)[0]
            start, length, _ = footer.page_span(where, part, last)
            data = self.read(start + length - position, position)
            for page in range(number, last + 1):
                start, length, page_first = footer.page_span(where, part, page)
                found = self._decode(data[start - position : start - position + length], part, page, start)
                end = min(stop - page_first, len(found) // words)
                yield found[words * (first - page_first) : words * end]
                first = page_first + end

    def _decode(self, data: bytes, part: int, number: int, position: int) -> memoryview:
        try:
            return footer.decode_page(data, part, number, self.trailer.own_chain)
        except CorruptLog as error:
            raise CorruptLog(f"{self._reader.directory}/{self.name}, byte {position}: {error}") from error

    def part(self, part: int) -> memoryview:
        """All words of a part."""
        words = bytearray()
        for found in self.slices(part, 0, self.trailer.parts[part].count):
            words += found.cast("B")
        return memoryview(words).cast("q")

    # -- partitions -----------------------------------------------------------------------------------------------
    def partition(self, uid: int) -> PartitionEnd | None:
        """What the directory says of a partition; ``None`` when it did not exist."""
        total = self.trailer.parts[DIRECTORY].count
        i = bisect_left(range(total), uid, key=lambda i: self.word(DIRECTORY, i, 0))
        if i == total:
            return None
        end = PartitionEnd(*self.element(DIRECTORY, i))
        return end if end.uid == uid else None

    def directory(self) -> list[PartitionEnd]:
        """The whole directory."""
        words = self.part(DIRECTORY).tolist()
        return [PartitionEnd(*words[i : i + 6]) for i in range(0, len(words), 6)]

    # -- entries --------------------------------------------------------------------------------------------------
    def position_of(self, index: int) -> int:
        """Position of the frame of an entry; ``frames_end`` for the index after the last. Raises ``LookupError``."""
        t = self.trailer
        if t.compacted or not t.last_index or not t.first_index <= index <= t.last_index + 1:
            raise LookupError(f"entry {index} is not in segment {self.segment_id}")
        return t.frames_end if index > t.last_index else self.word(BLOCKS, index - t.first_index, 1)

    def terms(self) -> list[tuple[int, int]]:
        """(first index, term) of each change of term."""
        t = self.trailer
        if t.first_term == t.last_term:  # nearly always, and then the file need not be touched
            return [(t.first_index, t.first_term)] if t.last_index else []
        words = self.part(TERMS).tolist()
        return list(zip(words[::2], words[1::2], strict=True))


class PagedRuns:
    """The runs of one partition in a sealed segment (``RunTable``)."""

    __slots__ = ("_first", "_segment", "count")

    def __init__(self, segment: SealedSegment, first: int, count: int) -> None:
        self._segment = segment
        self._first = first
        self.count = count

    def word(self, i: int, field: int) -> int:
        """See ``RunTable.word``."""
        return self._segment.word(RUNS, self._first + i, field)

    def entry(self, i: int) -> RunEntry:
        """See ``RunTable.entry``."""
        return RunEntry(*self._segment.element(RUNS, self._first + i))
