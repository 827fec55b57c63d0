"""A cluster of processes on this machine: started, killed, paused, and what can be seen of it from outside.

Owns: ports, configuration files, the processes. Must not know: what clients do, what is right.

Every node is an ``ayder serve`` with a configuration file of its own. Its peers' addresses in that file may be those of proxies
(``proxy.py``); clients always reach a node directly. All calls here block: from Trio, in a thread.
"""

from __future__ import annotations

import http.client
import random
import re
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import attrs

from ayder.entries import HardState
from ayder.storage.aof import AofLogStore
from tests.chaos.http_client import Blocking, Reply
from tests.chaos.server import Launch, Server, by_serve

__all__ = ["Cluster", "Standing", "wait_for"]

_T = TypeVar("_T")

SETTLE_S = 30.0
_ASK_S = 2.0
_PORTS = range(20_000, 32_000)
"""Below the range the kernel takes ports for outgoing connections from: a killed node finds its own free again."""

SEGMENTS = {
    "storage.segment_bytes": "262144",
    "storage.segment_blocks": "1000",
}
"""Small, so that segments roll and checkpoints are made; not so small that what a follower misses in seconds is collected."""
ELECTION_TIMEOUT_MS = 1000


@attrs.frozen
class Standing:
    """What a node says of itself."""

    role: str
    leader: str | None
    term: int
    commit_index: int
    applied_index: int
    ready: bool


class Cluster:
    """``size`` nodes n1, n2, … below one directory. A context manager: nothing runs after it.

    ``settings``: ``section__key=value``, for all nodes and lives.
    """

    mistake: ClassVar[str] = ""
    """Code that every node runs before its own: a defect made on purpose (``test_mutants.py``)."""

    def __init__(self, directory: Path, size: int = 3, **settings: object) -> None:
        self.names = tuple(f"n{i}" for i in range(1, size + 1))
        self._directory = directory
        self._settings = settings
        ports = self._free_ports(2 * size)
        self.addresses = {name: ("127.0.0.1", ports[2 * i]) for i, name in enumerate(self.names)}
        self.client_ports = {name: ports[2 * i + 1] for i, name in enumerate(self.names)}
        self.proxied: Mapping[tuple[str, str], int] = {}
        """Port by (from, to), instead of where ``to`` really listens. Set before nodes start."""
        self.election_timeouts_ms = dict.fromkeys(self.names, ELECTION_TIMEOUT_MS)
        """By node, from its next start on."""
        self.nodes = {name: self._server(name) for name in self.names}

    def _server(self, name: str) -> Server:
        directory = self._directory / name
        launch = Launch("cluster", partial(_command, directory / "ayder.toml", self.mistake), by_serve.environment, by_serve.url)
        settings = {key.replace(".", "__"): value for key, value in SEGMENTS.items()} | self._settings
        return Server(directory, launch, **({"raft__node_id": name} | settings))

    def _free_ports(self, count: int) -> list[int]:
        ports: list[int] = []
        while len(ports) < count:
            port = random.choice(_PORTS)
            with socket.socket() as claim:
                try:
                    claim.bind(("127.0.0.1", port))
                except OSError:
                    continue
            if port not in ports:
                ports.append(port)
        return ports

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for node in self.nodes.values():
            if node.lives:
                node.__exit__(kind, error, trace)

    # -- life and death ---------------------------------------------------------------------------------------------
    def start(self, *names: str) -> None:
        """Start these nodes (all when none is named) and wait until each answers."""
        for name in names or self.names:
            self.spawn(name)
        for name in names or self.names:
            self.nodes[name].wait_serving()

    def spawn(self, name: str) -> None:
        """Start and do not wait."""
        self._configure(name)
        self.nodes[name].spawn()

    def kill(self, *names: str) -> None:
        """SIGKILL these nodes (all when none is named) at once."""
        for name in names or self.names:
            if self.nodes[name].running:
                self.nodes[name].signal(signal.SIGKILL, whole_group=True)
        for name in names or self.names:
            self.nodes[name].kill()

    def stop(self, *names: str) -> None:
        """SIGTERM these nodes; they end well."""
        for name in names:
            assert self.nodes[name].terminate() == 0, self.nodes[name].stderr

    def pause(self, *names: str) -> None:
        """SIGSTOP."""
        for name in names:
            self.nodes[name].signal(signal.SIGSTOP, whole_group=True)

    def resume(self, *names: str) -> None:
        """SIGCONT."""
        for name in names:
            self.nodes[name].signal(signal.SIGCONT, whole_group=True)

    def _configure(self, name: str) -> None:
        lines = ["[raft]", f"election_timeout_ms = {self.election_timeouts_ms[name]}", "[cluster]", "nodes = ["]
        for peer in self.names:
            host, port = self.addresses[peer]
            seen_port = self.proxied.get((name, peer), port)
            url = f"http://127.0.0.1:{self.client_ports[peer]}"
            lines.append(f'  {{ id = "{peer}", host = "{host}", raft_port = {seen_port}, http_url = "{url}" }},')
        (self._directory / name / "ayder.toml").write_text("\n".join([*lines, "]", ""]))

    @property
    def running(self) -> list[str]:
        """Names of the nodes whose process lives."""
        return [name for name in self.names if self.nodes[name].running]

    # -- what they say ----------------------------------------------------------------------------------------------
    def client(self, name: str) -> Blocking:
        """A blocking client of this node."""
        return Blocking(self.client_ports[name])

    def standing(self, name: str) -> Standing | None:
        """``None`` when the node does not answer."""
        try:
            reply = self.client(name).request("GET", "/ready", seconds=_ASK_S)
        except (OSError, http.client.HTTPException):
            return None
        if reply.headers.get("ayder-node") != name:
            return None
        said = reply.json
        facts = said["role"], said["leader"], said["term"], said["commit_index"], said["applied_index"], said["ready"]
        return Standing(*facts)

    def leader(self, among: Iterable[str] | None = None) -> str | None:
        """Who says that it leads and is ready, in the highest term."""
        standings = {name: self.standing(name) for name in among or self.running}
        leading = [(one.term, name) for name, one in standings.items() if one is not None and one.role == "leader" and one.ready]
        return max(leading)[1] if leading else None

    def wait_leader(self, among: Iterable[str] | None = None, seconds: float = SETTLE_S) -> str:
        """Until one of these leads. Raises ``TimeoutError``."""
        return wait_for(lambda: self.leader(among), f"no leader among {among or self.running}", seconds)

    def wait_agreed(self, seconds: float = SETTLE_S) -> Standing:
        """Until all nodes that run follow one leader in one term and have applied the same; returns the leader's standing."""

        def agreed() -> Standing | None:
            standings = [self.standing(name) for name in self.running]
            if any(one is None for one in standings):
                return None
            facts = {(one.term, one.leader, one.commit_index, one.applied_index) for one in standings if one is not None}
            leads = [one for one in standings if one is not None and one.role == "leader" and one.ready]
            return leads[0] if len(facts) == 1 and leads and leads[0].commit_index == leads[0].applied_index else None

        return wait_for(agreed, lambda: f"no agreement: {[self.standing(name) for name in self.running]}", seconds)

    def call(self, method: str, target: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> Reply:
        """A call to whoever leads, as a client makes it that follows redirects; waits for a leader. Raises ``TimeoutError``.

        Only what surely did not happen is sent again.
        """
        deadline = time.monotonic() + SETTLE_S
        names = self.running
        name = names[0]
        while time.monotonic() < deadline:
            try:
                reply = self.client(name).request(method, target, body, headers)
            except ConnectionRefusedError:
                name = random.choice(names)
                continue
            if reply.status in (307, 308):
                name = self.named(reply.headers["location"])
            elif reply.status == 503 and reply.json.get("leader_url"):
                name = self.named(reply.json["leader_url"])
            elif reply.status == 503 and reply.json["outcome"] == "not_applied":
                time.sleep(0.02)
                name = random.choice(names)
            else:
                return reply
        raise TimeoutError(f"{method} {target}: nobody took it")

    def named(self, url: str) -> str:
        """The node a URL leads to."""
        found = re.match(r"http://127\.0\.0\.1:(\d+)", url)
        assert found, url
        return next(name for name, port in self.client_ports.items() if port == int(found[1]))

    # -- what they wrote down ---------------------------------------------------------------------------------------
    def leaders_by_term(self) -> dict[int, set[str]]:
        """Who led in each term, by what the nodes logged in all lives. R-1: one each."""
        leaders: dict[int, set[str]] = defaultdict(set)
        for name, node in self.nodes.items():
            for found in re.finditer(r" standing term=(\d+) role=leader ", node.all_stderr):
                leaders[int(found[1])].add(name)
        return leaders

    def hard_state(self, name: str) -> HardState:
        """Term and vote on the disk of a node that does not run."""
        assert not self.nodes[name].running
        store = AofLogStore.open(self.nodes[name].data / "log", monotonic_ns=time.monotonic_ns, node_id=name)
        try:
            return store.hard_state
        finally:
            store.close()

    def holders(self, value: bytes) -> list[str]:
        """The nodes in whose log files these bytes are."""
        return [name for name in self.names if any(value in path.read_bytes() for path in self.nodes[name].segments)]


_MAIN = "\nimport sys\nfrom ayder.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"


def _command(config: Path, mistake: str, data: Path, settings: Mapping[str, str]) -> list[str]:
    """``serve`` without ``--bind``: a member listens where its configuration says that clients reach it."""
    words = list(by_serve.command(data, settings))
    at = words.index("--bind")
    words[at : at + 2] = ["--config", str(config)]
    if mistake:
        words[:3] = [sys.executable, "-c", mistake + _MAIN]
    return words


def wait_for(ask: Callable[[], _T | None], complaint: str | Callable[[], str], seconds: float) -> _T:
    """Until ``ask`` gives something. Raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (answer := ask()) is not None:
            return answer
        time.sleep(0.02)
    raise TimeoutError(complaint if isinstance(complaint, str) else complaint())
