"""An ASGI `http` scope answered by the same application as the fast connection's requests.

Owns: turning a scope into a ``Request``, reading its body within limits and deadlines, racing the answer against the client's
hang-up, sending it as ASGI messages. Must not know: which ASGI server calls it, routes.

This is the slow road (HTTP/2, and HTTP/1.1 where the fast connection could not be put in): a task and several wake-ups a
request. An ASGI server does not cancel a handler whose client left, so every wait here is raced against ``http.disconnect``.

Invariants: a body byte is counted in the front before it is kept and counted out exactly once; one answer a request.

Source: ASGI 3.0 HTTP specification; RELIABILITY H-1, H-2.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ayder.http.exchange import Answer, Deferred, Request, Response, Work
from ayder.http.front import Front
from ayder.http.parser import LENGTH, Refusal

__all__ = ["Receive", "Scope", "Send", "answer_request"]

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
logger = logging.getLogger(__name__)


class _Gone(Exception):
    """The client hung up."""


async def answer_request(front: Front, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request. Returns quietly when the client hangs up."""
    request = Request(scope["method"], b"", b"", {}, received_ns=time.monotonic_ns())
    try:
        _read_scope(front, scope, request)
        answer = await _respond(front, request, receive)
    except Refusal as refusal:
        answer = front.refuse(refusal.code, refusal.message)
    except _Gone:
        return
    await _while_connected(receive, _Sending(front, request, answer, send).run)


def _read_scope(front: Front, scope: Scope, request: Request) -> None:
    """Fill in the request. Raises ``Refusal`` for what the fast connection would refuse too."""
    config = front.config
    path, query = scope.get("raw_path") or scope["path"].encode(), scope["query_string"]
    request.path, request.query = path.partition(b"?")[0], query
    request.peer = scope["client"][0] if scope.get("client") else ""
    if len(request.path) + len(query) + len(request.method) + len("  HTTP/1.1") > config.max_request_line_bytes:
        raise Refusal("URI_TOO_LONG", f"the request line is longer than {config.max_request_line_bytes} bytes")
    fields = scope["headers"]
    if len(fields) > config.max_headers or sum(len(name) + len(value) + 4 for name, value in fields) > config.max_head_bytes:
        raise Refusal("HEADERS_TOO_LARGE", "the request head is too large")
    headers = request.headers
    for name, value in fields:
        if name in headers and name in (b"content-length", b"transfer-encoding", b"host"):
            raise Refusal("INVALID_REQUEST", f"more than one {name.decode()} header")
        headers[name] = headers[name] + b", " + value if name in headers else value
    coding, length = headers.get(b"transfer-encoding"), headers.get(b"content-length")
    if coding is not None and (length is not None or coding.lower() != b"chunked" or scope["http_version"] == "1.0"):
        raise Refusal("INVALID_REQUEST", "the only Transfer-Encoding accepted is chunked, on HTTP/1.1, without Content-Length")
    if length is not None and LENGTH.fullmatch(length) is None:
        raise Refusal("INVALID_REQUEST", "Content-Length is not a number of up to 15 digits")


async def _respond(front: Front, request: Request, receive: Receive) -> Answer:
    """Raises ``Refusal``, ``_Gone``."""
    try:
        allowed = front.application.open(request)
        if isinstance(allowed, Response):
            return allowed
    except Exception:
        return front.bug(request)
    request.body = await _read_body(front, request, allowed, receive)
    try:
        return front.application.respond(request)
    except Exception:
        return front.bug(request)


async def _read_body(front: Front, request: Request, allowed: int, receive: Receive) -> bytes:
    """Raises ``Refusal`` for a body that is too large, too slow, or one too many; ``_Gone``."""
    declared = int(request.headers.get(b"content-length", b"0"))
    if declared > allowed:
        raise Refusal("PAYLOAD_TOO_LARGE", f"the body of {declared} bytes is larger than the {allowed} bytes allowed")
    if front.held_body_bytes + declared > front.config.max_bodies_in_flight_bytes:
        raise Refusal("OVERLOADED", "too many request bodies are in flight")
    body = bytearray()
    started = trio.current_time()
    try:
        while True:
            message = await _receive_in_time(front, receive, started, len(body))
            piece = message.get("body", b"")
            front.held_body_bytes += len(piece)
            body += piece
            if len(body) > allowed:
                raise Refusal("PAYLOAD_TOO_LARGE", f"the body is larger than {allowed} bytes")
            if front.held_body_bytes > front.config.max_bodies_in_flight_bytes:
                raise Refusal("OVERLOADED", "too many request bodies are in flight")
            if not message.get("more_body"):
                return bytes(body)
    finally:
        front.held_body_bytes -= len(body)


async def _receive_in_time(front: Front, receive: Receive, started: float, received: int) -> dict[str, Any]:
    rate = front.config.body_min_bytes_per_second
    allowance = received / rate if rate else front.body_timeout
    deadline = started + min(front.body_timeout, front.body_grace + allowance)
    message = None
    with trio.move_on_at(deadline):
        message = await receive()
    if message is None:
        raise Refusal("REQUEST_TIMEOUT", "the body did not arrive in time")
    if message["type"] == "http.disconnect":
        raise _Gone
    return message


async def _while_connected(receive: Receive, run: Callable[[], Awaitable[None]]) -> None:
    """Await ``run``; cancel it when the client hangs up first."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await run()
        nursery.cancel_scope.cancel()


class _Sending:
    """One answer on its way: waited for if need be, then sent."""

    def __init__(self, front: Front, request: Request, answer: Answer, send: Send) -> None:
        self._front = front
        self._request = request
        self._answer = answer
        self._send = send

    async def run(self) -> None:
        answer = self._answer
        if isinstance(answer, Deferred):
            answer = await self._wait(answer)
        if isinstance(answer, Work):
            try:
                answer = await answer.run()
            except Exception:
                answer = self._front.bug(self._request)
        await self._whole(answer) if answer.stream is None else await self._stream(answer)

    @staticmethod
    async def _wait(deferred: Deferred) -> Response:
        if deferred.response is None:
            resolved = trio.Event()
            deferred.when_resolved = resolved.set
            try:
                await resolved.wait()
            except trio.Cancelled:
                deferred.abandon()
                raise
        assert deferred.response is not None
        return deferred.response

    def _fields(self, response: Response, length: int | None) -> list[tuple[bytes, bytes]]:
        """Raises ``ValueError`` for a header that would break the framing."""
        headers = [(name.lower(), value) for name, value in response.headers]
        if any(b"\n" in name + value or b"\r" in name + value for name, value in headers):
            raise ValueError("a response header holds a line break")
        if response.content_type:
            headers.append((b"content-type", response.content_type))
        if length is not None and response.status not in (204, 304):
            headers.append((b"content-length", b"%d" % length))
        return headers + self._front.writer.extra_fields()

    async def _whole(self, response: Response) -> None:
        try:
            headers = self._fields(response, len(response.body))
        except ValueError:
            logger.exception("the application gave an answer that cannot be sent")
            response = self._front.refuse("INTERNAL", "internal error; it has been logged")
            headers = self._fields(response, len(response.body))
        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})
        body = b"" if self._request.method == "HEAD" else response.body
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream(self, response: Response) -> None:
        assert response.stream is not None
        headers = self._fields(response, None)
        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})
        if self._request.method != "HEAD":
            await response.stream(self._piece)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _piece(self, piece: bytes) -> None:
        if piece:
            await self._send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
