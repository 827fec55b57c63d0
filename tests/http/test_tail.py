"""SSE tails: what a subscriber receives, when streams end, how fan-out shares its work. Time is a clock the test moves."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import attrs
import msgspec
import pytest
import trio
import trio.testing

import ayder.http.fan_out
import ayder.http.tail
from ayder.errors import AyderError, ErrorCode
from ayder.http.exchange import Response
from tests.http.in_process import Client, running

EVENT_STREAM = {b"accept": b"text/event-stream"}


@attrs.define
class Subscriber:
    """Collects what a stream sends; ``open`` is a gate the client may shut to read nothing."""

    response: Response
    sent: list[bytes] = attrs.field(factory=list)
    open: trio.Event = attrs.field(factory=trio.Event)
    ended: bool = False
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    async def send(self, piece: bytes) -> None:
        self.sent.append(piece)
        await self.open.wait()
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        assert self.response.stream is not None
        with self.scope:
            await self.response.stream(self.send)
            self.ended = True

    @property
    def events(self) -> list[dict[str, str]]:
        """Every event as its fields, comments left out."""
        found = []
        for block in b"".join(self.sent).decode().split("\n\n"):
            lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
            if lines:
                found.append({name: value for name, _, value in lines})
        return found

    @property
    def records(self) -> list[dict[str, Any]]:
        found = []
        for event in self.events:
            if "data" in event and "event" not in event:
                record = msgspec.json.decode(event["data"])
                assert record["offset"] == int(event["id"])
                found.append(record)
        return found

    @property
    def offsets(self) -> list[int]:
        return [record["offset"] for record in self.records]

    @property
    def heartbeats(self) -> int:
        return sum(piece.startswith(b": ") for piece in self.sent)


class Tails:
    """Subscribers of one node, each in a task."""

    def __init__(self, client: Client, nursery: trio.Nursery, clock: trio.testing.MockClock) -> None:
        self.client = client
        self._nursery = nursery
        self._clock = clock

    async def subscribe(self, target: str = "/broker/consume/t/g/0", *, stalled: bool = False, **headers: bytes) -> Subscriber:
        named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
        response = await self.client.ask("GET", target, headers={**EVENT_STREAM, **named})
        assert response.status == 200, response
        subscriber = Subscriber(response)
        if not stalled:
            subscriber.open.set()
        self._nursery.start_soon(subscriber.run)
        await self.settle()
        return subscriber

    async def settle(self) -> None:
        """Until nothing happens any more without time passing."""
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()

    async def after(self, seconds: float) -> None:
        """Let time pass in steps, so that timers fire in their order."""
        for _ in range(max(1, round(seconds / 0.5))):
            self._clock.jump(min(seconds, 0.5))
            await self.settle()

    async def produce(self, *values: bytes, topic: str = "t") -> None:
        await self.client.produce(topic, *values)
        await self.after(0.5)


@contextlib.asynccontextmanager
async def tails(clock: trio.testing.MockClock, **settings: object) -> AsyncIterator[Tails]:
    async with running(**settings) as client, trio.open_nursery() as nursery:
        await client.post("/broker/topics", {"name": "t", "partitions": 2})
        yield Tails(client, nursery, clock)
        nursery.cancel_scope.cancel()


async def test_a_tail_begins_where_a_page_would_and_goes_on(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        await t.client.produce("t", b"0", b"1")
        subscriber = await t.subscribe()
        assert subscriber.response.content_type == b"text/event-stream"
        assert subscriber.events[0] == {"retry": "1000"}
        await t.produce(b"2")
        await t.produce("drei \n ü".replace("\n", "").encode())
        assert subscriber.offsets == [0, 1, 2, 3]
        assert [record["value"] for record in subscriber.records] == ["0", "1", "2", "drei  ü"]
        assert not subscriber.ended


async def test_line_breaks_and_bytes_in_values_do_not_break_events(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        values = [b"a\n\nb\r\ndata: x\n\n", b"\xff\n\n", b"", b'{"a":"\\n"}']
        for value in values:
            await t.client.call("POST", "/broker/topics/t/produce?partition=0", value, ok=200)
        subscriber = await t.subscribe("/broker/consume/t/g/0?encoding=b64")
        assert [base64.b64decode(record["value_b64"]) for record in subscriber.records] == values
        text = await t.subscribe("/broker/topics/t/0/records")
        assert text.records[0]["value"] == values[0].decode() and "value_b64" in text.records[1]


async def test_where_it_may_begin(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        await t.client.produce("t", *(b"%d" % number for number in range(5)))
        await t.client.post("/broker/commit", {"topic": "t", "group": "g", "partition": 0, "offset": 2})
        for target, expected in (
            ("/broker/consume/t/g/0", [3, 4]),
            ("/broker/consume/t/g/0?from=earliest", [0, 1, 2, 3, 4]),
            ("/broker/consume/t/g/0?from=latest", []),
            ("/broker/consume/t/g/0?offset=4", [4]),
            ("/broker/topics/t/0/records?from=tail:2", [3, 4]),
        ):
            assert (await t.subscribe(target)).offsets == expected
        resumed = await t.subscribe("/broker/consume/t/g/0?from=earliest", last_event_id=b"1")
        assert resumed.offsets == [2, 3, 4]


@pytest.mark.parametrize("raw", [b"x", b"-1", b"1.0", b"1 2", b"99999999999999999999"])
async def test_a_last_event_id_that_is_no_offset_is_400(raw: bytes, mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        reply = await t.client.call("GET", "/broker/consume/t/g/0", headers={**EVENT_STREAM, b"last-event-id": raw})
        assert reply.status == 400


async def test_resuming_behind_the_end_is_refused_not_waited_for(mock_clock: trio.testing.MockClock) -> None:
    """The topic the client remembers was deleted and made again: waiting would skip its records in silence."""
    async with tails(mock_clock) as t:
        await t.client.produce("t", b"0", b"1")
        exact = await t.subscribe(last_event_id=b"1")
        assert exact.offsets == []
        reply = await t.client.call("GET", "/broker/consume/t/g/0", headers={**EVENT_STREAM, b"last-event-id": b"2"})
        assert reply.status == 409 and reply.json()["high_watermark"] == 2


async def test_what_cannot_be_tailed_is_refused_with_its_status(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        for target, status in (("/broker/consume/none/g/0", 404), ("/broker/consume/t/g/7", 404), ("/broker/consume/t/g/x", 400)):
            assert (await t.client.call("GET", target, headers=EVENT_STREAM)).status == status


async def test_silence_is_filled_with_heartbeats(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        subscriber = await t.subscribe()
        await t.after(8)
        assert subscriber.heartbeats == 0
        await t.after(7)
        assert subscriber.heartbeats == 1
        await t.after(60)
        assert 4 <= subscriber.heartbeats <= 7
        await t.produce(b"0")
        assert subscriber.offsets == [0]


async def test_records_keep_heartbeats_away(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        subscriber = await t.subscribe()
        for number in range(8):
            await t.produce(b"%d" % number)
            await t.after(4)
        assert subscriber.heartbeats == 0 and subscriber.offsets == list(range(8))


async def test_it_ends_cleanly_when_the_topic_is_deleted(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        await t.client.produce("t", b"0")
        readers = [await t.subscribe() for _ in range(3)]
        await t.client.call("DELETE", "/broker/topics/t", ok=200)
        await t.after(0.5)
        for reader in readers:
            assert reader.ended and reader.events[-1] == {"event": "end", "data": '{"reason":"topic_deleted"}'}


async def test_it_ends_cleanly_when_the_node_stops(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        subscriber = await t.subscribe()
        t.client.node.broker.shutting_down = True
        await t.after(2)
        assert subscriber.ended and subscriber.events[-1]["data"] == '{"reason":"shutting_down"}'
        t.client.node.broker.shutting_down = False


async def test_it_ends_cleanly_when_the_leader_changes(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        subscriber = await t.subscribe()
        t.client.node.driver.consensus.current_term += 1
        await t.after(2)
        assert subscriber.ended and subscriber.events[-1]["data"] == '{"reason":"leader_changed"}'


async def test_what_retention_took_is_announced_and_a_resume_agrees(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        await t.client.produce("t", *(b"%d" % number for number in range(10)))
        await t.client.post("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 7})
        late = await t.subscribe(last_event_id=b"2")
        skipped = late.events[1]
        assert skipped == {"id": "6", "event": "skipped", "data": '{"from":3,"log_start_offset":7}'}
        assert late.offsets == [7, 8, 9]
        assert (await t.subscribe(last_event_id=skipped["id"].encode())).offsets == [7, 8, 9]


async def test_a_slow_subscriber_holds_one_piece_and_reads_on_later(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        slow = await t.subscribe(stalled=True)
        fast = await t.subscribe()
        for number in range(50):
            await t.produce(b"%03d" % number + b"x" * 5000)
        assert fast.offsets == list(range(50))
        assert slow.sent == [b"retry: 1000\n\n"]
        slow.open.set()
        await t.after(1)
        assert slow.offsets == list(range(50))
        assert max(map(len, slow.sent)) < 2 * ayder.http.tail.MAX_PIECE_BYTES


async def test_a_slow_subscriber_learns_what_it_missed(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        slow = await t.subscribe(stalled=True)
        await t.produce(*(b"%d" % number for number in range(10)))
        await t.client.post("/broker/delete-before", {"topic": "t", "partition": 0, "before_offset": 8})
        slow.open.set()
        await t.after(1)
        assert slow.offsets == [8, 9]
        assert '{"from":0,"log_start_offset":8}' in [event.get("data") for event in slow.events]


async def test_subscribers_who_keep_up_share_every_encoding(
    mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = ayder.http.fan_out.encode_messages
    monkeypatch.setattr(ayder.http.fan_out, "encode_messages", lambda page, *, b64: made.append(page) or real(page, b64=b64))
    async with tails(mock_clock) as t:
        readers = [await t.subscribe() for _ in range(40)]
        for number in range(10):
            await t.produce(b"%d" % number, b"again")
        assert all(reader.offsets == list(range(20)) for reader in readers)
        assert len(made) == 10
        assert all(reader.sent[1] is readers[0].sent[1] for reader in readers)


async def test_records_that_come_close_together_leave_together(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        readers = [await t.subscribe() for _ in range(100)]
        await t.produce(b"first")
        before = len(readers[0].sent)
        await t.client.produce("t", b"a")
        await t.settle()
        mock_clock.jump(0.001)
        for value in (b"b", b"c", b"d"):
            await t.client.produce("t", value)
            await t.settle()
        await t.after(0.5)
        assert readers[0].offsets == [0, 1, 2, 3, 4]
        assert len(readers[0].sent) - before <= 2


async def test_one_subscriber_waits_for_nobody(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        subscriber = await t.subscribe()
        await t.produce(b"0")
        await t.after(0.5)
        await t.client.produce("t", b"1")
        await t.settle()
        assert subscriber.offsets == [0, 1]


async def test_those_who_begin_at_different_offsets_all_receive_everything(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        readers = []
        for number in range(30):
            readers.append(
                (number, await t.subscribe(f"/broker/topics/t/0/records?offset={number}&encoding={'b64' if number % 2 else ''}"))
            )
            await t.produce(b"%d" % number)
        for first, reader in readers:
            assert reader.offsets == list(range(first, 30))


async def test_hanging_up_frees_the_subscriber_and_the_others_go_on(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock, http__max_stream_subscribers=3) as t:
        first, second, third = [await t.subscribe() for _ in range(3)]
        refused = await t.client.call("GET", "/broker/consume/t/g/0", headers=EVENT_STREAM)
        assert (refused.status, refused.json()["error"]) == (503, "overloaded")
        first.scope.cancel()  # the pacer: another one takes over
        await t.settle()
        await t.produce(b"0")
        assert second.offsets == third.offsets == [0] and first.offsets == []
        fourth = await t.subscribe()
        assert fourth.offsets == [0]
        for each in (second, third, fourth):
            each.scope.cancel()
        await t.settle()
        gauges = (await t.client.call("GET", "/metrics")).body
        assert b"ayder_stream_subscribers 0.0" in gauges


async def test_partitions_do_not_wake_each_other(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        zero, one = await t.subscribe("/broker/consume/t/g/0"), await t.subscribe("/broker/consume/t/g/1")
        await t.client.produce("t", b"x", partition=1)
        await t.after(0.5)
        assert (zero.offsets, one.offsets) == ([], [0]) and len(zero.sent) == 1


async def test_the_memo_of_encodings_is_bounded(mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ayder.http.fan_out, "MEMO_BYTES", 20_000)
    async with tails(mock_clock) as t:
        subscriber = await t.subscribe()
        for number in range(30):
            await t.produce(b"%d" % number + b"x" * 3000)
        fan_out = t.client.node.application._context.fan_out
        assert fan_out._memo_bytes <= 20_000 and sum(len(piece.data) for piece in fan_out._memo.values()) <= 20_000
        late = await t.subscribe("/broker/consume/t/g/0?from=earliest")
        assert subscriber.offsets == late.offsets == list(range(30))


async def test_old_records_are_read_from_the_disk_once_for_all(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock, storage__tail_cache_bytes=0, storage__read_cache_bytes=0) as t:
        await t.client.produce("t", *(b"%d" % number + b"x" * 100 for number in range(20)))
        await t.client.produce("t", b"newest")
        gate = trio.Event()
        fetcher = t.client.node.application._context.fetcher
        real = fetcher.fetch

        async def slow_disk(*arguments: Any) -> Any:
            await gate.wait()
            return await real(*arguments)

        fetcher.fetch = slow_disk
        readers = [await t.subscribe() for _ in range(10)]
        gate.set()
        while len(readers[-1].offsets) < 21:
            await t.settle()
        await t.settle()
        assert all(reader.offsets == list(range(21)) for reader in readers)
        assert fetcher.cold_reads <= 3


async def test_a_damaged_record_ends_the_stream_with_its_error(mock_clock: trio.testing.MockClock) -> None:
    async with tails(mock_clock) as t:
        subscriber = await t.subscribe()
        fetcher = t.client.node.application._context.fetcher

        def lost(*_arguments: Any) -> Any:
            raise AyderError(ErrorCode.STORAGE_DAMAGED, "lost", offset=0)

        fetcher.from_memory = lost
        await t.produce(b"0")
        assert subscriber.ended
        assert subscriber.events[-1] == {"event": "error", "data": '{"error":"storage_damaged","message":"lost","offset":0}'}
