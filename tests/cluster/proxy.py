"""The network between the nodes of a local cluster: one TCP proxy for each directed link, and what can go wrong with it.

Owns: sockets between nodes, what becomes of the bytes. Must not know: what the bytes mean, processes.

A node's connection to a peer carries only what that node says, so each link (from, to) is one proxy, and a one-way cut is a cut
of one link. A cut is silent, as a network's is: connections stay open, new ones are taken and lead nowhere, nobody is told. What
waited in a cut link arrives when it heals, late but in order, as TCP does it. ``ghost`` is the worse kind: bytes of an old
connection that arrive after the sender has made a new one.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import attrs
import trio

__all__ = ["Link", "Network", "open_network"]

_CHUNK_BYTES = 64 << 10
_MAX_HELD_BYTES = 8 << 20
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


@attrs.define(eq=False)
class _Pair:
    """A connection of the source, and ours to the target for it."""

    source: trio.SocketStream
    target: trio.SocketStream | None = None
    held: list[bytes] | None = None
    """A ghost: its bytes are kept instead of passed on."""


class Link:
    """What ``source`` says to ``target``. One proxy, any number of connections."""

    def __init__(self, source: str, target: str, address: tuple[str, int], listener: trio.SocketListener, seed: str) -> None:
        self.source, self.target = source, target
        self.address = address
        self.listener = listener
        self.port: int = listener.socket.getsockname()[1]
        self.delay_s = 0.0
        self.connections = 0
        self.flipped_bytes = 0
        self.ghosts = 0
        """Old connections whose bytes were delivered after a newer one was there."""
        self._flips = 0
        self._chance = random.Random(seed)
        self._open = trio.Event()
        self._open.set()
        self._pairs: set[_Pair] = set()

    # -- faults -----------------------------------------------------------------------------------------------------
    @property
    def is_cut(self) -> bool:
        """Whether nothing passes."""
        return not self._open.is_set()

    def cut(self) -> None:
        """Silence, until ``heal``."""
        if not self.is_cut:
            self._open = trio.Event()

    def heal(self) -> None:
        """What waited arrives; no more delay."""
        self.delay_s = 0.0
        self._open.set()

    def reset(self) -> None:
        """End all connections."""
        for pair in self._pairs:
            pair.source.socket.close()

    def flip(self, count: int = 1) -> None:
        """Change one byte in each of the next ``count`` pieces that pass."""
        self._flips += count

    async def ghost(self, hold_s: float, release_after_s: float) -> None:
        """Hold what the open connections carry, break them at the source, and let the old bytes arrive late."""
        old = list(self._pairs)
        for pair in old:
            pair.held = []
        try:
            await trio.sleep(hold_s)
            for pair in old:
                pair.source.socket.close()
            newer = self.connections
            await trio.sleep(release_after_s)
            for pair in old:
                await self._haunt(pair, haunts=self.connections > newer)
        finally:
            for pair in old:
                if pair.target is not None:
                    pair.target.socket.close()

    async def _haunt(self, pair: _Pair, *, haunts: bool) -> None:
        held, pair.held = pair.held or [], None
        try:
            if pair.target is not None and held:
                with trio.move_on_after(1):
                    await pair.target.send_all(b"".join(held))
                self.ghosts += haunts
        except _GONE:
            pass  # the target has given the old connection up: what it should do

    # -- the proxy --------------------------------------------------------------------------------------------------
    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection of the source."""
        pair = _Pair(stream)
        self._pairs.add(pair)
        self.connections += 1
        try:
            await self._open.wait()
            pair.target = await trio.open_tcp_stream(*self.address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, pair, pair.source, pair.target, nursery.cancel_scope)
                await self._pump(pair, pair.target, pair.source, nursery.cancel_scope)
        except* _GONE:
            pass  # an end went away
        finally:
            self._pairs.discard(pair)
            stream.socket.close()
            if pair.target is not None and pair.held is None:
                pair.target.socket.close()

    async def _pump(self, pair: _Pair, here: trio.SocketStream, there: trio.SocketStream, scope: trio.CancelScope) -> None:
        size = 0
        while size < _MAX_HELD_BYTES and (data := await here.receive_some(_CHUNK_BYTES)):
            if here is pair.source:
                if pair.held is not None:
                    pair.held.append(bytes(data))
                    size += len(data)
                    continue
                if self.delay_s:
                    await trio.sleep(self.delay_s * self._chance.random())
                data = self._flipped(bytes(data))
            await self._open.wait()
            await there.send_all(data)
        scope.cancel()

    def _flipped(self, data: bytes) -> bytes:
        if not self._flips:
            return data
        self._flips -= 1
        self.flipped_bytes += 1
        at = self._chance.randrange(len(data))
        return data[:at] + bytes((data[at] ^ (1 << self._chance.randrange(8)),)) + data[at + 1 :]


class Network:
    """All links of a cluster, by (from, to)."""

    def __init__(self, links: Mapping[tuple[str, str], Link]) -> None:
        self.links = dict(links)

    def cut(self, source: str, target: str) -> None:
        """One way."""
        self.links[source, target].cut()

    def isolate(self, names: Iterable[str]) -> None:
        """Both ways between these and all others."""
        inside = set(names)
        for (source, target), link in self.links.items():
            if (source in inside) != (target in inside):
                link.cut()

    def heal(self) -> None:
        """Everything passes."""
        for link in self.links.values():
            link.heal()


@asynccontextmanager
async def open_network(addresses: Mapping[str, tuple[str, int]], seed: int) -> AsyncIterator[Network]:
    """Proxies for every ordered pair of ``addresses`` (where each node really listens), for the length of the block."""
    async with trio.open_nursery() as nursery:
        links = {}
        for source in addresses:
            for target, address in addresses.items():
                if source != target:
                    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                    link = links[source, target] = Link(source, target, address, listener, f"{seed} {source} {target}")
                    nursery.start_soon(partial(trio.serve_listeners, link.serve, [listener]))
        try:
            yield Network(links)
        finally:
            nursery.cancel_scope.cancel()
