"""The state machine against a model, checkpoints at any moment, and the same bytes in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ayder.commands import (
    RUN,
    BatchHead,
    CommitOffset,
    CommitOffsets,
    CreateTopic,
    DeleteTopic,
    Retention,
    SetRetention,
    TrimPartition,
    TrimPartitions,
    encode_block,
    encode_command,
)
from ayder.entries import EntryKind, LogEntry, Placement
from ayder.errors import AyderError, CorruptLog
from ayder.records import partition_uid
from ayder.runs import encode_values
from ayder.state_machine import Appended, StateMachine
from ayder.topics import murmur2, partition_for_key
from tests.core.model import Model, Sink, assert_same, digest_of, plain

WINDOW_ENTRIES, WINDOW_MS = 3, 50

names = st.sampled_from("ab")
numbers = st.sampled_from([0, 0, 0, 1, 1, 2])
bodies = st.lists(st.binary(max_size=3), min_size=1, max_size=3)
keys = st.sampled_from([b"k1", b"k2", b"k3", b"k4", b"k5"])
limits = st.none() | st.integers(0, 3)
retentions = st.builds(Retention, limits, limits)


class Machine(RuleBasedStateMachine):
    """Commands gather in a block, as they do in life; ``end_block`` applies it and compares every result."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.sink = Sink()
        self.state = StateMachine(self.sink)
        self.slots: list[tuple[int, bytes]] = []
        self.expected: list[object] = []
        self.entries: list[LogEntry] = []
        for name in "ab":
            self.create(name, 2, Retention())

    def uid(self, name: str, number: int, *, stale: bool = False) -> int:
        """Of a living topic, or of one that was deleted or never was."""
        topic = self.model.topics.get(name)
        topic_id = 99 if topic is None else topic.topic_id - stale
        return partition_uid(topic_id, number)

    def add(self, slot: tuple[int, bytes], expected: object) -> None:
        self.slots.append(slot)
        self.expected.append(expected)

    @rule(name=names, partitions=st.integers(1, 3), retention=retentions)
    def create_again(self, name: str, partitions: int, retention: Retention) -> None:
        self.create(name, partitions, retention)

    def create(self, name: str, partitions: int, retention: Retention) -> None:
        command = CreateTopic(name, partitions, "sealed", retention, None, WINDOW_ENTRIES, WINDOW_MS)
        self.add(encode_command(command), self.model.create(command))

    @rule(name=names, sure=st.sampled_from([0, 0, 1]))
    def delete(self, name: str, sure: int) -> None:
        if not sure:  # else few topics would live to see anything
            return
        self.add(encode_command(DeleteTopic(name)), self.model.delete(name))

    def run_of(self, uid: int, values: list[bytes], producer: bytes) -> tuple[int, bytes]:
        return RUN, encode_values(uid >> 16, uid & 0xFFFF, values, producer=producer)

    @rule(name=names, number=numbers, values=bodies, stale=st.booleans())
    def produce(self, name: str, number: int, values: list[bytes], stale: bool) -> None:
        uid = self.uid(name, number, stale=stale)
        self.add(self.run_of(uid, values, b""), self.model.run(uid, [len(v) for v in values], b""))

    @rule(name=names, number=numbers, body=st.sampled_from([[b"x"], [b"y", b"zz"]]), key=keys)
    def produce_once(self, name: str, number: int, body: list[bytes], key: bytes) -> None:
        uid, producer = self.uid(name, number), digest_of(b"\n".join(body)) + key
        self.add(self.run_of(uid, body, producer), self.model.run(uid, [len(v) for v in body], producer))

    @rule(name=names, order=st.permutations([0, 1, 2]), runs=st.integers(1, 3), body=st.sampled_from([b"x", b"yy"]), key=keys)
    def produce_batch(self, name: str, order: list[int], runs: int, body: bytes, key: bytes) -> None:
        topic = self.model.topics.get(name)
        numbers = [n for n in order if topic is None or n < len(topic.partitions)][:runs]
        parts = [(self.uid(name, n), [body] * (n + 1)) for n in numbers]
        producer = digest_of(body) + key
        expected = self.model.batch([(uid, [len(v) for v in values]) for uid, values in parts], producer)
        self.add(encode_command(BatchHead(parts[0][0], producer, len(parts))), expected[0])
        for (uid, values), result in zip(parts, expected[1:], strict=True):
            self.add(self.run_of(uid, values, b""), result)

    @rule(
        commits=st.lists(
            st.tuples(names, numbers, st.sampled_from("gh"), st.integers(0, 3), st.booleans()), min_size=1, max_size=3
        )
    )
    def commit(self, commits: list[tuple[str, int, str, int, bool]]) -> None:
        asked = []
        for name, number, group, offset, reset in commits:
            uid = self.uid(name, number)
            asked.append(CommitOffset(uid >> 16, uid & 0xFFFF, group, offset - reset, reset))
        self.add(encode_command(CommitOffsets(tuple(asked))), self.model.commit(asked))

    @rule(name=names | st.just("*"), number=st.none() | numbers, retention=retentions)
    def retain(self, name: str, number: int | None, retention: Retention) -> None:
        command = SetRetention(name, None if name == "*" else number, retention)
        self.add(encode_command(command), self.model.retain(command))

    @rule(trims=st.lists(st.tuples(names, numbers, st.integers(0, 9)), min_size=1, max_size=3))
    def trim(self, trims: list[tuple[str, int, int]]) -> None:
        asked = []
        for name, number, offset in trims:
            uid = self.uid(name, number)
            found = self.model.partition(uid)
            asked.append(TrimPartition(uid, offset, sum(found[1].sizes[:offset]) if found else 0))
        self.add(encode_command(TrimPartitions(tuple(asked))), self.model.trim(asked))

    @rule(advance_ms=st.sampled_from([0, 1, 20, WINDOW_MS, WINDOW_MS + 1]), term=st.integers(0, 1))
    def end_block(self, advance_ms: int, term: int) -> None:
        entry = self.entry(EntryKind.BLOCK, encode_block(self.slots), term)
        results = self.state.apply(entry, Placement(7, 1000))
        assert [plain(result) for result in results] == self.expected
        self.slots, self.expected = [], []
        self.model.index += 1
        self.model.now += advance_ms

    def entry(self, kind: EntryKind, payload: bytes, term: int) -> LogEntry:
        before = self.entries[-1].term if self.entries else 1
        self.entries.append(LogEntry(self.model.index, before + term, kind, self.model.now, payload))
        return self.entries[-1]

    @rule()
    def restart(self) -> None:
        """A checkpoint holds everything: who starts from it goes on as if nothing had been."""
        self.end_block(0, 0)
        self.state.apply(self.entry(EntryKind.NOOP, b"", 1), Placement(7, 0))
        self.model.index += 1
        image = self.state.capture()
        restored = StateMachine(self.sink)
        restored.restore(image)
        assert restored.capture() == image
        self.state = restored

    @invariant()
    def same_as_the_model(self) -> None:
        if not self.slots:
            assert_same(self.state, self.model, self.sink)

    def teardown(self) -> None:
        self.end_block(0, 0)
        again = StateMachine(Sink())
        for entry in self.entries:
            again.apply(entry, Placement(1, 0))
        assert again.state_hash == self.state.state_hash
        assert again.capture() == self.state.capture()


Machine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAgainstTheModel = Machine.TestCase


# -- determinism across processes ---------------------------------------------------------------------------------
def log_of_everything() -> list[LogEntry]:
    """A log with every command in it, the refused ones too."""
    slots: list[list[tuple[int, bytes]]] = []
    for round_ in range(6):
        name = f"topic-{round_}"
        slots.append([encode_command(CreateTopic(name, 4, "sealed", Retention(None, round_), None, 3, 50))])
        topic_id = round_ + 1
        block = [encode_command(BatchHead(topic_id << 16, digest_of(b"b") + b"batch", 2))]
        block += [(RUN, encode_values(topic_id, n, [b"v", b"w"])) for n in (0, 1)]
        block += [(RUN, encode_values(topic_id, n, [b"%d" % n], producer=digest_of(b"x") + b"k%d" % n)) for n in (0, 1, 2, 9)]
        commits = [CommitOffset(topic_id, n, f"group-{i}", n) for n in (0, 1) for i in (5, 1, 3)]
        block += [encode_command(CommitOffsets(tuple(commits))), encode_command(CommitOffsets((CommitOffset(77, 0, "g", 0),)))]
        block += [encode_command(SetRetention(name, n, Retention(n, None))) for n in (3, 1, 200)]
        block += [encode_command(TrimPartitions((TrimPartition(topic_id << 16, 1, 1),)))]
        slots += [block, block]
    slots.append([encode_command(DeleteTopic("topic-2")), encode_command(DeleteTopic("nowhere"))])
    return [LogEntry(i, 1 + i // 9, EntryKind.BLOCK, 10 * i, encode_block(part)) for i, part in enumerate(slots, 1)]


def applied(entries: list[LogEntry]) -> StateMachine:
    state = StateMachine(Sink())
    for entry in entries:
        state.apply(entry, Placement(1, 0))
    return state


def test_another_process_with_another_hash_seed_comes_to_the_same_bytes() -> None:
    code = (
        "import tests.core.test_state_machine as t; s = t.applied(t.log_of_everything()); "
        "print(s.capture().hex(), s.state_hash.hex())"
    )
    found = set()
    for seed in ("0", "12345"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found.add(done.stdout.strip())
    here = applied(log_of_everything())
    assert found == {f"{here.capture().hex()} {here.state_hash.hex()}"}


def test_the_checkpoint_of_version_1_is_what_it_was() -> None:
    golden = (Path(__file__).parent / "golden" / "checkpoint.hex").read_text().split()
    state = applied(log_of_everything())
    assert [state.capture().hex(), state.state_hash.hex()] == golden


def test_the_state_hash_tells_histories_apart() -> None:
    entries = log_of_everything()
    hashes = {applied(entries[:n]).state_hash for n in range(len(entries) + 1)}
    assert len(hashes) == len(entries) + 1
    last = entries[-1]
    for other in (
        LogEntry(last.index, last.term + 1, last.kind, last.log_time_ms, last.payload),
        LogEntry(last.index, last.term, last.kind, last.log_time_ms + 1, last.payload),
        LogEntry(last.index, last.term, last.kind, last.log_time_ms, encode_block([encode_command(DeleteTopic("topic-1"))])),
    ):
        assert applied([*entries[:-1], other]).state_hash not in hashes


@pytest.mark.parametrize("damage", [b"", b"AYSTATE\x02", b"AYSTATE\x01", b"AYSTATE\x01\xc1", b"AYSTATE\x01\x91\x01"])
def test_what_is_no_checkpoint_is_refused(damage: bytes) -> None:
    with pytest.raises(CorruptLog):
        StateMachine(Sink()).restore(damage)


def test_no_cut_checkpoint_is_taken_for_whole() -> None:
    image = applied(log_of_everything()).capture()
    for length in range(0, len(image), 7):
        with pytest.raises(CorruptLog):
            StateMachine(Sink()).restore(image[:length])


# -- single rules, spelled out ------------------------------------------------------------------------------------
def machine_with(*blocks: list[tuple[int, bytes]]) -> tuple[StateMachine, list[object]]:
    """A topic ``t`` of three partitions, and the results of the last block."""
    state = StateMachine(Sink())
    first = [encode_command(CreateTopic("t", 3, "sealed", Retention(), None, 3, 50))]
    results: list[object] = []
    for index, block in enumerate((first, *blocks), 1):
        entry = LogEntry(index, 1, EntryKind.BLOCK, index, encode_block(block))
        results = [plain(result) for result in state.apply(entry, Placement(1, 0))]
    return state, results


def keyed(number: int, body: bytes, key: bytes) -> tuple[int, bytes]:
    return RUN, encode_values(1, number, [body], producer=digest_of(body) + key)


def test_a_key_used_twice_in_one_block_has_one_effect() -> None:
    state, results = machine_with([keyed(0, b"x", b"k"), keyed(0, b"x", b"k"), keyed(0, b"y", b"k"), keyed(1, b"x", b"k")])
    assert results == [
        ("appended", 0, 1, 2, False),
        ("appended", 0, 1, 2, True),
        "idempotency_key_reused",
        ("appended", 0, 1, 2, False),
    ]
    assert state.catalogue.by_name["t"].partitions[0].next_offset == 1


def test_a_batch_and_a_single_record_do_not_pass_for_each_other() -> None:
    batch = [encode_command(BatchHead(1 << 16, digest_of(b"x") + b"k", 1)), (RUN, encode_values(1, 0, [b"x"]))]
    assert machine_with([keyed(0, b"x", b"k")], batch)[1] == [("judged", True), "idempotency_key_reused"]
    assert machine_with(batch, [keyed(0, b"x", b"k")])[1] == ["idempotency_key_reused"]
    assert machine_with(batch, batch)[1] == [("judged", True), ("appended", 0, 1, 2, True)]


def test_a_batch_head_without_runs_is_no_command() -> None:
    state = StateMachine(Sink())
    block = encode_block([encode_command(BatchHead(1 << 16, b"d" * 16, 0))])
    with pytest.raises(CorruptLog):
        state.apply(LogEntry(1, 1, EntryKind.BLOCK, 0, block), Placement(1, 0))


def test_a_key_leaves_the_window_by_time_and_by_count() -> None:
    def judged(*uses: tuple[int, bytes]) -> list[bool]:
        state = machine_with()[0]
        found = []
        for index, (time_ms, key) in enumerate(uses, 2):
            (result,) = state.apply(
                LogEntry(index, 1, EntryKind.BLOCK, time_ms, encode_block([keyed(0, b"x", key)])), Placement(1, 0)
            )
            assert isinstance(result, Appended)
            found.append(result.duplicate)
        return found

    assert judged((100, b"k"), (150, b"k"), (151, b"k"), (201, b"k")) == [False, True, False, True]
    assert judged(*((100, b"%d" % n) for n in (1, 2, 3, 1, 4, 1))) == [False, False, False, True, False, False]


def test_committing_the_same_offset_again_is_no_step_back() -> None:
    def committing(offset: int, *, reset: bool = False) -> list[tuple[int, bytes]]:
        return [encode_command(CommitOffsets((CommitOffset(1, 0, "g", offset, reset),)))]

    values = [(RUN, encode_values(1, 0, [b"a", b"b", b"c"]))]
    assert machine_with(values, committing(1), committing(1))[1] == [("committed", (True,))]
    assert machine_with(values, committing(1), committing(0))[1] == [("committed", (False,))]
    state, results = machine_with(values, committing(1), committing(-1, reset=True))
    assert (results, state.groups.committed) == ([("committed", (True,))], {})


def test_d14_a_policy_for_a_topic_leaves_what_it_does_not_say() -> None:
    """Defect D-14: a record that set only the time limit took the size limit away."""
    state, _ = machine_with(
        [
            encode_command(SetRetention("t", 1, Retention(None, 100))),
            encode_command(SetRetention("t", 2, Retention(5, 7))),
            encode_command(SetRetention("t", None, Retention(1000, None))),
        ]
    )
    topic = state.catalogue.by_name["t"]
    policies = [state.catalogue.effective_retention(topic, n) for n in range(3)]
    assert policies == [Retention(1000, None), Retention(1000, 100), Retention(1000, 7)]


def test_entries_come_in_order_and_log_time_never_goes_back() -> None:
    state, _ = machine_with()
    for entry in (
        LogEntry(1, 1, EntryKind.NOOP, 5, b""),
        LogEntry(3, 1, EntryKind.NOOP, 5, b""),
        LogEntry(2, 1, EntryKind.NOOP, 0, b""),
    ):
        with pytest.raises(AssertionError):
            state.apply(entry, Placement(1, 0))


def test_a_refusal_says_what_stands() -> None:
    state, _ = machine_with([keyed(0, b"x", b"k")])
    block = encode_block([encode_command(CommitOffsets((CommitOffset(1, 0, "g", 1),))), keyed(0, b"y", b"k")])
    beyond, reused = state.apply(LogEntry(3, 1, EntryKind.BLOCK, 9, block), Placement(1, 0))
    assert isinstance(beyond, AyderError) and isinstance(reused, AyderError)
    assert beyond.facts == {"offset": 1, "log_start_offset": 0, "high_watermark": 1}
    assert reused.facts == {"offset": 0}


# -- partitioner --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "hash_"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_keys_go_where_kafkas_clients_send_them(key: bytes, hash_: int) -> None:
    """Vectors of Kafka's own test of ``Utils.murmur2``."""
    assert murmur2(key) == hash_ % (1 << 32)
    assert partition_for_key(key, 7) == (hash_ & 0x7FFFFFFF) % 7


def test_a_checkpoint_remembers_the_members_and_has_version_2_only_then() -> None:
    state = applied(log_of_everything())
    before = state.capture()
    entry = LogEntry(
        state.applied_index + 1, state.applied_term, EntryKind.MEMBERSHIP, state.log_time_ms, b"\x01\x01\x01a\x00\x00"
    )
    state.apply(entry, Placement(1, 0))
    image = state.capture()
    assert (before[:9], image[:9]) == (b"AYSTATE\x01\x98", b"AYSTATE\x02\x9a")
    assert image.endswith(b"\xc4\x06" + entry.payload + msgspec.msgpack.encode(entry.index))
    again = StateMachine(Sink())
    again.restore(image)
    assert (again.membership, again.membership_index) == (entry.payload, entry.index) and again.capture() == image
    again.restore(before)
    assert (again.membership, again.membership_index) == (b"", 0) and again.capture() == before
