"""Who belongs to the cluster and who leads it, over HTTP, on three nodes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ayder.http.schemas import REPLIES
from tests.http.in_process import Client
from tests.http.test_openapi import matches
from tests.http.three_nodes import Cluster, name_of, three_nodes, until

RECORDS = "/broker/topics/t/0/records?consistency=local"


async def members(client: Client) -> Any:
    return (await client.get("/ha/membership"))["membership"]


async def change(cluster: Cluster, what: str, name: str) -> Any:
    reply = await cluster.leader.post(f"/ha/membership/{what}", {"node_id": name})
    assert matches(REPLIES["MembershipChanged"], reply, REPLIES)
    return reply


async def test_everybody_says_who_belongs_and_who_leads() -> None:
    async with three_nodes() as cluster:
        leader = name_of(cluster.leader)
        for client in cluster.clients.values():
            said = await members(client)
            assert (said["node_count"], said["voters_old_mask"], said["voters_new_mask"], said["learners_mask"]) == (3, 7, 7, 0)
            assert (said["joint_active"], said["epoch"]) == (False, 1)
            assert [node["node_id"] for node in said["nodes"]] == ["n1", "n2", "n3"]
            assert [node["node_id"] for node in said["nodes"] if node["is_leader"]] == [leader]
            host, port = said["nodes"][0]["advertise_addr"].split(":")
            assert said["nodes"][0]["http_addr"] == f"{host}:{int(port) + 1}"


async def test_a_follower_goes_and_comes_back_as_learner_then_as_voter(tmp_path: Path) -> None:
    async with three_nodes(tmp_path) as cluster:
        gone = name_of(cluster.followers[0])
        bit = 1 << ("n1", "n2", "n3").index(gone)
        assert await change(cluster, "remove", gone) == {"ok": True, "node_id": gone, "removed": True}
        assert await change(cluster, "remove", gone) == {"ok": True, "node_id": gone, "removed": True}
        said = await members(cluster.leader)
        assert (said["voters_new_mask"], said["voters_old_mask"]) == (7 - bit, 7 - bit) and said["epoch"] > 1
        await cluster.leader.produce("t", b"without it")
        assert (await cluster.leader.post("/broker/topics/t/produce?ack=all", b"x"))["ack"]["voters"] == 2

        added = await change(cluster, "add", gone)
        assert (added["role"], added["index"]) == ("learner", ("n1", "n2", "n3").index(gone))
        assert await change(cluster, "add", gone) == added
        assert (await members(cluster.leader))["learners_mask"] == bit
        assert (await cluster.leader.post("/broker/topics/t/produce?ack=all", b"y"))["ack"]["voters"] == 2
        promoted = await change(cluster, "promote", gone)
        assert promoted == {"ok": True, "node_id": gone, "role": "voter"}
        assert await change(cluster, "promote", gone) == promoted
        assert (await cluster.leader.post("/broker/topics/t/produce?ack=all", b"z"))["ack"]["copies"] == 3
        await cluster.settle()
        page = await cluster.clients[gone].get(f"{RECORDS}&limit=10")
        assert page["high_watermark"] >= 1


async def test_a_node_whose_disk_was_replaced_comes_back_with_everything(tmp_path: Path) -> None:
    async with three_nodes(tmp_path) as cluster:
        await cluster.leader.produce("t", b"before")
        gone = name_of(cluster.followers[0])
        await change(cluster, "remove", gone)
        await cluster.stop(gone)
        shutil.rmtree(tmp_path / gone)
        await cluster.start(gone)
        await change(cluster, "add", gone)
        await change(cluster, "promote", gone)
        receipt = await cluster.leader.post("/broker/topics/t/produce?ack=all&partition=0", b"after")
        assert receipt["ack"]["copies"] == 3
        await cluster.settle()
        page = await cluster.clients[gone].get(RECORDS)
        assert [message["value"] for message in page["messages"]] == ["before", "after"]


async def test_the_leader_removes_itself_and_another_leads() -> None:
    async with three_nodes() as cluster:
        first = name_of(cluster.leader)
        assert (await change(cluster, "remove", first))["removed"] is True
        await until(lambda: not cluster.clients[first].node.driver.ready)
        left = [client for name, client in cluster.clients.items() if name != first]
        await until(lambda: any(client.node.driver.ready for client in left))
        leader = next(client for client in left if client.node.driver.ready)
        await leader.produce("t", b"x")
        assert first not in leader.node.driver.consensus.voters


async def test_a_node_that_starts_again_knows_the_newest_membership(tmp_path: Path) -> None:
    """H-13: the predecessor forgot who belonged when all stopped. From the log, and from a checkpoint once the log is cut."""
    async with three_nodes(tmp_path, storage__segment_bytes=65536, storage__preallocate_bytes=0) as cluster:
        gone = name_of(cluster.followers[0])
        await change(cluster, "remove", gone)
        await cluster.stop(gone)
        kept = sorted(cluster.clients)
        epoch = (await members(cluster.leader))["epoch"]
        for written in (0, 40):
            for number in range(written):
                await cluster.leader.produce("t", b"%03d" % number + b"x" * 8000)
            await cluster.settle()
            if written:
                await cluster.leader.node.cleaner.seal_ended()
            for name in kept:
                await cluster.stop(name)
            for name in kept:
                await cluster.start(name)
            await cluster.settle()
            for client in cluster.clients.values():
                assert list(client.node.driver.consensus.voters) == kept
                assert (await members(client))["epoch"] == epoch
            begun_at = [client.node.driver.consensus.membership_index for client in cluster.clients.values()]
            assert (max(begun_at) > epoch) == bool(written), "the second time, the change lies behind a checkpoint"
        assert (await cluster.leader.post("/broker/topics/t/produce?ack=all", b"x"))["ack"]["voters"] == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/ha/membership/add", {"node_id": "n9"}, 400, "not_supported"),
        ("/ha/membership/add", {"node_id": "n9", "advertise_addr": "10.0.0.9:7000"}, 400, "not_supported"),
        ("/ha/membership/add", {"node_id": "n1", "advertise_addr": "10.0.0.9:7000"}, 400, "invalid_request"),
        ("/ha/membership/add", {"node_id": "n1", "http_addr": "10.0.0.9:7000"}, 400, "invalid_request"),
        ("/ha/membership/add", {}, 400, "missing_fields"),
        ("/ha/membership/add", b"{", 400, "invalid_json"),
        ("/ha/membership/promote", {"node_id": "n9"}, 400, "invalid_request"),
        ("/ha/membership/remove", {"node_id": "n9"}, 400, "invalid_request"),
        ("/ha/membership/explode", {"node_id": "n1"}, 404, "not_found"),
        ("/ha/transfer", {"node_id": "n9"}, 400, "invalid_request"),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(path: str, body: object, status: int, error: str) -> None:
    async with three_nodes() as cluster:
        refused = await cluster.leader.post(path, body, ok=status)
        assert refused["error"] == error and refused["outcome"] == "not_applied"
        assert (await members(cluster.leader))["epoch"] == 1


async def test_one_change_at_a_time_and_a_learner_must_be_there_to_be_promoted() -> None:
    async with three_nodes(http__default_produce_timeout_ms=2000) as cluster:
        gone = name_of(cluster.followers[0])
        await change(cluster, "remove", gone)
        await cluster.stop(gone)
        await change(cluster, "add", gone)
        early = await cluster.leader.post("/ha/membership/promote", {"node_id": gone}, ok=409)
        assert (early["error"], early["outcome"]) == ("change_in_progress", "not_applied")
        assert gone not in cluster.leader.node.driver.consensus.voters


async def test_a_change_that_finds_no_majority_has_an_unknown_outcome_and_blocks_the_next() -> None:
    async with three_nodes(raft__election_timeout_ms=2000, http__default_produce_timeout_ms=200) as cluster:
        leader = cluster.leader
        for follower in list(cluster.followers):
            await cluster.stop(name_of(follower))
        name = next(name for name in ("n1", "n2", "n3") if name not in cluster.clients)
        late = await leader.post("/ha/membership/remove", {"node_id": name}, ok=504)
        assert (late["error"], late["outcome"]) == ("commit_timeout", "unknown")
        second = await leader.post("/ha/membership/remove", {"node_id": name_of(leader)}, ok=409)
        assert second["error"] == "change_in_progress"


@pytest.mark.parametrize("named", [True, False])
async def test_leadership_is_handed_over(named: bool) -> None:
    async with three_nodes() as cluster:
        first = cluster.leader
        target = name_of(cluster.followers[0])
        reply = await first.post("/ha/transfer", {"node_id": target} if named else b"")
        assert reply["node_id"] == target if named else reply["node_id"] != name_of(first)
        await cluster.settle()
        assert name_of(cluster.leader) == reply["node_id"]
        kept = await cluster.leader.post("/ha/transfer", {"node_id": reply["node_id"]})
        assert kept == {"ok": True, "node_id": reply["node_id"], "term": reply["term"]}


async def test_a_follower_sends_changes_to_the_leader() -> None:
    async with three_nodes() as cluster:
        follower = cluster.followers[0]
        for path, body in (("/ha/membership/remove", {"node_id": "n1"}), ("/ha/transfer", {})):
            sent = await follower.call("POST", path, body)
            assert (sent.status, sent.json()["error"]) == (307, "redirect_to_leader")
            member = cluster.leader.node.config.cluster.member(name_of(cluster.leader))
            assert member is not None and sent.headers[b"location"].decode() == member.client_url + path


def _value(text: str, name: str, labels: str = "") -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}{labels} ")]
    return float(line.rpartition(" ")[2])


async def test_metrics_say_how_each_node_stands() -> None:
    async with three_nodes() as cluster:
        await cluster.leader.produce("t", b"x")
        await cluster.settle()
        first, second = cluster.followers
        for path in ("/metrics", "/metrics_ha"):
            text = (await cluster.leader.call("GET", path, ok=200)).body.decode()
            last = cluster.leader.node.driver.consensus.last_index
            assert (_value(text, "ayder_raft_voters"), _value(text, "ayder_raft_joint")) == (3, 0)
            for follower in (first, second):
                labels = f'{{peer="{name_of(follower)}"}}'
                assert _value(text, "ayder_raft_peer_connected", labels) == 1
                assert 0 < _value(text, "ayder_raft_peer_match_index", labels) <= last
                assert _value(text, "ayder_raft_peer_sent_bytes_total", labels) > 0
                assert _value(text, "ayder_raft_peer_received_bytes_total", labels) > 0
        seen = (await first.call("GET", "/metrics_ha", ok=200)).body.decode()
        assert (_value(seen, "ramforge_ha_role"), _value(seen, "ramforge_ha_state")) == (1, 1)
        assert "ayder_raft_peer_match_index{" not in seen, "only the leader knows"
        await cluster.stop(name_of(first))
        for number in range(3):
            await cluster.leader.produce("t", b"%d" % number)
        text = (await cluster.leader.call("GET", "/metrics_ha", ok=200)).body.decode()
        assert _value(text, "ayder_raft_peer_lag_entries", f'{{peer="{name_of(first)}"}}') >= 3


async def test_a_learner_says_so_and_a_node_without_a_leader_is_not_ready() -> None:
    async with three_nodes() as cluster:
        learner = cluster.followers[0]
        await change(cluster, "remove", name_of(learner))
        await change(cluster, "add", name_of(learner))
        await until(lambda: name_of(learner) in learner.node.driver.consensus.membership.learners)
        assert "ramforge_ha_role 3.0" in (await learner.call("GET", "/metrics_ha", ok=200)).body.decode()
        assert (await learner.get("/ready"))["role"] == "follower"
        for client in list(cluster.clients.values()):
            if client is not learner:
                await cluster.stop(name_of(client))
        await until(lambda: learner.node.starting_reasons == ["no leader is known"])
        assert (await learner.get("/ready", ok=503))["role"] == "follower"


async def test_a_follower_is_ready_while_it_is_a_little_behind_and_not_when_it_is_far() -> None:
    """Under load there is always an entry that is committed and not applied here yet."""
    async with three_nodes() as cluster:
        node = cluster.followers[0].node
        applied = node.broker.applied_index
        node.broker.state.applied_index = applied - 50
        assert node.starting_reasons == []
        node.broker.state.applied_index = applied - 500
        assert node.starting_reasons == ["this follower is catching up"]
        node.broker.state.applied_index = applied
