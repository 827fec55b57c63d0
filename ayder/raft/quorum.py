"""Majority arithmetic: pure functions, no messages, no log.

Source: thesis section 3.6 (commitment), 3.4 (votes).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["committed_index", "majority", "vote_won"]


def majority(voters: int) -> int:
    """How many of ``voters`` are more than half."""
    assert voters > 0, voters
    return voters // 2 + 1


def committed_index(voters: Collection[str], match_index: Mapping[str, int]) -> int:
    """The highest index that a majority of the voters holds on disk (a voter not in ``match_index`` holds nothing)."""
    ranked = sorted((match_index.get(voter, 0) for voter in voters), reverse=True)
    return ranked[majority(len(voters)) - 1]


def vote_won(voters: Collection[str], granted: Collection[str]) -> bool:
    """Whether the *set* of those who granted holds a majority of the voters; others in it do not count (R-9)."""
    return len(set(voters) & set(granted)) >= majority(len(voters))
