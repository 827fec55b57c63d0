"""Who belongs to the cluster: configurations, the one change allowed at a time, and which of them is in force.

Owns: the value a MEMBERSHIP entry carries and its bytes, the validity of a change, and the history that lets a truncated
configuration roll back. Must not know: messages, terms, who leads.

A change of voters goes through a joint configuration: C(old,new) where every decision needs both majorities, then C(new). Adding
or removing a learner changes no majority and needs one entry. A configuration is in force from the moment it is *appended*.

Bytes: u8 version (1), then three lists (voters, outgoing voters, learners), each u8 count and per name u8 length and UTF-8.
Invariants (R-14): names in a list are sorted and unique; no learner votes; the newest configuration at or below the end of the
log is the one in force. Source: thesis 4.1 - 4.3; paper section 6.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs

from ayder.entries import LogIndex, NodeId
from ayder.errors import CorruptLog
from ayder.raft.quorum import VoteResult, joint_committed_index, joint_vote

__all__ = ["Membership", "MembershipHistory"]

_VERSION = 1
MAX_MEMBERS = 64


def _names(names: Iterable[NodeId]) -> tuple[NodeId, ...]:
    return tuple(sorted(set(names)))


@attrs.frozen(slots=True)
class Membership:
    """One configuration. ``outgoing`` holds the old voters while the change is joint and is empty otherwise."""

    voters: tuple[NodeId, ...] = attrs.field(converter=_names, default=())
    outgoing: tuple[NodeId, ...] = attrs.field(converter=_names, default=())
    learners: tuple[NodeId, ...] = attrs.field(converter=_names, default=())

    def __attrs_post_init__(self) -> None:
        assert not set(self.learners) & {*self.voters, *self.outgoing}, self
        assert self.voters or not self.outgoing, self

    @property
    def is_joint(self) -> bool:
        """Whether decisions need two majorities now."""
        return bool(self.outgoing)

    @property
    def all_voters(self) -> tuple[NodeId, ...]:
        """Everyone whose vote or copy counts in some half."""
        return _names((*self.voters, *self.outgoing)) if self.outgoing else self.voters

    @property
    def everyone(self) -> tuple[NodeId, ...]:
        """Everyone the leader replicates to, itself included."""
        return _names((*self.voters, *self.outgoing, *self.learners))

    def is_voter(self, node_id: NodeId) -> bool:
        """Whether this node's vote counts in some half."""
        return node_id in self.voters or node_id in self.outgoing

    def committed_index(self, match_index: Mapping[NodeId, LogIndex]) -> LogIndex:
        """The highest index held on disk by a majority of each half."""
        return joint_committed_index(self.voters, self.outgoing, match_index)

    def vote(self, granted: Collection[NodeId], refused: Collection[NodeId] = ()) -> VoteResult:
        """Where a poll stands."""
        return joint_vote(self.voters, self.outgoing, granted, refused)

    def has_quorum(self, nodes: Collection[NodeId]) -> bool:
        """Whether these nodes hold a majority of each half."""
        return self.vote(nodes) is VoteResult.WON

    # -- changes --------------------------------------------------------------------------------------------------
    def with_learner(self, node_id: NodeId) -> Membership:
        """The configuration with one more learner. Raises ``ValueError`` when it cannot be added."""
        self._demand_settled()
        if node_id in self.everyone:
            raise ValueError(f"{node_id} is a member already")
        if len(self.everyone) >= MAX_MEMBERS:
            raise ValueError(f"a cluster has at most {MAX_MEMBERS} members")
        return attrs.evolve(self, learners=(*self.learners, node_id))

    def promoting(self, node_id: NodeId) -> Membership:
        """The joint configuration in which a learner becomes a voter. Raises ``ValueError`` when it is no learner."""
        self._demand_settled()
        if node_id not in self.learners:
            raise ValueError(f"{node_id} is not a learner")
        learners = tuple(name for name in self.learners if name != node_id)
        return Membership(voters=(*self.voters, node_id), outgoing=self.voters, learners=learners)

    def removing(self, node_id: NodeId) -> Membership:
        """The configuration (joint, for a voter) in which a member goes. Raises ``ValueError`` when it cannot."""
        self._demand_settled()
        if node_id in self.learners:
            return attrs.evolve(self, learners=tuple(name for name in self.learners if name != node_id))
        if node_id not in self.voters:
            raise ValueError(f"{node_id} is not a member")
        if len(self.voters) == 1:
            raise ValueError("the last voter cannot be removed")
        return attrs.evolve(self, voters=tuple(name for name in self.voters if name != node_id), outgoing=self.voters)

    def settled(self) -> Membership:
        """C(new): what a joint configuration leads to."""
        assert self.is_joint, self
        return attrs.evolve(self, outgoing=())

    def _demand_settled(self) -> None:
        if self.is_joint:
            raise ValueError("a change of the voters is not finished yet")

    # -- bytes ----------------------------------------------------------------------------------------------------
    def encode(self) -> bytes:
        """The payload of a MEMBERSHIP entry."""
        parts = [bytes([_VERSION])]
        for names in (self.voters, self.outgoing, self.learners):
            parts.append(bytes([len(names)]))
            for name in names:
                encoded = name.encode()
                parts.append(bytes([len(encoded)]) + encoded)
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: bytes) -> Membership:
        """The inverse of ``encode``. Raises ``CorruptLog``: bytes in the log are not believed."""
        try:
            if payload[0] != _VERSION:
                raise CorruptLog(f"a membership entry has version {payload[0]}: a newer release of ayder wrote it")
            position, lists = 1, []
            for _ in range(3):
                names, position = _decode_names(payload, position)
                lists.append(names)
            if position != len(payload):
                raise CorruptLog("a membership entry has bytes behind its end")
            return cls(*lists)
        except (IndexError, UnicodeDecodeError, AssertionError) as error:
            raise CorruptLog(f"a membership entry does not decode: {error!r}") from error


def _decode_names(payload: bytes, position: int) -> tuple[tuple[NodeId, ...], int]:
    names = []
    count = payload[position]
    position += 1
    for _ in range(count):
        length = payload[position]
        end = position + 1 + length
        if end > len(payload):
            raise IndexError(end)
        names.append(payload[position + 1 : end].decode())
        position = end
    return tuple(names), position


class MembershipHistory:
    """The configurations of the log, oldest first; the last one is in force. The first is the snapshot's or the founders'."""

    def __init__(self, base: Membership, base_index: LogIndex, entries: Sequence[tuple[LogIndex, Membership]] = ()) -> None:
        self._history = [(base_index, base)]
        for index, membership in entries:
            if index > base_index:
                self.appended(index, membership)

    @property
    def current(self) -> Membership:
        """The configuration in force."""
        return self._history[-1][1]

    @property
    def index(self) -> LogIndex:
        """The entry that brought it."""
        return self._history[-1][0]

    def appended(self, index: LogIndex, membership: Membership) -> None:
        """The log has a new configuration at its end: it is in force now."""
        assert index > self.index, (index, self._history)
        self._history.append((index, membership))

    def truncated(self, first_gone: LogIndex) -> None:
        """The log lost the entries from here on: the configuration before them is in force again."""
        while self._history[-1][0] >= first_gone:
            assert len(self._history) > 1, (first_gone, self._history)
            self._history.pop()

    def restored(self, index: LogIndex, membership: Membership) -> None:
        """A snapshot replaced the whole log."""
        self._history = [(index, membership)]

    def at(self, index: LogIndex) -> Membership:
        """The configuration that held at this entry (for a snapshot taken there)."""
        return next(membership for at, membership in reversed(self._history) if at <= index or at == self._history[0][0])

    def compact(self, index: LogIndex) -> None:
        """Nothing at or below this entry can be truncated any more: forget what came before the newest of those."""
        while len(self._history) > 1 and self._history[1][0] <= index:
            self._history.pop(0)
