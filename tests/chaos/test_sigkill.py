"""SIGKILL of a loaded server, again and again, at both launches. The long form is ``python -m tests.chaos --minutes M``."""

import time
from pathlib import Path

import pytest

from tests.chaos.server import Launch, by_hypercorn, by_serve
from tests.chaos.sigkill import run_sigkill_loop

ROUNDS = 10


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("launch", [by_serve, by_hypercorn], ids=lambda launch: launch.name)
def test_nothing_acknowledged_is_lost_to_sigkill(launch: Launch, tmp_path: Path) -> None:
    """D-7, D-8; L1 … L14 of one node."""
    seed = time.time_ns() % 1_000_000  # another one each time; the history in tmp_path is what a failure is studied with
    findings = run_sigkill_loop(tmp_path, launch, seed=seed, rounds=ROUNDS)
    print(f"seed {seed}: {findings}")
    assert findings.anomalies == []
    assert findings.lives > ROUNDS
    findings.check_worth()
