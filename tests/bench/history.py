"""Cost must not grow with history: ``python -m tests.bench.history [--sizes 100000,1000000] [--partitions 1,100,10000]``.

Measures: produce (one record a request, 64 connections), pages of 100 at random old offsets and at the newest ones (8
connections), memory, at growing histories of one topic; then the same at growing numbers of partitions, requests going to each in
turn. How: a fresh node for each row; history loaded as NDJSON of 1000 and, for a tenth of it up to 200,000, by single-record
requests; 10,000 partitions are 10 topics of 1000.

Meaningless when: a line says FAILED; the machine is not quiet. Each produce run adds its own records to the history, which
matters for the first row only. With many partitions a block holds as many runs as requests, with one it holds one: that costs,
whatever the history.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from tests.bench import wrk
from tests.bench.node import Node, fresh_directory, interpreter_line
from tests.bench.records import Loader


def old_pages(end: int, limit: int, pages: int = 5000) -> list[str]:
    """Targets all over the history; the same ones in each run."""
    dice = random.Random(end)
    return [
        f"/broker/topics/bench-0/0/records?encoding=b64&limit={limit}&offset={dice.randrange(end - limit)}" for _ in range(pages)
    ]


def row(root: Path, seconds: float, *, records: int, partitions: int) -> None:
    """One history."""
    topics, each = max(partitions // 1000, 1), min(partitions, 1000)
    with fresh_directory(root) as directory, Node(directory) as node:
        for topic in range(topics):
            node.create_topic(f"bench-{topic}", each)
        singles = min(records // 10, 200_000)
        for count, lines, connections in ((records - singles, 1000, 8), (singles, 1, 64)):
            Loader(node.port, "bench-0", [0], lines=lines, connections=connections).load(count)
        print(f"\n{records:,} records before, {topics * each:,} partitions; log {node.disk_mb():,.0f} MB")
        end = node.end_offset("bench-0")
        targets = [f"/broker/topics/bench-{t}/produce?partition={p}" for p in range(each) for t in range(topics)]
        for _ in range(2):
            seen = wrk.fire(node.url, targets, connections=64, seconds=seconds, METHOD="POST", BODY_LINE=wrk.VALUE)
            print(f"  produce             {seen}", flush=True)
        seen = wrk.consume(node.url, old_pages(end, 100), records=100, connections=8, seconds=seconds)
        print(f"  pages of 100, old   {seen}")
        end = node.end_offset("bench-0")
        newest = f"/broker/topics/bench-0/0/records?encoding=b64&limit=100&offset={end - 100}"
        seen = wrk.consume(node.url, [newest], records=100, connections=8, seconds=seconds)
        print(f"  pages of 100, new   {seen}\n  memory {node.rss_mb():.0f} MB, peak {node.peak_rss_mb():.0f} MB", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100000,1000000,10000000")
    parser.add_argument("--partitions", default="1,100,10000")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    options = parser.parse_args()
    print(interpreter_line(), flush=True)
    for records in map(int, filter(None, options.sizes.split(","))):
        row(options.data_root, options.seconds, records=records, partitions=1)
    for partitions in map(int, filter(None, options.partitions.split(","))):
        row(options.data_root, options.seconds, records=100_000, partitions=partitions)


if __name__ == "__main__":
    main()
