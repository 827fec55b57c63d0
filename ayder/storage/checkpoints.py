"""Captured states of the state machine as files, written so that a crash leaves the old ones.

Owns: the file ``checkpoint-<index>.ckp``: name, checksum, how many are kept. Must not know: what a state is.

Layout, little-endian: u32 magic "AYCK" | u32 crc32c of all that follows | u16 version | u16 0 | u32 0 | u64 index | u64 length
| the state. Source: RELIABILITY S-4.
"""

from __future__ import annotations

import struct
from pathlib import Path

from crc32c import crc32c

from ayder.entries import LogIndex
from ayder.errors import CorruptLog
from ayder.storage.files import NO_SPACE, REAL_FILES, Files, Poison, replace_file
from ayder.storage.interface import StorageFull

__all__ = ["FileCheckpointStore", "MemoryCheckpointStore"]

FORMAT_VERSION = 1
KEPT = 2

_MAGIC = int.from_bytes(b"AYCK", "little")
_BEFORE = struct.Struct("<II")
_COVERED = struct.Struct("<HHIQQ")
_HEADER_BYTES = _BEFORE.size + _COVERED.size


def _name(index: LogIndex) -> str:
    return f"checkpoint-{index:016x}.ckp"


def _index_of(name: str) -> LogIndex | None:
    if len(name) != 31 or not name.startswith("checkpoint-") or not name.endswith(".ckp"):
        return None
    try:
        return int(name[11:27], 16)
    except ValueError:
        return None


class FileCheckpointStore:
    """See ``CheckpointStore``. One call at a time."""

    def __init__(self, path: Path | str, files: Files = REAL_FILES) -> None:
        """Use the directory ``path``, which is made if it is missing. Raises ``OSError``."""
        self._directory = str(path)
        self._files = files
        self._poison = Poison()
        self.damaged: list[str] = []
        """Sentences about checkpoints that ``newest`` passed over."""
        files.mkdir(self._directory)
        for name in files.listdir(self._directory):
            if name.endswith(".tmp"):
                files.unlink(f"{self._directory}/{name}")
        # A process killed after its rename may have left a name that is not durable yet. Whoever sees it will rely on it, and
        # drop the log behind it.
        files.fsync_dir(self._directory)

    def _indexes(self) -> list[LogIndex]:
        """Newest first."""
        found = (_index_of(name) for name in self._files.listdir(self._directory))
        return sorted((index for index in found if index is not None), reverse=True)

    def newest(self) -> tuple[LogIndex, bytes] | None:
        """See ``CheckpointStore.newest``. Raises ``CorruptLog`` for a newer format: passing that over would undo an upgrade."""
        return self.newest_until(None)

    def newest_until(self, limit: LogIndex | None) -> tuple[LogIndex, bytes] | None:
        """The newest checkpoint that verifies and stands at or before ``limit``."""
        for index in self._indexes():
            if limit is not None and index > limit:
                continue
            state = self._read(index)
            if state is not None:
                return index, state
        return None

    def _read(self, index: LogIndex) -> bytes | None:
        path = f"{self._directory}/{_name(index)}"
        fd = self._files.open(path, write=False)
        try:
            data = self._files.pread(fd, self._files.size(fd), 0)
        finally:
            self._files.close(fd)
        view = memoryview(data)
        if len(data) < _HEADER_BYTES or crc32c(view[8:]) != int.from_bytes(data[4:8], "little"):
            self.damaged.append(f"{path} fails its checksum: passed over")
            return None
        version, _, _, at, length = _COVERED.unpack_from(data, 8)
        if data[:4] != _MAGIC.to_bytes(4, "little") or at != index or length != len(data) - _HEADER_BYTES:
            self.damaged.append(f"{path} is not the checkpoint its name says: passed over")
            return None
        if version != FORMAT_VERSION:
            raise CorruptLog(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")
        return data[_HEADER_BYTES:]

    def write(self, index: LogIndex, state: bytes) -> None:
        """See ``CheckpointStore.write``. Raises ``StorageFull`` (the older ones stand), ``StoragePoisoned``."""
        self._poison.check()
        covered = _COVERED.pack(FORMAT_VERSION, 0, 0, index, len(state))
        head = _BEFORE.pack(_MAGIC, crc32c(state, crc32c(covered)))
        try:
            replace_file(self._files, self._directory, _name(index), b"".join((head, covered, state)))
            for old in self._indexes()[KEPT:]:
                self._files.unlink(f"{self._directory}/{_name(old)}")
        except OSError as error:
            if error.errno in NO_SPACE:
                raise StorageFull(f"no room for a checkpoint in {self._directory}: {error}") from error
            self._poison.raise_for(f"writing a checkpoint to {self._directory}", error)


class MemoryCheckpointStore:
    """The memory twin of ``FileCheckpointStore``."""

    def __init__(self) -> None:
        self._states: dict[LogIndex, bytes] = {}
        self.damaged: list[str] = []

    def newest(self) -> tuple[LogIndex, bytes] | None:
        """See ``CheckpointStore.newest``."""
        return self.newest_until(None)

    def newest_until(self, limit: LogIndex | None) -> tuple[LogIndex, bytes] | None:
        """The newest checkpoint at or before ``limit``."""
        index = max((index for index in self._states if limit is None or index <= limit), default=None)
        return None if index is None else (index, self._states[index])

    def write(self, index: LogIndex, state: bytes) -> None:
        """See ``CheckpointStore.write``."""
        self._states[index] = state
        for old in sorted(self._states)[:-KEPT]:
            del self._states[old]
