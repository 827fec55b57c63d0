"""What carries a connection's bytes: a plain socket driven by hand, or any Trio stream (TLS).

Owns: one task per client that reads, the socket's end of life. Must not know: HTTP.

A plain socket is read and written with non-blocking calls around ``wait_readable`` / ``wait_writable``: no lock, no checkpoint
beyond the one that waits. A stream (TLS) can only be written by awaiting, so there every answer goes through the writer task.

Invariants: one task reads; ``close`` ends it through its cancel scope; the socket is closed exactly once, by that task.
"""

from __future__ import annotations

import socket

import trio

from ayder.http.connection import MAX_READ_BYTES, Connection
from ayder.http.front import Front

__all__ = ["serve_socket", "serve_stream"]

MAX_JOINED_BYTES = 65536
MAX_IOVEC = 512


class _Reading:
    """The task that reads: its cancel scope, and the gate that back-pressure closes."""

    __slots__ = ("_gate", "scope")

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self._gate: trio.Event | None = None

    def reading_changed(self) -> None:
        """Look again whether the connection wants input."""
        if self._gate is not None:
            self._gate.set()

    async def wait_unpaused(self, connection: Connection) -> None:
        """Return once the connection wants input or is over."""
        while connection.paused and not connection.closed:
            self._gate = trio.Event()
            await self._gate.wait()
        self._gate = None

    def close(self) -> None:
        """End the reading task."""
        self.scope.cancel()


class SocketTransport(_Reading):
    """A plain non-blocking socket."""

    __slots__ = ("_fd", "_socket")

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._socket = sock
        self._fd = sock.fileno()

    def try_send(self, pieces: list[bytes]) -> int:
        """One ``send``. Raises ``OSError``."""
        try:
            if len(pieces) == 1:
                return self._socket.send(pieces[0])
            if sum(map(len, pieces)) <= MAX_JOINED_BYTES:
                return self._socket.send(b"".join(pieces))
            return self._socket.sendmsg(pieces[:MAX_IOVEC])
        except BlockingIOError:
            return 0

    async def drain(self, data: memoryview) -> int:
        """Wait for room, then one ``send``. Raises ``OSError``."""
        try:
            await trio.lowlevel.wait_writable(self._fd)
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except trio.ClosedResourceError as exc:
            raise OSError("closed") from exc

    def shutdown_writing(self) -> None:
        """FIN."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass


class StreamTransport(_Reading):
    """A Trio stream, in practice TLS."""

    __slots__ = ("_stream",)

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__()
        self._stream = stream

    def try_send(self, pieces: list[bytes]) -> int:
        """A stream is written by the writer task only."""
        return 0

    async def drain(self, data: memoryview) -> int:
        """Send up to 64 KiB. Raises ``OSError``."""
        piece = data[:MAX_JOINED_BYTES]
        try:
            await self._stream.send_all(piece)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise OSError("closed") from exc
        return len(piece)

    def shutdown_writing(self) -> None:
        """TLS over TCP has no half-close that clients understand: closing does both."""
        self.close()


async def serve_socket(front: Front, sock: socket.socket, peer: str, *, takes_over: bool = False) -> bytes | None:
    """Serve one client on a non-blocking socket until the connection is over, then close the socket.

    With ``takes_over``, returns the bytes read so far, the socket still open, when the client wants another protocol.
    """
    transport = SocketTransport(sock)
    connection = Connection(front, transport, peer, takes_over=takes_over)
    try:
        with transport.scope:
            await _read_socket(connection, transport, sock)
        if connection.handover is not None and not connection.closed:
            front.discard(connection)
            return connection.handover
    finally:
        if connection.handover is None or connection.closed:
            connection.lost()
            trio.lowlevel.notify_closing(sock.fileno())
            sock.close()
    return None


async def _read_socket(connection: Connection, transport: SocketTransport, sock: socket.socket) -> None:
    wait_readable, receive, received, fd = trio.lowlevel.wait_readable, sock.recv, connection.data_received, sock.fileno()
    while True:
        await wait_readable(fd)
        try:
            data = receive(MAX_READ_BYTES)
        except BlockingIOError:
            continue
        except OSError:
            return
        if not data:
            connection.eof_received()
            await trio.sleep_forever()  # until the answers owed are sent and the connection closes us
        received(data)
        if connection.paused:
            await transport.wait_unpaused(connection)
        if connection.handover is not None or connection.closed:
            return


async def serve_stream(front: Front, stream: trio.abc.Stream, peer: str) -> None:
    """Serve one client on a stream (its handshake done) until the connection is over, then close the stream."""
    transport = StreamTransport(stream)
    connection = Connection(front, transport, peer)
    try:
        with transport.scope:
            while not connection.closed:
                data = await stream.receive_some(MAX_READ_BYTES)
                if not data:
                    connection.eof_received()
                    await trio.sleep_forever()
                connection.data_received(bytes(data))
                await transport.wait_unpaused(connection)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        connection.lost()
        await trio.aclose_forcefully(stream)
