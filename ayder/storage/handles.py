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
    retired: bool = False


class FileHandles:
    """Read-only descriptors of the files of one directory, by name."""

    def __init__(self, files: Files, directory: str, limit: int = 64) -> None:
        self._files = files
        self._directory = directory
        self._limit = limit
        self._lock = Lock()
        self._handles: OrderedDict[str, _Handle] = OrderedDict()

    @contextmanager
    def borrow(self, name: str) -> Iterator[int]:
        """A descriptor of the file that bears ``name`` now; stays valid inside the ``with`` whatever happens to the name."""
        with self._lock:
            handle = self._handles.get(name)
            if handle is None:
                handle = self._handles[name] = _Handle(self._files.open(f"{self._directory}/{name}", write=False))
            handle.readers += 1
            self._handles.move_to_end(name)
            self._evict()
        try:
            yield handle.fd
        finally:
            with self._lock:
                handle.readers -= 1
                if handle.retired and not handle.readers:
                    self._files.close(handle.fd)

    def forget(self, name: str) -> None:
        """The name stands for another file from now on, or for none."""
        with self._lock:
            handle = self._handles.pop(name, None)
            if handle is not None:
                self._retire(handle)

    def close(self) -> None:
        """Close what nobody reads; what is being read is closed by its last reader."""
        with self._lock:
            while self._handles:
                self._retire(self._handles.popitem()[1])

    def _evict(self) -> None:
        while len(self._handles) > self._limit:
            self._retire(self._handles.popitem(last=False)[1])

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
