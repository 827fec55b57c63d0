"""What operators and their machines ask: health, readiness, metrics, the state of the log on disk.

Owns: these requests and replies, which numbers a scrape reads from where. Must not know: how metrics are rendered, how disk space
is given back (``log_cleaner.py``).

The predecessor's collection calls keep their shape and have become safe. ``/admin/sealed/gc``, ``/admin/compact`` and
``/admin/sealed/release`` all run one collection: sealed segments without retained records are dropped, those with few are
rewritten. ``max_age_ms`` (of log time, since a segment's newest entry) and ``max_bytes`` (of all segments) of a gc are targets:
they never remove anything that is retained, the reply's ``targets_met`` says whether the log is within them now. Who wants less
data kept sets retention, then collects (D-17).

Invariants: ``last_synced_batch_id`` never goes back, not even over a restart; one scrape is rendered at a time, off the event
loop. Source: API.md 9 and 10; PREDECESSOR A4, A15, A16.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import trio

from ayder.http.context import Context
from ayder.http.exchange import Answer, Request, Response, Work
from ayder.http.params import decode_json
from ayder.http.routes import Route, Scope
from ayder.metrics import CONTENT_TYPE, MAX_LABELS, OTHER, PeerSample, Sample, TopicTraffic
from ayder.raft.consensus import Consensus, Role
from ayder.topics import Topic

__all__ = ["ROUTES", "CollectBody"]

INT64_MAX: Final = (1 << 63) - 1
_ROLES: Final = {Role.LEADER: 0, Role.FOLLOWER: 1, Role.CANDIDATE: 2}
_ITEMS_A_SLICE: Final = 2000
"""Topics or committed offsets a scrape looks at before others have a turn."""
_HEALTHY: Final = b'{"ok":1}'
_NO_STORE: Final = ((b"cache-control", b"no-store"),)
_LEARNER: Final = 3

_encode = msgspec.json.Encoder().encode


class CollectBody(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /admin/sealed/gc``; 0 or a field left out is no target."""

    max_age_ms: Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)] | None = None
    max_bytes: Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)] | None = None


_decode_collect = msgspec.json.Decoder(CollectBody).decode


# -- health -------------------------------------------------------------------------------------------------------
def health(_context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /health``: the process lives and its event loop turns."""
    return Response(200, _HEALTHY)


def ready(context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /ready``: 200 when reads and writes are served, else 503 with the reasons."""
    reasons = context.node.starting_reasons
    consensus = context.broker.driver.consensus
    body = {
        "ready": not reasons,
        "reasons": reasons,
        "role": consensus.role.value,
        "leader": consensus.leader_id,
        "term": consensus.current_term,
        "commit_index": consensus.commit_index,
        "applied_index": context.broker.applied_index,
    }
    if not reasons:
        return Response(200, _encode(body), headers=_NO_STORE)
    return Response(503, _encode(body), headers=(*_NO_STORE, (b"retry-after", b"%d" % context.config.http.retry_after_s)))


# -- metrics ------------------------------------------------------------------------------------------------------
_scraping = trio.CapacityLimiter(1)


def metrics(context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /metrics``."""

    async def run() -> Response:
        async with _scraping:
            sample = await _sample(context)
            text = await trio.to_thread.run_sync(context.metrics.render, sample)
        return Response(200, text, CONTENT_TYPE, _NO_STORE)

    return Work(run)


def metrics_ha(context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /metrics_ha``: the predecessor's gauges of the cluster, beside ours."""
    consensus = context.broker.driver.consensus
    lead = consensus.leadership
    gauges = {
        "ramforge_ha_role": _role(consensus),
        "ramforge_ha_state": _state(context),
        "ramforge_ha_term": consensus.current_term,
        "ramforge_ha_epoch": max(1, context.broker.state.membership_index),
        "ramforge_ha_joint_active": int(consensus.membership.is_joint),
        "ramforge_ha_fresh_quorum": int(consensus.leader_id is not None if lead is None else lead.has_contact()),
        **_raft_gauges(context),
    }
    return Response(200, context.metrics.render_gauges(gauges, _peers(context)), CONTENT_TYPE, _NO_STORE)


def _role(consensus: Consensus) -> int:
    return _LEARNER if consensus.node_id in consensus.membership.learners else _ROLES[consensus.role]


def _state(context: Context) -> int:
    """0 initializing: nobody leads, or this node does and has not applied its log yet; 1 ready; 3 degraded."""
    if not context.node.starting_reasons:
        return 1
    driver = context.broker.driver
    leads = driver.consensus.role is Role.LEADER
    return 0 if driver.consensus.leader_id is None or (leads and not driver.ready) else 3


def _peers(context: Context) -> dict[str, PeerSample]:
    """Every other node of the cluster, as many as the configuration names."""
    consensus = context.broker.driver.consensus
    progress = {} if consensus.leadership is None else consensus.leadership.progress
    sampled = {}
    for name, facts in context.node.peer_facts().items():
        match = progress[name].match_index if name in progress else None
        sampled[name] = PeerSample(
            facts.connected,
            facts.queued_bytes,
            facts.counters.sent_bytes,
            facts.counters.received_bytes,
            match,
            None if match is None else consensus.last_index - match,
        )
    return sampled


def _raft_gauges(context: Context) -> dict[str, float]:
    consensus = context.broker.driver.consensus
    return {
        "ayder_raft_role": _role(consensus),
        "ayder_raft_term": consensus.current_term,
        "ayder_raft_commit_index": consensus.commit_index,
        "ayder_raft_applied_index": context.broker.applied_index,
        "ayder_raft_voters": len(consensus.voters),
        "ayder_raft_learners": len(consensus.membership.learners),
        "ayder_raft_joint": int(consensus.membership.is_joint),
        "ayder_raft_damaged": int(consensus.damaged),
    }


async def _sample(context: Context) -> Sample:
    """One scrape's numbers. Topics and groups are walked in slices, so the numbers of two of them may be moments apart."""
    broker = context.broker
    segments = broker.store.segments()
    catalogue, groups = broker.state.catalogue, broker.state.groups
    sample = Sample()
    sample.gauges = {
        **_raft_gauges(context),
        "ayder_ready": int(not context.node.starting_reasons),
        "ayder_tick_lateness_seconds": broker.driver.tick_lateness_s,
        "ayder_aof_files_total": len(segments),
        "ayder_aof_generation": segments[-1].segment_id if segments else 0,
        "ayder_log_segments": len(segments),
        "ayder_log_bytes": sum(segment.size_bytes for segment in segments),
        "ayder_log_first_index": broker.store.first_index,
        "ayder_log_last_index": broker.store.last_index,
        "ayder_log_collectable_index": context.cleaner.collectable_index,
        "ayder_tail_cache_bytes": broker.tail.size_bytes,
        "ayder_topics": len(catalogue.by_name),
        "ayder_consumer_groups": len(groups.committed),
    }
    sample.peers = _peers(context)
    sample.counters["ayder_cold_reads"] = context.fetcher.cold_reads
    context.metrics.forget_topics(catalogue.by_id)
    sample.gauges["ayder_partitions"] = await _add_traffic(context, sample)
    await _add_lag(context, sample)
    return context.metrics.sample(sample)


async def _add_traffic(context: Context, sample: Sample) -> int:
    """Fill in what went through each topic; returns the number of partitions."""
    partitions, rest = 0, TopicTraffic()
    for at, topic in enumerate(list(context.broker.state.catalogue.by_id.values()), 1):
        partitions += len(topic.partitions)
        if len(sample.topics) < MAX_LABELS:
            sample.topics[topic.name] = _traffic(context, topic)
        else:
            rest += _traffic(context, topic)
        if at % _ITEMS_A_SLICE == 0:
            await trio.lowlevel.checkpoint()
    if rest != TopicTraffic():
        sample.topics[OTHER] = rest
    return partitions


def _traffic(context: Context, topic: Topic) -> TopicTraffic:
    broker, topic_id = context.broker, topic.topic_id
    records_out, bytes_out = context.metrics.out_of(topic_id)
    return TopicTraffic(broker.records_in.get(topic_id, 0), broker.bytes_in.get(topic_id, 0), records_out, bytes_out)


async def _add_lag(context: Context, sample: Sample) -> None:
    """Fill in how far each group is behind in each topic; beyond the bound, the sum is under ``_other``."""
    state = context.broker.state
    walked = 0
    for group, offsets in list(state.groups.committed.items()):
        for uid, committed in list(offsets.items()):
            partition, topic = state.catalogue.partition(uid), state.catalogue.by_id.get(uid >> 16)
            if partition is None or topic is None:
                continue
            key = (group, topic.name)
            if key not in sample.group_lag and len(sample.group_lag) >= MAX_LABELS:
                key = (OTHER, OTHER)
            lag = max(0, partition.next_offset - max(committed + 1, partition.log_start_offset))
            sample.group_lag[key] = sample.group_lag.get(key, 0) + lag
        walked += len(offsets)
        if walked >= _ITEMS_A_SLICE:
            walked = 0
            await trio.lowlevel.checkpoint()


# -- the log on disk ----------------------------------------------------------------------------------------------
def sealed_status(context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /admin/sealed/status``: every receipt with this ``batch_id`` or a lower one is on disk."""
    consensus = context.broker.driver.consensus
    segments = context.broker.store.segments()
    body = {
        "ok": True,
        "last_synced_batch_id": consensus.persisted_index,
        "commit_index": consensus.commit_index,
        "applied_index": context.broker.applied_index,
        "first_index": context.broker.store.first_index,
        "segments": len(segments),
        "sealed_segments": sum(segment.sealed for segment in segments),
        "sealed_bytes": _size_bytes(context),
    }
    return Response(200, _encode(body), headers=_NO_STORE)


def sealed_gc(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /admin/sealed/gc``."""
    body: CollectBody = decode_json(_decode_collect, request.body or b"{}")

    async def run() -> Response:
        freed = await context.cleaner.collect()
        size = _size_bytes(context)
        met = _targets_met(context, body, size)
        return Response(200, _encode({"ok": True, "sealed_bytes_after": size, "freed_bytes": freed, "targets_met": met}))

    return Work(run)


def _targets_met(context: Context, body: CollectBody, size_bytes: int) -> bool:
    if body.max_bytes and size_bytes > body.max_bytes:
        return False
    if not body.max_age_ms:
        return True
    horizon_ms = context.broker.state.log_time_ms - body.max_age_ms
    return all(segment.last_time_ms >= horizon_ms for segment in context.broker.store.segments() if segment.sealed)


def compact(context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /admin/compact``: answers when the collection is over, hence ``async`` is false."""

    async def run() -> Response:
        freed = await context.cleaner.collect()
        return Response(200, _encode({"ok": True, "result": "compaction_started", "async": False, "freed_bytes": freed}))

    return Work(run)


def sealed_release(context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /admin/sealed/release``: nothing is held back from the disk here, so what can be released is dead space."""

    async def run() -> Response:
        freed = await context.cleaner.collect()
        return Response(200, _encode({"ok": True, "released": 1, "freed_bytes": freed}))

    return Work(run)


def _size_bytes(context: Context) -> int:
    return sum(segment.size_bytes for segment in context.broker.store.segments())


ROUTES = (
    Route("GET", "/health", health, None, summary="Whether the process lives"),
    Route("GET", "/ready", ready, None, summary="Whether reads and writes are served"),
    Route("GET", "/metrics", metrics, None, summary="Prometheus metrics"),
    Route("GET", "/metrics_ha", metrics_ha, None, summary="Prometheus metrics of the cluster"),
    Route("GET", "/admin/sealed/status", sealed_status, Scope("admin"), summary="What is synced to disk"),
    Route("POST", "/admin/sealed/gc", sealed_gc, Scope("admin"), summary="Give back disk space"),
    Route("POST", "/admin/sealed/release", sealed_release, Scope("admin"), summary="Give back disk space (old name)"),
    Route("POST", "/admin/compact", compact, Scope("admin"), summary="Give back disk space (old name)"),
)
