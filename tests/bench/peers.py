"""The peers: Redis Streams with ``appendfsync always``, and etcd as it comes (Debian: redis-server, redis-tools, etcd-server).

Owns: starting them in a directory of their own, their load. Must not know: ours. Every write of both is on disk before its
answer. redis-benchmark has one thread and is written in C, as wrk is; its protocol is cheaper to parse than HTTP.
"""

from __future__ import annotations

import base64
import csv
import io
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import wrk
from tests.bench.node import free_port

__all__ = ["Etcd", "Redis", "etcd", "redis"]


class Redis:
    """A running redis-server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._guess: dict[tuple[int, int], float] = {}

    def xadd(self, *, connections: int, seconds: float, pipeline: int = 1) -> wrk.Seen:
        """XADD of one 64-byte field, as many as take about ``seconds``."""
        key = (connections, pipeline)
        if key not in self._guess:
            self._guess[key] = self._run(connections, pipeline, 200 * connections * pipeline + 1000).requests_per_s
        seen = self._run(connections, pipeline, int(self._guess[key] * seconds))
        self._guess[key] = seen.requests_per_s
        return seen

    def _run(self, connections: int, pipeline: int, requests: int) -> wrk.Seen:
        words = [
            "redis-benchmark",
            "-p",
            str(self._port),
            "-c",
            str(connections),
            "-P",
            str(pipeline),
            "-n",
            str(requests),
            "--csv",
        ]
        done = subprocess.run([*words, "XADD", "s", "*", "v", wrk.VALUE], capture_output=True, text=True, check=True, timeout=120)
        row = list(csv.DictReader(io.StringIO(done.stdout)))[-1]
        rate = float(row["rps"])
        return wrk.Seen(
            rate, rate, float(row["p50_latency_ms"]), float(row["p99_latency_ms"]), float(row["max_latency_ms"]), 0, 0
        )


class Etcd:
    """A running etcd."""

    def __init__(self, url: str) -> None:
        self._url = url

    def put(self, *, connections: int, seconds: float) -> wrk.Seen:
        """Put of one 64-byte value through its JSON gateway, as curl would."""
        body = f'{{"key":"YmVuY2g=","value":"{base64.b64encode(wrk.VALUE.encode()).decode()}"}}'
        return wrk.fire(
            self._url, ["/v3/kv/put"], connections=connections, seconds=seconds, TOKEN="none", METHOD="POST", BODY_LINE=body
        )


@contextmanager
def redis(directory: Path) -> Iterator[Redis | None]:
    """Redis on ``directory``, or nothing when it is not installed."""
    if shutil.which("redis-server") is None or shutil.which("redis-benchmark") is None:
        yield None
        return
    port = free_port()
    flags = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--dir", str(directory)]
    with _process(["redis-server", "--port", str(port), "--bind", "127.0.0.1", *flags], directory / "redis.log"):
        time.sleep(1)
        yield Redis(port)


@contextmanager
def etcd(directory: Path) -> Iterator[Etcd | None]:
    """etcd on ``directory``, or nothing when it is not installed."""
    if shutil.which("etcd") is None:
        yield None
        return
    clients, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    flags = ["--listen-client-urls", clients, "--advertise-client-urls", clients, "--listen-peer-urls", peers]
    flags += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
    with _process(["etcd", "--data-dir", str(directory / "etcd"), *flags], directory / "etcd.log"):
        _wait_for(f"{clients}/health")
        yield Etcd(clients)


@contextmanager
def _process(words: list[str], log_path: Path) -> Iterator[None]:
    with log_path.open("wb") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
