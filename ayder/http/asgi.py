"""The launch by an ASGI server: ``hypercorn --worker-class trio ayder.http.asgi:app``.

Owns: the ASGI callable, its lifespan (which is the node's), the guard around hypercorn's connections, and who speaks which
protocol there. Must not know: routes. The only importer of hypercorn.

Bare hypercorn 0.18 on Trio ends its process on three small packets of a stranger, goes on serving after the node died in its
lifespan, and waits for a stalled reader for ever when it is told to stop. So importing this module puts a subclass of its
``TCPServer`` in its place: errors of a connection end that connection, HTTP/1.1 (plain or over TLS) is spoken by our fast
connection, HTTP/2 and Upgrade stay with hypercorn, every write has a stall deadline, and a stop has a last deadline of our own.
Where the names the subclass leans on have changed, nothing is replaced and a warning says so: everything then takes the road
of plain ASGI.

Invariants: when the node's tasks fail the process ends (``LifespanFailureError``); no client can end it.

Source: ASGI 3.0 (lifespan, HTTP); hypercorn 0.18 `trio/run.py`, `trio/tcp_server.py`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, cast

import hypercorn.trio.run
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.utils import LifespanFailureError

from ayder.config import HttpConfig
from ayder.http.asgi_requests import Receive, Scope, Send, answer_request
from ayder.http.connection import MAX_READ_BYTES
from ayder.http.exchange import Application
from ayder.http.front import Front
from ayder.http.server import ClientCounter, turn_away
from ayder.http.transport import serve_socket, serve_stream

__all__ = ["AsgiLaunch", "GuardedServer", "Opened", "app", "install"]

TCP_SERVER_PARAMETERS = ["self", "app", "config", "context", "state", "stream"]
STALL_PIECE_BYTES = 65536
logger = logging.getLogger(__name__)


class Opened(Protocol):
    """A node that runs: what the launch needs of it."""

    application: Application

    def add_front(self, front: Front) -> None:
        """A front answers for the node from now on."""
        ...

    async def wait_ready(self) -> None:
        """Until the node can answer."""
        ...

    def begin_stop(self) -> None:
        """The process was told to stop; requests in flight still finish."""
        ...


Open = Callable[[], AbstractAsyncContextManager[tuple[Opened, HttpConfig]]]


class AsgiLaunch:
    """The ASGI callable of one node. ``open_node`` yields the running node and the HTTP settings; leaving its body ends it."""

    def __init__(self, open_node: Open) -> None:
        self._open_node = open_node
        self._node: Opened | None = None
        self._tasks: trio.Nursery | None = None
        self._foreign: set[GuardedServer] = set()
        self._stopping = False
        self.front: Front | None = None
        self.clients: ClientCounter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            assert self.front is not None, "the lifespan has started"
            await answer_request(self.front, scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            raise RuntimeError(f"unknown ASGI scope {scope['type']}")

    # --- lifespan

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        running = False
        try:
            async with self._open_node() as (node, config), trio.open_nursery() as tasks:
                self._tasks = tasks
                self.clients = ClientCounter(config)
                front = Front(node.application, config)
                await tasks.start(front.run)
                node.add_front(front)
                await node.wait_ready()
                self._node, self.front, running = node, front, True
                await send({"type": "lifespan.startup.complete"})
                await receive()
                tasks.cancel_scope.cancel()
        except LifespanFailureError:
            raise
        except Exception as exc:
            # hypercorn would log anything else and go on serving without a node.
            logger.critical("the node %s: %r", "failed" if running else "did not start", exc, exc_info=exc)
            raise LifespanFailureError("run" if running else "startup", repr(exc)) from exc
        finally:
            self.front = None
        await send({"type": "lifespan.shutdown.complete"})

    # --- stopping

    def watch(self, terminated: Any) -> None:
        """Have everything drained once hypercorn's ``terminated`` event is set. Repeatable."""
        if not self._stopping and self._tasks is not None:
            self._stopping = True
            self._tasks.start_soon(self._drain_when, terminated)

    async def _drain_when(self, terminated: Any) -> None:
        await terminated.wait()
        front = self.front
        if front is None or self._node is None:
            return
        self._node.begin_stop()
        front.drain()
        with trio.move_on_after(front.config.drain_timeout_ms / 1000):
            await front.wait_until_empty()
            await trio.sleep_forever()  # until hypercorn's own connections end and the lifespan with them
        for connection in tuple(front.connections):
            connection.lost()
        for foreign in tuple(self._foreign):
            foreign.cut()

    def enter(self, server: GuardedServer) -> None:
        """A connection that hypercorn's own protocols serve begins."""
        self._foreign.add(server)

    def leave(self, server: GuardedServer) -> None:
        """It is over."""
        self._foreign.discard(server)


class GuardedServer(TCPServer):
    """One connection hypercorn accepted: ours where it is HTTP/1.1, hypercorn's else, and in either case harmless."""

    stream: Any  # plain, TLS or one of ours; hypercorn says TLS

    async def run(self) -> None:
        """Serve the connection. Raises nothing but what ends the process anyway."""
        stream = self.stream
        try:
            await self._run_guarded()
        except* Exception as group:
            logger.error("a connection broke: %r", group, exc_info=group)
        finally:
            if self.stream is not stream:  # hypercorn closes the stream it gave us; this one we made
                await trio.aclose_forcefully(self.stream)

    async def _run_guarded(self) -> None:
        launch = getattr(self.app, "app", None)
        if not isinstance(launch, AsgiLaunch) or launch.front is None or launch.clients is None:
            await super().run()
            return
        launch.watch(self.context.terminated)
        try:
            peer = str(self._socket().getpeername()[0])
        except (OSError, IndexError):
            peer = ""  # gone already, or a UNIX socket
        if not launch.clients.admit(peer):
            await self._turn_away(launch.front)
            return
        try:
            await self._choose(launch, launch.front, peer)
        finally:
            launch.clients.leave(peer)

    async def _turn_away(self, front: Front) -> None:
        if not isinstance(self.stream, trio.SSLStream):
            await turn_away(front, self._take_socket())

    async def _choose(self, launch: AsgiLaunch, front: Front, peer: str) -> None:
        """Who speaks: by ALPN over TLS, by the first bytes on a plain connection."""
        if isinstance(self.stream, trio.SSLStream):
            try:
                with trio.fail_after(self.config.ssl_handshake_timeout):
                    await self.stream.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                return
            if self.stream.selected_alpn_protocol() != "h2":
                await serve_stream(front, self.stream, peer)
                return
        else:
            sock = self._take_socket()
            already_read = await serve_socket(front, sock, peer, takes_over=True)
            if already_read is None:
                return
            self.stream = _Prefixed(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), already_read)
        launch.enter(self)
        try:
            await super().run()
        finally:
            launch.leave(self)

    async def _read_data(self) -> None:
        """As hypercorn's, but a connection without a request for ``idle_timeout_ms`` ends, whatever trickles in."""
        launch = getattr(self.app, "app", None)
        if not isinstance(launch, AsgiLaunch) or launch.front is None:
            await super()._read_data()
            return
        idle_timeout = launch.front.idle_timeout
        quiet_since = trio.current_time()
        while True:
            if self._busy():
                quiet_since = trio.current_time()
            data: bytes | bytearray | None = None
            with trio.move_on_at(quiet_since + idle_timeout):
                try:
                    data = await self.stream.receive_some(MAX_READ_BYTES)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    break
            if data is None:
                if self._busy():
                    continue
                break
            await self.protocol.handle(RawData(bytes(data)))
            if not data:
                break
        await self.protocol.handle(Closed())

    def _busy(self) -> bool:
        spoken = self.protocol.protocol
        return bool(getattr(spoken, "streams", None) or getattr(spoken, "stream", None))

    async def protocol_send(self, event: Event) -> None:
        """As hypercorn's, but a client that takes nothing for ``write_stall_timeout_ms`` is cut off."""
        launch = getattr(self.app, "app", None)
        if not isinstance(event, RawData) or not isinstance(launch, AsgiLaunch) or launch.front is None:
            await super().protocol_send(event)
            return
        async with self.send_lock:
            if not await self._send_pieces(event.data, launch.front.write_stall_timeout):
                self.cut()
                await self.protocol.handle(Closed())

    async def _send_pieces(self, data: bytes, seconds: float) -> bool:
        view = memoryview(data)
        try:
            for start in range(0, len(view), STALL_PIECE_BYTES):
                # Shielded as in hypercorn: a frame must not be cut in two by a cancelled stream of the same connection.
                with trio.CancelScope(shield=True, deadline=trio.current_time() + seconds) as scope:
                    await self.stream.send_all(view[start : start + STALL_PIECE_BYTES])
                if scope.cancelled_caught:
                    return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    def cut(self) -> None:
        """Give up the client: whoever waits for it goes on with an error."""
        try:
            self._socket().shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _socket(self) -> trio.socket.SocketType:
        stream = self.stream.transport_stream if isinstance(self.stream, trio.SSLStream) else self.stream
        return cast(trio.socket.SocketType, stream.socket)

    def _take_socket(self) -> socket.socket:
        sock = socket.socket(fileno=self._socket().detach())
        sock.setblocking(False)
        return sock


class _Prefixed:
    """A stream some of whose bytes were read already. (It has no ``do_handshake``: that is how hypercorn knows plain TCP.)"""

    def __init__(self, stream: trio.SocketStream, already_read: bytes) -> None:
        self._stream = stream
        self._already_read = already_read
        self.socket = stream.socket

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._already_read:
            data, self._already_read = self._already_read, b""
            return data
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | memoryview) -> None:
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def install() -> bool:
    """Put the guarded connection in hypercorn's place. Says whether it took; if not, a ``RuntimeWarning`` says why."""
    module: Any = hypercorn.trio.run
    if module.TCPServer is GuardedServer:
        return True
    fits = (
        module.TCPServer is TCPServer
        and list(inspect.signature(TCPServer.__init__).parameters) == TCP_SERVER_PARAMETERS
        and inspect.iscoroutinefunction(TCPServer.run)
        and inspect.iscoroutinefunction(TCPServer.protocol_send)
        and inspect.iscoroutinefunction(getattr(TCPServer, "_read_data", None))
    )
    if not fits:
        warnings.warn(
            "this hypercorn cannot be guarded: plain ASGI, slower and open to hostile packets", RuntimeWarning, stacklevel=2
        )
        return False
    module.TCPServer = GuardedServer
    return True


@asynccontextmanager
async def _open_real_node() -> AsyncIterator[tuple[Opened, HttpConfig]]:
    """The node of this process's settings (environment, and the TOML file ``AYDER_CONFIG`` names)."""
    # By name: the node stands above this package, and only this launch reaches up to it.
    launch = importlib.import_module("ayder.launch")
    node = importlib.import_module("ayder.node")
    launch.refuse_optimised()
    config, _ = await trio.to_thread.run_sync(launch.with_token, launch.config_from_process(bind_known=False))
    node.set_up_logging(config.logging)
    async with node.open_node(config) as opened:
        yield _RealNode(opened, node.tune_process), config.http


class _RealNode:
    """``ayder.node.Node`` as the launch wants it."""

    def __init__(self, node: Any, tune_process: Callable[[], None]) -> None:
        self._node = node
        self._tune_process = tune_process
        self.application: Application = node.application

    def add_front(self, front: Front) -> None:
        """Its answers carry who the node is."""
        self._node.add_front(front)

    async def wait_ready(self) -> None:
        """Until everything the log holds is applied."""
        await self._node.wait_ready()
        self._tune_process()

    def begin_stop(self) -> None:
        """From now on the node says that it is not ready and takes nothing new."""
        self._node.begin_stop()


install()
app = AsgiLaunch(_open_real_node)
