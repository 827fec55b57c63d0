"""Typed query parameters, percent-decoding, and the one place that says which parameter was wrong.

Owns: how a query string is read. Must not know: routes, what a parameter means. Names are case-sensitive, the first occurrence
wins, unknown ones are ignored (old clients send some); values are percent-decoded exactly once, ``+`` is a space.
Source: API.md section 1; WHATWG URL, application/x-www-form-urlencoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from ayder.errors import AyderError, ErrorCode

__all__ = ["Query", "decode_json", "decode_segment", "invalid", "parse_query"]

_INTEGER = re.compile(rb"-?[0-9]{1,19}")
_INT64_MAX = (1 << 63) - 1
MAX_JSON_DEPTH = 32
_CACHE_ENTRIES = 1024
_CACHED_BYTES = 96
_parsed: dict[bytes, dict[bytes, bytes]] = {}


def invalid(parameter: str, message: str) -> AyderError:
    """The error for a parameter or field that cannot be used."""
    return AyderError(ErrorCode.INVALID_REQUEST, f"{parameter}: {message}", parameter=parameter)


def parse_query(raw: bytes) -> Mapping[bytes, bytes]:
    """The parameters of a raw query string. Short ones are remembered: a client tends to send the same one again."""
    found = _parsed.get(raw)
    if found is not None:
        return found
    parameters: dict[bytes, bytes] = {}
    for part in raw.split(b"&"):
        if part:
            name, _, value = part.partition(b"=")
            parameters.setdefault(_decode(name), _decode(value))
    if len(raw) <= _CACHED_BYTES and b"key" not in raw:
        if len(_parsed) >= _CACHE_ENTRIES:
            _parsed.clear()
        _parsed[raw] = parameters
    return parameters


def _decode(value: bytes) -> bytes:
    if b"+" in value:
        value = value.replace(b"+", b" ")
    if b"%" in value:
        if re.search(rb"%(?![0-9A-Fa-f]{2})", value):
            raise invalid(value[:64].decode("ascii", "replace"), "a % must be followed by two hexadecimal digits")
        value = unquote_to_bytes(value)
    return value


def decode_segment(segment: bytes) -> bytes:
    """A path segment, percent-decoded once. Raises ``AyderError`` (invalid_request) for a broken escape."""
    if b"%" not in segment:
        return segment
    if re.search(rb"%(?![0-9A-Fa-f]{2})", segment):
        raise invalid("path", "a % must be followed by two hexadecimal digits")
    return unquote_to_bytes(segment)


class Query:
    """Typed access to one request's parameters. Every method raises ``AyderError`` (invalid_request) naming the parameter."""

    __slots__ = ("_values",)

    def __init__(self, raw: bytes) -> None:
        self._values = parse_query(raw) if raw else {}

    def __contains__(self, name: bytes) -> bool:
        return name in self._values

    def integer(self, name: str, default: int | None = None, *, least: int = 0, most: int = _INT64_MAX) -> int | None:
        """A decimal integer in ``least..most``; ``default`` when the parameter is absent or empty."""
        raw = self._values.get(name.encode(), b"")
        if not raw:
            return default
        if not _INTEGER.fullmatch(raw) or not least <= (value := int(raw)) <= most:
            raise invalid(name, f"must be an integer from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        """``1`` or ``true``; absent, empty, ``0`` or ``false`` is False."""
        raw = self._values.get(name.encode(), b"")
        if raw in (b"", b"0", b"false"):
            return False
        if raw in (b"1", b"true"):
            return True
        raise invalid(name, "must be 1 or 0")

    def raw(self, name: str, *, max_bytes: int) -> bytes:
        """The decoded bytes, ``b""`` when absent."""
        value = self._values.get(name.encode(), b"")
        if len(value) > max_bytes:
            raise invalid(name, f"must be at most {max_bytes} bytes, got {len(value)}")
        return value

    def text(self, name: str, default: str = "", *, choices: tuple[str, ...] = ()) -> str:
        """Decoded UTF-8 text; one of ``choices`` when they are given."""
        raw = self._values.get(name.encode(), b"")
        if not raw:
            return default
        try:
            value = raw.decode()
        except UnicodeDecodeError:
            raise invalid(name, "must be UTF-8") from None
        if choices and value not in choices:
            raise invalid(name, f"must be one of {', '.join(choices)}")
        return value


def decode_json(decode: Callable[[bytes], Any], body: bytes) -> Any:
    """Decode a JSON body with a msgspec decoder.

    Raises ``AyderError``: invalid_json where it is no JSON (bad UTF-8, NaN, too deep, an integer beyond 64 bits where one is
    asked for), missing_fields where a field is absent, invalid_request where one has the wrong type, is unknown or out of range.
    """
    try:
        check_depth(body)
        return decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        code = ErrorCode.MISSING_FIELDS if "missing required field" in message else ErrorCode.INVALID_REQUEST
        raise AyderError(code, message) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AyderError(ErrorCode.INVALID_JSON, f"the body is not valid JSON: {error}") from None


def check_depth(body: bytes) -> None:
    """Raise ``AyderError`` (invalid_json) when brackets nest deeper than 32 levels; brackets in strings are not counted."""
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    depth, in_string, escaped = 0, False, False
    for byte in body:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise AyderError(ErrorCode.INVALID_JSON, f"the body nests deeper than {MAX_JSON_DEPTH} levels")
        elif byte in b"]}":
            depth -= 1
