"""Does the SIGKILL loop notice a broken node? Servers with one mistake each, made on purpose, must be found out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest

from tests.chaos.server import Launch, ServerDied, by_serve
from tests.chaos.sigkill import run_sigkill_loop

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

FORGETS_KEYS = """
import msgspec, ayder.state_machine as machine
decode = machine.decode_image

def without_keys(data):
    image = decode(data)
    for topic in image.topics:
        for partition in topic.partitions:
            partition.seen.clear()
    return image

machine.decode_image = without_keys
"""
FORGETS_COMMITS = """
import ayder.state_machine as machine
decode = machine.decode_image

def without_commits(data):
    image = decode(data)
    image.groups.clear()
    return image

machine.decode_image = without_commits
"""
ANSWERS_TOO_EARLY = """
import os, threading
from ayder.storage.files import RealFiles
pread, held, lock = RealFiles.pread, [], threading.Lock()

def catch_up():
    with lock:
        while held:
            os.pwritev(*held.pop(0))

def writes_behind(fd, buffers, position):
    if position < 1000 or len(held) > 20:
        catch_up()
        return os.pwritev(fd, buffers, position)
    held.append((fd, [bytes(part) for part in buffers], position))
    return sum(map(len, buffers))

def pread_it_all(self, *place):
    catch_up()
    return pread(self, *place)

RealFiles.pwritev, RealFiles.pread = staticmethod(writes_behind), pread_it_all
"""
MAIN = "\nimport sys\nfrom ayder.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"


def mutant(code: str) -> Launch:
    def command(data: Path, settings: Mapping[str, str]) -> list[str]:
        return [sys.executable, "-c", code + MAIN, *by_serve.command(data, settings)[3:]]

    return attrs.evolve(by_serve, name="mutant", command=command)


@pytest.mark.parametrize(
    ("code", "expected"),
    [(FORGETS_KEYS, {"L4", "L14"}), (FORGETS_COMMITS, {"L11"}), (ANSWERS_TOO_EARLY, {"L1", "L2", "L6", "L7"})],
    ids=["forgets-keys", "forgets-commits", "answers-too-early"],
)
def test_a_broken_node_is_found_out(code: str, expected: set[str], tmp_path: Path) -> None:
    found: set[str] = set()
    for seed in range(8):  # chance decides what a kill hits; the first anomaly of the kind is enough
        try:
            findings = run_sigkill_loop(tmp_path / str(seed), mutant(code), seed=seed, rounds=4)
        except (AssertionError, ServerDied, BaseExceptionGroup) as noticed:
            print(f"seed {seed}: the node noticed it itself, which is fair, but not what is tested here: {noticed!r:.300}")
            continue
        found |= {anomaly.code for anomaly in findings.anomalies}
        if found & expected:
            return
    raise AssertionError(f"found {found}, not {expected}")
