"""What a leader knows of one follower, and how much it may have under way to it.

Owns: the three states of a follower, the match and next index, the window of appends in flight, when it was last heard, and the
leader's half of the damage rule. Must not know: the log, the other followers, what is committed.

* *probe*: where the logs agree is not known; one append at a time, answered by a match or a hint;
* *replicate*: they agree at ``match_index``; appends follow one another without waiting, within the window;
* *snapshot*: the follower needs entries that are gone; nothing but a snapshot goes out.

Invariants: ``match_index < next_index``; ``match_index`` falls only when the follower lost what it had synced (a new
incarnation); the window's bytes are the sum of what is in it. Source: thesis 3.5, 10.2.1; RELIABILITY R-8, R-16.
"""

from __future__ import annotations

import enum
from collections import deque

import attrs

from ayder.entries import LogIndex, NodeId, Term
from ayder.raft.messages import Barrier

__all__ = ["Limits", "Progress", "ProgressState", "ReadRange", "SendSnapshot"]


@attrs.frozen(kw_only=True)
class Limits:
    """Bounds of replication, per follower where they speak of messages."""

    max_append_entries: int = 64
    max_append_bytes: int = 1 << 20
    """Payload bytes of one append; a single larger entry goes alone."""
    max_inflight_appends: int = 64
    max_inflight_bytes: int = 8 << 20
    cache_bytes: int = 16 << 20
    """Payload bytes of written entries kept in memory for followers that are nearly up to date."""
    catch_up_entries: int = 64
    """A learner that lacks no more than this is caught up."""


class ProgressState(enum.Enum):
    """See the module header."""

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


@attrs.frozen(slots=True)
class ReadRange:
    """The next entries for ``peer`` are on disk: read ``first`` to at most ``last`` and hand them to ``append_read``."""

    peer: NodeId
    term: Term
    first: LogIndex
    last: LogIndex
    max_bytes: int


@attrs.frozen(slots=True)
class SendSnapshot:
    """``peer`` needs entries that are gone: fetch the newest snapshot and hand it to ``snapshot_message``."""

    peer: NodeId
    term: Term
    first_index: LogIndex
    """Any snapshot at or above ``first_index - 1`` will do."""


@attrs.define(slots=True, eq=False)
class Progress:
    """One follower as its leader sees it. Times are counted in the leader's ticks."""

    peer: NodeId
    next_index: LogIndex
    last_contact: int
    match_index: LogIndex = 0
    state: ProgressState = ProgressState.PROBE
    incarnation: int = 0
    damaged: bool = False
    barrier: Barrier | None = None
    acked_round: int = 0
    commit_told: LogIndex = 0
    moved: int = 0
    """When an append was last sent or answered: silence after it means that something was lost."""
    waiting: bool = False
    """In probe: the one append is under way. In snapshot: the snapshot is."""
    inflight: deque[tuple[LogIndex, int]] = attrs.field(factory=deque)
    """Last index and bytes of each append under way."""
    inflight_bytes: int = 0
    snapshot_index: LogIndex = 0

    # -- changes of state -----------------------------------------------------------------------------------------
    def probe(self, next_index: LogIndex) -> None:
        """Find out again where the logs agree, beginning with an append at ``next_index``."""
        self._enter(ProgressState.PROBE)
        self.next_index = max(next_index, self.match_index + 1)

    def replicate(self) -> None:
        """The logs agree at the match index: send from there on without waiting."""
        self._enter(ProgressState.REPLICATE)
        self.next_index = self.match_index + 1

    def need_snapshot(self) -> None:
        """The entry before the next one is gone."""
        self._enter(ProgressState.SNAPSHOT)

    def _enter(self, state: ProgressState) -> None:
        self.state = state
        self.waiting = False
        self.inflight.clear()
        self.inflight_bytes = 0
        self.snapshot_index = 0

    # -- what the follower said -----------------------------------------------------------------------------------
    def heard(self, now: int, incarnation: int, damaged: bool, leader_last: LogIndex) -> bool:
        """A reply came. ``False``: it is from before the follower lost synced bytes, and must not count (R-16)."""
        if incarnation < self.incarnation:
            return False
        self.last_contact = now
        if incarnation > self.incarnation:
            self.incarnation = incarnation
            self.match_index = 0
            self.probe(self.next_index)
        if damaged and (self.barrier is None or self.barrier.incarnation != incarnation):
            self.barrier = Barrier(incarnation, leader_last)
            self.probe(self.next_index)
        if not damaged:
            self.barrier = None
        self.damaged = damaged
        return True

    def accepted(self, index: LogIndex, now: int) -> None:
        """The follower holds the leader's log up to ``index``, synced."""
        self.moved = now
        self.match_index = max(self.match_index, index)
        while self.inflight and self.inflight[0][0] <= index:
            self.inflight_bytes -= self.inflight.popleft()[1]
        self.next_index = max(self.next_index, self.match_index + 1)
        if self.state is ProgressState.PROBE or self.match_index >= self.snapshot_index > 0:
            self.replicate()

    # -- what may be sent -----------------------------------------------------------------------------------------
    def may_send(self, limits: Limits) -> bool:
        """Whether another append may go out now."""
        if self.state is ProgressState.REPLICATE:
            return len(self.inflight) < limits.max_inflight_appends and self.inflight_bytes < limits.max_inflight_bytes
        return not self.waiting

    def sent(self, last_index: LogIndex, size: int, now: int) -> None:
        """An append up to ``last_index`` went out."""
        self.moved = now
        if self.state is ProgressState.REPLICATE:
            self.next_index = last_index + 1
            self.inflight.append((last_index, size))
            self.inflight_bytes += size
        else:
            self.waiting = True

    def check_invariants(self, leader_last: LogIndex) -> None:
        """Raise ``AssertionError`` when the state is one that no run may reach."""
        assert self.match_index < self.next_index <= leader_last + 1, (self, leader_last)
        assert self.inflight_bytes == sum(size for _, size in self.inflight), self
        assert self.state is ProgressState.REPLICATE or not self.inflight, self

    def __repr__(self) -> str:
        flags = "".join(
            text for text, on in ((" waiting", self.waiting), (" damaged", self.damaged)) if on
        )  # one line, compared by tests
        return (
            f"{self.peer} {self.state.value} match={self.match_index} next={self.next_index} inflight={len(self.inflight)}{flags}"
        )
