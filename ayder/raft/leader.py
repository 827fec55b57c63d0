"""A leader's volatile state (paper figure 2): its followers, what they hold, who waits to read, whom it hands over to.

Owns: what to send to each follower, which index a majority holds, rounds of heartbeats for linearizable reads, contact with the
quorum, leadership transfer. Made when an election is won and thrown away with the leadership, so nothing in it can leak into
another term. Must not know: elections, votes, the disk; the log is read, and its commit index advanced by the owner.

Invariants: only voters count, for commitment, contact and reads alike; a read is released only by a round that began after it
arrived, acknowledged by a majority of the configuration then in force (R-13); the commit index moves only to entries of this
term (R-7). Source: thesis 3.5 - 3.6, 3.10, 6.2 (check-quorum), 6.4 (reads), 10.2.1 (writing while sending).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import attrs

from ayder.entries import LogEntry, LogIndex, NodeId, Term
from ayder.raft.membership import Membership
from ayder.raft.messages import (
    AppendEntries,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Outbound,
    Snapshot,
    TimeoutNow,
)
from ayder.raft.progress import Limits, Progress, ProgressState, ReadRange, SendSnapshot
from ayder.raft.raft_log import RaftLog

__all__ = ["Leader", "ReadReady"]


@attrs.frozen(slots=True)
class ReadReady:
    """A read may be served once ``index`` is applied; ``None``: leadership was lost first, the read must be asked anew."""

    token: Hashable
    index: LogIndex | None


class Leader:
    """See the module header. ``election_ticks`` bounds silence, ``heartbeat_ticks`` spaces heartbeats."""

    def __init__(
        self,
        node_id: NodeId,
        term: Term,
        log: RaftLog,
        membership: Membership,
        *,
        election_ticks: int,
        heartbeat_ticks: int,
        limits: Limits,
    ) -> None:
        self.node_id = node_id
        self.term = term
        self.term_start_index: LogIndex = log.last_index + 1
        self._log = log
        self._limits = limits
        self._election_ticks = election_ticks
        self._heartbeat_ticks = heartbeat_ticks
        self.now = 0
        self.progress: dict[NodeId, Progress] = {}
        self.outbox: list[Outbound] = []
        self._round = 0
        self._early: deque[Hashable] = deque()
        """Reads that came before an entry of this term was committed."""
        self._waiting: deque[tuple[int, Hashable, LogIndex]] = deque()
        """Round that releases the read, the read, its index."""
        self.reads_ready: list[ReadReady] = []
        self.transfer_to: NodeId | None = None
        self._transfer_deadline = 0
        self._transfer_asked = False
        self.configure(membership)
        self.begin_round()

    def configure(self, membership: Membership) -> None:
        """A configuration is in force: members that came get a progress, those that went lose theirs."""
        self.membership = membership
        peers = [name for name in membership.everyone if name != self.node_id]
        self.progress = {
            name: self.progress.get(name) or Progress(name, self._log.last_index + 1, self.now, moved=self.now) for name in peers
        }
        self._others_vote = any(name != self.node_id for name in membership.all_voters)
        if self.transfer_to is not None and not membership.is_voter(self.transfer_to):
            self.transfer_to = None

    # -- time -----------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """One tick passed: show ourselves when it is time, look for what was lost, give up a transfer that hangs."""
        self.now += 1
        if self.now % self._heartbeat_ticks == 0:
            self.begin_round()
        if self.transfer_to is not None and self.now >= self._transfer_deadline:
            self.transfer_to = None
        for progress in self.progress.values():
            self._look_for_loss(progress)

    def has_contact(self) -> bool:
        """Whether a majority was heard from within one election timeout (R-12)."""
        return self.membership.has_quorum(self._heard_since(self.now - self._election_ticks))

    def _heard_since(self, tick: int) -> list[NodeId]:
        return [self.node_id, *(name for name, progress in self.progress.items() if progress.last_contact >= tick)]

    def _look_for_loss(self, progress: Progress) -> None:
        """An append or a snapshot that nobody answered for a while is taken as lost."""
        silence = self.now - progress.moved
        if progress.state is ProgressState.SNAPSHOT:
            if progress.waiting and silence > 4 * self._election_ticks:
                progress.probe(progress.match_index + 1)
        elif (progress.waiting or progress.inflight) and silence > self._election_ticks:
            progress.probe(progress.match_index + 1 if progress.inflight else progress.next_index)

    # -- heartbeats and reads -------------------------------------------------------------------------------------
    def begin_round(self) -> None:
        """Ask everyone whether we still lead."""
        self._round += 1
        for name, progress in self.progress.items():
            commit = min(self._log.commit_index, progress.match_index)
            self.outbox.append(Outbound(name, Heartbeat(self.term, self.node_id, commit, self._round)))

    def read_index(self, token: Hashable) -> None:
        """A linearizable read arrived. It is released through ``reads_ready``."""
        if self._log.commit_index < self.term_start_index:
            self._early.append(token)
            return
        if not self._others_vote:
            self.reads_ready.append(ReadReady(token, self._log.commit_index))
            return
        # Readers that come while a round is under way share the one after it.
        if not self._waiting:
            self.begin_round()
            self._waiting.append((self._round, token, self._log.commit_index))
        else:
            self._waiting.append((self._round + 1, token, self._log.commit_index))

    def _release_reads(self) -> None:
        if not self._waiting:
            return
        acked = {name: progress.acked_round for name, progress in self.progress.items()}
        acked[self.node_id] = self._round
        confirmed = self.membership.committed_index(acked)  # the same arithmetic: the round a majority has reached
        while self._waiting and self._waiting[0][0] <= confirmed:
            _, token, index = self._waiting.popleft()
            self.reads_ready.append(ReadReady(token, index))
        if self._waiting and self._waiting[0][0] > self._round:
            self.begin_round()

    def fail_reads(self) -> list[ReadReady]:
        """Leadership is over: every read that was not released fails."""
        tokens = [*self._early, *(token for _, token, _ in self._waiting)]
        return [*self.reads_ready, *(ReadReady(token, None) for token in tokens)]

    # -- what followers say ---------------------------------------------------------------------------------------
    def on_append_reply(self, message: AppendReply) -> None:
        """A follower accepted or refused an append, or installed a snapshot."""
        progress = self.progress.get(message.sender)
        if progress is None or not progress.heard(self.now, message.incarnation, message.damaged, self._log.last_index):
            return
        if message.accepted:
            assert message.index <= self._log.last_index, (message, self._log)
            progress.accepted(message.index, self.now)
            self._hand_over_if_ready()
        else:
            self._on_refusal(progress, message)

    def _on_refusal(self, progress: Progress, message: AppendReply) -> None:
        if progress.state is ProgressState.SNAPSHOT or message.index <= progress.match_index:
            return  # an old refusal
        if progress.state is ProgressState.PROBE and message.index != progress.next_index - 1:
            return
        index, _ = self._log.last_not_after(message.hint_index, message.hint_term)
        progress.moved = self.now
        progress.probe(min(index + 1, message.index))

    def on_heartbeat_reply(self, message: HeartbeatReply) -> None:
        """A follower still follows."""
        progress = self.progress.get(message.sender)
        if progress is None or not progress.heard(self.now, message.incarnation, message.damaged, self._log.last_index):
            return
        progress.acked_round = max(progress.acked_round, message.round)
        if progress.state is ProgressState.REPLICATE and not progress.inflight and message.verified_index < progress.match_index:
            progress.probe(progress.match_index + 1)  # it restarted: until an append verifies its log it commits nothing
        self._release_reads()

    def majority_index(self, persisted_index: LogIndex) -> LogIndex:
        """The highest index that a majority holds on disk; our own copy counts only when it was synced."""
        return self.membership.committed_index(self._match(persisted_index))

    def everywhere_index(self, persisted_index: LogIndex) -> LogIndex:
        """The highest index that every voter holds on disk."""
        match = self._match(persisted_index)
        return min(match.get(name, 0) for name in self.membership.all_voters)

    def copies(self, index: LogIndex, persisted_index: LogIndex) -> int:
        """How many voters are known to hold this entry on disk."""
        match = self._match(persisted_index)
        return sum(match.get(name, 0) >= index for name in self.membership.voters)

    def _match(self, persisted_index: LogIndex) -> dict[NodeId, LogIndex]:
        match = {name: progress.match_index for name, progress in self.progress.items()}
        match[self.node_id] = persisted_index
        return match

    def committed(self) -> None:
        """The commit index moved: reads that waited for this term's first commit start now."""
        if self._early and self._log.commit_index >= self.term_start_index:
            early, self._early = self._early, deque()
            for token in early:
                self.read_index(token)

    # -- what to send ---------------------------------------------------------------------------------------------
    def next_append(self, peer: NodeId) -> AppendEntries | ReadRange | SendSnapshot | None:
        """The next thing for this follower's stream to do, ``None`` when there is nothing now."""
        progress = self.progress.get(peer)
        if progress is None or not progress.may_send(self._limits):
            return None
        first, log, limits = progress.next_index, self._log, self._limits
        if progress.state is not ProgressState.SNAPSHOT and (first < log.first_index or log.term_at(first - 1) is None):
            progress.need_snapshot()
        if progress.state is ProgressState.SNAPSHOT:
            return SendSnapshot(peer, self.term, log.first_index)
        if first > log.last_index:
            return self._empty_append(progress)
        entries = log.recent(first, max_entries=limits.max_append_entries, max_bytes=limits.max_append_bytes)
        if entries is None:
            last = min(log.persisted_index, first + limits.max_append_entries - 1)
            return ReadRange(peer, self.term, first, last, limits.max_append_bytes)
        return self._append(progress, entries)

    def append_read(self, asked: ReadRange, entries: Sequence[LogEntry]) -> AppendEntries | None:
        """What a ``ReadRange`` asked for was read. ``None``: the question is out of date, ask ``next_append`` again."""
        progress = self.progress.get(asked.peer)
        if asked.term != self.term or progress is None or not progress.may_send(self._limits) or not entries:
            return None
        if progress.next_index != asked.first or progress.state is ProgressState.SNAPSHOT:
            return None
        if self._log.term_at(asked.first - 1) is None:
            return None  # the log was compacted while the disk was read
        if any(self._log.term_at(entry.index) != entry.term for entry in entries) or entries[0].index != asked.first:
            return None
        return self._append(progress, tuple(entries))

    def _empty_append(self, progress: Progress) -> AppendEntries | None:
        """Nothing new: a probe still has to verify, and a follower that is up to date is told of the commit index."""
        told = progress.commit_told >= min(self._log.commit_index, progress.match_index)
        if progress.state is ProgressState.REPLICATE and (progress.inflight or told):
            return None
        return self._append(progress, ())

    def _append(self, progress: Progress, entries: tuple[LogEntry, ...]) -> AppendEntries:
        prev_index = progress.next_index - 1
        prev_term = self._log.term_at(prev_index)
        assert prev_term is not None, (progress, self._log)
        last = prev_index + len(entries)
        progress.sent(last, sum(len(entry.payload) for entry in entries), self.now)
        commit = self._log.commit_index
        progress.commit_told = min(commit, last)
        return AppendEntries(self.term, self.node_id, prev_index, prev_term, entries, commit, progress.barrier)

    def snapshot_message(self, asked: SendSnapshot, snapshot: Snapshot) -> InstallSnapshot | None:
        """The message that ships this snapshot; ``None`` when it is not wanted any more."""
        progress = self.progress.get(asked.peer)
        if asked.term != self.term or progress is None or progress.state is not ProgressState.SNAPSHOT or progress.waiting:
            return None
        assert asked.first_index - 1 <= snapshot.meta.index <= self._log.commit_index, (asked, snapshot.meta)
        progress.waiting = True
        progress.snapshot_index = snapshot.meta.index
        progress.moved = self.now
        return InstallSnapshot(self.term, self.node_id, snapshot)

    def snapshot_progress(self, peer: NodeId) -> None:
        """Bytes of the snapshot are still moving."""
        if peer in self.progress:
            self.progress[peer].moved = self.now

    def peer_reset(self, peer: NodeId) -> None:
        """The connection broke: what was under way may be lost."""
        progress = self.progress.get(peer)
        if progress is not None:
            progress.probe(progress.match_index + 1)

    # -- handing over ---------------------------------------------------------------------------------------------
    def transfer(self, target: NodeId) -> None:
        """Hand over to a voter: when it has everything, tell it to stand. Given up after one election timeout."""
        self.transfer_to = target
        self._transfer_asked = False
        self._transfer_deadline = self.now + self._election_ticks
        self._hand_over_if_ready()

    def _hand_over_if_ready(self) -> None:
        target = self.transfer_to
        if target is None or self._transfer_asked:
            return
        if self.progress[target].match_index == self._log.last_index:
            self._transfer_asked = True
            self.outbox.append(Outbound(target, TimeoutNow(self.term, self.node_id)))

    def best_successor(self) -> NodeId | None:
        """The voter that holds most and was heard from lately."""
        able = [name for name in self._heard_since(self.now - self._election_ticks) if name in self.progress]
        voters = [name for name in able if name in self.membership.voters and not self.progress[name].damaged]
        return max(voters, key=lambda name: (self.progress[name].match_index, name), default=None)

    def is_caught_up(self, peer: NodeId) -> bool:
        """Whether a learner may be promoted: heard from lately, undamaged, and at most a little behind (thesis 4.2.1)."""
        progress = self.progress[peer]
        return (
            progress.state is ProgressState.REPLICATE
            and not progress.damaged
            and progress.last_contact >= self.now - self._election_ticks
            and progress.match_index + self._limits.catch_up_entries >= self._log.last_index
            and progress.match_index >= self.term_start_index
        )

    def take_outbox(self) -> list[Outbound]:
        """Messages that may leave now."""
        taken, self.outbox = self.outbox, []
        return taken

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the state is one that no run may reach."""
        for progress in self.progress.values():
            progress.check_invariants(self._log.last_index)
        rounds = [round for round, _, _ in self._waiting]
        assert rounds == sorted(rounds) and all(round <= self._round + 1 for round in rounds), rounds
        assert set(self.progress) == set(self.membership.everyone) - {self.node_id}, self.membership
