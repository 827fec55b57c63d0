"""SSE tails: a partition's records pushed to many subscribers as they become durable.

Owns: the event-stream format, who is woken when, the encoded pieces that subscribers share. Must not know: sockets, where records
lie, what a client does with them.

Fan-out costs one task switch and one send per subscriber and wake, because subscribers of a partition move together. One of them,
the pacer, waits for new records, then for the pause that is due, and sets the *frontier*: nobody reads past it, so all who keep
up stand at the same offset after each wake and share one encoding. The pause grows with the number of subscribers, so a single
one sees a record at once and five hundred cost no more than the machine has. A subscriber that falls behind reads piece by piece
at its own pace; it holds one piece at a time.

Invariants: offsets in one stream only grow, without a gap that no ``skipped`` event announces; the memo holds at most
``MEMO_BYTES`` and only immutable records; when a pacer is cancelled another subscriber takes over; a hub lives exactly as long
as it has subscribers. Source: HTML Living Standard 9.2 (server-sent events); RELIABILITY C-1, C-5.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Final

import msgspec
import trio

from ayder.errors import AyderError, ErrorCode
from ayder.fetch import Page
from ayder.http.context import Context
from ayder.http.exchange import ChunkSender, Request, Response
from ayder.http.pages import encode_messages
from ayder.http.params import invalid
from ayder.partition import Partition
from ayder.topics import Topic

__all__ = ["resume_offset", "tail_response"]

HEARTBEAT_S: Final = 10.0
POLL_S: Final = 1.0
"""How long a silent stream may take to notice that the node is stopping."""
PAUSE_PER_SUBSCRIBER_S: Final = 0.0001
"""A wake costs some 25 µs of this process per subscriber, so fan-out takes about a quarter of a core at any number of them."""
MAX_PAUSE_S: Final = 0.25
MAX_PIECE_BYTES: Final = 64 << 10
MAX_PIECE_RECORDS: Final = 1000
MEMO_BYTES: Final = 8 << 20
_PIECE_OVERHEAD_BYTES: Final = 300
_RETRY: Final = b"retry: 1000\n\n"
_HEARTBEAT: Final = b": heartbeat\n\n"
_HEADERS: Final = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))
_EVENT_ID: Final = re.compile(rb"[0-9]{1,18}")


def resume_offset(request: Request) -> int | None:
    """Where ``Last-Event-ID`` resumes: the offset after it; ``None`` without the header. Raises ``AyderError``."""
    raw = request.headers.get(b"last-event-id", b"")
    if not raw:
        return None
    if not _EVENT_ID.fullmatch(raw):
        raise invalid("Last-Event-ID", "must be the id of an event, an offset")
    return int(raw) + 1


def tail_response(
    context: Context, topic: Topic, partition: Partition, start_offset: int, limit_bytes: int, encoding: str
) -> Response:
    """A stream of the records from ``start_offset`` on; ``limit_bytes`` bounds one piece of it, ``encoding`` is text or b64.

    Raises ``AyderError``: overloaded when there are too many streams, offset_out_of_range for a start beyond the end (the topic
    the client remembers was deleted: waiting for that offset would skip records in silence).
    """
    fan_out = _fan_out(context)
    if fan_out.subscribers >= context.config.http.max_stream_subscribers:
        raise AyderError(ErrorCode.OVERLOADED, "too many streams are open")
    if start_offset > partition.next_offset:
        raise AyderError(
            ErrorCode.OFFSET_BEYOND_END, f"offset {start_offset} is beyond the end of the partition",
            offset=start_offset, log_start_offset=partition.log_start_offset, high_watermark=partition.next_offset,
        )  # fmt: skip
    tail = _Tail(context, topic, partition, start_offset, min(limit_bytes, MAX_PIECE_BYTES), b64=encoding == "b64")
    return Response(200, b"", b"text/event-stream", _HEADERS, stream=tail.run)


class _Piece:
    """Consecutive records, encoded. ``data`` is empty when retention took them all."""

    __slots__ = ("count", "data", "next_offset")

    def __init__(self, page: Page, *, b64: bool) -> None:
        messages = encode_messages(page, b64=b64)
        self.data = b"".join([b"id: %d\ndata: %b\n\n" % event for event in enumerate(messages, page.start_offset)])
        self.count = page.count
        self.next_offset = page.next_offset


_PieceKey = tuple[int, int, int, bool]
"""Partition uid, first offset, byte limit, base64."""


class _FanOut:
    """All tails of one node: the hubs by partition, and the pieces their subscribers share."""

    def __init__(self) -> None:
        self.subscribers = 0
        self._hubs: dict[int, _Hub] = {}
        self._memo: dict[_PieceKey, _Piece] = {}
        self._memo_bytes = 0
        self._making: dict[_PieceKey, trio.Event] = {}

    def join(self, context: Context, partition: Partition) -> _Hub:
        """The partition's hub, with one subscriber more."""
        hub = self._hubs.get(partition.uid)
        if hub is None:
            hub = self._hubs[partition.uid] = _Hub(context, partition)
        hub.subscribers += 1
        self.subscribers += 1
        return hub

    def leave(self, hub: _Hub) -> None:
        """One subscriber less."""
        hub.subscribers -= 1
        self.subscribers -= 1
        if not hub.subscribers:
            del self._hubs[hub.partition.uid]

    async def piece(self, hub: _Hub, start: int, limit_bytes: int, *, b64: bool) -> _Piece | None:
        """Records from ``start`` up to the frontier; ``None`` when retention has moved the log start past it.

        Does not wait when the records are in memory. Raises ``AyderError`` (storage_damaged).
        """
        key = (hub.partition.uid, start, limit_bytes, b64)
        while (found := self._memo.get(key)) is None and key in self._making:
            await self._making[key].wait()
        if found is not None:
            return found
        page = hub.context.fetcher.from_memory(hub.partition, start, _records(hub, start), limit_bytes)
        if page is None:
            page = await self._read(key, hub, start, limit_bytes)
        if page.start_offset > start:
            return None
        piece = _Piece(page, b64=b64)
        self._remember(key, piece)
        return piece

    async def _read(self, key: _PieceKey, hub: _Hub, start: int, limit_bytes: int) -> Page:
        """From the disk, once for all who wait for the same piece."""
        self._making[key] = trio.Event()
        try:
            return await hub.context.fetcher.fetch(hub.partition, start, _records(hub, start), limit_bytes)
        finally:
            self._making.pop(key).set()

    def _remember(self, key: _PieceKey, piece: _Piece) -> None:
        if key in self._memo:
            return
        self._memo[key] = piece
        self._memo_bytes += len(piece.data) + _PIECE_OVERHEAD_BYTES
        while self._memo_bytes > MEMO_BYTES:
            self._memo_bytes -= len(self._memo.pop(next(iter(self._memo))).data) + _PIECE_OVERHEAD_BYTES


def _records(hub: _Hub, start: int) -> int:
    return min(hub.frontier - start, MAX_PIECE_RECORDS)


_FAN_OUTS: weakref.WeakKeyDictionary[Context, _FanOut] = weakref.WeakKeyDictionary()


def _fan_out(context: Context) -> _FanOut:
    """The node's one. It goes with the context: only hubs, which have subscribers, point back to it."""
    fan_out = _FAN_OUTS.get(context)
    if fan_out is None:
        fan_out = _FAN_OUTS[context] = _FanOut()
        context.metrics.supply("ayder_stream_subscribers", lambda: fan_out.subscribers)
    return fan_out


class _Hub:
    """Wakes the subscribers of one partition together."""

    def __init__(self, context: Context, partition: Partition) -> None:
        self.partition = partition
        self.frontier = partition.next_offset
        """Nobody reads at or past this offset before the next wake."""
        self.subscribers = 0
        self.context = context
        self._term = context.broker.driver.consensus.current_term
        self._pacing = False
        self._woken = trio.Event()
        self._woken_at = 0.0

    @property
    def end_reason(self) -> str:
        """Why streams of this partition must end now; empty while they go on."""
        broker = self.context.broker
        if not self.context.fetcher.is_live(self.partition):
            return "topic_deleted"
        if broker.shutting_down:
            return "shutting_down"
        driver = broker.driver
        return "" if driver.ready and driver.consensus.current_term == self._term else "leader_changed"

    async def wait(self) -> None:
        """Until the frontier moved, the streams must end, or it is time to look after heartbeats."""
        if self._pacing:
            await self._woken.wait()
            return
        self._pacing = True
        try:
            await self._pace()
        finally:
            self._pacing = False
            self.frontier = self.partition.next_offset
            self._woken_at = trio.current_time()
            woken, self._woken = self._woken, trio.Event()
            woken.set()

    async def _pace(self) -> None:
        deadline = trio.current_time() + HEARTBEAT_S / 2
        while self.partition.next_offset <= self.frontier and not self.end_reason:
            now = trio.current_time()
            if now >= deadline:
                return
            with trio.move_on_at(min(deadline, now + POLL_S)):
                await self.context.broker.grown(self.partition.uid).wait()
        pause = min(self.subscribers * PAUSE_PER_SUBSCRIBER_S, MAX_PAUSE_S)
        await trio.sleep_until(max(trio.current_time(), self._woken_at + pause))


class _Tail:
    """One subscriber."""

    def __init__(
        self, context: Context, topic: Topic, partition: Partition, position: int, limit_bytes: int, *, b64: bool
    ) -> None:
        self._context = context
        self._fan_out = _fan_out(context)
        self._topic_id = topic.topic_id
        self._partition = partition
        self._position = position
        self._limit_bytes = limit_bytes
        self._b64 = b64
        self._sent_at = 0.0

    async def run(self, send: ChunkSender) -> None:
        """Send until the stream must end or the client leaves."""
        hub = self._fan_out.join(self._context, self._partition)
        try:
            await self._send(send, _RETRY)
            while not (reason := hub.end_reason):
                if self._position < self._partition.log_start_offset:
                    await self._skip(send)
                elif self._position < hub.frontier:
                    await self._advance(hub, send)
                else:
                    await hub.wait()
                    if self._position >= hub.frontier and trio.current_time() - self._sent_at >= HEARTBEAT_S - POLL_S:
                        await self._send(send, _HEARTBEAT)
            await self._send(send, _event("end", {"reason": reason}))
        except AyderError as error:
            await self._send(send, _event("error", {"error": error.code.wire, "message": error.message, **error.facts}))
        finally:
            self._fan_out.leave(hub)

    async def _advance(self, hub: _Hub, send: ChunkSender) -> None:
        piece = await self._fan_out.piece(hub, self._position, self._limit_bytes, b64=self._b64)
        if piece is not None:
            self._position = piece.next_offset
            self._context.metrics.records_out(self._topic_id, piece.count, len(piece.data))
            await self._send(send, piece.data)

    async def _skip(self, send: ChunkSender) -> None:
        """Retention took what this subscriber had not read. The id makes a resumed stream begin where this one goes on."""
        start = self._partition.log_start_offset
        facts = {"from": self._position, "log_start_offset": start}
        self._position = start
        await self._send(send, b"id: %d\n" % (start - 1) + _event("skipped", facts))

    async def _send(self, send: ChunkSender, data: bytes) -> None:
        await send(data)
        self._sent_at = trio.current_time()


def _event(kind: str, facts: Mapping[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(facts))
