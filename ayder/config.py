"""How the sources of settings become one ``Config``: defaults < TOML < environment < flags.

Owns: the precedence, the spelling of names in each source, and the list of mistakes. Must not know: files, the process
environment, sockets: ``load_config`` is a pure function of what it is given (``launch.py`` reads the real process). What a
setting is, ``config_sections.py`` says; the names of the predecessor are turned into ours by ``legacy_environment.py``.

Invariants: a name nobody knows is a mistake, never silence; all mistakes are reported at once, each with its path and its
source; where each value came from is known afterwards.
"""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from ayder import legacy_environment
from ayder.config_sections import (
    SECTIONS,
    AuthConfig,
    ClusterConfig,
    Config,
    HttpConfig,
    LoggingConfig,
    MemberConfig,
    RaftConfig,
    StorageConfig,
    TokenConfig,
    TopicsConfig,
    is_loopback,
    settings,
)

__all__ = [
    "CONFIG_FILE_VARIABLE",
    "DEV_TOKEN",
    "AuthConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "HttpConfig",
    "LoggingConfig",
    "MemberConfig",
    "RaftConfig",
    "StorageConfig",
    "TokenConfig",
    "TopicsConfig",
    "is_loopback",
    "load_config",
    "settings",
    "token_hash",
]

CONFIG_FILE_VARIABLE = "AYDER_CONFIG"
"""Environment variable that names the TOML file where there is no command line (the hypercorn launch)."""

DEV_TOKEN = "dev"
"""The well-known token of a node that only this machine can reach."""

PREFIX = "AYDER_"

# A Kubernetes service called "ayder" puts these into every pod beside it; they are not meant for us.
SERVICE_LINK = re.compile(r"AYDER_(SERVICE_(HOST|PORT)|PORT)(_.*)?")

LISTS_OF_TEXT = tuple[str, ...]


class ConfigError(Exception):
    """The settings are wrong. ``mistakes`` holds one sentence each, all of them, path first."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


@attrs.define
class Sources:
    """The raw values gathered so far: later sources overwrite earlier ones."""

    values: dict[str, Any] = attrs.Factory(dict)
    """Section → setting → raw value, as the TOML file would have it."""
    origins: dict[str, str] = attrs.Factory(dict)
    mistakes: list[str] = attrs.Factory(list)

    def put(self, path: str, value: object, origin: str) -> None:
        section, _, name = path.partition(".")
        table = self.values.setdefault(section, {})
        if isinstance(table, dict):  # else the file's mistake is reported when it is structured
            table[name] = value
        self.origins[path] = origin

    def put_text(self, path: str, text: str, origin: str) -> None:
        """Take a value written as text (environment, flag); what cannot be read is a mistake."""
        try:
            self.put(path, read_text(TYPES[path], text), origin)
        except ValueError as exc:
            self.mistakes.append(f"{path}: {exc} (from {origin})")


TYPES: dict[str, Any] = {}
for _section in SECTIONS.values():
    attrs.resolve_types(_section)
for _entry in (TokenConfig, MemberConfig):
    attrs.resolve_types(_entry)
TYPES.update((f"{section}.{attribute.name}", attribute.type) for section, attribute in settings())


def load_config(
    argv_settings: Mapping[str, str],
    environ: Mapping[str, str],
    toml_text: str | None,
    *,
    bind_known: bool = True,
    host_name: str = "",
) -> Config:
    """Join the sources. ``argv_settings`` maps ``section.key`` to text. Pure.

    Without a configured token, a node that only this machine can reach accepts ``DEV_TOKEN``; any other has no token at all,
    and ``launch.py`` makes one. ``bind_known=False`` says that somebody else opens the listener, so ``http.host`` proves nothing.
    ``host_name`` is this machine's; the predecessor's variables name a node by it (else by ``HOSTNAME``).
    Raises ``ConfigError`` with every mistake.
    """
    sources = Sources()
    _take_toml(sources, toml_text)
    legacy = legacy_environment.translate(environ, host_name)
    for path, (value, name) in legacy.settings.items():
        sources.put(path, value, f"environment {name}")
    _take_environment(sources, environ)
    _take_flags(sources, argv_settings)
    mistakes = sources.mistakes + legacy.mistakes
    try:
        config = CONVERTER.structure(sources.values, Config)
    except ClassValidationError as exc:
        mistakes += _explain(exc, sources.origins)
    else:
        if config.cluster.nodes and "raft.node_id" not in sources.origins:
            mistakes.append("raft.node_id: must say which of cluster.nodes this node is")  # two that guess would be one node
    if mistakes:
        raise ConfigError(mistakes)
    origins = {path: sources.origins.get(path, "default") for path in TYPES}
    config = attrs.evolve(config, origins=origins, warnings=tuple(legacy.warnings))
    return _with_dev_token(_as_member(config), bind_known)


def _as_member(config: Config) -> Config:
    """A member of a cluster listens where its entry says that clients reach it, where nothing else was said."""
    own = config.cluster.member(config.raft.node_id)
    if own is None:
        return config
    # Behind a proxy that speaks TLS for us, the URL is the proxy's.
    proxied = own.client_url.startswith("https:") and not config.http.tls_certificate
    host, port = (own.host, own.raft_port + 1) if proxied else own.client_address
    derived: dict[str, Any] = {
        name: value for name, value in (("host", host), ("port", port)) if config.origins[f"http.{name}"] == "default"
    }
    origins = {**config.origins, **{f"http.{name}": "derived from cluster.nodes" for name in derived}}
    config = attrs.evolve(config, http=attrs.evolve(config.http, **derived), origins=origins)
    return attrs.evolve(config, warnings=(*config.warnings, *_member_warnings(config, own)))


def _member_warnings(config: Config, own: MemberConfig) -> Iterator[str]:
    if not own.http_url and config.http.port != own.raft_port + 1:
        yield (
            f"this node listens on port {config.http.port}, but the others send clients to {own.client_url}: "
            f"set http_url of {own.id} in cluster.nodes"
        )
    if len(config.cluster.nodes) > 1 and not config.auth.tokens and not is_loopback(config.http.host):
        yield "auth.tokens is empty: each node makes a token of its own, and a client sent to another node is refused there"


def _with_dev_token(config: Config, bind_known: bool) -> Config:
    """Apply the rule for a node without tokens; ``insecure_dev`` adds the token everywhere, and says so."""
    auth, warnings = config.auth, config.warnings
    if auth.insecure_dev:
        warnings += (f"auth.insecure_dev is on: anyone who can reach this node may use the token {DEV_TOKEN!r}",)
    elif auth.tokens or not bind_known or not is_loopback(config.http.host):
        return config
    dev = TokenConfig(name="dev", sha256=token_hash(DEV_TOKEN))
    if any(token.name == dev.name or token.sha256 == dev.sha256 for token in auth.tokens):
        return config
    return attrs.evolve(config, auth=attrs.evolve(auth, tokens=(*auth.tokens, dev)), warnings=warnings)


# ---- the sources ----


def _take_toml(sources: Sources, text: str | None) -> None:
    try:
        sources.values = tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as exc:
        sources.mistakes.append(f"configuration file: not valid TOML: {exc}")
    for section, table in sources.values.items():
        if isinstance(table, dict):
            sources.origins.update((f"{section}.{name}", "file") for name in table)


def _take_environment(sources: Sources, environ: Mapping[str, str]) -> None:
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name == CONFIG_FILE_VARIABLE or SERVICE_LINK.fullmatch(name):
            continue
        path = name.removeprefix(PREFIX).lower().replace("__", ".", 1)
        if path in TYPES and name.isupper():
            sources.put_text(path, text, f"environment {name}")
        else:
            sources.mistakes.append(f"environment {name}: no such setting{_did_you_mean(path, _variable)}")


def _take_flags(sources: Sources, argv_settings: Mapping[str, str]) -> None:
    for path, text in argv_settings.items():
        if path in TYPES:
            sources.put_text(path, text, "flag")
        else:
            sources.mistakes.append(f"flag --set {path}: no such setting{_did_you_mean(path, str)}")


def _variable(path: str) -> str:
    return PREFIX + path.upper().replace(".", "__")


def _did_you_mean(path: str, spell: Any) -> str:
    near = difflib.get_close_matches(path, TYPES, n=1)
    return f"; did you mean {spell(near[0])}?" if near else ""


def read_text(kind: Any, text: str) -> Any:
    """What ``text`` means for a setting of type ``kind``; a list has commas, or is written as in TOML. Raises ``ValueError``."""
    if kind is bool:
        return _read_bool(text)
    if kind is int and re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()):
        return int(text)
    if kind is float and re.fullmatch(r"[+-]?[0-9]*\.?[0-9]+", text.strip()):
        return float(text)
    if kind is str:
        return text
    if kind == LISTS_OF_TEXT and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind in (int, float):
        raise ValueError(f"expected a {'whole ' if kind is int else ''}number, got {text!r}")
    return _read_array(text)


def _read_array(text: str) -> Any:
    """An array as TOML or JSON writes it; of text that is neither, what TOML says is wrong. Raises ``ValueError``."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as exc:
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError(f"expected an array of TOML or JSON, got {text!r}: {exc}") from None


def _read_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise ValueError(f"expected true or false, got {text!r}")
    return word in ("true", "1", "yes", "on")


# ---- structuring: strict types, limits checked setting by setting so that every mistake is found in one go ----


def _exactly(kind: type, what: str) -> Any:
    def structure(value: object, _type: Any) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise TypeError(f"expected {what}, got {value!r}")
        return value

    return structure


def _structure_texts(value: object, _type: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise TypeError(f"expected a list of strings, got {value!r}")
    return tuple(value)


def _structure_tables(entry: type[Any]) -> Any:
    def structure(value: object, _type: Any) -> Any:
        if not isinstance(value, list):
            raise TypeError("expected an array of tables")
        return tuple(CONVERTER.structure(value, list[entry]))  # type: ignore[valid-type]

    return structure


def _structure_optional_int(value: object, _type: Any) -> int | None:
    return None if value is None else CONVERTER.structure(value, int)


def _table_hook(cls: type[Any]) -> Any:
    """A structure function for one section: unknown names refused, each value checked against its own limits."""

    def checked(attribute: "attrs.Attribute[Any]") -> Any:
        def hook(value: object, kind: Any) -> Any:
            structured = CONVERTER.structure(value, kind)
            if attribute.validator is not None:
                attribute.validator(None, attribute, structured)
            return structured

        return override(struct_hook=hook)

    overrides = {attribute.name: checked(attribute) for attribute in attrs.fields(cls)}
    structure = make_dict_structure_fn(cls, CONVERTER, _cattrs_forbid_extra_keys=True, **overrides)

    def table(value: object, kind: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"expected a table, got {value!r}")
        return structure(value, kind)

    return table


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    converter.register_structure_hook(int, _exactly(int, "a whole number"))
    converter.register_structure_hook(float, _exactly(float, "a number"))
    converter.register_structure_hook(bool, _exactly(bool, "true or false"))
    converter.register_structure_hook(str, _exactly(str, "a string"))
    converter.register_structure_hook_func(lambda kind: kind == LISTS_OF_TEXT, _structure_texts)
    converter.register_structure_hook_func(lambda kind: kind == tuple[TokenConfig, ...], _structure_tables(TokenConfig))
    converter.register_structure_hook_func(lambda kind: kind == tuple[MemberConfig, ...], _structure_tables(MemberConfig))
    converter.register_structure_hook_func(lambda kind: kind == int | None, _structure_optional_int)
    return converter


CONVERTER = _converter()
_TABLES: tuple[type[Any], ...] = (TokenConfig, MemberConfig, *SECTIONS.values())
for _table in _TABLES:
    CONVERTER.register_structure_hook(_table, _table_hook(_table))
CONVERTER.register_structure_hook(
    Config,
    make_dict_structure_fn(
        Config, CONVERTER, _cattrs_forbid_extra_keys=True, origins=override(omit=True), warnings=override(omit=True)
    ),
)


def _explain(error: ClassValidationError, origins: Mapping[str, str]) -> list[str]:
    """Every mistake in one cattrs error, as ``path: what (from where)``."""
    lines = []
    for text in cattrs.transform_error(error, path="", format_exception=_sentence):
        what, _, path = text.rpartition(" @ ")
        path = path.lstrip(".")
        origin = origins.get(path) or origins.get(path.partition("[")[0])
        lines.append(f"{path}: {what} (from {origin})" if origin else f"{path}: {what}" if path else what)
    return lines


def _sentence(error: BaseException, _kind: type | None) -> str:
    if isinstance(error, ForbiddenExtraKeysError):
        return f"no such setting: {', '.join(sorted(error.extra_fields))}"
    if isinstance(error, KeyError):
        return "is missing"
    return str(error)


# ---- what other modules ask about settings ----


def token_hash(token: str) -> str:
    """The hex SHA-256 of a token, as ``TokenConfig.sha256`` wants it."""
    return hashlib.sha256(token.encode()).hexdigest()
