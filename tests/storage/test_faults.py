"""A failing disk: what surely did not happen is refused, and where nobody knows, the store stops for good (S-2, D-12, D-13)."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

import pytest

from ayder.entries import HardState
from ayder.errors import CorruptLog, StoragePoisoned
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.checkpoints import FileCheckpointStore
from ayder.storage.interface import StorageFull
from tests.storage.disks import FaultFiles, RecordingFiles
from tests.storage.model import check_entries, check_runs, make_entry, replay, simple_run
from tests.storage.test_conformance import fill, seal_all

NO_ROOM = [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, "short"]


def open_on(files: Any, **options: Any) -> AofLogStore:
    settings = {"segment_bytes": 600, "preallocate_bytes": 512, "reserve_bytes": 256, "watermark_interval_ms": 0} | options
    return AofLogStore.open("/d", AofOptions(**settings), monotonic_ns=lambda: 0, files=files)


def a_disk(count: int = 4, **options: Any) -> tuple[RecordingFiles, FaultFiles, AofLogStore, list[Any]]:
    disk = RecordingFiles()
    files = FaultFiles(disk)
    store = open_on(files, **options)
    return disk, files, store, fill(store, count)


def all_calls(store: AofLogStore) -> list[Callable[[], Any]]:
    return [
        lambda: store.append([make_entry(store.last_index + 1, 1, [])], None), lambda: store.append([], HardState(5, None)),
        store.idle, lambda: store.seal(1, {}), lambda: store.read_entries(1, 1, 1), lambda: store.find_run(1, 0),
        lambda: store.find_time(1, 0), lambda: store.find_bytes(1, 0), lambda: store.read_runs(1, 0, max_records=1, max_bytes=1),
        lambda: store.live_bytes(1, {}), lambda: store.drop_segment(1), lambda: store.rewrite_segment(1, {}), store.verify,
        store.close,
    ]  # fmt: skip


def assert_poisoned(store: AofLogStore, files: FaultFiles) -> None:
    """Nothing is taken or answered any more, also when the disk is well again, and nothing is written."""
    files.heal()
    state = (store.last_index, store.hard_state)
    before = len(files.inner.operations)
    for call in all_calls(store):
        with pytest.raises(StoragePoisoned):
            call()
    assert len(files.inner.operations) == before
    assert (store.last_index, store.hard_state) == state
    assert files.inner.open_descriptors == 0


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_after_the_first_failed_sync_nothing_is_acknowledged_any_more(error: int) -> None:
    disk, files, store, entries = a_disk()
    files.fail("fdatasync", 1, error)
    with pytest.raises(StoragePoisoned, match="syncing"):
        store.append([make_entry(5, 1, [])], HardState(9, "me"))
    assert store.last_index == 4
    assert store.hard_state == HardState()
    assert_poisoned(store, files)
    again = open_on(disk)
    assert again.read_entries(1, 4, 1 << 30) == entries
    assert again.last_index == 5  # the page cache kept the fifth: allowed, nobody was told that it did not happen
    again.close()


def test_an_input_output_error_at_the_write_poisons() -> None:
    _, files, store, _ = a_disk()
    files.fail("pwritev", 1, errno.EIO)
    with pytest.raises(StoragePoisoned, match="writing"):
        store.append([make_entry(5, 1, [])], None)
    assert_poisoned(store, files)


@pytest.mark.parametrize("error", NO_ROOM)
def test_a_write_that_does_not_fit_is_taken_back_and_the_store_goes_on(error: int | str) -> None:
    disk, files, store, entries = a_disk(preallocate_bytes=0)
    for _ in range(3):
        files.fail("pwritev", 1, error)
        with pytest.raises(StorageFull):
            store.append([make_entry(5, 1, [simple_run(0, b"x" * 2000)]), make_entry(6, 1, [])], HardState(4, "me"))
        check_entries(store, entries)
        assert store.hard_state == HardState()
        check_entries(open_on(RecordingFiles(disk.inodes, disk.names)), entries)
    entries += fill(store, 30, first=5)
    check_entries(store, entries)
    store.close()
    store = open_on(disk)
    check_entries(store, entries)
    store.close()


@pytest.mark.parametrize("kind", ["ftruncate", "fsync"])
def test_when_taking_back_fails_too_the_store_is_poisoned(kind: str) -> None:
    _, files, store, _ = a_disk(preallocate_bytes=0)
    files.fail("pwritev", 1, "short")
    files.fail(kind, 1, errno.EIO)
    with pytest.raises(StoragePoisoned, match="cutting"):
        store.append([make_entry(5, 1, [])], None)
    assert_poisoned(store, files)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_shows_at_preallocation_before_anything_is_written(error: int) -> None:
    disk, files, store, entries = a_disk()
    files.fail_always("fallocate", error)
    writes = len([op for op in disk.operations if op.kind == "write"])
    with pytest.raises(StorageFull, match="no room"):
        store.append([make_entry(5, 1, [simple_run(0, b"x" * 3000)])], None)
    assert len([op for op in disk.operations if op.kind == "write"]) == writes
    check_entries(store, entries)
    files.heal()
    entries += fill(store, 3, first=5)
    check_entries(store, entries)
    store.close()


def test_a_nearly_full_disk_takes_what_fits_without_the_step() -> None:
    _, files, store, _ = a_disk(preallocate_bytes=1 << 16, segment_bytes=1 << 20)
    store.append([make_entry(5, 1, [simple_run(0, b"x" * 65_000)])], None)
    files.fail("fallocate", 1, errno.ENOSPC)
    store.append([make_entry(6, 1, [simple_run(0, b"x" * 90_000)])], None)
    assert files.bitten == 1
    store.close()


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_preallocation_files_grow_by_writing(error: int) -> None:
    disk = RecordingFiles()
    files = FaultFiles(disk)
    files.fail_always("fallocate", error)
    store = open_on(files)
    entries = fill(store, 30)
    check_entries(store, entries)
    store.close()
    check_entries(open_on(disk), entries)


ROLL_FAULTS = [
    *(("open", error) for error in NO_ROOM[:3]), ("fallocate", errno.ENOSPC), ("pwritev", errno.ENOSPC), ("pwritev", "short"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "error"), ROLL_FAULTS)
def test_a_roll_without_room_refuses_and_leaves_no_file(kind: str, error: Any) -> None:
    disk, files, store, entries = a_disk(0)
    while store.segments()[-1].size_bytes < 600:
        entries += fill(store, 1, first=len(entries) + 1)
    names = set(disk.names)
    for _ in range(3):
        files.fail(kind, 1, error)
        files.fail(kind, 2, error)
        with pytest.raises(StorageFull):
            store.append([make_entry(len(entries) + 1, 1, [])], HardState(3, "me"))
        files.heal()
        assert set(disk.names) == names
        check_entries(store, entries)
    entries += fill(store, 30, first=len(entries) + 1)
    check_entries(store, entries)
    store.close()
    store = open_on(disk)
    check_entries(store, entries)
    store.close()


@pytest.mark.parametrize("kind", ["open", "pwritev", "fsync", "fsync_dir", "pwrite"])
def test_any_other_error_of_a_roll_poisons(kind: str) -> None:
    disk, files, store, entries = a_disk(0)
    while store.segments()[-1].size_bytes < 600:
        entries += fill(store, 1, first=len(entries) + 1)
    files.fail(kind, 1, errno.EIO)
    with pytest.raises(StoragePoisoned):
        store.append([make_entry(len(entries) + 1, 1, [])], None)
    files.heal()
    with pytest.raises(StoragePoisoned):
        store.append([make_entry(len(entries) + 1, 1, [])], None)
    again = open_on(disk)
    check_entries(again, entries)
    fill(again, 3, first=len(entries) + 1)
    again.close()


def sealed_store() -> tuple[RecordingFiles, FaultFiles, AofLogStore, list[Any], Any]:
    disk, files, store, entries = a_disk(60)
    return disk, files, store, entries, replay(store, entries)


@pytest.mark.parametrize("error", NO_ROOM)
@pytest.mark.parametrize("nth", [1, 2])
def test_sealing_on_a_full_disk_uses_the_reserve_and_else_leaves_the_segment_as_it_was(error: Any, nth: int) -> None:
    disk, files, store, entries, applied = sealed_store()
    first, second, *_ = store.segments()
    assert "/d/reserve" in disk.names
    files.fail("pwrite", nth, error)
    store.seal(first.segment_id, applied.ends_at[first.last_index])
    assert "/d/reserve" not in disk.names
    files.fail("pwrite", nth, error)
    with pytest.raises(StorageFull):
        store.seal(second.segment_id, applied.ends_at[second.last_index])
    check_entries(store, entries)
    check_runs(store, applied)
    assert store.verify() == []
    check_entries(open_on(RecordingFiles(disk.inodes, disk.names)), entries)
    seal_all(store, applied)
    check_runs(store, applied)
    store.drop_segment(first.segment_id)
    assert "/d/reserve" in disk.names  # room again: the reserve is made again
    store.close()


@pytest.mark.parametrize("kind", ["pwrite", "ftruncate", "fsync"])
def test_any_other_error_of_sealing_poisons_and_the_log_is_whole_after_a_restart(kind: str) -> None:
    disk, files, store, entries, applied = sealed_store()
    first = store.segments()[0]
    files.fail(kind, 1, errno.EIO)
    with pytest.raises(StoragePoisoned, match="sealing"):
        store.seal(first.segment_id, applied.ends_at[first.last_index])
    with pytest.raises(StoragePoisoned):
        store.append([make_entry(61, 1, [])], None)
    again = open_on(disk)
    check_entries(again, entries)
    check_runs(again, replay(again, entries))
    again.close()


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_rewriting_and_dropping_on_a_full_disk(nth: int) -> None:
    disk, files, store, entries, applied = sealed_store()
    seal_all(store, applied)
    starts = {uid: end // 3 for uid, end in applied.ends_at[60].items()}
    mixed = next(info.segment_id for info in store.segments() if info.sealed and store.live_bytes(info.segment_id, starts))
    disk.unlink("/d/reserve")
    files.fail("pwrite", nth, errno.ENOSPC)
    with pytest.raises(StorageFull):
        store.rewrite_segment(mixed, starts)
    check_entries(store, entries)
    assert not [name for name in disk.names if name.endswith(".tmp")]
    files.heal()
    files.fail("pwrite", 1, errno.ENOSPC)
    with pytest.raises(StorageFull):
        store.drop_segment(1)
    check_runs(store, applied)
    files.heal()
    store.rewrite_segment(mixed, starts)
    check_runs(store, applied, starts)
    assert store.verify() == []
    store.close()


@pytest.mark.parametrize("kind", ["rename", "fsync", "fsync_dir", "pwrite"])
def test_any_other_error_of_rewriting_poisons(kind: str) -> None:
    disk, files, store, entries, applied = sealed_store()
    seal_all(store, applied)
    starts = {uid: end // 3 for uid, end in applied.ends_at[60].items()}
    files.fail(kind, 1, errno.EIO)
    with pytest.raises(StoragePoisoned, match="rewriting"):
        store.rewrite_segment(2, starts)
    again = open_on(disk)
    applied = replay(again, entries)
    check_runs(again, applied, starts)
    again.close()


def test_a_damaged_run_is_not_carried_into_a_rewritten_segment() -> None:
    disk, _, store, _, applied = sealed_store()
    seal_all(store, applied)
    run = store.find_run(next(iter(applied.runs)), 0)
    assert run is not None
    inode = disk.inodes[disk.names["/d/seg-0000000000000001.log"]]
    inode[run.position + 50] ^= 1
    for _ in range(2):
        with pytest.raises(CorruptLog, match="seg-0000000000000001"):
            store.rewrite_segment(1, dict.fromkeys(applied.runs, 0))
    store.append([make_entry(61, 1, [])], None)  # the log goes on, the old file stays
    assert "seg-0000000000000001" in store.verify()[0]
    store.close()


def test_a_flipped_bit_on_the_way_from_the_disk_is_never_served() -> None:
    _, files, store, entries, applied = sealed_store()
    seal_all(store, applied)
    caught = 0
    choose = random.Random(3)
    for _ in range(300):
        uid = choose.choice(list(applied.runs))
        run = choose.choice(applied.runs[uid])
        files.fail("pread", choose.randint(1, 2), "flip")
        try:
            found = store.read_runs(uid, run.base_offset, max_records=1, max_bytes=1)
            assert found[0].data == run.data
        except CorruptLog:
            caught += 1
        files.heal()
    assert caught > 30
    check_runs(store, applied)  # and nothing of it stayed in a cache
    check_entries(store, entries)
    store.close()


def test_every_failing_call_in_turn_never_loses_what_was_acknowledged() -> None:
    """The nth call of any kind fails, for every n a short life of a store has: the acknowledged prefix is there afterwards."""
    seen = 0
    for kind in ("open", "pwrite", "pwritev", "fsync", "fdatasync", "fsync_dir", "fallocate", "ftruncate", "rename", "unlink"):
        for error in (errno.EIO, errno.ENOSPC):
            nth = 1
            while True:
                disk = RecordingFiles()
                files = FaultFiles(disk)
                files.fail(kind, nth, error)
                entries = _short_life(files)
                if not files.bitten:
                    break
                seen += 1
                store = open_on(disk)
                assert store.last_index >= len(entries)
                found = store.read_entries(1, len(entries), 1 << 30) if entries and store.first_index == 1 else entries
                assert found == entries
                store.close()
                nth += 1
    assert seen > 80


def _short_life(files: FaultFiles) -> list[Any]:
    """Append, seal, rewrite until something is refused; the acknowledged entries."""
    entries: list[Any] = []
    try:
        store = open_on(files)
        for index in range(1, 31):
            entry = make_entry(index, 1, [simple_run(index % 2, b"value %d" % index)])
            store.append([entry], HardState(index, "me") if index % 7 == 0 else None)
            entries.append(entry)
        applied = replay(store, entries)
        seal_all(store, applied)
        store.close()
        checkpoints = FileCheckpointStore("/c", files)
        checkpoints.write(30, b"state")
    except (StorageFull, StoragePoisoned, OSError):
        pass
    return entries


# -- checkpoints ------------------------------------------------------------------------------------------------------
def test_a_checkpoint_without_room_leaves_the_older_ones() -> None:
    files = FaultFiles(RecordingFiles())
    store = FileCheckpointStore("/c", files)
    store.write(5, b"five")
    for kind in ("pwrite", "open"):
        files.fail(kind, 1, errno.ENOSPC)
        with pytest.raises(StorageFull):
            store.write(6, b"six")
    files.fail("pwrite", 1, "short")
    with pytest.raises(StorageFull):
        store.write(6, b"six")
    assert store.newest() == (5, b"five")
    store.write(6, b"six")
    assert store.newest() == (6, b"six")
    files.fail("fsync", 1, errno.EIO)
    with pytest.raises(StoragePoisoned):
        store.write(7, b"seven")
    with pytest.raises(StoragePoisoned):
        store.write(8, b"eight")
    assert store.newest() == (6, b"six")
