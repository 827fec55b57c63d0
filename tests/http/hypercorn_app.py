"""The toy application under hypercorn's launch: ``hypercorn --worker-class trio tests.http.hypercorn_app:app``.

``/fail`` makes the node's task fail; ``TOY_*`` in the environment are HTTP settings.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ayder.config import HttpConfig
from ayder.http.asgi import AsgiLaunch
from ayder.http.exchange import Answer, ChunkSender, Request, Response, Work
from ayder.http.front import Front
from tests.http.toy import Toy


class Opened:
    def __init__(self, application: Toy) -> None:
        self.application = application
        self.stopping = False

    def add_front(self, front: Front) -> None:
        front.extra_headers = b"Toy-Front: 1\r\n"

    async def wait_ready(self) -> None:
        await trio.lowlevel.checkpoint()

    def begin_stop(self) -> None:
        self.stopping = True


class Counting(Toy):
    """Adds paths that work without a test holding the strings."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = trio.Event()
        self.cancelled = 0
        self.waiting = 0

    def respond(self, request: Request) -> Answer:
        match request.path:
            case b"/count":
                text = f"{len(self.seen)} {self.waiting} {self.cancelled}"
                self.seen.clear()
                return Response(200, text.encode())
            case b"/fail":
                self.failed.set()
            case b"/wait":
                return Work(self.wait)
            case b"/ticks":
                return Response(200, content_type=b"text/event-stream", stream=self.ticks)
            case b"/flood":
                return Response(200, content_type=b"text/plain", stream=self.flood)
        return super().respond(request)

    async def wait(self) -> Response:
        self.waiting += 1
        try:
            await trio.sleep(20)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return Response(200, b"waited")

    async def ticks(self, send: ChunkSender) -> None:
        for number in range(3):
            await send(b"data: %d\n\n" % number)

    async def flood(self, send: ChunkSender) -> None:
        self.waiting += 1
        try:
            while True:
                await send(b"x" * 65536)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1

    async def watch_disk(self) -> None:
        await self.failed.wait()
        raise OSError("No space left on device")


@asynccontextmanager
async def open_toy() -> AsyncIterator[tuple[Opened, HttpConfig]]:
    settings = {name[4:].lower(): int(value) for name, value in os.environ.items() if name.startswith("TOY_")}
    application = Counting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(application.watch_disk)
        yield Opened(application), HttpConfig(**settings)
        nursery.cancel_scope.cancel()


app = AsgiLaunch(open_toy)
