"""Descriptors and pages for readers: two bounded caches that many worker threads share.

Owns: which read-only descriptors are open and which footer pages are in memory. Must not know: what the bytes mean.

Invariants: a descriptor is closed only when nobody reads through it, also when its file was renamed over or removed meanwhile;
at most ``limit`` idle descriptors and ``limit_bytes`` of pages are kept. A lock each, held for dictionary work only, never over a
system call that reads: the threads that come here are real ones, so nothing weaker will do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import attrs

from ayder.storage.files import Files

__all__ = ["FileHandles", "PageCache"]


@attrs.define(slots=True, eq=False)
class _Handle:
    fd: int
    readers: int = 0
    pinned: bool = False
    retired: bool = False


class FileHandles:
    """Read-only descriptors of the files of one directory, by name and generation.

    A rewritten file has the same name and another generation. ``pin`` the old one before its name is given away, then readers
    that know only the old one read on; once nobody can meet it any more, ``forget`` it.
    """

    def __init__(self, files: Files, directory: str, limit: int = 64) -> None:
        self._files = files
        self._directory = directory
        self._limit = limit
        self._lock = Lock()
        self._handles: OrderedDict[tuple[str, int], _Handle] = OrderedDict()

    @contextmanager
    def borrow(self, name: str, generation: int = 0) -> Iterator[int]:
        """A descriptor of the file, valid inside the ``with`` whatever happens to the name. Raises ``FileNotFoundError``."""
        with self._lock:
            handle = self._get(name, generation)
            handle.readers += 1
            self._evict()
        try:
            yield handle.fd
        finally:
            with self._lock:
                handle.readers -= 1
                if handle.retired and not handle.readers:
                    self._files.close(handle.fd)

    def _get(self, name: str, generation: int) -> _Handle:
        key = (name, generation)
        handle = self._handles.get(key)
        if handle is None:
            handle = self._handles[key] = _Handle(self._files.open(f"{self._directory}/{name}", write=False))
        self._handles.move_to_end(key)
        return handle

    def pin(self, name: str, generation: int) -> None:
        """Keep the file that bears the name now open until it is forgotten."""
        with self._lock:
            self._get(name, generation).pinned = True

    def forget(self, name: str, generation: int) -> None:
        """Nobody new will ask for this file."""
        with self._lock:
            handle = self._handles.pop((name, generation), None)
            if handle is not None:
                self._retire(handle)

    def close(self) -> None:
        """Close what nobody reads; what is being read is closed by its last reader."""
        with self._lock:
            while self._handles:
                self._retire(self._handles.popitem()[1])

    def _evict(self) -> None:
        if len(self._handles) > self._limit:
            oldest = next((key for key, handle in self._handles.items() if not handle.pinned), None)
            if oldest is not None:
                self._retire(self._handles.pop(oldest))

    def _retire(self, handle: _Handle) -> None:
        handle.retired = True
        if not handle.readers:
            self._files.close(handle.fd)


class PageCache:
    """Verified footer pages as words, least recently used go first."""

    def __init__(self, limit_bytes: int = 4 << 20) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._lock = Lock()
        self._pages: OrderedDict[tuple[int, int], memoryview] = OrderedDict()

    def get(self, key: tuple[int, int]) -> memoryview | None:
        """The page if it is here. ``key`` is (a segment's serial number, position of the page)."""
        with self._lock:
            page = self._pages.get(key)
            if page is not None:
                self._pages.move_to_end(key)
            return page

    def put(self, key: tuple[int, int], page: memoryview) -> None:
        """Keep the page, and drop others to stay within the limit."""
        with self._lock:
            if key in self._pages:
                return
            self._pages[key] = page
            self._bytes += page.nbytes
            while self._bytes > self._limit_bytes and len(self._pages) > 1:
                self._bytes -= self._pages.popitem(last=False)[1].nbytes
