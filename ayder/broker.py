"""The verbs that change something: what a request must satisfy before it may enter the log, and who waits for it.

Owns: admission to the log, the choice of a partition, the blocks that gather and those that are on their way, and what happens
to each applied run (offset index, tail cache, readers who wait). Must not know: HTTP, files, Raft's rules.

Invariants: every check here is a courtesy that spares the log a refusal, the decision is ``StateMachine.apply``'s; an
``AyderError`` raised by a verb means that nothing entered the log; a waiter is told exactly once. All state changes are sync.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import trio

from ayder.checkpoint import Snapshot
from ayder.commands import BLOCK_HEADER_BYTES, Command, CreateTopic, Retention
from ayder.config import Config
from ayder.entries import LogEntry, LogIndex, Placement
from ayder.errors import AyderError, ErrorCode
from ayder.partition import Partition
from ayder.pending import MAKES_ROOM, AppendWaiter, EveryCopy, PendingBlock
from ayder.raft.driver import Driver
from ayder.records import Record
from ayder.run_cache import CachedRun, RunCache
from ayder.runs import RUN_HEADER_BYTES, encode_records
from ayder.state_machine import Result, StateMachine
from ayder.storage.interface import LogStore, RunEntry
from ayder.topics import Topic, partition_for_key

__all__ = ["Broker", "SegmentEnd"]

_BLOCK_SLACK_BYTES = 64
_SEALED = b'"sealed":true,"durable":true,"mode":"sealed","synced":true'
_IN_MEMORY = b'"sealed":false,"durable":false,"mode":"memory","synced":null'


class SegmentEnd:
    """A segment whose last entry was applied: the state at that point, and what its footer needs."""

    __slots__ = ("applied_index", "end_offsets", "segment_id", "state")

    def __init__(self, segment_id: int, applied_index: LogIndex, state: Snapshot, end_offsets: dict[int, int]) -> None:
        self.segment_id = segment_id
        self.applied_index = applied_index
        self.state = state
        self.end_offsets = end_offsets


class _CommandWaiter:
    """Bridges a control command to the task that awaits it."""

    __slots__ = ("deadline_ns", "done", "event", "log_index", "outcome")

    def __init__(self, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns
        self.done = False
        self.event = trio.Event()
        self.outcome: Result | None = None
        self.log_index = 0

    def applied(self, result: Result, log_index: int) -> None:
        self.outcome, self.log_index = result, log_index
        self.event.set()

    def failed(self, error: AyderError) -> None:
        self.outcome = error
        self.event.set()


class Broker:
    """One node's broker. ``attach`` gives it its driver; until that is ready every verb answers ``no_quorum``."""

    def __init__(self, *, config: Config, store: LogStore, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.config = config
        self.store = store
        self.state = StateMachine(self)
        self.tail = RunCache(config.storage.tail_cache_bytes)
        self.clock_ns = clock_ns
        self.segment_ends: deque[SegmentEnd] = deque()
        self.segment_ended = trio.Event()
        self.retention_due = trio.Event()
        self.size_limits: dict[int, int] = {}
        """Partitions with a size limit, kept by the log cleaner: exceeding one wakes it at once."""
        self.claims = _SEALED if store.survives_restart else _IN_MEMORY
        """What a receipt says of the durability reached, as JSON fields: computed from the store, never from a request."""
        self.shutting_down = False
        self.client_urls: dict[str, str] = {}
        """Where clients reach each member; from the configuration only."""
        self._driver: Driver | None = None
        self._segment_id: int | None = None
        self._gathering: deque[PendingBlock] = deque()
        self._in_flight: dict[LogIndex, PendingBlock] = {}
        self._taken: PendingBlock | None = None
        self._early: deque[LogIndex] = deque()
        """Blocks in flight with somebody in them who is content with this disk."""
        self.every_copy = EveryCopy()
        self._queued_bytes = 0
        self._max_queued_bytes = config.raft.max_queued_bytes
        self._max_block_bytes = config.raft.max_block_bytes
        self._grown: dict[int, trio.Event] = {}
        self._cursors: dict[int, int] = {}
        self.records_in: dict[int, int] = {}
        """Records taken since start, by topic id (metrics)."""
        self.bytes_in: dict[int, int] = {}

    def attach(self, driver: Driver) -> None:
        """Proposals go through this driver from now on."""
        self._driver = driver

    def begin_stop(self) -> None:
        """Take nothing more; whoever waits for records is woken to see it."""
        self.shutting_down = True
        grown, self._grown = self._grown, {}
        for event in grown.values():
            event.set()

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the disk or to be applied."""
        return self._queued_bytes

    @property
    def queued_blocks(self) -> int:
        """Blocks that wait for the disk or to be applied."""
        return len(self._gathering) + len(self._in_flight)

    @property
    def driver(self) -> Driver:
        """The driver attached."""
        assert self._driver is not None
        return self._driver

    # -- admission ------------------------------------------------------------------------------------------------
    def admit(self, size_bytes: int, *, makes_room: bool = False) -> PendingBlock:
        """The block that may take ``size_bytes`` more. Raises ``AyderError``: surely nothing happened.

        While the disk is full only what ``makes_room`` is let in: it may use the ballast (RELIABILITY S-9).

        Codes: shutting_down, no_quorum (not caught up), storage_full, overloaded, payload_too_large.
        """
        driver = self._driver
        assert driver is not None
        if self.shutting_down:
            raise AyderError(ErrorCode.SHUTTING_DOWN, "the node is stopping")
        if not driver.ready:
            raise self.not_ready()
        if driver.refuse_until_ns and not makes_room and self.clock_ns() < driver.refuse_until_ns:
            raise AyderError(ErrorCode.STORAGE_FULL, "the disk is full; nothing was written")
        if self._queued_bytes + size_bytes > self._max_queued_bytes:
            raise AyderError(ErrorCode.OVERLOADED, "too much is waiting for the disk", retry_after=1)
        gathering = self._gathering
        if gathering:
            block = gathering[-1]
            if block.size_bytes + size_bytes <= self._max_block_bytes or not block:
                return block
        block = PendingBlock()
        gathering.append(block)
        return block

    def not_ready(self) -> AyderError:
        """Why this node can neither take a write nor serve a linearizable read now: surely nothing happened."""
        consensus = self.driver.consensus
        if consensus.leader_id is None:
            return AyderError(ErrorCode.NO_QUORUM, "no leader is known", leader_url=None)
        if consensus.leader_id == consensus.node_id:
            return AyderError(ErrorCode.NO_QUORUM, "the node is still applying its log", leader_url=None)
        url = self.client_urls.get(consensus.leader_id)
        return AyderError(ErrorCode.NOT_LEADER, f"{consensus.leader_id} leads", leader_url=url)

    async def read_barrier(self) -> None:
        """Until a read here sees everything acknowledged before this call. Raises ``AyderError`` (no_quorum, not_leader)."""
        with trio.move_on_after(self.config.http.default_produce_timeout_ms / 1000):
            await self.driver.read_barrier()
            return
        raise AyderError(ErrorCode.NO_QUORUM, "no majority confirmed in time that this node still leads", leader_url=None)

    def _added(self, block: PendingBlock, size_before: int) -> None:
        self._queued_bytes += block.size_bytes - size_before
        self.driver.poke()

    # -- topics ---------------------------------------------------------------------------------------------------
    def topic(self, name: str) -> Topic:
        """The topic of that name. Raises ``AyderError`` (topic_not_found)."""
        topic = self.state.catalogue.by_name.get(name)
        if topic is None:
            raise AyderError(ErrorCode.TOPIC_NOT_FOUND, f"there is no topic {name!r}", topic=name)
        return topic

    def creation_of(
        self, name: str, partitions: int, *, storage: str = "", retention: Retention | None = None, write_mode: str | None = None
    ) -> CreateTopic:
        """The command that creates a topic with this node's settings. Raises ``AyderError`` when there are too many topics."""
        topics, catalogue = self.config.topics, self.state.catalogue
        if len(catalogue.by_name) >= topics.max_topics and name not in catalogue.by_name:
            raise AyderError(
                ErrorCode.INVALID_REQUEST,
                f"this node has the {topics.max_topics} topics it may have",
                max_topics=topics.max_topics,
            )
        return CreateTopic(
            name,
            partitions,
            storage or topics.default_storage,
            retention or Retention(),
            write_mode,
            topics.idempotency_window_entries,
            topics.idempotency_window_ms,
        )

    def partition(self, topic: Topic, number: int) -> Partition:
        """Raises ``AyderError`` (partition_not_found)."""
        if not 0 <= number < len(topic.partitions):
            raise AyderError(
                ErrorCode.PARTITION_NOT_FOUND,
                f"topic {topic.name!r} has partitions 0 to {len(topic.partitions) - 1}, not {number}",
                topic=topic.name,
                partition=number,
            )
        return topic.partitions[number]

    def choose_partition(self, topic: Topic, key: bytes) -> int:
        """By key as Kafka's clients do; without one the partition of the moment, another each block (sticky round-robin)."""
        count = len(topic.partitions)
        if key:
            return partition_for_key(key, count)
        return (self.state.applied_index + topic.topic_id) % count

    # -- produce --------------------------------------------------------------------------------------------------
    def produce_value(self, topic: Topic, partition: int, value: bytes, waiter: AppendWaiter) -> None:
        """One bare record: no key, headers, own timestamp or idempotency key. The waiter is told when it is durable."""
        block = self.admit(len(value) + RUN_HEADER_BYTES + _BLOCK_SLACK_BYTES)
        before = block.size_bytes
        block.add_value(topic.topic_id, partition, value, waiter)
        if waiter.early:
            block.early = True
        self._added(block, before)

    def produce_run(self, uid: int, run: bytes, waiter: AppendWaiter) -> None:
        """Records of one partition already laid out as a run (``runs.encode_*``), with its producer section if any."""
        block = self.admit(len(run) + _BLOCK_SLACK_BYTES)
        before = block.size_bytes
        block.add_run(uid, run, waiter)
        if waiter.early:
            block.early = True
        self._added(block, before)

    def produce_records(
        self, topic: Topic, partition: int, records: Sequence[Record], waiter: AppendWaiter, *, producer: bytes = b""
    ) -> None:
        """Records of one partition with keys, headers or timestamps."""
        run = encode_records(topic.topic_id, partition, records, producer=producer)
        self.produce_run(topic.partitions[partition].uid, run, waiter)

    def produce_batch(self, runs: Sequence[tuple[int, bytes]], waiters: Sequence[AppendWaiter], *, producer: bytes = b"") -> None:
        """Runs of several partitions in one block, so that all of them or none is taken. One waiter a run."""
        block = self.admit(sum(len(run) for _, run in runs) + _BLOCK_SLACK_BYTES * (len(runs) + 1) + len(producer))
        before = block.size_bytes
        block.add_batch(runs, waiters, producer)
        self._added(block, before)

    # -- control commands -----------------------------------------------------------------------------------------
    async def execute(self, command: Command, *, timeout_ms: int | None = None) -> tuple[Result, LogIndex]:
        """Put a control command through the log and return what applying it gave. Raises ``AyderError``."""
        wait_ms = self.config.http.default_produce_timeout_ms if timeout_ms is None else timeout_ms
        waiter = _CommandWaiter(self.clock_ns() + wait_ms * 1_000_000)
        block = self.admit(512 + _BLOCK_SLACK_BYTES, makes_room=isinstance(command, MAKES_ROOM))
        before = block.size_bytes
        block.add_command(command, waiter)
        self._added(block, before)
        await waiter.event.wait()
        if isinstance(waiter.outcome, AyderError):
            raise waiter.outcome
        assert waiter.outcome is not None
        return waiter.outcome, waiter.log_index

    # -- BlockSource ----------------------------------------------------------------------------------------------
    def take_block(self) -> bytes | None:
        """See ``raft.driver.BlockSource``."""
        if not self._gathering or not self._gathering[0]:
            return None
        block = self._gathering.popleft()
        payload = block.encode()
        block.forget_bytes()
        self._taken = block
        return payload

    def proposed(self, entry: LogEntry) -> None:
        """See ``raft.driver.BlockSource``."""
        assert self._taken is not None
        self._in_flight[entry.index] = self._taken
        if self._taken.early:
            self._early.append(entry.index)
        self._taken = None

    def makes_room(self, index: LogIndex) -> bool:
        """See ``raft.driver.BlockSource``."""
        block = self._in_flight.get(index)
        return block is not None and block.makes_room

    def leadership_lost(self) -> None:
        """See ``raft.driver.BlockSource``."""
        unknown = AyderError(ErrorCode.COMMIT_TIMEOUT, "leadership was lost before this was committed; it may still be")
        for index in list(self._in_flight):
            self._answer_for(self._in_flight.pop(index)).fail(unknown)
        surely_not = self.not_ready()
        while self._gathering:
            self._answer_for(self._gathering.popleft()).fail(surely_not)
        self._early.clear()
        self.every_copy.give_up()

    def progressed(self) -> None:
        """See ``raft.driver.BlockSource``."""
        consensus = self.driver.consensus
        while self._early and self._early[0] <= consensus.persisted_index:
            self._tell_written(self._early.popleft())
        if self.every_copy:
            self.every_copy.release(consensus.everywhere_index)

    def _tell_written(self, index: LogIndex) -> None:
        """Say where the records of a block that is not committed yet will be: exact as long as this node leads."""
        before: dict[int, int] = {}
        for at, block in self._in_flight.items():  # in the order of the log; what is not in here was applied
            if not block.foreseeable:
                return  # whoever waits is answered at the commit, which is more than was asked for
            if at == index:
                block.tell_written(lambda uid: self._next_offset(uid, before), index)
                return
            for uid, count in block.record_counts.items():
                before[uid] = before.get(uid, 0) + count

    def _next_offset(self, uid: int, in_flight: dict[int, int]) -> int | None:
        partition = self.state.catalogue.partition(uid)
        return None if partition is None else partition.next_offset + in_flight.get(uid, 0)

    def refused(self, error: AyderError) -> None:
        """See ``raft.driver.BlockSource``: the newest block in flight was not written."""
        if self._in_flight:
            self._answer_for(self._in_flight.popitem()[1]).fail(error)

    def expire(self, now_ns: int) -> None:
        """See ``raft.driver.BlockSource``."""
        for block in (*self._in_flight.values(), *self._gathering):
            block.expire(now_ns)
        if self.every_copy:
            self.every_copy.expire(now_ns)

    def _answer_for(self, block: PendingBlock) -> PendingBlock:
        self._queued_bytes -= block.size_bytes - BLOCK_HEADER_BYTES
        return block

    # -- Applier and RunSink --------------------------------------------------------------------------------------
    @property
    def applied_index(self) -> LogIndex:
        """See ``raft.driver.Applier``."""
        return self.state.applied_index

    def apply(self, entry: LogEntry, placement: Placement) -> None:
        """See ``raft.driver.Applier``. The first entry of a segment is also the moment the one before it can be sealed."""
        if placement.segment_id != self._segment_id:
            self._begin_segment(placement.segment_id)
        results = self.state.apply(entry, placement)
        block = self._in_flight.pop(entry.index, None)
        if block is not None:
            self._answer_for(block).complete(results, entry.index)

    def _begin_segment(self, segment_id: int) -> None:
        if self._segment_id is not None:
            self.segment_ends.append(
                SegmentEnd(self._segment_id, self.state.applied_index, self.state.snapshot(), self.state.end_offsets())
            )
            self.segment_ended.set()
        self._segment_id = segment_id

    def run_applied(self, uid: int, segment_id: int, entry: RunEntry, payload: bytes, start: int) -> None:
        """See ``state_machine.RunSink``."""
        self.store.note_run(segment_id, uid, entry)
        base, count, _, log_time_ms, _, length = entry
        self.tail.add(uid, CachedRun(base, count, log_time_ms, payload, start, length))
        grown = self._grown.pop(uid, None)
        if grown is not None:
            grown.set()
        limit = self.size_limits.get(uid)
        if limit is not None:
            self._check_size(uid, limit)
        topic_id = uid >> 16
        self.records_in[topic_id] = self.records_in.get(topic_id, 0) + count
        self.bytes_in[topic_id] = self.bytes_in.get(topic_id, 0) + length

    def _check_size(self, uid: int, limit: int) -> None:
        partition = self.state.catalogue.partition(uid)
        if partition is not None and partition.retained_bytes > limit:
            self.retention_due.set()

    def topic_deleted(self, topic: Topic) -> None:
        """See ``state_machine.RunSink``."""
        for partition in topic.partitions:
            self.store.forget_partition(partition.uid)
            self.tail.forget(partition.uid)
            grown = self._grown.pop(partition.uid, None)
            if grown is not None:
                grown.set()
        self.records_in.pop(topic.topic_id, None)
        self.bytes_in.pop(topic.topic_id, None)

    def grown(self, uid: int) -> trio.Event:
        """An event that is set when the partition takes its next run (or its topic is deleted)."""
        event = self._grown.get(uid)
        if event is None:
            event = self._grown[uid] = trio.Event()
        return event
