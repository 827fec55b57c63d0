"""Two nodes never work on one directory (D-19), and a dead one does not keep it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ayder.storage.directory_lock import DirectoryInUse, DirectoryLock

HOLD = """
import sys
from ayder.storage.directory_lock import DirectoryLock
lock = DirectoryLock(sys.argv[1])
print("held", flush=True)
input()
"""


def test_a_second_holder_is_refused_with_the_first_ones_number(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path / "made"), pytest.raises(DirectoryInUse, match=f"in use by process {os.getpid()}"):
        DirectoryLock(tmp_path / "made")
    with DirectoryLock(tmp_path / "made") as lock:
        lock.close()
        lock.close()
        DirectoryLock(tmp_path / "made").close()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(DirectoryInUse, match=f"process {process.pid}"):
            DirectoryLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        DirectoryLock(tmp_path).close()


def test_without_a_number_in_the_file_the_message_still_helps(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(DirectoryInUse, match="another process"):
            DirectoryLock(tmp_path)
