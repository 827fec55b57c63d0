"""What the tests of the core share."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

MemoryPeak = Callable[[int], contextlib.AbstractContextManager[None]]


@pytest.fixture
def memory_peak() -> MemoryPeak:
    """``with memory_peak(n):`` fails when the block takes more than ``n`` bytes at any moment."""

    @contextlib.contextmanager
    def limit(most: int) -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= most, f"{peak} bytes at once"

    return limit
