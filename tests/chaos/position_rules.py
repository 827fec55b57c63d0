"""Rules about positions: committed offsets of groups, and where partitions begin.

Owns: L11 and T2. Must not know: how the history came about. Source: RELIABILITY.md G-1 … G-5, T-2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tests.chaos.history import Page, Read, Trimmed
from tests.chaos.operations import Anomaly, LogOperations, RunningMax

__all__ = ["POSITION_RULES"]

_GroupKey = tuple[str, int, str]


# -- groups ---------------------------------------------------------------------------------------------------------
def commits_stay(log: LogOperations) -> Iterator[Anomaly]:
    """L11: what a group committed is never lost, goes back, or comes from nowhere."""
    attempts: dict[_GroupKey, dict[int, int]] = defaultdict(dict)
    floors: dict[_GroupKey, RunningMax] = defaultdict(RunningMax)
    for operation, commit in log.commits():
        if operation.outcome != "refused":
            attempts[commit.topic, commit.partition, commit.group].setdefault(commit.offset, operation.invoked)
    _acknowledged_commits(log, floors)
    for operation, read, page in log.pages():
        if read.group is not None:
            assert operation.completed is not None
            key = (read.topic, read.partition, read.group)
            yield from _committed(key, page.committed, floors[key].before(operation.invoked), attempts[key], operation.completed)
    for (topic, partition), final in log.finals.items():
        groups = {group for t, p, group in attempts if (t, p) == (topic, partition)} | set(final.committed)
        for group in sorted(groups):
            key = (topic, partition, group)
            found = final.committed.get(group)
            yield from _committed(key, found, floors[key].before(1 << 62), attempts[key], 1 << 62)
            if found is not None and found >= final.high_watermark:
                yield Anomaly("L11", f"{key} has committed {found}, beyond the end {final.high_watermark}")


def _acknowledged_commits(log: LogOperations, floors: dict[_GroupKey, RunningMax]) -> None:
    """What each group is known to have committed: by its own commits, and by what reads showed."""
    by_id = {operation.id: commit for operation, commit in log.commits()}
    for operation in log.by_completion:
        assert operation.completed is not None
        commit = by_id.get(operation.id)
        if commit is not None and operation.outcome == "ok":
            floors[commit.topic, commit.partition, commit.group].add(operation.completed, commit.offset)
            continue
        read, page = operation.action, operation.result
        if isinstance(read, Read) and isinstance(page, Page) and read.group is not None and page.committed is not None:
            floors[read.topic, read.partition, read.group].add(operation.completed, page.committed)


def _committed(key: _GroupKey, found: int | None, floor: int, attempts: dict[int, int], until: int) -> Iterator[Anomaly]:
    if (-1 if found is None else found) < floor:
        yield Anomaly("L11", f"{key} is at {found}, {floor} was committed before")
    if found is not None and attempts.get(found, until) >= until:
        yield Anomaly("L11", f"{key} is at {found}, which nobody committed")


def groups_resume(log: LogOperations) -> Iterator[Anomaly]:
    """L11: a group reads on right after what it committed."""
    for operation, read, page in log.pages():
        if read.offset is None and read.group is not None:
            wanted = max(page.log_start_offset, 0 if page.committed is None else page.committed + 1)
            if page.start != wanted:
                yield Anomaly("L11", f"operation {operation.id}: group {read.group} resumes at {page.start}, not {wanted}")


# -- log starts -----------------------------------------------------------------------------------------------------
def trims_stay(log: LogOperations) -> Iterator[Anomaly]:
    """L1 and T2: a log start is where somebody asked for it, and never moves back."""
    asked: dict[tuple[str, int], int] = defaultdict(int)
    for operation, trim in log.trims():
        if operation.outcome != "refused":
            key = (trim.topic, trim.partition)
            asked[key] = max(asked[key], trim.before_offset)
    floors: dict[tuple[str, int], RunningMax] = defaultdict(RunningMax)
    by_id = {operation.id: trim for operation, trim in log.trims()}
    for operation in log.by_completion:
        assert operation.completed is not None
        trim_or_none = by_id.get(operation.id)
        if trim_or_none is not None and isinstance(operation.result, Trimmed):
            key = (trim_or_none.topic, trim_or_none.partition)
            floors[key].add(operation.completed, trim_or_none.before_offset)
            yield from _log_start(key, operation.result.log_start_offset, trim_or_none.before_offset, asked[key])
        elif isinstance(operation.action, Read) and isinstance(operation.result, Page):
            key = (operation.action.topic, operation.action.partition)
            found = operation.result.log_start_offset
            yield from _log_start(key, found, floors[key].before(operation.invoked), asked[key])
            floors[key].add(operation.completed, found)
    for key, final in log.finals.items():
        yield from _log_start(key, final.log_start_offset, floors[key].before(1 << 62), asked[key])


def _log_start(key: tuple[str, int], found: int, floor: int, asked: int) -> Iterator[Anomaly]:
    if found < floor:
        yield Anomaly("T2", f"{key} begins at {found}, it began at {floor} before")
    if found > asked:
        yield Anomaly("L1", f"{key} begins at {found}, nobody asked for more than {asked}")


POSITION_RULES = (commits_stay, groups_resume, trims_stay)
