"""``deploy/`` without a container engine: what its files say about each other, about the settings and about a real node.

The certificate script runs, two nodes' TLS accepts what it makes, and the settings of the containers make a cluster of processes.
What watches the nodes is in ``test_dashboard.py``.
"""

import fnmatch
import hashlib
import importlib
import json
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ayder.config import load_config, token_hash
from ayder.raft.frames import ProtocolError
from ayder.raft.peer_tls import PeerTls, demand_name
from tests.chaos.server import Server
from tests.test_cluster_example import free_base_port

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
NODES = ("node-1", "node-2", "node-3")
LIMIT_S = 30

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def read_yaml(path: Path) -> Any:
    """A development tool brings PyYAML along, on Python 3.13 under another name."""
    for name in ("yaml", "yaml_ft"):
        try:
            reader = importlib.import_module(name)
        except ImportError:
            continue
        return reader.safe_load(path.read_text())
    pytest.skip("PyYAML is not installed")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT_S)


# -- the image ------------------------------------------------------------------------------------------------------
def instructions() -> list[tuple[str, str]]:
    """Instruction and argument of each line of the Dockerfile, continuations joined."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def copied() -> list[str]:
    """Sources of every COPY from the build context."""
    copies = [argument.split() for word, argument in instructions() if word == "COPY" and not argument.startswith("--from=")]
    return [source for *sources, _target in copies for source in sources]


def sent_to_builder(path: str) -> bool:
    """By the rules of ``Dockerfile.dockerignore``: the last line that matches the path, or a folder above it, decides."""
    sent = True
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        if any(fnmatch.fnmatchcase(part, pattern) for part in (path, *(str(up) for up in Path(path).parents))):
            sent = line.startswith("!")
    return sent


def test_the_image_copies_what_exists_and_what_the_builder_is_sent() -> None:
    sources = copied()
    assert {"ayder", "constraints/runtime.txt", "pyproject.toml", "README.md"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert sent_to_builder(source), source
    for secret in ("data/token", ".git/config", "deploy/secrets/node-1/key.pem", "tests/conftest.py"):
        assert not sent_to_builder(secret), secret


def test_the_image_is_pinned_unprivileged_and_watched() -> None:
    lines = instructions()
    stages = [at for at, (word, _) in enumerate(lines) if word == "FROM"]
    assert len(stages) == 2
    built, final = lines[: stages[1]], lines[stages[1] :]
    installs = [argument for word, argument in built if word == "RUN" and " install " in argument]
    assert len(installs) == 2
    assert "--require-hashes -r constraints/runtime.txt" in installs[0]
    assert "--no-index --no-deps" in installs[1], "nothing may be fetched without a hash"
    users = [argument for word, argument in final if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert ("VOLUME", "/data") in final
    (health,) = [argument for word, argument in final if word == "HEALTHCHECK"]
    assert json.loads(health.partition(" CMD ")[2]) == ["python", "/usr/local/lib/ayder/healthcheck.py"]
    words = dict(final)
    assert json.loads(words["ENTRYPOINT"]) + json.loads(words["CMD"]) == ["ayder", "serve"], (
        "a shell would keep SIGTERM to itself"
    )


def test_every_dependency_has_a_hash() -> None:
    requirements = re.sub(r"\\\n\s*", " ", (ROOT / "constraints" / "runtime.txt").read_text()).splitlines()
    assert len(requirements) > 10
    assert all("==" in line and "--hash=sha256:" in line for line in requirements if line)


def image_environment() -> dict[str, str]:
    """What ENV of the image sets, without PATH."""
    pairs = [pair for word, argument in instructions() if word == "ENV" for pair in argument.split()]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs) if name != "PATH"}


def test_the_image_alone_is_configured() -> None:
    config = load_config({}, image_environment(), None)
    assert (config.http.host, config.http.port, config.storage.data_dir) == ("0.0.0.0", 1109, "/data")
    assert not config.auth.tokens, "a token must not come with the image"


# -- compose --------------------------------------------------------------------------------------------------------
def interpolated(text: str) -> str:
    """As compose does it with an empty environment: ``${NAME:-default}``."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


def compose() -> dict[str, Any]:
    """The file, with its own anchors resolved."""
    loaded = read_yaml(DEPLOY / "compose.yaml")
    assert isinstance(loaded, dict)
    return loaded


def test_compose_has_the_services() -> None:
    services = compose()["services"]
    assert set(services) == {*NODES, "secrets", "prometheus", "grafana"}
    for name in NODES:
        assert services[name]["depends_on"]["secrets"]["condition"] == "service_completed_successfully"
        assert {"/data", "/run/ayder"} == {mount.split(":")[1] for mount in services[name]["volumes"]}
        assert services[name]["build"]["dockerfile"] == "deploy/Dockerfile"
    assert (DEPLOY / services["node-1"]["build"]["context"]).resolve() == ROOT
    made = services["secrets"]
    assert made["command"] == ["/secrets", *NODES]
    assert Path(made["entrypoint"][1]).name == "make-secrets.sh"


def test_compose_mounts_what_exists_and_publishes_on_loopback() -> None:
    loaded = compose()
    for name, service in loaded["services"].items():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in loaded["volumes"], mount
        for port in service.get("ports", ()):
            assert interpolated(port).startswith("127.0.0.1:"), f"{name} is open to the network: {port}"
    keys = {name: [m for m in loaded["services"][name]["volumes"] if "secrets" in m] for name in NODES}
    assert keys == {name: [f"{name}-secrets:/run/ayder:ro"] for name in NODES}, "a node sees its own key only"


@pytest.mark.parametrize("name", NODES)
def test_each_node_of_compose_is_configured(name: str) -> None:
    """What a container gets, read by the very code that reads it there: every member agrees, and redirects lead to the host."""
    service = compose()["services"][name]
    environment = {key: interpolated(value) for key, value in service["environment"].items()}
    assert environment.pop("AYDER_CONFIG") == "/run/ayder/tokens.toml"
    tokens = f'[[auth.tokens]]\nname = "operator"\nsha256 = "{token_hash("a token")}"\n'
    config = load_config({}, image_environment() | environment, tokens)
    assert not config.warnings
    assert config.raft.node_id == name
    assert tuple(member.id for member in config.cluster.nodes) == NODES
    assert (config.http.host, config.http.port) == ("0.0.0.0", 1109)
    me = config.cluster.member(name)
    assert me is not None and me.host == name, "the others find it by its service name"
    (published,) = (interpolated(port) for port in service["ports"])
    assert published == f"{me.client_url.removeprefix('http://')}:{config.http.port}"


# -- the health check -----------------------------------------------------------------------------------------------
def test_the_health_check_tells_a_live_node_from_a_dead_one(tmp_path: Path) -> None:
    check = partial(run, sys.executable, str(DEPLOY / "healthcheck.py"))
    with Server(tmp_path) as server:
        server.start()
        alive = check(AYDER_HTTP__PORT=str(server.port))
        server.kill()
        dead = check(AYDER_HTTP__PORT=str(server.port))
    assert (alive.returncode, dead.returncode) == (0, 1), alive.stderr + dead.stderr
    assert dead.stderr.startswith("not healthy: ")


# -- certificates ---------------------------------------------------------------------------------------------------
def make_secrets(directory: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("sh", str(DEPLOY / "make-secrets.sh"), str(directory), *names, **environment)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("secrets")
    done = make_secrets(directory, *NODES)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def peer_tls(directory: Path, name: str) -> PeerTls:
    mine = directory / name
    return PeerTls(ca=str(mine / "ca.pem"), certificate=str(mine / "certificate.pem"), key=str(mine / "key.pem"))


def talk(dialler: PeerTls, listener: PeerTls, called: str, caller: str) -> bytes:
    """One exchange between two nodes; each demands the other's name. What the listener heard."""

    async def exchange() -> bytes:
        ours, theirs = trio.testing.memory_stream_pair()
        client = trio.SSLStream(ours, dialler.dialling(), server_hostname=None)
        server = trio.SSLStream(theirs, listener.listening(), server_side=True)
        heard = b""

        async def listen() -> None:
            nonlocal heard
            await server.do_handshake()
            demand_name(server, caller)
            heard = bytes(await server.receive_some())

        async def dial() -> None:
            await client.do_handshake()
            demand_name(client, called)
            await client.send_all(b"hello")

        refusals: list[Exception] = []

        async def until_refused(side: Callable[[], Awaitable[None]]) -> None:
            try:
                await side()
            except (ProtocolError, ssl.SSLError, trio.BrokenResourceError) as exc:
                refusals.append(exc)
                nursery.cancel_scope.cancel()

        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_refused, listen)
                nursery.start_soon(until_refused, dial)
        if refusals:
            raise refusals[0]
        return heard

    return trio.run(exchange)


@needs_openssl
def test_two_nodes_accept_each_other(secrets: Path) -> None:
    one, two = peer_tls(secrets, "node-1"), peer_tls(secrets, "node-2")
    assert talk(one, two, "node-2", "node-1") == b"hello"
    assert talk(two, one, "node-1", "node-2") == b"hello"


@needs_openssl
def test_a_certificate_is_good_for_one_name_only(secrets: Path) -> None:
    one, two = peer_tls(secrets, "node-1"), peer_tls(secrets, "node-2")
    with pytest.raises(ProtocolError, match="the certificate is for node-2, not for node-3"):
        talk(one, two, "node-3", "node-1")


@needs_openssl
def test_another_authority_is_refused(secrets: Path, tmp_path: Path) -> None:
    assert make_secrets(tmp_path, "node-2").returncode == 0
    with pytest.raises((ssl.SSLError, trio.BrokenResourceError)):
        talk(peer_tls(secrets, "node-1"), peer_tls(tmp_path, "node-2"), "node-2", "node-1")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@needs_openssl
def test_made_again_they_are_what_they_were(secrets: Path) -> None:
    before = contents(secrets)
    done = make_secrets(secrets, *NODES)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    assert contents(secrets) == before


SPOILERS: list[Callable[[Path], object]] = [
    lambda folder: (folder / "certificate.pem").unlink(),
    lambda folder: (folder / "key.pem").write_bytes((folder.parent / "node-2" / "key.pem").read_bytes()),
    lambda folder: [
        (folder / name).write_bytes((folder.parent / "node-2" / name).read_bytes()) for name in ("key.pem", "certificate.pem")
    ],
    lambda folder: (folder / "certificate.pem").write_text("rubbish"),
]


@needs_openssl
@pytest.mark.parametrize("spoil", SPOILERS, ids=["no certificate", "another's key", "another's identity", "rubbish"])
def test_what_does_not_fit_is_made_anew(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    assert make_secrets(tmp_path, "node-1", "node-2").returncode == 0
    spoil(tmp_path / "node-1")
    done = make_secrets(tmp_path, "node-1", "node-2")
    assert done.stdout == "a new certificate for node-1\n", done.stdout + done.stderr
    assert talk(peer_tls(tmp_path, "node-1"), peer_tls(tmp_path, "node-2"), "node-2", "node-1") == b"hello"


@needs_openssl
def test_a_node_that_joins_gets_its_own_and_the_others_keep_theirs(tmp_path: Path) -> None:
    assert make_secrets(tmp_path, "node-1").returncode == 0
    before = contents(tmp_path)
    assert make_secrets(tmp_path, "node-1", "node-4").returncode == 0
    assert before.items() <= contents(tmp_path).items()
    assert talk(peer_tls(tmp_path, "node-4"), peer_tls(tmp_path, "node-1"), "node-1", "node-4") == b"hello"


@needs_openssl
def test_nobody_else_may_read_them(secrets: Path) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in secrets.rglob("*")}
    assert modes and not any(mode & 0o077 for mode in modes.values()), modes
    assert sorted(path.name for path in (secrets / "node-1").iterdir()) == ["ca.pem", "certificate.pem", "key.pem", "tokens.toml"]


@needs_openssl
def test_the_token_is_what_the_nodes_accept(secrets: Path, tmp_path: Path) -> None:
    token = (secrets / "authority" / "token").read_text().strip()
    assert len(token) == 64
    files = [(secrets / name / "tokens.toml").read_text() for name in NODES]
    assert len(set(files)) == 1 and token not in files[0]
    config = load_config({}, {}, files[0])
    assert [entry.sha256 for entry in config.auth.tokens] == [hashlib.sha256(token.encode()).hexdigest()]
    assert make_secrets(tmp_path, "node-1", CLUSTER_TOKEN="my own").returncode == 0
    (entry,) = tomllib.loads((tmp_path / "node-1" / "tokens.toml").read_text())["auth"]["tokens"]
    assert entry["sha256"] == token_hash("my own")


@needs_openssl
@pytest.mark.parametrize("name", ["", "..", "a/b", "authority", "-x", "a b", "a,DNS:b"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    done = make_secrets(tmp_path / "new", name)
    assert done.returncode == 2 and not (tmp_path / "new").exists(), done.stdout + done.stderr


# -- all of it ------------------------------------------------------------------------------------------------------
def ask(url: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, {"Authorization": "Bearer a token"})
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        return json.load(answer)


def on_loopback(name: str, secrets: Path, ports: dict[str, int]) -> dict[str, str]:
    """The environment of a container, with this machine's addresses and folders in it."""
    environment = image_environment() | compose()["services"][name]["environment"]
    members = [
        {"id": member["id"], "host": "127.0.0.1", "raft_port": ports[member["id"]]}
        for member in json.loads(interpolated(environment["AYDER_CLUSTER__NODES"]))
    ]
    environment = {key: value.replace("/run/ayder", str(secrets / name)) for key, value in environment.items()}
    return environment | {
        "AYDER_CLUSTER__NODES": json.dumps(members),
        "AYDER_HTTP__HOST": "127.0.0.1",
        "AYDER_HTTP__PORT": str(ports[name] + 1),
        "AYDER_STORAGE__DATA_DIR": str(secrets / name / "data"),
    }


@needs_openssl
@pytest.mark.slow
@pytest.mark.chaos
def test_the_nodes_of_compose_are_a_cluster(tmp_path: Path) -> None:
    """Their settings, their certificates and their token, in processes on this machine: a write to one is read from all."""
    assert make_secrets(tmp_path, *NODES, CLUSTER_TOKEN="a token").returncode == 0
    base = free_base_port()
    ports = {name: base + 2 * number for number, name in enumerate(NODES)}
    urls = {name: f"http://127.0.0.1:{port + 1}" for name, port in ports.items()}
    deadline = time.monotonic() + LIMIT_S

    def eventually(attempt: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
        while True:
            try:
                if wanted(answer := attempt()):
                    return answer
            except OSError:
                pass
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-8000:]
            time.sleep(0.05)

    def write() -> Any:
        leader = ask(f"{urls['node-1']}/ready")["leader"]
        return ask(f"{urls[leader or 'node-1']}/broker/topics/orders/produce?partition=0&idempotency_key=one", b"over TLS")

    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("wb"))
        for name in NODES:
            command = [sys.executable, "-m", "ayder", "serve"]
            environment = os.environ | on_loopback(name, tmp_path, ports)
            node = stack.enter_context(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            stack.callback(node.kill)
        for url in urls.values():
            eventually(partial(ask, f"{url}/ready"), lambda answer: bool(answer["ready"]))
        assert eventually(write, lambda answer: bool(answer["ok"]))["synced"]
        for url in urls.values():
            records = partial(ask, f"{url}/broker/topics/orders/0/records?consistency=local")
            page = eventually(records, lambda answer: answer["count"] == 1)
            assert page["messages"][0]["value"] == "over TLS"
