"""The state machine as bytes: what a checkpoint holds, versioned.

Owns: the image's shape and its encoding. Must not know: files (``storage/checkpoints.py`` adds checksum and fsync), how state
comes about. Invariant: the same state gives the same bytes, whatever order it was built in is the order it is written in, and
every node builds it in log order.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ayder.commands import Retention
from ayder.consumer_groups import ConsumerGroups
from ayder.errors import CorruptLog
from ayder.partition import IdempotencyWindow, Partition, Seen
from ayder.records import TopicId, partition_uid
from ayder.topics import Topic, TopicCatalogue

__all__ = ["StateImage", "catalogue_of", "decode_image", "encode_image", "groups_of", "image_of"]

IMAGE_VERSION: Final = 1
_MAGIC: Final = b"AYSTATE"


class PartitionImage(msgspec.Struct, array_like=True, frozen=True):
    """One partition's counters and its idempotency window, oldest key first."""

    next_offset: int
    log_start_offset: int
    bytes_taken: int
    bytes_before_start: int
    seen: dict[bytes, Seen]


class TopicImage(msgspec.Struct, array_like=True, frozen=True):
    """One topic with its partitions in order."""

    topic_id: int
    name: str
    storage: str
    write_mode: str | None
    retention: Retention
    partition_retention: dict[int, Retention]
    idempotency_window_entries: int
    idempotency_window_ms: int
    created_index: int
    partitions: list[PartitionImage]


class StateImage(msgspec.Struct, array_like=True, frozen=True):
    """Everything ``apply`` has made of the log up to ``applied_index``."""

    applied_index: int
    applied_term: int
    log_time_ms: int
    state_hash: bytes
    next_topic_id: int
    default_retention: Retention
    topics: list[TopicImage]
    groups: dict[str, dict[int, int]]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StateImage)


def encode_image(image: StateImage) -> bytes:
    """A magic word, a version byte and the image as MessagePack."""
    return _MAGIC + bytes((IMAGE_VERSION,)) + _encoder.encode(image)


def decode_image(data: bytes) -> StateImage:
    """Raises ``CorruptLog`` for bytes that are no image of a version this release reads."""
    if data[:7] != _MAGIC or data[7:8] != bytes((IMAGE_VERSION,)):
        raise CorruptLog(f"a checkpoint begins with {data[:8]!r}: this release reads {_MAGIC!r} version {IMAGE_VERSION}")
    try:
        return _decoder.decode(memoryview(data)[8:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptLog(f"a checkpoint cannot be read: {error}") from error


def image_of(
    catalogue: TopicCatalogue, groups: ConsumerGroups, *, index: int, term: int, log_time_ms: int, state_hash: bytes
) -> StateImage:
    """Copy the living state into an image. Cost: one small object a partition, one a remembered key is shared, not copied."""
    return StateImage(
        index,
        term,
        log_time_ms,
        state_hash,
        catalogue.next_topic_id,
        catalogue.default_retention,
        [_topic_image(topic) for topic in catalogue.by_id.values()],
        groups.committed,
    )


def _topic_image(topic: Topic) -> TopicImage:
    partitions = [
        PartitionImage(p.next_offset, p.log_start_offset, p.bytes_taken, p.bytes_before_start, p.window.seen)
        for p in topic.partitions
    ]
    return TopicImage(
        topic.topic_id,
        topic.name,
        topic.storage,
        topic.write_mode,
        topic.retention,
        topic.partition_retention,
        topic.idempotency_window_entries,
        topic.idempotency_window_ms,
        topic.created_index,
        partitions,
    )


def catalogue_of(image: StateImage) -> TopicCatalogue:
    """The catalogue an image holds, alive again."""
    catalogue = TopicCatalogue(default_retention=image.default_retention, next_topic_id=image.next_topic_id)
    for topic in image.topics:
        entries, window_ms = topic.idempotency_window_entries, topic.idempotency_window_ms
        partitions = [
            Partition(
                partition_uid(topic.topic_id, number),
                IdempotencyWindow(entries, window_ms, p.seen),
                p.next_offset,
                p.log_start_offset,
                p.bytes_taken,
                p.bytes_before_start,
            )
            for number, p in enumerate(topic.partitions)
        ]
        catalogue.add(
            Topic(
                TopicId(topic.topic_id),
                topic.name,
                topic.storage,
                topic.write_mode,
                topic.retention,
                dict(topic.partition_retention),
                entries,
                window_ms,
                partitions,
                topic.created_index,
            )
        )
    return catalogue


def groups_of(image: StateImage) -> ConsumerGroups:
    """The committed offsets an image holds, alive again."""
    return ConsumerGroups({group: dict(offsets) for group, offsets in image.groups.items()})
