"""The composition root: opens the data directory, builds the parts, owns the nursery tree and the order of stopping.

Owns: which object gets which. Must not know: any rule of any part. Lifetimes nest, the inner dies first: HTTP stops before the
log cleaner, that before Raft, Raft before the files. Whatever a task of the log raises leaves through here and ends the process,
because a node that cannot keep its promises must not go on answering (ADR 0006).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from ayder.broker import Broker
from ayder.config import Config
from ayder.entries import LogIndex
from ayder.errors import CorruptLog
from ayder.fetch import Fetcher
from ayder.http import consume, groups, openapi, operations, produce, topics
from ayder.http.admission import RateLimiter
from ayder.http.app import HttpApplication
from ayder.http.auth import Authenticator
from ayder.http.context import Context
from ayder.http.fan_out import FanOut
from ayder.http.front import Front
from ayder.http.server import HttpServer
from ayder.log_cleaner import LogCleaner
from ayder.logs import set_up_logging
from ayder.metrics import Metrics
from ayder.raft.consensus import Consensus
from ayder.raft.driver import Driver
from ayder.storage.backends import log_store_backend
from ayder.storage.checkpoints import FileCheckpointStore, MemoryCheckpointStore
from ayder.storage.directory_lock import DirectoryLock

__all__ = ["Node", "open_node", "run_node", "tune_process"]

logger = logging.getLogger(__name__)

ROUTES = (*produce.ROUTES, *consume.ROUTES, *topics.ROUTES, *groups.ROUTES, *operations.ROUTES, *openapi.ROUTES)
_FINAL_SYNC_S = 5.0
_SWITCH_INTERVAL_S = 0.0005


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@attrs.define(slots=True, eq=False)
class Node:
    """A node whose tasks run. ``application`` is what a front drives."""

    config: Config
    broker: Broker
    driver: Driver
    cleaner: LogCleaner
    metrics: Metrics
    application: HttpApplication = attrs.field(init=False)
    fronts: list[Front] = attrs.field(factory=list)

    @property
    def starting_reasons(self) -> list[str]:
        """Why the node is not ready; empty when it is."""
        reasons = []
        if self.broker.shutting_down:
            reasons.append("the node is stopping")
        if not self.driver.ready:
            reasons.append("the log of the last run is being applied")
        if self.driver.refuse_until_ns:
            reasons.append("the disk is full")
        return reasons

    def supply_gauges(self, fan_out: FanOut) -> None:
        """Have what only the node sees of its parts read at each scrape."""
        supply, broker, fronts = self.metrics.supply, self.broker, self.fronts
        supply("ayder_stream_subscribers", lambda: fan_out.subscribers)
        supply("ayder_queue_bytes", lambda: broker.queued_bytes)
        supply("ayder_aof_pending_writes", lambda: broker.queued_blocks)
        supply("ayder_sealed_queue_depth", lambda: broker.queued_blocks)
        supply("ayder_http_active_connections", lambda: sum(len(front.connections) for front in fronts))
        supply("ayder_http_bodies_in_flight_bytes", lambda: sum(front.held_body_bytes for front in fronts))

    def begin_stop(self) -> None:
        """Take no new work; streams and long-polls end."""
        self.broker.begin_stop()

    def add_front(self, front: Front) -> None:
        """A front that answers for this node: its answers carry who we are."""
        self.fronts.append(front)
        self._name(front)

    def _name(self, front: Front) -> None:
        term = self.driver.consensus.current_term
        front.extra_headers = b"ayder-node: %b\r\nayder-term: %d\r\n" % (self.config.raft.node_id.encode(), term)

    async def wait_ready(self) -> None:
        """Until everything the log holds is applied and this node leads."""
        await self.driver.wait_ready()
        for front in self.fronts:
            self._name(front)
        consensus = self.driver.consensus
        logger.info(
            "leads", extra={"node": consensus.node_id, "term": consensus.current_term, "applied_index": self.broker.applied_index}
        )


def tune_process() -> None:
    """For a launch whose process is the node's alone, once it is ready: no long waits for the interpreter.

    A worker that computes (a seal, a retention plan) keeps the interpreter for a whole switch interval each time the event loop
    makes a system call; with the default of 5 ms a loop turn took 50 ms then. And what exists after start lives as long as the
    process: the collector need not look at it again (10 to 20 ms each time).
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()


@asynccontextmanager
async def open_node(config: Config) -> AsyncIterator[Node]:
    """Open the data directory and run the log's tasks for the length of the block.

    Raises ``DirectoryInUse``, ``CorruptLog``, ``StorageFull``, ``OSError`` before the block; inside it, what ends the node.
    """
    started = time.perf_counter()
    with ExitStack() as files:
        store, checkpoints = await trio.to_thread.run_sync(_open_storage, config, files)
        broker = Broker(config=config, store=store)
        checkpoint_index = _restore(broker, store, checkpoints)
        node = _build(config, broker, store, checkpoints, _older(checkpoints, checkpoint_index))
        logger.info(
            "opened",
            extra={
                "data": config.storage.data_dir,
                "checkpoint_index": checkpoint_index,
                "last_index": store.last_index,
                "seconds": round(time.perf_counter() - started, 3),
            },
        )
        async with trio.open_nursery() as raft_nursery:
            await raft_nursery.start(node.driver.run)
            async with trio.open_nursery() as cleaner_nursery:
                cleaner_nursery.start_soon(node.cleaner.run)
                try:
                    yield node
                    broker.begin_stop()
                    with trio.move_on_after(_FINAL_SYNC_S):
                        await node.driver.quiesce()
                finally:
                    broker.begin_stop()
                    cleaner_nursery.cancel_scope.cancel()
            raft_nursery.cancel_scope.cancel()
        logger.info("stopped", extra={"applied_index": broker.applied_index})


def _open_storage(config: Config, files: ExitStack) -> tuple[Any, Any]:
    """In a worker: lock the directory, open log and checkpoints. Closed in reverse order by ``files``."""
    storage = config.storage
    backend = log_store_backend(storage.log)
    directory = Path(storage.data_dir)
    if storage.log == "memory":
        return backend.store.open(
            directory, backend.make_options(attrs.asdict(storage)), monotonic_ns=time.monotonic_ns
        ), MemoryCheckpointStore()
    files.enter_context(DirectoryLock(directory))
    checkpoints = FileCheckpointStore(directory / "checkpoints")
    store = backend.store.open(
        directory / "log",
        backend.make_options(attrs.asdict(storage)),
        monotonic_ns=time.monotonic_ns,
        node_id=config.raft.node_id,
        cluster_id=os.urandom(16).hex(),
    )
    files.callback(store.close)
    return store, checkpoints


def _restore(broker: Broker, store: Any, checkpoints: Any) -> LogIndex:
    """Put the broker's state where the newest checkpoint stands; returns its index (0: there is none)."""
    newest = checkpoints.newest()
    for sentence in checkpoints.damaged:
        logger.error("checkpoint passed over", extra={"reason": sentence})
    if newest is None:
        if store.first_index > 1:
            raise CorruptLog("the log begins after its first entry and there is no checkpoint that verifies: restore a backup")
        return 0
    index, state = newest
    broker.state.restore(state)
    if not store.first_index - 1 <= index <= store.last_index:
        raise CorruptLog(
            f"the newest checkpoint stands at entry {index}, the log holds {store.first_index} to {store.last_index}: "
            "entries are missing. Keep the directory as it is and restore a backup"
        )
    return LogIndex(index)


def _older(checkpoints: Any, newest: LogIndex) -> LogIndex:
    """Where the checkpoint before the newest stands: what lies behind both may be collected."""
    older = checkpoints.newest_until(newest - 1) if newest else None
    return LogIndex(0 if older is None else older[0])


def _build(config: Config, broker: Broker, store: Any, checkpoints: Any, collectable_index: LogIndex) -> Node:
    raft = config.raft
    consensus = Consensus(
        node_id=raft.node_id, voters=(raft.node_id,), log=store, election_ticks=max(1, raft.election_timeout_ms // raft.tick_ms)
    )
    for info in store.segments():  # the entries behind the checkpoint carry later times than the state does
        consensus.observe_log_time(info.last_time_ms)
    consensus.observe_log_time(broker.state.log_time_ms)
    driver = Driver(
        consensus=consensus, log=store, source=broker, applier=broker, tick_s=raft.tick_ms / 1000, clock_ms=wall_clock_ms
    )
    broker.attach(driver)
    metrics = Metrics()
    driver.append_seconds = metrics.observe_append
    cleaner = LogCleaner(broker=broker, checkpoints=checkpoints, collectable_index=collectable_index, clock_ms=wall_clock_ms)
    fetcher = Fetcher(broker)
    fan_out = FanOut(broker, fetcher)
    node = Node(config, broker, driver, cleaner, metrics)
    node.supply_gauges(fan_out)
    context = Context(
        config=config,
        broker=broker,
        fetcher=fetcher,
        cleaner=cleaner,
        authenticator=Authenticator(config.auth),
        rate_limiter=RateLimiter(enabled=config.auth.rate_limits),
        metrics=metrics,
        fan_out=fan_out,
        node=node,
    )
    node.application = HttpApplication(context, ROUTES)
    return node


async def run_node(config: Config, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED) -> None:
    """Run a node until SIGTERM or SIGINT; reports its URLs when it serves. Raises what ended it otherwise."""
    set_up_logging(config.logging)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_node(config) as node, trio.open_nursery() as nursery:
            server = HttpServer(node.application, config.http)
            await nursery.start(server.serve)
            node.add_front(server.front)
            await node.wait_ready()
            tune_process()
            task_status.started(server.urls)
            async for number in signals:
                logger.info("stopping", extra={"signal": signal.Signals(number).name})
                break
            node.begin_stop()
            nursery.start_soon(partial(_second_signal, signals, nursery.cancel_scope))
            await server.drain()
            nursery.cancel_scope.cancel()


async def _second_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """A second signal while draining: stop waiting for clients."""
    async for _ in signals:
        scope.cancel()
        return
