"""Everything the node counts, and its Prometheus text.

Owns: the names, helps and buckets of all metrics, the counters of the hot path. Must not know: what is measured (callers hand in
plain numbers), HTTP. The only importer of prometheus_client.

Counting is a dictionary look-up and a few additions on plain integers; families exist only while a scrape is rendered, from a
``Sample`` that is a copy, so that rendering may happen in a worker thread. Labels are bounded: at most ``MAX_LABELS`` topics and
groups have their own series, the rest is summed under ``_other``; routes are templates, never paths.

Invariants: ``+Inf`` equals ``_count`` in every histogram (D-40); counters never go back within one life of the process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import attrs
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "MAX_LABELS", "OTHER", "Histogram", "Metrics", "PeerSample", "Sample", "TopicTraffic", "bounded"]

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
MAX_LABELS: Final = 1000
OTHER: Final = "_other"
_MAX_TRACKED_TOPICS: Final = 16_384
_MAX_REQUEST_SERIES: Final = 2048

OLD_BOUNDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
"""Seconds: the buckets of the predecessor."""
LATENCY_BOUNDS: Final = (0.0001, 0.00025, *OLD_BOUNDS, 1.0, 2.5, 5.0, 10.0, 60.0)
SIZE_BOUNDS: Final = tuple(float(1 << power) for power in range(8, 25, 2))
"""Bytes: 256 B to 16 MiB."""

_PRODUCE_ROUTES: Final = frozenset({"/broker/topics/{topic}/produce", "/broker/topics/{topic}/produce-ndjson"})


class Histogram:
    """Counts by bucket, not yet cumulative; the last bucket is everything above the bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.counts)

    def add(self, other: Histogram) -> None:
        """Take over what another one with the same bounds saw."""
        assert self.bounds == other.bounds
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> Histogram:
        """An independent one with the same content."""
        twin = Histogram(self.bounds)
        twin.counts, twin.total = list(self.counts), self.total
        return twin

    def cumulative(self, bounds: Sequence[float] = ()) -> list[tuple[str, float]]:
        """Buckets as Prometheus wants them; ``bounds`` may name some of the bounds only."""
        buckets, running = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            if bound == float("inf"):
                buckets.append(("+Inf", float(running)))
            elif not bounds or bound in bounds:
                buckets.append((repr(bound), float(running)))
        return buckets


@attrs.frozen(slots=True)
class TopicTraffic:
    """What went into and out of one topic since the process started."""

    records_in: int = 0
    bytes_in: int = 0
    records_out: int = 0
    bytes_out: int = 0

    def __add__(self, other: TopicTraffic) -> TopicTraffic:
        return TopicTraffic(
            self.records_in + other.records_in,
            self.bytes_in + other.bytes_in,
            self.records_out + other.records_out,
            self.bytes_out + other.bytes_out,
        )


@attrs.frozen(slots=True)
class PeerSample:
    """One other node of the cluster. ``match_index`` and ``lag`` are known to the leader only."""

    connected: bool
    queued_bytes: int
    sent_bytes: int
    received_bytes: int
    match_index: int | None = None
    lag: int | None = None


@attrs.define(slots=True)
class Sample:
    """One scrape's numbers. The caller fills in what it knows; ``Metrics.sample`` adds what was counted."""

    gauges: dict[str, float] = attrs.field(factory=dict)
    """Values of the gauges named in ``GAUGES``; those missing are not exported."""
    counters: dict[str, float] = attrs.field(factory=dict)
    """Values of the counters named in ``COUNTERS``."""
    topics: dict[str, TopicTraffic] = attrs.field(factory=dict)
    group_lag: dict[tuple[str, str], int] = attrs.field(factory=dict)
    """(group, topic) → records not yet processed."""
    peers: dict[str, PeerSample] = attrs.field(factory=dict)
    """By node id: as many as the configuration names."""
    requests: dict[tuple[str, int], Histogram] = attrs.field(factory=dict)
    append: Histogram = attrs.field(factory=lambda: Histogram(LATENCY_BOUNDS))
    block_bytes: Histogram = attrs.field(factory=lambda: Histogram(SIZE_BOUNDS))


GAUGES: Final[dict[str, str]] = {
    "ayder_http_active_connections": "Open client connections",
    "ayder_http_bodies_in_flight_bytes": "Bytes of request bodies that are being received",
    "ayder_stream_subscribers": "Open SSE tails",
    "ayder_aof_pending_writes": "Blocks that wait for the disk",
    "ayder_sealed_queue_depth": "Blocks that wait for the disk (old name)",
    "ayder_queue_bytes": "Bytes of records that wait for the disk or to be applied",
    "ayder_aof_files_total": "Segment files of the log",
    "ayder_aof_generation": "Number of the segment that is being written; grows as segments fill",
    "ayder_log_bytes": "Bytes of all segments",
    "ayder_log_segments": "Segment files of the log",
    "ayder_log_first_index": "Oldest index of the log",
    "ayder_log_last_index": "Newest index on disk",
    "ayder_log_collectable_index": "Segments that end here or before may be dropped or rewritten",
    "ayder_tail_cache_bytes": "Newest records kept in memory",
    "ayder_topics": "Topics",
    "ayder_partitions": "Partitions of all topics",
    "ayder_consumer_groups": "Consumer groups with a committed offset",
    "ayder_raft_role": "0 leader, 1 follower, 2 candidate, 3 learner",
    "ayder_raft_term": "Current term",
    "ayder_raft_commit_index": "Newest committed log index",
    "ayder_raft_applied_index": "Newest applied log index",
    "ayder_raft_voters": "Members whose votes and copies count",
    "ayder_raft_learners": "Members that follow without a vote",
    "ayder_raft_joint": "1 while a change of the voters is not finished",
    "ayder_raft_damaged": "1 while this node repairs lost bytes and has no vote",
    "ayder_ready": "1 when the node takes reads and writes",
    "ayder_tick_lateness_seconds": "How late the last tick of the consensus clock came",
    "ramforge_ha_role": "0 leader, 1 follower, 2 candidate, 3 learner",
    "ramforge_ha_state": "0 initializing, 1 ready, 2 syncing, 3 degraded, 4 failed",
    "ramforge_ha_term": "Current term",
    "ramforge_ha_epoch": "Number of the membership",
    "ramforge_ha_joint_active": "1 while the membership changes",
    "ramforge_ha_fresh_quorum": "1 when a majority was heard of lately",
}
"""Every gauge and its help."""

COUNTERS: Final[dict[str, str]] = {
    "ayder_cold_reads": "Reads that went to the disk",
}
"""Every plain counter and its help; the exported name ends in ``_total``."""


class Metrics:
    """What the hot path counts. All methods but ``render`` belong to the event loop and cost well under a microsecond."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], Histogram] = {}
        self._append = Histogram(LATENCY_BOUNDS)
        self._block_bytes = Histogram(SIZE_BOUNDS)
        self._out: dict[int, list[int]] = {}
        self._suppliers: dict[str, Callable[[], float]] = {}
        self._process = ProcessCollector(registry=None)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered; ``route`` is the template that matched."""
        histogram = self._requests.get((route, status))
        if histogram is None:
            histogram = self._new_request_series(route, status)
        histogram.observe(seconds)

    def _new_request_series(self, route: str, status: int) -> Histogram:
        if len(self._requests) >= _MAX_REQUEST_SERIES:
            route = OTHER
        return self._requests.setdefault((route, status), Histogram(LATENCY_BOUNDS))

    def observe_append(self, seconds: float, block_bytes: int) -> None:
        """A write to the log and its sync took this long."""
        self._append.observe(seconds)
        if block_bytes:
            self._block_bytes.observe(block_bytes)

    def records_out(self, topic_id: int, records: int, body_bytes: int = 0) -> None:
        """Records were read from a topic, in an answer of this size."""
        out = self._out.get(topic_id)
        if out is None:
            out = self._out.setdefault(topic_id if len(self._out) < _MAX_TRACKED_TOPICS else 0, [0, 0])
        out[0] += records
        out[1] += body_bytes

    def out_of(self, topic_id: int) -> tuple[int, int]:
        """Records and bytes read from a topic so far."""
        records, body_bytes = self._out.get(topic_id, (0, 0))
        return records, body_bytes

    def forget_topics(self, live: Iterable[int]) -> None:
        """Drop the counters of topics that are gone."""
        keep = {0, *live}
        for topic_id in [topic_id for topic_id in self._out if topic_id not in keep]:
            del self._out[topic_id]

    def supply(self, name: str, read: Callable[[], float]) -> None:
        """Have a gauge of ``GAUGES`` read at each scrape."""
        assert name in GAUGES, name
        self._suppliers[name] = read

    def sample(self, sample: Sample) -> Sample:
        """Add to ``sample`` what was counted and what the suppliers say. Everything in it is a copy afterwards."""
        sample.requests = {key: histogram.copy() for key, histogram in self._requests.items()}
        sample.append = self._append.copy()
        sample.block_bytes = self._block_bytes.copy()
        for name, read in self._suppliers.items():
            sample.gauges[name] = read()
        return sample

    def render(self, sample: Sample) -> bytes:
        """The whole text of ``/metrics``. Any thread; some milliseconds with many topics."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(sample))
        return generate_latest(registry) + generate_latest(self._process)

    @staticmethod
    def render_gauges(gauges: dict[str, float], peers: dict[str, PeerSample]) -> bytes:
        """The text of these gauges and of these peers alone."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(Sample(gauges=gauges, peers=peers), gauges_only=True))
        return generate_latest(registry)


def bounded(values: dict[str, TopicTraffic]) -> dict[str, TopicTraffic]:
    """The first ``MAX_LABELS`` by age, the rest summed under ``_other``."""
    if len(values) <= MAX_LABELS:
        return values
    names = list(values)
    kept = {name: values[name] for name in names[:MAX_LABELS]}
    kept[OTHER] = sum((values[name] for name in names[MAX_LABELS:]), TopicTraffic())
    return kept


class _Families(Collector):
    """Turns one sample into families."""

    def __init__(self, sample: Sample, *, gauges_only: bool = False) -> None:
        self._sample = sample
        self._gauges_only = gauges_only

    def collect(self) -> Iterator[Metric]:
        """See ``prometheus_client.registry.Collector``."""
        for name, value in self._sample.gauges.items():
            yield GaugeMetricFamily(name, GAUGES[name], value=value)
        if self._gauges_only:
            yield from self._peers()
            return
        for name, value in self._sample.counters.items():
            yield CounterMetricFamily(name, COUNTERS[name], value=value)
        yield from self._http()
        yield from self._log()
        yield from self._peers()
        yield from self._topics()

    def _http(self) -> Iterator[Metric]:
        requests = self._sample.requests
        by_route = CounterMetricFamily("ayder_http_route_requests", "Answers by route and status", labels=("route", "status"))
        by_class: dict[str, int] = {}
        latency: dict[str, Histogram] = {}
        for (route, status), histogram in requests.items():
            count = histogram.count
            by_route.add_metric((route, str(status)), count)
            by_class[_code(status)] = by_class.get(_code(status), 0) + count
            latency.setdefault(route, Histogram(LATENCY_BOUNDS)).add(histogram)
        yield CounterMetricFamily("ayder_http_requests", "Requests answered", value=sum(by_class.values()))
        responses = CounterMetricFamily("ayder_http_responses", "Answers by class; each is counted once", labels=("code",))
        for code in ("2xx", "3xx", "4xx", "401", "429", "5xx", "503"):
            responses.add_metric((code,), by_class.get(code, 0))
        yield responses
        yield by_route
        seconds = HistogramMetricFamily(
            "ayder_http_request_duration_seconds", "From a complete head to the answer", labels=("route",)
        )
        for route, histogram in latency.items():
            seconds.add_metric((route,), histogram.cumulative(), histogram.total)
        yield seconds

    def _log(self) -> Iterator[Metric]:
        sample = self._sample
        yield _histogram("ayder_fsync_duration_seconds", "Write and sync of one append to the log", sample.append, OLD_BOUNDS)
        yield _histogram("ayder_block_bytes", "Size of the blocks written", sample.block_bytes)
        durable = Histogram(LATENCY_BOUNDS)
        for (route, status), histogram in sample.requests.items():
            if route in _PRODUCE_ROUTES and status == 200:
                durable.add(histogram)
        yield _histogram("ayder_commit_latency_seconds", "From a produce request to its durable, applied answer", durable)
        yield _histogram("ayder_sealed_durable_latency_seconds", "The same with the old buckets", durable, OLD_BOUNDS)

    def _peers(self) -> Iterator[Metric]:
        labels = ("peer",)
        connected = GaugeMetricFamily("ayder_raft_peer_connected", "1 when this node has a connection to it", labels=labels)
        queued = GaugeMetricFamily("ayder_raft_peer_queued_bytes", "Bytes that wait to be sent to it", labels=labels)
        sent = CounterMetricFamily("ayder_raft_peer_sent_bytes", "Bytes sent to it", labels=labels)
        received = CounterMetricFamily("ayder_raft_peer_received_bytes", "Bytes received from it", labels=labels)
        match = GaugeMetricFamily("ayder_raft_peer_match_index", "On the leader: newest index on its disk", labels=labels)
        lag = GaugeMetricFamily("ayder_raft_peer_lag_entries", "On the leader: entries it does not have yet", labels=labels)
        for name, peer in self._sample.peers.items():
            connected.add_metric((name,), int(peer.connected))
            queued.add_metric((name,), peer.queued_bytes)
            sent.add_metric((name,), peer.sent_bytes)
            received.add_metric((name,), peer.received_bytes)
            if peer.match_index is not None and peer.lag is not None:
                match.add_metric((name,), peer.match_index)
                lag.add_metric((name,), peer.lag)
        yield from (connected, queued, sent, received, match, lag)

    def _topics(self) -> Iterator[Metric]:
        families = [
            CounterMetricFamily(name, help, labels=("topic",))
            for name, help in (
                ("ayder_topic_records_in", "Records taken"),
                ("ayder_topic_bytes_in", "Bytes taken, as stored"),
                ("ayder_topic_records_out", "Records read"),
                ("ayder_topic_bytes_out", "Bytes of answers with records"),
            )
        ]
        for topic, traffic in bounded(self._sample.topics).items():
            values = (traffic.records_in, traffic.bytes_in, traffic.records_out, traffic.bytes_out)
            for family, value in zip(families, values, strict=True):
                family.add_metric((topic,), value)
        yield from families
        lag = GaugeMetricFamily("ayder_group_lag_records", "Records a group has not processed yet", labels=("group", "topic"))
        for (group, topic), records in self._sample.group_lag.items():
            lag.add_metric((group, topic), records)
        yield lag


def _code(status: int) -> str:
    return str(status) if status in (401, 429, 503) else f"{status // 100}xx"


def _histogram(name: str, help: str, histogram: Histogram, bounds: tuple[float, ...] = ()) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, help, buckets=histogram.cumulative(bounds), sum_value=histogram.total)
