"""The state machine as bytes: what a checkpoint holds, versioned.

Owns: the image's shape and its encoding. Must not know: files (``storage/checkpoints.py`` adds checksum and fsync), how state
comes about. Invariant: the same state gives the same bytes, whatever order it was built in is the order it is written in, and
every node builds it in log order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from ayder.commands import Retention
from ayder.consumer_groups import ConsumerGroups
from ayder.errors import CorruptLog
from ayder.partition import IdempotencyWindow, Partition, Seen
from ayder.records import TopicId, partition_uid
from ayder.topics import Topic, TopicCatalogue

__all__ = ["Snapshot", "StateImage", "catalogue_of", "decode_image", "groups_of", "snapshot"]

IMAGE_VERSION: Final = 2
_WITHOUT_MEMBERSHIP: Final = 1
"""The version before: its images lack the last two fields. Still written where the members never changed: one can go back."""
_MAGIC: Final = b"AYSTATE"


class PartitionImage(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One partition's counters and its idempotency window, oldest key first (the last field: see ``Snapshot``)."""

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
    membership: bytes = b""
    """The newest MEMBERSHIP entry applied; empty: the founders are the members."""
    membership_index: int = 0
    """Where it stands in the log."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StateImage)
_ARRAY: Final = (0x90, 0xDC)
_MAP: Final = (0x80, 0xDE)
_PAUSE_BYTES: Final = 64 << 10


class Snapshot:
    """The state as it was at one index, for a worker to encode while the state goes on.

    Taking one costs one small object a partition and nothing per idempotency key: the generations of the windows are shared.
    """

    __slots__ = ("_groups", "_image", "_membership", "_topics")

    def __init__(self, image: StateImage, topics: Sequence[Topic], groups: ConsumerGroups) -> None:
        """``image`` is without topics and groups: they are taken from the living state."""
        tail = _encoder.encode(image.membership) + _encoder.encode(image.membership_index)
        self._membership = tail if image.membership else b""
        version, fields = (IMAGE_VERSION, 10) if image.membership else (_WITHOUT_MEMBERSHIP, 8)
        self._image = _MAGIC + bytes((version,)) + _head(_ARRAY, fields) + _without_tail(image, 2 + len(tail))[1:]
        self._topics = [
            (
                _topic_head(topic),
                [(_partition_image(partition), partition.window.generations()) for partition in topic.partitions],
            )
            for topic in topics
        ]
        self._groups = _encoder.encode(groups.committed)

    def encode(self, pause: Callable[[], None] = lambda: None) -> bytes:
        """A magic word, a version byte and the image as MessagePack; ``pause`` is called after every 64 KiB or so."""
        pieces = []
        since_pause = 0
        for piece in self._pieces():
            pieces.append(piece)
            since_pause += len(piece)
            if since_pause >= _PAUSE_BYTES:
                since_pause = 0
                pause()
        return b"".join(pieces)

    def _pieces(self) -> Iterator[bytes]:
        yield self._image + _head(_ARRAY, len(self._topics))
        for topic, partitions in self._topics:
            yield topic + _head(_ARRAY, len(partitions))
            for image, generations in partitions:
                yield _without_tail(image, 1) + _head(_MAP, sum(map(len, generations)))
                for generation in generations:
                    yield _encoder.encode(generation)[len(_head(_MAP, len(generation))) :]
        yield self._groups
        yield self._membership


def snapshot(
    catalogue: TopicCatalogue,
    groups: ConsumerGroups,
    *,
    index: int,
    term: int,
    log_time_ms: int,
    state_hash: bytes,
    membership: bytes = b"",
    membership_index: int = 0,
) -> Snapshot:
    """The living state at this moment; it encodes to what a ``StateImage`` of it would, byte for byte."""
    facts = (index, term, log_time_ms, state_hash, catalogue.next_topic_id, catalogue.default_retention)
    image = StateImage(*facts, topics=[], groups={}, membership=membership, membership_index=membership_index)
    return Snapshot(image, list(catalogue.by_id.values()), groups)


def _without_tail(image: msgspec.Struct, empty: int) -> bytes:
    """An image encoded without its last fields, which are empty and take this many bytes."""
    return _encoder.encode(image)[:-empty]


def _head(kind: tuple[int, int], count: int) -> bytes:
    """What stands before the elements of a MessagePack array or map, as short as can be."""
    fixed, wide = kind
    if count < 16:
        return bytes((fixed | count,))
    return struct.pack(">BH", wide, count) if count < 1 << 16 else struct.pack(">BI", wide + 1, count)


def decode_image(data: bytes) -> StateImage:
    """Raises ``CorruptLog`` for bytes that are no image of a version this release reads."""
    if data[:7] != _MAGIC or data[7:8] not in (bytes((_WITHOUT_MEMBERSHIP,)), bytes((IMAGE_VERSION,))):
        raise CorruptLog(f"a checkpoint begins with {data[:8]!r}: this release reads {_MAGIC!r} versions 1 to {IMAGE_VERSION}")
    try:
        return _decoder.decode(memoryview(data)[8:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptLog(f"a checkpoint cannot be read: {error}") from error


def _topic_head(topic: Topic) -> bytes:
    """A topic's image up to its partitions."""
    return _without_tail(
        TopicImage(
            topic.topic_id,
            topic.name,
            topic.storage,
            topic.write_mode,
            topic.retention,
            topic.partition_retention,
            topic.idempotency_window_entries,
            topic.idempotency_window_ms,
            topic.created_index,
            partitions=[],
        ),
        1,
    )


def _partition_image(p: Partition) -> PartitionImage:
    """Without its window."""
    return PartitionImage(p.next_offset, p.log_start_offset, p.bytes_taken, p.bytes_before_start, {})


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
