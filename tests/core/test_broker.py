"""What gathers, what is on its way and who waits for it: order, exactly one answer each, and the account of bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from ayder.broker import Broker
from ayder.commands import BLOCK_HEADER_BYTES, CreateTopic, DeleteTopic, Retention
from ayder.config import load_config
from ayder.entries import EntryKind, LogEntry
from ayder.errors import AyderError, ErrorCode
from ayder.pending import PendingBlock
from ayder.raft.driver import Driver
from ayder.runs import Run, encode_values
from ayder.storage.memory import MemoryDisk, MemoryLogStore, MemoryOptions
from tests.core.waiters import Waiter

NO_ROOM = AyderError(ErrorCode.STORAGE_FULL, "full")


def broker_by_hand(**settings_: int) -> Broker:
    """A broker whose driver is ready and does nothing: the test takes blocks and applies them. Topic ``t`` of 2 partitions."""
    flags = {"storage.log": "memory", **{f"raft.{name}": str(value) for name, value in settings_.items()}}
    store = MemoryLogStore(MemoryDisk(), MemoryOptions())
    broker = Broker(config=load_config(flags, {}, None), store=store)
    driver = SimpleNamespace(ready=True, refuse_until_ns=0, poke=lambda: None)
    broker.attach(cast(Driver, driver))
    broker.admit(100).add_command(CreateTopic("t", 2, "sealed", Retention(), None, 9, 9), Waiter())
    write(broker)
    broker._queued_bytes = 0  # the command above went in by the back door
    return broker


def take(broker: Broker) -> LogEntry | None:
    payload = broker.take_block()
    if payload is None:
        return None
    entry = LogEntry(broker.store.last_index + 1, 1, EntryKind.BLOCK, 0, payload)
    broker.proposed(entry)
    return entry


def persist(broker: Broker, entry: LogEntry) -> None:
    (placement,) = broker.store.append([entry], None)
    broker.apply(entry, placement)


def write(broker: Broker) -> None:
    while (entry := take(broker)) is not None:
        persist(broker, entry)


class Queue(RuleBasedStateMachine):
    """Any order of producing, taking, applying, refusing and giving up."""

    def __init__(self) -> None:
        super().__init__()
        self.broker = broker_by_hand(max_block_bytes=64 << 10)
        self.now_ns = 0
        self.taken: LogEntry | None = None
        self.asked: list[tuple[int, list[bytes], list[Waiter]]] = []
        """Partition, values, waiter of each, in the order they were handed in."""
        self.waiters: list[Waiter] = []
        self.fresh = 0

    def waiter(self, wait_ns: int) -> Waiter:
        self.waiters.append(Waiter(self.now_ns + wait_ns))
        return self.waiters[-1]

    def values(self, count: int) -> list[bytes]:
        self.fresh += count
        return [b"%d" % n for n in range(self.fresh - count, self.fresh)]

    @rule(number=st.integers(0, 1), wait_ns=st.integers(1, 9))
    def value(self, number: int, wait_ns: int) -> None:
        (value,) = self.values(1)
        waiter = self.waiter(wait_ns)
        self.broker.produce_value(self.broker.topic("t"), number, value, waiter)
        self.asked.append((number, [value], [waiter]))

    @rule(number=st.integers(0, 1), count=st.integers(1, 3), wait_ns=st.integers(1, 9))
    def run(self, number: int, count: int, wait_ns: int) -> None:
        values, waiter = self.values(count), self.waiter(wait_ns)
        self.broker.produce_run(1 << 16 | number, encode_values(1, number, values), waiter)
        self.asked.append((number, values, [waiter]))

    @rule(wait_ns=st.integers(1, 9), producer=st.booleans())
    def batch(self, wait_ns: int, producer: bool) -> None:
        parts = [(number, self.values(2), self.waiter(wait_ns)) for number in (1, 0)]
        runs = [(1 << 16 | number, encode_values(1, number, values)) for number, values, _ in parts]
        key = b"d" * 16 + b"%d" % self.fresh if producer else b""
        self.broker.produce_batch(runs, [waiter for _, _, waiter in parts], producer=key)
        self.asked += [(number, values, [waiter]) for number, values, waiter in parts]

    @rule(wait_ns=st.integers(1, 9), big=st.booleans())
    def command(self, wait_ns: int, big: bool) -> None:
        block = self.broker.admit(600)
        before = block.size_bytes
        block.add_command(DeleteTopic("x" * (40_000 if big else 3)), self.waiter(wait_ns))
        self.broker._added(block, before)

    @precondition(lambda self: self.taken is None)
    @rule()
    def take(self) -> None:
        self.taken = take(self.broker)

    @precondition(lambda self: self.taken is not None)
    @rule(fits=st.sampled_from([True, True, False]))
    def finish(self, fits: bool) -> None:
        assert self.taken is not None
        if fits:
            persist(self.broker, self.taken)
        else:
            self.broker.refused(NO_ROOM)
        self.taken = None

    @rule(passed_ns=st.integers(1, 5))
    def time_passes(self, passed_ns: int) -> None:
        self.now_ns += passed_ns
        self.broker.expire(self.now_ns)
        for waiter in self.waiters:
            assert len(waiter.told) == 1 or waiter.deadline_ns > self.now_ns

    def teardown(self) -> None:
        if self.taken is not None:
            self.finish(True)
        write(self.broker)
        assert self.broker.queued_bytes == 0
        assert self.broker.queued_blocks == 0
        assert [len(waiter.told) for waiter in self.waiters] == [1] * len(self.waiters)
        for number in (0, 1):
            self.check_partition(number)

    def check_partition(self, number: int) -> None:
        reads = self.broker.store.read_runs(1 << 16 | number, 0, max_records=10**6, max_bytes=10**9)
        stored = [value for read in reads for value in Run(read.data).values(0, read.entry.count)]
        assert stored == sorted(stored, key=int), "the order of those who asked"
        assert len(set(stored)) == len(stored)
        for asked, values, waiters in self.asked:
            (told,) = waiters[0].told
            if asked != number:
                continue
            if isinstance(told, tuple):
                assert stored[told[0] : told[0] + told[1]] == values
            elif told is ErrorCode.STORAGE_FULL:
                assert not set(values) & set(stored), "refused, and yet it is there"
            else:
                assert told is ErrorCode.COMMIT_TIMEOUT
                assert len(set(values) & set(stored)) in (0, len(values))


Queue.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestQueue = Queue.TestCase


def test_values_that_gathered_are_one_run() -> None:
    broker = broker_by_hand()
    waiters = [Waiter() for _ in range(100)]
    for n, waiter in enumerate(waiters):
        broker.produce_value(broker.topic("t"), 0, b"%d" % n, waiter)
    write(broker)
    assert [waiter.told for waiter in waiters] == [[(n, 1, 2, False)] for n in range(100)]
    (read,) = broker.store.read_runs(1 << 16, 0, max_records=1000, max_bytes=10**6)
    assert read.entry.count == 100


def test_overload_is_refused_and_leaves_no_trace() -> None:
    broker = broker_by_hand(max_queued_bytes=8 << 20)
    refused = Waiter()
    for _ in range(7):
        broker.produce_value(broker.topic("t"), 0, bytes(1 << 20), Waiter())
    with pytest.raises(AyderError) as caught:
        broker.produce_value(broker.topic("t"), 0, bytes(1 << 20), refused)
    assert caught.value.code is ErrorCode.OVERLOADED
    assert broker.queued_bytes <= 8 << 20
    write(broker)
    assert (broker.queued_bytes, refused.told) == (0, [])
    assert broker.topic("t").partitions[0].next_offset == 7


def test_a_block_closes_at_its_size_and_one_larger_record_is_a_block_alone() -> None:
    broker = broker_by_hand(max_block_bytes=64 << 10)
    for size in (30_000, 30_000, 30_000, 200_000, 10):
        broker.produce_value(broker.topic("t"), 0, bytes(size), Waiter())
    sizes = []
    while (entry := take(broker)) is not None:
        sizes.append(len(entry.payload) // 10_000)
        persist(broker, entry)
    assert sizes == [6, 3, 20, 0]


def test_the_gathered_size_is_that_of_the_block() -> None:
    block = PendingBlock()
    block.add_value(1, 0, b"abc", Waiter())
    block.add_value(1, 0, b"", Waiter())
    block.add_value(1, 1, b"de", Waiter())
    block.add_run(1 << 16, encode_values(1, 0, [b"x"] * 9), Waiter())
    block.add_batch([(1 << 16, encode_values(1, 0, [b"y"]))], [Waiter()], b"d" * 17)
    block.add_command(DeleteTopic("t"), Waiter())
    assert block.size_bytes == len(block.encode())
    assert PendingBlock().size_bytes == BLOCK_HEADER_BYTES == len(PendingBlock().encode())


def test_records_for_a_topic_deleted_meanwhile_are_refused_and_its_successor_takes_none() -> None:
    broker = broker_by_hand()
    topic = broker.topic("t")
    early, late = Waiter(), Waiter()
    broker.produce_value(topic, 0, b"early", early)
    for command in (DeleteTopic("t"), CreateTopic("t", 2, "sealed", Retention(), None, 9, 9)):
        broker.admit(600).add_command(command, Waiter())
    broker.produce_value(topic, 0, b"late", late)
    write(broker)
    assert (early.told, late.told) == ([(0, 1, 2, False)], [ErrorCode.TOPIC_NOT_FOUND])
    assert broker.topic("t").topic_id == 2
    assert broker.topic("t").partitions[0].next_offset == 0
