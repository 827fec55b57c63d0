"""The one door to the file system: everything the storage floor does to a disk goes through ``Files``.

Owns: the protocol, the real implementation, the poison flag, and the distinction between "no room" and "nobody knows". Must not
know: what is in the files. Tests put recording, lossy and failing implementations behind the same door.

Invariants: positions are explicit (no shared file cursor, so threads may read one descriptor at once); a write may be short and
says so by its result; nothing is durable before ``fsync``/``fdatasync`` returned, no name before ``fsync_dir`` did.
Source: ALICE (OSDI'14) for what may not be assumed; Rebello et al. (ATC'20) for why a failed fsync ends the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NoReturn, Protocol

from ayder.errors import StoragePoisoned

__all__ = ["NO_SPACE", "REAL_FILES", "Files", "Poison", "RealFiles", "pread_exactly", "remove_if_there", "replace_file",
           "write_exactly"]  # fmt: skip

Buffer = bytes | bytearray | memoryview

NO_SPACE = frozenset((errno.ENOSPC, errno.EFBIG, errno.EDQUOT))
"""Errors after which we know that the missing bytes are missing: the caller may cut back and go on."""

_MAX_READ = 1 << 30  # Linux reads at most 2 GiB - 4 KiB at once; stay well below and loop


class Files(Protocol):
    """Blocking file operations on absolute or relative path strings. Each raises ``OSError`` as the system call does."""

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        """A descriptor for reading, and writing unless ``write`` is false; ``create`` demands that the file is new."""
        ...

    def close(self, fd: int) -> None:
        """Give the descriptor back."""
        ...

    def pread(self, fd: int, length: int, position: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        ...

    def pwrite(self, fd: int, data: Buffer, position: int) -> int:
        """Bytes written; may be fewer than given."""
        ...

    def pwritev(self, fd: int, buffers: Sequence[Buffer], position: int) -> int:
        """Bytes written from the buffers end to end; may be fewer than given. At most 1024 buffers."""
        ...

    def fsync(self, fd: int) -> None:
        """Contents and metadata of the file are on disk on return."""
        ...

    def fdatasync(self, fd: int) -> None:
        """Contents and size of the file are on disk on return."""
        ...

    def fallocate(self, fd: int, position: int, length: int) -> None:
        """Reserve space, extending the file with zeros."""
        ...

    def ftruncate(self, fd: int, length: int) -> None:
        """Set the length of the file."""
        ...

    def size(self, fd: int) -> int:
        """Length of the file in bytes."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what had it."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a name."""
        ...

    def fsync_dir(self, path: str) -> None:
        """Names in the directory are on disk on return."""
        ...

    def listdir(self, path: str) -> list[str]:
        """Names in the directory, in no order."""
        ...

    def mkdir(self, path: str) -> None:
        """Make the directory and its parents where they are missing, durably."""
        ...


class RealFiles:
    """``Files`` by system calls."""

    close = staticmethod(os.close)
    fsync = staticmethod(os.fsync)
    fdatasync = staticmethod(os.fdatasync)
    fallocate = staticmethod(os.posix_fallocate)
    ftruncate = staticmethod(os.ftruncate)
    pwrite = staticmethod(os.pwrite)
    pwritev = staticmethod(os.pwritev)
    rename = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)
    listdir = staticmethod(os.listdir)

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        """See ``Files.open``."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC
        return os.open(path, flags | os.O_CREAT | os.O_EXCL if create else flags, 0o640)

    def pread(self, fd: int, length: int, position: int) -> bytes:
        """See ``Files.pread``: loops over the limit of one system call."""
        data = os.pread(fd, min(length, _MAX_READ), position)
        if len(data) == length or not data:
            return data
        parts = [data]
        got = len(data)
        while got < length:
            data = os.pread(fd, min(length - got, _MAX_READ), position + got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def size(self, fd: int) -> int:
        """See ``Files.size``."""
        return os.fstat(fd).st_size

    def fsync_dir(self, path: str) -> None:
        """See ``Files.fsync_dir``."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: str) -> None:
        """See ``Files.mkdir``: every parent that gains a name is synced."""
        path = os.path.abspath(path)
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        self.mkdir(parent)
        os.mkdir(path, 0o750)
        self.fsync_dir(parent)


REAL_FILES = RealFiles()


class Poison:
    """The flag that a write or a sync failed; shared by all parts of one store and never taken back."""

    __slots__ = ("reason",)

    def __init__(self) -> None:
        self.reason: str | None = None

    def check(self) -> None:
        """Raises ``StoragePoisoned`` once the flag is up."""
        if self.reason is not None:
            raise StoragePoisoned(self.reason)

    def raise_for(self, what: str, error: BaseException) -> NoReturn:
        """Put the flag up (the first reason stays) and raise ``StoragePoisoned``."""
        if self.reason is None:
            self.reason = f"{what}: {error}"
        raise StoragePoisoned(self.reason) from error


def pread_exactly(files: Files, fd: int, length: int, position: int) -> bytes:
    """``length`` bytes; raises ``EOFError`` when the file ends before."""
    data = files.pread(fd, length, position)
    if len(data) != length:
        raise EOFError(f"{length} bytes wanted at {position}, the file has {len(data)} of them")
    return data


def write_exactly(files: Files, fd: int, data: Buffer, position: int) -> None:
    """Write all of ``data``; a short write raises ``OSError`` (ENOSPC), as the next one would have said."""
    if files.pwrite(fd, data, position) != len(data):
        raise OSError(errno.ENOSPC, "short write")


def remove_if_there(files: Files, path: str) -> None:
    """Remove a name that may be absent."""
    try:
        files.unlink(path)
    except FileNotFoundError:
        pass


def replace_file(files: Files, directory: str, name: str, data: bytes) -> None:
    """Make ``name`` hold exactly ``data``, whatever happens in between: aside, fsync, rename, fsync of the directory.

    Raises ``OSError``; then the old content still stands and the file aside is gone where that was possible.
    """
    path = f"{directory}/{name}"
    aside = path + ".tmp"
    remove_if_there(files, aside)  # what an interrupted attempt left
    fd = files.open(aside, create=True)
    try:
        try:
            write_exactly(files, fd, data, 0)
            files.fsync(fd)
        finally:
            files.close(fd)
    except OSError as error:
        if error.errno in NO_SPACE:
            remove_if_there(files, aside)
        raise
    files.rename(aside, path)
    files.fsync_dir(directory)
