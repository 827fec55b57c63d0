"""Committed offsets: how far each consumer group has come in each partition.

Owns: the commit rules (forward only, unless reset). Must not know: who reads, where records lie.

Invariants: a committed offset is the last one processed, so reading resumes at +1; "nothing committed" is the absence of an
entry, never a number (G-4); a lower commit is ignored and says so (G-2).
"""

from __future__ import annotations

import attrs

__all__ = ["ConsumerGroups"]


@attrs.define(slots=True, eq=False)
class ConsumerGroups:
    """group name → partition uid → last processed offset."""

    committed: dict[str, dict[int, int]] = attrs.field(factory=dict)

    def get(self, group: str, uid: int) -> int | None:
        """The last processed offset, ``None`` when the group never committed here."""
        offsets = self.committed.get(group)
        return None if offsets is None else offsets.get(uid)

    def commit(self, group: str, uid: int, offset: int, *, reset: bool) -> bool:
        """Move the group forward (anywhere with ``reset``; -1 forgets). Returns False when a backward commit was ignored."""
        offsets = self.committed.setdefault(group, {})
        current = offsets.get(uid)
        if reset and offset < 0:
            offsets.pop(uid, None)
            if not offsets:
                del self.committed[group]
            return True
        if current is not None and offset < current and not reset:
            return False
        offsets[uid] = offset
        return True

    def forget_topic(self, topic_id: int) -> None:
        """The topic was deleted: so are the offsets committed in it."""
        for group in list(self.committed):
            offsets = self.committed[group]
            for uid in [uid for uid in offsets if uid >> 16 == topic_id]:
                del offsets[uid]
            if not offsets:
                del self.committed[group]
