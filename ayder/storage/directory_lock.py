"""One node a data directory: a lock that the kernel drops when its holder dies, however it dies.

Owns: the file ``lock`` and the sentence a second process gets. Must not know: what else is in the directory.
``flock`` and not a pid file: a pid file outlives its process, and its number may belong to another one by then. The number in the
file is only for the message.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from ayder.storage.files import REAL_FILES

__all__ = ["DirectoryInUse", "DirectoryLock"]

LOCK_FILE = "lock"


class DirectoryInUse(Exception):
    """Another process works on the data directory."""


class DirectoryLock:
    """Held from construction until ``close`` or the end of the process. A context manager."""

    def __init__(self, directory: Path | str) -> None:
        """Make the directory if it is missing and take the lock without waiting. Raises ``DirectoryInUse``, ``OSError``."""
        REAL_FILES.mkdir(str(directory))
        path = Path(directory) / LOCK_FILE
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise DirectoryInUse(
                f"{directory} is in use by {who}: one node at a time, stop that one first or use another directory"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let another process have the directory. The file stays: removing it would let two hold "the" lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
