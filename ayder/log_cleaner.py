"""Housekeeping of the log: seals what is full, checkpoints the state, enforces retention, gives disk space back.

Owns: when and what; three small loops. Must not know: formats, HTTP. Named after Kafka's own.

Retention is decided here, by the leader's clock, but happens through the log: a trim is a command like any other, so every node
has the same log start at the same index, and a restart changes nothing (RELIABILITY T-2, ADR 0007). Disk space follows later
and only from segments that lie before a checkpoint: nothing that a restart would need, and nothing retained, is ever dropped.

Invariants: a segment is sealed before the checkpoint that stands at its end is written, so that a restart finds either the
footer or the entries to rebuild it from; one collection runs at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import attrs
import trio

from ayder.broker import Broker, SegmentEnd
from ayder.commands import Retention, TrimPartition, TrimPartitions
from ayder.entries import LogIndex
from ayder.errors import AyderError, CorruptLog
from ayder.partition import Partition
from ayder.runs import Run
from ayder.storage.interface import CheckpointStore, LogStore, StorageFull

__all__ = ["LogCleaner"]

logger = logging.getLogger(__name__)

_COLLECT_INTERVAL_S = 10.0
_FULL_RETRY_S = 1.0
_MAX_TRIMS = 1000
_ENCODING_PAUSE_S = 0.001


@attrs.frozen(slots=True)
class _Limit:
    """What holds for one partition now: keep runs at or after ``horizon_ms``, and at most ``max_bytes`` (0: no limit)."""

    uid: int
    log_start_offset: int
    next_offset: int
    bytes_taken: int
    retained_bytes: int
    horizon_ms: int
    max_bytes: int


class LogCleaner:
    """See the module header. ``clock_ms`` is the wall clock, milliseconds since 1970."""

    def __init__(
        self, *, broker: Broker, checkpoints: CheckpointStore, collectable_index: LogIndex, clock_ms: Callable[[], int]
    ) -> None:
        self._broker = broker
        self._store: LogStore = broker.store
        self._checkpoints = checkpoints
        self._clock_ms = clock_ms
        self._policy_version = -1
        self._limited: list[tuple[Partition, Retention]] = []
        self._oldest_ms: dict[int, tuple[int, int]] = {}
        self._collecting = trio.Lock()
        self._sealing = trio.Lock()
        self.collectable_index = collectable_index
        """Segments that end here or before lie behind the two newest checkpoints: if the newest is damaged, the other will do."""
        self._checkpoint_index = collectable_index

    async def run(self) -> None:
        """All loops, until cancelled; a failed seal or checkpoint ends the node."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal_loop, name="seal loop")
            nursery.start_soon(self._retention_loop, name="retention loop")
            nursery.start_soon(self._collect_loop, name="collect loop")

    # -- sealing --------------------------------------------------------------------------------------------------
    async def _seal_loop(self) -> None:
        while True:
            await self._broker.segment_ended.wait()
            self._broker.segment_ended = trio.Event()
            if not await self.seal_ended():
                await trio.sleep(_FULL_RETRY_S)
                self._broker.segment_ended.set()

    async def seal_ended(self) -> bool:
        """Seal every segment whose end was applied, then checkpoint the newest of those states.

        Returns False when the disk has no room for it: what is not sealed stays in the list, and until it is a restart replays
        more. Nothing is lost by waiting, so a full disk does not end the node here (RELIABILITY S-9).
        """
        async with self._sealing:
            try:
                while self._broker.segment_ends:
                    await self._seal_oldest()
            except StorageFull as full:
                logger.warning("no room to seal a segment; it will be tried again", extra={"reason": str(full)})
                return False
            return True

    async def _seal_oldest(self) -> None:
        ends = self._broker.segment_ends
        end = ends[0]
        if self._is_unsealed(end.segment_id):
            await trio.to_thread.run_sync(self._store.seal, end.segment_id, end.end_offsets)
        if len(ends) == 1:  # else a newer state is about to be written
            await trio.to_thread.run_sync(self._write_checkpoint, end)
            self.collectable_index, self._checkpoint_index = self._checkpoint_index, end.applied_index
        ends.popleft()

    def _write_checkpoint(self, end: SegmentEnd) -> None:
        """In a worker, which rests between two pieces: encoding holds the interpreter, and the event loop waits for it."""
        self._checkpoints.write(end.applied_index, end.state.encode(partial(time.sleep, _ENCODING_PAUSE_S)))

    def _is_unsealed(self, segment_id: int) -> bool:
        return any(info.segment_id == segment_id and not info.sealed for info in self._store.segments())

    # -- retention ------------------------------------------------------------------------------------------------
    async def _retention_loop(self) -> None:
        interval_s = self._broker.config.topics.retention_check_ms / 1000
        await self._broker.driver.wait_ready()
        while True:
            with trio.move_on_after(interval_s):
                await self._broker.retention_due.wait()
            self._broker.retention_due = trio.Event()
            if not self._broker.driver.ready:
                continue  # another node leads and decides
            try:
                await self.enforce_retention()
            except AyderError as error:  # refused or not committed in time: it is due again at the next turn
                logger.warning("retention could not be applied", extra={"reason": error.message})
                await trio.sleep(interval_s)

    async def enforce_retention(self) -> None:
        """Trim every partition that holds more, or older, than its policy allows. Raises ``AyderError``."""
        due = self._due(self._clock_ms())
        if not due:
            return
        trims = await trio.to_thread.run_sync(self._plan, due)
        for at in range(0, len(trims), _MAX_TRIMS):
            await self._broker.execute(TrimPartitions(tuple(trims[at : at + _MAX_TRIMS])))

    def _due(self, now_ms: int) -> list[_Limit]:
        state = self._broker.state
        if state.policy_version != self._policy_version:
            self._policy_version = state.policy_version
            self._refresh_policies()
        due = []
        for partition, retention in self._limited:
            max_bytes, ttl_ms = retention.max_bytes or 0, retention.ttl_ms or 0
            horizon_ms = now_ms - ttl_ms if ttl_ms else 0
            oversize = max_bytes and partition.retained_bytes > max_bytes
            if partition.log_start_offset < partition.next_offset and (
                oversize or (ttl_ms and self._may_expire(partition, horizon_ms))
            ):
                due.append(
                    _Limit(
                        partition.uid,
                        partition.log_start_offset,
                        partition.next_offset,
                        partition.bytes_taken,
                        partition.retained_bytes,
                        horizon_ms,
                        max_bytes,
                    )
                )
        return due

    def _refresh_policies(self) -> None:
        catalogue = self._broker.state.catalogue
        self._limited = []
        for topic, partition in catalogue.partitions():
            retention = catalogue.effective_retention(topic, partition.uid & 0xFFFF)
            if retention.ttl_ms or retention.max_bytes:
                self._limited.append((partition, retention))
        self._broker.size_limits = {p.uid: r.max_bytes for p, r in self._limited if r.max_bytes}
        self._oldest_ms.clear()

    def _may_expire(self, partition: Partition, horizon_ms: int) -> bool:
        """Whether the oldest retained run may be older than the horizon; what a look-up learned is remembered."""
        known = self._oldest_ms.get(partition.uid)
        return known is None or known[0] != partition.log_start_offset or known[1] < horizon_ms

    def _plan(self, due: list[_Limit]) -> list[TrimPartition]:
        """In a worker: where each partition's log start must move to."""
        trims = []
        for limit in due:
            try:
                offset, bytes_before = self._target(limit)
            except CorruptLog as damage:  # the reader of those records is told; the rest of the node goes on
                logger.error(
                    "retention met damage and leaves the partition as it is", extra={"uid": limit.uid, "damage": str(damage)}
                )
                continue
            if offset > limit.log_start_offset:
                trims.append(TrimPartition(limit.uid, offset, bytes_before))
        return trims

    def _target(self, limit: _Limit) -> tuple[int, int]:
        offset, bytes_before = self._after_horizon(limit)
        if limit.max_bytes and limit.bytes_taken - bytes_before > limit.max_bytes:
            return self._within_size(limit)
        return offset, bytes_before

    def _after_horizon(self, limit: _Limit) -> tuple[int, int]:
        before_start = limit.bytes_taken - limit.retained_bytes
        if not limit.horizon_ms:
            return limit.log_start_offset, before_start
        entry = self._store.find_time(limit.uid, limit.horizon_ms)
        if entry is None or entry.base_offset >= limit.next_offset:
            return limit.next_offset, limit.bytes_taken
        if entry.base_offset > limit.log_start_offset:
            return entry.base_offset, entry.bytes_before
        self._oldest_ms[limit.uid] = (limit.log_start_offset, entry.log_time_ms)
        return limit.log_start_offset, before_start

    def _within_size(self, limit: _Limit) -> tuple[int, int]:
        """The first record of the largest suffix that fits: exact to the record."""
        target = limit.bytes_taken - limit.max_bytes
        entry = self._store.find_bytes(limit.uid, target)
        if entry is None:
            return limit.log_start_offset, limit.bytes_taken - limit.retained_bytes
        if entry.bytes_before >= target:
            return entry.base_offset, entry.bytes_before
        run = self._run_at(limit.uid, entry.base_offset)
        if run is None:
            return limit.log_start_offset, limit.bytes_taken - limit.retained_bytes
        keep_from = next(i for i in range(1, run.count + 1) if entry.bytes_before + run.bytes_until(i) >= target)
        return entry.base_offset + keep_from, entry.bytes_before + run.bytes_until(keep_from)

    def _run_at(self, uid: int, offset: int) -> Run | None:
        """The run that begins at ``offset``; ``None`` when a trim and a collection overtook us and it is gone."""
        reads = self._store.read_runs(uid, offset, max_records=1, max_bytes=1)
        return Run(reads[0].data) if reads and reads[0].entry.base_offset == offset else None

    async def bytes_before(self, partition: Partition, offset: int) -> int:
        """Record bytes the partition had taken before ``offset``: what a trim to it needs to know."""
        if offset < partition.next_offset:
            read = partial(self._store.read_runs, partition.uid, offset, max_records=1, max_bytes=1)
            reads = await trio.to_thread.run_sync(read) if offset > partition.log_start_offset else []
            if offset > partition.log_start_offset and reads:
                entry = reads[0].entry
                return entry.bytes_before + Run(reads[0].data).bytes_until(offset - entry.base_offset)
            return partition.bytes_before_start
        return partition.bytes_taken

    # -- disk space -----------------------------------------------------------------------------------------------
    async def _collect_loop(self) -> None:
        seen = (-1, -1)
        while True:
            await trio.sleep(_COLLECT_INTERVAL_S)
            there_now = (self._broker.state.trim_version, self.collectable_index)
            if there_now != seen:
                seen = there_now
                await self.collect()

    async def collect(self) -> int:
        """Drop sealed segments that hold nothing retained, rewrite those that hold little. Returns bytes freed.

        Where the disk has no room for a rewrite the segment stays as it is.
        """
        if not self._broker.driver.alone:
            return 0  # a follower may need what is in there, and there is no snapshot to give it instead
        async with self._collecting:
            log_starts = {p.uid: p.log_start_offset for _, p in self._broker.state.catalogue.partitions()}
            freed = 0
            for info in self._store.segments():
                if info.sealed and info.last_index <= self.collectable_index:
                    freed += await trio.to_thread.run_sync(
                        partial(self._collect_segment, info.segment_id, info.size_bytes, log_starts)
                    )
            return freed

    def _collect_segment(self, segment_id: int, size_bytes: int, log_starts: dict[int, int]) -> int:
        live = self._store.live_bytes(segment_id, log_starts)
        if live == 0:
            return self._store.drop_segment(segment_id)
        if live < self._broker.config.storage.gc_live_ratio * size_bytes:
            try:
                return self._store.rewrite_segment(segment_id, log_starts)
            except StorageFull as full:
                logger.warning("no room to rewrite a segment", extra={"segment": segment_id, "reason": str(full)})
        return 0
