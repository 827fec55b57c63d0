"""The three-node script in ``examples/cluster`` runs as a newcomer would run it, sees what it is there to see, and cleans up."""

import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "cluster"
SCRIPT = FOLDER / "08-three-nodes.sh"
LIMIT_S = 100
PORTS = 6


def free_base_port() -> int:
    """The first of six free ports in a row, below those the kernel hands out."""
    while True:
        base = random.randrange(20_000, 32_000)
        with ExitStack() as stack:
            try:
                for port in range(base, base + PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return base


def run(temporary: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One run; whatever the outcome, no process of it listens afterwards and no file is left."""
    temporary.mkdir()
    base = free_base_port()
    settings = {"AYDER": f"{sys.executable} -m ayder", "BASE_PORT": str(base), "TMPDIR": str(temporary)}
    done = subprocess.run(
        ["sh", str(SCRIPT)],
        env=os.environ | settings | environment,
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    assert not list(temporary.iterdir()), "the script leaves files behind"
    for port in range(base, base + PORTS):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"something still listens on {port}"
    return done


@pytest.mark.slow
@pytest.mark.chaos
def test_nothing_is_lost_when_the_leader_is_killed(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    assert [line[:2] for line in done.stdout.splitlines() if line[0] != " "] == [f"{step}." for step in range(1, 8)]
    assert done.stdout.count(": 60 records, ") == 3
    assert done.stdout.endswith("nothing lost, nothing twice, the same bytes everywhere\n")


LYING_CURL = """#!/bin/sh
{curl} "$@" >{answer}
status=$?
case "$*" in *consistency=local*) sed 's/"order 33"/"order 34"/' {answer} ;; *) cat {answer} ;; esac
exit $status
"""


@pytest.mark.slow
@pytest.mark.chaos
def test_a_record_that_is_not_what_was_written_is_noticed(tmp_path: Path) -> None:
    """The check at the end is worth something: a curl that changes one record on the way ends in a failure."""
    liar = tmp_path / "bin" / "curl"
    liar.parent.mkdir()
    liar.write_text(LYING_CURL.format(curl=shutil.which("curl"), answer=tmp_path / "answer"))
    liar.chmod(0o755)
    done = run(tmp_path / "run", PATH=f"{liar.parent}:{os.environ['PATH']}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "node-1 has other records than those that were acknowledged" in done.stderr


@pytest.mark.parametrize("command", ["false", "no-such-command"])
def test_a_node_that_does_not_start_is_said_at_once(tmp_path: Path, command: str) -> None:
    done = run(tmp_path / "run", AYDER=command)
    assert done.returncode == 1
    assert "node-1 has ended" in done.stderr


def test_the_readme_lists_every_script() -> None:
    text = (FOLDER / "README.md").read_text()
    scripts = sorted(FOLDER.glob("[0-9]*"))
    assert scripts == [SCRIPT]
    for script in scripts:
        assert f"]({script.name})" in text
        assert os.access(script, os.X_OK)
