"""The disk's own thread: one job at a time, the answer given on the event loop.

Owns: the thread, its queue, the hand-over in both directions. Must not know: what a job does. A thread that lives as long as
the node answers a third faster under load than one borrowed a job (``trio.to_thread``), and "one writer" is then a fact of the
program rather than of a lock.

Invariants: jobs run in the order they were given; waiting for one cannot be cancelled, so that no one ever believes a write
did not happen because he stopped waiting for it; what a job raises is raised where it is awaited.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import outcome
import trio

__all__ = ["Job", "WriterThread"]

T = TypeVar("T")


class Job(Generic[T]):
    """A call that runs, or ran, on the writer thread."""

    __slots__ = ("_call", "_outcome", "_task")

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._outcome: outcome.Outcome[T] | None = None
        self._task: trio.lowlevel.Task | None = None

    def run(self) -> outcome.Outcome[T]:
        """On the writer thread."""
        return outcome.capture(self._call)

    def finished(self, result: outcome.Outcome[T]) -> None:
        """On the event loop: keep the result and wake who waits for it."""
        self._outcome = result
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)

    async def wait(self) -> T:
        """The result; raises what the call raised. Not cancellable."""
        if self._outcome is None:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        assert self._outcome is not None
        return self._outcome.unwrap()


class WriterThread:
    """A daemon thread that takes jobs; ``stop`` lets the one that runs finish."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def start(self, call: Callable[[], T]) -> Job[T]:
        """Queue a call; ``await job.wait()`` for its result."""
        job: Job[T] = Job(call)
        self._jobs.put(job)
        return job

    async def run(self, call: Callable[[], T]) -> T:
        """Queue a call and wait for it."""
        return await self.start(call).wait()

    def stop(self) -> None:
        """No more jobs; returns at once."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            result = job.run()
            try:
                self._token.run_sync_soon(job.finished, result)
            except trio.RunFinishedError:
                return
