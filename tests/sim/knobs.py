"""What a seed turns on: every class of fault is off in a good part of the seeds, so that none hides another ("swarm testing").

Times are in simulated milliseconds.
"""

from __future__ import annotations

import random

import attrs

__all__ = ["Knobs"]


@attrs.frozen(kw_only=True)
class Knobs:
    """The drawn ranges of one run. Printed when it fails."""

    nodes: int = 3
    spares: int = 0
    election_ms: int = 150
    safety_ms: int = 3_000
    batch: int = 1
    inflight: int = 4
    snapshot_every: int = 1_000_000
    keep_behind: int = 0
    clients: int = 4
    think_ms: float = 40.0
    reads: float = 0.4
    loss: float = 0.0
    duplicate: float = 0.0
    delay_ms: float = 4.0
    fifo: bool = False
    ghosts: float = 0.0
    disk_ms: float = 4.0
    stall: float = 0.0
    torn: bool = True
    fsync_error: float = 0.0
    rot: float = 0.0
    crash_every_ms: float = 0.0
    crash_all: float = 0.0
    mid_step: float = 0.0
    partition_every_ms: float = 0.0
    pause_every_ms: float = 0.0
    hunt: float = 0.0
    membership_every_ms: float = 0.0
    transfer_every_ms: float = 0.0
    clock_jumps: bool = False
    heal_all: bool = True

    @classmethod
    def draw(cls, rng: random.Random) -> Knobs:
        """The knobs of a seed."""

        def sometimes(share: float, low: float, high: float) -> float:
            return rng.uniform(low, high) if rng.random() < share else 0.0

        storm = rng.random() < 0.35
        return cls(
            nodes=rng.choice((1, 3, 3, 3, 3, 5, 5, 7)),
            spares=2 if storm else 0,
            election_ms=rng.choice((150, 150, 150, 300)),
            safety_ms=rng.choice((1_500, 2_500, 4_000)),
            batch=rng.choice((1, 1, 2, 8, 64)),
            inflight=rng.choice((1, 4)),
            snapshot_every=rng.choice((5, 20, 50, 1_000_000)),
            keep_behind=rng.choice((0, 3, 20)),
            clients=rng.choice((2, 4, 8)),
            think_ms=rng.choice((15.0, 40.0, 80.0)),
            reads=rng.choice((0.2, 0.5)),
            loss=sometimes(0.5, 0.0, 0.3),
            duplicate=sometimes(0.5, 0.0, 0.3),
            delay_ms=rng.choice((2.0, 5.0, 15.0, 30.0)),
            fifo=rng.random() < 0.4,
            ghosts=sometimes(0.4, 0.0, 0.05),
            disk_ms=rng.choice((1.0, 4.0, 12.0, 30.0)),
            stall=sometimes(0.3, 0.0, 0.02),
            torn=rng.random() < 0.7,
            fsync_error=sometimes(0.4, 0.0, 0.01),
            rot=sometimes(0.4, 0.1, 0.7),
            crash_every_ms=sometimes(0.65, 150, 900),
            crash_all=sometimes(0.5, 0.05, 0.3),
            mid_step=sometimes(0.5, 0.2, 1.0),
            partition_every_ms=sometimes(0.6, 150, 900),
            pause_every_ms=sometimes(0.4, 200, 1_000),
            hunt=sometimes(0.55, 0.3, 1.0),
            membership_every_ms=rng.uniform(80, 400) if storm else 0.0,
            transfer_every_ms=sometimes(0.3, 150, 800),
            clock_jumps=rng.random() < 0.3,
            heal_all=rng.random() < 0.5,
        )
