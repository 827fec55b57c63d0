"""One direction at a time, on memory streams and a clock of our own: back-off, deadlines, back-pressure, who replaces whom."""

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio
import trio.testing

from ayder.entries import EntryKind, LogEntry
from ayder.raft.frames import ProtocolError
from ayder.raft.handshake import HandshakeReader, Hello, Refusal, encode_hello, encode_refusal
from ayder.raft.messages import AppendEntries, Heartbeat, Message, TimeoutNow
from ayder.raft.peer_inbound import InboundPeers
from ayder.raft.peer_link import PeerCounters, PeerLimits
from ayder.raft.peer_outbound import OutboundPeer
from ayder.raft.wire import PING, FrameReader, encode

CLUSTER = bytes(range(16))
A, B, C = "node-a", "node-b", "node-c"
Pair = tuple[trio.abc.Stream, trio.abc.Stream]


def beat(number: int, sender: str = A) -> Heartbeat:
    return Heartbeat(1, sender, 0, number)


def append(number: int, size: int) -> AppendEntries:
    return AppendEntries(1, A, number - 1, 1, (LogEntry(number, 1, EntryKind.BLOCK, 0, bytes(size)),), 0)


def wire_bytes(*said: Message) -> bytes:
    return b"".join(piece for message in said for piece in encode(message))


async def silent(_peer: str) -> Message | None:
    await trio.lowlevel.checkpoint()
    return None


class Speaker:
    """An outbound peer (A speaking to B) under test, dialling whatever the test puts into ``streams``."""

    def __init__(
        self,
        *streams: trio.abc.Stream | Exception,
        limits: PeerLimits | None = None,
        next_append: Callable[[str], Awaitable[Message | None]] = silent,
        jitter: float = 1.0,
    ) -> None:
        self.streams = deque(streams)
        self.dialled: list[float] = []
        self.losses = 0
        self.counters = PeerCounters()
        self.outbound = OutboundPeer(
            Hello(CLUSTER, A, B),
            limits=limits or PeerLimits(),
            counters=self.counters,
            dial=self.dial,
            next_append=next_append,
            lost=self.lost,
            jitter=lambda: jitter,
        )

    async def dial(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.dialled.append(trio.current_time())
        found = self.streams.popleft() if self.streams else OSError("connection refused")
        if isinstance(found, Exception):
            raise found
        return found

    def lost(self, peer: str) -> None:
        assert peer == B
        self.losses += 1


class Ear:
    """B's end of a connection that A made."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.reader = FrameReader(A)
        self.heard: deque[Message] = deque()

    async def welcome(self, answer: bytes = encode_hello(Hello(CLUSTER, B, A))) -> None:
        reader = HandshakeReader()
        while (said := reader.receive_data(bytes(await self.stream.receive_some(100)))) is None:
            pass
        assert said == Hello(CLUSTER, A, B)
        await self.stream.send_all(answer)

    async def hear(self) -> Message:
        while not self.heard:
            data = bytes(await self.stream.receive_some(1 << 16))
            if not data:
                raise EOFError
            self.heard.extend(self.reader.receive_data(data))
        return self.heard.popleft()


class CountingStream(trio.abc.Stream):
    """A stream that remembers the size of every send."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self.inner = inner
        self.sends: list[int] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sends.append(len(data))
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.inner.aclose()


def memory_pair() -> Pair:
    return trio.testing.memory_stream_pair()


def lockstep_pair() -> Pair:
    """A send returns when everything was received: the smallest buffer there can be."""
    return trio.testing.lockstep_stream_pair()


# -- speaking -------------------------------------------------------------------------------------------------------------


async def test_it_dials_again_with_a_pause_that_doubles_up_to_its_bound(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    speaker = Speaker(limits=PeerLimits(min_backoff_s=0.125, max_backoff_s=1.0))
    with trio.move_on_after(10):
        await speaker.outbound.run()
    gaps = [round(after - before, 3) for before, after in zip(speaker.dialled, speaker.dialled[1:], strict=False)]
    assert gaps[:6] == [0.125, 0.25, 0.5, 1.0, 1.0, 1.0]
    assert [record.message for record in caplog.records] == ["cannot connect to node-b: connection refused"], "said once"


async def test_jitter_at_least_halves_the_pause(autojump_clock: trio.testing.MockClock) -> None:
    speaker = Speaker(limits=PeerLimits(min_backoff_s=1.0, max_backoff_s=1.0), jitter=0.0)
    with trio.move_on_after(10.2):
        await speaker.outbound.run()
    assert len(speaker.dialled) == 21


async def test_a_peer_that_was_heard_is_dialled_soon(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    speaker = Speaker(limits=PeerLimits(min_backoff_s=0.125, max_backoff_s=64.0))
    nursery.start_soon(speaker.outbound.run)
    await trio.sleep(0.125 * (1 + 2 + 4 + 8 + 16 + 32) + 1)
    count = len(speaker.dialled)
    await trio.sleep(1)
    assert len(speaker.dialled) == count, "it is in a long pause"
    speaker.outbound.hurry()
    await trio.sleep(0.01)
    assert len(speaker.dialled) == count + 1


async def test_a_flapping_connection_does_not_become_a_storm(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Accepted and closed at once, for ever: the pause grows as if it had been refused."""
    pairs = [memory_pair() for _ in range(100)]

    async def accept_and_close() -> None:
        for _, theirs in pairs:
            await Ear(theirs).welcome()
            await theirs.aclose()

    speaker = Speaker(*(ours for ours, _ in pairs), limits=PeerLimits(min_backoff_s=0.125, max_backoff_s=1.0))
    nursery.start_soon(accept_and_close)
    with trio.move_on_after(20):
        await speaker.outbound.run()
    assert 20 <= len(speaker.dialled) <= 23
    assert speaker.losses == speaker.counters.connects == len(speaker.dialled)


async def test_a_handshake_that_hangs_is_given_up(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    (first, first_far), (second, second_far) = memory_pair(), memory_pair()
    speaker = Speaker(first, second)
    nursery.start_soon(speaker.outbound.run)
    await Ear(second_far).welcome()
    assert 5.0 <= trio.current_time() <= 5.2
    assert "no answer for 5 s" in caplog.text
    assert bytes(await first_far.receive_some()) == encode_hello(Hello(CLUSTER, A, B))
    assert bytes(await first_far.receive_some()) == b"", "and closed"


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (encode_refusal("not\nhere"), "it refused: 'not\\nhere'"),
        (encode_hello(Hello(bytes(16), B, A)), "cluster 0000"),
        (encode_hello(Hello(CLUSTER, C, A)), "node-b was called, node-c answered"),
        (encode_hello(Hello(CLUSTER, B, C)), "node-c was called, this is node-a"),
        (encode_hello(Hello(CLUSTER, B, A, 2, 9)), "protocol versions 2 to 9"),
        (encode_hello(Hello(CLUSTER, B, A)) + PING, "before the handshake"),
        (encode_hello(Hello(CLUSTER, B, A)) + b"?", "spoke before"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "are allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_whoever_answers_wrongly_is_told_nothing(
    answer: bytes, complaint: str, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = memory_pair()
    speaker = Speaker(ours)
    speaker.outbound.send(beat(1))
    nursery.start_soon(speaker.outbound.run)
    await Ear(theirs).welcome(answer)
    assert bytes(await theirs.receive_some()) == b""
    await trio.testing.wait_all_tasks_blocked()
    assert complaint in caplog.text
    assert not speaker.outbound.connected and speaker.losses == 0


async def test_what_is_queued_leaves_in_one_send(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    ours, theirs = memory_pair()
    counting = CountingStream(ours)
    speaker = Speaker(counting)
    for number in range(100):
        speaker.outbound.send(beat(number))
    nursery.start_soon(speaker.outbound.run)
    ear = Ear(theirs)
    await ear.welcome()
    assert [await ear.hear() for _ in range(100)] == [beat(number) for number in range(100)]
    assert counting.sends == [len(encode_hello(Hello(CLUSTER, A, B))), 100 * len(wire_bytes(beat(1)))]
    assert speaker.counters.sent_messages == 100
    assert speaker.outbound.queued_messages == speaker.outbound.queued_bytes == 0


async def test_a_full_queue_loses_its_oldest_and_counts_them() -> None:
    size = len(wire_bytes(beat(1)))
    speaker = Speaker(limits=PeerLimits(max_queued_messages=10))
    for number in range(25):
        speaker.outbound.send(beat(number))
    assert (speaker.outbound.queued_messages, speaker.outbound.queued_bytes) == (10, 10 * size)
    assert speaker.counters.dropped_messages == 15
    assert b"".join(speaker.outbound._gather()[1]) == wire_bytes(*map(beat, range(15, 25)))


async def test_a_queue_is_bounded_in_bytes() -> None:
    limits = PeerLimits(max_frame_bytes=10_000, max_queued_bytes=10_000)
    speaker = Speaker(limits=limits)
    for number in range(1, 100):
        speaker.outbound.send(append(number, 3_000))
        assert speaker.outbound.queued_bytes <= 10_000
    assert (speaker.outbound.queued_messages, speaker.counters.dropped_messages) == (3, 96)
    with pytest.raises(ValueError, match="fit a frame"):
        speaker.outbound.send(append(1, 10_000))
    with pytest.raises(ValueError, match="room for the longest frame"):
        PeerLimits(max_queued_bytes=1000)


async def test_news_for_a_peer_that_cannot_be_reached_grows_old_and_goes(autojump_clock: trio.testing.MockClock) -> None:
    speaker = Speaker()
    speaker.outbound.send(beat(1))
    with trio.move_on_after(0.01):
        await speaker.outbound.run()
    assert len(speaker.dialled) == 1
    assert (speaker.outbound.queued_messages, speaker.counters.dropped_messages) == (0, 1)


class Appends:
    """A ``next_append`` that gives what the test puts in."""

    def __init__(self, *ready: Message) -> None:
        self.ready = deque(ready)
        self.asked = 0
        self.slow: trio.Event | None = None

    async def __call__(self, peer: str) -> Message | None:
        assert peer == B
        self.asked += 1
        found = self.ready.popleft() if self.ready else None
        if self.slow is not None:
            await self.slow.wait()
        await trio.lowlevel.checkpoint()
        return found


async def test_appends_are_asked_for_until_there_are_none_and_after_a_wake(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ours, theirs = memory_pair()
    appends = Appends(append(1, 10), append(2, 10), append(3, 10))
    speaker = Speaker(ours, next_append=appends)
    nursery.start_soon(speaker.outbound.run)
    ear = Ear(theirs)
    await ear.welcome()
    assert [await ear.hear() for _ in range(3)] == [append(number, 10) for number in (1, 2, 3)]
    await trio.testing.wait_all_tasks_blocked()
    assert appends.asked == 4
    appends.ready.append(append(4, 10))
    speaker.outbound.wake()
    assert await ear.hear() == append(4, 10)
    await trio.sleep(30)
    assert appends.asked == 6, "nobody woke it"


async def test_a_wake_while_an_append_is_being_read_is_not_lost(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ours, theirs = memory_pair()
    appends = Appends()
    appends.slow = trio.Event()
    speaker = Speaker(ours, next_append=appends)
    nursery.start_soon(speaker.outbound.run)
    ear = Ear(theirs)
    await ear.welcome()
    await trio.testing.wait_all_tasks_blocked()
    appends.ready.append(append(1, 10))  # too late for the question under way, which says None
    speaker.outbound.wake()
    appends.slow.set()
    assert await ear.hear() == append(1, 10)


async def test_small_messages_overtake_the_appends_that_wait(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ours, theirs = lockstep_pair()
    speaker = Speaker(ours, next_append=Appends(*(append(number, 100_000) for number in range(1, 10))))
    nursery.start_soon(speaker.outbound.run)
    ear = Ear(theirs)
    await ear.welcome()
    assert await ear.hear() == append(1, 100_000)
    speaker.outbound.send(beat(7))
    heard = [await ear.hear() for _ in range(3)]
    assert beat(7) in heard, "at most the append that is under way goes before it"


async def test_a_peer_that_takes_nothing_is_cut_off_and_costs_its_queue_only(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (first, first_far), (second, second_far) = lockstep_pair(), lockstep_pair()
    limits = PeerLimits(max_frame_bytes=100_000, max_queued_bytes=100_000)
    endless = Appends(*(append(number, 90_000) for number in range(1, 100)))
    speaker = Speaker(first, second, limits=limits, next_append=endless)
    nursery.start_soon(speaker.outbound.run)
    await Ear(first_far).welcome()
    await trio.sleep(9.9)
    assert speaker.outbound.connected
    assert endless.asked == 1, "the next append is asked for when the one before has left"
    for number in range(10_000):
        speaker.outbound.send(beat(number))
    assert speaker.outbound.queued_bytes <= 100_000
    await trio.sleep(0.2)
    assert "the peer took nothing for 10 s" in caplog.text
    assert speaker.losses == 1
    await Ear(second_far).welcome()


async def test_an_idle_speaker_pings(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    ours, theirs = memory_pair()
    nursery.start_soon(Speaker(ours).outbound.run)
    await Ear(theirs).welcome()
    began = trio.current_time()
    for _ in range(5):
        assert bytes(await theirs.receive_some()) == PING
    assert 5.0 <= trio.current_time() - began < 5.1


async def test_whoever_answers_on_a_connection_that_is_ours_is_cut_off(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ours, theirs = memory_pair()
    speaker = Speaker(ours)
    nursery.start_soon(speaker.outbound.run)
    await Ear(theirs).welcome()
    await trio.testing.wait_all_tasks_blocked()
    assert speaker.outbound.connected
    await theirs.send_all(b"x")
    await trio.testing.wait_all_tasks_blocked()
    assert "it spoke where it should listen" in caplog.text
    assert speaker.losses == 1
    assert await closed(theirs)


async def test_redial_makes_a_new_connection_and_stop_ends_it(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    (first, first_far), (second, second_far) = memory_pair(), memory_pair()
    speaker = Speaker(first, second)
    nursery.start_soon(speaker.outbound.run)
    await Ear(first_far).welcome()
    await trio.testing.wait_all_tasks_blocked()
    speaker.outbound.redial()
    ear = Ear(second_far)
    await ear.welcome()
    speaker.outbound.send(beat(1))
    assert await ear.hear() == beat(1)
    assert bytes(await first_far.receive_some()) == b""
    speaker.outbound.stop()
    with pytest.raises(EOFError):
        await ear.hear()
    assert speaker.losses == 2


@pytest.mark.parametrize("error", [OSError("the disk is gone"), AssertionError("a defect"), KeyError("another")])
async def test_what_next_append_raises_ends_the_node(error: Exception, autojump_clock: trio.testing.MockClock) -> None:
    async def broken(_peer: str) -> Message | None:
        await trio.lowlevel.checkpoint()
        raise error

    ours, theirs = memory_pair()
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Speaker(ours, next_append=broken).outbound.run)
            await Ear(theirs).welcome()
            await trio.sleep_forever()
    assert leaves(caught.value) == [error]


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in leaves(one)]
    return [error]


# -- listening ------------------------------------------------------------------------------------------------------------


class Listener:
    """B's inbound side under test, with A and C as members."""

    def __init__(self, limits: PeerLimits | None = None) -> None:
        self.received: list[tuple[str, Message]] = []
        self.delivering = 0
        self.gate: trio.Event | None = None
        self.error: Exception | None = None
        self.heard: list[str] = []
        self.counters = {A: PeerCounters(), C: PeerCounters()}
        self.inbound = InboundPeers(
            B, CLUSTER, limits=limits or PeerLimits(), counters=self.counters, receive=self.receive, heard=self.heard.append
        )

    async def receive(self, sender: str, message: Message) -> None:
        self.delivering += 1
        assert self.delivering == 1, "one message at a time"
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.received.append((sender, message))
        self.delivering -= 1

    def rounds(self) -> list[int]:
        return [message.round for _, message in self.received if isinstance(message, Heartbeat)]

    async def connect(
        self, nursery: trio.Nursery, hello: Hello = Hello(CLUSTER, A, B), pair: Pair | None = None
    ) -> trio.abc.Stream:
        far = self.accept(nursery, pair)
        await far.send_all(encode_hello(hello))
        assert await read_handshake(far) == Hello(CLUSTER, B, hello.sender)
        return far

    def accept(self, nursery: trio.Nursery, pair: Pair | None = None) -> trio.abc.Stream:
        near, far = pair or memory_pair()
        nursery.start_soon(self.inbound.serve, near, "somewhere")
        return far


async def read_handshake(stream: trio.abc.Stream) -> Hello | Refusal:
    reader = HandshakeReader()
    while (said := reader.receive_data(bytes(await stream.receive_some()))) is None:
        pass
    return said


async def closed(stream: trio.abc.Stream) -> bool:
    with trio.move_on_after(0.001):
        return bytes(await stream.receive_some()) == b""
    return False


async def test_messages_are_delivered_in_the_name_of_the_sender(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    listener = Listener()
    from_a = await listener.connect(nursery)
    from_c = await listener.connect(nursery, Hello(CLUSTER, C, B))
    await from_a.send_all(wire_bytes(beat(1), beat(2)) + PING)
    await trio.testing.wait_all_tasks_blocked()
    await from_c.send_all(wire_bytes(TimeoutNow(1, "whoever")))
    await trio.testing.wait_all_tasks_blocked()
    assert listener.received == [(A, beat(1)), (A, beat(2)), (C, TimeoutNow(1, C))]
    assert listener.heard == [A, C]
    assert listener.counters[A].received_messages == 2


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(bytes(16), A, B), "cluster 0000"),
        (Hello(CLUSTER, A, C), "node-c was called, this is node-b"),
        (Hello(CLUSTER, "node-x", B), "node-x is not a member"),
        (Hello(CLUSTER, B, B), "own name"),
        (Hello(CLUSTER, A, B, 3, 4), "protocol versions 3 to 4"),
    ],
)
async def test_who_is_not_welcome_is_told_why(
    hello: Hello, reason: str, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()
    far = listener.accept(nursery)
    await far.send_all(encode_hello(hello))
    said = await read_handshake(far)
    assert isinstance(said, Refusal) and reason in said.reason
    assert await closed(far)
    assert reason in caplog.text
    assert listener.inbound.refused == 1 and listener.heard == []


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\xff" * 600, PING])
async def test_who_does_not_speak_the_protocol_is_told_nothing(
    noise: bytes, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()
    far = listener.accept(nursery)
    await far.send_all(noise)
    assert await closed(far)
    assert "refused a peer connection from somewhere" in caplog.text


async def test_a_hello_that_drips_is_cut_off(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    listener = Listener()
    far = listener.accept(nursery)
    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
        for byte in encode_hello(Hello(CLUSTER, A, B)):
            await far.send_all(bytes([byte]))
            await trio.sleep(0.9)
    assert 5.0 <= trio.current_time() - began < 6.0
    assert listener.inbound.refused == 1


async def test_only_so_many_may_be_unknown_at_once(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    listener = Listener(PeerLimits(max_handshakes=3))
    waiting = [listener.accept(nursery) for _ in range(3)]
    await trio.testing.wait_all_tasks_blocked()
    assert await closed(listener.accept(nursery))
    assert [await closed(one) for one in waiting] == [False] * 3
    await trio.sleep(6)
    assert [await closed(one) for one in waiting] == [True] * 3
    await listener.connect(nursery)


async def test_refusals_do_not_fill_the_log(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()
    for _ in range(50):
        await listener.accept(nursery).send_all(b"\xff" * 8)
    await trio.sleep(2)
    await listener.accept(nursery).send_all(b"\xff" * 8)
    await trio.testing.wait_all_tasks_blocked()
    assert listener.inbound.refused == 51
    assert len(caplog.records) == 2
    assert "(49 others before it)" in caplog.records[1].message


async def test_a_connection_that_fell_silent_is_given_up(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """Half open: the other host is gone and nobody will ever say so."""
    caplog.set_level(logging.INFO)
    listener = Listener()
    far = await listener.connect(nursery)
    for _ in range(5):
        await trio.sleep(9)
        await far.send_all(PING)
    assert listener.inbound.is_connected(A)
    await trio.sleep(10.1)
    assert not listener.inbound.is_connected(A)
    assert "nothing was heard for 10 s" in caplog.text


@pytest.mark.parametrize("garbage", [b"\xff" * 4, bytes([*wire_bytes(beat(1))[:-1], 1]), encode_hello(Hello(CLUSTER, A, B))])
async def test_a_malformed_frame_ends_the_connection_and_nothing_else(
    garbage: bytes, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    listener = Listener()
    far = await listener.connect(nursery)
    await far.send_all(garbage)
    assert await closed(far)
    again = await listener.connect(nursery)
    await again.send_all(wire_bytes(beat(2)))
    await trio.testing.wait_all_tasks_blocked()
    assert listener.rounds() == [2]


async def test_a_receiver_that_is_slow_is_not_read_for(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    listener = Listener()
    listener.gate = trio.Event()
    far = await listener.connect(nursery, pair=lockstep_pair())
    sent = 0

    async def pour() -> None:
        nonlocal sent
        for number in range(100):
            await far.send_all(wire_bytes(beat(number)))
            sent += 1

    nursery.start_soon(pour)
    await trio.sleep(100)  # no deadline runs against a peer that we do not read
    assert sent == 1
    listener.gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert listener.rounds() == list(range(100))


async def test_a_newer_connection_replaces_the_older_one(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    listener = Listener()
    listener.gate = trio.Event()
    older = await listener.connect(nursery)
    await older.send_all(wire_bytes(beat(1), beat(2), beat(3)))
    await trio.testing.wait_all_tasks_blocked()
    newer = await listener.connect(nursery)
    await newer.send_all(wire_bytes(beat(10)))
    await trio.testing.wait_all_tasks_blocked()
    assert listener.delivering == 1, "the newer one waits for the message that is being delivered"
    listener.gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert listener.rounds() == [1, 10], "the rest of the older one is dropped"
    assert await closed(older)
    assert "a newer connection replaced it" in caplog.text
    await newer.send_all(wire_bytes(beat(11)))
    await trio.testing.wait_all_tasks_blocked()
    assert listener.rounds() == [1, 10, 11]


async def test_an_idle_connection_is_replaced_at_once(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    listener = Listener()
    older = await listener.connect(nursery)
    newer = await listener.connect(nursery)
    assert await closed(older)
    assert not await closed(newer)
    assert listener.inbound.is_connected(A)


async def test_a_peer_that_connects_again_and_again_holds_two_connections_at_most(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    listener = Listener()
    listener.gate = trio.Event()
    made = []
    for number in range(50):
        made.append(await listener.connect(nursery))
        await made[-1].send_all(wire_bytes(beat(number)))
        await trio.testing.wait_all_tasks_blocked()
    assert [at for at, one in enumerate(made) if not await closed(one)] == [0, 49]
    listener.gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert listener.rounds() == [0, 49]


async def test_a_peer_that_is_forgotten_is_cut_off(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    listener = Listener()
    listener.gate = trio.Event()
    first = await listener.connect(nursery)
    await first.send_all(wire_bytes(beat(1), beat(2)))
    second = await listener.connect(nursery)
    await trio.testing.wait_all_tasks_blocked()
    listener.inbound.forget(A)
    del listener.counters[A]
    listener.gate.set()
    assert await closed(first) and await closed(second)
    assert listener.rounds() == [1]
    far = listener.accept(nursery)
    await far.send_all(encode_hello(Hello(CLUSTER, A, B)))
    assert await read_handshake(far) == Refusal("node-a is not a member")


class ClosingStream(CountingStream):
    """A stream that says when it is closed."""

    def __init__(self, inner: trio.abc.Stream, told: Callable[[], None]) -> None:
        super().__init__(inner)
        self.told = told

    async def aclose(self) -> None:
        self.told()
        await super().aclose()


async def test_a_peer_that_is_forgotten_in_the_moment_its_turn_comes_is_cut_off(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    listener = Listener()
    listener.gate = trio.Event()

    def forget() -> None:
        listener.inbound.forget(A)
        listener.counters.pop(A, None)

    near, far = memory_pair()
    first = await listener.connect(nursery, pair=(ClosingStream(near, forget), far))
    await first.send_all(wire_bytes(beat(1)))
    await trio.testing.wait_all_tasks_blocked()
    second = await listener.connect(nursery)
    await second.send_all(wire_bytes(beat(2)))
    await trio.testing.wait_all_tasks_blocked()
    listener.gate.set()  # the first one ends: it gives its turn to the second one, then it is closed
    assert await closed(second)
    await trio.testing.wait_all_tasks_blocked()
    assert listener.rounds() == [1]


@pytest.mark.parametrize("error", [OSError("the disk is gone"), AssertionError("a defect"), KeyError("another")])
async def test_what_receive_raises_ends_the_node(error: Exception, autojump_clock: trio.testing.MockClock) -> None:
    listener = Listener()
    listener.error = error
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with trio.open_nursery() as nursery:
            far = await listener.connect(nursery)
            await far.send_all(wire_bytes(beat(1)))
            await trio.sleep_forever()
    assert leaves(caught.value) == [error]


async def test_a_message_that_makes_no_sense_ends_its_connection_only(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    listener = Listener()
    listener.error = ProtocolError("a term below zero")
    far = await listener.connect(nursery)
    await far.send_all(wire_bytes(beat(1)))
    assert await closed(far)
    assert "a term below zero" in caplog.text


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="three times"):
        attrs.evolve(PeerLimits(), ping_interval_s=5.0)
