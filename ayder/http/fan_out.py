"""Fan-out: who of many subscribers of a partition is woken when, and the encoded pieces they share.

Owns: the hub of each partition that has subscribers, the pace of wakes, the memo of encoded pieces. Must not know: routes,
requests, how a stream reaches its client (``tail.py``).

Fan-out costs one task switch and one send per subscriber and wake, because subscribers of a partition move together. One of them,
the pacer, waits for new records, then for the pause that is due, and sets the *frontier*: nobody reads past it, so all who keep
up stand at the same offset after each wake and share one encoding. The pause grows with the number of subscribers, so a single
one sees a record at once and five hundred cost no more than the machine has.

Invariants: the memo holds at most ``MEMO_BYTES`` and only immutable records; when a pacer is cancelled another subscriber takes
over; a hub lives exactly as long as it has subscribers.
"""

from __future__ import annotations

from typing import Final

import trio

from ayder.broker import Broker
from ayder.fetch import Fetcher, Page
from ayder.http.pages import encode_messages
from ayder.partition import Partition

__all__ = ["HEARTBEAT_S", "POLL_S", "FanOut", "Hub"]

HEARTBEAT_S: Final = 10.0
POLL_S: Final = 1.0
"""How long a silent stream may take to notice that the node is stopping."""
PAUSE_PER_SUBSCRIBER_S: Final = 0.0001
"""A wake costs some 25 µs of this process per subscriber, so fan-out takes about a quarter of a core at any number of them."""
MAX_PAUSE_S: Final = 0.25
MAX_PIECE_RECORDS: Final = 1000
MEMO_BYTES: Final = 8 << 20
_PIECE_OVERHEAD_BYTES: Final = 300


class Piece:
    """Consecutive records, encoded. ``data`` is empty when retention took them all."""

    __slots__ = ("count", "data", "next_offset")

    def __init__(self, page: Page, *, b64: bool) -> None:
        messages = encode_messages(page, b64=b64)
        self.data = b"".join([b"id: %d\ndata: %b\n\n" % event for event in enumerate(messages, page.start_offset)])
        self.count = page.count
        self.next_offset = page.next_offset


_PieceKey = tuple[int, int, int, bool]
"""Partition uid, first offset, byte limit, base64."""


class FanOut:
    """All tails of one node: the hubs by partition, and the pieces their subscribers share."""

    def __init__(self, broker: Broker, fetcher: Fetcher) -> None:
        self.subscribers = 0
        self._broker = broker
        self._fetcher = fetcher
        self._hubs: dict[int, Hub] = {}
        self._memo: dict[_PieceKey, Piece] = {}
        self._memo_bytes = 0
        self._making: dict[_PieceKey, trio.Event] = {}

    def join(self, partition: Partition) -> Hub:
        """The partition's hub, with one subscriber more."""
        hub = self._hubs.get(partition.uid)
        if hub is None:
            hub = self._hubs[partition.uid] = Hub(self._broker, self._fetcher, partition)
        hub.subscribers += 1
        self.subscribers += 1
        return hub

    def leave(self, hub: Hub) -> None:
        """One subscriber less."""
        hub.subscribers -= 1
        self.subscribers -= 1
        if not hub.subscribers:
            del self._hubs[hub.partition.uid]

    async def piece(self, hub: Hub, start: int, limit_bytes: int, *, b64: bool) -> Piece | None:
        """Records from ``start`` up to the frontier; ``None`` when retention has moved the log start past it.

        Does not wait when the records are in memory. Raises ``AyderError`` (storage_damaged).
        """
        key = (hub.partition.uid, start, limit_bytes, b64)
        while (found := self._memo.get(key)) is None and key in self._making:
            await self._making[key].wait()
        if found is not None:
            return found
        page = hub.fetcher.from_memory(hub.partition, start, _records(hub, start), limit_bytes)
        if page is None:
            page = await self._read(key, hub, start, limit_bytes)
        if page.start_offset > start:
            return None
        piece = Piece(page, b64=b64)
        self._remember(key, piece)
        return piece

    async def _read(self, key: _PieceKey, hub: Hub, start: int, limit_bytes: int) -> Page:
        """From the disk, once for all who wait for the same piece."""
        self._making[key] = trio.Event()
        try:
            return await hub.fetcher.fetch(hub.partition, start, _records(hub, start), limit_bytes)
        finally:
            self._making.pop(key).set()

    def _remember(self, key: _PieceKey, piece: Piece) -> None:
        if key in self._memo:
            return
        self._memo[key] = piece
        self._memo_bytes += len(piece.data) + _PIECE_OVERHEAD_BYTES
        while self._memo_bytes > MEMO_BYTES:
            self._memo_bytes -= len(self._memo.pop(next(iter(self._memo))).data) + _PIECE_OVERHEAD_BYTES


def _records(hub: Hub, start: int) -> int:
    return min(hub.frontier - start, MAX_PIECE_RECORDS)


class Hub:
    """Wakes the subscribers of one partition together."""

    def __init__(self, broker: Broker, fetcher: Fetcher, partition: Partition) -> None:
        self.partition = partition
        self.frontier = partition.next_offset
        """Nobody reads at or past this offset before the next wake."""
        self.subscribers = 0
        self.broker = broker
        self.fetcher = fetcher
        self._term = broker.driver.consensus.current_term
        self._pacing = False
        self._woken = trio.Event()
        self._woken_at = 0.0

    @property
    def end_reason(self) -> str:
        """Why streams of this partition must end now; empty while they go on."""
        if not self.fetcher.is_live(self.partition):
            return "topic_deleted"
        if self.broker.shutting_down:
            return "shutting_down"
        driver = self.broker.driver
        return "" if driver.ready and driver.consensus.current_term == self._term else "leader_changed"

    async def wait(self) -> None:
        """Until the frontier moved, the streams must end, or it is time to look after heartbeats."""
        if self._pacing:
            await self._woken.wait()
            return
        self._pacing = True
        try:
            await self._pace()
        finally:
            self._pacing = False
            self.frontier = self.partition.next_offset
            self._woken_at = trio.current_time()
            woken, self._woken = self._woken, trio.Event()
            woken.set()

    async def _pace(self) -> None:
        deadline = trio.current_time() + HEARTBEAT_S / 2
        while self.partition.next_offset <= self.frontier and not self.end_reason:
            now = trio.current_time()
            if now >= deadline:
                return
            with trio.move_on_at(min(deadline, now + POLL_S)):
                await self.broker.grown(self.partition.uid).wait()
        pause = min(self.subscribers * PAUSE_PER_SUBSCRIBER_S, MAX_PAUSE_S)
        await trio.sleep_until(max(trio.current_time(), self._woken_at + pause))
