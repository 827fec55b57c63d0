"""Messages between peers as bytes: one type number and one codec per message class.

Owns: the body of every message. Must not know: sockets, time, who is connected, what a message makes a node do. Synchronous:
bytes in, messages out, and the other way round.

The handshake said who speaks, so no message names its sender: a node cannot speak in another one's name. Entries follow
``prev_index`` without gaps, so none carries its index: it cannot contradict its place.

Invariants: whatever arrives is either a message whose encoding is exactly those bytes, or a ``ProtocolError``; a payload is
copied once, from the input to its entry, and not at all on the way out. Source: docs/peer-protocol.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ayder.entries import EntryKind, LogEntry, NodeId
from ayder.errors import CorruptLog
from ayder.raft.frames import Body, Frames, ProtocolError, frame
from ayder.raft.membership import Membership
from ayder.raft.messages import (
    AppendEntries,
    AppendReply,
    Barrier,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    RequestVote,
    Snapshot,
    SnapshotMeta,
    TimeoutNow,
    VoteReply,
)

__all__ = ["MAX_FRAME_BYTES", "PING", "FrameReader", "ProtocolError", "encode"]

MAX_FRAME_BYTES = 16 << 20
"""A block of 4 MiB and a body of 8 MiB fit, with room to spare."""

_PING_TYPE = 3
PING = b"".join(frame(_PING_TYPE, b""))
"""Says only that the sender is there; not a message."""

# -- bodies --------------------------------------------------------------------------------------------------------------

_ONE = struct.Struct("<Q")
_VOTE = struct.Struct("<QQQB")
_VOTE_REPLY = struct.Struct("<QQB")
_APPEND = struct.Struct("<QQQQIB")
_BARRIER = struct.Struct("<QQ")
_ENTRY = struct.Struct("<QqIB")
_APPEND_REPLY = struct.Struct("<QQQQQB")
_HEARTBEAT = struct.Struct("<QQQ")
_HEARTBEAT_REPLY = struct.Struct("<QQQQB")
_SNAPSHOT = struct.Struct("<QQQqI")

_KINDS = {int(kind): kind for kind in EntryKind}


def _flags(first: bool, second: bool = False) -> int:
    return (1 if first else 0) | (2 if second else 0)


def _unpack(layout: struct.Struct, view: memoryview, flags: int) -> tuple[int, ...]:
    """The fields of a body that is nothing but them; the last one is made of ``flags``."""
    if len(view) != layout.size:
        raise ProtocolError(f"a body of {len(view)} bytes where there must be {layout.size}")
    fields = layout.unpack(view)
    if flags and fields[-1] & ~flags:
        raise ProtocolError(f"unknown flags {fields[-1]:#x}")
    return fields


def _encode_request_vote(message: RequestVote) -> list[bytes]:
    flags = _flags(message.pre_vote, message.transfer)
    return frame(16, _VOTE.pack(message.term, message.last_index, message.last_term, flags))


def _decode_request_vote(sender: NodeId, view: memoryview) -> RequestVote:
    term, last_index, last_term, flags = _unpack(_VOTE, view, 3)
    return RequestVote(term, sender, last_index, last_term, bool(flags & 1), bool(flags & 2))


def _encode_vote_reply(message: VoteReply) -> list[bytes]:
    return frame(17, _VOTE_REPLY.pack(message.term, message.poll_term, _flags(message.granted, message.pre_vote)))


def _decode_vote_reply(sender: NodeId, view: memoryview) -> VoteReply:
    term, poll_term, flags = _unpack(_VOTE_REPLY, view, 3)
    return VoteReply(term, sender, poll_term, bool(flags & 1), bool(flags & 2))


def _encode_append_entries(message: AppendEntries) -> list[bytes]:
    entries, barrier = message.entries, message.barrier
    head = [
        _APPEND.pack(
            message.term, message.prev_index, message.prev_term, message.commit_index, len(entries), _flags(barrier is not None)
        )
    ]
    if barrier is not None:
        head.append(_BARRIER.pack(barrier.incarnation, barrier.index))
    for index, entry in enumerate(entries, message.prev_index + 1):
        assert entry.index == index, (message.prev_index, entry.index, index)
        head.append(_ENTRY.pack(entry.term, entry.log_time_ms, len(entry.payload), entry.kind))
    return frame(18, b"".join(head), *[entry.payload for entry in entries])


def _decode_append_entries(sender: NodeId, view: memoryview) -> AppendEntries:
    body = Body(view)
    term, prev_index, prev_term, commit_index, count, flags = body.unpack(_APPEND)
    if flags & ~1:
        raise ProtocolError(f"unknown flags {flags:#x}")
    barrier = None
    if flags:
        incarnation, index = body.unpack(_BARRIER)
        barrier = Barrier(incarnation, index)
    if count * _ENTRY.size > body.left:
        raise ProtocolError(f"{count} entries in {body.left} bytes")
    heads = body.take(count * _ENTRY.size)
    entries = []
    for index, (entry_term, log_time_ms, length, kind) in enumerate(_ENTRY.iter_unpack(heads), prev_index + 1):
        if kind not in _KINDS:
            raise ProtocolError(f"an entry of unknown kind {kind}: a newer release of ayder wrote it")
        entries.append(LogEntry(index, entry_term, _KINDS[kind], log_time_ms, bytes(body.take(length))))
    body.end()
    return AppendEntries(term, sender, prev_index, prev_term, tuple(entries), commit_index, barrier)


def _encode_append_reply(message: AppendReply) -> list[bytes]:
    flags = _flags(message.accepted, message.damaged)
    return frame(
        19,
        _APPEND_REPLY.pack(
            message.term, message.index, message.hint_index, message.hint_term, message.incarnation, flags
        ),
    )  # fmt: skip


def _decode_append_reply(sender: NodeId, view: memoryview) -> AppendReply:
    term, index, hint_index, hint_term, incarnation, flags = _unpack(_APPEND_REPLY, view, 3)
    return AppendReply(term, sender, bool(flags & 1), index, hint_index, hint_term, incarnation, bool(flags & 2))


def _encode_heartbeat(message: Heartbeat) -> list[bytes]:
    return frame(20, _HEARTBEAT.pack(message.term, message.commit_index, message.round))


def _decode_heartbeat(sender: NodeId, view: memoryview) -> Heartbeat:
    term, commit_index, round = _unpack(_HEARTBEAT, view, 0)
    return Heartbeat(term, sender, commit_index, round)


def _encode_heartbeat_reply(message: HeartbeatReply) -> list[bytes]:
    flags = _flags(message.damaged)
    return frame(21, _HEARTBEAT_REPLY.pack(message.term, message.round, message.verified_index, message.incarnation, flags))


def _decode_heartbeat_reply(sender: NodeId, view: memoryview) -> HeartbeatReply:
    term, round, verified_index, incarnation, flags = _unpack(_HEARTBEAT_REPLY, view, 1)
    return HeartbeatReply(term, sender, round, verified_index, incarnation, bool(flags))


def _encode_install_snapshot(message: InstallSnapshot) -> list[bytes]:
    meta = message.snapshot.meta
    membership = meta.membership.encode()
    head = _SNAPSHOT.pack(message.term, meta.index, meta.term, meta.log_time_ms, len(membership))
    return frame(22, head + membership, message.snapshot.data)


def _decode_install_snapshot(sender: NodeId, view: memoryview) -> InstallSnapshot:
    body = Body(view)
    term, index, meta_term, log_time_ms, length = body.unpack(_SNAPSHOT)
    encoded = bytes(body.take(length))
    try:
        membership = Membership.decode(encoded)
    except CorruptLog as error:
        raise ProtocolError(str(error)) from error
    if membership.encode() != encoded:
        raise ProtocolError("a configuration has its names out of order or twice")
    meta = SnapshotMeta(index, meta_term, membership, log_time_ms)
    return InstallSnapshot(term, sender, Snapshot(meta, bytes(body.take(body.left))))


def _encode_timeout_now(message: TimeoutNow) -> list[bytes]:
    return frame(23, _ONE.pack(message.term))


def _decode_timeout_now(sender: NodeId, view: memoryview) -> TimeoutNow:
    (term,) = _unpack(_ONE, view, 0)
    return TimeoutNow(term, sender)


_DECODERS: dict[int, Callable[[NodeId, memoryview], Message]] = {
    16: _decode_request_vote,
    17: _decode_vote_reply,
    18: _decode_append_entries,
    19: _decode_append_reply,
    20: _decode_heartbeat,
    21: _decode_heartbeat_reply,
    22: _decode_install_snapshot,
    23: _decode_timeout_now,
}
_ENCODERS: dict[type, Callable[..., list[bytes]]] = {
    RequestVote: _encode_request_vote,
    VoteReply: _encode_vote_reply,
    AppendEntries: _encode_append_entries,
    AppendReply: _encode_append_reply,
    Heartbeat: _encode_heartbeat,
    HeartbeatReply: _encode_heartbeat_reply,
    InstallSnapshot: _encode_install_snapshot,
    TimeoutNow: _encode_timeout_now,
}


def encode(message: Message) -> list[bytes]:
    """One frame, in pieces to be sent in this order; payloads are the message's own objects, not copies."""
    return _ENCODERS[type(message)](message)


class FrameReader:
    """What ``sender`` says after the handshake."""

    def __init__(self, sender: NodeId, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.sender = sender
        self._frames = Frames(max_frame_bytes)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the frame that is not complete yet; never more than the limit."""
        return self._frames.kept_bytes

    def receive_data(self, data: bytes) -> list[Message]:
        """The messages that ended within ``data``. Raises ``ProtocolError``, then and on every later call: what came before it in
        ``data`` is lost with the connection, as Raft permits."""
        return self._frames.receive(data, self._decode)

    def _decode(self, kind: int, view: memoryview) -> Message | None:
        decode = _DECODERS.get(kind)
        if decode is not None:
            return decode(self.sender, view)
        if kind != _PING_TYPE or len(view):
            raise ProtocolError(f"a frame of type {kind} where a message must be")
        return None
