"""The disk's thread: one job after the other, and nobody stops waiting for a write that goes on."""

from __future__ import annotations

import threading

import pytest
import trio

from ayder.raft.writer_thread import WriterThread


async def test_jobs_run_in_order_on_one_thread() -> None:
    writer = WriterThread("writer")
    ran: list[tuple[int, str]] = []
    jobs = [writer.start(lambda n=n: ran.append((n, threading.current_thread().name))) for n in range(20)]
    for job in jobs:
        await job.wait()
    assert ran == [(n, "writer") for n in range(20)]
    writer.stop()


async def test_what_a_job_gives_or_raises_arrives_where_it_is_awaited() -> None:
    writer = WriterThread("writer")
    assert await writer.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await writer.run(lambda: 1 // 0)
    assert await writer.run(lambda: 8) == 8, "the thread goes on"
    early = writer.start(lambda: 9)
    await writer.run(lambda: None)
    assert await early.wait() == 9, "a result that came before anyone asked is kept"
    writer.stop()


async def test_waiting_cannot_be_cancelled_so_the_end_of_a_write_is_always_seen() -> None:
    writer = WriterThread("writer")
    gate = threading.Event()
    seen: list[bool] = []

    async def wait() -> None:
        seen.append(await writer.run(gate.wait))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        trio.lowlevel.spawn_system_task(_open_later, gate)
    assert seen == [True]
    writer.stop()


async def _open_later(gate: threading.Event) -> None:
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    gate.set()


def test_a_job_that_ends_when_the_loop_is_gone_ends_quietly() -> None:
    gate = threading.Event()
    threads: list[threading.Thread] = []

    async def main() -> None:
        writer = WriterThread("writer")
        writer.start(gate.wait)
        threads.append(writer._thread)

    trio.run(main)
    gate.set()
    threads[0].join(10)
    assert not threads[0].is_alive()


async def test_stopping_lets_what_was_queued_finish() -> None:
    writer = WriterThread("writer")
    jobs = [writer.start(lambda n=n: n) for n in range(5)]
    writer.stop()
    assert [await job.wait() for job in jobs] == list(range(5))
    writer._thread.join(10)
    assert not writer._thread.is_alive()
