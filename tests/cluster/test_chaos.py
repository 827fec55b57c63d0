"""A cluster under load and faults, in short. The long form is ``python -m tests.cluster --minutes M``."""

import time
from pathlib import Path

import pytest

from tests.cluster.chaos import SHORT, run_chaos


@pytest.mark.chaos
@pytest.mark.slow
def test_a_cluster_keeps_its_word_whatever_happens_to_a_minority(tmp_path: Path) -> None:
    """L1 … L14 over all nodes, R-1; kills, pauses, partitions."""
    seed = time.time_ns() % 1_000_000  # another one each time; the history in tmp_path is what a failure is studied with
    findings = run_chaos(tmp_path, seed=seed, faults=SHORT)
    print(f"seed {seed}: {findings}")
    assert findings.anomalies == []
    assert set(findings.faults) == set(SHORT)
    findings.check_worth()
