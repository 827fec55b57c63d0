"""What gathers while a block is being written: commands that will form the next one, and who waits for each.

Owns: merging single records of a partition into one run, the order of commands, the waiters and their deadlines. Must not
know: Raft, HTTP, what applying does.

One record a request is the common case, so it must cost nearly nothing: its value goes into a list, its waiter into another,
and only when the block is taken are both turned into one columnar run, in C.

Invariants: the records one caller added to a partition keep his order; a command's result goes to exactly its waiters; each
waiter is told once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ayder.commands import (
    BLOCK_HEADER_BYTES,
    COMMAND_HEADER_BYTES,
    RUN,
    BatchHead,
    Command,
    DeleteTopic,
    SetRetention,
    TrimPartitions,
    encode_block,
    encode_command,
)
from ayder.errors import AyderError, ErrorCode
from ayder.runs import RUN_HEADER_BYTES, encode_values
from ayder.state_machine import Appended, Result

__all__ = ["MAKES_ROOM", "AppendWaiter", "PendingBlock", "ResultWaiter"]

MAKES_ROOM = (DeleteTopic, SetRetention, TrimPartitions)
_VALUE_OVERHEAD_BYTES = 4
_RUN_OVERHEAD_BYTES = COMMAND_HEADER_BYTES + RUN_HEADER_BYTES


class AppendWaiter(Protocol):
    """Who waits for records to be on disk and applied."""

    deadline_ns: int
    """Monotonic clock; after it the waiter is told ``commit_timeout``."""
    done: bool
    """Set by whoever told the waiter; nothing more is told to it."""

    def appended(self, base_offset: int, count: int, log_index: int, duplicate: bool) -> None:
        """The records are durable and readable at these offsets."""
        ...

    def failed(self, error: AyderError) -> None:
        """They are not, or nobody knows: the error says which."""
        ...


class ResultWaiter(Protocol):
    """Who waits for a control command."""

    deadline_ns: int
    done: bool

    def applied(self, result: Result, log_index: int) -> None:
        """The command was applied, with this result (never an error)."""
        ...

    def failed(self, error: AyderError) -> None:
        """It was refused, or nobody knows."""
        ...


class _Values:
    """The open run of bare values of one partition."""

    __slots__ = ("partition", "topic_id", "values", "waiters")

    def __init__(self, topic_id: int, partition: int) -> None:
        self.topic_id = topic_id
        self.partition = partition
        self.values: list[bytes] = []
        self.waiters: list[AppendWaiter] = []


class PendingBlock:
    """The next block while it gathers. ``size_bytes`` is close to what ``encode`` will return."""

    __slots__ = ("_open", "_slots", "_waiters", "makes_room", "next_deadline_ns", "size_bytes")

    def __init__(self) -> None:
        self._slots: list[_Values | tuple[int, bytes]] = []
        self._waiters: list[list[AppendWaiter] | AppendWaiter | ResultWaiter] = []
        self._open: dict[int, _Values] = {}
        self.makes_room = True
        """Nothing but commands that let disk space be given back: these may use the ballast of a full disk."""
        self.size_bytes = BLOCK_HEADER_BYTES
        self.next_deadline_ns = 1 << 63

    def __bool__(self) -> bool:
        return bool(self._slots)

    def add_value(self, topic_id: int, partition: int, value: bytes, waiter: AppendWaiter) -> None:
        """One bare record: joins the open run of its partition."""
        uid = topic_id << 16 | partition
        run = self._open.get(uid)
        if run is None:
            run = self._open[uid] = _Values(topic_id, partition)
            self._slots.append(run)
            self._waiters.append(run.waiters)
            self.makes_room = False
            self.size_bytes += _RUN_OVERHEAD_BYTES
        run.values.append(value)
        run.waiters.append(waiter)
        self.size_bytes += len(value) + _VALUE_OVERHEAD_BYTES
        if waiter.deadline_ns < self.next_deadline_ns:
            self.next_deadline_ns = waiter.deadline_ns

    def add_run(self, uid: int, run: bytes, waiter: AppendWaiter) -> None:
        """A whole run. Values that come later for this partition form a new run behind it."""
        self._open.pop(uid, None)
        self.makes_room = False
        self._add((RUN, run), waiter)

    def add_batch(self, runs: Sequence[tuple[int, bytes]], waiters: Sequence[AppendWaiter], producer: bytes) -> None:
        """Runs of several partitions that are taken or refused together, recognised by ``producer`` (digest and key)."""
        if producer:
            slot = encode_command(BatchHead(runs[0][0], producer, len(runs)))
            self._slots.append(slot)
            self._waiters.append([])
            self.size_bytes += len(slot[1]) + COMMAND_HEADER_BYTES
        for (uid, run), waiter in zip(runs, waiters, strict=True):
            self.add_run(uid, run, waiter)

    def add_command(self, command: Command, waiter: ResultWaiter) -> None:
        """A control command. Later records stand behind it."""
        self._open.clear()
        self.makes_room = self.makes_room and isinstance(command, MAKES_ROOM)
        self._add(encode_command(command), waiter)

    def _add(self, slot: tuple[int, bytes], waiter: AppendWaiter | ResultWaiter) -> None:
        self._slots.append(slot)
        self._waiters.append(waiter)
        self.size_bytes += len(slot[1]) + COMMAND_HEADER_BYTES
        if waiter.deadline_ns < self.next_deadline_ns:
            self.next_deadline_ns = waiter.deadline_ns

    def encode(self) -> bytes:
        """The block's payload."""
        commands = []
        for slot in self._slots:
            if isinstance(slot, _Values):
                commands.append((RUN, encode_values(slot.topic_id, slot.partition, slot.values)))
            else:
                commands.append(slot)
        return encode_block(commands)

    def forget_bytes(self) -> None:
        """The payload is encoded: the gathered copies may go, the waiters stay."""
        self._slots.clear()
        self._open.clear()

    def complete(self, results: Sequence[Result], log_index: int) -> None:
        """The block was applied: tell every waiter its own result."""
        assert len(results) == len(self._waiters), (len(results), len(self._waiters))
        for result, waiter in zip(results, self._waiters, strict=True):
            if isinstance(waiter, list):
                if waiter:  # empty: the head of a batch, for which nobody waits
                    _complete_values(result, waiter, log_index)
            elif not waiter.done:
                waiter.done = True
                _complete_one(result, waiter, log_index)

    def fail(self, error: AyderError) -> None:
        """Nothing of the block was applied, or nobody knows: tell everyone."""
        for waiter in self._each_waiter():
            if not waiter.done:
                waiter.done = True
                waiter.failed(error)

    def expire(self, now_ns: int) -> None:
        """Tell those whose time is up that the outcome is unknown; the block itself goes on."""
        if now_ns < self.next_deadline_ns:
            return
        self.next_deadline_ns = 1 << 63
        for waiter in self._each_waiter():
            if waiter.done:
                continue
            if waiter.deadline_ns <= now_ns:
                waiter.done = True
                waiter.failed(AyderError(ErrorCode.COMMIT_TIMEOUT, "not committed in time; it may still be"))
            else:
                self.next_deadline_ns = min(self.next_deadline_ns, waiter.deadline_ns)

    def _each_waiter(self) -> list[AppendWaiter | ResultWaiter]:
        flat: list[AppendWaiter | ResultWaiter] = []
        for waiter in self._waiters:
            if isinstance(waiter, list):
                flat.extend(waiter)
            else:
                flat.append(waiter)
        return flat


def _complete_values(result: Result, waiters: list[AppendWaiter], log_index: int) -> None:
    if isinstance(result, AyderError):
        for waiter in waiters:
            if not waiter.done:
                waiter.done = True
                waiter.failed(result)
        return
    assert isinstance(result, Appended) and result.count == len(waiters), result
    offset = result.base_offset
    for waiter in waiters:
        if not waiter.done:
            waiter.done = True
            waiter.appended(offset, 1, log_index, False)
        offset += 1


def _complete_one(result: Result, waiter: AppendWaiter | ResultWaiter, log_index: int) -> None:
    if isinstance(result, AyderError):
        waiter.failed(result)
    elif isinstance(result, Appended):
        waiter.appended(result.base_offset, result.count, result.log_index, result.duplicate)  # type: ignore[union-attr]
    else:
        waiter.applied(result, log_index)  # type: ignore[union-attr]
