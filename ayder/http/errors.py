"""The one table from an error to a status, and the one error body.

Owns: statuses and the error format. Must not know: who raised. Checked total at import: a code without a row does not start.
Rule (API.md section 1): 4xx and 503 surely did not happen and never will; 504 and 500 nobody knows.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ayder.errors import AyderError, ErrorCode, Outcome
from ayder.http.exchange import Response

__all__ = ["STATUS", "error_response"]

STATUS: Final[dict[ErrorCode, int]] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.INVALID_JSON: 400,
    ErrorCode.MISSING_FIELDS: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.ROUTE_NOT_FOUND: 404,
    ErrorCode.TOPIC_NOT_FOUND: 404,
    ErrorCode.PARTITION_NOT_FOUND: 404,
    ErrorCode.GROUP_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.NOT_ACCEPTABLE: 406,
    ErrorCode.REQUEST_TIMEOUT: 408,
    ErrorCode.TOPIC_EXISTS: 409,
    ErrorCode.OFFSET_BEYOND_END: 409,
    ErrorCode.CHANGE_IN_PROGRESS: 409,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.URI_TOO_LONG: 414,
    ErrorCode.OFFSET_OUT_OF_RANGE: 416,
    ErrorCode.IDEMPOTENCY_KEY_REUSED: 422,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.HEADERS_TOO_LARGE: 431,
    ErrorCode.NOT_SUPPORTED: 400,
    ErrorCode.OVERLOADED: 503,
    ErrorCode.STORAGE_FULL: 503,
    ErrorCode.SHUTTING_DOWN: 503,
    ErrorCode.NOT_LEADER: 503,
    ErrorCode.NO_QUORUM: 503,
    ErrorCode.SEALED_ONLY: 503,
    ErrorCode.COMMIT_TIMEOUT: 504,
    ErrorCode.STORAGE_DAMAGED: 500,
    ErrorCode.INTERNAL: 500,
}

assert set(STATUS) == set(ErrorCode), f"codes without a status: {set(ErrorCode) - set(STATUS)}"
for _code, _status in STATUS.items():
    assert (_status in (500, 504)) == (_code.outcome is Outcome.UNKNOWN), f"{_code} says {_code.outcome} but answers {_status}"

_RATE_HEADERS: Final = tuple((f"rate_{name}", b"x-ratelimit-" + name.encode()) for name in ("limit", "remaining", "reset"))
_encode = msgspec.json.Encoder().encode


def error_response(error: AyderError, *, retry_after_s: int = 1) -> Response:
    """The answer for an error: the one body, and the headers its status calls for."""
    status = STATUS[error.code]
    body = {"ok": False, "error": error.code.wire, "message": error.message, "outcome": error.code.outcome.value, **error.facts}
    headers: list[tuple[bytes, bytes]] = [(b"cache-control", b"no-store")]
    if status == 503 or status == 429:
        headers.append((b"retry-after", b"%d" % error.facts.get("retry_after", retry_after_s)))
        headers += [(header, b"%d" % error.facts[fact]) for fact, header in _RATE_HEADERS if fact in error.facts]
    elif status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="Ayder", error="invalid_token"'))
    elif status == 405:
        headers.append((b"allow", ", ".join(error.facts.get("allow", ())).encode()))
    return Response(status, _encode(body), headers=tuple(headers))
