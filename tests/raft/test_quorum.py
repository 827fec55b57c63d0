"""Majority arithmetic against brute force over all subsets, and the bytes of a configuration."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayder.errors import CorruptLog
from ayder.raft.membership import Membership, MembershipHistory
from ayder.raft.quorum import VoteResult, committed_index, joint_committed_index, joint_vote, majority, vote_won

NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def subsets(names: list[str]) -> list[set[str]]:
    return [set(chosen) for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)]


@pytest.mark.parametrize("size", range(1, 8))
def test_two_majorities_share_a_voter(size: int) -> None:
    voters = NAMES[:size]
    winners = [chosen for chosen in subsets(voters) if vote_won(voters, chosen)]
    assert winners
    assert all(one & other for one in winners for other in winners)
    assert min(len(chosen) for chosen in winners) == majority(size)


@given(st.integers(1, 7), st.lists(st.integers(0, 5), min_size=7, max_size=7))
def test_the_committed_index_is_the_highest_that_some_majority_holds(size: int, matches: list[int]) -> None:
    voters = NAMES[:size]
    match = dict(zip(voters, matches, strict=False))
    best = max(
        index
        for index in range(6)
        if any(len(chosen) >= majority(size) and all(match[name] >= index for name in chosen) for chosen in subsets(voters))
    )
    assert committed_index(voters, match) == best


@given(
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sets(st.sampled_from(NAMES)),
    st.lists(st.integers(0, 5), min_size=7, max_size=7),
)
def test_a_joint_decision_is_one_of_both_halves(incoming: set[str], outgoing: set[str], matches: list[int]) -> None:
    match = dict(zip(NAMES, matches, strict=True))
    index = joint_committed_index(incoming, outgoing, match)
    holders = {name for name, at in match.items() if at >= index}
    assert vote_won(incoming, holders) and (not outgoing or vote_won(outgoing, holders))
    above = {name for name, at in match.items() if at > index}
    assert not vote_won(incoming, above) or (outgoing and not vote_won(outgoing, above))


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_a_poll_is_won_lost_or_open_by_what_the_rest_can_still_do(
    incoming: set[str], outgoing: set[str], granted: set[str]
) -> None:
    for refused in (set(NAMES) - granted, set()):
        result = joint_vote(incoming, outgoing, granted, refused)
        rest = set(NAMES) - granted - refused
        best = joint_vote(incoming, outgoing, granted | rest, refused)
        if result is VoteResult.WON:
            assert best is VoteResult.WON
        if result is VoteResult.LOST:
            assert best is VoteResult.LOST
        if result is VoteResult.PENDING:
            assert best is VoteResult.WON and rest


def test_names_that_are_no_voters_count_nowhere() -> None:
    assert not vote_won(["a", "b", "c"], ["a", "x", "y"])
    assert committed_index(["a", "b", "c"], {"a": 9, "x": 9, "y": 9}) == 0
    learners = Membership(voters=("a",), learners=("b", "c"))
    assert learners.committed_index({"a": 1, "b": 5, "c": 5}) == 1


# -- configurations -----------------------------------------------------------------------------------------------------------
@given(
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sets(st.sampled_from(NAMES)),
    st.sets(st.text(min_size=1, max_size=20), max_size=4),
)
def test_a_configuration_survives_its_bytes(voters: set[str], outgoing: set[str], learners: set[str]) -> None:
    membership = Membership(voters=tuple(voters), outgoing=tuple(outgoing), learners=tuple(learners - voters - outgoing))
    assert Membership.decode(membership.encode()) == membership


def test_the_bytes_of_a_configuration_are_these() -> None:
    """Golden: they are in logs on disks."""
    membership = Membership(voters=("n1", "n2"), outgoing=("n1",), learners=("x",))
    assert membership.encode().hex() == "010202" + b"n1".hex() + "02" + b"n2".hex() + "0102" + b"n1".hex() + "0101" + b"x".hex()


@given(st.binary(max_size=40))
def test_bytes_that_are_no_configuration_are_refused(data: bytes) -> None:
    try:
        membership = Membership.decode(data)
    except CorruptLog:
        return
    assert Membership.decode(membership.encode()) == membership


def test_every_cut_of_a_configuration_is_refused() -> None:
    data = Membership(voters=("n1", "n2", "n3"), learners=("n4",)).encode()
    for length in range(len(data)):
        with pytest.raises(CorruptLog):
            Membership.decode(data[:length])


def test_what_cannot_be_changed_says_why() -> None:
    membership = Membership(voters=("a", "b"), learners=("c",))
    joint = membership.promoting("c")
    assert joint == Membership(voters=("a", "b", "c"), outgoing=("a", "b")) and joint.settled().voters == ("a", "b", "c")
    assert membership.removing("b") == Membership(voters=("a",), outgoing=("a", "b"), learners=("c",))
    for change in (
        lambda: joint.with_learner("d"), lambda: membership.with_learner("a"), lambda: membership.promoting("a"),
        lambda: membership.removing("x"), lambda: Membership(voters=("a",)).removing("a"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            change()


def test_configurations_roll_back_with_the_log() -> None:
    one, two, three = (Membership(voters=tuple(NAMES[:size])) for size in (1, 2, 3))
    history = MembershipHistory(one, 0, [(5, two), (9, three)])
    assert (history.current, history.at(4), history.at(5), history.at(8)) == (three, one, two, two)
    history.truncated(9)
    assert history.current == two
    history.compact(7)
    assert history.at(7) == two and history.index == 5
    history.restored(20, three)
    assert (history.current, history.index) == (three, 20)
