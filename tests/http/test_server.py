"""The listener of `ayder serve` over real sockets: the corpus again, limits, TLS, a graceful stop."""

import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from ayder.config import HttpConfig
from ayder.http.exchange import ChunkSender, Response
from ayder.http.server import HttpServer, is_loopback, serve_http
from tests.http.corpus import CASES
from tests.http.toy import Seen, Toy, read_answers

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(application: Toy, **settings: Any) -> AsyncIterator[HttpServer]:
    async with trio.open_nursery() as nursery:
        yield await nursery.start(serve_http, application, HttpConfig(port=0, **settings))
        nursery.cancel_scope.cancel()


async def connect(server: HttpServer) -> trio.SocketStream:
    host, port = server.addresses[0]
    return await trio.open_tcp_stream(host, port)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Until the server closes."""
    received = b""
    with trio.fail_after(10):
        async for data in stream:
            received += data
    return received


async def read_some(stream: trio.abc.ReceiveStream, count: int) -> list[Seen]:
    """``count`` answers."""
    received = b""
    with trio.fail_after(10):
        while True:
            received += await stream.receive_some()
            with contextlib.suppress(AssertionError, KeyError, ValueError):
                answers = read_answers(received)
                if len(answers) >= count:
                    return answers


async def run_case(server: HttpServer, raw: bytes, *, at_once: bool) -> tuple[list[Seen], bool]:
    """Send, half-close, read to the end. Says also whether the server had ended the connection before it saw our end."""
    async with await connect(server) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            for start in range(0, len(raw), len(raw) if at_once else 1):
                await stream.send_all(raw[start:] if at_once else raw[start : start + 1])
        ended = False
        received = b""
        with trio.move_on_after(0.15):
            async for data in stream:
                received += data
            ended = True
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_eof()
        return read_answers(received + (b"" if ended else await read_all(stream))), ended


@pytest.mark.parametrize("at_once", [True, False], ids=["whole", "byte by byte"])
async def test_the_corpus_over_sockets(at_once: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "ayder.http")
    wrong: list[str] = []

    async def check(number: int) -> None:
        case = CASES[number]
        application = Toy()
        async with serving(application) as server:
            answers, ended = await run_case(server, case.raw, at_once=at_once)
        statuses = tuple(answer.status for answer in answers if answer.status != 100)
        if (statuses, ended, len(application.seen)) != (case.statuses, case.ends, case.requests):
            wrong.append(f"{case.name}: {statuses} {ended} {len(application.seen)}")

    for start in range(0, len(CASES), 24):
        async with trio.open_nursery() as nursery:
            for number in range(start, min(start + 24, len(CASES))):
                nursery.start_soon(check, number)
    assert wrong == []


async def test_many_clients_many_requests() -> None:
    application = Toy()

    async def client(server: HttpServer) -> None:
        async with await connect(server) as stream:
            for _ in range(5):
                await stream.send_all(GET * 8)
                assert [answer.status for answer in await read_some(stream, 8)] == [200] * 8

    async with serving(application) as server, trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(client, server)
    assert len(application.seen) == 40 * 5 * 8
    assert server.clients.total == 0


async def test_large_bodies_both_ways() -> None:
    application = Toy()
    application.body_limit = 8 << 20
    body = bytes(range(256)) * 20_000
    async with serving(application) as server, await connect(server) as stream:
        for framing, raw in ((b"Content-Length: %d" % len(body), body), (b"Transfer-Encoding: chunked", None)):
            if raw is None:
                raw = b"".join(b"%x\r\n%b\r\n" % (len(body) // 4, body[i::4]) for i in range(4)) + b"0\r\n\r\n"
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n" + raw)
            (answer,) = await read_some(stream, 1)
            assert len(answer.body) == len(body)
        assert application.seen[0].body == body
        assert application.seen[1].body == b"".join(body[i::4] for i in range(4))


async def test_a_slow_reader_does_not_stop_others_and_gets_everything() -> None:
    application = Toy()
    async with serving(application) as server, await connect(server) as slow, await connect(server) as quick:
        await slow.send_all(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n" * 12)
        await trio.sleep(0.1)
        assert len(application.seen) < 12  # the rest waits until this client has read
        await quick.send_all(GET)
        assert (await read_some(quick, 1))[0].status == 200
        answers = await read_some(slow, 12)
        assert [len(answer.body) for answer in answers] == [1_000_000] * 12


async def test_a_client_over_the_limit_is_told_so() -> None:
    async with serving(Toy(), max_connections_loopback=2) as server, await connect(server) as one, await connect(server) as two:
        for stream in (one, two):
            await stream.send_all(GET)
            await read_some(stream, 1)
        async with await connect(server) as three:
            (answer,) = read_answers(await read_all(three))
            assert answer.status == 503
            assert answer.headers[b"connection"] == b"close"
        await one.aclose()
        await trio.sleep(0.05)
        async with await connect(server) as four:
            await four.send_all(GET)
            assert (await read_some(four, 1))[0].status == 200


def test_what_is_loopback() -> None:
    assert [is_loopback(text) for text in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1")] == [True] * 4
    assert [is_loopback(text) for text in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "")] == [False] * 4


async def test_running_out_of_descriptors_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(Toy()) as server, await connect(server) as before:
        with contextlib.ExitStack() as clients:
            for client in [clients.enter_context(socket.socket()) for _ in range(4)]:
                client.setblocking(False)
                client.connect_ex(server.addresses[0])
            # Their handshakes are done by the kernel; accepting them needs descriptors that we now take away.
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                await before.send_all(GET)
                assert (await read_some(before, 1))[0].status == 200
                await trio.sleep(0.25)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await trio.sleep(0.2)
            async with await connect(server) as after:
                await after.send_all(GET)
                assert (await read_some(after, 1))[0].status == 200
    assert "cannot accept" in caplog.text


async def test_a_reset_frees_what_the_client_held() -> None:
    application = Toy()
    async with serving(application) as server:
        for _ in range(5):
            stream = await connect(server)
            await stream.send_all(
                b"POST /later HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\nxx"
            )
            await trio.sleep(0.02)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            await stream.aclose()
        await trio.sleep(0.05)
        assert server.clients.total == 0
        assert not server.front.connections
        assert server.front.held_body_bytes == 0
        assert [deferred.abandoned for deferred in application.deferred] == [True] * 5


async def test_draining_lets_requests_finish_and_refuses_newcomers() -> None:
    application = Toy()

    async def work() -> Response:
        await trio.sleep(0.3)
        return Response(200, b"worked")

    application.work = work
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_http, application, HttpConfig(port=0))
        idle, busy = await connect(server), await connect(server)
        await idle.send_all(GET)
        await read_some(idle, 1)
        await busy.send_all(b"GET /work HTTP/1.1\r\nHost: a\r\n\r\n")
        await trio.sleep(0.05)
        started = trio.current_time()
        host, port = server.addresses[0]
        await server.drain()
        assert 0.2 < trio.current_time() - started < 3
        assert await read_all(idle) == b""
        (answer,) = read_answers(await read_all(busy))
        assert (answer.body, answer.headers[b"connection"]) == (b"worked", b"close")
        await idle.aclose()
        await busy.aclose()
        with pytest.raises(OSError, match="all attempts"):
            await trio.open_tcp_stream(host, port)


async def test_draining_has_a_hard_deadline_whatever_clients_do() -> None:
    application = Toy()
    cancelled = trio.Event()

    async def flood(send: ChunkSender) -> None:
        try:
            while True:
                await send(b"x" * 65536)
        finally:
            cancelled.set()

    application.stream = flood
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_http, application, HttpConfig(port=0, drain_timeout_ms=300))
        stalled, half, unanswered = [await connect(server) for _ in range(3)]
        await stalled.send_all(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        await half.send_all(b"GET / HTTP/1.1\r\n")
        await unanswered.send_all(b"POST /later HTTP/1.1\r\nHost: a\r\n\r\n")
        await trio.sleep(0.1)
        started = trio.current_time()
        await server.drain()
        assert 0.25 < trio.current_time() - started < 2
        await cancelled.wait()
        for stream in (stalled, half, unanswered):
            await stream.aclose()


async def test_a_bug_in_the_application_costs_one_answer(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Toy()) as server, await connect(server) as stream:
        await stream.send_all(b"GET /bug HTTP/1.1\r\nHost: a\r\n\r\n" + GET)
        assert [answer.status for answer in await read_some(stream, 2)] == [500, 200]
    assert "a bug" in caplog.text


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[trustme.CA, dict[str, str]]:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    return authority, {"tls_certificate": str(chain), "tls_key": str(key)}


async def test_tls(certificate: tuple[trustme.CA, dict[str, str]]) -> None:
    authority, settings = certificate
    context = ssl.create_default_context()
    authority.configure_trust(context)
    application = Toy()
    application.body_limit = 8 << 20
    body = bytes(range(256)) * 4000
    async with serving(application, **settings) as server:
        assert server.urls[0].startswith("https://")
        async with trio.SSLStream(await connect(server), context, server_hostname="127.0.0.1", https_compatible=True) as stream:
            await stream.send_all(GET * 3 + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            answers = await read_some(stream, 4)
            assert [answer.status for answer in answers] == [200] * 4
            assert answers[3].body == body
            await stream.send_all(b"GET /bye HTTP/1.1\r\nHost: a\r\n\r\n")
            assert read_answers(await read_all(stream))[0].body == b"bye"
        async with await connect(server) as plain:
            await plain.send_all(GET)
            with contextlib.suppress(trio.BrokenResourceError):
                assert b"HTTP/1.1" not in await read_all(plain)
        async with trio.SSLStream(await connect(server), context, server_hostname="127.0.0.1", https_compatible=True) as again:
            await again.send_all(GET)
            assert (await read_some(again, 1))[0].status == 200
