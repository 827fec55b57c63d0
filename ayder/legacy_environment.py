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


def translate(environ: Mapping[str, str]) -> LegacySettings:
    """Read every old name in ``environ``. Pure; mistakes are collected, not raised."""
    present = {name: value for name, value in environ.items() if value}
    found = LegacySettings()
    _refuse_what_is_not_built(present, found)
    _listener(present, found)
    _numbers(present, found)
    _auth(present, found)
    if "RF_HA_NODE_ID" in present:
        found.settings["raft.node_id"] = (present["RF_HA_NODE_ID"], "RF_HA_NODE_ID")
    _log_level(present, found)
    _name_the_rest(present, found)
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
    if present.get("RF_HA_ENABLED") == "1":
        # Running alone would acknowledge writes that the operator believes replicated.
        found.mistakes.append(
            "environment RF_HA_ENABLED=1: this version is a single node and will not pretend to be a cluster; "
            "unset it to run one node"
        )
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


def _numbers(present: Mapping[str, str], found: LegacySettings) -> None:
    for name, path in WHOLE_NUMBERS.items():
        if name not in present:
            continue
        if re.fullmatch(r"[0-9]{1,18}", present[name].strip()):
            found.settings[path] = (int(present[name]), name)
        else:
            found.mistakes.append(f"environment {name}: expected a whole number, got {present[name]!r}")


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


def _name_the_rest(present: Mapping[str, str], found: LegacySettings) -> None:
    rest = sorted(name for name in present if WITHOUT_MEANING.fullmatch(name) and name not in HONOURED)
    if rest:
        found.warnings.append(f"these variables of the predecessor have no meaning here and are ignored: {', '.join(rest)}")
