"""The loop: load, SIGKILL at a random instant, restart, go on; at the end read everything and judge.

Owns: when the server dies, what makes a run worth something. Must not know: what clients do, the rules.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from pathlib import Path

import attrs
import trio

from tests.chaos.checker import Anomaly, check
from tests.chaos.history import Completion, Produce, Receipt, Recorder
from tests.chaos.http_client import Connection
from tests.chaos.operations import LogOperations
from tests.chaos.server import Launch, Server
from tests.chaos.workload import Traffic, read_everything, set_up_topics

__all__ = ["Findings", "run_sigkill_loop"]

SERVING_S = 60.0
CALM_DOWN_S = 60.0


@attrs.define
class Findings:
    """What a run did, and what was wrong."""

    anomalies: list[Anomaly]
    lives: int
    killed_while_starting: int
    acknowledged_records: int
    operations: int
    unknown: int
    refused: int
    duplicates: int
    sealed_segments: int
    checkpoints_used: int
    statuses: dict[int, int]
    seconds: float

    def check_worth(self) -> None:
        """A run that proved nothing fails."""
        assert self.acknowledged_records >= 1000, self
        assert self.unknown >= 1 and self.refused >= 1 and self.duplicates >= 1, self
        assert self.sealed_segments >= 1 and self.checkpoints_used >= 1, self


def run_sigkill_loop(
    directory: Path, launch: Launch, *, seed: int, rounds: int | None = None, seconds: float | None = None, clients: int = 12
) -> Findings:
    """Kill the server ``rounds`` times, or until ``seconds`` are over. The history stays in the directory."""
    with Server(directory, launch) as server:
        return trio.run(_Loop(server, seed, rounds, seconds, clients).run, directory)


class _Loop:
    def __init__(self, server: Server, seed: int, rounds: int | None, seconds: float | None, clients: int) -> None:
        self._server = server
        self._chance = random.Random(seed)
        self._seed = seed
        self._rounds = rounds
        self._seconds = seconds
        self._clients = clients
        self._killed_while_starting = 0
        self._checkpoints_used = 0

    async def run(self, directory: Path) -> Findings:
        started = time.monotonic()
        with contextlib.closing(Recorder(directory / "history.jsonl")) as recorder:
            return await self._run(recorder, started)

    async def _run(self, recorder: Recorder, started: float) -> Findings:
        traffic = Traffic(recorder, self._seed, self._server.node_id)
        await self._restart(traffic, may_die=False)
        await set_up_topics(traffic)
        async with trio.open_nursery() as nursery:
            for number in range(self._clients):
                nursery.start_soon(traffic.client, number)
            for _ in self._turns(started):
                await trio.sleep(self._chance.uniform(0.05, 1.0))
                assert self._server.running, self._server.stderr
                traffic.server_dies()
                self._server.kill()
                await self._restart(traffic, may_die=True)
            await trio.sleep(0.3)
            traffic.stopping = True
            nursery.cancel_scope.deadline = trio.current_time() + CALM_DOWN_S
        assert not nursery.cancel_scope.cancelled_caught, "clients did not come to an end"
        await read_everything(traffic)
        sealed = await _sealed_segments(traffic.port)
        return self._findings(recorder, traffic, sealed, started)

    def _turns(self, started: float) -> range | list[None]:
        if self._rounds is not None:
            return range(self._rounds)
        return _Until(started + (self._seconds or 0.0))  # type: ignore[return-value]

    async def _restart(self, traffic: Traffic, *, may_die: bool) -> None:
        """Start; now and then kill it once more while it starts."""
        while True:
            self._checkpoints_used += bool(self._server.checkpoints)
            self._server.spawn()
            if may_die and self._chance.random() < 0.2:
                await trio.sleep(self._chance.uniform(0.1, 0.6))
                if not self._server.said_url():
                    self._killed_while_starting += 1
                    self._server.kill()
                    continue
            await self._serving()
            traffic.server_serves(self._server.port)
            return

    async def _serving(self) -> None:
        with trio.fail_after(SERVING_S):
            while not await trio.to_thread.run_sync(self._server.answers):
                await trio.sleep(0.01)

    def _findings(self, recorder: Recorder, traffic: Traffic, sealed: int, started: float) -> Findings:
        receipts = [
            event.result for event in recorder.events if isinstance(event, Completion) and isinstance(event.result, Receipt)
        ]
        log = LogOperations(recorder.events)
        produced = [operation for operation in log.all if isinstance(operation.action, Produce)]
        used = len(re.findall(r"checkpoint_index=[1-9]", self._server.all_stderr)) or self._checkpoints_used
        return Findings(
            anomalies=check(recorder.events),
            lives=self._server.lives,
            killed_while_starting=self._killed_while_starting,
            acknowledged_records=sum(run.count for receipt in receipts for run in receipt.runs if not receipt.duplicate),
            operations=len(log.all),
            unknown=sum(operation.outcome == "unknown" for operation in produced),
            refused=sum(operation.outcome == "refused" and operation.status > 0 for operation in produced),
            duplicates=sum(receipt.duplicate for receipt in receipts),
            sealed_segments=sealed,
            checkpoints_used=used,
            statuses=dict(sorted(traffic.statuses.items())),
            seconds=round(time.monotonic() - started, 1),
        )


class _Until:
    """Turns until a moment of the monotonic clock."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def __iter__(self) -> _Until:
        return self

    def __next__(self) -> None:
        if time.monotonic() >= self._deadline:
            raise StopIteration


async def _sealed_segments(port: int) -> int:
    connection = Connection()
    reply = await connection.request(port, "GET", "/admin/sealed/status")
    await connection.close()
    assert reply.status == 200, reply
    return int(reply.json["sealed_segments"])
