"""SSE tails: a partition's records pushed to many subscribers as they become durable.

Owns: the event-stream format, one subscriber's place in it. Must not know: sockets, where records lie, what a client does with
them.

Subscribers of a partition move together (``fan_out.py``). One that falls behind reads piece by piece at its own pace; it holds
one piece at a time.

Invariants: offsets in one stream only grow, without a gap that no ``skipped`` event announces.
Source: HTML Living Standard 9.2 (server-sent events); RELIABILITY C-1, C-5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec
import trio

from ayder.errors import AyderError, ErrorCode
from ayder.http.context import Context
from ayder.http.exchange import ChunkSender, Request, Response
from ayder.http.fan_out import HEARTBEAT_S, POLL_S, Hub
from ayder.http.params import invalid
from ayder.partition import Partition
from ayder.topics import Topic

__all__ = ["resume_offset", "tail_response"]

MAX_PIECE_BYTES: Final = 64 << 10
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
    fan_out = context.fan_out
    if fan_out.subscribers >= context.config.http.max_stream_subscribers:
        raise AyderError(ErrorCode.OVERLOADED, "too many streams are open")
    if start_offset > partition.next_offset:
        raise AyderError(
            ErrorCode.OFFSET_BEYOND_END, f"offset {start_offset} is beyond the end of the partition",
            offset=start_offset, log_start_offset=partition.log_start_offset, high_watermark=partition.next_offset,
        )  # fmt: skip
    tail = _Tail(context, topic, partition, start_offset, min(limit_bytes, MAX_PIECE_BYTES), b64=encoding == "b64")
    return Response(200, b"", b"text/event-stream", _HEADERS, stream=tail.run)


class _Tail:
    """One subscriber."""

    def __init__(
        self, context: Context, topic: Topic, partition: Partition, position: int, limit_bytes: int, *, b64: bool
    ) -> None:
        self._context = context
        self._fan_out = context.fan_out
        self._topic_id = topic.topic_id
        self._partition = partition
        self._position = position
        self._limit_bytes = limit_bytes
        self._b64 = b64
        self._sent_at = 0.0

    async def run(self, send: ChunkSender) -> None:
        """Send until the stream must end or the client leaves."""
        hub = self._fan_out.join(self._partition)
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

    async def _advance(self, hub: Hub, send: ChunkSender) -> None:
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
