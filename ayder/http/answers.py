"""The answers one connection owes, and the bytes it could not send yet.

Owns: the order of answers, joining them into one send, the tasks of a ``Work`` and of a streamed body, the unsent rest of a
client that reads slowly, whether an answer ends the connection. Must not know: how requests are read, which kind of stream
carries the bytes, routes.

An answer that is ready and first in line goes straight to the output list. One that is not ready takes a ``Slot``; resolving a
slot at the head of the line sends it at once when it is alone, else the front resumes the connection in the next pass of the
scheduler, so that answers that become ready together leave in one send.

Invariants: answers leave in the order of their requests; once ``finishing`` is set nothing is added; every slot is answered or
given up, exactly once; ``unsent`` is not empty exactly while a writer task runs.

Source: RFC 9112 sections 6.3, 7.1, 9.3, 9.6.
"""

from __future__ import annotations

import logging
from collections import deque

import trio

from ayder.http.exchange import Deferred, Request, Response, Work
from ayder.http.front import Front, Owner, Transport
from ayder.http.writing import CLOSE, CONTINUE, KEEP_ALIVE, LAST_CHUNK, chunk

__all__ = ["SAFE_METHODS", "AnswerQueue", "Slot"]

MAX_UNFLUSHED_BYTES = 65536
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
logger = logging.getLogger(__name__)


class Slot:
    """The place of one answer in the queue."""

    __slots__ = ("deferred", "head_only", "http11", "keep_alive", "queue", "request", "response", "scope", "streaming")

    def __init__(self, queue: AnswerQueue, request: Request | None, keep_alive: bool, http11: bool) -> None:
        self.queue = queue
        self.request = request
        self.head_only = request is not None and request.method == "HEAD"
        self.keep_alive = keep_alive
        self.http11 = http11
        self.response: Response | None = None
        self.deferred: Deferred | None = None
        self.scope: trio.CancelScope | None = None
        self.streaming = False

    def resolved(self) -> None:
        """The deferred answer is there."""
        assert self.deferred is not None
        self.response = self.deferred.response
        self.deferred = None
        self.queue.slot_ready(self)

    def give_up(self) -> None:
        """Nobody will read this answer."""
        if self.deferred is not None:
            self.deferred.abandon()
            self.deferred = None
        if self.scope is not None:
            self.scope.cancel()


class AnswerQueue:
    """See the module."""

    __slots__ = (
        "_exclusive",
        "_front",
        "_limit",
        "_out",
        "_out_bytes",
        "_owner",
        "_room",
        "_slots",
        "_slots_safe",
        "_transport",
        "finishing",
        "last_sent",
        "unsent",
        "unsent_since",
    )

    def __init__(self, front: Front, transport: Transport, owner: Owner) -> None:
        self._front = front
        self._transport = transport
        self._owner = owner
        self._limit = front.config.max_pipelined_requests
        self._slots: deque[Slot] = deque()
        self._slots_safe = True
        self._exclusive = False
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._room: trio.Event | None = None
        self.finishing = False
        self.last_sent = front.now
        self.unsent: deque[memoryview] = deque()
        self.unsent_since = 0.0

    # --- what the connection asks

    @property
    def owed(self) -> int:
        """How many answers are not sent."""
        return len(self._slots)

    @property
    def full(self) -> bool:
        """Whether no further request may be read now."""
        return bool(self.unsent) or len(self._slots) >= self._limit

    @property
    def idle(self) -> bool:
        """Whether nothing is owed and nothing is unsent."""
        return not (self._slots or self._out or self.unsent)

    @property
    def works(self) -> bool:
        """Whether a task is busy with an answer."""
        return any(slot.scope is not None for slot in self._slots)

    def admits(self, request: Request) -> bool:
        """Whether ``request`` may start beside those owed: reads beside reads, writes beside writes (the log orders them)."""
        return not self._slots or (not self._exclusive and self._slots_safe is (request.method in SAFE_METHODS))

    # --- adding

    def ask(self, request: Request, keep_alive: bool, http11: bool) -> None:
        """Hand a complete request to the application and take its answer."""
        try:
            answer = self._front.application.respond(request)
        except Exception:
            answer = self._front.bug(request)
        if isinstance(answer, Response):
            self.put(answer, request, keep_alive, http11)
            return
        if isinstance(answer, Deferred):
            if answer.response is None:
                slot = self._add(request, keep_alive, http11)
                slot.deferred = answer
                answer.when_resolved = slot.resolved
                return
            answer = answer.response
        if isinstance(answer, Work):
            slot = self._add(request, keep_alive, http11)
            slot.scope = trio.CancelScope()
            self._exclusive = self._exclusive or not self._slots_safe
            self._front.spawn(self._owner, self._work, slot, answer)
        else:
            self.put(answer, request, keep_alive, http11)

    def put(self, response: Response, request: Request | None, keep_alive: bool, http11: bool) -> None:
        """Queue an answer that is ready. ``request`` is None when the request could not even be read."""
        if self._slots or response.stream is not None:
            slot = self._add(request, keep_alive, http11)
            slot.response = response
            self._advance()
        else:
            self._emit(response, request is not None and request.method == "HEAD", keep_alive, http11)

    def interim(self) -> None:
        """Say 100 Continue, unless an earlier answer is owed (the client then sends its body unasked, RFC 9110 10.1.1)."""
        if self.idle or not self._slots:
            self._out.append(CONTINUE)
            self._out_bytes += len(CONTINUE)

    def _add(self, request: Request | None, keep_alive: bool, http11: bool) -> Slot:
        slot = Slot(self, request, keep_alive, http11)
        if not self._slots:
            self._slots_safe = request is None or request.method in SAFE_METHODS
            self._exclusive = False
        self._slots.append(slot)
        return slot

    # --- answering

    def slot_ready(self, slot: Slot) -> None:
        """A slot got its answer."""
        slots = self._slots
        if not slots or slots[0] is not slot:
            return
        if len(slots) == 1:
            self._advance()
            self.flush()
            if self._owner.wants_turn():
                self._front.soon(self._owner)
        else:
            self._front.soon(self._owner)

    def advance_and_flush(self) -> None:
        """Send whatever is ready."""
        self._advance()
        self.flush()

    def _advance(self) -> None:
        slots = self._slots
        while slots and not self.finishing:
            slot = slots[0]
            response = slot.response
            if response is None or slot.streaming:
                return
            if response.stream is not None:
                self._start_stream(slot, response)
                return
            slots.popleft()
            self._emit(response, slot.head_only, slot.keep_alive, slot.http11)

    def _emit(self, response: Response, head_only: bool, keep_alive: bool, http11: bool) -> None:
        front = self._front
        if keep_alive and http11 and not (head_only or response.close or front.draining):
            piece = front.writer.plain(response)
            if piece:
                self._out.append(piece)
                self._out_bytes += len(piece)
                return
        last = not keep_alive or response.close or (front.draining and not self._slots)
        self._emit_pieces(response, head_only, CLOSE if last else b"" if http11 else KEEP_ALIVE)
        if last:
            self._finish()
        if self._out_bytes > MAX_UNFLUSHED_BYTES:
            self.flush()

    def _emit_pieces(self, response: Response, head_only: bool, connection: bytes) -> None:
        writer = self._front.writer
        try:
            pieces = writer.whole(response, head_only=head_only, connection=connection)
        except (ValueError, TypeError):
            logger.exception("the application gave an answer that cannot be sent")
            broken = self._front.refuse("INTERNAL", "internal error; it has been logged")
            pieces = writer.whole(broken, head_only=head_only, connection=connection)
        self._out += pieces
        self._out_bytes += sum(map(len, pieces))

    def _finish(self) -> None:
        self.finishing = True
        self._give_up_slots()

    def _give_up_slots(self) -> None:
        slots, self._slots = self._slots, deque()
        for slot in slots:
            slot.give_up()

    def abandon(self) -> None:
        """The client is gone: drop everything, cancel every task."""
        self.finishing = True
        self._out.clear()
        self.unsent.clear()
        self._give_up_slots()
        if self._room is not None:
            self._room.set()

    # --- sending

    def flush(self) -> None:
        """Send the output in one call. What does not fit is left to a writer task."""
        pieces = self._out
        if not pieces:
            if self.finishing and not self.unsent:
                self._owner.all_sent()
            return
        total = self._out_bytes
        self._out = []
        self._out_bytes = 0
        self.last_sent = self._front.now
        try:
            sent = 0 if self.unsent else self._transport.try_send(pieces)
        except OSError:
            self._owner.lost()
            return
        if sent < total:
            self._keep(pieces, sent)
        elif self.finishing:
            self._owner.all_sent()

    def _keep(self, pieces: list[bytes], sent: int) -> None:
        starting = not self.unsent
        for piece in pieces:
            if sent >= len(piece):
                sent -= len(piece)
            else:
                self.unsent.append(memoryview(piece)[sent:])
                sent = 0
        if starting:
            self.unsent_since = self._front.now
            self._front.spawn(self._owner, self._write)

    async def _write(self) -> None:
        unsent = self.unsent
        try:
            while unsent:
                sent = await self._transport.drain(unsent[0])
                if not unsent:  # abandoned meanwhile
                    return
                if sent:
                    self.unsent_since = self._front.now
                if sent < len(unsent[0]):
                    unsent[0] = unsent[0][sent:]
                else:
                    unsent.popleft()
        except OSError:
            self._owner.lost()
            return
        if self._room is not None:
            self._room.set()
        if self.finishing:
            self.flush()
        self._transport.reading_changed()
        self._front.soon(self._owner)

    # --- tasks

    async def _work(self, slot: Slot, work: Work) -> None:
        assert slot.scope is not None and slot.request is not None
        with slot.scope:
            try:
                slot.response = await work.run()
            except Exception:
                slot.response = self._front.bug(slot.request)
        slot.scope = None
        if slot.response is not None:
            self.slot_ready(slot)

    def _start_stream(self, slot: Slot, response: Response) -> None:
        slot.streaming = True
        if response.close or not slot.http11:
            slot.keep_alive = False
        connection = b"" if slot.keep_alive else CLOSE
        try:
            head = self._front.writer.stream_head(response, http11=slot.http11, connection=connection)
        except (ValueError, TypeError):
            logger.exception("the application gave an answer that cannot be sent")
            slot.response = self._front.refuse("INTERNAL", "internal error; it has been logged")
            slot.streaming = False
            self._advance()
            return
        self._out.append(head)
        self._out_bytes += len(head)
        if slot.head_only:
            self._stream_over(slot)
            return
        slot.scope = trio.CancelScope()
        self._front.spawn(self._owner, self._stream, slot, response)

    async def _stream(self, slot: Slot, response: Response) -> None:
        assert slot.scope is not None and response.stream is not None

        async def send(piece: bytes) -> None:
            if piece:
                self._out.append(chunk(piece) if slot.http11 else piece)
                self._out_bytes += len(self._out[-1])
                await self._send_all()

        complete = False
        with slot.scope:
            try:
                await response.stream(send)
                complete = True
            except Exception:
                logger.exception("a streamed answer broke off")
        slot.scope = None
        if self.finishing:
            return
        if not complete:
            self._owner.lost()  # the missing last chunk tells the client
            return
        if slot.http11:
            self._out.append(LAST_CHUNK)
            self._out_bytes += len(LAST_CHUNK)
        self._stream_over(slot)
        self.advance_and_flush()
        self._front.soon(self._owner)

    def _stream_over(self, slot: Slot) -> None:
        self._slots.popleft()
        if not slot.keep_alive or (self._front.draining and not self._slots):
            self._finish()
        else:
            self._advance()

    async def _send_all(self) -> None:
        self.flush()
        if not self.unsent:
            await trio.lowlevel.checkpoint()
        while self.unsent:
            self._room = trio.Event()
            await self._room.wait()
            self._room = None
