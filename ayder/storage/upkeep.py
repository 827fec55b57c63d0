"""Work on whole segments while the log is open: seal, drop, rewrite, and the ballast that makes it possible on a full disk.

Owns: the order of these changes, one at a time, and their undoing on a full disk. Must not know: appending; the bytes
(``maintenance.py``).

The lock is for real threads: workers call in here, and two changes at once would each swap in a view that lacks the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import TypeVar

import attrs

from ayder.storage import maintenance
from ayder.storage.files import NO_SPACE, Poison, remove_if_there
from ayder.storage.footer import Trailer
from ayder.storage.interface import StorageFull
from ayder.storage.lookup import View, Views
from ayder.storage.meta import DroppedSegments
from ayder.storage.recovery import RESERVE_FILE, TermStarts
from ayder.storage.sealed import SealedSegment, SegmentReader

__all__ = ["Upkeep"]

_Result = TypeVar("_Result")


class Upkeep:
    """Seals, drops and rewrites the segments of one store. Worker threads."""

    def __init__(
        self, reader: SegmentReader, views: Views, poison: Poison, dropped: DroppedSegments, terms: TermStarts, reserve_bytes: int
    ) -> None:
        self._reader = reader
        self._files = reader.files
        self._directory = reader.directory
        self._views = views
        self._poison = poison
        self._dropped = dropped
        self._terms = terms
        self._reserve_bytes = reserve_bytes
        self._lock = Lock()

    def seal(self, segment_id: int, end_offsets: Mapping[int, int]) -> None:
        """See ``LogStore.seal``. Raises ``StorageFull`` (the segment stays as it is), ``ValueError``, ``StoragePoisoned``."""
        with self._lock:
            self._poison.check()
            view = self._views.current
            if len(view.unsealed) < 2 or view.unsealed[0].segment_id != segment_id:
                raise ValueError(f"segment {segment_id} is not the oldest full one that is not sealed")
            segment = view.unsealed[0]
            path = f"{self._directory}/{segment.name}"
            older = view.sealed[-1].directory() if view.sealed else []
            terms = self._terms.within(segment.start, segment.last_index)
            trailer, size = self._change(
                f"sealing {path}",
                lambda: maintenance.seal_file(self._files, path, segment, terms, end_offsets, older),
                lambda: self._cut(path, segment.tail),
            )
            self._files.fsync_dir(self._directory)
            sealed = SealedSegment(self._reader, segment.name, trailer, size)
            self._views.swap(lambda view: View((*view.sealed, sealed), view.unsealed[1:]))
            self._reader.handles.forget(segment.name, segment.generation)

    def _cut(self, path: str, tail: int) -> None:
        fd = self._files.open(path)
        try:
            self._files.ftruncate(fd, tail)
            self._files.fsync(fd)
        finally:
            self._files.close(fd)

    def drop(self, segment_id: int) -> int:
        """See ``LogStore.drop_segment``."""
        with self._lock:
            self._poison.check()
            segment = self._views.current.sealed_segment(segment_id)
            path = f"{self._directory}/{segment.name}"

            def remove() -> None:
                self._reader.handles.pin(segment.name, segment.generation)
                self._dropped.add(segment_id)
                self._files.unlink(path)
                self._files.fsync_dir(self._directory)

            self._change(f"removing {path}", remove, lambda: None)
            self._views.swap(lambda view: attrs.evolve(view, sealed=tuple(one for one in view.sealed if one is not segment)))
            self._reader.handles.forget(segment.name, segment.generation)
            self.make_reserve()
            return segment.size_bytes

    def rewrite(self, segment_id: int, log_starts: Mapping[int, int]) -> int:
        """See ``LogStore.rewrite_segment``. Raises ``StorageFull``, ``CorruptLog`` (the old file stays), ``StoragePoisoned``."""
        with self._lock:
            self._poison.check()
            segment = self._views.current.sealed_segment(segment_id)
            path = f"{self._directory}/{segment.name}"
            aside = path + ".tmp"

            def rewrite() -> tuple[Trailer, int]:
                self._reader.handles.pin(segment.name, segment.generation)
                remove_if_there(self._files, aside)  # an earlier attempt that met a damaged run
                result = maintenance.rewrite_into(self._files, aside, segment, log_starts)
                self._files.rename(aside, path)
                self._files.fsync_dir(self._directory)
                return result

            trailer, size = self._change(f"rewriting {path}", rewrite, lambda: remove_if_there(self._files, aside))
            new = SealedSegment(self._reader, segment.name, trailer, size)
            self._views.swap(lambda view: attrs.evolve(view, sealed=tuple(new if one is segment else one for one in view.sealed)))
            self._reader.handles.forget(segment.name, segment.generation)
            self.make_reserve()
            return segment.size_bytes - size

    def verify(self) -> list[str]:
        """See ``LogStore.verify``."""
        with self._lock:
            self._poison.check()
            view = self._views.current
            found = [damage for segment in view.sealed for damage in maintenance.verify_sealed(segment)]
            for segment in view.unsealed:
                found += maintenance.verify_unsealed(self._files, f"{self._directory}/{segment.name}", segment.tail)
            return found

    def _change(self, what: str, work: Callable[[], _Result], undo: Callable[[], None]) -> _Result:
        """Do ``work``; on a full disk undo it, give the ballast back and try once more.

        Raises ``StorageFull`` (nothing was changed), ``StoragePoisoned``.
        """
        try:
            try:
                return work()
            except OSError as error:
                self._undo(what, error, undo)
                if not self.give_reserve():
                    raise StorageFull(f"{what}: {error}") from error
            try:
                return work()
            except OSError as error:
                self._undo(what, error, undo)
                raise StorageFull(f"{what}: {error}") from error
        except OSError as error:
            self._poison.raise_for(what, error)

    def _undo(self, what: str, error: OSError, undo: Callable[[], None]) -> None:
        if error.errno not in NO_SPACE:
            self._poison.raise_for(what, error)
        undo()

    # -- the ballast ------------------------------------------------------------------------------------------------
    def give_reserve(self) -> bool:
        """Free the ballast; whether there was any."""
        try:
            self._files.unlink(f"{self._directory}/{RESERVE_FILE}")
            self._files.fsync_dir(self._directory)
        except FileNotFoundError:
            return False
        return True

    def make_reserve(self) -> None:
        """Have the ballast again if there is room. It holds nothing, so its loss matters to nobody and nothing is synced."""
        if not self._reserve_bytes:
            return
        path = f"{self._directory}/{RESERVE_FILE}"
        try:
            fd = self._files.open(path, create=True)
        except OSError:
            return  # it is there, or there is no room for a name
        try:
            self._files.fallocate(fd, 0, self._reserve_bytes)
        except OSError:
            self._files.unlink(path)
        finally:
            self._files.close(fd)
