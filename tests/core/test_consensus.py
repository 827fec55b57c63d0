"""Consensus with one voter as golden transcripts, and the quorum rule against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayder.entries import EntryKind, HardState, LogEntry
from ayder.errors import AyderError, ErrorCode
from ayder.raft.consensus import Consensus, Ready, Role
from ayder.raft.quorum import committed_index, majority, vote_won


class Disk:
    """What a log on disk would answer."""

    def __init__(self, entries: list[LogEntry] | None = None, hard_state: HardState | None = None) -> None:
        self.entries = list(entries or [])
        self.hard_state = hard_state or HardState()

    @property
    def last_index(self) -> int:
        return len(self.entries)

    def term_at(self, index: int) -> int:
        return self.entries[index - 1].term if index else 0

    def write(self, ready: Ready) -> None:
        self.entries += ready.entries
        self.hard_state = ready.hard_state or self.hard_state


class Transcript:
    """Runs a script of words and writes down what the module did after each; invariants are checked at every step."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.consensus = self.started()
        self.lines: list[str] = []

    def started(self) -> Consensus:
        return Consensus(node_id="n", voters=("n",), log=self.disk, election_ticks=3)

    def run(self, script: str) -> str:
        for line in filter(None, map(str.strip, script.splitlines())):
            command = line.split(" -> ")[0].strip()
            told = self.step(*command.split())
            self.consensus.check_invariants()
            c = self.consensus
            state = f"{c.role.value} term={c.current_term} last={c.last_index} disk={c.persisted_index} commit={c.commit_index}"
            self.lines.append(f"{command} -> {told}{state}{' reads' if c.may_serve_reads else ''}")
        return "\n".join(self.lines)

    def step(self, word: str, argument: str = "0") -> str:
        c = self.consensus
        match word:
            case "campaign":
                c.campaign()
            case "tick":
                c.tick()
            case "propose":
                try:
                    entry = c.propose(EntryKind.BLOCK, b"b", int(argument))
                except AyderError as error:
                    return f"{error.code.wire}; "
                return f"entry {entry.index}@{entry.log_time_ms}; "
            case "take":
                self.ready = c.take_ready()
                return f"{self.shown(self.ready)}; "
            case "persisted":
                assert self.ready is not None
                self.disk.write(self.ready)
                c.persisted()
            case "refused":
                c.refused()
            case "restart":
                self.consensus = self.started()
            case "observe":
                c.observe_log_time(int(argument))
        return ""

    def shown(self, ready: Ready | None) -> str:
        if ready is None:
            return "nothing"
        state = "" if ready.hard_state is None else f" vote={ready.hard_state.voted_for}/{ready.hard_state.term}"
        return "write" + state + "".join(f" {e.kind.name.lower()}{e.index}" for e in ready.entries)


def check(golden: str, disk: Disk | None = None) -> Transcript:
    transcript = Transcript(disk or Disk())
    expected = "\n".join(filter(None, map(str.strip, golden.splitlines())))
    assert transcript.run(golden) == expected
    return transcript


def test_a_new_node_leads_once_its_vote_is_on_disk_and_serves_once_its_first_entry_is() -> None:
    check("""
        take -> nothing; follower term=0 last=0 disk=0 commit=0
        campaign -> candidate term=1 last=0 disk=0 commit=0
        propose 5 -> not_leader; candidate term=1 last=0 disk=0 commit=0
        take -> write vote=n/1; candidate term=1 last=0 disk=0 commit=0
        persisted -> leader term=1 last=1 disk=0 commit=0
        take -> write noop1; leader term=1 last=1 disk=0 commit=0
        persisted -> leader term=1 last=1 disk=1 commit=1 reads
        take -> nothing; leader term=1 last=1 disk=1 commit=1 reads
    """)


LEADING = "campaign\n take\n persisted\n take\n persisted\n"


def leading(disk: Disk | None = None) -> Transcript:
    transcript = Transcript(disk or Disk())
    transcript.run(LEADING)
    transcript.lines.clear()
    return transcript


def assert_goes_on(transcript: Transcript, golden: str) -> None:
    expected = "\n".join(filter(None, map(str.strip, golden.splitlines())))
    assert transcript.run(golden) == expected


def test_entries_commit_when_they_are_on_disk_and_those_behind_wait() -> None:
    assert_goes_on(leading(), """
        propose 10 -> entry 2@10; leader term=1 last=2 disk=1 commit=1 reads
        take -> write block2; leader term=1 last=2 disk=1 commit=1 reads
        propose 11 -> entry 3@11; leader term=1 last=3 disk=1 commit=1 reads
        propose 12 -> entry 4@12; leader term=1 last=4 disk=1 commit=1 reads
        persisted -> leader term=1 last=4 disk=2 commit=2 reads
        take -> write block3 block4; leader term=1 last=4 disk=2 commit=2 reads
        persisted -> leader term=1 last=4 disk=4 commit=4 reads
    """)  # fmt: skip


def test_log_time_never_goes_back() -> None:
    assert_goes_on(leading(), """
        propose 100 -> entry 2@100; leader term=1 last=2 disk=1 commit=1 reads
        propose 50 -> entry 3@100; leader term=1 last=3 disk=1 commit=1 reads
        observe 300 -> leader term=1 last=3 disk=1 commit=1 reads
        propose 200 -> entry 4@300; leader term=1 last=4 disk=1 commit=1 reads
    """)  # fmt: skip


def test_what_a_full_disk_refused_never_was() -> None:
    assert_goes_on(leading(), """
        propose 10 -> entry 2@10; leader term=1 last=2 disk=1 commit=1 reads
        take -> write block2; leader term=1 last=2 disk=1 commit=1 reads
        refused -> leader term=1 last=1 disk=1 commit=1 reads
        take -> nothing; leader term=1 last=1 disk=1 commit=1 reads
        propose 11 -> entry 2@11; leader term=1 last=2 disk=1 commit=1 reads
        take -> write block2; leader term=1 last=2 disk=1 commit=1 reads
        persisted -> leader term=1 last=2 disk=2 commit=2 reads
    """)  # fmt: skip


def test_a_full_disk_at_the_start_is_tried_again_in_a_new_term() -> None:
    check("""
        campaign -> candidate term=1 last=0 disk=0 commit=0
        take -> write vote=n/1; candidate term=1 last=0 disk=0 commit=0
        refused -> candidate term=1 last=0 disk=0 commit=0
        take -> write vote=n/1; candidate term=1 last=0 disk=0 commit=0
        persisted -> leader term=1 last=1 disk=0 commit=0
        take -> write noop1; leader term=1 last=1 disk=0 commit=0
        refused -> follower term=1 last=0 disk=0 commit=0
        propose 1 -> not_leader; follower term=1 last=0 disk=0 commit=0
        tick -> follower term=1 last=0 disk=0 commit=0
        tick -> follower term=1 last=0 disk=0 commit=0
        tick -> candidate term=2 last=0 disk=0 commit=0
        take -> write vote=n/2; candidate term=2 last=0 disk=0 commit=0
        tick -> candidate term=2 last=0 disk=0 commit=0
        persisted -> leader term=2 last=1 disk=0 commit=0
        take -> write noop1; leader term=2 last=1 disk=0 commit=0
        persisted -> leader term=2 last=1 disk=1 commit=1 reads
        tick -> leader term=2 last=1 disk=1 commit=1 reads
    """)


def test_a_restart_takes_a_higher_term_and_commits_the_past_with_its_first_entry() -> None:
    assert_goes_on(leading(), """
        propose 10 -> entry 2@10; leader term=1 last=2 disk=1 commit=1 reads
        take -> write block2; leader term=1 last=2 disk=1 commit=1 reads
        persisted -> leader term=1 last=2 disk=2 commit=2 reads
        propose 20 -> entry 3@20; leader term=1 last=3 disk=2 commit=2 reads
        restart -> follower term=1 last=2 disk=2 commit=0
        campaign -> candidate term=2 last=2 disk=2 commit=0
        take -> write vote=n/2; candidate term=2 last=2 disk=2 commit=0
        persisted -> leader term=2 last=3 disk=2 commit=0
        take -> write noop3; leader term=2 last=3 disk=2 commit=0
        persisted -> leader term=2 last=3 disk=3 commit=3 reads
    """)  # fmt: skip


def test_a_vote_that_did_not_reach_the_disk_was_not_given() -> None:
    """The same term may be voted in again: the disk knows nothing of the first time."""
    transcript = Transcript(Disk())
    transcript.run("campaign\n take\n restart\n campaign\n take")
    assert transcript.disk.hard_state == HardState()
    assert transcript.consensus.role is Role.CANDIDATE
    assert transcript.ready == Ready((), HardState(1, "n"))


def test_the_last_term_is_that_of_the_last_entry_also_after_a_refusal() -> None:
    """Votes are given by it."""
    transcript = leading()
    transcript.run("restart\n campaign\n take\n persisted")
    assert (transcript.consensus.last_index, transcript.consensus.last_term) == (2, 2)
    transcript.run("take\n refused")
    assert (transcript.consensus.last_index, transcript.consensus.last_term) == (1, 1)


def test_one_hand_out_is_open_at_a_time() -> None:
    transcript = leading()
    transcript.run("propose 1\n take")
    with pytest.raises(AssertionError):
        transcript.consensus.take_ready()


def test_the_error_of_a_node_that_does_not_lead_is_definite() -> None:
    with pytest.raises(AyderError) as caught:
        Transcript(Disk()).consensus.propose(EntryKind.BLOCK, b"", 0)
    assert caught.value.code is ErrorCode.NOT_LEADER


def test_the_invariants_can_fail() -> None:
    consensus = leading().consensus
    consensus.log.commit_index = 99
    with pytest.raises(AssertionError):
        consensus.check_invariants()


# -- quorum -------------------------------------------------------------------------------------------------------
names = st.sampled_from("abcdefg")


@given(st.sets(names, min_size=1), st.dictionaries(names, st.integers(0, 9)))
def test_committed_is_what_some_majority_holds_in_whole(voters: set[str], match_index: dict[str, int]) -> None:
    groups = combinations(sorted(voters), len(voters) // 2 + 1)
    assert committed_index(voters, match_index) == max(min(match_index.get(v, 0) for v in group) for group in groups)


@given(st.sets(names, min_size=1), st.sets(names))
def test_a_vote_is_won_by_a_majority_of_the_voters_alone(voters: set[str], granted: set[str]) -> None:
    winners = [set(group) for size in range(1, 8) for group in combinations(voters, size) if 2 * size > len(voters)]
    assert vote_won(voters, granted) == any(group <= granted for group in winners)


def test_two_majorities_share_a_voter() -> None:
    for count in range(1, 10):
        assert 2 * majority(count) > count >= majority(count)
