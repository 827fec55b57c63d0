"""The bucket and the daily quota of a token, by a clock the test holds."""

import pytest

from ayder.errors import AyderError, ErrorCode
from ayder.http.admission import RateLimiter
from ayder.http.auth import Principal
from tests.http.in_process import Client, running, scoped_tokens

NOON = 20_000 * 86_400 + 43_200
LIMIT, REMAINING, RESET = b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"


def principal(rps: int | None = None, burst: int | None = None, daily: int | None = None) -> Principal:
    return Principal("p", ("*",), rps, burst, daily)


def refused(limiter: RateLimiter, who: Principal, now_s: float) -> dict[str, int]:
    with pytest.raises(AyderError) as caught:
        limiter.check(who, now_s)
    assert caught.value.code is ErrorCode.RATE_LIMITED
    return caught.value.facts


def test_a_token_without_limits_has_no_headers() -> None:
    assert RateLimiter().check(principal(), NOON) is None


def test_switched_off_limits_neither_count_nor_show() -> None:
    limiter = RateLimiter(enabled=False)
    assert [limiter.check(principal(1, 1, 1), NOON) for _ in range(3)] == [None] * 3


def test_the_bucket_lets_its_burst_through_and_then_its_rate() -> None:
    limiter, who = RateLimiter(), principal(rps=2, burst=3)
    shown = [dict(limiter.check(who, NOON) or ()) for _ in range(3)]
    assert [each[REMAINING] for each in shown] == [b"2", b"1", b"0"]
    assert shown[0][LIMIT] == b"2" and shown[0][RESET] == b"%d" % (NOON + 1)
    assert refused(limiter, who, NOON) == {"retry_after": 1, "rate_limit": 2, "rate_remaining": 0, "rate_reset": NOON + 1}
    limiter.check(who, NOON + 0.5)
    refused(limiter, who, NOON + 0.5)
    for _ in range(3):
        limiter.check(who, NOON + 100)
    refused(limiter, who, NOON + 100)


def test_a_refused_request_costs_nothing() -> None:
    limiter, who = RateLimiter(), principal(rps=1, burst=1, daily=2)
    limiter.check(who, NOON)
    for _ in range(50):
        refused(limiter, who, NOON)
    limiter.check(who, NOON + 1)
    assert refused(limiter, who, NOON + 2)["retry_after"] > 1


def test_the_day_ends_at_utc_midnight() -> None:
    limiter, who = RateLimiter(), principal(rps=10, daily=1)
    limiter.check(who, NOON)
    facts = refused(limiter, who, NOON + 1.5)
    midnight = NOON + 43_200
    assert facts["retry_after"] == 43_199 and facts["rate_reset"] == midnight
    refused(limiter, who, midnight - 0.001)
    assert limiter.check(who, midnight) is not None


def test_a_quota_alone_shows_itself_in_the_headers() -> None:
    shown = dict(RateLimiter().check(principal(daily=5), NOON) or ())
    assert shown == {LIMIT: b"5", REMAINING: b"4", RESET: b"%d" % (NOON + 43_200)}


def test_a_clock_that_goes_back_refills_nothing_and_gives_no_second_quota() -> None:
    limiter, who = RateLimiter(), principal(rps=1, burst=1, daily=2)
    limiter.check(who, NOON)
    refused(limiter, who, NOON - 86_400)
    limiter.check(who, NOON + 1)
    assert refused(limiter, who, NOON + 2 - 86_400)["retry_after"] > 1


def test_tokens_do_not_share_their_buckets() -> None:
    limiter = RateLimiter()
    limiter.check(Principal("a", ("*",), 1, 1), NOON)
    limiter.check(Principal("b", ("*",), 1, 1), NOON)
    refused(limiter, Principal("a", ("*",), 1, 1), NOON)


async def test_a_limited_token_sees_the_headers_on_answers_and_refusals() -> None:
    toml = scoped_tokens(slow="*") + "\nrequests_per_second = 1\nburst = 2\ndaily = 2"
    async with running(toml) as client:
        slow = Client(client.node, "slow")
        replies = [await slow.call("GET", "/broker/topics") for _ in range(3)]
        assert [reply.status for reply in replies] == [200, 200, 429]
        assert all({LIMIT, REMAINING, RESET} <= reply.headers.keys() for reply in replies)
        assert int(replies[2].headers[b"retry-after"]) == replies[2].json()["retry_after"] > 0
        assert replies[2].json()["error"] == "rate_limited"
        free = await client.call("GET", "/broker/topics")
        assert free.status == 200 and LIMIT not in free.headers
        assert (await slow.call("GET", "/health")).status == 200
