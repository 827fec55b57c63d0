"""A node asked in the peers' own language for what it must not do: a second vote in a term, entries of an old term (H-1, H-4).

The test speaks as a member whose process does not run. Nothing is refused for its form: only Raft's rules stand in the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from ayder.entries import EntryKind, LogEntry
from ayder.raft.messages import AppendEntries, HeartbeatReply, Message, RequestVote, VoteReply
from ayder.raft.peers import PeerLimits, PeerNetwork
from tests.cluster.local import Cluster
from tests.cluster.test_scenarios import create, linearizable, local, produce

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

CLUSTER_ID = hashlib.blake2b(b"ayder", digest_size=16).digest()
FAR = 1 << 40
_ANSWER_S = 10.0

_Answer = TypeVar("_Answer", bound=Message)


class Impostor:
    """Speaks as one member to another."""

    def __init__(self, network: PeerNetwork, name: str, answers: trio.MemoryReceiveChannel[Message]) -> None:
        self.name = name
        self._network = network
        self._answers = answers

    async def ask(self, node: str, message: Message, kind: type[_Answer]) -> _Answer:
        """Its next answer of this kind. Sends again: a message may be lost while they connect."""
        with trio.fail_after(_ANSWER_S):
            while True:
                self._network.send(node, message)
                with trio.move_on_after(0.5):
                    async for answer in self._answers:
                        if isinstance(answer, kind) and answer.sender == node:
                            return answer


@asynccontextmanager
async def speaking_as(cluster: Cluster, name: str) -> AsyncIterator[Impostor]:
    """The member ``name``, whose own process must not run."""
    assert not cluster.nodes[name].running
    said, answers = trio.open_memory_channel[Message](1000)

    async def receive(_sender: str, message: Message) -> None:
        await said.send(message)

    async def nothing_to_append(_peer: str) -> None:
        await trio.lowlevel.checkpoint()

    network = PeerNetwork(
        node_id=name,
        cluster_id=CLUSTER_ID,
        addresses={peer: address for peer, address in cluster.addresses.items() if peer != name},
        bind=cluster.addresses[name],
        tls=None,
        limits=PeerLimits(),
        receive=receive,
        next_append=nothing_to_append,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(network.run)
        try:
            yield Impostor(network, name, answers)
        finally:
            nursery.cancel_scope.cancel()


async def ask_for_vote(cluster: Cluster, candidate: str, voter: str, term: int) -> bool:
    """Whether ``voter`` gives its vote to ``candidate``, whose log is ahead of everybody's."""
    async with speaking_as(cluster, candidate) as impostor:
        reply = await impostor.ask(voter, RequestVote(term, candidate, FAR, FAR), VoteReply)
    return reply.granted


async def test_h1_no_second_vote_in_a_term_after_a_restart(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        await trio.to_thread.run_sync(cluster.start)
        await trio.to_thread.run_sync(cluster.wait_agreed)
        cluster.kill()
        voter = "n2"
        before = cluster.hard_state(voter)
        cluster.election_timeouts_ms[voter] = 60_000  # it does not stand for election itself
        cluster.spawn(voter)
        await trio.to_thread.run_sync(cluster.nodes[voter].wait_serving)
        assert await ask_for_vote(cluster, "n3", voter, before.term + 1), "it votes once in a new term"
        cluster.kill(voter)
        assert (cluster.hard_state(voter).term, cluster.hard_state(voter).voted_for) == (before.term + 1, "n3")
        cluster.spawn(voter)
        await trio.to_thread.run_sync(cluster.nodes[voter].wait_serving)
        assert not await ask_for_vote(cluster, "n1", voter, before.term + 1), "a second vote in the same term"
        assert not await ask_for_vote(cluster, "n1", voter, before.term), "a vote in an old term"
        assert await ask_for_vote(cluster, "n3", voter, before.term + 1), "the same vote may be said again"
        assert await ask_for_vote(cluster, "n1", voter, before.term + 2)


async def test_h4_entries_of_an_old_term_change_nothing(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        for _ in range(2):  # the second time in a later term
            await trio.to_thread.run_sync(cluster.start, "n1", "n2")
            leader = await trio.to_thread.run_sync(cluster.wait_leader)
            if not linearizable_topics(cluster):
                create(cluster)
                produce(cluster, ["a", "b"])
                cluster.kill()
        standing = await trio.to_thread.run_sync(cluster.wait_agreed)
        old = AppendEntries(
            standing.term - 1, "n3", standing.commit_index, standing.term,
            (LogEntry(standing.commit_index + 1, standing.term - 1, EntryKind.NOOP, 0, b""),), standing.commit_index + 1,
        )  # fmt: skip
        async with speaking_as(cluster, "n3") as impostor:
            for name in ("n1", "n2"):
                reply = await impostor.ask(name, old, HeartbeatReply)
                assert reply.term == standing.term, "the sender is told how old it is"
        assert await trio.to_thread.run_sync(cluster.wait_agreed) == standing
        assert await trio.to_thread.run_sync(cluster.leader) == leader
        assert linearizable(cluster) == local(cluster, "n1") == local(cluster, "n2") == ["a", "b"]


def linearizable_topics(cluster: Cluster) -> list[str]:
    return [topic["topic"] for topic in cluster.call("GET", "/broker/topics").json["topics"]]
