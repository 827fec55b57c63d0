"""Every script in ``examples/`` runs, as a newcomer would run it, and is listed in its README."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.server import Server

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.sh"))
PROGRAMS = sorted(EXAMPLES.glob("[0-9]*.py"))
LIMIT_S = 120


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node all scripts share, as a newcomer's would be."""
    with Server(tmp_path_factory.mktemp("examples")) as server:
        yield server.start()


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_run(script: Path, url: str) -> None:
    done = run("sh", str(script), URL=url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1. ") and not done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_fail_loudly(script: Path, url: str) -> None:
    done = run("sh", str(script), URL=url, TOKEN="not the token")
    assert done.returncode != 0
    assert done.stderr


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_programs_run(program: Path) -> None:
    done = run(sys.executable, str(program))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5. all batches sent once more" in done.stdout


def test_the_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert len(SCRIPTS) == 6 and len(PROGRAMS) == 1
    for example in (*SCRIPTS, *PROGRAMS):
        assert f"]({example.name})" in text
        assert os.access(example, os.X_OK)
