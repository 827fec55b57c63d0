"""Log stores by name, through the entry points of the group ``ayder.log_stores``.

Owns: finding a backend's class and filling in its options. Must not know: any backend in particular, except that a checkout
which is not installed has no entry points: then the table below stands in for them.
A backend is a class with ``open(path, options, *, monotonic_ns, node_id, cluster_id)`` and, beside it in its module, an attrs
class of options whose name is the backend's with ``Options`` for ``LogStore``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import attrs

__all__ = ["LogStoreBackend", "log_store_backend", "log_store_names"]

GROUP = "ayder.log_stores"
_BUILT_IN = {"aof": "ayder.storage.aof:AofLogStore", "memory": "ayder.storage.memory:MemoryLogStore"}


@attrs.frozen
class LogStoreBackend:
    """A backend that was found."""

    store: Any
    """The class; its instances are ``LogStore``s."""
    options: type[Any]

    def make_options(self, settings: Mapping[str, Any]) -> Any:
        """Options from those of ``settings`` that the backend knows; the others belong to other parts of the storage section."""
        names = {field.name for field in attrs.fields(self.options)}
        return self.options(**{name: value for name, value in settings.items() if name in names})


def _found() -> dict[str, EntryPoint]:
    built_in = {name: EntryPoint(name, value, GROUP) for name, value in _BUILT_IN.items()}
    return built_in | {point.name: point for point in entry_points(group=GROUP)}


def log_store_names() -> list[str]:
    """The names ``log_store_backend`` knows."""
    return sorted(_found())


def log_store_backend(name: str) -> LogStoreBackend:
    """The backend of that name. Raises ``LookupError`` that lists the names there are."""
    point = _found().get(name)
    if point is None:
        raise LookupError(f"there is no log store {name!r}; there are {', '.join(log_store_names())}")
    store = point.load()
    options = getattr(import_module(store.__module__), store.__name__.removesuffix("LogStore") + "Options")
    return LogStoreBackend(store, options)
