"""What one node is to the group: its term and vote, its log and configuration, its role, and what it owes to disk and network.

Owns: the state, the facts others may ask for, and the hand-over of work (``Ready`` and messages). Must not know: the rules that
change it, which are ``consensus.py``; it was split off only so that either fits on a few pages.

Invariants: what ``take_ready`` handed out stays open until the owner closes it; a message that promises something waits for the
disk that keeps the promise (R-6). Source: paper figure 2; thesis 3.8.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import attrs

from ayder.entries import EntryKind, HardState, LogEntry, LogIndex, NodeId, Term
from ayder.raft.leader import Leader, ReadReady
from ayder.raft.membership import Membership, MembershipHistory
from ayder.raft.messages import Outbound, Snapshot, SnapshotMeta
from ayder.raft.progress import Limits
from ayder.raft.raft_log import LogView, RaftLog
from ayder.raft.repair import Repair

__all__ = ["NodeState", "Poll", "Ready", "Role"]


class Role(enum.Enum):
    """The three roles of figure 4 of the paper. A node that asks for pre-votes is still a follower."""

    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"


@attrs.frozen(slots=True)
class Ready:
    """What must be on disk, all of it in one append, before ``messages`` leave and anything that depends on it counts.

    Order: the snapshot (it replaces the whole log), entries (they replace any suffix from their first index on), term and vote,
    ``repaired`` (the damaged flag is cleared).
    """

    entries: tuple[LogEntry, ...] = ()
    hard_state: HardState | None = None
    snapshot: Snapshot | None = None
    repaired: bool = False
    messages: tuple[Outbound, ...] = ()

    @property
    def needs_write(self) -> bool:
        """Whether the disk is involved at all."""
        return bool(self.entries) or self.hard_state is not None or self.snapshot is not None or self.repaired


@attrs.define(slots=True, eq=False)
class Poll:
    """Votes for this node, real or preliminary, in one term. Sets, so that nobody counts twice (R-9)."""

    term: Term
    pre_vote: bool
    transfer: bool
    granted: set[NodeId] = attrs.field(factory=set)
    refused: set[NodeId] = attrs.field(factory=set)


def _no_spread(ticks: int) -> int:
    del ticks
    return 0


class NodeState:
    """One node's state. See ``consensus.py`` for the order of calls.

    ``voters`` are the founders, used until the log or a snapshot names a configuration. ``spread(n)`` draws from 0 to n - 1 and
    must be given to every group of more than one. ``snapshot`` is the newest on disk, ``memberships`` are the MEMBERSHIP
    entries in the log behind it. ``incarnation`` and ``damaged`` come from the disk's own record (R-16).
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        voters: tuple[NodeId, ...],
        log: LogView,
        election_ticks: int,
        heartbeat_ticks: int = 1,
        spread: Callable[[int], int] = _no_spread,
        snapshot: SnapshotMeta | None = None,
        memberships: Sequence[tuple[LogIndex, Membership]] = (),
        incarnation: int = 0,
        damaged: bool = False,
        limits: Limits | None = None,
    ) -> None:
        assert len(set(voters)) == len(voters), voters
        assert election_ticks > 0 and heartbeat_ticks > 0, (election_ticks, heartbeat_ticks)
        self.node_id = node_id
        self.limits = limits or Limits()
        self.log = RaftLog(log, snapshot, self.limits.cache_bytes)
        base = snapshot.membership if snapshot else Membership(voters=voters)
        self._memberships = MembershipHistory(base, snapshot.index if snapshot else 0, memberships)
        self.role = Role.FOLLOWER
        self.current_term: Term = log.hard_state.term
        self.voted_for: NodeId | None = log.hard_state.voted_for
        self.leader_id: NodeId | None = None
        self.term_start_index: LogIndex = 0
        """While leading: the index of this term's first entry."""
        self.repair = Repair(incarnation, damaged)
        self._election_ticks = election_ticks
        self._heartbeat_ticks = heartbeat_ticks
        self._spread = spread
        self._ticks_waited = 0
        self._silent_ticks = 0
        """Since a leader was last heard."""
        self._last_time_ms = snapshot.log_time_ms if snapshot else 0
        self._hard_state_changed = self.log.last_term > self.current_term
        if self._hard_state_changed:  # entries survived a power cut and the term written with them did not
            self.current_term, self.voted_for = self.log.last_term, None
        self._snapshot: Snapshot | None = None
        self._open: Ready | None = None
        self._now: list[Outbound] = []
        self._after: list[Outbound] = []
        self._reads: list[ReadReady] = []
        self._poll: Poll | None = None
        self._lead: Leader | None = None
        self._verified_index: LogIndex = 0
        """Up to where this term's leader has verified our log."""
        self._configure()
        self._draw_timeout()

    def _draw_timeout(self) -> None:
        self._ticks_waited = 0
        self._timeout_ticks = self._election_ticks + self._spread(self._election_ticks)

    # -- facts ----------------------------------------------------------------------------------------------------
    @property
    def membership(self) -> Membership:
        """The configuration in force: the newest in the log, committed or not (R-14)."""
        return self._memberships.current

    @property
    def membership_index(self) -> LogIndex:
        """The entry that brought it; 0 for the founders."""
        return self._memberships.index

    @property
    def voters(self) -> tuple[NodeId, ...]:
        """Voters of the configuration in force."""
        return self.membership.voters

    @property
    def last_index(self) -> LogIndex:
        """The newest entry, on disk or not."""
        return self.log.last_index

    @property
    def last_term(self) -> Term:
        """Its term."""
        return self.log.last_term

    @property
    def persisted_index(self) -> LogIndex:
        """Everything up to here is on this disk."""
        return self.log.persisted_index

    @property
    def commit_index(self) -> LogIndex:
        """Everything up to here is committed. Apply up to the lower of this and ``persisted_index``."""
        return self.log.commit_index

    @property
    def everywhere_index(self) -> LogIndex:
        """While leading: everything up to here is on the disk of every voter (write mode ``sync-all``)."""
        return self._lead.everywhere_index(self.log.persisted_index) if self._lead else 0

    @property
    def hears_leader(self) -> bool:
        """Whether this node leads, or heard of a leader within two election timeouts; one without a vote never stands itself."""
        return self._lead is not None or (self.leader_id is not None and self._silent_ticks < 2 * self._election_ticks)

    def copies(self, index: LogIndex) -> int:
        """How many voters are known to hold this entry on disk; of a committed one it is a majority, whoever says so."""
        known = self._lead.copies(index, self.log.persisted_index) if self._lead else 0
        return max(known, len(self.voters) // 2 + 1 if index <= self.commit_index else 0)

    @property
    def may_serve_reads(self) -> bool:
        """Whether this node leads and has committed an entry of its term, so that its commit index is current (R-13)."""
        return self._lead is not None and self.commit_index >= self.term_start_index

    @property
    def damaged(self) -> bool:
        """Whether synced bytes were lost and not yet repaired from the quorum: no vote, no candidacy (R-16)."""
        return self.repair.damaged

    @property
    def transfer_to(self) -> NodeId | None:
        """While leading: whom this node hands over to."""
        return self._lead.transfer_to if self._lead else None

    @property
    def leadership(self) -> Leader | None:
        """While leading: what it knows of its followers. For reports and metrics: read, do not change."""
        return self._lead

    def membership_at(self, index: LogIndex) -> Membership:
        """The configuration that held at an applied entry: what a snapshot taken there must carry."""
        return self._memberships.at(index)

    def observe_log_time(self, log_time_ms: int) -> None:
        """An entry in the log carries this time: later ones will not carry less."""
        self._last_time_ms = max(self._last_time_ms, log_time_ms)

    def log_compacted(self, index: LogIndex) -> None:
        """A snapshot at ``index`` is on disk: configurations before it will not be asked for."""
        self._memberships.compact(index)

    # -- the log's end --------------------------------------------------------------------------------------------
    def _appended(self, entries: Sequence[LogEntry]) -> None:
        """Entries came to the end of the log; a configuration among them is in force at once."""
        for entry in entries:
            if entry.kind is EntryKind.MEMBERSHIP:
                self._memberships.appended(entry.index, Membership.decode(entry.payload))
                self._configure()
        if entries:
            self.observe_log_time(entries[-1].log_time_ms)

    def _truncated(self, first_gone: LogIndex) -> None:
        """Entries were taken back: so are the configurations among them."""
        self._memberships.truncated(first_gone)
        self._configure()

    def _configure(self) -> None:
        alone = self.membership.everyone == (self.node_id,)
        self.log.cache_bytes = 0 if alone else self.limits.cache_bytes  # nobody would ever ask
        if self._lead is not None:
            self._lead.configure(self.membership)

    # -- what the driver takes ------------------------------------------------------------------------------------
    def take_messages(self) -> list[Outbound]:
        """Messages that may leave now."""
        messages, self._now = self._now, []
        if self._lead is not None:
            messages += self._lead.take_outbox()
        return messages

    def take_reads(self) -> list[ReadReady]:
        """Reads that were released since the last call, or that failed."""
        reads, self._reads = self._reads, []
        if self._lead is not None:
            reads += self._lead.reads_ready
            self._lead.reads_ready = []
        return reads

    def take_ready(self) -> Ready | None:
        """What to persist next, or ``None``. The caller answers with ``persisted`` or ``refused`` before it asks again."""
        assert self._open is None, "one append is in flight at a time"
        repaired = self.repair.is_due(self.current_term, min(self._verified_index, self.log.persisted_index))
        if not (self.log.unwritten or self._hard_state_changed or self._after or self._snapshot or repaired):
            return None
        state = HardState(self.current_term, self.voted_for) if self._hard_state_changed else None
        self._open = Ready(self.log.take(), state, self._snapshot, repaired, tuple(self._after))
        self._after.clear()
        self._snapshot = None
        self._hard_state_changed = False
        return self._open

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the state is one that no run may reach."""
        self.log.check_invariants()
        self.repair.check_invariants()
        leads = self.role is Role.LEADER
        assert leads == (self._lead is not None), self
        assert not leads or (self.voted_for, self.leader_id) == (self.node_id, self.node_id), self
        assert not (self.damaged and self.role is not Role.FOLLOWER), self
        assert self.last_term <= self.current_term, self
        assert self.membership_index <= self.last_index, self
        assert (self.role is Role.CANDIDATE) <= (self._poll is not None), self
        if self._lead is not None:
            assert self._lead.term == self.current_term and self._lead.membership == self.membership, self
            self._lead.check_invariants()

    def __repr__(self) -> str:
        return (
            f"Consensus({self.node_id} {self.role.value} term={self.current_term} vote={self.voted_for}"
            f" last={self.last_index} persisted={self.persisted_index} commit={self.commit_index})"
        )
