"""The log as consensus sees it: what is on disk, what is on its way there, and what only memory holds yet.

Owns: the unwritten tail, the recent entries kept for followers, the conflict check, the persisted and the commit index. Must not
know: terms other than those of entries, roles, peers, what a payload means. Entry bytes on disk are never read here; only the
terms of entries are, and those answer from memory.

    first_index ........ persisted_index ........ handed out ........ last_index
    |--- on disk -------------||--- being written ----||--- waits for the next append ---|

Invariants: ``commit_index <= last_index`` and never falls; ``persisted_index <= handed out <= last_index``; every entry above
``persisted_index`` is in memory; nothing at or below ``commit_index`` is ever truncated; terms never decrease along the log.
Source: paper figure 2 (AppendEntries), thesis 3.5, 5.1 (snapshots).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ayder.entries import HardState, LogEntry, LogIndex, Term
from ayder.raft.messages import SnapshotMeta

__all__ = ["LogView", "RaftLog"]


class LogView(Protocol):
    """What consensus asks of the log on disk; answers come from memory."""

    @property
    def first_index(self) -> LogIndex:
        """The oldest index on disk; ``last_index + 1`` when there is none."""
        ...

    @property
    def last_index(self) -> LogIndex:
        """The newest index on disk."""
        ...

    @property
    def hard_state(self) -> HardState:
        """Term and vote on disk."""
        ...

    def term_at(self, index: LogIndex) -> Term:
        """The term of an entry on disk. Raises ``LookupError`` when it is not there."""
        ...


class RaftLog:
    """See the module header. ``snapshot`` is the newest one on disk; a log that does not reach it begins behind it."""

    def __init__(self, view: LogView, snapshot: SnapshotMeta | None, cache_bytes: int) -> None:
        self._view = view
        self._boundary = (snapshot.index, snapshot.term) if snapshot else (0, 0)
        """An entry whose term is known though it may be gone: the snapshot's last."""
        behind = snapshot is not None and snapshot.index > view.last_index
        self._floor: LogIndex = self._boundary[0] + 1 if behind else 0
        self.last_index: LogIndex = self._boundary[0] if behind else view.last_index
        self.last_term: Term = self._boundary[1] if behind else view.term_at(view.last_index)
        self.persisted_index: LogIndex = self.last_index
        self.commit_index: LogIndex = self._boundary[0]
        self.cache_bytes = cache_bytes
        self._handed: LogIndex = self.last_index
        self._flight_last: LogIndex = self.last_index
        """The last entry of the open append that the log still wants."""
        self._recent: dict[LogIndex, LogEntry] = {}
        self._recent_first: LogIndex = self.last_index + 1
        self._recent_bytes = 0

    # -- reading --------------------------------------------------------------------------------------------------
    @property
    def first_index(self) -> LogIndex:
        """The oldest entry that a follower can still be given."""
        return max(self._view.first_index, self._floor)

    @property
    def unwritten(self) -> bool:
        """Whether there are entries that no append has taken yet."""
        return self._handed < self.last_index

    def term_at(self, index: LogIndex) -> Term | None:
        """The term of an entry, ``None`` when it is gone or not there yet."""
        recent = self._recent.get(index)
        if recent is not None:
            return recent.term
        if index == self._boundary[0]:
            return self._boundary[1]
        if index > self.last_index or index < self._floor:
            return None
        try:
            return self._view.term_at(index)
        except LookupError:
            return None

    def matches(self, index: LogIndex, term: Term) -> bool:
        """Whether the log holds this entry (two entries with one index and term are one entry: log matching)."""
        return self.term_at(index) == term

    def is_up_to_date(self, last_index: LogIndex, last_term: Term) -> bool:
        """Whether a log that ends there holds at least what this one does (paper 5.4.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def last_not_after(self, limit: LogIndex, term: Term) -> tuple[LogIndex, Term]:
        """The last entry at or before ``limit`` whose term is at most ``term``: terms are sorted, so bisect."""
        low, high = max(self.first_index - 1, 0), min(limit, self.last_index)
        while low < high:
            middle = (low + high + 1) // 2
            if (self.term_at(middle) or 0) <= term:
                low = middle
            else:
                high = middle - 1
        return low, self.term_at(low) or 0

    def recent(self, first: LogIndex, *, max_entries: int, max_bytes: int) -> tuple[LogEntry, ...] | None:
        """Entries from ``first`` on, at least one, if memory has them; ``None`` when they must be read from disk."""
        if first < self._recent_first:
            return None
        found: list[LogEntry] = []
        size = 0
        for index in range(first, min(self.last_index, first + max_entries - 1) + 1):
            entry = self._recent[index]
            size += len(entry.payload)
            if found and size > max_bytes:
                break
            found.append(entry)
        return tuple(found)

    # -- growing --------------------------------------------------------------------------------------------------
    def append(self, entries: Sequence[LogEntry]) -> None:
        """Put entries at the end."""
        for entry in entries:
            assert entry.index == self.last_index + 1 and entry.term >= self.last_term, (entry, self.last_index, self.last_term)
            self._recent[entry.index] = entry
            self._recent_bytes += len(entry.payload)
            self.last_index, self.last_term = entry.index, entry.term

    def accept(self, prev_index: LogIndex, entries: Sequence[LogEntry]) -> tuple[LogIndex | None, Sequence[LogEntry]]:
        """Take over a leader's entries behind a matching ``prev_index``: skip what is there, replace what conflicts.

        Returns the first index that was truncated, if any, and the entries that are new.
        """
        for position, entry in enumerate(entries):
            if entry.index <= self.commit_index:
                continue
            if not self.matches(entry.index, entry.term):
                truncated = entry.index if entry.index <= self.last_index else None
                if truncated is not None:
                    self.truncate(truncated)
                fresh = entries[position:]
                self.append(fresh)
                return truncated, fresh
        return None, ()

    def truncate(self, first_gone: LogIndex) -> None:
        """Forget the suffix from ``first_gone`` on. The next append replaces it on disk."""
        assert self.commit_index < first_gone <= self.last_index, (first_gone, self.commit_index, self.last_index)
        last = first_gone - 1
        term = self.term_at(last)
        assert term is not None, (first_gone, self.first_index)
        for index in range(max(first_gone, self._recent_first), self.last_index + 1):
            self._recent_bytes -= len(self._recent.pop(index).payload)
        self._recent_first = min(self._recent_first, first_gone)
        self.last_index, self.last_term = last, term
        self.persisted_index = min(self.persisted_index, last)
        self._handed = min(self._handed, last)
        self._flight_last = min(self._flight_last, last)

    def restore(self, meta: SnapshotMeta) -> None:
        """A snapshot replaces the whole log. On disk it does so with the next append."""
        assert meta.index > self.commit_index, (meta, self.commit_index)
        self.persisted_index = min(self.persisted_index, self.commit_index)
        self._flight_last = self.persisted_index
        self._recent.clear()
        self._recent_bytes = 0
        self._boundary = (meta.index, meta.term)
        self._floor = self._recent_first = meta.index + 1
        self.last_index, self.last_term = meta.index, meta.term
        self.commit_index = self._handed = meta.index

    def commit_to(self, index: LogIndex) -> None:
        """Entries up to here are committed; an older value changes nothing."""
        assert index <= self.last_index, (index, self.last_index)
        self.commit_index = max(self.commit_index, index)

    # -- durability -----------------------------------------------------------------------------------------------
    def take(self) -> tuple[LogEntry, ...]:
        """Hand out what no append has taken yet."""
        entries = tuple(self._recent[index] for index in range(self._handed + 1, self.last_index + 1))
        self._handed = self._flight_last = self.last_index
        return entries

    def written(self) -> None:
        """The open append returned: what it held and the log still wants is on disk."""
        self.persisted_index = max(self.persisted_index, self._flight_last)
        self._shrink()

    def put_back(self) -> None:
        """The open append wrote nothing: hand the same entries out again."""
        self._handed = self._flight_last = max(self.persisted_index, self._recent_first - 1)

    def forget_unwritten(self, first_gone: LogIndex) -> None:
        """The open append wrote nothing and nobody else holds its entries: they never were."""
        self._handed = self._flight_last = min(self._handed, first_gone - 1)
        self.truncate(first_gone)

    def _shrink(self) -> None:
        """Keep as many recent entries as the budget allows; the unwritten ones always."""
        while self._recent_bytes > self.cache_bytes and self._recent_first <= self.persisted_index:
            self._recent_bytes -= len(self._recent.pop(self._recent_first).payload)
            self._recent_first += 1

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the state is one that no run may reach."""
        assert self.persisted_index <= self._handed <= self.last_index, self
        assert self.commit_index <= self.last_index, self
        assert self._recent_first <= self._handed + 1, self
        assert list(self._recent) == list(range(self._recent_first, self.last_index + 1)), self
        terms = [entry.term for entry in self._recent.values()]
        assert terms == sorted(terms) and (not terms or terms[-1] == self.last_term), self

    def __repr__(self) -> str:
        return (
            f"RaftLog(first={self.first_index} persisted={self.persisted_index} handed={self._handed}"
            f" last={self.last_index}@{self.last_term} commit={self.commit_index})"
        )
