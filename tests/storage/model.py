"""A naive log: what a store must hold, worked out from the entries alone, and blocks of runs to fill it with.

Owns: building blocks, the model of offsets and runs, and the checks of a store against it. Must not know: any backend.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from ayder.commands import BLOCK_HEADER_BYTES, COMMAND_HEADER_BYTES, RUN, encode_block
from ayder.entries import EntryKind, HardState, LogEntry
from ayder.records import partition_uid
from ayder.runs import Run, encode_values
from ayder.storage.interface import RunEntry


class Placed(NamedTuple):
    """A run as the model expects it."""

    index: int
    base_offset: int
    count: int
    bytes_before: int
    log_time_ms: int
    start: int
    """Of the run inside its block."""
    data: bytes


def make_block(runs: Sequence[bytes]) -> bytes:
    """A block's payload that carries these runs."""
    return encode_block([(RUN, run) for run in runs])


def make_entry(index: int, term: int, runs: Sequence[bytes], log_time_ms: int | None = None) -> LogEntry:
    """An entry with a block of runs."""
    return LogEntry(index, term, EntryKind.BLOCK, 1000 + index if log_time_ms is None else log_time_ms, make_block(runs))


def simple_run(partition: int, *values: bytes, topic_id: int = 1) -> bytes:
    """A run of these values."""
    return encode_values(topic_id, partition, values)


def random_run(choose: random.Random, partition: int, longest: int = 60) -> bytes:
    """A run of 1 to 3 random values."""
    return simple_run(partition, *(choose.randbytes(choose.randrange(longest)) for _ in range(choose.randint(1, 3))))


def runs_in(payload: bytes) -> list[tuple[int, bytes]]:
    """(start in the payload, run) of each run in a block that ``make_block`` made."""
    found = []
    at = BLOCK_HEADER_BYTES
    while at < len(payload):
        length = int.from_bytes(payload[at + 4 : at + 8], "little")
        at += COMMAND_HEADER_BYTES
        found.append((at, payload[at : at + length]))
        at += length
    return found


class Applied:
    """Partitions after applying entries 1, 2, …: every run with its place in its partition."""

    def __init__(self, entries: Sequence[LogEntry] = ()) -> None:
        self.runs: dict[int, list[Placed]] = {}
        self.by_index: dict[int, list[tuple[int, Placed]]] = {}
        self.ends_at: dict[int, dict[int, int]] = {0: {}}
        """After each index, the next offset of every partition."""
        self._taken: dict[int, int] = {}
        self.index = 0
        for entry in entries:
            self.apply(entry)

    def apply(self, entry: LogEntry) -> list[tuple[int, Placed]]:
        """(partition uid, run) of each run in the entry."""
        placed = []
        ends = dict(self.ends_at[self.index])
        for start, data in runs_in(entry.payload) if entry.kind is EntryKind.BLOCK else ():
            run = Run(data)
            uid = int(run.uid)
            base = ends.get(uid, 0)
            one = Placed(entry.index, base, run.count, self._taken.get(uid, 0), entry.log_time_ms, start, data)
            ends[uid] = base + run.count
            self._taken[uid] = one.bytes_before + run.record_bytes
            self.runs.setdefault(uid, []).append(one)
            placed.append((uid, one))
        self.index = entry.index
        self.by_index[entry.index] = placed
        self.ends_at[entry.index] = ends
        return placed


def note(store: Any, placed: list[tuple[int, Placed]]) -> None:
    """Tell the store of applied runs, as the state machine does."""
    for uid, run in placed:
        where = store.placement(run.index)
        entry = RunEntry(run.base_offset, run.count, run.bytes_before, run.log_time_ms, where.position + run.start, len(run.data))
        store.note_run(where.segment_id, uid, entry)


def replay(store: Any, entries: Sequence[LogEntry]) -> Applied:
    """Apply the entries, telling the store of the runs that lie in unsealed segments."""
    applied = Applied()
    for entry in entries:
        placed = applied.apply(entry)
        if entry.index >= store.unsealed_first_index:
            note(store, placed)
    return applied


def entry_of(run: Placed, found: RunEntry) -> bool:
    """Whether an index entry describes this run (its position is the store's own business)."""
    return (found.base_offset, found.count, found.bytes_before, found.log_time_ms, found.length) == (
        run.base_offset, run.count, run.bytes_before, run.log_time_ms, len(run.data),
    )  # fmt: skip


def check_runs(store: Any, applied: Applied, log_starts: dict[int, int] | None = None, every: int = 1) -> None:
    """All retained runs are found by offset, time and bytes, and read back with the same bytes."""
    for uid, all_runs in applied.runs.items():
        start = (log_starts or {}).get(uid, 0)
        runs = [run for run in all_runs if run.base_offset + run.count > start]
        read = store.read_runs(uid, start, max_records=1 << 40, max_bytes=1 << 40)
        retained = [one for one in read if one.entry.base_offset + one.entry.count > start]
        assert [one.data for one in retained] == [run.data for run in runs]
        assert all(entry_of(run, one.entry) for run, one in zip(runs, retained, strict=True))
        for run in runs[::every]:
            for offset in {run.base_offset, run.base_offset + run.count - 1}:
                if offset >= start:
                    assert entry_of(run, store.find_run(uid, offset))
        end = all_runs[-1].base_offset + all_runs[-1].count
        assert store.find_run(uid, end) is None
        assert store.read_runs(uid, end, max_records=1, max_bytes=1) == []


def check_entries(store: Any, entries: Sequence[LogEntry]) -> None:
    """The readable part of the log holds exactly these entries (from 1)."""
    assert store.last_index == len(entries)
    first = store.first_index
    if first <= store.last_index:
        assert store.read_entries(first, store.last_index, 1 << 40) == list(entries[first - 1 :])
    for entry in entries[first - 1 :]:
        assert store.term_at(entry.index) == entry.term


def partition(number: int) -> int:
    """The uid of a partition of the tests' topic."""
    return partition_uid(1, number)


FRESH = HardState()
