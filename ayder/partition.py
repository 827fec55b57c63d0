"""One partition as the state machine sees it: offsets, what is retained, and which idempotency keys it has seen.

Owns: offset assignment, the log start, the byte counters, the idempotency window. Must not know: where a run lies on disk
(the store's offset index), who asked, what time it is (the caller passes log time).

Invariants: ``log_start_offset <= next_offset``; offsets are assigned 0, 1, 2, … without gaps (P-1); neither counter ever goes
back; eviction from the window depends on the log alone, so every node forgets the same keys (I-2).
"""

from __future__ import annotations

from collections import OrderedDict

import attrs
import msgspec

__all__ = ["IdempotencyWindow", "Partition", "Seen"]


class Seen(msgspec.Struct, array_like=True, frozen=True):
    """The first use of an idempotency key: what a duplicate is answered with."""

    base_offset: int
    count: int
    digest: bytes
    log_index: int
    log_time_ms: int
    parts: tuple[tuple[int, int], ...] = ()
    """For a batch over several partitions: base offset and count of each of its runs."""


@attrs.define(slots=True, eq=False)
class IdempotencyWindow:
    """The keys of the last ``entries`` idempotent requests, none older than ``window_ms`` of log time (I-2).

    The full key and a 128-bit digest of the body are kept: no identity by hash (I-1).
    """

    entries: int
    window_ms: int
    seen: dict[bytes, Seen] = attrs.field(factory=dict)
    """In order of first use: the oldest is the first to go. A plain ``dict`` would search for it through all that went before."""

    def find(self, key: bytes, now_ms: int) -> Seen | None:
        """The first use of ``key``, if it is still inside the window at log time ``now_ms``."""
        found = self.seen.get(key)
        return None if found is None or found.log_time_ms < now_ms - self.window_ms else found

    def add(self, key: bytes, first: Seen) -> None:
        """Remember a first use and forget what has left the window."""
        seen = self.seen
        if not isinstance(seen, OrderedDict):  # made late: most partitions never see a key
            seen = self.seen = OrderedDict(seen)
        seen.pop(key, None)
        seen[key] = first
        horizon = first.log_time_ms - self.window_ms
        while len(seen) > self.entries or next(iter(seen.values())).log_time_ms < horizon:
            seen.popitem(last=False)


@attrs.define(slots=True, eq=False)
class Partition:
    """Counters of one partition. ``bytes_*`` count values and keys ever taken, so differences weigh any range."""

    uid: int
    window: IdempotencyWindow
    next_offset: int = 0
    log_start_offset: int = 0
    bytes_taken: int = 0
    bytes_before_start: int = 0

    def append(self, count: int, record_bytes: int) -> tuple[int, int]:
        """Take a run: returns its base offset and the bytes taken before it."""
        assert count > 0 and record_bytes >= 0, (count, record_bytes)
        base, before = self.next_offset, self.bytes_taken
        self.next_offset = base + count
        self.bytes_taken = before + record_bytes
        return base, before

    def trim(self, log_start_offset: int, bytes_before: int) -> tuple[int, int]:
        """Move the log start up (never down, never beyond the end); returns how many records and bytes went."""
        target = min(log_start_offset, self.next_offset)
        gone = target - self.log_start_offset
        if gone <= 0:
            return 0, 0
        before = self.bytes_before_start
        self.log_start_offset = target
        self.bytes_before_start = max(before, min(bytes_before, self.bytes_taken))
        return gone, self.bytes_before_start - before

    @property
    def retained_bytes(self) -> int:
        """Values and keys still readable."""
        return self.bytes_taken - self.bytes_before_start

    def __repr__(self) -> str:
        return (
            f"Partition({self.uid >> 16}/{self.uid & 0xFFFF} {self.log_start_offset}..{self.next_offset} {self.retained_bytes} B)"
        )
