"""A history as operations: each invocation with its completion, and what the end of the history found, indexed for the rules.

Owns: the indexes. Must not know: a rule. Built in one pass; every look-up is O(1) or O(log n).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import attrs

from tests.chaos.history import (
    Action,
    Commit,
    Completion,
    DeleteBefore,
    Event,
    FinalPartition,
    Invocation,
    Outcome,
    Page,
    Produce,
    Read,
    Receipt,
    Result,
)

__all__ = ["Anomaly", "LogOperations", "Operation", "Place", "RunningMax"]

PartitionKey = tuple[str, int]


@attrs.frozen
class Anomaly:
    """One broken promise; ``code`` is that of RELIABILITY.md 3.6 (``T2``: what was trimmed came back)."""

    code: str
    text: str


@attrs.define
class Operation:
    """``invoked`` and ``completed`` are positions in the history, which is in real-time order."""

    id: int
    client: str
    action: Action
    invoked: int
    completed: int | None = None
    outcome: Outcome = "unknown"
    status: int = 0
    result: Result | None = None


class Place(NamedTuple):
    """Where a record is at the end."""

    topic: str
    partition: int
    offset: int


class RunningMax:
    """The largest value known at a point of the history. Add in order."""

    def __init__(self) -> None:
        self._at: list[int] = []
        self._values: list[int] = []

    def add(self, at: int, value: int) -> None:
        """Known from ``at`` on."""
        self._at.append(at)
        self._values.append(max(value, self._values[-1]) if self._values else value)

    def before(self, at: int, default: int = -1) -> int:
        """The largest value known before ``at``."""
        i = bisect_left(self._at, at)
        return self._values[i - 1] if i else default


class LogOperations:
    """See the module header."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.all: list[Operation] = []
        self.by_completion: list[Operation] = []
        self.finals: dict[PartitionKey, FinalPartition] = {}
        self.process_events: list[str] = []
        self.places: dict[str, list[Place]] = defaultdict(list)
        self.senders: dict[str, list[Operation]] = defaultdict(list)
        self.by_key: dict[tuple[str, str], list[Operation]] = defaultdict(list)
        """Produce calls that share topic, idempotency key and records, in order: one effect is theirs together."""
        self._take(events)
        for final in self.finals.values():
            for offset, mark in enumerate(final.records, final.log_start_offset):
                self.places[mark].append(Place(final.topic, final.partition, offset))

    def _take(self, events: Iterable[Event]) -> None:
        open_operations: dict[int, Operation] = {}
        for at, event in enumerate(events):
            match event:
                case Invocation():
                    self._begin(open_operations, event, at)
                case Completion():
                    operation = open_operations.pop(event.id)
                    operation.completed = at
                    operation.outcome, operation.status, operation.result = event.outcome, event.status, event.result
                    assert (event.outcome == "ok") == (event.result is not None), event
                    self.by_completion.append(operation)
                case FinalPartition():
                    self.finals[event.topic, event.partition] = event
                case _:
                    self.process_events.append(event.what)

    def _begin(self, open_operations: dict[int, Operation], event: Invocation, at: int) -> None:
        operation = open_operations[event.id] = Operation(event.id, event.client, event.action, at)
        self.all.append(operation)
        if isinstance(event.action, Produce):
            for sent in event.action.records:
                self.senders[sent.fingerprint].append(operation)
            if event.action.idempotency_key is not None:
                self.by_key[event.action.topic, event.action.idempotency_key].append(operation)

    # -- views ------------------------------------------------------------------------------------------------------
    def acknowledged(self) -> Iterator[tuple[Operation, Produce, Receipt]]:
        """Produce calls that were answered 2xx, by completion."""
        for operation in self.by_completion:
            if isinstance(operation.action, Produce) and isinstance(operation.result, Receipt):
                yield operation, operation.action, operation.result

    def pages(self) -> Iterator[tuple[Operation, Read, Page]]:
        """Reads that were answered, by completion."""
        for operation in self.by_completion:
            if isinstance(operation.action, Read) and isinstance(operation.result, Page):
                yield operation, operation.action, operation.result

    def commits(self) -> Iterator[tuple[Operation, Commit]]:
        """All commits, by invocation."""
        for operation in self.all:
            if isinstance(operation.action, Commit):
                yield operation, operation.action

    def trims(self) -> Iterator[tuple[Operation, DeleteBefore]]:
        """All calls of delete-before, by invocation."""
        for operation in self.all:
            if isinstance(operation.action, DeleteBefore):
                yield operation, operation.action

    def siblings(self, operation: Operation) -> list[Operation]:
        """The sends of the same thing: this one and, with an idempotency key, its retries. In order."""
        action = operation.action
        assert isinstance(action, Produce)
        if action.idempotency_key is None:
            return [operation]
        return [one for one in self.by_key[action.topic, action.idempotency_key] if _same_records(one, action)]

    def log_start(self, topic: str, partition: int) -> int:
        """At the end; 0 for a partition that was not read."""
        final = self.finals.get((topic, partition))
        return 0 if final is None else final.log_start_offset

    def record_at(self, topic: str, partition: int, offset: int) -> str | None:
        """At the end; ``None`` when there is none (trimmed, beyond the end, not read)."""
        final = self.finals.get((topic, partition))
        at = -1 if final is None else offset - final.log_start_offset
        return final.records[at] if final is not None and 0 <= at < len(final.records) else None


def _same_records(operation: Operation, action: Produce) -> bool:
    assert isinstance(operation.action, Produce)
    return operation.action.records == action.records
