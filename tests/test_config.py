"""Settings: precedence, limits, every mistake at once, the predecessor's names, and the page that documents them."""

import json
import pathlib
import tomllib

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayder import config_report
from ayder.config import (
    DEV_TOKEN,
    Config,
    ConfigError,
    HttpConfig,
    RaftConfig,
    is_loopback,
    load_config,
    settings,
    token_hash,
)
from ayder.legacy_environment import parse_tokens

ROOT = pathlib.Path(__file__).parent.parent
A_HASH = token_hash("a")


def mistakes(flags: dict[str, str] | None = None, environ: dict[str, str] | None = None, toml: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(flags or {}, environ or {}, toml)
    return list(caught.value.mistakes)


# ---- sources and precedence ----


def test_defaults_are_a_valid_configuration() -> None:
    config = load_config({}, {}, None)
    assert (config.http.host, config.http.port, config.storage.log) == ("127.0.0.1", 1109, "aof")
    assert set(config.origins.values()) == {"default"}
    assert attrs.evolve(config, auth=Config().auth) == Config()


def test_later_sources_win_and_each_setting_knows_its_source() -> None:
    toml = '[http]\nport = 1\nhost = "::1"\nmax_headers = 10\nmax_connections = 5\n'
    environ = {"PORT": "2", "AYDER_HTTP__MAX_HEADERS": "11", "BP_MAX_ACTIVE_CONNS": "6", "AYDER_HTTP__MAX_CONNECTIONS": "7"}
    config = load_config({"http.max_headers": "12"}, environ, toml)
    assert (config.http.host, config.http.port) == ("::1", 2)
    assert (config.http.max_headers, config.http.max_connections) == (12, 7)
    assert config.origins["http.host"] == "file"
    assert config.origins["http.port"] == "environment PORT"
    assert config.origins["http.max_connections"] == "environment AYDER_HTTP__MAX_CONNECTIONS"
    assert config.origins["http.max_headers"] == "flag"
    assert config.origins["http.tls_key"] == "default"


@pytest.mark.parametrize(("section", "attribute"), list(settings()), ids=lambda value: getattr(value, "name", value))
def test_every_setting_can_be_given_in_every_source(section: str, attribute: "attrs.Attribute[object]") -> None:
    path = f"{section}.{attribute.name}"
    text = config_report._as_toml(attribute.default)
    plain = attribute.default if isinstance(attribute.default, str) else text
    variable = f"AYDER_{section}__{attribute.name}".upper()
    from_file = load_config({}, {}, f"[{section}]\n{attribute.name} = {text}")
    from_environment = load_config({}, {variable: plain}, None)
    from_flag = load_config({path: plain}, {}, None)
    assert [c.origins[path] for c in (from_file, from_environment, from_flag)] == ["file", f"environment {variable}", "flag"]
    assert from_file == from_environment == from_flag == load_config({}, {}, None)


def test_lists_and_tables_in_text() -> None:
    tokens = f'[{{name = "x", sha256 = "{A_HASH}", scopes = ["consume:*"], daily = 7}}]'
    config = load_config({"auth.tokens": tokens}, {"AYDER_AUTH__SKIP_PREFIXES": "/a, /b"}, None)
    assert config.auth.skip_prefixes == ("/a", "/b")
    (token,) = config.auth.tokens
    assert (token.name, token.scopes, token.daily, token.burst) == ("x", ("consume:*",), 7, None)
    assert A_HASH not in repr(config)


# ---- mistakes ----


def test_every_mistake_is_reported_at_once_with_path_and_source() -> None:
    found = mistakes(
        {"http.port": "65536", "http.prot": "1", "storage.gc_live_ratio": "nan"},
        {"AYDER_RAFT__TICK_MS": "soon", "AYDER_HTTP__HOTS": "x"},
        'zoo = 1\nstorage = 5\n[http]\nhost = 7\nfoo = 1\n[[auth.tokens]]\nsha256 = "12"\nscopes = ["cook"]\n',
    )
    for expected in (
        "http.port: must be at most 65535, got 65536 (from flag)",
        "flag --set http.prot: no such setting; did you mean http.port?",
        "storage.gc_live_ratio: expected a number, got 'nan' (from flag)",
        "raft.tick_ms: expected a whole number, got 'soon' (from environment AYDER_RAFT__TICK_MS)",
        "environment AYDER_HTTP__HOTS: no such setting; did you mean AYDER_HTTP__HOST?",
        "no such setting: zoo",
        "storage: expected a table, got 5",
        "http.host: expected a string, got 7 (from file)",
        "http: no such setting: foo",
        "auth.tokens[0].name: is missing (from file)",
        "auth.tokens[0].sha256: must be the 64 lower-case hex digits of the token's SHA-256 (from file)",
    ):
        assert expected in found
    assert len(found) == 12
    assert any(line.startswith("auth.tokens[0].scopes: not a scope") for line in found)


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[raft]\nelection_timeout_ms = 499", "raft: election_timeout_ms (499) must be at least 5 times"),
        ('[http]\ntls_key = "k.pem"', "http: tls_certificate and tls_key go together"),
        ("[http]\nmax_request_line_bytes = 20000", "http: max_request_line_bytes must not exceed max_head_bytes"),
        ("[http]\nmax_bodies_in_flight_bytes = 1048576", "http: max_bodies_in_flight_bytes must hold"),
        ("[raft]\nmax_queued_bytes = 1048576", "raft.max_queued_bytes must hold one body"),
        ("[topics]\nmax_partitions = 4", "topics: default_partitions must not exceed max_partitions"),
        ('[topics]\ndefault_storage = "rocket"', "topics.default_storage: 'rocket'"),
        ("[http]\nport = true", "http.port: expected a whole number, got True"),
        ("[http]\nport = 1.5", "http.port: expected a whole number, got 1.5"),
        ("[storage]\ngc_live_ratio = inf", "storage.gc_live_ratio: must be a finite number"),
        ("[topics]\nauto_create = 1", "topics.auto_create: expected true or false, got 1"),
        ('[auth]\nskip_prefixes = "/a"', "auth.skip_prefixes: expected a list of strings"),
        ("[auth]\ntokens = 3", "auth.tokens: expected an array of tables"),
        ("[auth]\ntokens = [3]", "auth.tokens[0]: expected a table"),
        ('[http]\ncors_origins = ["example.com"]', "http.cors_origins: not an origin"),
        ('[logging]\nlevel = "loud"', "logging.level: must be one of debug, info, warning, error, critical; got 'loud'"),
        ('origins = {"http.port" = "x"}', "no such setting: origins"),
        ("[http", "configuration file: not valid TOML"),
    ],
)
def test_a_wrong_value_is_refused_in_words(toml: str, expected: str) -> None:
    (found,) = mistakes(toml=toml)
    assert found.startswith(expected)


def test_two_tokens_must_differ() -> None:
    entry = f'{{name = "%s", sha256 = "{A_HASH}"}}'
    (found,) = mistakes(toml=f"[auth]\ntokens = [{entry % 'x'}, {entry % 'y'}]")
    assert "two entries are one token" in found


@pytest.mark.parametrize("name", ["AYDER_FOO", "AYDER_HTTP_PORT", "ayder_http__port".upper().replace("PORT", "port"), "AYDER___"])
def test_an_unknown_variable_of_ours_is_a_mistake(name: str) -> None:
    (found,) = mistakes(environ={name: "1"})
    assert found.startswith(f"environment {name}: no such setting")


def test_variables_that_kubernetes_sets_for_a_service_of_our_name_are_not_ours() -> None:
    links = {"AYDER_PORT": "tcp://10.0.0.1:1109", "AYDER_SERVICE_HOST": "10.0.0.1", "AYDER_SERVICE_PORT_HTTP": "1109"}
    links["AYDER_PORT_1109_TCP_ADDR"] = "10.0.0.1"
    assert load_config({}, links, None) == load_config({}, {}, None)


@given(st.dictionaries(st.sampled_from([f"{s}.{a.name}" for s, a in settings()]), st.text(max_size=30), max_size=4))
def test_no_text_breaks_the_loader(flags: dict[str, str]) -> None:
    try:
        config = load_config(flags, {}, None)
    except ConfigError as exc:
        assert exc.mistakes
        assert all(line for line in exc.mistakes)
    else:
        assert {config.origins[path] for path in flags} <= {"flag"}


def test_limits_hold_without_the_loader_too() -> None:
    with pytest.raises(ValueError, match="at most 65535"):
        HttpConfig(port=70_000)
    with pytest.raises(ValueError, match="at least 5 times"):
        RaftConfig(heartbeat_interval_ms=500)


# ---- tokens of a node without tokens ----


def token_names(config: Config) -> list[str]:
    return [token.name for token in config.auth.tokens]


def test_only_a_node_on_loopback_accepts_the_well_known_token() -> None:
    (token,) = load_config({}, {}, None).auth.tokens
    assert (token.sha256, token.scopes) == (token_hash(DEV_TOKEN), ("*",))
    assert token_names(load_config({"http.host": "0.0.0.0"}, {}, None)) == []
    assert token_names(load_config({}, {}, None, bind_known=False)) == []
    assert token_names(load_config({}, {"RF_BEARER_TOKENS": "secret"}, None)) == ["legacy-1"]


def test_insecure_dev_accepts_it_anywhere_and_says_so() -> None:
    config = load_config({"http.host": "0.0.0.0", "auth.insecure_dev": "true"}, {}, None)
    assert token_names(config) == ["dev"]
    assert "insecure_dev" in config.warnings[0]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_what_counts_as_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# ---- a cluster ----


def member(id: str, raft_port: int, **more: object) -> dict[str, object]:
    return {"id": id, "host": "127.0.0.1", "raft_port": raft_port, **more}


THREE = [member("a", 7000), member("b", 7002, http_url="http://127.0.0.1:9000"), member("c", 7004, priority=11)]
FILES = {"cluster.tls_ca": "ca", "cluster.tls_certificate": "c", "cluster.tls_key": "k"}


def of_cluster(nodes: list[dict[str, object]], **flags: str) -> dict[str, str]:
    return {"cluster.nodes": json.dumps(nodes), "raft.node_id": "a"} | {
        name.replace("__", "."): text for name, text in flags.items()
    }


def test_a_node_alone_is_no_cluster_and_members_wait_for_a_majority() -> None:
    cluster = load_config({}, {}, None).cluster
    assert (cluster.nodes, cluster.write_mode, cluster.redirect_status, cluster.forward) == ((), "sync-majority", 307, False)


def test_the_nodes_can_be_written_as_tables_as_toml_and_as_json() -> None:
    toml = "".join(
        "[[cluster.nodes]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in node.items()) for node in THREE
    )
    from_file = load_config({"raft.node_id": "a"}, {}, toml)
    inline = ", ".join(config_report._as_toml(node) for node in from_file.cluster.nodes)
    from_environment = load_config({"raft.node_id": "a"}, {"AYDER_CLUSTER__NODES": f"[{inline}]"}, None)
    from_flag = load_config(of_cluster(THREE), {}, None)
    assert from_file == from_environment == from_flag
    assert [node.id for node in from_file.cluster.nodes] == ["a", "b", "c"]
    assert [node.client_url for node in from_file.cluster.nodes] == [
        "http://127.0.0.1:7001",
        "http://127.0.0.1:9000",
        "http://127.0.0.1:7005",
    ]


@pytest.mark.parametrize(
    ("http_url", "address"),
    [
        ("", ("127.0.0.1", 7001)),
        ("http://127.0.0.9:81", ("127.0.0.9", 81)),
        ("http://127.0.0.9", ("127.0.0.9", 80)),
        ("https://ayder.example", ("127.0.0.1", 7001)),
    ],
)
def test_a_member_listens_where_its_entry_says(http_url: str, address: tuple[str, int]) -> None:
    config = load_config(of_cluster([member("a", 7000, http_url=http_url), *THREE[1:]]), {}, None)
    assert (config.http.host, config.http.port) == address
    assert {config.origins["http.host"], config.origins["http.port"]} == {"derived from cluster.nodes"}
    assert config.warnings == ()


def test_a_member_that_serves_tls_itself_listens_where_its_url_says() -> None:
    nodes = [member("a", 7000, http_url="https://127.0.0.1:8443"), *THREE[1:]]
    config = load_config(of_cluster(nodes, http__tls_certificate="c", http__tls_key="k"), {}, None)
    assert config.http.port == 8443
    (found,) = mistakes(of_cluster(THREE, http__tls_certificate="c", http__tls_key="k"))
    assert "http_url of a must begin with https://" in found


def test_what_was_set_is_not_derived() -> None:
    config = load_config(of_cluster(THREE), {"AYDER_HTTP__HOST": "::1"}, None)
    assert (config.http.host, config.origins["http.host"]) == ("::1", "environment AYDER_HTTP__HOST")
    assert (config.http.port, config.origins["http.port"]) == (7001, "derived from cluster.nodes")
    config = load_config(of_cluster(THREE, http__port="8080"), {}, None)
    assert (config.http.port, config.origins["http.port"]) == (8080, "flag")
    (warning,) = config.warnings
    assert "listens on port 8080, but the others send clients to http://127.0.0.1:7001" in warning


def test_members_on_a_network_need_certificates_and_should_have_tokens() -> None:
    nodes = [member(name, 7000, host=f"{name}.example") for name in "abc"]
    (found,) = mistakes(of_cluster(nodes))
    assert found.startswith("cluster: without tls_ca, tls_certificate and tls_key every node must be on loopback")
    assert found.endswith("; a.example, b.example, c.example are not")
    config = load_config(of_cluster(nodes) | FILES, {}, None)
    assert (config.http.host, config.http.port) == ("a.example", 7001)
    assert config.auth.tokens == ()
    assert "each node makes a token of its own" in config.warnings[0]
    assert load_config(of_cluster(nodes) | FILES, {"RF_BEARER_TOKENS": "x"}, None).warnings == ()


@pytest.mark.parametrize("count", [2, 4, 6, 8, 9])
def test_a_cluster_has_an_odd_number_of_nodes_and_at_most_seven(count: int) -> None:
    (found,) = mistakes(of_cluster([member(f"n{number}", 7000 + 2 * number) for number in range(count)]))
    assert found.startswith(f"cluster.nodes: a cluster has 1, 3, 5 or 7 nodes, not {count}: an even number survives no more")


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_the_sizes_of_a_cluster(count: int) -> None:
    nodes = [member("abcdefg"[number], 7000 + 2 * number) for number in range(count)]
    assert len(load_config(of_cluster(nodes), {}, None).cluster.nodes) == count


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (member("a", 7002), "cluster.nodes: two nodes have one id: a"),
        (member("b", 7000), "cluster.nodes: one address is used twice"),
        (member("b", 7001), "cluster.nodes: one address is used twice"),
        (member("b", 6999), "cluster.nodes: one address is used twice"),
        (member("b", 7002, http_url="http://127.0.0.1:7001"), "cluster.nodes: one address is used twice"),
        (member("b", 65535), "cluster.nodes[1].raft_port: must be at most 65534, got 65535 (from flag)"),
        (member("b", 0), "cluster.nodes[1].raft_port: must be at least 1"),
        (member("b c", 7002), "cluster.nodes[1].id: not a name: 'b c'"),
        (member("b", 7002, host="x\r\ny"), "cluster.nodes[1].host: not a host"),
        (member("b", 7002, host="fe80::1%x\r\ny"), "cluster.nodes[1].host: not a host"),
        (member("b", 7002, host="0.0.0.0"), "cluster.nodes[1].host: not an address of one machine"),
        (member("b", 7002, host=""), "cluster.nodes[1].host: not a host"),
        (member("b", 7002, http_url="http://h/path"), "cluster.nodes[1].http_url: not the URL of a node"),
        (member("b", 7002, http_url="http://u@h"), "cluster.nodes[1].http_url: not the URL of a node"),
        (member("b", 7002, http_url="http://h:1\n"), "cluster.nodes[1].http_url: not the URL of a node"),
        (member("b", 7002, http_url="http://h:99999"), "cluster.nodes[1].http_url: not the URL of a node"),
        (member("b", 7002, http_url="ftp://h"), "cluster.nodes[1].http_url: not the URL of a node"),
        (member("b", 7002, colour="red"), "cluster.nodes[1]: no such setting: colour"),
        ({"id": "b", "host": "::1"}, "cluster.nodes[1].raft_port: is missing"),
    ],
)
def test_an_entry_that_cannot_be_right_is_refused(second: dict[str, object], expected: str) -> None:
    (found,) = mistakes(of_cluster([THREE[0], second, THREE[2]]))
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"raft.node_id": "z"}, "raft.node_id: 'z' is not among cluster.nodes (a, b, c)"),
        ({"cluster.tls_ca": "x"}, "cluster: tls_ca, tls_certificate and tls_key go together: set all or none"),
        ({"cluster.write_mode": "quorum"}, "cluster.write_mode: must be one of async, sync-majority, sync-all; got 'quorum'"),
        ({"cluster.redirect_status": "302"}, "cluster.redirect_status: must be one of 307, 308; got 302"),
        ({"cluster.max_frame_bytes": "8388608"}, "cluster.max_frame_bytes must exceed raft.max_block_bytes"),
        ({"cluster.name": "a b"}, "cluster.name: not a name"),
        ({"cluster.nodes": "[{]"}, "cluster.nodes: expected an array of TOML or JSON, got '[{]'"),
        ({"cluster.nodes": "7"}, "cluster.nodes: expected an array of tables"),
    ],
)
def test_a_cluster_with_a_mistake_is_refused(flags: dict[str, str], expected: str) -> None:
    (found,) = mistakes(of_cluster(THREE) | flags)
    assert found.startswith(expected)


def test_a_member_says_which_one_it_is_even_when_a_default_would_fit() -> None:
    """Two machines with one file and no node_id would both be the node of the default name."""
    nodes = [member("node-1", 7000), *THREE[1:]]
    assert mistakes({"cluster.nodes": json.dumps(nodes)}) == ["raft.node_id: must say which of cluster.nodes this node is"]
    assert load_config(of_cluster(nodes) | {"raft.node_id": "node-1"}, {}, None).http.port == 7001


# ---- the predecessor's environment ----


@pytest.mark.parametrize(
    ("environ", "port"),
    [
        ({"PORT": "1", "RF_HTTP_PORT": "2", "RF_HTTP_ADDR": ":3"}, 2),
        ({"PORT": "1", "RF_HTTP_ADDR": ":3"}, 1),
        ({"RF_HTTP_ADDR": ":3"}, 3),
        ({"RF_HTTP_ADDR": "3"}, 3),
        ({"PORT": ""}, 1109),
    ],
)
def test_old_port_names_and_their_rank(environ: dict[str, str], port: int) -> None:
    config = load_config({}, environ, None)
    assert (config.http.host, config.http.port) == ("127.0.0.1", port)


def test_only_an_old_address_can_name_a_host() -> None:
    config = load_config({}, {"RF_HTTP_ADDR": "[::]:3"}, None)
    assert (config.http.host, config.http.port) == ("::", 3)


def test_flags_and_names_of_ours_are_above_the_old_names() -> None:
    assert load_config({"http.port": "9"}, {"RF_HTTP_PORT": "2"}, None).http.port == 9
    assert load_config({}, {"RF_HTTP_PORT": "2", "AYDER_HTTP__PORT": "8"}, None).http.port == 8


DEFAULTS = (50, 100, 100_000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dev", [("dev", DEFAULTS)]),
        ("dev@5", [("dev", (5, 100, 100_000))]),
        ("dev@5:6:7,b@:8", [("dev", (5, 6, 7)), ("b", (50, 8, 100_000))]),
        ("dev@scope:token2:token3", [("dev", DEFAULTS)]),
        ("dev@0:0:0", [("dev", DEFAULTS)]),
        ("dev@12abc", [("dev", (12, 100, 100_000))]),
        ("dev@55555555555555:55555555555555:99999999999999999999999", [("dev", (55555555555555, 55555555555555, 10**23 - 1))]),
        ("a, b ,,@5,a@9", [("a", DEFAULTS), ("b", DEFAULTS)]),
    ],
)
def test_old_token_grammar(text: str, expected: list[tuple[str, tuple[int, int, int]]]) -> None:
    assert parse_tokens(text, DEFAULTS) == expected
    tokens = load_config({}, {"RF_BEARER_TOKENS": text}, None).auth.tokens
    found = [(token.sha256, (token.requests_per_second, token.burst, token.daily)) for token in tokens]
    assert found == [(token_hash(name), limits) for name, limits in expected]
    assert all(token.scopes == ("*",) for token in tokens)


def test_old_default_limits() -> None:
    environ = {"RF_BEARER_TOKENS": "a", "RL_DEFAULT_RPS": "1", "RL_DEFAULT_BURST": "0", "RL_DEFAULT_DAILY": "3"}
    (token,) = load_config({}, environ, None).auth.tokens
    assert (token.requests_per_second, token.burst, token.daily) == (1, 100, 3)


@pytest.mark.parametrize("text", ["x" * 128, ",".join(f"t{n}" for n in range(129))])
def test_old_tokens_beyond_the_old_limits_are_refused_not_dropped(text: str) -> None:
    (found,) = mistakes(environ={"RF_BEARER_TOKENS": text})
    assert found.startswith("environment RF_BEARER_TOKENS: ")


def test_other_old_names_that_are_honoured() -> None:
    environ = {
        "RF_HTTP_DISABLE_RL": "1", "RF_AUTH_SKIP_PREFIXES": "/a;/b,/c", "BP_RETRY_AFTER_SEC": "4", "RF_HTTP_RETRY_AFTER": "3",
        "RF_HA_NODE_ID": "n1", "RF_HA_HEARTBEAT_MS": "200", "RF_HA_ELECTION_TIMEOUT_MS": "2000", "LOG_LEVEL": "WARN",
        "RF_ROCKET": "0", "RF_HA_ENABLED": "0",
    }  # fmt: skip
    config = load_config({}, environ, None)
    assert (config.auth.rate_limits, config.auth.skip_prefixes) == (False, ("/a", "/b", "/c"))
    assert (config.raft.node_id, config.raft.heartbeat_interval_ms, config.raft.election_timeout_ms) == ("n1", 200, 2000)
    assert (config.http.retry_after_s, config.logging.level) == (4, "warning")
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RF_HA_ENABLED": "1"}, "RF_HA_ENABLED=1: RF_HA_NODES must name the nodes"),
        ({"RF_HA_ENABLED": "1", "RF_HA_NODES": "a,b,c"}, "expected id:host:raft_port[:priority], got 'a'"),
        ({"RF_HA_ENABLED": "1", "RF_HA_NODES": " , "}, "environment RF_HA_NODES: names no node"),
        ({"RF_ROCKET": "1"}, "not in this version"),
        ({"PORT": "http"}, "environment PORT: expected a port"),
        ({"RF_HTTP_PORT": "70000"}, "http.port: must be at most 65535, got 70000 (from environment RF_HTTP_PORT)"),
        ({"BP_MAX_ACTIVE_CONNS": "-1"}, "environment BP_MAX_ACTIVE_CONNS: expected a whole number"),
    ],
)
def test_old_names_that_are_refused(environ: dict[str, str], expected: str) -> None:
    (found,) = mistakes(environ=environ)
    assert expected in found


OLD_NODES = "a:127.0.0.1:7000,b:[::1]:7000:20, c:localhost:7010"
OLD_MEMBER = {"RF_HA_ENABLED": "1", "RF_HA_NODES": OLD_NODES, "RF_HA_NODE_ID": "b"}


def test_an_old_cluster_is_a_cluster_here() -> None:
    environ = OLD_MEMBER | {"RF_HA_SYNC_MODE": "2", "RF_HA_REDIRECT_STATUS": "308", "RF_HA_RETRY_AFTER": "4"}
    config = load_config({}, environ | {"BP_RETRY_AFTER_SEC": "9", "RF_HTTP_RETRY_AFTER": "8"}, None)
    found = [(node.id, node.host, node.raft_port, node.priority, node.client_url) for node in config.cluster.nodes]
    assert found == [
        ("a", "127.0.0.1", 7000, 10, "http://127.0.0.1:7001"),
        ("b", "::1", 7000, 20, "http://[::1]:7001"),
        ("c", "localhost", 7010, 10, "http://localhost:7011"),
    ]
    assert (config.raft.node_id, config.http.host, config.http.port) == ("b", "::1", 7001)
    assert (config.cluster.write_mode, config.cluster.redirect_status, config.http.retry_after_s) == ("sync-all", 308, 4)
    assert config.origins["cluster.nodes"] == "environment RF_HA_NODES"
    assert config.warnings == ()


@pytest.mark.parametrize(("mode", "expected"), [("0", "async"), ("1", "sync-majority"), ("2", "sync-all")])
def test_old_write_modes(mode: str, expected: str) -> None:
    assert load_config({}, OLD_MEMBER | {"RF_HA_SYNC_MODE": mode}, None).cluster.write_mode == expected


def test_an_old_member_without_a_name_is_called_like_its_machine() -> None:
    environ = {name: value for name, value in OLD_MEMBER.items() if name != "RF_HA_NODE_ID"}
    config = load_config({}, environ | {"HOSTNAME": "a"}, None, host_name="c")
    assert config.raft.node_id == "c"
    assert config.origins["raft.node_id"] == "environment RF_HA_NODES (the name of this machine)"
    assert load_config({}, environ | {"HOSTNAME": "a"}, None).raft.node_id == "a"
    assert load_config({"raft.node_id": "a"}, environ, None, host_name="elsewhere").raft.node_id == "a"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"RF_HA_NODE_ID": "d"}, "raft.node_id: 'd' is not among cluster.nodes (a, b, c)"),
        ({"RF_HA_NODE_ID": "", "HOSTNAME": "d"}, "raft.node_id: 'd' is not among cluster.nodes (a, b, c)"),
        ({"RF_HA_NODE_ID": "", "RF_HA_NODES": "node-1:::1:7000"}, "expected id:host:raft_port[:priority], got 'node-1:::1:7000'"),
        ({"RF_HA_NODE_ID": "", "RF_HA_NODES": "node-1:localhost:7000"}, "raft.node_id: must say which of cluster.nodes"),
    ],
)
def test_an_old_member_that_is_not_in_the_list_never_runs_alone(changed: dict[str, str], expected: str) -> None:
    """Defect H-14 of the predecessor."""
    (found,) = mistakes(environ=OLD_MEMBER | changed)
    assert expected in found


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"RF_HA_SYNC_MODE": "3"}, "environment RF_HA_SYNC_MODE: must be 0, 1 or 2, got '3'"),
        ({"RF_HA_REDIRECT_STATUS": "302"}, "cluster.redirect_status: must be one of 307, 308; got 302"),
        ({"RF_HA_RETRY_AFTER": "soon"}, "environment RF_HA_RETRY_AFTER: expected a whole number"),
        ({"RF_HA_TLS": "yes"}, "environment RF_HA_TLS: must be 0 or 1, got 'yes'"),
        ({"RF_HA_TLS": "1", "RF_HA_TLS_CA": "x"}, "environment RF_HA_TLS=1: RF_HA_TLS_CERT, RF_HA_TLS_KEY must be set"),
        ({"RF_HA_TLS_CA": "x"}, "cluster: tls_ca, tls_certificate and tls_key go together"),
        ({"RF_HA_NODES": OLD_NODES.replace("localhost", "c.example")}, "every node must be on loopback; c.example is not"),
        ({"RF_HA_NODES": OLD_NODES + ",d:localhost:7020"}, "cluster.nodes: a cluster has 1, 3, 5 or 7 nodes, not 4"),
    ],
)
def test_an_old_cluster_with_a_mistake_is_refused(changed: dict[str, str], expected: str) -> None:
    (found,) = mistakes(environ=OLD_MEMBER | changed)
    assert expected in found


def test_old_names_of_certificates() -> None:
    files = {"RF_HA_TLS_CA": "ca.pem", "RF_HA_TLS_CERT": "b.pem", "RF_HA_TLS_KEY": "b.key"}
    cluster = load_config({}, OLD_MEMBER | files | {"RF_HA_TLS": "1"}, None).cluster
    assert (cluster.tls_ca, cluster.tls_certificate, cluster.tls_key) == ("ca.pem", "b.pem", "b.key")
    assert load_config({}, OLD_MEMBER | files, None).cluster == cluster
    assert load_config({}, OLD_MEMBER | files | {"RF_HA_TLS": "0"}, None).cluster.tls_ca == ""


@pytest.mark.parametrize("enabled", ["0", "true", "2", ""])
def test_only_exactly_1_makes_an_old_node_a_member_and_the_others_are_told(enabled: str) -> None:
    config = load_config({}, OLD_MEMBER | {"RF_HA_ENABLED": enabled, "RF_HA_TLS": "1", "RF_HA_SYNC_MODE": "9"}, None)
    assert config.cluster == Config().cluster
    alone, ignored = config.warnings
    assert "this node is alone, not a member of a cluster" in alone
    assert ignored.endswith("ignored: RF_HA_NODES, RF_HA_SYNC_MODE, RF_HA_TLS")


def test_old_names_that_mean_nothing_in_a_cluster_are_warned_about() -> None:
    environ = OLD_MEMBER | {"RF_HA_BOOTSTRAP_LEADER": "1", "RF_HA_WRITE_CONCERN": "2", "RF_HA_DEDICATED_WORKER": "0"}
    (warning,) = load_config({}, environ, None).warnings
    assert warning.endswith("ignored: RF_HA_BOOTSTRAP_LEADER, RF_HA_DEDICATED_WORKER, RF_HA_WRITE_CONCERN")


def test_old_names_without_meaning_are_named_in_one_warning() -> None:
    environ = {
        "RF_HA_TLS_CA": "x",
        "RAMFORGE_WORKERS": "4",
        "BP_MAX_SEALED_Q": "1",
        "LOG_TIMESTAMP": "1",
        "RF_BUS_DESC": "",
        "HOME": "/",
    }
    (warning,) = load_config({}, environ, None).warnings
    assert warning.endswith("ignored: BP_MAX_SEALED_Q, LOG_TIMESTAMP, RAMFORGE_WORKERS, RF_HA_TLS_CA")
    (warning,) = load_config({}, {"LOG_LEVEL": "7"}, None).warnings
    assert "LOG_LEVEL" in warning


# ---- the documentation ----


def test_the_page_shows_the_settings_as_they_are() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert config_report.rewrite_tables(page) == page, "stale: run `make docs`"
    for section, attribute in settings():
        assert f"| `{attribute.name}` |" in page, section
    assert "| `raft_port` | (required) | 1 … 65534 |" in page


def test_every_setting_says_what_it_is_and_ends_with_its_unit() -> None:
    suffixes = {"ms": ("_ms",), "s": ("_s",), "bytes": ("_bytes",), "ratio": ("_ratio",), "": ("",)}
    for _section, attribute in settings():
        assert attribute.metadata["help"]
        assert attribute.name.endswith(suffixes[attribute.metadata["unit"]])


def test_the_listing_is_toml_and_reads_back_as_the_same_settings() -> None:
    config = load_config({}, {"AYDER_HTTP__CORS_ORIGINS": "https://a.example,*", "RF_HA_NODE_ID": "n-7"}, None)
    listing = [line for line in config_report.effective_settings(config) if not line.startswith("auth.tokens")]
    again = load_config({}, {}, "\n".join(listing))
    assert again == config
    assert tomllib.loads("\n".join(listing))["raft"]["node_id"] == "n-7"


def test_the_listing_of_a_member_reads_back_too() -> None:
    config = load_config(of_cluster(THREE), {}, None)
    listing = [line for line in config_report.effective_settings(config) if not line.startswith("auth.tokens")]
    assert load_config({}, {}, "\n".join(listing)) == config
    assert "http.port = 7001  # derived from cluster.nodes" in listing
