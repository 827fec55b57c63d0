"""The peer network over real loopback sockets, plain and with TLS: who may talk, what survives, what one bad peer costs."""

import logging
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio
import trustme

from ayder.entries import EntryKind, LogEntry
from ayder.raft.handshake import HandshakeReader, Hello, encode_hello
from ayder.raft.messages import AppendEntries, Heartbeat, HeartbeatReply, Message
from ayder.raft.peer_tls import is_loopback
from ayder.raft.peers import PeerLimits, PeerNetwork, PeerTls

CLUSTER = bytes(range(16))
A, B, C = "node-a", "node-b", "node-c"
LOOPBACK = ("127.0.0.1", 0)
QUICK = PeerLimits(min_backoff_s=0.01, max_backoff_s=0.05)
MIB = 1 << 20


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Real time bounds how long a test hangs when it fails; it decides nothing else."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.002)


class Node:
    """A peer network and what came out of it."""

    def __init__(
        self,
        node_id: str,
        *,
        tls: PeerTls | None = None,
        limits: PeerLimits = QUICK,
        cluster_id: bytes = CLUSTER,
        port: int = 0,
        jitter: float = 0.5,
    ) -> None:
        self.node_id = node_id
        self.heard: list[tuple[str, Message]] = []
        self.appends: dict[str, deque[Message]] = {}
        self.taken = 0
        self.lost: list[str] = []
        self.answers = False
        self.heard_something = trio.Event()
        self.scope = trio.CancelScope()
        self.network = PeerNetwork(
            node_id=node_id,
            cluster_id=cluster_id,
            addresses={},
            bind=("127.0.0.1", port),
            tls=tls,
            limits=limits,
            receive=self.receive,
            next_append=self.next_append,
            lost=self.lost.append,
            jitter=lambda: jitter,
        )

    async def receive(self, sender: str, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.heard.append((sender, message))
        if self.answers and isinstance(message, Heartbeat):
            self.network.send(sender, HeartbeatReply(1, self.node_id, message.round, 0))
        self.heard_something.set()

    async def next_append(self, peer: str) -> Message | None:
        await trio.lowlevel.checkpoint()
        ready = self.appends.get(peer)
        if not ready:
            return None
        self.taken += 1
        return ready.popleft()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            await self.network.run(task_status=task_status)

    @property
    def address(self) -> tuple[str, int]:
        return self.network.bound[0]

    def beat(self, number: int) -> Heartbeat:
        return Heartbeat(1, self.node_id, 0, number)

    def connected(self, *peers: str) -> bool:
        return all(self.network.facts().peers[peer].connected for peer in peers)


async def start(nursery: trio.Nursery, *nodes: Node) -> None:
    """Start them, and tell each where the others are."""
    for node in nodes:
        await nursery.start(node.run)
    addresses = {node.node_id: node.address for node in nodes}
    for node in nodes:
        node.network.set_addresses(addresses)


def append(sender: str, number: int, payload: bytes) -> AppendEntries:
    return AppendEntries(1, sender, number - 1, 1, (LogEntry(number, 1, EntryKind.BLOCK, 0, payload),), 0)


# -- plain ----------------------------------------------------------------------------------------------------------------


async def test_three_nodes_talk_each_with_each(nursery: trio.Nursery) -> None:
    nodes = [Node(name) for name in (A, B, C)]
    await start(nursery, *nodes)
    for speaker in nodes:
        for listener in nodes:
            if listener is not speaker:
                speaker.network.send(listener.node_id, speaker.beat(7))
                speaker.appends[listener.node_id] = deque([append(speaker.node_id, 1, b"x" * 100_000)])
                speaker.network.wake(listener.node_id)
    await until(lambda: all(len(node.heard) == 4 for node in nodes))
    for node in nodes:
        others = [other for other in nodes if other is not node]
        for other in others:
            said = [message for sender, message in node.heard if sender == other.node_id]
            assert other.beat(7) in said and append(other.node_id, 1, b"x" * 100_000) in said
    facts = nodes[0].network.facts()
    assert facts.refused_connections == facts.unroutable_messages == 0
    for peer in (B, C):
        one = facts.peers[peer]
        assert one.connected and one.connected_to_us and one.rtt_s is not None and 0 < one.rtt_s < 5
        assert one.counters.sent_messages == one.counters.received_messages == 2
        assert one.counters.sent_bytes > 100_000 < one.counters.received_bytes


async def test_a_peer_that_restarts_is_found_again(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    here, there = Node(A), Node(B)
    await start(nursery, here, there)
    await until(lambda: here.connected(B) and there.connected(A))
    there.scope.cancel()
    await until(lambda: not here.connected(B))
    assert here.lost == [B]
    again = Node(B, port=there.address[1])
    await nursery.start(again.run)
    again.network.set_addresses({A: here.address})
    await until(lambda: here.connected(B) and again.connected(A))
    here.network.send(B, here.beat(2))
    await until(lambda: again.heard)
    assert again.heard[-1] == (A, here.beat(2))
    lines = [record.message for record in caplog.records]
    assert lines.count("connected to node-b") == 2
    assert any(line.startswith("lost the connection to node-b: ") for line in lines)


async def test_a_peer_that_connects_to_us_is_dialled_at_once(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    here, there = Node(A, jitter=1e9), Node(B)  # the pause would take years
    (held,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = held.socket.getsockname()
    held.socket.close()
    await nursery.start(here.run)
    here.network.set_addresses({B: address})
    await until(lambda: "cannot connect to node-b" in caplog.text)
    assert "refused" in caplog.text
    await nursery.start(there.run)
    here.network._addresses[B] = there.address  # as if it had been there all the time
    there.network.set_addresses({A: here.address})
    await until(lambda: here.connected(B))


async def test_membership_changes_connect_and_disconnect(nursery: trio.Nursery) -> None:
    here, there, third = Node(A), Node(B), Node(C)
    await start(nursery, here, there)
    await nursery.start(third.run)
    await until(lambda: here.connected(B) and there.connected(A))
    third.network.set_addresses({A: here.address})
    await until(lambda: here.network.facts().refused_connections, 5)
    here.network.set_addresses({B: there.address, C: third.address})
    await until(lambda: here.connected(B, C) and third.connected(A))
    here.network.send(C, here.beat(3))
    await until(lambda: third.heard == [(A, here.beat(3))])
    here.network.set_addresses({C: third.address})
    await until(lambda: not there.connected(A) and not there.network.facts().peers[A].connected_to_us)
    here.network.send(B, here.beat(4))
    here.network.wake(B)
    assert here.network.facts().unroutable_messages == 1
    assert set(here.network.facts().peers) == {C}


async def test_a_peer_that_moves_is_dialled_where_it_is_now(nursery: trio.Nursery) -> None:
    here, there = Node(A), Node(B)
    await start(nursery, here, there)
    await until(lambda: here.connected(B))
    moved = Node(B)
    await nursery.start(moved.run)
    moved.network.set_addresses({A: here.address})
    here.network.set_addresses({B: moved.address})
    await until(lambda: moved.network.facts().peers[A].connected_to_us and here.connected(B))
    here.network.send(B, here.beat(1))
    await until(lambda: moved.heard == [(A, here.beat(1))])
    assert here.network.facts().peers[B].counters.connects == 2


async def test_two_clusters_do_not_merge(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    here, there = Node(A), Node(B, cluster_id=bytes(16))
    await start(nursery, here, there)
    await until(lambda: here.network.facts().refused_connections and there.network.facts().refused_connections)
    assert "is not ours" in caplog.text
    assert not here.connected(B) and not there.connected(A)


async def raw_peer(node: Node, hello: Hello) -> trio.SocketStream:
    """A connection to the node by hand, welcomed."""
    stream = await trio.open_tcp_stream(*node.address)
    await stream.send_all(encode_hello(hello))
    answer = HandshakeReader()
    while (said := answer.receive_data(bytes(await stream.receive_some()))) is None:
        pass
    assert said == Hello(CLUSTER, node.node_id, hello.sender), said
    return stream


async def test_an_oversized_frame_ends_the_connection(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    here, there = Node(A), Node(B)
    await start(nursery, here, there)
    await until(lambda: there.network.facts().peers[A].connected_to_us)
    async with await raw_peer(there, Hello(CLUSTER, A, B)) as impostor:
        await impostor.send_all(struct.pack("<I", 16 * MIB))
        assert await impostor.receive_some() == b""
    assert "a frame of 16777216 bytes" in caplog.text
    await until(lambda: here.network.facts().peers[B].counters.connects == 2)
    here.network.send(B, here.beat(1))
    await until(lambda: there.heard == [(A, here.beat(1))])


async def test_a_replaced_connection_is_closed_and_made_again(nursery: trio.Nursery) -> None:
    """Two that call themselves A: the newer one wins, and the other one comes back with a pause."""
    here, there = Node(A), Node(B)
    await start(nursery, here, there)
    await until(lambda: here.connected(B))
    async with await raw_peer(there, Hello(CLUSTER, A, B)) as other:
        await until(lambda: here.lost == [B])
        assert await other.receive_some() == b"", "the first one came back"


async def deaf_listener(hello: Hello, listener: trio.SocketListener) -> None:
    """Welcomes whoever comes, and never reads again."""
    stream = await listener.accept()
    reader = HandshakeReader()
    while reader.receive_data(bytes(await stream.receive_some())) is None:
        pass
    await stream.send_all(encode_hello(hello))
    try:
        await trio.sleep_forever()
    finally:
        await trio.aclose_forcefully(stream)


async def test_a_peer_that_does_not_read_costs_bounded_memory_and_the_others_nothing(nursery: trio.Nursery) -> None:
    here, there = Node(A, limits=attrs.evolve(QUICK, max_frame_bytes=MIB, max_queued_bytes=MIB)), Node(B)
    await nursery.start(here.run)
    await nursery.start(there.run)
    (deaf,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(deaf_listener, Hello(CLUSTER, C, A), deaf)
    here.network.set_addresses({B: there.address, C: deaf.socket.getsockname()})
    there.network.set_addresses({A: here.address})
    await until(lambda: here.connected(B, C))
    payload = bytes(256 << 10)
    for peer in (B, C):
        here.appends[peer] = deque(append(A, number, payload) for number in range(1, 201))
        here.network.wake(peer)
    await until(lambda: len(there.heard) == 200)
    for number in range(100_000):
        here.network.send(C, here.beat(number))
    deaf_facts = here.network.facts().peers[C]
    assert deaf_facts.queued_bytes <= MIB and deaf_facts.queued_messages <= 4096
    assert deaf_facts.counters.dropped_messages >= 90_000
    assert deaf_facts.counters.sent_bytes < 20 * MIB, "the rest of its appends was not even asked for"
    assert len(here.appends[C]) > 100
    here.network.send(B, here.beat(5))
    await until(lambda: there.heard[-1] == (A, here.beat(5)))
    deaf.socket.close()


async def test_plain_connections_stay_on_this_machine() -> None:
    def network(bind: str, peer: str) -> PeerNetwork:
        node = Node(A)
        return PeerNetwork(
            node_id=A,
            cluster_id=CLUSTER,
            addresses={A: ("10.0.0.1", 1), B: (peer, 1)},
            bind=(bind, 0),
            tls=None,
            limits=QUICK,
            receive=node.receive,
            next_append=node.next_append,
        )

    allowed = network("::1", "localhost")
    for bind, peer, named in [
        ("0.0.0.0", "127.0.0.1", "'0.0.0.0'"),
        ("", "127.0.0.1", "''"),
        ("127.0.0.1", "10.1.2.3", "'10.1.2.3'"),
        ("127.0.0.1", "node-b.example", "'node-b.example'"),
        ("127.0.0.1", "::ffff:10.0.0.1", "'::ffff:10.0.0.1'"),
    ]:
        with pytest.raises(ValueError, match="without TLS") as caught:
            network(bind, peer)
        assert named in str(caught.value)
    with pytest.raises(ValueError, match="without TLS"):
        allowed.set_addresses({B: ("10.1.2.3", 1)})
    assert set(allowed.facts().peers) == {B}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.1", "localhost"])
def test_loopback_has_many_names(host: str) -> None:
    assert is_loopback(host)


async def test_a_cluster_id_has_16_bytes() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Node(A, cluster_id=b"short")


async def test_an_address_that_is_taken_is_an_error(nursery: trio.Nursery) -> None:
    here = Node(A)
    await nursery.start(here.run)
    with pytest.raises(OSError, match="in use"):
        await Node(B, port=here.address[1]).run()


# -- TLS ------------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Certificates:
    """One authority, another one that nobody trusts, and certificates by name."""

    folder: Path
    ca: trustme.CA = attrs.field(factory=trustme.CA)
    other_ca: trustme.CA = attrs.field(factory=trustme.CA)

    def tls(self, *names: str, trusted: bool = True) -> PeerTls:
        stem = self.folder / f"{'-'.join(names)}-{trusted}"
        issued = (self.ca if trusted else self.other_ca).issue_cert(*names)
        self.ca.cert_pem.write_to_path(self.folder / "ca.pem")
        Path(f"{stem}.key").write_bytes(issued.private_key_pem.bytes())
        Path(f"{stem}.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return PeerTls(ca=f"{self.folder}/ca.pem", certificate=f"{stem}.pem", key=f"{stem}.key")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


async def test_nodes_with_certificates_of_their_own_name_talk(nursery: trio.Nursery, certificates: Certificates) -> None:
    here, there = (Node(name, tls=certificates.tls(name, f"{name}.example")) for name in (A, B))
    await start(nursery, here, there)
    here.appends[B] = deque([append(A, 1, b"y" * 3 * MIB)])
    here.network.send(B, here.beat(1))
    there.network.send(A, there.beat(2))
    await until(lambda: len(there.heard) == 2 and here.heard)
    assert sorted(there.heard, key=repr) == sorted([(A, here.beat(1)), (A, append(A, 1, b"y" * 3 * MIB))], key=repr)
    assert here.heard == [(B, there.beat(2))]


@pytest.mark.parametrize(
    ("names", "trusted", "complaint"),
    [
        ([C], True, "cannot connect to node-b: the certificate is for node-c, not for node-b"),
        (["*.example", "node-b.example"], True, "the certificate is for *.example, node-b.example, not for node-b"),
        (["127.0.0.1"], True, "the certificate is for no DNS name, not for node-b"),
        ([B], False, "cannot connect to node-b: [SSL: CERTIFICATE_VERIFY_FAILED]"),
    ],
)
async def test_a_wrong_certificate_is_refused_by_whoever_dials(
    names: list[str],
    trusted: bool,
    complaint: str,
    nursery: trio.Nursery,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here, there = Node(A, tls=certificates.tls(A)), Node(B, tls=certificates.tls(*names, trusted=trusted))
    await nursery.start(here.run)
    await nursery.start(there.run)
    here.network.set_addresses({B: there.address})
    await until(lambda: complaint in caplog.text)
    assert not here.connected(B) and not there.heard


@pytest.mark.parametrize(
    ("names", "trusted", "complaint"),
    [
        ([C], True, "the certificate is for node-c, not for node-b"),
        ([B], False, "CERTIFICATE_VERIFY_FAILED"),
    ],
)
async def test_a_wrong_certificate_is_refused_by_whoever_listens(
    names: list[str],
    trusted: bool,
    complaint: str,
    nursery: trio.Nursery,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here, there = Node(A, tls=certificates.tls(A)), Node(B, tls=certificates.tls(*names, trusted=trusted))
    await nursery.start(here.run)
    await nursery.start(there.run)
    here.network.set_addresses({B: ("127.0.0.1", 1)})
    there.network.set_addresses({A: here.address})
    there.network.send(A, there.beat(1))
    await until(lambda: here.network.facts().refused_connections)
    refusals = [
        record.message for record in caplog.records if record.message.startswith("refused a peer connection from 127.0.0.1")
    ]
    assert refusals and complaint in refusals[0]
    assert not here.heard and not here.network.facts().peers[B].connected_to_us


async def tls_handshake(node: Node, context: ssl.SSLContext) -> bytes:
    """What a node says to a client of its TLS port that does everything right but for its certificate or version."""
    stream = trio.SSLStream(await trio.open_tcp_stream(*node.address), context, https_compatible=True)
    try:
        await stream.do_handshake()
        await stream.send_all(encode_hello(Hello(CLUSTER, B, A)))
        return bytes(await stream.receive_some())
    except trio.BrokenResourceError:
        return b""
    finally:
        await trio.aclose_forcefully(stream)


async def test_a_client_without_a_certificate_or_with_an_old_tls_hears_nothing(
    nursery: trio.Nursery, certificates: Certificates
) -> None:
    node = Node(A, tls=certificates.tls(A))
    await nursery.start(node.run)
    node.network.set_addresses({B: ("127.0.0.1", 1)})
    bare = ssl.create_default_context(cafile=f"{certificates.folder}/ca.pem")
    bare.check_hostname = False
    assert await tls_handshake(node, bare) == b""
    proper = certificates.tls(B).dialling()
    assert await tls_handshake(node, proper) == encode_hello(Hello(CLUSTER, A, B))
    old = certificates.tls(B).dialling()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await tls_handshake(node, old) == b""


async def test_plain_and_tls_do_not_mix(
    nursery: trio.Nursery, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    secure, plain = Node(A, tls=certificates.tls(A)), Node(B)
    await start(nursery, secure, plain)
    await until(lambda: secure.network.facts().refused_connections and plain.network.facts().refused_connections)
    assert not secure.connected(B) and not plain.connected(A)
    assert not secure.heard and not plain.heard


async def test_a_certificate_that_cannot_be_used_is_an_error_at_once(certificates: Certificates) -> None:
    good = certificates.tls(A)
    with pytest.raises(OSError, match="No such file"):
        Node(A, tls=attrs.evolve(good, certificate="/nowhere.pem"))
    with pytest.raises(OSError, match="KEY_VALUES_MISMATCH"):
        Node(A, tls=attrs.evolve(good, key=certificates.tls(B).key))
    assert "key=" not in repr(good)


# -- how fast -------------------------------------------------------------------------------------------------------------


async def test_an_append_stream_moves_quickly(nursery: trio.Nursery, capsys: pytest.CaptureFixture[str]) -> None:
    """200 MB in appends of 64 KiB; the figure is printed, that all of it arrives in order is the test."""
    here, there = Node(A), Node(B)
    await start(nursery, here, there)
    await until(lambda: here.connected(B))
    count = 200_000_000 // 65536
    payload = bytes(range(256)) * 256
    here.appends[B] = deque(append(A, number, payload) for number in range(1, count + 1))
    began = time.perf_counter()
    here.network.wake(B)
    await until(lambda: len(there.heard) == count, 60)
    took = time.perf_counter() - began
    assert all(
        message.prev_index == at and message.entries[0].payload == payload
        for at, (_, message) in enumerate(there.heard)
        if isinstance(message, AppendEntries)
    )
    with capsys.disabled():
        print(f"\n  {count * 65536 / took / 1e6:.0f} MB/s in appends of 64 KiB")


async def test_a_small_message_comes_back_soon(nursery: trio.Nursery, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = Node(A), Node(B)
    there.answers = True
    await start(nursery, here, there)
    await until(lambda: here.connected(B) and there.connected(A))
    times = []
    for number in range(500):
        here.heard_something = trio.Event()
        began = time.perf_counter()
        here.network.send(B, here.beat(number))
        with trio.fail_after(5):
            await here.heard_something.wait()
        times.append(time.perf_counter() - began)
        assert here.heard[-1] == (B, HeartbeatReply(1, B, number, 0))
    times.sort()
    with capsys.disabled():
        print(
            f"\n  a heartbeat and its reply: {times[250] * 1e6:.0f} us in the middle, {times[495] * 1e6:.0f} us at worst of 99 %"
        )
