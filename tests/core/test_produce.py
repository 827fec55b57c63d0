"""Producing through the dispatch, API.md section 3: every parameter, every refusal, and that a refusal changes nothing."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import trio

from ayder.http.exchange import Work
from ayder.topics import partition_for_key
from tests.http.in_process import Client, running

RECORDS = {b"content-type": b"application/vnd.ayder.records+ndjson"}


async def everything(client: Client, topic: str = "t", partitions: int = 2) -> list[list[dict[str, Any]]]:
    """All records of a topic, by partition."""
    found = []
    for number in range(partitions):
        page = await client.get(f"/broker/topics/{topic}/{number}/records?encoding=b64&limit=10000&max_bytes=16000000")
        assert not page["truncated"]
        found.append(page["messages"])
    return found


async def values(client: Client, number: int = 0, topic: str = "t") -> list[bytes]:
    page = await client.get(f"/broker/topics/{topic}/{number}/records?encoding=b64&limit=10000&max_bytes=16000000")
    return [base64.b64decode(message["value_b64"]) for message in page["messages"]]


async def with_topic(client: Client, partitions: int = 2) -> None:
    await client.post("/broker/topics", {"name": "t", "partitions": partitions})


IN_MEMORY = {"sealed": False, "durable": False, "mode": "memory", "synced": None}
SEALED = {"sealed": True, "durable": True, "mode": "sealed", "synced": True}


@pytest.mark.parametrize(("store", "claims"), [("memory", IN_MEMORY), ("aof", SEALED)])
async def test_a_receipt_claims_what_the_store_keeps(tmp_path: Path, store: str, claims: dict[str, object]) -> None:
    async with running(storage__log=store, storage__data_dir=tmp_path) as client:
        await with_topic(client)
        one = await client.post("/broker/topics/t/produce?partition=1", b"a")
        batch = await client.post("/broker/topics/t/produce-ndjson?partition=1", b"b\nc")
        typed = await client.call("POST", "/broker/topics/t/produce-ndjson", b'{"value":"d"}', headers=RECORDS, ok=200)
        for receipt in (one, batch, typed.json()):
            assert {name: receipt[name] for name in claims} == claims


async def test_the_receipt() -> None:
    async with running() as client:
        await with_topic(client)
        first = await client.post("/broker/topics/t/produce?partition=1", b"a")
        assert first.pop("batch_id") > 0
        assert first == {
            "ok": True, "offset": 0, "partition": 1, "duplicate": False, **IN_MEMORY,
        }  # fmt: skip
        assert (await client.post("/broker/topics/t/produce?partition=1", b"b"))["offset"] == 1
        assert await values(client, 1) == [b"a", b"b"]


@pytest.mark.parametrize("value", [b"", b"\x00", b"\xff\xfe", b"line\nline\r\n", b'{"a":1}', b"x" * 300_000])
async def test_a_value_is_kept_byte_for_byte(value: bytes) -> None:
    async with running() as client:
        await with_topic(client)
        await client.post("/broker/topics/t/produce?partition=0", value)
        assert await values(client) == [value]


async def test_batch_ids_increase() -> None:
    async with running() as client:
        ids = [(await client.post("/broker/topics/t/produce", b"x"))["batch_id"] for _ in range(5)]
        assert ids == sorted(set(ids))


async def test_d30_the_reply_states_the_partition_and_all_of_them_are_reached() -> None:
    """Defect D-30: -1 in the reply, partitions never reached, keys not hashed."""
    async with running() as client:
        await with_topic(client, 3)
        seen = {(await client.post("/broker/topics/t/produce", b"x"))["partition"] for _ in range(9)}
        assert seen == {0, 1, 2}
        for key in ("21", "foobar", "ü", "a b"):
            escaped = "".join(f"%{byte:02X}" for byte in key.encode())
            receipt = await client.post(f"/broker/topics/t/produce?key={escaped}", b"keyed")
            assert receipt["partition"] == partition_for_key(key.encode(), 3)
        await client.post("/broker/topics/t/produce?partition=2&key=21", b"the given one")
        assert (await values(client, 2))[-1] == b"the given one"


async def test_keys_and_headers_come_back() -> None:
    async with running() as client:
        await with_topic(client)
        headers = {b"ayder-header-trace": b"t1", b"ayder-header-x": b""}
        await client.call("POST", "/broker/topics/t/produce?partition=0&key=k%2F+1", b"v", headers=headers, ok=200)
        (message,) = (await client.get("/broker/topics/t/0/records"))["messages"]
        assert (message["key"], message["value"], message["headers"]) == ("k/ 1", "v", {"trace": "t1", "x": ""})


async def test_timing_receipt_and_ack() -> None:
    async with running() as client:
        await with_topic(client)
        receipt = await client.post("/broker/topics/t/produce?timing=1&receipt=1", b"x")
        assert receipt["ack"] == {"level": "majority", "copies": 1, "voters": 1, "term": 1, "index": receipt["batch_id"]}
        assert receipt["server_us"] == receipt["queue_us"] + receipt["sync_wait_us"]
        assert {"recv_parse_us", "produce_us"} <= set(receipt)
        leader = await client.post("/broker/topics/t/produce?ack=leader", b"x")
        assert leader["ack"]["level"] == "majority"  # a node alone is one as soon as its sync has returned
        everyone = await client.post("/broker/topics/t/produce?ack=all", b"x")
        assert everyone["ack"]["level"] == "all"


async def test_a_duplicate_is_the_first_answer_again() -> None:
    """Defect D-7: ``synced:true`` on this path was a constant; here a duplicate waits for its own block like the first."""
    async with running() as client:
        await with_topic(client)
        first = await client.post("/broker/topics/t/produce?idempotency_key=k&partition=0&receipt=1", b"x")
        await client.post("/broker/topics/t/produce?partition=0", b"between")
        again = await client.post("/broker/topics/t/produce?idempotency_key=k&partition=0&receipt=1", b"x")
        assert (first["duplicate"], again["duplicate"]) == (False, True)
        assert {**again, "duplicate": False} == first
        header = await client.call(
            "POST", "/broker/topics/t/produce?partition=0", b"x", headers={b"idempotency-key": b"k"}, ok=200
        )
        assert header.json()["duplicate"]
        assert (await client.post("/broker/topics/t/produce?idempotency_key=k&partition=1", b"x"))["duplicate"] is False
        reused = await client.post("/broker/topics/t/produce?idempotency_key=k&partition=0", b"other", ok=422)
        assert (reused["error"], reused["outcome"]) == ("idempotency_key_reused", "not_applied")
        assert await values(client) == [b"x", b"between"]


async def test_a_retry_without_a_partition_finds_the_one_it_went_to() -> None:
    async with running() as client:
        await with_topic(client, 5)
        for key in "abcdefg":
            receipts = [await client.post(f"/broker/topics/t/produce?idempotency_key={key}", b"x") for _ in range(3)]
            assert [receipt["duplicate"] for receipt in receipts] == [False, True, True]
            batches = [await client.post(f"/broker/topics/t/produce-ndjson?idempotency_key=b{key}", b"x\ny") for _ in range(2)]
            assert [batch["duplicate"] for batch in batches] == [False, True]
        assert sum(map(len, await everything(client, partitions=5))) == 7 * 3


async def test_the_same_key_at_the_same_time_is_stored_once() -> None:
    """Defect D-4, and I-3: thirty at once, half of them with another body."""
    async with running() as client:
        await with_topic(client)
        statuses: list[int] = []

        async def one(body: bytes) -> None:
            statuses.append((await client.call("POST", "/broker/topics/t/produce?idempotency_key=k&partition=0", body)).status)

        async with trio.open_nursery() as nursery:
            for n in range(30):
                nursery.start_soon(one, b"ab"[n % 2 : n % 2 + 1])
        assert sorted(statuses) == [200] * 15 + [422] * 15
        assert len(await values(client)) == 1


async def test_d26_long_keys_differ_to_their_last_byte() -> None:
    """Defect D-26: keys were cut at some length, so two of them were one."""
    async with running() as client:
        await with_topic(client)
        for last in "ab":
            long = "k" * 511 + last
            receipt = await client.post(f"/broker/topics/t/produce?idempotency_key={long}&partition=1", b"x")
            assert (receipt["duplicate"], receipt["partition"]) == (False, 1)
        for name in ("n" * 127 + "a", "n" * 127 + "b"):
            await client.post(f"/broker/topics/{name}/produce?partition=0", name[-1:].encode())
        assert await values(client, topic="n" * 127 + "a") == [b"a"]


async def test_d16_keys_leave_the_window_in_order_and_nothing_else_does() -> None:
    """Defect D-16: one full table, and then keys were stored twice and messages overwritten."""
    async with running(topics__idempotency_window_entries=4) as client:
        await with_topic(client)

        async def use(key: int) -> bool:
            receipt = await client.post(f"/broker/topics/t/produce?idempotency_key=k{key}&partition=0", b"%d" % key)
            return bool(receipt["duplicate"])

        assert [await use(n) for n in range(8)] == [False] * 8
        assert [await use(n) for n in (4, 5, 6, 7)] == [True] * 4
        assert await use(0) is False
        assert await values(client) == [b"%d" % n for n in (*range(8), 0)]


# -- batches ------------------------------------------------------------------------------------------------------
async def test_ndjson() -> None:
    async with running() as client:
        await with_topic(client)
        receipt = await client.post("/broker/topics/t/produce-ndjson?partition=0", b'{"n":1}\r\n\n"two"\n')
        assert receipt.pop("batch_id") > 0
        assert receipt == {
            "ok": True, "first_offset": 0, "count": 2, "partition": 0, "duplicate": False, **IN_MEMORY,
        }  # fmt: skip
        assert await values(client) == [b'{"n":1}', b"two"]


async def test_d35_a_duplicate_batch_reports_what_the_first_stored() -> None:
    async with running() as client:
        await with_topic(client)
        batch = "/broker/topics/t/produce-ndjson?partition=0&idempotency_key=k"
        assert (await client.post(batch, b"a\nb\nc"))["count"] == 3
        again = await client.post(batch, b"a\nb\nc")
        assert (again["duplicate"], again["first_offset"], again["count"]) == (True, 0, 3)
        assert (await client.post(batch, b"a\nb", ok=422))["offset"] == 0
        assert len(await values(client)) == 3


async def test_d36_ten_thousand_lines_and_not_one_more() -> None:
    """Defect D-36: a thousand lines, the rest dropped; 64 KB a request."""
    async with running() as client:
        await with_topic(client)
        lines = [b"%d" % n for n in range(10_000)]
        assert (await client.post("/broker/topics/t/produce-ndjson?partition=0", b"\n".join(lines)))["count"] == 10_000
        refused = await client.post("/broker/topics/t/produce-ndjson?partition=0", b"\n".join([*lines, b"x"]), ok=413)
        assert (refused["error"], refused["max_records"]) == ("payload_too_large", 10_000)
        assert await values(client) == lines


async def test_a_typed_batch_over_partitions() -> None:
    async with running() as client:
        await with_topic(client)
        body = b"\n".join(
            (
                b'{"value":"a","partition":1,"timestamp_ms":5,"headers":{"h":"v"}}',
                b'{"value_b64":"/w==","key":"21"}',
                b'{"json":{"n":1},"partition":1}',
            )
        )
        target = "/broker/topics/t/produce-ndjson?idempotency_key=k"
        first = (await client.call("POST", target, body, headers=RECORDS, ok=200)).json()
        keyed = partition_for_key(b"21", 2)
        runs = {each["partition"]: each for each in first["results"]}
        assert (first["count"], set(runs)) == (3, {1, keyed})
        again = (await client.call("POST", target, body, headers=RECORDS, ok=200)).json()
        assert again == {**first, "duplicate": True, "results": [{**each, "duplicate": True} for each in first["results"]]}
        stored = await everything(client)
        assert sum(map(len, stored)) == 3
        ours = [message for message in stored[1] if message.get("headers")]
        assert [(m["timestamp_ms"], m["headers"]) for m in ours] == [(5, {"h": "v"})]
        reused = (await client.call("POST", target, body + b"\n" + body, headers=RECORDS)).json()
        assert reused["error"] == "idempotency_key_reused"
        assert sum(map(len, await everything(client))) == 3


# -- refusals change nothing --------------------------------------------------------------------------------------
BAD = [
    ("/broker/topics/t/produce?partition=2", 404, "partition_not_found"),
    ("/broker/topics/t/produce?partition=-1", 400, "invalid_request"),
    ("/broker/topics/t/produce?partition=x", 400, "invalid_request"),
    ("/broker/topics/t/produce?partition=1.5", 400, "invalid_request"),
    ("/broker/topics/t/produce?partition=99999999999999999999", 400, "invalid_request"),
    ("/broker/topics/t/produce?timeout_ms=-1", 400, "invalid_request"),
    ("/broker/topics/t/produce?timeout_ms=999999999999", 400, "invalid_request"),
    ("/broker/topics/t/produce?ack=some", 400, "invalid_request"),
    ("/broker/topics/t/produce?timing=yes", 400, "invalid_request"),
    ("/broker/topics/t/produce?key=%zz", 400, "invalid_request"),
    ("/broker/topics/t/produce?idempotency_key=" + "k" * 513, 400, "invalid_request"),
    ("/broker/topics/t/produce?key=" + "k" * 4097, 400, "invalid_request"),
    ("/broker/topics/t/produce-ndjson?partition=2", 404, "partition_not_found"),
    ("/broker/topics/new/produce?partition=8", 404, "partition_not_found"),
    ("/broker/topics/new/produce-ndjson?partition=8", 404, "partition_not_found"),
    ("/broker/topics/bad%20name/produce", 400, "invalid_request"),
    ("/broker/topics/.hidden/produce", 400, "invalid_request"),
    ("/broker/topics/a%2Fb/produce", 400, "invalid_request"),
    ("/broker/topics/%ff/produce", 400, "invalid_request"),
    ("/broker/topics/%c3%bc/produce", 400, "invalid_request"),
    ("/broker/topics/%zz/produce", 400, "invalid_request"),
    ("/broker/topics/" + "n" * 129 + "/produce", 400, "invalid_request"),
    ("/broker/topics/t/nothing", 404, "not_found"),
]


@pytest.mark.parametrize(("target", "status", "code"), BAD, ids=[target[:60] for target, _, _ in BAD])
async def test_bad_input_is_refused_and_changes_nothing(target: str, status: int, code: str) -> None:
    async with running() as client:
        await with_topic(client)
        before = client.node.broker.applied_index
        answer = await client.post(target, b"x", ok=status)
        assert (answer["ok"], answer["error"], answer["outcome"]) == (False, code, "not_applied")
        assert answer["message"]
        assert client.node.broker.applied_index == before
        assert await everything(client) == [[], []]


@pytest.mark.parametrize("line", [b"", b"{", *(b'{"value":"a","partition":%d}' % n for n in (2, -1, 70_000, 1 << 70)), b"\xff"])
@pytest.mark.parametrize("topic", ["t", "new"])
async def test_a_bad_line_refuses_its_whole_batch(line: bytes, topic: str) -> None:
    async with running(topics__default_partitions=2) as client:
        await with_topic(client)
        before = client.node.broker.applied_index
        body = line and b'{"value":"good","partition":0}\n' + line
        answer = await client.call("POST", f"/broker/topics/{topic}/produce-ndjson", body, headers=RECORDS)
        assert answer.status in (400, 404)
        assert answer.json()["outcome"] == "not_applied"
        assert client.node.broker.applied_index == before


@pytest.mark.parametrize(
    "headers",
    [
        {b"ayder-header-" + b"n" * 256: b"v"},
        {b"ayder-header-": b"v"},
        {b"ayder-header-n%d" % n: b"v" for n in range(65)},
        {b"idempotency-key": b"k" * 513},
    ],
)
async def test_bad_record_headers(headers: dict[bytes, bytes]) -> None:
    async with running() as client:
        await with_topic(client)
        await client.call("POST", "/broker/topics/t/produce", b"x", headers=headers, ok=400)
        assert await everything(client) == [[], []]


async def test_auto_create_can_be_off() -> None:
    async with running(topics__auto_create=False) as client:
        assert (await client.post("/broker/topics/new/produce", b"x", ok=404))["error"] == "topic_not_found"
        assert (await client.get("/broker/topics"))["topics"] == []


async def test_many_produce_to_a_topic_that_is_not_there() -> None:
    async with running() as client:

        async def one() -> None:
            await client.post("/broker/topics/new/produce?partition=0", b"x")

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
        assert len(await values(client, topic="new")) == 20


async def test_a_client_that_hangs_up_while_its_topic_is_created() -> None:
    """Whatever the moment: nothing breaks, and what it sent is there once or not at all."""
    async with running() as client:
        for turn in range(12):
            request_scope = trio.CancelScope()

            async def produce(topic: str = f"new{turn}", scope: trio.CancelScope = request_scope) -> None:
                with scope:
                    await client.post(f"/broker/topics/{topic}/produce?partition=0", b"x")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(produce)
                for _ in range(turn):
                    await trio.lowlevel.checkpoint()
                request_scope.cancel()
        with trio.fail_after(5):
            await client.node.driver.quiesce()
        names = [topic["topic"] for topic in (await client.get("/broker/topics"))["topics"]]
        for name in names:
            assert len(await values(client, topic=name)) <= 1
        assert client.node.broker.queued_bytes == 0
        assert (await client.post("/broker/topics/after/produce", b"x"))["ok"]


# -- time and room ------------------------------------------------------------------------------------------------
async def test_full_disk_refuses_surely_and_later_takes_again() -> None:
    async with running() as client:
        await with_topic(client)
        disk = client.node.broker.store._disk  # type: ignore[attr-defined]
        disk.full = True
        refused = await client.post("/broker/topics/t/produce?partition=0&idempotency_key=k", b"x", ok=503)
        assert (refused["error"], refused["outcome"]) == ("storage_full", "not_applied")
        disk.full = False
        client.node.driver.refuse_until_ns = 1
        again = await client.post("/broker/topics/t/produce?partition=0&idempotency_key=k", b"x")
        assert (again["offset"], again["duplicate"]) == (0, False)
        assert await values(client) == [b"x"]


async def test_the_wait_of_a_caller_bounds_the_creation_of_his_topic_too() -> None:
    async with running() as client:
        waits: list[object] = []
        execute = client.node.broker.execute

        async def watched(command: Any, *, timeout_ms: int | None = None) -> Any:
            waits.append(timeout_ms)
            return await execute(command, timeout_ms=timeout_ms)

        client.node.broker.execute = watched  # type: ignore[method-assign]
        await client.post("/broker/topics/a/produce?timeout_ms=1234", b"x")
        await client.post("/broker/topics/b/produce-ndjson?timeout_ms=2345", b"x")
        await client.post("/broker/topics/c/produce", b"x")
        assert waits == [1234, 2345, None]


async def test_overload_is_refused_before_anything_is_stored() -> None:
    async with running(raft__max_queued_bytes=9 << 20) as client:
        await with_topic(client)
        body = b"v" * (4 << 20)
        statuses: list[int] = []

        async def one() -> None:
            reply = await client.call("POST", "/broker/topics/t/produce?partition=0", body)
            statuses.append(reply.status)
            if reply.status == 503:
                assert (reply.json()["error"], reply.json()["outcome"]) == ("overloaded", "not_applied")
                assert int(reply.headers[b"retry-after"]) >= 1

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert set(statuses) == {200, 503}
        page = await client.get("/broker/topics/t/0/records?limit=1")
        assert page["high_watermark"] == statuses.count(200)
        assert client.node.broker.queued_bytes == 0


async def test_not_ready_is_refused() -> None:
    async with running() as client:
        await with_topic(client)
        client.node.broker.shutting_down = True
        answer = await client.post("/broker/topics/t/produce", b"x", ok=503)
        assert (answer["error"], answer["outcome"]) == ("shutting_down", "not_applied")


async def test_settings_of_one_node_are_not_those_of_the_next() -> None:
    """The parsed query is remembered; what the configuration adds to it must not be."""
    for timeout_ms in (1000, 7000):
        async with running(http__default_produce_timeout_ms=timeout_ms) as client:
            await with_topic(client)
            from ayder.http.exchange import Deferred, Request

            request = Request("POST", b"/broker/topics/t/produce", b"", {b"authorization": b"Bearer dev"}, b"x")
            assert isinstance(client.node.application.open(request), int)
            answer = client.node.application.respond(request)
            assert isinstance(answer, Deferred) and not isinstance(answer, Work)
            lasts_ns = answer.deadline_ns - answer._started_ns  # type: ignore[attr-defined]
            assert lasts_ns == timeout_ms * 1_000_000
            answer.abandon()
            await client.node.driver.quiesce()
            assert answer.response is not None
