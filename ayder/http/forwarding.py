"""A follower calls the leader for its client: one request out, its answer back as it came.

Owns: which requests go that way, the call over HTTP/1.1, its bounds, and what its failure says. Must not know: routes, what a
request means.

One connection a call, to the address the configuration names, never to one a request names. The call carries the caller's token:
the leader judges it again. A header marks what was forwarded; whoever receives it answers by itself, so nothing goes in circles.

Invariants: at most ``MAX_CALLS`` at a time, ``MAX_ANSWER_BYTES`` of answer each, none longer than its deadline; before there is
a connection a failure says that surely nothing happened, after that a write's outcome is unknown.
Source: API.md 9; RFC 9110 section 7.6.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import h11
import trio

from ayder.config import Config
from ayder.errors import AyderError, ErrorCode
from ayder.http.exchange import Request, Response
from ayder.http.params import Query

__all__ = ["MAX_ANSWER_BYTES", "MAX_CALLS", "Forwarder"]

MAX_CALLS: Final = 256
MAX_ANSWER_BYTES: Final = 64 << 20
MARK: Final = b"ayder-forwarded-by"
_READ_BYTES: Final = 64 << 10
_GRACE_S: Final = 1.0
"""The leader answers its own deadline first."""
_CONNECT_S: Final = 2.0
_HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_NOT_SENT: Final = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"origin", MARK}
_NOT_RETURNED: Final = _HOP_BY_HOP | {
    b"content-length", b"content-type", b"date", b"server", b"server-timing", b"ayder-node", b"ayder-term",
    b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset",
}  # fmt: skip


class Forwarder:
    """See the module header."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.calls = 0
        """Calls under way."""

    def wants(self, request: Request) -> bool:
        """Whether this request, which only the leader can answer, is to be taken there by us."""
        if MARK in request.headers or b"text/event-stream" in request.headers.get(b"accept", b""):
            return False  # a tail has no end: its client is sent to the leader
        asked = request.query.split(b"&")
        if b"forward=1" in asked or b"forward=0" in asked:
            return b"forward=1" in asked
        return self._config.cluster.forward and b"redirect=1" not in asked

    async def call(self, request: Request, leader_url: str) -> Response:
        """The leader's answer. Raises ``AyderError``: overloaded, no_quorum (surely nothing happened), commit_timeout."""
        if self.calls >= MAX_CALLS:
            raise AyderError(ErrorCode.OVERLOADED, "too many requests are on their way to the leader", retry_after=1)
        self.calls += 1
        sent = False
        try:
            with trio.fail_after(self._seconds(request)):
                async with _connected(leader_url) as stream:
                    sent = True
                    return await self._exchange(stream, request, leader_url)
        except (OSError, trio.TooSlowError, trio.BrokenResourceError, h11.ProtocolError, _TooLarge) as error:
            raise _failure(request, leader_url, error, sent=sent) from error
        finally:
            self.calls -= 1

    def _seconds(self, request: Request) -> float:
        http, asked = self._config.http, Query(request.query)
        timeout_ms = asked.integer("timeout_ms", 0, most=3_600_000) or http.default_produce_timeout_ms
        wait_ms = min(asked.integer("wait_ms", 0) or 0, http.max_long_poll_ms)
        return (timeout_ms + wait_ms) / 1000 + _GRACE_S

    async def _exchange(self, stream: trio.abc.Stream, request: Request, leader_url: str) -> Response:
        connection = h11.Connection(h11.CLIENT)
        for event in self._events(request, leader_url):
            await stream.send_all(connection.send(event) or b"")
        return await _answer(stream, connection)

    def _events(self, request: Request, leader_url: str) -> list[h11.Event]:
        headers = [(name, value) for name, value in request.headers.items() if name not in _NOT_SENT]
        headers += [
            (b"host", urlsplit(leader_url).netloc.encode()),
            (b"connection", b"close"),
            (MARK, self._config.raft.node_id.encode()),
            (b"content-length", b"%d" % len(request.body)),
        ]
        target = request.path + (b"?" + request.query if request.query else b"")
        head = h11.Request(method=request.method.encode(), target=target, headers=headers)
        return [head, *([h11.Data(data=request.body)] if request.body else []), h11.EndOfMessage()]


class _TooLarge(Exception):
    pass


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[trio.abc.Stream]:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    with trio.fail_after(_CONNECT_S):
        if parts.scheme == "https":
            stream: trio.abc.Stream = await trio.open_ssl_over_tcp_stream(host, port or 443, https_compatible=True)
            await stream.do_handshake()  # type: ignore[attr-defined]
        else:
            stream = await trio.open_tcp_stream(host, port or 80)
    try:
        yield stream
    finally:
        await trio.aclose_forcefully(stream)


async def _answer(stream: trio.abc.Stream, connection: h11.Connection) -> Response:
    response = Response(0)
    body, size = [], 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(_READ_BYTES)))
        elif isinstance(event, h11.Response):
            response.status = event.status_code
            response.content_type = dict(event.headers).get(b"content-type", b"")
            response.headers = tuple((name, value) for name, value in event.headers if name not in _NOT_RETURNED)
        elif isinstance(event, h11.Data):
            body.append(bytes(event.data))
            size += len(body[-1])
            if size > MAX_ANSWER_BYTES:
                raise _TooLarge(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        elif isinstance(event, h11.EndOfMessage):
            response.body = b"".join(body)
            return response
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("the connection ended before the answer")


def _failure(request: Request, leader_url: str, error: Exception, *, sent: bool) -> AyderError:
    why = str(error) or type(error).__name__
    if sent and request.method not in ("GET", "HEAD"):
        return AyderError(ErrorCode.COMMIT_TIMEOUT, f"the leader was called and did not answer ({why}); it may have happened")
    return AyderError(ErrorCode.NO_QUORUM, f"the leader could not be asked ({why})", leader_url=leader_url)
