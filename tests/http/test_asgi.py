"""The launch by hypercorn: a real process, the corpus again, the packets that end a bare hypercorn, HTTP/2, TLS, how it stops."""

import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import h2.config
import h2.connection
import h2.events
import hypercorn.trio.run
import pytest
import trio
import trustme
from hypercorn.trio.tcp_server import TCPServer

from ayder.config import HttpConfig
from ayder.http import asgi
from ayder.http.asgi_requests import answer_request
from ayder.http.exchange import ChunkSender, Response
from ayder.http.front import Front
from tests.http.corpus import CASES
from tests.http.test_server import GET, read_all, read_some
from tests.http.toy import Seen, Toy, read_answers

ROOT = Path(__file__).parent.parent.parent
WEBSOCKET = b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
WEBSOCKET_KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
KILLERS = {
    "a byte behind the upgrade": WEBSOCKET + WEBSOCKET_KEY + b"\r\nX",
    "protocol not ASCII": WEBSOCKET + WEBSOCKET_KEY + b"Sec-WebSocket-Protocol: \xff\r\n\r\n",
    "extensions not ASCII": WEBSOCKET + WEBSOCKET_KEY + b"Sec-WebSocket-Extensions: \xff\r\n\r\n",
}


@attrs.define
class Launched:
    """A hypercorn process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def ask(self, raw: bytes, count: int = 1) -> list[Seen]:
        async with await self.connect() as stream:
            await stream.send_all(raw)
            return await read_some(stream, count)

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)


@contextlib.contextmanager
def launched(folder: Path, *options: str, **environment: str) -> Iterator[Launched]:
    log = folder / f"hypercorn-{time.monotonic_ns()}.log"
    command = [str(Path(sys.executable).parent / "hypercorn"), "--worker-class", "trio", "-b", "127.0.0.1:0", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "tests.http.hypercorn_app:app"], cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output
        )
    try:
        yield Launched(process, _port(process, log), log)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(15)
        finally:
            process.kill()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = re.search(r"Running on https?://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            return int(found[1])
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    with launched(tmp_path_factory.mktemp("launch"), TOY_MAX_CONNECTIONS_LOOPBACK="60", TOY_IDLE_TIMEOUT_MS="3000") as running:
        yield running


def test_the_guard_took() -> None:
    """Importing the module is enough; a hypercorn it does not fit is left alone with a warning."""
    assert hypercorn.trio.run.TCPServer is asgi.GuardedServer  # type: ignore[attr-defined]
    assert issubclass(asgi.GuardedServer, TCPServer)
    assert asgi.install()


def test_a_hypercorn_that_changed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed:
        pass

    monkeypatch.setattr(hypercorn.trio.run, "TCPServer", Changed)
    with pytest.warns(RuntimeWarning, match="cannot be guarded"):
        assert not asgi.install()
    assert hypercorn.trio.run.TCPServer is Changed  # type: ignore[attr-defined]


async def test_the_corpus_under_hypercorn(shared: Launched) -> None:
    wrong: list[str] = []
    for case in CASES:
        async with await shared.connect() as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(case.raw)
                await stream.send_eof()
            answers = read_answers(await read_all(stream))
        (count,) = await shared.ask(b"GET /count HTTP/1.1\r\nHost: a\r\n\r\n")
        statuses = tuple(answer.status for answer in answers if answer.status != 100)
        if statuses != case.statuses or int(count.body.split()[0]) != case.requests:
            wrong.append(f"{case.name}: {statuses} {count.body!r}")
        if answers and case.ends and answers[-1].headers.get(b"connection") != b"close":
            wrong.append(f"{case.name}: not ended")
    assert wrong == []


@pytest.mark.parametrize("packet", KILLERS.values(), ids=KILLERS)
async def test_the_packets_that_end_a_bare_hypercorn(shared: Launched, packet: bytes) -> None:
    for _ in range(3):
        async with await shared.connect() as stream:
            await stream.send_all(packet)
            with trio.move_on_after(0.3), contextlib.suppress(trio.BrokenResourceError):
                async for _data in stream:
                    pass
        assert (await shared.ask(GET))[0].status == 200
    assert shared.process.poll() is None


async def test_the_fast_connection_serves_http11(shared: Launched) -> None:
    (answer,) = await shared.ask(GET)
    assert answer.headers[b"server"] == b"ayder"
    assert answer.headers[b"toy-front"] == b"1"


async def until_waiting(shared: Launched, count: bytes) -> None:
    """Until that many requests wait in the application."""
    with trio.fail_after(5):
        while (await shared.ask(b"GET /count HTTP/1.1\r\nHost: a\r\n\r\n"))[0].body.split()[1] != count:
            await trio.sleep(0.05)


async def test_a_hang_up_cancels_what_waits(shared: Launched) -> None:
    stream = await shared.connect()
    await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
    await until_waiting(shared, b"1")
    await stream.aclose()
    await until_waiting(shared, b"0")


async def test_connections_are_counted(tmp_path: Path) -> None:
    with launched(tmp_path, TOY_MAX_CONNECTIONS_LOOPBACK="1") as running:
        async with await running.connect() as first:
            await first.send_all(GET)
            await read_some(first, 1)
            async with await running.connect() as second:
                assert read_answers(await read_all(second))[0].status == 503


class H2Client:
    """A small HTTP/2 client on the h2 state machine."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.machine = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))

    async def open(self) -> None:
        self.machine.initiate_connection()
        await self.stream.send_all(self.machine.data_to_send())

    async def send(self, number: int, method: str, path: str, body: bytes = b"") -> None:
        fields = [(":method", method), (":path", path), (":authority", "a"), (":scheme", "http")]
        self.machine.send_headers(number, fields, end_stream=not body)
        if body:
            self.machine.send_data(number, body, end_stream=True)
        await self.stream.send_all(self.machine.data_to_send())

    async def read(self, count: int) -> dict[int, tuple[dict[str, str], bytes]]:
        heads: dict[int, dict[str, str]] = {}
        bodies: dict[int, bytes] = {}
        ended: set[int] = set()
        with trio.fail_after(10):
            while len(ended) < count:
                for event in self.machine.receive_data(bytes(await self.stream.receive_some())):
                    if isinstance(event, h2.events.ResponseReceived):
                        heads[event.stream_id] = dict(event.headers)  # type: ignore[arg-type]
                    elif isinstance(event, h2.events.DataReceived):
                        bodies[event.stream_id] = bodies.get(event.stream_id, b"") + event.data
                        self.machine.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, h2.events.StreamEnded):
                        ended.add(event.stream_id)
                await self.stream.send_all(self.machine.data_to_send())
        return {number: (heads[number], bodies.get(number, b"")) for number in ended}


@contextlib.asynccontextmanager
async def h2_over(stream: trio.abc.Stream) -> AsyncIterator[H2Client]:
    client = H2Client(stream)
    async with stream:
        await client.open()
        yield client


async def check_http2(client: H2Client) -> None:
    await client.send(1, "GET", "/")
    await client.send(3, "POST", "/", b"body")
    await client.send(5, "GET", "/ticks")
    await client.send(7, "HEAD", "/large")
    await client.send(9, "GET", "/forbidden")
    await client.send(11, "POST", "/", b"x" * 1001)
    answers = await client.read(6)
    assert answers[1][0][":status"] == "200"
    assert answers[1][0]["toy-front"] == "1"
    assert answers[3][1] == b"body"
    assert answers[5][1] == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert (answers[7][0]["content-length"], answers[7][1]) == ("1000000", b"")
    assert answers[9][0][":status"] == "403"
    assert answers[11][0][":status"] == "413"


async def test_http2_by_prior_knowledge(shared: Launched) -> None:
    async with h2_over(await shared.connect()) as client:
        await check_http2(client)


async def test_http2_cancelling_a_stream_cancels_its_work(shared: Launched) -> None:
    async with h2_over(await shared.connect()) as client:
        await client.send(1, "GET", "/wait")
        await until_waiting(shared, b"1")
        client.machine.reset_stream(1)
        await client.stream.send_all(client.machine.data_to_send())
        await until_waiting(shared, b"0")


async def test_rubbish_behind_an_http2_preface_is_harmless(shared: Launched) -> None:
    async with await shared.connect() as stream:
        await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100)
        await read_all(stream)
    assert (await shared.ask(GET))[0].status == 200


async def test_tls_chooses_by_alpn(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    with launched(tmp_path, "--certfile", str(chain), "--keyfile", str(key)) as running:
        for protocols in (["h2", "http/1.1"], ["http/1.1"], []):
            context = ssl.create_default_context()
            authority.configure_trust(context)
            if protocols:
                context.set_alpn_protocols(protocols)
            stream = trio.SSLStream(await running.connect(), context, server_hostname="127.0.0.1", https_compatible=True)
            if "h2" in protocols:
                async with h2_over(stream) as client:
                    assert stream.selected_alpn_protocol() == "h2"
                    await check_http2(client)
            else:
                async with stream:
                    await stream.send_all(GET)
                    (answer,) = await read_some(stream, 1)
                    assert answer.headers[b"server"] == b"ayder"
        async with await running.connect() as plain:
            await plain.send_all(GET)
            with contextlib.suppress(trio.BrokenResourceError):
                await read_all(plain)
        assert running.process.poll() is None


@pytest.mark.parametrize("workers", ["0", "1"])
async def test_a_failing_node_ends_the_process(tmp_path: Path, workers: str) -> None:
    with launched(tmp_path, "--workers", workers) as running:
        with contextlib.suppress(trio.BrokenResourceError, AssertionError):
            await running.ask(b"GET /fail HTTP/1.1\r\nHost: a\r\n\r\n")
        status = running.wait(10)
        assert status != 0 or workers == "1"  # with a child, hypercorn 0.18 forgets its status (`run` joins the children twice)
        assert "No space left on device" in running.log.read_text()


async def test_a_stop_lets_requests_finish(tmp_path: Path) -> None:
    with launched(tmp_path) as running:
        async with await running.connect() as idle, await running.connect() as busy:
            await idle.send_all(GET)
            await read_some(idle, 1)
            await busy.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nh")
            await trio.sleep(0.1)
            running.process.send_signal(signal.SIGTERM)
            assert await read_all(idle) == b""
            await busy.send_all(b"i")
            (answer,) = read_answers(await read_all(busy))
            assert (answer.body, answer.headers[b"connection"]) == (b"hi", b"close")
        assert running.wait(10) == 0


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_a_stop_has_a_hard_deadline_whatever_clients_do(tmp_path: Path, version: str) -> None:
    with launched(tmp_path, TOY_DRAIN_TIMEOUT_MS="500") as running:
        async with await running.connect() as stalled:
            if version == "2":
                client = H2Client(stalled)
                await client.open()
                client.machine.increment_flow_control_window(2**30)
                await client.send(1, "GET", "/flood")
                client.machine.increment_flow_control_window(2**30, 1)
                await stalled.send_all(client.machine.data_to_send())
            else:
                await stalled.send_all(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
            await trio.sleep(0.5)
            started = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            assert running.wait(8) == 0
            assert time.monotonic() - started < 6


# --- the ASGI side without a server


async def call(application: Toy, scope: dict[str, Any], *messages: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Run one request; after ``messages`` the client stays connected and silent."""
    front = Front(application, HttpConfig(**settings))
    sent: list[dict[str, Any]] = []
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await trio.sleep_forever()
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    base = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [],
        "http_version": "2",
    }
    await answer_request(front, base | {"client": ("192.0.2.1", 1)} | scope, receive, send)
    assert front.held_body_bytes == 0
    return sent


def body(piece: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": piece, "more_body": more}


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        ({"raw_path": b"/" + b"a" * 4096}, 414),
        ({"headers": [(b"x", b"y")] * 65}, 431),
        ({"headers": [(b"x", b"y" * 17000)]}, 431),
        ({"headers": [(b"content-length", b"1"), (b"content-length", b"1")]}, 400),
        ({"headers": [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]}, 400),
        ({"headers": [(b"transfer-encoding", b"gzip, chunked")]}, 400),
        ({"headers": [(b"content-length", b"1_0")]}, 400),
        ({"headers": [(b"content-length", b"1001")]}, 413),
        ({"raw_path": b"/bug"}, 500),
        ({"raw_path": b"/bug-in-open"}, 500),
        ({"raw_path": b"/split"}, 500),
        ({"raw_path": b"/resolved"}, 200),
    ],
)
async def test_asgi_statuses(scope: dict[str, Any], status: int) -> None:
    sent = await call(Toy(), scope, body(b""))
    assert sent[0]["status"] == status
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


async def test_asgi_body_is_joined_and_limited() -> None:
    application = Toy()
    sent = await call(application, {"method": "POST"}, body(b"a", more=True), body(b"b"))
    assert sent[1]["body"] == b"ab"
    sent = await call(application, {"method": "POST"}, *[body(b"x" * 400, more=True)] * 3)
    assert sent[0]["status"] == 413


async def test_asgi_body_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    sent = await call(Toy(), {"method": "POST"}, body(b"a", more=True))
    assert sent[0]["status"] == 408
    assert 5 <= trio.current_time() <= 6


async def test_asgi_deferred_and_hang_up(autojump_clock: trio.testing.MockClock) -> None:
    application = Toy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, application, {"method": "POST", "raw_path": b"/later"}, body(b""))
        await trio.sleep(1)
        application.deferred[0].resolve(Response(200, b"done"))
    await call(application, {"method": "POST", "raw_path": b"/later"}, body(b""), {"type": "http.disconnect"})
    assert application.deferred[1].abandoned


async def test_asgi_stream_ends_with_the_client(autojump_clock: trio.testing.MockClock) -> None:
    application = Toy()

    async def stream(send: ChunkSender) -> None:
        while True:
            await send(b"tick")
            await trio.sleep(1)

    application.stream = stream
    sent = await call(application, {"raw_path": b"/stream"}, body(b""), {"type": "http.disconnect"})
    assert all(message.get("more_body", True) for message in sent)


async def test_a_node_that_does_not_start_is_a_failed_lifespan(caplog: pytest.LogCaptureFixture) -> None:
    @contextlib.asynccontextmanager
    async def broken() -> AsyncIterator[Any]:
        raise RuntimeError("the data directory is locked")
        yield

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError(message)

    with pytest.raises(asgi.LifespanFailureError, match="locked"):
        await asgi.AsgiLaunch(broken)({"type": "lifespan"}, receive, send)
