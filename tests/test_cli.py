"""The command line: flags become settings, exit codes, what is printed, the token file. No node is started here."""

import errno
import os
import pathlib
import stat
import subprocess
import sys
import types
from collections.abc import Awaitable, Callable

import pytest
import trio

from ayder import __version__, launch
from ayder.__main__ import greeting, main
from ayder.config import Config, ConfigError, load_config, token_hash
from ayder.errors import StoragePoisoned

ROOT = pathlib.Path(__file__).parent.parent
RunNode = Callable[..., Awaitable[None]]


@pytest.fixture
def in_tmp(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, str]:
    """The effective settings of a command line: path → ``value  # source``."""
    assert main(["check-config", *argv]) == 0
    return dict(line.split(" = ", 1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bind", "[::1]:7", "--data", "d"], {"http.host": '"::1"', "http.port": "7", "storage.data_dir": '"d"'}),
        (["--set", "raft.tick_ms=10", "--set", "http.port=5"], {"raft.tick_ms": "10", "http.port": "5"}),
        (["-p", "8"], {"http.port": "8", "http.host": '"127.0.0.1"'}),
        (["--port", "8", "--http", "10.0.0.1:9"], {"http.port": "8", "http.host": '"10.0.0.1"'}),
        (["--http", ":9"], {"http.port": "9", "http.host": '"127.0.0.1"'}),
        (["--port", "8", "--bind", "127.0.0.1:9", "--set", "http.port=10"], {"http.port": "10"}),
        (["--workers", "1", "--aof", "always"], {"http.port": "1109"}),
    ],
)
def test_flags_become_settings(argv: list[str], expected: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = check(capsys, *argv)
    assert {path: found[path].partition("  # ")[0] for path in expected} == expected


def test_check_config_says_where_each_setting_comes_from(
    in_tmp: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "a.toml").write_text("[http]\nport = 3\nmax_headers = 9\n")
    monkeypatch.setenv("AYDER_CONFIG", "a.toml")
    monkeypatch.setenv("AYDER_HTTP__MAX_HEADERS", "10")
    found = check(capsys, "--data", "x")
    assert found["http.port"] == "3  # file"
    assert found["http.max_headers"] == "10  # environment AYDER_HTTP__MAX_HEADERS"
    assert found["storage.data_dir"] == '"x"  # flag'
    assert found["raft.tick_ms"] == "50  # default"
    assert not (in_tmp / "x").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bind", "7"], "flag --bind 7: expected HOST:PORT"),
        (["--bind", ":7"], "flag --bind :7: expected HOST:PORT"),
        (["--http", "a:b"], "flag --http a:b: expected [HOST]:PORT"),
        (["--port", "x"], "http.port: expected a whole number, got 'x' (from flag)"),
        (["--set", "http.port"], "flag --set http.port: expected SECTION.KEY=VALUE"),
        (["--config", "absent.toml"], "configuration file absent.toml: "),
    ],
)
def test_a_wrong_setting_ends_with_status_2(
    argv: list[str], expected: str, in_tmp: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *argv]) == 2
    assert f"ayder: {expected}" in capsys.readouterr().err


def test_an_unknown_flag_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--prot", "7"])
    assert caught.value.code == 2


def test_flags_that_mean_nothing_here_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "--workers", "4", "--aof", "never"]) == 0
    said = capsys.readouterr().err
    assert "--workers 4" in said
    assert "--aof never" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ayder {__version__}\n"


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_it_refuses_to_run_without_assertions(flag: str) -> None:
    command = [sys.executable, flag, "-m", "ayder", "check-config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "python -O" in done.stderr


def test_the_commands_that_start_nothing_import_no_trio() -> None:
    script = "import sys; from ayder.__main__ import main; main(['check-config']); sys.exit('trio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0


# ---- serve, with a stand-in for the node ----


def serve(monkeypatch: pytest.MonkeyPatch, run_node: RunNode, *argv: str) -> int:
    module = types.ModuleType("ayder.node")
    module.run_node = run_node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ayder.node", module)
    monkeypatch.setattr("ayder.node", module, raising=False)
    return main([*argv])


async def node_that_stops(config: Config, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
    task_status.started("http://127.0.0.1:40000")


def test_a_node_that_stops_cleanly_ends_with_status_0_and_was_announced(
    in_tmp: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(monkeypatch, node_that_stops, "serve") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"ayder {__version__} listens on http://127.0.0.1:40000"
    assert said[1] == "token: dev"
    assert sum(line.startswith("curl ") for line in said) == 3


def test_the_greeting_names_an_address_that_can_be_called(
    in_tmp: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run_node(config: Config, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started(["http://0.0.0.0:7"])

    assert serve(monkeypatch, run_node, "serve", "--bind", "0.0.0.0:0") == 0
    said = capsys.readouterr().out
    assert "listens on http://127.0.0.1:7\n" in said
    assert (in_tmp / "data" / "token").read_text().strip() in said


def test_flags_alone_start_a_node_as_the_predecessor_did(in_tmp: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []

    async def run_node(config: Config, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        seen.append(config)
        task_status.started()

    assert serve(monkeypatch, run_node, "--port", "7", "--aof", "always") == 0
    assert seen[0].http.port == 7


@pytest.mark.parametrize(
    ("error", "expected", "traced"),
    [
        (StoragePoisoned("fdatasync failed: no space"), "ayder: fdatasync failed: no space\n", False),
        (
            ExceptionGroup("", [ExceptionGroup("", [OSError(5, "Input/output error")])]),
            "ayder: [Errno 5] Input/output error\n",
            False,
        ),
        (OSError(errno.EADDRINUSE, "in use"), "ayder: 127.0.0.1:1109 is taken: another process listens there\n", False),
        (ZeroDivisionError("division by zero"), "ayder: ZeroDivisionError: division by zero\n", True),
        (AssertionError(), "ayder: AssertionError: AssertionError\n", True),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_node_that_fails_ends_with_status_1_and_a_sentence(
    error: Exception,
    expected: str,
    traced: bool,
    late: bool,
    in_tmp: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def run_node(config: Config, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        if late:
            task_status.started()
        raise error

    assert serve(monkeypatch, run_node, "serve") == 1
    said = capsys.readouterr().err
    assert said.endswith(expected)
    assert ("Traceback" in said) is traced


def test_ctrl_c_ends_with_status_130_and_no_traceback(
    in_tmp: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run_node(config: Config, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        raise KeyboardInterrupt

    assert serve(monkeypatch, run_node, "serve") == 130
    assert capsys.readouterr().err == ""


def test_check_config_survives_a_reader_that_leaves() -> None:
    script = f"{sys.executable} -m ayder check-config | true; test ${{PIPESTATUS[0]}} -eq 0"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the token of a data directory ----


def open_config(directory: pathlib.Path) -> Config:
    return load_config({"http.host": "0.0.0.0", "storage.data_dir": str(directory)}, {}, None)


def test_a_node_open_to_a_network_makes_a_token_once(tmp_path: pathlib.Path) -> None:
    first, token = launch.with_token(open_config(tmp_path / "d"))
    assert token is not None
    assert len(token) == 32
    assert [one.sha256 for one in first.auth.tokens] == [token_hash(token)]
    assert stat.S_IMODE(os.stat(tmp_path / "d" / "token").st_mode) == 0o600
    assert os.listdir(tmp_path / "d") == ["token"]
    assert launch.with_token(open_config(tmp_path / "d")) == (first, token)


def test_a_configured_token_needs_no_file(tmp_path: pathlib.Path) -> None:
    config = load_config({"storage.data_dir": str(tmp_path / "d")}, {"RF_BEARER_TOKENS": "a"}, None)
    assert launch.with_token(config) == (config, None)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("content", ["", "short\n"])
def test_a_token_file_without_a_token_is_refused(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigError, match="delete it"):
        launch.with_token(open_config(tmp_path))


def test_a_token_that_cannot_be_kept_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="none can be kept"):
        launch.with_token(open_config(tmp_path / "file"))


def test_of_two_that_make_a_token_at_once_both_use_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "token").write_text("x" * 32)
    assert launch._make_token(str(tmp_path / "token")) == "x" * 32
    assert os.listdir(tmp_path) == ["token"]


def test_the_greeting_never_prints_a_configured_token(tmp_path: pathlib.Path) -> None:
    config = load_config({}, {"RF_BEARER_TOKENS": "very-secret"}, None)
    text = "\n".join(greeting(config, None, "http://127.0.0.1:1"))
    assert "very-secret" not in text
    assert "$TOKEN" in text
    config, token = launch.with_token(open_config(tmp_path))
    text = "\n".join(greeting(config, token, "http://127.0.0.1:1"))
    assert f"$(cat {tmp_path / 'token'})" in text


# ---- a member of a cluster ----

NODES = '[{id = "a", host = "127.0.0.1", raft_port = 7000}, {id = "b", host = "127.0.0.1", raft_port = 7002}, '
NODES += '{id = "c", host = "127.0.0.1", raft_port = 7004}]'


def test_the_greeting_of_a_member_names_itself_and_the_others() -> None:
    config = load_config({"cluster.nodes": NODES, "raft.node_id": "b"}, {}, None)
    said = greeting(config, None, "http://127.0.0.1:7003")
    assert said[0].endswith("listens on http://127.0.0.1:7003")
    assert said[1] == "b of cluster ayder, with a http://127.0.0.1:7001, c http://127.0.0.1:7005"
    assert said[2] == "token: dev"
    assert [line.split(" -H ")[0] for line in said[4:]] == ["curl -L --location-trusted"] * 3


def test_a_member_of_a_cluster_of_one_has_nobody_else() -> None:
    config = load_config({"cluster.nodes": NODES.split("},")[0] + "}]", "raft.node_id": "a"}, {}, None)
    assert greeting(config, None, "http://x")[1] == "a of cluster ayder, with nobody else"


def test_a_node_that_is_not_in_its_cluster_does_not_start(in_tmp: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Defect H-14 of the predecessor: it went on alone."""
    assert main(["serve", "--set", f"cluster.nodes={NODES}", "--set", "raft.node_id=d"]) == 2
    assert capsys.readouterr().err == "ayder: raft.node_id: 'd' is not among cluster.nodes (a, b, c)\n"
    assert not (in_tmp / "data").exists()
