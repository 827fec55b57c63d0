"""What may never happen, looked at after every step of every node: R-1 to R-16 of RELIABILITY with the eyes of someone who sees
all disks and all messages at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ayder.entries import EntryKind, LogEntry, LogIndex, NodeId, Term
from ayder.raft.consensus import Consensus, Role
from ayder.raft.membership import Membership
from ayder.raft.messages import AppendEntries, AppendReply, HeartbeatReply, Outbound, RequestVote, VoteReply
from tests.sim.node import SimNode, State

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["Oracle"]


class Oracle:
    """Raises ``AssertionError`` with the rule that was broken."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.leaders: dict[Term, NodeId] = {}
        self.committed: dict[LogIndex, tuple[Term, bytes]] = {}
        self.max_committed: LogIndex = 0
        self._digests: dict[LogIndex, int] = {}
        self._seen: dict[NodeId, tuple[LogIndex, LogIndex, Term]] = {}
        self._disk_terms: dict[NodeId, Term] = {}
        self._lead_last: dict[NodeId, tuple[Term, LogIndex]] = {}
        self._durable: dict[NodeId, dict[LogIndex, Term]] = {}
        self._configurations: list[tuple[LogIndex, Membership]] = []
        """As they were committed."""
        self._bases: dict[NodeId, LogIndex] = {}
        self.elections = 0
        self.damage_seen = 0

    # -- hooks --------------------------------------------------------------------------------------------------------
    def started(self, node: SimNode) -> None:
        """A new life: commit and applied begin again from the disk."""
        core = node.core
        assert core is not None
        self._seen[node.name] = (core.commit_index, node.state.applied_index, core.current_term)
        self.damage_seen += core.damaged
        assert core.current_term >= self._disk_terms.get(node.name, 0), ("R-6: the term went back", node)

    def stepped(self, node: SimNode, core: Consensus) -> None:
        """After each step of a node."""
        facts = (
            core.log.commit_index, node.state.applied_index, core.current_term, core.role, core.log.last_index,
            core.membership_index, node.disk.hard_state.term, node.life,
        )  # fmt: skip
        if facts == node.facts:
            return
        node.facts = facts
        commit, applied, term = self._seen[node.name]
        assert core.commit_index >= commit and node.state.applied_index >= applied, ("R-15: commit or applied went back", node)
        assert core.current_term >= term, ("R-6: the term went back", node)
        disk_term = node.disk.hard_state.term
        assert disk_term >= self._disk_terms.get(node.name, 0), ("R-6: the term on disk went back", node)
        self._disk_terms[node.name] = disk_term
        self._check_membership(node, core)
        if core.role is Role.LEADER:
            self._leads(node, core)
        if core.commit_index > commit:
            self._commit_moved(node, core, commit)
        self._seen[node.name] = (core.commit_index, node.state.applied_index, core.current_term)

    def _check_membership(self, node: SimNode, core: Consensus) -> None:
        """R-14: the configuration in force is the newest in the log, and a snapshot brings the one that held there."""
        history = core._memberships._history
        index, membership = history[-1]
        if len(history) > 1:
            entry = core.log._recent.get(index) or (node.disk.read(index, index) or [None])[0]
            assert entry is not None and entry.payload == membership.encode(), ("R-14: in force but not in the log", node, index)
        base, founding = history[0]
        if base and base != self._bases.get(node.name):
            self._bases[node.name] = base
            known = [held for at, held in self._configurations if at <= base]
            assert not known or known[-1] == founding, ("R-14: the snapshot's configuration is another", node, founding)

    def _leads(self, node: SimNode, core: Consensus) -> None:
        term = core.current_term
        if self.leaders.get(term) is None:
            self.leaders[term] = node.name
            self.elections += 1
            node.led_since = self._world.now
            node.contact.clear()
            held = core.log.term_at(self.max_committed)
            known = self.committed.get(self.max_committed)
            gone = self.max_committed < core.log.first_index
            newer = known is not None and known[0] > term  # votes of a term that is over may still come together
            assert known is None or gone or newer or held == known[0], (
                "R-4: a leader lacks what is committed",
                node,
                self.max_committed,
            )
            self._world.leader_elected(node)
        assert self.leaders[term] == node.name, ("R-1: two leaders in one term", term, self.leaders[term], node)
        before = self._lead_last.get(node.name, (0, 0))
        assert before[0] != term or core.last_index >= before[1], ("R-2: a leader shortened its log", node)
        self._lead_last[node.name] = (term, core.last_index)
        changes = [index for index, _ in core._memberships._history if index > max(core.commit_index, self.max_committed)]
        assert len(changes) <= 1, ("R-14: two changes under way", node, changes)

    def ticked(self, node: SimNode, core: Consensus) -> None:
        """R-12, with half an election timeout of grace for pauses that end."""
        world = self._world
        if core.role is not Role.LEADER:
            return
        limit = world.now - 1.6 * world.knobs.election_ms
        if core.membership_index != node.configured[0]:
            node.configured = (core.membership_index, world.now)
        if max(node.led_since, node.paused_until, node.configured[1]) > limit:
            return
        heard = [name for name, when in node.contact.items() if when >= limit]
        assert core.membership.has_quorum([node.name, *heard]), ("R-12: leads without contact to a majority", node)

    def _commit_moved(self, node: SimNode, core: Consensus, before: LogIndex) -> None:
        commit = core.commit_index
        term = core.log.term_at(commit)
        led = self._lead_last.get(node.name, (0, 0))[0] == core.current_term  # a leader that was removed has stepped down by now
        if led and commit > self.max_committed:
            self._check_durable(node, core, commit, term or 0)
            for index in range(max(before, self.max_committed, core.log.first_index - 1) + 1, commit + 1):
                entry = core.log._recent.get(index) or node.disk.read(index, index)[0]
                self.committed[index] = (entry.term, entry.payload)
                if entry.kind is EntryKind.MEMBERSHIP:
                    self._configurations.append((index, Membership.decode(entry.payload)))
            self.max_committed = commit
            self._check_newer_leaders(commit, term or 0)
        assert commit <= self.max_committed, ("R-8: committed what no leader committed", node)
        known = self.committed.get(commit)
        assert known is None or term is None or known[0] == term, ("R-5: committed another entry", node, commit, known)

    def _check_durable(self, node: SimNode, core: Consensus, commit: LogIndex, term: Term) -> None:
        assert term == core.current_term, ("R-7: committed by counting an entry of an older term", node, commit, term)
        disks = {name: one.disk for name, one in self._world.nodes.items()}
        holders = [name for name, disk in disks.items() if disk.rotten or disk.holds(commit, term)]
        assert core.membership.has_quorum(holders), ("R-7: committed what no majority holds on disk", node, commit, holders)

    def _check_newer_leaders(self, commit: LogIndex, term: Term) -> None:
        for other in self._world.nodes.values():
            core = other.core
            if core is not None and core.role is Role.LEADER and core.current_term > term and core.log.first_index <= commit:
                assert core.log.term_at(commit) == term, ("R-4: a newer leader lacks what was committed", other, commit)

    def applied(self, node: SimNode, entry: LogEntry, state: State) -> None:
        """A node made an entry visible."""
        known = self.committed.get(entry.index)
        assert known is not None, ("R-5: applied what is not committed", node, entry)
        assert known == (entry.term, entry.payload), ("R-5: applied another entry", node, entry, known)
        digest = self._digests.setdefault(entry.index, state.digest)
        assert digest == state.digest, ("R-5: another state at the same index", node, entry.index)

    def sends(self, node: SimNode, outbound: Outbound) -> None:
        """R-6: what a message promises is on the disk when it leaves."""
        message, saved = outbound.message, node.disk.hard_state
        assert not node.disk.failed, ("S-2: goes on after a failed sync", node, message)
        self._world.note(node.name, outbound.to, type(message).__name__, message.term)
        if isinstance(message, VoteReply) and message.granted and not message.pre_vote:
            kept = saved.term > message.term or (saved.term, saved.voted_for) == (message.term, outbound.to)
            assert kept, ("R-6: a vote left before it was synced", node, message, saved)
            assert not node.disk.damaged, ("R-16: a damaged node votes", node)
        elif isinstance(message, RequestVote) and not message.pre_vote:
            kept = saved.term > message.term or (saved.term, saved.voted_for) == (message.term, node.name)
            assert kept, ("R-6: a candidacy left before its own vote was synced", node, message, saved)
        elif isinstance(message, AppendReply) and message.accepted:
            assert saved.term >= message.term, ("R-6: an acknowledgement of a term that is not synced", node, message)
            assert node.disk.last_index >= message.index, ("R-6: acknowledged before the sync", node, message)
        elif isinstance(message, HeartbeatReply):
            assert saved.term >= message.term, ("R-6: a reply of a term that is not synced", node, message)
        elif isinstance(message, AppendEntries):
            assert self.leaders.get(message.term) == node.name, ("R-1: a second sender in one term", node, message)
        self._remember_durable(node)

    def _remember_durable(self, node: SimNode) -> None:
        durable = self._durable.setdefault(node.name, {})
        for entry in reversed(node.disk.entries):
            if durable.get(entry.index) == entry.term:
                break
            durable[entry.index] = entry.term

    def repaired(self, node: SimNode) -> None:
        """R-16: a node that votes again holds every committed entry that it ever held."""
        for index, term in self._durable.get(node.name, {}).items():
            known = self.committed.get(index)
            if known is not None and known[0] == term:
                assert node.disk.holds(index, term), ("R-16: repaired without what it once acknowledged", node, index, term)

    # -- now and then -------------------------------------------------------------------------------------------------
    def check_logs(self) -> None:
        """R-3: two logs that agree on an entry agree on everything before it."""
        logs = [node.disk for node in self._world.nodes.values()]
        for position, one in enumerate(logs):
            for other in logs[position + 1 :]:
                agree = False
                for index in range(min(one.last_index, other.last_index), max(one.base[0], other.base[0]), -1):
                    mine, theirs = one.entries[index - one.base[0] - 1], other.entries[index - other.base[0] - 1]
                    agree = agree or mine.term == theirs.term
                    assert not agree or mine == theirs, ("R-3: logs that agree later differ before", mine, theirs)
                    if mine is theirs and agree:
                        break
