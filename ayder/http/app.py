"""The dispatch every front shares: match, authenticate, admit, call the handler, and the one error boundary.

Owns: the order of the gates and what an unexpected exception becomes. Must not know: sockets, what any handler does.

The gates, cheapest and most secret first: public paths pass; a token is judged before anything is said about what exists; then
route, scope, rate, body limit. All of this happens on the head alone, before a byte of body is read (RELIABILITY H-4).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import msgspec

from ayder.errors import AyderError, ErrorCode
from ayder.http.auth import ANONYMOUS, Principal
from ayder.http.context import Context
from ayder.http.errors import error_response
from ayder.http.exchange import Answer, Deferred, Request, Response, Work
from ayder.http.forwarding import Forwarder
from ayder.http.routes import Body, Match, Route, Router

__all__ = ["HttpApplication"]

logger = logging.getLogger(__name__)

_NO_ROUTE = Route("", "(none)", lambda *_: Response(404), None)


class HttpApplication:
    """See ``exchange.Application``: two sync calls a request, neither of which raises."""

    def __init__(self, context: Context, routes: Iterable[Route]) -> None:
        self._context = context
        self._router = Router(routes)
        http = context.config.http
        self._limits = {Body.PRODUCE: http.max_produce_body_bytes, Body.CONTROL: http.max_control_body_bytes}
        self._origins = frozenset(origin.encode() for origin in http.cors_origins)
        self._observe = context.metrics.observe_request
        self._forwarder = Forwarder(context.config)

    @property
    def routes(self) -> tuple[Route, ...]:
        """The route table."""
        return self._router.routes

    # -- head -----------------------------------------------------------------------------------------------------
    def open(self, request: Request) -> int | Response:
        """The body limit, or the refusal."""
        memo = request.memo
        if memo is not None and memo.body_limit >= 0:
            request.route, request.principal = memo.route, memo.principal
            return memo.body_limit
        try:
            match = self._admit(request)
        except AyderError as error:
            return self._finish(request, self._error(error))
        except Exception as error:
            return self._finish(request, self._unexpected(request, error))
        if isinstance(match, Response):
            return self._finish(request, match)
        request.route = match
        limit = self._limits[match.route.body]
        if memo is not None and not request.response_headers:  # a token with a rate limit is counted every time
            memo.body_limit, memo.route, memo.principal = limit, match, request.principal
        return limit

    def _admit(self, request: Request) -> Match | Response:
        if request.method == "OPTIONS":
            return self._options(request)
        match = self._router.match(request.method, request.path)
        public = isinstance(match, Match) and match.route.scope is None
        if public or self._context.authenticator.is_open(request.path):
            request.principal = ANONYMOUS
        else:
            principal = self._context.authenticator.authenticate(request.headers.get(b"authorization"))
            request.principal = principal
            if isinstance(match, Match):
                _check_scope(principal, match)
            if b"x-force-overload" in request.headers and request.headers[b"x-force-overload"][:1] in (b"1", b"y", b"Y"):
                raise AyderError(ErrorCode.OVERLOADED, "the request asked for this answer")
            limited = self._context.rate_limiter.check(principal, time.time())
            if limited is not None:
                request.response_headers = limited
        if not isinstance(match, Match):
            raise _no_match(request, match)
        return match

    def _options(self, request: Request) -> Response:
        match = self._router.match("OPTIONS", request.path)
        methods = match if isinstance(match, tuple) and match else ("DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT")
        allow = ", ".join(methods).encode()
        headers: list[tuple[bytes, bytes]] = [(b"allow", allow)]
        if request.headers.get(b"origin") in self._origins or b"*" in self._origins:
            headers += [
                (b"access-control-allow-methods", allow),
                (b"access-control-allow-headers", b"authorization, content-type, idempotency-key, last-event-id"),
                (b"access-control-max-age", b"600"),
            ]
        return Response(204, headers=tuple(headers))

    # -- body -----------------------------------------------------------------------------------------------------
    def respond(self, request: Request) -> Answer:
        """The handler's answer, with its errors turned into answers."""
        match = request.route
        assert isinstance(match, Match)
        try:
            answer = match.route.handler(self._context, request, match.parameters)
        except AyderError as error:
            if leader_url := self._forwards(request, error):
                return Work(partial(self._run, request, partial(self._forwarder.call, request, leader_url)))
            return self._finish(request, self._error(error, request))
        except Exception as error:
            return self._finish(request, self._unexpected(request, error))
        if type(answer) is Response:
            return self._finish(request, answer)
        if isinstance(answer, Deferred):
            answer.observer = partial(self._observe_answer, request)
            return answer
        assert isinstance(answer, Work)
        return Work(partial(self._run, request, answer.run))

    def _observe_answer(self, request: Request, response: Response) -> None:
        self._finish(request, response)

    async def _run(self, request: Request, run: Callable[[], Awaitable[Response]]) -> Response:
        try:
            response = await run()
        except AyderError as error:
            if leader_url := self._forwards(request, error):  # a call to the leader never says not_leader itself
                return await self._run(request, partial(self._forwarder.call, request, leader_url))
            response = self._error(error, request)
        except Exception as error:
            response = self._unexpected(request, error)
        return self._finish(request, response)

    def _forwards(self, request: Request, error: AyderError) -> str | None:
        """Where to take a request that only the leader can answer; ``None``: its client is told."""
        leader_url: str | None = error.facts.get("leader_url") if error.code is ErrorCode.NOT_LEADER else None
        return leader_url if leader_url and self._forwarder.wants(request) else None

    def refuse(self, code: str, message: str) -> Response:
        """The answer for what a front refuses by itself."""
        response = self._error(AyderError(ErrorCode[code], message))
        self._observe("(refused)", response.status, 0.0)
        return response

    # -- every answer passes here ---------------------------------------------------------------------------------
    def _finish(self, request: Request, response: Response) -> Response:
        match = request.route
        template = match.route.template if isinstance(match, Match) else _NO_ROUTE.template
        seconds = (time.monotonic_ns() - request.received_ns) / 1e9
        self._observe(template, response.status, seconds)
        if request.query and b"timing=1" in request.query:
            response.headers += ((b"server-timing", b"total;dur=%.3f" % (seconds * 1000)),)
        if request.response_headers:
            response.headers += request.response_headers
        if self._origins and b"origin" in request.headers:
            origin = request.headers[b"origin"]
            if origin in self._origins or b"*" in self._origins:
                response.headers += ((b"access-control-allow-origin", origin), (b"vary", b"origin"))
        return response

    def _error(self, error: AyderError, request: Request | None = None) -> Response:
        leader_url = error.facts.get("leader_url") if error.code is ErrorCode.NOT_LEADER else None
        if leader_url and request is not None and (request.method not in ("GET", "HEAD") or b"redirect=1" in request.query):
            return self._redirect(request, leader_url)
        return error_response(error, retry_after_s=self._context.config.http.retry_after_s)

    def _redirect(self, request: Request, leader_url: str) -> Response:
        """To the leader, as the predecessor said it. The address comes from the configuration, never from the request."""
        cluster, retry_after = self._context.config.cluster, self._context.config.http.retry_after_s
        target = request.path + (b"?" + request.query if request.query else b"")
        location = leader_url.rstrip("/") + target.decode("latin-1")
        body = {
            "ok": False,
            "error": "redirect_to_leader",
            "message": "another node leads; ask it",
            "outcome": "not_applied",
            "leader_url": leader_url,
            "retry_after": retry_after,
            "redirect": {"status": cluster.redirect_status, "location": location},
        }
        headers = ((b"location", location.encode()), (b"retry-after", b"%d" % retry_after), (b"cache-control", b"no-store"))
        return Response(cluster.redirect_status, msgspec.json.encode(body), headers=headers)

    def _unexpected(self, request: Request, error: Exception) -> Response:
        error_id = uuid.uuid4().hex[:12]
        trace = request.headers.get(b"traceparent", b"").decode("latin-1")
        logger.error(
            "unexpected error in a handler",
            exc_info=error,
            extra={"error_id": error_id, "method": request.method, "path": request.path.decode("latin-1"), "traceparent": trace},
        )
        return self._error(AyderError(ErrorCode.INTERNAL, "an unexpected error; the log knows it by its id", error_id=error_id))


def _check_scope(principal: Principal, match: Match) -> None:
    scope = match.route.scope
    assert scope is not None
    resource = None if scope.parameter is None else match.parameters[scope.parameter].decode("utf-8", "replace")
    principal.require(scope.action, resource)


def _no_match(request: Request, allowed: tuple[str, ...]) -> AyderError:
    if allowed:
        return AyderError(
            ErrorCode.METHOD_NOT_ALLOWED, f"{request.method} is not among {', '.join(allowed)}", allow=list(allowed)
        )
    return AyderError(ErrorCode.ROUTE_NOT_FOUND, "there is no such path; GET /openapi.json lists them")
