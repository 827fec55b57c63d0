"""What both directions of a peer connection share: limits, counters, deadlines, and what counts as the other side's fault.

Owns: bounded reads and writes of a Trio stream, the exchange of hellos. Must not know: messages, who dials whom and when.

Whatever the network or the peer does wrong leaves here as ``LinkLost`` or ``ProtocolError``. Those end a connection; any other
exception is a defect of this node and is never caught around here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import trio

from ayder.raft.frames import ProtocolError
from ayder.raft.handshake import HANDSHAKE_BYTES, HandshakeReader, Hello, Refusal
from ayder.raft.wire import MAX_FRAME_BYTES

__all__ = ["LinkLost", "PeerCounters", "PeerLimits", "deadline", "read_hello", "read_some", "write"]

_READ_BYTES = 256 << 10
_WRITE_BYTES = 256 << 10
"""The stall deadline is given to every piece of this size; smaller things are joined up to it."""


@attrs.frozen(kw_only=True)
class PeerLimits:
    """Bounds of the peer network. Seconds and bytes; the bytes are per peer."""

    max_frame_bytes: int = MAX_FRAME_BYTES
    """Longest frame taken from a peer; the same on every node, or longer than what any node sends."""
    max_queued_bytes: int = MAX_FRAME_BYTES
    max_queued_messages: int = 4096
    handshake_timeout_s: float = 5.0
    """From the first packet to the hello of the other side, TLS included."""
    write_timeout_s: float = 10.0
    """A peer that takes less than 256 KiB in this time is cut off."""
    ping_interval_s: float = 1.0
    """Who has said nothing for so long says that it is there."""
    silence_timeout_s: float = 10.0
    """A peer that was not heard for so long is gone."""
    min_backoff_s: float = 0.05
    max_backoff_s: float = 1.0
    max_handshakes: int = 64
    """Connections that have not said their name yet, of all peers; one more is closed at once."""

    def __attrs_post_init__(self) -> None:
        if self.max_queued_bytes < self.max_frame_bytes:
            raise ValueError("max_queued_bytes must have room for the longest frame")
        if self.silence_timeout_s < 3 * self.ping_interval_s:
            raise ValueError("silence_timeout_s must be at least three times ping_interval_s")


@attrs.define(slots=True)
class PeerCounters:
    """What happened with one peer since this node started."""

    connects: int = 0
    sent_messages: int = 0
    sent_bytes: int = 0
    received_messages: int = 0
    received_bytes: int = 0
    dropped_messages: int = 0
    """Never left: the queue was full, or the peer could not be reached."""


class LinkLost(Exception):
    """The connection is over; the text says why."""


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
        raise LinkLost(_innermost(error)) from error


def _innermost(error: BaseException) -> str:
    """What really happened: Trio wraps the errors of TLS, and of every address that was tried."""
    while isinstance(error, BaseExceptionGroup) or error.__cause__ is not None:
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error
    return str(error) or type(error).__name__


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[trio.CancelScope]:
    """Bound what is inside. Raises ``LinkLost`` when its time is up and for every error of the network."""
    with trio.move_on_after(seconds) as scope, _losing():
        yield scope
    if scope.cancelled_caught:
        raise LinkLost(f"{what} for {seconds:g} s")


async def read_some(stream: trio.abc.ReceiveStream, max_bytes: int = _READ_BYTES) -> bytes:
    """What there is, at least one byte. Raises ``LinkLost``, also at the end of the stream."""
    with _losing():
        data = await stream.receive_some(max_bytes)
    if not data:
        raise LinkLost("the peer closed it")
    return bytes(data)


async def write(stream: trio.abc.SendStream, pieces: list[bytes], timeout_s: float) -> int:
    """Send everything; returns how many bytes that was. Raises ``LinkLost``, also when the peer stops taking any."""
    total = 0
    for part in _parts(pieces):
        view = memoryview(part)
        for at in range(0, len(part), _WRITE_BYTES):
            with deadline(timeout_s, "the peer took nothing"):
                await stream.send_all(view[at : at + _WRITE_BYTES])
        total += len(part)
    return total


def _parts(pieces: list[bytes]) -> Iterator[bytes]:
    """The same bytes with small neighbours joined: one send for many small messages, no copy of a large payload."""
    small: list[bytes] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > _WRITE_BYTES and small:
            yield b"".join(small)
            small, size = [], 0
        if len(piece) > _WRITE_BYTES:
            yield piece
        else:
            small.append(piece)
            size += len(piece)
    if small:
        yield b"".join(small)


async def read_hello(stream: trio.abc.ReceiveStream) -> Hello:
    """The other side's hello. Raises ``LinkLost`` and ``ProtocolError``; the caller bounds the time."""
    reader = HandshakeReader()
    while (said := reader.receive_data(await read_some(stream, HANDSHAKE_BYTES))) is None:
        pass
    if isinstance(said, Refusal):
        raise ProtocolError(f"it refused: {said.reason!r}")
    return said
