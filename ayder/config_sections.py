"""Every setting of a node: its name, default, limits and meaning.

Owns: the sections and their limits. Must not know: where a value comes from (``config.py`` joins the sources); files, sockets.

Invariants: a section that exists is within every limit; each setting has a help text; names end in their unit; no plain-text
token is kept, only its SHA-256. ``docs/configuration.md`` is generated from what is declared here.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import attrs

__all__ = [
    "SECTIONS",
    "AuthConfig",
    "ClusterConfig",
    "Config",
    "HttpConfig",
    "LoggingConfig",
    "MemberConfig",
    "RaftConfig",
    "StorageConfig",
    "TokenConfig",
    "TopicsConfig",
    "is_loopback",
    "settings",
]

KIB = 1024
MIB = 1024 * KIB
ONE_DAY_MS = 24 * 3600 * 1000


def setting(
    default: object,
    help: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    one_of: tuple[str | int, ...] = (),
    check: Callable[[Any], str | None] | None = None,
    shown: bool = True,
) -> Any:
    """Declare a setting. ``check`` says what is wrong with a value, or None; limits are inclusive; a secret is not ``shown``."""

    def validate(_instance: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}")
        if at_least is not None and value < at_least:
            raise ValueError(f"must be at least {at_least}, got {value}")
        if at_most is not None and value > at_most:
            raise ValueError(f"must be at most {at_most}, got {value}")
        if one_of and value not in one_of:
            raise ValueError(f"must be one of {', '.join(map(str, one_of))}; got {value!r}")
        if check is not None and (complaint := check(value)):
            raise ValueError(complaint)

    limits = {"at_least": at_least, "at_most": at_most, "one_of": one_of}
    return attrs.field(default=default, validator=validate, repr=shown, metadata={"help": help, "unit": unit, **limits})


def _milliseconds(default: int, help: str, *, at_least: int = 1, at_most: int = ONE_DAY_MS) -> Any:
    return setting(default, help, unit="ms", at_least=at_least, at_most=at_most)


def _bytes(default: int, help: str, *, at_least: int = 1, at_most: int = 1 << 40) -> Any:
    return setting(default, help, unit="bytes", at_least=at_least, at_most=at_most)


def _count(default: int, help: str, *, at_least: int = 1, at_most: int = 1_000_000) -> Any:
    return setting(default, help, at_least=at_least, at_most=at_most)


def _not_empty(value: str) -> str | None:
    return None if value else "must not be empty"


def _origins(values: tuple[str, ...]) -> str | None:
    wrong = [value for value in values if value != "*" and not re.fullmatch(r"https?://[^/\s]+", value)]
    return f"not an origin (scheme://host[:port]): {', '.join(wrong)}" if wrong else None


def _prefixes(values: tuple[str, ...]) -> str | None:
    wrong = [value for value in values if not value.startswith("/")]
    return f"a path prefix starts with /: {', '.join(map(repr, wrong))}" if wrong else None


def _name(value: str) -> str | None:
    return None if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value) else f"not a name: {value!r}"


def _storage_kind(value: str) -> str | None:
    if value == "rocket":
        return "'rocket' (topics kept in memory, not durable) is not in this version; only 'sealed' is"
    return None if value == "sealed" else f"must be 'sealed', got {value!r}"


@attrs.frozen(kw_only=True)
class HttpConfig:
    """The HTTP front: where it listens and what one client, or all of them, may cost."""

    host: str = setting("127.0.0.1", "address to listen on", check=_not_empty)
    port: int = setting(1109, "port to listen on; 0 takes any free one", at_least=0, at_most=65535)
    tls_certificate: str = setting("", "PEM file with the certificate chain; empty: plain HTTP")
    tls_key: str = setting("", "PEM file with the private key of the certificate")
    cors_origins: tuple[str, ...] = setting((), "origins a browser may call from; `*` is any; empty: CORS is off", check=_origins)
    max_request_line_bytes: int = _bytes(4 * KIB, "longest request line; beyond it 414", at_least=256, at_most=MIB)
    max_head_bytes: int = _bytes(16 * KIB, "longest request head; beyond it 431", at_least=KIB, at_most=MIB)
    max_headers: int = _count(64, "most headers in a request; beyond it 431", at_most=10_000)
    head_timeout_ms: int = _milliseconds(5_000, "time a client has to send a whole head, from its first byte; then 408")
    body_grace_ms: int = _milliseconds(5_000, "time after which the rate of an incoming body is judged", at_least=0)
    body_min_bytes_per_second: int = _count(1024, "slowest body after the grace time; slower is 408", at_least=0, at_most=1 << 40)
    body_timeout_ms: int = _milliseconds(60_000, "time a client has to send a whole body; then 408")
    idle_timeout_ms: int = _milliseconds(30_000, "time a kept-alive connection may be silent between requests")
    write_stall_timeout_ms: int = _milliseconds(10_000, "time a client may take no byte of an answer before it is cut off")
    max_connections: int = _count(1_000, "open connections, all clients together")
    max_connections_per_address: int = _count(100, "open connections from one address that is not loopback")
    max_connections_loopback: int = _count(1_000, "open connections from this machine")
    max_pipelined_requests: int = _count(16, "requests of one connection that may wait for an answer", at_most=10_000)
    max_produce_body_bytes: int = _bytes(8 * MIB, "largest body of produce and produce-ndjson; beyond it 413", at_most=256 * MIB)
    max_control_body_bytes: int = _bytes(
        64 * KIB, "largest body of any other call; beyond it 413", at_least=KIB, at_most=64 * MIB
    )
    max_bodies_in_flight_bytes: int = _bytes(64 * MIB, "bodies held for all clients together; beyond it 503", at_least=MIB)
    drain_timeout_ms: int = _milliseconds(5_000, "time requests have to finish when the node is told to stop", at_least=0)
    max_long_poll_ms: int = _milliseconds(60_000, "longest `wait_ms` of a consume call", at_least=0)
    default_produce_timeout_ms: int = _milliseconds(5_000, "wait for durability when a call has no `timeout_ms`; then 504")
    max_stream_subscribers: int = _count(2_000, "open SSE tails, all clients together")
    retry_after_s: int = setting(1, "`Retry-After` of a 503 answer", unit="s", at_least=0, at_most=86_400)

    def __attrs_post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key go together: set both or neither")
        if self.max_request_line_bytes > self.max_head_bytes:
            raise ValueError("max_request_line_bytes must not exceed max_head_bytes")
        if self.max_bodies_in_flight_bytes < max(self.max_produce_body_bytes, self.max_control_body_bytes):
            raise ValueError("max_bodies_in_flight_bytes must hold at least one body of the largest size allowed")


@attrs.frozen(kw_only=True)
class StorageConfig:
    """The log on disk."""

    log: str = setting("aof", "log store, by its name among the `ayder.log_stores` entry points", check=_not_empty)
    data_dir: str = setting("./data", "directory that holds everything the node keeps", check=_not_empty)
    segment_bytes: int = _bytes(64 * MIB, "a segment is sealed when it has grown to this size", at_least=64 * KIB)
    segment_blocks: int = _count(32_768, "a segment is sealed when it holds this many blocks", at_most=1 << 24)
    preallocate_bytes: int = _bytes(8 * MIB, "how far the open segment is allocated ahead; 0: not at all", at_least=0)
    tail_cache_bytes: int = _bytes(16 * MIB, "newest blocks kept in memory for readers near the end", at_least=0)
    read_cache_bytes: int = _bytes(16 * MIB, "older blocks kept in memory after a cold read", at_least=0)
    watermark_interval_ms: int = _milliseconds(100, "how often the synced watermark is written down", at_most=60_000)
    reserve_bytes: int = _bytes(MIB, "ballast file given back when the disk is full, so that deletion works", at_least=0)
    gc_live_ratio: float = setting(
        0.5, "a sealed segment is rewritten when less than this share of it is live", unit="ratio", at_least=0.0, at_most=1.0
    )


@attrs.frozen(kw_only=True)
class RaftConfig:
    """The consensus module and its driver."""

    node_id: str = setting("node-1", "name of this node, unique in its cluster", check=_name)
    tick_ms: int = _milliseconds(50, "length of one tick of the consensus clock", at_most=1_000)
    heartbeat_interval_ms: int = _milliseconds(100, "a leader shows itself this often", at_least=10, at_most=60_000)
    election_timeout_ms: int = _milliseconds(1_000, "silence after which a follower asks for votes; >= 5 heartbeats", at_least=50)
    max_block_bytes: int = _bytes(
        4 * MIB, "a block closes at this size; one larger command is a block alone", at_least=64 * KIB, at_most=1 << 30
    )
    max_queued_bytes: int = _bytes(32 * MIB, "proposals waiting for the disk; beyond it 503", at_least=MIB)

    def __attrs_post_init__(self) -> None:
        if self.election_timeout_ms < 5 * self.heartbeat_interval_ms:
            raise ValueError(
                f"election_timeout_ms ({self.election_timeout_ms}) must be at least 5 times "
                f"heartbeat_interval_ms ({self.heartbeat_interval_ms})"
            )
        if self.tick_ms > self.heartbeat_interval_ms:
            raise ValueError("tick_ms must not exceed heartbeat_interval_ms")


CLUSTER_SIZES = (1, 3, 5, 7)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on ``host``. A name other than ``localhost`` is taken as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _host(value: str) -> str | None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return None if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", value) else f"not a host: {value!r}"
    if "%" in value:  # a zone may hold any character, and it would go into URLs
        return f"not a host: {value!r}"
    return "not an address of one machine" if value in ("0.0.0.0", "::") else None  # noqa: S104  (refused, not bound)


def _url(value: str) -> str | None:
    """Redirects carry it, so nothing may hide in it: no path, no user, no space, no line end."""
    if not value:
        return None
    try:
        port = urlsplit(value).port
    except ValueError:
        port = 0
    fits = re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", value) and port != 0
    return None if fits else f"not the URL of a node (http://HOST[:PORT]): {value!r}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@attrs.frozen(kw_only=True)
class MemberConfig:
    """One node of a cluster: where the other nodes and the clients reach it."""

    id: str = setting(attrs.NOTHING, "its `raft.node_id`; its certificate bears this name", check=_name)
    host: str = setting(attrs.NOTHING, "name or address the other nodes call", check=_host)
    raft_port: int = setting(attrs.NOTHING, "port the other nodes call; clients are on the next", at_least=1, at_most=65534)
    http_url: str = setting("", "where clients reach it; empty: `http://host:(raft_port+1)`", check=_url)
    priority: int = setting(10, "kept for configurations of the predecessor; it changes nothing", at_least=0, at_most=1_000)

    @property
    def client_url(self) -> str:
        """Where clients reach it, without a slash at the end."""
        return self.http_url or f"http://{_bracketed(self.host)}:{self.raft_port + 1}"

    @property
    def client_address(self) -> tuple[str, int]:
        """Host and port of ``client_url``."""
        url = urlsplit(self.client_url)
        return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def _members(nodes: tuple[MemberConfig, ...]) -> str | None:
    if nodes and len(nodes) not in CLUSTER_SIZES:
        return (
            f"a cluster has 1, 3, 5 or 7 nodes, not {len(nodes)}: an even number survives no more failures than one node less, "
            "and more than 7 make every write slower"
        )
    if twice := _twice(node.id for node in nodes):
        return f"two nodes have one id: {twice}"
    addresses = [(node.host.lower(), node.raft_port) for node in nodes] + [node.client_address for node in nodes]
    if twice := _twice(f"{_bracketed(host)}:{port}" for host, port in addresses):
        return f"one address is used twice (clients are served on raft_port + 1 unless http_url says otherwise): {twice}"
    return None


def _twice(values: Iterable[str]) -> str:
    return ", ".join(value for value, count in Counter(values).items() if count > 1)


@attrs.frozen(kw_only=True)
class ClusterConfig:
    """The nodes that keep one log together. Every node is given the same ``nodes``, and its own ``raft.node_id``."""

    name: str = setting("ayder", "name of the cluster; nodes of another one are refused", check=_name)
    nodes: tuple[MemberConfig, ...] = setting((), "tables, one a node; empty: this node is alone", check=_members)
    tls_ca: str = setting("", "PEM file with the authority that signed the certificates of all nodes")
    tls_certificate: str = setting("", "PEM file with the certificate (its name is the node id) shown to the other nodes")
    tls_key: str = setting("", "PEM file with its private key")
    write_mode: str = setting(
        "sync-majority",
        "a write is answered when it is on the disk of: the leader alone, a majority, every voter",
        one_of=("async", "sync-majority", "sync-all"),
    )
    redirect_status: int = setting(307, "status by which a follower sends a client to the leader", one_of=(307, 308))
    forward: bool = setting(False, "a follower calls the leader for its client instead of redirecting it")
    max_frame_bytes: int = _bytes(16 * MIB, "longest message between nodes", at_least=MIB, at_most=512 * MIB)

    def __attrs_post_init__(self) -> None:
        files = (self.tls_ca, self.tls_certificate, self.tls_key)
        if any(files) and not all(files):
            raise ValueError("tls_ca, tls_certificate and tls_key go together: set all or none")
        exposed = [node.host for node in self.nodes if not is_loopback(node.host)]
        if exposed and not all(files):
            raise ValueError(
                f"without tls_ca, tls_certificate and tls_key every node must be on loopback; {', '.join(exposed)} "
                f"{'is' if len(exposed) == 1 else 'are'} not"
            )

    def member(self, node_id: str) -> MemberConfig | None:
        """The entry of ``node_id``, if there is one."""
        return next((node for node in self.nodes if node.id == node_id), None)


@attrs.frozen(kw_only=True)
class TopicsConfig:
    """Topics, partitions and what one record may be."""

    default_partitions: int = _count(8, "partitions of a topic created without a count", at_most=1_024)
    auto_create: bool = setting(True, "producing to an unknown topic creates it")
    max_partitions: int = _count(1_024, "most partitions of one topic", at_most=1_024)
    max_topics: int = _count(10_000, "most topics")
    idempotency_window_entries: int = _count(16_384, "idempotency keys remembered per partition", at_most=1 << 24)
    idempotency_window_ms: int = _milliseconds(
        7 * ONE_DAY_MS, "how long an idempotency key is remembered", at_most=366 * ONE_DAY_MS
    )
    max_batch_records: int = _count(10_000, "most records in one produce call; beyond it 413")
    max_key_bytes: int = _bytes(4 * KIB, "longest record key", at_most=MIB)
    max_idempotency_key_bytes: int = _bytes(512, "longest idempotency key", at_most=32 * KIB)
    max_headers_per_record: int = _count(64, "most headers of one record", at_least=0, at_most=1_024)
    retention_check_ms: int = _milliseconds(100, "how often retention by time and size is enforced", at_least=10)
    default_storage: str = setting("sealed", "storage of a topic created without one", check=_storage_kind)

    def __attrs_post_init__(self) -> None:
        if self.default_partitions > self.max_partitions:
            raise ValueError("default_partitions must not exceed max_partitions")


SCOPE = re.compile(r"\*|admin|metrics|(produce|consume|kv)(:[A-Za-z0-9._*-]+)?")


def _scopes(values: tuple[str, ...]) -> str | None:
    wrong = [value for value in values if not SCOPE.fullmatch(value)]
    return f"not a scope (*, admin, metrics, produce:TOPIC, consume:TOPIC, kv:NAMESPACE): {', '.join(wrong)}" if wrong else None


def _sha256(value: str) -> str | None:
    return None if re.fullmatch(r"[0-9a-f]{64}", value) else "must be the 64 lower-case hex digits of the token's SHA-256"


def _limit(value: int | None) -> str | None:
    return None if value is None or value > 0 else "must be at least 1; leave it out for no limit"


@attrs.frozen(kw_only=True)
class TokenConfig:
    """One bearer token: what it may do, and how often. The token itself is not kept."""

    name: str = setting(attrs.NOTHING, "its name in logs and metrics", check=_not_empty)
    sha256: str = setting(attrs.NOTHING, "SHA-256 of the token, in hex", check=_sha256, shown=False)
    scopes: tuple[str, ...] = setting(
        ("*",), "what it may do: `*`, `admin`, `metrics`, `produce:orders.*`, `consume:*`, `kv:app`", check=_scopes
    )
    requests_per_second: int | None = setting(None, "refill of its bucket; none: no limit", check=_limit)
    burst: int | None = setting(None, "size of its bucket; none: as requests_per_second", check=_limit)
    daily: int | None = setting(None, "requests in one UTC day; none: no limit", check=_limit)


def _unique_tokens(tokens: tuple[TokenConfig, ...]) -> str | None:
    if len({token.name for token in tokens}) < len(tokens):
        return "two tokens have one name"
    return "two entries are one token" if len({token.sha256 for token in tokens}) < len(tokens) else None


@attrs.frozen(kw_only=True)
class AuthConfig:
    """Who may call. In a loaded configuration ``tokens`` is what the node accepts, the token of a node without any included."""

    tokens: tuple[TokenConfig, ...] = setting((), "tables with name, sha256, scopes and limits", check=_unique_tokens)
    skip_prefixes: tuple[str, ...] = setting((), "paths that start with one of these need no token", check=_prefixes)
    insecure_dev: bool = setting(False, "accept the token `dev` with full rights on any address")
    rate_limits: bool = setting(True, "enforce the limits of the tokens")


@attrs.frozen(kw_only=True)
class LoggingConfig:
    """Log lines on standard error."""

    level: str = setting("info", "least serious line that is written", one_of=("debug", "info", "warning", "error", "critical"))
    format: str = setting("text", "one line of text, or one JSON object, for each event", one_of=("text", "json"))


@attrs.frozen(kw_only=True)
class Config:
    """All settings, where each came from (``origins``: path → source) and what the operator should hear at start."""

    http: HttpConfig = attrs.Factory(HttpConfig)
    storage: StorageConfig = attrs.Factory(StorageConfig)
    raft: RaftConfig = attrs.Factory(RaftConfig)
    cluster: ClusterConfig = attrs.Factory(ClusterConfig)
    topics: TopicsConfig = attrs.Factory(TopicsConfig)
    auth: AuthConfig = attrs.Factory(AuthConfig)
    logging: LoggingConfig = attrs.Factory(LoggingConfig)
    origins: Mapping[str, str] = attrs.field(factory=dict, eq=False, repr=False)
    warnings: tuple[str, ...] = attrs.field(default=(), eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.raft.max_queued_bytes < self.http.max_produce_body_bytes:
            raise ValueError("raft.max_queued_bytes must hold one body of http.max_produce_body_bytes")
        if self.cluster.nodes:
            self._check_member()

    def _check_member(self) -> None:
        own = self.cluster.member(self.raft.node_id)
        if own is None:
            # Running alone would acknowledge writes that the operator believes replicated (H-14).
            names = ", ".join(node.id for node in self.cluster.nodes)
            raise ValueError(f"raft.node_id: {self.raft.node_id!r} is not among cluster.nodes ({names})")
        if self.http.tls_certificate and not own.client_url.startswith("https:"):
            raise ValueError(f"cluster.nodes: http_url of {own.id} must begin with https://, because http.tls_certificate is set")
        if self.cluster.max_frame_bytes < max(self.raft.max_block_bytes, self.http.max_produce_body_bytes) + MIB:
            raise ValueError("cluster.max_frame_bytes must exceed raft.max_block_bytes and http.max_produce_body_bytes by 1 MiB")


SECTIONS: dict[str, type[Any]] = {
    "http": HttpConfig,
    "storage": StorageConfig,
    "raft": RaftConfig,
    "cluster": ClusterConfig,
    "topics": TopicsConfig,
    "auth": AuthConfig,
    "logging": LoggingConfig,
}


def settings() -> Iterator[tuple[str, "attrs.Attribute[Any]"]]:
    """Every setting as (section name, attribute), in the order of declaration."""
    for name, section in SECTIONS.items():
        for attribute in attrs.fields(section):
            yield name, attribute
