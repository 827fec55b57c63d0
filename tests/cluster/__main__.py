"""``python -m tests.cluster --minutes M``: a cluster under load and faults by chance for as long as wanted.

Prints one line a run of a minute; exits with 1 at the first anomaly and leaves the directory (history, data, logs) as it is.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.chaos import run_chaos

RUN_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--nodes", type=int, default=3, choices=(3, 5, 7))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--directory", type=Path, help="where data and histories go (default: a new temporary directory)")
    options = parser.parse_args()
    base = options.directory or Path(tempfile.mkdtemp(prefix="cluster-"))
    deadline = time.monotonic() + options.minutes * 60
    seed, records = options.seed, 0
    while (left := deadline - time.monotonic()) > 0:
        directory = base / f"seed-{seed}"
        directory.mkdir(parents=True)
        try:
            findings = run_chaos(directory, seed=seed, seconds=min(RUN_S, left), size=options.nodes, clients=options.clients)
        except BaseException:
            print(f"seed {seed} came to no end; kept: {directory}")
            raise
        records += findings.acknowledged_records
        print(f"seed {seed}: {findings}", flush=True)
        if findings.anomalies:
            print(f"{len(findings.anomalies)} anomalies; kept: {directory}")
            return 1
        shutil.rmtree(directory)
        seed += 1
    print(f"no anomaly; {records} acknowledged records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
