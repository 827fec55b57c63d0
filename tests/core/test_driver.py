"""The driver with a disk that answers when the test says so: nothing is told too early, and failure ends it."""

from __future__ import annotations

import queue
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from ayder.broker import Broker
from ayder.commands import CreateTopic, Retention
from ayder.config import load_config
from ayder.entries import EntryKind, HardState, LogEntry, Placement
from ayder.errors import AyderError, ErrorCode, StoragePoisoned
from ayder.raft.consensus import Consensus
from ayder.raft.driver import Driver
from ayder.storage.interface import StorageFull
from ayder.storage.memory import MemoryDisk, MemoryLogStore, MemoryOptions
from tests.core.waiters import FAR_NS, Waiter


class GatedStore(MemoryLogStore):
    """Once ``gated``, an append ends when the test hands it a verdict: ``None``, or what it must raise."""

    gated = False
    idled = 0

    def __init__(self, disk: MemoryDisk) -> None:
        super().__init__(disk, MemoryOptions(segment_blocks=3))
        self.verdicts: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.started: list[Sequence[LogEntry]] = []

    def append(self, entries: Sequence[LogEntry], hard_state: HardState | None) -> list[Placement]:
        self.started.append(entries)
        verdict = self.verdicts.get() if self.gated else None
        if verdict is not None:
            raise verdict
        return super().append(entries, hard_state)

    def idle(self) -> None:
        self.idled += 1


@attrs.define
class Rig:
    store: GatedStore
    broker: Broker
    driver: Driver
    clock: MockClock

    def produce(self, value: bytes, *, deadline_ns: int = FAR_NS) -> Waiter:
        waiter = Waiter(deadline_ns)
        self.broker.produce_value(self.broker.topic("t"), 0, value, waiter)
        return waiter

    def release(self, verdict: Exception | None = None) -> None:
        self.store.verdicts.put(verdict)

    async def appends(self, count: int) -> None:
        """Until that many appends were started since the gate was shut."""
        await until(lambda: len(self.store.started) >= count)


async def until(condition: Callable[[], object]) -> None:
    """The writer is a real thread: give it the processor until it did what it must. The bound is for a test that fails."""
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        await trio.lowlevel.checkpoint()
        time.sleep(0.0002)


async def settled() -> None:
    """Whatever the event loop had to do without the disk is done."""
    for _ in range(20):
        await trio.lowlevel.checkpoint()


def rig_on(disk: MemoryDisk, clock: MockClock) -> Rig:
    store = GatedStore(disk)
    broker = Broker(config=load_config({"storage.log": "memory"}, {}, None), store=store)
    consensus = Consensus(node_id="n", voters=("n",), log=store, election_ticks=3)
    for info in store.segments():
        consensus.observe_log_time(info.last_time_ms)
    driver = Driver(consensus=consensus, log=store, source=broker, applier=broker, tick_s=0.05, clock_ms=lambda: 1000)
    broker.attach(driver)
    return Rig(store, broker, driver, clock)


@asynccontextmanager
async def running(clock: MockClock, disk: MemoryDisk | None = None) -> AsyncIterator[Rig]:
    """A driver that leads, with topic ``t``; its disk is gated from here on."""
    rig = rig_on(disk or MemoryDisk(), clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.driver.run)
        await until(lambda: rig.driver.ready)
        if "t" not in rig.broker.state.catalogue.by_name:
            await rig.broker.execute(CreateTopic("t", 2, "sealed", Retention(), None, 9, 9))
        await rig.driver.quiesce()
        rig.store.started.clear()
        rig.store.gated = True
        try:
            yield rig
        finally:
            rig.store.gated = False
            for _ in range(50):
                rig.release()
            nursery.cancel_scope.cancel()


async def test_d8_nothing_is_answered_or_shown_before_its_append_returned(mock_clock: MockClock) -> None:
    """Defect D-8: the answer meant "queued in memory"."""
    async with running(mock_clock) as rig:
        waiter = rig.produce(b"x")
        await rig.appends(1)
        await settled()
        assert waiter.told == []
        assert rig.broker.topic("t").partitions[0].next_offset == 0
        rig.release()
        await until(lambda: waiter.told)
        assert waiter.told == [(0, 1, rig.store.last_index, False)]
        assert rig.broker.applied_index == rig.store.last_index == rig.driver.consensus.commit_index


async def test_one_append_is_in_flight_and_what_gathers_meanwhile_is_the_next(mock_clock: MockClock) -> None:
    async with running(mock_clock) as rig:
        first = rig.produce(b"0")
        await rig.appends(1)
        rest = [rig.produce(b"%d" % n) for n in range(1, 30)]
        await settled()
        assert len(rig.store.started) == 1
        rig.release()
        await rig.appends(2)
        await until(lambda: first.told)
        assert [waiter.told for waiter in rest] == [[]] * 29
        rig.release()
        await until(lambda: rest[-1].told)
        assert len(rig.store.started) == 2
        assert [waiter.told[0][0] for waiter in rest] == list(range(1, 30))  # type: ignore[index]


@pytest.mark.parametrize("failure", [StoragePoisoned("fsync: EIO"), OSError(5, "EIO"), MemoryError()])
async def test_a_failed_append_ends_the_node_and_answers_nobody(failure: Exception, mock_clock: MockClock) -> None:
    waiters: list[Waiter] = []

    async def fail() -> None:
        async with running(mock_clock) as rig:
            waiters.append(rig.produce(b"in flight"))
            await rig.appends(1)
            waiters.append(rig.produce(b"gathering"))
            rig.release(failure)
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await fail()
    innermost: BaseException = caught.value
    while isinstance(innermost, ExceptionGroup):
        (innermost,) = innermost.exceptions
    assert innermost is failure
    assert [waiter.told for waiter in waiters] == [[], []]


async def test_a_full_disk_refuses_surely_and_the_next_block_may_fit(mock_clock: MockClock) -> None:
    async with running(mock_clock) as rig:
        refused = rig.produce(b"refused")
        await rig.appends(1)
        behind = rig.produce(b"behind")
        last_index = rig.store.last_index
        rig.release(StorageFull("no room"))
        await rig.appends(2)
        assert refused.told == [ErrorCode.STORAGE_FULL]
        with pytest.raises(AyderError) as caught:
            rig.produce(b"not even tried")
        assert caught.value.code is ErrorCode.STORAGE_FULL
        rig.driver.consensus.check_invariants()
        rig.release()
        await until(lambda: behind.told)
        assert behind.told == [(0, 1, last_index + 1, False)]
        assert rig.driver.refuse_until_ns == 0
        assert rig.broker.queued_bytes == 0


async def test_a_node_finds_out_by_itself_that_there_is_room_again(mock_clock: MockClock) -> None:
    """Who is told that it is not ready sends it nothing, so it would have stayed so for ever."""
    async with running(mock_clock) as rig:
        refused = rig.produce(b"refused")
        rig.release(StorageFull("no room"))
        await until(lambda: refused.told)
        for verdict in (StorageFull("no room"), None):
            tries = len(rig.store.started)
            rig.driver.refuse_until_ns = 1  # long past
            rig.clock.jump(0.06)
            await rig.appends(tries + 1)
            assert [entry.kind for entry in rig.store.started[-1]] == [EntryKind.NOOP]
            rig.release(verdict)
            await until(lambda: rig.driver.refuse_until_ns != 1)
            assert (rig.driver.refuse_until_ns == 0) is (verdict is None)
            rig.driver.consensus.check_invariants()
        assert len(rig.store.started) == 3
        await until(lambda: rig.broker.applied_index == rig.store.last_index)


async def test_a_waiter_whose_time_is_up_is_told_so_and_the_record_comes_all_the_same(mock_clock: MockClock) -> None:
    async with running(mock_clock) as rig:
        in_flight = rig.produce(b"in flight", deadline_ns=0)
        await rig.appends(1)
        gathering = rig.produce(b"gathering", deadline_ns=0)
        patient = rig.produce(b"patient")
        await settled()
        assert in_flight.told == []
        rig.clock.jump(0.06)
        await until(lambda: gathering.told)
        assert (in_flight.told, gathering.told, patient.told) == ([ErrorCode.COMMIT_TIMEOUT], [ErrorCode.COMMIT_TIMEOUT], [])
        rig.release()
        rig.release()
        await until(lambda: patient.told)
        assert rig.broker.topic("t").partitions[0].next_offset == 3
        assert (len(in_flight.told), len(gathering.told), patient.told[0][0]) == (1, 1, 2)  # type: ignore[index]


async def test_a_command_whose_caller_left_is_applied(mock_clock: MockClock) -> None:
    async with running(mock_clock) as rig:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rig.broker.execute, CreateTopic("u", 1, "sealed", Retention(), None, 9, 9))
                await rig.appends(1)
                scope.cancel()
        rig.release()
        await until(lambda: "u" in rig.broker.state.catalogue.by_name)
        assert rig.broker.queued_bytes == 0


async def test_quiesce_waits_for_what_was_handed_in(mock_clock: MockClock) -> None:
    async with running(mock_clock) as rig:
        waiter = rig.produce(b"x")
        finished: list[bool] = []

        async def quiesce() -> None:
            await rig.driver.quiesce()
            finished.append(bool(waiter.told))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(quiesce)
            await rig.appends(1)
            await settled()
            assert finished == []
            rig.release()
        assert finished == [True]


async def test_the_disk_is_told_when_there_is_nothing_to_do(mock_clock: MockClock) -> None:
    async with running(mock_clock) as rig:
        before = rig.store.idled
        rig.clock.jump(0.06)
        await until(lambda: rig.store.idled > before)


async def test_a_restart_applies_what_the_last_life_wrote_before_it_serves(mock_clock: MockClock) -> None:
    disk = MemoryDisk()
    async with running(mock_clock, disk) as rig:
        rig.store.gated = False
        for n in range(20):
            waiter = rig.produce(b"%d" % n)
            await until(lambda told=waiter: told.told)  # type: ignore[misc]
        before = rig.broker.state.catalogue.by_name["t"].partitions[0].next_offset
        term = rig.driver.consensus.current_term
    again = rig_on(disk, mock_clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(again.driver.run)
        with pytest.raises(AyderError) as caught:
            again.broker.admit(1)
        assert caught.value.code is ErrorCode.NO_QUORUM
        await until(lambda: again.driver.ready)
        assert again.broker.topic("t").partitions[0].next_offset == before == 20
        assert again.driver.consensus.current_term == term + 1
        assert again.broker.applied_index == again.store.last_index == again.driver.consensus.commit_index
        assert again.produce(b"next").told == []
        await again.driver.quiesce()
        assert again.broker.topic("t").partitions[0].next_offset == 21
        nursery.cancel_scope.cancel()


async def test_a_disk_that_is_full_at_the_start_is_tried_again(mock_clock: MockClock) -> None:
    disk = MemoryDisk()
    disk.full = True
    rig = rig_on(disk, mock_clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.driver.run)
        await rig.appends(1)
        await settled()
        assert not rig.driver.ready
        disk.full = False

        def leads() -> bool:
            rig.clock.jump(0.3)
            return rig.driver.ready

        await until(leads)
        assert rig.driver.refuse_until_ns == 0
        nursery.cancel_scope.cancel()
