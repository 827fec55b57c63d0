"""Records that can be told apart: numbered lines sent by several connections, and binary pages decoded and compared.

Owns: what record number N looks like, which numbers were acknowledged at which offsets. Must not know: what is measured.
"""

from __future__ import annotations

import http.client
import struct
import threading
from collections.abc import Iterator, Sequence

import attrs

from tests.bench.node import AUTH

__all__ = ["Batch", "Loader", "Pages", "line"]

_FRAME = struct.Struct("<IIQqIBBHIII")
_TIMESTAMPS = 4
_PAD = b"x" * 38


def line(number: int) -> bytes:
    """64 bytes of JSON."""
    return b'{"n":%015d,"v":"%b"}' % (number, _PAD[:36])


@attrs.frozen
class Batch:
    """``count`` records from number ``number`` on were acknowledged from offset ``offset`` on."""

    partition: int
    offset: int
    number: int
    count: int


class Loader:
    """Sends numbered records over several connections, a thread each, until there are enough of them."""

    def __init__(self, port: int, topic: str, partitions: Sequence[int], *, lines: int, connections: int) -> None:
        self._port = port
        self._topic = topic
        self._partitions = partitions
        self._lines = lines
        self._connections = connections
        self._lock = threading.Lock()
        self._next = 0
        self.acknowledged: list[Batch] = []

    def load(self, records: int, *, first: int = 0) -> None:
        """Send record numbers ``first`` … ``first + records - 1``. Raises ``RuntimeError``."""
        self._next, end = first, first + records
        mistakes: list[BaseException] = []

        def work(partition: int) -> None:
            try:
                self._send(partition, end)
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                mistakes.append(error)

        threads = [
            threading.Thread(target=work, args=(self._partitions[n % len(self._partitions)],)) for n in range(self._connections)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if mistakes:
            raise RuntimeError(f"loading failed: {mistakes[0]!r}")

    def _send(self, partition: int, end: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        path = f"/broker/topics/{self._topic}/{'produce-ndjson' if self._lines > 1 else 'produce'}?partition={partition}"
        while (batch := self._take(end)) is not None:
            number, count = batch
            body = b"\n".join([line(n) for n in range(number, number + count)])
            connection.request("POST", path, body, AUTH)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {content[:200]!r}")
            self.acknowledged.append(Batch(partition, _first_offset(content), number, count))
        connection.close()

    def _take(self, end: int) -> tuple[int, int] | None:
        with self._lock:
            number = self._next
            count = min(self._lines, end - number)
            self._next += max(count, 0)
            return (number, count) if count > 0 else None


def _first_offset(answer: bytes) -> int:
    at = answer.index(b'offset":') + 8
    return int(answer[at : answer.index(b",", at)])


class Pages:
    """A sequential reader of binary pages on one connection."""

    def __init__(self, port: int, topic: str, partition: int, *, limit: int = 10000) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._path = f"/broker/topics/{topic}/{partition}/records?limit={limit}&max_bytes={1 << 20}&offset="

    def read(self, offset: int) -> tuple[bytes, int, int]:
        """The page at ``offset``, the next offset, the end of the partition. Raises ``RuntimeError``."""
        self._connection.request("GET", f"{self._path}{offset}", headers=AUTH | {"Accept": "application/octet-stream"})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {content[:200]!r}")
        return content, int(answer.headers["Ayder-Next-Offset"]), int(answer.headers["Ayder-High-Watermark"])

    @staticmethod
    def values(page: bytes) -> Iterator[tuple[int, bytes]]:
        """Offset and value of each record of a page whose records have no key and no headers."""
        at = 0
        while at < len(page):
            length, _, base, _, count, flags, gap, _, start, _, _ = _FRAME.unpack_from(page, at)
            if flags & ~_TIMESTAMPS:
                raise RuntimeError(f"a frame at {base} has columns nobody sent: flags {flags}")
            ends = struct.unpack_from(f"<{count}I", page, at + _FRAME.size)
            columns = (12 if flags else 4) * count
            values = page[at + _FRAME.size + columns : at + 4 + length]
            at += 4 + length
            begin = 0
            for offset, end in enumerate(ends, base):
                yield offset, values[begin : end - start]
                begin = end - start + gap
