"""The consensus module: terms, roles, votes, the log's growing end and its commit index.

Owns: who leads, which entries exist, which are committed. Must not know: disks, sockets, clocks, Trio, what a payload means.
Time is a count of ticks, the wall clock an argument, durability something the driver reports with ``persisted``.

How it is driven: ``tick``/``propose`` change state at once and leave work behind; ``take_ready`` hands out what must reach the
disk next (at most one hand-out is open at a time, ADR 0003); ``persisted`` says it did, and only then does this node count its
own vote or its own copy. Nothing here awaits, so each call is atomic with respect to every task.

Today the group has one voter: the elections and the commit rule are Raft's own, the messages to other voters come with them.

Invariants (``check_invariants``, R-1 … R-8): ``commit_index <= persisted_index <= last_index``; terms in the log never
decrease; a leader commits by counting only entries of its own term; term and vote are persisted before they count.
Source: Raft (extended version) figure 2; thesis 3.4 – 3.8, 6.4.
"""

from __future__ import annotations

import enum
from typing import Protocol

import attrs

from ayder.entries import EntryKind, HardState, LogEntry, LogIndex, NodeId, Term
from ayder.errors import AyderError, ErrorCode
from ayder.raft.quorum import committed_index, vote_won

__all__ = ["Consensus", "LogView", "Ready", "Role"]


class Role(enum.Enum):
    """The three roles of figure 4 of the paper."""

    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"


class LogView(Protocol):
    """What consensus asks of the log on disk; answers come from memory."""

    @property
    def last_index(self) -> LogIndex:
        """The newest index on disk."""
        ...

    @property
    def hard_state(self) -> HardState:
        """Term and vote on disk."""
        ...

    def term_at(self, index: LogIndex) -> Term:
        """The term of an entry on disk."""
        ...


@attrs.frozen(slots=True)
class Ready:
    """What must be on disk before anything that depends on it: entries in order, and term and vote when they changed."""

    entries: tuple[LogEntry, ...]
    hard_state: HardState | None


class Consensus:
    """One node's consensus state. All methods are sync; see the module header for the order of calls."""

    def __init__(self, *, node_id: NodeId, voters: tuple[NodeId, ...], log: LogView, election_ticks: int) -> None:
        assert node_id in voters and len(set(voters)) == len(voters), voters
        assert election_ticks > 0, election_ticks
        self.node_id = node_id
        self.voters = voters
        self._log = log
        self.role = Role.FOLLOWER
        self.current_term: Term = log.hard_state.term
        self.voted_for: NodeId | None = log.hard_state.voted_for
        self.leader_id: NodeId | None = None
        self.persisted_index: LogIndex = log.last_index
        self.last_index: LogIndex = log.last_index
        self.last_term: Term = log.term_at(log.last_index)
        self.commit_index: LogIndex = 0
        self.term_start_index: LogIndex = 0
        """While leading: the index of this term's first entry."""
        self._election_ticks = election_ticks
        self._ticks_waited = 0
        self._unstable: list[LogEntry] = []
        self._last_time_ms = 0
        self._hard_state_changed = False
        self._open: Ready | None = None
        self._granted: set[NodeId] = set()

    # -- inputs ---------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """One tick passed. A node that heard of no leader for an election timeout stands for election (thesis 3.4)."""
        if self.role is Role.LEADER or self._open is not None:
            return
        self._ticks_waited += 1
        if self._ticks_waited >= self._election_ticks:
            self.campaign()

    def campaign(self) -> None:
        """Stand for election: a new term, a vote for oneself, which counts once it is on disk."""
        assert self.role is not Role.LEADER, self
        self.role = Role.CANDIDATE
        self.current_term += 1
        self.voted_for = self.node_id
        self.leader_id = None
        self._granted = set()
        self._hard_state_changed = True
        self._ticks_waited = 0

    def propose(self, kind: EntryKind, payload: bytes, now_ms: int) -> LogEntry:
        """Append one entry to the leader's log. Raises ``AyderError`` (not_leader) elsewhere: it surely did not happen.

        ``now_ms`` is the wall clock; the entry's log time is that or, if the clock went back, the time of the entry before.
        """
        if self.role is not Role.LEADER:
            raise AyderError(ErrorCode.NOT_LEADER, "this node does not lead", leader_url=None)
        self._last_time_ms = max(self._last_time_ms, now_ms)
        entry = LogEntry(self.last_index + 1, self.current_term, kind, self._last_time_ms, payload)
        self._unstable.append(entry)
        self.last_index, self.last_term = entry.index, entry.term
        return entry

    def observe_log_time(self, log_time_ms: int) -> None:
        """An entry in the log carries this time: later ones will not carry less."""
        self._last_time_ms = max(self._last_time_ms, log_time_ms)

    # -- durability -----------------------------------------------------------------------------------------------
    def take_ready(self) -> Ready | None:
        """What to persist next, or ``None``. The caller answers with ``persisted`` or ``refused`` before it asks again."""
        assert self._open is None, "one append is in flight at a time"
        if not self._unstable and not self._hard_state_changed:
            return None
        state = HardState(self.current_term, self.voted_for) if self._hard_state_changed else None
        self._open = Ready(tuple(self._unstable), state)
        self._unstable.clear()
        self._hard_state_changed = False
        return self._open

    def persisted(self) -> None:
        """What ``take_ready`` handed out is on disk: count our copy and our vote."""
        ready = self._open
        assert ready is not None, "nothing was handed out"
        self._open = None
        if ready.entries:
            self.persisted_index = ready.entries[-1].index
        if ready.hard_state is not None and self.role is Role.CANDIDATE and ready.hard_state.term == self.current_term:
            self._granted.add(self.node_id)
            if vote_won(self.voters, self._granted):
                self._become_leader()
        self._advance_commit()

    def refused(self) -> None:
        """The disk had no room: nothing that was handed out was written, and nothing of it left this node.

        Only where this node is the whole group may a leader forget entries: no one else can hold them.
        """
        ready = self._open
        assert ready is not None and self.voters == (self.node_id,), self
        assert not self._unstable, "entries were proposed behind ones that were refused"
        self._open = None
        self._hard_state_changed = ready.hard_state is not None
        if ready.entries:
            self.last_index = ready.entries[0].index - 1
            self.last_term = self._log.term_at(self.last_index)
            if self.last_index < self.term_start_index:
                self.role, self.leader_id = Role.FOLLOWER, None

    # -- facts ----------------------------------------------------------------------------------------------------
    @property
    def may_serve_reads(self) -> bool:
        """Whether this node leads and has committed an entry of its term, so that its commit index is current (R-13)."""
        return self.role is Role.LEADER and self.commit_index >= self.term_start_index

    def _become_leader(self) -> None:
        self.role = Role.LEADER
        self.leader_id = self.node_id
        self.propose(EntryKind.NOOP, b"", self._last_time_ms)
        self.term_start_index = self.last_index

    def _advance_commit(self) -> None:
        if self.role is not Role.LEADER:
            return
        candidate = committed_index(self.voters, {self.node_id: self.persisted_index})
        if candidate >= self.term_start_index:  # only entries of one's own term are committed by counting (thesis 3.6.2)
            assert candidate >= self.commit_index, self
            self.commit_index = candidate

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the state is one that no run may reach."""
        assert self.commit_index <= self.persisted_index <= self.last_index, self
        assert self.role is not Role.LEADER or (self.voted_for, self.leader_id) == (self.node_id, self.node_id), self
        assert self.last_term <= self.current_term, self
        indexes = [entry.index for entry in self._unstable]
        assert indexes == list(range(self.last_index - len(indexes) + 1, self.last_index + 1)), self

    def __repr__(self) -> str:
        return (
            f"Consensus({self.node_id} {self.role.value} term={self.current_term} vote={self.voted_for}"
            f" last={self.last_index} persisted={self.persisted_index} commit={self.commit_index})"
        )
