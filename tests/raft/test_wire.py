"""The peer protocol's bytes: what goes in comes out, anything else is a ProtocolError, and version 1 is what it was."""

import random
import re
import struct
import tracemalloc
import typing
from pathlib import Path

import attrs
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from ayder.entries import EntryKind, LogEntry
from ayder.raft.frames import FRAME_HEADER_BYTES, ProtocolError, frame
from ayder.raft.handshake import HANDSHAKE_BYTES, HandshakeReader, Hello, Refusal, encode_hello, encode_refusal
from ayder.raft.membership import Membership
from ayder.raft.messages import (
    AppendEntries,
    AppendReply,
    Barrier,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    RequestVote,
    Snapshot,
    SnapshotMeta,
    TimeoutNow,
    VoteReply,
)
from ayder.raft.wire import MAX_FRAME_BYTES, PING, FrameReader, encode

GOLDEN = Path(__file__).parent / "golden" / "peer-protocol-v1.txt"
CLUSTER = bytes(range(16))
MIB = 1 << 20

numbers = st.integers(0, 2**64 - 1)
names = st.text("abcdefgh-.", min_size=1, max_size=9)
entries = st.builds(
    LogEntry, st.just(0), numbers, st.sampled_from(EntryKind), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=40)
)


@st.composite
def memberships(draw: st.DrawFn) -> Membership:
    voters = draw(st.sets(names, min_size=1, max_size=4))
    outgoing = draw(st.just(set()) | st.sets(names, max_size=4))
    return Membership(tuple(voters), tuple(outgoing), tuple(draw(st.sets(names, max_size=3)) - voters - outgoing))


def values_of(kind: object) -> st.SearchStrategy[object]:
    """Values of a field by its type, so that a field added to a message is under test at once."""
    if kind is int:
        return numbers
    if kind is bool:
        return st.booleans()
    if kind is bytes:
        return st.binary(max_size=60)
    if kind is Membership:
        return memberships()
    if typing.get_args(kind):
        return st.one_of(*[values_of(one) for one in typing.get_args(kind)])
    if kind is type(None):
        return st.none()
    return objects_of(typing.cast(type, kind))


def objects_of(kind: type) -> st.SearchStrategy[object]:
    hints = typing.get_type_hints(kind)
    fixed = {"sender": st.just("node-2"), "log_time_ms": st.integers(-(2**63), 2**63 - 1)}
    fields = {
        one.name: fixed[one.name] if one.name in fixed else values_of(hints[one.name])
        for one in attrs.fields(kind)
        if one.name != "entries"
    }
    return st.builds(kind, **fields, **({"entries": st.just(())} if "entries" in hints else {}))


@st.composite
def appends(draw: st.DrawFn) -> AppendEntries:
    message = typing.cast(AppendEntries, draw(objects_of(AppendEntries)))
    found = draw(st.lists(entries, max_size=4))
    placed = tuple(attrs.evolve(one, index=message.prev_index + at) for at, one in enumerate(found, 1))
    return attrs.evolve(message, entries=placed)


messages: st.SearchStrategy[Message] = st.one_of(
    *[appends() if kind is AppendEntries else objects_of(kind) for kind in typing.get_args(Message)]
)


def wire_bytes(*said: Message) -> bytes:
    return b"".join(piece for message in said for piece in encode(message))


def read(data: bytes, *, pieces: int | None = None, limit: int = MAX_FRAME_BYTES) -> list[Message]:
    reader = FrameReader("node-2", max_frame_bytes=limit)
    step = pieces or max(1, len(data))
    return [message for at in range(0, len(data), step) for message in reader.receive_data(data[at : at + step])]


@given(st.lists(messages, max_size=5), st.integers(1, 50))
def test_messages_come_out_as_they_went_in(said: list[Message], step: int) -> None:
    data = wire_bytes(*said)
    assert read(data) == said
    assert read(data, pieces=1) == said
    assert read(data, pieces=step) == said


@given(messages)
def test_pings_between_messages_are_not_seen(message: Message) -> None:
    assert read(PING + wire_bytes(message) + PING + wire_bytes(message) + PING) == [message, message]


@given(messages)
def test_a_message_that_is_cut_off_is_waited_for(message: Message) -> None:
    data = wire_bytes(message)
    for cut in range(len(data)):
        reader = FrameReader("node-2")
        assert reader.receive_data(data[:cut]) == []
        assert reader.kept_bytes == cut
        assert reader.receive_data(data[cut:]) == [message]
        assert reader.kept_bytes == 0


@given(messages)
def test_a_body_that_is_shorter_than_it_says_or_longer_is_refused(message: Message) -> None:
    """Every truncation and every extension under a valid checksum: a message has one encoding and no other is taken."""
    data = wire_bytes(message)
    kind, body = data[8], data[FRAME_HEADER_BYTES:]
    for changed in (*(body[:cut] for cut in range(len(body))), body + b"\0"):
        refitted = b"".join(frame(kind, changed))
        if kind == 22:  # the data of a snapshot is whatever is left of the body
            assert_refused_or_canonical(refitted)
        else:
            with pytest.raises(ProtocolError):
                read(refitted)


def assert_refused_or_canonical(data: bytes) -> None:
    reader = FrameReader("node-2")
    try:
        found = reader.receive_data(data)
    except ProtocolError:
        return
    assert wire_bytes(*found) == data[: len(data) - reader.kept_bytes]


@given(messages, st.data())
def test_a_flipped_bit_is_never_another_message(message: Message, data: st.DataObject) -> None:
    original = wire_bytes(message)
    follower = wire_bytes(Heartbeat(1, "node-2", 2, 3)) * 20
    at = data.draw(st.integers(0, len(original) * 8 - 1))
    flipped = bytearray(original)
    flipped[at // 8] ^= 1 << at % 8
    try:
        assert read(bytes(flipped) + follower) == []  # a length that grew: still waiting
    except ProtocolError:
        pass


@given(st.binary(max_size=200))
def test_noise_raises_nothing_but_protocol_errors(noise: bytes) -> None:
    assert_refused_or_canonical(noise)
    for reader in (HandshakeReader(), HandshakeReader()):
        try:
            reader.receive_data(noise)
        except ProtocolError:
            pass


@given(st.sampled_from([*range(26), 255]), st.binary(max_size=120))
def test_noise_in_a_valid_frame_is_refused_or_means_exactly_these_bytes(kind: int, body: bytes) -> None:
    data = b"".join(frame(kind, body))
    if data != PING:
        assert_refused_or_canonical(data)
    try:
        said = HandshakeReader().receive_data(data)
    except ProtocolError:
        return
    assert said is not None
    assert (encode_hello(said) if isinstance(said, Hello) else encode_refusal(said.reason)) == data


@given(messages, st.data())
def test_a_changed_byte_under_a_valid_checksum_means_exactly_these_bytes(message: Message, data: st.DataObject) -> None:
    original = wire_bytes(message)
    body = bytearray(original[FRAME_HEADER_BYTES:])
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    assert_refused_or_canonical(b"".join(frame(original[8], bytes(body))))


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("checksum", bytes([*wire_bytes(TimeoutNow(1, "a"))[:-1], 9])),
        ("version", struct.pack("<II", 2, crc32c(b"\2\0\0\0\x17\2")) + b"\x17\2"),
        ("type 24", b"".join(frame(24, b""))),
        ("type 1 ", encode_hello(Hello(CLUSTER, "a", "b"))),
        ("unknown flags", b"".join(frame(16, struct.pack("<QQQB", 1, 2, 3, 4)))),
        ("unknown flags", b"".join(frame(18, struct.pack("<QQQQIB", 1, 2, 3, 4, 0, 2)))),
        ("entries in 0 bytes", b"".join(frame(18, struct.pack("<QQQQIB", 1, 2, 3, 4, 2**32 - 1, 0)))),
        ("shorter than", b"".join(frame(18, struct.pack("<QQQQIB QqIB", 1, 2, 3, 4, 1, 0, 1, 1, 2**32 - 1, 1)))),
        ("unknown kind", b"".join(frame(18, struct.pack("<QQQQIB QqIB", 1, 2, 3, 4, 1, 0, 1, 1, 0, 77)))),
        ("out of order", b"".join(frame(22, struct.pack("<QQQqI", 1, 2, 3, 4, 8) + b"\1\2\1b\1a\0\0"))),
        ("does not decode", b"".join(frame(22, struct.pack("<QQQqI", 1, 2, 3, 4, 6) + b"\1\1\1\xff\0\0"))),
        ("does not decode", b"".join(frame(22, struct.pack("<QQQqI", 1, 2, 3, 4, 0)))),
        ("of 1 bytes", b"\1\0\0\0"),
        ("of 4294967295 bytes", b"\xff" * 4),
    ],
)
def test_what_is_malformed_is_named(what: str, data: bytes) -> None:
    reader = FrameReader("a")
    with pytest.raises(ProtocolError, match=what):
        reader.receive_data(data)
    with pytest.raises(ProtocolError, match="over"):
        reader.receive_data(PING)


def test_a_block_and_a_large_body_fit_and_nothing_longer_than_the_limit() -> None:
    rng = random.Random(3)
    block, body = rng.randbytes(4 * MIB), rng.randbytes(8 * MIB)
    placed = (LogEntry(8, 1, EntryKind.BLOCK, 5, block), LogEntry(9, 1, EntryKind.BLOCK, 6, body))
    said = AppendEntries(1, "node-2", 7, 1, placed, 7)
    pieces = encode(said)
    assert pieces[1] is block and pieces[2] is body, "payloads are not copied"
    data = b"".join(pieces)
    assert read(data, pieces=65536) == [said]
    with pytest.raises(ProtocolError, match="are allowed"):
        read(data[:4], limit=len(data) - 1)
    assert read(data, pieces=MIB, limit=len(data)) == [said]


def test_a_claimed_length_costs_nothing_until_the_bytes_arrive() -> None:
    """Sixteen hundred readers that were promised 16 MiB each."""
    claim = struct.pack("<I", MAX_FRAME_BYTES - 8)
    tracemalloc.start()
    try:
        readers = [FrameReader("node-2") for _ in range(1600)]
        for reader in readers:
            assert reader.receive_data(claim + b"x" * 60) == []
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


def test_no_more_than_one_frame_is_kept_however_it_arrives() -> None:
    said = InstallSnapshot(1, "node-2", Snapshot(SnapshotMeta(1, 1, Membership(("a",))), bytes(MIB)))
    data = wire_bytes(said) * 3
    reader = FrameReader("node-2")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for at in range(0, len(data), 1000):
            for message in reader.receive_data(data[at : at + 1000]):
                assert message == said
                del message
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 3 * MIB, "a frame, its payload, and the growth of the buffer"
    assert reader.kept_bytes == 0


# -- the handshake --------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=16, max_size=16), names, names, st.tuples(st.integers(1, 255), st.integers(1, 255)).map(sorted))
def test_a_hello_comes_out_as_it_went_in(cluster_id: bytes, sender: str, receiver: str, versions: list[int]) -> None:
    hello = Hello(cluster_id, sender, receiver, *versions)
    data = encode_hello(hello)
    assert HandshakeReader().receive_data(data) == hello
    reader = HandshakeReader()
    for at in range(len(data) - 1):
        assert reader.receive_data(data[at : at + 1]) is None
    assert reader.receive_data(data[-1:]) == hello


@given(st.text(max_size=400))
def test_a_refusal_carries_its_reason_as_far_as_there_is_room(reason: str) -> None:
    said = HandshakeReader().receive_data(encode_refusal(reason.replace("\ud800", "?").encode(errors="replace").decode()))
    assert isinstance(said, Refusal)
    assert said.reason


def test_the_longest_names_fit_the_handshake() -> None:
    hello = Hello(CLUSTER, "a" * 128, "b" * 128)
    assert len(encode_hello(hello)) <= HANDSHAKE_BYTES
    assert HandshakeReader().receive_data(encode_hello(hello)) == hello


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("spoke before", encode_hello(Hello(CLUSTER, "a", "b")) + b"x"),
        ("spoke before", encode_hello(Hello(CLUSTER, "a", "b")) * 2),
        ("are allowed", struct.pack("<I", 513 - 8)),
        ("are allowed", b"GET / HTTP/1.1\r\n\r\n"),
        ("are allowed", b"\x16\x03\x01\x02\x00\x01\x00"),
        ("not a peer", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPS", 1, 1, 0, CLUSTER) + b"\1\0a\1\0b"))),
        ("not a peer", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPR", 2, 1, 0, CLUSTER) + b"\1\0a\1\0b"))),
        ("not a peer", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPR", 1, 1, 7, CLUSTER) + b"\1\0a\1\0b"))),
        ("a text of 0", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPR", 1, 1, 0, CLUSTER) + b"\0\0\1\0b"))),
        ("a text of 129", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPR", 1, 1, 0, CLUSTER) + b"\x81\0" + b"a" * 140))),
        ("UTF-8", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPR", 1, 1, 0, CLUSTER) + b"\1\0\xff\1\0b"))),
        ("printable", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPR", 1, 1, 0, CLUSTER) + b"\2\0a\n\1\0b"))),
        ("behind the end", b"".join(frame(1, struct.pack("<4sBBH16s", b"AYPR", 1, 1, 0, CLUSTER) + b"\1\0a\1\0b!"))),
        ("before the handshake", wire_bytes(TimeoutNow(1, "a"))),
        ("before the handshake", PING),
    ],
)
def test_a_handshake_that_is_malformed_is_named(what: str, data: bytes) -> None:
    with pytest.raises(ProtocolError, match=what):
        HandshakeReader().receive_data(data)


@pytest.mark.parametrize(
    ("hello", "objection"),
    [
        (Hello(CLUSTER, "a", "b"), None),
        (Hello(CLUSTER, "a", "b", 1, 200), None),
        (Hello(bytes(16), "a", "b"), "cluster 0000"),
        (Hello(CLUSTER, "a", "c"), "c was called, this is b"),
        (Hello(CLUSTER, "b", "b"), "own name"),
        (Hello(CLUSTER, "a", "b", 2, 3), "protocol versions 2 to 3, here 1 to 1"),
    ],
)
def test_who_may_talk_to_whom(hello: Hello, objection: str | None) -> None:
    found = hello.objection(cluster_id=CLUSTER, node_id="b")
    assert (found is None) if objection is None else (found is not None and objection in found)


# -- version 1 ------------------------------------------------------------------------------------------------------------

MEMBERS = Membership(("n1", "n2"), ("n1",), ("n3",))
ENTRY = LogEntry(42, 7, EntryKind.BLOCK, 1700000000123, b"payload")
GOLDEN_FRAMES: dict[str, bytes] = {
    "hello": encode_hello(Hello(CLUSTER, "node-1", "node-2")),
    "refusal": encode_refusal("not today"),
    "ping": PING,
    "request-vote": wire_bytes(RequestVote(7, "node-2", 41, 6, pre_vote=True, transfer=True)),
    "vote-reply": wire_bytes(VoteReply(7, "node-2", 8, granted=True, pre_vote=True)),
    "append-entries": wire_bytes(AppendEntries(7, "node-2", 41, 6, (ENTRY, attrs.evolve(ENTRY, index=43, payload=b"")), 40)),
    "append-entries-barrier": wire_bytes(AppendEntries(7, "node-2", 41, 6, (), 40, Barrier(3, 99))),
    "append-reply": wire_bytes(AppendReply(7, "node-2", True, 42, 1, 2, 3, True)),
    "heartbeat": wire_bytes(Heartbeat(7, "node-2", 42, 99)),
    "heartbeat-reply": wire_bytes(HeartbeatReply(7, "node-2", 99, 42, 3, True)),
    "install-snapshot": wire_bytes(InstallSnapshot(7, "node-2", Snapshot(SnapshotMeta(42, 6, MEMBERS, 1700000000123), b"state"))),
    "timeout-now": wire_bytes(TimeoutNow(7, "node-2")),
}


def test_version_1_is_what_it_was() -> None:
    kept = dict(line.split() for line in GOLDEN.read_text(encoding="ascii").splitlines())
    assert {name: data.hex() for name, data in GOLDEN_FRAMES.items()} == kept


def test_every_message_has_golden_bytes() -> None:
    kinds = {type(message) for data in GOLDEN_FRAMES.values() if data[8] >= 16 for message in read(data)}
    assert kinds == set(typing.get_args(Message))


def test_the_documentation_lists_every_type_and_its_example_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "peer-protocol.md").read_text(encoding="utf-8")
    listed = {int(number): name for number, name in re.findall(r"^\| (\d+) \| ([A-Z]\w+) \|", page, re.MULTILINE)}
    spoken = {data[8]: "".join(word.capitalize() for word in name.split("-")) for name, data in GOLDEN_FRAMES.items()}
    spoken[18] = "AppendEntries"
    assert listed == spoken
    (example,) = re.findall(r"^  ([0-9a-f]{8} [0-9a-f]{8} [0-9a-f ]+)$", page, re.MULTILINE)
    assert bytes.fromhex(example) == GOLDEN_FRAMES["heartbeat"]
