"""Those who wait, remembering all they were told."""

from __future__ import annotations

from ayder.errors import AyderError
from ayder.state_machine import Result

FAR_NS = 1 << 62


class Waiter:
    """Both kinds of waiter of ``pending.py``."""

    def __init__(self, deadline_ns: int = FAR_NS) -> None:
        self.deadline_ns = deadline_ns
        self.done = False
        self.early = False
        self.told: list[object] = []

    def appended(self, base_offset: int, count: int, log_index: int, duplicate: bool) -> None:
        self.told.append((base_offset, count, log_index, duplicate))

    def written(self, base_offset: int, count: int, log_index: int) -> None:
        self.told.append(("written", base_offset, count, log_index))

    def applied(self, result: Result, log_index: int) -> None:
        self.told.append((result, log_index))

    def failed(self, error: AyderError) -> None:
        self.told.append(error.code)
