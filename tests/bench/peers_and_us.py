"""Speed beside the peers, in one run: ``python -m tests.bench.peers_and_us [--seconds 5] [--only produce,batch,consume,health]``.

Measures: one record a request at 1, 16, 64, 256 connections against Redis Streams (``appendfsync always``) and etcd; NDJSON of
100 and 1000 against Redis in pipelines of 100; pages in base64 JSON and binary; ``/health`` by both launches.

How: each workload runs on a fresh node, then on the peers, then on the node again; the ratio is of our mean to the peer's
figure. All processes live on one machine, the idle ones cost next to nothing. Pages are read from a topic written by
single-record requests at 64 connections and from one written as NDJSON of 1000: what a page costs may depend on that.

Meaningless when: the data directory is on a RAM disk; anything else runs (see the load in the first line); a line says FAILED;
our two figures differ by more than a few percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.bench import wrk
from tests.bench.node import Node, fresh_directory, interpreter_line
from tests.bench.peers import Etcd, Redis, etcd, redis

BINARY = "application/octet-stream"
Measure = Callable[[], wrk.Seen]


def beside(what: str, ours: Measure, **peers: Measure | None) -> None:
    """Ours, the peers, ours again; prints figures and ratios."""
    first = ours()
    others = {name: measure() for name, measure in peers.items() if measure is not None}
    second = ours()
    print(f"\n{what}\n  ayder   {first}\n  ayder   {second}")
    mean = (first.records_per_s + second.records_per_s) / 2
    for name, seen in others.items():
        print(f"  {name:7} {seen}\n          ratio {mean / seen.records_per_s:.2f}", flush=True)


def measure_produce(node: Node, peer: Redis | None, other: Etcd | None, seconds: float) -> None:
    """One record a request."""
    for connections in (1, 16, 64, 256):
        beside(
            f"one record a request, {connections} connections",
            lambda c=connections: wrk.produce(node.url, connections=c, seconds=seconds),
            redis=peer and (lambda c=connections: peer.xadd(connections=c, seconds=seconds)),
            etcd=other and (lambda c=connections: other.put(connections=c, seconds=seconds)),
        )


def measure_batches(node: Node, peer: Redis | None, seconds: float) -> None:
    """NDJSON."""
    for lines in (100, 1000):
        beside(
            f"NDJSON of {lines}, 8 connections",
            lambda n=lines: wrk.ndjson(node.url, lines=n, connections=8, seconds=seconds),
            redis=peer and (lambda: peer.xadd(connections=8, seconds=seconds, pipeline=100)),
        )


def measure_consume(node: Node, seconds: float) -> None:
    """Pages, 8 connections, of records that are in memory after the first page."""
    for topic in ("singles", "batches"):
        node.create_topic(topic, 1)
    wrk.produce(node.url, connections=64, seconds=2, topic="singles")
    wrk.ndjson(node.url, lines=1000, connections=8, seconds=1, topic="batches")
    for topic in ("singles", "batches"):
        for limit, accept in ((100, ""), (1000, ""), (1000, BINARY), (10000, BINARY)):
            target = f"/broker/consume/{topic}/readers/0?offset=0&limit={limit}&encoding=b64"
            page, kind = node.call("GET", target, Accept=accept or "*/*")[1], "binary" if accept else "b64"
            if int(page.get("ayder-count", limit)) != limit:
                raise RuntimeError(f"a page of {limit} holds {page['ayder-count']}")
            seen = wrk.consume(node.url, [target], records=limit, connections=8, seconds=seconds, accept=accept)
            print(f"\nconsume {limit} {kind}, records of {topic}\n  ayder   {seen}", flush=True)


def measure_health(root: Path, node: Node, seconds: float) -> None:
    """The cheapest answer there is, 64 connections, by ``ayder serve`` and by hypercorn."""
    beside("/health, ayder serve", lambda: wrk.fire(node.url, ["/health"], connections=64, seconds=seconds))
    with fresh_directory(root) as directory, Node(directory, hypercorn=True) as launched:
        beside("/health, hypercorn's launch", lambda: wrk.fire(launched.url, ["/health"], connections=64, seconds=seconds))
        launched.create_topic("bench", 4)
        beside(
            "one record a request, 64 connections, hypercorn's launch",
            lambda: wrk.produce(launched.url, connections=64, seconds=seconds),
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", default="produce,batch,consume,health")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    options = parser.parse_args()
    only = set(options.only.split(","))
    print(interpreter_line(), flush=True)
    with ExitStack() as stack:
        directory = stack.enter_context(fresh_directory(options.data_root))
        node = stack.enter_context(Node(directory))
        node.create_topic("bench", 4)
        peer = None if options.no_peers else stack.enter_context(redis(directory))
        if "produce" in only:
            with etcd(directory) if not options.no_peers else ExitStack() as other:
                measure_produce(node, peer, None if options.no_peers else other, options.seconds)
        if "batch" in only:
            measure_batches(node, peer, options.seconds)
        if "consume" in only:
            measure_consume(node, options.seconds)
        if "health" in only:
            measure_health(options.data_root, node, options.seconds)
        memory = f"{node.rss_mb():.0f} MB (peak {node.peak_rss_mb():.0f} MB)"
        print(f"\nresident memory at the end: {memory}, log {node.disk_mb():,.0f} MB")


if __name__ == "__main__":
    main()
