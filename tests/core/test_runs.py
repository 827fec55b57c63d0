"""Runs: what goes in comes out, by every way of reading it; damage never goes unnoticed; version 1 is what it was."""

import struct
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayder.errors import CorruptLog
from ayder.records import Record
from ayder.runs import (
    HEADERS,
    KEYS,
    RUN_HEADER_BYTES,
    TIMESTAMPS,
    Run,
    decode_headers,
    encode_records,
    encode_run,
    encode_values,
    merge_runs,
    run_length,
)

GOLDEN = Path(__file__).parent / "golden"

values = st.lists(st.binary(max_size=12), min_size=1, max_size=20)
header_lists = st.lists(st.tuples(st.text(min_size=1, max_size=6), st.binary(max_size=6)), max_size=3).map(tuple)
record_lists = st.lists(
    st.builds(
        Record,
        value=st.binary(max_size=12),
        key=st.binary(max_size=6),
        headers=header_lists,
        timestamp_ms=st.none() | st.integers(0, 2**53),
    ),
    min_size=1,
    max_size=20,
)
producers = st.just(b"") | st.binary(min_size=17, max_size=40)


def gapped(lines: list[bytes]) -> bytes:
    """Lines as one run that kept the LF between them."""
    ends = [end + i for i, end in enumerate(accumulate(map(len, lines)))]
    return encode_run(3, 2, len(lines), struct.pack(f"<{len(ends)}I", *ends), b"\n".join(lines), gap=1)


def assert_holds(run: Run, records: list[Record]) -> None:
    """Every reader of the run agrees with the list, for every slice of it."""
    run.verify()
    assert (run.count, run_length(run.data)) == (len(records), len(run.data))
    assert run.record_bytes == sum(len(r.value) + len(r.key) for r in records)
    assert [run.value(i) for i in range(run.count)] == [r.value for r in records]
    for i in range(run.count + 1):
        assert run.bytes_until(i) == sum(len(r.value) + len(r.key) for r in records[:i])
    for first in range(run.count):
        for last in range(first + 1, run.count + 1):
            part = records[first:last]
            assert run.values(first, last) == [r.value for r in part]
            assert run.keys(first, last) == [r.key for r in part]
            assert [tuple(decode_headers(blob)) for blob in run.headers(first, last)] == [r.headers for r in part]
            assert_columns_hold(run, first, last, part)


def assert_columns_hold(run: Run, first: int, last: int, part: list[Record]) -> None:
    ends, blob, start = run.value_columns(first, last)
    assert cut(ends, blob, start, run.gap) == [r.value for r in part]
    if run.flags & KEYS:
        assert cut(*run.blob_columns(KEYS, first, last), 0) == [r.key for r in part]
    if run.flags & HEADERS:
        assert cut(*run.blob_columns(HEADERS, first, last), 0) == run.headers(first, last)
    stamps = [-1 if r.timestamp_ms is None else r.timestamp_ms for r in part]
    assert (run.timestamps(first, last) or [-1] * len(part)) == stamps
    assert list(run.timestamp_column(first, last).cast("q") if run.flags & TIMESTAMPS else stamps) == stamps


def cut(ends: memoryview, blob: memoryview, start: int, gap: int) -> list[bytes]:
    """A column read the way the module doc of ``http/pages.py`` tells a client to."""
    found, at = [], 0
    for end in ends.cast("I"):
        found.append(bytes(blob[at : end - start]))
        at = end - start + gap
    return found


@settings(max_examples=60, deadline=None)
@given(values, producers)
def test_bare_values(given_values: list[bytes], producer: bytes) -> None:
    run = Run(encode_values(3, 2, given_values, producer=producer))
    assert (run.uid, run.flags, run.gap, run.producer) == (3 << 16 | 2, 0, 0, producer)
    assert_holds(run, [Record(value) for value in given_values])


@settings(max_examples=80, deadline=None)
@given(record_lists, producers)
def test_records_with_what_they_carry(records: list[Record], producer: bytes) -> None:
    run = Run(encode_records(3, 2, records, producer=producer))
    assert run.producer == producer
    assert bool(run.flags & KEYS) == any(r.key for r in records)
    assert bool(run.flags & HEADERS) == any(r.headers for r in records)
    assert bool(run.flags & TIMESTAMPS) == any(r.timestamp_ms is not None for r in records)
    assert_holds(run, records)


@settings(max_examples=60, deadline=None)
@given(values)
def test_values_that_kept_their_line_feeds(lines: list[bytes]) -> None:
    assert_holds(Run(gapped(lines)), [Record(line) for line in lines])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(values, st.booleans(), st.integers(0, 2**42)), min_size=1, max_size=4))
def test_merging_keeps_values_and_times(parts: list[tuple[list[bytes], bool, int]]) -> None:
    runs = [(Run(gapped(lines) if kept else encode_values(3, 2, lines)), time_ms) for lines, kept, time_ms in parts]
    merged = Run(merge_runs(runs))
    assert merged.uid == 3 << 16 | 2
    assert_holds(merged, [Record(line, timestamp_ms=time_ms) for lines, _, time_ms in parts for line in lines])


SAMPLE = [
    Record(b"alpha", b"k1", (("h", b"v"), ("h2", b"\xff")), 1_700_000_000_123),
    Record(b"", b"", (), None),
    Record("ü\n".encode(), b"\x00", (("ä", b""),), 0),
]


@pytest.mark.parametrize("data", [encode_records(7, 1023, SAMPLE, producer=b"d" * 16 + b"key"), gapped([b"a", b"", b"ccc"])])
def test_no_truncation_and_no_flipped_bit_goes_unnoticed(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(CorruptLog):
            Run(data[:length]).verify()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptLog):
            Run(bytes(damaged)).verify()
    with pytest.raises(CorruptLog):
        Run(data + b"\0").verify()


GOLDEN_RUNS = {
    "run-values.bin": encode_values(1, 0, [b"a", b"", b"\x00\xff", b"longer"]),
    "run-lines.bin": gapped([b"one", b"", b"three"]),
    "run-producer.bin": encode_values(1, 3, [b"x"], producer=bytes(range(16)) + b"retry-1"),
    "run-records.bin": encode_records(7, 1023, SAMPLE, producer=b"d" * 16 + b"key"),
}


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_version_1_is_what_it_was(name: str) -> None:
    """These bytes are on people's disks: another layout needs another version number."""
    stored = (GOLDEN / name).read_bytes()
    assert GOLDEN_RUNS[name] == stored
    Run(stored).verify()


def test_golden_records_read_back() -> None:
    assert_holds(Run((GOLDEN / "run-records.bin").read_bytes()), SAMPLE)
    assert Run((GOLDEN / "run-lines.bin").read_bytes()).values(0, 3) == [b"one", b"", b"three"]


def test_another_version_is_refused() -> None:
    data = bytearray(encode_values(1, 0, [b"a"]))
    data[4] = 2
    with pytest.raises(CorruptLog, match="version 2"):
        Run(bytes(data))


def test_a_run_of_no_records_is_none() -> None:
    with pytest.raises(CorruptLog):
        Run(encode_run(1, 0, 0, b"", b""))
    assert len(encode_run(1, 0, 0, b"", b"")) == RUN_HEADER_BYTES


def test_the_limits_of_a_header() -> None:
    """What HTTP lets in (names of 255 bytes, values of 65535) is what the format holds."""
    record = Record(b"v", headers=(("n" * 255, b"v" * 0xFFFF),))
    assert decode_headers(Run(encode_records(1, 0, [record])).headers(0, 1)[0]) == list(record.headers)
