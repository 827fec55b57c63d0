"""A disk that keeps only what was synced, and not even that for ever.

One file of frames, each with a checksum chained to the frame before it (RELIABILITY S-1), a record of term and vote, a snapshot
file that changes atomically, and the flags of the damage rule. Between a write and the end of its sync anything may survive a
crash: any subset of the frames, the last of them torn, the term and vote or not. A rotten frame is one that was synced and no
longer verifies; recovery cuts there, says so, and begins a new incarnation (R-16).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import attrs

from ayder.entries import EntryKind, HardState, LogEntry, LogIndex, Term
from ayder.raft.messages import Snapshot, SnapshotMeta

__all__ = ["Disk"]


@attrs.define(slots=True, eq=False)
class Frame:
    """One entry in the file."""

    entry: LogEntry
    before: int
    """Checksum of the frame before it when it was written."""
    checksum: int
    good: bool = True


def chain(before: int, entry: LogEntry) -> int:
    """The checksum of a frame."""
    return zlib.crc32(b"%d %d %d %d " % (entry.index, entry.term, entry.kind, entry.log_time_ms) + entry.payload, before)


class Disk:
    """Survives its node. Reading answers from what was synced (``LogView``)."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.base: tuple[LogIndex, Term] = (0, 0)
        self.entries: list[LogEntry] = []
        """The logical log behind ``base``, synced."""
        self.hard_state = HardState()
        self.snapshot: Snapshot | None = None
        self.incarnation = 0
        self.damaged = False
        self.rotten = False
        """Something was lost that had been synced: what this disk once acknowledged it may not hold now."""
        self.synced = 0
        """Frames whose sync returned."""
        self.failed = False
        """A sync failed: nothing may be promised any more (S-2)."""
        self._writing: tuple[list[Frame], HardState | None, Snapshot | None, bool] | None = None

    # -- LogView ------------------------------------------------------------------------------------------------------
    @property
    def first_index(self) -> LogIndex:
        return self.base[0] + 1

    @property
    def last_index(self) -> LogIndex:
        return self.base[0] + len(self.entries)

    def term_at(self, index: LogIndex) -> Term:
        if index == self.base[0]:
            return self.base[1]
        if not self.base[0] < index <= self.last_index:
            raise LookupError(index)
        return self.entries[index - self.base[0] - 1].term

    def read(self, first: LogIndex, last: LogIndex) -> list[LogEntry]:
        """Synced entries ``first`` to ``last``."""
        return self.entries[first - self.base[0] - 1 : last - self.base[0]]

    def holds(self, index: LogIndex, term: Term) -> bool:
        """Whether a synced copy of this entry is here (as itself or inside the snapshot)."""
        if self.snapshot is not None and index <= self.snapshot.meta.index:
            return True
        return self.base[0] < index <= self.last_index and self.term_at(index) == term

    # -- writing ------------------------------------------------------------------------------------------------------
    def write(self, entries: Sequence[LogEntry], hard_state: HardState | None, snapshot: Snapshot | None, repaired: bool) -> None:
        """Into the page cache; ``sync`` makes it last."""
        assert self._writing is None
        before = 0 if snapshot is not None or not self.frames else self.frames[-1].checksum
        frames = []
        for entry in entries:
            checksum = chain(before, entry)
            frames.append(Frame(entry, before, checksum))
            before = checksum
        self._writing = (frames, hard_state, snapshot, repaired)

    def sync(self) -> None:
        """What was written is on the disk."""
        assert self._writing is not None
        frames, hard_state, snapshot, repaired = self._writing
        self._writing = None
        if hard_state is not None:
            self.hard_state = hard_state
        if snapshot is not None:
            self.install(snapshot)
        self.frames += frames
        for frame in frames:
            self._place(frame.entry)
        self.synced = len(self.frames)
        if repaired:
            self.damaged = self.rotten = False

    def forget_write(self, rng: random.Random) -> None:
        """The sync failed: the pages are marked clean, some reached the disk."""
        assert self._writing is not None
        frames, _, _, _ = self._writing
        self._writing = None
        self.failed = True
        self.frames += [frame for frame in frames if rng.random() < 0.3]

    def _place(self, entry: LogEntry) -> None:
        position = entry.index - self.base[0] - 1
        if position < 0:
            return
        assert position <= len(self.entries), ("a gap in the log", entry, self.last_index)
        del self.entries[position:]
        self.entries.append(entry)

    def install(self, snapshot: Snapshot) -> None:
        """A snapshot replaces everything."""
        self.snapshot = snapshot
        self.base = (snapshot.meta.index, snapshot.meta.term)
        self.entries.clear()
        self.frames.clear()
        self.synced = 0

    def checkpoint(self, snapshot: Snapshot, keep_behind: int) -> None:
        """A snapshot of our own; the log before it goes, but for some entries kept for followers."""
        self.snapshot = snapshot
        cut = min(snapshot.meta.index - keep_behind, self.last_index)
        if cut <= self.base[0]:
            return
        term = self.term_at(cut)
        self.entries = self.entries[cut - self.base[0] :]
        self.base = (cut, term)
        before = 0
        pending = self._writing[0] if self._writing else []
        self.frames = []
        for entry in self.entries:
            frame = Frame(entry, before, chain(before, entry))
            before = frame.checksum
            self.frames.append(frame)
        self.synced = len(self.frames)
        for frame in pending:
            frame.before, frame.checksum = before, chain(before, frame.entry)
            before = frame.checksum

    # -- losing -------------------------------------------------------------------------------------------------------
    def power_cut(self, rng: random.Random, *, torn: bool, rot: bool) -> None:
        """The node is gone: of an unfinished write any part may be there. With ``rot`` a synced frame no longer verifies."""
        if self._writing is not None:
            frames, hard_state, _, _ = self._writing
            self._writing = None
            share = rng.choice((0.0, 0.5, 0.9, 1.0))
            survivors = [frame for frame in frames if rng.random() < share]
            if survivors and torn and rng.random() < 0.5:
                survivors[-1].good = False
            self.frames += survivors
            if hard_state is not None and rng.random() < 0.5:
                self.hard_state = hard_state
        if rot and self.synced:
            self.frames[rng.randrange(self.synced)].good = False
        self.failed = False
        self.recover()

    def recover(self) -> None:
        """Follow the chain from the start; what comes after its first break is cut."""
        self.entries.clear()
        before, kept = 0, 0
        for frame in self.frames:
            if not self.accepts(frame, before):
                break
            self._place(frame.entry)
            before, kept = frame.checksum, kept + 1
        if kept < self.synced:
            self.found_damage()
        del self.frames[kept:]
        self.synced = kept
        if self.snapshot is not None and self.last_index < self.snapshot.meta.index:
            self.install(self.snapshot)

    def accepts(self, frame: Frame, before: int) -> bool:
        """Whether recovery believes this frame."""
        return frame.good and frame.before == before and frame.entry.index <= self.last_index + 1

    def found_damage(self) -> None:
        """Bytes that had been synced do not verify."""
        self.rotten = self.damaged = True
        self.incarnation += 1

    def core_arguments(self) -> dict[str, Any]:
        """What a restarting node reads from its disk."""
        from ayder.raft.membership import Membership

        memberships = [
            (entry.index, Membership.decode(entry.payload)) for entry in self.entries if entry.kind is EntryKind.MEMBERSHIP
        ]
        meta: SnapshotMeta | None = self.snapshot.meta if self.snapshot else None
        return {
            "log": self,
            "snapshot": meta,
            "memberships": memberships,
            "incarnation": self.incarnation,
            "damaged": self.damaged,
        }
