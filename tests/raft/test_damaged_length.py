"""A frame whose length was damaged on the way must not make a peer mute: found by flipped bits in links that carry only pings."""

from __future__ import annotations

import trio
import trio.testing

from ayder.raft.handshake import HandshakeReader, Hello, encode_hello
from ayder.raft.messages import Heartbeat, Message
from ayder.raft.peer_inbound import InboundPeers
from ayder.raft.peer_link import PeerCounters, PeerLimits
from ayder.raft.wire import PING, encode

CLUSTER = bytes(range(16))


class Listener:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.received: list[Message] = []
        self.limits = PeerLimits()
        self.inbound = InboundPeers(
            "b", CLUSTER, limits=self.limits, counters={"a": PeerCounters()}, receive=self.receive, heard=lambda _: None
        )
        self.nursery = nursery

    async def receive(self, _sender: str, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.received.append(message)

    async def connect(self) -> trio.abc.Stream:
        near, far = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.inbound.serve, near, "somewhere")
        await far.send_all(encode_hello(Hello(CLUSTER, "a", "b")))
        reader = HandshakeReader()
        while reader.receive_data(bytes(await far.receive_some())) is None:
            pass
        return far


def damaged(frame: bytes) -> bytes:
    """The length says 1 MiB more."""
    return frame[:2] + bytes((frame[2] ^ 0x10,)) + frame[3:]


async def test_a_frame_that_swallows_the_signs_of_life_ends_the_connection(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    listener = Listener(nursery)
    far = await listener.connect()
    await far.send_all(damaged(PING))
    started = trio.current_time()
    with trio.move_on_after(60) as patience:
        while listener.inbound.is_connected("a"):
            await far.send_all(PING)
            await trio.sleep(listener.limits.ping_interval_s)
    assert not patience.cancelled_caught, "a peer whose words are not understood is kept for its signs of life"
    assert trio.current_time() - started <= 2 * listener.limits.silence_timeout_s
    again = await listener.connect()
    message = Heartbeat(1, "a", 0, 1)
    await again.send_all(b"".join(encode(message)))
    await trio.testing.wait_all_tasks_blocked()
    assert listener.received == [message]


async def test_a_long_frame_on_a_slow_link_arrives(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """It grows by 16 KiB a second: what arrives in the time of silence is more than signs of life."""
    listener = Listener(nursery)
    far = await listener.connect()
    await far.send_all(damaged(PING))  # 1 MiB is still to come
    for _ in range(60):
        await far.send_all(bytes(16 << 10))
        await trio.sleep(1)
        assert listener.inbound.is_connected("a")
