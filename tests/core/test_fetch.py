"""Pages: contiguous, never a record twice or none, within their bounds, whatever is in memory and whatever retention does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from struct import pack

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ayder.broker import Broker
from ayder.commands import (
    RUN,
    CreateTopic,
    DeleteTopic,
    Retention,
    TrimPartition,
    TrimPartitions,
    encode_block,
    encode_command,
)
from ayder.config import load_config
from ayder.entries import EntryKind, LogEntry
from ayder.errors import AyderError, CorruptLog, ErrorCode
from ayder.fetch import Fetcher, Page, coalesce
from ayder.partition import Partition
from ayder.records import Record
from ayder.run_cache import CachedRun, RunCache
from ayder.runs import decode_headers, encode_records, encode_run, encode_values
from ayder.storage.interface import RunEntry, RunRead
from ayder.storage.memory import MemoryDisk, MemoryLogStore, MemoryOptions

UID = 1 << 16


class HookedStore(MemoryLogStore):
    """Something happens while a worker reads."""

    while_reading: Callable[[], None] | None = None

    def read_runs(self, uid: int, offset: int, *, max_records: int, max_bytes: int) -> list[RunRead]:
        reads = super().read_runs(uid, offset, max_records=max_records, max_bytes=max_bytes)
        if self.while_reading is not None:
            hook, self.while_reading = self.while_reading, None
            hook()
        return reads


class Log:
    """A broker without a driver: entries are appended and applied by hand. Records of partition 0 of topic ``t``."""

    def __init__(self, *, tail_bytes: int, read_bytes: int, segment_blocks: int = 3) -> None:
        flags = {
            "storage.log": "memory",
            "storage.tail_cache_bytes": str(tail_bytes),
            "storage.read_cache_bytes": str(read_bytes),
        }
        self.store = HookedStore(MemoryDisk(), MemoryOptions(segment_blocks=segment_blocks))
        self.broker = Broker(config=load_config(flags, {}, None), store=self.store)
        self.fetcher = Fetcher(self.broker)
        self.records: list[tuple[Record, int]] = []
        self.block(encode_command(CreateTopic("t", 2, "sealed", Retention(), None, 9, 9)))

    @property
    def partition(self) -> Partition:
        return self.broker.state.catalogue.by_name["t"].partitions[0]

    def block(self, *slots: tuple[int, bytes]) -> None:
        index = self.store.last_index + 1
        entry = LogEntry(index, 1, EntryKind.BLOCK, 1000 * index, encode_block(slots))
        (placement,) = self.store.append([entry], None)
        self.broker.apply(entry, placement)

    def take(self, records: list[Record], kind: str) -> None:
        """One block with one run of ours between two of the other partition."""
        values = [record.value for record in records]
        if kind == "records":
            run = encode_records(1, 0, records)
        elif kind == "lines":
            ends = [end + i for i, end in enumerate(accumulate(map(len, values)))]
            run = encode_run(1, 0, len(values), pack(f"<{len(ends)}I", *ends), b"\n".join(values), gap=1)
        else:
            run = encode_values(1, 0, values)
        kept = records if kind == "records" else [Record(value) for value in values]
        self.records += [(record, 1000 * (self.store.last_index + 1)) for record in kept]
        self.block((RUN, encode_values(1, 1, [b"other"])), (RUN, run), (RUN, encode_values(1, 1, [b"other"])))

    def trim(self, offset: int) -> None:
        weight = sum(len(r.value) + len(r.key) for r, _ in self.records[:offset])
        self.block(encode_command(TrimPartitions((TrimPartition(UID, offset, weight),))))

    def fetch(self, offset: int, limit: int, max_bytes: int) -> Page:
        partition = self.partition

        async def main() -> Page:
            return await self.fetcher.fetch(partition, offset, limit, max_bytes)

        return trio.run(main)


def read(page: Page) -> Iterator[tuple[int, Record, int]]:
    """(offset, record, time to show) of each record of a page."""
    for piece in page.slices:
        run, first, last = piece.cached.run, piece.first, piece.last
        stamps = run.timestamps(first, last) or [-1] * (last - first)
        columns = zip(run.values(first, last), run.keys(first, last), run.headers(first, last), stamps, strict=True)
        for offset, (value, key, headers, stamp) in enumerate(columns, piece.cached.base_offset + first):
            yield offset, Record(value, key, tuple(decode_headers(headers))), piece.cached.log_time_ms if stamp < 0 else stamp


def weight(record: Record) -> int:
    return len(record.value) + len(record.key) + sum(3 + len(name.encode()) + len(value) for name, value in record.headers)


def assert_page(log: Log, page: Page, asked: int, limit: int, max_bytes: int) -> None:
    partition = log.partition
    assert page.start_offset == max(asked, partition.log_start_offset)
    assert (page.log_start_offset, page.high_watermark) == (partition.log_start_offset, partition.next_offset)
    found = list(read(page))
    assert [offset for offset, _, _ in found] == list(range(page.start_offset, page.start_offset + page.count))
    assert page.next_offset == page.start_offset + page.count
    for offset, record, time_ms in found:
        kept, log_time_ms = log.records[offset]
        assert (record.value, record.key, record.headers) == (kept.value, kept.key, kept.headers)
        assert time_ms == (log_time_ms if kept.timestamp_ms is None else kept.timestamp_ms)
    there = len(log.records) - page.start_offset
    assert page.count <= limit
    assert page.count >= 1 or there <= 0
    assert page.truncated == (page.next_offset < len(log.records))
    assert page.count == 1 or sum(weight(record) for _, record, _ in found) <= max_bytes


records = st.lists(
    st.builds(
        Record,
        value=st.binary(max_size=9),
        key=st.binary(max_size=9),
        headers=st.lists(st.tuples(st.sampled_from("ab"), st.binary(max_size=9)), max_size=2).map(tuple),
        timestamp_ms=st.none() | st.integers(0, 5),
    ),
    min_size=1,
    max_size=6,
)
blocks = st.lists(st.tuples(records, st.sampled_from(["records", "lines", "values", "values"])), min_size=1, max_size=12)


@settings(max_examples=120, deadline=None)
@given(
    blocks,
    st.sampled_from([0, 600, 1500, 1 << 20]),
    st.sampled_from([0, 900, 1 << 20]),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 120), st.integers(-40, 30)), max_size=6),
)
def test_pages_hold_what_was_taken(
    given_blocks: list[tuple[list[Record], str]], tail: int, cache: int, reads: list[tuple[int, int, int, int]]
) -> None:
    log = Log(tail_bytes=tail, read_bytes=cache)
    for taken, kind in given_blocks:
        log.take(taken, kind)
    for offset, limit, max_bytes, trim in reads:
        assert_page(log, log.fetch(offset, limit, max_bytes), offset, limit, max_bytes)
        if trim > 0:
            log.trim(trim)
    offset, seen = 0, 0
    while (page := log.fetch(offset, 3, 40)).slices:
        assert_page(log, page, offset, 3, 40)
        seen += page.count
        offset = page.next_offset
    assert page.next_offset == len(log.records)
    assert seen == len(log.records) - log.partition.log_start_offset


def cold_log(values: int = 30) -> Log:
    log = Log(tail_bytes=0, read_bytes=0)
    for n in range(values):
        log.take([Record(b"%d" % n)], "values")
    return log


def test_a_page_begins_where_the_log_does_when_retention_overtakes_the_read() -> None:
    log = cold_log()
    log.store.while_reading = lambda: log.trim(5)
    assert_page(log, log.fetch(0, 10, 1000), 0, 10, 1000)


def test_a_read_that_retention_overtook_altogether_is_done_again() -> None:
    """It once said that the disk had lost the records."""
    log = Log(tail_bytes=0, read_bytes=0)
    for n in range(6):
        log.take([Record(b"%d" % n * 150_000)], "values")
    log.store.while_reading = lambda: log.trim(5)
    page = log.fetch(0, 1, 10)
    assert_page(log, page, 0, 1, 10)
    assert (page.start_offset, page.next_offset) == (5, 6)


def test_a_read_whose_records_all_went_is_an_empty_page() -> None:
    log = cold_log(5)
    log.store.while_reading = lambda: log.trim(5)
    page = log.fetch(0, 10, 1000)
    assert (page.start_offset, page.next_offset, page.count, page.truncated) == (5, 5, 0, False)


def test_a_topic_deleted_during_a_read_is_not_a_damaged_disk() -> None:
    log = cold_log()
    log.store.read_runs = lambda *a, **k: (log.block(encode_command(DeleteTopic("t"))), [])[1]  # type: ignore[method-assign,assignment,func-returns-value]
    with pytest.raises(AyderError) as caught:
        log.fetch(3, 10, 1000)
    assert caught.value.code is ErrorCode.TOPIC_NOT_FOUND


def test_what_the_disk_lost_is_said_to_be_lost() -> None:
    log = cold_log()
    log.store.read_runs = lambda *a, **k: []  # type: ignore[method-assign]
    with pytest.raises(AyderError) as caught:
        log.fetch(3, 10, 1000)
    assert (caught.value.code, caught.value.facts) == (ErrorCode.STORAGE_DAMAGED, {"offset": 3})


def test_a_rotten_run_is_storage_damage_and_not_an_accident() -> None:
    log = cold_log()

    def rotten(*_: object, **__: object) -> list[RunRead]:
        raise CorruptLog("a run of 1 records fails its checksum")

    log.store.read_runs = rotten  # type: ignore[method-assign]
    with pytest.raises(AyderError) as caught:
        log.fetch(3, 10, 1000)
    assert caught.value.code is ErrorCode.STORAGE_DAMAGED


def test_runs_are_joined_only_where_one_follows_the_other() -> None:
    """Where the log has a hole the offsets behind it must stay what they are."""

    def run_at(base: int, count: int, flags: bool = False) -> RunRead:
        records_ = [Record(b"%d" % n, b"k" if flags else b"") for n in range(base, base + count)]
        data = encode_records(1, 0, records_)
        return RunRead(RunEntry(base, count, 0, 10 * base, 0, len(data)), data)

    found = coalesce(
        [run_at(0, 1), run_at(1, 2), run_at(5, 1), run_at(6, 1), run_at(7, 1, flags=True), run_at(8, 1), run_at(9, 200)]
    )
    assert [(cached.base_offset, cached.count) for cached in found] == [(0, 3), (5, 2), (7, 1), (8, 1), (9, 200)]
    for cached in found:
        stamps = cached.run.timestamps(0, cached.count) or [cached.log_time_ms] * cached.count
        assert cached.run.values(0, cached.count) == [b"%d" % n for n in range(cached.base_offset, cached.end_offset)]
        assert stamps[0] == 10 * cached.base_offset


def test_keys_and_headers_count_against_the_page() -> None:
    """A page of ten small values with large keys and headers was as large as they were."""
    log = Log(tail_bytes=1 << 20, read_bytes=0)
    log.take([Record(b"v", b"k" * 100, (("h", b"x" * 100),)) for _ in range(10)], "records")
    assert log.fetch(0, 10, 500).count == 2
    assert log.fetch(0, 10, 10_000).count == 10


async def test_waiting_ends_with_a_record_a_deadline_or_the_topic(autojump_clock: object) -> None:
    log = cold_log(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.fetcher.wait_for_records, log.partition, 1, trio.current_time() + 1e9)
        await trio.testing.wait_all_tasks_blocked()
        log.take([Record(b"x")], "values")
    before = trio.current_time()
    await log.fetcher.wait_for_records(log.partition, 2, before + 5)
    assert trio.current_time() == before + 5
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.fetcher.wait_for_records, log.partition, 2, trio.current_time() + 1e9)
        await trio.testing.wait_all_tasks_blocked()
        log.block(encode_command(DeleteTopic("t")))


async def test_waiters_that_gave_up_leave_one_event_a_partition(autojump_clock: object) -> None:
    log = cold_log(1)
    for _ in range(50):
        await log.fetcher.wait_for_records(log.partition, 1, trio.current_time() + 1)
    assert len(log.broker._grown) == 1


async def test_time_is_looked_up_to_the_run() -> None:
    log = cold_log(10)  # blocks at 2000, 3000 … 11000 ms
    at = log.fetcher.offset_at_time
    assert [await at(log.partition, ms) for ms in (0, 2000, 2001, 11_000, 11_001)] == [0, 0, 1, 9, 10]
    log.trim(4)
    assert await at(log.partition, 0) == 4


# -- the cache ----------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 5), st.booleans()), max_size=60))
def test_the_cache_keeps_its_budget_and_its_tables(steps: list[tuple[int, int, int, bool]]) -> None:
    cache = RunCache(2500)
    for uid, base, count, touch in steps:
        cache.add(uid, CachedRun(base, count, 0, bytes(100 * count), 0, 100 * count))
        found = cache.find(uid, base, touch=touch)
        assert found is not None and found.base_offset == base
        assert cache.size_bytes <= 2500
        assert cache.size_bytes == sum(run.length + 400 for run in cache._runs.values())
        assert cache._bases == {
            u: sorted(b for v, b in cache._runs if v == u) for u in {u for u, _ in cache._runs}
        }  # fmt: skip
    for uid in range(3):
        cache.forget(uid)
    assert (cache.size_bytes, cache._bases, len(cache._runs)) == (0, {}, 0)


def test_the_least_used_goes_first() -> None:
    cache = RunCache(3 * 500)
    for base in (0, 1, 2):
        cache.add(1, CachedRun(base, 1, 0, bytes(100), 0, 100))
    assert cache.find(1, 0, touch=True)
    cache.add(1, CachedRun(3, 1, 0, bytes(100), 0, 100))
    assert [cache.find(1, base) is not None for base in range(4)] == [True, False, True, True]


def test_a_longer_run_takes_the_place_of_a_shorter_one() -> None:
    """A cold read joins small runs: what it kept of a shorter read must not hide the longer."""
    cache = RunCache(10_000)
    cache.add(1, CachedRun(0, 2, 0, bytes(100), 0, 100))
    cache.add(1, CachedRun(0, 9, 0, bytes(900), 0, 900))
    cache.add(1, CachedRun(0, 3, 0, bytes(100), 0, 100))
    assert (found := cache.find(1, 8)) is not None and found.count == 9
    assert cache.size_bytes == 1300
