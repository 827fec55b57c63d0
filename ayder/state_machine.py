"""The deterministic heart: committed entries in, state and results out.

Owns: the meaning of every command, log time, the running state hash. Must not know: Raft, files, Trio, the wall clock, who
waits for a result.

Invariants: ``apply`` is total and depends on the entry and the state alone, so that every node that applies the same entries
holds the same state (compare ``state_hash`` at equal indexes); a command that is refused changes nothing; entries are applied
in order, each once; log time never decreases. Offsets are assigned here and nowhere else: a proposal that was lost leaves no
hole, and a repeated idempotency key is answered with its first result (RELIABILITY P-1, I-2 … I-5, S-7).
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from typing import NamedTuple, Protocol

from ayder.checkpoint import Snapshot, catalogue_of, decode_image, groups_of, snapshot
from ayder.commands import (
    BatchHead,
    Command,
    CommitOffsets,
    CreateTopic,
    DeleteTopic,
    Retention,
    SetRetention,
    TrimPartitions,
    decode_block,
)
from ayder.consumer_groups import ConsumerGroups
from ayder.entries import EntryKind, LogEntry, Placement
from ayder.errors import AyderError, ErrorCode
from ayder.partition import Partition, Seen
from ayder.runs import DIGEST_BYTES, RUN_HEADER_BYTES
from ayder.storage.interface import RunEntry
from ayder.topics import Topic, TopicCatalogue, merge_retention

__all__ = ["Appended", "BatchJudged", "Committed", "Result", "RunSink", "StateMachine", "TopicChanged", "Trimmed"]

_RUN_FACTS = struct.Struct("<6xBBIII12xH2xI")
"""From a run's header: gap is skipped with the CRC and version; see ``runs.py`` for the whole layout."""


class Appended(NamedTuple):
    """A run was taken, or recognised: ``duplicate`` answers with what its first use got."""

    base_offset: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which has no use here
    log_index: int
    duplicate: bool


class TopicChanged(NamedTuple):
    """A topic was created, deleted, found as asked for, or given another policy."""

    topic: Topic | None
    changed: bool


class Committed(NamedTuple):
    """One flag a commit: False where it was backward and ignored."""

    moved: tuple[bool, ...]


class Trimmed(NamedTuple):
    """One count a trim: the records that went, and their bytes (values and keys)."""

    records: tuple[int, ...]
    record_bytes: tuple[int, ...]


class BatchJudged(NamedTuple):
    """Whether the batch that follows was seen before."""

    duplicate: bool


Result = Appended | BatchJudged | TopicChanged | Committed | Trimmed | AyderError


class RunSink(Protocol):
    """Who is told where an applied run lies: the offset index, the tail cache, those who wait for records."""

    def run_applied(self, uid: int, segment_id: int, entry: RunEntry, payload: bytes, start: int) -> None:
        """The run is ``payload[start : start + entry.length]``."""
        ...

    def topic_deleted(self, topic: Topic) -> None:
        """Its partitions are gone for good."""
        ...


class _Batch:
    """An idempotent batch whose runs are being applied."""

    __slots__ = ("first", "head", "left", "partition", "parts")

    def __init__(self, head: BatchHead, partition: Partition, first: Seen | None) -> None:
        self.head = head
        self.partition = partition
        self.first = first
        self.left = head.runs
        self.parts: list[tuple[int, int]] = []

    def verdict(self) -> Result:
        """The answer for the next run of a batch whose key was used before."""
        assert self.first is not None
        at = self.head.runs - self.left
        if self.first.digest != self.head.producer[:DIGEST_BYTES] or len(self.first.parts) != self.head.runs:
            return _reused(self.first)
        return Appended(*self.first.parts[at], self.first.log_index, True)


class StateMachine:
    """Topics, partitions, groups at ``applied_index``. Sync and single-threaded: it lives on the event loop."""

    def __init__(self, sink: RunSink) -> None:
        self._sink = sink
        self.catalogue = TopicCatalogue()
        self.groups = ConsumerGroups()
        self.applied_index = 0
        self.applied_term = 0
        self.log_time_ms = 0
        self.state_hash = bytes(8)
        self.membership = b""
        """The newest MEMBERSHIP entry applied, as ``raft.membership`` encodes it; empty: the founders are the members."""
        self.membership_index = 0
        self._batch: _Batch | None = None
        self.trim_version = 0
        """Moves when records were trimmed or a topic deleted: there may be disk space to give back."""
        self.policy_version = 0
        """Moves when topics or retention policies change: what is derived from them is stale."""

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """The state at ``applied_index``, for a checkpoint: cheap to take, and encoded elsewhere while this one goes on."""
        return snapshot(
            self.catalogue,
            self.groups,
            index=self.applied_index,
            term=self.applied_term,
            log_time_ms=self.log_time_ms,
            state_hash=self.state_hash,
            membership=self.membership,
            membership_index=self.membership_index,
        )

    def capture(self) -> bytes:
        """The state at ``applied_index`` as checkpoint bytes."""
        return self.snapshot().encode()

    def restore(self, data: bytes) -> None:
        """Become the state a checkpoint holds. Raises ``CorruptLog``."""
        image = decode_image(data)
        self.catalogue = catalogue_of(image)
        self.groups = groups_of(image)
        self.membership, self.membership_index = image.membership, image.membership_index
        self.applied_index, self.applied_term = image.applied_index, image.applied_term
        self.log_time_ms, self.state_hash = image.log_time_ms, image.state_hash
        self.policy_version += 1

    def end_offsets(self) -> dict[int, int]:
        """The next offset of every live partition."""
        return {partition.uid: partition.next_offset for _, partition in self.catalogue.partitions()}

    # -- apply ----------------------------------------------------------------------------------------------------
    def apply(self, entry: LogEntry, placement: Placement) -> list[Result]:
        """Apply one committed entry; one result a command. Raises ``CorruptLog`` for what this release cannot read."""
        assert entry.index == self.applied_index + 1, f"entry {entry.index} after {self.applied_index}"
        assert entry.log_time_ms >= self.log_time_ms, f"log time {entry.log_time_ms} after {self.log_time_ms}"
        self.applied_index, self.applied_term, self.log_time_ms = entry.index, entry.term, entry.log_time_ms
        if entry.kind is EntryKind.MEMBERSHIP:
            self.membership, self.membership_index = entry.payload, entry.index
        if entry.kind is not EntryKind.BLOCK:
            self._fold(entry, array("Q"), b"")
            return []
        self._batch = None
        results: list[Result] = []
        effects = array("Q")
        words = b""
        for _, position, length, command in decode_block(entry.payload):
            if command is None:
                results.append(self._apply_run(entry, placement, position, length, effects))
            else:
                result = self._apply_command(command, entry)
                results.append(result)
                words += repr((command, result.code.wire if isinstance(result, AyderError) else "ok")).encode()
        self._fold(entry, effects, words)
        return results

    def _fold(self, entry: LogEntry, effects: array[int], words: bytes) -> None:
        head = struct.pack("<8sQQQ", self.state_hash, entry.index, entry.term, entry.log_time_ms)
        self.state_hash = hashlib.blake2b(head + effects.tobytes() + words, digest_size=8).digest()

    def _apply_run(self, entry: LogEntry, placement: Placement, start: int, length: int, effects: array[int]) -> Result:
        payload = entry.payload
        _, _, topic_id, number, count, producer_length, record_bytes = _RUN_FACTS.unpack_from(payload, start)
        partition = self.catalogue.partition(topic_id << 16 | number)
        if partition is None:
            return AyderError(ErrorCode.TOPIC_NOT_FOUND, "the topic was deleted before this record was committed")
        if self._batch is not None and self._batch.first is not None:
            return self._skip_run(self._batch, effects)
        if producer_length:
            at = start + RUN_HEADER_BYTES
            key = payload[at + DIGEST_BYTES : at + producer_length]
            digest = payload[at : at + DIGEST_BYTES]
            first = partition.window.find(key, entry.log_time_ms)
            if first is not None:
                effects.extend((partition.uid, first.base_offset, 0))
                return _duplicate(first, digest)
            partition.window.add(key, Seen(partition.next_offset, count, digest, entry.index, entry.log_time_ms))
        base, before = partition.append(count, record_bytes)
        effects.extend((partition.uid, base, count))
        run = RunEntry(base, count, before, entry.log_time_ms, placement.position + start, length)
        self._sink.run_applied(partition.uid, placement.segment_id, run, payload, start)
        if self._batch is not None:
            self._batched_run(self._batch, entry, base, count)
        return Appended(base, count, entry.index, False)

    def _judge_batch(self, head: BatchHead, entry: LogEntry) -> Result:
        partition = self.catalogue.partition(head.uid)
        if partition is None:  # the topic is gone: each run will say so
            return BatchJudged(False)
        first = partition.window.find(head.producer[DIGEST_BYTES:], entry.log_time_ms)
        self._batch = _Batch(head, partition, first)
        return BatchJudged(first is not None)

    def _skip_run(self, batch: _Batch, effects: array[int]) -> Result:
        result = batch.verdict()
        batch.left -= 1
        effects.extend((batch.head.uid, batch.left, 0))
        if not batch.left:
            self._batch = None
        return result

    def _batched_run(self, batch: _Batch, entry: LogEntry, base: int, count: int) -> None:
        batch.parts.append((base, count))
        batch.left -= 1
        if batch.left:
            return
        self._batch = None
        producer = batch.head.producer
        total = sum(part[1] for part in batch.parts)
        seen = Seen(batch.parts[0][0], total, producer[:DIGEST_BYTES], entry.index, entry.log_time_ms, tuple(batch.parts))
        batch.partition.window.add(producer[DIGEST_BYTES:], seen)

    def _apply_command(self, command: Command, entry: LogEntry) -> Result:
        match command:
            case CreateTopic():
                return self._create_topic(command, entry.index)
            case DeleteTopic():
                return self._delete_topic(command)
            case CommitOffsets():
                return self._commit(command)
            case SetRetention():
                return self._set_retention(command)
            case TrimPartitions():
                return self._trim(command)
            case BatchHead():
                return self._judge_batch(command, entry)

    def _create_topic(self, command: CreateTopic, index: int) -> Result:
        existing = self.catalogue.by_name.get(command.name)
        if existing is None:
            self.policy_version += 1
            return TopicChanged(self.catalogue.create(command, index), True)
        if len(existing.partitions) != command.partitions or existing.storage != command.storage:
            return AyderError(
                ErrorCode.TOPIC_EXISTS,
                f"topic {command.name!r} exists with {len(existing.partitions)} partitions ({existing.storage})",
                topic=command.name,
                partitions=len(existing.partitions),
                storage=existing.storage,
            )
        return TopicChanged(existing, False)

    def _delete_topic(self, command: DeleteTopic) -> Result:
        topic = self.catalogue.delete(command.name)
        if topic is None:
            return AyderError(ErrorCode.TOPIC_NOT_FOUND, f"there is no topic {command.name!r}", topic=command.name)
        self.groups.forget_topic(topic.topic_id)
        self.policy_version += 1
        self.trim_version += 1
        self._sink.topic_deleted(topic)
        return TopicChanged(topic, True)

    def _commit(self, command: CommitOffsets) -> Result:
        for commit in command.commits:
            partition = self.catalogue.partition(commit.topic_id << 16 | commit.partition)
            if partition is None:
                return AyderError(ErrorCode.TOPIC_NOT_FOUND, "the topic was deleted before this commit was applied")
            if commit.offset >= partition.next_offset:
                return _beyond_end("commit", commit.offset, partition)
        return Committed(
            tuple(self.groups.commit(c.group, c.topic_id << 16 | c.partition, c.offset, reset=c.reset) for c in command.commits)
        )

    def _set_retention(self, command: SetRetention) -> Result:
        self.policy_version += 1
        if command.topic == "*":
            self.catalogue.default_retention = merge_retention(self.catalogue.default_retention, command.retention)
            return TopicChanged(None, True)
        topic = self.catalogue.by_name.get(command.topic)
        if topic is None:
            return AyderError(ErrorCode.TOPIC_NOT_FOUND, f"there is no topic {command.topic!r}", topic=command.topic)
        if command.partition is None:
            topic.retention = merge_retention(topic.retention, command.retention)
            topic.partition_retention = _without(topic.partition_retention, command.retention)
        elif command.partition < len(topic.partitions):
            own = topic.partition_retention.get(command.partition, Retention())
            topic.partition_retention[command.partition] = merge_retention(own, command.retention)
        else:
            return AyderError(
                ErrorCode.PARTITION_NOT_FOUND,
                f"topic {command.topic!r} has no partition {command.partition}",
                topic=command.topic,
                partition=command.partition,
            )
        return TopicChanged(topic, True)

    def _trim(self, command: TrimPartitions) -> Result:
        self.trim_version += 1
        gone = []
        for trim in command.trims:
            partition = self.catalogue.partition(trim.uid)
            gone.append((0, 0) if partition is None else partition.trim(trim.log_start_offset, trim.bytes_before))
        return Trimmed(tuple(records for records, _ in gone), tuple(record_bytes for _, record_bytes in gone))


def _without(policies: dict[int, Retention], said: Retention) -> dict[int, Retention]:
    """What a topic's policy says holds for all its partitions; what it does not say stays theirs (D-14)."""
    kept = {}
    for number, own in policies.items():
        ttl_ms = own.ttl_ms if said.ttl_ms is None else None
        max_bytes = own.max_bytes if said.max_bytes is None else None
        if (ttl_ms, max_bytes) != (None, None):
            kept[number] = Retention(ttl_ms, max_bytes)
    return kept


def _duplicate(first: Seen, digest: bytes) -> Result:
    if first.digest != digest or first.parts:
        return _reused(first)
    return Appended(first.base_offset, first.count, first.log_index, True)


def _reused(first: Seen) -> AyderError:
    return AyderError(
        ErrorCode.IDEMPOTENCY_KEY_REUSED,
        "this idempotency key was used with another body; the first use stands",
        offset=first.base_offset,
    )


def _beyond_end(what: str, offset: int, partition: Partition) -> AyderError:
    return AyderError(
        ErrorCode.OFFSET_BEYOND_END,
        f"{what} at offset {offset} is beyond the end of the partition",
        offset=offset,
        log_start_offset=partition.log_start_offset,
        high_watermark=partition.next_offset,
    )
