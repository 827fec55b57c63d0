"""The peer network of one node: a listener, and a connection to every other member.

Owns: sockets, who is a member and where it listens, the lifetime of the connections. Must not know: what a message means, the
consensus module, the log.

Every node dials every other one, and a connection carries only what its dialer says, requests and answers alike: Raft's messages
are one-way, so nothing needs to be matched with anything. Two nodes that talk have two connections, each with its own fate.

Invariants: what a peer or the network does ends connections and nothing else; what ``receive``, ``next_append`` or ``lost``
raise (other than ``ProtocolError`` by ``receive``) leaves through ``run``; without TLS no byte leaves this machine.
Source: RELIABILITY H-8; ARCHITECTURE D4; docs/peer-protocol.md.
"""

from __future__ import annotations

import functools
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping

import attrs
import trio

from ayder.entries import NodeId
from ayder.raft.handshake import Hello
from ayder.raft.messages import Message
from ayder.raft.peer_inbound import InboundPeers
from ayder.raft.peer_link import PeerCounters, PeerLimits
from ayder.raft.peer_outbound import OutboundPeer
from ayder.raft.peer_tls import PeerTls, demand_loopback, demand_name

__all__ = ["NetworkFacts", "PeerFacts", "PeerLimits", "PeerNetwork", "PeerTls"]

Address = tuple[str, int]
_BACKLOG = 128


@attrs.frozen(slots=True)
class PeerFacts:
    """One peer, for metrics. The counters are a copy."""

    connected: bool
    """We have a connection to it that it accepted."""
    connected_to_us: bool
    rtt_s: float | None
    """How long it took to answer our last hello."""
    queued_messages: int
    queued_bytes: int
    counters: PeerCounters


@attrs.frozen(slots=True)
class NetworkFacts:
    """The whole network, for metrics."""

    peers: dict[NodeId, PeerFacts]
    refused_connections: int
    unroutable_messages: int
    """Sent to nodes that are no peers of ours."""


def _nobody(_peer: NodeId) -> None:
    """Nobody wants to know."""


class PeerNetwork:
    """See the module header.

    ``addresses`` says where each member listens; our own entry, if there is one, is ignored. ``receive`` gets one message at a
    time of each peer, and what it takes is the back-pressure. ``next_append`` may read the disk; it gives ``None`` when there is
    nothing to send *now* and is asked again after ``wake``. ``lost`` is told that a connection to a peer ended, so that what was
    under way may be lost.

    Raises ``ValueError`` when a cluster id has not 16 bytes or a plain connection would leave this machine, ``OSError`` when a
    certificate cannot be used.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        cluster_id: bytes,
        addresses: Mapping[NodeId, Address],
        bind: Address,
        tls: PeerTls | None,
        limits: PeerLimits,
        receive: Callable[[NodeId, Message], Awaitable[None]],
        next_append: Callable[[NodeId], Awaitable[Message | None]],
        lost: Callable[[NodeId], None] = _nobody,
        jitter: Callable[[], float] = random.SystemRandom().random,
    ) -> None:
        if len(cluster_id) != 16:
            raise ValueError(f"a cluster id has 16 bytes, not {len(cluster_id)}")
        if tls is None:
            demand_loopback([bind[0]])
        self.node_id = node_id
        self._cluster_id = cluster_id
        self._bind = bind
        self._limits = limits
        self._next_append = next_append
        self._lost = lost
        self._jitter = jitter
        self._listening: ssl.SSLContext | None = tls.listening() if tls else None
        self._dialling: ssl.SSLContext | None = tls.dialling() if tls else None
        self._counters: dict[NodeId, PeerCounters] = {}
        self._outbound: dict[NodeId, OutboundPeer] = {}
        self._addresses: dict[NodeId, Address] = {}
        self._nursery: trio.Nursery | None = None
        self._unroutable = 0
        self.bound: list[Address] = []
        """Where we listen, once ``run`` has started."""
        self._inbound = InboundPeers(
            node_id, cluster_id, limits=limits, counters=self._counters, receive=receive, heard=self._heard
        )  # fmt: skip
        self.set_addresses(addresses)

    # -- for the node: none of these waits -----------------------------------------------------------------------
    def send(self, to: NodeId, message: Message) -> None:
        """Queue a message. It may be lost, and is counted then. Raises ``ValueError`` when it does not fit a frame."""
        assert message.sender == self.node_id, message
        peer = self._outbound.get(to)
        if peer is None:
            self._unroutable += 1
        else:
            peer.send(message)

    def wake(self, to: NodeId) -> None:
        """There may be an append for this peer: its stream asks ``next_append`` until that says ``None``."""
        peer = self._outbound.get(to)
        if peer is not None:
            peer.wake()

    def set_addresses(self, addresses: Mapping[NodeId, Address]) -> None:
        """The membership changed: connect to who came, leave who went. Raises ``ValueError`` for a plain one beyond loopback."""
        wanted = {peer: address for peer, address in addresses.items() if peer != self.node_id}
        if self._dialling is None:
            demand_loopback(host for host, _ in wanted.values())
        before, self._addresses = self._addresses, wanted
        for peer in before.keys() - wanted.keys():
            self._outbound.pop(peer).stop()
            self._inbound.forget(peer)
            del self._counters[peer]
        for peer, address in wanted.items():
            if peer not in before:
                self._add(peer)
            elif before[peer] != address:
                self._outbound[peer].redial()

    def facts(self) -> NetworkFacts:
        """How things stand, for metrics."""
        peers = {peer: self._facts_of(outbound) for peer, outbound in self._outbound.items()}
        return NetworkFacts(peers, self._inbound.refused, self._unroutable)

    def _facts_of(self, outbound: OutboundPeer) -> PeerFacts:
        return PeerFacts(
            connected=outbound.connected,
            connected_to_us=self._inbound.is_connected(outbound.peer),
            rtt_s=outbound.rtt_s,
            queued_messages=outbound.queued_messages,
            queued_bytes=outbound.queued_bytes,
            counters=attrs.evolve(outbound.counters),
        )

    def _add(self, peer: NodeId) -> None:
        self._counters[peer] = PeerCounters()
        outbound = OutboundPeer(
            Hello(self._cluster_id, self.node_id, peer),
            limits=self._limits,
            counters=self._counters[peer],
            dial=functools.partial(self._dial, peer),
            next_append=self._next_append,
            lost=self._lost,
            jitter=self._jitter,
        )
        self._outbound[peer] = outbound
        if self._nursery is not None:
            self._nursery.start_soon(outbound.run, name=f"stream to {peer}")

    def _heard(self, peer: NodeId) -> None:
        self._outbound[peer].hurry()

    # -- tasks ---------------------------------------------------------------------------------------------------
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and stay connected, until cancelled. Started when the listener is bound.

        Raises ``OSError`` when it cannot be bound, and whatever the node's own functions raise (in an exception group).
        """
        host, port = self._bind
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
        self.bound = [listener.socket.getsockname()[:2] for listener in listeners]
        try:
            async with trio.open_nursery() as self._nursery:
                for peer, outbound in self._outbound.items():
                    self._nursery.start_soon(outbound.run, name=f"stream to {peer}")
                serve = functools.partial(trio.serve_listeners, handler_nursery=self._nursery)
                self._nursery.start_soon(serve, self._accept, listeners)
                task_status.started()
        finally:
            self._nursery = None

    async def _accept(self, accepted: trio.SocketStream) -> None:
        try:
            host, port = accepted.socket.getpeername()[:2]
            _watch_half_open(accepted, self._limits.silence_timeout_s)
        except OSError:  # gone before we looked
            await trio.aclose_forcefully(accepted)
            return
        await self._inbound.serve(_over_tls(accepted, self._listening, server_side=True), f"{host}:{port}")

    async def _dial(self, peer: NodeId) -> trio.abc.Stream:
        """A connection to the peer, its certificate checked. Raises ``OSError``, Trio's stream errors and ``ProtocolError``."""
        host, port = self._addresses[peer]
        plain = await trio.open_tcp_stream(host, port)
        try:
            _watch_half_open(plain, self._limits.write_timeout_s)
            stream = _over_tls(plain, self._dialling, server_side=False)
            if isinstance(stream, trio.SSLStream):
                await stream.do_handshake()
            demand_name(stream, peer)
        except BaseException:
            await trio.aclose_forcefully(plain)
            raise
        return stream


def _over_tls(plain: trio.SocketStream, context: ssl.SSLContext | None, *, server_side: bool) -> trio.abc.Stream:
    if context is None:
        return plain
    return trio.SSLStream(plain, context, server_side=server_side, https_compatible=True)


def _watch_half_open(stream: trio.SocketStream, seconds: float) -> None:
    """A host that vanished without a word acknowledges nothing: the kernel cuts such a connection, where it can.

    Deadlines of our own would take long to notice: pings are small, and a socket's buffer swallows them for hours.
    """
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
