"""The topic catalogue: names, partition counts, retention policies, and how a key chooses its partition.

Owns: which topics exist and what holds for them. Must not know: records, the log, time.

Invariants: a topic id is never used twice (T-1); a partition count never changes; the widest scope that says something about
retention is asked last: partition, then topic, then ``*``.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from ayder.commands import CreateTopic, Retention
from ayder.partition import IdempotencyWindow, Partition
from ayder.records import TopicId, partition_uid

__all__ = ["Topic", "TopicCatalogue", "merge_retention", "murmur2", "partition_for_key"]


@attrs.define(slots=True, eq=False)
class Topic:
    """One life of a topic."""

    topic_id: TopicId
    name: str
    storage: str
    write_mode: str | None
    retention: Retention
    partition_retention: dict[int, Retention]
    idempotency_window_entries: int
    idempotency_window_ms: int
    partitions: list[Partition]
    created_index: int

    def __repr__(self) -> str:
        return f"Topic({self.name!r} id={self.topic_id} partitions={len(self.partitions)})"


@attrs.define(slots=True, eq=False)
class TopicCatalogue:
    """Topics by name and by id, and the default retention of ``*``."""

    by_name: dict[str, Topic] = attrs.field(factory=dict)
    by_id: dict[int, Topic] = attrs.field(factory=dict)
    default_retention: Retention = Retention()
    next_topic_id: int = 1

    def create(self, command: CreateTopic, index: int) -> Topic:
        """Add a topic that does not exist yet."""
        assert command.name not in self.by_name, command.name
        topic_id = TopicId(self.next_topic_id)
        self.next_topic_id += 1
        topic = Topic(
            topic_id=topic_id,
            name=command.name,
            storage=command.storage,
            write_mode=command.write_mode,
            retention=command.retention,
            partition_retention={},
            idempotency_window_entries=command.idempotency_window_entries,
            idempotency_window_ms=command.idempotency_window_ms,
            partitions=[],
            created_index=index,
        )
        for number in range(command.partitions):
            window = IdempotencyWindow(command.idempotency_window_entries, command.idempotency_window_ms)
            topic.partitions.append(Partition(partition_uid(topic_id, number), window))
        self.add(topic)
        return topic

    def add(self, topic: Topic) -> None:
        """Enter a topic under its name and its id."""
        self.by_name[topic.name] = topic
        self.by_id[topic.topic_id] = topic

    def delete(self, name: str) -> Topic | None:
        """Forget a topic; returns it, or ``None`` when there is none."""
        topic = self.by_name.pop(name, None)
        if topic is not None:
            del self.by_id[topic.topic_id]
        return topic

    def partition(self, uid: int) -> Partition | None:
        """The partition with this number, if its topic still lives."""
        topic = self.by_id.get(uid >> 16)
        number = uid & 0xFFFF
        return topic.partitions[number] if topic is not None and number < len(topic.partitions) else None

    def partitions(self) -> Iterator[tuple[Topic, Partition]]:
        """Every live partition with its topic, in order of topic id."""
        for topic in self.by_id.values():
            for partition in topic.partitions:
                yield topic, partition

    def effective_retention(self, topic: Topic, partition: int) -> Retention:
        """What holds for one partition; 0 or ``None`` means no limit."""
        own = topic.partition_retention.get(partition, Retention())
        return merge_retention(merge_retention(self.default_retention, topic.retention), own)


def merge_retention(wider: Retention, narrower: Retention) -> Retention:
    """``narrower`` where it says something, else ``wider``."""
    return Retention(
        wider.ttl_ms if narrower.ttl_ms is None else narrower.ttl_ms,
        wider.max_bytes if narrower.max_bytes is None else narrower.max_bytes,
    )


def partition_for_key(key: bytes, partitions: int) -> int:
    """The partition Kafka's default partitioner gives this key."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """32-bit MurmurHash2 with Kafka's seed, unsigned (org.apache.kafka.common.utils.Utils.murmur2)."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    length = len(data)
    h = (0x9747B28C ^ length) & mask
    whole = length & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    rest = data[whole:]
    if rest:
        h = ((h ^ int.from_bytes(rest, "little")) * m) & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)
