"""Consuming through the dispatch, API.md section 4: where a reader starts, what a page says, in every format."""

from __future__ import annotations

import base64
import datetime
import json
import struct
import urllib.parse
from typing import Any

import pytest
import trio

from ayder.fetch import Fetcher, Page
from ayder.http.routes import Router
from ayder.node import ROUTES
from tests.http.in_process import Client, running

RECORDS = {b"content-type": b"application/vnd.ayder.records+ndjson"}


async def filled(client: Client, count: int = 10) -> None:
    await client.post("/broker/topics", {"name": "t", "partitions": 2})
    if count:
        await client.produce("t", *(b"%d" % n for n in range(count)))


def offsets(page: dict[str, Any]) -> list[int]:
    return [message["offset"] for message in page["messages"]]


async def test_the_page() -> None:
    async with running() as client:
        await filled(client, 3)
        page = await client.get("/broker/consume/t/g/0?limit=2")
        stamps = [message.pop("timestamp_ms") for message in page["messages"]]
        assert page == {
            "messages": [
                {"offset": 0, "partition": 0, "key": "", "value": "0"},
                {"offset": 1, "partition": 0, "key": "", "value": "1"},
            ],
            "count": 2, "next_offset": 2, "committed_offset": None, "truncated": True, "log_start_offset": 0, "high_watermark": 3,
        }  # fmt: skip
        assert stamps[0] == stamps[1] > 1_700_000_000_000
        rest = await client.get("/broker/consume/t/g/0?offset=2")
        assert (offsets(rest), rest["next_offset"], rest["truncated"]) == ([2], 3, False)
        beyond = await client.get("/broker/consume/t/g/0?offset=3")
        assert (beyond["messages"], beyond["count"], beyond["next_offset"]) == ([], 0, 3)


async def test_a_group_goes_on_behind_what_it_committed() -> None:
    async with running() as client:
        await filled(client)
        await client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 4})
        page = await client.get("/broker/consume/t/g/0?limit=2")
        assert (offsets(page), page["committed_offset"]) == ([5, 6], 4)
        assert offsets(await client.get("/broker/consume/t/g/0?limit=1&offset=0")) == [0]
        assert offsets(await client.get("/broker/consume/t/other/0?limit=1")) == [0]
        assert offsets(await client.get("/broker/topics/t/0/records?limit=1")) == [0]


async def test_d33_groups_with_one_hash_are_two_groups() -> None:
    """Defect D-33: ``grp68486`` and ``grp106684`` shared a commit."""
    async with running() as client:
        await filled(client)
        await client.post("/broker/commit", {"topic": "t", "group": "grp68486", "partition": 0, "offset": 4})
        assert (await client.get("/broker/consume/t/grp106684/0"))["committed_offset"] is None


async def test_text_and_base64() -> None:
    async with running() as client:
        await filled(client, 0)
        first = b'{"value_b64":"/wA=","key_b64":"/g==","headers":{"h":"\xc3\xbc"},"timestamp_ms":7}'
        body = first + b'\n{"value":"\\u00fc\\n","key":"k"}\n{"value":""}'
        await client.call("POST", "/broker/topics/t/produce-ndjson?partition=0", body, headers=RECORDS, ok=200)
        text = (await client.get("/broker/topics/t/0/records"))["messages"]
        now = text[1].pop("timestamp_ms")
        assert text.pop(2) == {"offset": 2, "partition": 0, "key": "", "value": "", "timestamp_ms": now}
        assert text == [
            {
                "offset": 0,
                "partition": 0,
                "key": "",
                "key_b64": "/g==",
                "value_b64": "/wA=",
                "timestamp_ms": 7,
                "headers": {"h": "ü"},
            },
            {"offset": 1, "partition": 0, "key": "k", "value": "ü\n"},
        ]
        encoded = (await client.get("/broker/topics/t/0/records?encoding=b64"))["messages"]
        assert encoded == [
            {"offset": 0, "partition": 0, "value_b64": "/wA=", "timestamp_ms": 7, "key_b64": "/g==", "headers": {"h": "ü"}},
            {"offset": 1, "partition": 0, "value_b64": "w7wK", "timestamp_ms": now, "key_b64": "aw=="},
            {"offset": 2, "partition": 0, "value_b64": "", "timestamp_ms": now},
        ]


async def test_d20_a_large_page_is_whole_json_and_passes_nothing_unsent() -> None:
    """Defect D-20: replies over 32 KB broke off inside an object, and counted what they had not sent."""
    async with running() as client:
        await filled(client, 0)
        sent = [bytes([65 + n]) * 65_000 for n in range(10)] + [b'"\\' * 3000, b"\xff" * 5000]
        for value in sent:
            await client.post("/broker/topics/t/produce?partition=0", value)
        for encoding in ("text", "b64"):
            got: list[bytes] = []
            at = 0
            while at < len(sent):
                query = f"offset={at}&max_bytes=200000&encoding={encoding}"
                reply = await client.call("GET", f"/broker/topics/t/0/records?{query}", ok=200)
                page = json.loads(reply.body)
                assert page["count"] == len(page["messages"]) == page["next_offset"] - at > 0
                assert page["truncated"] == (page["next_offset"] < len(sent))
                got += [m["value"].encode() if "value" in m else base64.b64decode(m["value_b64"]) for m in page["messages"]]
                at = page["next_offset"]
            assert got == sent


async def test_d21_offsets_are_64_bit() -> None:
    """Defect D-21: numbers of eleven digits were no numbers."""
    async with running() as client:
        await filled(client, 1)
        far = 1 << 62
        page = await client.get(f"/broker/consume/t/g/0?offset={far}")
        assert (page["messages"], page["next_offset"]) == ([], far)
        refused = await client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": far}, ok=409)
        assert refused["offset"] == far
        assert (await client.post("/broker/commit", {"topic": "t", "group": "v1.2", "partition": 0, "offset": 0}))["ok"]


# -- where to start -----------------------------------------------------------------------------------------------
async def test_from() -> None:
    async with running() as client:
        await filled(client)
        read = "/broker/topics/t/0/records?limit=2&from="
        assert offsets(await client.get(read + "earliest")) == [0, 1]
        assert offsets(await client.get(read + "tail:3")) == [7, 8]
        assert offsets(await client.get(read + "tail:99")) == [0, 1]
        latest = await client.get(read + "latest")
        assert (latest["messages"], latest["next_offset"]) == ([], 10)
        assert (await client.get(read + "tail:0"))["next_offset"] == 10
        assert offsets(await client.get("/broker/consume/t/g/0?limit=1&offset=-1")) == [0]


async def test_from_a_time() -> None:
    async with running() as client:
        await filled(client, 1)
        await trio.sleep(0.005)
        await client.produce("t", b"later")
        stamp = (await client.get("/broker/topics/t/0/records?offset=1"))["messages"][0]["timestamp_ms"]
        moment = datetime.datetime.fromtimestamp(stamp // 1000, datetime.UTC).replace(microsecond=stamp % 1000 * 1000)
        for text in (moment.isoformat(), moment.isoformat().replace("+00:00", "Z")):
            page = await client.get("/broker/topics/t/0/records?from=time:" + urllib.parse.quote(text))
            assert offsets(page) == [1]
        assert offsets(await client.get("/broker/topics/t/0/records?from=time:1970-01-01T00:00:00Z")) == [0, 1]
        assert (await client.get("/broker/topics/t/0/records?from=time:2999-01-01T00:00:00Z"))["next_offset"] == 2


async def test_retention_moves_the_start() -> None:
    async with running() as client:
        await filled(client)
        await client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 1})
        await client.post("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 6})
        refused = await client.get("/broker/consume/t/g/0?offset=3", ok=416)
        assert (refused["error"], refused["log_start_offset"], refused["high_watermark"]) == ("offset_out_of_range", 6, 10)
        page = await client.get("/broker/consume/t/g/0?limit=2")
        assert (offsets(page), page["skipped_to"], page["committed_offset"]) == ([6, 7], 6, 1)
        fresh = await client.get("/broker/consume/t/new/0?limit=2")
        assert offsets(fresh) == [6, 7]
        assert "skipped_to" not in fresh
        headers = (await client.call("GET", "/broker/consume/t/g/0", headers={b"accept": b"application/x-ndjson"})).headers
        assert headers[b"ayder-skipped-to"] == b"6"
        await client.post("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 10})
        empty = await client.get("/broker/consume/t/g/0")
        assert (empty["messages"], empty["next_offset"], empty["skipped_to"]) == ([], 10, 10)


async def test_an_explicit_offset_that_retention_overtakes_is_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records go between the check and the read: said as always (C-3), not skipped."""
    fetch = Fetcher.fetch
    async with running() as client:
        await filled(client)

        async def overtaken(self: Fetcher, *arguments: Any) -> Page:
            await client.post("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 6})
            return await fetch(self, *arguments)

        monkeypatch.setattr(Fetcher, "from_memory", lambda *_: None)
        monkeypatch.setattr(Fetcher, "fetch", overtaken)
        refused = await client.get("/broker/topics/t/0/records?offset=3", ok=416)
        assert (refused["error"], refused["log_start_offset"]) == ("offset_out_of_range", 6)


# -- waiting ------------------------------------------------------------------------------------------------------
async def test_long_poll_answers_with_the_first_record() -> None:
    async with running() as client:
        await filled(client, 1)
        pages: list[Any] = []

        async def poll() -> None:
            pages.append(await client.get("/broker/consume/t/g/0?offset=1&wait_ms=60000"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not pages
            await client.produce("t", b"x")
        assert offsets(pages[0]) == [1]


async def test_long_poll_ends() -> None:
    async with running(http__max_long_poll_ms=30) as client:
        await filled(client, 1)
        for wait in ("1", "999999"):
            page = await client.get(f"/broker/consume/t/g/0?offset=1&wait_ms={wait}")
            assert (page["messages"], page["next_offset"]) == ([], 1)
        assert offsets(await client.get("/broker/consume/t/g/0?wait_ms=60000")) == [0]


async def test_a_reader_that_hangs_up_leaves_nothing_behind() -> None:
    async with running() as client:
        await filled(client, 1)
        for _ in range(20):
            with trio.move_on_after(0.001):
                await client.get("/broker/consume/t/g/0?offset=1&wait_ms=60000")
        assert len(client.node.broker._grown) <= 1


async def test_a_deleted_topic_ends_the_wait() -> None:
    async with running() as client:
        await filled(client, 1)
        statuses: list[int] = []

        async def poll() -> None:
            statuses.append((await client.call("GET", "/broker/consume/t/g/0?offset=1&wait_ms=60000")).status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await client.call("DELETE", "/broker/topics/t", ok=200)
        assert statuses in ([200], [404])


# -- formats ------------------------------------------------------------------------------------------------------
def decode_frames(body: bytes) -> list[dict[str, Any]]:
    """A client of the binary page, written from the module doc of ``ayder/http/pages.py`` alone."""
    found = []
    at = 0
    while at < len(body):
        (length,) = struct.unpack_from("<I", body, at)
        frame = body[at + 4 : at + 4 + length]
        at += 4 + length
        partition, base, time_ms, count, flags, gap, zero, *starts = struct.unpack_from("<IQqIBBHIII", frame)
        assert zero == 0
        column = struct.calcsize("<IQqIBBHIII")
        ends = []
        for flag in (0, 1, 2):
            if not flag or flags & flag:
                ends.append(struct.unpack_from(f"<{count}I", frame, column))
                column += 4 * count
            else:
                ends.append(())
        stamps = struct.unpack_from(f"<{count}q", frame, column) if flags & 4 else (-1,) * count
        column += 8 * count if flags & 4 else 0
        cells: list[list[bytes]] = [[], [], []]
        for which in (1, 2, 0):
            for i, end in enumerate(ends[which]):
                start = 0 if i == 0 else ends[which][i - 1] + (gap if which == 0 else 0) - starts[which]
                cells[which].append(frame[column + start : column + end - starts[which]])
            column += ends[which][-1] - starts[which] if ends[which] else 0
        assert column == len(frame)
        for i in range(count):
            message = {"offset": base + i, "partition": partition, "value": cells[0][i]}
            message["timestamp_ms"] = time_ms if stamps[i] < 0 else stamps[i]
            message["key"] = cells[1][i] if cells[1] else b""
            message["headers"] = cells[2][i] if cells[2] else b""
            found.append(message)
    assert at == len(body)
    return found


async def mixed(client: Client) -> None:
    """Runs of every kind in partition 0."""
    await filled(client, 3)
    await client.post("/broker/topics/t/produce?partition=0&key=k", b"\xff")
    body = b'{"value":"a","headers":{"h":"v"}}\n{"value":"bb","key":"kk","timestamp_ms":9}\n{"value":"","key":"k"}'
    await client.call("POST", "/broker/topics/t/produce-ndjson?partition=0", body, headers=RECORDS, ok=200)
    await client.post("/broker/topics/t/produce-ndjson?partition=0", b'"x"\n"y\\n"')
    for n in range(3):
        await client.post("/broker/topics/t/produce?partition=0", b"single %d" % n)


@pytest.mark.parametrize("tail_bytes", [1 << 20, 0])
async def test_the_binary_page_says_what_the_json_page_does(tail_bytes: int) -> None:
    async with running(storage__tail_cache_bytes=tail_bytes) as client:
        await mixed(client)
        for query in ("", "&limit=2", "&offset=1&limit=4", "&offset=5&limit=1", "&max_bytes=3", "&offset=8&limit=3"):
            target = "/broker/topics/t/0/records?encoding=b64" + query
            reply = await client.call("GET", target, headers={b"accept": b"application/octet-stream"}, ok=200)
            page = await client.get(target)
            frames = decode_frames(reply.body)
            told = [
                {k: m[k] for k in ("offset", "partition", "timestamp_ms")}
                | {"value": base64.b64decode(m["value_b64"]), "key": base64.b64decode(m.get("key_b64", ""))}
                for m in page["messages"]
            ]
            assert [{k: v for k, v in f.items() if k != "headers"} for f in frames] == told
            assert [bool(f["headers"]) for f in frames] == [bool(m.get("headers")) for m in page["messages"]]
            assert_headers_say(reply.headers, page)
            lines = await client.call("GET", target, headers={b"accept": b"application/x-ndjson"}, ok=200)
            assert [json.loads(line) for line in lines.body.splitlines()] == page["messages"]
            assert_headers_say(lines.headers, page)


def assert_headers_say(headers: dict[bytes, bytes], page: dict[str, Any]) -> None:
    assert headers[b"ayder-count"] == b"%d" % page["count"]
    assert headers[b"ayder-next-offset"] == b"%d" % page["next_offset"]
    assert headers[b"ayder-truncated"] == (b"true" if page["truncated"] else b"false")
    assert headers[b"ayder-log-start-offset"] == b"%d" % page["log_start_offset"]
    assert headers[b"ayder-high-watermark"] == b"%d" % page["high_watermark"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (b"", b"application/json; charset=utf-8"),
        (b"*/*", b"application/json; charset=utf-8"),
        (b"text/html, application/*;q=0.5", b"application/json; charset=utf-8"),
        (b"Application/JSON", b"application/json; charset=utf-8"),
        (b"application/x-ndjson", b"application/x-ndjson"),
        (b"application/octet-stream, application/json;q=0.1", b"application/octet-stream"),
        (b"application/json, application/octet-stream", b"application/json; charset=utf-8"),
        (b"text/html", b""),
    ],
)
async def test_accept_decides_the_format(accept: bytes, kind: bytes) -> None:
    async with running() as client:
        await filled(client, 1)
        response = await client.ask("GET", "/broker/topics/t/0/records", headers={b"accept": accept})
        if kind:
            assert (response.status, response.content_type) == (200, kind)
        else:
            assert (response.status, json.loads(response.body)["error"]) == (406, "not_acceptable")


async def test_a_local_read_says_how_far_it_is() -> None:
    async with running() as client:
        await filled(client, 1)
        index = client.node.broker.applied_index
        target = "/broker/topics/t/0/records?consistency=local"
        assert (await client.get(target))["as_of_index"] == index
        reply = await client.call("GET", target, headers={b"accept": b"application/octet-stream"})
        assert reply.headers[b"ayder-as-of-index"] == b"%d" % index
        assert "as_of_index" not in await client.get("/broker/topics/t/0/records?consistency=linearizable")


# -- refusals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/broker/consume/none/g/0", 404, "topic_not_found"),
        ("/broker/consume/t/g/2", 404, "partition_not_found"),
        ("/broker/consume/t/g/-1", 400, "invalid_request"),
        ("/broker/consume/t/g/0x0", 400, "invalid_request"),
        ("/broker/consume/t/g/%D9%A3", 400, "invalid_request"),
        ("/broker/consume/t/g/99999999999", 400, "invalid_request"),
        ("/broker/consume/t/my%20group/0", 400, "invalid_request"),
        ("/broker/consume/t/%ff/0", 400, "invalid_request"),
        ("/broker/consume/t/g/0?limit=0", 400, "invalid_request"),
        ("/broker/consume/t/g/0?limit=10001", 400, "invalid_request"),
        ("/broker/consume/t/g/0?limit=NaN", 400, "invalid_request"),
        ("/broker/consume/t/g/0?limit=1e3", 400, "invalid_request"),
        ("/broker/consume/t/g/0?max_bytes=0", 400, "invalid_request"),
        ("/broker/consume/t/g/0?max_bytes=999999999", 400, "invalid_request"),
        ("/broker/consume/t/g/0?offset=-2", 400, "invalid_request"),
        ("/broker/consume/t/g/0?offset=9223372036854775808", 400, "invalid_request"),
        ("/broker/consume/t/g/0?wait_ms=-1", 400, "invalid_request"),
        ("/broker/consume/t/g/0?offset=1&from=latest", 400, "invalid_request"),
        ("/broker/consume/t/g/0?from=middle", 400, "invalid_request"),
        ("/broker/consume/t/g/0?from=tail:-1", 400, "invalid_request"),
        ("/broker/consume/t/g/0?from=tail:%D9%A3", 400, "invalid_request"),
        ("/broker/consume/t/g/0?from=time:yesterday", 400, "invalid_request"),
        ("/broker/consume/t/g/0?from=time:2024-01-01T00:00:00", 400, "invalid_request"),
        ("/broker/consume/t/g/0?from=%ff", 400, "invalid_request"),
        ("/broker/consume/t/g/0?consistency=none", 400, "invalid_request"),
    ],
)
async def test_bad_input_is_refused(target: str, status: int, code: str) -> None:
    async with running() as client:
        await filled(client, 1)
        answer = await client.get(target, ok=status)
        assert (answer["error"], answer["outcome"]) == (code, "not_applied")


async def test_unknown_parameters_are_ignored() -> None:
    async with running() as client:
        await filled(client, 1)
        assert (await client.get("/broker/consume/t/g/0?colour=red&limit=1&limit=x"))["count"] == 1


async def test_d29_names_are_decoded_once() -> None:
    """Defect D-29: what JSON named could not be reached by URL."""
    async with running() as client:
        await filled(client, 1)
        assert (await client.get("/broker/consume/%74/%67.%2D/%30"))["count"] == 1
        assert (await client.get("/broker/consume/%2574/g/0", ok=400))["error"] == "invalid_request"
        assert (await client.get("//broker//consume/t/g/0/"))["count"] == 1


def test_the_router_does_not_keep_what_strangers_ask_for() -> None:
    router = Router(ROUTES)
    for n in range(5000):
        router.match("GET", b"/nothing/%d" % n)
        router.match("GET", b"/nothing/" + b"x" * 4000 + b"%d" % n)
    assert sum(len(path) for _, path in router._matched) < 1 << 20
