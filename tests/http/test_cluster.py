"""Who belongs to the cluster and who leads it, over HTTP, on three nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.http.in_process import Client
from tests.http.three_nodes import Cluster, name_of, three_nodes, until

RECORDS = "/broker/topics/t/0/records?consistency=local"


async def members(client: Client) -> Any:
    return (await client.get("/ha/membership"))["membership"]


async def change(cluster: Cluster, what: str, name: str) -> Any:
    return await cluster.leader.post(f"/ha/membership/{what}", {"node_id": name})


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
    async with three_nodes(http__default_produce_timeout_ms=600) as cluster:
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
