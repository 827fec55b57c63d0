"""Directories that earlier releases wrote are opened by this one, and this one still writes format version 1 byte for byte.

``golden/v1`` was written by ``write_golden``; it is never written again. A new format version gets a new directory beside it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ayder.entries import EntryKind, HardState, LogEntry
from ayder.storage.aof import AofLogStore, AofOptions
from ayder.storage.checkpoints import FileCheckpointStore
from tests.storage.model import Applied, check_entries, check_runs, make_entry, partition, replay, simple_run

GOLDEN = Path(__file__).parent / "golden" / "v1"
OPTIONS = AofOptions(segment_bytes=700, preallocate_bytes=0, reserve_bytes=0, watermark_interval_ms=0)
CLUSTER = "0123456789abcdef0123456789abcdef"
LOG_STARTS = {partition(0): 6, partition(1): 9, partition(2): 0, partition(3): 4}
DROPPED, COMPACTED = 1, 3


def golden_entries() -> list[LogEntry]:
    """The log of the golden directory."""
    start = 1_700_000_000_000
    entries = [LogEntry(1, 1, EntryKind.NOOP, start, b""), LogEntry(2, 1, EntryKind.MEMBERSHIP, start, b"me")]
    for index in range(3, 41):
        runs = [simple_run(index % 4, b"value %d" % index, b"", bytes([index]) * (index % 5))]
        if index % 3 == 0:
            runs.append(simple_run(2, b'{"n":%d}' % index))
        entries.append(make_entry(index, 1 + index // 15, runs, start + 10 * index))
    return entries


def write_golden(path: Path) -> None:
    """Write the golden directory with today's code."""
    store = AofLogStore.open(path / "log", OPTIONS, monotonic_ns=lambda: 0, node_id="node-1", cluster_id=CLUSTER)
    entries = golden_entries()
    store.append(entries[:2], HardState(1, "node-1"))
    for entry in entries[2:30]:
        store.append([entry], None)
    store.append([make_entry(31, 2, []), make_entry(32, 2, [])], None)  # not committed: replaced below
    store.append(entries[30:], HardState(4, None))
    applied = replay(store, entries)
    for info in store.segments()[:5]:
        store.seal(info.segment_id, applied.ends_at[info.last_index])
    store.rewrite_segment(COMPACTED, LOG_STARTS)
    store.drop_segment(DROPPED)
    store.close()
    checkpoints = FileCheckpointStore(path / "checkpoints")
    checkpoints.write(20, b"state at 20")
    checkpoints.write(30, bytes(range(256)))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_directory_of_version_1_is_opened_and_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "v1")
    entries = golden_entries()
    for _ in range(2):
        store = AofLogStore.open(tmp_path / "v1/log", OPTIONS, monotonic_ns=lambda: 0)
        assert (store.node_id, store.cluster_id) == ("node-1", CLUSTER)
        assert store.hard_state == HardState(4, None)
        infos = store.segments()
        assert infos[0].segment_id == 2
        assert [info.sealed for info in infos][:5] == [True] * 4 + [False]
        assert 1 < store.first_index < store.unsealed_first_index < store.last_index == 40
        check_entries(store, entries)
        applied = replay(store, entries)
        check_runs(store, applied, _readable(applied, infos[0].first_index))
        assert store.verify() == []
        assert store.report.warnings == []
        store.close()
        assert files_of(tmp_path / "v1") == files_of(GOLDEN)
    checkpoints = FileCheckpointStore(tmp_path / "v1/checkpoints")
    assert checkpoints.newest() == (30, bytes(range(256)))
    assert checkpoints.newest_until(29) == (20, b"state at 20")


def _readable(applied: Applied, first_index: int) -> dict[int, int]:
    """Log starts that leave out what was dropped."""
    dropped = applied.ends_at[first_index - 1]
    return {uid: max(start, dropped.get(uid, 0)) for uid, start in LOG_STARTS.items()}


def test_this_release_writes_version_1_byte_for_byte(tmp_path: Path) -> None:
    write_golden(tmp_path)
    written, golden = files_of(tmp_path), files_of(GOLDEN)
    assert written.keys() == golden.keys()
    assert [name for name in golden if written[name] != golden[name]] == []


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
