"""What a launch does to its process, seen from inside one that is a node's alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SERVE = """
import trio
from ayder.config import load_config
from ayder.node import run_node
config = load_config({"storage.data_dir": "DIRECTORY", "http.port": "0"}, {}, None)

async def serve():
    async with trio.open_nursery() as nursery:
        await nursery.start(run_node, config)
        report()
        nursery.cancel_scope.cancel()
"""
HYPERCORN = """
import os, trio
os.environ.update(AYDER_STORAGE__DATA_DIR="DIRECTORY", AYDER_LOGGING__LEVEL="error")
from ayder.http import asgi

async def serve():
    async with asgi._open_real_node() as (node, _):
        await node.wait_ready()
        report()
"""
REPORT = """
import gc, sys

def report():
    print(sys.getswitchinterval(), gc.get_freeze_count() > 10000)

trio.run(serve)
"""


@pytest.mark.parametrize("launch", [SERVE, HYPERCORN], ids=["serve", "hypercorn"])
def test_workers_and_the_collector_do_not_hold_the_event_loop_for_long(launch: str, tmp_path: Path) -> None:
    script = launch.replace("DIRECTORY", str(tmp_path / "data")) + REPORT
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "0.0005 True\n", done.stderr
