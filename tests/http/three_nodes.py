"""Three nodes in one process: memory stores, real dispatch, peers over loopback. What is waited for is a state, never a time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import trio

from ayder.config import load_config
from ayder.entries import NodeId
from ayder.http.server import HttpServer
from ayder.node import Node, open_node
from ayder.raft.consensus import Role
from ayder.raft.messages import AppendReply, Message
from tests.http.in_process import Client

NAMES = ("n1", "n2", "n3")


def _free_ports(count: int) -> list[int]:
    """Neighbours, because clients are served on the port behind that of the peers."""
    found: list[int] = []
    while len(found) < count:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                held.enter_context(socket.socket()).bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            if not {port - 1, port, port + 1} & set(found):
                found.append(port)
    return found


@attrs.define(eq=False)
class Cluster:
    """The nodes that run, by name."""

    toml: str
    flags: dict[str, str]
    nursery: trio.Nursery
    disks: Path | None
    """``None``: in memory. A node of it that starts again has lost its disk, which is not what a restart is."""
    clients: dict[str, Client] = attrs.field(factory=dict)
    scopes: dict[str, trio.CancelScope] = attrs.field(factory=dict)

    async def start(self, name: str) -> None:
        await self.nursery.start(self._run, name)

    async def _run(self, name: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        own = {} if self.disks is None else {"storage.log": "aof", "storage.data_dir": str(self.disks / name)}
        config = load_config({**self.flags, **own, "raft.node_id": name}, {}, self.toml)
        with trio.CancelScope() as scope:
            async with open_node(config) as node, trio.open_nursery() as nursery:
                server = HttpServer(node.application, config.http)
                await nursery.start(server.serve)
                node.add_front(server.front)
                self.clients[name], self.scopes[name] = Client(node), scope
                task_status.started()
                await trio.sleep_forever()
        del self.scopes[name]

    async def stop(self, name: str) -> None:
        """As a crash would: nobody is told."""
        self.scopes[name].cancel()
        del self.clients[name]
        await until(lambda: name not in self.scopes)

    @property
    def leader(self) -> Client:
        """Who leads and is ready; ``KeyError`` when nobody is."""
        for client in self.clients.values():
            if client.node.driver.ready and client.node.driver.consensus.role is Role.LEADER:
                return client
        raise KeyError("nobody leads")

    @property
    def followers(self) -> list[Client]:
        leader = self.leader
        return [client for client in self.clients.values() if client is not leader]

    async def settle(self) -> Client:
        """Until one leads and all who run follow it and hold what it holds."""
        await until(self._settled)
        return self.leader

    def _settled(self) -> bool:
        try:
            leader = self.leader.node
        except KeyError:
            return False
        mine = leader.driver.consensus
        return all(
            node.driver.consensus.leader_id == mine.node_id and node.broker.applied_index == mine.commit_index
            for node in (client.node for client in self.clients.values())
        )


def name_of(client: Client) -> str:
    return client.node.driver.consensus.node_id


async def until(condition: Callable[[], object]) -> None:
    """The bound is for a test that fails."""
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


def withhold_copies(node: Node) -> None:
    """This node follows, but what it says of its disk gets lost: its copies never count."""
    network = node.network
    assert network is not None
    send = network.send

    def send_others(to: NodeId, message: Message) -> None:
        if not isinstance(message, AppendReply):
            send(to, message)

    network.send = send_others  # type: ignore[method-assign]


@contextlib.asynccontextmanager
async def three_nodes(disks: Path | None = None, **settings: object) -> AsyncIterator[Cluster]:
    """A cluster that has settled. ``settings`` are ``section__name=value`` of all its nodes."""
    flags = {
        name.replace("__", "."): str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()
    }
    ports = _free_ports(len(NAMES))
    toml = "".join(
        f'[[cluster.nodes]]\nid = "{name}"\nhost = "127.0.0.1"\nraft_port = {port}\n'
        for name, port in zip(NAMES, ports, strict=True)
    )
    quick = {"storage.log": "memory", "raft.tick_ms": "20", "raft.heartbeat_interval_ms": "40", "raft.election_timeout_ms": "400"}
    async with trio.open_nursery() as nursery:
        cluster = Cluster(toml, {**quick, **flags}, nursery, disks)
        for name in NAMES:
            await cluster.start(name)
        await cluster.settle()
        yield cluster
        nursery.cancel_scope.cancel()
