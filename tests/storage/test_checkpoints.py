"""Checkpoints: newest first, two kept, a damaged one passed over and reported."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest

from ayder.errors import CorruptLog
from ayder.storage.checkpoints import FileCheckpointStore, MemoryCheckpointStore
from tests.storage.disks import Killed, KillSwitch, RecordingFiles, crash_images, flip


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return FileCheckpointStore(tmp_path / "made" / "here") if request.param == "file" else MemoryCheckpointStore()


def test_newest_and_the_two_that_are_kept(store: Any) -> None:
    assert store.newest() is None
    for index in (1, 7, 300, 2**40):
        store.write(index, b"state at %d" % index * 100)
        assert store.newest() == (index, b"state at %d" % index * 100)
    assert store.newest_until(2**40 - 1) == (300, b"state at 300" * 100)
    assert store.newest_until(299) is None
    assert store.damaged == []


def test_an_empty_state_is_a_state(store: Any) -> None:
    store.write(3, b"")
    assert store.newest() == (3, b"")


def two_checkpoints() -> tuple[RecordingFiles, str]:
    files = RecordingFiles()
    store = FileCheckpointStore("/c", files)
    store.write(1, b"old")
    store.write(2, b"new")
    return files, "/c/checkpoint-0000000000000002.ckp"


def test_every_flipped_bit_is_noticed_and_the_older_one_stands_in() -> None:
    files, name = two_checkpoints()
    inode = files.names[name]
    good = bytes(files.inodes[inode])
    for bit in range(8 * len(good)):
        files.inodes[inode] = bytearray(flip(good, bit))
        store = FileCheckpointStore("/c", files)
        assert store.newest() == (1, b"old")
        assert "checkpoint-0000000000000002.ckp" in store.damaged[0]


def test_every_cut_is_noticed() -> None:
    files, name = two_checkpoints()
    inode = files.names[name]
    good = bytes(files.inodes[inode])
    for length in range(len(good)):
        files.inodes[inode] = bytearray(good[:length])
        assert FileCheckpointStore("/c", files).newest() == (1, b"old")


def test_a_renamed_checkpoint_is_not_another_one() -> None:
    files, name = two_checkpoints()
    files.rename(name, "/c/checkpoint-0000000000000009.ckp")
    store = FileCheckpointStore("/c", files)
    assert store.newest() == (1, b"old")
    assert "not the checkpoint its name says" in store.damaged[0]


def test_a_newer_format_stops_the_release() -> None:
    from crc32c import crc32c

    files, name = two_checkpoints()
    data = files.inodes[files.names[name]]
    data[8] = 2
    data[4:8] = crc32c(bytes(data[8:])).to_bytes(4, "little")
    with pytest.raises(CorruptLog, match="format version 2"):
        FileCheckpointStore("/c", files).newest()


def test_a_checkpoint_seen_after_a_kill_outlasts_a_power_cut() -> None:
    """Killed between rename and fsync of the directory, started again (the log behind it is dropped), then a power cut."""
    files = KillSwitch(RecordingFiles())
    store = FileCheckpointStore("/c", files)
    store.write(1, b"old")
    for countdown in range(12):
        files.countdown = countdown
        with contextlib.suppress(Killed):
            store.write(2, b"new")
        files.countdown = -1
        store = FileCheckpointStore("/c", files)
        seen = store.newest()
        *_, (_, after_power_cut) = crash_images(RecordingFiles(), files.inner.operations, random.Random(0), 0)
        assert FileCheckpointStore("/c", after_power_cut).newest() == seen
    assert seen == (2, b"new")


def test_leftovers_go_and_strangers_stay() -> None:
    files, _ = two_checkpoints()
    for name in ("/c/checkpoint-0000000000000003.ckp.tmp", "/c/README", "/c/checkpoint-xyz.ckp"):
        files.close(files.open(name, create=True))
    store = FileCheckpointStore("/c", files)
    assert store.newest() == (2, b"new")
    assert "/c/README" in files.names
    assert "/c/checkpoint-0000000000000003.ckp.tmp" not in files.names
