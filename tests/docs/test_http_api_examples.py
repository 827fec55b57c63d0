"""docs/http-api.md runs: every block, in the order of the page, against one fresh node; answers are what the page shows."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT, Example, examples, text_of

EXAMPLES = list(examples(text_of("http-api.md")))
PRELUDE, CALLS = EXAMPLES[0], EXAMPLES[1:]
ANYTHING = "…"
VARYING = re.compile(r"batch_id|last_synced_batch_id|term|\w*index|timestamp_ms|\w+_us|sealed_bytes\w*")
"""Numbers under these names differ from run to run."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, pathlib.Path]]:
    """The URL of a node of its own, and a directory for what the examples write."""
    directory = tmp_path_factory.mktemp("node")
    command = [sys.executable, "-m", "ayder", "serve", "--bind", "127.0.0.1:0", "--data", str(directory / "data")]
    with (
        open(directory / "log", "w+") as log,
        subprocess.Popen(
            command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            greeting = process.stdout.readline()
            assert " listens on " in greeting, (directory / "log").read_text()
            yield greeting.rpartition(" ")[2].strip(), directory
            process.terminate()
            assert process.wait(timeout=30) == 0, (directory / "log").read_text()
        finally:
            process.kill()


def run(example: Example, url: str, directory: pathlib.Path) -> str:
    """What the block prints. It must end well and say nothing on standard error."""
    if example.language == "python":
        command = [sys.executable, "-c", example.code]
    else:
        prelude = PRELUDE.code.replace("http://127.0.0.1:1109", url)
        assert url in prelude
        command = ["sh", "-eu", "-c", prelude + example.code]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def fits(shown: object, got: object, name: str = "") -> bool:
    """Whether an answer is what the page shows."""
    if shown == ANYTHING:
        return True
    if isinstance(shown, dict) and isinstance(got, dict):
        return shown.keys() == got.keys() and all(fits(shown[key], got[key], key) for key in shown)
    if isinstance(shown, list) and isinstance(got, list):
        if shown and shown[-1] == ANYTHING:
            shown, got = shown[:-1], got[: len(shown) - 1]
        return len(shown) == len(got) and all(map(fits, shown, got))
    if VARYING.fullmatch(name):
        return type(shown) is type(got) is int
    return type(shown) is type(got) and shown == got


def text_fits(shown: str, got: str) -> bool:
    pattern = ".+?".join(re.escape(part) for part in shown.rstrip("\n").split(ANYTHING))
    return re.fullmatch(pattern, got.rstrip("\n")) is not None


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are curl calls")
def test_every_example_answers_what_the_page_shows(node: tuple[str, pathlib.Path]) -> None:
    for example in CALLS:
        got = run(example, *node)
        if example.shown_as == "json":
            assert fits(json.loads(example.shown), json.loads(got)), f"http-api.md line {example.line}: answered {got}"
        else:
            assert text_fits(example.shown, got), f"http-api.md line {example.line}: printed {got!r}"


def test_every_call_shows_its_answer() -> None:
    assert len(CALLS) > 30
    silent = [example.line for example in CALLS if not example.shown_as and " -o " not in example.code]
    assert silent == []


@pytest.mark.parametrize(
    ("shown", "got", "expected"),
    [
        ({"ok": True, "batch_id": 5}, {"ok": True, "batch_id": 9}, True),
        ({"ok": True, "batch_id": 5}, {"ok": True, "batch_id": "9"}, False),
        ({"ok": True, "batch_id": 5}, {"ok": True, "batch_id": True}, False),
        ({"offset": 5}, {"offset": 6}, False),
        ({"ok": True}, {"ok": 1}, False),
        ({"ok": 1}, {"ok": 1, "more": 2}, False),
        ({"ok": 1, "more": 2}, {"ok": 1}, False),
        ({"a": "…"}, {"a": [1]}, True),
        ({"a": "…"}, {}, False),
        ([1, "…"], [1, 2, 3], True),
        ([1, "…"], [2, 2, 3], False),
        ([1, 2], [1], False),
        ([1, "…"], [], False),
    ],
)
def test_the_comparison_tells_answers_apart(shown: object, got: object, expected: bool) -> None:
    assert fits(shown, got) is expected


@pytest.mark.parametrize(
    ("shown", "got", "expected"),
    [("a …, b\n", "a 12, b", True), ("a …, b", "a , b", False), ("a.b", "axb", False), ("a", "ab", False)],
)
def test_the_comparison_tells_texts_apart(shown: str, got: str, expected: bool) -> None:
    assert text_fits(shown, got) is expected
