"""What readers of old offsets cost producers: ``python -m tests.bench.cold_reads [--records 4000000] [--rates 5,20,0]``.

Measures: produce (one record a request, 64 connections) alone, with one and with two readers that page sequentially through old
offsets, at so many MB/s each (0: as fast as they can), in turn, several rounds; the loss of the medians in percent.

How: history as NDJSON of 1000 in another partition, far beyond all caches of the node; the kernel is asked to forget the files
before each run. Each reader fetches binary pages of 1 MiB in a process of its own. At full rate this is a test of the machine:
node, producers and readers share its processors, so what a reader's own process takes counts against the producers (its share is
printed).

Meaningless when: a line says FAILED; the runs alone differ by more than the loss.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.bench import wrk
from tests.bench.node import Node, fresh_directory, interpreter_line
from tests.bench.records import Loader, Pages


def read(port: int, start: int, mb_per_s: float, seconds: float) -> None:
    """The reader's process: prints what it read."""
    pages = Pages(port, "bench", 1)
    began = time.perf_counter()
    at, total = start, 0
    while (now := time.perf_counter()) < began + seconds:
        if mb_per_s and total / 1e6 > (now - began) * mb_per_s:
            time.sleep(0.002)
            continue
        page, at, end = pages.read(at)
        total += len(page)
        at = 0 if at >= end else at
    cpu = sum(os.times()[:2])
    print(f"    reader: {total / seconds / 1e6:,.0f} MB/s, {100 * cpu / seconds:.0f} % of a processor", flush=True)


def run(node: Node, readers: int, mb_per_s: float, seconds: float, records: int) -> wrk.Seen:
    """Producers, with so many readers."""
    node.forget_file_cache()
    words = [sys.executable, "-m", "tests.bench.cold_reads", "--reader", str(node.port), "--seconds", str(seconds + 0.5)]
    processes = [
        subprocess.Popen([*words, "--rates", str(mb_per_s), "--start", str(records * n // readers)]) for n in range(readers)
    ]
    time.sleep(0.3)
    seen = wrk.produce(node.url, connections=64, seconds=seconds)
    for process in processes:
        process.wait(timeout=60)
    return seen


def compare(node: Node, rate: float, options: argparse.Namespace) -> None:
    """Rounds of alone, one reader, two readers; prints the medians and the losses."""
    rounds = [[run(node, readers, rate, options.seconds, options.records) for readers in range(3)] for _ in range(options.rounds)]
    medians = [statistics.median(one[readers].requests_per_s for one in rounds) for readers in range(3)]
    pace = f"{rate:g} MB/s each" if rate else "as fast as can be"
    for readers, median in enumerate(medians):
        rates = ", ".join(f"{one[readers].requests_per_s:,.0f}" for one in rounds)
        failed = sum(one[readers].failed for one in rounds)
        loss = f"loss {100 * (1 - median / medians[0]):.1f} %" if readers else ""
        print(f"{readers} reader(s), {pace}: {median:,.0f} /s of {rates}  {loss}{'  FAILED' if failed else ''}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4_000_000)
    parser.add_argument("--rates", default="5,20,0", help="MB/s of each reader, 0: as fast as it can")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--reader", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        read(options.reader, options.start, float(options.rates), options.seconds)
        return
    print(interpreter_line(), flush=True)
    with fresh_directory(options.data_root) as directory, Node(directory) as node:
        node.create_topic("bench", 2)
        Loader(node.port, "bench", [1], lines=1000, connections=8).load(options.records)
        for rate in map(float, options.rates.split(",")):
            compare(node, rate, options)
        print(f"memory {node.rss_mb():.0f} MB, peak {node.peak_rss_mb():.0f} MB")


if __name__ == "__main__":
    main()
