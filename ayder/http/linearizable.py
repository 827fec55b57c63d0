"""What is told about the state of the log must be so now: the step before every linearizable read of a member of a cluster.

Owns: when an answer may be made from this node's memory. Must not know: what is read.

A leader that was deposed and does not know it yet still takes itself for the leader; only a round to a majority tells (ReadIndex,
RELIABILITY R-13). Everything the answer depends on is looked up after that round, what does not exist included.
"""

from __future__ import annotations

from collections.abc import Callable

from ayder.http.context import Context
from ayder.http.exchange import Answer, Response, Work

__all__ = ["linearizable"]


def linearizable(context: Context, read: Callable[[], Response | Work]) -> Answer:
    """The answer of ``read``, made when this node is known to lead. Raises ``AyderError``: not_leader, no_quorum."""
    broker = context.broker
    if not broker.driver.ready:
        raise broker.not_ready()
    if broker.driver.alone:
        return read()

    async def run() -> Response:
        await broker.read_barrier()
        answer = read()
        return await answer.run() if isinstance(answer, Work) else answer

    return Work(run)
