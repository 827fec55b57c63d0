"""An NDJSON body as the columns of a run, without touching its records one by one where that can be helped.

Owns: splitting, the rule that a line which is one JSON string is stored as that string's characters, the typed record lines.
Must not know: topics, partitions, waiters. Pure.

The usual body (LF between lines, no line a JSON string) is kept whole: its lines become a run whose values still have the LF
between them (``gap`` 1), so the bytes are split once to be counted and never copied record by record.
"""

from __future__ import annotations

import operator
import re
from array import array
from itertools import accumulate, islice
from typing import NamedTuple

import msgspec

from ayder.errors import AyderError, ErrorCode
from ayder.http.params import check_depth
from ayder.records import Record

__all__ = ["Lines", "TypedRecord", "parse_records", "split_lines"]

_LINE = re.compile(rb"(?!\r?(?:\n|\Z))[^\n]+")
"""A line that is not empty, its CR included."""
_TYPED_LINE = re.compile(rb"[^ \t\r\n][^\n]*")
"""From the first byte of a line that is not blank."""
_decode_string = msgspec.json.Decoder(str).decode


class Lines(NamedTuple):
    """The parts of a run of lines: ``runs.encode_run`` takes them as they are."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which has no use here
    ends: bytes
    values: bytes
    gap: int


def split_lines(body: bytes, max_records: int) -> Lines:
    """Lines of ``body``: LF or CRLF, empty lines skipped.

    Raises ``AyderError``: payload_too_large beyond ``max_records`` (a batch is never cut), invalid_request for no line at all.
    """
    text = body[:-1] if body.endswith(b"\n") else body
    breaks = text.count(b"\n")
    if _is_plain(text, breaks):
        _check_count(breaks + 1, max_records)
        lines = text.split(b"\n")
        ends = array("I", map(operator.add, accumulate(map(len, lines)), range(len(lines))))
        return Lines(len(lines), ends.tobytes(), text, 1)
    found = list(islice(_LINE.finditer(text), max_records + 1))  # what is refused is not split to its end
    _check_count(len(found), max_records)
    values = [_value(line.group().removesuffix(b"\r")) for line in found]
    return Lines(len(values), array("I", accumulate(map(len, values))).tobytes(), b"".join(values), 0)


def _is_plain(text: bytes, breaks: int) -> bool:
    """Whether every line is stored as it stands: none empty, none ending in CR, none that could be a JSON string."""
    if text[:1] == b"{" and text.count(b"\n{") == breaks and b"\r" not in text:
        return True  # every line begins an object: the usual batch, told by three scans instead of six
    return not (
        text[:1] in (b"", b"\n", b'"', b" ", b"\t")
        or text.endswith(b"\n")
        or b"\r" in text
        or b"\n\n" in text
        or b'\n"' in text
        or b"\n " in text
        or b"\n\t" in text
    )


def _value(line: bytes) -> bytes:
    stripped = line.strip(b" \t")
    if not (stripped.startswith(b'"') and stripped.endswith(b'"')):
        return line
    try:
        return _decode_string(stripped).encode()
    except (msgspec.MsgspecError, UnicodeError):
        return line


def _check_count(count: int, max_records: int) -> None:
    if count > max_records:
        raise AyderError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"a batch holds at most {max_records} records, this one has more",
            max_records=max_records,
        )
    if count == 0:
        raise AyderError(ErrorCode.INVALID_REQUEST, "the body holds no record", parameter="body")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    value: str | None = None
    value_b64: bytes | None = None
    json: msgspec.Raw = msgspec.Raw()
    key: str | None = None
    key_b64: bytes | None = None
    headers: dict[str, str] = {}
    partition: int | None = None
    timestamp_ms: int | None = None


_decode_line = msgspec.json.Decoder(_Line).decode


class TypedRecord(NamedTuple):
    """One line of ``application/vnd.ayder.records+ndjson``."""

    record: Record
    partition: int | None


def parse_records(body: bytes, *, max_records: int, max_key_bytes: int, max_headers: int) -> list[TypedRecord]:
    """The records of a typed batch. Raises ``AyderError`` naming the line (from 1) of the first mistake."""
    found = list(islice(_TYPED_LINE.finditer(body), max_records + 1))
    _check_count(len(found), max_records)
    records = []
    for number, match in enumerate(found, 1):
        line = match.group()
        try:
            check_depth(line)
            records.append(_typed(_decode_line(line), max_key_bytes, max_headers))
        except AyderError as error:
            raise AyderError(error.code, f"line {number}: {error.message}", **{**error.facts, "line": number}) from None
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise AyderError(ErrorCode.INVALID_REQUEST, f"line {number}: {error}", line=number) from None
    return records


def _typed(line: _Line, max_key_bytes: int, max_headers: int) -> TypedRecord:
    given = (line.value is not None) + (line.value_b64 is not None) + bool(bytes(line.json))
    if given != 1:
        raise AyderError(ErrorCode.INVALID_REQUEST, "exactly one of value, value_b64 and json is needed")
    bytes(line.json).decode()  # kept as it came, so nothing has looked inside its strings yet
    if line.key is not None and line.key_b64 is not None:
        raise AyderError(ErrorCode.INVALID_REQUEST, "key and key_b64 exclude each other")
    value = line.value.encode() if line.value is not None else line.value_b64 if line.value_b64 is not None else bytes(line.json)
    key = line.key.encode() if line.key is not None else line.key_b64 or b""
    if len(key) > max_key_bytes:
        raise AyderError(ErrorCode.INVALID_REQUEST, f"a key has at most {max_key_bytes} bytes, this one {len(key)}")
    if line.timestamp_ms is not None and not 0 <= line.timestamp_ms < 1 << 53:
        raise AyderError(ErrorCode.INVALID_REQUEST, "timestamp_ms must be milliseconds since 1970, below 2^53")
    headers = checked_headers(((name, text.encode()) for name, text in line.headers.items()), max_headers)
    return TypedRecord(Record(value, key, headers, line.timestamp_ms), line.partition)


def checked_headers(headers: object, max_headers: int) -> tuple[tuple[str, bytes], ...]:
    """Record headers within their limits: names of 1…255 bytes, values below 64 KiB. Raises ``AyderError``."""
    checked: tuple[tuple[str, bytes], ...] = tuple(headers)  # type: ignore[arg-type]
    if len(checked) > max_headers:
        raise AyderError(ErrorCode.INVALID_REQUEST, f"a record has at most {max_headers} headers, this one {len(checked)}")
    for name, value in checked:
        if not 1 <= len(name.encode()) <= 255 or len(value) > 0xFFFF:
            raise AyderError(ErrorCode.INVALID_REQUEST, f"header {name[:32]!r}: a name has 1 to 255 bytes, a value at most 65535")
    return checked
