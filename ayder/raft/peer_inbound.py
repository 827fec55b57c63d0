"""What peers say to this node: connections that prove who they are, and are heard one message at a time.

Owns: the listener's half of the handshake, the rule of one connection a peer, deadlines of silence. Must not know: what a message
means, how connections are accepted.

``receive`` is awaited for each message before the next one is looked at, and the connection is not read meanwhile: that is the
back-pressure. A newer connection of the same peer replaces the older one: the peer made it because the older one is of no use.
What the older one has not delivered yet is dropped; a message it is delivering is delivered, and only then is the newer one read.

Invariants: a peer has at most one connection that is read and one that waits for it; a message is delivered only in the name of
the peer that the handshake proved; only what ``receive`` raises leaves this module.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import attrs
import trio

from ayder.entries import NodeId
from ayder.raft.frames import ProtocolError
from ayder.raft.handshake import Hello, encode_hello, encode_refusal
from ayder.raft.messages import Message
from ayder.raft.peer_link import LinkLost, PeerCounters, PeerLimits, deadline, read_hello, read_some
from ayder.raft.peer_tls import demand_name
from ayder.raft.wire import FrameReader

__all__ = ["InboundPeers"]

_REFUSALS_LOGGED_EVERY_S = 1.0
_LEAST_GROWTH_BYTES = 64 << 10
"""What a frame that is not complete has to grow by in the time of silence; signs of life alone are far less."""
logger = logging.getLogger(__name__)


@attrs.define(slots=True, eq=False)
class _Connection:
    sender: NodeId
    stream: trio.abc.Stream
    over: str = ""
    """Why nothing more is taken from it, once that is so."""
    waiting: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def is_over(self) -> bool:
        """It may be ended from outside while its task waits."""
        return bool(self.over)

    def end(self, why: str) -> None:
        self.over = self.over or why
        self.waiting.cancel()


class _Progress:
    """A frame comes to its end. One whose length was damaged on the way would swallow what follows, and a peer with little to say
    would not be understood for hours: its signs of life keep the connection, and none of them is read."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._since = trio.current_time()
        self._bytes = 0

    def check(self, received: int, *, same_frame: bool) -> None:
        """After each piece. Raises ``ProtocolError`` when a frame has hardly grown for the length of the window."""
        now = trio.current_time()
        self._bytes += received
        if not same_frame or self._bytes >= _LEAST_GROWTH_BYTES:
            self._since, self._bytes = now, 0
        elif now - self._since > self._window_s:
            raise ProtocolError("a frame does not come to its end")


class InboundPeers:
    """See the module header. ``counters`` holds one entry for each peer that may connect; ``heard`` is told who did."""

    def __init__(
        self,
        node_id: NodeId,
        cluster_id: bytes,
        *,
        limits: PeerLimits,
        counters: dict[NodeId, PeerCounters],
        receive: Callable[[NodeId, Message], Awaitable[None]],
        heard: Callable[[NodeId], None],
    ) -> None:
        self.refused = 0
        """Connections that were not let in."""
        self._node_id = node_id
        self._cluster_id = cluster_id
        self._limits = limits
        self._counters = counters
        self._receive = receive
        self._heard = heard
        self._handshakes = 0
        self._current: dict[NodeId, _Connection] = {}
        self._turns: dict[NodeId, trio.Lock] = {}
        self._log_refusals_from = 0.0
        self._unlogged = 0

    def is_connected(self, peer: NodeId) -> bool:
        """Whether the peer has a connection to us."""
        return peer in self._current

    def forget(self, peer: NodeId) -> None:
        """The peer is a peer no more."""
        if peer in self._current:
            self._current[peer].end("it is no member any more")

    async def serve(self, stream: trio.abc.Stream, origin: str) -> None:
        """Serve one connection until it is over. ``origin`` says in the log where it came from."""
        try:
            connection = await self._welcome(stream)
            if connection is not None:
                await self._take_turn(connection)
        except (LinkLost, ProtocolError) as error:
            self._log_refusal(origin, str(error))
        finally:
            await trio.aclose_forcefully(stream)

    # -- handshake -----------------------------------------------------------------------------------------------
    async def _welcome(self, stream: trio.abc.Stream) -> _Connection | None:
        if self._handshakes >= self._limits.max_handshakes:
            raise ProtocolError("too many connections have not said their name")
        self._handshakes += 1
        try:
            with deadline(self._limits.handshake_timeout_s, "no hello"):
                hello = await read_hello(stream)
                objection = self._objection(hello, stream)
                if objection:
                    await stream.send_all(encode_refusal(objection))
                    raise ProtocolError(objection)
                await stream.send_all(encode_hello(Hello(self._cluster_id, self._node_id, hello.sender)))
        finally:
            self._handshakes -= 1
        return self._let_in(_Connection(hello.sender, stream)) if hello.sender in self._counters else None

    def _objection(self, hello: Hello, stream: trio.abc.Stream) -> str | None:
        objection = hello.objection(cluster_id=self._cluster_id, node_id=self._node_id)
        if objection is None and hello.sender not in self._counters:
            objection = f"{hello.sender} is not a member"
        if objection is None:
            try:
                demand_name(stream, hello.sender)
            except ProtocolError as error:
                objection = str(error)
        return objection

    def _let_in(self, connection: _Connection) -> _Connection:
        older = self._current.get(connection.sender)
        self._current[connection.sender] = connection
        if older is not None:
            older.end("a newer connection replaced it")
        self._heard(connection.sender)
        return connection

    def _log_refusal(self, origin: str, reason: str) -> None:
        """One line a second: whoever knocks all day does not fill the disk."""
        self.refused += 1
        now = trio.current_time()
        if now < self._log_refusals_from:
            self._unlogged += 1
            return
        self._log_refusals_from = now + _REFUSALS_LOGGED_EVERY_S
        logger.warning("refused a peer connection from %s: %s (%d others before it)", origin, reason, self._unlogged)
        self._unlogged = 0

    # -- messages ------------------------------------------------------------------------------------------------
    async def _take_turn(self, connection: _Connection) -> None:
        sender = connection.sender
        turn = self._turns.setdefault(sender, trio.Lock())
        mine = False
        try:
            with connection.waiting:
                await turn.acquire()
                mine = True
            if mine and not connection.is_over():
                logger.info("%s connected to us", sender)
                await self._read(connection)
        except (LinkLost, ProtocolError) as error:
            connection.end(str(error))
        finally:
            if mine:
                turn.release()
            if self._current.get(sender) is connection:
                del self._current[sender]
            if mine:
                logger.info("the connection of %s is over: %s", sender, connection.over or "this node stops")

    async def _read(self, connection: _Connection) -> None:
        sender, stream = connection.sender, connection.stream
        reader = FrameReader(sender, max_frame_bytes=self._limits.max_frame_bytes)
        counters = self._counters[sender]
        progress = _Progress(self._limits.silence_timeout_s)
        while not connection.is_over():
            with deadline(self._limits.silence_timeout_s, "nothing was heard") as connection.waiting:
                data = await read_some(stream)
            counters.received_bytes += len(data)
            kept = reader.kept_bytes
            for message in reader.receive_data(data):
                if connection.is_over():
                    return
                counters.received_messages += 1
                await self._receive(sender, message)
            progress.check(len(data), same_frame=kept > 0 and reader.kept_bytes == kept + len(data))
