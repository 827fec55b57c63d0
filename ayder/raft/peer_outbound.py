"""One peer as this node speaks to it: a queue, a connection that is made again and again, one task that writes.

Owns: the queue and its bounds, dialling with back-off, the order of what leaves. Must not know: what a message means, sockets.

Small messages wait in a queue that is bounded in bytes and count; when it is full the oldest goes, for Raft repeats what matters
and the newest says most. Appends are never queued: the writer asks for the next one when the one before has been taken by the
connection, so a slow peer holds back its own appends and nobody else's. What was queued for a peer that then could not be
reached is dropped: it would arrive as old news.

Invariants: at most one connection; ``send`` and ``wake`` never wait; every wait of the writer but ``next_append`` has a deadline.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from ayder.entries import NodeId
from ayder.raft.frames import ProtocolError
from ayder.raft.handshake import Hello, encode_hello
from ayder.raft.messages import Message
from ayder.raft.peer_link import LinkLost, PeerCounters, PeerLimits, deadline, read_hello, read_some, write
from ayder.raft.wire import PING, encode

__all__ = ["OutboundPeer"]

_GATHERED_BYTES = 256 << 10
logger = logging.getLogger(__name__)


class OutboundPeer:
    """See the module header. ``dial`` returns a stream whose other end is proven to be the peer, as far as that is demanded;
    ``next_append`` gives the next append or ``None``; ``lost`` is told when a connection ends; ``jitter`` gives 0 to 1."""

    def __init__(
        self,
        hello: Hello,
        *,
        limits: PeerLimits,
        counters: PeerCounters,
        dial: Callable[[], Awaitable[trio.abc.Stream]],
        next_append: Callable[[NodeId], Awaitable[Message | None]],
        lost: Callable[[NodeId], None],
        jitter: Callable[[], float],
    ) -> None:
        self.peer = hello.receiver
        self.connected = False
        self.rtt_s: float | None = None
        """How long the answer to the last hello took."""
        self.queued_bytes = 0
        self.counters = counters
        self._hello = hello
        self._limits = limits
        self._dial = dial
        self._next_append = next_append
        self._lost = lost
        self._jitter = jitter
        self._queue: deque[tuple[int, list[bytes]]] = deque()
        self._may_append = False
        self._work = trio.Event()
        self._hurry = trio.Event()
        self._scope = trio.CancelScope()
        self._attempt = trio.CancelScope()
        self._complaint = ""

    # -- for the node: none of these waits -----------------------------------------------------------------------
    @property
    def queued_messages(self) -> int:
        """Messages that wait for the connection."""
        return len(self._queue)

    def send(self, message: Message) -> None:
        """Queue a message. Raises ``ValueError`` when it is longer than a frame may be."""
        pieces = self._encode(message)
        size = sum(map(len, pieces))
        self._queue.append((size, pieces))
        self.queued_bytes += size
        while self.queued_bytes > self._limits.max_queued_bytes or len(self._queue) > self._limits.max_queued_messages:
            self._drop_oldest()
        self._work.set()

    def wake(self) -> None:
        """There may be an append."""
        self._may_append = True
        self._work.set()

    def hurry(self) -> None:
        """The peer was heard: a connection that could not be made just now can be."""
        self._hurry.set()

    def redial(self) -> None:
        """Give up the connection, if there is one, and make a new one."""
        self._attempt.cancel()
        self._hurry.set()

    def stop(self) -> None:
        """The peer is a peer no more."""
        self._scope.cancel()

    def _encode(self, message: Message) -> list[bytes]:
        pieces = encode(message)
        size = sum(map(len, pieces))
        if size > self._limits.max_frame_bytes:
            raise ValueError(f"{type(message).__name__} of {size} bytes, {self._limits.max_frame_bytes} fit a frame")
        return pieces

    def _drop_oldest(self) -> None:
        self.queued_bytes -= self._queue.popleft()[0]
        self.counters.dropped_messages += 1

    # -- the connection ------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Be connected, until ``stop``. Raises only what ``next_append`` and ``lost`` raise."""
        with self._scope:
            backoff = self._limits.min_backoff_s
            while True:
                began = trio.current_time()
                await self._once()
                lasted = trio.current_time() - began
                if self._hurry.is_set() or (not self._complaint and lasted >= self._limits.max_backoff_s):
                    backoff = self._limits.min_backoff_s
                await self._pause(backoff * (1 + self._jitter()) / 2)
                backoff = min(2 * backoff, self._limits.max_backoff_s)

    async def _pause(self, seconds: float) -> None:
        """Wait; a peer that is heard meanwhile ends it, though never before the shortest pause."""
        await trio.sleep(min(seconds, self._limits.min_backoff_s))
        with trio.move_on_after(max(0.0, seconds - self._limits.min_backoff_s)):
            await self._hurry.wait()

    async def _once(self) -> None:
        with trio.CancelScope() as self._attempt:
            self._hurry = trio.Event()
            try:
                stream = await self._connect()
            except (LinkLost, ProtocolError) as error:
                self._not_reached(str(error))
                return
            try:
                await self._converse(stream)
            finally:
                self.connected = False
                self._lost(self.peer)
                await trio.aclose_forcefully(stream)

    async def _connect(self) -> trio.abc.Stream:
        with deadline(self._limits.handshake_timeout_s, "no answer"):
            stream = await self._dial()
            try:
                began = trio.current_time()
                await stream.send_all(encode_hello(self._hello))
                answer = await read_hello(stream)
                self.rtt_s = trio.current_time() - began
                objection = answer.objection(cluster_id=self._hello.cluster_id, node_id=self._hello.sender)
                if answer.sender != self.peer:
                    objection = f"{self.peer} was called, {answer.sender} answered"
                if objection:
                    raise ProtocolError(objection)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
        return stream

    def _not_reached(self, reason: str) -> None:
        if reason != self._complaint:
            logger.warning("cannot connect to %s: %s", self.peer, reason)
        self._complaint = reason
        while self._queue:
            self._drop_oldest()

    async def _converse(self, stream: trio.abc.Stream) -> None:
        self.connected = self._may_append = True
        self._complaint = ""
        self.counters.connects += 1
        logger.info("connected to %s", self.peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_lost, nursery.cancel_scope, self._listen, stream)
            nursery.start_soon(self._until_lost, nursery.cancel_scope, self._speak, stream)

    async def _until_lost(
        self, both: trio.CancelScope, part: Callable[[trio.abc.Stream], Awaitable[None]], stream: trio.abc.Stream
    ) -> None:
        try:
            await part(stream)
        except (LinkLost, ProtocolError) as error:
            logger.info("lost the connection to %s: %s", self.peer, error)
            both.cancel()

    async def _listen(self, stream: trio.abc.Stream) -> None:
        """This direction carries what we say: the other one only tells us of its end."""
        await read_some(stream, 1)
        raise ProtocolError("it spoke where it should listen")

    async def _speak(self, stream: trio.abc.Stream) -> None:
        while True:
            if self._queue:
                count, pieces = self._gather()
                await self._write(stream, pieces, count)
            if self._may_append:
                self._may_append = False  # before asking: whoever wakes us meanwhile is heard
                message = await self._next_append(self.peer)
                if message is not None:
                    self._may_append = True
                    await self._write(stream, self._encode(message), 1)
            elif not self._queue:
                await self._wait_for_work(stream)

    def _gather(self) -> tuple[int, list[bytes]]:
        """The oldest messages, as many as leave in one send; at least one."""
        gathered: list[bytes] = []
        count = size = 0
        while self._queue and size < _GATHERED_BYTES:
            length, pieces = self._queue.popleft()
            gathered += pieces
            size += length
            count += 1
        self.queued_bytes -= size
        return count, gathered

    async def _wait_for_work(self, stream: trio.abc.Stream) -> None:
        self._work = trio.Event()
        with trio.move_on_after(self._limits.ping_interval_s) as quiet:
            await self._work.wait()
        if quiet.cancelled_caught:
            await self._write(stream, [PING], 0)

    async def _write(self, stream: trio.abc.Stream, pieces: list[bytes], messages: int) -> None:
        self.counters.sent_bytes += await write(stream, pieces, self._limits.write_timeout_s)
        self.counters.sent_messages += messages
