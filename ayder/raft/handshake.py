"""The first frame each way between peers: who speaks, to whom, in which cluster and version.

Owns: that frame, its limit, the rules by which a node talks to another. Must not know: who is a member, certificates, sockets.

A connection begins with a ``Hello`` of the dialer; the other side answers with its own, or with a ``Refusal`` that says why and
ends it. Neither side says anything else before it has the other's hello, so bytes behind a hello are a violation.

Invariant: nobody gets more than 512 bytes of memory before its name is known. The layout of a hello never changes (its version
stays 1 for ever): it is what two releases agree by. Source: RELIABILITY H-8, O-1; docs/peer-protocol.md.
"""

from __future__ import annotations

import struct

import attrs

from ayder.entries import NodeId
from ayder.raft.frames import Body, Frames, ProtocolError, encode_text, frame

__all__ = ["HANDSHAKE_BYTES", "HandshakeReader", "Hello", "Refusal", "encode_hello", "encode_refusal"]

HANDSHAKE_BYTES = 512
"""Longest frame of a peer whose name is not known yet."""
OLDEST_VERSION = 1
NEWEST_VERSION = 1
"""Versions of the protocol this release speaks; the newest that both sides speak is used."""

_MAGIC = b"AYPR"
_MAX_NAME_BYTES = 128
_MAX_REASON_BYTES = 256
_HELLO = struct.Struct("<4sBBH16s")
_HELLO_TYPE, _REFUSAL_TYPE = 1, 2


@attrs.frozen(slots=True)
class Hello:
    """Who speaks, to whom it means to speak, in which cluster and in which versions of this protocol."""

    cluster_id: bytes
    sender: NodeId
    receiver: NodeId
    oldest: int = OLDEST_VERSION
    newest: int = NEWEST_VERSION

    def __attrs_post_init__(self) -> None:
        assert len(self.cluster_id) == 16 and 0 < self.oldest <= self.newest, self

    def objection(self, *, cluster_id: bytes, node_id: NodeId) -> str | None:
        """Why a node of this name and cluster must not talk with the sender; ``None`` when it may."""
        if self.cluster_id != cluster_id:
            return f"cluster {self.cluster_id.hex()} is not ours, {cluster_id.hex()}"
        if self.newest < OLDEST_VERSION or self.oldest > NEWEST_VERSION:
            return f"protocol versions {self.oldest} to {self.newest}, here {OLDEST_VERSION} to {NEWEST_VERSION}"
        if self.receiver != node_id:
            return f"{self.receiver} was called, this is {node_id}"
        if self.sender == node_id:
            return "it has our own name"
        return None


@attrs.frozen(slots=True)
class Refusal:
    """The answer to a hello that is not welcome."""

    reason: str


def encode_hello(hello: Hello) -> bytes:
    """The first frame of either side."""
    head = _HELLO.pack(_MAGIC, hello.oldest, hello.newest, 0, hello.cluster_id)
    return b"".join(frame(_HELLO_TYPE, head + encode_text(hello.sender) + encode_text(hello.receiver)))


def encode_refusal(reason: str) -> bytes:
    """Instead of a hello. A reason that is too long is cut."""
    return b"".join(frame(_REFUSAL_TYPE, encode_text(reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore") or "?")))


class HandshakeReader:
    """Reads the one frame that a side may send before it is known."""

    def __init__(self) -> None:
        self._frames = Frames(HANDSHAKE_BYTES)

    def receive_data(self, data: bytes) -> Hello | Refusal | None:
        """The frame once it is complete. Raises ``ProtocolError``, also for anything behind it: it is not our turn to listen."""
        said: list[Hello | Refusal] = self._frames.receive(data, _decode_handshake)
        if len(said) > 1 or (said and self._frames.kept_bytes):
            raise ProtocolError("spoke before it was welcome")
        return said[0] if said else None


def _name(body: Body) -> NodeId:
    name = body.text(_MAX_NAME_BYTES)
    if not name.isprintable():  # it goes into log lines
        raise ProtocolError("a name is not printable")
    return name


def _decode_handshake(kind: int, view: memoryview) -> Hello | Refusal:
    body = Body(view)
    said: Hello | Refusal
    if kind == _HELLO_TYPE:
        magic, oldest, newest, reserved, cluster_id = _HELLO.unpack(body.take(_HELLO.size))
        if magic != _MAGIC or reserved or not 0 < oldest <= newest:
            raise ProtocolError("not a peer of ayder")
        said = Hello(cluster_id, _name(body), _name(body), oldest, newest)
    elif kind == _REFUSAL_TYPE:
        said = Refusal(body.text(_MAX_REASON_BYTES))
    else:
        raise ProtocolError(f"a frame of type {kind} before the handshake")
    body.end()
    return said
