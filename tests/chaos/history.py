"""What clients did and what they were told: the record that a checker judges.

Owns: the shape of a history, its JSONL form, the recorder. Must not know: HTTP, processes, what is right or wrong.

An invocation is recorded before its first byte is sent, a completion after the last byte of the answer arrived; a file's order is
the order of real time, because one recorder in one task scheduler writes it. An operation without a completion stays open to
infinity, like one whose outcome is unknown. Values are unique, so a record is known by its *fingerprint*: the id its value begins
with and a hash over every byte of key, value and headers. Source: RELIABILITY.md 3.6.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple

import msgspec

__all__ = [
    "Commit", "Committed", "Completion", "DeleteBefore", "Event", "FinalPartition", "Invocation", "Outcome", "Page",
    "ProcessEvent", "Produce", "Read", "Receipt", "Recorder", "RunReceipt", "Sent", "Trimmed", "fingerprint", "load",
]  # fmt: skip

Outcome = Literal["ok", "refused", "unknown"]
"""It happened as said; it did not and never will; nobody knows."""


def fingerprint(value: bytes, key: bytes = b"", headers: Mapping[str, str] | None = None) -> str:
    """The id the value begins with (up to the first space), and a hash of everything."""
    identity = value.split(b" ", 1)[0][:80].decode("latin-1")
    digest = hashlib.blake2b(len(key).to_bytes(4, "big") + key + value, digest_size=6)
    for name, text in sorted((headers or {}).items()):
        digest.update(f"\0{name}\0{text}".encode())
    return f"{identity}#{digest.hexdigest()}"


class Sent(NamedTuple):
    """One record of a produce call; ``partition`` is ``None`` where the server chooses."""

    fingerprint: str
    partition: int | None = None


# -- what was asked -------------------------------------------------------------------------------------------------
class Produce(msgspec.Struct, tag="produce", frozen=True):
    """One call; its records are taken together or not at all."""

    topic: str
    records: tuple[Sent, ...]
    idempotency_key: str | None = None


class Read(msgspec.Struct, tag="read", frozen=True):
    """A page; ``offset`` is ``None`` where the group's committed offset decides."""

    topic: str
    partition: int
    offset: int | None = None
    group: str | None = None


class Commit(msgspec.Struct, tag="commit", frozen=True):
    """``offset`` is the last record processed."""

    topic: str
    partition: int
    group: str
    offset: int


class DeleteBefore(msgspec.Struct, tag="delete-before", frozen=True):
    """Records below ``before_offset`` may go."""

    topic: str
    partition: int
    before_offset: int


# -- what was answered ----------------------------------------------------------------------------------------------
class RunReceipt(NamedTuple):
    """Consecutive records of one partition."""

    partition: int
    first_offset: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which has no use here


class Receipt(msgspec.Struct, tag="receipt", frozen=True):
    """The answer to a produce call."""

    runs: tuple[RunReceipt, ...]
    batch_id: int
    duplicate: bool = False
    sealed: bool = True
    durable: bool = True
    synced: bool | None = True
    mode: str = "sealed"


class Page(msgspec.Struct, tag="page", frozen=True):
    """The answer to a read: fingerprints in order, the first one at ``start``."""

    start: int
    records: tuple[str, ...]
    next_offset: int
    high_watermark: int
    log_start_offset: int
    committed: int | None = None


class Committed(msgspec.Struct, tag="committed", frozen=True):
    """The answer to a commit."""

    ignored: bool
    batch_id: int


class Trimmed(msgspec.Struct, tag="trimmed", frozen=True):
    """The answer to delete-before."""

    log_start_offset: int


Action = Produce | Read | Commit | DeleteBefore
Result = Receipt | Page | Committed | Trimmed


# -- events ---------------------------------------------------------------------------------------------------------
class Invocation(msgspec.Struct, tag="invoke", frozen=True):
    """An operation begins."""

    id: int
    client: str
    at_ns: int
    action: Action


class Completion(msgspec.Struct, tag="complete", frozen=True):
    """An operation ends as far as its client knows. ``status`` 0: no answer."""

    id: int
    at_ns: int
    outcome: Outcome
    status: int = 0
    result: Result | None = None
    detail: str = ""


class ProcessEvent(msgspec.Struct, tag="process", frozen=True):
    """Something happened to the server: ``serving``, ``killed`` …"""

    at_ns: int
    what: str


class FinalPartition(msgspec.Struct, tag="final", frozen=True):
    """All of a partition, read when the faults were over: the record at ``log_start_offset + n`` is ``records[n]``."""

    topic: str
    partition: int
    log_start_offset: int
    high_watermark: int
    records: tuple[str, ...]
    committed: dict[str, int] = {}


Event = Invocation | Completion | ProcessEvent | FinalPartition

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


class Recorder:
    """Writes a history, one JSON object a line, and keeps it in memory for the checker. One thread."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self.events: list[Event] = []
        self._file: IO[bytes] = path.open("wb")
        self._clock_ns = clock_ns
        self._next_id = 0

    def invoke(self, client: str, action: Action) -> int:
        """Before the first byte is sent. Returns the operation's id."""
        self._next_id += 1
        self._write(Invocation(self._next_id, client, self._clock_ns(), action))
        return self._next_id

    def complete(self, op: int, outcome: Outcome, *, status: int = 0, result: Result | None = None, detail: str = "") -> None:
        """After the last byte of the answer, or when there will be none."""
        self._write(Completion(op, self._clock_ns(), outcome, status, result, detail))

    def process(self, what: str) -> None:
        """Something happened to the server."""
        self._write(ProcessEvent(self._clock_ns(), what))

    def final(self, partition: FinalPartition) -> None:
        """What a partition held at the end."""
        self._write(partition)

    def close(self) -> None:
        """The file is complete."""
        self._file.close()

    def _write(self, event: Event) -> None:
        self.events.append(event)
        self._file.write(_encode(event) + b"\n")


def load(path: Path) -> Sequence[Event]:
    """The history a recorder wrote. Raises ``msgspec.ValidationError`` for a line that is none of its."""
    with path.open("rb") as file:
        return [_decode(line) for line in file]
