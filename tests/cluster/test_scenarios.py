"""What the predecessor's cluster did wrong, done again: each as a test with ayder's result.

The numbers are those of the list of its defects. Processes, real sockets, real files; nothing is waited for longer than needed.
"""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.server import ServerDied
from tests.cluster.local import Cluster

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def produce(cluster: Cluster, values: list[str], topic: str = "t") -> list[int]:
    """One call a value, each acknowledged; returns the offsets."""
    offsets = []
    for value in values:
        reply = cluster.call("POST", f"/broker/topics/{topic}/produce?partition=0", value.encode())
        assert reply.status == 200 and reply.json["durable"] is True, reply
        offsets.append(reply.json["offset"])
    return offsets


def create(cluster: Cluster, topic: str = "t") -> None:
    """A topic of one partition."""
    reply = cluster.call("POST", "/broker/topics", json.dumps({"name": topic, "partitions": 1}).encode())
    assert reply.status == 200, reply


def linearizable(cluster: Cluster, topic: str = "t") -> list[str]:
    """Everything in the topic, as the leader serves it."""
    said = cluster.call("GET", f"/broker/topics/{topic}/0/records?offset=0&limit=10000").json
    return [message["value"] for message in said["messages"]]


def local(cluster: Cluster, name: str, topic: str = "t") -> list[str]:
    """Everything in the topic, as this node holds it."""
    said = cluster.client(name).get(f"/broker/topics/{topic}/0/records?offset=0&limit=10000&consistency=local")
    return [message["value"] for message in said["messages"]]


# -- H-1: terms and votes are remembered ----------------------------------------------------------------------------
def test_h1_terms_and_votes_survive_a_restart_of_all_nodes(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        votes: dict[tuple[str, int], set[str]] = {}
        newest_term = 0
        for _ in range(3):
            cluster.start()
            cluster.wait_leader()
            term = cluster.wait_agreed().term
            assert term > newest_term, "a term was used again after a restart"
            newest_term = term
            cluster.kill()
            for name in cluster.names:
                state = cluster.hard_state(name)
                assert state.term >= term, "a node forgot the term it had answered with"
                if state.voted_for is not None:
                    votes.setdefault((name, state.term), set()).add(state.voted_for)
        assert votes and all(len(candidates) == 1 for candidates in votes.values()), votes
        by_term = cluster.leaders_by_term()
        assert len(by_term) >= 3 and all(len(leaders) == 1 for leaders in by_term.values()), by_term


# -- H-2, H-11: what a majority acknowledged outlives its leader --------------------------------------------------------
def test_h2_a_stale_node_does_not_win_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.start()
        create(cluster)
        before = [f"before-{n}" for n in range(5)]
        produce(cluster, before)
        cluster.wait_agreed()
        first = cluster.wait_leader()
        fresh, stale = (name for name in cluster.names if name != first)
        cluster.kill(stale)
        missed = [f"missed-{n}" for n in range(50)]
        produce(cluster, missed)
        cluster.kill(first)
        cluster.kill(fresh)
        cluster.election_timeouts_ms |= {stale: 500, fresh: 3000}  # the stale one asks for votes at least twice before the other
        cluster.start(stale, fresh)
        started = time.monotonic()
        assert cluster.wait_leader() == fresh
        assert time.monotonic() - started > 1.0, "the stale node had no time to ask"
        assert linearizable(cluster) == before + missed
        assert produce(cluster, ["after"]) == [len(before + missed)], "an offset was given twice"
        cluster.wait_agreed()
        assert local(cluster, stale) == [*before, *missed, "after"]
        cluster.start(first)
        cluster.wait_agreed()
        assert local(cluster, first) == [*before, *missed, "after"]
        assert all(len(leaders) == 1 for leaders in cluster.leaders_by_term().values())


# -- H-5: fail-over does not depend on history --------------------------------------------------------------------------
_WRITERS = 4


def fill(port: int, records: int, _writer: int) -> None:
    """One record a call, one call after the other, on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(records):
        connection.request("POST", "/broker/topics/t/produce?partition=0", b"x", {"Authorization": "Bearer dev"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    connection.close()


def fail_over_s(directory: Path, entries: int) -> float:
    """Seconds from the leader's SIGKILL to the next acknowledged write, on a log of this many records."""
    with Cluster(directory, storage__segment_bytes=8 << 20, storage__segment_blocks=20_000) as cluster:
        cluster.start()
        create(cluster)
        leader = cluster.wait_leader()
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(partial(fill, cluster.client_ports[leader], entries // _WRITERS), range(_WRITERS)))
        standing = cluster.wait_agreed()
        print(f"{entries} records are {standing.commit_index} entries of the log")
        assert standing.commit_index >= entries / _WRITERS, standing
        cluster.kill(leader)
        started = time.monotonic()
        produce(cluster, ["after"])
        return time.monotonic() - started


def test_h5_fail_over_takes_as_long_with_a_long_history(tmp_path: Path) -> None:
    """The predecessor: 42 s after 400 entries, growing with each."""
    short, long = fail_over_s(tmp_path / "short", 100), fail_over_s(tmp_path / "long", 20_000)
    print(f"fail-over after 100 records: {short:.2f} s, after 20,000: {long:.2f} s")
    assert long < 10 * max(short, 1.0)


# -- H-6: a hole heals ----------------------------------------------------------------------------------------------
def test_h6_a_restart_of_all_nodes_heals_the_one_that_missed_writes(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.start()
        create(cluster)
        first = [f"all-{n}" for n in range(4)]
        produce(cluster, first)
        lagging = next(name for name in cluster.names if name != cluster.wait_leader())
        cluster.kill(lagging)
        second = [f"two-{n}" for n in range(3)]
        produce(cluster, second)
        cluster.kill()
        cluster.election_timeouts_ms |= dict.fromkeys(cluster.names, 3000) | {lagging: 500}
        cluster.start()
        cluster.wait_agreed()
        assert all(local(cluster, name) == first + second for name in cluster.names)
        for _ in range(5):  # and as the leader, which it becomes because it is the quickest
            leader = cluster.wait_leader()
            if leader == lagging:
                break
            cluster.kill(leader)
            cluster.wait_leader()
            cluster.start(leader)
            cluster.wait_agreed()
        assert cluster.wait_leader() == lagging
        assert linearizable(cluster) == first + second


# -- H-7: committed offsets are replicated --------------------------------------------------------------------------
def test_h7_committed_offsets_outlive_the_leader(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.start()
        create(cluster)
        produce(cluster, [f"m-{n}" for n in range(5)])
        leader = cluster.wait_leader()
        follower = next(name for name in cluster.names if name != leader)
        body = json.dumps({"topic": "t", "group": "g", "partition": 0, "offset": 2}).encode()
        reply = cluster.client(follower).request("POST", "/broker/commit", body)
        assert reply.status == 307, "a follower took a commit itself"
        reply = cluster.call("POST", "/broker/commit", body)
        assert reply.status == 200, reply
        cluster.kill(leader)
        page = cluster.call("GET", "/broker/consume/t/g/0").json
        assert page["committed_offset"] == 2
        assert [message["value"] for message in page["messages"]] == ["m-3", "m-4"]


# -- H-8, H-9, H-10, H-16: what is claimed, and what is not -------------------------------------------------------------
def test_h9_h10_what_was_acknowledged_is_on_a_majority_when_all_are_killed(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        for turn in range(3):
            cluster.start()
            if not turn:
                create(cluster)
            mark = f"acknowledged-in-turn-{turn}"
            produce(cluster, [mark])
            cluster.kill()
            holders = cluster.holders(mark.encode())
            assert len(holders) >= 2, holders
        cluster.start()
        assert linearizable(cluster) == [f"acknowledged-in-turn-{turn}" for turn in range(3)]


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_h8_h16_without_followers_nothing_is_claimed(tmp_path: Path, how: str) -> None:
    """503 before the log, 504 with an unknown outcome after; never success."""
    with Cluster(tmp_path) as cluster:
        cluster.start()
        create(cluster)
        produce(cluster, ["kept"])
        leader = cluster.wait_leader()
        followers = [name for name in cluster.names if name != leader]
        client = cluster.client(leader)
        cluster.kill(*followers) if how == "killed" else cluster.pause(*followers)
        answers = []
        for n in range(6):
            reply = client.request("POST", "/broker/topics/t/produce?partition=0&timeout_ms=400", b"lonely-%d" % n)
            answers.append((reply.status, reply.json.get("error"), reply.json.get("outcome")))
            time.sleep(0.25)
        reads = client.request("GET", "/broker/topics/t/0/records?offset=0")
        assert reads.status == 503 and reads.json["error"] in ("no_quorum", "not_leader"), reads
        body = json.dumps({"name": "lonely", "partitions": 1}).encode()
        assert client.request("POST", "/broker/topics", body).status in (503, 504)
        assert answers[0] == (504, "commit_timeout", "unknown"), answers
        assert answers[-1] == (503, "no_quorum", "not_applied"), answers
        assert all(status in (503, 504) and (status == 504) == (what == "unknown") for status, _, what in answers), answers
        cluster.start(*followers) if how == "killed" else cluster.resume(*followers)
        cluster.wait_leader()
        refused = {f"lonely-{n}" for n, (status, _, _) in enumerate(answers) if status == 503}
        after = linearizable(cluster)
        assert after[0] == "kept" and not refused & set(after), (after, answers)
        cluster.wait_agreed()
        assert all(local(cluster, name) == linearizable(cluster) for name in cluster.names)


# -- H-14: a node that is not in its own list -----------------------------------------------------------------------
def test_h14_a_misconfigured_node_does_not_run_alone(tmp_path: Path) -> None:
    with (
        Cluster(tmp_path, raft__node_id="n9") as cluster,
        pytest.raises(ServerDied, match=r"exit code [1-9].*n9.*cluster\.nodes"),
    ):
        cluster.start("n1")
