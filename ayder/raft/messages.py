"""What voters and learners say to one another: one frozen class per RPC and per answer.

Owns: the fields and their meaning. Must not know: how they look on the wire, or when they are sent.

Every message carries its sender and a term. For all but a pre-vote that is the sender's current term, so that a receiver can
tell old news from new by comparing one number; the two exceptions are said at ``RequestVote`` and ``VoteReply``. Answers of a
follower carry its ``incarnation`` and whether its disk is ``damaged`` (the damage rule, R-16).
Source: paper figures 2 and 13; thesis 3.10 (TimeoutNow), 6.4 (rounds of heartbeats), 9.6 (pre-vote).
"""

from __future__ import annotations

from typing import NamedTuple

import attrs

from ayder.entries import LogEntry, LogIndex, NodeId, Term
from ayder.raft.membership import Membership

__all__ = [
    "AppendEntries", "AppendReply", "Barrier", "Heartbeat", "HeartbeatReply", "InstallSnapshot", "Message", "Outbound",
    "RequestVote", "Snapshot", "SnapshotMeta", "TimeoutNow", "VoteReply",
]  # fmt: skip


@attrs.frozen(slots=True)
class RequestVote:
    """Stand for election in ``term``; with ``pre_vote``, ask whether that would succeed (the sender's own term is one less)."""

    term: Term
    sender: NodeId
    last_index: LogIndex
    last_term: Term
    pre_vote: bool = False
    transfer: bool = False
    """The leader asked for this election: its followers need not wait until they miss it."""


@attrs.frozen(slots=True)
class VoteReply:
    """A granted pre-vote carries the asker's own term (it says nothing newer is known); a refused one the refuser's (R-11)."""

    term: Term
    sender: NodeId
    poll_term: Term
    """The term of the request this answers."""
    granted: bool
    pre_vote: bool = False


@attrs.frozen(slots=True)
class Barrier:
    """Up to where a damaged node must be verified and synced, in the term of the message that carries it, to vote again."""

    incarnation: int
    index: LogIndex


@attrs.frozen(slots=True)
class AppendEntries:
    """Entries that follow (``prev_index``, ``prev_term``); without entries it verifies or tells the commit index."""

    term: Term
    sender: NodeId
    prev_index: LogIndex
    prev_term: Term
    entries: tuple[LogEntry, ...]
    commit_index: LogIndex
    barrier: Barrier | None = None


@attrs.frozen(slots=True)
class AppendReply:
    """Accepted: the sender's log equals the leader's up to ``index`` and is synced there. Refused: ``index`` is the
    ``prev_index`` that did not match, the hint the place to go back to (thesis 3.5: one round a term, not one an entry)."""

    term: Term
    sender: NodeId
    accepted: bool
    index: LogIndex
    hint_index: LogIndex = 0
    hint_term: Term = 0
    incarnation: int = 0
    damaged: bool = False


@attrs.frozen(slots=True)
class Heartbeat:
    """The leader shows itself. ``round`` is echoed: a majority of echoes proves it still led when that round began."""

    term: Term
    sender: NodeId
    commit_index: LogIndex
    round: int


@attrs.frozen(slots=True)
class HeartbeatReply:
    """``verified_index``: up to where this leader has verified the sender's log in this term, and it is synced."""

    term: Term
    sender: NodeId
    round: int
    verified_index: LogIndex
    incarnation: int = 0
    damaged: bool = False


@attrs.frozen(slots=True)
class SnapshotMeta:
    """What a snapshot stands for: everything up to ``index`` applied, and the configuration in force there."""

    index: LogIndex
    term: Term
    membership: Membership
    log_time_ms: int = 0


@attrs.frozen(slots=True)
class Snapshot:
    """A snapshot to install. ``data`` is opaque here: the state, or whatever tells the driver where it lies."""

    meta: SnapshotMeta
    data: bytes


@attrs.frozen(slots=True)
class InstallSnapshot:
    """The follower needs entries that are gone: here is the state instead. Answered by an ``AppendReply``."""

    term: Term
    sender: NodeId
    snapshot: Snapshot


@attrs.frozen(slots=True)
class TimeoutNow:
    """The leader hands over: stand for election at once."""

    term: Term
    sender: NodeId


Message = RequestVote | VoteReply | AppendEntries | AppendReply | Heartbeat | HeartbeatReply | InstallSnapshot | TimeoutNow


class Outbound(NamedTuple):
    """A message and where it goes."""

    to: NodeId
    message: Message
