"""Where runs lie: packed entries of one partition in one segment, in memory or in a footer, and the bisections over them.

Owns: the 48-byte entry and the look-up rules by offset, time and bytes inside one segment. Must not know: files, segments.

A table of packed entries is read with ``unpack_from``, never through a memoryview kept over a bytecode: the event loop appends to
the same bytearray while worker threads bisect it, and an exported buffer would make that append fail.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from typing import Protocol

from ayder.storage.interface import RunEntry

__all__ = ["RUN_ENTRY_BYTES", "PackedRuns", "RunTable", "first_after", "first_at_time", "last_at_bytes", "pack_entry"]

_ENTRY = struct.Struct("<6q")
_WORD = struct.Struct("<q")
RUN_ENTRY_BYTES = _ENTRY.size
_pack = _ENTRY.pack

BASE_OFFSET, COUNT, BYTES_BEFORE, LOG_TIME_MS, POSITION, LENGTH = range(6)


def pack_entry(entry: RunEntry) -> bytes:
    """The entry as it stands in memory and in a footer."""
    return _pack(*entry)


class RunTable(Protocol):
    """The runs of one partition in one segment, in offset order."""

    @property
    def count(self) -> int:
        """How many."""
        ...

    def word(self, i: int, field: int) -> int:
        """One field of entry ``i``, counted as in ``RunEntry``."""
        ...

    def entry(self, i: int) -> RunEntry:
        """Entry ``i``."""
        ...


class PackedRuns:
    """A table over packed entries in memory, as long as it was when the table was made."""

    __slots__ = ("_packed", "count")

    def __init__(self, packed: bytearray | bytes) -> None:
        self._packed = packed
        self.count = len(packed) // RUN_ENTRY_BYTES

    def word(self, i: int, field: int) -> int:
        """See ``RunTable.word``."""
        value: int = _WORD.unpack_from(self._packed, RUN_ENTRY_BYTES * i + 8 * field)[0]
        return value

    def entry(self, i: int) -> RunEntry:
        """See ``RunTable.entry``."""
        return RunEntry(*_ENTRY.unpack_from(self._packed, RUN_ENTRY_BYTES * i))


def first_after(table: RunTable, offset: int) -> int:
    """Number of the run that holds ``offset``, or of the first after it; ``count`` when there is none."""
    word = table.word
    return bisect_right(range(table.count), offset, key=lambda i: word(i, BASE_OFFSET) + word(i, COUNT))


def first_at_time(table: RunTable, time_ms: int) -> int:
    """Number of the first run with a log time >= ``time_ms``; ``count`` when all are older."""
    return bisect_left(range(table.count), time_ms, key=lambda i: table.word(i, LOG_TIME_MS))


def last_at_bytes(table: RunTable, bytes_before: int) -> int:
    """Number of the last run whose ``bytes_before`` is <= the given one; -1 when there is none."""
    return bisect_right(range(table.count), bytes_before, key=lambda i: table.word(i, BYTES_BEFORE)) - 1
