"""Slow clients under a clock of our own: every phase of a connection has an end."""

from collections.abc import AsyncIterator

import pytest
import trio

from ayder.config import HttpConfig
from ayder.http.exchange import Response
from ayder.http.front import Front
from tests.http.toy import Client, Toy

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
SLACK = 0.6  # two ticks of the reaper and a little


@pytest.fixture
async def client(autojump_clock: trio.testing.MockClock) -> AsyncIterator[Client]:
    # pytest-trio finds a clock among a test's own arguments only: each test below names it too.
    front = Front(Toy(), HttpConfig())
    async with trio.open_nursery() as nursery:
        await nursery.start(front.run)
        yield Client.open(front)
        nursery.cancel_scope.cancel()


async def seconds_until_ended(client: Client, at_most: float) -> float:
    started = trio.current_time()
    with trio.fail_after(at_most):
        while not client.ended:
            await trio.sleep(0.05)
    return trio.current_time() - started


async def test_a_head_has_five_seconds_whatever_drips_in(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"G")
    for byte in b"ET / HTTP":
        await trio.sleep(0.5)
        client.send(bytes([byte]))
    assert not client.ended
    assert await seconds_until_ended(client, 1 + SLACK) >= 0.3
    assert client.statuses() == [408]


async def test_a_blank_line_starts_no_clock_that_hangs(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"\r")
    assert await seconds_until_ended(client, 5 + SLACK) >= 5
    assert client.statuses() == [408]


async def test_a_head_behind_another_request_has_its_own_five_seconds(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    client.send(GET)
    await trio.sleep(10)
    client.send(GET + b"GET / HT")
    assert await seconds_until_ended(client, 5 + SLACK) >= 5
    assert client.statuses() == [200, 200, 408]


async def test_a_body_may_be_late_but_not_slow(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
    await trio.sleep(4)
    client.send(b"x" * 200)
    assert await seconds_until_ended(client, 2 + SLACK) >= 1
    assert client.statuses() == [408]
    assert client.front.held_body_bytes == 0


async def test_a_body_that_keeps_the_rate_has_a_minute(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.application.body_limit = 1 << 20
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(59):
        client.send(b"x" * 1100)
        await trio.sleep(1)
    assert not client.ended
    client.send(b"x" * 1100)
    assert await seconds_until_ended(client, 1 + SLACK) > 0.5
    assert client.statuses() == [408]


async def test_a_chunked_body_is_judged_too(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(20):
        if not client.ended:
            client.send(b"1\r\nx\r\n")
            await trio.sleep(0.3)
    assert client.statuses() == [408]


async def test_a_skipped_body_is_judged_too(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"POST /forbidden HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\n")
    assert client.statuses() == [403]
    assert await seconds_until_ended(client, 5 + SLACK) >= 5


async def test_an_idle_connection_is_closed_without_a_word(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(GET)
    assert await seconds_until_ended(client, 30 + SLACK) >= 30
    assert client.statuses() == [200]
    assert not client.front.connections


async def test_a_client_that_never_speaks_is_closed(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    assert await seconds_until_ended(client, 30 + SLACK) >= 30
    assert client.transport.output == b""


async def test_waiting_for_an_answer_is_not_idling(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"POST /later HTTP/1.1\r\nHost: a\r\n\r\n")
    await trio.sleep(100)
    assert not client.ended
    client.application.deferred[0].resolve(Response(200, b"done"))
    assert await seconds_until_ended(client, 30 + SLACK) >= 30
    assert client.statuses() == [200]


async def test_a_client_that_takes_nothing_is_cut_off(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.transport.room = 1000
    client.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
    assert client.connection.paused
    assert await seconds_until_ended(client, 10 + SLACK) >= 10
    assert client.transport.closed


async def test_a_client_that_takes_a_little_is_not(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.transport.room = 1000
    client.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n" + GET)
    for _ in range(5):
        await trio.sleep(9)
        client.transport.give_room(1000)
    assert not client.ended
    assert len(client.application.seen) == 1  # the next request waits for the slow reader
    client.transport.give_room(None)
    await trio.sleep(1)
    assert client.statuses() == [200, 200]


async def test_a_refused_client_may_linger_two_seconds(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"BAD\r\n\r\n")
    assert client.transport.shut
    await trio.sleep(1.9)
    assert not client.transport.closed
    await trio.sleep(SLACK)
    assert client.transport.closed


async def test_a_refused_client_may_not_send_for_ever(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    client.send(b"BAD\r\n\r\n")
    for _ in range(600):
        if not client.transport.closed:
            client.send(b"x" * 65536)
    assert client.transport.closed


async def test_draining_closes_idle_connections_and_answers_the_others(
    client: Client, autojump_clock: trio.testing.MockClock
) -> None:
    busy = Client.open(client.front)
    half = Client.open(client.front)
    busy.send(b"POST /later HTTP/1.1\r\nHost: a\r\n\r\n" * 2)
    half.send(b"GET / HTTP/1.1\r\n")
    client.front.drain()
    assert client.transport.closed
    assert not busy.ended
    for deferred in client.application.deferred:
        deferred.resolve(Response(200, b"done"))
    await trio.sleep(0.1)
    assert [answer.headers.get(b"connection") for answer in busy.answers()] == [None, b"close"]
    half.send(b"Host: a\r\n\r\n")
    assert [answer.headers.get(b"connection") for answer in half.answers()] == [b"close"]
    with trio.fail_after(5):
        await client.front.wait_until_empty()
