"""docs/http-api.md is complete: every route, error code, metric and parameter of the code is on the page, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ayder.config import settings
from ayder.errors import ErrorCode
from ayder.http.errors import STATUS
from ayder.http.routes import Route
from ayder.metrics import COUNTERS, GAUGES
from ayder.node import ROUTES
from tests.docs.pages import examples, text_of
from tests.http.in_process import Client, running

PAGE = text_of("http-api.md")


def test_the_headings_are_the_routes() -> None:
    headings = re.findall(r"^### `([A-Z]+) (/\S*)`$", PAGE, re.MULTILINE)
    assert sorted(headings) == sorted((route.method, route.template) for route in ROUTES)


def test_the_table_of_errors_is_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \| (\w+) \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted((str(STATUS[code]), code.wire, code.outcome.value) for code in ErrorCode)


async def test_every_parameter_and_field_of_the_contract_is_described() -> None:
    """What OpenAPI lists of queries and request bodies stands in the section of its call."""
    async with running() as client:
        document = await client.get("/openapi.json")
    missing = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            described = section(method.upper(), path) + shared_section(path)
            names = [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]
            names += fields_of(document, operation)
            missing += [f"{method} {path}: {name}" for name in names if name not in re.findall(r"\w+", described)]
    assert missing == []


def fields_of(document: Any, operation: Any) -> list[str]:
    """The fields of a JSON request body, those of objects within it too."""
    found: list[str] = []

    def walk(schema: Any) -> None:
        if "$ref" in schema:
            walk(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        for name, part in schema.get("properties", {}).items():
            found.append(name)
            walk(part)
        for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *([schema["items"]] if "items" in schema else ())):
            walk(part)

    for content in operation.get("requestBody", {}).get("content", {}).values():
        walk(content.get("schema", {}))
    return found


def section(method: str, template: str) -> str:
    return PAGE.partition(f"### `{method} {template}`\n")[2].partition("\n### ")[0]


def shared_section(path: str) -> str:
    """The section that another one refers to for its parameters."""
    match path:
        case "/broker/consume/{topic}/{group}/{partition}":
            return section("GET", "/broker/topics/{topic}/{partition}/records")
        case "/broker/topics/{topic}/produce-ndjson":
            return section("POST", "/broker/topics/{topic}/produce")
        case "/broker/groups":
            return section("GET", "/broker/topics")
    return ""


async def test_every_metric_is_described_and_every_described_one_exists() -> None:
    async with running() as client:
        await client.produce("orders", b"one")
        text = (await client.call("GET", "/metrics", ok=200)).body.decode()
    exported = {name for name in re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE) if not name.startswith("process_")}
    known = exported | GAUGES.keys() | {f"{name}_total" for name in COUNTERS}
    described = set(re.findall(r"\b((?:ayder|ramforge)_[a-z_]*[a-z])(?=[`{])", PAGE))
    assert described == known


async def test_the_decoder_reads_every_kind_of_page(tmp_path: Path) -> None:
    (block,) = [example for example in examples(PAGE) if example.language == "python"]
    async with running() as client:
        await client.produce("t", b"zero", b"one", b"two two", b"three")  # stored with the line feeds between
        await client.post("/broker/topics/t/produce?partition=0&key=k%00", b"four\nlines")
        typed = (
            b'{"value":"five","key":"aa","headers":{"a":"b"}}\n{"value":"six","key":"k","timestamp_ms":7,"headers":{"c":"d"}}\n'
        )
        typed += b'{"value":"seven","key":"zz"}'
        content_type = {b"content-type": b"application/vnd.ayder.records+ndjson"}
        await client.call("POST", "/broker/topics/t/produce-ndjson?partition=0", typed, headers=content_type, ok=200)
        for offset in range(7):
            expected, page = await _both_formats(client, f"/broker/topics/t/0/records?offset={offset}&limit=3")
            (tmp_path / "page.bin").write_bytes(page)
            printed = subprocess.run([sys.executable, "-c", block.code], cwd=tmp_path, capture_output=True, text=True, check=True)
            assert printed.stdout.splitlines() == expected


async def _both_formats(client: Client, target: str) -> tuple[list[str], bytes]:
    """What the decoder has to print, from JSON; and the binary page."""
    messages = (await client.get(f"{target}&encoding=b64"))["messages"]
    binary = await client.call("GET", target, headers={b"accept": b"application/octet-stream"}, ok=200)

    def plain(text: str) -> bytes:
        return msgspec.json.decode(f'"{text}"', type=bytes)

    lines = [f"{one['offset']} {plain(one.get('key_b64', ''))!r} {plain(one['value_b64'])!r}" for one in messages]
    return lines, binary.body


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.template}")
def test_each_call_says_who_may_make_it(route: Route) -> None:
    said = {
        "admin": "Scope `admin`",
        "produce": "Scope `produce:{topic}`",
        "consume": "Scope `consume:{topic}`",
        "describe": "may see",
    }
    assert (said[route.scope.action] if route.scope else "Public") in section(route.method, route.template)


DEFAULTS = [
    ("http.max_request_line_bytes", "a request line of 4 KiB"),
    ("http.max_head_bytes", "a head of 16 KiB"),
    ("http.max_headers", "with 64 headers"),
    ("http.head_timeout_ms", "5 s for a whole head"),
    ("http.body_min_bytes_per_second", "at least 1 KiB/s"),
    ("http.body_grace_ms", "after 5 s and"),
    ("http.body_timeout_ms", "and 60 s in all for a body"),
    ("http.idle_timeout_ms", "30 s of silence"),
    ("http.write_stall_timeout_ms", "10 s without taking a byte"),
    ("http.max_pipelined_requests", "16 requests waiting"),
    ("http.max_long_poll_ms", "more than 60000"),
    ("http.max_stream_subscribers", "At most 2000 streams"),
    ("http.max_produce_body_bytes", "take up to 8 MiB"),
    ("http.max_control_body_bytes", "every other call 64 KiB"),
    ("http.default_produce_timeout_ms", "default 5000"),
    ("topics.default_partitions", "default 8 for a new topic"),
    ("topics.idempotency_window_entries", "newest 16,384 keys"),
    ("topics.idempotency_window_ms", "at most 7 days of log time"),
    ("topics.max_batch_records", "At most 10,000 records"),
    ("topics.max_headers_per_record", "at most 64 [`topics.max_headers_per_record`]"),
    ("topics.max_idempotency_key_bytes", "≤ 512 bytes"),
    ("topics.max_key_bytes", "≤ 4 KiB"),
    ("topics.retention_check_ms", "every 100 ms"),
]
UNITS = {"KiB": 1024, "MiB": 1024**2, "s": 1000, "days": 24 * 3600 * 1000}


@pytest.mark.parametrize(("setting", "phrase"), DEFAULTS)
def test_limits_on_the_page_are_the_defaults(setting: str, phrase: str) -> None:
    number, unit = re.findall(r"([\d,]+) ?([A-Za-z]*)", phrase)[0]
    defaults = {f"{section}.{attribute.name}": attribute.default for section, attribute in settings()}
    assert int(number.replace(",", "")) * UNITS.get(unit, 1) == defaults[setting]
    assert phrase in " ".join(PAGE.split())
