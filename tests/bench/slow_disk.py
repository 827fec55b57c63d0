"""``ayder`` with a slower disk: ``python -m tests.bench.slow_disk MILLISECONDS serve …`` sleeps that long after each fdatasync.

Meaningless for anything but a feeling: a real disk's syncs vary, and slow down under load.
"""

from __future__ import annotations

import os
import sys
import time

from ayder.__main__ import main
from ayder.storage.files import RealFiles


def slow_down(seconds: float) -> None:
    """Make every ``fdatasync`` of the process take longer; the sleep holds no lock, as the system call holds none."""

    def fdatasync(fd: int) -> None:
        os.fdatasync(fd)
        time.sleep(seconds)

    RealFiles.fdatasync = staticmethod(fdatasync)


if __name__ == "__main__":
    slow_down(float(sys.argv[1]) / 1000)
    sys.exit(main(sys.argv[2:]))
