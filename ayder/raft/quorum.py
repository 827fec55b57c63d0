"""Majority arithmetic: pure functions over sets of voters, no messages, no log.

Owns: what "more than half" means, in one configuration and in a joint one, where both halves must agree. Must not know: who the
voters are or how they were asked. Invariant: two sets that win in the same configuration share a member, and so do a set that
wins in a joint configuration and one that wins in either half of it. Source: thesis 3.4 (votes), 3.6 (commitment), 4.3 (joint).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

__all__ = ["VoteResult", "committed_index", "joint_committed_index", "joint_vote", "majority", "vote_lost", "vote_won"]


class VoteResult(enum.Enum):
    """Where a poll stands."""

    PENDING = "pending"
    WON = "won"
    LOST = "lost"


def majority(voters: int) -> int:
    """How many of ``voters`` are more than half."""
    assert voters > 0, voters
    return voters // 2 + 1


def committed_index(voters: Collection[str], match_index: Mapping[str, int]) -> int:
    """The highest index that a majority of the voters holds on disk (a voter not in ``match_index`` holds nothing)."""
    ranked = sorted((match_index.get(voter, 0) for voter in voters), reverse=True)
    return ranked[majority(len(voters)) - 1]


def joint_committed_index(incoming: Collection[str], outgoing: Collection[str], match_index: Mapping[str, int]) -> int:
    """As ``committed_index``, by both halves when ``outgoing`` is not empty."""
    index = committed_index(incoming, match_index)
    return min(index, committed_index(outgoing, match_index)) if outgoing else index


def vote_won(voters: Collection[str], granted: Collection[str]) -> bool:
    """Whether the *set* of those who granted holds a majority of the voters; others in it do not count (R-9)."""
    return len(set(voters) & set(granted)) >= majority(len(voters))


def vote_lost(voters: Collection[str], refused: Collection[str]) -> bool:
    """Whether so many refused that the rest is no majority."""
    return len(set(voters) - set(refused)) < majority(len(voters))


def joint_vote(
    incoming: Collection[str], outgoing: Collection[str], granted: Collection[str], refused: Collection[str]
) -> VoteResult:
    """Where a poll stands: won when every half is won, lost when one half is lost."""
    halves = [incoming, outgoing] if outgoing else [incoming]
    if all(vote_won(half, granted) for half in halves):
        return VoteResult.WON
    if any(vote_lost(half, refused) for half in halves):
        return VoteResult.LOST
    return VoteResult.PENDING
