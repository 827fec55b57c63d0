"""The OpenAPI document: whole, true to the route table, equal to its golden copy."""

import pathlib
import re
from typing import Any

import msgspec

from ayder.http.errors import STATUS
from ayder.http.openapi import DESCRIBED, document, golden, table
from ayder.node import ROUTES
from tests.http.in_process import Client, running

GOLDEN = pathlib.Path(__file__).parents[2] / "docs" / "openapi.json"


def operations(doc: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method.upper(), path): operation for path, methods in doc["paths"].items() for method, operation in methods.items()}


def test_every_route_of_the_node_is_described_and_nothing_else() -> None:
    served = {(route.method, route.template) for route in ROUTES}
    assert {(route.method, route.template) for route in table()} == served == set(DESCRIBED)


def test_the_golden_copy_is_current() -> None:
    """`python -m ayder.http.openapi docs/openapi.json` writes it."""
    assert GOLDEN.read_text(encoding="utf-8") == golden()


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    text = golden()
    used = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert used == set(msgspec.json.decode(text)["components"]["schemas"])


def test_every_operation_has_its_statuses_and_its_own_name() -> None:
    found = operations(document(table()))
    names = [operation["operationId"] for operation in found.values()]
    assert len(names) == len(set(names))
    for route in table():
        operation = found[route.method, route.template]
        statuses = {int(status) for status in operation["responses"]}
        assert statuses <= {200, *STATUS.values()} and {400, 500, 503} <= statuses
        assert ({401, 403, 429} <= statuses) == (route.scope is not None) == bool(operation["security"])
        named = set(re.findall(r"\{(\w+)\}", route.template))
        assert named == {each["name"] for each in operation["parameters"] if each["in"] == "path"}


async def test_the_node_serves_the_document_to_anyone() -> None:
    async with running() as client:
        reply = await Client(client.node, "").call("GET", "/openapi.json", ok=200)
        assert reply.json() == msgspec.json.decode(golden())


def matches(schema: dict[str, Any], value: Any, components: dict[str, Any]) -> bool:
    """Enough of JSON Schema for the replies: type, properties, required, items, const, enum, references."""
    if "$ref" in schema:
        return matches(components[schema["$ref"].rpartition("/")[2]], value, components)
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    if "type" in schema:
        wanted = [kinds[name] for name in ([schema["type"]] if isinstance(schema["type"], str) else schema["type"])]
        if type(value) not in wanted:
            return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(schema["required"]) <= value.keys() <= known.keys() and all(
            matches(known[name], each, components) for name, each in value.items()
        )
    return not isinstance(value, list) or all(matches(schema["items"], each, components) for each in value)


async def test_replies_are_as_described() -> None:
    """Fields that come back and are not in the document, or are missing, fail here."""
    doc = document(table())
    found, components = operations(doc), doc["components"]["schemas"]
    calls: list[tuple[str, str, str, Any]] = [
        ("POST", "/broker/topics", "/broker/topics", {"name": "t", "partitions": 1}),
        ("POST", "/broker/topics/{topic}/produce", "/broker/topics/t/produce?timing=1&receipt=1", b"1"),
        ("POST", "/broker/topics/{topic}/produce-ndjson", "/broker/topics/t/produce-ndjson", b"2\n3"),
        ("GET", "/broker/consume/{topic}/{group}/{partition}", "/broker/consume/t/g/0", b""),
        ("GET", "/broker/topics/{topic}/{partition}/records", "/broker/topics/t/0/records?encoding=b64&consistency=local", b""),
        ("GET", "/broker/topics", "/broker/topics", b""),
        ("GET", "/broker/topics/{topic}", "/broker/topics/t", b""),
        ("POST", "/broker/retention", "/broker/retention", {"topic": "t", "ttl_ms": 0}),
        ("POST", "/broker/delete-before", "/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 1}),
        ("POST", "/broker/commit", "/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 1}),
        ("POST", "/broker/commit", "/broker/commit", [{"topic": "t", "group": "g", "partition": 0, "offset": 1}]),
        ("GET", "/broker/groups", "/broker/groups", b""),
        ("GET", "/broker/groups/{group}", "/broker/groups/g", b""),
        ("GET", "/health", "/health", b""),
        ("GET", "/ready", "/ready", b""),
        ("GET", "/admin/sealed/status", "/admin/sealed/status", b""),
        ("POST", "/admin/sealed/gc", "/admin/sealed/gc", b""),
        ("POST", "/admin/sealed/release", "/admin/sealed/release", b""),
        ("POST", "/admin/compact", "/admin/compact", b""),
        ("GET", "/ha/membership", "/ha/membership", b""),
        ("POST", "/ha/transfer", "/ha/transfer", {"node_id": "node-1"}),
        ("DELETE", "/broker/topics/{topic}", "/broker/topics/t", b""),
    ]
    async with running() as client:
        for method, template, target, body in calls:
            reply = await client.call(method, target, body, ok=200)
            schema = found[method, template]["responses"]["200"]["content"]["application/json"]["schema"]
            assert matches(schema, reply.json(), components), (method, target, reply.body)
    described = {(method, template) for method, template, _, _ in calls}
    with_json = {
        key
        for key, each in found.items()
        if "schema" in each["responses"].get("200", {}).get("content", {}).get("application/json", {})
    }
    assert with_json - described == {("POST", "/ha/membership/{change}")}, "which a node alone refuses: see test_cluster.py"
