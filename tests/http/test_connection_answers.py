"""The order of answers, pipelines, streams, works, hang-ups: the connection in memory."""

import itertools

import h11
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ayder.config import HttpConfig
from ayder.http.exchange import ChunkSender, Response
from ayder.http.front import Front
from tests.http.toy import Client, Toy, read_answers


def request(path: str, method: str = "GET", body: bytes = b"", *lines: str) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\n" + "".join(line + "\r\n" for line in lines)
    return head.encode() + (b"Content-Length: %d\r\n" % len(body) if body else b"") + b"\r\n" + body


def bodies(client: Client) -> list[bytes]:
    return [answer.body for answer in client.answers()]


def test_a_request_carries_what_was_sent() -> None:
    client = Client.open()
    client.send(b"POST /a%2Fb?x=1&y HTTP/1.1\r\nHost: a\r\nX-Two: 1\r\nX-TWO: 2 \r\nContent-Length: 2\r\n\r\nhi")
    (seen,) = client.application.seen
    assert (seen.method, seen.path, seen.query, seen.body) == ("POST", b"/a%2Fb", b"x=1&y", b"hi")
    assert seen.headers == {b"host": b"a", b"x-two": b"1, 2", b"content-length": b"2"}
    assert seen.peer == "192.0.2.1"
    assert seen.received_ns > 0


def test_trailers_never_become_headers() -> None:
    client = Client.open()
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
    (seen,) = client.application.seen
    assert b"authorization" not in seen.headers
    assert seen.body == b"a"


def test_head_has_the_length_of_get_and_no_body() -> None:
    client = Client.open()
    client.send(request("/large", "HEAD") + request("/"))
    head, _, rest = client.transport.output.partition(b"\r\n\r\n")
    assert b"Content-Length: 1000000" in head
    assert read_answers(rest)[0].body == b"ok"


def test_several_answers_leave_in_one_send() -> None:
    client = Client.open()
    client.send(request("/") * 10)
    assert client.statuses() == [200] * 10
    assert len(client.transport.sends) == 1


def test_a_deferred_answer_is_sent_when_it_is_resolved() -> None:
    client = Client.open()
    client.send(request("/later", "POST", b"x"))
    assert client.transport.output == b""
    client.application.deferred[0].resolve(Response(200, b"done"))
    assert bodies(client) == [b"done"]


def test_an_answer_resolved_before_it_is_returned_is_sent_at_once() -> None:
    client = Client.open()
    client.send(request("/resolved"))
    assert bodies(client) == [b"resolved"]


def test_answers_keep_the_order_of_requests_and_are_joined() -> None:
    client = Client.open()
    client.send(request("/later", "POST", b"x") * 5)
    for number in (3, 1, 0, 4, 2):
        client.application.deferred[number].resolve(Response(200, b"%d" % number))
    client.front.run_due()
    assert bodies(client) == [b"0", b"1", b"2", b"3", b"4"]
    assert len(client.transport.sends) == 1


@given(st.permutations(range(8)), st.lists(st.integers(0, 400), max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_of_resolving_and_any_segmentation(order: list[int], cuts: list[int], data: st.DataObject) -> None:
    client = Client.open(max_pipelined_requests=3)
    raw = b"".join(request(f"/later?{number}", "POST", b"%d" % number) for number in range(8))
    edges = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    for start, end in itertools.pairwise(edges):
        client.send(raw[start:end])
    left = set(order)
    while left:
        assert len(client.application.deferred) - (8 - len(left)) <= 3
        open_ones = [number for number in order if number in left and number < len(client.application.deferred)]
        number = data.draw(st.sampled_from(open_ones))
        left.discard(number)
        client.application.deferred[number].resolve(Response(200, client.application.seen[number].body))
        client.front.run_due()
    assert bodies(client) == [b"%d" % number for number in range(8)]


def test_a_pipeline_is_at_most_as_deep_as_configured() -> None:
    client = Client.open(max_pipelined_requests=4)
    client.send(request("/later", "POST", b"x") * 9)
    assert len(client.application.seen) == 4
    for number in range(9):
        client.application.deferred[number].resolve(Response(200, b"%d" % number))
        client.front.run_due()
    assert bodies(client) == [b"%d" % number for number in range(9)]


def test_no_more_is_buffered_than_64_kib_while_the_pipeline_is_full() -> None:
    client = Client.open(max_pipelined_requests=1)
    client.send(request("/later", "POST", b"x"))
    client.send(request("/") * 3000)
    assert client.connection.paused
    assert len(client.application.seen) == 1
    client.application.deferred[0].resolve(Response(200, b"done"))
    for _ in range(3000 // 16 + 1):
        client.front.run_due()
    assert len(client.answers()) == 3001
    assert not client.connection.paused


def test_a_long_pipeline_is_served_in_turns() -> None:
    client = Client.open()
    client.connection.data_received(request("/") * 100)
    assert len(client.application.seen) == 16
    client.front.run_due()
    assert len(client.application.seen) == 32
    for _ in range(10):
        client.front.run_due()
    assert client.statuses() == [200] * 100


def test_a_read_waits_for_the_writes_before_it() -> None:
    client = Client.open()
    client.send(request("/later", "POST", b"x") + request("/") + request("/?2") + request("/", "POST", b"y"))
    assert [seen.method for seen in client.application.seen] == ["POST"]
    client.application.deferred[0].resolve(Response(200, b"stored"))
    client.front.run_due()
    assert bodies(client) == [b"stored", b"ok", b"ok", b"y"]


def test_a_write_waits_for_the_reads_before_it() -> None:
    client = Client.open()
    client.send(request("/later") + request("/", "DELETE"))
    assert [seen.method for seen in client.application.seen] == ["GET"]
    client.application.deferred[0].resolve(Response(200, b"read"))
    client.front.run_due()
    assert [seen.method for seen in client.application.seen] == ["GET", "DELETE"]


def test_an_error_in_a_pipeline_waits_for_the_answers_before_it() -> None:
    client = Client.open()
    client.send(request("/later", "POST", b"x") + b"BAD\r\n\r\n")
    assert client.transport.output == b""
    client.application.deferred[0].resolve(Response(200, b"done"))
    client.front.run_due()
    assert client.statuses() == [200, 400]
    assert client.ended


def test_expect_is_answered_once_the_head_is_accepted() -> None:
    client = Client.open()
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert client.statuses() == [100]
    client.send(b"hi")
    assert client.statuses() == [100, 200]


@pytest.mark.parametrize("path", ["/forbidden", "/"])
def test_expect_is_not_answered_for_a_refused_head(path: str) -> None:
    client = Client.open()
    length = 10 if path == "/forbidden" else 5000
    client.send(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (path.encode(), length))
    assert client.statuses() == [403 if path == "/forbidden" else 413]
    assert client.ended  # whether the body still comes is anybody's guess


def test_a_refused_request_has_its_short_body_skipped() -> None:
    client = Client.open()
    client.send(b"POST /forbidden HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
    assert client.statuses() == [403]
    client.send(b"cde" + request("/"))
    assert client.statuses() == [403, 200]
    assert [seen.method for seen in client.application.seen] == ["GET"]


def test_a_refused_request_with_a_long_body_ends_the_connection_after_what_the_client_sends() -> None:
    client = Client.open()
    client.send(b"POST /forbidden HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nab")
    assert client.statuses() == [403]
    assert client.transport.shut
    client.send(b"x" * 65536)
    assert not client.transport.closed  # lingering: the client reads its answer instead of a reset
    client.connection.eof_received()
    assert client.transport.closed


def test_a_half_closed_client_still_gets_its_answers() -> None:
    client = Client.open()
    client.send(request("/later", "POST", b"x") + request("/"))
    client.connection.eof_received()
    assert not client.transport.closed
    client.application.deferred[0].resolve(Response(200, b"done"))
    client.front.run_due()
    assert bodies(client) == [b"done", b"ok"]
    assert client.transport.closed
    assert not client.front.connections


def test_a_client_that_is_gone_frees_everything() -> None:
    client = Client.open()
    client.send(request("/later", "POST", b"x") * 3)
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n" + b"x" * 500)
    assert client.front.held_body_bytes == 500
    client.transport.gone = True
    client.application.deferred[0].resolve(Response(200, b"done"))
    client.front.run_due()
    assert client.transport.closed
    assert client.front.held_body_bytes == 0
    assert not client.front.connections
    assert [deferred.abandoned for deferred in client.application.deferred[1:]] == [True, True]
    client.application.deferred[1].resolve(Response(200, b"too late"))


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_of_all_connections_together_are_bounded(chunked: bool) -> None:
    front = Front(Toy(), HttpConfig(max_bodies_in_flight_bytes=2 << 20, max_produce_body_bytes=2 << 20))
    assert isinstance(front.application, Toy)
    front.application.body_limit = 2 << 20
    first, second, third = (Client.open(front) for _ in range(3))
    head = b"POST / HTTP/1.1\r\nHost: a\r\n" + (
        b"Transfer-Encoding: chunked\r\n\r\n180000\r\n" if chunked else b"Content-Length: 1572864\r\n\r\n"
    )
    first.send(head + b"x" * 1_500_000)
    second.send(head + (b"x" * 1_500_000 if chunked else b""))
    assert first.transport.output == b""
    assert second.statuses() == [503]
    assert second.ended
    assert front.held_body_bytes == 1_500_000
    third.send(request("/"))
    assert third.statuses() == [200]  # what needs no room is served
    first.connection.lost()
    assert front.held_body_bytes == 0


def test_the_constant_lines_of_the_application_are_in_every_answer() -> None:
    client = Client.open()
    client.application.extra_headers = b"Ayder-Node: n1\r\nAyder-Term: 7\r\n"  # type: ignore[attr-defined]
    fresh = Client.open(Front(client.application, HttpConfig()))
    fresh.send(request("/"))
    assert fresh.answers()[0].headers[b"ayder-term"] == b"7"
    client.application.extra_headers = b"Ayder-Node: n1\r\nAyder-Term: 8\r\n"  # type: ignore[attr-defined]
    fresh.send(request("/"))
    assert fresh.answers()[1].headers[b"ayder-term"] == b"8"


@pytest.mark.parametrize("cut", [1, 3, 7, 14, 17])
def test_an_http2_preface_is_handed_over_with_its_bytes(cut: int) -> None:
    raw = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 9
    client = Client.open(takes_over=True)
    client.send(raw[:cut])
    assert client.connection.handover is None
    client.send(raw[cut:])
    assert client.connection.handover == raw
    assert client.transport.output == b""


def test_an_upgrade_is_handed_over_only_where_somebody_takes_it() -> None:
    raw = request("/x", "GET", b"", "Connection: upgrade", "Upgrade: websocket") + b"rest"
    client = Client.open(takes_over=True)
    client.send(request("/") + raw)
    assert client.statuses() == [200]
    assert client.connection.handover == raw
    alone = Client.open()
    alone.send(raw[:-4])
    assert alone.statuses() == [200]
    assert not alone.ended


async def test_a_work_is_awaited_and_cancelled_when_the_client_leaves(autojump_clock: trio.testing.MockClock) -> None:
    client = Client.open()
    events: list[str] = []

    async def work() -> Response:
        try:
            await trio.sleep(3)
        except trio.Cancelled:
            events.append("cancelled")
            raise
        return Response(200, b"worked")

    client.application.work = work
    async with trio.open_nursery() as nursery:
        await nursery.start(client.front.run)
        client.send(request("/work") + request("/work") + request("/"))
        await trio.sleep(4)
        assert bodies(client) == [b"worked", b"worked", b"ok"]
        client.send(request("/work"))
        await trio.sleep(1)
        client.connection.eof_received()
        await trio.sleep(1.6)
        assert events == ["cancelled"]
        assert client.transport.closed
        nursery.cancel_scope.cancel()


async def test_a_work_that_fails_is_a_500(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    client = Client.open()

    async def work() -> Response:
        await trio.sleep(0)
        raise RuntimeError("a bug")

    client.application.work = work
    async with trio.open_nursery() as nursery:
        await nursery.start(client.front.run)
        client.send(request("/work") + request("/"))
        await trio.testing.wait_all_tasks_blocked()
        assert client.statuses() == [500, 200]
        nursery.cancel_scope.cancel()
    assert "a bug" in caplog.text


async def test_a_stream_is_chunked_and_waits_for_room(autojump_clock: trio.testing.MockClock) -> None:
    client = Client.open()
    sent: list[int] = []

    async def stream(send: ChunkSender) -> None:
        for number in range(5):
            await send(b"%d" % number * 100)
            sent.append(number)

    client.application.stream = stream
    client.transport.room = 450
    async with trio.open_nursery() as nursery:
        await nursery.start(client.front.run)
        client.send(request("/stream") + request("/"))
        await trio.sleep(1)
        assert len(sent) < 5
        assert client.connection.paused
        client.transport.give_room(None)
        await trio.sleep(1)
        assert sent == [0, 1, 2, 3, 4]
        first, second = client.answers()
        assert first.headers[b"transfer-encoding"] == b"chunked"
        assert first.body == b"".join(b"%d" % number * 100 for number in range(5))
        assert second.body == b"ok"
        nursery.cancel_scope.cancel()


async def test_a_stream_on_http10_ends_with_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    client = Client.open()

    async def stream(send: ChunkSender) -> None:
        await send(b"hello")

    client.application.stream = stream
    async with trio.open_nursery() as nursery:
        await nursery.start(client.front.run)
        client.send(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        await trio.sleep(1)
        head, _, body = client.transport.output.partition(b"\r\n\r\n")
        assert body == b"hello"
        assert b"Transfer-Encoding" not in head
        assert client.ended
        nursery.cancel_scope.cancel()


async def test_head_of_a_stream_runs_no_stream(autojump_clock: trio.testing.MockClock) -> None:
    client = Client.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(client.front.run)
        client.send(request("/stream", "HEAD") + request("/"))
        await trio.sleep(1)
        assert client.transport.output.count(b"HTTP/1.1 200") == 2
        assert client.transport.output.endswith(b"\r\n\r\nok")
        nursery.cancel_scope.cancel()


async def test_a_stream_that_breaks_is_not_ended_cleanly(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client.open()

    async def stream(send: ChunkSender) -> None:
        await send(b"hello")
        raise RuntimeError("a bug")

    client.application.stream = stream
    async with trio.open_nursery() as nursery:
        await nursery.start(client.front.run)
        client.send(request("/stream"))
        await trio.sleep(1)
        assert client.transport.closed
        assert not client.transport.output.endswith(b"0\r\n\r\n")
        nursery.cancel_scope.cancel()
    assert "a bug" in caplog.text


async def test_a_stream_ends_when_the_client_leaves(autojump_clock: trio.testing.MockClock) -> None:
    client = Client.open()
    ended = trio.Event()

    async def stream(send: ChunkSender) -> None:
        try:
            while True:
                await send(b"tick")
                await trio.sleep(1)
        finally:
            ended.set()

    client.application.stream = stream
    async with trio.open_nursery() as nursery:
        await nursery.start(client.front.run)
        client.send(request("/stream"))
        await trio.sleep(3)
        client.transport.gone = True
        await ended.wait()
        assert client.transport.closed
        nursery.cancel_scope.cancel()


NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,8}", fullmatch=True).filter(
    lambda name: (
        name.lower() not in ("host", "content-length", "transfer-encoding", "connection", "expect", "upgrade", "trailer", "te")
    )
)
VALUES = st.from_regex(r"[!-~]([ -~]{0,8}[!-~])?", fullmatch=True)


@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]),
    st.from_regex(r"/[A-Za-z0-9%._~/-]{0,12}(\?[A-Za-z0-9=&%-]{0,12})?", fullmatch=True),
    st.lists(st.tuples(NAMES, VALUES), max_size=6),
    st.lists(st.binary(min_size=1, max_size=40), max_size=4),
    st.booleans(),
    st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_h11_and_we_agree_on_valid_requests(
    method: str, target: str, headers: list[tuple[str, str]], pieces: list[bytes], chunked: bool, step: int
) -> None:
    framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(sum(map(len, pieces))))
    writer = h11.Connection(h11.CLIENT)
    raw = writer.send(h11.Request(method=method, target=target, headers=[("Host", "a"), *headers, framing])) or b""
    for piece in pieces:
        raw += writer.send(h11.Data(data=piece)) or b""
    raw += writer.send(h11.EndOfMessage()) or b""
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(raw)
    expected = reader.next_event()
    assert isinstance(expected, h11.Request)
    client = Client.open()
    for start in range(0, len(raw), step):
        client.send(raw[start : start + step])
    (seen,) = client.application.seen
    path, _, query = bytes(expected.target).partition(b"?")
    assert (seen.method.encode(), seen.path, seen.query, seen.body) == (expected.method, path, query, b"".join(pieces))
    merged: dict[bytes, bytes] = {}
    for name, value in expected.headers:
        merged[name] = merged[name] + b", " + value if name in merged else value
    assert seen.headers == merged


@given(st.binary(max_size=300), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_rubbish_is_refused_or_waited_for_but_never_breaks_anything(raw: bytes, step: int) -> None:
    client = Client.open()
    for start in range(0, len(raw), step):
        client.send(raw[start : start + step])
    assert client.statuses() in ([], [400], [414], [431])
