"""Response heads as bytes, with everything that repeats prebuilt.

Owns: the status lines, the constant header lines and their order, ``Date``. Must not know: sockets, requests beyond what the
head depends on, routes. Sync; time is handed in.

What does not change from one answer to the next (status line, ``Server``, ``Date`` of this second, the node's own lines) is
joined once a second per status, so that an answer costs one formatting of bytes.

Source: RFC 9110 sections 6.6.1, 8.6, 15; RFC 9112 sections 4, 6.
"""

from __future__ import annotations

from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

from ayder.http.exchange import Response

__all__ = ["CLOSE", "CONTINUE", "KEEP_ALIVE", "LAST_CHUNK", "HeadWriter", "chunk"]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
SMALL_BODY_BYTES = 16384
BODILESS = frozenset({204, 304})
CLOSE = b"Connection: close\r\n"
KEEP_ALIVE = b"Connection: keep-alive\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def chunk(piece: bytes) -> bytes:
    """One piece of a chunked body; ``piece`` is not empty (an empty one would end the body)."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


class ExtraHeaders(Protocol):
    """Whoever knows the lines every answer carries. Swapping the attribute for another object is enough."""

    extra_headers: bytes


class HeadWriter:
    """Builds heads. ``extra_headers`` (header lines, each ending in CRLF) stand in every answer and may be swapped any time.

    With a ``source``, they are whatever its ``extra_headers`` is when the answer is written.
    """

    __slots__ = ("_date", "_extra_headers", "_prefixes", "_source")

    def __init__(self, source: ExtraHeaders | None = None) -> None:
        self._source = source
        self._extra_headers = b""
        self._date = b""
        self._prefixes: dict[int, bytes] = {}

    @property
    def extra_headers(self) -> bytes:
        """Header lines every answer carries."""
        return self._extra_headers

    @extra_headers.setter
    def extra_headers(self, lines: bytes) -> None:
        assert not lines or lines.endswith(b"\r\n"), "header lines end in CRLF"
        self._extra_headers = lines
        self._prefixes.clear()

    def extra_fields(self) -> list[tuple[bytes, bytes]]:
        """The extra header lines as (lower-case name, value) pairs."""
        lines = self._source.extra_headers if self._source is not None else self._extra_headers
        pairs = (line.partition(b":") for line in lines.splitlines())
        return [(name.lower(), value.strip()) for name, _, value in pairs]

    def set_time(self, unix_seconds: float) -> None:
        """Say what ``Date`` is from now on."""
        date = formatdate(unix_seconds, usegmt=True).encode()
        if date != self._date:
            self._date = date
            self._prefixes.clear()

    def plain(self, response: Response) -> bytes:
        """The usual answer as one piece: no header of its own, a small body, the connection stays. ``b""``: it is not that."""
        body = response.body
        if response.headers or len(body) > SMALL_BODY_BYTES or not response.content_type or response.status in BODILESS:
            return b""
        prefix = self._prefix(response.status)
        return b"%bContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (prefix, response.content_type, len(body), body)

    def whole(self, response: Response, *, head_only: bool, connection: bytes) -> list[bytes]:
        """Head and body of a whole answer in one or two pieces (a large body is not copied).

        ``connection`` is a header line or empty. Raises ``ValueError`` for a header that would break the framing.
        """
        body = response.body
        prefix = self._prefix(response.status)
        length = b"" if response.status in BODILESS else b"Content-Length: %d\r\n" % len(body)
        head = prefix + self._fields(response) + length + connection + b"\r\n"
        if head_only or not length or not body:
            return [head]
        return [head + body] if len(body) <= SMALL_BODY_BYTES else [head, body]

    def stream_head(self, response: Response, *, http11: bool, connection: bytes) -> bytes:
        """The head of a streamed answer: chunked, or on HTTP/1.0 ended by closing."""
        return self._prefix(response.status) + self._fields(response) + (CHUNKED if http11 else b"") + connection + b"\r\n"

    def _prefix(self, status: int) -> bytes:
        source = self._source
        if source is not None and source.extra_headers is not self._extra_headers:
            self.extra_headers = source.extra_headers
        return self._prefixes.get(status) or self._build_prefix(status)

    def _build_prefix(self, status: int) -> bytes:
        reason = REASONS.get(status, b"Unknown")
        prefix = b"HTTP/1.1 %d %b\r\nServer: ayder\r\nDate: %b\r\n%b" % (status, reason, self._date, self._extra_headers)
        self._prefixes[status] = prefix
        return prefix

    @staticmethod
    def _fields(response: Response) -> bytes:
        lines = [b"%b: %b\r\n" % field for field in response.headers]
        if response.content_type:
            lines.append(b"Content-Type: %b\r\n" % response.content_type)
        fields = b"".join(lines)
        if fields.count(b"\n") != len(lines) or fields.count(b"\r") != len(lines):
            raise ValueError("a response header holds a line break")
        return fields
