"""Retention exact to the record, by size and by time, whichever scope says it; disk space comes back, records do not go."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any, cast

import attrs
import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import ayder.node
from ayder.checkpoint import StateImage, decode_image
from ayder.commands import Retention, SetRetention, TrimPartitions, encode_command
from ayder.log_cleaner import LogCleaner
from ayder.records import Record
from ayder.storage.interface import CheckpointStore
from tests.core.test_fetch import Log, blocks, weight
from tests.http.in_process import Client, running


def cleaner_of(log: Log, now_ms: int) -> LogCleaner:
    return LogCleaner(broker=log.broker, checkpoints=cast(CheckpointStore, None), collectable_index=0, clock_ms=lambda: now_ms)


def enforce(log: Log, now_ms: int) -> list[Any]:
    """What the retention loop does in a turn, without the log's wait."""
    cleaner = cleaner_of(log, now_ms)
    trims = cleaner._plan(cleaner._due(now_ms))
    if trims:
        log.block(encode_command(TrimPartitions(tuple(trims))))
    return trims


def retained(log: Log) -> list[Record]:
    return [record for record, _ in log.records[log.partition.log_start_offset :]]


def bytes_of(records: list[Record]) -> int:
    return sum(len(record.value) + len(record.key) for record in records)


@settings(max_examples=150, deadline=None)
@given(
    blocks,
    st.integers(1, 60),
    st.just(0) | st.sampled_from([0, 0, 3000, 8001]),
    st.sampled_from(["*", "t", "partition"]),
    st.integers(0, 9),
)
def test_what_stays_is_the_longest_end_that_a_policy_allows(
    given_blocks: list[Any], max_bytes: int, ttl_ms: int, scope: str, first_trim: int
) -> None:
    log = Log(tail_bytes=0, read_bytes=0)
    for records, kind in given_blocks:
        log.take(records, kind)
    log.trim(first_trim)
    policy = SetRetention("*" if scope == "*" else "t", 0 if scope == "partition" else None, Retention(ttl_ms, max_bytes))
    log.block(encode_command(policy))
    start, now_ms = log.partition.log_start_offset, 14_000
    enforce(log, now_ms)
    kept, gone = retained(log), log.records[start : log.partition.log_start_offset]
    assert log.partition.retained_bytes == bytes_of(kept) <= max_bytes
    in_time = [record for record, time_ms in log.records if not ttl_ms or time_ms >= now_ms - ttl_ms]
    assert len(kept) <= len(in_time)
    weighty = [i for i, (record, _) in enumerate(gone) if record.value or record.key]
    last = gone[weighty[-1]] if weighty else None
    if last is not None and (not ttl_ms or last[1] >= now_ms - ttl_ms):
        assert bytes_of([record for record, _ in gone[weighty[-1] :]]) + bytes_of(kept) > max_bytes, "one more would have fit"
    assert enforce(log, now_ms) == [], "a second turn finds nothing to do"


def test_time_goes_by_the_run_and_zero_means_for_ever() -> None:
    log = Log(tail_bytes=0, read_bytes=0)
    for n in range(5):  # blocks at 2000, 3000 … 6000 ms
        log.take([Record(b"%d" % n), Record(b"-")], "values")
    log.block(encode_command(SetRetention("*", None, Retention(2000, None))))
    enforce(log, 5000)
    assert log.partition.log_start_offset == 2
    log.block(encode_command(SetRetention("t", None, Retention(0, None))))
    enforce(log, 10**9)
    assert log.partition.log_start_offset == 2
    log.block(encode_command(SetRetention("t", 0, Retention(1, None))))
    enforce(log, 10**9)
    assert log.partition.log_start_offset == log.partition.next_offset == 10
    assert log.broker.state.catalogue.by_name["t"].partitions[1].log_start_offset == 2


def test_what_a_look_up_learned_is_not_asked_again_until_it_may_matter() -> None:
    log = Log(tail_bytes=0, read_bytes=0)
    log.take([Record(b"x")], "values")
    log.block(encode_command(SetRetention("t", 0, Retention(5000, None))))
    cleaner = cleaner_of(log, 0)
    assert cleaner._plan(cleaner._due(6000)) == []
    assert cleaner._due(6500) == []
    assert [trim.log_start_offset for trim in cleaner._plan(cleaner._due(7001))] == [1]


def test_weight_counts_what_a_page_carries() -> None:
    assert weight(Record(b"ab", b"c", (("h", b"v"),))) == 3 + 5


# -- a whole node, several lives ----------------------------------------------------------------------------------
SETTINGS: dict[str, object] = {
    "storage__log": "aof",
    "storage__segment_bytes": 64 << 10,
    "storage__segment_blocks": 7,
    "storage__preallocate_bytes": 0,
    "storage__reserve_bytes": 0,
    "storage__tail_cache_bytes": 2000,
    "storage__read_cache_bytes": 2000,
    "topics__idempotency_window_entries": 5,
}


def living(path: Path) -> Any:
    return running(**SETTINGS, storage__data_dir=str(path))


async def sealed(client: Client) -> None:
    """Until every segment that ended is sealed and the state at its end is on disk."""
    with trio.fail_after(20):
        while client.node.broker.segment_ends:
            await trio.sleep(0.002)


async def live(client: Client, seed: int, requests: int = 60) -> None:
    """Some of everything, the same for the same seed."""
    dice = random.Random(seed)
    for name in "ab":
        await client.post("/broker/topics", {"name": name, "partitions": 2})
    for turn in range(requests):
        name, number = dice.choice("ab"), dice.randrange(2)
        match dice.randrange(9):
            case 0:
                await client.post(
                    "/broker/commit", {"topic": name, "group": "g", "partition": number, "offset": -1, "reset": True}
                )
            case 1:
                body = {"topic": name, "group": dice.choice("gh"), "partition": number, "next_offset": dice.randrange(1, 4)}
                await client.post("/broker/commit", body, ok=None)
            case 2:
                await client.post(
                    "/broker/delete-before", {"topic": name, "partition": number, "before_offset": turn // 9}, ok=None
                )
            case 3:
                target = f"/broker/topics/{name}/produce?partition={number}&idempotency_key=k{dice.randrange(9)}"
                await client.post(target, b"%d" % dice.randrange(2), ok=None)
            case 4 if dice.random() < 0.2:
                await client.call("DELETE", f"/broker/topics/{name}")
                await client.post("/broker/topics", {"name": name, "partitions": 2})
            case _:
                values = [b"%d-%d" % (turn, n) + b"." * dice.randrange(60) for n in range(dice.randrange(1, 9))]
                await client.produce(name, *values, partition=number)


async def seen(client: Client) -> dict[tuple[str, int], list[tuple[int, bytes]]]:
    """Every record a client can read, by name and partition."""
    found = {}
    for name in "ab":
        for number in range(2):
            page = await client.get(f"/broker/topics/{name}/{number}/records?encoding=b64&limit=10000&max_bytes=16000000")
            assert not page["truncated"]
            found[name, number] = [(m["offset"], base64.b64decode(m["value_b64"])) for m in page["messages"]]
    return found


def state_of(client: Client) -> StateImage:
    """Topics, partitions, windows and groups; what belongs to the newest entry of a life is left out."""
    image = decode_image(client.node.broker.state.capture())
    return msgspec.structs.replace(image, applied_index=0, applied_term=0, state_hash=b"", log_time_ms=0)


@attrs.frozen
class Life:
    state: StateImage
    records: dict[tuple[str, int], list[tuple[int, bytes]]]


async def one_life(path: Path, seed: int, requests: int = 60) -> Life:
    async with living(path) as client:
        for half in (seed, seed + 1000):  # a slow disk may make one checkpoint of many ends, so let it catch up in between
            await live(client, half, requests // 2)
            await sealed(client)
        return Life(state_of(client), await seen(client))


async def assert_goes_on(path: Path, before: Life) -> None:
    async with living(path) as client:
        assert state_of(client) == before.state
        assert await seen(client) == before.records


def checkpoints(path: Path) -> list[Path]:
    return sorted((path / "checkpoints").iterdir())


@pytest.mark.parametrize("harm", ["none", "newest deleted", "newest flipped", "newest cut", "all deleted"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_a_restart_from_a_checkpoint_and_what_came_after_is_the_state_before(tmp_path: Path, harm: str, seed: int) -> None:
    """``newest deleted`` is a kill between sealing and the checkpoint."""
    before = await one_life(tmp_path, seed)
    files = checkpoints(tmp_path)
    assert len(files) == 2
    if harm == "newest deleted":
        files[-1].unlink()
    elif harm == "newest flipped":
        data = bytearray(files[-1].read_bytes())
        data[len(data) // 2] ^= 4
        files[-1].write_bytes(data)
    elif harm == "newest cut":
        files[-1].write_bytes(files[-1].read_bytes()[:-9])
    elif harm == "all deleted":
        for file in files:
            file.unlink()
    await assert_goes_on(tmp_path, before)
    await assert_goes_on(tmp_path, before)


@pytest.mark.parametrize("harm", [False, True])
async def test_collecting_takes_nothing_that_is_kept_or_that_a_restart_needs(tmp_path: Path, harm: bool) -> None:
    async with living(tmp_path) as client:
        await live(client, 3, 150)
        for name in "ab":
            for number in range(2):
                end = client.node.broker.topic(name).partitions[number].next_offset
                await client.post("/broker/delete-before", {"topic": name, "partition": number, "before_offset": end * 2 // 3})
        await live(client, 4, 40)
        await sealed(client)
        records = await seen(client)
        used = sum(file.stat().st_size for file in (tmp_path / "log").iterdir())
        assert await client.node.cleaner.collect() > 0
        assert sum(file.stat().st_size for file in (tmp_path / "log").iterdir()) < used
        assert await client.node.cleaner.collect() == 0
        assert await seen(client) == records
        before = Life(state_of(client), records)
        await sealed(client)
    if harm:
        newest = checkpoints(tmp_path)[-1]
        newest.write_bytes(b"rot" + newest.read_bytes()[3:])
    await assert_goes_on(tmp_path, before)


async def test_a_clock_that_went_back_does_not_stop_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for now_ms in (2_000_000, 1_000_000, 1_500_000):
        monkeypatch.setattr(ayder.node, "wall_clock_ms", lambda now_ms=now_ms: now_ms)
        async with living(tmp_path) as client:
            for _ in range(3):
                await client.post("/broker/topics/a/produce?partition=0", b"x")
    async with living(tmp_path) as client:
        stamps = [m["timestamp_ms"] for m in (await client.get("/broker/topics/a/0/records"))["messages"]]
    assert stamps == [2_000_000] * 9


async def test_size_limits_hold_while_producing(tmp_path: Path) -> None:
    """API.md section 6: exact to one block."""
    async with living(tmp_path) as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 1})
        await client.post("/broker/retention", {"topic": "t", "max_bytes": 1000})
        for n in range(60):
            await client.post("/broker/topics/t/produce", b"%099d" % n)
        partition = client.node.broker.topic("t").partitions[0]
        with trio.fail_after(20):
            while partition.retained_bytes > 1000:
                await trio.sleep(0.002)
        page = await client.get("/broker/topics/t/0/records")
        assert [int(m["value"]) for m in page["messages"]] == list(range(60 - 10, 60))
