"""What gathers while a block is being written: commands that will form the next one, and who waits for each.

Owns: merging single records of a partition into one run, the order of commands, the waiters and their deadlines. Must not
know: Raft, HTTP, what applying does.

One record a request is the common case, so it must cost nearly nothing: its value goes into a list, its waiter into another,
and only when the block is taken are both turned into one columnar run, in C.

Two levels of acknowledgement differ from the usual one, and begin here: a waiter that is content with the leader's own disk is
told the offset its records will have unless another leader comes first (``tell_written``); one that wants a copy on every voter
waits on after its block was applied (``EveryCopy``).

Invariants: the records one caller added to a partition keep his order; a command's result goes to exactly its waiters; each
waiter is told once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
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
from ayder.entries import LogIndex
from ayder.errors import AyderError, ErrorCode
from ayder.runs import RUN_HEADER_BYTES, encode_values, run_place
from ayder.state_machine import Appended, Result

__all__ = ["MAKES_ROOM", "AppendWaiter", "EveryCopy", "PendingBlock", "ResultWaiter"]

MAKES_ROOM = (DeleteTopic, SetRetention, TrimPartitions)
_UNFORESEEABLE = frozenset(encode_command(command)[0] for command in (DeleteTopic(""), BatchHead(0, b"", 1)))
_VALUE_OVERHEAD_BYTES = 4
_RUN_OVERHEAD_BYTES = COMMAND_HEADER_BYTES + RUN_HEADER_BYTES


class AppendWaiter(Protocol):
    """Who waits for records to be on disk and applied."""

    deadline_ns: int
    """Monotonic clock; after it the waiter is told ``commit_timeout``."""
    done: bool
    """Set by whoever told the waiter; nothing more is told to it."""
    early: bool
    """Content with the leader's own disk: told ``written`` if that comes before the commit and the offset is known by then."""

    def written(self, base_offset: int, count: int, log_index: int) -> None:
        """The records are on this disk. Unless another node comes to lead first, these will be their offsets."""
        ...

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

    __slots__ = (
        "_early", "_open", "_slots", "_waiters", "early", "foreseeable", "makes_room", "next_deadline_ns", "record_counts",
        "size_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self._slots: list[_Values | tuple[int, bytes]] = []
        self._waiters: list[list[AppendWaiter] | AppendWaiter | ResultWaiter] = []
        self._open: dict[int, _Values] = {}
        self.makes_room = True
        """Nothing but commands that let disk space be given back: these may use the ballast of a full disk."""
        self.size_bytes = BLOCK_HEADER_BYTES
        self.next_deadline_ns = 1 << 63
        self.early = False
        """Somebody in here is content with the leader's own disk."""
        self._early: list[tuple[AppendWaiter, int, int, int]] = []
        """Those who are, each with partition, place among the block's records for it, and number of records."""
        self.record_counts: dict[int, int] = {}
        """Records by partition (uid). Known once encoded."""
        self.foreseeable = True
        """Whether applying this block surely takes exactly these records: no repeat to recognise, no topic deleted."""

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
        self._foresee()
        for slot in self._slots:
            if isinstance(slot, _Values):
                commands.append((RUN, encode_values(slot.topic_id, slot.partition, slot.values)))
            else:
                commands.append(slot)
        return encode_block(commands)

    def _foresee(self) -> None:
        """Work out what the block will do to the offsets of its partitions."""
        counts = self.record_counts
        for slot, waiters in zip(self._slots, self._waiters, strict=True):
            if isinstance(slot, _Values):
                uid, count = slot.topic_id << 16 | slot.partition, len(slot.values)
            elif slot[0] == RUN:
                uid, count, recognisable = run_place(slot[1])
                self.foreseeable &= not recognisable
            else:
                self.foreseeable &= slot[0] not in _UNFORESEEABLE
                continue
            before = counts.get(uid, 0)
            counts[uid] = before + count
            if self.early:
                told = enumerate(waiters) if isinstance(waiters, list) else ((0, waiters),)
                size = 1 if isinstance(waiters, list) else count
                self._early += [(one, uid, before + at, size) for at, one in told if one.early]  # type: ignore[union-attr, misc]

    def tell_written(self, next_offsets: Callable[[int], int | None], log_index: int) -> None:
        """The block is on this disk: tell those who are content with that. ``next_offsets``: a partition's, before the block."""
        for waiter, uid, place, count in self._early:
            base = next_offsets(uid)
            if base is not None and not waiter.done:
                waiter.done = True
                waiter.written(base + place, count, log_index)
        self._early.clear()

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


class EveryCopy:
    """Who waits, after their records were applied, until every voter has them on disk."""

    def __init__(self) -> None:
        self._heap: list[tuple[LogIndex, int, int, Callable[[bool], None]]] = []
        self._number = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, index: LogIndex, deadline_ns: int, tell: Callable[[bool], None]) -> None:
        """``tell(True)`` once everybody holds ``index``; ``tell(False)`` at the deadline (monotonic) or when nobody can say."""
        self._number += 1
        heapq.heappush(self._heap, (index, self._number, deadline_ns, tell))

    def release(self, everywhere_index: LogIndex) -> None:
        """Everything up to here is on the disk of every voter."""
        while self._heap and self._heap[0][0] <= everywhere_index:
            heapq.heappop(self._heap)[3](True)

    def expire(self, now_ns: int) -> None:
        """Tell those whose time is up."""
        late = [waiting for waiting in self._heap if waiting[2] <= now_ns]
        if late:
            self._heap = [waiting for waiting in self._heap if waiting[2] > now_ns]
            heapq.heapify(self._heap)
        for _, _, _, tell in late:
            tell(False)

    def give_up(self) -> None:
        """This node does not lead any more: nobody tells it what the others hold."""
        waiting, self._heap = self._heap, []
        for _, _, _, tell in waiting:
            tell(False)
