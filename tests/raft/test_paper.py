"""The paper and the thesis, walked by section: one test for each sentence that tells an implementer what to do."""

from __future__ import annotations

import pytest

from ayder.entries import EntryKind, HardState
from ayder.errors import AyderError, ErrorCode
from ayder.raft.consensus import Consensus, Role
from ayder.raft.membership import Membership
from ayder.raft.messages import (
    AppendEntries,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    RequestVote,
    Snapshot,
    SnapshotMeta,
    TimeoutNow,
    VoteReply,
)
from ayder.raft.progress import Limits, ProgressState
from tests.raft.group import Group, entries, make_disk
from tests.sim.disk import Disk

THREE = ("a", "b", "c")


def kinds(sent: list) -> list[str]:
    return [type(outbound.message).__name__ for outbound in sent]


# -- 5.1 Raft basics ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "message",
    [
        RequestVote(5, "b", 9, 4), AppendEntries(5, "b", 0, 0, (), 0), Heartbeat(5, "b", 0, 1), AppendReply(5, "b", True, 1),
        HeartbeatReply(5, "b", 1, 0), VoteReply(5, "b", 4, False),
    ],
    ids=lambda message: type(message).__name__,
)  # fmt: skip
@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE, Role.LEADER])
def test_5_1_a_newer_term_makes_a_follower_of_everyone(message: Message, role: Role) -> None:
    group = Group(*THREE)
    if role is Role.CANDIDATE:
        group.campaign("a")
        group.step("a", VoteReply(0, "b", 1, True, pre_vote=True))
    if role is Role.LEADER:
        group.elect("a")
        group["a"].leadership.has_contact = lambda: True  # type: ignore[method-assign, union-attr]
    assert group["a"].role is role
    if role is Role.LEADER and isinstance(message, RequestVote):
        return  # 4.2.3 of the thesis: a leader with contact to a majority is not disturbed by a candidate (tested below)
    group.step("a", message)
    assert (group["a"].role, group["a"].current_term) == (Role.FOLLOWER, 5)
    assert group.disks["a"].hard_state.term == 5


def test_5_1_a_request_of_an_older_term_is_rejected() -> None:
    group = Group(*THREE, disks={"a": make_disk(1, 3, term=3)})
    for stale in (AppendEntries(2, "b", 1, 1, tuple(entries(1, 2)[1:]), 2), Heartbeat(2, "b", 2, 1), RequestVote(2, "b", 9, 2)):
        (answer,) = group.step("a", stale)
        assert answer.to == "b" and answer.message.term == 3
        assert not getattr(answer.message, "granted", False)
    assert (group["a"].commit_index, group["a"].last_index, group["a"].leader_id) == (0, 2, None)


# -- 5.2 Leader election -----------------------------------------------------------------------------------------------
def test_5_2_a_follower_that_hears_nothing_stands_within_one_to_two_timeouts() -> None:
    spreads = iter([0, 9, 4, 0, 0])
    group = Group("a", "b", disks=None, spread=lambda n: next(spreads))
    ticks = 0
    while not group.sent:
        group["a"].tick()
        group.work("a")
        ticks += 1
    assert ticks == 10  # the first draw was 0
    group.sent.clear()
    while not group.sent:
        group["b"].tick()
        group.work("b")
        ticks += 1
    assert ticks == 10 + 19  # the second was 9


def test_5_2_a_candidate_votes_for_itself_on_disk_before_it_asks() -> None:
    group = Group(*THREE)
    group.campaign("a")
    group["a"].step(VoteReply(0, "b", 1, True, pre_vote=True))
    assert group["a"].take_messages() == []
    ready = group["a"].take_ready()
    assert ready is not None and ready.hard_state == HardState(1, "a")
    assert kinds(list(ready.messages)) == ["RequestVote", "RequestVote"]


def test_5_2_one_vote_a_term_first_come_first_served_also_after_a_restart() -> None:
    group = Group(*THREE)
    (first,) = group.step("c", RequestVote(1, "a", 0, 0))
    (second,) = group.step("c", RequestVote(1, "b", 0, 0))
    (again,) = group.step("c", RequestVote(1, "a", 0, 0))
    assert [one.message.granted for one in (first, second, again)] == [True, False, True]  # type: ignore[union-attr]
    restarted = Group(*THREE, disks=group.disks)
    (after,) = restarted.step("c", RequestVote(1, "b", 0, 0))
    assert not after.message.granted  # type: ignore[union-attr]


def test_5_2_a_candidate_steps_back_for_a_leader_of_its_own_term() -> None:
    group = Group(*THREE)
    group.campaign("a")
    group.step("a", VoteReply(0, "b", 1, True, pre_vote=True))
    assert group["a"].role is Role.CANDIDATE
    group.step("a", Heartbeat(1, "c", 0, 1))
    assert (group["a"].role, group["a"].leader_id) == (Role.FOLLOWER, "c")


def test_5_2_a_majority_of_votes_wins_and_the_winner_shows_itself_at_once() -> None:
    group = Group("a", "b", "c", "d", "e")
    group.campaign("a")
    for name in ("b", "c"):
        group.step("a", VoteReply(0, name, 1, True, pre_vote=True))
    group.sent.clear()
    group.step("a", VoteReply(1, "b", 1, True))
    assert group["a"].role is Role.CANDIDATE
    sent = group.step("a", VoteReply(1, "c", 1, True))
    assert group["a"].role is Role.LEADER
    assert [one.to for one in sent if isinstance(one.message, Heartbeat)] == ["b", "c", "d", "e"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7])
def test_5_2_groups_of_one_to_seven_elect_and_commit(size: int) -> None:
    names = tuple("abcdefg"[:size])
    group = Group(*names)
    group.campaign("a")
    group.run()
    assert group["a"].role is Role.LEADER
    group["a"].propose(EntryKind.BLOCK, b"x", 0)
    group.work("a")
    group.run()
    assert [group[name].commit_index for name in names] == [2] * size


# -- 5.3 Log replication -----------------------------------------------------------------------------------------------
def test_5_3_only_a_leader_takes_proposals_and_only_at_the_end_of_its_log() -> None:
    group = Group(*THREE)
    with pytest.raises(AyderError) as refused:
        group["a"].propose(EntryKind.BLOCK, b"x", 0)
    assert refused.value.code is ErrorCode.NOT_LEADER
    group.elect("a")
    assert [group["a"].propose(EntryKind.BLOCK, b"x", 0).index for _ in range(3)] == [2, 3, 4]


def test_5_3_an_append_without_the_previous_entry_is_refused() -> None:
    group = Group(*THREE, disks={"b": make_disk(1, 1)})
    for index, term in ((3, 1), (2, 2)):
        (reply,) = group.step("b", AppendEntries(2, "a", index, term, (), 0))
        assert isinstance(reply.message, AppendReply) and not reply.message.accepted and reply.message.index == index


def test_5_3_log_time_never_goes_back_whatever_clock_leads() -> None:
    group = Group(*THREE)
    group.elect("a")
    times = [group["a"].propose(EntryKind.BLOCK, b"x", now).log_time_ms for now in (500, 400, 600)]
    group.work("a")
    group.run()
    group.elect("b")
    times.append(group["b"].propose(EntryKind.BLOCK, b"x", 100).log_time_ms)
    assert times == [500, 500, 600, 600]


def test_5_3_committed_entries_are_told_with_the_next_message_even_to_an_idle_follower() -> None:
    group = Group(*THREE)
    group.elect("a")
    group["a"].propose(EntryKind.BLOCK, b"x", 0)
    group.work("a")
    group.run()
    assert [group[name].commit_index for name in THREE] == [2, 2, 2]


# -- 5.4 Safety --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mine", "theirs", "granted"),
    [((1,), (1,), True), ((1,), (1, 1), True), ((1, 1), (1,), False), ((1, 1), (2,), True), ((2,), (1, 1, 1), False)],
)
def test_5_4_1_a_vote_goes_to_a_log_at_least_as_up_to_date(mine: tuple[int, ...], theirs: tuple[int, ...], granted: bool) -> None:
    group = Group(*THREE, disks={"b": make_disk(*mine)})
    for pre_vote in (True, False):
        (reply,) = group.step("b", RequestVote(9, "a", len(theirs), theirs[-1], pre_vote=pre_vote))
        assert isinstance(reply.message, VoteReply) and reply.message.granted is granted


def test_5_4_2_old_entries_are_committed_only_by_one_of_this_term() -> None:
    group = Group(*THREE, disks={name: make_disk(1, 1) for name in THREE}, limits=Limits(max_append_entries=1))
    group.campaign("a")
    group.run("a", "b")
    assert group["a"].term_start_index == 3 and group["a"].commit_index == 3
    fresh = Group(*THREE, disks={name: make_disk(1, 1) for name in THREE})
    fresh.campaign("a")
    fresh.step("a", VoteReply(1, "b", 2, True, pre_vote=True))
    fresh.step("a", VoteReply(2, "b", 2, True))
    fresh.step("a", AppendReply(2, "b", True, 2))
    assert fresh["a"].commit_index == 0


# -- 5.5 Crashes of followers and candidates ---------------------------------------------------------------------------
def test_5_5_messages_may_come_twice() -> None:
    group = Group(*THREE)
    append = AppendEntries(1, "a", 0, 0, tuple(entries(1, 1)), 1)
    first = group.step("b", append)
    second = group.step("b", append)
    assert first == second and group["b"].last_index == 2
    assert [entry.index for entry in group.disks["b"].entries] == [1, 2]


# -- thesis 3.8 Persisted state ----------------------------------------------------------------------------------------
def test_3_8_an_acknowledgement_and_a_vote_leave_with_the_append_that_keeps_them() -> None:
    group = Group(*THREE)
    core = group["b"]
    core.step(AppendEntries(1, "a", 0, 0, tuple(entries(1)), 0))
    assert core.take_messages() == []
    ready = core.take_ready()
    assert ready is not None and ready.hard_state == HardState(1, None) and len(ready.entries) == 1
    assert [one.message for one in ready.messages] == [AppendReply(1, "b", True, 1)]
    core.step(RequestVote(2, "c", 5, 1, transfer=True))
    assert core.take_messages() == []
    core.persisted()
    ready = core.take_ready()
    assert ready is not None and ready.hard_state == HardState(2, "c")
    assert [one.message for one in ready.messages] == [VoteReply(2, "b", 2, True)]


def test_3_8_an_acknowledgement_for_entries_that_were_replaced_meanwhile_is_not_sent() -> None:
    core = Group(*THREE)["b"]
    core.step(AppendEntries(1, "a", 0, 0, tuple(entries(1, 1)), 0))
    core.step(AppendEntries(2, "c", 0, 0, tuple(entries(2)), 0))
    ready = core.take_ready()
    assert ready is not None and [entry.term for entry in ready.entries] == [2]
    assert [(one.to, one.message) for one in ready.messages] == [("c", AppendReply(2, "b", True, 1))]


def test_3_8_a_write_under_way_when_its_entries_are_replaced_counts_only_up_to_there() -> None:
    core = Group(*THREE)["b"]
    core.step(AppendEntries(1, "a", 0, 0, tuple(entries(1, 1, 1)), 0))
    assert core.take_ready() is not None
    core.step(AppendEntries(2, "c", 1, 1, tuple(entries(1, 2)[1:]), 0))
    core.persisted()
    assert (core.persisted_index, core.last_index) == (1, 2)
    ready = core.take_ready()
    assert ready is not None and [(entry.index, entry.term) for entry in ready.entries] == [(2, 2)]
    core.persisted()
    assert core.persisted_index == 2
    core.check_invariants()


def test_3_8_entries_that_survived_a_power_cut_without_their_term_bring_it_back() -> None:
    core = Group(*THREE, disks={"a": make_disk(1, 4, term=2, vote="b")})["a"]
    assert (core.current_term, core.voted_for) == (4, None)
    ready = core.take_ready()
    assert ready is not None and ready.hard_state == HardState(4, None)


# -- thesis 3.10 Leadership transfer -----------------------------------------------------------------------------------
def test_3_10_proposals_wait_outside_while_the_lead_is_handed_over() -> None:
    group = Group(*THREE)
    group.elect("a")
    assert group["a"].transfer_leadership() in ("b", "c")
    with pytest.raises(AyderError) as refused:
        group["a"].propose(EntryKind.BLOCK, b"x", 0)
    assert refused.value.code is ErrorCode.NOT_LEADER
    group.work("a")
    group.run()
    assert group["a"].role is Role.FOLLOWER and group["a"].current_term == 2


def test_3_10_a_damaged_node_or_a_learner_that_is_told_to_stand_does_not() -> None:
    disk = make_disk(1)
    disk.found_damage()
    group = Group(*THREE, disks={"b": disk})
    group.step("b", TimeoutNow(1, "a"))
    assert group["b"].role is Role.FOLLOWER and group["b"].current_term == 1


# -- thesis 4 Membership -----------------------------------------------------------------------------------------------
def test_4_1_a_configuration_is_in_force_when_it_is_appended_and_gone_when_it_is_truncated() -> None:
    group = Group(*THREE)
    group.elect("a")
    group["a"].add_learner("d", 0)
    assert group["a"].membership.learners == ("d",)
    group.step("a", AppendEntries(2, "b", 1, 1, (entries(1, 2)[1],), 1))
    assert group["a"].membership == Membership(voters=THREE)


def test_4_1_a_restart_finds_the_configuration_in_the_log() -> None:
    group = Group(*THREE)
    group.elect("a")
    group["a"].add_learner("d", 0)
    group.work("a")
    again = Group(*THREE, disks=group.disks)
    assert again["a"].membership.learners == ("d",) and again["a"].membership_index == 2


def test_4_1_one_change_at_a_time_and_none_before_a_commit_of_this_term() -> None:
    group = Group(*THREE)
    group.campaign("a")
    group.step("a", VoteReply(0, "b", 1, True, pre_vote=True))
    group.step("a", VoteReply(1, "b", 1, True))
    with pytest.raises(AyderError) as early:
        group["a"].add_learner("d", 0)
    assert early.value.code is ErrorCode.CHANGE_IN_PROGRESS
    group.step("a", AppendReply(1, "b", True, 1))
    group["a"].add_learner("d", 0)
    with pytest.raises(AyderError) as second:
        group["a"].remove("b", 0)
    assert second.value.code is ErrorCode.CHANGE_IN_PROGRESS


def test_4_2_1_a_learner_that_was_never_heard_is_not_promoted() -> None:
    group = Group(*THREE)
    group.elect("a")
    group["a"].add_learner("d", 0)
    group.work("a")
    group.run()
    with pytest.raises(AyderError) as refused:
        group["a"].promote("d", 0)
    assert refused.value.code is ErrorCode.CHANGE_IN_PROGRESS and not group["a"].membership.is_joint


def test_4_2_2_a_node_outside_the_configuration_never_stands() -> None:
    core = Consensus(node_id="x", voters=(), log=Disk(), election_ticks=10)
    for _ in range(50):
        core.tick()
    assert core.take_messages() == [] and core.take_ready() is None and core.current_term == 0


def test_4_2_3_a_candidate_does_not_disturb_those_who_hear_a_leader() -> None:
    group = Group(*THREE)
    group.elect("a")
    for name in ("a", "b"):
        assert group.step(name, RequestVote(7, "c", 99, 9)) == []
        assert group[name].current_term == 1
    group.step("b", RequestVote(7, "c", 99, 9, transfer=True))
    assert group["b"].current_term == 7


# -- thesis 5 Snapshots ------------------------------------------------------------------------------------------------
def snapshot(index: int, term: int) -> Snapshot:
    return Snapshot(SnapshotMeta(index, term, Membership(voters=THREE), 77), b"state")


def test_5_1_a_snapshot_ahead_of_the_log_replaces_it_and_is_acknowledged_when_it_is_on_disk() -> None:
    core = Group(*THREE, disks={"b": make_disk(1, 1)})["b"]
    core.step(InstallSnapshot(3, "a", snapshot(8, 2)))
    assert (core.last_index, core.last_term, core.commit_index) == (8, 2, 8) and core.persisted_index == 0
    ready = core.take_ready()
    assert ready is not None and ready.snapshot == snapshot(8, 2)
    assert [one.message for one in ready.messages] == [AppendReply(3, "b", True, 8)]
    core.persisted()
    assert core.persisted_index == 8


def test_5_1_a_snapshot_inside_the_log_keeps_what_follows() -> None:
    core = Group(*THREE, disks={"b": make_disk(1, 1, 1)})["b"]
    core.step(InstallSnapshot(3, "a", snapshot(2, 1)))
    ready = core.take_ready()
    assert ready is not None and ready.snapshot is None
    assert (core.last_index, core.commit_index) == (3, 2)


def test_5_1_an_old_snapshot_takes_nothing_back() -> None:
    group = Group(*THREE)
    group.step("b", AppendEntries(1, "a", 0, 0, tuple(entries(1, 1, 1)), 3))
    (reply,) = group.step("b", InstallSnapshot(1, "a", snapshot(2, 1)))
    assert reply.message == AppendReply(1, "b", True, 2) and group["b"].commit_index == 3


# -- thesis 6.2, 6.4 Leaders that are cut off; reads -------------------------------------------------------------------
def test_6_2_a_leader_without_a_majority_steps_down_within_an_election_timeout() -> None:
    group = Group(*THREE)
    group.elect("a")
    ticks = 0
    while group["a"].role is Role.LEADER:
        group["a"].tick()
        group.work("a")
        ticks += 1
    assert ticks == 11 and group["a"].leader_id is None


def test_6_2_answers_of_learners_and_strangers_are_no_contact() -> None:
    group = Group(*THREE)
    group.elect("a")
    group["a"].add_learner("d", 0)
    for _ in range(11):
        group["a"].tick()
        for name in ("d", "x"):
            group.step("a", HeartbeatReply(1, name, 99, 0))
    assert group["a"].role is Role.FOLLOWER


def test_6_4_a_read_needs_a_round_that_began_after_it_arrived() -> None:
    group = Group(*THREE)
    group.elect("a")
    group["a"].read_index("r1")
    (one, *_) = [out.message.round for out in group.work("a") if isinstance(out.message, Heartbeat)]
    group["a"].read_index("r2")
    group.step("a", HeartbeatReply(1, "b", one, 1))
    assert [read.token for read in group["a"].take_reads()] == ["r1"]
    group.step("a", HeartbeatReply(1, "c", one, 1))
    assert group["a"].take_reads() == []
    group.step("a", HeartbeatReply(1, "c", one + 1, 1))
    assert [read.token for read in group["a"].take_reads()] == ["r2"]


def test_6_4_a_single_node_reads_at_once_and_a_deposed_one_fails_its_readers() -> None:
    alone = Group("a")
    alone.campaign("a")
    alone["a"].read_index("r")
    assert [(read.token, read.index) for read in alone["a"].take_reads()] == [("r", 1)]
    group = Group(*THREE)
    group.elect("a")
    group["a"].read_index("r")
    group.step("a", Heartbeat(2, "b", 0, 1))
    assert [(read.token, read.index) for read in group["a"].take_reads()] == [("r", None)]


# -- thesis 9.6 Pre-vote -----------------------------------------------------------------------------------------------
def test_9_6_asking_and_answering_changes_no_term_on_either_side() -> None:
    group = Group(*THREE)
    group.campaign("a")
    (reply,) = group.step("b", RequestVote(1, "a", 0, 0, pre_vote=True))
    assert reply.message == VoteReply(0, "b", 1, True, pre_vote=True)
    assert [core.current_term for core in group.cores.values()] == [0, 0, 0]
    assert all(not disk.frames and disk.hard_state == HardState() for disk in group.disks.values())


# -- thesis 10.2.1 Writing while sending; flow control -----------------------------------------------------------------
def test_10_2_1_a_leader_sends_before_it_synced_and_counts_itself_after() -> None:
    group = Group(*THREE)
    group.elect("a")
    core = group["a"]
    core.propose(EntryKind.BLOCK, b"x", 0)
    assert isinstance(core.next_append("b"), AppendEntries)
    ready = core.take_ready()
    assert ready is not None
    core.step(AppendReply(1, "b", True, 2))
    assert core.commit_index == 1
    core.persisted()
    assert core.commit_index == 2


def test_appends_under_way_are_bounded_in_number_and_bytes() -> None:
    for limits, expected in (
        (Limits(max_append_entries=1, max_inflight_appends=3), 3),
        (Limits(max_append_entries=1, max_inflight_bytes=250), 3),
    ):
        group = Group(*THREE, limits=limits)
        group.elect("a")
        for _ in range(10):
            group["a"].propose(EntryKind.BLOCK, bytes(100), 0)
        sent = [out for out in group.work("a") if out.to == "b"]
        assert len(sent) == expected
        (progress, *_) = group["a"].leadership.progress.values()  # type: ignore[union-attr]
        assert progress.inflight_bytes == 300
        more = group.step("a", AppendReply(1, "b", True, 2))
        assert len([out for out in more if out.to == "b"]) == 1


def test_an_entry_larger_than_an_append_may_be_goes_alone() -> None:
    group = Group(*THREE, limits=Limits(max_append_bytes=100))
    group.elect("a")
    for size in (500, 10, 10):
        group["a"].propose(EntryKind.BLOCK, bytes(size), 0)
    assert [len(out.message.entries) for out in group.work("a") if out.to == "b"] == [1, 2]  # type: ignore[union-attr]


def test_entries_that_left_memory_are_read_from_disk_and_checked_against_what_leads_now() -> None:
    group = Group(*THREE, limits=Limits(cache_bytes=0), disks={name: make_disk(1) for name in THREE})
    group.elect("a")
    for value in (b"x", b"y", b"z"):
        group["a"].propose(EntryKind.BLOCK, value, 0)
    group.work("a")
    group.sent.clear()
    group["a"].peer_reset("c")
    plan = group["a"].next_append("c")
    assert plan is not None and not isinstance(plan, AppendEntries)
    assert plan.first == 3  # type: ignore[union-attr]
    stale = entries(1, 1, 1, 1)
    assert group["a"].append_read(plan, stale[2:]) is None  # type: ignore[arg-type]
    good = group["a"].append_read(plan, group.disks["a"].read(3, 5))  # type: ignore[arg-type]
    assert good is not None and [entry.index for entry in good.entries] == [3, 4, 5]
    assert group["a"].append_read(plan, group.disks["a"].read(3, 5)) is None  # type: ignore[arg-type]


def test_silence_after_an_append_is_taken_for_a_loss_and_a_broken_stream_too() -> None:
    group = Group(*THREE)
    group.elect("a")
    group["a"].propose(EntryKind.BLOCK, b"x", 0)
    group.work("a")
    progress = group["a"].leadership.progress["b"]  # type: ignore[union-attr]
    assert progress.state is ProgressState.REPLICATE and progress.inflight
    for _ in range(11):
        group["a"].tick()
        for name in ("b", "c"):
            group.step("a", HeartbeatReply(1, name, 0, 1))
    assert progress.match_index == 1 and progress.next_index == 2 and not progress.inflight
    group["a"].peer_reset("b")
    assert progress.state is ProgressState.PROBE and not progress.waiting


# -- a full disk -------------------------------------------------------------------------------------------------------
def test_a_refused_write_in_a_group_is_handed_out_again() -> None:
    core = Group(*THREE)["b"]
    core.step(AppendEntries(1, "a", 0, 0, tuple(entries(1)), 0))
    first = core.take_ready()
    core.refused()
    core.step(AppendEntries(1, "a", 1, 1, tuple(entries(1, 1)[1:]), 0))
    second = core.take_ready()
    assert first is not None and second is not None
    assert [entry.index for entry in second.entries] == [1, 2] and second.hard_state == first.hard_state
    assert second.messages[: len(first.messages)] == first.messages


def test_a_refused_write_of_a_single_node_never_was() -> None:
    group = Group("a")
    group.campaign("a")
    group["a"].propose(EntryKind.BLOCK, b"x", 0)
    assert group["a"].take_ready() is not None
    group["a"].refused()
    assert (group["a"].last_index, group["a"].role) == (1, Role.LEADER)
    assert group["a"].propose(EntryKind.BLOCK, b"y", 0).index == 2
