"""Retention and delete-before over HTTP."""

import pytest
import trio
import trio.testing

from tests.http.in_process import Client, running


async def bounds(client: Client, topic: str = "t", partition: int = 0) -> tuple[int, int, int]:
    part = (await client.get(f"/broker/topics/{topic}"))["partitions"][partition]
    return part["log_start_offset"], part["high_watermark"], part["bytes"]


async def policy(client: Client, topic: str, partition: int = 0) -> tuple[int, int]:
    retention = (await client.get(f"/broker/topics/{topic}"))["partitions"][partition]["retention"]
    return retention["ttl_ms"], retention["max_bytes"]


def before(offset: int, **fields: object) -> dict[str, object]:
    return {"topic": "t", "partition": 0, "before_offset": offset, **fields}


# -- delete-before ------------------------------------------------------------------------------------------------
async def test_records_below_the_floor_go_and_are_counted_exactly() -> None:
    async with running() as client:
        await client.produce("t", *(b"x" * size for size in (1, 20, 300, 4000)))
        reply = await client.post("/broker/delete-before", before(3))
        assert reply == {"ok": True, "deleted_count": 3, "freed_bytes": 321, "log_start_offset": 3}
        assert await bounds(client) == (3, 4, 4000)
        page = await client.get("/broker/consume/t/g/0")
        assert [message["offset"] for message in page["messages"]] == [3] and page["log_start_offset"] == 3


async def test_a_floor_never_comes_down() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1", b"2")
        await client.post("/broker/delete-before", before(2))
        for offset in (0, 1, 2):
            reply = await client.post("/broker/delete-before", before(offset))
            assert (reply["deleted_count"], reply["freed_bytes"], reply["log_start_offset"]) == (0, 0, 2)
        assert await bounds(client) == (2, 3, 1)


async def test_everything_may_go_and_offsets_go_on() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        assert (await client.post("/broker/delete-before", before(2)))["freed_bytes"] == 2
        await client.produce("t", b"new")
        page = await client.get("/broker/topics/t/0/records")
        assert [(message["offset"], message["value"]) for message in page["messages"]] == [(2, "new")]


async def test_keys_count_as_bytes() -> None:
    async with running() as client:
        for key in ("aaaa", "bb"):
            await client.call("POST", f"/broker/topics/t/produce?partition=0&key={key}", b"123", ok=200)
        assert (await client.post("/broker/delete-before", before(1)))["freed_bytes"] == 7
        assert await bounds(client) == (1, 2, 5)


@pytest.mark.parametrize("offset", [3, 1 << 31, (1 << 63) - 1])
async def test_d34_a_floor_beyond_the_end_is_409_and_hides_nothing(offset: int) -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        refused = await client.post("/broker/delete-before", before(offset), ok=409)
        assert (refused["error"], refused["high_watermark"]) == ("offset_out_of_range", 2)
        await client.produce("t", b"2")
        assert await bounds(client) == (0, 3, 3)


@pytest.mark.parametrize(
    "body",
    [
        before(-1), before(1 << 63), before(1, partition=-1), before(1, partition=0.0), before(True), before("1"),  # type: ignore[arg-type]
        {"topic": "t", "partition": 0}, {"topic": "t", "before_offset": 1}, {"partition": 0, "before_offset": 1}, {}, [],
        before(1, force=True), before(1, topic=""), before(1, topic="*"), before(1, topic=None),
    ],
)  # fmt: skip
async def test_d34_a_malformed_floor_is_400_and_hides_nothing(body: object) -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        assert (await client.call("POST", "/broker/delete-before", body)).status == 400
        assert await bounds(client) == (0, 2, 2)


async def test_a_floor_where_nothing_is_is_404() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 2})
        assert (await client.post("/broker/delete-before", before(0, topic="none"), ok=404))["error"] == "topic_not_found"
        assert (await client.post("/broker/delete-before", before(0, partition=2), ok=404))["error"] == "partition_not_found"


# -- retention ----------------------------------------------------------------------------------------------------
async def test_the_reply_has_the_old_shape() -> None:
    async with running() as client:
        await client.produce("t", b"0")
        ask, size = "/broker/retention", "sealed_bytes_after"
        both = await client.post(ask, {"topic": "t", "ttl_ms": 3_600_000, "max_bytes": 100})
        assert both.pop(size) > 0 and both == {"ok": True, "ttl_applied": True, "size_applied": True}
        one = await client.post(ask, {"topic": "t", "ttl_ms": 0})
        assert (one["ttl_applied"], one["size_applied"]) == (True, False)
        none = await client.post(ask, {"topic": "t"})
        assert (none["ttl_applied"], none["size_applied"]) == (False, False)


async def test_d14_a_policy_set_in_part_keeps_the_rest_and_zero_switches_off() -> None:
    async with running() as client:
        await client.produce("t", b"0")
        await client.post("/broker/retention", {"topic": "t", "ttl_ms": 7_200_000, "max_bytes": 1000})
        await client.post("/broker/retention", {"topic": "t", "ttl_ms": 3_600_000})
        assert await policy(client, "t") == (3_600_000, 1000)
        await client.post("/broker/retention", {"topic": "t", "ttl_ms": 0})
        assert await policy(client, "t") == (0, 1000)


async def test_d21_numbers_have_64_bits() -> None:
    async with running() as client:
        await client.produce("t", b"0")
        large = (1 << 62) + 1
        await client.post("/broker/retention", {"topic": "t", "ttl_ms": large, "max_bytes": large})
        assert await policy(client, "t") == (large, large)
        assert await bounds(client) == (0, 1, 1)


@pytest.mark.parametrize("everyone", [{}, {"topic": ""}, {"topic": "*"}, {"topic": None}])
async def test_a_default_holds_for_topics_that_say_nothing_now_and_later(everyone: dict[str, object]) -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "early"})
        await client.post("/broker/topics", {"name": "own", "retention": {"max_bytes": 7}})
        await client.post("/broker/retention", {**everyone, "max_bytes": 5000})
        await client.post("/broker/topics", {"name": "late"})
        assert [await policy(client, name) for name in ("early", "late", "own")] == [(0, 5000), (0, 5000), (0, 7)]


async def test_one_partition_may_differ() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 2, "retention": {"ttl_ms": 3_600_000}})
        await client.post("/broker/retention", {"topic": "t", "partition": 1, "max_bytes": 9})
        assert [await policy(client, "t", number) for number in (0, 1)] == [(3_600_000, 0), (3_600_000, 9)]


async def test_d34_a_partition_that_is_not_there_never_means_all() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 2})
        refused = await client.post("/broker/retention", {"topic": "t", "partition": 2, "max_bytes": 1}, ok=404)
        assert refused["error"] == "partition_not_found"
        for wrong in ({"topic": "t", "partition": -1}, {"partition": 0}, {"topic": "*", "partition": 0}):
            assert (await client.call("POST", "/broker/retention", {**wrong, "max_bytes": 1})).status == 400
        assert (await client.post("/broker/retention", {"topic": "none", "max_bytes": 1}, ok=404))["error"] == "topic_not_found"
        assert (await client.post("/broker/retention", {"topic": "none"}, ok=404))["error"] == "topic_not_found"
        assert [await policy(client, "t", number) for number in (0, 1)] == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    "body",
    [
        {"topic": "t", "ttl_ms": -1},
        {"topic": "t", "ttl_ms": 1.5},
        {"topic": "t", "max_bytes": "1"},
        {"topic": "t", "max_bytes": 1 << 63},
        {"topic": "t", "ttl_ms": True},
        {"topic": "t", "days": 1},
        {"topic": "t", "sealed": 1},
        {"topic": "t", "sealed": {"age": 1}},
        {"topic": "t", "sealed": {"max_bytes": -1}},
        {"topic": 1},
        [],
    ],
)
async def test_a_malformed_policy_is_400_and_changes_nothing(body: object) -> None:
    async with running() as client:
        await client.produce("t", b"0")
        assert (await client.call("POST", "/broker/retention", body)).status == 400
        assert await policy(client, "t") == (0, 0)


async def test_a_size_limit_keeps_the_newest_that_fit(mock_clock: trio.testing.MockClock) -> None:
    async with running() as client:
        await client.produce("t", *(b"%010d" % number for number in range(1000)))
        await client.post("/broker/retention", {"topic": "t", "max_bytes": 30})
        with trio.fail_after(5):
            while (await bounds(client))[0] == 0:
                await trio.testing.wait_all_tasks_blocked()
        assert await bounds(client) == (997, 1000, 30)


async def test_d17_the_one_shot_collection_loses_nothing_that_is_kept() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        await client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 0})
        reply = await client.post("/broker/retention", {"topic": "t", "sealed": {"max_age_ms": 1, "max_bytes": 1}})
        assert reply["sealed_bytes_after"] > 0
        await client.produce("t", b"2")
        page = await client.get("/broker/consume/t/g/0")
        assert page["committed_offset"] == 0 and [message["value"] for message in page["messages"]] == ["1", "2"]
