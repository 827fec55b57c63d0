"""Restart after SIGKILL with a long history: ``python -m tests.bench.restart [--records 8000000]``.

Measures: seconds from process start to the first record served, by a client that connects again and again; how long until all
offsets were read; memory after start, and at 64 connections that produce and consume. How: 8M numbered records of 64 bytes over
4 partitions (most as NDJSON of 1000, some by single-record requests, of one connection and of 64), SIGKILL while 64 connections
produce, start, read, then every partition is paged from the log start to the end: offsets must be dense, and every acknowledged
record must stand at its offset with its bytes. Once with the files in the kernel's cache, once after it was asked to forget them.

Meaningless when: the check at the end does not say that every record was found; the machine is not quiet.
"""

from __future__ import annotations

import argparse
import bisect
import socket
import time
from pathlib import Path

from tests.bench import wrk
from tests.bench.node import Node, fresh_directory, interpreter_line
from tests.bench.records import Batch, Loader, Pages, line

PARTITIONS = 4


def fill(node: Node, records: int) -> list[Batch]:
    """The history."""
    node.create_topic("bench", PARTITIONS)
    few, some = min(records // 100, 5000), min(records // 50, 100_000)
    acknowledged = []
    sent = 0
    rest = records - records // 2 - few - some
    for count, lines, connections in ((records // 2, 1000, 8), (few, 1, 1), (some, 1, 64), (rest, 1000, 8)):
        loader = Loader(node.port, "bench", range(PARTITIONS), lines=lines, connections=connections)
        began = time.perf_counter()
        loader.load(count, first=sent)
        seconds = time.perf_counter() - began
        print(
            f"  {count:,} records, {lines} a request, {connections} connections: {seconds:.1f} s (the client is Python)",
            flush=True,
        )
        sent += count
        acknowledged += loader.acknowledged
    return acknowledged


def kill_under_load(node: Node) -> None:
    """SIGKILL while 64 connections produce."""
    target = "/broker/topics/bench/produce?partition=0"
    load = wrk.start(node.url, [target], connections=64, seconds=3, METHOD="POST", BODY_LINE=wrk.VALUE)
    time.sleep(1.5)
    node.kill()
    load.result()


def first_record(node: Node, offset: int) -> float:
    """Start the node; seconds until a record was read whole."""
    target = f"/broker/topics/bench/0/records?offset={offset}&limit=1"
    request = f"GET {target} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer dev\r\n\r\n".encode()
    node.spawn()
    while time.perf_counter() < node.started_at + 120:
        try:
            with socket.create_connection(("127.0.0.1", node.port), timeout=60) as sock:
                sock.sendall(request)
                answer = sock.recv(65536)
            if answer.startswith(b"HTTP/1.1 200") and b'"value":' in answer:
                return time.perf_counter() - node.started_at
        except ConnectionError:
            pass
        time.sleep(0.002)
    raise RuntimeError(f"no record within 120 s: {node.log}")


def check(node: Node, acknowledged: list[Batch]) -> None:
    """Read everything; raises ``RuntimeError`` on a gap or a wrong byte."""
    began = time.perf_counter()
    total = matched = 0
    for partition in range(PARTITIONS):
        batches = sorted((b for b in acknowledged if b.partition == partition), key=lambda b: b.offset)
        starts = [batch.offset for batch in batches]
        pages = Pages(node.port, "bench", partition)
        at, end = 0, 1
        while at < end:
            page, following, end = pages.read(at)
            for offset, value in pages.values(page):
                if offset != at:
                    raise RuntimeError(f"partition {partition}: offset {offset} where {at} belongs")
                batch = batches[max(bisect.bisect_right(starts, offset) - 1, 0)]
                if batch.offset <= offset < batch.offset + batch.count:
                    matched += 1
                    if value != line(batch.number + offset - batch.offset):
                        raise RuntimeError(f"partition {partition}: offset {offset} holds {value!r}")
                at += 1
            if at != following:
                raise RuntimeError(f"partition {partition}: the page says {following}, it ends at {at}")
        total += at
    wanted = sum(batch.count for batch in acknowledged)
    if matched != wanted:
        raise RuntimeError(f"{wanted:,} acknowledged, {matched:,} found")
    seconds = time.perf_counter() - began
    print(f"  every offset read in {seconds:.0f} s (client Python): {total:,} records, all {wanted:,} acknowledged ones as sent")


def memory(node: Node) -> None:
    """At 64 connections: half produce, half read random old pages."""
    print(f"  memory after reading all: {node.rss_mb():.0f} MB, peak {node.peak_rss_mb():.0f} MB")
    end = node.end_offset("bench")
    old = [f"/broker/topics/bench/0/records?limit=100&offset={end * n // 997}" for n in range(997)]
    target = "/broker/topics/bench/produce?partition=0"
    producers = wrk.start(node.url, [target], connections=32, seconds=5, METHOD="POST", BODY_LINE=wrk.VALUE)
    readers = wrk.start(node.url, old, connections=32, seconds=5, PER_REQUEST=100)
    time.sleep(4)
    print(f"  memory at 64 connections (half produce, half read old pages): {node.rss_mb():.0f} MB", flush=True)
    print(f"  producers {producers.result()}\n  readers   {readers.result()}\n  peak {node.peak_rss_mb():.0f} MB", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=8_000_000)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    options = parser.parse_args()
    print(interpreter_line(), flush=True)
    with fresh_directory(options.data_root) as directory, Node(directory) as node:
        acknowledged = fill(node, options.records)
        print(f"  log {node.disk_mb():,.0f} MB, memory {node.rss_mb():.0f} MB, peak {node.peak_rss_mb():.0f} MB", flush=True)
        kill_under_load(node)
        for what in ("files in the kernel's cache", "files forgotten by the kernel", "again"):
            if "forgotten" in what:
                node.forget_file_cache()
            for offset in (0, 1_000_000):
                seconds = first_record(node, min(offset, options.records // 10))
                print(
                    f"first record after {seconds:.2f} s ({what}, offset {offset:,}); memory {node.rss_mb():.0f} MB", flush=True
                )
                node.kill()
        node.start()
        check(node, acknowledged)
        memory(node)


if __name__ == "__main__":
    main()
