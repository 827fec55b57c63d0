"""How often each token may ask: a bucket that refills, and a quota for the UTC day.

Owns: the state of the limits and the three headers that report it. Must not know: tokens, routes, clocks (the time is handed
in), what a refusal looks like.

Invariants: a refused request costs neither a bucket token nor quota; a clock that goes back refills nothing and gives no second
quota; the state is one entry per configured token, so it cannot grow. Volatile: a restart begins with full buckets.
Source: PREDECESSOR A3; RFC 6585 section 4.
"""

from __future__ import annotations

import math
from typing import Protocol

from ayder.errors import AyderError, ErrorCode
from ayder.http.exchange import Headers

__all__ = ["Limits", "RateLimiter", "rate_headers"]

_DAY_S = 86_400


class Limits(Protocol):
    """What the limiter reads of a principal."""

    @property
    def name(self) -> str:
        """The token's name, unique among tokens."""
        ...

    @property
    def requests_per_second(self) -> int | None:
        """Refill of the bucket."""
        ...

    @property
    def burst(self) -> int | None:
        """Size of the bucket; ``None``: as the refill."""
        ...

    @property
    def daily(self) -> int | None:
        """Requests in one UTC day."""
        ...


class _Spent:
    """What one token has used."""

    __slots__ = ("day", "filled_at_s", "tokens", "used_today")

    def __init__(self, tokens: float, now_s: float) -> None:
        self.tokens = tokens
        self.filled_at_s = now_s
        self.day = int(now_s // _DAY_S)
        self.used_today = 0


class RateLimiter:
    """The limits of all tokens of one node."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._spent: dict[str, _Spent] = {}

    def check(self, principal: Limits, now_s: float) -> Headers | None:
        """Count a request at ``now_s`` (Unix time, seconds); returns the headers for its answer, ``None`` without limits.

        Raises ``AyderError`` (rate_limited) with ``retry_after`` in seconds and the values of the three headers.
        """
        rate, daily = principal.requests_per_second, principal.daily
        if (rate is None and daily is None) or not self.enabled:
            return None
        size = float(principal.burst or rate or 0)
        spent = self._spent.get(principal.name)
        if spent is None:
            spent = self._spent[principal.name] = _Spent(size, now_s)
        _advance(spent, rate, size, now_s)
        if daily is not None and spent.used_today >= daily:
            midnight = (spent.day + 1) * _DAY_S
            _refuse("the daily quota of this token is used up", max(1, math.ceil(midnight - now_s)), rate or daily, 0, midnight)
        if rate is not None:
            if spent.tokens < 1:
                _refuse("this token asks too often", 1, rate, 0, int(now_s) + 1)
            spent.tokens -= 1
        spent.used_today += 1
        if rate is not None:
            return rate_headers(rate, int(spent.tokens), int(now_s) + 1)
        assert daily is not None
        return rate_headers(daily, daily - spent.used_today, (spent.day + 1) * _DAY_S)


def _advance(spent: _Spent, rate: int | None, size: float, now_s: float) -> None:
    if now_s > spent.filled_at_s:
        if rate is not None:
            spent.tokens = min(size, spent.tokens + (now_s - spent.filled_at_s) * rate)
        spent.filled_at_s = now_s
    day = int(now_s // _DAY_S)
    if day > spent.day:
        spent.day, spent.used_today = day, 0


def _refuse(message: str, retry_after: int, limit: int, remaining: int, reset: int) -> None:
    raise AyderError(
        ErrorCode.RATE_LIMITED, message,
        retry_after=retry_after, rate_limit=limit, rate_remaining=remaining, rate_reset=reset,
    )  # fmt: skip


def rate_headers(limit: int, remaining: int, reset: int) -> Headers:
    """The three headers: requests allowed, requests left now, Unix time in seconds when more are."""
    return (
        (b"x-ratelimit-limit", b"%d" % limit),
        (b"x-ratelimit-remaining", b"%d" % remaining),
        (b"x-ratelimit-reset", b"%d" % reset),
    )
