"""A server as a process of its own: started, killed, stopped, and what it printed.

Owns: both launches, their command lines, the log files of each life. Must not know: HTTP, what clients do.

Standard output and error of every life go to ``life-N.out`` and ``life-N.err`` beside the data directory and are kept; a failed
test shows the newest. hypercorn runs its worker in a second process, so a launch is a process group and is killed as one.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import attrs

__all__ = ["SMALL", "Launch", "Server", "ServerDied", "by_hypercorn", "by_hypercorn_alone", "by_serve"]

START_S = 60.0
STOP_S = 30.0

SMALL = {
    "storage.segment_bytes": "65536",
    "storage.segment_blocks": "50",
    "storage.preallocate_bytes": "65536",
    "storage.reserve_bytes": "65536",
    "logging.level": "debug",
}
"""Segments so small that rolls, seals and checkpoints happen many times a second."""


class ServerDied(Exception):
    """The process ended before it served."""


@attrs.frozen
class Launch:
    """One way to start the node: the command, the environment, and the line that says where it listens."""

    name: str
    command: Callable[[Path, Mapping[str, str]], Sequence[str]]
    environment: Callable[[Path, Mapping[str, str]], dict[str, str]]
    url: re.Pattern[str]


def _serve_command(data: Path, settings: Mapping[str, str]) -> list[str]:
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "ayder", "serve", "--bind", "127.0.0.1:0", "--data", str(data), *flags]


def _hypercorn_command(_data: Path, _settings: Mapping[str, str]) -> list[str]:
    flags = ["--worker-class", "trio", "--bind", "127.0.0.1:0", "--graceful-timeout", "10"]
    return [sys.executable, "-m", "hypercorn", *flags, "ayder.http.asgi:app"]


def _one_process_command(data: Path, settings: Mapping[str, str]) -> list[str]:
    return [*_hypercorn_command(data, settings), "--workers", "0"]


def _hypercorn_environment(data: Path, settings: Mapping[str, str]) -> dict[str, str]:
    all_settings = {"storage.data_dir": str(data), "auth.insecure_dev": "true", **settings}
    return {f"AYDER_{name.upper().replace('.', '__')}": value for name, value in all_settings.items()}


by_serve = Launch("serve", _serve_command, lambda _data, _settings: {}, re.compile(r"listens on (http://\S+)"))
_RUNNING = re.compile(r"Running on (http://\S+)")
by_hypercorn = Launch("hypercorn", _hypercorn_command, _hypercorn_environment, _RUNNING)
by_hypercorn_alone = Launch("hypercorn-alone", _one_process_command, _hypercorn_environment, _RUNNING)
"""Without a parent process: that one answers 0 for a worker that failed (hypercorn 0.18)."""


class Server:
    """One data directory and the lives of the server on it. A context manager: nothing runs after it."""

    def __init__(self, directory: Path, launch: Launch = by_serve, **settings: object) -> None:
        """``settings``: ``section__key=value``, above ``SMALL``."""
        self.data = directory / "data"
        self.lives = 0
        self.url = ""
        self._directory = directory
        self._launch = launch
        self.node_id = str(settings.pop("raft__node_id", f"chaos-{secrets.token_hex(4)}"))
        """Its answers carry it: a port given up by a killed server may be another program's the next moment."""
        self._settings = (
            SMALL | {"raft.node_id": self.node_id} | {name.replace("__", "."): str(value) for name, value in settings.items()}
        )
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.kill()
        if kind is not None:
            print(f"--- standard error of life {self.lives}\n{self.stderr[-8000:]}")

    # -- life and death ---------------------------------------------------------------------------------------------
    def start(self, *, command: Sequence[str] | None = None, limit_file_bytes: int | None = None) -> str:
        """Start and wait until it says where it listens; returns the URL. Raises ``ServerDied``.

        ``command`` replaces the first words (the interpreter and its ``-m ayder``).
        """
        self.spawn(command=command, limit_file_bytes=limit_file_bytes)
        return self.wait_serving()

    def spawn(self, *, command: Sequence[str] | None = None, limit_file_bytes: int | None = None) -> None:
        """Start and do not wait."""
        assert not self.running
        self.lives += 1
        words = list(self._launch.command(self.data, self._settings))
        if command is not None:
            words[:3] = command
        if limit_file_bytes is not None:
            words[:0] = ["prlimit", f"--fsize={limit_file_bytes}:"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self._launch.environment(self.data, self._settings)
        with self._log("out").open("wb") as out, self._log("err").open("wb") as err:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )

    def wait_serving(self) -> str:
        """Until the process answers where it says it listens. Raises ``ServerDied``."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.answers():
                return self.url
            time.sleep(0.01)
        raise ServerDied(f"not serving after {START_S} s: {self.stderr}")

    def said_url(self) -> str:
        """The URL once the process printed it, else the empty string."""
        found = self._launch.url.search(self.stdout + self.stderr)
        self.url = found[1] if found else ""
        return self.url

    def answers(self) -> bool:
        """Whether it says where it listens and does (hypercorn says so a moment too early). Raises ``ServerDied``."""
        if not self.running:
            raise ServerDied(f"exit code {self.exit_code}: {self.stderr}")
        if not self.said_url():
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.headers["ayder-node"] == self.node_id)
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL, for all processes of the launch; returns when they are gone."""
        if self._process is None:
            return
        if self.running:
            self.signal(signal.SIGKILL, whole_group=True)
        self._process.wait()
        self._wait_unlocked()

    def _wait_unlocked(self) -> None:
        """hypercorn's worker is not our child: the lock tells when it is dead, too."""
        lock = self.data / "lock"
        deadline = time.monotonic() + STOP_S
        while lock.exists() and time.monotonic() < deadline:
            with lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(0.005)

    def terminate(self, seconds: float = STOP_S) -> int:
        """SIGTERM; returns the exit code. Raises ``subprocess.TimeoutExpired``."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def signal(self, number: signal.Signals, *, whole_group: bool = False) -> None:
        """Send a signal to the process, or to its group."""
        assert self._process is not None
        try:
            if whole_group:
                os.killpg(self._process.pid, number)
            else:
                os.kill(self._process.pid, number)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float = STOP_S) -> int:
        """Until it ended; returns the exit code. Raises ``subprocess.TimeoutExpired``."""
        assert self._process is not None
        return self._process.wait(seconds)

    # -- what can be seen from outside --------------------------------------------------------------------------------
    @property
    def running(self) -> bool:
        """Whether the process (for hypercorn: its first one) lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int:
        """Of the first process."""
        assert self._process is not None
        return self._process.pid

    @property
    def port(self) -> int:
        """Where this life listens."""
        return int(self.url.rpartition(":")[2])

    @property
    def stdout(self) -> str:
        """Of this life."""
        return self._log("out").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """Of this life."""
        return self._log("err").read_text(errors="replace")

    @property
    def all_stderr(self) -> str:
        """Of all lives, oldest first."""
        return "".join(self._log("err", life).read_text(errors="replace") for life in range(1, self.lives + 1))

    def _log(self, kind: str, life: int | None = None) -> Path:
        return self._directory / f"life-{life or self.lives}.{kind}"

    @property
    def segments(self) -> list[Path]:
        """Segment files, oldest first."""
        return sorted((self.data / "log").glob("seg-*.log"))

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted((self.data / "checkpoints").glob("checkpoint-*.ckp"))

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
