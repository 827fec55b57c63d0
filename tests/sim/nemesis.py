"""Everything bad that happens to a simulated cluster, and the quiet afterwards.

Leader hunting is what finds the old bugs (RELIABILITY 3.3): just after an election the winner is left with exactly a minority,
cut one way, killed or paused, and so is its successor.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ayder.entries import NodeId
from tests.sim.node import SimNode

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["Nemesis"]


class Nemesis:
    """Draws from its own generator; silent once ``over``."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self.over = False
        self.bites = 0

    def start(self) -> None:
        """Plan the first of everything."""
        knobs = self._world.knobs
        for mean, action in (
            (knobs.crash_every_ms, self._crash),
            (knobs.partition_every_ms, self._partition),
            (knobs.pause_every_ms, self._pause),
            (knobs.membership_every_ms, self._change_membership),
            (knobs.transfer_every_ms, self._transfer),
            (400.0 if knobs.clock_jumps else 0.0, self._jump),
        ):
            if mean:
                self._again(mean, action)

    def _again(self, mean: float, action: object) -> None:
        self._world.schedule(self._rng.expovariate(1 / mean), self._strike, mean, action)

    def _strike(self, mean: float, action: object) -> None:
        if self.over:
            return
        assert callable(action)
        action()
        self.bites += 1
        self._again(mean, action)

    def _some(self, share: float = 0.5) -> list[NodeId]:
        return [name for name in self._world.names if self._rng.random() < share]

    # -- nodes --------------------------------------------------------------------------------------------------------
    def _crash(self) -> None:
        world, rng = self._world, self._rng
        if rng.random() < world.knobs.crash_all:
            for node in world.nodes.values():
                world.crash(node)
            return
        node = world.nodes[rng.choice(world.names)]
        if rng.random() < world.knobs.mid_step:
            node.effects_left = rng.randrange(6)  # dies between two effects of its next steps
        else:
            world.crash(node)

    def _pause(self) -> None:
        node = self._world.nodes[self._rng.choice(self._world.names)]
        node.pause(self._world.now + self._rng.uniform(0.5, 6) * self._world.knobs.election_ms)

    def _jump(self) -> None:
        self._world.nodes[self._rng.choice(self._world.names)].clock_offset_ms += self._rng.randrange(-600_000, 600_000)

    # -- links --------------------------------------------------------------------------------------------------------
    def _partition(self) -> None:
        world, rng = self._world, self._rng
        world.network.heal()
        shape = rng.choice(("heal", "split", "isolate", "one-way", "deaf", "mute", "bridge", "ring"))
        names = world.names
        victim = world.current_leader() or rng.choice(names)
        if shape == "split":
            side = set(self._some())
            self.cut_between([n for n in names if n in side], [n for n in names if n not in side])
        elif shape == "isolate":
            self.cut_between([victim], [n for n in names if n != victim])
        elif shape == "one-way":
            for _ in range(rng.randrange(1, len(names) + 1)):
                world.network.cut(rng.choice(names), rng.choice(names))
        elif shape in ("deaf", "mute"):
            for name in names:
                world.network.cut(*((name, victim) if shape == "deaf" else (victim, name)))
        elif shape == "bridge":
            others = [n for n in names if n != victim]
            half = len(others) // 2
            self.cut_between(others[:half], others[half:])
        elif shape == "ring":
            self._cut_all_but_neighbours(names)

    def cut_between(self, left: list[NodeId], right: list[NodeId]) -> None:
        """Nothing passes between the two groups."""
        for one in left:
            for other in right:
                self._world.network.cut(one, other)
                self._world.network.cut(other, one)

    def _cut_all_but_neighbours(self, names: list[NodeId]) -> None:
        for at, one in enumerate(names):
            for to, other in enumerate(names):
                if abs(at - to) not in (0, 1, len(names) - 1):
                    self._world.network.cut(one, other)

    # -- hunting ------------------------------------------------------------------------------------------------------
    def leader_elected(self, node: SimNode) -> None:
        """Maybe hunt it, soon."""
        if not self.over and self._rng.random() < self._world.knobs.hunt:
            delay = self._rng.expovariate(1 / (0.25 * self._world.knobs.election_ms))
            self._world.schedule(delay, self._hunt, node, node.life)

    def _hunt(self, node: SimNode, life: int) -> None:
        world, rng = self._world, self._rng
        if self.over or node.core is None or node.life != life:
            return
        self.bites += 1
        way = rng.choice(("minority", "minority", "deaf", "mute", "kill", "pause"))
        others = [name for name in world.names if name != node.name]
        if way == "kill":
            world.crash(node)
        elif way == "pause":
            node.pause(world.now + rng.uniform(1, 4) * world.knobs.election_ms)
        else:
            world.network.heal()
            rng.shuffle(others)
            listeners = others[: max(0, (len(world.names) - 1) // 2)]
            for other in others:
                if way == "minority" and other not in listeners:
                    world.network.cut(node.name, other)
                    world.network.cut(other, node.name)
                elif way == "deaf":
                    world.network.cut(other, node.name)
                elif way == "mute":
                    world.network.cut(node.name, other)
        world.schedule(rng.uniform(1, 5) * world.knobs.election_ms, self._maybe_heal)

    def _maybe_heal(self) -> None:
        if not self.over and self._rng.random() < 0.5:
            self._world.network.heal()

    # -- administration -----------------------------------------------------------------------------------------------
    def _leader_or_anyone(self) -> SimNode | None:
        running = [name for name in self._world.names if self._world.nodes[name].up]
        if not running:
            return None
        leader = self._world.current_leader()
        return self._world.nodes[leader if leader and self._rng.random() < 0.8 else self._rng.choice(running)]

    def _change_membership(self) -> None:
        node = self._leader_or_anyone()
        if node is None:
            return
        membership = node.membership()
        assert membership is not None
        spare = [name for name in self._world.names if name not in membership.everyone]
        actions = [("add", name) for name in spare] + [("promote", name) for name in membership.learners] * 3
        if len(membership.voters) > 2 or self._rng.random() < 0.1:
            actions += [("remove", name) for name in membership.voters]
        actions += [("remove", name) for name in membership.learners]
        if actions:
            self._world.act(node, node.administer, *self._rng.choice(actions))

    def _transfer(self) -> None:
        node = self._leader_or_anyone()
        if node is not None:
            self._world.act(node, node.administer, "transfer", self._rng.choice(self._world.names))
