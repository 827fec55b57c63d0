"""A page of records as bytes: JSON (text or base64), NDJSON, binary frames.

Owns: the message shapes and the frame layout (docs/http-api.md). Must not know: where a page comes from, routes.

A message is built once a record, encoded in C. The binary page does no work per record: a frame is the columns of a run, cut.
Frame, little-endian::

    u32 length of what follows | u32 partition | u64 base_offset | i64 log_time_ms | u32 count | u8 flags | u8 gap | u16 0
    u32 values_start | u32 keys_start | u32 headers_start
    value_ends u32[count] | key_ends u32[count] if flags & 1 | header_ends u32[count] if flags & 2
    timestamps i64[count] if flags & 4
    keys if flags & 1 | headers if flags & 2 | values

Record ``i``'s value is ``values[value_ends[i-1] + gap - values_start : value_ends[i] - values_start]``, with 0 for the first
start; keys and headers likewise, without a gap.
"""

from __future__ import annotations

import struct
from itertools import repeat

import msgspec

from ayder.fetch import Page, Slice
from ayder.records import partition_of
from ayder.runs import HEADERS, KEYS, TIMESTAMPS, decode_headers

__all__ = ["encode_messages", "render_binary", "render_json", "render_ndjson"]

_FRAME = struct.Struct("<IIQqIBBHIII")


class _Base64Message(msgspec.Struct, omit_defaults=True):
    offset: int
    partition: int
    value_b64: bytes
    timestamp_ms: int
    key_b64: bytes = b""
    headers: dict[str, str] | None = None


class _TextMessage(msgspec.Struct, omit_defaults=True):
    offset: int
    partition: int
    key: str
    timestamp_ms: int
    value: str | msgspec.UnsetType = msgspec.UNSET
    value_b64: bytes | msgspec.UnsetType = msgspec.UNSET
    key_b64: bytes | msgspec.UnsetType = msgspec.UNSET
    headers: dict[str, str] | None = None


_encoder = msgspec.json.Encoder()


def render_json(page: Page, *, b64: bool, committed: int | None, extra: bytes = b"") -> bytes:
    """The old reply: ``messages`` and where the reader stands. ``extra`` is more fields, each beginning with a comma."""
    messages: list[_Base64Message] | list[_TextMessage] = _base64_messages(page) if b64 else _text_messages(page)
    return (
        b'{"messages":%b,"count":%d,"next_offset":%d,"committed_offset":%b,"truncated":%b,"log_start_offset":%d,"high_watermark":%d%b}'
        % (
            _encoder.encode(messages),
            page.count,
            page.next_offset,
            b"null" if committed is None else b"%d" % committed,
            b"true" if page.truncated else b"false",
            page.log_start_offset,
            page.high_watermark,
            extra,
        )
    )


def render_ndjson(page: Page, *, b64: bool) -> bytes:
    """A message a line."""
    return _encoder.encode_lines(_base64_messages(page) if b64 else _text_messages(page))


def encode_messages(page: Page, *, b64: bool) -> list[bytes]:
    """Each message by itself, in offset order."""
    messages: list[_Base64Message] | list[_TextMessage] = _base64_messages(page) if b64 else _text_messages(page)
    return [_encoder.encode(message) for message in messages]


def _base64_messages(page: Page) -> list[_Base64Message]:
    partition = partition_of(page.uid)
    messages: list[_Base64Message] = []
    for piece in page.slices:
        cached = piece.cached
        run, first, last = cached.run, piece.first, piece.last
        base, time_ms = cached.base_offset, cached.log_time_ms
        values = run.values(first, last)
        if not run.flags:
            messages += map(_Base64Message, range(base + first, base + last), repeat(partition), values, repeat(time_ms))
            continue
        if run.flags == TIMESTAMPS:
            offsets = range(base + first, base + last)
            messages += map(_Base64Message, offsets, repeat(partition), values, _stamps(piece))
            continue
        for i, (value, key, headers, stamp) in enumerate(
            zip(values, run.keys(first, last), run.headers(first, last), _stamps(piece), strict=True), base + first
        ):
            messages.append(_Base64Message(i, partition, value, stamp, key, _headers(headers)))
    return messages


def _text_messages(page: Page) -> list[_TextMessage]:
    partition = partition_of(page.uid)
    messages: list[_TextMessage] = []
    for piece in page.slices:
        cached = piece.cached
        run, first, last = cached.run, piece.first, piece.last
        base, time_ms = cached.base_offset, cached.log_time_ms
        values = run.values(first, last)
        if not run.flags:
            try:
                messages += [
                    _TextMessage(offset, partition, "", time_ms, value.decode())
                    for offset, value in enumerate(values, base + first)
                ]
                continue
            except UnicodeDecodeError:
                del messages[max(0, base + first - page.start_offset) :]
        for i, (value, key, headers, stamp) in enumerate(
            zip(values, run.keys(first, last), run.headers(first, last), _stamps(piece), strict=True), base + first
        ):
            messages.append(_text_message(i, partition, value, key, headers, stamp))
    return messages


def _text_message(offset: int, partition: int, value: bytes, key: bytes, headers: bytes, stamp: int) -> _TextMessage:
    message = _TextMessage(offset, partition, "", stamp, headers=_headers(headers))
    try:
        message.value = value.decode()
    except UnicodeDecodeError:
        message.value_b64 = value
    try:
        message.key = key.decode()
    except UnicodeDecodeError:
        message.key_b64 = key
    return message


def _stamps(piece: Slice) -> list[int]:
    cached = piece.cached
    own = cached.run.timestamps(piece.first, piece.last)
    if own is None:
        return [cached.log_time_ms] * (piece.last - piece.first)
    return [cached.log_time_ms if stamp < 0 else stamp for stamp in own]


def _headers(blob: bytes) -> dict[str, str] | None:
    if not blob:
        return None
    return {name: value.decode("utf-8", "replace") for name, value in decode_headers(blob)}


def render_binary(page: Page) -> bytes:
    """The frames of a page, one a run."""
    parts: list[bytes | memoryview] = []
    partition = partition_of(page.uid)
    for piece in page.slices:
        cached, first, last = piece.cached, piece.first, piece.last
        run = cached.run
        value_ends, values, values_start = run.value_columns(first, last)
        columns: list[bytes | memoryview] = [value_ends]
        blobs: list[bytes | memoryview] = []
        keys_start = headers_start = 0
        if run.flags:
            for flag in (KEYS, HEADERS):
                if run.flags & flag:
                    ends, blob, start = run.blob_columns(flag, first, last)
                    columns.append(ends)
                    blobs.append(blob)
                    keys_start, headers_start = (start, headers_start) if flag == KEYS else (keys_start, start)
            columns.append(run.timestamp_column(first, last))
        body = [*columns, *blobs, values]
        length = _FRAME.size - 4 + sum(map(len, body))
        parts.append(
            _FRAME.pack(
                length,
                partition,
                cached.base_offset + first,
                cached.log_time_ms,
                last - first,
                run.flags,
                run.gap,
                0,
                values_start,
                keys_start,
                headers_start,
            )
        )
        parts += body
    return b"".join(parts)
