"""A change of the membership from its proposal until it is settled.

Owns: when a change counts as done, and when nobody can say. Must not know: which changes there are (``consensus.py``), HTTP.

Invariants: success is told only for an entry that is committed, of the term it was proposed in, and when no joint configuration
is left; an error raised by the proposal itself means that nothing was changed. Source: thesis 4.3; RELIABILITY R-14.
"""

from __future__ import annotations

from collections.abc import Callable

from ayder.entries import LogEntry
from ayder.errors import AyderError, ErrorCode
from ayder.raft.consensus import Consensus, Role
from ayder.raft.driver import Driver

__all__ = ["settle"]


async def settle(driver: Driver, propose: Callable[[], LogEntry]) -> None:
    """Propose a change and wait until it is committed, through its joint configuration if it has one. The caller bounds it.

    Raises what ``propose`` does, then ``AyderError`` (commit_timeout) when another node came to lead first.
    """
    consensus = driver.consensus
    entry = propose()
    driver.advance()
    driver.poke()
    while not _is_settled(consensus, entry):
        if consensus.role is not Role.LEADER or consensus.current_term != entry.term:
            raise AyderError(ErrorCode.COMMIT_TIMEOUT, "leadership was lost before the change was committed; it may still be")
        await driver.wait_moved()


def _is_settled(consensus: Consensus, entry: LogEntry) -> bool:
    committed = entry.index <= consensus.membership_index <= consensus.commit_index
    return committed and not consensus.membership.is_joint and consensus.log.term_at(entry.index) in (entry.term, None)
