"""Would the scenarios notice? Clusters with one mistake each, made on purpose, must be found out.

Two of the mistakes are the predecessor's: it voted for whoever asked (H-2), and called a write durable that only the leader had
(H-8). The third lets a leader answer reads without asking whether it still leads.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.server import ServerDied
from tests.cluster.chaos import run_chaos
from tests.cluster.local import Cluster
from tests.cluster.test_scenarios import (
    test_h2_a_stale_node_does_not_win_and_nothing_acknowledged_is_lost as stale_node_scenario,
)
from tests.cluster.test_scenarios import test_h8_h16_without_followers_nothing_is_claimed as lonely_leader_scenario
from tests.cluster.test_stale_leader import test_a_deposed_leader_tells_nothing_old as deposed_leader_scenario

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

VOTES_FOR_ANYBODY = """
from ayder.raft.raft_log import RaftLog
RaftLog.is_up_to_date = lambda self, last_index, last_term: True
"""
COMMITS_ALONE = """
import ayder.raft.membership as membership
membership.joint_committed_index = lambda incoming, outgoing, match_index: max(match_index.values())
"""
READS_UNASKED = """
from ayder.broker import Broker
async def no_barrier(self):
    pass
Broker.read_barrier = no_barrier
"""


def test_a_vote_without_a_look_at_the_log_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "mistake", VOTES_FOR_ANYBODY)
    with pytest.raises((AssertionError, TimeoutError, ServerDied)) as caught:
        stale_node_scenario(tmp_path)
    print(f"found out by {caught.value!r:.300}")


def test_a_commit_without_a_majority_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "mistake", COMMITS_ALONE)
    with pytest.raises(AssertionError, match="200"):
        lonely_leader_scenario(tmp_path, "killed")


async def test_a_read_without_a_round_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "mistake", READS_UNASKED)
    with pytest.raises(BaseExceptionGroup) as caught:
        await deposed_leader_scenario(tmp_path)
    assert caught.group_contains(AssertionError, match="/broker/groups/g: 200")


def test_the_history_of_commits_without_a_majority_is_condemned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the whole run: a leader that is cut off acknowledges what is gone when it comes back."""
    monkeypatch.setattr(Cluster, "mistake", COMMITS_ALONE)
    try:
        findings = run_chaos(tmp_path, seed=1, faults=("isolate leader", "isolate leader"), clients=4)
    except (AssertionError, TimeoutError, ServerDied, BaseExceptionGroup) as noticed:
        print(f"noticed before the end: {noticed!r:.300}")
    else:
        assert {"L1", "L2", "L3", "L7"} & {anomaly.code for anomaly in findings.anomalies}, findings
