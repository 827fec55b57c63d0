"""What every launch does before there is a node: read the settings of the real process, and see to it that somebody can log in.

Owns: the configuration file, the process environment, the token file of a data directory. Must not know: Trio, the node, which
launch is using it (``ayder serve`` and the ASGI launch both do).

Invariants: the token file is readable by its owner only and appears whole or not at all; a node is never open to a network
with a token that the documentation prints.
"""

import os
import secrets
import sys
from collections.abc import Mapping

import attrs

from ayder.config import CONFIG_FILE_VARIABLE, Config, ConfigError, TokenConfig, load_config, token_hash

__all__ = ["TOKEN_FILE", "config_from_process", "refuse_optimised", "token_path", "with_token"]

TOKEN_FILE = "token"
MAX_CONFIG_FILE_BYTES = 1 << 20


def refuse_optimised() -> None:
    """Raise ``ConfigError`` under ``python -O``: invariants are checked by assertions, and a node without them must not run."""
    if not __debug__ or sys.flags.optimize:
        raise ConfigError(["python -O (or PYTHONOPTIMIZE) strips the checks that keep data safe: start without it"])


def config_from_process(
    argv_settings: Mapping[str, str] | None = None, *, config_path: str | None = None, bind_known: bool = True
) -> Config:
    """The settings of this process: flags as given, ``os.environ``, and the file (``config_path``, else ``$AYDER_CONFIG``).

    ``bind_known=False`` when somebody else opens the listener (see ``load_config``). Raises ``ConfigError``.
    """
    path = config_path or os.environ.get(CONFIG_FILE_VARIABLE)
    text = _read_config_file(path) if path else None
    return load_config(argv_settings or {}, os.environ, text, bind_known=bind_known, host_name=os.uname().nodename)


def _read_config_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CONFIG_FILE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError([f"configuration file {path}: {exc}"]) from exc
    if len(text) > MAX_CONFIG_FILE_BYTES:
        raise ConfigError([f"configuration file {path}: larger than {MAX_CONFIG_FILE_BYTES} bytes"])
    return text


def token_path(config: Config) -> str:
    """Where the generated token of this data directory is kept."""
    return os.path.join(os.path.abspath(config.storage.data_dir), TOKEN_FILE)


def with_token(config: Config) -> tuple[Config, str | None]:
    """``config`` as it is when it has a token; else with the token of its data directory, made on first use, and that token.

    Blocking (small file). Raises ``ConfigError`` when the file cannot be made or read.
    """
    if config.auth.tokens:
        return config, None
    path = token_path(config)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        token = _read_token(path) or _make_token(path)
    except OSError as exc:
        raise ConfigError([f"no token is configured (auth.tokens) and none can be kept in {path}: {exc}"]) from exc
    generated = TokenConfig(name="data-directory", sha256=token_hash(token))
    return attrs.evolve(config, auth=attrs.evolve(config.auth, tokens=(generated,))), token


def _read_token(path: str) -> str | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            token = file.read(1024).strip()
    except FileNotFoundError:
        return None
    if len(token) < 16:
        raise ConfigError([f"{path} does not hold a token of at least 16 characters; delete it to have a new one made"])
    return token


def _make_token(path: str) -> str:
    """Write aside, then link: of two processes that start at once, one makes the token and both use it."""
    token = secrets.token_urlsafe(24)
    aside = f"{path}.{os.getpid()}"
    descriptor = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            token = _read_token(path) or token
    finally:
        os.unlink(aside)
    _sync_directory(os.path.dirname(path))
    return token


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
