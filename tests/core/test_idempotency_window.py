"""The idempotency window against the shortest one that could be right, and snapshots that later changes do not reach."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ayder.checkpoint import TopicImage, decode_image, snapshot
from ayder.commands import CreateTopic, Retention
from ayder.consumer_groups import ConsumerGroups
from ayder.partition import IdempotencyWindow, Seen
from ayder.topics import TopicCatalogue

Keyed = list[tuple[bytes, Seen]]
steps = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=200)


def kept(window: IdempotencyWindow) -> Keyed:
    return [item for generation in window.generations() for item in generation.items()]


@given(steps, st.integers(1, 20), st.integers(1, 60))
def test_it_forgets_by_number_and_by_age_and_survives_a_checkpoint_anywhere(
    steps: list[tuple[int, int]], entries: int, window_ms: int
) -> None:
    window = IdempotencyWindow(entries, window_ms)
    model: Keyed = []
    now = 0
    for number, (name, passed) in enumerate(steps):
        now += passed
        key = b"%d" % name
        found = window.find(key, now)
        assert found == next((first for k, first in model if k == key and first.log_time_ms >= now - window_ms), None)
        if found is None:
            first = Seen(number, 1, b"d", number, now)
            window.add(key, first)
            young = [(k, f) for k, f in model if f.log_time_ms >= now - window_ms]
            model = [*young, (key, first)][-entries:]
        assert kept(window) == model
        assert len(window) == len(model)
        if number % 7 == 3:
            window = IdempotencyWindow(entries, window_ms, dict(model))
            assert kept(window) == model


@given(steps, st.integers(1, 20))
def test_what_was_handed_out_never_changes(steps: list[tuple[int, int]], entries: int) -> None:
    window = IdempotencyWindow(entries, 30)
    handed_out: list[tuple[tuple[dict[bytes, Seen], ...], Keyed]] = []
    now = 0
    for number, (name, passed) in enumerate(steps):
        now += passed
        handed_out.append((window.generations(), kept(window)))
        if window.find(b"%d" % name, now) is None:
            window.add(b"%d" % name, Seen(number, 1, b"d", number, now))
    for generations, then in handed_out:
        assert [item for generation in generations for item in generation.items()] == then


def catalogue_with(keys: int, entries: int) -> TopicCatalogue:
    catalogue = TopicCatalogue()
    for name in ("full", "empty"):
        catalogue.create(CreateTopic(name, 20, "sealed", Retention(), None, entries, 1000), 1)
    window = catalogue.by_name["full"].partitions[0].window
    for number in range(keys):
        window.add(b"%d" % number, Seen(number, 1, b"d" * 16, number, 5))
    return catalogue


def whole(catalogue: TopicCatalogue) -> bytes:
    """The image as one object, encoded at once."""
    topics = []
    for topic in catalogue.by_id.values():
        policy = (topic.retention, topic.partition_retention, topic.idempotency_window_entries, topic.idempotency_window_ms)
        partitions = [
            (p.next_offset, p.log_start_offset, p.bytes_taken, p.bytes_before_start, dict(kept(p.window)))
            for p in topic.partitions
        ]
        facts = (topic.topic_id, topic.name, topic.storage, topic.write_mode)
        topics.append(msgspec.convert((*facts, *policy, topic.created_index, partitions), TopicImage, strict=False))
    image = (7, 2, 9, b"12345678", catalogue.next_topic_id, catalogue.default_retention, topics, {"g": {1: 2}})
    return b"AYSTATE\x01" + msgspec.msgpack.encode(image)  # version 1: the members never changed


def test_pieces_are_the_whole_whatever_the_lengths() -> None:
    for keys in (0, 1, 15, 16, 17, 70_000):
        for entries in (1, 16, 100_000):
            catalogue = catalogue_with(keys, entries)
            groups = ConsumerGroups({"g": {1: 2}})
            taken = snapshot(catalogue, groups, index=7, term=2, log_time_ms=9, state_hash=b"12345678").encode()
            assert taken == whole(catalogue)
            assert len(decode_image(taken).topics[0].partitions[0].seen) == min(keys, entries)


def test_a_snapshot_is_of_its_moment_and_pauses_while_it_is_encoded() -> None:
    catalogue = catalogue_with(10_000, 8000)
    groups = ConsumerGroups({"g": {1: 2}})
    then = whole(catalogue)
    taken = snapshot(catalogue, groups, index=7, term=2, log_time_ms=9, state_hash=b"12345678")
    pauses = 0

    def change() -> None:
        """What the state machine does while a worker encodes: each pause falls into the middle of it."""
        nonlocal pauses
        pauses += 1
        topic = catalogue.by_name["full"]
        for number in range(1700):
            topic.partitions[0].window.add(b"new %d %d" % (pauses, number), Seen(1, 1, b"e", 1, 6))
        topic.partitions[0].append(3, 30)
        topic.partition_retention[pauses] = Retention(1, 1)
        groups.commit("g", 1, 10 * pauses, reset=True)
        catalogue.delete("empty")

    assert taken.encode(change) == then
    assert pauses >= 4
    assert len(catalogue.by_name) == 1
