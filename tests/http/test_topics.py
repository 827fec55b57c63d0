"""Topics over HTTP: create, list, describe, delete."""

import pytest

from tests.http.in_process import running


async def test_a_topic_is_created_once_and_reports_its_real_count() -> None:
    async with running() as client:
        first = await client.post("/broker/topics", {"name": "t", "partitions": 3})
        assert first == {"ok": True, "topic": "t", "partitions": 3, "created": True}
        for again in ({"name": "t", "partitions": 3}, {"name": "t"}):
            assert await client.post("/broker/topics", again) == {"ok": True, "topic": "t", "partitions": 3, "created": False}
        clash = await client.post("/broker/topics", {"name": "t", "partitions": 4}, ok=409)
        assert (clash["error"], clash["outcome"], clash["partitions"]) == ("topic_exists", "not_applied", 3)
        assert (await client.get("/broker/topics/t"))["partition_count"] == 3


async def test_without_a_count_the_configured_one_holds() -> None:
    async with running(topics__default_partitions=5) as client:
        assert (await client.post("/broker/topics", {"name": "t"}))["partitions"] == 5


@pytest.mark.parametrize(
    "body",
    [
        b'{"name":"t","partitions":0}',
        b'{"name":"t","partitions":1025}',
        b'{"name":"t","partitions":-1}',
        b'{"name":"t","partitions":8.0}',
        b'{"name":"t","partitions":8.5}',
        b'{"name":"t","partitions":"8"}',
        b'{"name":"t","partitions":true}',
        b'{"name":"t","partitions":18446744073709551616}',
        b'{"name":"t","partitions":1e400}',
        b'{"name":""}',
        b'{"name":"a b"}',
        b'{"name":"-a"}',
        b'{"name":"a/b"}',
        b'{"name":"\xc3\xa9"}',
        b'{"name":1}',
        b'{"name":null}',
        b'{"partitions":8}',
        b"{}",
        b"[]",
        b'"t"',
        b"",
        b"{",
        b'{"name":"t"}x',
        b"\xff",
        b'{"name":"t","colour":1}',
        b'{"name":"t","storage":"paper"}',
        b'{"name":"t","storage":"rocket"}',
        b'{"name":"t","write_mode":"maybe"}',
        b'{"name":"t","retention":{"ttl_ms":-1}}',
        b'{"name":"t","retention":{"ttl_ms":9223372036854775808}}',
        b'{"name":"t","retention":{"days":1}}',
        b'{"name":"t","retention":7}',
        b'{"name":"' + b"a" * 129 + b'"}',
        b'{"name":"t","retention":' + b"[" * 60_000 + b"}",
    ],
)
async def test_d27_what_cannot_be_created_is_400_and_creates_nothing(body: bytes) -> None:
    async with running() as client:
        reply = await client.call("POST", "/broker/topics", body)
        assert reply.status == 400
        error = reply.json()
        assert error["ok"] is False and error["outcome"] == "not_applied"
        assert error["error"] in ("invalid_request", "invalid_json", "missing_fields", "not_supported")
        assert (await client.get("/broker/topics"))["topics"] == []


async def test_the_smallest_and_the_largest_topic() -> None:
    async with running() as client:
        for count in (1, 1024):
            assert (await client.post("/broker/topics", {"name": f"t{count}", "partitions": count}))["partitions"] == count
        described = await client.get("/broker/topics/t1024")
        assert [part["partition"] for part in described["partitions"]] == list(range(1024))


async def test_the_longest_name_works_everywhere() -> None:
    async with running() as client:
        name = "a" * 128
        await client.post("/broker/topics", {"name": name})
        await client.produce(name, b"x")
        assert (await client.get(f"/broker/topics/{name}"))["partitions"][0]["high_watermark"] == 1
        assert (await client.call("GET", f"/broker/topics/{name}a")).status == 400


async def test_d36_the_limit_of_topics_is_said_and_all_below_it_are_usable() -> None:
    async with running(topics__max_topics=3, topics__auto_create=False) as client:
        for number in range(3):
            await client.post("/broker/topics", {"name": f"t{number}", "partitions": 1})
        refused = await client.post("/broker/topics", {"name": "t3"}, ok=400)
        assert (refused["error"], refused["max_topics"]) == ("invalid_request", 3)
        assert (await client.post("/broker/topics", {"name": "t1"}))["created"] is False
        for number in range(3):
            await client.produce(f"t{number}", b"x")


async def test_topics_are_listed_by_name_page_by_page() -> None:
    async with running() as client:
        names = sorted(f"topic-{number}" for number in range(12))
        for name in reversed(names):
            await client.post("/broker/topics", {"name": name, "partitions": 2, "retention": {"ttl_ms": 5}})
        found, after = [], ""
        while after is not None:
            page = await client.get(f"/broker/topics?limit=5&after={after}")
            assert len(page["topics"]) <= 5
            found += page["topics"]
            after = page["next_after"]
        assert [topic["topic"] for topic in found] == names
        assert found[0] == {
            "topic": "topic-0", "partitions": 2, "storage": "sealed", "write_mode": None,
            "retention": {"ttl_ms": 5, "max_bytes": None},
        }  # fmt: skip
        for wrong in ("limit=0", "limit=1001", "limit=x"):
            assert (await client.call("GET", f"/broker/topics?{wrong}")).status == 400


async def test_a_description_tells_bounds_and_bytes_exactly() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 2})
        await client.produce("t", b"12345", b"678", partition=1)
        await client.call("POST", "/broker/topics/t/produce?partition=1&key=kk", b"9", ok=200)
        await client.post("/broker/delete-before", {"topic": "t", "partition": 1, "before_offset": 1})
        empty, full = (await client.get("/broker/topics/t"))["partitions"]
        assert empty == {
            "partition": 0, "log_start_offset": 0, "high_watermark": 0, "bytes": 0, "retention": {"ttl_ms": 0, "max_bytes": 0},
        }  # fmt: skip
        assert (full["log_start_offset"], full["high_watermark"], full["bytes"]) == (1, 3, 3 + 1 + 2)


async def test_what_is_not_there_is_404() -> None:
    async with running() as client:
        for method, target in (("GET", "/broker/topics/none"), ("DELETE", "/broker/topics/none")):
            reply = await client.call(method, target)
            assert (reply.status, reply.json()["error"], reply.json()["topic"]) == (404, "topic_not_found", "none")


async def test_a_deleted_topic_takes_records_and_offsets_along_and_may_come_again() -> None:
    async with running() as client:
        await client.produce("t", b"old")
        await client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 0})
        deleted = (await client.call("DELETE", "/broker/topics/t", ok=200)).json()
        assert deleted == {"ok": True, "topic": "t", "deleted": True}
        assert (await client.call("GET", "/broker/consume/t/g/0")).status == 404
        assert (await client.call("GET", "/broker/groups/g")).status == 404
        await client.produce("t", b"new")
        page = await client.get("/broker/consume/t/g/0")
        assert [message["value"] for message in page["messages"]] == ["new"] and page["committed_offset"] is None


async def test_d29_a_name_from_json_and_from_a_path_is_one_name() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "my.topic-1_x", "partitions": 1})
        assert (await client.get("/broker/topics/my%2Etopic%2D1%5fx"))["topic"] == "my.topic-1_x"
        assert (await client.call("POST", "/broker/topics/my%2etopic-1_x/produce", b"v")).status == 200
        assert (await client.get("/broker/topics/my.topic-1_x/0/records"))["count"] == 1
        assert (await client.call("GET", "/broker/topics/my%20topic")).status == 400
