"""How far a write has come when it is answered, on three nodes; no answer says more (RELIABILITY 2.1, D-1)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from ayder.errors import ErrorCode
from ayder.pending import EveryCopy
from tests.http.three_nodes import Cluster, name_of, three_nodes, until, withhold_copies

PRODUCE = "/broker/topics/t/produce"


async def topic(cluster: Cluster, **fields: object) -> None:
    await cluster.leader.post("/broker/topics", {"name": "t", "partitions": 1, **fields})
    await cluster.settle()


async def test_a_majority_is_counted_not_assumed() -> None:
    async with three_nodes() as cluster:
        await topic(cluster)
        leader = cluster.leader
        receipt = await leader.post(f"{PRODUCE}?receipt=1", b"x")
        ack = receipt["ack"]
        assert (ack["level"], ack["voters"], ack["index"]) == ("majority", 3, receipt["batch_id"])
        assert 2 <= ack["copies"] <= 3
        await cluster.stop(name_of(cluster.followers[0]))
        ack = (await leader.post(f"{PRODUCE}?receipt=1", b"y"))["ack"]
        assert (ack["level"], ack["copies"], ack["voters"]) == ("majority", 2, 3)
        assert "ack" not in await leader.post(PRODUCE, b"z")


@pytest.mark.parametrize("path", ["produce", "produce-ndjson"])
async def test_every_copy_is_waited_for(path: str) -> None:
    async with three_nodes() as cluster:
        await topic(cluster)
        ack = (await cluster.leader.post(f"/broker/topics/t/{path}?ack=all", b"x"))["ack"]
        assert (ack["level"], ack["copies"], ack["voters"]) == ("all", 3, 3)


async def test_every_copy_is_asked_for_and_one_voter_is_down(tmp_path: Path) -> None:
    """The record stands, and the answer says so; an unknown outcome is all a status may promise."""
    async with three_nodes(tmp_path) as cluster:
        await topic(cluster, write_mode="sync-all")
        leader = cluster.leader
        assert (await leader.post(PRODUCE, b"0"))["ack"]["level"] == "all"
        gone = name_of(cluster.followers[0])
        await cluster.stop(gone)
        late = await leader.post(f"{PRODUCE}?timeout_ms=200", b"1", ok=504)
        assert (late["error"], late["outcome"]) == ("commit_timeout", "unknown")
        assert (late["committed"], late["replicas"]) == (True, "2/3")
        page = await leader.get("/broker/topics/t/0/records")
        assert [message["value"] for message in page["messages"]] == ["0", "1"]
        weaker = await leader.post(f"{PRODUCE}?ack=majority", b"2")
        assert (weaker["ack"]["level"], weaker["ack"]["copies"]) == ("majority", 2)
        await cluster.start(gone)
        assert (await leader.post(PRODUCE, b"3"))["ack"] == {
            "level": "all",
            "copies": 3,
            "voters": 3,
            "term": leader.node.driver.consensus.current_term,
            "index": leader.node.broker.applied_index,
        }


async def test_the_write_mode_of_the_cluster_holds_where_nothing_else_is_said() -> None:
    async with three_nodes(cluster__write_mode="sync-all") as cluster:
        await topic(cluster)
        assert (await cluster.leader.post(PRODUCE, b"x"))["ack"]["level"] == "all"


async def test_the_leaders_own_disk_is_enough_for_who_says_so() -> None:
    """Where no copy is confirmed only the weakest level is reached, and the answer says no more."""
    async with three_nodes() as cluster:
        await topic(cluster)
        leader = cluster.leader
        await leader.post(PRODUCE, b"0")
        for follower in cluster.followers:
            withhold_copies(follower.node)
        first = await leader.post(f"{PRODUCE}?ack=leader", b"1")
        assert first["ack"] == {
            "level": "leader",
            "durable": False,
            "committed": False,
            "offset_provisional": True,
            "copies": 1,
            "voters": 3,
            "term": leader.node.driver.consensus.current_term,
            "index": first["batch_id"],
        }
        assert (first["offset"], first["durable"]) == (1, False)
        batch = await leader.post("/broker/topics/t/produce-ndjson?ack=leader", b"2\n3")
        assert (batch["first_offset"], batch["count"]) == (2, 2)
        assert (await leader.post(f"{PRODUCE}?ack=leader", b"4"))["offset"] == 4
        assert leader.node.broker.topic("t").partitions[0].next_offset == 1, "readers see what is committed"
        late = await leader.post(f"{PRODUCE}?timeout_ms=100", b"5", ok=504)
        assert "committed" not in late


async def test_an_offset_that_cannot_be_foretold_is_told_at_the_commit() -> None:
    async with three_nodes() as cluster:
        await topic(cluster)
        keyed = await cluster.leader.post(f"{PRODUCE}?ack=leader&idempotency_key=k", b"x")
        assert keyed["ack"]["level"] == "majority" and "committed" not in keyed["ack"]
        again = await cluster.leader.post(f"{PRODUCE}?ack=leader&idempotency_key=k", b"x")
        assert (again["duplicate"], again["offset"]) == (True, keyed["offset"])


async def test_a_provisional_offset_is_the_offset_while_the_leader_leads() -> None:
    """Sixty at once, answered at different moments, some before their commit: each value lies where its receipt says."""
    async with three_nodes() as cluster:
        await topic(cluster)
        told: dict[str, int] = {}

        async def one(number: int) -> None:
            query = ("ack=leader", "ack=leader&key=k", "")[number % 3]
            told[str(number)] = (await cluster.leader.post(f"{PRODUCE}?{query}", b"%d" % number))["offset"]

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(one, number)
        await until(lambda: cluster.leader.node.broker.topic("t").partitions[0].next_offset == 60)
        page = await cluster.leader.get("/broker/topics/t/0/records?limit=100")
        assert {message["value"]: message["offset"] for message in page["messages"]} == told


async def test_who_waits_for_every_copy_is_told_once() -> None:
    told: list[tuple[str, bool]] = []
    waiting = EveryCopy()
    for index, deadline in ((5, 100), (3, 50), (4, 200), (9, 300)):
        waiting.add(index, deadline, lambda reached, index=index: told.append((str(index), reached)))  # type: ignore[misc]
    waiting.release(2)
    assert told == []
    waiting.release(3)
    waiting.expire(100)
    assert told == [("3", True), ("5", False)]
    waiting.release(4)
    waiting.give_up()
    waiting.give_up()
    assert told[2:] == [("4", True), ("9", False)] and not waiting


async def test_a_leader_that_loses_its_office_answers_who_waits_for_every_copy() -> None:
    async with three_nodes() as cluster:
        await topic(cluster)
        leader = cluster.leader
        await cluster.stop(name_of(cluster.followers[0]))
        answers = []

        async def ask() -> None:
            answers.append(await leader.post(f"{PRODUCE}?ack=all&timeout_ms=60000", b"x", ok=504))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: leader.node.broker.every_copy)
            await cluster.stop(name_of(cluster.followers[0]))
        assert answers[0]["error"] == ErrorCode.COMMIT_TIMEOUT.wire and answers[0]["committed"] is True
