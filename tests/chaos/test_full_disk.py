"""A disk without room, in real processes: a full tmpfs and a limit on the size of files.

D-12, D-13, S-9: writes are refused as surely not applied, reads and ``/health`` go on, ``/ready`` says why, nothing acknowledged
is lost, and with room again the node goes on, by itself or after a restart.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.http_client import Blocking
from tests.chaos.server import Server

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

PATIENCE_S = 10.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def value(n: int, size: int = 2000) -> bytes:
    return f"{n} ".encode() + b"x" * size


def fill(client: Blocking, acknowledged: list[bytes], *, size: int = 2000, most: int = 3000) -> None:
    """Produce until a write is refused for want of room."""
    for n in range(len(acknowledged), most):
        reply = client.request("POST", "/broker/topics/t/produce?partition=0", value(n, size))
        if reply.status != 200:
            assert (reply.status, reply.json["error"], reply.json["outcome"]) == (503, "storage_full", "not_applied"), reply
            assert "retry-after" in reply.headers
            return
        assert reply.json["offset"] == n
        acknowledged.append(value(n, size))
    raise AssertionError(f"{most} records found room")


def check_refusing(client: Blocking, acknowledged: list[bytes]) -> None:
    """Full: alive, readable, not ready, and refusals are true."""
    assert client.get("/health") == {"ok": 1}
    ready = client.request("GET", "/ready")
    assert ready.status == 503 and any("full" in reason for reason in ready.json["reasons"]), ready
    batch = b"\n".join(value(n) for n in range(20))
    for path, body in (("produce?partition=0", value(-1)), ("produce-ndjson?partition=0", batch)):
        reply = client.request("POST", f"/broker/topics/t/{path}", body)
        assert (reply.status, reply.json["outcome"]) == (503, "not_applied"), reply
    assert client.get("/health") == {"ok": 1}
    check_kept(client, acknowledged)


def check_kept(client: Blocking, acknowledged: list[bytes], start: int = 0) -> None:
    """Every acknowledged record is where it was said to be, and nothing else is there."""
    found: list[str] = []
    offset = start
    while True:
        page = client.get(f"/broker/topics/t/0/records?offset={offset}&limit=1000")
        found += [message["value"] for message in page["messages"]]
        offset = page["next_offset"]
        if offset >= page["high_watermark"]:
            break
    assert [one.encode() for one in found] == acknowledged[start:]


def wait_writable(client: Blocking, acknowledged: list[bytes]) -> None:
    """Until a write is taken again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        n = len(acknowledged)
        reply = client.request("POST", "/broker/topics/t/produce?partition=0&idempotency_key=after", value(n))
        if reply.status == 200:
            assert reply.json["offset"] == n and not reply.json["duplicate"], reply
            acknowledged.append(value(n))
            return
        assert (reply.status, reply.json["outcome"]) == (503, "not_applied"), reply
        assert time.monotonic() < deadline, reply
        time.sleep(0.1)


def test_a_full_disk_refuses_and_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    acknowledged: list[bytes] = []
    with Server(tmp_path / "node") as server:
        server.data = small_disk / "data"
        server.start()
        client = Blocking(server.port)
        fill(client, acknowledged)
        assert len(acknowledged) > 100
        check_refusing(client, acknowledged)
        assert server.running
        resize(small_disk, "4m")
        wait_writable(client, acknowledged)
        assert client.request("GET", "/ready").status == 200
        check_kept(client, acknowledged)
        server.kill()
        server.start()
        check_kept(Blocking(server.port), acknowledged)


def test_a_full_disk_survives_sigkill_and_restart(small_disk: Path, tmp_path: Path) -> None:
    """Full to the last byte, the ballast still holds a new term: the node starts, serves what it has, and refuses writes."""
    acknowledged: list[bytes] = []
    with Server(tmp_path / "node", http__port=free_port()) as server:
        server.data = small_disk / "data"
        server.start()
        client = Blocking(server.port)
        fill(client, acknowledged)
        server.kill()
        free = os.statvfs(small_disk)
        (small_disk / "somebody else's").write_bytes(bytes(free.f_bavail * free.f_bsize))
        server.start()
        check_kept(client, acknowledged)
        fill(client, acknowledged)  # the rest of the ballast
        assert client.get("/health") == {"ok": 1}
        ready = client.request("GET", "/ready")
        assert ready.status == 503 and any("full" in reason for reason in ready.json["reasons"]), ready
        check_kept(client, acknowledged)
        resize(small_disk, "4m")
        wait_writable(client, acknowledged)
        check_kept(client, acknowledged)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_deleting_makes_room_on_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """S-9: the ballast is there so that deletion works when nothing else does."""
    acknowledged: list[bytes] = []
    with Server(tmp_path / "node") as server:
        server.data = small_disk / "data"
        server.start()
        client = Blocking(server.port)
        fill(client, acknowledged)
        time.sleep(1.1)  # what was refused is tried again only now and then
        fill(client, acknowledged, size=0)  # so that not even a small entry finds room
        before = len(acknowledged) - 20
        deadline = time.monotonic() + PATIENCE_S
        while True:
            body = b'{"topic":"t","partition":0,"before_offset":%d}' % before
            reply = client.request("POST", "/broker/delete-before", body)
            if reply.status == 200:
                break
            assert reply.status == 503 and time.monotonic() < deadline, reply
            time.sleep(0.2)
        assert client.post("/admin/sealed/gc", {})["freed_bytes"] > 500_000
        wait_writable(client, acknowledged)
        check_kept(client, acknowledged, start=before)


def test_a_limit_on_file_size_is_a_full_disk(tmp_path: Path) -> None:
    """D-13: the write that meets the limit is short, then EFBIG."""
    acknowledged: list[bytes] = []
    with Server(tmp_path / "node") as server:
        server.start(limit_file_bytes=40_000)
        client = Blocking(server.port)
        fill(client, acknowledged)
        assert 5 < len(acknowledged) < 20
        check_refusing(client, acknowledged)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_writable(client, acknowledged)
        check_kept(client, acknowledged)
        server.kill()
        server.start()
        check_kept(Blocking(server.port), acknowledged)
