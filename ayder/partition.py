"""One partition as the state machine sees it: offsets, what is retained, and which idempotency keys it has seen.

Owns: offset assignment, the log start, the byte counters, the idempotency window. Must not know: where a run lies on disk
(the store's offset index), who asked, what time it is (the caller passes log time).

Invariants: ``log_start_offset <= next_offset``; offsets are assigned 0, 1, 2, … without gaps (P-1); neither counter ever goes
back; eviction from the window depends on the log alone, so every node forgets the same keys (I-2).
"""

from __future__ import annotations

from itertools import islice

import attrs
import msgspec

__all__ = ["IdempotencyWindow", "Partition", "Seen"]


class Seen(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The first use of an idempotency key: what a duplicate is answered with. A million of them must not slow the collector."""

    base_offset: int
    count: int
    digest: bytes
    log_index: int
    log_time_ms: int
    parts: tuple[tuple[int, int], ...] = ()
    """For a batch over several partitions: base offset and count of each of its runs."""


class IdempotencyWindow:
    """The keys of the last ``entries`` idempotent requests, none older than ``window_ms`` of log time (I-2).

    The full key and a 128-bit digest of the body are kept: no identity by hash (I-1).

    Keys lie in generations, oldest first. Only the oldest, which is being emptied, and the newest, which is being filled, ever
    change; a capture of the state shares the others, so that it costs no work per key (``generations``).
    """

    __slots__ = ("_count", "_generation_entries", "_leaving", "_newest", "_order", "_settled", "entries", "window_ms")

    def __init__(self, entries: int, window_ms: int, seen: dict[bytes, Seen] | None = None) -> None:
        """``seen``: what it holds already, oldest first."""
        self.entries = entries
        self.window_ms = window_ms
        self._generation_entries = max(entries // 8, 1)
        self._leaving: dict[bytes, Seen] = {}
        self._order: list[bytes] = []
        """Keys of ``_leaving``, the oldest last. A ``dict`` alone would search for it through all that went before."""
        self._settled: tuple[dict[bytes, Seen], ...] = ()
        self._newest: dict[bytes, Seen] = {}
        self._count = len(seen or ())
        items = iter((seen or {}).items())
        while generation := dict(islice(items, self._generation_entries)):
            self._settled += (generation,)

    def __len__(self) -> int:
        return self._count

    def generations(self) -> tuple[dict[bytes, Seen], ...]:
        """All keys with their first use, in order of first use; what is handed out never changes."""
        if not self._count:
            return ()
        if self._count == len(self._newest):
            return (self._newest.copy(),)
        return tuple(filter(None, (self._leaving.copy(), *self._settled, self._newest.copy())))

    def find(self, key: bytes, now_ms: int) -> Seen | None:
        """The first use of ``key``, if it is still inside the window at log time ``now_ms``."""
        found = self._newest.get(key) or self._leaving.get(key)
        if found is None:
            for generation in self._settled:
                if (found := generation.get(key)) is not None:
                    break
        return None if found is None or found.log_time_ms < now_ms - self.window_ms else found

    def add(self, key: bytes, first: Seen) -> None:
        """Remember a first use (``find`` gave none) and forget what has left the window."""
        horizon = first.log_time_ms - self.window_ms
        while self._count and (self._count >= self.entries or self._oldest().log_time_ms < horizon):
            self._forget_oldest()
        self._newest[key] = first
        self._count += 1
        if len(self._newest) >= self._generation_entries:
            self._settled += (self._newest,)
            self._newest = {}

    def _oldest(self) -> Seen:
        if not self._order:
            self._begin_generation()
        return self._leaving[self._order[-1]]

    def _forget_oldest(self) -> None:
        if not self._order:
            self._begin_generation()
        del self._leaving[self._order.pop()]
        self._count -= 1

    def _begin_generation(self) -> None:
        """The oldest generation is the next to be emptied: a copy, because a capture may share it."""
        if self._settled:
            self._leaving, self._settled = self._settled[0].copy(), self._settled[1:]
        else:
            self._leaving, self._newest = self._newest, {}
        self._order = list(self._leaving)
        self._order.reverse()


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
