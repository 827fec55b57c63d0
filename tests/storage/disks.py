"""A disk in memory that remembers every operation, can lose what was not synced, and can fail.

Owns: ``RecordingFiles`` (a ``Files`` on inodes in memory with a list of what was done), ``crash_images`` (every disk a power
cut could leave, as ALICE counts them) and ``FaultFiles``. Must not know: what a log is.

The crash model: data and size of a file, and the names in a directory, are independent of each other and of other files. What was
done to a file since its last fsync may be there or not, each operation by itself and each 512-byte sector of a write by itself;
the same holds for the names in a directory since its last fsync. Operations that are there keep their order.
"""

from __future__ import annotations

import errno
import posixpath
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

SECTOR = 512


class Operation(NamedTuple):
    """One thing done to the disk. ``inode`` is a number; names are full paths."""

    kind: str
    inode: int = 0
    name: str = ""
    new_name: str = ""
    position: int = 0
    data: bytes = b""


class RecordingFiles:
    """``Files`` in memory. ``operations`` is what was done, in order; kinds in ``deaf`` are not recorded: a lying disk."""

    def __init__(
        self, inodes: dict[int, Any] | None = None, names: dict[str, int] | None = None, deaf: Sequence[str] = ()
    ) -> None:
        self.inodes: dict[int, bytearray] = {number: bytearray(data) for number, data in (inodes or {}).items()}
        self.names: dict[str, int] = dict(names or {})
        self.operations: list[Operation] = []
        self._deaf = frozenset(deaf)
        self._next_inode = max(self.inodes, default=0) + 1
        self._open: dict[int, int] = {}
        self._next_fd = 3

    def _did(self, kind: str, inode: int = 0, **fields: Any) -> None:
        if kind not in self._deaf:
            self.operations.append(Operation(kind, inode, **fields))

    def tree(self) -> dict[str, bytes]:
        """Every file with its content."""
        return {name: bytes(self.inodes[inode]) for name, inode in self.names.items()}

    @property
    def open_descriptors(self) -> int:
        return len(self._open)

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        if create:
            if path in self.names:
                raise FileExistsError(errno.EEXIST, "exists", path)
            inode = self.names[path] = self._next_inode
            self._next_inode += 1
            self.inodes[inode] = bytearray()
            self._did("create", inode, name=path)
        elif path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self._next_fd += 1
        self._open[self._next_fd] = self.names[path]
        return self._next_fd

    def close(self, fd: int) -> None:
        del self._open[fd]

    def pread(self, fd: int, length: int, position: int) -> bytes:
        return bytes(self.inodes[self._open[fd]][position : position + length])

    def pwrite(self, fd: int, data: Any, position: int) -> int:
        return self.pwritev(fd, [data], position)

    def pwritev(self, fd: int, buffers: Sequence[Any], position: int) -> int:
        inode = self._open[fd]
        data = b"".join(buffers)
        put(self.inodes[inode], position, data)
        self._did("write", inode, position=position, data=data)
        return len(data)

    def fsync(self, fd: int) -> None:
        self._did("fsync", self._open[fd])

    def fdatasync(self, fd: int) -> None:
        self._did("fdatasync", self._open[fd])

    def fallocate(self, fd: int, position: int, length: int) -> None:
        inode = self._open[fd]
        extend(self.inodes[inode], position + length)
        self._did("extend", inode, position=position + length)

    def ftruncate(self, fd: int, length: int) -> None:
        inode = self._open[fd]
        truncate(self.inodes[inode], length)
        self._did("truncate", inode, position=length)

    def size(self, fd: int) -> int:
        return len(self.inodes[self._open[fd]])

    def rename(self, old: str, new: str) -> None:
        inode = self.names.pop(old)
        self.names[new] = inode
        self._did("rename", inode, name=old, new_name=new)

    def unlink(self, path: str) -> None:
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self._did("unlink", self.names.pop(path), name=path)

    def fsync_dir(self, path: str) -> None:
        self._did("fsync_dir", name=path)

    def listdir(self, path: str) -> list[str]:
        return [posixpath.basename(name) for name in self.names if posixpath.dirname(name) == path]

    def mkdir(self, path: str) -> None:
        """Directories are there as soon as they are named: making them durable is one system call sequence tested for itself."""


def put(data: bytearray, position: int, new: bytes) -> None:
    """Write into a file's bytes; a hole reads as zeros."""
    extend(data, position)
    data[position : position + len(new)] = new


def extend(data: bytearray, length: int) -> None:
    """Grow to ``length`` with zeros."""
    if len(data) < length:
        data += bytes(length - len(data))


def truncate(data: bytearray, length: int) -> None:
    """Cut or grow to ``length``."""
    del data[length:]
    extend(data, length)


class _Replay:
    """The disk while the operations are done again: what is surely there, and what is pending."""

    def __init__(self, files: RecordingFiles) -> None:
        self.inodes = {number: bytes(data) for number, data in files.inodes.items()}
        self.names = dict(files.names)
        self.pending: dict[int, list[Operation]] = {}
        self.pending_names: dict[str, list[Operation]] = {}

    def do(self, operation: Operation) -> None:
        if operation.kind in ("fsync", "fdatasync"):
            data = bytearray(self.inodes.get(operation.inode, b""))
            for one in self.pending.pop(operation.inode, ()):
                apply(data, one)
            self.inodes[operation.inode] = bytes(data)
        elif operation.kind == "fsync_dir":
            for one in self.pending_names.pop(operation.name, ()):
                apply_name(self.names, one)
        elif operation.kind in ("create", "rename", "unlink"):
            self.pending_names.setdefault(posixpath.dirname(operation.name), []).append(operation)
        else:
            self.pending.setdefault(operation.inode, []).append(operation)

    def image(self, keep: random.Random | None, *, everything: bool = False, last: Operation | None = None) -> RecordingFiles:
        """A disk after a power cut now: all that is pending, none of it, or what ``keep`` chooses; ``last`` is torn as given."""
        inodes = dict(self.inodes)
        for inode, operations in self.pending.items():
            data = bytearray(inodes.get(inode, b""))
            for one in operations:
                if everything:
                    apply(data, one)
                elif keep is not None:
                    apply_partly(data, one, keep)
            inodes[inode] = bytes(data)
        if last is not None:
            data = bytearray(inodes.get(last.inode, b""))
            apply(data, last)
            inodes[last.inode] = bytes(data)
        names = dict(self.names)
        for operations in self.pending_names.values():
            for one in operations:
                if everything or (keep is not None and keep.random() < 0.5):
                    apply_name(names, one)
        used = set(names.values())
        return RecordingFiles({number: inodes.get(number, b"") for number in used}, names)


def apply(data: bytearray, operation: Operation) -> None:
    """All of one operation on a file."""
    if operation.kind == "write":
        put(data, operation.position, operation.data)
    elif operation.kind == "extend":
        extend(data, operation.position)
    else:
        truncate(data, operation.position)


def apply_partly(data: bytearray, operation: Operation, choose: random.Random) -> None:
    """The operation, or nothing, or of a write some sectors, or only the size."""
    chance = choose.random()
    if chance < 0.35:
        return
    if operation.kind != "write" or chance < 0.7:
        apply(data, operation)
        return
    end = operation.position + len(operation.data)
    if chance < 0.85:
        extend(data, end)
    start = operation.position
    while start < end:
        stop = min(end, start - start % SECTOR + SECTOR)
        if choose.random() < 0.5:
            put(data, start, operation.data[start - operation.position : stop - operation.position])
        start = stop


def apply_name(names: dict[str, int], operation: Operation) -> None:
    """One change of a directory."""
    if operation.kind == "create":
        names[operation.name] = operation.inode
    elif operation.kind == "unlink":
        if names.get(operation.name) == operation.inode:
            del names[operation.name]
    else:
        names.pop(operation.name, None)
        names[operation.new_name] = operation.inode


def crash_images(
    start: RecordingFiles, operations: Sequence[Operation], choose: random.Random, limit: int
) -> Iterator[tuple[int, RecordingFiles]]:
    """(number of operations done, the disk found after a power cut there): about ``limit`` of them, spread over all prefixes.

    ``start`` is the disk before the first operation. Of each chosen prefix: everything done is there (a killed process), nothing
    unsynced is, and random choices; of each chosen write, every tear at a sector's edge.
    """
    replay = _Replay(start)
    share = min(1.0, limit / max(1, 4 * len(operations)))
    for done, operation in enumerate(operations):
        if choose.random() < share:
            yield done, replay.image(None, everything=True)
            yield done, replay.image(None)
            for _ in range(2):
                yield done, replay.image(choose)
            if operation.kind == "write" and len(operation.data) > SECTOR:
                for cut in range(SECTOR, len(operation.data), SECTOR):
                    yield done, replay.image(None, everything=True, last=operation._replace(data=operation.data[:cut]))
        replay.do(operation)
    yield len(operations), replay.image(None, everything=True)
    yield len(operations), replay.image(None)


class Killed(BaseException):
    """The process is gone; what it wrote is in the page cache."""


class KillSwitch:
    """``Files`` over others under which the process dies before a chosen operation."""

    MUTATING = frozenset(
        ("open", "pwrite", "pwritev", "fsync", "fdatasync", "fallocate", "ftruncate", "rename", "unlink", "fsync_dir")
    )

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.countdown = -1
        """Operations until death; negative: lives on."""

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self.inner, name)
        if name not in self.MUTATING:
            return inner

        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.countdown == 0:
                raise Killed
            self.countdown -= 1
            return inner(*arguments, **keywords)

        return call


class FaultFiles:
    """``Files`` over others in which the nth call of a kind fails.

    ``fail(kind, nth, error)``: an errno is raised; for writes "short" writes half. A failed fsync drops the unsynced pages of
    that file when ``inner`` is a ``RecordingFiles`` whose disk is asked for by ``power_cut``.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls: dict[str, int] = {}
        self._faults: dict[tuple[str, int], int | str] = {}
        self.bitten = 0

    def fail(self, kind: str, nth: int, error: int | str) -> None:
        """The ``nth`` call of ``kind`` from now on (1: the next) fails."""
        self._faults[kind, self.calls.get(kind, 0) + nth] = error

    def fail_always(self, kind: str, error: int) -> None:
        """Every call from now on fails."""
        self._faults[kind, 0] = error

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self.inner, name)
        if not callable(inner):
            return inner

        def call(*arguments: Any, **keywords: Any) -> Any:
            number = self.calls[name] = self.calls.get(name, 0) + 1
            fault = self._faults.get((name, number), self._faults.get((name, 0)))
            if fault is None:
                return inner(*arguments, **keywords)
            self.bitten += 1
            if fault == "short":
                fd, data, position = arguments
                whole = b"".join(data) if name == "pwritev" else bytes(data)
                return self.inner.pwrite(fd, whole[: len(whole) // 2], position)
            if fault == "flip":
                return flip(inner(*arguments, **keywords), number)
            assert isinstance(fault, int)
            raise OSError(fault, errno.errorcode[fault])

        return call


def flip(data: bytes, bit: int) -> bytes:
    """One bit of ``data`` the other way round."""
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)
