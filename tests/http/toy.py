"""A private application for the tests of the fronts, a transport in memory, and a reader of answers."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from ayder.config import HttpConfig
from ayder.http.connection import Connection
from ayder.http.exchange import Answer, ChunkSender, Deferred, Request, Response, Work
from ayder.http.front import Front

BODY_LIMIT = 1000
STATUS = {
    "REQUEST_TIMEOUT": 408,
    "PAYLOAD_TOO_LARGE": 413,
    "URI_TOO_LONG": 414,
    "HEADERS_TOO_LARGE": 431,
    "OVERLOADED": 503,
    "INTERNAL": 500,
    "INVALID_REQUEST": 400,
}


def refusal(code: str, message: str) -> Response:
    return Response(STATUS[code], json.dumps({"ok": False, "error": code.lower(), "message": message}).encode())


class Toy:
    """Counts what it sees. The path says how it answers; any other path echoes the body."""

    def __init__(self) -> None:
        self.opened: list[Request] = []
        self.seen: list[Request] = []
        self.deferred: list[Deferred] = []
        self.work: Callable[[], Awaitable[Response]] | None = None
        self.stream: Callable[[ChunkSender], Awaitable[None]] | None = None
        self.body_limit = BODY_LIMIT

    def open(self, request: Request) -> int | Response:
        self.opened.append(request)
        if request.path == b"/bug-in-open":
            raise RuntimeError("a bug")
        if request.path == b"/forbidden":
            return Response(403, b'{"error":"forbidden"}')
        return self.body_limit

    def respond(self, request: Request) -> Answer:
        self.seen.append(request)
        match request.path:
            case b"/later":
                deferred = Deferred()
                self.deferred.append(deferred)
                return deferred
            case b"/resolved":
                deferred = Deferred()
                deferred.resolve(Response(200, b"resolved"))
                return deferred
            case b"/work":
                assert self.work is not None
                return Work(self.work)
            case b"/stream":
                return Response(200, content_type=b"text/plain", stream=self.stream)
            case b"/bug":
                raise RuntimeError("a bug")
            case b"/split":
                return Response(200, b"", headers=((b"location", b"/x\r\nSet-Cookie: a=b"),))
            case b"/bye":
                return Response(200, b"bye", close=True)
            case b"/none":
                return Response(204, b"", content_type=b"")
            case b"/large":
                return Response(200, b"x" * 1_000_000)
        return Response(200, request.body or b"ok", headers=((b"x-method", request.method.encode()),))

    def refuse(self, code: str, message: str) -> Response:
        return refusal(code, message)


class MemoryTransport:
    """Takes everything, or as many bytes as ``room`` says."""

    def __init__(self) -> None:
        self.sends: list[bytes] = []
        self.room: int | None = None
        self.gone = False
        self.shut = False
        self.closed = False
        self.more_room = trio.Event()

    @property
    def output(self) -> bytes:
        return b"".join(self.sends)

    def _take(self, data: bytes) -> int:
        if self.gone:
            raise BrokenPipeError
        took = data if self.room is None else data[: self.room]
        if self.room is not None:
            self.room -= len(took)
        if took:
            self.sends.append(bytes(took))
        return len(took)

    def try_send(self, pieces: list[bytes]) -> int:
        assert not self.closed
        return self._take(b"".join(pieces))

    async def drain(self, data: memoryview) -> int:
        while self.room == 0 and not self.gone:
            self.more_room = trio.Event()
            await self.more_room.wait()
        return self._take(bytes(data))

    def give_room(self, room: int | None) -> None:
        self.room = room
        self.more_room.set()

    def reading_changed(self) -> None:
        pass

    def shutdown_writing(self) -> None:
        self.shut = True

    def close(self) -> None:
        self.closed = True
        self.more_room.set()


@attrs.define
class Client:
    """A connection with its two ends in the test's hands."""

    front: Front
    application: Toy
    transport: MemoryTransport
    connection: Connection

    @classmethod
    def open(cls, front: Front | None = None, *, takes_over: bool = False, **settings: Any) -> "Client":
        if front is None:
            front = Front(Toy(), HttpConfig(**settings))
        transport = MemoryTransport()
        assert isinstance(front.application, Toy)
        connection = Connection(front, transport, "192.0.2.1", takes_over=takes_over)
        return cls(front, front.application, transport, connection)

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)
        self.front.run_due()

    @property
    def ended(self) -> bool:
        """Whether the server has ended the connection, or its own side of it."""
        return self.transport.shut or self.transport.closed

    def answers(self) -> list["Seen"]:
        return read_answers(self.transport.output, self.application.seen)

    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers()]


@attrs.frozen
class Seen:
    """One answer as a client reads it."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


def read_answers(raw: bytes, requests: list[Request] | None = None) -> list[Seen]:
    """Cut answers apart strictly; a 100 counts as one. HEAD is known by the toy's ``x-method`` header."""
    answers: list[Seen] = []
    while raw:
        head, found, raw = raw.partition(b"\r\n\r\n")
        assert found, f"half a head: {head!r}"
        line, *fields = head.split(b"\r\n")
        version, status, _reason = line.split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers = {name.lower(): value for name, value in (field.split(b": ", 1) for field in fields)}
        assert len(headers) == len(fields)
        body = b""
        if headers.get(b"transfer-encoding") == b"chunked":
            body, raw = read_chunks(raw)
        elif headers.get(b"x-method") != b"HEAD" and int(status) not in (100, 204):
            length = int(headers[b"content-length"])
            body, raw = raw[:length], raw[length:]
            assert len(body) == length, "an answer is cut short"
        answers.append(Seen(int(status), headers, body))
    return answers


def read_chunks(raw: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        body, raw = body + raw[:length], raw[length:]
        assert raw.startswith(b"\r\n"), "a chunk has no end"
        raw = raw[2:]
        if not length:
            return body, raw
