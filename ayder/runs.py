"""A run: consecutive records of one partition as they lie in a block, on disk, in the cache and in a binary page.

Owns: the columnar byte layout of a run, building and slicing it. Must not know: blocks, files, offsets (a run gets its base
offset only when it is applied; the offset index keeps it).

Everything a page needs is found by arithmetic: column ``ends`` holds the cumulative end of each value, so record ``i`` is
``values[ends[i-1] + gap : ends[i]]`` (``gap`` is 1 when the values still have the LF between them they came with, else 0).
Layout, little-endian (docs/storage-format.md has the diagram)::

    u32 crc32c of all that follows | u8 version | u8 flags | u8 gap | u8 0 | u32 topic_id | u32 partition | u32 count
    u32 values_length | u32 keys_length | u32 headers_length | u16 producer_length | u16 0 | u32 record_bytes
    producer | ends u32[] | key_ends u32[] if KEYS | header_ends u32[] if HEADERS | timestamps i64[] if TIMESTAMPS
    keys | headers | values

``producer`` is a 16-byte digest of the body followed by the idempotency key. ``record_bytes`` counts values and keys.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import accumulate

import crc32c

from ayder.errors import CorruptLog
from ayder.records import PartitionUid, Record, partition_uid

__all__ = [
    "HEADERS",
    "KEYS",
    "RUN_HEADER_BYTES",
    "TIMESTAMPS",
    "Run",
    "decode_headers",
    "encode_records",
    "encode_run",
    "encode_values",
    "merge_runs",
    "run_length",
    "run_place",
]

RUN_VERSION = 1
KEYS, HEADERS, TIMESTAMPS = 1, 2, 4
DIGEST_BYTES = 16

_HEADER = struct.Struct("<I4B6IHHI")
_AFTER_CRC = struct.Struct("<4B6IHHI")
RUN_HEADER_BYTES = _HEADER.size
assert RUN_HEADER_BYTES == 40
assert array("I").itemsize == 4


def encode_run(
    topic_id: int,
    partition: int,
    count: int,
    columns: bytes,
    values: bytes,
    *,
    flags: int = 0,
    gap: int = 0,
    keys: bytes = b"",
    headers: bytes = b"",
    producer: bytes = b"",
) -> bytes:
    """Join the parts of a run and put its header with the checksum before them."""
    head = _AFTER_CRC.pack(
        RUN_VERSION,
        flags,
        gap,
        0,
        topic_id,
        partition,
        count,
        len(values),
        len(keys),
        len(headers),
        len(producer),
        0,
        len(values) - gap * max(0, count - 1) + len(keys),
    )
    body = b"".join((head, producer, columns, keys, headers, values))
    return crc32c.crc32c(body).to_bytes(4, "little") + body


def encode_values(topic_id: int, partition: int, values: Sequence[bytes], *, producer: bytes = b"") -> bytes:
    """A run of bare values: no keys, headers or own timestamps. The loops are in C."""
    ends = array("I", accumulate(map(len, values)))
    return encode_run(topic_id, partition, len(values), ends.tobytes(), b"".join(values), producer=producer)


def encode_records(topic_id: int, partition: int, records: Sequence[Record], *, producer: bytes = b"") -> bytes:
    """A run of records with whatever of keys, headers and timestamps they carry; absent columns are left out."""
    columns = array("I", accumulate(len(record.value) for record in records)).tobytes()
    keys = [record.key for record in records]
    headers = [_encode_headers(record.headers) for record in records]
    flags = 0
    if any(keys):
        flags |= KEYS
        columns += array("I", accumulate(map(len, keys))).tobytes()
    if any(headers):
        flags |= HEADERS
        columns += array("I", accumulate(map(len, headers))).tobytes()
    if any(record.timestamp_ms is not None for record in records):
        flags |= TIMESTAMPS
        columns += array("q", (-1 if record.timestamp_ms is None else record.timestamp_ms for record in records)).tobytes()
    return encode_run(
        topic_id,
        partition,
        len(records),
        columns,
        b"".join(record.value for record in records),
        flags=flags,
        keys=b"".join(keys),
        headers=b"".join(headers),
        producer=producer,
    )


def merge_runs(runs: Sequence[tuple[Run, int]]) -> bytes:
    """One run of the records of consecutive runs without columns of their own; each keeps its log time as its timestamp.

    What a producer of one record a block leaves behind is read back as if it had come in a batch.
    """
    values: list[bytes] = []
    times: list[int] = []
    for run, log_time_ms in runs:
        assert not run.flags, run.flags
        values += run.values(0, run.count)
        times += [log_time_ms] * run.count
    uid = runs[0][0].uid
    columns = array("I", accumulate(map(len, values))).tobytes() + array("q", times).tobytes()
    return encode_run(uid >> 16, uid & 0xFFFF, len(values), columns, b"".join(values), flags=TIMESTAMPS)


def run_place(run: bytes) -> tuple[int, int, bool]:
    """Partition (uid), number of records, and whether a repeat of it can be recognised. Nothing is verified."""
    _, _, _, _, _, topic_id, partition, count, _, _, _, producer_length, _, _ = _HEADER.unpack_from(run)
    return topic_id << 16 | partition, count, bool(producer_length)


def run_length(head: bytes | memoryview, position: int = 0) -> int:
    """Bytes of the run whose header starts at ``position``."""
    _, _, flags, _, _, _, _, count, values, keys, headers, producer, _, _ = _HEADER.unpack_from(head, position)
    length: int = RUN_HEADER_BYTES + producer + keys + headers + values
    return length + _columns_length(flags, count)


def _columns_length(flags: int, count: int) -> int:
    words = 1 + (flags & KEYS != 0) + (flags & HEADERS != 0) + 2 * (flags & TIMESTAMPS != 0)
    return 4 * words * count


class Run:
    """A run read back: its columns as lists, made when first asked for. ``data`` starts at the CRC."""

    __slots__ = (
        "_columns_at",
        "_ends",
        "_values_at",
        "count",
        "data",
        "flags",
        "gap",
        "headers_length",
        "keys_length",
        "producer",
        "record_bytes",
        "uid",
        "values_length",
    )

    def __init__(self, data: bytes) -> None:
        """Raises ``CorruptLog`` when the bytes cannot be a run."""
        if len(data) < RUN_HEADER_BYTES:
            raise CorruptLog(f"a run of {len(data)} bytes has no room for its header")
        (
            _,
            version,
            self.flags,
            self.gap,
            _,
            topic_id,
            partition,
            self.count,
            self.values_length,
            self.keys_length,
            self.headers_length,
            producer_length,
            _,
            self.record_bytes,
        ) = _HEADER.unpack_from(data)
        if version != RUN_VERSION:
            raise CorruptLog(f"run version {version}: this release reads version {RUN_VERSION}")
        self.data = data
        self.uid: PartitionUid = partition_uid(topic_id, partition)
        self._columns_at = RUN_HEADER_BYTES + producer_length
        self.producer = data[RUN_HEADER_BYTES : self._columns_at]
        self._values_at = self._columns_at + _columns_length(self.flags, self.count) + self.keys_length + self.headers_length
        if self.count < 1 or self._values_at + self.values_length != len(data):
            raise CorruptLog(f"a run of {self.count} records says {self._values_at + self.values_length} bytes, has {len(data)}")
        self._ends: list[int] | None = None

    def verify(self) -> None:
        """Raises ``CorruptLog`` when the bytes do not match their checksum."""
        if crc32c.crc32c(memoryview(self.data)[4:]) != int.from_bytes(self.data[:4], "little"):
            raise CorruptLog(f"a run of {self.count} records fails its checksum")

    @property
    def ends(self) -> list[int]:
        """Cumulative end of each value inside the values column."""
        if self._ends is None:
            self._ends = self._column(0, self.count)
        return self._ends

    def _column(self, word: int, count: int) -> list[int]:
        start = self._columns_at + 4 * word * self.count
        return memoryview(self.data)[start : start + 4 * count].cast("I").tolist()

    def value(self, i: int) -> bytes:
        """The value of record ``i`` of the run."""
        ends = self.ends
        at = self._values_at
        return self.data[at + (ends[i - 1] + self.gap if i else 0) : at + ends[i]]

    def values(self, first: int, last: int) -> list[bytes]:
        """The values of records ``first..last-1``."""
        at, ends = self._values_at, self.ends
        begin = ends[first - 1] + self.gap if first else 0
        blob = self.data[at + begin : at + ends[last - 1]]
        cuts = [end - begin for end in ends[first:last]] if first else ends[:last]
        starts = [cut + self.gap for cut in cuts] if self.gap else cuts
        return [blob[start:end] for start, end in zip([0, *starts], cuts, strict=False)]

    def keys(self, first: int, last: int) -> list[bytes]:
        """The keys of records ``first..last-1``; all empty when the run has no keys."""
        if not self.flags & KEYS:
            return [b""] * (last - first)
        return self._blobs(1, self._values_at - self.headers_length - self.keys_length, first, last)

    def headers(self, first: int, last: int) -> list[bytes]:
        """The encoded headers of records ``first..last-1`` (``decode_headers``); all empty when the run has none."""
        if not self.flags & HEADERS:
            return [b""] * (last - first)
        return self._blobs(1 + (self.flags & KEYS != 0), self._values_at - self.headers_length, first, last)

    def timestamps(self, first: int, last: int) -> list[int] | None:
        """Own timestamps of records ``first..last-1``, -1 where a record has none; ``None`` when no record has one."""
        if not self.flags & TIMESTAMPS:
            return None
        start = self._columns_at + 4 * self.count * (1 + (self.flags & KEYS != 0) + (self.flags & HEADERS != 0))
        return memoryview(self.data)[start + 8 * first : start + 8 * last].cast("q").tolist()

    def bytes_until(self, i: int) -> int:
        """Record bytes (values and keys) of the first ``i`` records: what trimming them frees."""
        if i <= 0:
            return 0
        key_bytes = self._end_at(1, i - 1) if self.flags & KEYS else 0
        value_bytes: int = self._end_at(0, i - 1) - self.gap * (i - 1)
        return value_bytes + key_bytes

    def weight_until(self, i: int) -> int:
        """Bytes of the first ``i`` records with their keys and headers: what they cost a page. No work per record."""
        if i >= self.count:
            whole: int = self.record_bytes + self.headers_length
            return whole
        header_bytes = self._end_at(1 + (self.flags & KEYS != 0), i - 1) if i > 0 and self.flags & HEADERS else 0
        return self.bytes_until(i) + header_bytes

    def _blobs(self, word: int, at: int, first: int, last: int) -> list[bytes]:
        ends = self._column(word, last)
        starts = [0, *ends]
        return [self.data[at + starts[i] : at + ends[i]] for i in range(first, last)]

    def value_columns(self, first: int, last: int) -> tuple[memoryview, memoryview, int]:
        """What a binary page sends of records ``first..last-1``: ends column, values, the position value ``first`` starts at.

        No work per record: two cuts.
        """
        view = memoryview(self.data)
        start = self._end_at(0, first - 1) + self.gap if first else 0
        at = self._columns_at
        return (
            view[at + 4 * first : at + 4 * last],
            view[self._values_at + start : self._values_at + self._end_at(0, last - 1)],
            start,
        )

    def blob_columns(self, flag: int, first: int, last: int) -> tuple[memoryview, memoryview, int]:
        """The same for the keys (``KEYS``) or the headers (``HEADERS``), which the run must have."""
        view = memoryview(self.data)
        word = 1 if flag == KEYS else 1 + (self.flags & KEYS != 0)
        blob_at = self._values_at - self.headers_length - (self.keys_length if flag == KEYS else 0)
        start = self._end_at(word, first - 1) if first else 0
        at = self._columns_at + 4 * word * self.count
        return view[at + 4 * first : at + 4 * last], view[blob_at + start : blob_at + self._end_at(word, last - 1)], start

    def timestamp_column(self, first: int, last: int) -> memoryview:
        """The own timestamps of records ``first..last-1`` as they lie; empty when the run has none."""
        if not self.flags & TIMESTAMPS:
            return memoryview(b"")
        at = self._columns_at + 4 * self.count * (1 + (self.flags & KEYS != 0) + (self.flags & HEADERS != 0))
        return memoryview(self.data)[at + 8 * first : at + 8 * last]

    def _end_at(self, word: int, i: int) -> int:
        at = self._columns_at + 4 * (word * self.count + i)
        return int.from_bytes(self.data[at : at + 4], "little")


def _encode_headers(headers: tuple[tuple[str, bytes], ...]) -> bytes:
    """Headers of one record: per header u8 name length, name, u16 value length, value."""
    parts = []
    for name, value in headers:
        encoded = name.encode()
        parts.append(bytes((len(encoded),)) + encoded + len(value).to_bytes(2, "little") + value)
    return b"".join(parts)


def decode_headers(blob: bytes) -> list[tuple[str, bytes]]:
    """The headers of one record, in the order they came."""
    headers = []
    at = 0
    while at < len(blob):
        name_end = at + 1 + blob[at]
        value_end = name_end + 2 + int.from_bytes(blob[name_end : name_end + 2], "little")
        headers.append((blob[at + 1 : name_end].decode(), blob[name_end + 2 : value_end]))
        at = value_end
    return headers
