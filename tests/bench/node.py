"""A node to measure: a fresh data directory, a process, its memory and processor time.

Owns: starting, killing and removing what a benchmark needs. Must not know: what is measured.

The data directory is made under ``--data-root`` (default ``./data``) because a figure that includes fdatasync says something
about the disk the directory is on; a RAM disk makes every durable figure meaningless. ``BENCH_SYNC_MS`` adds so many
milliseconds to each sync (``slow_disk.py``), to see what a slower disk would leave of a figure.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

__all__ = ["AUTH", "Node", "free_port", "fresh_directory", "interpreter_line"]

AUTH = {"Authorization": "Bearer dev"}
START_S = 120.0


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def interpreter_line() -> str:
    """What a figure must be quoted with: interpreter, kernel, processors, load before the run."""
    uname, load = os.uname(), os.getloadavg()[0]
    slow = os.environ.get("BENCH_SYNC_MS")
    python = f"CPython {sys.version.split()[0]} ({os.path.realpath(sys.executable)})"
    machine = f"Linux {uname.release}, {os.cpu_count()} processors, load {load:.2f} before"
    return ", ".join((python, machine, *([f"{slow} ms added to each sync"] if slow else [])))


@contextmanager
def fresh_directory(root: Path) -> Iterator[Path]:
    """A new directory below ``root``, gone afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=root))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Node:
    """One server process on a directory. A context manager: nothing runs after it. ``settings``: ``section__key=value``."""

    def __init__(self, directory: Path, *, hypercorn: bool = False, **settings: object) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.port = free_port()
        self._hypercorn = hypercorn
        self._settings = {name.replace("__", "."): str(value) for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        """``time.perf_counter`` just before the process was made."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    # -- life and death ---------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start and wait until ``/ready`` says 200."""
        self.spawn()
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                self.call("GET", "/ready")
                return
            except (OSError, RuntimeError):
                assert self._process is not None
                if self._process.poll() is not None:
                    raise RuntimeError(f"the node ended: {self.log}") from None
                time.sleep(0.02)
        raise RuntimeError(f"not serving after {START_S} s: {self.log}")

    def spawn(self) -> None:
        """Start and do not wait."""
        environment = dict(os.environ)
        with (self.directory / "node.log").open("ab") as log:
            self.started_at = time.perf_counter()
            self._process = subprocess.Popen(
                self._command(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _command(self, environment: dict[str, str]) -> list[str]:
        if self._hypercorn:
            settings = {"storage.data_dir": str(self.data), "auth.insecure_dev": "true", **self._settings}
            environment |= {f"AYDER_{name.upper().replace('.', '__')}": value for name, value in settings.items()}
            flags = ["--worker-class", "trio", "--bind", f"127.0.0.1:{self.port}", "ayder.http.asgi:app"]
            return [sys.executable, "-m", "hypercorn", *flags]
        slow = os.environ.get("BENCH_SYNC_MS")
        program = ["-m", "tests.bench.slow_disk", slow] if slow else ["-m", "ayder"]
        flags = [part for name, value in self._settings.items() for part in ("--set", f"{name}={value}")]
        return [sys.executable, *program, "serve", "--bind", f"127.0.0.1:{self.port}", "--data", str(self.data), *flags]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()

    # -- calls ------------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def call(self, method: str, target: str, body: bytes | None = None, **headers: str) -> tuple[bytes, dict[str, str]]:
        """One request on a connection of its own; body and headers of a 200. Raises ``OSError``, ``RuntimeError``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, target, body, AUTH | headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{method} {target}: {answer.status} {content[:300]!r}")
            return content, {name.lower(): value for name, value in answer.getheaders()}
        except http.client.HTTPException as error:
            raise ConnectionError(repr(error)) from error
        finally:
            connection.close()

    def create_topic(self, name: str, partitions: int, **more: Any) -> None:
        """Create a topic."""
        self.call("POST", "/broker/topics", json.dumps({"name": name, "partitions": partitions, **more}).encode())

    def end_offset(self, topic: str, partition: int = 0) -> int:
        """The offset the partition's next record will get."""
        described = json.loads(self.call("GET", f"/broker/topics/{topic}")[0])
        return int(described["partitions"][partition]["high_watermark"])

    # -- what it costs ----------------------------------------------------------------------------------------------
    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it printed."""
        return (self.directory / "node.log").read_text(errors="replace")[-4000:]

    def rss_mb(self) -> float:
        """Resident memory, megabytes (10^6)."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def peak_rss_mb(self) -> float:
        """The most it ever was since start, megabytes."""
        line = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    def cpu_s(self) -> float:
        """Processor seconds used so far, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def disk_mb(self) -> float:
        """Size of all its files, megabytes."""
        return sum(path.stat().st_size for path in self.data.rglob("*") if path.is_file()) / 1e6

    def forget_file_cache(self) -> None:
        """Ask the kernel to drop its copies of the log, so that the next reads come from the disk."""
        for path in (self.data / "log").glob("seg-*"):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
