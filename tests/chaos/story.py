"""Histories written by hand, in a few words."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.history import (
    Commit,
    Committed,
    DeleteBefore,
    FinalPartition,
    Page,
    Produce,
    Read,
    Receipt,
    Recorder,
    RunReceipt,
    Sent,
    Trimmed,
)

__all__ = ["Story"]


class Story:
    """Writes a history by hand. Time is the order of the calls."""

    def __init__(self, directory: Path) -> None:
        self.recorder = Recorder(directory / "history.jsonl", clock_ns=iter(range(1 << 30)).__next__)

    def send(self, *marks: str, key: str | None = None, to: int | None = 0, topic: str = "t") -> int:
        records = tuple(Sent(mark, to) for mark in marks)
        return self.recorder.invoke("a", Produce(topic, records, key))

    def acked(self, op: int, offset: int, batch: int, *, count: int = 1, duplicate: bool = False, partition: int = 0) -> None:
        receipt = Receipt((RunReceipt(partition, offset, count),), batch, duplicate)
        self.recorder.complete(op, "ok", status=200, result=receipt)

    def unknown(self, op: int) -> None:
        self.recorder.complete(op, "unknown")

    def refused(self, op: int) -> None:
        self.recorder.complete(op, "refused", status=503)

    def put(self, mark: str, offset: int, batch: int) -> None:
        self.acked(self.send(mark), offset, batch)

    def three(self) -> None:
        for n, mark in enumerate("xyz"):
            self.put(mark, n, n + 1)

    def begin_read(self, offset: int | None = 0, group: str | None = None) -> int:
        return self.recorder.invoke("r", Read("t", 0, offset, group))

    def end_read(
        self, op: int, marks: str, *, end: int, start: int = 0, log_start: int = 0, committed: int | None = None
    ) -> None:
        page = Page(start, tuple(marks), start + len(marks), end, log_start, committed)
        self.recorder.complete(op, "ok", status=200, result=page)

    def read(self, marks: str, *, end: int, start: int = 0, log_start: int = 0, group: str | None = None,
             committed: int | None = None, asked: int | None = -1) -> None:  # fmt: skip
        asked = start if asked == -1 else asked
        self.end_read(self.begin_read(asked, group), marks, end=end, start=start, log_start=log_start, committed=committed)

    def commit(self, offset: int, *, outcome: str = "ok", group: str = "g", ignored: bool = False) -> None:
        op = self.recorder.invoke("c", Commit("t", 0, group, offset))
        if outcome == "ok":
            self.recorder.complete(op, "ok", status=200, result=Committed(ignored, 99))
        else:
            self.recorder.complete(op, "unknown" if outcome == "unknown" else "refused")

    def trim(self, before: int, *, outcome: str = "ok") -> None:
        op = self.recorder.invoke("d", DeleteBefore("t", 0, before))
        if outcome == "ok":
            self.recorder.complete(op, "ok", status=200, result=Trimmed(before))
        else:
            self.unknown(op)

    def end(self, marks: str, *, start: int = 0, high: int | None = None, partition: int = 0, **committed: int) -> None:
        high = start + len(marks) if high is None else high
        self.recorder.final(FinalPartition("t", partition, start, high, tuple(marks), committed))
