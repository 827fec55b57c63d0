"""What a front and the handlers exchange: a request in, and one of three kinds of answer out.

Owns: the shapes that every front (the fast HTTP/1.1 connection, the ASGI app) and every handler agree on. Must not know:
sockets, routes, Trio. All of it is synchronous and plain.

A handler is a sync function ``Request -> Response | Deferred | Work``:

* a ``Response`` is ready now;
* a ``Deferred`` becomes ready when somebody calls ``resolve`` (a block was synced): no task waits for it;
* a ``Work`` is an async function the front runs in a task of its own (long-poll, cold read, stream), cancelled when the
  client hangs up.

Invariants: every ``Deferred`` is resolved or abandoned at most once; answers leave a connection in the order of its requests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import attrs

__all__ = ["Answer", "Application", "ChunkSender", "Deferred", "HeadMemo", "Headers", "Request", "Response", "Work"]

Headers = tuple[tuple[bytes, bytes], ...]
"""Response headers as (lower-case name, value) pairs."""

ChunkSender = Callable[[bytes], Awaitable[None]]
"""Sends one piece of a streamed body; returns when the client has room for more; bounded by the write-stall deadline."""


class HeadMemo:
    """What the application worked out from a head alone. A client on a kept-alive connection tends to send the very same head
    again; the front then gives the new request the memo of the one before, and nothing is matched or judged twice.
    """

    __slots__ = ("body_limit", "prepared", "principal", "route")

    def __init__(self) -> None:
        self.body_limit = -1
        """-1: nothing is remembered yet."""
        self.principal: object = None
        self.route: object = None
        self.prepared: object = None
        """The handler's own."""


@attrs.define(slots=True, eq=False)
class Request:
    """One request. ``headers`` has lower-case names; a name that came twice has its values joined with ``b", "``."""

    method: str
    path: bytes
    """The path as it came, still percent-encoded, without the query."""
    query: bytes
    """What stood behind the ``?`` as it came; ``b""`` when there was none."""
    headers: dict[bytes, bytes]
    body: bytes = b""
    peer: str = ""
    """The client's address, for logs and per-address limits."""
    received_ns: int = 0
    """Monotonic clock when the head was complete, nanoseconds."""
    principal: object = None
    """Who asks: set by ``Application.open`` (a ``Principal``)."""
    route: object = None
    """What was matched: set by ``Application.open`` so that ``respond`` need not match again."""
    memo: HeadMemo | None = None
    """Shared by the requests of one connection whose heads are the same bytes."""
    response_headers: Headers = ()
    """Headers every answer to this request carries: set by ``Application.open`` (rate limits)."""


@attrs.define(slots=True, eq=False)
class Response:
    """A whole answer, or, with ``stream``, its head and a function that sends the body piece by piece (chunked)."""

    status: int
    body: bytes = b""
    content_type: bytes = b"application/json; charset=utf-8"
    headers: Headers = ()
    close: bool = False
    """Close the connection after this answer."""
    stream: Callable[[ChunkSender], Awaitable[None]] | None = None


class Deferred:
    """An answer that is not there yet. The front sets ``when_resolved``; whoever owes the answer calls ``resolve``.

    An abandoned one (the client left) swallows its answer: the operation itself is not undone.
    """

    __slots__ = ("abandoned", "observer", "response", "when_resolved")

    def __init__(self) -> None:
        self.response: Response | None = None
        self.abandoned = False
        self.when_resolved: Callable[[], None] | None = None
        self.observer: Callable[[Response], None] | None = None
        """Sees the answer before it leaves, and may add headers to it."""

    def resolve(self, response: Response) -> None:
        """Give the answer. Sync, never raises for a client that left; calling it twice is a bug."""
        assert self.response is None, "a deferred answer is given once"
        self.response = response
        if self.observer is not None:
            self.observer(response)
        if self.when_resolved is not None and not self.abandoned:
            self.when_resolved()

    def abandon(self) -> None:
        """The client left: whatever comes is dropped."""
        self.abandoned = True


@attrs.define(slots=True, eq=False)
class Work:
    """An answer that has to wait or to read: ``run`` is awaited in a task of the front, cancelled when the client leaves."""

    run: Callable[[], Awaitable[Response]]


Answer = Response | Deferred | Work


class Application(Protocol):
    """What a front drives: two sync calls a request, neither of which may raise."""

    def open(self, request: Request) -> int | Response:
        """The head is complete. Returns how many body bytes the request may carry, or the answer that refuses it unread."""
        ...

    def respond(self, request: Request) -> Answer:
        """The body is complete (and within the limit). Returns the answer, now or to come."""
        ...

    def refuse(self, code: str, message: str) -> Response:
        """The answer for a request the front itself refuses (malformed head, limit, deadline).

        ``code`` is a member name of ``ErrorCode``.
        """
        ...
