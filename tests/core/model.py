"""The state machine's meaning once more, slowly, in plain dicts and lists: what the tests compare it with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import attrs

from ayder.commands import (
    BatchHead,
    Command,
    CommitOffset,
    CommitOffsets,
    CreateTopic,
    DeleteTopic,
    Retention,
    SetRetention,
    TrimPartition,
    TrimPartitions,
)
from ayder.errors import AyderError
from ayder.state_machine import Appended, BatchJudged, Committed, StateMachine, TopicChanged, Trimmed
from ayder.storage.interface import RunEntry
from ayder.topics import Topic


class Sink:
    """Remembers where each run was said to lie."""

    def __init__(self) -> None:
        self.runs: dict[int, list[tuple[int, RunEntry, bytes]]] = {}

    def run_applied(self, uid: int, segment_id: int, entry: RunEntry, payload: bytes, start: int) -> None:
        self.runs.setdefault(uid, []).append((segment_id, entry, payload[start : start + entry.length]))

    def topic_deleted(self, topic: Topic) -> None:
        for partition in topic.partitions:
            self.runs.pop(partition.uid, None)


@attrs.define
class ModelPartition:
    sizes: list[int] = attrs.field(factory=list)
    """Bytes of each record ever taken."""
    start: int = 0
    seen: list[tuple[bytes, dict[str, Any]]] = attrs.field(factory=list)

    def find(self, key: bytes, now: int, window_ms: int) -> dict[str, Any] | None:
        return next((first for k, first in self.seen if k == key and first["time"] >= now - window_ms), None)

    def remember(self, key: bytes, first: dict[str, Any], entries: int, window_ms: int) -> None:
        kept = [(k, f) for k, f in self.seen if k != key and f["time"] >= first["time"] - window_ms]
        self.seen = [*kept, (key, first)][-entries:]


@attrs.define
class ModelTopic:
    topic_id: int
    command: CreateTopic
    partitions: list[ModelPartition]
    ttl: dict[int | None, int | None] = attrs.field(factory=dict)
    size: dict[int | None, int | None] = attrs.field(factory=dict)


class Model:
    """Each method returns what applying the command must give, as plain values (``plain``)."""

    def __init__(self) -> None:
        self.topics: dict[str, ModelTopic] = {}
        self.groups: dict[tuple[str, int], int] = {}
        self.default = [None, None]
        self.next_id = 1
        self.index = 1
        self.now = 0

    def partition(self, uid: int) -> tuple[ModelTopic, ModelPartition] | None:
        for topic in self.topics.values():
            if topic.topic_id == uid >> 16 and uid & 0xFFFF < len(topic.partitions):
                return topic, topic.partitions[uid & 0xFFFF]
        return None

    def create(self, command: CreateTopic) -> object:
        have = self.topics.get(command.name)
        if have is None:
            have = ModelTopic(self.next_id, command, [ModelPartition() for _ in range(command.partitions)])
            have.ttl[None], have.size[None] = command.retention.ttl_ms, command.retention.max_bytes
            self.topics[command.name] = have
            self.next_id += 1
            return ("topic", have.topic_id, True)
        if len(have.partitions) != command.partitions:
            return "topic_exists"
        return ("topic", have.topic_id, False)

    def delete(self, name: str) -> object:
        have = self.topics.pop(name, None)
        if have is None:
            return "topic_not_found"
        self.groups = {key: offset for key, offset in self.groups.items() if key[1] >> 16 != have.topic_id}
        return ("topic", have.topic_id, True)

    def take(self, part: ModelPartition, sizes: list[int]) -> int:
        base = len(part.sizes)
        part.sizes += sizes
        return base

    def run(self, uid: int, sizes: list[int], producer: bytes) -> object:
        found = self.partition(uid)
        if found is None:
            return "topic_not_found"
        topic, part = found
        digest, key = producer[:16], producer[16:]
        entries, window_ms = topic.command.idempotency_window_entries, topic.command.idempotency_window_ms
        first = part.find(key, self.now, window_ms) if producer else None
        if first is not None:
            if first["digest"] != digest or first["batch"]:
                return "idempotency_key_reused"
            return ("appended", first["base"], first["count"], first["index"], True)
        base = self.take(part, sizes)
        if producer:
            facts = {"digest": digest, "base": base, "count": len(sizes), "index": self.index, "time": self.now, "batch": None}
            part.remember(key, facts, entries, window_ms)
        return ("appended", base, len(sizes), self.index, False)

    def batch(self, runs: Sequence[tuple[int, list[int]]], producer: bytes) -> list[object]:
        found = self.partition(runs[0][0])
        if found is None:
            return [("judged", False)] + ["topic_not_found"] * len(runs)
        topic, part = found
        digest, key = producer[:16], producer[16:]
        first = part.find(key, self.now, topic.command.idempotency_window_ms)
        if first is not None:
            same = first["digest"] == digest and first["batch"] is not None and len(first["batch"]) == len(runs)
            verdicts = [("appended", *each, first["index"], True) for each in first["batch"]] if same else []
            return [("judged", True), *(verdicts or ["idempotency_key_reused"] * len(runs))]
        parts = [(self.run(uid, sizes, b""), len(sizes)) for uid, sizes in runs]
        bases = [(result[1], count) for result, count in parts if isinstance(result, tuple)]
        facts = {"digest": digest, "index": self.index, "time": self.now, "batch": bases, "base": bases[0][0]}
        part.remember(key, facts, topic.command.idempotency_window_entries, topic.command.idempotency_window_ms)
        return [("judged", False), *(result for result, _ in parts)]

    def commit(self, commits: Sequence[CommitOffset]) -> object:
        for each in commits:
            found = self.partition(each.topic_id << 16 | each.partition)
            if found is None:
                return "topic_not_found"
            if each.offset >= len(found[1].sizes):
                return "offset_out_of_range"
        moved = []
        for each in commits:
            key = (each.group, each.topic_id << 16 | each.partition)
            if each.reset and each.offset < 0:
                self.groups.pop(key, None)
                moved.append(True)
            elif each.reset or each.offset >= self.groups.get(key, -1):
                self.groups[key] = each.offset
                moved.append(True)
            else:
                moved.append(False)
        return ("committed", tuple(moved))

    def retain(self, command: SetRetention) -> object:
        said = command.retention
        if command.topic == "*":
            self.default = [
                self.default[0] if said.ttl_ms is None else said.ttl_ms,
                self.default[1] if said.max_bytes is None else said.max_bytes,
            ]
            return ("topic", None, True)
        topic = self.topics.get(command.topic)
        if topic is None:
            return "topic_not_found"
        if command.partition is not None and command.partition >= len(topic.partitions):
            return "partition_not_found"
        for table, value in ((topic.ttl, said.ttl_ms), (topic.size, said.max_bytes)):
            if value is not None:
                if command.partition is None:
                    table.clear()
                table[command.partition] = value
        return ("topic", topic.topic_id, True)

    def trim(self, trims: Sequence[TrimPartition]) -> object:
        gone = []
        for each in trims:
            found = self.partition(each.uid)
            if found is None:
                gone.append((0, 0))
                continue
            part = found[1]
            start = max(part.start, min(each.log_start_offset, len(part.sizes)))
            gone.append((start - part.start, sum(part.sizes[part.start : start])))
            part.start = start
        return ("trimmed", tuple(records for records, _ in gone), tuple(weight for _, weight in gone))

    def effective(self, topic: ModelTopic, number: int) -> Retention:
        pick = [
            next((v for v in (table.get(number), table.get(None), default) if v is not None), None)
            for table, default in ((topic.ttl, self.default[0]), (topic.size, self.default[1]))
        ]
        return Retention(*pick)


def plain(result: object) -> object:
    """A result of the state machine as the model says it."""
    match result:
        case AyderError():
            return result.code.wire
        case Appended():
            return ("appended", *result)
        case BatchJudged():
            return ("judged", result.duplicate)
        case TopicChanged():
            return ("topic", None if result.topic is None else result.topic.topic_id, result.changed)
        case Committed():
            return ("committed", result.moved)
        case Trimmed():
            return ("trimmed", result.records, result.record_bytes)
    raise AssertionError(result)


def assert_same(state: StateMachine, model: Model, sink: Sink) -> None:
    """The living state is the model's."""
    assert {name: topic.topic_id for name, topic in state.catalogue.by_name.items()} == {
        name: topic.topic_id for name, topic in model.topics.items()
    }
    committed = {(g, uid): o for g, offsets in state.groups.committed.items() for uid, o in offsets.items()}
    assert committed == model.groups
    assert all(state.groups.committed.values()), "a group without offsets is no group"
    for name, topic in model.topics.items():
        for number, part in enumerate(topic.partitions):
            real = state.catalogue.by_name[name].partitions[number]
            assert (real.next_offset, real.log_start_offset) == (len(part.sizes), part.start)
            assert real.retained_bytes == sum(part.sizes[part.start :])
            assert state.catalogue.effective_retention(state.catalogue.by_name[name], number) == model.effective(topic, number)
            assert [key for keys in real.window.generations() for key in keys] == [key for key, _ in part.seen]
            assert len(real.window) == len(part.seen)
    assert state.end_offsets() == {
        t.topic_id << 16 | n: len(p.sizes) for t in model.topics.values() for n, p in enumerate(t.partitions)
    }
    for uid, runs in sink.runs.items():
        ends = [0, *(entry.base_offset + entry.count for _, entry, _ in runs)]
        assert [entry.base_offset for _, entry, _ in runs] == ends[:-1], f"offsets of {uid} are not dense"


def digest_of(body: bytes) -> bytes:
    """What the producer section begins with."""
    return hashlib.blake2b(body, digest_size=16).digest()


__all__ = ["BatchHead", "Command", "CommitOffsets", "DeleteTopic", "Model", "Sink", "TrimPartitions", "assert_same", "plain"]
