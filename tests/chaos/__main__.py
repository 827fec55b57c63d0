"""``python -m tests.chaos --minutes M``: the SIGKILL loop for as long as wanted, at both launches in turn.

Prints one line a run; exits with 1 at the first anomaly and leaves the directory (history, data, what the server said) as it is.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.server import by_hypercorn, by_serve
from tests.chaos.sigkill import run_sigkill_loop

RUN_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--directory", type=Path, help="where data and histories go (default: a new temporary directory)")
    options = parser.parse_args()
    base = options.directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    deadline = time.monotonic() + options.minutes * 60
    seed, records = options.seed, 0
    while (left := deadline - time.monotonic()) > 0:
        launch = (by_serve, by_hypercorn)[seed % 2]
        directory = base / f"{launch.name}-{seed}"
        findings = run_sigkill_loop(directory, launch, seed=seed, seconds=min(RUN_S, left), clients=options.clients)
        records += findings.acknowledged_records
        print(f"seed {seed} {launch.name}: {findings}", flush=True)
        if findings.anomalies:
            print(f"{len(findings.anomalies)} anomalies; kept: {directory}")
            return 1
        shutil.rmtree(directory)
        seed += 1
    print(f"no anomaly; {records} acknowledged records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
