"""What all connections of one listener share: the application, the limits, the clock, the reaper and the pump.

Owns: the shapes of a connection and of what carries its bytes, the set of open connections, the bytes of bodies they hold
together, one coarse clock, the list of connections that have something to do outside their own reading. Must not know:
sockets, parsing, routes.

No connection has a timer: ``reap`` runs once a tick for all of them, and every stamp a connection keeps is read from ``now``,
which stands still between two ticks. A deadline therefore fires up to two ticks late and never early.

Invariants: a connection is in ``connections`` exactly while it may still write or be called back; ``held_body_bytes`` is the sum
of the body bytes of requests that are not complete yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, cast

import trio

from ayder.config import HttpConfig
from ayder.http.exchange import Application, Request, Response
from ayder.http.writing import ExtraHeaders, HeadWriter

__all__ = ["TICK_SECONDS", "Front", "Owner", "Transport"]

TICK_SECONDS = 0.25
logger = logging.getLogger(__name__)


class Owner(Protocol):
    """A connection, as the front and the queue of answers see it."""

    due: bool

    def resume(self) -> None:
        """Called in the next pass of the scheduler after ``Front.soon``."""
        ...

    def tick(self, now: float) -> None:
        """Judge the deadlines; ``now`` in seconds, Trio's clock."""
        ...

    def drain(self) -> None:
        """The server stops."""
        ...

    def lost(self) -> None:
        """The client is gone."""
        ...

    def wants_turn(self) -> bool:
        """Whether ``resume`` has something to do once an answer left."""
        ...

    def all_sent(self) -> None:
        """The last answer of the connection is sent."""
        ...


class Transport(Protocol):
    """What carries the bytes of one connection. Only ``drain`` waits."""

    def try_send(self, pieces: list[bytes]) -> int:
        """Send what fits now; returns how many bytes went. Raises ``OSError`` when the client is gone."""
        ...

    async def drain(self, data: memoryview) -> int:
        """Wait until the client takes bytes again; returns how many went. Raises ``OSError`` when the client is gone."""
        ...

    def reading_changed(self) -> None:
        """Whether the connection wants input may have changed, or the connection was handed over."""
        ...

    def shutdown_writing(self) -> None:
        """Tell the client that nothing more comes, still reading. Never raises."""
        ...

    def close(self) -> None:
        """Give up the client; the task that reads ends. Sync, repeatable."""
        ...


class Front:
    """The shared part of a listener. ``run`` must be running for streams, works, deadlines and joined answers to happen."""

    def __init__(self, application: Application, config: HttpConfig) -> None:
        self.application = application
        self.config = config
        self.writer = HeadWriter(cast(ExtraHeaders, application) if hasattr(application, "extra_headers") else None)
        self.connections: set[Owner] = set()
        self.held_body_bytes = 0
        self.draining = False
        self.now = 0.0
        self._due: list[Owner] = []
        self._parking = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None
        self._all_gone: trio.Event | None = None
        # Deadlines in seconds, one tick added because `now` may be a tick old when a stamp is taken.
        self.head_timeout = config.head_timeout_ms / 1000 + TICK_SECONDS
        self.body_grace = config.body_grace_ms / 1000 + TICK_SECONDS
        self.body_timeout = config.body_timeout_ms / 1000 + TICK_SECONDS
        self.idle_timeout = config.idle_timeout_ms / 1000 + TICK_SECONDS
        self.write_stall_timeout = config.write_stall_timeout_ms / 1000 + TICK_SECONDS
        self.writer.set_time(time.time())

    @property
    def extra_headers(self) -> bytes:
        """Header lines (each ending in CRLF) of every answer, swapped at will. An application's own ``extra_headers`` wins."""
        return self.writer.extra_headers

    @extra_headers.setter
    def extra_headers(self, lines: bytes) -> None:
        self.writer.extra_headers = lines

    # --- the application, with its bugs contained

    def refuse(self, code: str, message: str) -> Response:
        """The application's words for a refusal of ours."""
        try:
            return self.application.refuse(code, message)
        except Exception:
            logger.exception("the application failed to word a refusal")
            return Response(500, b'{"ok":false,"error":"internal","message":"internal error","outcome":"unknown"}')

    def bug(self, request: Request) -> Response:
        """Call inside ``except``: logs the application's exception and words the 500."""
        logger.exception("unexpected error while answering %s %r", request.method, request.path)
        return self.refuse("INTERNAL", "internal error; it has been logged")

    # --- connections

    def add(self, connection: Owner) -> None:
        """A connection is open."""
        self.connections.add(connection)

    def discard(self, connection: Owner) -> None:
        """A connection is over."""
        self.connections.discard(connection)
        if self._all_gone is not None and not self.connections:
            self._all_gone.set()

    def soon(self, connection: Owner) -> None:
        """Have ``connection.resume`` called in the next pass of the scheduler, once however often it is asked."""
        if not connection.due:
            connection.due = True
            self._due.append(connection)
            self._parking.unpark_all()

    def run_due(self) -> None:
        """Resume every connection that asked for it so far."""
        due, self._due = self._due, []
        for connection in due:
            connection.due = False
            try:
                connection.resume()
            except Exception:
                self._broken(connection)

    def reap(self, now: float, unix_seconds: float) -> None:
        """A tick: move the clock, then let each connection judge its deadlines."""
        self.now = now
        self.writer.set_time(unix_seconds)
        for connection in tuple(self.connections):
            try:
                connection.tick(now)
            except Exception:
                self._broken(connection)

    def drain(self) -> None:
        """From now on every answer is the last of its connection, and idle connections close. Repeatable."""
        self.draining = True
        for connection in tuple(self.connections):
            connection.drain()

    async def wait_until_empty(self) -> None:
        """Return when no connection is open. Unbounded: the caller brings the deadline."""
        while self.connections:
            self._all_gone = trio.Event()
            await self._all_gone.wait()

    # --- tasks

    def spawn(self, connection: Owner, function: Callable[..., Awaitable[Any]], *args: object) -> None:
        """Run a task that belongs to a connection; a bug in it costs that connection only. Needs ``run``."""
        assert self._nursery is not None, "the front is running"
        self._nursery.start_soon(self._contained, connection, function, *args)

    async def _contained(self, connection: Owner, function: Callable[..., Awaitable[Any]], *args: object) -> None:
        try:
            await function(*args)
        except Exception:
            self._broken(connection)

    @staticmethod
    def _broken(connection: Owner) -> None:
        logger.exception("a connection broke: %r", connection)
        connection.lost()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reaper, pump and the tasks of all connections, until cancelled."""
        self.now = trio.current_time()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._reaper)
            nursery.start_soon(self._pump)
            task_status.started()

    async def _reaper(self) -> None:
        while True:
            await trio.sleep(TICK_SECONDS)
            self.reap(trio.current_time(), time.time())

    async def _pump(self) -> None:
        while True:
            if self._due:
                await trio.lowlevel.checkpoint()
            else:
                await self._parking.park()
            self.run_due()
