"""A follower that calls the leader for its client, and what it says when it cannot."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from ayder.config import load_config
from ayder.errors import AyderError, ErrorCode
from ayder.http import forwarding
from ayder.http.exchange import Request
from ayder.http.forwarding import Forwarder
from tests.http.three_nodes import name_of, three_nodes

PRODUCE = "/broker/topics/t/produce?partition=0"


async def test_a_follower_answers_with_what_the_leader_said() -> None:
    async with three_nodes() as cluster:
        follower = cluster.followers[0]
        assert (await follower.call("POST", PRODUCE, b"x")).status == 307
        headers = {b"ayder-header-source": b"web", b"idempotency-key": b"k"}
        first = await follower.call("POST", PRODUCE + "&forward=1&receipt=1", b"value", headers=headers, ok=200)
        assert (first.json()["offset"], first.json()["ack"]["voters"]) == (0, 3)
        again = (await follower.call("POST", PRODUCE + "&forward=1", b"value", headers=headers, ok=200)).json()
        assert again["duplicate"] is True
        page = await follower.get("/broker/topics/t/0/records?forward=1")
        assert [message["value"] for message in page["messages"]] == ["value"]
        assert page["messages"][0]["headers"] == {"source": "web"}
        missing = await follower.call("GET", "/broker/topics/none/0/records?forward=1")
        assert (missing.status, missing.json()["error"]) == (404, "topic_not_found")
        names = [name for name in first.headers if name in (b"ayder-node", b"date", b"content-length", b"connection")]
        assert names == [], "this node's own front says these"


async def test_the_configuration_may_ask_for_it_and_a_request_may_not_want_it() -> None:
    async with three_nodes(cluster__forward=True) as cluster:
        follower = cluster.followers[0]
        assert (await follower.call("POST", PRODUCE, b"x")).status == 200
        assert (await follower.call("POST", PRODUCE + "&redirect=1", b"x")).status == 307
        assert (await follower.call("POST", PRODUCE + "&forward=0", b"x")).status == 307
        marked = await follower.call("POST", PRODUCE, b"x", headers={b"ayder-forwarded-by": b"n9"})
        assert marked.status == 307, "who was asked by a node answers by itself"
        tail = await follower.call("GET", "/broker/topics/t/0/records", headers={b"accept": b"text/event-stream"})
        assert (tail.status, tail.json()["error"]) == (503, "not_leader")
        token = await follower.call("POST", PRODUCE, b"x", headers={b"authorization": b"Bearer wrong"})
        assert token.status == 401
        assert name_of(follower) != name_of(cluster.leader)


def request(method: str = "POST", query: bytes = b"") -> Request:
    return Request(method, b"/x", query, {b"te": b"x", b"origin": b"http://o", b"accept": b"*/*"}, b"body")


def forwarder() -> Forwarder:
    return Forwarder(load_config({"storage.log": "memory", "http.default_produce_timeout_ms": "200"}, {}, None))


async def failing(method: str, serve: object, query: bytes = b"") -> AyderError:
    """What a call says when the other side does this with its connection."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        port = listener.socket.getsockname()[1]
        with pytest.raises(AyderError) as raised:
            await forwarder().call(request(method, query), f"http://127.0.0.1:{port}")
        nursery.cancel_scope.cancel()
    return raised.value


async def hang_up(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.aclose()


async def say_rubbish(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.send_all(b"rubbish\r\n\r\n")
    await stream.aclose()


async def stop_in_the_middle(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await stream.aclose()


async def say_too_much(stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 100)
    await stream.aclose()


@pytest.mark.parametrize("serve", [hang_up, say_rubbish, stop_in_the_middle, say_too_much])
async def test_a_leader_that_answers_badly_leaves_a_write_unknown(serve: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "MAX_ANSWER_BYTES", 50)
    assert (await failing("POST", serve)).code is ErrorCode.COMMIT_TIMEOUT
    assert (await failing("GET", serve)).code is ErrorCode.NO_QUORUM


async def test_a_leader_that_cannot_be_reached_did_surely_nothing() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    calls = forwarder()
    with pytest.raises(AyderError) as raised:
        await calls.call(request(), f"http://127.0.0.1:{port}")
    assert raised.value.code is ErrorCode.NO_QUORUM and calls.calls == 0


async def test_a_leader_that_says_nothing_is_waited_for_as_long_as_the_caller_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    calls, begun = forwarder(), trio.current_time()
    silent = trio.testing.memory_stream_pair()[0]

    @forwarding.asynccontextmanager
    async def connected(_url: str):  # type: ignore[no-untyped-def]
        yield silent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwarding, "_connected", connected)
        with pytest.raises(AyderError) as raised:
            await calls.call(request(query=b"timeout_ms=3000&wait_ms=500"), "http://leader")
    assert raised.value.code is ErrorCode.COMMIT_TIMEOUT
    assert trio.current_time() - begun == pytest.approx(4.5)


async def test_only_so_many_calls_at_once() -> None:
    calls = forwarder()
    calls.calls = forwarding.MAX_CALLS
    with pytest.raises(AyderError) as raised:
        await calls.call(request(), "http://127.0.0.1:1")
    assert raised.value.code is ErrorCode.OVERLOADED


def test_what_belongs_to_one_connection_is_not_sent_on() -> None:
    head, data, _ = forwarder()._events(request(query=b"a=1&b=%20"), "http://127.0.0.1:8001")
    names = [name for name, _ in head.headers]  # type: ignore[attr-defined]
    assert sorted(names) == [b"accept", b"ayder-forwarded-by", b"connection", b"content-length", b"host"]
    assert head.target == b"/x?a=1&b=%20" and data.data == b"body"  # type: ignore[attr-defined]
