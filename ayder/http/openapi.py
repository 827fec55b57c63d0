"""``/openapi.json``: the contract as a document, made from the route table and the classes that decode the bodies.

Owns: what the document says of each operation beyond its route. Must not know: how anything is handled. ``docs/openapi.json`` is
its golden copy; a test fails when the two differ, or when a route of the table is not described here.

Every operation lists the statuses it can answer with: its own, those of its gates (token, scope, rate) and those the front gives
by itself (head and body limits, deadlines, draining). Source: OpenAPI 3.1.0.

``python -m ayder.http.openapi docs/openapi.json`` writes the golden copy.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

import attrs
import msgspec

from ayder import __version__
from ayder.errors import ErrorCode
from ayder.http import cluster, consume, groups, operations, produce, topics
from ayder.http.context import Context
from ayder.http.errors import STATUS
from ayder.http.exchange import Answer, Request, Response
from ayder.http.routes import Body, Route
from ayder.http.schemas import REPLIES, Schema, header, integer, query, reference, text

__all__ = ["DESCRIBED", "ROUTES", "document", "golden", "table"]

_JSON: Final = "application/json"
_E = ErrorCode
_FRONT_ERRORS: Final = (_E.INVALID_REQUEST, _E.REQUEST_TIMEOUT, _E.URI_TOO_LONG, _E.HEADERS_TOO_LARGE, _E.OVERLOADED, _E.INTERNAL)
_BODY_ERRORS: Final = (_E.PAYLOAD_TOO_LARGE,)
_GATE_ERRORS: Final = (_E.UNAUTHORIZED, _E.FORBIDDEN, _E.RATE_LIMITED)
_WRITE_ERRORS: Final = (_E.NO_QUORUM, _E.STORAGE_FULL, _E.SHUTTING_DOWN, _E.COMMIT_TIMEOUT)
_JSON_ERRORS: Final = (_E.INVALID_JSON, _E.MISSING_FIELDS)


@attrs.frozen(kw_only=True)
class Described:
    """What the document says of one operation."""

    reply: str = ""
    """Name of the reply's schema; empty where the reply is not JSON."""
    other_replies: tuple[str, ...] = ()
    """Content types besides JSON."""
    body: object = None
    """The type that decodes the request body."""
    raw_bodies: tuple[str, ...] = ()
    """Content types of a body that is not decoded as JSON."""
    body_required: bool = True
    parameters: tuple[Schema, ...] = ()
    errors: tuple[ErrorCode, ...] = ()


_PRODUCE_QUERY: Final = (
    query("partition", integer("Where to; without it the key decides, else all partitions in turn", least=0)),
    query("idempotency_key", text("A retry with the same key and body has one effect")),
    query("timeout_ms", integer("How long to wait for durability, then 504", least=0)),
    query("ack", text("", choices=("leader", "majority", "all"))),
    query("timing", text("1: where the time went", choices=("0", "1"))),
    query("receipt", text("1: which copies there are", choices=("0", "1"))),
    header("Idempotency-Key", text("As the query parameter")),
)
_PRODUCE_ERRORS: Final = (
    *_WRITE_ERRORS,
    _E.TOPIC_NOT_FOUND,
    _E.PARTITION_NOT_FOUND,
    _E.IDEMPOTENCY_KEY_REUSED,
    _E.PAYLOAD_TOO_LARGE,
)
_READ_QUERY: Final = (
    query("offset", integer("The first offset; -1 is the log start", least=-1)),
    query("from", text("earliest, latest, tail:N or time:RFC3339; excludes offset")),
    query("limit", integer("Most records", least=1, most=10_000)),
    query("max_bytes", integer("Most bytes of records; at least one record comes", least=1)),
    query("wait_ms", integer("Wait so long for the first record", least=0)),
    query("encoding", text("b64: values and keys in base64")),
    query("consistency", text("", choices=("linearizable", "local"))),
    header("Last-Event-ID", text("Event streams: go on behind this offset")),
)
_READ: Final = Described(
    reply="Page",
    other_replies=("application/x-ndjson", "application/octet-stream", "text/event-stream"),
    parameters=_READ_QUERY,
    errors=(
        _E.TOPIC_NOT_FOUND, _E.PARTITION_NOT_FOUND, _E.NOT_ACCEPTABLE, _E.OFFSET_OUT_OF_RANGE, _E.OFFSET_BEYOND_END, _E.NO_QUORUM,
        _E.STORAGE_DAMAGED,
    ),
)  # fmt: skip
_PAGING: Final = (query("after", text("Names behind this one")), query("limit", integer("", least=1, most=1000)))

DESCRIBED: Final[dict[tuple[str, str], Described]] = {
    ("POST", "/broker/topics/{topic}/produce"): Described(
        reply="Receipt", raw_bodies=("application/octet-stream",), body_required=False, errors=_PRODUCE_ERRORS,
        parameters=(*_PRODUCE_QUERY, query("key", text("The record's key"))),
    ),
    ("POST", "/broker/topics/{topic}/produce-ndjson"): Described(
        reply="BatchReceipt", raw_bodies=("application/x-ndjson", "application/vnd.ayder.records+ndjson"),
        parameters=_PRODUCE_QUERY, errors=(*_PRODUCE_ERRORS, _E.INVALID_JSON),
    ),
    ("GET", "/broker/consume/{topic}/{group}/{partition}"): _READ,
    ("GET", "/broker/topics/{topic}/{partition}/records"): _READ,
    ("POST", "/broker/topics"): Described(
        reply="TopicCreated", body=topics.CreateTopicBody,
        errors=(*_WRITE_ERRORS, *_JSON_ERRORS, _E.TOPIC_EXISTS, _E.NOT_SUPPORTED),
    ),
    ("GET", "/broker/topics"): Described(reply="TopicList", parameters=_PAGING, errors=(_E.NO_QUORUM,)),
    ("GET", "/broker/topics/{topic}"): Described(reply="Topic", errors=(_E.TOPIC_NOT_FOUND, _E.NO_QUORUM)),
    ("DELETE", "/broker/topics/{topic}"): Described(reply="TopicDeleted", errors=(*_WRITE_ERRORS, _E.TOPIC_NOT_FOUND)),
    ("POST", "/broker/retention"): Described(
        reply="RetentionSet", body=topics.RetentionBody,
        errors=(*_WRITE_ERRORS, *_JSON_ERRORS, _E.TOPIC_NOT_FOUND, _E.PARTITION_NOT_FOUND),
    ),
    ("POST", "/broker/delete-before"): Described(
        reply="DeletedBefore", body=topics.DeleteBeforeBody,
        errors=(*_WRITE_ERRORS, *_JSON_ERRORS, _E.TOPIC_NOT_FOUND, _E.PARTITION_NOT_FOUND, _E.OFFSET_BEYOND_END),
    ),
    ("POST", "/broker/commit"): Described(
        reply="Committed", body=groups.CommitBody | list[groups.CommitBody],
        errors=(*_WRITE_ERRORS, *_JSON_ERRORS, _E.TOPIC_NOT_FOUND, _E.PARTITION_NOT_FOUND, _E.OFFSET_BEYOND_END),
    ),
    ("GET", "/broker/groups"): Described(reply="GroupList", parameters=_PAGING, errors=(_E.NO_QUORUM,)),
    ("GET", "/broker/groups/{group}"): Described(reply="Group", errors=(_E.GROUP_NOT_FOUND, _E.NO_QUORUM)),
    ("GET", "/health"): Described(reply="Health"),
    ("GET", "/ready"): Described(reply="Readiness"),
    ("GET", "/metrics"): Described(other_replies=("text/plain",)),
    ("GET", "/metrics_ha"): Described(other_replies=("text/plain",)),
    ("GET", "/admin/sealed/status"): Described(reply="SealedStatus"),
    ("POST", "/admin/sealed/gc"): Described(
        reply="Collected", body=operations.CollectBody, body_required=False, errors=_JSON_ERRORS
    ),
    ("POST", "/admin/sealed/release"): Described(reply="Released"),
    ("POST", "/admin/compact"): Described(reply="Compacted"),
    ("GET", "/ha/membership"): Described(reply="Membership"),
    ("POST", "/ha/membership/{change}"): Described(
        reply="MembershipChanged", body=cluster.MemberBody,
        errors=(
            *_JSON_ERRORS, _E.NOT_SUPPORTED, _E.ROUTE_NOT_FOUND, _E.CHANGE_IN_PROGRESS, _E.NOT_LEADER, _E.NO_QUORUM,
            _E.COMMIT_TIMEOUT,
        ),
    ),
    ("POST", "/ha/transfer"): Described(
        reply="Transferred", body=cluster.TransferBody, body_required=False,
        errors=(*_JSON_ERRORS, _E.NOT_LEADER, _E.NO_QUORUM, _E.COMMIT_TIMEOUT),
    ),
    ("GET", "/openapi.json"): Described(other_replies=("application/json",)),
}  # fmt: skip
"""By method and template. A test holds it against the route table."""


def openapi(_context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /openapi.json``."""
    return Response(200, _document_bytes())


ROUTES = (Route("GET", "/openapi.json", openapi, None, summary="This document"),)


def table() -> tuple[Route, ...]:
    """Every route of a node, in the order of the document."""
    return (*produce.ROUTES, *consume.ROUTES, *topics.ROUTES, *groups.ROUTES, *operations.ROUTES, *cluster.ROUTES, *ROUTES)


@cache
def _document_bytes() -> bytes:
    return msgspec.json.encode(document(table()))


def document(routes: Iterable[Route]) -> Schema:
    """The OpenAPI 3.1 document of these routes. Raises ``KeyError`` for one that is not described."""
    described = [(route, DESCRIBED[route.method, route.template]) for route in routes]
    bodies = [entry.body for _, entry in described if entry.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    body_schemas = iter(schemas)
    paths: dict[str, Schema] = {}
    for route, entry in described:
        body_schema = next(body_schemas) if entry.body is not None else None
        paths.setdefault(_path(route), {})[route.method.lower()] = _operation(route, entry, body_schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ayder", "version": __version__, "description": "A durable event log over HTTP; curl is the client."},
        "paths": paths,
        "components": {
            "schemas": {**components, **REPLIES},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _path(route: Route) -> str:
    return route.template.replace("*}", "}")


def _operation(route: Route, entry: Described, body_schema: Schema | None) -> Schema:
    names = re.findall(r"\{([a-z_]+)\*?\}", route.template)
    path_parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    operation: Schema = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "parameters": [*path_parameters, *entry.parameters],
        "responses": _responses(route, entry),
        "security": [] if route.scope is None else [{"token": []}],
    }
    if route.scope is not None:
        operation["x-ayder-scope"] = route.scope.action
    if body_schema is not None:
        operation["requestBody"] = {"required": entry.body_required, "content": {_JSON: {"schema": body_schema}}}
    elif entry.raw_bodies:
        content: Schema = {kind: {} for kind in entry.raw_bodies}
        operation["requestBody"] = {"required": entry.body_required, "content": content}
    return operation


def _responses(route: Route, entry: Described) -> Schema:
    errors = {*_FRONT_ERRORS, *entry.errors}
    if route.method != "GET" or route.body is Body.PRODUCE:
        errors |= set(_BODY_ERRORS)
    if route.scope is not None:
        errors |= set(_GATE_ERRORS)
    by_status: dict[int, list[str]] = {}
    for code in ErrorCode:
        if code in errors:
            by_status.setdefault(STATUS[code], []).append(code.wire)
    responses: Schema = {}
    if entry.reply or entry.other_replies:
        content: Schema = {kind: {} for kind in entry.other_replies}
        if entry.reply:
            content = {_JSON: {"schema": reference(entry.reply)}, **content}
        responses["200"] = {"description": "It happened as said", "content": content}
    for status, codes in sorted(by_status.items()):
        error = {"schema": reference("Error")}
        if route.template == "/ready" and status == STATUS[_E.OVERLOADED]:
            error = {"schema": {"oneOf": [reference("Readiness"), reference("Error")]}}
        responses[str(status)] = {"description": ", ".join(dict.fromkeys(codes)), "content": {_JSON: error}}
    return responses


def golden() -> str:
    """The document as people read it in ``docs/openapi.json``."""
    return msgspec.json.format(_document_bytes(), indent=1).decode() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(golden(), encoding="utf-8")
