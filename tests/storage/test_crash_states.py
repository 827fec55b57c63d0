"""Every disk that a power cut may leave behind is opened and judged (RELIABILITY 3.5-1), and the judge is shown to say no."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ayder.errors import CorruptLog
from ayder.storage import maintenance, upkeep
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.meta import MetaFile
from ayder.storage.recovery import _Recovery
from ayder.storage.segment import SegmentWriter
from tests.storage.crash_workload import LOG, Workload, soak_workloads
from tests.storage.disks import Killed, KillSwitch, RecordingFiles, crash_images
from tests.storage.model import Applied, check_entries, make_entry, partition, replay
from tests.storage.test_conformance import fill, seal_all

IMAGES = 100
STEPS = 40
BATCHES = 8


def judge_all(seed: int, *, images: int = IMAGES, deaf: tuple[str, ...] = (), steps: int = STEPS) -> int:
    """Run a workload, judge the disks of about ``images`` crashes; how many there were."""
    files = RecordingFiles(deaf=deaf)
    workload = Workload(seed, files)
    workload.run(steps)
    count = 0
    for done, disk in crash_images(RecordingFiles(), files.operations, random.Random(seed), images):
        try:
            workload.judge(done, disk)
        except Exception as error:
            error.add_note(f"workload {seed}, crash after {done} of {len(files.operations)} operations")
            raise
        count += 1
    return count


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_crash_leaves_a_disk_that_holds_what_was_acknowledged_and_nothing_else(batch: int) -> None:
    workloads = range(batch, soak_workloads(200), BATCHES)
    judged = sum(judge_all(seed) for seed in workloads)
    assert judged > 60 * len(workloads)  # not vacuous


def test_the_workloads_do_everything_there_is_to_do() -> None:
    """Kills, rolls, seals, drops, rewrites, replaced suffixes and checkpoints all happen, many times."""
    kinds: Counter[str] = Counter()
    for seed in range(40):
        files = RecordingFiles()
        workload = Workload(seed, files)
        workload.run(STEPS)
        kinds["kill"] += workload.kills
        for operation in files.operations:
            what = operation.new_name or operation.name
            kinds[operation.kind + " " + what.rsplit("/")[-1].split("-")[0]] += 1
        terms = {entry.term for entry in workload.state.entries}
        kinds["terms"] += len(terms)
    for wanted in ("kill", "create seg", "rename seg", "unlink seg", "rename dropped", "rename checkpoint", "truncate ", "terms"):
        assert kinds[wanted] > 20, (wanted, kinds)


def test_a_crash_during_recovery_is_recovered_from() -> None:
    """The disk after a crash is opened, the power goes again on the way, and again the judge must agree."""
    judged = 0
    for seed in range(1000, 1000 + soak_workloads(200) // 10):
        files = RecordingFiles()
        workload = Workload(seed, files)
        workload.run(STEPS)
        for done, first in crash_images(RecordingFiles(), files.operations, random.Random(seed), 15):
            start = RecordingFiles({number: bytes(data) for number, data in first.inodes.items()}, first.names)
            AofLogStore.open(LOG, workload.options, monotonic_ns=lambda: 0, files=first)
            for _, second in crash_images(start, first.operations, random.Random(seed), 10):
                workload.judge(done, second)
                judged += 1
    assert judged > 500


WORK: dict[str, Callable[[AofLogStore, Applied], Any]] = {
    "seal": lambda store, applied: store.seal(1, applied.ends_at[store.segments()[0].last_index]),
    "rewrite": lambda store, applied: store.rewrite_segment(1, {partition(0): 3, partition(1): 0, partition(2): 9}),
    "drop": lambda store, applied: store.drop_segment(1),
    "append": lambda store, applied: store.append([make_entry(store.last_index + 1, 1, [])], None),
}


@pytest.mark.parametrize("work", list(WORK))
def test_killed_anywhere_in_a_piece_of_work_then_more_work_then_a_power_cut(work: str) -> None:
    """What a restart believes it must also make last: the next seal or drop relies on it."""
    options = AofOptions(segment_bytes=300, preallocate_bytes=256, reserve_bytes=0)
    points = 0
    while True:
        disk = RecordingFiles()
        files = KillSwitch(disk)
        store = AofLogStore.open("/d", options, monotonic_ns=lambda: 0, files=files)
        entries = fill(store, 10)  # the open segment is full: the next append rolls
        applied = replay(store, entries)
        if work in ("rewrite", "drop"):
            WORK["seal"](store, applied)
        files.countdown = points
        with contextlib.suppress(Killed):
            WORK[work](store, applied)
            break
        points += 1
        files.countdown = -1
        killed = len(disk.operations)
        store = AofLogStore.open("/d", options, monotonic_ns=lambda: 0, files=files)
        entries = [*entries, make_entry(11, 1, [])][: store.last_index]
        replay(store, entries)
        seal_all(store, applied)
        images = [
            image for done, image in crash_images(RecordingFiles(), disk.operations, random.Random(0), 10**6) if done >= killed
        ]
        assert len(images) > 10
        for image in images:
            store = AofLogStore.open("/d", options, monotonic_ns=lambda: 0, files=image)
            check_entries(store, entries[: store.last_index])
            replay(store, entries[: store.last_index])
            assert store.last_index >= 10
            assert store.verify() == []
            store.close()
    assert points > 3


# -- the judge must be able to say no ---------------------------------------------------------------------------------
def assert_red(images: int = 150, workloads: int = 12, **how: Any) -> None:
    for seed in range(workloads):
        try:
            judge_all(seed, images=images, steps=60, **how)
        except (AssertionError, CorruptLog, LookupError, OSError):
            return
    pytest.fail("nothing noticed")


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "fsync_dir"])
def test_a_disk_that_lies_about_a_sync_is_noticed(call: str) -> None:
    assert_red(deaf=(call,))


def test_a_store_that_writes_the_watermark_before_the_sync_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SegmentWriter.write

    def write(self: Any, buffers: Any, length: int) -> None:
        store = holder[0]
        segment = store._open
        tail, chain = segment.tail, segment.tail_chain
        if len(buffers) > 1:
            segment.tail_chain = int.from_bytes(buffers[-2][4:8], "little")
        segment.tail = tail + length
        store._save_watermark(sync=True)
        segment.tail, segment.tail_chain = tail, chain
        real(self, buffers, length)

    holder: list[Any] = []
    real_start = AofLogStore._start

    def start(self: Any, log: Any) -> None:
        real_start(self, log)
        holder[:] = [self]

    monkeypatch.setattr(AofLogStore, "_start", start)
    monkeypatch.setattr(SegmentWriter, "write", write)
    assert_red()


def test_a_roll_that_forgets_the_directory_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SegmentWriter.create

    def create(files: Any, *rest: Any) -> SegmentWriter:
        class NoDirectorySync:
            def __getattr__(self, name: str) -> Any:
                return (lambda path: None) if name == "fsync_dir" else getattr(files, name)

        writer = real(NoDirectorySync(), *rest)  # type: ignore[arg-type]
        writer._files = files
        return writer

    monkeypatch.setattr(SegmentWriter, "create", create)
    assert_red()


def test_a_seal_whose_trailer_does_not_wait_for_the_footer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = maintenance.seal_file

    def seal_file(files: Any, *rest: Any) -> Any:
        syncs = []

        class OneSyncOnly:
            def __getattr__(self, name: str) -> Any:
                if name == "fsync" and not syncs:
                    return syncs.append
                return getattr(files, name)

        return real(OneSyncOnly(), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(upkeep.maintenance, "seal_file", seal_file)
    assert_red(images=600)


def test_a_rewrite_that_renames_before_its_sync_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = maintenance.rewrite_into

    def rewrite_into(files: Any, *rest: Any) -> Any:
        class NoSync:
            def __getattr__(self, name: str) -> Any:
                return (lambda fd: None) if name == "fsync" else getattr(files, name)

        return real(NoSync(), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(upkeep.maintenance, "rewrite_into", rewrite_into)
    assert_red(images=600)


def test_a_drop_that_does_not_write_down_what_it_drops_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: Any, segment_id: int) -> None:
        self._ranges.append((segment_id, segment_id))

    monkeypatch.setattr("ayder.storage.meta.DroppedSegments.add", add)
    assert_red()


@pytest.mark.parametrize("call", ["fsync", "fsync_dir"])
def test_a_recovery_that_trusts_the_page_cache_is_noticed(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process left unsynced is shown after the restart, so the restart has to sync it."""
    real = _Recovery._finish

    def finish(self: Any, leftovers: list[str]) -> None:
        files = self._files

        class NoSync:
            def __getattr__(self, name: str) -> Any:
                return (lambda what: None) if name == call else getattr(files, name)

        self._files = NoSync()
        real(self, leftovers)

    monkeypatch.setattr(_Recovery, "_finish", finish)
    assert_red(workloads=80, images=300)


def test_a_meta_file_that_rewrites_its_only_good_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MetaFile.save

    def save(self: MetaFile, state: Any, *, sync: bool) -> None:
        self._stable = 1
        real(self, state, sync=sync)

    monkeypatch.setattr(MetaFile, "save", save)
    # A slot is one sector, so only a disk that tears inside a sector tells the difference.
    monkeypatch.setattr("tests.storage.disks.SECTOR", 100)
    assert_red(images=600)


def test_without_a_mutation_the_same_workloads_are_green() -> None:
    for seed in range(4):
        judge_all(seed, images=300, steps=60)
