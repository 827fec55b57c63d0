"""The gates every request passes, and how queries, paths and JSON bodies are read."""

from __future__ import annotations

import json
from urllib.parse import parse_qsl, quote_from_bytes, urlencode

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayder.errors import AyderError, ErrorCode
from ayder.http.app import HttpApplication
from ayder.http.exchange import Request, Response, Work
from ayder.http.params import Query, check_depth, decode_json, decode_segment, parse_query
from ayder.http.routes import Match, Route, Router, Scope
from tests.http.in_process import Client, running, scoped_tokens

DEEP = b"[" * 60_000
NINES = b"9" * 5000
BAD_JSON = [
    DEEP, b'{"a":' * 60_000, b"", b"{", b"nul", b"NaN", b'{"topic":NaN}', b'{"topic":"\xff"}', b'{"topic":"\\ud800"}', b"\x00",
    b"[]", b"null", b"1", b'{"topic":1}', b'{"name":"t","partitions":1e400}', b'{"name":"t","partitions":' + NINES + b"}",
    b'{"topic":"t","partition":0,"group":"g","offset":1e400}', b'{"colour":"red"}', b'{"topic":"t"} x',
]  # fmt: skip


# -- gates --------------------------------------------------------------------------------------------------------
async def test_a_wrong_token_learns_nothing_about_what_exists() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 1})
        stranger = Client(client.node, "wrong")
        targets = (
            "/broker/topics/t/produce",
            "/broker/topics/none/produce",
            "/no/such/path",
            "/broker/topics/%zz/x",
            "/broker/commit",
        )
        answers = [await stranger.call("POST", target, b"x") for target in targets if "%" not in target]
        assert {(answer.status, answer.body) for answer in answers} == {(401, answers[0].body)}
        assert answers[0].json()["error"] == "unauthorized"
        assert client.node.broker.topic("t").partitions[0].next_offset == 0


async def test_a_scope_is_judged_before_the_body_and_names_what_is_missing() -> None:
    async with running(scoped_tokens(writer="produce:orders.*")) as client:
        writer = Client(client.node, "writer")
        await writer.call("POST", "/broker/topics/orders.new/produce", b"x", ok=200)
        refused = await writer.call("POST", "/broker/topics/other/produce", b"x", ok=403)
        assert refused.json()["scope"] == "produce:other"
        await writer.call("GET", "/broker/topics/orders.new/0/records", ok=403)
        names = [topic["topic"] for topic in (await client.get("/broker/topics"))["topics"]]
        assert names == ["orders.new"]


async def test_d27_paths_and_methods() -> None:
    """Defect D-27: 500 for a method that is not there, 404 for bad JSON."""
    async with running() as client:
        assert (await client.call("GET", "/no/such", ok=404)).json()["error"] == "not_found"
        wrong = await client.call("PUT", "/broker/topics/t/produce", ok=405)
        assert (wrong.json()["error"], wrong.headers[b"allow"]) == ("method_not_allowed", b"OPTIONS, POST")
        assert (await client.call("POST", "/broker/commit", b"{", ok=400)).json()["error"] == "invalid_json"
        assert (await client.call("OPTIONS", "/broker/commit")).status == 204


@pytest.mark.parametrize("path", ["/broker/commit", "/broker/topics", "/broker/delete-before", "/broker/retention"])
@pytest.mark.parametrize("body", BAD_JSON, ids=lambda body: body[:12].decode("latin-1"))
async def test_d22_no_body_hurts(path: str, body: bytes) -> None:
    """Defect D-22: sixty thousand brackets ended every worker."""
    async with running() as client:
        before = client.node.broker.applied_index
        answer = (await client.call("POST", path, body[:65536], ok=400)).json()
        assert (answer["ok"], answer["outcome"]) == (False, "not_applied")
        assert client.node.broker.applied_index == before


@pytest.mark.parametrize("body", [DEEP, b'"' * 60_000, b"\\" * 60_000, b"\x00" * 60_000, b"{\n" * 5000])
async def test_d22_a_value_may_be_anything(body: bytes) -> None:
    async with running() as client:
        await client.post("/broker/topics/t/produce?partition=0", body)
        await client.post("/broker/topics/t/produce-ndjson?partition=0", body)
        page = await client.get("/broker/topics/t/0/records?limit=10000")
        assert page["messages"][0]["value"].encode() == body


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 2}, 409),
        ("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": -1}, 400),
        ("/broker/delete-before", {"topic": "t", "partition": 9, "before_offset": 0}, 404),
        ("/broker/retention", {"topic": "t", "partition": 9, "ttl_ms": 1}, 404),
        ("/broker/retention", {"topic": "t", "partition": -1, "ttl_ms": 1}, 400),
        ("/broker/retention", {"topic": "t", "ttl_ms": -1}, 400),
        ("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": -1}, 400),
        ("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 1}, 409),
        ("/broker/commit", {"topic": "t", "group": "g", "partition": 9, "offset": 0}, 404),
        ("/broker/commit", {"topic": "t", "group": "g h", "partition": 0, "offset": 0}, 400),
    ],
)
async def test_d34_destructive_input_is_refused(path: str, body: dict[str, object], status: int) -> None:
    """Defect D-34: a floor of 2^64-1 hid all that was ever to come; one odd partition meant all of them."""
    async with running() as client:
        await client.post("/broker/topics/t/produce?partition=0", b"x")
        before = client.node.broker.applied_index
        assert (await client.post(path, body, ok=status))["outcome"] == "not_applied"
        assert client.node.broker.applied_index == before
        assert (await client.get("/broker/topics/t/0/records"))["count"] == 1


async def test_a_bug_in_a_handler_is_an_answer_with_an_id_and_its_outcome_unknown(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> Response:
        raise KeyError("secret")

    async def later() -> Response:
        raise KeyError("secret")

    async with running() as client:
        application = client.node.application
        routes = (Route("GET", "/now", broken, None), Route("GET", "/later", lambda *_: Work(later), None))
        client.node.application = HttpApplication(application._context, routes)
        for target in ("/now", "/later"):
            reply = await client.call("GET", target, ok=500)
            answer = reply.json()
            assert (answer["error"], answer["outcome"]) == ("internal", "unknown")
            assert b"secret" not in reply.body
            assert answer["error_id"] in [getattr(record, "error_id", None) for record in caplog.records]


async def test_what_a_front_refuses_has_the_one_format() -> None:
    async with running() as client:
        for code in ErrorCode:
            answer = msgspec.json.decode(client.node.application.refuse(code.name, "m").body)
            assert (answer["ok"], answer["error"], answer["message"], answer["outcome"]) == (
                False,
                code.wire,
                "m",
                code.outcome.value,
            )


# -- queries ------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=5), st.text(max_size=5)), max_size=5))
def test_a_query_is_read_as_browsers_write_it(pairs: list[tuple[str, str]]) -> None:
    raw = urlencode(pairs).encode()
    expected: dict[bytes, bytes] = {}
    for name, value in parse_qsl(raw.decode(), keep_blank_values=True):
        expected.setdefault(name.encode(), value.encode())
    assert dict(parse_query(raw)) == expected
    assert dict(parse_query(raw)) == expected, "and the second time, when it is remembered"


@given(st.binary(max_size=20))
def test_a_segment_is_decoded_once(data: bytes) -> None:
    assert decode_segment(quote_from_bytes(data, safe="").encode()) == data
    assert decode_segment(quote_from_bytes(quote_from_bytes(data, safe="").encode(), safe="").encode()) == quote_from_bytes(
        data, safe=""
    ).encode()  # fmt: skip


@pytest.mark.parametrize("raw", [b"%", b"%1", b"%zz", b"a%2", b"%%41"])
def test_a_broken_escape_is_refused(raw: bytes) -> None:
    for read in (lambda: parse_query(b"a=" + raw), lambda: parse_query(raw + b"=1"), lambda: decode_segment(raw)):
        with pytest.raises(AyderError):
            read()


@given(st.integers(-(1 << 70), 1 << 70))
def test_integers_are_exact_and_bounded(number: int) -> None:
    query = Query(b"n=%d" % number)
    if 0 <= number < 1 << 63:
        assert query.integer("n") == number
    else:
        with pytest.raises(AyderError) as caught:
            query.integer("n")
        assert caught.value.facts["parameter"] == "n"


@pytest.mark.parametrize("text", ["+1", " 1", "1 ", "1_0", "0x1", "1.0", "1e1", "٣", "NaN", "--1", "-"])
def test_what_is_no_integer(text: str) -> None:
    with pytest.raises(AyderError):
        Query(urlencode({"n": text}).encode()).integer("n", least=-5)


def test_what_is_remembered_of_queries_is_bounded() -> None:
    from ayder.http import params

    for n in range(5000):
        parse_query(b"n=%d" % n)
        parse_query(b"n=" + b"9" * 4000 + b"%d" % n)
    assert len(params._parsed) <= params._CACHE_ENTRIES
    assert sum(map(len, params._parsed)) <= params._CACHE_ENTRIES * params._CACHED_BYTES


# -- JSON ---------------------------------------------------------------------------------------------------------
nested = st.recursive(
    st.none() | st.text(alphabet='[]{}"\\a', max_size=6) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='[{"\\', max_size=3), inner, max_size=4),
    max_leaves=60,
)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@settings(max_examples=100, deadline=None)
@given(nested, st.integers(0, 40))
def test_only_brackets_outside_strings_nest(value: object, wrappers: int) -> None:
    for n in range(wrappers):
        value = [value] if n % 2 else {"a": value, "b": "]]}"}
    body = json.dumps(value).encode()
    if depth_of(value) <= 32:
        check_depth(body)
    else:
        with pytest.raises(AyderError) as caught:
            check_depth(body)
        assert caught.value.code is ErrorCode.INVALID_JSON


@given(st.binary(max_size=40))
def test_any_bytes_are_a_value_or_a_refusal(body: bytes) -> None:
    try:
        decode_json(msgspec.json.decode, body)
    except AyderError as error:
        assert error.code is ErrorCode.INVALID_JSON


# -- routes -------------------------------------------------------------------------------------------------------
def route(method: str, template: str) -> Route:
    return Route(method, template, lambda *_: Response(200), Scope("x"))


def test_the_router() -> None:
    routes = [
        route("GET", "/a/{x}"),
        route("POST", "/a/{x}"),
        route("GET", "/a/lit"),
        route("GET", "/a/{x}/b/{y}"),
        route("GET", "/kv/{ns}/{key*}"),
    ]
    router = Router(routes)

    def matched(method: str, path: bytes) -> tuple[str, tuple[bytes, ...]]:
        found = router.match(method, path)
        assert isinstance(found, Match), found
        return found.route.template, found.parameters

    assert matched("GET", b"/a/lit") == ("/a/lit", ())
    assert matched("GET", b"/a/l%69t") == ("/a/lit", ())
    assert matched("HEAD", b"//a///x/") == ("/a/{x}", (b"x",))
    assert matched("GET", b"/a/x%2Fy/b/%00") == ("/a/{x}/b/{y}", (b"x/y", b"\0"))
    assert matched("GET", b"/kv/n/a/b%2Fc") == ("/kv/{ns}/{key*}", (b"n", b"a/b/c"))
    assert router.match("PUT", b"/a/x") == ("GET", "HEAD", "OPTIONS", "POST")
    assert router.match("GET", b"/b") == ()
    assert router.match("GET", b"/a") == ()
    with pytest.raises(AyderError):
        router.match("GET", b"/a/%")


def test_the_application_never_raises() -> None:
    """A front relies on it: whatever the head, there is an answer."""

    async def main() -> None:
        async with running() as client:
            for path in (
                b"",
                b"/",
                b"%",
                b"/%",
                b"\xff",
                b"/broker/topics/\xff/produce",
                b"*",
                b"/" * 3000,
                b"/broker/topics/%ff/%ff/records",
            ):
                for headers in (
                    {},
                    {b"authorization": b""},
                    {b"authorization": b"Bearer"},
                    {b"authorization": b"Bearer \xff"},
                    {b"authorization": b"Bearer dev"},
                ):
                    request = Request("POST", path, b"%", dict(headers))
                    opened = client.node.application.open(request)
                    assert isinstance(opened, int) or 400 <= opened.status < 500

    import trio

    trio.run(main)
