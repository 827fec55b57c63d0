"""Commits and groups over HTTP."""

import pytest

from tests.http.in_process import Client, running


async def resume(client: Client, group: str = "g", topic: str = "t", partition: int = 0) -> tuple[int | None, list[int]]:
    page = await client.get(f"/broker/consume/{topic}/{group}/{partition}")
    return page["committed_offset"], [message["offset"] for message in page["messages"]]


def commit(**fields: object) -> dict[str, object]:
    return {"topic": "t", "group": "g", "partition": 0, **fields}


async def test_reading_resumes_behind_what_was_processed() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1", b"2", b"3")
        assert await resume(client) == (None, [0, 1, 2, 3])
        reply = await client.post("/broker/commit", commit(offset=1))
        assert reply["ok"] is True and reply["ignored"] is False and reply["batch_id"] > 0
        assert await resume(client) == (1, [2, 3])
        await client.post("/broker/commit", commit(next_offset=3))
        assert await resume(client) == (2, [3])
        await client.post("/broker/commit", commit(offset=3))
        assert await resume(client) == (3, [])


async def test_a_backward_commit_is_ignored_and_says_so_unless_reset() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1", b"2")
        await client.post("/broker/commit", commit(offset=2))
        assert (await client.post("/broker/commit", commit(offset=1)))["ignored"] is True
        assert (await client.post("/broker/commit", commit(offset=2)))["ignored"] is False
        assert await resume(client) == (2, [])
        assert (await client.post("/broker/commit", commit(offset=0, reset=True)))["ignored"] is False
        assert await resume(client) == (0, [1, 2])


@pytest.mark.parametrize("nothing", [{"offset": -1}, {"next_offset": 0}])
async def test_d34_nothing_processed_is_no_number_and_needs_reset(nothing: dict[str, int]) -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        assert (await client.post("/broker/commit", commit(**nothing), ok=400))["error"] == "invalid_request"
        await client.post("/broker/commit", commit(offset=1))
        await client.post("/broker/commit", commit(**nothing, reset=True))
        assert await resume(client) == (None, [0, 1])
        assert (await client.call("GET", "/broker/groups/g")).status == 404
        assert (await client.post("/broker/commit", commit(offset=0)))["ignored"] is False


async def test_a_commit_beyond_the_end_is_refused_and_changes_nothing() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        for fields in ({"offset": 2}, {"next_offset": 3}, {"offset": 9223372036854775807}, {"offset": 2, "reset": True}):
            refused = await client.post("/broker/commit", commit(**fields), ok=409)
            assert (refused["error"], refused["high_watermark"]) == ("offset_out_of_range", 2)
        assert await resume(client) == (None, [0, 1])


async def test_a_commit_to_what_is_not_there_is_404() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 2})
        assert (await client.post("/broker/commit", commit(offset=0, topic="none"), ok=404))["error"] == "topic_not_found"
        assert (await client.post("/broker/commit", commit(offset=0, partition=2), ok=404))["error"] == "partition_not_found"
        assert (await client.post("/broker/commit", commit(offset=0, partition=1 << 40), ok=404))[
            "error"
        ] == "partition_not_found"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"{}", "missing_fields"), (b'{"topic":"t","group":"g","partition":0}', "missing_fields"), (b"[]", "missing_fields"),
        (b'{"topic":"t","group":"g","partition":0,"offset":0,"next_offset":1}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":0,"offset":-2,"reset":true}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":-1,"offset":0}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":0,"offset":0.0}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":0,"offset":"0"}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":false,"offset":0}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":0,"offset":0,"reset":1}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":0,"offset":0,"metadata":""}', "invalid_request"),
        (b'{"topic":"t","group":"my group","partition":0,"offset":0}', "invalid_request"),
        (b'{"topic":"t","group":"","partition":0,"offset":0}', "invalid_request"),
        (b'{"topic":"t","group":"g","partition":0,"offset":9223372036854775808}', "invalid_request"),
        (b'[{"topic":"t","group":"g","partition":0,"offset":0},7]', "invalid_request"),
        (b"[" * 60_000, "invalid_json"), (b'{"topic":"t"', "invalid_json"), (b"", "invalid_json"), (b"nan", "invalid_json"),
        (b'{"topic":"\xff"}', "invalid_json"),
    ],
)  # fmt: skip
async def test_d22_a_malformed_commit_is_400_stores_nothing_and_the_node_lives(body: bytes, error: str) -> None:
    async with running() as client:
        await client.produce("t", b"0")
        reply = await client.call("POST", "/broker/commit", body)
        assert (reply.status, reply.json()["error"], reply.json()["outcome"]) == (400, error, "not_applied")
        assert (await client.get("/broker/groups"))["groups"] == []


async def test_d21_offsets_above_31_bits_and_dots_in_names_are_read_exactly() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        body = b'{"partition":0,"offset":1,"group":"v1.2","topic":"t"}'
        await client.call("POST", "/broker/commit", body, ok=200)
        assert (await resume(client, "v1.2"))[0] == 1
        refused = await client.post("/broker/commit", commit(offset=(1 << 53) + 1), ok=409)
        assert refused["offset"] == (1 << 53) + 1


async def test_several_commits_are_one_and_all_or_nothing() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 2})
        await client.produce("t", b"0", b"1", partition=0)
        await client.produce("t", b"0", partition=1)
        both = [commit(offset=1), commit(partition=1, offset=0)]
        reply = await client.post("/broker/commit", both)
        assert reply["results"] == [{"ok": True, "ignored": False}] * 2
        again = [commit(offset=0), commit(partition=1, offset=0, group="h")]
        assert [each["ignored"] for each in (await client.post("/broker/commit", again))["results"]] == [True, False]
        half = [commit(offset=0, group="x"), commit(partition=1, offset=1, group="x")]
        await client.post("/broker/commit", half, ok=409)
        assert (await client.call("GET", "/broker/groups/x")).status == 404


async def test_d33_groups_are_not_hashed() -> None:
    """These two names shared a commit in the predecessor."""
    async with running() as client:
        await client.produce("t", *(b"%d" % number for number in range(5)))
        await client.post("/broker/commit", commit(group="grp68486", offset=4))
        assert await resume(client, "grp106684") == (None, [0, 1, 2, 3, 4])
        await client.post("/broker/commit", commit(group="grp106684", offset=1))
        assert (await resume(client, "grp68486"))[0] == 4


async def test_d16_nothing_is_lost_when_there_are_many_groups() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        for first in range(0, 3000, 500):
            await client.post("/broker/commit", [commit(group=f"g{number}", offset=0) for number in range(first, first + 500)])
        found, after = [], ""
        while after is not None:
            page = await client.get(f"/broker/groups?limit=1000&after={after}")
            found += [group["group"] for group in page["groups"]]
            after = page["next_after"]
        assert found == sorted(f"g{number}" for number in range(3000))
        assert await resume(client, "g1234") == (0, [1])


async def test_a_group_shows_what_is_left_for_it() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "a", "partitions": 2})
        await client.produce("a", *(b"%d" % number for number in range(6)), partition=1)
        await client.produce("b", b"0", b"1")
        await client.post("/broker/commit", [commit(topic="a", partition=1, offset=1), commit(topic="b", offset=1)])
        await client.post("/broker/delete-before", {"topic": "a", "partition": 1, "before_offset": 4})
        assert await client.get("/broker/groups/g") == {
            "ok": True, "group": "g", "lag": 2,
            "partitions": [
                {"topic": "a", "partition": 1, "committed_offset": 1, "log_start_offset": 4, "high_watermark": 6, "lag": 2},
                {"topic": "b", "partition": 0, "committed_offset": 1, "log_start_offset": 0, "high_watermark": 2, "lag": 0},
            ],
        }  # fmt: skip
        assert (await client.get("/broker/groups"))["groups"] == [{"group": "g", "partitions": 2}]
        assert (await client.call("GET", "/broker/groups/none")).json()["error"] == "group_not_found"
        assert (await client.call("GET", "/broker/groups/a%20b")).status == 400


async def test_d29_a_group_committed_by_json_is_read_by_its_escaped_path() -> None:
    async with running() as client:
        await client.produce("t", b"0", b"1")
        await client.post("/broker/commit", commit(group="my.group", offset=0))
        assert (await client.get("/broker/consume/t/my%2Egroup/0"))["committed_offset"] == 0
        assert (await client.get("/broker/groups/my%2egroup"))["group"] == "my.group"
