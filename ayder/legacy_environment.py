"""The environment of the predecessor (``PORT``, ``RF_*``, ``BP_*``, ``RL_*``), turned into settings of ours.

Owns: the old names, their grammar and their precedence. Must not know: which settings exist beyond the paths it writes, files,
the process environment. Source: the predecessor's own parsing, whose odd corners clients rely on (numbers of any size, text
after a number ignored, ``dev@scope:token2`` being one token).

Invariants: a name that is set is honoured, refused, or named in the one warning; never silently ignored. A name set to the
empty string counts as not set.
"""

import hashlib
import re
from collections.abc import Mapping

import attrs

__all__ = ["LegacySettings", "translate"]

MAX_TOKENS = 128
MAX_TOKEN_BYTES = 127

# What the predecessor applied to a token that named no limits of its own.
RATE_DEFAULTS = (("RL_DEFAULT_RPS", 50), ("RL_DEFAULT_BURST", 100), ("RL_DEFAULT_DAILY", 100_000))

LEVELS = {"debug": "debug", "info": "info", "warn": "warning", "warning": "warning", "error": "error", "fatal": "critical"}

WRITE_MODES = {"0": "async", "1": "sync-majority", "2": "sync-all"}

NODE = re.compile(r"([^:\s]+):(\[[^\]\s]+\]|[^:\s]+):([0-9]{1,5})(?::([0-9]{1,9}))?")
"""One of ``RF_HA_NODES``: ``id:host:raft_port[:priority]``; an IPv6 address is in brackets."""

TLS_FILES = {
    "RF_HA_TLS_CA": "cluster.tls_ca",
    "RF_HA_TLS_CERT": "cluster.tls_certificate",
    "RF_HA_TLS_KEY": "cluster.tls_key",
}

MEMBER_NUMBERS = {"RF_HA_REDIRECT_STATUS": "cluster.redirect_status", "RF_HA_RETRY_AFTER": "http.retry_after_s"}

MEMBER_NAMES = {"RF_HA_NODES", "RF_HA_SYNC_MODE", "RF_HA_TLS", *TLS_FILES, *MEMBER_NUMBERS}
"""What counts only where ``RF_HA_ENABLED`` is 1."""

WHOLE_NUMBERS = {
    # later entries win where two names mean one setting
    "RF_HTTP_RETRY_AFTER": "http.retry_after_s",
    "BP_RETRY_AFTER_SEC": "http.retry_after_s",
    "BP_MAX_ACTIVE_CONNS": "http.max_connections",
    "RF_HA_HEARTBEAT_MS": "raft.heartbeat_interval_ms",
    "RF_HA_ELECTION_TIMEOUT_MS": "raft.election_timeout_ms",
}

HONOURED = {
    *WHOLE_NUMBERS,
    *(name for name, _default in RATE_DEFAULTS),
    "PORT",
    "RF_HTTP_PORT",
    "RF_HTTP_ADDR",
    "RF_BEARER_TOKENS",
    "RF_AUTH_SKIP_PREFIXES",
    "RF_HTTP_DISABLE_RL",
    "RF_ROCKET",
    "RF_HA_ENABLED",
    "RF_HA_NODE_ID",
    "LOG_LEVEL",
}

WITHOUT_MEANING = re.compile(r"RF_.+|RAMFORGE_.+|RL_DEFAULT_.+|BP_MAX_SEALED_Q|LOG_TIMESTAMP")
"""What belongs to the predecessor; those of them not in ``HONOURED`` mean nothing here."""


@attrs.define
class LegacySettings:
    """What the old names say: path → (raw value, the name it came from), and what the operator must hear."""

    settings: dict[str, tuple[object, str]] = attrs.Factory(dict)
    warnings: list[str] = attrs.Factory(list)
    mistakes: list[str] = attrs.Factory(list)


def translate(environ: Mapping[str, str], host_name: str = "") -> LegacySettings:
    """Read every old name in ``environ``. Pure; mistakes are collected, not raised.

    A member of a cluster without ``RF_HA_NODE_ID`` is called ``host_name``, or ``HOSTNAME`` where that is not known.
    """
    present = {name: value for name, value in environ.items() if value}
    found = LegacySettings()
    _refuse_what_is_not_built(present, found)
    _listener(present, found)
    _numbers(present, WHOLE_NUMBERS, found)
    _auth(present, found)
    if "RF_HA_NODE_ID" in present:
        found.settings["raft.node_id"] = (present["RF_HA_NODE_ID"], "RF_HA_NODE_ID")
    member = present.get("RF_HA_ENABLED") == "1"
    if member:
        _member(present, host_name or present.get("HOSTNAME", ""), found)
    _log_level(present, found)
    _name_the_rest(present, HONOURED | MEMBER_NAMES if member else HONOURED, found)
    return found


def parse_tokens(text: str, defaults: tuple[int, int, int]) -> list[tuple[str, tuple[int, int, int]]]:
    """The old grammar, ``token[@rps[:burst[:daily]]]`` separated by commas, as (token, (rps, burst, daily)).

    Of two equal tokens the first wins; a number that is missing, zero or no number is the default. Raises ``ValueError`` for
    what the predecessor dropped unsaid: more than 128 tokens, or one of more than 127 bytes.
    """
    tokens: dict[str, tuple[int, int, int]] = {}
    for entry in text.split(","):
        token, _, limits = entry.strip().partition("@")
        if len(token.encode()) > MAX_TOKEN_BYTES:
            raise ValueError(f"a token is longer than {MAX_TOKEN_BYTES} bytes")
        numbers = [_leading_number(part) for part in limits.split(":")[:3]]
        numbers += [0] * (3 - len(numbers))
        if token:
            rps, burst, daily = (number or default for number, default in zip(numbers, defaults, strict=True))
            tokens.setdefault(token, (rps, burst, daily))
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"{len(tokens)} tokens, at most {MAX_TOKENS} are allowed")
    return list(tokens.items())


def _leading_number(text: str) -> int:
    digits = re.match(r"\s*([0-9]{1,400})", text)
    return int(digits[1]) if digits else 0


def _refuse_what_is_not_built(present: Mapping[str, str], found: LegacySettings) -> None:
    if not present.get("RF_ROCKET", "0").startswith("0"):
        found.mistakes.append(
            "environment RF_ROCKET: topics kept in memory are not in this version; unset it, every topic is sealed (durable)"
        )


def _listener(present: Mapping[str, str], found: LegacySettings) -> None:
    """``RF_HTTP_PORT`` > ``PORT`` > ``RF_HTTP_ADDR``. Only the last can name a host; the others leave it as configured."""
    name = next((name for name in ("RF_HTTP_PORT", "PORT", "RF_HTTP_ADDR") if name in present), None)
    if name is None:
        return
    host, colon, port = present[name].rpartition(":") if name == "RF_HTTP_ADDR" else ("", "", present[name])
    if not re.fullmatch(r"[0-9]{1,5}", port.strip()):
        found.mistakes.append(f"environment {name}: expected a port, got {present[name]!r}")
        return
    found.settings["http.port"] = (int(port), name)
    if colon and host:
        found.settings["http.host"] = (host.strip("[]"), name)


def _numbers(present: Mapping[str, str], names: Mapping[str, str], found: LegacySettings) -> None:
    for name, path in names.items():
        if name not in present:
            continue
        if re.fullmatch(r"[0-9]{1,18}", present[name].strip()):
            found.settings[path] = (int(present[name]), name)
        else:
            found.mistakes.append(f"environment {name}: expected a whole number, got {present[name]!r}")


def _member(present: Mapping[str, str], host_name: str, found: LegacySettings) -> None:
    """A member of a cluster. What is missing is a mistake: a node that ran alone instead would answer for unreplicated writes."""
    if "RF_HA_NODES" not in present:
        found.mistakes.append("environment RF_HA_ENABLED=1: RF_HA_NODES must name the nodes (id:host:raft_port[:priority],...)")
        return
    try:
        found.settings["cluster.nodes"] = (parse_nodes(present["RF_HA_NODES"]), "RF_HA_NODES")
    except ValueError as exc:
        found.mistakes.append(f"environment RF_HA_NODES: {exc}")
    if "RF_HA_NODE_ID" not in present and host_name:
        found.settings["raft.node_id"] = (host_name, "RF_HA_NODES (the name of this machine)")
    if "RF_HA_SYNC_MODE" in present:
        mode = WRITE_MODES.get(present["RF_HA_SYNC_MODE"].strip())
        if mode is None:
            found.mistakes.append(f"environment RF_HA_SYNC_MODE: must be 0, 1 or 2, got {present['RF_HA_SYNC_MODE']!r}")
        else:
            found.settings["cluster.write_mode"] = (mode, "RF_HA_SYNC_MODE")
    _numbers(present, MEMBER_NUMBERS, found)
    _member_tls(present, found)


def parse_nodes(text: str) -> list[dict[str, object]]:
    """The old grammar, ``id:host:raft_port[:priority]`` separated by commas, as tables. Raises ``ValueError``."""
    tables = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        parts = NODE.fullmatch(entry)
        if parts is None:
            raise ValueError(f"expected id:host:raft_port[:priority], got {entry!r}")
        table: dict[str, object] = {"id": parts[1], "host": parts[2].strip("[]"), "raft_port": int(parts[3])}
        tables.append(table | ({"priority": int(parts[4])} if parts[4] else {}))
    if not tables:
        raise ValueError("names no node")
    return tables


def _member_tls(present: Mapping[str, str], found: LegacySettings) -> None:
    """``RF_HA_TLS`` 1 demands the files, 0 leaves them aside; without it they are used when they are named."""
    switch = present.get("RF_HA_TLS", "").strip()
    if switch == "0":
        return
    if switch not in ("", "1"):
        found.mistakes.append(f"environment RF_HA_TLS: must be 0 or 1, got {present['RF_HA_TLS']!r}")
    missing = [name for name in TLS_FILES if name not in present]
    if switch == "1" and missing:
        found.mistakes.append(f"environment RF_HA_TLS=1: {', '.join(missing)} must be set")
        return
    found.settings.update((path, (present[name], name)) for name, path in TLS_FILES.items() if name in present)


def _auth(present: Mapping[str, str], found: LegacySettings) -> None:
    if "RF_AUTH_SKIP_PREFIXES" in present:
        prefixes = [part.strip() for part in re.split("[,;]", present["RF_AUTH_SKIP_PREFIXES"]) if part.strip()]
        found.settings["auth.skip_prefixes"] = (prefixes, "RF_AUTH_SKIP_PREFIXES")
    if not present.get("RF_HTTP_DISABLE_RL", "0").startswith("0"):
        found.settings["auth.rate_limits"] = (False, "RF_HTTP_DISABLE_RL")
    if "RF_BEARER_TOKENS" in present:
        rps, burst, daily = (_leading_number(present.get(name, "")) or default for name, default in RATE_DEFAULTS)
        try:
            tokens = parse_tokens(present["RF_BEARER_TOKENS"], (rps, burst, daily))
        except ValueError as exc:
            found.mistakes.append(f"environment RF_BEARER_TOKENS: {exc}")
        else:
            tables = [_token_table(f"legacy-{number}", *token) for number, token in enumerate(tokens, start=1)]
            found.settings["auth.tokens"] = (tables, "RF_BEARER_TOKENS")


def _token_table(name: str, token: str, limits: tuple[int, int, int]) -> dict[str, object]:
    rps, burst, daily = limits
    digest = hashlib.sha256(token.encode()).hexdigest()
    return {"name": name, "sha256": digest, "scopes": ["*"], "requests_per_second": rps, "burst": burst, "daily": daily}


def _log_level(present: Mapping[str, str], found: LegacySettings) -> None:
    """The name is everybody's, so a value only others understand is a warning, not a mistake."""
    if "LOG_LEVEL" not in present:
        return
    level = LEVELS.get(present["LOG_LEVEL"].strip().lower())
    if level is None:
        found.warnings.append(f"environment LOG_LEVEL: {present['LOG_LEVEL']!r} is not a level; it is ignored")
    else:
        found.settings["logging.level"] = (level, "LOG_LEVEL")


def _name_the_rest(present: Mapping[str, str], honoured: set[str], found: LegacySettings) -> None:
    rest = sorted(name for name in present if WITHOUT_MEANING.fullmatch(name) and name not in honoured)
    if "RF_HA_NODES" in rest or present.get("RF_HA_ENABLED", "0") not in ("0", "1"):
        found.warnings.append("RF_HA_ENABLED is not exactly 1: this node is alone, not a member of a cluster")
    if rest:
        found.warnings.append(f"these variables of the predecessor have no meaning here and are ignored: {', '.join(rest)}")
