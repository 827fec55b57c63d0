"""Every replicated command, and the block that carries many of them as one log entry.

Owns: the commands, their versioned binary form, the block layout. Must not know: what applying a command does
(``state_machine.py``), who proposes it.

A block is ``u8 version, 3 zero bytes, u32 command count`` and then, a command after the other, ``u8 tag, u8 version, u16 0,
u32 body length, body``. A RUN's body is a run as ``runs.py`` lays it out, so that the bytes a producer sent are copied once
into the block and read back from there; all other bodies are small and rare, and are MessagePack arrays.

Invariants: a tag or version this release does not know stops the node (``CorruptLog``), it is never skipped: skipping would
let two nodes disagree. Encoding is a function of the command alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

import msgspec

from ayder.errors import CorruptLog
from ayder.runs import RUN_HEADER_BYTES

__all__ = [
    "BLOCK_HEADER_BYTES",
    "COMMAND_HEADER_BYTES",
    "RUN",
    "BatchHead",
    "Command",
    "CommitOffset",
    "CommitOffsets",
    "CreateTopic",
    "DeleteTopic",
    "Retention",
    "SetRetention",
    "TrimPartition",
    "TrimPartitions",
    "decode_block",
    "encode_block",
    "encode_command",
]

BLOCK_VERSION: Final = 1
COMMAND_VERSION: Final = 1
RUN: Final = 1

_BLOCK = struct.Struct("<B3xI")
_COMMAND = struct.Struct("<BBHI")
BLOCK_HEADER_BYTES: Final = _BLOCK.size
COMMAND_HEADER_BYTES: Final = _COMMAND.size


class Retention(msgspec.Struct, array_like=True, frozen=True):
    """How long records are kept. ``None``: not said here, the next wider scope decides (partition, topic, ``*``); 0: no limit."""

    ttl_ms: int | None = None
    max_bytes: int | None = None


class CreateTopic(msgspec.Struct, array_like=True, frozen=True):
    """Create a topic; the same settings again are no change. The window settings ride along so that every node agrees on them."""

    name: str
    partitions: int
    storage: str
    retention: Retention
    write_mode: str | None
    idempotency_window_entries: int
    idempotency_window_ms: int


class DeleteTopic(msgspec.Struct, array_like=True, frozen=True):
    """Delete a topic with its records and committed offsets."""

    name: str


class CommitOffset(msgspec.Struct, array_like=True, frozen=True):
    """``offset`` is the last one processed (-1: none, with ``reset``)."""

    topic_id: int
    partition: int
    group: str
    offset: int
    reset: bool = False


class CommitOffsets(msgspec.Struct, array_like=True, frozen=True):
    """Commits of one request: all or nothing."""

    commits: tuple[CommitOffset, ...]


class SetRetention(msgspec.Struct, array_like=True, frozen=True):
    """Set what is not ``None`` of a policy: of topic ``*`` (a default that later topics inherit), a topic, or one partition."""

    topic: str
    partition: int | None
    retention: Retention


class TrimPartition(msgspec.Struct, array_like=True, frozen=True):
    """Records below ``log_start_offset`` are gone; ``bytes_before`` is what the partition had taken before that offset."""

    uid: int
    log_start_offset: int
    bytes_before: int


class TrimPartitions(msgspec.Struct, array_like=True, frozen=True):
    """Log starts move up (retention, delete-before); a trim that would move one down changes nothing."""

    trims: tuple[TrimPartition, ...]


class BatchHead(msgspec.Struct, array_like=True, frozen=True):
    """The next ``runs`` RUN commands are one idempotent batch: all are taken or none.

    ``producer`` (digest and key) is judged in the window of partition ``uid``, the batch's first.
    """

    uid: int
    producer: bytes
    runs: Annotated[int, msgspec.Meta(ge=1)]


Command = BatchHead | CreateTopic | DeleteTopic | CommitOffsets | SetRetention | TrimPartitions

_TAGS: Final[dict[type[Command], int]] = {
    CreateTopic: 2,
    DeleteTopic: 3,
    CommitOffsets: 4,
    SetRetention: 5,
    TrimPartitions: 6,
    BatchHead: 7,
}
_DECODERS: Final[dict[int, msgspec.msgpack.Decoder[Command]]] = {
    tag: msgspec.msgpack.Decoder(kind) for kind, tag in _TAGS.items()
}
_encoder = msgspec.msgpack.Encoder()


def encode_command(command: Command) -> tuple[int, bytes]:
    """The tag and the body of a command."""
    return _TAGS[type(command)], _encoder.encode(command)


def encode_block(commands: Sequence[tuple[int, bytes]]) -> bytes:
    """One log entry's payload from (tag, body) pairs."""
    parts = [_BLOCK.pack(BLOCK_VERSION, len(commands))]
    for tag, body in commands:
        parts.append(_COMMAND.pack(tag, COMMAND_VERSION, 0, len(body)))
        parts.append(body)
    return b"".join(parts)


def decode_block(payload: bytes) -> Iterator[tuple[int, int, int, Command | None]]:
    """Walk a block: (tag, body position, body length, command); the command of a RUN is ``None``: its bytes are the run.

    Raises ``CorruptLog`` for a version, tag or length this release cannot read.
    """
    if len(payload) < BLOCK_HEADER_BYTES:
        raise CorruptLog(f"a block of {len(payload)} bytes has no room for its header")
    version, count = _BLOCK.unpack_from(payload)
    if version != BLOCK_VERSION:
        raise CorruptLog(f"block version {version}: this release reads version {BLOCK_VERSION}")
    position = BLOCK_HEADER_BYTES
    for _ in range(count):
        if position + COMMAND_HEADER_BYTES > len(payload):
            raise CorruptLog(f"a block of {len(payload)} bytes ends inside its commands")
        tag, command_version, _, length = _COMMAND.unpack_from(payload, position)
        position += COMMAND_HEADER_BYTES
        if command_version != COMMAND_VERSION or position + length > len(payload):
            raise CorruptLog(f"command tag {tag} version {command_version} of {length} bytes cannot be read by this release")
        if tag == RUN and length < RUN_HEADER_BYTES:
            raise CorruptLog(f"a run of {length} bytes has no room for its header")
        yield tag, position, length, None if tag == RUN else _decode(tag, payload[position : position + length])
        position += length


def _decode(tag: int, body: bytes) -> Command:
    decoder = _DECODERS.get(tag)
    if decoder is None:
        raise CorruptLog(f"command tag {tag} is unknown to this release: run the release that wrote this log, or a later one")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptLog(f"command tag {tag}: {error}") from error
