"""Clients that hang up in the middle: what was held for them is given back."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.http_client import Blocking
from tests.chaos.server import Launch, Server, by_hypercorn, by_serve

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

CLIENTS = 40
BODY_PART_BYTES = 1 << 20
ALLOWED_GROWTH_BYTES = 60 << 20
"""What malloc may keep. Bodies alone that were not given back would be 40 MiB a round."""
AUTHORIZED = b"Host: a\r\nAuthorization: Bearer dev\r\n"


def long_poll(connection: socket.socket) -> None:
    connection.sendall(b"GET /broker/topics/t/0/records?from=latest&wait_ms=60000 HTTP/1.1\r\n" + AUTHORIZED + b"\r\n")


def tail(connection: socket.socket) -> None:
    head = b"GET /broker/topics/t/0/records HTTP/1.1\r\nAccept: text/event-stream\r\n"
    connection.sendall(head + AUTHORIZED + b"\r\n")
    assert b"200" in connection.recv(65536)


def upload(connection: socket.socket) -> None:
    head = b"POST /broker/topics/t/produce?partition=0 HTTP/1.1\r\nContent-Length: 8000000\r\n"
    connection.sendall(head + AUTHORIZED + b"\r\n" + bytes(BODY_PART_BYTES))


def download(connection: socket.socket) -> None:
    """Asks for pages and takes none."""
    request = b"GET /broker/topics/t/0/records?limit=1000 HTTP/1.1\r\n" + AUTHORIZED + b"\r\n"
    connection.sendall(request * 8)


@pytest.mark.parametrize("launch", [by_serve, by_hypercorn], ids=lambda launch: launch.name)
def test_a_client_that_hangs_up_frees_what_it_held(launch: Launch, tmp_path: Path) -> None:
    with Server(tmp_path, launch) as server:
        server.start()
        client = Blocking(server.port)
        client.post("/broker/topics/t/produce-ndjson?partition=0", b"\n".join([b"x" * 1000] * 1000))
        resident = _resident(client)
        grown = []
        for _ in range(3):
            for hold in (long_poll, tail, upload, download):
                _hold_and_hang_up(server, client, hold)
            grown.append(_resident(client) - resident)
        assert grown[2] < ALLOWED_GROWTH_BYTES, grown
        assert client.get("/broker/topics/t/0/records?limit=1")["high_watermark"] == 1000  # no half of a body is a record


def _hold_and_hang_up(server: Server, client: Blocking, hold: Callable[[socket.socket], None]) -> None:
    with contextlib.ExitStack() as connections:
        for _ in range(CLIENTS):
            hold(connections.enter_context(client.open()))
        _wait(lambda: client.metric("ayder_http_active_connections") >= CLIENTS, f"{hold.__name__}: the clients are there")
        if hold is upload:
            _wait(lambda: client.metric("ayder_http_bodies_in_flight_bytes") > 0, "the bodies are counted")
    for name, most in (("http_active_connections", 2), ("http_bodies_in_flight_bytes", 0), ("stream_subscribers", 0)):
        _wait(lambda name=name, most=most: client.metric(f"ayder_{name}") <= most, f"{hold.__name__}: {name} returns")  # type: ignore[misc]
    assert server.running


def _resident(client: Blocking) -> float:
    """Of the process that serves (hypercorn's is a child)."""
    return client.metric("process_resident_memory_bytes")


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
