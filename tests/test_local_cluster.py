"""The child processes of ``ayder cluster``: how they start, end, are told to stop. The children here only play nodes."""

import json
import os
import pathlib
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from ayder import local_cluster
from ayder.__main__ import main
from ayder.config import load_config
from ayder.local_cluster import LocalCluster, LocalNode, local_members, local_nodes, serve_flags

PLAY = """
import os, signal, socket, sys
port, on_stop = int(sys.argv[1]), sys.argv[2]
listener = socket.create_server(("127.0.0.1", port))
print("plays a node")
print("its last words", flush=True)
if on_stop == "ends":
    sys.exit(3)
wanted = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
open(sys.argv[3], "w").close()
while True:
    got = signal.sigwait(wanted)
    print("heard", signal.Signals(got).name, flush=True)
    if on_stop != "stubborn":
        sys.exit({"stops": 0, "fails": 4}[on_stop])
"""


def free_port() -> int:
    """The first of two free ports in a row; rarely somebody else is quicker."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except (OSError, OverflowError):
                continue


@attrs.define
class Stage:
    """What the person who watches sees, and the files by which the children say that they are there."""

    folder: pathlib.Path
    said: list[str] = attrs.Factory(list)
    changed: trio.Event = attrs.Factory(trio.Event)

    def say(self, line: str) -> None:
        self.said.append(line)
        self.changed.set()
        self.changed = trio.Event()

    async def until_said(self, text: str) -> None:
        while not any(text in line for line in self.said):
            await self.changed.wait()

    def player(self, number: int, on_stop: str = "stops") -> LocalNode:
        (member,) = local_members(1, free_port())
        member = attrs.evolve(member, id=f"node-{number}")
        ready = str(self.folder / f"{member.id}.ready")
        command = (sys.executable, "-I", "-S", "-c", PLAY, str(member.client_address[1]), on_stop, ready)
        return LocalNode(member, command, str(self.folder / "logs" / f"{member.id}.log"))

    async def until_ready(self, nodes: Sequence[LocalNode]) -> None:
        while not all((self.folder / f"{node.member.id}.ready").exists() for node in nodes):
            await trio.sleep(0.01)


@pytest.fixture
def stage(tmp_path: pathlib.Path) -> Stage:
    return Stage(tmp_path)


@asynccontextmanager
async def running(cluster: LocalCluster, stage: Stage, expected: int) -> AsyncIterator[trio.Nursery]:
    """The cluster runs beside the block and must end by itself, with status ``expected``."""
    found: list[int] = []

    async def run() -> None:
        found.append(await cluster.run())

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield nursery
    assert found == [expected]
    assert cluster.running == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_stops_all_and_each_child_hears_it_once(stage: Stage, number: signal.Signals) -> None:
    nodes = [stage.player(1), stage.player(2), stage.player(3)]
    cluster = LocalCluster(nodes, stage.say, ["they are there"])
    async with running(cluster, stage, 0):
        await stage.until_said("they are there")
        await stage.until_ready(nodes)
        assert cluster.running == ["node-1", "node-2", "node-3"]
        signal.raise_signal(number)
    assert f"{number.name}: stopping node-1, node-2, node-3" in stage.said
    assert {f"node-{n} stopped" for n in (1, 2, 3)} <= set(stage.said)
    heard = "SIGTERM" if number == signal.SIGHUP else number.name
    for node in nodes:
        assert pathlib.Path(node.log_path).read_text().splitlines()[2:] == [f"heard {heard}"]
        assert stat.S_IMODE(os.stat(node.log_path).st_mode) == 0o600


async def test_a_child_that_is_killed_is_named_and_the_others_go_on(stage: Stage) -> None:
    nodes = [stage.player(1), stage.player(2)]
    cluster = LocalCluster(nodes, stage.say)
    async with running(cluster, stage, 0):
        await stage.until_ready(nodes)
        cluster.processes["node-1"].kill()
        await stage.until_said("start it again")
        assert stage.said[0] == "node-1 was ended by SIGKILL; the others go on: node-2"
        assert cluster.running == ["node-2"]
        signal.raise_signal(signal.SIGTERM)
    assert stage.said[-1] == "node-2 stopped"


async def test_it_ends_with_its_last_child_and_shows_why(stage: Stage) -> None:
    cluster = LocalCluster([stage.player(1, "ends")], stage.say)
    async with running(cluster, stage, 1):
        pass
    assert stage.said == ["node-1 ended with status 3; no node is left", "  plays a node", "  its last words"]


async def test_a_child_that_fails_to_stop_is_a_failure(stage: Stage) -> None:
    nodes = [stage.player(1), stage.player(2, "fails")]
    cluster = LocalCluster(nodes, stage.say)
    async with running(cluster, stage, 1):
        await stage.until_ready(nodes)
        signal.raise_signal(signal.SIGTERM)
    assert "node-2 ended with status 4" in stage.said
    assert "node-1 stopped" in stage.said


async def test_a_child_that_does_not_stop_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [stage.player(1, "stubborn"), stage.player(2)]
    monkeypatch.setattr(local_cluster, "STOP_TIMEOUT_S", 0.5)
    cluster = LocalCluster(nodes, stage.say)
    async with running(cluster, stage, 1):
        await stage.until_ready(nodes)
        signal.raise_signal(signal.SIGTERM)
        await stage.until_said("node-2 stopped")
        signal.raise_signal(signal.SIGINT)  # a second one is passed on too
    assert "node-1 did not stop within 0.5 s: killed" in stage.said
    assert "node-1 was ended by SIGKILL" in stage.said
    assert "heard SIGTERM\nheard SIGINT\n" in pathlib.Path(nodes[0].log_path).read_text()


async def test_when_one_cannot_be_started_the_others_are_ended(stage: Stage) -> None:
    absent = attrs.evolve(stage.player(2), command=(str(stage.folder / "absent"),))
    cluster = LocalCluster([stage.player(1), absent], stage.say)
    with trio.fail_after(30), pytest.raises((OSError, ExceptionGroup)):
        await cluster.run()
    assert list(cluster.processes) == ["node-1"]
    assert cluster.running == []


async def test_cancelling_leaves_no_child_behind(stage: Stage) -> None:
    nodes = [stage.player(1), stage.player(2)]
    cluster = LocalCluster(nodes, stage.say)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.run)
            await stage.until_ready(nodes)
            nursery.cancel_scope.cancel()
    assert [process.returncode for process in cluster.processes.values()] == [0, 0]


async def test_the_announcement_does_not_wait_for_a_child_that_ended(stage: Stage) -> None:
    nodes = [stage.player(1, "ends"), stage.player(2)]
    cluster = LocalCluster(nodes, stage.say, ["that is all"])
    async with running(cluster, stage, 0):
        await stage.until_said("that is all")
        await stage.until_ready(nodes[1:])
        signal.raise_signal(signal.SIGTERM)


# ---- who the nodes are ----


def test_ports_and_folders_of_the_members() -> None:
    members = local_members(3, 20_000)
    assert [(m.id, m.raft_port, m.client_url) for m in members] == [
        ("node-1", 20_000, "http://127.0.0.1:20001"),
        ("node-2", 20_002, "http://127.0.0.1:20003"),
        ("node-3", 20_004, "http://127.0.0.1:20005"),
    ]
    second = local_nodes(members, "/d", ["--set", "raft.tick_ms=10"])[1]
    assert second.log_path == "/d/node-2.log"
    assert second.command[:4] == (sys.executable, "-m", "ayder", "serve")
    assert second.command[-2:] == ("--set", "raft.tick_ms=10")


def test_the_flags_of_a_member_are_a_valid_configuration_whatever_the_environment_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = local_members(5, 20_000)
    monkeypatch.setenv("PORT", "7")
    monkeypatch.setenv("AYDER_RAFT__NODE_ID", "elsewhere")
    assert main(["check-config", *serve_flags(members[3], members, "/d")]) == 0
    listing = capsys.readouterr().out
    for line in ('raft.node_id = "node-4"', 'http.host = "127.0.0.1"', "http.port = 20007", 'storage.data_dir = "/d/node-4"'):
        assert f"{line}  # flag\n" in listing
    nodes = json.dumps([attrs.asdict(member) for member in members])
    expected = load_config({"cluster.nodes": nodes, "raft.node_id": "node-4"}, {}, None).cluster
    assert list(expected.nodes) == members


# ---- the command ----


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--nodes", "4"], "a cluster has 1, 3, 5 or 7 nodes, not 4"),
        (["--nodes", "0"], "a cluster has 1, 3, 5 or 7 nodes"),
        (["--base-port", "65533"], "must be at most 65534"),
        (["--set", "raft.tick_ms=soon"], "raft.tick_ms: expected a whole number"),
        (["--config", "absent.toml"], "configuration file absent.toml"),
    ],
)
def test_a_wrong_cluster_starts_nothing(
    argv: list[str], expected: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "--data", str(tmp_path / "d"), *argv]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_the_command_prints_urls_token_and_calls(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_a_reader_that_stops_it(nodes: list[LocalNode], say: Callable[[str], None], lines: list[str]) -> LocalCluster:
        def read(line: str) -> None:
            say(line)
            if line == lines[-1]:
                signal.raise_signal(signal.SIGTERM)

        return LocalCluster(nodes, read, lines)

    monkeypatch.setattr(local_cluster, "local_nodes", lambda *_: [stage.player(1), stage.player(2)])
    monkeypatch.setattr(local_cluster, "LocalCluster", with_a_reader_that_stops_it)
    assert main(["cluster", "--data", str(stage.folder), "--base-port", "20000"]) == 0
    said = capsys.readouterr().out
    for number in (1, 2, 3):
        assert f"node-{number} listens on http://127.0.0.1:{19_999 + 2 * number}\n" in said
    assert "token: dev\n" in said
    calls = [line for line in said.splitlines() if line.startswith("curl ")]
    assert len(calls) == 3
    assert all(line.startswith('curl -L --location-trusted -H "Authorization: Bearer dev" ') for line in calls)


def test_a_child_that_cannot_be_started_ends_the_command_in_words(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = attrs.evolve(stage.player(1), command=(str(stage.folder / "absent"),))
    monkeypatch.setattr(local_cluster, "local_nodes", lambda *_: [absent])
    assert main(["cluster", "--data", str(stage.folder)]) == 1
    assert "ayder: [Errno 2] No such file or directory" in capsys.readouterr().err
