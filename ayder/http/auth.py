"""Who asks: bearer tokens, and what each of them may do.

Owns: the ``Authorization`` header, the comparison with the accepted digests, what a scope covers. Must not know: routes, rate
limits (``admission.py``), where tokens come from.

A scope is an action with an optional pattern for the resource: ``produce:orders.*``, ``consume:*``, ``kv:app``, ``admin``,
``metrics``; an action without a pattern covers every resource, ``*`` covers everything. In a pattern ``*`` stands for any
characters, the dot for itself. Routes may also ask for ``describe``, which is no scope of its own: who may read, write or
administer something may see that it is there.

Invariants: only digests are compared, all of them each time, each in constant time, so the time an answer takes says nothing
about how close a guess was; whoever is not accepted learns only that. Sync, pure. Source: RFC 6750 section 2.1, RFC 9110 11.4.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final

import attrs

from ayder.config_sections import AuthConfig, TokenConfig
from ayder.errors import AyderError, ErrorCode

__all__ = ["ANONYMOUS", "Authenticator", "Principal"]

_SCHEME: Final = b"bearer"
_REMEMBERED_ANSWERS = 4096
DESCRIBE: Final = "describe"
_DESCRIBING: Final = ("consume", "produce", "admin")


class _Grants:
    """What a set of scopes covers, with the answers that were already worked out."""

    __slots__ = ("_answers", "_patterns", "everything")

    def __init__(self, scopes: Iterable[str]) -> None:
        self.everything = False
        self._patterns: dict[str, list[re.Pattern[str]]] = {}
        self._answers: dict[tuple[str, str], bool] = {}
        for scope in scopes:
            action, _, pattern = scope.partition(":")
            if action == "*":
                self.everything = True
            else:
                self._patterns.setdefault(action, []).append(_compiled(pattern or "*"))
        described = [pattern for action in _DESCRIBING for pattern in self._patterns.get(action, ())]
        if described:
            self._patterns[DESCRIBE] = described

    def cover(self, action: str, resource: str | None) -> bool:
        if resource is None:
            return action in self._patterns
        answer = self._answers.get((action, resource))
        if answer is None:
            answer = any(pattern.fullmatch(resource) for pattern in self._patterns.get(action, ()))
            if len(self._answers) >= _REMEMBERED_ANSWERS:
                self._answers.clear()
            self._answers[action, resource] = answer
        return answer


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)


@attrs.frozen(slots=True, eq=False)
class Principal:
    """Whose request it is. The rate settings are per token; ``None`` is no limit."""

    name: str
    scopes: tuple[str, ...] = ("*",)
    requests_per_second: int | None = None
    burst: int | None = None
    daily: int | None = None
    _grants: _Grants = attrs.field(init=False, repr=False)

    @_grants.default
    def _compile_scopes(self) -> _Grants:
        return _Grants(self.scopes)

    @property
    def everything(self) -> bool:
        """Whether no action on any resource is closed to this principal."""
        return self._grants.everything

    def allows(self, action: str, resource: str | None = None) -> bool:
        """Whether ``action`` on ``resource`` is granted; without a resource: on at least one."""
        return self._grants.everything or self._grants.cover(action, resource)

    def require(self, action: str, resource: str | None = None) -> None:
        """Raise ``AyderError`` (forbidden) naming the scope that is missing."""
        if not self.allows(action, resource):
            action = _DESCRIBING[0] if action == DESCRIBE else action
            scope = action if resource is None else f"{action}:{resource}"
            raise AyderError(ErrorCode.FORBIDDEN, f"this token lacks the scope {scope!r}", scope=scope)


ANONYMOUS: Final = Principal("anonymous")
"""Who asks for a path that ``auth.skip_prefixes`` leaves open: full rights, no limits, as with the predecessor."""


class Authenticator:
    """The accepted tokens. The last header that was accepted is kept, so a client that repeats it costs one comparison."""

    def __init__(self, config: AuthConfig) -> None:
        self._accepted = tuple((bytes.fromhex(token.sha256), _principal(token)) for token in config.tokens)
        self._open_prefixes = tuple(prefix.encode() for prefix in config.skip_prefixes)
        self._last_header = b""
        self._last_principal = ANONYMOUS

    def is_open(self, path: bytes) -> bool:
        """Whether this path, as it came, needs no token."""
        return bool(self._open_prefixes) and path.startswith(self._open_prefixes)

    def authenticate(self, header: bytes | None) -> Principal:
        """Whose ``Authorization`` header this is. Raises ``AyderError`` (unauthorized), in the same words for every reason."""
        if header and hmac.compare_digest(header, self._last_header):
            return self._last_principal
        principal = self._find(header or b"")
        if principal is None or not header:
            raise AyderError(ErrorCode.UNAUTHORIZED, "a valid bearer token is needed")
        self._last_header, self._last_principal = header, principal
        return principal

    def _find(self, header: bytes) -> Principal | None:
        """Scheme in any case; the space behind it may be missing (clients of the predecessor)."""
        if header[: len(_SCHEME)].lower() != _SCHEME:
            return None
        digest = hashlib.sha256(header[len(_SCHEME) :].strip(b" \t")).digest()
        found = None
        for accepted, principal in self._accepted:
            if hmac.compare_digest(digest, accepted):
                found = principal
        return found


def _principal(token: TokenConfig) -> Principal:
    return Principal(token.name, token.scopes, token.requests_per_second, token.burst, token.daily)
