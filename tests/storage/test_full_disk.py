"""A real disk that is really full: refused cleanly, nothing acknowledged lost, a clean start afterwards (S-2, S-9, D-12)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.checkpoints import FileCheckpointStore
from ayder.storage.interface import StorageFull
from tests.storage.model import check_entries, check_runs, make_entry, replay, simple_run
from tests.storage.test_conformance import fill, seal_all

LIMITED = """
import resource, sys
from pathlib import Path
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.interface import StorageFull
from tests.storage.model import make_entry, simple_run

limit, step = int(sys.argv[2]), int(sys.argv[3])
store = AofLogStore.open(Path(sys.argv[1]), AofOptions(preallocate_bytes=step, reserve_bytes=0), monotonic_ns=lambda: 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
refused = 0
for _ in range(200):
    try:
        store.append([make_entry(store.last_index + 1, 1, [simple_run(0, b"x" * 5000)])], None)
    except StorageFull:
        refused += 1
store.append([make_entry(store.last_index + 1, 1, [simple_run(0, b"small")])], None)
print(store.last_index, refused, flush=True)
"""


@pytest.mark.chaos
@pytest.mark.parametrize("step", [0, 4096, 1 << 20])
def test_a_file_size_limit_gives_a_short_write_and_a_clean_refusal(tmp_path: Path, step: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "log"), "100000", str(step)],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last, refused = map(int, result.stdout.split())
    assert (last, refused) == (20, 181)
    store = AofLogStore.open(tmp_path / "log", monotonic_ns=lambda: 0)
    assert store.report.torn_bytes == 0
    expected = [make_entry(index, 1, [simple_run(0, b"x" * 5000)]) for index in range(1, last)]
    check_entries(store, [*expected, make_entry(last, 1, [simple_run(0, b"small")])])
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def free(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_bsize


@pytest.mark.chaos
@pytest.mark.parametrize("step", [0, 64 << 10])
def test_a_full_disk_refuses_writes_serves_reads_and_takes_writes_again_after_deletion(small_disk: Path, step: int) -> None:
    options = AofOptions(segment_bytes=150_000, preallocate_bytes=step, reserve_bytes=300_000)
    store = AofLogStore.open(small_disk / "log", options, monotonic_ns=lambda: 0)
    checkpoints = FileCheckpointStore(small_disk / "checkpoints")
    checkpoints.write(1, b"old" * 1000)
    entries = []
    try:
        for index in range(1, 10_000):
            entry = make_entry(index, 1, [simple_run(index % 2, b"%d" % index * 400)])
            store.append([entry], None)
            entries.append(entry)
    except StorageFull as error:
        assert "no room" in str(error)
    assert len(entries) > 500
    with pytest.raises(StorageFull):
        checkpoints.write(2, b"new" * 100_000)
    assert checkpoints.newest() == (1, b"old" * 1000)
    applied = replay(store, entries)
    check_entries(store, entries)
    check_runs(store, applied, every=17)
    _fill_up(small_disk)
    seal_all(store, applied)  # the reserve pays for the footers
    assert free(small_disk) > 0
    starts = {uid: end // 2 for uid, end in applied.ends_at[len(entries)].items()}
    dropped = [info for info in store.segments() if info.sealed and store.live_bytes(info.segment_id, starts) == 0]
    assert len(dropped) > 3
    for info in dropped:
        store.drop_segment(info.segment_id)
    check_runs(store, applied, starts, every=17)
    entries += fill(store, 50, first=len(entries) + 1)
    check_entries(store, entries)
    store.close()
    store = AofLogStore.open(small_disk / "log", options, monotonic_ns=lambda: 0)
    check_entries(store, entries)
    assert store.verify() == []
    store.close()


def _fill_up(disk: Path) -> None:
    """Take every byte that is left."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (4096, 1):
            try:
                while True:
                    ballast.write(b"x" * size)
            except OSError:
                continue


@pytest.mark.chaos
def test_a_log_begun_on_a_full_disk_is_refused_and_begun_later(small_disk: Path) -> None:
    _fill_up(small_disk)
    options = AofOptions(reserve_bytes=0, preallocate_bytes=0)
    for _ in range(2):
        with pytest.raises((StorageFull, OSError)):
            AofLogStore.open(small_disk / "log", options, monotonic_ns=lambda: 0)
    (small_disk / "ballast").unlink()
    store = AofLogStore.open(small_disk / "log", options, monotonic_ns=lambda: 0)
    check_entries(store, fill(store, 3))
    store.close()
