"""What is counted, and that the text of a scrape adds up and stays bounded."""

import re

from prometheus_client.parser import text_string_to_metric_families

from ayder.metrics import LATENCY_BOUNDS, MAX_LABELS, OTHER, Histogram, Metrics, Sample, TopicTraffic, bounded
from tests.http.in_process import Client, running

Series = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parse(text: bytes) -> Series:
    found: Series = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def scrape(client: Client, path: str = "/metrics") -> Series:
    reply = await Client(client.node, "").call("GET", path, ok=200)
    return parse(reply.body)


def only(series: Series, name: str, **labels: str) -> float:
    return series[name][tuple(sorted(labels.items()))]


def check_histogram(series: Series, name: str, **labels: str) -> None:
    """Buckets never fall and the last is the count (D-40)."""
    buckets = {dict(key)["le"]: value for key, value in series[name + "_bucket"].items() if labels.items() <= dict(key).items()}
    values = [buckets[bound] for bound in sorted(buckets, key=float)]
    assert values == sorted(values)
    assert buckets["+Inf"] == only(series, name + "_count", **labels)


def test_a_histogram_puts_a_value_on_a_bound_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert histogram.cumulative((2.0,)) == [("2.0", 4.0), ("+Inf", 5.0)]
    assert (histogram.count, histogram.total) == (5, 7.5)


def test_a_sample_is_a_copy() -> None:
    metrics = Metrics()
    metrics.observe_request("/a", 200, 0.1)
    sample = metrics.sample(Sample())
    metrics.observe_request("/a", 200, 0.1)
    assert sample.requests["/a", 200].count == 1


def test_d40_infinity_counts_everything_however_slow() -> None:
    metrics = Metrics()
    for seconds in (0.0001, 0.4, 0.6, 30.0, 4000.0):
        metrics.observe_append(seconds, 100)
        metrics.observe_request("/broker/topics/{topic}/produce", 200, seconds)
    series = parse(metrics.render(metrics.sample(Sample())))
    for name in (
        "ayder_fsync_duration_seconds",
        "ayder_sealed_durable_latency_seconds",
        "ayder_commit_latency_seconds",
        "ayder_block_bytes",
    ):
        check_histogram(series, name)
        assert only(series, name + "_count") == 5
    old = [dict(key)["le"] for key in series["ayder_fsync_duration_seconds_bucket"]]
    assert old == ["0.0005", "0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.25", "0.5", "+Inf"]


def test_each_answer_is_counted_in_one_class() -> None:
    metrics = Metrics()
    for status in (200, 204, 301, 400, 401, 404, 429, 500, 503, 504):
        metrics.observe_request("/a", status, 0.001)
    series = parse(metrics.render(metrics.sample(Sample())))
    classes = {dict(key)["code"]: value for key, value in series["ayder_http_responses_total"].items()}
    assert classes == {"2xx": 2, "3xx": 1, "4xx": 2, "401": 1, "429": 1, "5xx": 2, "503": 1}
    assert only(series, "ayder_http_requests_total") == 10
    assert only(series, "ayder_http_route_requests_total", route="/a", status="404") == 1
    check_histogram(series, "ayder_http_request_duration_seconds", route="/a")


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(5000):
        metrics.observe_request(f"/{number}", 200, 0.001)
        metrics.records_out(number + 1, 1, 10)
    sample = metrics.sample(Sample(topics={f"t{number}": TopicTraffic(1, 2, 3, 4) for number in range(MAX_LABELS + 50)}))
    assert len(sample.requests) <= 2049 and sample.requests[OTHER, 200].count == 5000 - 2048
    kept = bounded(sample.topics)
    assert len(kept) == MAX_LABELS + 1 and kept[OTHER] == TopicTraffic(50, 100, 150, 200)
    series = parse(metrics.render(sample))
    assert sum(series["ayder_topic_records_in_total"].values()) == MAX_LABELS + 50


def test_topics_that_are_gone_are_forgotten_and_never_tracked_without_bound() -> None:
    metrics = Metrics()
    for topic_id in range(1, 20_000):
        metrics.records_out(topic_id, 1, 1)
    assert metrics.out_of(1) == (1, 1) and metrics.out_of(19_999) == (0, 0)
    assert metrics.out_of(0)[0] == 19_999 - 16_384
    metrics.forget_topics([5])
    assert metrics.out_of(5) == (1, 1) and metrics.out_of(6) == (0, 0)


def test_a_supplied_gauge_is_read_at_each_scrape() -> None:
    metrics, values = Metrics(), [1.0]
    metrics.supply("ayder_http_active_connections", lambda: values[0])
    for value in (1.0, 7.0):
        values[0] = value
        assert only(parse(metrics.render(metrics.sample(Sample()))), "ayder_http_active_connections") == value


async def test_a_scrape_tells_what_happened() -> None:
    async with running() as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 2})
        await client.produce("t", b"0", b"1", b"2")
        await client.get("/broker/consume/t/g/0")
        await client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 0})
        await client.call("GET", "/broker/topics/none")
        series = await scrape(client)
        assert only(series, "ayder_topic_records_in_total", topic="t") == 3
        assert only(series, "ayder_topic_records_out_total", topic="t") == 3
        assert only(series, "ayder_topic_bytes_in_total", topic="t") > 3
        assert only(series, "ayder_group_lag_records", group="g", topic="t") == 2
        assert only(series, "ayder_topics") == 1 and only(series, "ayder_partitions") == 2
        assert only(series, "ayder_consumer_groups") == 1
        assert only(series, "ayder_http_responses_total", code="4xx") == 1
        assert only(series, "ayder_raft_role") == 0 and only(series, "ayder_raft_term") == 1 and only(series, "ayder_ready") == 1
        assert (
            only(series, "ayder_raft_commit_index")
            == only(series, "ayder_raft_applied_index")
            == client.node.broker.applied_index
        )
        assert only(series, "ayder_aof_files_total") == only(series, "ayder_log_segments") == 1
        assert only(series, "ayder_log_bytes") > 0
        assert only(series, "process_resident_memory_bytes") > 0


async def test_d40_the_durable_latency_is_fed() -> None:
    async with running() as client:
        for _ in range(3):
            await client.call("POST", "/broker/topics/t/produce", b"x", ok=200)
        await client.call("POST", "/broker/topics/t/produce?partition=99", b"x")
        series = await scrape(client)
        for name in ("ayder_sealed_durable_latency_seconds", "ayder_commit_latency_seconds"):
            assert only(series, name + "_count") == 3
        assert only(series, "ayder_fsync_duration_seconds_count") >= 3
        check_histogram(series, "ayder_fsync_duration_seconds")


async def test_a_deleted_topic_leaves_the_scrape() -> None:
    async with running() as client:
        await client.produce("t", b"0")
        await client.get("/broker/topics/t/0/records")
        await client.call("DELETE", "/broker/topics/t", ok=200)
        series = await scrape(client)
        assert series.get("ayder_topic_records_in_total", {}) == {} and only(series, "ayder_topics") == 0


async def test_many_topics_and_groups_are_summed_up() -> None:
    async with running(topics__auto_create=False) as client:
        await client.post("/broker/topics", {"name": "t", "partitions": 1})
        await client.produce("t", b"0", b"1")
        commits = [{"topic": "t", "group": f"g{number}", "partition": 0, "offset": 0} for number in range(MAX_LABELS + 5)]
        for first in range(0, len(commits), 500):
            await client.post("/broker/commit", commits[first : first + 500])
        series = await scrape(client)
        assert len(series["ayder_group_lag_records"]) == MAX_LABELS + 1
        assert only(series, "ayder_group_lag_records", group=OTHER, topic=OTHER) == 5


async def test_the_old_cluster_gauges_of_one_node() -> None:
    async with running() as client:
        series = await scrape(client, "/metrics_ha")
        found = {
            name: only(series, f"ramforge_ha_{name}")
            for name in ("role", "state", "term", "epoch", "joint_active", "fresh_quorum")
        }
        assert found == {"role": 0, "state": 1, "term": 1, "epoch": 1, "joint_active": 0, "fresh_quorum": 1}
        assert only(series, "ayder_raft_role") == 0
        client.node.driver.refuse_until_ns = 1
        assert only(await scrape(client, "/metrics_ha"), "ramforge_ha_state") == 3


async def test_the_text_is_what_prometheus_reads() -> None:
    async with running() as client:
        reply = await client.ask("GET", "/metrics")
        assert reply.content_type == b"text/plain; version=0.0.4; charset=utf-8"
        names = re.findall(rb"^# TYPE (\S+)", reply.body, re.MULTILINE)
        assert len(names) == len(set(names)) > 20


def test_the_old_bounds_are_among_ours() -> None:
    assert list(LATENCY_BOUNDS) == sorted(LATENCY_BOUNDS)
    assert {0.0005, 0.5} <= set(LATENCY_BOUNDS)
