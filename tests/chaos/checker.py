"""Judges a history of one node: was every answer true?

Owns: the rules about records. Those about groups and log starts are in ``position_rules.py``. Must not know: how the history came
about. Every rule is a function from the indexed history to anomalies; all of them together are O(n log n).

Codes: L1 lost, L2 moved, L3 two reads differ, L4 more than one effect, L5 refused but there, L6 phantom, L7 gap or reuse of
offsets, L8 real-time order, L9 stale read, L10 batch torn, L11 commits, L14 an answer claims too much, T2 trimmed records back.
Source: RELIABILITY.md 3.6, P-1 … P-4, I-2, I-3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from tests.chaos.history import Event, Page, Produce, Read, Receipt
from tests.chaos.operations import Anomaly, LogOperations, Operation, RunningMax
from tests.chaos.position_rules import POSITION_RULES

__all__ = ["Anomaly", "check"]


def check(events: Iterable[Event]) -> list[Anomaly]:
    """Every anomaly of a complete history."""
    log = LogOperations(events)
    return [anomaly for rule in RULES for anomaly in rule(log)]


# -- acknowledged records ------------------------------------------------------------------------------------------
def acknowledged_records(log: LogOperations) -> Iterator[Anomaly]:
    """L1, L2: what was acknowledged is where the receipt says."""
    for operation, action, receipt in log.acknowledged():
        sent = {one.fingerprint: one.partition for one in action.records}
        missing = set(sent)
        trimmed = 0
        for run in receipt.runs:
            start = log.log_start(action.topic, run.partition)
            trimmed += max(0, min(start, run.first_offset + run.count) - run.first_offset)
            for offset in range(max(start, run.first_offset), run.first_offset + run.count):
                found = log.record_at(action.topic, run.partition, offset)
                where = f"{action.topic}/{run.partition} at {offset}, acknowledged by operation {operation.id}"
                if found is None:
                    yield Anomaly("L1", f"nothing is in {where}")
                elif found not in sent:
                    yield Anomaly("L2", f"{found}, another record, is in {where}")
                elif sent[found] not in (None, run.partition):
                    yield Anomaly("L2", f"{found} was sent to partition {sent[found]} and is in {where}")
                missing.discard(found or "")
        lost = [mark for mark in missing if mark not in log.places]
        if len(lost) > trimmed:
            yield Anomaly("L1", f"{len(lost)} records of operation {operation.id} are gone, {trimmed} were trimmed: {lost[:3]}")


def one_effect(log: LogOperations) -> Iterator[Anomaly]:
    """L4: a record is there as often as it was sent without an idempotency key, once with one."""
    for mark, places in log.places.items():
        senders = log.senders.get(mark, ())
        keyed = any(isinstance(one.action, Produce) and one.action.idempotency_key is not None for one in senders)
        allowed = 1 if keyed else sum(one.outcome != "refused" for one in senders)
        if len(places) > max(1, allowed):
            yield Anomaly("L4", f"{mark} is there {len(places)} times: {places[:3]}")
    for (topic, key), operations in log.by_key.items():
        receipts = [one.result for one in operations if isinstance(one.result, Receipt)]
        if len({receipt.runs for receipt in receipts}) > 1:
            yield Anomaly("L4", f"key {key} of {topic} was acknowledged at {[receipt.runs for receipt in receipts][:3]}")
        if sum(not receipt.duplicate for receipt in receipts) > 1:
            yield Anomaly("L4", f"key {key} of {topic} was acknowledged as new more than once")


def refused_stay_away(log: LogOperations) -> Iterator[Anomaly]:
    """L5: what was refused is nowhere, not even for a moment."""
    for mark, senders in log.senders.items():
        if mark in log.places and all(one.outcome == "refused" for one in senders):
            yield Anomaly("L5", f"{mark} was refused (status {senders[0].status}) and is at {log.places[mark][0]}")
    for operation, action, page in log.pages():
        for mark in page.records:
            senders = log.senders.get(mark, [])
            if senders and all(one.outcome == "refused" for one in senders):
                yield Anomaly("L5", f"{mark} was refused; operation {operation.id} read it in {action.topic}/{action.partition}")


# -- reads ----------------------------------------------------------------------------------------------------------
def no_phantoms(log: LogOperations) -> Iterator[Anomaly]:
    """L6: what is read was sent before, and stays."""
    for mark, places in log.places.items():
        if mark not in log.senders:
            yield Anomaly("L6", f"nobody sent {mark}, found at {places[0]}")
    for operation, action, page in log.pages():
        assert operation.completed is not None
        for offset, mark in enumerate(page.records, page.start):
            where = f"{action.topic}/{action.partition} at {offset} by operation {operation.id}"
            senders = log.senders.get(mark)
            if not senders:
                yield Anomaly("L6", f"nobody sent {mark}, read in {where}")
            elif senders[0].invoked > operation.completed:
                yield Anomaly("L6", f"{mark} was read in {where} before it was sent")
            if offset >= log.log_start(action.topic, action.partition):
                now = log.record_at(action.topic, action.partition, offset)
                if now != mark:
                    yield Anomaly("L6", f"{mark} was read in {where}; at the end {now} is there")


def reads_agree(log: LogOperations) -> Iterator[Anomaly]:
    """L3: an offset holds the same record for everybody, for ever."""
    seen: dict[tuple[str, int, int], str] = {}
    for operation, action, page in log.pages():
        for offset, mark in enumerate(page.records, page.start):
            first = seen.setdefault((action.topic, action.partition, offset), mark)
            if first != mark:
                where = f"{action.topic}/{action.partition} at {offset}"
                yield Anomaly("L3", f"operation {operation.id} read {mark} in {where}, an earlier one read {first}")


def reads_are_fresh(log: LogOperations) -> Iterator[Anomaly]:
    """L9: a read knows of everything acknowledged, or read, before it began."""
    known: dict[tuple[str, int], RunningMax] = defaultdict(RunningMax)
    for operation in log.by_completion:
        assert operation.completed is not None
        if isinstance(operation.result, Receipt) and isinstance(operation.action, Produce):
            for run in operation.result.runs:
                known[operation.action.topic, run.partition].add(operation.completed, run.first_offset + run.count)
        elif isinstance(operation.result, Page) and isinstance(operation.action, Read):
            key = (operation.action.topic, operation.action.partition)
            floor = known[key].before(operation.invoked, 0)
            if operation.result.high_watermark < floor:
                yield Anomaly("L9", f"operation {operation.id} saw {key} end at {operation.result.high_watermark}, not {floor}")
            known[key].add(operation.completed, operation.result.high_watermark)


# -- offsets --------------------------------------------------------------------------------------------------------
def offsets_are_dense(log: LogOperations) -> Iterator[Anomaly]:
    """L7: no gap, no offset given twice, a page is one stretch that begins where it was asked to."""
    for key, final in log.finals.items():
        if final.log_start_offset + len(final.records) != final.high_watermark:
            yield Anomaly("L7", f"{key} has {len(final.records)} records from {final.log_start_offset} to {final.high_watermark}")
    for operation, action, page in log.pages():
        if page.next_offset != page.start + len(page.records) or page.next_offset > max(page.high_watermark, page.start):
            yield Anomaly("L7", f"operation {operation.id}: {len(page.records)} from {page.start}, next {page.next_offset}")
        if action.offset is not None and page.start != action.offset:
            yield Anomaly("L7", f"operation {operation.id} asked for {action.offset} and got a page from {page.start}")
    yield from _reused_offsets(log)


def _reused_offsets(log: LogOperations) -> Iterator[Anomaly]:
    taken: dict[tuple[str, int, int], Operation] = {}
    for operation, action, receipt in log.acknowledged():
        for run in receipt.runs:
            for offset in range(run.first_offset, run.first_offset + run.count):
                other = taken.setdefault((action.topic, run.partition, offset), operation)
                assert isinstance(other.action, Produce)
                if other.action.records != action.records:
                    where = f"{action.topic}/{run.partition} at {offset}"
                    yield Anomaly("L7", f"operations {other.id} and {operation.id} were both given {where}")


def real_time_order(log: LogOperations) -> Iterator[Anomaly]:
    """L8: acknowledged before the other was sent, so before it in the partition; batch ids likewise, over all partitions."""
    floors: dict[tuple[str, int], RunningMax] = defaultdict(RunningMax)
    for operation, action, receipt in log.acknowledged():
        assert operation.completed is not None
        for run in receipt.runs:
            floors[action.topic, run.partition].add(operation.completed, run.first_offset)
    for mark, places in log.places.items():
        senders = log.senders.get(mark)
        for topic, partition, offset in places if senders else ():
            assert senders is not None
            floor = floors[topic, partition].before(senders[0].invoked)
            if floor >= offset:
                yield Anomaly("L8", f"{mark} is at {offset} of {topic}/{partition}, {floor} was acknowledged before it was sent")
    yield from _batch_ids(log)


def _batch_ids(log: LogOperations) -> Iterator[Anomaly]:
    floor = RunningMax()
    for operation, _, receipt in log.acknowledged():
        assert operation.completed is not None
        first = log.siblings(operation)[0]
        if not receipt.duplicate and receipt.batch_id <= floor.before(first.invoked, 0):
            known = floor.before(first.invoked)
            yield Anomaly("L8", f"operation {operation.id} has batch_id {receipt.batch_id}, {known} was known before it was sent")
        floor.add(operation.completed, receipt.batch_id)


# -- batches and claims ---------------------------------------------------------------------------------------------
def batches_are_whole(log: LogOperations) -> Iterator[Anomaly]:
    """L10: all records of a call or none, side by side, in order."""
    for operation in log.all:
        action = operation.action
        if not isinstance(action, Produce) or len(action.records) < 2:
            continue
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for nth, sent in enumerate(action.records):
            for topic, partition, offset in log.places.get(sent.fingerprint, ())[:1]:
                if topic == action.topic:
                    found[partition].append((offset, nth))
        there = sum(len(run) for run in found.values())
        if there < len(action.records) and there and not _begins_trimmed(log, action.topic, found):
            yield Anomaly("L10", f"{there} of {len(action.records)} records of operation {operation.id} are there")
        for partition, run in found.items():
            offsets = [offset for offset, _ in run]
            if offsets != list(range(offsets[0], offsets[0] + len(offsets))):
                yield Anomaly("L10", f"operation {operation.id} is at {offsets[:5]}… of partition {partition}: not one stretch")


def _begins_trimmed(log: LogOperations, topic: str, found: dict[int, list[tuple[int, int]]]) -> bool:
    """Whether missing records may be those below a log start: their partition's rest begins there, or nothing is left of it."""
    trimmed = [key for key, final in log.finals.items() if key[0] == topic and final.log_start_offset > 0]
    return any(partition not in found or found[partition][0][0] == log.log_start(topic, partition) for _, partition in trimmed)


def claims_are_true(log: LogOperations) -> Iterator[Anomaly]:
    """L14: durable means durable, a duplicate had a first, a count is what was sent."""
    for operation, action, receipt in log.acknowledged():
        said = (receipt.mode, receipt.sealed, receipt.durable, receipt.synced)
        if said not in (("sealed", True, True, True), ("rocket", False, False, None)):
            yield Anomaly("L14", f"operation {operation.id} was told {said}")
        if receipt.sealed and receipt.batch_id <= 0:
            yield Anomaly("L14", f"operation {operation.id} was told batch_id {receipt.batch_id}")
        if receipt.duplicate and not _had_a_first(log, operation):
            yield Anomaly("L14", f"operation {operation.id} was told it is a duplicate; it is the first")
        if sum(run.count for run in receipt.runs) != len(action.records):
            yield Anomaly("L14", f"operation {operation.id} sent {len(action.records)} records and was told {receipt.runs}")
    for operation, read, page in log.pages():
        final = log.finals.get((read.topic, read.partition))
        if final is not None and page.high_watermark > final.high_watermark:
            where = f"{read.topic}/{read.partition}"
            yield Anomaly("L14", f"operation {operation.id} saw {where} end at {page.high_watermark}, not {final.high_watermark}")


def _had_a_first(log: LogOperations, operation: Operation) -> bool:
    """Whether another send of the same thing had begun when this one was answered."""
    assert operation.completed is not None
    return any(one is not operation and one.invoked < operation.completed for one in log.siblings(operation))


RULES: tuple[Callable[[LogOperations], Iterator[Anomaly]], ...] = (
    acknowledged_records,
    one_effect,
    refused_stay_away,
    no_phantoms,
    reads_agree,
    reads_are_fresh,
    offsets_are_dense,
    real_time_order,
    batches_are_whole,
    claims_are_true,
    *POSITION_RULES,
)
