"""The least HTTP/1.1 client that tells what is known from what is not: over Trio for many at once, and blocking for scripts.

Owns: one connection, one request after the other. Must not know: the API. Its own framing, on purpose: a client made of the
server's parts would agree with their mistakes.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any

import attrs
import trio

__all__ = ["Blocking", "Connection", "NotSent", "Reply", "Unanswered"]

MAX_ANSWER_BYTES = 64 << 20


class NotSent(Exception):
    """No byte of the request left this machine: it surely did not happen."""


class Unanswered(Exception):
    """The request may have arrived, its answer did not."""


@attrs.frozen
class Reply:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded. Raises ``ValueError``."""
        return json.loads(self.body)


class Connection:
    """A connection that is opened when needed and again after it broke. One task."""

    def __init__(self, token: str = "dev") -> None:
        self._token = token
        self._stream: trio.SocketStream | None = None
        self._port = 0
        self._received = bytearray()

    async def request(
        self,
        port: int,
        method: str,
        target: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        seconds: float = 30,
    ) -> Reply:
        """Raises ``NotSent``, ``Unanswered``."""
        fields = {"Host": "a", "Authorization": f"Bearer {self._token}", "Content-Length": str(len(body)), **(headers or {})}
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        stream = await self._connected(port)
        try:
            with trio.fail_after(seconds):
                await stream.send_all(head.encode("latin-1") + body)
                return await self._read(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, EOFError) as error:
            await self.close()
            raise Unanswered(repr(error)) from error

    async def _connected(self, port: int) -> trio.SocketStream:
        if self._stream is not None and self._port == port:
            return self._stream
        await self.close()
        sock = trio.socket.socket()
        try:
            await sock.connect(("127.0.0.1", port))
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                raise NotSent(repr(error)) from error
            raise
        self._stream, self._port = trio.SocketStream(sock), port
        self._received.clear()
        return self._stream

    async def _read(self, stream: trio.SocketStream) -> Reply:
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            await self._more(stream)
        lines = bytes(self._received[:end]).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = int(headers["content-length"])
        while len(self._received) < end + 4 + length:
            await self._more(stream)
        body = bytes(self._received[end + 4 : end + 4 + length])
        del self._received[: end + 4 + length]
        if headers.get("connection", "").lower() == "close":
            await self.close()
        return Reply(int(lines[0].split(" ")[1]), headers, body)

    async def _more(self, stream: trio.SocketStream) -> None:
        data = await stream.receive_some(65536)
        if not data or len(self._received) > MAX_ANSWER_BYTES:
            raise EOFError("the server closed the connection")
        self._received += data

    async def close(self) -> None:
        """Give the connection up."""
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)
            self._stream = None


class Blocking:
    """For scripts: each call opens a connection."""

    def __init__(self, port: int, token: str = "dev") -> None:
        self._port = port
        self._token = token

    def request(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None, seconds: float = 30
    ) -> Reply:
        """Raises ``OSError`` or ``http.client.HTTPException`` when there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=seconds)
        try:
            connection.request(method, target, body, {"Authorization": f"Bearer {self._token}", **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, target: str) -> Any:
        """The JSON of a 200 answer."""
        reply = self.request("GET", target)
        assert reply.status == 200, (target, reply)
        return reply.json

    def post(self, target: str, body: bytes | dict[str, Any]) -> Any:
        """The JSON of a 200 answer."""
        reply = self.request("POST", target, body if isinstance(body, bytes) else json.dumps(body).encode())
        assert reply.status == 200, (target, reply)
        return reply.json

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        text = self.request("GET", "/metrics").body.decode()
        return float(next(line for line in text.splitlines() if line.startswith(name + " ")).rpartition(" ")[2])

    def open(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self._port), timeout=30)
