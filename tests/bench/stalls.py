"""The longest stall: ``python -m tests.bench.stalls [--only quiet,partitions,keys,more-keys,trims] [--seconds 15]``.

Measures: round trips of ``/health``, asked for every 5 ms on one connection by a process of its own, while one-record requests
come from 8 connections and (by small segments) a segment is sealed and the state checkpointed several times:

* quiet: no seal at all, what the machine and the load alone do to a round trip;
* partitions: 10,000 partitions;
* keys: one topic of 8 partitions whose idempotency windows are full (16,384 keys each), each request has a key;
* more-keys: 64 partitions, windows full: a million keys;
* trims: 10,000 partitions that keep two seconds, so that retention trims all of them again and again, and space is collected.

How: the node answers ``/health`` in its event loop, so a round trip cannot be shorter than what holds the loop. The time the
probe waited beyond its own schedule is not counted. Meaningless when: the quiet line shows stalls as long as the others do.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.bench import wrk
from tests.bench.node import Node, fresh_directory, interpreter_line

PROBE_S = 0.005
WINDOW = 16384


def probe(port: int, seconds: float) -> None:
    """The probe's process: prints round trips in milliseconds as a JSON list."""
    request = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    taken = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            sock.sendall(request)
            sock.recv(65536)
            took = time.perf_counter() - began
            taken.append(took * 1000)
            time.sleep(max(PROBE_S - took, 0))
    print(json.dumps(taken))


def measure(node: Node, targets: list[str], seconds: float, *, keyed: bool) -> None:
    """Load and probe; prints one line."""
    sealed = len(list((node.data / "log").glob("seg-*")))
    words = [sys.executable, "-m", "tests.bench.stalls", "--probe", str(node.port), "--seconds", str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    options = {"KEYED": "1"} if keyed else {}
    load = wrk.fire(node.url, targets, connections=8, seconds=seconds, METHOD="POST", BODY_LINE=wrk.VALUE, **options)
    taken = sorted(json.loads(process.communicate(timeout=seconds + 60)[0]))
    sealed = len(list((node.data / "log").glob("seg-*"))) - sealed
    sizes = [path.stat().st_size for path in (node.data / "checkpoints").glob("*.ckp")]
    p999, worst = taken[int(len(taken) * 0.999)], ", ".join(f"{one:.0f}" for one in taken[:-6:-1])
    over = sum(one > 20 for one in taken)
    most = f"p50 {taken[len(taken) // 2]:.1f} ms  p99.9 {p999:.0f} ms  worst {worst} ms"
    print(f"    probe {most}  over 20 ms: {over} of {len(taken):,}")
    checkpoint = f"checkpoint {max(sizes, default=0) / 1e6:.1f} MB"
    print(f"    load {load}; segments {sealed:+d}, {checkpoint}, memory {node.rss_mb():.0f} MB", flush=True)


def produce_targets(topics: int, partitions: int) -> list[str]:
    """To each partition of each topic in turn."""
    return [f"/broker/topics/bench-{t}/produce?partition={p}" for p in range(partitions) for t in range(topics)]


def fill_windows(node: Node, targets: list[str]) -> None:
    """Until every partition's window is full."""
    while node.end_offset("bench-0", len(targets) - 1) < WINDOW:
        wrk.fire(node.url, targets, connections=256, seconds=4, METHOD="POST", BODY_LINE=wrk.VALUE, KEYED="1")


def scenario(root: Path, name: str, seconds: float) -> None:
    """One line of the module's list."""
    topics, partitions = {"keys": (1, 8), "more-keys": (1, 64)}.get(name, (10, 1000))
    settings = {"storage__segment_blocks": 1 << 20, "storage__segment_bytes": 1 << 33} if name == "quiet" else {}
    with fresh_directory(root) as directory, Node(directory, **(settings or {"storage__segment_blocks": 4096})) as node:
        retention = {"retention": {"ttl_ms": 2000}} if name == "trims" else {}
        for topic in range(topics):
            node.create_topic(f"bench-{topic}", partitions, **retention)
        targets = produce_targets(topics, partitions)
        keyed = "keys" in name
        if keyed:
            fill_windows(node, targets)
        print(f"{name}: {topics * partitions:,} partitions{', windows full' if keyed else ''}", flush=True)
        measure(node, targets, seconds, keyed=keyed)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="quiet,partitions,keys,more-keys,trims")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--probe", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(options.probe, options.seconds)
        return
    print(interpreter_line(), flush=True)
    for name in options.only.split(","):
        scenario(options.data_root, name, options.seconds)


if __name__ == "__main__":
    main()
