"""One contract, every backend: what ``LogStore`` promises, checked against a naive model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ayder.entries import EntryKind, HardState, LogEntry
from ayder.errors import StoragePoisoned
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.backends import log_store_backend, log_store_names
from ayder.storage.memory import MemoryDisk, MemoryLogStore, MemoryOptions
from tests.storage.disks import RecordingFiles
from tests.storage.model import (
    Applied,
    check_entries,
    check_runs,
    entry_of,
    make_entry,
    note,
    partition,
    random_run,
    replay,
    simple_run,
)  # fmt: skip

SMALL = 600


class Backend:
    """Opens one kind of store on one kind of disk, again and again."""

    def __init__(self, kind: str, path: Path | None) -> None:
        self.kind = kind
        self._path = path
        self._files = RecordingFiles()
        self._disk = MemoryDisk()

    def open(self, *, segment_bytes: int = SMALL, segment_blocks: int = 1000) -> Any:
        if self.kind == "memory":
            return MemoryLogStore.open(
                options=MemoryOptions(segment_bytes=segment_bytes, segment_blocks=segment_blocks), disk=self._disk
            )
        options = AofOptions(
            segment_bytes=segment_bytes, segment_blocks=segment_blocks, preallocate_bytes=1024, reserve_bytes=512
        )
        if self.kind == "aof":
            return AofLogStore.open(self._path or Path("never"), options, monotonic_ns=lambda: 0)
        return AofLogStore.open("/d", options, monotonic_ns=lambda: 0, files=self._files)


KINDS = ("aof", "aof in memory", "memory")


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return Backend(request.param, tmp_path / "log")


@pytest.fixture
def store(backend: Backend) -> Iterator[Any]:
    store = backend.open()
    yield store
    store.close()


def fill(store: Any, count: int, *, first: int = 1, term: int = 1, partitions: int = 3) -> list[LogEntry]:
    entries = []
    for index in range(first, first + count):
        entries.append(make_entry(index, term, [simple_run(index % partitions, b"value %d of term %d" % (index, term))]))
        store.append(entries[-1:], None)
    return entries


def seal_all(store: Any, applied: Applied) -> None:
    for info in store.segments()[:-1]:
        if not info.sealed:
            store.seal(info.segment_id, applied.ends_at[info.last_index or info.first_index - 1])


def test_all_registered_backends_are_under_test() -> None:
    assert set(log_store_names()) == {"aof", "memory"}
    for name in log_store_names():
        backend = log_store_backend(name)
        assert backend.make_options({"segment_bytes": 4711, "of another part": 1}).segment_bytes == 4711
        assert callable(backend.store.open)
    with pytest.raises(LookupError, match="aof, memory"):
        log_store_backend("floppy")


def test_a_new_store_is_empty(store: Any) -> None:
    assert (store.first_index, store.last_index, store.unsealed_first_index) == (1, 0, 1)
    assert store.hard_state == HardState(0, None)
    assert store.term_at(0) == 0
    assert [info.sealed for info in store.segments()] == [False]
    assert store.find_run(partition(0), 0) is None
    assert store.find_time(partition(0), 0) is None
    assert store.find_bytes(partition(0), 0) is None
    assert store.read_runs(partition(0), 0, max_records=1, max_bytes=1) == []
    assert store.verify() == []
    with pytest.raises(LookupError):
        store.term_at(1)
    with pytest.raises(LookupError):
        store.read_entries(1, 1, 1)
    with pytest.raises(LookupError):
        store.placement(1)


def test_entries_of_every_kind_come_back_also_after_opening_again(backend: Backend) -> None:
    store = backend.open()
    entries = [
        LogEntry(1, 1, EntryKind.NOOP, 5, b""),
        LogEntry(2, 1, EntryKind.MEMBERSHIP, 5, b"members"),
        make_entry(3, 2, [simple_run(0, b"a", b"")], 7),
        LogEntry(4, 9, EntryKind.BLOCK, 2**62, bytes(range(256)) * 300),
    ]
    placements = store.append(entries, HardState(9, "node-3"))
    assert placements == [store.placement(entry.index) for entry in entries]
    check_entries(store, entries)
    store.close()
    store = backend.open()
    check_entries(store, entries)
    assert store.hard_state == HardState(9, "node-3")
    assert [store.placement(entry.index) for entry in entries] == placements
    store.close()


@pytest.mark.parametrize("state", [HardState(1, None), HardState(2, "n"), HardState(2**40, "x" * 128)])
def test_a_vote_alone_is_kept(backend: Backend, state: HardState) -> None:
    store = backend.open()
    assert store.append([], state) == []
    assert store.hard_state == state
    store.close()
    store = backend.open()
    assert store.hard_state == state
    assert store.last_index == 0
    store.close()


def test_the_vote_outlives_the_segment_it_was_written_in(backend: Backend) -> None:
    store = backend.open()
    store.append([], HardState(3, "node-1"))
    entries = fill(store, 60)
    seal_all(store, replay(store, entries))
    for info in store.segments()[:-1]:
        store.drop_segment(info.segment_id)
    store.close()
    assert backend.open().hard_state == HardState(3, "node-1")


def test_segments_roll_by_bytes_and_by_blocks(backend: Backend) -> None:
    store = backend.open(segment_bytes=1 << 20, segment_blocks=10)
    fill(store, 35)
    infos = store.segments()
    assert [(info.first_index, info.last_index) for info in infos] == [(1, 10), (11, 20), (21, 30), (31, 35)]
    assert [info.segment_id for info in infos] == [1, 2, 3, 4]
    assert [(info.first_time_ms, info.last_time_ms) for info in infos][1] == (1011, 1020)
    store.close()
    store = backend.open(segment_bytes=400, segment_blocks=1 << 30)
    fill(store, 10, first=36)
    assert len(store.segments()) > 5
    store.close()


def test_reading_stops_at_max_bytes_but_gives_one(store: Any) -> None:
    entries = fill(store, 40)
    size = len(entries[9].payload)
    assert store.read_entries(10, 40, 1) == entries[9:10]
    assert store.read_entries(10, 40, size * 2) == entries[9:11]
    assert store.read_entries(10, 12, 1 << 30) == entries[9:12]
    assert store.read_entries(40, 40, 1 << 30) == entries[39:]
    for first, last in ((0, 3), (1, 41), (41, 41), (3, 2)):
        with pytest.raises(LookupError):
            store.read_entries(first, last, 1 << 30)


@pytest.mark.parametrize("cut", [1, 2, 13, 25, 30])
def test_a_conflicting_suffix_is_replaced_also_across_segments(backend: Backend, cut: int) -> None:
    store = backend.open()
    old = fill(store, 30)
    assert len(store.segments()) > 3
    new = [make_entry(index, 2, [simple_run(0, b"new %d" % index)]) for index in range(cut, cut + 4)]
    store.append(new, HardState(2, "other"))
    expected = old[: cut - 1] + new
    check_entries(store, expected)
    store.close()
    store = backend.open()
    check_entries(store, expected)
    expected += fill(store, 20, first=cut + 4, term=3)
    check_entries(store, expected)
    applied = replay(store, expected)
    check_runs(store, applied)
    seal_all(store, applied)
    check_entries(store, expected)
    check_runs(store, applied)
    store.close()
    store = backend.open()
    check_entries(store, expected)
    check_runs(store, replay(store, expected))
    assert store.verify() == []
    store.close()


def test_a_suffix_is_replaced_again_and_again(backend: Backend) -> None:
    store = backend.open(segment_bytes=300)
    expected = fill(store, 5)
    for term in range(2, 12):
        first = max(1, store.last_index - term % 5)
        expected = expected[: first - 1] + fill(store, 3, first=first, term=term)
        check_entries(store, expected)
    store.close()
    check_entries(backend.open(), expected)


def test_what_cannot_follow_is_refused_and_changes_nothing(store: Any) -> None:
    entries = fill(store, 30)
    applied = replay(store, entries)
    for wrong in ([make_entry(32, 1, [])], [make_entry(0, 1, [])], [make_entry(31, 1, []), make_entry(33, 1, [])]):
        with pytest.raises(ValueError):
            store.append(wrong, None)
    seal_all(store, applied)
    sealed_to = store.segments()[-2].last_index
    with pytest.raises(ValueError):
        store.append([make_entry(sealed_to, 2, [])], None)
    check_entries(store, entries)
    check_runs(store, applied)


def test_seal_takes_the_oldest_full_segment_only(store: Any) -> None:
    entries = fill(store, 30)
    applied = replay(store, entries)
    first, second, *_, last = store.segments()
    for wrong in (second.segment_id, last.segment_id, 4711):
        with pytest.raises(ValueError):
            store.seal(wrong, {})
    store.seal(first.segment_id, applied.ends_at[first.last_index])
    assert [info.sealed for info in store.segments()][:2] == [True, False]
    with pytest.raises(ValueError):
        store.seal(first.segment_id, {})
    assert store.unsealed_first_index == second.first_index
    with pytest.raises(LookupError):
        store.placement(first.last_index)
    for wrong in (second.segment_id, 4711):
        for refused in (store.drop_segment, lambda i: store.rewrite_segment(i, {}), lambda i: store.live_bytes(i, {})):
            with pytest.raises(LookupError):
                refused(wrong)


def test_a_deleted_partition_is_forgotten_and_left_out_of_the_footer(store: Any) -> None:
    entries = fill(store, 30)
    applied = replay(store, entries)
    gone = partition(1)
    store.forget_partition(gone)
    assert store.find_run(gone, 0) is None
    check_runs(store, applied, {gone: 1 << 40} | {}, every=7)
    first = store.segments()[0]
    store.seal(first.segment_id, {uid: end for uid, end in applied.ends_at[first.last_index].items() if uid != gone})
    assert store.find_run(gone, 0) is None
    assert entry_of(applied.runs[partition(0)][0], store.find_run(partition(0), 0))


def test_runs_noted_for_a_sealed_segment_are_ignored(store: Any) -> None:
    entries = fill(store, 30)
    applied = replay(store, entries)
    before = store.find_run(partition(1), 0)
    first = store.segments()[0]
    store.seal(first.segment_id, applied.ends_at[first.last_index])
    store.note_run(first.segment_id, partition(1), before)
    check_runs(store, applied)


def test_dropping_and_rewriting_keep_what_is_retained(backend: Backend) -> None:
    store = backend.open()
    choose = random.Random(7)
    entries = []
    for index in range(1, 121):
        entries.append(make_entry(index, 1, [random_run(choose, choose.randrange(4)) for _ in range(choose.randint(1, 3))]))
        store.append(entries[-1:], None)
    applied = replay(store, entries)
    seal_all(store, applied)
    ends = applied.ends_at[120]
    starts = {uid: end // 2 for uid, end in ends.items()}
    starts[partition(0)] = 0
    sealed = [info.segment_id for info in store.segments() if info.sealed]
    for segment_id in sealed:
        live = store.live_bytes(segment_id, starts)
        mine = [
            run for uid, runs in applied.runs.items() for run in runs
            if run.base_offset + run.count > starts[uid] and _segment_of(store, run.index) == segment_id
        ]  # fmt: skip
        assert live == sum(len(run.data) for run in mine)
    nobody = {partition(0): ends[partition(0)]}
    assert store.live_bytes(sealed[0], nobody) == 0
    assert store.live_bytes(sealed[0], {}) == 0
    assert sum(store.rewrite_segment(segment_id, starts) for segment_id in sealed[:-2]) > 1000
    check_runs(store, applied, starts)
    assert store.first_index == next(info.first_index for info in store.segments() if info.segment_id == sealed[-2])
    check_entries(store, entries)
    dropped = next(i for i in sealed if store.live_bytes(i, {partition(0): 0}) and i > 3)
    starts[partition(0)] = max(r.base_offset + r.count for r in applied.runs[partition(0)] if _index_in(store, r.index, dropped))
    for segment_id in [i for i in sealed if i <= dropped]:
        if store.live_bytes(segment_id, starts) == 0:
            assert store.drop_segment(segment_id) > 0
    check_runs(store, applied, starts)
    assert store.verify() == []
    before = [(info.segment_id, info.first_index, info.last_index) for info in store.segments()]
    store.close()
    store = backend.open()
    assert [(info.segment_id, info.first_index, info.last_index) for info in store.segments()] == before
    replay(store, entries)
    check_runs(store, applied, starts)
    check_entries(store, entries)
    assert store.verify() == []
    store.close()


def _segment_of(store: Any, index: int) -> int:
    return next(info.segment_id for info in store.segments() if info.first_index <= index <= info.last_index)


def _index_in(store: Any, index: int, segment_id: int) -> bool:
    return any(info.segment_id == segment_id and info.first_index <= index <= info.last_index for info in store.segments())


def test_everything_may_be_dropped_and_the_log_goes_on(backend: Backend) -> None:
    store = backend.open()
    entries = fill(store, 50)
    for _ in range(2):
        seal_all(store, replay(store, entries))
        for info in store.segments()[:-1]:
            store.drop_segment(info.segment_id)
        assert store.first_index == store.unsealed_first_index
        check_entries(store, entries)
        store.close()
        store = backend.open()
        check_entries(store, entries)
        entries += fill(store, 30, first=len(entries) + 1, term=2)
        check_entries(store, entries)
    store.close()


def test_a_gap_in_the_middle_is_known_after_opening_again(backend: Backend) -> None:
    store = backend.open()
    entries = fill(store, 80)
    applied = replay(store, entries)
    seal_all(store, applied)
    sealed = [info for info in store.segments() if info.sealed]
    for info in (sealed[3], sealed[1], sealed[-1]):
        store.drop_segment(info.segment_id)
    store.close()
    store = backend.open()
    assert store.first_index == store.unsealed_first_index
    check_entries(store, entries)
    replay(store, entries)
    after = applied.ends_at[sealed[-1].last_index]
    newest = store.read_runs(partition(0), after[partition(0)], max_records=1, max_bytes=1)
    assert newest[0].entry.base_offset == after[partition(0)]
    hole = applied.ends_at[sealed[0].last_index][partition(0)]
    found = store.find_run(partition(0), hole)
    assert found is not None
    assert found.base_offset == applied.ends_at[sealed[1].last_index][partition(0)]
    assert store.verify() == []
    store.close()


def test_reading_runs_stops_where_told(store: Any) -> None:
    entries = [make_entry(i, 1, [simple_run(0, *(b"%d-%d" % (i, n) for n in range(5)))]) for i in range(1, 21)]
    for entry in entries:
        store.append([entry], None)
    replay(store, entries)
    uid = partition(0)

    def bases(offset: int, records: int, size: int) -> list[int]:
        return [one.entry.base_offset for one in store.read_runs(uid, offset, max_records=records, max_bytes=size)]

    assert bases(0, 1, 1 << 20) == [0]
    assert bases(0, 5, 1 << 20) == [0]
    assert bases(0, 6, 1 << 20) == [0, 5]
    assert bases(4, 2, 1 << 20) == [0, 5]
    assert bases(7, 10, 1 << 20) == [5, 10, 15]
    length = store.find_run(uid, 0).length
    assert bases(0, 100, length * 3) == [0, 5, 10]
    assert bases(0, 100, length * 3 - 1) == [0, 5]
    assert bases(0, 100, 1) == [0]


def test_after_close_everything_is_refused(store: Any) -> None:
    fill(store, 3)
    store.close()
    store.close()
    for refused in (
        lambda: store.append([], HardState(1, None)), store.idle, lambda: store.read_entries(1, 1, 1),
        lambda: store.find_run(1, 0), lambda: store.seal(1, {}), store.verify,
    ):  # fmt: skip
        with pytest.raises(StoragePoisoned):
            refused()


def test_empty_segments_after_a_replaced_suffix_are_sealed_and_read_past(backend: Backend) -> None:
    store = backend.open()
    fill(store, 40)
    kept = make_entry(1, 2, [simple_run(0, b"kept")])
    store.append([kept], None)
    entries = [kept, *fill(store, 40, first=2, term=2)]
    empty = [info for info in store.segments() if not info.last_index]
    assert len(empty) > 2
    applied = replay(store, entries)
    seal_all(store, applied)
    check_entries(store, entries)
    check_runs(store, applied)
    store.drop_segment(empty[1].segment_id)
    store.close()
    store = backend.open()
    check_entries(store, entries)
    check_runs(store, replay(store, entries))
    store.close()


def test_void_entries_between_a_sealed_segment_and_the_ones_that_replace_them(backend: Backend) -> None:
    """The oldest segment is sealed with one entry; the next segments still begin with what stood after its void ones."""
    store = backend.open(segment_bytes=1 << 20, segment_blocks=5)
    old = fill(store, 18)
    entries = [old[0], *fill(store, 9, first=2, term=2)]
    applied = replay(store, entries)
    store.seal(1, applied.ends_at[1])
    for _ in range(2):
        check_entries(store, entries)
        check_runs(store, applied)
        store.close()
        store = backend.open(segment_bytes=1 << 20, segment_blocks=5)
        replay(store, entries)
    seal_all(store, applied)
    store.drop_segment(1)
    store.close()
    store = backend.open(segment_bytes=1 << 20, segment_blocks=5)
    check_entries(store, entries)
    store.close()


# -- against the model, at random ---------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(kind=st.sampled_from(KINDS[1:]), seed=st.integers(0, 2**32), size=st.integers(150, 3000), partitions=st.integers(1, 40))
def test_look_ups_agree_with_a_naive_scan(kind: str, seed: int, size: int, partitions: int) -> None:
    backend = Backend(kind, None)
    choose = random.Random(seed)
    store = backend.open(segment_bytes=size)
    entries: list[LogEntry] = []
    applied = Applied()
    time_ms = 0
    for index in range(1, choose.randint(2, 80)):
        time_ms += choose.choice((0, 0, 1, 1000))
        runs = [random_run(choose, int(partitions * choose.random() ** 3)) for _ in range(choose.randint(0, 3))]
        entries.append(make_entry(index, index // 10, runs, time_ms))
        store.append(entries[-1:], None)
        note(store, applied.apply(entries[-1]))
        if choose.random() < 0.1:
            seal_all(store, applied)
    check_entries(store, entries)
    check_runs(store, applied)
    for uid, runs in applied.runs.items():
        for probe in {run.log_time_ms + d for run in runs for d in (-1, 0, 1)}:
            _same(next((run for run in runs if run.log_time_ms >= probe), None), store.find_time(uid, probe))
        for probe in {run.bytes_before + d for run in runs for d in (-1, 0, 1)}:
            _same(next((run for run in reversed(runs) if run.bytes_before <= probe), None), store.find_bytes(uid, probe))
    absent = partition(partitions + 5)
    assert store.find_run(absent, 0) is store.find_time(absent, 0) is store.find_bytes(absent, 1 << 40) is None
    store.close()


def _same(expected: Any, found: Any) -> None:
    assert (expected is None) == (found is None)
    assert expected is None or entry_of(expected, found)


def _open_twice(backend: Backend, check: Callable[[Any], None]) -> None:
    for _ in range(2):
        store = backend.open()
        check(store)
        store.close()


def test_opening_twice_gives_the_same(backend: Backend) -> None:
    store = backend.open()
    entries = fill(store, 25)
    store.close()
    _open_twice(backend, lambda store: check_entries(store, entries))


# -- the memory twin's own failures -----------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_memory_disk_loses_what_was_not_synced(keep: int) -> None:
    disk = MemoryDisk()
    store = MemoryLogStore.open(disk=disk)
    entries = fill(store, 3)
    disk.fail_sync = True
    more = [make_entry(4, 1, []), make_entry(5, 1, [])]
    with pytest.raises(StoragePoisoned):
        store.append(more, None)
    with pytest.raises(StoragePoisoned):
        store.append(more, None)
    assert store.last_index == 3
    disk.fail_sync = False
    disk.power_cut(keep)
    check_entries(MemoryLogStore.open(disk=disk), entries + more[:keep])
