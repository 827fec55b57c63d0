"""The composition root: opens the data directory, builds the parts, owns the nursery tree and the order of stopping.

Owns: which object gets which. Must not know: any rule of any part. Lifetimes nest, the inner dies first: HTTP stops before the
log cleaner, that before Raft, Raft before the files. Whatever a task of the log raises leaves through here and ends the process,
because a node that cannot keep its promises must not go on answering (ADR 0006).
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from ayder.broker import Broker
from ayder.config import Config
from ayder.entries import EntryKind, LogIndex
from ayder.errors import AyderError, CorruptLog
from ayder.fetch import Fetcher
from ayder.http import cluster, consume, groups, openapi, operations, produce, topics
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
from ayder.raft.consensus import Consensus, Role
from ayder.raft.driver import Driver
from ayder.raft.membership import Membership
from ayder.raft.messages import SnapshotMeta
from ayder.raft.peers import PeerFacts, PeerLimits, PeerNetwork, PeerTls
from ayder.state_machine import StateMachine
from ayder.storage.backends import log_store_backend
from ayder.storage.checkpoints import FileCheckpointStore, MemoryCheckpointStore
from ayder.storage.directory_lock import DirectoryLock

__all__ = ["Node", "open_node", "run_node", "tune_process"]

logger = logging.getLogger(__name__)

ROUTES = (*produce.ROUTES, *consume.ROUTES, *topics.ROUTES, *groups.ROUTES, *operations.ROUTES, *cluster.ROUTES, *openapi.ROUTES)
_FINAL_SYNC_S = 5.0
_SCAN_BYTES = 4 << 20
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
    network: PeerNetwork | None
    """``None`` for a node that is the whole group."""
    application: HttpApplication = attrs.field(init=False)
    fronts: list[Front] = attrs.field(factory=list)

    @property
    def starting_reasons(self) -> list[str]:
        """Why the node is not ready; empty when it is."""
        reasons = []
        if self.broker.shutting_down:
            reasons.append("the node is stopping")
        consensus = self.driver.consensus
        if not self.driver.alone and not consensus.hears_leader:
            reasons.append("no leader is known")
        elif not self.driver.alone and consensus.leader_id != consensus.node_id:
            if self.broker.applied_index + consensus.limits.catch_up_entries < consensus.commit_index:
                reasons.append("this follower is catching up")
            if consensus.node_id not in consensus.membership.everyone:
                reasons.append("this node is not a member of the cluster")
        elif not self.driver.ready:
            reasons.append("the log of the last run is being applied")
        if consensus.damaged:
            reasons.append("this node repairs bytes that its disk lost")
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

    def peer_facts(self) -> Mapping[str, PeerFacts]:
        """How the connections to the other nodes stand, by node id; empty for a node that is alone."""
        return {} if self.network is None else self.network.facts().peers

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

    def standing_changed(self) -> None:
        """Answers carry the term from now on."""
        for front in self.fronts:
            self._name(front)

    async def hand_over(self) -> None:
        """Before a leader stops: let another node lead, so that clients find one at once. Bounded; does nothing elsewhere."""
        consensus = self.driver.consensus
        if self.driver.alone or consensus.role is not Role.LEADER:
            return
        try:
            consensus.transfer_leadership()
        except AyderError:
            return  # there is nobody to hand over to
        self.driver.advance()
        with trio.move_on_after(2 * self.config.raft.election_timeout_ms / 1000):
            while consensus.role is Role.LEADER:
                await self.driver.wait_moved()

    async def wait_ready(self) -> None:
        """Until everything the log holds is applied and this node leads; a member of a cluster need not lead to serve."""
        if not self.driver.alone:
            return
        await self.driver.wait_ready()
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
        memberships = await trio.to_thread.run_sync(_memberships, store, checkpoint_index) if config.cluster.nodes else []
        node = _build(config, broker, store, checkpoints, _older(checkpoints, checkpoint_index), memberships)
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
            if node.network is not None:
                await raft_nursery.start(node.network.run)
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
        cluster_id=(_cluster_id(config) if config.cluster.nodes else os.urandom(16)).hex(),
    )
    files.callback(store.close)
    if len(config.cluster.nodes) > 1 and store.first_index > 1:
        raise CorruptLog(
            f"{directory} belonged to a node alone that has given disk space back, so its log begins after its first entry: "
            "the other nodes could never catch up from it. Start the cluster on empty directories"
        )
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


def _memberships(store: Any, checkpoint_index: LogIndex) -> list[tuple[LogIndex, Membership]]:
    """In a worker: the configurations in the log behind the checkpoint, committed or not: the newest is in force (R-14)."""
    found = []
    first = checkpoint_index + 1
    while first <= store.last_index:
        entries = store.read_entries(first, store.last_index, _SCAN_BYTES)
        found += [(entry.index, Membership.decode(entry.payload)) for entry in entries if entry.kind is EntryKind.MEMBERSHIP]
        first = entries[-1].index + 1
    return found


def _build(
    config: Config,
    broker: Broker,
    store: Any,
    checkpoints: Any,
    collectable_index: LogIndex,
    memberships: list[tuple[LogIndex, Membership]],
) -> Node:
    raft = config.raft
    voters = tuple(member.id for member in config.cluster.nodes) or (raft.node_id,)
    state = broker.state
    consensus = Consensus(
        node_id=raft.node_id,
        voters=voters,
        log=store,
        election_ticks=max(1, raft.election_timeout_ms // raft.tick_ms),
        heartbeat_ticks=max(1, raft.heartbeat_interval_ms // raft.tick_ms),
        spread=random.SystemRandom().randrange,
        snapshot=SnapshotMeta(state.applied_index, state.applied_term, _membership(state, voters), state.log_time_ms)
        if state.applied_index
        else None,
        memberships=memberships,
    )
    for info in store.segments():  # the entries behind the checkpoint carry later times than the state does
        consensus.observe_log_time(info.last_time_ms)
    consensus.observe_log_time(broker.state.log_time_ms)
    driver = Driver(
        consensus=consensus, log=store, source=broker, applier=broker, tick_s=raft.tick_ms / 1000, clock_ms=wall_clock_ms
    )
    broker.attach(driver)
    broker.client_urls = {member.id: member.client_url for member in config.cluster.nodes}
    metrics = Metrics()
    driver.append_seconds = metrics.observe_append
    cleaner = LogCleaner(broker=broker, checkpoints=checkpoints, collectable_index=collectable_index, clock_ms=wall_clock_ms)
    fetcher = Fetcher(broker)
    fan_out = FanOut(broker, fetcher)
    node = Node(config, broker, driver, cleaner, metrics, _network(config, driver))
    driver.network = node.network
    driver.standing_changed = node.standing_changed
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


def _membership(state: StateMachine, founders: tuple[str, ...]) -> Membership:
    return Membership.decode(state.membership) if state.membership else Membership(voters=founders)


def _network(config: Config, driver: Driver) -> PeerNetwork | None:
    cluster = config.cluster
    if len(cluster.nodes) <= 1:
        return None
    me = next(member for member in cluster.nodes if member.id == config.raft.node_id)
    tls = PeerTls(ca=cluster.tls_ca, certificate=cluster.tls_certificate, key=cluster.tls_key) if cluster.tls_ca else None
    return PeerNetwork(
        node_id=me.id,
        cluster_id=_cluster_id(config),
        addresses={member.id: (member.host, member.raft_port) for member in cluster.nodes if member.id != me.id},
        bind=(me.host, me.raft_port),
        tls=tls,
        limits=PeerLimits(max_frame_bytes=cluster.max_frame_bytes),
        receive=driver.receive,
        next_append=driver.next_append,
        lost=driver.peer_lost,
    )


def _cluster_id(config: Config) -> bytes:
    """What the members of one cluster share: 16 bytes of its name."""
    return hashlib.blake2b(config.cluster.name.encode(), digest_size=16).digest()


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
            await node.hand_over()
            node.begin_stop()
            nursery.start_soon(partial(_second_signal, signals, nursery.cancel_scope))
            await server.drain()
            nursery.cancel_scope.cancel()


async def _second_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """A second signal while draining: stop waiting for clients."""
    async for _ in signals:
        scope.cancel()
        return
