"""Ends that are not SIGKILL: an ordinary stop under load, a second node on the same directory, a disk that cannot sync."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.chaos.checker import check
from tests.chaos.history import Completion, Receipt, Recorder
from tests.chaos.http_client import Blocking
from tests.chaos.server import Launch, Server, ServerDied, by_hypercorn, by_hypercorn_alone, by_serve
from tests.chaos.workload import Traffic, read_everything, set_up_topics

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

BOTH = pytest.mark.parametrize("launch", [by_serve, by_hypercorn], ids=lambda launch: launch.name)
EXIT_CODES = pytest.mark.parametrize("launch", [by_serve, by_hypercorn_alone], ids=lambda launch: launch.name)
FAILING_SYNC = """
import os, sys
TRIGGER = {trigger!r}
from ayder.__main__ import main
from ayder.storage.files import RealFiles

def fdatasync(fd):
    if os.path.exists(TRIGGER):
        raise OSError(5, "Input/output error")
    os.fdatasync(fd)

RealFiles.fdatasync = staticmethod(fdatasync)
sys.exit(main(sys.argv[1:]))
"""


@contextlib.asynccontextmanager
async def load(server: Server, directory: Path, clients: int = 10) -> AsyncIterator[Traffic]:
    """A started server under traffic until the block ends; then everything is read and judged."""
    with contextlib.closing(Recorder(directory / "history.jsonl")) as recorder:
        traffic = Traffic(recorder, time.time_ns() % 1_000_000, server.node_id)
        traffic.server_serves(server.port)
        await set_up_topics(traffic)
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(traffic.client, number)
            yield traffic
            traffic.stopping = True
            nursery.cancel_scope.deadline = trio.current_time() + 30
        assert not nursery.cancel_scope.cancelled_caught
        await read_everything(traffic)
        assert check(recorder.events) == []


def acknowledged(recorder: Recorder) -> int:
    results = [event.result for event in recorder.events if isinstance(event, Completion)]
    return sum(isinstance(result, Receipt) for result in results)


# -- SIGTERM ----------------------------------------------------------------------------------------------------------
@BOTH
async def test_sigterm_under_load_is_a_clean_stop(launch: Launch, tmp_path: Path) -> None:
    """D-8: exit code 0 within the deadline, every answer was true, nothing acknowledged is lost."""
    with Server(tmp_path, launch) as server:
        server.start()
        async with load(server, tmp_path) as traffic:
            await trio.sleep(0.7)
            begun = time.monotonic()
            assert await trio.to_thread.run_sync(server.terminate) == 0
            assert time.monotonic() - begun < 12  # http.drain_timeout_ms and the final sync
            assert "Traceback" not in server.stderr
            traffic.server_dies()
            server.start()
            traffic.server_serves(server.port)
            await trio.sleep(0.2)
        assert acknowledged(traffic.recorder) > 100
        assert 500 not in traffic.statuses


@BOTH
def test_sigterm_ends_those_who_wait(launch: Launch, tmp_path: Path) -> None:
    """Idle connections, long-polls, tails and a body that does not come: none of them holds the node up."""
    with Server(tmp_path, launch) as server, contextlib.ExitStack() as connections:
        server.start()
        client = Blocking(server.port)
        client.post("/broker/topics/t/produce?partition=0", b"x")
        idle, poll, tail, upload = (connections.enter_context(client.open()) for _ in range(4))
        fields = b"Host: a\r\nAuthorization: Bearer dev\r\n"
        poll.sendall(b"GET /broker/topics/t/0/records?from=latest&wait_ms=60000 HTTP/1.1\r\n" + fields + b"\r\n")
        tail.sendall(b"GET /broker/topics/t/0/records HTTP/1.1\r\nAccept: text/event-stream\r\n" + fields + b"\r\n")
        upload.sendall(b"POST /broker/topics/t/produce HTTP/1.1\r\nContent-Length: 9\r\n" + fields + b"\r\nhalf")
        assert b"200" in tail.recv(65536)
        begun = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - begun < 12
        assert b"shutting_down" in until_the_end(tail)
        assert b'"messages":[]' in until_the_end(poll)
        assert until_the_end(idle) == b"" and b"HTTP/1.1 200" not in until_the_end(upload)


def until_the_end(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


# -- one node a directory -----------------------------------------------------------------------------------------------
@EXIT_CODES
def test_a_second_node_on_the_same_data_is_refused(launch: Launch, tmp_path: Path) -> None:
    """D-19."""
    node_id = "twins"
    with Server(tmp_path / "1", raft__node_id=node_id) as first, Server(tmp_path / "2", launch, raft__node_id=node_id) as second:
        first.start()
        Blocking(first.port).post("/broker/topics/t/produce?partition=0", b"mine")
        second.data = first.data
        with pytest.raises(ServerDied):
            second.start()
        assert second.wait() not in (0, None)
        assert f"is in use by process {first.pid}" in second.stderr
        assert Blocking(first.port).get("/broker/topics/t/0/records")["messages"][0]["value"] == "mine"
        first.kill()
        second.start()  # the lock went with its holder
        assert Blocking(second.port).get("/broker/topics/t/0/records")["messages"][0]["value"] == "mine"


def test_a_taken_port_is_said_in_words(tmp_path: Path) -> None:
    with Server(tmp_path / "one") as first:
        first.start()
        with Server(tmp_path / "two", http__port=first.port) as second, pytest.raises(ServerDied, match="is taken"):
            second.start()
        assert second.exit_code == 1


# -- a disk that cannot sync ----------------------------------------------------------------------------------------------
async def test_a_failed_sync_ends_the_process(tmp_path: Path) -> None:
    """S-2: no answer of success after it, exit code not 0, the restart serves everything acknowledged."""
    broken = tmp_path / "broken"
    with Server(tmp_path / "node") as server:
        server.start(command=_failing_sync(broken))
        async with load(server, tmp_path) as traffic:
            await trio.sleep(0.5)
            before = acknowledged(traffic.recorder)
            broken.touch()
            assert await trio.to_thread.run_sync(server.wait) == 1
            traffic.server_dies()
            assert "syncing" in server.stderr and "Input/output error" in server.stderr
            broken.unlink()
            server.start()
            traffic.server_serves(server.port)
            await trio.sleep(0.2)
        assert before > 50


def test_no_success_is_answered_once_syncs_fail(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with Server(tmp_path / "node") as server:
        server.start(command=_failing_sync(broken))
        client = Blocking(server.port)
        assert client.post("/broker/topics/t/produce?partition=0", b"kept")["offset"] == 0
        broken.touch()
        with contextlib.suppress(OSError):  # the connection may just end
            reply = client.request("POST", "/broker/topics/t/produce?partition=0", b"in doubt")
            assert reply.status in (500, 503, 504), reply
        assert server.wait() == 1
        broken.unlink()
        server.start()
        values = [one["value"] for one in Blocking(server.port).get("/broker/topics/t/0/records")["messages"]]
        assert values in (["kept"], ["kept", "in doubt"])


def _failing_sync(trigger: Path) -> list[str]:
    """An interpreter that runs the node with a disk whose syncs fail while ``trigger`` exists."""
    return [sys.executable, "-c", FAILING_SYNC.format(trigger=str(trigger))]
