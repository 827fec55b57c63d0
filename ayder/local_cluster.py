"""A cluster on this machine for trying things: one child process a node, all of them on loopback.

Owns: who the nodes are, the life of the child processes, where their output goes. Must not know: what a node does, or how it is
configured beyond the flags it is given. A node that ends is not started again: that is what one wants to watch.

Invariants: when ``LocalCluster.run`` is over, no child is left, whatever ended it; a child hears a signal once, from here,
because it is in a session of its own that the terminal does not reach; every wait for a child that was told to stop is bounded.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence

import attrs
import trio

from ayder.config import MemberConfig

__all__ = ["LocalCluster", "LocalNode", "local_members", "local_nodes", "serve_flags"]

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 30.0
"""A child that was told to stop and has not ended after this time is killed."""
SERVE_TIMEOUT_S = 10.0
"""How long the announcement waits for nodes that do not listen yet."""

_POLL_S = 0.05
_TAIL_BYTES = 2_000
_TAIL_LINES = 5
_STOPPED_BY_US = {0, -signal.SIGINT, -signal.SIGTERM, 130}


@attrs.frozen
class LocalNode:
    """One child: its entry in ``cluster.nodes``, the command that runs it, and the file that takes what it prints."""

    member: MemberConfig
    command: tuple[str, ...]
    log_path: str


def local_members(count: int, base_port: int) -> list[MemberConfig]:
    """``node-1`` … on loopback: peers on ``base_port``, + 2, + 4 …, clients one above. Raises ``ValueError`` beyond the ports."""
    return [MemberConfig(id=f"node-{number + 1}", host=HOST, raft_port=base_port + 2 * number) for number in range(count)]


def serve_flags(member: MemberConfig, members: Sequence[MemberConfig], data_dir: str) -> list[str]:
    """The flags by which ``ayder serve`` runs this member; above every other source of settings."""
    host, port = member.client_address
    settings = {"raft.node_id": member.id, "cluster.nodes": json.dumps([attrs.asdict(one) for one in members])}
    flags = ["--bind", f"{host}:{port}", "--data", os.path.join(data_dir, member.id)]
    return [*flags, *(part for path, value in settings.items() for part in ("--set", f"{path}={value}"))]


def local_nodes(members: Sequence[MemberConfig], data_dir: str, more_flags: Sequence[str] = ()) -> list[LocalNode]:
    """What to run for each member; ``more_flags`` go to all of them."""
    serve = (sys.executable, "-m", "ayder", "serve")
    return [
        LocalNode(
            member,
            (*serve, *serve_flags(member, members, data_dir), *more_flags),
            os.path.join(data_dir, f"{member.id}.log"),
        )
        for member in members
    ]


@attrs.define(eq=False)
class LocalCluster:
    """The children. ``say`` takes each line for the person who watches; ``announcement`` is said once the nodes listen."""

    nodes: Sequence[LocalNode]
    say: Callable[[str], None]
    announcement: Sequence[str] = ()
    told_to_stop: bool = attrs.field(default=False, init=False)
    failed: bool = attrs.field(default=False, init=False)
    processes: dict[str, trio.Process] = attrs.field(factory=dict, init=False)
    """Every child that was started, by node id."""

    async def run(self) -> int:
        """Until all children have ended; SIGINT and SIGTERM are passed on to them (SIGHUP as SIGTERM).

        0: they were told to stop and did so. 1: all ended untold, or one failed to stop. Raises ``OSError`` when one cannot be
        started.
        """
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            try:
                async with trio.open_nursery() as nursery:
                    for node in self.nodes:
                        self.processes[node.member.id] = await _start(node)
                    nursery.start_soon(self._forward, signals, nursery)
                    nursery.start_soon(self._announce)
                    async with trio.open_nursery() as watchers:
                        for node in self.nodes:
                            watchers.start_soon(self._watch, node)
                    nursery.cancel_scope.cancel()
            finally:  # only when something went wrong here is anybody left to be ended
                self._signal_all(signal.SIGTERM)
                with trio.move_on_after(STOP_TIMEOUT_S, shield=True):
                    await self._wait_all()
                self._signal_all(signal.SIGKILL)
                with trio.move_on_after(STOP_TIMEOUT_S, shield=True):
                    await self._wait_all()
        return 1 if self.failed or not self.told_to_stop else 0

    @property
    def running(self) -> list[str]:
        """The nodes whose process has not ended."""
        return [node_id for node_id, process in self.processes.items() if process.returncode is None]

    async def _forward(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            if not self.told_to_stop:
                self.say(f"{signal.Signals(number).name}: stopping {', '.join(self.running)}")
                nursery.start_soon(self._kill_late)
            self.told_to_stop = True
            self._signal_all(signal.SIGTERM if number == signal.SIGHUP else number)

    async def _kill_late(self) -> None:
        await trio.sleep(STOP_TIMEOUT_S)
        self.say(f"{', '.join(self.running)} did not stop within {STOP_TIMEOUT_S:g} s: killed")
        self._signal_all(signal.SIGKILL)

    async def _announce(self) -> None:
        with trio.move_on_after(SERVE_TIMEOUT_S):
            for node in self.nodes:
                await self._listens(node.member)
        for line in self.announcement:
            self.say(line)

    async def _listens(self, member: MemberConfig) -> None:
        """Until clients can connect to it, or it has ended."""
        while member.id in self.running:
            if await _accepts(*member.client_address):
                return
            await trio.sleep(_POLL_S)

    async def _watch(self, node: LocalNode) -> None:
        process = self.processes[node.member.id]
        status = await process.wait()
        if self.told_to_stop:
            self.failed |= status not in _STOPPED_BY_US
            self.say(f"{node.member.id} stopped" if status in _STOPPED_BY_US else f"{node.member.id} {_ended(status)}")
            return
        left = self.running
        others = f"the others go on: {', '.join(left)}" if left else "no node is left"
        self.say(f"{node.member.id} {_ended(status)}; {others}")
        for line in await trio.to_thread.run_sync(_last_lines, node.log_path) if status > 0 else ():
            self.say(f"  {line}")
        if left:
            self.say(f"  to start it again: {shlex.join(node.command)}")

    def _signal_all(self, number: int) -> None:
        for node_id in self.running:
            self.processes[node_id].send_signal(number)

    async def _wait_all(self) -> None:
        for process in self.processes.values():
            await process.wait()


async def _start(node: LocalNode) -> trio.Process:
    log = await trio.to_thread.run_sync(_open_log, node.log_path)
    try:
        return await trio.lowlevel.open_process(
            node.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    finally:
        os.close(log)


def _open_log(path: str) -> int:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # a node may print the token it made


def _last_lines(path: str) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]


async def _accepts(host: str, port: int) -> bool:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError:
        return False
    await stream.aclose()
    return True


def _ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
