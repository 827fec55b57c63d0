"""The network between simulated nodes: loss, delay, duplication, reordering, one-way cuts, and ghosts.

A ghost is a message held back until long after, as a broken connection's last bytes can be: past restarts, past terms.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ayder.entries import NodeId
from ayder.raft.messages import Message
from tests.sim.knobs import Knobs

__all__ = ["Network"]


class Network:
    """``schedule(delay_ms, call)`` is the world's clock; ``deliver(to, message)`` its door."""

    def __init__(
        self,
        rng: random.Random,
        knobs: Knobs,
        schedule: Callable[..., None],
        deliver: Callable[[NodeId, Message], None],
        now: Callable[[], float],
    ) -> None:
        self._rng = rng
        self._knobs = knobs
        self._schedule = schedule
        self._deliver = deliver
        self._now = now
        self._cut: dict[tuple[NodeId, NodeId], int] = {}
        self._last: dict[tuple[NodeId, NodeId], float] = {}
        self.quiet = False
        """In the liveness phase nothing is lost on a link that is not cut."""

    # -- links --------------------------------------------------------------------------------------------------------
    def cut(self, sender: NodeId, receiver: NodeId) -> None:
        """Nothing passes this way any more."""
        self._cut[sender, receiver] = 1

    def mend(self, sender: NodeId, receiver: NodeId) -> None:
        """This way is open again."""
        self._cut.pop((sender, receiver), None)

    def heal(self) -> None:
        """Every link works."""
        self._cut.clear()

    def is_cut(self, sender: NodeId, receiver: NodeId) -> bool:
        """Whether this direction is cut."""
        return (sender, receiver) in self._cut

    # -- messages -----------------------------------------------------------------------------------------------------
    def send(self, to: NodeId, message: Message) -> None:
        """Maybe it arrives, maybe twice, maybe when nobody expects it any more."""
        rng, knobs = self._rng, self._knobs
        if (message.sender, to) in self._cut:
            return
        if self.quiet:
            self._later(to, message, min(rng.expovariate(1 / knobs.delay_ms), 4 * knobs.delay_ms, knobs.election_ms / 15))
            return
        if knobs.loss and rng.random() < knobs.loss:
            return
        self._later(to, message, self._delay(message.sender, to))
        if knobs.duplicate and rng.random() < knobs.duplicate:
            self._later(to, message, 4 * rng.expovariate(1 / knobs.delay_ms))
        if knobs.ghosts and rng.random() < knobs.ghosts:
            self._later(to, message, rng.uniform(knobs.election_ms, 12 * knobs.election_ms))

    def _delay(self, sender: NodeId, to: NodeId) -> float:
        delay = self._rng.expovariate(1 / self._knobs.delay_ms)
        if self._knobs.fifo:
            arrival = max(self._last.get((sender, to), 0.0), self._now() + delay)
            self._last[sender, to] = arrival
            delay = arrival - self._now()
        return delay

    def _later(self, to: NodeId, message: Message, delay: float) -> None:
        self._schedule(delay, self._arrive, to, message)

    def _arrive(self, to: NodeId, message: Message) -> None:
        if not self.is_cut(message.sender, to):
            self._deliver(to, message)
