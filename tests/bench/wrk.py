"""wrk, the load generator (Debian's package ``wrk``), and what it saw.

Owns: the command line and the environment of ``load.lua``. Must not know: what a figure is for. wrk takes about half a
processor for 50,000 requests/s, on the same machine as the node: figures are of both together.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import attrs

__all__ = ["Seen", "consume", "fire", "ndjson", "produce", "start"]

LUA = Path(__file__).with_name("load.lua")
VALUE = "x" * 64
LINE = '{"v":"' + "x" * 56 + '"}'


@attrs.frozen
class Seen:
    """Figures of one run; latencies are those of whole requests."""

    requests_per_s: float
    records_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    mb_per_s: float
    failed: int

    def __str__(self) -> str:
        unit = "/s" if self.records_per_s == self.requests_per_s else "records/s"
        failed = f"  FAILED {self.failed}" if self.failed else ""
        latency = f"p50 {self.p50_ms:.2f} ms  p99 {self.p99_ms:.2f} ms  max {self.max_ms:.0f} ms"
        return f"{self.records_per_s:>11,.0f} {unit}  {latency}  {self.mb_per_s:.0f} MB/s{failed}"


class Run:
    """wrk while it runs."""

    def __init__(self, url: str, targets: Sequence[str], connections: int, seconds: float, environment: dict[str, str]) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".targets", delete=False) as file:
            file.write("\n".join(targets) + "\n")
        self._targets = Path(file.name)
        self._limit_s = seconds + 30
        environment = os.environ | environment | {"TARGETS": file.name}
        words = ["wrk", "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s", "--timeout", "10s", "-s", str(LUA), url]
        self._process = subprocess.Popen(
            words,
            env=os.environ | environment | {"TARGETS": file.name},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def result(self) -> Seen:
        """Wait for the end. Raises ``RuntimeError`` when wrk printed no figures."""
        try:
            output, _ = self._process.communicate(timeout=self._limit_s)
        finally:
            self._process.kill()
            self._targets.unlink(missing_ok=True)
        found = [line for line in output.splitlines() if line.startswith("{")]
        if not found:
            raise RuntimeError(f"wrk: {output}")
        return Seen(**json.loads(found[-1]))


def start(url: str, targets: Sequence[str], *, connections: int, seconds: float, **environment: object) -> Run:
    """Begin to send ``targets`` in turn; ``environment`` in capitals as ``load.lua`` says."""
    return Run(url, targets, connections, seconds, {name: str(value) for name, value in environment.items()})


def fire(url: str, targets: Sequence[str], *, connections: int, seconds: float, **environment: object) -> Seen:
    """The same, to its end."""
    return start(url, targets, connections=connections, seconds=seconds, **environment).result()


def produce(url: str, *, connections: int, seconds: float, topic: str = "bench", partition: int = 0) -> Seen:
    """One record of 64 bytes a request."""
    target = f"/broker/topics/{topic}/produce?partition={partition}"
    return fire(url, [target], connections=connections, seconds=seconds, METHOD="POST", BODY_LINE=VALUE)


def ndjson(url: str, *, lines: int, connections: int, seconds: float, topic: str = "bench", partition: int = 0) -> Seen:
    """``lines`` records of 64 bytes a request."""
    target = f"/broker/topics/{topic}/produce-ndjson?partition={partition}"
    body = {"BODY_LINE": LINE, "LINES": lines, "PER_REQUEST": lines}
    return fire(url, [target], connections=connections, seconds=seconds, METHOD="POST", **body)


def consume(url: str, targets: Sequence[str], *, records: int, connections: int, seconds: float, accept: str = "") -> Seen:
    """Pages of ``records`` records (every target must have as many)."""
    return fire(url, targets, connections=connections, seconds=seconds, PER_REQUEST=records, ACCEPT=accept)
