"""One request head, read strictly, and the framing of a chunked body.

Owns: what bytes are accepted as a request head (RELIABILITY H-1) and where a chunked body ends. Must not know: sockets, routes,
answers, deadlines. Sync, no clock.

Two readers have to agree on every head: llhttp (through httptools) and the gate here, which works on the raw bytes. llhttp
refuses bare CR or LF, folding, control characters and doubled lengths; it lets through HTTP/2.0, RTSP, missing or double Host,
`Transfer-Encoding` on HTTP/1.0, repeated spaces and unbounded heads, so those are refused here. Trailers are checked by llhttp
and dropped. A chunked body is cut here and read by llhttp too: both must find its end at the same byte.

Invariants: a head ends at the first CRLF CRLF; after a ``Refusal`` the connection's bytes mean nothing any more.

Source: RFC 9112 sections 2.2, 3, 5, 6, 7.1, 9; RFC 9110 section 10.1.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import httptools

from ayder.http.exchange import HeadMemo, Request

__all__ = ["CHUNKED", "NO_BODY", "ChunkedBody", "HeadReader", "Refusal"]

NO_BODY = 0
CHUNKED = -1

MAX_CHUNK_LINE_BYTES = 8 + 256
MAX_TRAILER_BYTES = 8192
MAX_REMEMBERED_HEAD_BYTES = 2048  # an idle connection stays small

METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")}
LENGTH = re.compile(rb"[0-9]{1,15}")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(;[\t\x20-\x7e]{0,255})?")
# RFC 3986 reg-name, IPv4 or a bracketed IP literal, with an optional port; an empty Host is allowed by RFC 9112 3.2.
HOST = re.compile(rb"(?:\[[0-9A-Fa-fv:.%]{2,64}\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")
ABSOLUTE = re.compile(rb"https?://([^/?]*)([^?]*)(.*)", re.IGNORECASE)
VERSIONS = {b"HTTP/1.1": True, b"HTTP/1.0": False}


class Refusal(Exception):
    """The client's bytes are refused. ``code`` names a member of ``ErrorCode``; the connection is closed after the answer."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def _bad(message: str) -> Refusal:
    return Refusal("INVALID_REQUEST", message)


class HeadReader:
    """Reads heads one after another. After ``finish`` the attributes describe the request just read."""

    __slots__ = (
        "_complete",
        "_fault",
        "_headers",
        "_llhttp",
        "_read",
        "_same_head",
        "_same_request",
        "body_length",
        "expects_continue",
        "http11",
        "keep_alive",
        "max_head",
        "max_headers",
        "max_line",
        "upgrade",
    )

    def __init__(self, max_line: int, max_head: int, max_headers: int) -> None:
        self.max_line = max_line
        self.max_head = max_head
        self.max_headers = max_headers
        self.body_length = NO_BODY
        self.expects_continue = False
        self.http11 = True
        self.keep_alive = True
        self.upgrade = False
        self._headers: dict[bytes, bytes] = {}
        self._fault = ""
        self._complete = False
        self._read = 0
        self._llhttp: httptools.HttpRequestParser | None = None
        self._same_head = b""
        self._same_request: Request | None = None

    # --- what httptools calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._complete:
            return  # a trailer: checked, then dropped, so that it can never pass for a header
        name = name.lower()
        headers = self._headers
        if name in headers:
            self._repeated(name, value)
        else:
            headers[name] = value.rstrip(b" \t")

    def on_headers_complete(self) -> None:
        self._complete = True

    def on_message_complete(self) -> None:
        self._read = -1

    # --- what the connection calls

    def progress(self, partial: bytes) -> None:
        """Look at a head that is not complete, so that rubbish is refused early. ``partial`` starts at the request line."""
        line_end = partial.find(b"\r\n")
        if line_end > self.max_line or (line_end < 0 and len(partial) > self.max_line + 1):
            raise Refusal("URI_TOO_LONG", f"the request line is longer than {self.max_line} bytes")
        if len(partial) > self.max_head:
            raise Refusal("HEADERS_TOO_LARGE", f"the head is longer than {self.max_head} bytes")
        if line_end >= 0:
            self._split_line(partial[:line_end])
        self._feed_head(partial)

    def finish(self, head: bytes) -> Request:
        """Read a whole head (ending in CRLF CRLF). Raises ``Refusal``.

        Reading is a function of the bytes alone, so a head that is the same as the one before is not read again: what it said
        about framing still stands in this object.
        """
        same = self._same_request
        if same is not None and head == self._same_head:
            self._llhttp = None  # a head that came in pieces was fed to it
            self._headers = {}
            return Request(same.method, same.path, same.query, same.headers, memo=same.memo)
        self._same_request = None
        line_end = head.find(b"\r\n")
        if line_end > self.max_line:
            raise Refusal("URI_TOO_LONG", f"the request line is longer than {self.max_line} bytes")
        if len(head) > self.max_head:
            raise Refusal("HEADERS_TOO_LARGE", f"the head is longer than {self.max_head} bytes")
        if head.count(b"\r\n") - 2 > self.max_headers:
            raise Refusal("HEADERS_TOO_LARGE", f"more than {self.max_headers} header lines")
        method, target, version = self._split_line(head[:line_end])
        self._feed_head(head)
        if self._fault:
            raise _bad(self._fault)
        if not self._complete:
            raise _bad("malformed request head")
        headers = self._headers
        self.http11 = VERSIONS[version]
        self._read_host(headers)
        self._read_framing(headers)
        self._read_options(headers)
        path, query = self._split_target(method, target, headers)
        name = METHODS.get(method)
        if self.body_length != CHUNKED:
            self._llhttp = None
        self._headers = {}
        request = Request(name or method.decode("ascii"), path, query, headers, memo=HeadMemo())
        if self._llhttp is None and len(head) <= MAX_REMEMBERED_HEAD_BYTES:
            self._same_head = head
            self._same_request = Request(request.method, path, query, headers, memo=request.memo)
        return request

    def chunked_body(self, limit: int) -> ChunkedBody:
        """The reader for the chunked body that follows the head just finished; ``limit`` in bytes of content."""
        assert self._llhttp is not None, "only after a chunked head"
        body = ChunkedBody(self._llhttp, self, limit)
        self._llhttp = None
        return body

    @property
    def message_ended(self) -> bool:
        """Whether llhttp saw the end of the message (used by the chunked body to compare notes)."""
        return self._read < 0

    # --- details

    def _feed_head(self, upto: bytes) -> None:
        parser = self._llhttp
        if parser is None:
            parser = self._llhttp = httptools.HttpRequestParser(self)
            self._complete = False
            self._fault = ""
            self._read = 0
        fresh = upto[self._read :] if self._read > 0 else upto
        self._read = len(upto)
        try:
            parser.feed_data(fresh)
        except httptools.HttpParserUpgrade:
            pass  # CONNECT or Upgrade: what follows is framed by us
        except httptools.HttpParserError as exc:
            raise _bad(f"malformed request head: {exc}") from None

    def _repeated(self, name: bytes, value: bytes) -> None:
        if name in (b"host", b"content-length", b"transfer-encoding"):
            self._fault = f"more than one {name.decode()} header"
        self._headers[name] += b", " + value.rstrip(b" \t")

    @staticmethod
    def _split_line(line: bytes) -> tuple[bytes, bytes, bytes]:
        parts = line.split(b" ")
        if len(parts) != 3 or not parts[0].isalpha():
            if len(parts) == 3 and parts[0].replace(b"-", b"").isalpha():  # M-SEARCH
                return parts[0], parts[1], parts[2]
            raise _bad("the request line is not METHOD SP target SP HTTP/1.1")
        if parts[2] not in VERSIONS:
            raise _bad("only HTTP/1.1 and HTTP/1.0 are spoken here")
        return parts[0], parts[1], parts[2]

    def _read_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host")
        if host is None:
            if self.http11:
                raise _bad("the Host header is missing")
        elif HOST.fullmatch(host) is None:
            raise _bad("the Host header is malformed")

    def _read_framing(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        self.body_length = NO_BODY
        if coding is not None:
            if length is not None:
                raise _bad("Content-Length and Transfer-Encoding together")
            if not self.http11 or coding.lower() != b"chunked":
                raise _bad("the only Transfer-Encoding accepted is chunked, on HTTP/1.1")
            self.body_length = CHUNKED
        elif length is not None:
            if LENGTH.fullmatch(length) is None:
                raise _bad("Content-Length is not a number of up to 15 digits")
            self.body_length = int(length)

    def _read_options(self, headers: dict[bytes, bytes]) -> None:
        connection = headers.get(b"connection")
        self.upgrade = False
        if connection is None:
            self.keep_alive = self.http11
        else:
            tokens = [token.strip() for token in connection.lower().split(b",")]
            self.keep_alive = b"close" not in tokens and (self.http11 or b"keep-alive" in tokens)
            self.upgrade = b"upgrade" in tokens and b"upgrade" in headers
        expect = headers.get(b"expect")
        self.expects_continue = expect is not None and self.http11 and expect.lower() == b"100-continue"

    @staticmethod
    def _split_target(method: bytes, target: bytes, headers: dict[bytes, bytes]) -> tuple[bytes, bytes]:
        if b"#" in target:
            raise _bad("the request target has a fragment")
        if target[:1] != b"/":
            if target == b"*" and method == b"OPTIONS":
                return target, b""
            absolute = ABSOLUTE.fullmatch(target)
            if absolute is None:
                raise _bad("the request target must be a path")
            authority, path, query = absolute.groups()
            if authority.lower() != headers.get(b"host", b"").lower():
                raise _bad("the request target names another host than the Host header")
            return path or b"/", query[1:]
        path, _, query = target.partition(b"?")
        return path, query


class ChunkedBody:
    """Cuts a chunked body out of the stream of bytes, holding what it carried."""

    __slots__ = ("_left", "_limit", "_llhttp", "_pending", "_reader", "_state", "_trailer_bytes", "content")

    def __init__(self, llhttp: httptools.HttpRequestParser, reader: HeadReader, limit: int) -> None:
        self._llhttp = llhttp
        self._reader = reader
        self._limit = limit
        self._state: Callable[[bytes, int], int] = self._size_line
        self._pending = b""
        self._left = 0
        self._trailer_bytes = 0
        self.content = bytearray()

    @property
    def size(self) -> int:
        """Bytes of content so far."""
        return len(self.content)

    def feed(self, data: bytes) -> int:
        """Take bytes. Returns how many of ``data`` were left over behind the end of the body, or -1 when there is more to come.

        Raises ``Refusal``.
        """
        buffer = self._pending + data if self._pending else data
        position = 0
        while True:
            step = self._state(buffer, position)
            if step < 0:
                break
            position = step
            if self._state == self._done:
                left = len(buffer) - position
                self._agree(data[: len(data) - left], ended=True)
                return left
        self._pending = buffer[position:]
        self._agree(data, ended=False)
        return -1

    def _agree(self, consumed: bytes, *, ended: bool) -> None:
        try:
            self._llhttp.feed_data(consumed)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            raise _bad(f"malformed chunked body: {exc}") from None
        if self._reader.message_ended is not ended:
            raise _bad("malformed chunked body: its end is ambiguous")

    # --- each takes the buffer and a position, returns the new position or -1 when it needs more bytes

    def _size_line(self, buffer: bytes, position: int) -> int:
        end = buffer.find(b"\r\n", position, position + MAX_CHUNK_LINE_BYTES + 2)
        if end < 0:
            if len(buffer) - position > MAX_CHUNK_LINE_BYTES + 1:
                raise _bad("a chunk-size line is too long")
            if b"\n" in buffer[position:]:
                raise _bad("a chunk-size line ends in a bare LF")
            return -1
        match = CHUNK_LINE.fullmatch(buffer, position, end)
        if match is None:
            raise _bad("malformed chunk size or extension")
        self._left = int(match[1], 16)
        if len(self.content) + self._left > self._limit:
            raise Refusal("PAYLOAD_TOO_LARGE", f"the body is larger than {self._limit} bytes")
        self._state = self._content if self._left else self._trailer
        return end + 2

    def _content(self, buffer: bytes, position: int) -> int:
        piece = buffer[position : position + self._left]
        if not piece:
            return -1
        self.content += piece
        self._left -= len(piece)
        if not self._left:
            self._state = self._content_end
        return position + len(piece)

    def _content_end(self, buffer: bytes, position: int) -> int:
        if not b"\r\n".startswith(buffer[position : position + 2]):
            raise _bad("a chunk is not followed by CRLF")
        if len(buffer) < position + 2:
            return -1
        self._state = self._size_line
        return position + 2

    def _trailer(self, buffer: bytes, position: int) -> int:
        end = buffer.find(b"\r\n", position)
        line_bytes = (end if end >= 0 else len(buffer)) + 2 - position
        if self._trailer_bytes + line_bytes > MAX_TRAILER_BYTES:
            raise Refusal("HEADERS_TOO_LARGE", f"the trailer is longer than {MAX_TRAILER_BYTES} bytes")
        if end < 0:
            return -1
        self._trailer_bytes += line_bytes
        if end == position:
            self._state = self._done
        return end + 2

    def _done(self, _buffer: bytes, _position: int) -> int:
        raise AssertionError("nothing is read behind the end of a body")
