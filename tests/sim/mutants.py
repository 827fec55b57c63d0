"""Classic mistakes of home-made Rafts (RELIABILITY 3.3 and 5), each as a patch of one method, and what notices it.

``MUTANTS`` is the list. A mutant is killed when a run of the simulator raises, when a golden story goes otherwise, or when the
directed check named in ``directed`` fails under it. ``seeds`` is how many seeds from 0 the simulator needed when the list was
last measured (``python -m tests.sim --mutants``), 0 where it did not notice within 20 s. A suite that stays green under one of
them is a defect of the suite.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from ayder.entries import EntryKind, HardState, LogEntry
from ayder.raft.consensus import Consensus, ReadReady, Ready, Role
from ayder.raft.leader import Leader
from ayder.raft.membership import Membership, MembershipHistory
from ayder.raft.messages import AppendEntries, AppendReply, Barrier, Heartbeat, Outbound, RequestVote, VoteReply
from ayder.raft.progress import Progress
from ayder.raft.raft_log import RaftLog
from ayder.raft.repair import Repair
from tests.raft.transcripts import TESTDATA, run_file
from tests.sim.disk import Disk, Frame
from tests.sim.node import SimNode, State
from tests.sim.world import Failure, run_seed

__all__ = ["MUTANTS", "Mutant", "applied", "kill", "splice", "stories_that_notice"]

Patch = tuple[type[Any], str, Any]


@attrs.frozen
class Mutant:
    """``patches`` replaces attributes of classes for the length of a run."""

    name: str
    patches: tuple[Patch, ...]
    seeds: int = 0
    """Seeds the simulator needed; 0: it did not notice within the cap."""
    story: str = ""
    """A golden story that notices."""
    directed: str = ""
    """A function of this module that raises under the mutant and not without it."""


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The mistake is made inside the block."""
    saved = [(cls, name, cls.__dict__.get(name)) for cls, name, _ in mutant.patches]
    try:
        for cls, name, value in mutant.patches:
            setattr(cls, name, value)
        yield
    finally:
        for cls, name, value in saved:
            if value is None:
                delattr(cls, name)  # it was inherited
            else:
                setattr(cls, name, value)


def kill(mutant: Mutant, seeds: range) -> tuple[int, Failure] | None:
    """The first seed that notices, and how; ``None`` when none does."""
    with applied(mutant):
        for seed in seeds:
            try:
                run_seed(seed)
            except Failure as error:
                return seed, error
    return None


def stories_that_notice(mutant: Mutant) -> list[str]:
    """The golden stories of ``tests/raft/testdata`` that go otherwise under this mutant."""
    noticed = []
    with applied(mutant):
        for path in sorted(TESTDATA.glob("*.txt")):
            text = path.read_text(encoding="utf-8")
            try:
                same = run_file(text) == text
            except Exception:  # the core notices by itself
                same = False
            if not same:
                noticed.append(path.stem)
    return noticed


# -- votes ----------------------------------------------------------------------------------------------------------------
def _voted_from_memory(self: Consensus) -> Ready | None:
    ready = _take_ready(self)
    if ready is None or ready.hard_state is None:
        return ready
    self._open = attrs.evolve(ready, hard_state=None)
    return self._open


_take_ready = Consensus.take_ready
_adopt_term = Consensus._adopt_term
_written = SimNode.written
_step = Consensus.step


def _persisted_without_state(self: Consensus) -> None:
    ready = self._open
    assert ready is not None
    self._open = attrs.evolve(ready, hard_state=HardState(self.current_term, self.voted_for))
    _persisted(self)


_persisted = Consensus.persisted


def _votes_leave_early(self: SimNode, ready: Ready) -> None:
    _leave_early(self, ready, VoteReply)


def _acks_leave_early(self: SimNode, ready: Ready) -> None:
    _leave_early(self, ready, AppendReply)


def _leave_early(self: SimNode, ready: Ready, kind: type[Any]) -> None:
    for outbound in ready.messages:
        if isinstance(outbound.message, kind):
            self.send(outbound)


def _keep_vote(self: Consensus, term: int) -> None:
    voted_for = self.voted_for
    _adopt_term(self, term)
    self.voted_for = voted_for


def _count_by_counter(self: Consensus, message: VoteReply) -> None:
    poll = self._poll
    if poll is None or message.poll_term != poll.term or message.pre_vote != poll.pre_vote:
        return
    if message.granted:  # the same voter counts again: it gets the name of one who has not voted
        others = [name for name in self.membership.all_voters if name not in poll.granted]
        poll.granted.add(message.sender if message.sender not in poll.granted or not others else others[0])
    self._count_votes(poll)


def _count_stale_votes(self: Consensus, message: Any) -> None:
    if isinstance(message, VoteReply) and message.granted and not message.pre_vote and self._poll and not self._poll.pre_vote:
        self._poll.granted.add(message.sender)
        self._count_votes(self._poll)
        return
    _step(self, message)


def _stand_at_once(self: Consensus) -> None:
    self._draw_timeout()
    if self.membership.is_voter(self.node_id) and not self.damaged:
        self._stand(transfer=False)


def _refuse_without_term(self: Consensus, message: RequestVote) -> None:
    granted = (
        message.term > self.current_term
        and self.log.is_up_to_date(message.last_index, message.last_term)
        and not self.damaged
        and not self._leader_is_alive()
    )
    self._answer(message.sender, VoteReply(message.term - 1, self.node_id, message.term, granted, pre_vote=True))


def _pre_vote_takes_term(self: Consensus, message: RequestVote) -> None:
    if message.term > self.current_term + 1:
        self._adopt_term(message.term - 1)
    _on_pre_vote(self, message)


_on_pre_vote = Consensus._on_pre_vote


# -- logs -----------------------------------------------------------------------------------------------------------------
def _old_terms_welcome(self: Consensus, message: Any) -> None:
    if isinstance(message, AppendEntries) and message.term < self.current_term and self.role is not Role.LEADER:
        self._on_append_entries(message)
        return
    _step(self, message)


def _prev_term_unchecked(self: Consensus, message: AppendEntries) -> None:
    if message.prev_index <= self.last_index:
        message = attrs.evolve(message, prev_term=self.log.term_at(message.prev_index) or 0)
    _on_append_entries(self, message)


_on_append_entries = Consensus._on_append_entries


def _never_truncate(self: RaftLog, prev_index: int, entries: Any) -> Any:
    fresh = [entry for entry in entries if entry.index > self.last_index]
    fresh = [entry for entry in fresh if entry.term >= self.last_term]
    self.append(fresh)
    return None, fresh


def _always_truncate(self: RaftLog, prev_index: int, entries: Any) -> Any:
    first = max(prev_index, self.commit_index) + 1
    fresh = [entry for entry in entries if entry.index >= first]
    truncated = first if first <= self.last_index else None
    if truncated is not None:
        self.truncate(truncated)
    self.append(fresh)
    return truncated, fresh


def _ack_last_index(self: Consensus, leader_id: str, index: int, commit_index: int) -> None:
    _verified(self, leader_id, self.last_index, min(commit_index, index))


_verified = Consensus._verified


def _commit_unclamped(self: Consensus, leader_id: str, index: int, commit_index: int) -> None:
    self._commit(min(commit_index, self.last_index))
    _verified(self, leader_id, index, 0)


def _heartbeat_commit_unclamped(self: Consensus, message: Any) -> None:
    self._commit(min(message.commit_index, self.last_index))
    _on_heartbeat(self, message)


_on_heartbeat = Consensus._on_heartbeat


def _tell_commit_unclamped(self: Leader) -> None:
    self._round += 1
    for name in self.progress:
        self.outbox.append(Outbound(name, Heartbeat(self.term, self.node_id, self._log.commit_index, self._round)))


def _commit_any_term(self: Consensus) -> None:
    if self._lead is not None:
        self._commit(self._lead.majority_index(self.log.persisted_index))


def _count_unsynced_self(self: Leader, persisted_index: int) -> dict[str, int]:
    match = {name: progress.match_index for name, progress in self.progress.items()}
    match[self.node_id] = self._log.last_index
    return match


def _count_stale_acks(self: Consensus, message: Any) -> None:
    if isinstance(message, AppendReply) and message.accepted and self._lead is not None and message.term < self.current_term:
        index = min(message.index, self.last_index)
        self._lead.on_append_reply(attrs.evolve(message, index=index))
        self._advance_commit()
        return
    _step(self, message)


def _no_noop(self: Consensus) -> None:
    _become_leader(self)
    assert self._lead is not None
    if len(self.membership.everyone) > 1:
        self.log.truncate(self.last_index)
        self._lead.term_start_index = self.term_start_index = 0


_become_leader = Consensus._become_leader


# -- driver and disk --------------------------------------------------------------------------------------------------------
def _fsync_error_ignored(self: SimNode, core: Consensus, ready: Ready) -> None:
    self.disk.forget_write(self.world.rng)
    for entry in ready.entries:
        self.disk._place(entry)
    if ready.hard_state is not None:
        self.disk.hard_state = ready.hard_state
    if ready.snapshot is not None:
        self.disk.install(ready.snapshot)
    self.world.act(self, self.written, core, ready)


def _skip_holes(self: Disk) -> None:
    self.entries.clear()
    kept = []
    for frame in self.frames:
        if frame.good and frame.entry.index <= self.last_index + 1:
            self._place(frame.entry)
            kept.append(frame)
    self.frames, self.synced = kept, len(kept)
    if self.snapshot is not None and self.last_index < self.snapshot.meta.index:
        self.install(self.snapshot)


def _renumbered(self: Disk) -> None:
    """Records behind a bad one are taken for what comes next."""
    self.entries.clear()
    kept = [frame for frame in self.frames if frame.good]
    for frame in kept:
        position = min(frame.entry.index, self.last_index + 1)
        self._place(attrs.evolve(frame.entry, index=position))
    self.frames, self.synced = kept, len(kept)
    if self.snapshot is not None and self.last_index < self.snapshot.meta.index:
        self.install(self.snapshot)


def _unchained(self: Disk, frame: Frame, before: int) -> bool:
    return frame.good and frame.entry.index <= self.last_index + 1


def _no_damage(self: Disk) -> None:
    self.rotten = False


def _apply_everything(self: SimNode, core: Consensus) -> int:
    return core.persisted_index


def _dedupe_forgotten(self: SimNode, snapshot: Any) -> State:
    state = _restored(self, snapshot)
    state.positions.clear()
    return state


_restored = SimNode.restored


# -- reads ------------------------------------------------------------------------------------------------------------------
def _read_locally(self: Leader, token: Any) -> None:
    self.reads_ready.append(ReadReady(token, self._log.commit_index))


def _read_with_running_round(self: Leader, token: Any) -> None:
    """Join the round that is under way: it began before this read arrived."""
    if self._log.commit_index < self.term_start_index:
        self._early.append(token)
        return
    self._waiting.append((self._round, token, self._log.commit_index))
    self._release_reads()


def _read_before_own_commit(self: Leader, token: Any) -> None:
    start, self.term_start_index = self.term_start_index, 0
    _leader_read_index(self, token)
    self.term_start_index = start


_leader_read_index = Leader.read_index


# -- contact ----------------------------------------------------------------------------------------------------------------
def _always_in_contact(self: Leader) -> bool:
    return True


# -- membership -------------------------------------------------------------------------------------------------------------
def _single_majority(self: Membership, match_index: Any) -> int:
    return Membership(voters=self.voters).committed_index(match_index) if self.outgoing else _committed_index(self, match_index)


_committed_index = Membership.committed_index


def _vote_of_new_half(self: Membership, granted: Any, refused: Any = ()) -> Any:
    return _membership_vote(attrs.evolve(self, outgoing=()), granted, refused)


_membership_vote = Membership.vote


def _learners_count(self: Membership, match_index: Any) -> int:
    return _committed_index(attrs.evolve(self, voters=(*self.voters, *self.learners), learners=()), match_index)


def _no_rollback(self: MembershipHistory, first_gone: int) -> None:
    while self._history[-1][0] >= first_gone:
        _, membership = self._history.pop()
        if not self._history or self._history[-1][0] < first_gone:
            self._history.append((first_gone - 1, membership))
            return


def _change_any_time(self: Consensus, change: Callable[[], Membership], now_ms: int, caught_up: Any = None) -> LogEntry:
    self._leading()
    try:
        membership = change()
    except ValueError as error:
        from ayder.errors import AyderError, ErrorCode

        raise AyderError(ErrorCode.INVALID_REQUEST, str(error)) from error
    return self.propose(EntryKind.MEMBERSHIP, membership.encode(), now_ms)


# -- damage, snapshots --------------------------------------------------------------------------------------------------------
def _repaired_early(self: Repair, term: int, verified_index: int) -> bool:
    return self.damaged and self._barrier is not None and self._barrier[0] == term and verified_index > 0


def _old_incarnations_count(self: Progress, now: int, incarnation: int, damaged: bool, leader_last: int) -> bool:
    self.last_contact = now
    if damaged and self.barrier is None:
        self.barrier = Barrier(incarnation, leader_last)
    self.incarnation = incarnation
    self.damaged = damaged
    return True


def _keep_conflicting_log(self: RaftLog, meta: Any) -> None:
    """A snapshot arrives, the old entries behind it stay."""
    if self.last_index <= meta.index:
        _restore(self, meta)
        return
    self.commit_index = max(self.commit_index, meta.index)


_restore = RaftLog.restore


def _snapshot_forgets_membership(self: MembershipHistory, index: int, membership: Membership) -> None:
    self._history = [(index, self.current)]


def _stale_timeout_now(self: Consensus, message: Any) -> None:
    from ayder.raft.messages import TimeoutNow

    if isinstance(message, TimeoutNow) and self.role is not Role.LEADER and self.membership.is_voter(self.node_id):
        self.role, self.voted_for = Role.LEADER, self.node_id
        self._become_leader()
        return
    _step(self, message)


def splice() -> None:
    """A power cut leaves the end of an unfinished write and not its beginning: recovery must not join two histories."""

    class Second(random.Random):
        """Of three unsynced frames the last two survive."""

        def __init__(self) -> None:
            super().__init__(0)
            self.draws = iter((0.99, 0.0, 0.0, 0.99))

        def random(self) -> float:
            return next(self.draws)

        def choice(self, options: Any) -> Any:
            return 0.5

    def entries(first: int, last: int, term: int) -> list[LogEntry]:
        return [LogEntry(index, term, EntryKind.BLOCK, 0, b"%d" % term) for index in range(first, last + 1)]

    disk = Disk()
    disk.write(entries(1, 6, 1), HardState(1), None, False)
    disk.sync()
    disk.write(entries(4, 6, 2), None, None, False)
    disk.power_cut(Second(), torn=False, rot=False)
    assert [entry.term for entry in disk.entries] == [1] * 6, disk.entries


MUTANTS: tuple[Mutant, ...] = (
    Mutant("vote without log check", ((RaftLog, "is_up_to_date", lambda self, index, term: True),), seeds=1, story="figure_7"),
    Mutant(
        "vote by index only",
        ((RaftLog, "is_up_to_date", lambda self, index, term: index >= self.last_index),),
        seeds=95,
        story="figure_7",
    ),
    Mutant(
        "vote by term only",
        ((RaftLog, "is_up_to_date", lambda self, index, term: term >= self.last_term),),
        seeds=1,
        story="figure_7",
    ),
    Mutant(
        "term and vote in memory",
        ((Consensus, "take_ready", _voted_from_memory), (Consensus, "persisted", _persisted_without_state)),
        seeds=1,
        story="unverified",
    ),
    Mutant("vote sent before sync", ((SimNode, "before_sync", _votes_leave_early),), seeds=1),
    Mutant("vote kept into the next term", ((Consensus, "_adopt_term", _keep_vote),), seeds=1, story="old_terms"),
    Mutant("duplicate votes counted", ((Consensus, "_on_vote_reply", _count_by_counter),), seeds=1, story="old_terms"),
    Mutant("stale votes counted", ((Consensus, "step", _count_stale_votes),), story="old_terms"),
    Mutant("accepts appends of an old term", ((Consensus, "step", _old_terms_welcome),), seeds=3, story="damage"),
    Mutant("previous term unchecked", ((Consensus, "_on_append_entries", _prev_term_unchecked),), seeds=4, story="figure_7"),
    Mutant("conflicts not truncated", ((RaftLog, "accept", _never_truncate),), seeds=3, story="conflicts"),
    Mutant("always truncates", ((RaftLog, "accept", _always_truncate),), seeds=1, story="match_is_prev_plus_length"),
    Mutant("match is the last index", ((Consensus, "_verified", _ack_last_index),), story="match_is_prev_plus_length"),
    Mutant("commit not clamped", ((Consensus, "_verified", _commit_unclamped),), story="match_is_prev_plus_length"),
    Mutant(
        "heartbeat commits unverified",
        ((Consensus, "_on_heartbeat", _heartbeat_commit_unclamped), (Leader, "begin_round", _tell_commit_unclamped)),
        seeds=12,
        story="unverified",
    ),
    Mutant("commits entries of old terms", ((Consensus, "_advance_commit", _commit_any_term),), seeds=6, story="figure_8"),
    Mutant("acknowledges before the sync", ((SimNode, "before_sync", _acks_leave_early),), seeds=1),
    Mutant("leader counts its unsynced copy", ((Leader, "_match", _count_unsynced_self),), seeds=2, story="slow_disk"),
    Mutant("fsync error ignored", ((SimNode, "sync_failed", _fsync_error_ignored),), seeds=3),
    Mutant("recovery skips holes", ((Disk, "recover", _renumbered),), seeds=8, story="damage"),
    Mutant("recovery skips what does not verify", ((Disk, "recover", _skip_holes),), seeds=44, story="damage"),
    Mutant("rot is cut and forgotten", ((Disk, "found_damage", _no_damage),), seeds=44, story="damage"),
    Mutant("applies what is not committed", ((SimNode, "apply_limit", _apply_everything),), seeds=1),
    Mutant("reads at the leader unconfirmed", ((Leader, "read_index", _read_locally),), seeds=3, story="read_index"),
    Mutant("no entry at the start of a term", ((Consensus, "_become_leader", _no_noop),), seeds=1, story="term_at_start"),
    Mutant("dedupe table not in the snapshot", ((SimNode, "restored", _dedupe_forgotten),), seeds=102),
    Mutant("no pre-vote", ((Consensus, "campaign", _stand_at_once),), seeds=5, story="pre_vote"),
    Mutant("no check-quorum", ((Leader, "has_contact", _always_in_contact),), seeds=1, story="check_quorum"),
    Mutant("pre-vote refused without the term", ((Consensus, "_on_pre_vote", _refuse_without_term),), story="pre_vote"),
    Mutant("log records not chained", ((Disk, "accepts", _unchained),), directed="splice"),
    Mutant("stale acknowledgements counted", ((Consensus, "step", _count_stale_acks),), story="stale_acks"),
    # -- beyond the 28 of RELIABILITY 3.3
    Mutant("pre-vote changes the term", ((Consensus, "_on_pre_vote", _pre_vote_takes_term),), seeds=3, story="pre_vote"),
    Mutant("read joins a round under way", ((Leader, "read_index", _read_with_running_round),), story="read_index"),
    Mutant(
        "read before this term's first commit", ((Leader, "read_index", _read_before_own_commit),), seeds=17, story="read_index"
    ),
    Mutant("joint commit by the new half only", ((Membership, "committed_index", _single_majority),), seeds=60),
    Mutant("joint votes by the new half only", ((Membership, "vote", _vote_of_new_half),), story="joint_votes"),
    Mutant("learners are counted", ((Membership, "committed_index", _learners_count),), seeds=6, story="joint"),
    Mutant("configuration not rolled back", ((MembershipHistory, "truncated", _no_rollback),), seeds=19, story="joint"),
    Mutant("membership changes overlap", ((Consensus, "_change", _change_any_time),), seeds=1, story="joint"),
    Mutant("damage cleared by the first verified entry", ((Repair, "is_due", _repaired_early),), seeds=44, story="damage"),
    Mutant("acknowledgements of older incarnations counted", ((Progress, "heard", _old_incarnations_count),), story="damage"),
    Mutant(
        "snapshot keeps the conflicting log", ((RaftLog, "restore", _keep_conflicting_log),), story="snapshot_of_a_deposed_leader"
    ),
    Mutant(
        "snapshot without the membership",
        ((MembershipHistory, "restored", _snapshot_forgets_membership),),
        story="snapshot_conflict",
    ),
    Mutant("hand-over takes the lead without an election", ((Consensus, "step", _stale_timeout_now),), seeds=3, story="transfer"),
)
