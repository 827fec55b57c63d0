"""Raft's nouns: terms, indexes, log entries, the state a node must never forget.

Owns: the values that consensus, storage and driver exchange. Must not know: what is inside a payload.
Source: Raft (extended version) figure 2; thesis section 3.
"""

from __future__ import annotations

import enum

import attrs

__all__ = ["EntryKind", "HardState", "LogEntry", "LogIndex", "NodeId", "Placement", "Term"]

NodeId = str
Term = int
LogIndex = int
"""Position of an entry in the log; the first entry is 1, 0 means "before the log"."""


class EntryKind(enum.IntEnum):
    """What an entry's payload is. The numbers are on disk."""

    BLOCK = 1
    """Commands for the state machine (``commands.py``)."""
    NOOP = 2
    """A new leader's first entry, empty; committing it commits everything before it (thesis 6.4)."""
    MEMBERSHIP = 3
    """A configuration of the cluster (thesis 4)."""


@attrs.frozen(slots=True)
class LogEntry:
    """One entry. ``log_time_ms`` is stamped by the leader and never decreases along the log."""

    index: LogIndex
    term: Term
    kind: EntryKind
    log_time_ms: int
    payload: bytes


@attrs.frozen(slots=True)
class HardState:
    """What must be on disk before any message that depends on it leaves (thesis 3.8)."""

    term: Term = 0
    voted_for: NodeId | None = None


@attrs.frozen(slots=True)
class Placement:
    """Where the payload of an appended entry lies: byte ``position`` of the file of segment ``segment_id``."""

    segment_id: int
    position: int
