"""Health, readiness, the log on disk, membership; that collection never takes what is kept."""

import pytest

from tests.http.in_process import Client, running, scoped_tokens

SMALL_SEGMENTS = {"storage__segment_bytes": 65536, "storage__preallocate_bytes": 0}


async def test_health_is_one() -> None:
    async with running() as client:
        reply = await client.call("GET", "/health")
        assert (reply.status, reply.body) == (200, b'{"ok":1}')
        assert (await client.call("HEAD", "/health")).status == 200


async def test_answers_do_not_carry_the_headers_of_others() -> None:
    async with running(http__cors_origins="https://a.example,https://b.example") as client:
        for origin in (b"https://a.example", b"https://b.example", b"https://evil.example", None):
            reply = await client.ask("GET", "/health", headers={} if origin is None else {b"origin": origin})
            allowed = [value for name, value in reply.headers if name == b"access-control-allow-origin"]
            assert allowed == ([origin] if origin in (b"https://a.example", b"https://b.example") else [])


async def test_ready_says_who_leads_and_where_the_log_is() -> None:
    async with running() as client:
        await client.produce("t", b"0")
        ready = await client.get("/ready")
        assert ready["ready"] is True and ready["reasons"] == []
        assert (ready["role"], ready["leader"], ready["term"]) == ("leader", "node-1", 1)
        assert ready["commit_index"] == ready["applied_index"] > 1


async def test_d12_a_node_that_takes_no_writes_is_not_ready_and_says_why() -> None:
    async with running() as client:
        client.node.driver.refuse_until_ns = 1
        full = await client.call("GET", "/ready")
        assert full.status == 503 and full.json()["ready"] is False and full.json()["reasons"] == ["the disk is full"]
        assert full.headers[b"retry-after"] == b"1"
        client.node.driver.refuse_until_ns = 0
        client.node.broker.shutting_down = True
        assert (await client.get("/ready", ok=503))["reasons"] == ["the node is stopping"]
        assert (await client.call("GET", "/health")).status == 200


async def test_the_status_is_a_barrier_for_receipts() -> None:
    async with running() as client:
        seen = []
        for _ in range(3):
            receipt = (await client.call("POST", "/broker/topics/t/produce", b"x")).json()
            status = await client.get("/admin/sealed/status")
            assert status["ok"] is True and status["last_synced_batch_id"] >= receipt["batch_id"] > 0
            seen.append(status["last_synced_batch_id"])
        assert seen == sorted(seen)


async def fill(client: Client, records: int = 60) -> None:
    """Enough for several small segments."""
    for number in range(records):
        await client.produce("t", b"%03d" % number + b"x" * 8000)
    await client.node.cleaner.seal_ended()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/sealed/gc", {"max_age_ms": 1, "max_bytes": 1}),
        ("/admin/sealed/gc", {}),
        ("/admin/sealed/gc", b""),
        ("/admin/compact", b""),
        ("/admin/sealed/release", b""),
    ],
)
async def test_d17_collection_loses_nothing_that_is_kept(path: str, body: object) -> None:
    async with running(**SMALL_SEGMENTS) as client:
        await fill(client)
        await client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 0})
        reply = await client.post(path, body)
        assert reply["freed_bytes"] == 0
        page = await client.get("/broker/consume/t/g/0?limit=1000")
        assert [message["value"][:3] for message in page["messages"]] == [f"{number:03}" for number in range(1, 60)]
        assert (await client.get("/broker/topics/t"))["partition_count"] == 8


async def test_collection_gives_back_what_retention_freed() -> None:
    async with running(**SMALL_SEGMENTS) as client:
        await fill(client)
        size = (await client.get("/admin/sealed/status"))["sealed_bytes"]
        await client.post("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 55})
        reply = await client.post("/admin/sealed/gc", {"max_bytes": size // 2})
        assert reply["freed_bytes"] > size // 2 and reply["targets_met"] is True
        trim_entry_bytes = reply["sealed_bytes_after"] - (size - reply["freed_bytes"])
        assert 0 < trim_entry_bytes < 300
        page = await client.get("/broker/topics/t/0/records?limit=1000")
        assert [message["offset"] for message in page["messages"]] == list(range(55, 60))


async def test_a_target_that_kept_records_exceed_is_not_met_and_says_so() -> None:
    async with running(**SMALL_SEGMENTS) as client:
        await fill(client)
        assert (await client.post("/admin/sealed/gc", {"max_bytes": 1}))["targets_met"] is False
        assert (await client.post("/admin/sealed/gc", {"max_bytes": 1 << 40, "max_age_ms": 1 << 40}))["targets_met"] is True
        assert (await client.get("/broker/topics/t/0/records?limit=1"))["high_watermark"] == 60


async def test_the_old_shapes_of_collection() -> None:
    async with running() as client:
        assert await client.post("/admin/compact") == {
            "ok": True,
            "result": "compaction_started",
            "async": False,
            "freed_bytes": 0,
        }
        assert await client.post("/admin/sealed/release") == {"ok": True, "released": 1, "freed_bytes": 0}
        collected = await client.post("/admin/sealed/gc", {"max_age_ms": 86_400_000})
        assert {"ok", "sealed_bytes_after"} <= collected.keys()
        for wrong in (b"[]", b"{", b'{"max_age_ms":-1}', b'{"max_bytes":1.5}', b'{"x":1}'):
            assert (await client.call("POST", "/admin/sealed/gc", wrong)).status == 400


async def test_a_node_of_one_has_a_membership_of_one_that_cannot_change() -> None:
    async with running(raft__node_id="alone") as client:
        membership = (await client.get("/ha/membership"))["membership"]
        assert (membership["node_count"], membership["voters_new_mask"], membership["joint_active"]) == (1, 1, False)
        (node,) = membership["nodes"]
        assert (node["index"], node["node_id"], node["is_voter"], node["is_learner"]) == (0, "alone", True, False)
        for change in ("add", "promote", "remove"):
            refused = await client.post(f"/ha/membership/{change}", {"node_id": "b"}, ok=400)
            assert (refused["error"], refused["outcome"]) == ("not_supported", "not_applied")
        assert (await client.post("/ha/membership/explode", ok=404))["error"] == "not_found"


async def test_operators_calls_need_the_admin_scope() -> None:
    async with running(scoped_tokens(user="produce:*,consume:*")) as client:
        user = Client(client.node, "user")
        for method, path in (
            ("GET", "/admin/sealed/status"),
            ("POST", "/admin/sealed/gc"),
            ("POST", "/admin/compact"),
            ("POST", "/admin/sealed/release"),
            ("GET", "/ha/membership"),
            ("POST", "/ha/membership/add"),
            ("POST", "/broker/retention"),
            ("POST", "/broker/delete-before"),
            ("POST", "/broker/topics"),
        ):
            reply = await user.call(method, path, b"{}")
            assert (reply.status, reply.json()["scope"]) == (403, "admin")
