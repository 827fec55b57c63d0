"""Run the simulator for as long as you like: ``python -m tests.sim --seed N --minutes M [--mutants]``.

Seeds go up from N. A failing seed is printed with its knobs; ``--seed N --minutes 0`` runs that one again. ``--mutants``
breaks the code in every way of the list instead and says how many seeds each took.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import time
import zlib

import attrs

from tests.sim.mutants import MUTANTS, kill, stories_that_notice
from tests.sim.world import Failure, run_seed

CHUNK = 10


def seed_of_commit() -> int:
    """A start that is new with every commit, so that each run explores new ground."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return zlib.crc32(done.stdout.strip().encode()) if done.returncode == 0 else 0


def soak(first: int, minutes: float) -> int:
    """Seeds from ``first`` until the time is over; the number of failures."""
    began, seed, failures = time.perf_counter(), first, 0
    totals: collections.Counter[str] = collections.Counter()
    while True:
        try:
            for name, value in attrs.asdict(run_seed(seed)).items():
                totals[name] += value
        except Failure as failure:
            failures += 1
            print(f"FAILED {failure}", flush=True)
        seed += 1
        seconds = time.perf_counter() - began
        if seconds >= 60 * minutes:
            break
    hours, rate = totals["simulated_ms"] / 3_600_000, (seed - first) / seconds
    print(f"{seed - first} seeds from {first}, {failures} failed, {rate:.1f} a second, {hours:.3f} simulated hours")
    shown = ("events", "appends", "reads", "elections", "crashes", "damages", "snapshots", "changes")
    print(", ".join(f"{totals[name]} {name}" for name in shown))
    return failures


def hunt_mutants(seconds: float) -> int:
    """How many seeds every mutant takes, and which stories notice it; the number that nothing noticed."""
    escaped = 0
    for mutant in MUTANTS:
        began, seed, found = time.perf_counter(), 0, None
        while found is None and time.perf_counter() - began < seconds:
            found = kill(mutant, range(seed, seed + CHUNK))
            seed += CHUNK
        stories = stories_that_notice(mutant)
        escaped += found is None and not stories and not mutant.directed
        simulated = f"seed {found[0] + 1}" if found else f"none in {seed}"
        print(f"{mutant.name:50} {simulated:14} {', '.join(stories[:3]) or '-'} {mutant.directed}", flush=True)
    return escaped


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="first seed; by default it comes from the commit")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--mutant-seconds", type=float, default=20.0)
    options = parser.parse_args()
    if options.mutants:
        return hunt_mutants(options.mutant_seconds)
    return soak(seed_of_commit() if options.seed is None else options.seed, options.minutes)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
