"""What a follower receives is bounded by what its disk takes, and a leader that repeats itself does not use the bound up."""

from __future__ import annotations

import time
from pathlib import Path

import trio

from ayder.broker import Broker
from ayder.config import load_config
from ayder.entries import EntryKind, LogEntry, NodeId
from ayder.raft.consensus import Consensus
from ayder.raft.driver import Driver
from ayder.raft.messages import AppendEntries, AppendReply, Message
from ayder.storage.memory import MemoryLogStore

BLOCK_BYTES = 4 << 20


class Recorder:
    """A network that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, to: NodeId, message: Message) -> None:
        assert to == "a"
        self.sent.append(message)

    def wake(self, to: NodeId) -> None:
        raise AssertionError(f"a follower has nothing for {to}")


async def test_entries_sent_again_and_again_do_not_make_a_follower_deaf(tmp_path: Path) -> None:
    config = load_config({"storage.log": "memory"}, {}, None)
    store = MemoryLogStore.open(tmp_path, monotonic_ns=time.monotonic_ns)
    broker = Broker(config=config, store=store)
    consensus = Consensus(node_id="b", voters=("a", "b", "c"), log=store, election_ticks=10_000, spread=lambda _: 0)
    driver = Driver(consensus=consensus, log=store, source=broker, applier=broker, tick_s=0.05, clock_ms=lambda: 0)
    broker.attach(driver)
    network = driver.network = Recorder()
    entry = LogEntry(1, 1, EntryKind.BLOCK, 0, bytes(BLOCK_BYTES))
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        with trio.fail_after(20):
            for _ in range(20):  # 80 MiB received, 4 MiB of it new
                await driver.receive("a", AppendEntries(1, "a", 0, 0, (entry,), 0))
            while sum(isinstance(message, AppendReply) and message.accepted for message in network.sent) < 20:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert store.last_index == 1
