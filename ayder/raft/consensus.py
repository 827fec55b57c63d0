"""The consensus module: terms, roles, votes, and the order in which everything reaches the disk and the network.

Owns: who leads, what is promised to whom, what must be on disk before which message leaves. Must not know: disks, sockets,
clocks, chance, Trio, what a payload means. Time is a count of ticks; the wall clock and the spread of timeouts are arguments;
durability is something the driver reports with ``persisted``. Nothing here awaits, so each call is atomic with respect to every
task.

How it is driven: ``tick``, ``step``, ``propose``, ``read_index`` and the rest change state at once. Then, in any order:

* ``take_messages``: what may leave now (heartbeats, pre-votes, refusals: nothing in them promises anything that is not on disk);
* ``take_ready``: what must reach the disk next, and the messages that may leave only after it. One hand-out is open at a time
  (ADR 0003); the driver writes it, says ``persisted``, and sends its messages. One that only holds messages needs no write;
* ``next_append(peer)``: what that follower's stream should send, as soon as it can send. A leader sends while it syncs its own
  copy, which counts only when it was synced (thesis 10.2.1);
* ``take_reads``: linearizable reads that may be served, or that failed.

Invariants (``check_invariants``): R-1, R-2, R-4, R-6 ... R-14, R-16 of RELIABILITY as far as one node can see them.
Source: Raft (extended version) figure 2; thesis 3.4 - 3.10, 4, 6.2, 6.4, 9.6, 10.2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ayder.entries import EntryKind, HardState, LogEntry, LogIndex, NodeId, Term
from ayder.errors import AyderError, ErrorCode
from ayder.raft.leader import Leader, ReadReady
from ayder.raft.membership import Membership
from ayder.raft.messages import (
    AppendEntries,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    Outbound,
    RequestVote,
    Snapshot,
    TimeoutNow,
    VoteReply,
)
from ayder.raft.node_state import NodeState, Poll, Ready, Role
from ayder.raft.progress import ReadRange, SendSnapshot
from ayder.raft.quorum import VoteResult
from ayder.raft.raft_log import LogView

__all__ = ["Consensus", "LogView", "ReadReady", "Ready", "Role"]


class Consensus(NodeState):
    """The rules. All methods are sync; the module header gives the order of calls, ``NodeState`` the arguments and facts."""

    # -- time -----------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """One tick passed. A node that heard of no leader for an election timeout stands for election (thesis 3.4)."""
        if self._lead is not None:
            self._lead.tick()
            if not self._lead.has_contact():
                self._follow(None)
            return
        self._silent_ticks += 1
        if self._open is not None:  # who cannot write now could not vote for itself either
            return
        self._ticks_waited += 1
        if self._ticks_waited >= self._timeout_ticks:
            self.campaign()

    # -- elections ------------------------------------------------------------------------------------------------
    def campaign(self) -> None:
        """Stand for election if this node may: ask first whether it can be won (thesis 9.6), alone at once."""
        assert self.role is not Role.LEADER, self
        self._draw_timeout()
        if not self.membership.is_voter(self.node_id) or self.damaged:
            return
        if self.membership.all_voters == (self.node_id,):
            self._stand(transfer=False)
            return
        self.role, self.leader_id = Role.FOLLOWER, None
        self._poll = Poll(self.current_term + 1, pre_vote=True, transfer=False, granted={self.node_id})
        self._now += self._requests(self._poll)

    def _stand(self, *, transfer: bool) -> None:
        """A new term and a vote for oneself, which counts once it is on disk; the requests leave then too."""
        self._adopt_term(self.current_term + 1)
        self.role = Role.CANDIDATE
        self.voted_for = self.node_id
        self._poll = Poll(self.current_term, pre_vote=False, transfer=transfer)
        self._after += self._requests(self._poll)
        self._draw_timeout()

    def _requests(self, poll: Poll) -> list[Outbound]:
        request = RequestVote(
            poll.term, self.node_id, self.log.last_index, self.log.last_term, pre_vote=poll.pre_vote, transfer=poll.transfer
        )
        return [Outbound(name, request) for name in self.membership.all_voters if name != self.node_id]

    def _leader_is_alive(self) -> bool:
        """Whether an election would only disturb (thesis 4.2.3). Check-quorum vouches for a leader, silence speaks against it."""
        return self.role is Role.LEADER or (self.leader_id is not None and self._silent_ticks < self._election_ticks)

    def _on_pre_vote(self, message: RequestVote) -> None:
        """Would this node vote for the sender? Answering changes nothing here (R-11)."""
        granted = (
            message.term > self.current_term
            and self.log.is_up_to_date(message.last_index, message.last_term)
            and not self.damaged
            and not self._leader_is_alive()
        )
        term = message.term - 1 if granted else self.current_term
        self._answer(message.sender, VoteReply(term, self.node_id, message.term, granted, pre_vote=True))

    def _on_request_vote(self, message: RequestVote) -> None:
        granted = (
            message.term == self.current_term
            and self.voted_for in (None, message.sender)
            and self.log.is_up_to_date(message.last_index, message.last_term)
            and not self.damaged
        )
        if granted:
            self._hard_state_changed |= self.voted_for is None
            self.voted_for = message.sender
            self._ticks_waited = 0
        reply = VoteReply(self.current_term, self.node_id, message.term, granted)
        if granted:
            self._after.append(Outbound(message.sender, reply))
        else:
            self._answer(message.sender, reply)

    def _on_vote_reply(self, message: VoteReply) -> None:
        poll = self._poll
        if poll is None or message.poll_term != poll.term or message.pre_vote != poll.pre_vote:
            return
        (poll.granted if message.granted else poll.refused).add(message.sender)
        self._count_votes(poll)

    def _count_votes(self, poll: Poll) -> None:
        result = self.membership.vote(poll.granted, poll.refused)
        if result is VoteResult.LOST:
            self.role, self._poll = Role.FOLLOWER, None
        elif result is VoteResult.WON and poll.pre_vote:
            self._stand(transfer=False)
        elif result is VoteResult.WON:
            self._become_leader()

    def _become_leader(self) -> None:
        self.role, self.leader_id, self._poll = Role.LEADER, self.node_id, None
        self._lead = Leader(
            self.node_id, self.current_term, self.log, self.membership,
            election_ticks=self._election_ticks, heartbeat_ticks=self._heartbeat_ticks, limits=self.limits,
        )  # fmt: skip
        self.term_start_index = self._lead.term_start_index
        self._append_own(EntryKind.NOOP, b"", self._last_time_ms)

    def _adopt_term(self, term: Term) -> None:
        """Enter a newer term as a follower of nobody. What was promised in older terms need not be said any more."""
        assert term > self.current_term, (term, self)
        self.current_term, self.voted_for = term, None
        self._hard_state_changed = True
        self._verified_index = 0
        self._after.clear()
        self._follow(None)

    def _follow(self, leader_id: NodeId | None) -> None:
        """Be a follower. A leader that becomes one fails its readers; what it proposed has an unknown outcome (R-12)."""
        if self._lead is not None:
            self._reads += self._lead.fail_reads()
            self._lead = None
            self._draw_timeout()
        self.role, self.leader_id, self._poll = Role.FOLLOWER, leader_id, None
        if leader_id is not None:
            self._ticks_waited = self._silent_ticks = 0

    # -- messages -------------------------------------------------------------------------------------------------
    def step(self, message: Message) -> None:
        """A message arrived. One of an older term changes nothing, except that a stale sender learns the newer term (R-10)."""
        assert message.sender != self.node_id, message
        if isinstance(message, RequestVote) and message.pre_vote:
            self._on_pre_vote(message)
            return
        if message.term > self.current_term:
            if isinstance(message, RequestVote) and not message.transfer and self._leader_is_alive():
                return
            self._adopt_term(message.term)
        if message.term < self.current_term:
            self._answer_stale(message)
            return
        handler: Callable[[Any], None] = getattr(self, _HANDLERS[type(message)])
        handler(message)

    def _answer_stale(self, message: Message) -> None:
        if isinstance(message, RequestVote):
            self._answer(message.sender, VoteReply(self.current_term, self.node_id, message.term, granted=False))
        elif isinstance(message, AppendEntries | Heartbeat | InstallSnapshot):
            self._answer(message.sender, self._heartbeat_reply(0))

    def _answer(self, to: NodeId, message: Message) -> None:
        """An answer that promises nothing but its term: it waits for the disk only if that term is not on it yet."""
        dirty = self._hard_state_changed or (self._open is not None and self._open.hard_state is not None)
        (self._after if dirty else self._now).append(Outbound(to, message))

    def _on_timeout_now(self, message: TimeoutNow) -> None:
        del message
        if self.membership.is_voter(self.node_id) and not self.damaged:
            self._stand(transfer=True)

    # -- following ------------------------------------------------------------------------------------------------
    def _on_append_entries(self, message: AppendEntries) -> None:
        assert self.role is not Role.LEADER, (message, self)
        self._follow(message.sender)
        if message.barrier is not None:
            self.repair.ordered(message.barrier, self.current_term)
        prev_index, last = message.prev_index, message.prev_index + len(message.entries)
        if prev_index >= self.commit_index and not self.log.matches(prev_index, message.prev_term):
            hint_index, hint_term = self.log.last_not_after(prev_index, message.prev_term)
            self._answer(message.sender, self._append_reply(False, prev_index, hint_index, hint_term))
            return
        truncated, fresh = self.log.accept(prev_index, message.entries)
        if truncated is not None:
            self._truncated(truncated)
        self._appended(fresh)
        self._verified(message.sender, last, message.commit_index)

    def _verified(self, leader_id: NodeId, index: LogIndex, commit_index: LogIndex) -> None:
        """Our log equals the leader's up to ``index``: say so when it is on disk (R-8), and commit no further than that."""
        self._verified_index = max(self._verified_index, index)
        self._commit(min(commit_index, index))
        self._after.append(Outbound(leader_id, self._append_reply(True, index)))

    def _on_heartbeat(self, message: Heartbeat) -> None:
        assert self.role is not Role.LEADER, (message, self)
        self._follow(message.sender)
        self._commit(min(message.commit_index, self._verified_index))
        self._answer(message.sender, self._heartbeat_reply(message.round))

    def _on_install_snapshot(self, message: InstallSnapshot) -> None:
        assert self.role is not Role.LEADER, (message, self)
        self._follow(message.sender)
        meta = message.snapshot.meta
        if meta.index > self.commit_index:
            if self.log.matches(meta.index, meta.term):
                self._commit(meta.index)  # we have all of it: keep what follows
            else:
                self.log.restore(meta)
                self._memberships.restored(meta.index, meta.membership)
                self._configure()
                self._snapshot = message.snapshot
                self.observe_log_time(meta.log_time_ms)
        self._verified(message.sender, meta.index, meta.index)

    def _append_reply(self, accepted: bool, index: LogIndex, hint_index: LogIndex = 0, hint_term: Term = 0) -> AppendReply:
        repair = self.repair
        return AppendReply(
            self.current_term, self.node_id, accepted, index, hint_index, hint_term, repair.incarnation, repair.damaged
        )

    def _heartbeat_reply(self, round: int) -> HeartbeatReply:
        verified = min(self._verified_index, self.log.persisted_index)
        return HeartbeatReply(self.current_term, self.node_id, round, verified, self.repair.incarnation, self.repair.damaged)

    # -- leading --------------------------------------------------------------------------------------------------
    def _leading(self) -> Leader:
        if self._lead is None:
            raise AyderError(ErrorCode.NOT_LEADER, "this node does not lead", leader_url=None)
        return self._lead

    def propose(self, kind: EntryKind, payload: bytes, now_ms: int) -> LogEntry:
        """Append one entry to the leader's log. Raises ``AyderError`` (not_leader) elsewhere: it surely did not happen.

        ``now_ms`` is the wall clock; the entry's log time is that or, if the clock went back, the time of the entry before.
        """
        if self._leading().transfer_to is not None:
            raise AyderError(ErrorCode.NOT_LEADER, "this node is handing over its leadership", leader_url=None)
        return self._append_own(kind, payload, now_ms)

    def _append_own(self, kind: EntryKind, payload: bytes, now_ms: int) -> LogEntry:
        self._last_time_ms = max(self._last_time_ms, now_ms)
        entry = LogEntry(self.log.last_index + 1, self.current_term, kind, self._last_time_ms, payload)
        self.log.append((entry,))
        self._appended((entry,))
        return entry

    def read_index(self, token: Hashable) -> None:
        """A linearizable read: ``take_reads`` gives ``token`` back with the index to wait for. Raises as ``propose`` does."""
        self._leading().read_index(token)

    def transfer_leadership(self, target: NodeId | None = None) -> NodeId:
        """Hand over to a voter (the most advanced one by default); until it took over or failed, proposals are refused.

        Raises ``AyderError``: not_leader, or no_quorum when there is nobody to hand over to.
        """
        lead = self._leading()
        target = lead.best_successor() if target is None else target
        if target is None or target == self.node_id or target not in self.voters:
            raise AyderError(ErrorCode.NO_QUORUM, "there is no other voter to hand over to")
        lead.transfer(target)
        return target

    def add_learner(self, node_id: NodeId, now_ms: int) -> LogEntry:
        """Let a node follow without a vote. Raises ``AyderError``: not_leader, change_in_progress, invalid_request."""
        return self._change(lambda: self.membership.with_learner(node_id), now_ms)

    def promote(self, node_id: NodeId, now_ms: int) -> LogEntry:
        """Make a learner that is caught up a voter, through a joint configuration. Raises as ``add_learner`` does."""
        return self._change(lambda: self.membership.promoting(node_id), now_ms, caught_up=node_id)

    def remove(self, node_id: NodeId, now_ms: int) -> LogEntry:
        """Remove a member, this leader too: it steps down when that is committed. Raises as ``add_learner`` does."""
        return self._change(lambda: self.membership.removing(node_id), now_ms)

    def _change(self, change: Callable[[], Membership], now_ms: int, caught_up: NodeId | None = None) -> LogEntry:
        """One change at a time, and none before an entry of this term is committed (the single-server bug of 2015)."""
        lead = self._leading()
        pending = self.membership.is_joint or self.membership_index > self.commit_index
        if pending or self.commit_index < self.term_start_index:
            raise AyderError(ErrorCode.CHANGE_IN_PROGRESS, "a change of the membership is not committed yet")
        try:
            membership = change()
        except ValueError as error:
            raise AyderError(ErrorCode.INVALID_REQUEST, str(error)) from error
        if caught_up is not None and not lead.is_caught_up(caught_up):
            raise AyderError(ErrorCode.CHANGE_IN_PROGRESS, f"{caught_up} has not caught up yet")
        return self.propose(EntryKind.MEMBERSHIP, membership.encode(), now_ms)

    def next_append(self, peer: NodeId) -> AppendEntries | ReadRange | SendSnapshot | None:
        """What the stream to this follower should do now; ``None``: wait until something changed. See ``Leader``."""
        return self._lead.next_append(peer) if self._lead else None

    def append_read(self, asked: ReadRange, entries: Sequence[LogEntry]) -> AppendEntries | None:
        """The entries a ``ReadRange`` asked for; ``None`` when the question is out of date."""
        return self._lead.append_read(asked, entries) if self._lead else None

    def snapshot_message(self, asked: SendSnapshot, snapshot: Snapshot) -> InstallSnapshot | None:
        """The snapshot a ``SendSnapshot`` asked for; ``None`` when the question is out of date."""
        return self._lead.snapshot_message(asked, snapshot) if self._lead else None

    def snapshot_progress(self, peer: NodeId) -> None:
        """Bytes of a snapshot are still moving to this follower."""
        if self._lead:
            self._lead.snapshot_progress(peer)

    def peer_reset(self, peer: NodeId) -> None:
        """The connection to this follower broke: what was under way may be lost."""
        if self._lead:
            self._lead.peer_reset(peer)

    def _on_append_reply(self, message: AppendReply) -> None:
        if self._lead is not None:
            self._lead.on_append_reply(message)
            self._advance_commit()

    def _on_heartbeat_reply(self, message: HeartbeatReply) -> None:
        if self._lead is not None:
            self._lead.on_heartbeat_reply(message)

    def _advance_commit(self) -> None:
        lead = self._lead
        if lead is None:
            return
        candidate = lead.majority_index(self.log.persisted_index)
        if candidate >= self.term_start_index:  # only entries of one's own term are committed by counting (thesis 3.6.2)
            self._commit(candidate)

    def _commit(self, index: LogIndex) -> None:
        if index <= self.commit_index:
            return
        self.log.commit_to(index)
        lead = self._lead
        if lead is None:
            return
        lead.committed()
        if self.membership_index <= index:
            self._membership_committed(lead)

    def _membership_committed(self, lead: Leader) -> None:
        """A joint configuration leads on to C(new); a leader that is not in C(new) has done its last work (thesis 4.2.2)."""
        if self.membership.is_joint:
            self._append_own(EntryKind.MEMBERSHIP, self.membership.settled().encode(), self._last_time_ms)
        elif not self.membership.is_voter(self.node_id):
            lead.begin_round()
            successor = lead.best_successor()
            if successor is not None:
                lead.outbox.append(Outbound(successor, TimeoutNow(self.current_term, self.node_id)))
            self._now += lead.take_outbox()
            self._follow(None)

    def persisted(self) -> None:
        """What ``take_ready`` handed out is on disk: count our copy and our vote. Its messages may leave."""
        ready = self._open
        assert ready is not None, "nothing was handed out"
        self._open = None
        self.log.written()
        if ready.repaired:
            self.repair.done()
        poll = self._poll
        if self.role is Role.CANDIDATE and poll is not None and ready.hard_state == HardState(poll.term, self.node_id):
            poll.granted.add(self.node_id)
            self._count_votes(poll)
        self._advance_commit()

    def refused(self) -> None:
        """The disk had no room: nothing that was handed out was written, and none of its messages left this node.

        Where this node is the whole group, no one else can hold the entries and they are forgotten. In a larger group they may be
        on their way to others: they stay, and the next ``take_ready`` hands them out again.
        """
        ready = self._open
        assert ready is not None, self
        self._open = None
        self._hard_state_changed |= ready.hard_state is not None
        if self.membership.everyone != (self.node_id,):
            self.log.put_back()
            self._snapshot = self._snapshot or ready.snapshot
            self._after[:0] = [sent for sent in ready.messages if sent.message.term == self.current_term]
            return
        assert not self.log.unwritten, "entries were proposed behind ones that were refused"
        if ready.entries:
            self.log.forget_unwritten(ready.entries[0].index)
            self._truncated(ready.entries[0].index)
            if self.last_index < self.term_start_index:
                self._follow(None)


_HANDLERS: dict[type[Any], str] = {
    RequestVote: "_on_request_vote",
    VoteReply: "_on_vote_reply",
    AppendEntries: "_on_append_entries",
    AppendReply: "_on_append_reply",
    Heartbeat: "_on_heartbeat",
    HeartbeatReply: "_on_heartbeat_reply",
    InstallSnapshot: "_on_install_snapshot",
    TimeoutNow: "_on_timeout_now",
}
