"""The listener of `ayder serve`: binds, accepts, counts clients, and stops in bounded time.

Owns: listening sockets, the limits on open connections, TLS, the graceful stop. Must not know: HTTP beyond one refusal, routes.

The nurseries nest: accepting inside serving inside the front, so stopping goes accept, clients, shared tasks. What one client
causes ends that client only; a failure of the listener itself ends ``serve``.

Invariants: never more than ``max_connections`` clients are served at once, nor more than the limit of their address;
``drain`` returns within ``drain_timeout_ms`` (and one pass of the scheduler) whatever clients do.

Source: RELIABILITY H-2, O-4; RFC 9112 section 9.6.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import ssl

import attrs
import trio

from ayder.config import HttpConfig
from ayder.http.exchange import Application
from ayder.http.front import Front
from ayder.http.transport import serve_socket, serve_stream
from ayder.http.writing import CLOSE

__all__ = ["ClientCounter", "HttpServer", "bind_sockets", "is_loopback", "serve_http", "turn_away"]

BACKLOG = 2048
ACCEPTS_A_TURN = 64
EXHAUSTED_PAUSE_SECONDS = 0.1
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
TURN_AWAY_SECONDS = 1.0
MAX_TURNING_AWAY = 64
logger = logging.getLogger(__name__)


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for every address ``host`` means (IPv4 and IPv6). With port 0 all get the same free port.

    Raises ``OSError`` when an address cannot be bound.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            bound.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            port = listener.getsockname()[1]
            listener.listen(BACKLOG)
            listener.setblocking(False)
    except OSError:
        for listener in bound:
            listener.close()
        raise
    return bound


def is_loopback(address: str) -> bool:
    """Whether a textual IP address is this machine."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


@attrs.define(slots=True, eq=False)
class ClientCounter:
    """How many clients are connected, in all and by address."""

    config: HttpConfig
    total: int = 0
    by_address: dict[str, int] = attrs.field(factory=dict)

    def admit(self, address: str) -> bool:
        """Count a client in, or say that there is no room for it."""
        count = self.by_address.get(address, 0)
        limit = self.config.max_connections_loopback if is_loopback(address) else self.config.max_connections_per_address
        if self.total >= self.config.max_connections or count >= limit:
            return False
        self.total += 1
        self.by_address[address] = count + 1
        return True

    def leave(self, address: str) -> None:
        """Count an admitted client out."""
        self.total -= 1
        count = self.by_address[address] - 1
        if count:
            self.by_address[address] = count
        else:
            del self.by_address[address]


class HttpServer:
    """Accepts clients and gives each to the fast connection. ``front.extra_headers`` are the lines every answer carries."""

    def __init__(self, application: Application, config: HttpConfig) -> None:
        self.front = Front(application, config)
        self.config = config
        self.clients = ClientCounter(config)
        self._listeners = bind_sockets(config.host, config.port)
        self._tls = _tls_context(config)
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._turning_away = 0
        self._drained = trio.Event()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) of each listener."""
        return [listener.getsockname()[:2] for listener in self._listeners]

    @property
    def urls(self) -> list[str]:
        """Where clients find us."""
        scheme = "https" if self._tls else "http"
        return [f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}" for host, port in self.addresses]

    async def serve(self, *, task_status: trio.TaskStatus[HttpServer] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until drained or cancelled. Reports itself when clients may come."""
        try:
            with self._serving:
                async with trio.open_nursery() as front_nursery:
                    await front_nursery.start(self.front.run)
                    async with trio.open_nursery() as client_nursery:
                        with self._accepting:
                            async with trio.open_nursery() as accept_nursery:
                                for listener in self._listeners:
                                    accept_nursery.start_soon(self._accept, listener, client_nursery)
                                task_status.started(self)
                        await self._drained.wait()
                    front_nursery.cancel_scope.cancel()
        finally:
            self._close_listeners()

    async def drain(self) -> None:
        """Stop: accept nobody, finish the requests in flight, and after ``drain_timeout_ms`` cut off whoever is left."""
        self._accepting.cancel()
        self._close_listeners()
        self.front.drain()
        with trio.move_on_after(self.config.drain_timeout_ms / 1000):
            await self.front.wait_until_empty()
        for connection in tuple(self.front.connections):
            connection.lost()
        self._drained.set()
        self._serving.cancel()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            if listener.fileno() >= 0:
                trio.lowlevel.notify_closing(listener.fileno())
                listener.close()

    # --- accepting

    async def _accept(self, listener: socket.socket, clients: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.fileno())
            for _ in range(ACCEPTS_A_TURN):
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as exc:
                    if exc.errno in EXHAUSTED:
                        logger.warning("cannot accept: %s; trying again in %d ms", exc, EXHAUSTED_PAUSE_SECONDS * 1000)
                        await trio.sleep(EXHAUSTED_PAUSE_SECONDS)
                    break
                self._welcome(sock, address[0], clients)

    def _welcome(self, sock: socket.socket, peer: str, clients: trio.Nursery) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.clients.admit(peer):
            clients.start_soon(self._client, sock, peer)
        elif self._tls is None and self._turning_away < MAX_TURNING_AWAY:
            clients.start_soon(self._turn_away, sock)
        else:
            sock.close()

    async def _turn_away(self, sock: socket.socket) -> None:
        self._turning_away += 1
        try:
            await turn_away(self.front, sock)
        finally:
            self._turning_away -= 1

    async def _client(self, sock: socket.socket, peer: str) -> None:
        try:
            if self._tls is None:
                await serve_socket(self.front, sock, peer)
            else:
                await self._client_over_tls(sock, peer, self._tls)
        except Exception:
            logger.exception("a connection from %s broke", peer)
        finally:
            self.clients.leave(peer)

    async def _client_over_tls(self, sock: socket.socket, peer: str, context: ssl.SSLContext) -> None:
        stream = trio.SSLStream(
            trio.SocketStream(trio.socket.from_stdlib_socket(sock)), context, server_side=True, https_compatible=True
        )
        try:
            with trio.fail_after(self.config.head_timeout_ms / 1000):
                await stream.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError):
            await trio.aclose_forcefully(stream)
            return
        except BaseException:
            sock.close()
            raise
        await serve_stream(self.front, stream, peer)


async def turn_away(front: Front, sock: socket.socket) -> None:
    """Answer 503 to a client there is no room for, wait a moment for it to read that, close."""
    response = front.refuse("OVERLOADED", "too many connections")
    try:
        sock.send(b"".join(front.writer.whole(response, head_only=False, connection=CLOSE)))
        sock.shutdown(socket.SHUT_WR)
        with trio.move_on_after(TURN_AWAY_SECONDS):
            while True:
                await trio.lowlevel.wait_readable(sock.fileno())
                if not sock.recv(65536):
                    break
    except OSError:
        pass
    finally:
        trio.lowlevel.notify_closing(sock.fileno())
        sock.close()


def _tls_context(config: HttpConfig) -> ssl.SSLContext | None:
    if not config.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(config.tls_certificate, config.tls_key)
    context.set_alpn_protocols(["http/1.1"])
    return context


async def serve_http(
    application: Application, config: HttpConfig, *, task_status: trio.TaskStatus[HttpServer] = trio.TASK_STATUS_IGNORED
) -> None:
    """Bind and serve until somebody awaits ``HttpServer.drain`` (the server is the value of ``task_status``) or we are cancelled.

    Raises ``OSError`` when the address cannot be bound or the certificate cannot be read.
    """
    async with trio.open_nursery() as nursery:
        task_status.started(await nursery.start(HttpServer(application, config).serve))
