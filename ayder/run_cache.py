"""Runs kept in memory: the newest of every partition, and those lately read from disk.

Owns: the byte budget and who goes first. Must not know: files, pages, waiters. Two of them stand side by side, one filled by
apply (the tail) and one by cold reads, so that a reader of old history does not push out what everyone else reads.

Invariants: ``size_bytes <= budget_bytes`` after every call unless one run alone is larger; per partition ``bases`` is sorted
and holds exactly the bases of the cached runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict

from ayder.runs import Run

__all__ = ["CachedRun", "RunCache"]

_OVERHEAD_BYTES = 400
"""What a cached run costs beside its bytes: the object, its places in the tables."""


class CachedRun:
    """One run at its offsets; the bytes are cut out of the block when somebody first reads them."""

    __slots__ = ("_run", "base_offset", "count", "length", "log_time_ms", "payload", "start")

    def __init__(self, base_offset: int, count: int, log_time_ms: int, payload: bytes, start: int, length: int) -> None:
        self.base_offset = base_offset
        self.count = count
        self.log_time_ms = log_time_ms
        self.payload = payload
        self.start = start
        self.length = length
        self._run: Run | None = None

    @property
    def run(self) -> Run:
        """The run, its header read."""
        if self._run is None:
            self.payload = self.payload[self.start : self.start + self.length]  # the block may go when its last run was cut out
            self.start = 0
            self._run = Run(self.payload)
        return self._run

    @property
    def end_offset(self) -> int:
        """The offset after the last record."""
        return self.base_offset + self.count


class RunCache:
    """Least recently added goes first; a hit of ``find`` with ``touch`` counts as added."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._runs: OrderedDict[tuple[int, int], CachedRun] = OrderedDict()
        self._bases: dict[int, list[int]] = {}
        self.size_bytes = 0

    def add(self, uid: int, cached: CachedRun) -> None:
        """Keep a run; older ones may go. Of two that begin at one offset the longer stays."""
        key = (uid, cached.base_offset)
        known = self._runs.get(key)
        if known is not None:
            if known.count >= cached.count:
                return
            self._drop(key)
        self._runs[key] = cached
        bases = self._bases.setdefault(uid, [])
        if not bases or bases[-1] < cached.base_offset:
            bases.append(cached.base_offset)
        else:
            bases.insert(bisect_left(bases, cached.base_offset), cached.base_offset)
        self.size_bytes += cached.length + _OVERHEAD_BYTES
        while self.size_bytes > self._budget_bytes and len(self._runs) > 1:
            self._drop(next(iter(self._runs)))

    def find(self, uid: int, offset: int, *, touch: bool = False) -> CachedRun | None:
        """The cached run that holds ``offset``."""
        bases = self._bases.get(uid)
        if not bases:
            return None
        at = bisect_right(bases, offset) - 1
        if at < 0:
            return None
        key = (uid, bases[at])
        cached = self._runs[key]
        if offset >= cached.base_offset + cached.count:
            return None
        if touch:
            self._runs.move_to_end(key)
        return cached

    def forget(self, uid: int) -> None:
        """The partition is gone."""
        for base in list(self._bases.get(uid, ())):
            self._drop((uid, base))

    def _drop(self, key: tuple[int, int]) -> None:
        cached = self._runs.pop(key)
        self.size_bytes -= cached.length + _OVERHEAD_BYTES
        uid, base = key
        bases = self._bases[uid]
        del bases[bisect_left(bases, base)]
        if not bases:
            del self._bases[uid]
