"""Defects of the predecessor that concern the whole process of one node, each by its number in the list this project began with.

Others stand beside what they are about: storage (D-9 … D-13, D-19) in tests/storage and tests/chaos, broker and pages (D-7, D-16,
D-20 … D-22, D-26, D-33 … D-36) in tests/core and tests/http. Here a real server is spoken to over real sockets, byte for byte.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.server import Server

AUTH = b"Authorization: Bearer dev\r\n"
SLOW_SYNC = """
import os, sys, time
from ayder.storage import files
def slow(fd):
    if os.path.exists(sys.argv[1] + "/slow"):
        time.sleep(0.8)
    os.fdatasync(fd)
files.RealFiles.fdatasync = staticmethod(slow)
from ayder.__main__ import main
sys.exit(main(sys.argv[2:]))
"""

OLD_FLAG = "import sys; from ayder.__main__ import main; sys.exit(main([*sys.argv[2:], '--aof', sys.argv[1]]))"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as running:
        running.start()
        yield running


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def request(method: str, target: str, body: bytes = b"", extra: bytes = b"") -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n".encode()
    return head + AUTH + extra + b"\r\n" + body


def read_answers(sock: socket.socket, count: int) -> list[tuple[int, bytes, dict[str, str]]]:
    """That many answers with Content-Length: (status, body, headers)."""
    answers, data = [], b""
    while len(answers) < count:
        while b"\r\n\r\n" not in data:
            data += _more(sock)
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        while len(data) < length:
            data += _more(sock)
        answers.append((int(lines[0].split()[1]), data[:length], headers))
        data = data[length:]
    assert not data, "bytes behind the last answer"
    return answers


def _more(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    assert data, "the server hung up"
    return data


def call(server: Server, method: str, target: str, body: bytes = b"") -> tuple[int, Any]:
    with connect(server) as sock:
        sock.sendall(request(method, target, body))
        [(status, answer, _)] = read_answers(sock, 1)
    return status, json.loads(answer) if answer else None


def test_d1_every_connection_sees_the_same_topics_records_and_floors(server: Server) -> None:
    assert call(server, "POST", "/broker/topics", b'{"name":"shared","partitions":3}')[0] == 200
    for number in range(20):
        status, receipt = call(server, "POST", f"/broker/topics/shared/produce?partition={number % 3}", b"%d" % number)
        assert (status, receipt["offset"]) == (200, number // 3)
    assert call(server, "POST", "/broker/delete-before", b'{"topic":"shared","partition":0,"before_offset":2}')[0] == 200
    seen = {tuple(m["value"] for m in call(server, "GET", "/broker/consume/shared/g/0")[1]["messages"]) for _ in range(40)}
    assert seen == {("6", "9", "12", "15", "18")}


def test_d18_a_restart_adds_next_to_nothing_and_small_records_are_not_padded(server: Server) -> None:
    lines = b"\n".join(b"{%062d}" % number for number in range(1000))
    assert call(server, "POST", "/broker/topics/small/produce-ndjson?partition=0", lines)[1]["count"] == 1000
    assert call(server, "POST", "/admin/compact")[0] == 200
    grown = _metric(server, "ayder_log_bytes")
    assert 64_000 < grown < 64_000 * 1.2, "64 bytes of record cost at most 20 % more on disk, not 512"
    for _ in range(3):
        assert server.terminate() == 0
        server.start()
    assert _metric(server, "ayder_log_bytes") - grown < 3 * 400


def _metric(server: Server, name: str) -> float:
    with connect(server) as sock:
        sock.sendall(request("GET", "/metrics"))
        [(_, text, _)] = read_answers(sock, 1)
    return next(float(line.split()[1]) for line in text.decode().splitlines() if line.startswith(name + " "))


def test_d24_a_slow_disk_delays_nobody_but_those_who_wait_for_it(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        server.start(command=[sys.executable, "-c", SLOW_SYNC, str(tmp_path)])
        assert call(server, "POST", "/broker/topics/t/produce?partition=0", b"x")[0] == 200
        (tmp_path / "slow").touch()
        with connect(server) as waiting:
            waiting.sendall(request("POST", "/broker/topics/t/produce?partition=0&timeout_ms=5000", b"y"))
            delays = []
            for _ in range(20):
                started = time.perf_counter()
                assert call(server, "GET", "/health")[0] == 200
                delays.append(time.perf_counter() - started)
            [(status, answer, _)] = read_answers(waiting, 1)
        assert (status, json.loads(answer)["durable"]) == (200, True)
        assert sum(delays) < 0.8, f"twenty health checks together took longer than the one sync: {delays}"


def test_d25_pipelined_requests_are_all_answered_in_order(server: Server) -> None:
    call(server, "POST", "/broker/topics", b'{"name":"pipe","partitions":1}')
    with connect(server) as sock:
        sock.sendall(b"".join(request("POST", "/broker/topics/pipe/produce", b"%d" % n) for n in range(3)))
        offsets = [json.loads(body)["offset"] for _, body, _ in read_answers(sock, 3)]
    assert offsets == [0, 1, 2]
    assert [m["value"] for m in call(server, "GET", "/broker/consume/pipe/g/0")[1]["messages"]] == ["0", "1", "2"]


def test_d28_a_browser_may_ask_first_without_a_token_and_only_configured_origins_get_in(tmp_path: Path) -> None:
    with Server(tmp_path, http__cors_origins='["https://console.example"]') as server:
        server.start()
        for origin, allowed in ((b"https://console.example", True), (b"https://evil.example", False)):
            extra = b"Origin: " + origin + b"\r\nAccess-Control-Request-Method: POST\r\n"
            with connect(server) as sock:
                sock.sendall(request("OPTIONS", "/broker/topics/t/produce", extra=extra))
                [(status, _, headers)] = read_answers(sock, 1)
                assert status == 204
                assert ("access-control-allow-origin" in headers) is allowed
                sock.sendall(request("GET", "/health", extra=b"Origin: " + origin + b"\r\n"))
                [(_, _, headers)] = read_answers(sock, 1)
            assert headers.get("access-control-allow-origin") == (origin.decode() if allowed else None)


def test_d23_a_body_that_comes_in_many_pieces_is_stored_as_it_was_sent(server: Server) -> None:
    value = bytes(range(256)) * 300
    whole = request("POST", "/broker/topics/pieces/produce?partition=0", value)
    with connect(server) as sock:
        for at in range(0, len(whole), 7001):
            sock.sendall(whole[at : at + 7001])
            time.sleep(0.001)
        assert read_answers(sock, 1)[0][0] == 200
        extra = b"Accept: application/octet-stream\r\n"
        sock.sendall(request("GET", "/broker/topics/pieces/0/records?offset=0", extra=extra))
        [(_, page, _)] = read_answers(sock, 1)
    assert page.endswith(value)


def test_d43_a_chunked_request_in_one_segment_is_answered(server: Server) -> None:
    head = b"POST /broker/topics/chunky/produce?partition=0 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" + AUTH
    with connect(server) as sock:
        sock.sendall(head + b"\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
        assert read_answers(sock, 1)[0][0] == 200
    assert call(server, "GET", "/broker/consume/chunky/g/0")[1]["messages"][0]["value"] == "hello world"


def test_d44_a_malformed_request_gets_one_whole_answer_and_the_connection_closes(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nbroken header\r\n\r\n")
        [(status, body, headers)] = read_answers(sock, 1)
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(body)["outcome"] == "not_applied"
        assert sock.recv(1) == b""


@pytest.mark.parametrize("mode", ["never", "always"])
def test_d42_the_old_aof_flags_neither_crash_nor_refuse_writes(tmp_path: Path, mode: str) -> None:
    with Server(tmp_path) as server:
        server.start(command=[sys.executable, "-c", OLD_FLAG, mode])
        assert call(server, "POST", "/broker/topics/t/produce?partition=0", b"x")[0] == 200
        commit = b'{"topic":"t","group":"g","partition":0,"offset":0}'
        assert call(server, "POST", "/broker/commit", commit)[1]["ok"] is True
