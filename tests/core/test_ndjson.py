"""Lines of a body: what counts as one, what is stored of it, what is refused and at what cost."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayder.errors import AyderError, ErrorCode
from ayder.http.ndjson import parse_records, split_lines
from ayder.records import Record


def split(body: bytes, most: int = 100) -> list[bytes]:
    lines = split_lines(body, most)
    ends = struct.unpack(f"<{lines.count}I", lines.ends)
    starts = [0, *(end + lines.gap for end in ends[:-1])]
    assert ends[-1] == len(lines.values)
    return [lines.values[start:end] for start, end in zip(starts, ends, strict=True)]


def slowly(body: bytes) -> list[bytes]:
    """The rule of API.md section 3, a line at a time."""
    found = []
    for raw in body.split(b"\n"):
        line = raw.removesuffix(b"\r")
        if not line:
            continue
        stripped = line.strip(b" \t")
        try:
            string = msgspec.json.decode(stripped, type=str) if stripped[:1] == stripped[-1:] == b'"' else None
        except (msgspec.MsgspecError, UnicodeError):
            string = None
        found.append(line if string is None else string.encode())
    return found


ATOMS = [b"\n", b"\r", b"\r\n", b" ", b"\t", b'"', b"\\", b"a", b"{}", b'"x"', b'"a\\nb"', b"\xff", b"\\u00e4"]
pieces = st.lists(st.sampled_from(ATOMS), max_size=14)


@settings(max_examples=400, deadline=None)
@given(pieces)
def test_every_body_gives_the_lines_of_the_rule(parts: list[bytes]) -> None:
    body = b"".join(parts)
    expected = slowly(body)
    if expected:
        assert split(body) == expected
    else:
        with pytest.raises(AyderError) as caught:
            split(body)
        assert caught.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b'{"n":1}\n{"n":2}', [b'{"n":1}', b'{"n":2}']),
        (b"a\r\nb\r\n", [b"a", b"b"]),
        (b"\n\na\n\r\n\nb\n\n", [b"a", b"b"]),
        (b'"text"\n"\\u00fc\\"\\n"\n""', [b"text", "ü\"\n".encode(), b""]),
        (b' "padded" ', [b"padded"]),
        (b'"a","b"', [b'"a","b"']),
        (b'"open\n"bad\\x"', [b'"open', b'"bad\\x"']),
        (b'"\\ud800"', [b'"\\ud800"']),
        (b"a\rb", [b"a\rb"]),
        (b"a\n\n", [b"a"]),
        (b"\xff\xfe\n\x00", [b"\xff\xfe", b"\x00"]),
        (b"one", [b"one"]),
    ],
)  # fmt: skip
def test_d35_lines_are_stored_as_the_rule_says(body: bytes, values: list[bytes]) -> None:
    """Defect D-35: strings cut at their first quote, escapes left as they came."""
    assert split(body) == values


@pytest.mark.parametrize("line", [b"a", b"a\r", b'"a"', b" a"])
def test_d35_a_batch_is_never_cut(line: bytes) -> None:
    """Defect D-35: lines after the thousandth went, and the answer was ok."""
    assert len(split((line + b"\n") * 10, 10)) == 10
    with pytest.raises(AyderError) as caught:
        split((line + b"\n") * 11, 10)
    assert (caught.value.code, caught.value.facts["max_records"]) == (ErrorCode.PAYLOAD_TOO_LARGE, 10)


@pytest.mark.parametrize("body", [b"a\n" * 4_000_000, b'"\n' * 4_000_000, b"{}\n" * 2_700_000])
def test_what_is_refused_is_not_taken_apart_first(
    body: bytes, memory_peak: Callable[[int], AbstractContextManager[None]]
) -> None:
    """Eight megabytes of short lines cost several times their size, on the event loop, before they were refused."""
    with memory_peak(len(body) * 3 // 2):
        for read in (
            lambda: split_lines(body, 1000),
            lambda: parse_records(body, max_records=1000, max_key_bytes=9, max_headers=9),
        ):
            with pytest.raises(AyderError):
                read()


# -- typed lines --------------------------------------------------------------------------------------------------
def parse(*lines: bytes) -> list[tuple[Record, int | None]]:
    body = b"\n".join(lines)
    return [tuple(each) for each in parse_records(body, max_records=50, max_key_bytes=8, max_headers=2)]


def test_typed_lines() -> None:
    assert parse(
        b'{"value":"text"}',
        b"  ",
        b'\t{"value_b64":"AP8=","key":"k","partition":3,"timestamp_ms":5}\r',
        b"\r",
        b'{"json": {"a": [1, 2]}, "key_b64":"/w==","headers":{"h":"v","g":""}}',
        b'{"value":"","key":""}',
        b'{"value_b64":""}',
        b'{"json":null}',
        b'{"value":"\\u00fc \\ud83d\\ude00"}',
    ) == [
        (Record(b"text"), None),
        (Record(b"\x00\xff", b"k", (), 5), 3),
        (Record(b'{"a": [1, 2]}', b"\xff", (("h", b"v"), ("g", b""))), None),
        (Record(b""), None),
        (Record(b""), None),
        (Record(b"null"), None),
        (Record("ü 😀".encode()), None),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"value":"a","json":1}',
        b'{"value":"a","value_b64":"YQ=="}',
        b'{"value":1}',
        b'{"value_b64":"!"}',
        b'{"value":"a","key":"k","key_b64":"aw=="}',
        b'{"value":"a","key":"123456789"}',
        b'{"value":"a","colour":"red"}',
        b'{"value":"a"} b',
        b'{"value":"a"',
        b'{"value":"\\ud800"}',
        b'{"value":"\xff"}',
        b'{"json":"\xff"}',
        b'{"json":NaN}',
        b'{"json":' + b"[" * 60_000 + b"}",
        b'{"json":' + b"[" * 33 + b"]" * 33 + b"}",
        b'{"value":"a","timestamp_ms":-1}',
        b'{"value":"a","timestamp_ms":9007199254740992}',
        b'{"value":"a","timestamp_ms":1.5}',
        b'{"value":"a","timestamp_ms":' + b"9" * 400 + b"}",
        b'{"value":"a","headers":{"a":"1","b":"2","c":"3"}}',
        b'{"value":"a","headers":{"":"1"}}',
        b'{"value":"a","headers":{"a":1}}',
        b'{"value":"a","headers":{"' + b"n" * 256 + b'":"1"}}',
        b'{"value":"a","headers":{"a":"' + b"v" * 65536 + b'"}}',
        b'{"value":"a","headers":null}',
        b'{"value":"a","partition":"0"}',
    ],
)
def test_a_mistake_is_refused_with_its_line(line: bytes) -> None:
    with pytest.raises(AyderError) as caught:
        parse(b'{"value":"first"}', b"", line or b"{", b'{"value":"last"}')
    assert caught.value.code in (ErrorCode.INVALID_REQUEST, ErrorCode.INVALID_JSON)
    assert caught.value.facts["line"] == 2
    assert caught.value.message.startswith("line 2: ")


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_json_is_kept_byte_for_byte(value: object) -> None:
    raw = json.dumps(value).encode()
    assert parse(b'{"json":' + raw + b"}")[0][0].value == raw
