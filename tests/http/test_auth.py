"""Tokens and scopes: who is accepted, what a scope covers, what a stranger learns."""

import pytest

from ayder.config import load_config, token_hash
from ayder.config_sections import AuthConfig, TokenConfig
from ayder.errors import AyderError, ErrorCode
from ayder.http.auth import Authenticator, Principal
from tests.http.in_process import Client, running, scoped_tokens


def authenticator(*tokens: str, **settings: object) -> Authenticator:
    return Authenticator(
        AuthConfig(tokens=tuple(TokenConfig(name=f"name-{t}", sha256=token_hash(t)) for t in tokens), **settings)
    )


@pytest.mark.parametrize("header", [b"Bearer two", b"bearer two", b"BEARER two", b"Bearertwo", b"Bearer  two ", b"bEaReR\ttwo"])
def test_the_scheme_is_read_in_any_case_and_the_space_is_optional(header: bytes) -> None:
    assert authenticator("one", "two").authenticate(header).name == "name-two"


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer ", b"Basic two", b"Bearer tw", b"Bearer twoo", b"Bearer TWO", b"two", b"\xff\x00"]
)
def test_everything_else_is_refused_in_the_same_words(header: bytes | None) -> None:
    with pytest.raises(AyderError) as caught:
        authenticator("one", "two").authenticate(header)
    assert (caught.value.code, caught.value.message, caught.value.facts) == (
        ErrorCode.UNAUTHORIZED, "a valid bearer token is needed", {},
    )  # fmt: skip


def test_without_tokens_nobody_is_accepted() -> None:
    for header in (None, b"", b"Bearer ", b"Bearer dev"):
        with pytest.raises(AyderError):
            authenticator().authenticate(header)


def test_the_last_header_accepted_does_not_let_another_one_in() -> None:
    both = authenticator("one", "two")
    for _ in range(2):
        assert both.authenticate(b"Bearer one").name == "name-one"
        assert both.authenticate(b"Bearer two").name == "name-two"
        with pytest.raises(AyderError):
            both.authenticate(b"Bearer tw")


def test_old_tokens_have_full_rights_and_their_limits() -> None:
    config = load_config({}, {"RF_BEARER_TOKENS": "dev@55555555555555:7:9,plain"}, None)
    one = Authenticator(config.auth).authenticate(b"Bearer dev")
    assert one.everything and one.allows("admin") and one.allows("kv", "any")
    assert (one.requests_per_second, one.burst, one.daily) == (55555555555555, 7, 9)
    assert Authenticator(config.auth).authenticate(b"Bearer plain").everything


@pytest.mark.parametrize(
    ("scopes", "action", "resource", "allowed"),
    [
        ("*", "admin", None, True),
        ("*", "produce", "any", True),
        ("produce:orders.*", "produce", "orders.eu", True),
        ("produce:orders.*", "produce", "orders.", True),
        ("produce:orders.*", "produce", "orders", False),
        ("produce:orders.*", "produce", "ordersXeu", False),
        ("produce:orders.*", "produce", "my.orders.eu", False),
        ("produce:orders.*", "consume", "orders.eu", False),
        ("produce:orders.*", "produce", None, True),
        ("produce:orders.*", "consume", None, False),
        ("produce:*-log", "produce", "a-log", True),
        ("produce:*-log", "produce", "a-log2", False),
        ("consume", "consume", "anything", True),
        ("consume:a,consume:b", "consume", "b", True),
        ("consume:a,consume:b", "consume", "c", False),
        ("metrics", "admin", None, False),
        ("admin", "admin", None, True),
        ("admin", "produce", "t", False),
        ("consume:a", "describe", "a", True),
        ("produce:a", "describe", "a", True),
        ("produce:a", "describe", "b", False),
        ("admin", "describe", "b", True),
        ("kv:app", "describe", "app", False),
        ("kv:app", "kv", "app", True),
    ],
)
def test_what_a_scope_covers(scopes: str, action: str, resource: str | None, allowed: bool) -> None:
    principal = Principal("p", tuple(scopes.split(",")))
    assert [principal.allows(action, resource) for _ in range(2)] == [allowed, allowed]


def test_a_missing_scope_is_named_as_it_would_be_configured() -> None:
    for action, resource, scope in (("produce", "t", "produce:t"), ("admin", None, "admin"), ("describe", "t", "consume:t")):
        with pytest.raises(AyderError) as caught:
            Principal("p", ("kv",)).require(action, resource)
        assert caught.value.code is ErrorCode.FORBIDDEN and caught.value.facts == {"scope": scope}


def test_answers_about_scopes_are_not_kept_without_bound() -> None:
    principal = Principal("p", ("produce:a*",))
    for number in range(20_000):
        assert principal.allows("produce", f"a{number}")
    assert not principal.allows("produce", "b")


async def test_a_wrong_token_learns_nothing_about_what_exists() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "secret"})
        stranger = Client(client.node, "wrong")
        targets = ["/broker/topics/secret", "/broker/topics/none", "/no/such/route", "/broker/groups", "/admin/sealed/status"]
        for target in targets:
            for token in (stranger, Client(client.node, "")):
                reply = await token.call("GET", target)
                assert (reply.status, reply.json()["error"]) == (401, "unauthorized"), target
                assert b"secret" not in reply.body
                assert reply.headers[b"www-authenticate"].startswith(b"Bearer ")


async def test_public_paths_need_no_token_with_or_without_a_query() -> None:
    async with running() as client:
        nobody = Client(client.node, "")
        for path in ("/health", "/ready", "/metrics", "/metrics_ha", "/openapi.json"):
            assert (await nobody.call("GET", path)).status == 200
            assert (await nobody.call("GET", path + "?x=1")).status == 200


async def test_open_prefixes_need_no_token() -> None:
    async with running(auth__skip_prefixes="/broker/topics/open") as client:
        nobody = Client(client.node, "")
        assert (await nobody.call("POST", "/broker/topics/open-a/produce", b"x")).status == 200
        assert (await nobody.call("POST", "/broker/topics/shut/produce", b"x")).status == 401


async def test_scopes_close_routes_and_hide_the_topics_of_others() -> None:
    async with running(scoped_tokens(reader="consume:a", writer="produce:a", boss="admin")) as client:
        await client.produce("a", b"1")
        await client.produce("b", b"1")
        reader, writer, boss = (Client(client.node, name) for name in ("reader", "writer", "boss"))
        assert (await writer.call("POST", "/broker/topics/a/produce", b"x")).status == 200
        assert (await writer.call("POST", "/broker/topics/b/produce", b"x")).status == 403
        assert (await reader.call("GET", "/broker/topics/a/0/records")).status == 200
        assert (await reader.call("GET", "/broker/topics/b/0/records")).json()["scope"] == "consume:b"
        assert [topic["topic"] for topic in (await reader.get("/broker/topics"))["topics"]] == ["a"]
        assert [topic["topic"] for topic in (await boss.get("/broker/topics"))["topics"]] == ["a", "b"]
        assert (await reader.call("DELETE", "/broker/topics/a")).status == 403
        assert (await boss.call("DELETE", "/broker/topics/a")).status == 200


async def test_a_commit_needs_the_right_to_read_the_topic_its_body_names() -> None:
    async with running(scoped_tokens(reader="consume:a")) as client:
        await client.produce("a", b"1")
        await client.produce("b", b"1")
        reader = Client(client.node, "reader")
        commits = [{"topic": name, "group": "g", "partition": 0, "offset": 0} for name in ("a", "b")]
        assert (await reader.call("POST", "/broker/commit", commits[0])).status == 200
        assert (await reader.call("POST", "/broker/commit", commits[1])).status == 403
        assert (await reader.call("POST", "/broker/commit", commits)).status == 403
        await client.post("/broker/commit", commits[1])
        seen = await reader.get("/broker/groups/g")
        assert [part["topic"] for part in seen["partitions"]] == ["a"]
