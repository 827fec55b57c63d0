"""The follower's half of the damage rule: a node that lost synced bytes does not vote until the quorum gave them back.

Owns: the damaged flag and incarnation as the disk records them, and the barrier that ends the damage. Must not know: how bytes
are found to be damaged (storage does), who may vote (consensus asks ``damaged``).

Its acknowledgements from before the damage may have committed entries that it no longer holds. Were it to vote now, a candidate
without them could win. So a leader that sees the new incarnation answers with a barrier: its last index at that moment, which
covers everything this node can ever have acknowledged to it or to its predecessors. Verified and synced up to there, in that
leader's term, the node is as good as before. "Something of the leader's term is committed here" would *not* be enough.

Invariant: the flag falls only through a barrier of the current term and of this incarnation. Source: RELIABILITY R-16; FAST'18.
"""

from __future__ import annotations

from ayder.entries import LogIndex, Term
from ayder.raft.messages import Barrier

__all__ = ["Repair"]


class Repair:
    """What this node's disk says of itself, and what its leader demands."""

    def __init__(self, incarnation: int, damaged: bool) -> None:
        assert incarnation > 0 or not damaged, "damage begins a new incarnation"
        self.incarnation = incarnation
        self.damaged = damaged
        self._barrier: tuple[Term, LogIndex] | None = None

    def ordered(self, barrier: Barrier, term: Term) -> None:
        """The leader of ``term`` says how far this node must be verified."""
        if self.damaged and barrier.incarnation == self.incarnation:
            self._barrier = (term, barrier.index)

    def is_due(self, term: Term, verified_index: LogIndex) -> bool:
        """Whether the flag may be cleared: verified by the leader of ``term``, and synced, up to its barrier."""
        return self.damaged and self._barrier is not None and self._barrier[0] == term and verified_index >= self._barrier[1]

    def done(self) -> None:
        """The disk no longer says that it is damaged."""
        self.damaged = False
        self._barrier = None

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the state is one that no run may reach."""
        assert self.damaged or self._barrier is None, self._barrier
