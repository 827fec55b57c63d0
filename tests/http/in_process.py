"""A whole node without sockets: the memory store, the real dispatch, and requests handed to it as a front would."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import attrs
import msgspec
import trio

from ayder.config import load_config, token_hash
from ayder.http.exchange import Answer, Request, Response, Work
from ayder.node import Node, open_node


@attrs.frozen
class Reply:
    """An answer, its JSON read on demand."""

    status: int
    body: bytes
    headers: dict[bytes, bytes]

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Client:
    """Calls one node as the holder of one token."""

    def __init__(self, node: Node, token: str = "dev") -> None:
        self.node = node
        self._token = token

    async def call(
        self, method: str, target: str, body: object = b"", *, headers: dict[bytes, bytes] | None = None, ok: int | None = None
    ) -> Reply:
        """Ask, wait for the answer; ``ok`` is the status it must have. A body that is not bytes is sent as JSON."""
        response = await self.ask(method, target, body, headers)
        assert response.stream is None, "a streamed answer"
        reply = Reply(response.status, response.body, dict(response.headers))
        assert ok is None or reply.status == ok, (method, target, reply)
        return reply

    async def ask(self, method: str, target: str, body: object = b"", headers: dict[bytes, bytes] | None = None) -> Response:
        path, _, query = target.encode().partition(b"?")
        own = {b"authorization": b"Bearer " + self._token.encode()} if self._token else {}
        request = Request(method, path, query, {**own, **(headers or {})}, received_ns=time.monotonic_ns())
        admitted = self.node.application.open(request)
        if isinstance(admitted, Response):
            return admitted
        request.body = body if isinstance(body, bytes) else msgspec.json.encode(body)
        assert len(request.body) <= admitted
        with trio.fail_after(30):
            return await _answered(self.node.application.respond(request))

    async def get(self, target: str, *, ok: int | None = 200) -> Any:
        return (await self.call("GET", target, ok=ok)).json()

    async def post(self, target: str, body: object = b"", *, ok: int | None = 200) -> Any:
        return (await self.call("POST", target, body, ok=ok)).json()

    async def produce(self, topic: str, *values: bytes, partition: int = 0) -> None:
        """One batch of values without line breaks."""
        await self.post(f"/broker/topics/{topic}/produce-ndjson?partition={partition}", b"\n".join(values))


async def _answered(answer: Answer) -> Response:
    if isinstance(answer, Work):
        return await answer.run()
    if isinstance(answer, Response):
        return answer
    if answer.response is None:
        resolved = trio.Event()
        answer.when_resolved = resolved.set
        await resolved.wait()
    assert answer.response is not None
    return answer.response


@contextlib.asynccontextmanager
async def running(toml: str = "", **settings: object) -> AsyncIterator[Client]:
    """A node on the memory store. ``settings`` are ``section__name=value``; the client holds the token ``dev``."""
    flags = {
        name.replace("__", "."): str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()
    }
    async with open_node(load_config({"storage.log": "memory", **flags}, {}, toml)) as node:
        await node.wait_ready()
        yield Client(node)


def scoped_tokens(**scopes: str) -> str:
    """TOML that accepts these tokens (name = token) with these scopes, comma-separated, and ``dev`` with all rights."""
    return "\n".join(_token_table(name, scope) for name, scope in {"dev": "*", **scopes}.items())


def _token_table(name: str, scopes: str) -> str:
    listed = msgspec.json.encode(scopes.split(",")).decode()
    return f'[[auth.tokens]]\nname = "{name}"\nsha256 = "{token_hash(name)}"\nscopes = {listed}'
