"""One HTTP/1.1 connection: bytes in, requests to the application, answers out in order.

Owns: which request a byte belongs to, the framing of bodies, back-pressure on the client, the deadlines of one client, how a
connection ends. Must not know: routes, what a handler does, which kind of stream carries the bytes, how answers are queued.

Everything between two reads is synchronous: a request and its answer cost no task, no timer and no cancel scope.

Invariants: while an answer byte is unsent, or the pipeline is full, no request is read and at most 64 KiB are buffered; a
request that may change something never starts while an earlier read is being answered, nor the other way round (RFC 9112
9.3.2), so a pipeline reads its own writes; after a refusal the rest of the input is thrown away unread.

Source: RFC 9112 sections 2.2, 6, 9; RFC 9110 section 10.1.1; RELIABILITY H-1, H-2.
"""

from __future__ import annotations

import time

from ayder.http.answers import AnswerQueue
from ayder.http.exchange import Request, Response
from ayder.http.front import Front, Transport
from ayder.http.parser import CHUNKED, ChunkedBody, HeadReader, Refusal

__all__ = ["MAX_READ_BYTES", "Connection"]

MAX_READ_BYTES = 65536
MAX_BUFFERED_BYTES = 65536
MAX_REQUESTS_A_TURN = 16
MAX_SKIPPED_BODY_BYTES = 65536
LINGER_SECONDS = 2.0
MAX_LINGER_BYTES = 32 * 1024 * 1024
HANG_UP_GRACE_SECONDS = 1.0
H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\n"

# What the next byte of input belongs to.
HEAD, LENGTH, CHUNKS, SKIP, DEAF = range(5)


class Connection:
    """``takes_over`` says that somebody else speaks HTTP/2 and Upgrade: such a client's bytes end up in ``handover``."""

    __slots__ = (
        "_answers",
        "_blank_line",
        "_body",
        "_buffer",
        "_chunked",
        "_discarded",
        "_eof",
        "_first",
        "_front",
        "_held_bytes",
        "_held_request",
        "_in_head",
        "_mode",
        "_peer",
        "_reader",
        "_received",
        "_remaining",
        "_request",
        "_shut",
        "_since",
        "_takes_over",
        "_transport",
        "closed",
        "due",
        "handover",
    )

    def __init__(self, front: Front, transport: Transport, peer: str, *, takes_over: bool = False) -> None:
        config = front.config
        self._front = front
        self._transport = transport
        self._peer = peer
        self._takes_over = takes_over
        self._answers = AnswerQueue(front, transport, self)
        self._reader = HeadReader(config.max_request_line_bytes, config.max_head_bytes, config.max_headers)
        self._mode = HEAD
        self._first = True
        self._blank_line = False
        self._in_head = False
        self._buffer = b""
        self._request: Request | None = None
        self._held_request: Request | None = None
        self._body = bytearray()
        self._held_bytes = 0
        self._chunked: ChunkedBody | None = None
        self._remaining = 0
        self._received = 0
        self._discarded = 0
        self._eof = False
        self._shut = False
        self._since = front.now
        self.closed = False
        self.due = False
        self.handover: bytes | None = None
        front.add(self)

    def __repr__(self) -> str:
        mode = ("head", "length", "chunks", "skip", "deaf")[self._mode]
        return f"<Connection {self._peer} {mode} buffered={len(self._buffer)} owed={self._answers.owed} closed={self.closed}>"

    # --- what the task that reads calls

    @property
    def paused(self) -> bool:
        """Whether the client has to wait before more is read."""
        return bool(self._answers.unsent) or len(self._buffer) >= MAX_BUFFERED_BYTES

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._mode == DEAF:
            self._discard(len(data))
            return
        self._process(self._buffer + data if self._buffer else data)
        self._answers.flush()

    def eof_received(self) -> None:
        """The client will send nothing more; what it asked for so far is still answered (it may only have shut its own side)."""
        self._eof = True
        self._since = self._front.now
        if self._answers.idle and not self._has_input():
            self.lost()

    def lost(self) -> None:
        """The client is gone, or given up: free everything. Repeatable."""
        if self.closed:
            return
        self.closed = True
        self._mode = DEAF
        self._buffer = b""
        self._held_request = None
        self._release_body()
        self._answers.abandon()
        self._front.discard(self)
        self._transport.close()

    # --- what the front and the queue of answers call

    def wants_turn(self) -> bool:
        """Whether ``resume`` has something to do once an answer left."""
        return self._eof or self._has_input()

    def resume(self) -> None:
        """Send what is ready, read on where back-pressure stopped."""
        if self.closed:
            return
        answers = self._answers
        answers.advance_and_flush()
        if self._mode == HEAD and (self._held_request is not None or self._buffer):
            self._process(self._buffer)
            answers.flush()
            self._transport.reading_changed()
        if self._eof and answers.idle and not self._has_input():
            self.lost()

    def all_sent(self) -> None:
        """The last answer is sent: say so, then wait a little for the client to have read it (RFC 9112 9.6)."""
        if self._shut or self.closed:
            return
        self._stop_reading()
        self._shut = True
        self._since = self._front.now
        if self._eof:
            self.lost()
        else:
            self._transport.shutdown_writing()

    def drain(self) -> None:
        """The server stops: an idle connection closes now, another one after its answers."""
        if self._mode == HEAD and not self._in_head and not self._buffer and self._answers.idle:
            self.lost()

    def tick(self, now: float) -> None:
        """Judge the deadlines of the phase the connection is in. ``now`` in seconds, Trio's clock."""
        front, answers, waited = self._front, self._answers, now - self._since
        if answers.unsent:
            if now - answers.unsent_since >= front.write_stall_timeout:
                self.lost()
        elif self._eof:
            if waited >= HANG_UP_GRACE_SECONDS and (answers.works or answers.idle):
                self.lost()
        elif self._mode == DEAF:
            if self._shut and waited >= LINGER_SECONDS:
                self.lost()
        elif self._mode == HEAD:
            self._tick_between_bodies(now, waited)
        elif waited >= front.body_timeout or self._too_slow(waited):
            self._refuse(Refusal("REQUEST_TIMEOUT", "the body did not arrive in time"))
            answers.flush()

    def _tick_between_bodies(self, now: float, waited: float) -> None:
        front, answers = self._front, self._answers
        if self._in_head:
            if waited >= front.head_timeout:
                self._refuse(Refusal("REQUEST_TIMEOUT", "the request head did not arrive in time"))
                answers.flush()
        elif answers.idle and not self._buffer:
            quiet = min(waited, now - answers.last_sent)
            if quiet >= front.idle_timeout or front.draining:
                self.lost()

    def _too_slow(self, waited: float) -> bool:
        judged = waited - self._front.body_grace
        return judged > 0 and self._received < judged * self._front.config.body_min_bytes_per_second

    # --- reading

    def _has_input(self) -> bool:
        return self._held_request is not None or (bool(self._buffer) and self._mode == HEAD and not self._in_head)

    def _process(self, buffer: bytes) -> None:
        """Read as many requests as may be read now, and keep the rest."""
        position, size, turn = 0, len(buffer), 0
        try:
            if self._held_request is not None and not self._release_held():
                position = -1
            while 0 <= position < size:
                if self._mode != HEAD:
                    position = self._read_body(buffer, position)
                elif self._held_request is not None or self._answers.full:
                    break
                elif turn == MAX_REQUESTS_A_TURN:
                    self._front.soon(self)
                    break
                else:
                    turn += 1
                    after = self._read_head(buffer, position)
                    if after < 0:
                        break
                    position = after
        except Refusal as refusal:
            self._refuse(refusal)
        if self._mode == DEAF:
            self._buffer = b""
        elif position > 0:
            self._buffer = buffer[position:]
        else:
            self._buffer = buffer

    def _read_head(self, buffer: bytes, start: int) -> int:
        """Returns the position behind what was read (head, perhaps body), or -1 when the head is not complete."""
        if buffer[start] == 13 and not self._blank_line:  # one empty line before a request is ignored (RFC 9112 2.2)
            if len(buffer) == start + 1:
                return self._wait_for_head()
            if buffer[start + 1] == 10:
                self._blank_line = True
                return start + 2
        if self._first and self._takes_over and buffer[start] == 80 and self._is_preface(buffer[start:]):
            return self._hand_over(buffer[start:]) if len(buffer) - start >= len(H2_PREFACE) else self._wait_for_head()
        end = buffer.find(b"\r\n\r\n", start)
        if end < 0:
            self._wait_for_head()
            self._reader.progress(buffer[start:])
            return -1
        reader = self._reader
        request = reader.finish(buffer[start : end + 4])
        if self._takes_over and reader.upgrade and not reader.body_length:
            self._answers.flush()
            if self._answers.idle:
                return self._hand_over(buffer[start:])
        self._first = self._in_head = self._blank_line = False
        request.peer = self._peer
        request.received_ns = time.monotonic_ns()
        return self._begin(request, buffer, end + 4)

    def _wait_for_head(self) -> int:
        if not self._in_head:
            self._in_head = True
            self._since = self._front.now
        return -1

    @staticmethod
    def _is_preface(buffer: bytes) -> bool:
        return buffer.startswith(H2_PREFACE) or H2_PREFACE.startswith(buffer)

    def _hand_over(self, rest: bytes) -> int:
        self.handover = rest
        self._mode = DEAF
        self._transport.reading_changed()
        return -1

    def _begin(self, request: Request, buffer: bytes, position: int) -> int:
        """The head is complete: ask the application, then take what is there of the body. Returns the position behind it."""
        length = self._reader.body_length
        try:
            allowed = self._front.application.open(request)
        except Exception:
            allowed = self._front.bug(request)
        self._request = request
        if isinstance(allowed, Response):
            return self._turn_away(request, allowed, len(buffer) - position, position)
        if length == 0:
            self._complete(request)
            return position
        if length > allowed:
            raise Refusal("PAYLOAD_TOO_LARGE", f"the body of {length} bytes is larger than the {allowed} bytes allowed")
        if 0 < length <= len(buffer) - position:
            request.body = buffer[position : position + length]
            self._complete(request)
            return position + length
        self._await_body(length, allowed, something_came=len(buffer) > position)
        return position

    def _turn_away(self, request: Request, response: Response, there: int, position: int) -> int:
        """The application refused the request unread. A short body is skipped, else the connection ends."""
        reader = self._reader
        length = reader.body_length
        short = 0 <= length <= max(there, MAX_SKIPPED_BODY_BYTES)
        keep = reader.keep_alive and short and not (reader.expects_continue and length > there)
        self._answers.put(response, request, keep, reader.http11)
        if not keep or self._answers.finishing:
            self._stop_reading()
        elif length > there:
            self._mode = SKIP
            self._remaining = length
            self._start_body_clock()
        else:
            self._since = self._front.now
            self._request = None
            return position + length
        return position

    def _await_body(self, length: int, allowed: int, *, something_came: bool) -> None:
        front = self._front
        if front.held_body_bytes + max(length, 0) > front.config.max_bodies_in_flight_bytes:
            raise Refusal("OVERLOADED", "too many request bodies are in flight")
        if self._reader.expects_continue and not something_came:
            self._answers.interim()
        if length == CHUNKED:
            self._mode = CHUNKS
            self._chunked = self._reader.chunked_body(allowed)
        else:
            self._mode = LENGTH
            self._remaining = length
        self._start_body_clock()

    def _start_body_clock(self) -> None:
        self._since = self._front.now
        self._received = 0

    def _read_body(self, buffer: bytes, position: int) -> int:
        """Take body bytes. Returns the position behind them."""
        if self._mode == DEAF:
            return len(buffer)
        if self._mode == CHUNKS:
            return self._read_chunks(buffer, position)
        end = min(len(buffer), position + self._remaining)
        self._remaining -= end - position
        self._received += end - position
        if self._mode == LENGTH:
            self._hold(end - position)
            self._body += buffer[position:end] if position or end < len(buffer) else buffer
        if not self._remaining:
            self._body_complete(self._body, skipped=self._mode == SKIP)
        return end

    def _read_chunks(self, buffer: bytes, position: int) -> int:
        assert self._chunked is not None
        before = self._chunked.size
        left = self._chunked.feed(buffer[position:])
        self._received += len(buffer) - position
        self._hold(self._chunked.size - before)
        if left < 0:
            return len(buffer)
        self._body_complete(self._chunked.content, skipped=False)
        return len(buffer) - left

    def _hold(self, size: int) -> None:
        front = self._front
        self._held_bytes += size
        front.held_body_bytes += size
        if front.held_body_bytes > front.config.max_bodies_in_flight_bytes:
            raise Refusal("OVERLOADED", "too many request bodies are in flight")

    def _release_body(self) -> None:
        self._front.held_body_bytes -= self._held_bytes
        self._held_bytes = 0
        self._chunked = None
        self._body = bytearray()

    def _body_complete(self, body: bytearray, *, skipped: bool) -> None:
        request, self._request = self._request, None
        assert request is not None
        self._mode = HEAD
        self._since = self._front.now
        if not skipped:
            request.body = bytes(body)
            self._release_body()
            self._complete(request)

    def _complete(self, request: Request) -> None:
        """The request is whole: have it answered, unless it has to wait for earlier ones."""
        answers, reader = self._answers, self._reader
        self._request = None
        if answers.owed and not answers.admits(request):
            self._held_request = request
            return
        self._since = self._front.now
        answers.ask(request, reader.keep_alive, reader.http11)
        if not reader.keep_alive or answers.finishing:
            self._stop_reading()

    def _release_held(self) -> bool:
        request = self._held_request
        assert request is not None
        if not self._answers.admits(request):
            return False
        self._held_request = None
        self._complete(request)
        return True

    # --- ending

    def _refuse(self, refusal: Refusal) -> None:
        response = self._front.refuse(refusal.code, refusal.message)
        request = self._request
        self._stop_reading()
        self._answers.put(response, request, False, True)

    def _stop_reading(self) -> None:
        self._release_body()
        self._mode = DEAF
        self._in_head = False
        self._request = None
        self._buffer = b""

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > MAX_LINGER_BYTES:
            self.lost()
