"""A tail that was being written when the power went is cut; bytes that had been synced and changed are refused (S-1)."""

from __future__ import annotations

from typing import Any

import pytest

from ayder.entries import HardState, LogEntry
from ayder.errors import CorruptLog
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.footer import TRAILER_BYTES
from tests.storage.disks import RecordingFiles, flip
from tests.storage.model import check_entries, check_runs, make_entry, replay, simple_run
from tests.storage.test_conformance import fill

SEGMENT = "/d/seg-%016x.log"
META = "/d/meta"


def open_store(files: RecordingFiles, **options: Any) -> AofLogStore:
    settings = {"preallocate_bytes": 512, "reserve_bytes": 0, "watermark_interval_ms": 1000} | options
    return AofLogStore.open("/d", AofOptions(**settings), monotonic_ns=lambda: 0, files=files)


def disk(files: RecordingFiles, **changed: bytes | None) -> RecordingFiles:
    """A copy of the disk; keyword ``log1`` stands for segment 1, ``meta`` for the meta file, None removes."""
    tree: dict[str, bytes | None] = dict(files.tree())
    for name, data in changed.items():
        tree[META if name == "meta" else SEGMENT % int(name[3:])] = data
    kept = {name: data for name, data in tree.items() if data is not None}
    numbers = dict(zip(kept, range(1, len(kept) + 1), strict=True))
    return RecordingFiles({numbers[name]: data for name, data in kept.items()}, numbers)


def unmarked_tail() -> tuple[RecordingFiles, list[LogEntry], int, int]:
    """A log whose watermark stands before its last three entries: (disk, entries, watermark's position, end)."""
    files = RecordingFiles()
    store = open_store(files)
    entries = fill(store, 3)
    store.close()
    marked = store.placement(3).position + len(entries[2].payload)
    store = open_store(files)
    entries += fill(store, 3, first=4)
    end = store.placement(6).position + len(entries[5].payload)
    return files, entries, marked, end  # and no close: the process was killed


def entries_after(files: RecordingFiles) -> list[LogEntry]:
    store = open_store(files)
    found = store.read_entries(1, store.last_index, 1 << 30) if store.last_index else []
    store.close()
    return found


def test_cut_at_every_byte_of_the_tail() -> None:
    files, entries, marked, end = unmarked_tail()
    log = files.tree()[SEGMENT % 1]
    ends = {store_end(entries, n, end): n for n in (3, 4, 5, 6)}
    for cut in range(marked, end + 1):
        expected = entries[: max(n for at, n in ends.items() if at <= cut)]
        for rest in (b"", bytes(len(log) - cut)):  # the file ends there, or goes on with the zeros of preallocation
            image = disk(files, log1=log[:cut] + rest)
            assert entries_after(image) == expected
            again = image.tree()
            assert entries_after(image) == expected
            assert image.tree() == again
            store = open_store(image)
            more = fill(store, 2, first=len(expected) + 1, term=7)
            store.close()
            assert entries_after(image) == expected + more


def store_end(entries: list[LogEntry], count: int, end: int) -> int:
    return end - sum(48 + len(entry.payload) for entry in entries[count:])


def test_flip_of_every_bit_of_the_tail_cuts_there() -> None:
    files, entries, marked, end = unmarked_tail()
    log = files.tree()[SEGMENT % 1]
    ends = [store_end(entries, n, end) for n in (4, 5, 6)]
    for bit in range(8 * marked, 8 * end):
        kept = 3 + sum(8 * at <= bit for at in ends)
        assert entries_after(disk(files, log1=flip(log, bit))) == entries[:kept]


def test_flip_of_every_bit_before_the_watermark_is_refused_and_nothing_is_changed() -> None:
    files, _, marked, _ = unmarked_tail()
    log = files.tree()[SEGMENT % 1]
    for bit in range(8 * marked):
        image = disk(files, log1=flip(log, bit))
        before = image.tree()
        with pytest.raises(CorruptLog) as caught:
            open_store(image)
        assert image.tree() == before
        assert "seg-0000000000000001.log" in str(caught.value)
        assert image.open_descriptors == 0
    assert "Synced up to entry 3 at least" in str(caught.value)
    assert "restored backup" in str(caught.value)


def test_the_file_cut_before_the_watermark_is_refused() -> None:
    files, _, marked, _ = unmarked_tail()
    log = files.tree()[SEGMENT % 1]
    for cut in range(marked):
        with pytest.raises(CorruptLog):
            open_store(disk(files, log1=log[:cut]))
    with pytest.raises(CorruptLog, match="missing"):
        open_store(disk(files, log1=None))


def test_a_stale_suffix_does_not_continue_a_new_tail() -> None:
    """Frames left over from another history follow the tail byte for byte, and their own checksums are right."""
    files, entries, _, end = unmarked_tail()
    log = files.tree()[SEGMENT % 1]
    fourth = store_end(entries, 4, end)
    # Another history: entry 4 has the same length, another content; what follows on disk is the old entries 5 and 6.
    image = disk(files, log1=log[: store_end(entries, 3, end)])
    store = open_store(image)
    other = make_entry(4, 1, [simple_run(1, b"VALUE 4 of term 1")])
    assert len(other.payload) == len(entries[3].payload)
    store.append([other], None)
    spliced = image.tree()[SEGMENT % 1][:fourth] + log[fourth:]
    assert entries_after(disk(image, log1=spliced)) == [*entries[:3], other]


def test_a_segment_is_not_accepted_in_the_place_of_another() -> None:
    files = RecordingFiles()
    store = open_store(files, segment_bytes=300)
    fill(store, 20)
    store.close()
    tree = files.tree()
    with pytest.raises(CorruptLog):
        open_store(disk(files, log2=tree[SEGMENT % 3], log3=tree[SEGMENT % 2]))
    other = RecordingFiles()
    AofLogStore.open("/d", monotonic_ns=lambda: 0, files=other, cluster_id="1" * 32).close()
    with pytest.raises(CorruptLog, match="of cluster 1111"):
        open_store(disk(files, log1=other.tree()[SEGMENT % 1]))


def several_segments() -> tuple[RecordingFiles, list[LogEntry]]:
    """Three sealed segments, then unsealed ones; the process was killed."""
    files = RecordingFiles()
    store = open_store(files, segment_bytes=400)
    store.append([], HardState(1, "node-1"))
    entries = fill(store, 24)
    applied = replay(store, entries)
    for info in store.segments()[:3]:
        store.seal(info.segment_id, applied.ends_at[info.last_index])
    return files, entries


def test_any_damage_of_an_older_unsealed_segment_is_refused() -> None:
    files, _ = several_segments()
    log = files.tree()[SEGMENT % 4]
    tail = len(log.rstrip(b"\0"))
    for bit in range(0, 8 * tail, 3):
        with pytest.raises(CorruptLog):
            open_store(disk(files, log4=flip(log, bit)))


def test_a_missing_segment_is_refused() -> None:
    files, _ = several_segments()
    for number in range(1, 6):
        with pytest.raises(CorruptLog, match="missing"):
            open_store(disk(files, **{f"log{number}": None}))


def test_a_damaged_trailer_in_the_middle_is_refused_and_the_newest_one_is_scanned_again() -> None:
    files, entries = several_segments()
    for number in (1, 2, 3):
        log = files.tree()[SEGMENT % number]
        for bit in range(8 * (len(log) - TRAILER_BYTES), 8 * len(log), 7):
            image = disk(files, **{f"log{number}": flip(log, bit)})
            if number < 3:
                with pytest.raises(CorruptLog, match="trailer is damaged"):
                    open_store(image)
            else:  # its frames are whole, and the segment after it says where they end: it is as it was before sealing
                store = open_store(image)
                check_entries(store, entries)
                check_runs(store, replay(store, entries))
                store.close()


def test_damage_of_a_sealed_segment_is_never_served() -> None:
    """Each bit of frames, header and footer: reads give the right bytes or CorruptLog, and ``verify`` finds it."""
    files, entries = several_segments()
    log = files.tree()[SEGMENT % 2]
    for bit in range(0, 8 * (len(log) - TRAILER_BYTES), 5):
        store = open_store(disk(files, log2=flip(log, bit)))
        applied = replay(store, entries)
        for check, expected in ((check_entries, entries), (check_runs, applied)):
            try:
                check(store, expected)  # type: ignore[operator]
            except CorruptLog as error:
                assert "seg-0000000000000002.log" in str(error)
        assert store.verify() != []
        store.close()


def test_meta_one_slot_damaged_is_survived_both_are_refused() -> None:
    files, entries = several_segments()
    meta = files.tree()[META]
    for first in range(0, 8 * 512, 37):
        store = open_store(disk(files, meta=flip(meta, first)))
        check_entries(store, entries)
        store.close()
        with pytest.raises(CorruptLog, match="restore a backup"):
            open_store(disk(files, meta=flip(flip(meta, first), 8 * 4096 + first)))
    with pytest.raises(CorruptLog, match="meta is missing"):
        open_store(disk(files, meta=None))


def test_the_dropped_list_is_checked_and_needed() -> None:
    files, _ = several_segments()
    store = open_store(files, segment_bytes=400)
    store.drop_segment(2)
    store.close()
    tree = files.tree()
    dropped = tree["/d/dropped"]
    for bit in range(8 * len(dropped)):
        numbers = dict(zip(tree, range(1, 99), strict=False))
        changed = tree | {"/d/dropped": flip(dropped, bit)}
        with pytest.raises(CorruptLog, match="dropped"):
            open_store(RecordingFiles({numbers[name]: data for name, data in changed.items()}, numbers))
    files.unlink("/d/dropped")
    with pytest.raises(CorruptLog, match="missing that was not removed by retention"):
        open_store(files)


def test_leftovers_and_strangers() -> None:
    files, entries = several_segments()
    for name in ("seg-0000000000000002.log.tmp", "dropped.tmp", "notes.txt", "seg-xyz.log"):
        fd = files.open(f"/d/{name}", create=True)
        files.pwrite(fd, b"junk", 0)
        files.close(fd)
    store = open_store(files)
    check_entries(store, entries)
    assert {name for name in files.listdir("/d") if not name.startswith("seg-0")} == {"meta", "notes.txt", "seg-xyz.log"}
    assert sum("not part of the log" in warning for warning in store.report.warnings) == 2
    assert sum("left by interrupted work" in warning for warning in store.report.warnings) == 2
    store.close()


def test_another_nodes_directory_is_refused() -> None:
    files = RecordingFiles()
    AofLogStore.open("/d", monotonic_ns=lambda: 0, files=files, node_id="a", cluster_id="5" * 32).close()
    with pytest.raises(CorruptLog, match="belongs to node 'a'"):
        AofLogStore.open("/d", monotonic_ns=lambda: 0, files=files, node_id="b")
    store = AofLogStore.open("/d", monotonic_ns=lambda: 0, files=files, node_id="a")
    assert (store.node_id, store.cluster_id) == ("a", "5" * 32)
    store.close()


def test_the_watermark_follows_the_clock_and_is_never_ahead() -> None:
    files = RecordingFiles()
    now = [0]
    store = AofLogStore.open("/d", AofOptions(watermark_interval_ms=100), monotonic_ns=lambda: now[0], files=files)

    def saved() -> int:
        return sum(op.kind == "write" and op.inode == files.names[META] for op in files.operations)

    before = saved()
    fill(store, 5)
    now[0] += 99_999_999
    fill(store, 1, first=6)
    store.idle()
    assert saved() == before
    now[0] += 1
    store.idle()
    assert saved() == before + 1
    now[0] += 1 << 40
    store.idle()
    assert saved() == before + 1  # nothing moved
    fill(store, 1, first=7)
    assert saved() == before + 2
    store.close()
