"""Judges the history of a cluster: the rules of one node for all that is linearizable, and what local reads must still keep.

Owns: which rule holds for which reads. Must not know: how the history came about.

A local read may be old, so it is exempt from freshness (L9) and from what is known of positions (L11, T2). It must not show what
was refused or never sent (L5, L6), differ from any other read (L3), or skip (L7); and until a node starts again, what it shows
never becomes less (C-4).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from tests.chaos.checker import RULES, Anomaly, no_phantoms, offsets_are_dense, reads_agree, refused_stay_away
from tests.chaos.history import Completion, Event, FinalPartition, Invocation, Page, ProcessEvent, Read
from tests.chaos.operations import LogOperations
from tests.cluster.clients import LOCAL, STARTS

__all__ = ["check_cluster", "local_reads_go_on", "nodes_agree", "one_leader_a_term"]

RULES_OF_ALL_READS = (refused_stay_away, no_phantoms, reads_agree, offsets_are_dense)


def check_cluster(events: Iterable[Event]) -> list[Anomaly]:
    """Every anomaly of a complete history."""
    events = list(events)
    local = {event.id for event in events if isinstance(event, Invocation) and event.client.startswith(LOCAL)}
    linearizable = LogOperations([event for event in events if getattr(event, "id", None) not in local])
    everything = LogOperations(events)
    strict = [anomaly for rule in RULES for anomaly in rule(linearizable)]
    loose = [anomaly for rule in RULES_OF_ALL_READS for anomaly in rule(everything)]
    return [*strict, *(anomaly for anomaly in loose if anomaly not in strict), *local_reads_go_on(events)]


def local_reads_go_on(events: Iterable[Event]) -> Iterator[Anomaly]:
    """C-4. A node that starts may show less than before: it applies again what it learns to be committed."""
    asked: dict[int, tuple[str, str, int]] = {}
    ends: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
    for event in events:
        match event:
            case Invocation(client=client, action=Read(topic=topic, partition=partition)) if client.startswith(LOCAL):
                asked[event.id] = (client.removeprefix(LOCAL), topic, partition)
            case Completion(result=Page(high_watermark=end)) if event.id in asked:
                node, topic, partition = asked.pop(event.id)
                floor = ends[node].setdefault((topic, partition), end)
                if end < floor:
                    yield Anomaly("C4", f"{node} showed {topic}/{partition} up to {floor}, then to {end} (operation {event.id})")
                ends[node][topic, partition] = max(end, floor)
            case ProcessEvent(what=what) if what.startswith(STARTS):
                ends.pop(what.removeprefix(STARTS), None)


def nodes_agree(held: Mapping[str, Mapping[tuple[str, int], FinalPartition]]) -> Iterator[Anomaly]:
    """L3 between nodes: when the faults are over, all hold the same."""
    names = sorted(held)
    for name in names[1:]:
        for key, final in held[names[0]].items():
            other = held[name][key]
            if other != final:
                facts = [(one.log_start_offset, one.high_watermark) for one in (final, other)]
                differ = sum(a != b for a, b in zip(final.records, other.records, strict=False))
                yield Anomaly("L3", f"{key} on {names[0]} and {name}: (start, end) {facts}, {differ} records differ")


def one_leader_a_term(leaders: Mapping[int, set[str]]) -> Iterator[Anomaly]:
    """R-1."""
    for term, names in leaders.items():
        if len(names) > 1:
            yield Anomaly("R1", f"{sorted(names)} led in term {term}")
