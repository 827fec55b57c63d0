"""The raw-bytes corpus: what a client may send, and what has to come of it, on every front.

One line a case: name, bytes, the statuses answered in order, whether the server then ends the connection, how many requests the
application is asked to answer. Sources: RELIABILITY.md H-1, H-2 and 1.6 (h1spec, the server classes of HTTP Garden), LIBRARIES.md
Q2 (what llhttp lets through), RFC 9110 and 9112.
"""

import attrs

ENDS, STAYS = True, False


@attrs.frozen
class Case:
    """One client and its fate."""

    name: str
    raw: bytes
    statuses: tuple[int, ...]
    ends: bool
    requests: int


def get(*lines: bytes, target: bytes = b"/") -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: a\r\n" % target + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def post(*lines: bytes, body: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


GET = get()
BAD = ((400,), ENDS, 0)
OK = ((200,), STAYS, 1)

TABLE: list[tuple[str, bytes, tuple[int, ...], bool, int]] = [
    # --- well-formed
    ("plain get", GET, *OK),
    ("two pipelined", GET * 2, (200, 200), STAYS, 2),
    ("one blank line first", b"\r\n" + GET, *OK),
    ("blank line between requests", GET + b"\r\n" + GET, (200, 200), STAYS, 2),
    ("empty header value", get(b"X-Empty:"), *OK),
    ("no space after the colon", get(b"X:y"), *OK),
    ("spaces and tabs around a value", get(b"X: \t y \t "), *OK),
    ("bytes above 7F in a value", get(b"X: caf\xc3\xa9"), *OK),
    ("every token character in a name", get(b"!#$%&'*+-.^_`|~0aZ: x"), *OK),
    ("host with port", b"GET / HTTP/1.1\r\nHost: example.org:1109\r\n\r\n", *OK),
    ("host as IPv6 literal", b"GET / HTTP/1.1\r\nHost: [::1]:1109\r\n\r\n", *OK),
    ("empty host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", *OK),
    ("host in capitals", b"GET / HTTP/1.1\r\nHOST: A\r\n\r\n", *OK),
    ("query string", get(target=b"/x?a=b&c=%20?d"), *OK),
    ("absolute form that agrees", b"GET http://A:80/x?q HTTP/1.1\r\nHost: a:80\r\n\r\n", *OK),
    ("absolute form without path", b"GET http://a?q HTTP/1.1\r\nHost: a\r\n\r\n", *OK),
    ("asterisk for OPTIONS", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", *OK),
    ("HEAD", b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", *OK),
    ("HEAD then GET", b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + GET, (200, 200), STAYS, 2),
    ("an unusual method", b"PROPFIND / HTTP/1.1\r\nHost: a\r\n\r\n", *OK),
    ("a method with a dash", b"M-SEARCH / HTTP/1.1\r\nHost: a\r\n\r\n", *OK),
    ("length 0", post(b"Content-Length: 0"), *OK),
    ("a body", post(b"Content-Length: 3", body=b"abc"), *OK),
    ("leading zeros in the length", post(b"Content-Length: 003", body=b"abc"), *OK),
    ("space behind the length", post(b"Content-Length: 3 ", body=b"abc"), *OK),
    ("a body on GET", b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc" + GET, (200, 200), STAYS, 2),
    ("body then request", post(b"Content-Length: 3", body=b"abc") + GET, (200, 200), STAYS, 2),
    ("a body that looks like a request", post(b"Content-Length: %d" % len(GET), body=GET) + GET, (200, 200), STAYS, 2),
    ("the largest body", post(b"Content-Length: 1000", body=b"x" * 1000), *OK),
    ("chunked", chunked(b"3\r\nabc\r\n0\r\n\r\n"), *OK),
    ("chunked then request", chunked(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") + GET, (200, 200), STAYS, 2),
    ("empty chunked", chunked(b"0\r\n\r\n"), *OK),
    ("chunk size in hex", chunked(b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n"), *OK),
    ("chunk size of eight digits", chunked(b"00000003\r\nabc\r\n00000000\r\n\r\n"), *OK),
    ("chunk extension", chunked(b'3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n') + GET, (200, 200), STAYS, 2),
    ("trailers", chunked(b"3\r\nabc\r\n0\r\nX-Trailer: y\r\nHost: b\r\n\r\n") + GET, (200, 200), STAYS, 2),
    ("coding in capitals", post(b"Transfer-Encoding: Chunked", body=b"1\r\na\r\n0\r\n\r\n"), *OK),
    ("a chunk full of CRLF", chunked(b"8\r\n\r\n0\r\n\r\n\r\r\n0\r\n\r\n"), *OK),
    ("expect 100-continue with its body", post(b"Content-Length: 3", b"Expect: 100-continue", body=b"abc"), *OK),
    ("an expectation we do not know", post(b"Content-Length: 3", b"Expect: tea", body=b"abc"), *OK),
    ("connection close", get(b"Connection: close"), (200,), ENDS, 1),
    ("connection close in a list", get(b"Connection: foo, Close"), (200,), ENDS, 1),
    ("connection close twice", get(b"Connection: foo", b"Connection: close"), (200,), ENDS, 1),
    ("request behind connection close", get(b"Connection: close") + GET, (200,), ENDS, 1),
    ("rubbish behind connection close", get(b"Connection: close") + b"\x00\x01", (200,), ENDS, 1),
    ("HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", (200,), ENDS, 1),
    ("HTTP/1.0 without host", b"GET / HTTP/1.0\r\n\r\n", (200,), ENDS, 1),
    ("HTTP/1.0 keep-alive", b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n" * 2, (200, 200), STAYS, 2),
    ("HTTP/1.0 with a body", b"POST / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc", (200,), ENDS, 1),
    ("sixty-four headers", get(*[b"X-%d: y" % number for number in range(63)]), *OK),
    ("request line at its limit", get(target=b"/" + b"a" * (4096 - len("GET / HTTP/1.1"))), *OK),
    ("repeated ordinary header", get(b"X: 1", b"x: 2"), *OK),
    ("the application closes", get(target=b"/bye") + GET, (200,), ENDS, 1),
    ("an answer without body", get(target=b"/none") + GET, (204, 200), STAYS, 2),
    ("a bug in the application", get(target=b"/bug") + GET, (500, 200), STAYS, 2),
    ("a bug when the head is judged", get(target=b"/bug-in-open") + GET, (500, 200), STAYS, 1),
    ("an answer that would split", get(target=b"/split") + GET, (500, 200), STAYS, 2),
    ("the application refuses", get(target=b"/forbidden") + GET, (403, 200), STAYS, 1),
    (
        "the application refuses a short body",
        b"POST /forbidden HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc" + GET,
        (403, 200),
        STAYS,
        1,
    ),
    (
        "the application refuses a chunked body",
        b"POST /forbidden HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + GET,
        (403,),
        ENDS,
        0,
    ),
    ("unfinished head", b"GET / HTTP/1.1\r\nHost: a\r\n", (), STAYS, 0),
    ("unfinished method", b"GE", (), STAYS, 0),
    ("unfinished body", post(b"Content-Length: 3", body=b"ab"), (), STAYS, 0),
    ("unfinished chunk", chunked(b"3\r\nab"), (), STAYS, 0),
    ("unfinished trailer", chunked(b"0\r\nX: y\r\n"), (), STAYS, 0),
    # --- two lengths, or none that is clear
    ("length and coding", post(b"Content-Length: 3", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n") + GET, *BAD),
    ("coding and length", post(b"Transfer-Encoding: chunked", b"Content-Length: 3", body=b"0\r\n\r\n") + GET, *BAD),
    ("two equal lengths", post(b"Content-Length: 3", b"Content-Length: 3", body=b"abc"), *BAD),
    ("two different lengths", post(b"Content-Length: 3", b"Content-Length: 4", body=b"abc"), *BAD),
    ("a list of lengths", post(b"Content-Length: 3, 3", body=b"abc"), *BAD),
    ("length with a plus", post(b"Content-Length: +3", body=b"abc"), *BAD),
    ("negative length", post(b"Content-Length: -3", body=b"abc"), *BAD),
    ("length in hex", post(b"Content-Length: 0x3", body=b"abc"), *BAD),
    ("length with underscore", post(b"Content-Length: 1_0", body=b"0123456789"), *BAD),
    ("length with a space inside", post(b"Content-Length: 1 0", body=b"0123456789"), *BAD),
    ("length in other digits", post(b"Content-Length: \xd9\xa3", body=b"abc"), *BAD),
    ("empty length", post(b"Content-Length:", body=b"abc"), *BAD),
    ("length with a comma", post(b"Content-Length: 3,", body=b"abc"), *BAD),
    ("length of sixteen digits", post(b"Content-Length: 0000000000000003", body=b"abc"), *BAD),
    ("length beyond 64 bits", post(b"Content-Length: 18446744073709551619", body=b"abc"), *BAD),
    ("coding gzip, chunked", post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), *BAD),
    ("coding chunked, gzip", post(b"Transfer-Encoding: chunked, gzip", body=b"0\r\n\r\n"), *BAD),
    ("coding chunked, chunked", post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), *BAD),
    ("coding twice", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), *BAD),
    ("coding identity", post(b"Transfer-Encoding: identity", body=b"0\r\n\r\n"), *BAD),
    ("coding xchunked", post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"), *BAD),
    ("coding quoted", post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"), *BAD),
    ("coding empty", post(b"Transfer-Encoding:", body=b"0\r\n\r\n"), *BAD),
    ("coding with a parameter", post(b"Transfer-Encoding: chunked;q=1", body=b"0\r\n\r\n"), *BAD),
    ("coding behind a vertical tab", post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), *BAD),
    ("coding folded", post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n"), *BAD),
    ("coding on HTTP/1.0", b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", *BAD),
    ("space before the colon of the length", post(b"Content-Length : 3", body=b"abc"), *BAD),
    ("space before the colon of the coding", post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"), *BAD),
    # --- chunks
    ("chunk size of nine digits", chunked(b"000000003\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("chunk size with 0x", chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("chunk size with a plus", chunked(b"+3\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("negative chunk size", chunked(b"-3\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("chunk size with underscore", chunked(b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"), *BAD),
    ("empty chunk size", chunked(b"\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("space before a chunk size", chunked(b" 3\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("space behind a chunk size", chunked(b"3 \r\nabc\r\n0\r\n\r\n"), *BAD),
    ("bare LF behind a chunk size", chunked(b"3\nabc\r\n0\r\n\r\n"), *BAD),
    ("bare LF behind a chunk", chunked(b"3\r\nabc\n0\r\n\r\n"), *BAD),
    ("bare CR behind a chunk size", chunked(b"3\rabc\r\n0\r\n\r\n"), *BAD),
    ("chunk longer than its size", chunked(b"3\r\nabcd\r\n0\r\n\r\n"), *BAD),
    ("two bytes instead of CRLF", chunked(b"3\r\nabcXX0\r\n\r\n"), *BAD),
    ("long chunk extension", chunked(b"3;" + b"a" * 300 + b"\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("control byte in a chunk extension", chunked(b"3;a\x01\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("bare CR in a chunk extension", chunked(b"3;a\rb\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("bare LF in a chunk extension", chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), *BAD),
    ("malformed trailer", chunked(b"0\r\nX y\r\n\r\n"), *BAD),
    ("folded trailer", chunked(b"0\r\nX: y\r\n z\r\n\r\n"), *BAD),
    ("trailer ended by bare LF", chunked(b"0\r\nX: y\n\r\n"), *BAD),
    ("last chunk ended by bare LF", chunked(b"0\r\n\n") + GET, *BAD),
    ("endless trailer", chunked(b"0\r\n" + b"X: y\r\n" * 2000 + b"\r\n"), (431,), ENDS, 0),
    # --- the request line
    ("HTTP/0.9", b"GET /\r\n", *BAD),
    ("HTTP/0.9 with a blank line", b"GET /\r\n\r\n", *BAD),
    ("version 0.9", b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", *BAD),
    ("version 1.2", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", *BAD),
    ("version 2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", *BAD),
    ("version 9.9", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", *BAD),
    ("version 1.10", b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", *BAD),
    ("version 01.1", b"GET / HTTP/01.1\r\nHost: a\r\n\r\n", *BAD),
    ("version 1", b"GET / HTTP/1\r\nHost: a\r\n\r\n", *BAD),
    ("version in small letters", b"GET / http/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("another protocol", b"GET / RTSP/1.0\r\nHost: a\r\n\r\n", *BAD),
    ("no version", b"GET / \r\nHost: a\r\n\r\n", *BAD),
    ("two spaces behind the method", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("two spaces behind the target", b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("space behind the version", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", *BAD),
    ("tab instead of a space", b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("space before the method", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("space in the target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("two blank lines first", b"\r\n\r\n" + GET, *BAD),
    ("bare LF first", b"\n" + GET, *BAD),
    ("method in small letters", b"get / HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("an invented method", b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("NUL in the method", b"G\x00T / HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("CONNECT", b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", *BAD),
    ("no target", b"GET HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("target without slash", b"GET index HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("asterisk for GET", b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("fragment in the target", get(target=b"/a#b"), *BAD),
    ("control byte in the target", get(target=b"/a\x01"), *BAD),
    ("NUL in the target", get(target=b"/a\x00b"), *BAD),
    ("DEL in the target", get(target=b"/a\x7f"), *BAD),
    ("byte above 7F in the target", get(target=b"/\xff"), *BAD),
    ("absolute form of another host", b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("absolute form of another port", b"GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("absolute form with user info", b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    ("absolute form of another scheme", b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", *BAD),
    # --- headers
    ("no host", b"GET / HTTP/1.1\r\n\r\n", *BAD),
    ("two hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", *BAD),
    ("two equal hosts", b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", *BAD),
    ("host with a space", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", *BAD),
    ("host with a path", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", *BAD),
    ("host with user info", b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", *BAD),
    ("host list", b"GET / HTTP/1.1\r\nHost: a, b c\r\n\r\n", *BAD),
    ("host with a strange port", b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", *BAD),
    ("space before the first header", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", *BAD),
    ("folded header", get(b"X: a", b" b"), *BAD),
    ("header folded with a tab", get(b"X: a", b"\tb"), *BAD),
    ("space before a colon", get(b"X : y"), *BAD),
    ("tab before a colon", get(b"X\t: y"), *BAD),
    ("no colon", get(b"X"), *BAD),
    ("no name", get(b": y"), *BAD),
    ("NUL in a name", get(b"X\x00Y: z"), *BAD),
    ("control byte in a name", get(b"X\x01: z"), *BAD),
    ("byte above 7F in a name", get(b"X\xe9: z"), *BAD),
    ("parenthesis in a name", get(b"X(: z"), *BAD),
    ("NUL in a value", get(b"X: a\x00b"), *BAD),
    ("BEL in a value", get(b"X: a\x07b"), *BAD),
    ("DEL in a value", get(b"X: a\x7fb"), *BAD),
    ("bare CR in a value", get(b"X: a\rb"), *BAD),
    ("bare LF in a value", get(b"X: a\nY: b"), *BAD),
    ("bare CR before CRLF", get(b"X: a\r"), *BAD),
    ("bare LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n", *BAD),
    ("bare LF at the end of the head", b"GET / HTTP/1.1\r\nHost: a\r\n\n", *BAD),
    ("bare CR at the end of the head", b"GET / HTTP/1.1\r\nHost: a\r\n\rX", *BAD),
    ("good then bad", GET + b"BAD\r\n\r\n", (200, 400), ENDS, 1),
    ("good, bad, good", GET + get(b"X : y") + GET, (200, 400), ENDS, 1),
    ("TLS hello on a plain port", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(32), *BAD),
    # --- sizes
    ("request line too long", get(target=b"/" + b"a" * 4100), (414,), ENDS, 0),
    ("request line without end", b"GET /" + b"a" * 5000, (414,), ENDS, 0),
    ("sixty-five headers", get(*[b"X-%d: y" % number for number in range(64)]), (431,), ENDS, 0),
    ("head too large", get(b"X: " + b"a" * 17000), (431,), ENDS, 0),
    ("head without end", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20000, (431,), ENDS, 0),
    ("body too large", post(b"Content-Length: 1001", body=b"x" * 1001), (413,), ENDS, 0),
    ("huge length", post(b"Content-Length: 999999999999999"), (413,), ENDS, 0),
    ("chunk too large", chunked(b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n"), (413,), ENDS, 0),
    ("chunks too large together", chunked((b"1f4\r\n" + b"x" * 500 + b"\r\n") * 3 + b"0\r\n\r\n"), (413,), ENDS, 0),
    ("chunk size that would overflow", chunked(b"ffffffff\r\n"), (413,), ENDS, 0),
]

CASES = [Case(*row) for row in TABLE]
