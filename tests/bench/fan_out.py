"""SSE fan-out: ``python -m tests.bench.fan_out [--subscribers 500] [--rate 1000] [--seconds 10]``.

Measures: 500 subscribers of one partition while it takes 1,000 records/s, one a request: whether each got every record, once, in
order; the time from just before a producer sends a record until a subscriber has its last byte (p50, p99, max over all
records of all subscribers); processor time of the node.

How: three processes. A producer writes the clock (CLOCK_MONOTONIC, one for all processes of a machine) into each record. The
subscribers live in one process: the first to receive a byte of the stream writes it to a common copy, every other one is compared
with it, so completeness is byte by byte; the copy is parsed at the end.

Meaningless when: the client process is the bottleneck (its share of a processor is printed: near 100 % the latencies are its
own); the producers did not keep their rate (printed too).
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path

import trio

from tests.bench.node import Node, fresh_directory, interpreter_line

WARM_UP_S = 1.0
CONNECTIONS = 8
FIELDS = b" HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer dev\r\n"


# -- the producer process ------------------------------------------------------------------------------------------------
async def produce(port: int, rate: int, seconds: float) -> None:
    """``rate`` records/s in all, on a few connections; each sends on time even when its last answer is late (by a little)."""
    async with trio.open_nursery() as nursery:
        for n in range(CONNECTIONS):
            nursery.start_soon(_produce_one, port, rate, seconds, n)


async def _produce_one(port: int, rate: int, seconds: float, number: int) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    head = b"POST /broker/topics/bench/produce?partition=0" + FIELDS + b"Content-Length: 64\r\n\r\n"
    began = trio.current_time() + 0.1 + number / rate
    for turn in range(int(rate * seconds / CONNECTIONS)):
        await trio.sleep_until(began + turn * CONNECTIONS / rate)
        await stream.send_all(head + b"%020d" % time.monotonic_ns() + b"x" * 44)
        answer = bytes(await stream.receive_some(65536))
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"produce: {answer!r}")


# -- the subscribers -----------------------------------------------------------------------------------------------------
class Subscriber:
    """One stream: takes the chunked coding off, compares with the common copy, remembers when it had how much."""

    def __init__(self, port: int, common: bytearray) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.sendall(b"GET /broker/topics/bench/0/records?offset=0" + FIELDS + b"Accept: text/event-stream\r\n\r\n")
        self._common = common
        self._raw = b""
        self._in_body = False
        self.position = 0
        self.arrivals: list[tuple[int, int]] = []
        """Time in ns, bytes of the stream received until then."""

    def receive(self) -> bool:
        """What is there now; False at the end of the stream."""
        data = self.sock.recv(1 << 18)
        now = time.monotonic_ns()
        self._raw += data
        if not self._in_body and not self._head():
            return bool(data)
        while (end := self._raw.find(b"\r\n")) >= 0:
            size = int(self._raw[:end], 16)
            if len(self._raw) < end + 4 + size:
                break
            self._take(self._raw[end + 2 : end + 2 + size])
            self._raw = self._raw[end + 4 + size :]
        self.arrivals.append((now, self.position))
        return bool(data)

    def _head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if found and not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"subscribe: {head!r}")
        if found:
            self._raw, self._in_body = rest, True
        return bool(found)

    def _take(self, piece: bytes) -> None:
        if piece.startswith(b":"):
            return
        known = self._common[self.position : self.position + len(piece)]
        if not piece.startswith(known):
            raise RuntimeError(f"two subscribers got different bytes at {self.position}: {piece[:200]!r}, {known[:200]!r}")
        self._common += piece[len(known) :]
        self.position += len(piece)


def watch(subscribers: list[Subscriber], producer: subprocess.Popen[bytes], grace_s: float) -> None:
    """Receive until the producer ended and everyone has what the fastest has."""
    selector = selectors.DefaultSelector()
    for one in subscribers:
        selector.register(one.sock, selectors.EVENT_READ, one)
    ended = 0.0
    while True:
        for key, _ in selector.select(0.1):
            if not key.data.receive():
                raise RuntimeError("a stream ended")
        if producer.poll() is not None:
            ended = ended or time.monotonic()
            if time.monotonic() > ended + grace_s:
                return


def report(subscribers: list[Subscriber], common: bytearray, wanted: int) -> None:
    """Completeness, latencies."""
    sent, ends, at = [], [], 0
    for event in bytes(common).split(b"\n\n"):
        at += len(event) + 2
        if event.startswith(b"id: "):
            name, _, data = event.partition(b"\ndata: ")
            if int(name[4:]) != len(sent):
                raise RuntimeError(f"event {name!r} where {len(sent)} belongs")
            sent.append(int(json.loads(data)["value"][:20]))
            ends.append(at)
    if len(sent) != wanted or any(one.position != len(common) for one in subscribers):
        short = sum(one.position != len(common) for one in subscribers)
        raise RuntimeError(f"{wanted} sent, {len(sent)} seen by the fastest; {short} subscribers have less")
    warm = min(sent) + int(WARM_UP_S * 1e9)
    histogram: dict[int, int] = {}
    for one in subscribers:
        before = 0
        for now, position in one.arrivals:
            upto = bisect.bisect_right(ends, position)
            for stamp in sent[before:upto]:
                if stamp >= warm:
                    late = (now - stamp) // 1_000_000
                    histogram[late] = histogram.get(late, 0) + 1
            before = upto
    total = sum(histogram.values())
    print(f"  {len(subscribers)} subscribers, each got all {wanted:,} records in order, byte by byte the same")
    print(f"  delivery p50 {_quantile(histogram, 0.5 * total)} ms  p99 {_quantile(histogram, 0.99 * total)} ms  "
          f"p99.9 {_quantile(histogram, 0.999 * total)} ms  max {max(histogram)} ms")  # fmt: skip
    took = (max(sent) - min(sent)) / 1e9
    print(f"  producers sent {wanted / took:,.0f} records/s; {len(subscribers) * wanted / took:,.0f} deliveries/s")


def _quantile(histogram: dict[int, int], count: float) -> int:
    seen = 0
    for late in sorted(histogram):
        seen += histogram[late]
        if seen >= count:
            return late + 1
    raise AssertionError


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subscribers", type=int, default=500)
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--producer", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.producer:
        trio.run(produce, options.producer, options.rate, options.seconds)
        return
    print(interpreter_line(), flush=True)
    with fresh_directory(options.data_root) as directory, Node(directory) as node:
        node.create_topic("bench", 1)
        common = bytearray()
        subscribers = [Subscriber(node.port, common) for _ in range(options.subscribers)]
        words = [sys.executable, "-m", "tests.bench.fan_out", "--producer", str(node.port)]
        began, node_cpu, own_cpu = time.perf_counter(), node.cpu_s(), sum(os.times()[:2])
        producer = subprocess.Popen([*words, "--rate", str(options.rate), "--seconds", str(options.seconds)])
        watch(subscribers, producer, grace_s=1)
        took = time.perf_counter() - began
        node_cpu, own_cpu = node.cpu_s() - node_cpu, sum(os.times()[:2]) - own_cpu
        report(subscribers, common, options.rate // CONNECTIONS * CONNECTIONS * int(options.seconds))
        shares = f"node {100 * node_cpu / took:.0f} %, subscribers' process {100 * own_cpu / took:.0f} %"
        print(f"  processor: {shares}; memory {node.rss_mb():.0f} MB")


if __name__ == "__main__":
    main()
