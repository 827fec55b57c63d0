"""The route table's types and its matcher.

Owns: how a path becomes a route and its parameters. Must not know: what a handler does; the table itself stands in ``app.py``'s
sight as the sum of each handler module's ``ROUTES``.

Empty segments collapse (``a//b`` is ``a/b``, a trailing slash is ignored) and a literal segment wins over a parameter, as
clients of the predecessor expect; each segment is percent-decoded once, after splitting.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from ayder.http.exchange import Answer, Request
from ayder.http.params import decode_segment

__all__ = ["Body", "Match", "Route", "Router", "Scope"]

_CACHE_ENTRIES = 2048
_CACHED_PATH_BYTES = 256


class Body(enum.Enum):
    """Which limit holds for a request's body."""

    PRODUCE = "produce"
    CONTROL = "control"


@attrs.frozen(slots=True)
class Scope:
    """What a token must allow: an action (``produce``, ``consume``, ``kv``, ``admin``, ``metrics``) on a resource.

    ``parameter`` is the index of the path parameter that names the resource; ``None``: the handler checks what the body names,
    or the action has no resource.
    """

    action: str
    parameter: int | None = None


@attrs.frozen(slots=True, eq=False)
class Route:
    """One operation. ``template`` has ``{name}`` for parameters, ``{name*}`` at the end for the rest of the path."""

    method: str
    template: str
    handler: Callable[[Any, Request, tuple[bytes, ...]], Answer]
    """Called with the context, the request and the decoded path parameters."""
    scope: Scope | None
    """``None``: public."""
    body: Body = Body.CONTROL
    summary: str = ""


@attrs.frozen(slots=True, eq=False)
class Match:
    """A route and the decoded values of its path parameters."""

    route: Route
    parameters: tuple[bytes, ...]


class _Node:
    __slots__ = ("children", "parameter", "rest", "routes")

    def __init__(self) -> None:
        self.children: dict[bytes, _Node] = {}
        self.parameter: _Node | None = None
        self.rest: dict[str, Route] = {}
        self.routes: dict[str, Route] = {}


class Router:
    """A tree of segments, with the answers for the paths that come often kept ready."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._root = _Node()
        self._matched: dict[tuple[str, bytes], Match | tuple[str, ...]] = {}
        for route in self.routes:
            self._add(route)

    def _add(self, route: Route) -> None:
        node = self._root
        for segment in route.template.strip("/").split("/"):
            if segment.endswith("*}"):
                assert route.method not in node.rest, route.template
                node.rest[route.method] = route
                return
            if segment.startswith("{"):
                node.parameter = node.parameter or _Node()
                node = node.parameter
            else:
                node = node.children.setdefault(segment.encode(), _Node())
        assert route.method not in node.routes, f"two routes for {route.method} {route.template}"
        node.routes[route.method] = route

    def match(self, method: str, path: bytes) -> Match | tuple[str, ...]:
        """The match, or the methods this path does take (none: there is no such path).

        Raises ``AyderError`` (invalid_request) for a broken percent escape.
        """
        key = (method, path)
        found = self._matched.get(key)
        if found is None:
            found = self._find(method, path)
            if len(path) <= _CACHED_PATH_BYTES:  # anyone may ask for anything, without a token
                if len(self._matched) >= _CACHE_ENTRIES:
                    self._matched.clear()
                self._matched[key] = found
        return found

    def _find(self, method: str, path: bytes) -> Match | tuple[str, ...]:
        segments = [segment for segment in path.split(b"/") if segment]
        node, parameters = self._root, list[bytes]()
        for at, segment in enumerate(segments):
            decoded = decode_segment(segment)
            child = node.children.get(decoded)
            if child is None:
                child = node.parameter
                if child is None:
                    if node.rest:
                        parameters.append(b"/".join(decode_segment(each) for each in segments[at:]))
                        return _chosen(node.rest, method, parameters)
                    return ()
                parameters.append(decoded)
            node = child
        return _chosen(node.routes, method, parameters)


def _chosen(routes: dict[str, Route], method: str, parameters: list[bytes]) -> Match | tuple[str, ...]:
    route = routes.get("GET" if method == "HEAD" else method)
    if route is not None:
        return Match(route, tuple(parameters))
    return tuple(sorted({*routes, *(("HEAD",) if "GET" in routes else ()), *(("OPTIONS",) if routes else ())}))
