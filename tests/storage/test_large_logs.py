"""Positions beyond 2^31 and 2^32 (D-11), many segments, many frames: by sparse files, so that it is quick."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ayder.entries import EntryKind, LogEntry
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.files import RealFiles
from tests.storage.model import Applied, check_entries, check_runs, make_entry, replay, simple_run
from tests.storage.test_conformance import fill, seal_all

GIB = 1 << 30


ZEROS = bytes(64 << 20)


class SparseFiles(RealFiles):
    """Leaves a hole where a payload of ``ZEROS`` would be written."""

    def pwritev(self, fd: int, buffers: Any, position: int) -> int:
        if buffers[-1] is not ZEROS:
            return os.pwritev(fd, buffers, position)
        length = os.pwritev(fd, buffers[:-1], position) + len(ZEROS)
        os.ftruncate(fd, position + length)
        return length


@pytest.mark.slow
def test_frames_runs_and_footers_beyond_two_and_four_gibibytes(tmp_path: Path) -> None:
    files = SparseFiles()
    options = AofOptions(segment_bytes=5 * GIB, segment_blocks=135, preallocate_bytes=0, reserve_bytes=0)
    store = AofLogStore.open(tmp_path / "log", options, monotonic_ns=lambda: 0, files=files)
    entries = []
    while len(store.segments()) < 2:
        index = len(entries) + 1
        entries.append(
            LogEntry(index, 1, EntryKind.MEMBERSHIP, 1000 + index, ZEROS)
            if index % 2 and index < 130
            else make_entry(index, 1, [simple_run(index % 4, b"value %d" % index)])
        )
        store.append(entries[-1:], None)
    small = [entry for entry in entries if entry.kind is EntryKind.BLOCK]
    assert store.placement(small[-3].index).position > 1 << 32

    def check(store: AofLogStore, applied: Applied) -> None:
        for entry in small:
            assert store.read_entries(entry.index, entry.index, 1) == [entry]
        check_runs(store, applied)

    check(store, replay(store, entries))
    store.close()
    store = AofLogStore.open(tmp_path / "log", options, monotonic_ns=lambda: 0, files=files)  # scans 4 GiB
    assert (store.first_index, store.last_index, store.report.torn_bytes) == (1, len(entries), 0)
    applied = replay(store, entries)
    check(store, applied)
    seal_all(store, applied)
    check(store, applied)
    store.close()
    store = AofLogStore.open(tmp_path / "log", options, monotonic_ns=lambda: 0, files=files)  # does not
    assert store.segments()[0].size_bytes > 4 * GIB
    check(store, replay(store, entries))
    store.close()


def test_a_log_of_many_segments_opens_by_its_trailers(tmp_path: Path) -> None:
    options = AofOptions(segment_bytes=1, preallocate_bytes=0, reserve_bytes=0)
    store = AofLogStore.open(tmp_path / "log", options, monotonic_ns=lambda: 0)
    entries = fill(store, 300)
    applied = replay(store, entries)
    seal_all(store, applied)
    store.close()
    preads = [0]

    class Counting(RealFiles):
        def pread(self, fd: int, length: int, position: int) -> bytes:
            preads[0] += 1
            return super().pread(fd, length, position)

    store = AofLogStore.open(tmp_path / "log", options, monotonic_ns=lambda: 0, files=Counting())
    assert len(store.segments()) == 301
    assert preads[0] < 301 + 10  # one trailer each, no scan
    check_entries(store, entries)
    check_runs(store, replay(store, entries))
    store.close()


def test_an_entry_larger_than_a_segment_and_than_the_scan_reads_at_once(tmp_path: Path) -> None:
    options = AofOptions(segment_bytes=100_000, preallocate_bytes=4096)
    store = AofLogStore.open(tmp_path / "log", options, monotonic_ns=lambda: 0)
    entries = [
        LogEntry(n, 1, EntryKind.BLOCK, n, b"%d" % n * size)
        for n, size in ((1, 10), (2, 5 << 20), (3, 1), (4, (1 << 20) - 48), (5, 99_000), (6, 3 << 20), (7, 0))
    ]
    for entry in entries:
        store.append([entry], None)
    check_entries(store, entries)
    assert [len(store.read_entries(2, 7, size)) for size in (1, 6 << 20)] == [1, 3]
    store.close()
    store = AofLogStore.open(tmp_path / "log", options, monotonic_ns=lambda: 0)
    check_entries(store, entries)
    store.close()


def test_more_entries_in_one_append_than_a_gathering_write_takes(tmp_path: Path) -> None:
    store = AofLogStore.open(tmp_path / "log", AofOptions(segment_bytes=1), monotonic_ns=lambda: 0)
    entries = [make_entry(n, 1, [simple_run(0, b"%d" % n)]) for n in range(1, 3001)]
    store.append(entries[:1], None)
    placements = store.append(entries[1:], None)
    assert len({placement.segment_id for placement in placements}) == 1  # one append, one segment, one sync
    check_entries(store, entries)
    store.close()


def test_readers_in_threads_while_segments_are_sealed_rewritten_and_dropped(tmp_path: Path) -> None:
    """Workers read while the writer appends and another worker does upkeep: always the right bytes, no descriptor lost."""
    store = AofLogStore.open(tmp_path / "log", AofOptions(segment_bytes=1500, preallocate_bytes=4096), monotonic_ns=lambda: 0)
    entries = fill(store, 400)
    applied = replay(store, entries)
    starts = {uid: end // 3 for uid, end in applied.ends_at[400].items()}
    stop = threading.Event()
    wrong: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                check_runs(store, applied, starts, every=13)
                first = store.first_index
                try:
                    assert store.read_entries(first, 400, 1 << 30) == entries[first - 1 :]
                except LookupError:
                    assert store.first_index > first  # it was dropped meanwhile
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        seal_all(store, applied)
        for info in [info for info in store.segments() if info.sealed][:-2]:
            if store.live_bytes(info.segment_id, starts) == 0:
                store.drop_segment(info.segment_id)
            else:
                store.rewrite_segment(info.segment_id, starts)
        for index in range(401, 500):
            store.append([make_entry(index, 1, [])], None)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    check_runs(store, applied, starts)
    store.close()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in _target(link)]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
