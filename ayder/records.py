"""Kafka's nouns: topics, partitions, offsets, records.

Owns: the names and small values that every floor above speaks in. Must not know: how any of them is stored or sent.
"""

from __future__ import annotations

import re
from typing import NewType

import attrs

from ayder.errors import AyderError, ErrorCode

__all__ = [
    "MAX_PARTITIONS",
    "NO_OFFSET",
    "Offset",
    "PartitionUid",
    "Record",
    "TopicId",
    "check_name",
    "partition_of",
    "partition_uid",
    "topic_of",
]

Offset = int
"""Position of a record in its partition: 0, 1, 2, … without gaps or reuse."""
TopicId = NewType("TopicId", int)
"""A topic's number for life: a topic deleted and created again has another one."""
PartitionUid = NewType("PartitionUid", int)
"""One partition of one life of a topic: ``topic_id << 16 | partition``."""

MAX_PARTITIONS = 1024
NO_OFFSET = -1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


def partition_uid(topic_id: int, partition: int) -> PartitionUid:
    """The number under which the log and its indexes know this partition."""
    return PartitionUid(topic_id << 16 | partition)


def topic_of(uid: int) -> TopicId:
    """The topic a partition belongs to."""
    return TopicId(uid >> 16)


def partition_of(uid: int) -> int:
    """The partition's number inside its topic."""
    return uid & 0xFFFF


def check_name(what: str, name: object) -> str:
    """Return ``name`` if it may name a topic, a group or a namespace; raises ``AyderError`` (invalid_request) otherwise."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise AyderError(ErrorCode.INVALID_REQUEST, f"{what} must match [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}", parameter=what)


@attrs.frozen(slots=True)
class Record:
    """One record on its way in, for requests that carry more than a bare value."""

    value: bytes
    key: bytes = b""
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp_ms: int | None = None
    """Client's own time, milliseconds since 1970; ``None`` takes the log time of the block."""
