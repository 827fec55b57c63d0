"""What clients do to a node that keeps dying: every kind of call, retried where its outcome is unknown, all of it recorded.

Owns: the mix of calls and what is sent. Must not know: whether an answer was right (``checker.py``), who kills the server.

A client is one task. After an unknown outcome it goes on when the server serves again: with the same idempotency key if the call
had one, else not at all. Calls that must be refused are sent on purpose; their records must never be seen.
"""

from __future__ import annotations

import base64
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import trio

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
    Result,
    RunReceipt,
    Sent,
    Trimmed,
    fingerprint,
)
from tests.chaos.http_client import Connection, NotSent, Reply, Unanswered

__all__ = ["TOPICS", "Traffic", "read_everything", "set_up_topics"]

TOPICS = {"bulk": 4, "trimmed": 2, "aged": 2}
"""Partitions by topic. ``trimmed`` is cut by delete-before, ``aged`` by a size limit."""
AGED_MAX_BYTES = 40_000
GROUPS = ("billing", "search")
TYPED = {"Content-Type": "application/vnd.ayder.records+ndjson"}
ANYTHING = 1 << 62


class Traffic:
    """The clients of one run, and what they need to know of the server."""

    def __init__(self, recorder: Recorder, seed: int, node_id: str) -> None:
        self.recorder = recorder
        self.node_id = node_id
        self.seed = seed
        self.port = 0
        self.serving = trio.Event()
        self.stopping = False
        self.ends: dict[tuple[str, int], int] = defaultdict(int)
        """How many records a partition is known to have."""
        self.statuses: Counter[int] = Counter()

    def server_serves(self, port: int) -> None:
        """From now on it listens here."""
        self.port = port
        self.recorder.process("serving")
        self.serving.set()

    def server_dies(self) -> None:
        """It is about to be killed."""
        self.recorder.process("killed")
        self.serving = trio.Event()

    async def client(self, number: int) -> None:
        """One client, until ``stopping``."""
        client = _Client(self, f"c{number}", random.Random(f"{self.seed}-{number}"))
        await client.run()


class _Client:
    def __init__(self, traffic: Traffic, name: str, chance: random.Random) -> None:
        self._traffic = traffic
        self._recorder = traffic.recorder
        self._name = name
        self._chance = chance
        self._connection = Connection()
        self._values = 0
        self._keys = 0
        self._spent_key: tuple[str, str, str] | None = None
        actions: list[tuple[int, Callable[[], Any]]] = [
            (30, self._single), (20, self._lines), (20, self._typed), (8, self._typed_race), (6, self._refused),
            (20, self._consume), (10, self._read), (4, self._trim),
        ]  # fmt: skip
        self._weights = [weight for weight, _ in actions]
        self._actions = [action for _, action in actions]

    async def run(self) -> None:
        try:
            while not self._traffic.stopping:
                await self._traffic.serving.wait()
                await self._chance.choices(self._actions, self._weights)[0]()
        finally:
            await self._connection.close()

    # -- one call, recorded -------------------------------------------------------------------------------------------
    async def _call(
        self, action: Any, method: str, target: str, decode: Callable[[Any], Result], body: bytes = b"",
        headers: Mapping[str, str] | None = None, connection: Connection | None = None,
    ) -> tuple[str, Result | None]:  # fmt: skip
        """Returns the outcome and, when it is ok, the result."""
        op = self._recorder.invoke(self._name, action)
        try:
            reply = await (connection or self._connection).request(self._traffic.port, method, target, body, headers)
        except NotSent as error:
            self._recorder.complete(op, "refused", detail=str(error))
            await trio.sleep(0.02)
            return "not sent", None
        except Unanswered as error:
            self._recorder.complete(op, "unknown", detail=str(error))
            return "unknown", None
        if reply.headers.get("ayder-node") != self._traffic.node_id:  # our server is dead and its port another program's
            self._recorder.complete(op, "refused", detail="another server")
            await self._connection.close()
            await trio.sleep(0.02)
            return "not sent", None
        self._traffic.statuses[reply.status] += 1
        return self._completed(op, reply, decode)

    def _completed(self, op: int, reply: Reply, decode: Callable[[Any], Result]) -> tuple[str, Result | None]:
        if reply.status == 200:
            result = decode(reply.json)
            self._recorder.complete(op, "ok", status=200, result=result)
            return "ok", result
        said = reply.json
        unknown = reply.status in (500, 504)
        assert said["ok"] is False and said["outcome"] == ("unknown" if unknown else "not_applied"), reply
        self._recorder.complete(op, "unknown" if unknown else "refused", status=reply.status, detail=said["error"])
        return ("unknown" if unknown else "busy" if reply.status == 503 else "refused"), None

    async def _produce(self, action: Produce, target: str, body: bytes, headers: Mapping[str, str] | None = None) -> str:
        """Until the outcome is known, if the call has an idempotency key. Returns the last outcome."""
        while True:
            outcome, result = await self._call(action, "POST", target, _receipt(action), body, headers)
            if isinstance(result, Receipt):
                for run in result.runs:
                    place = (action.topic, run.partition)
                    self._traffic.ends[place] = max(self._traffic.ends[place], run.first_offset + run.count)
            if outcome in ("ok", "refused") or (outcome == "unknown" and action.idempotency_key is None):
                return outcome
            await trio.sleep(0.005)
            await self._traffic.serving.wait()

    # -- what is sent -------------------------------------------------------------------------------------------------
    def _value(self, *, text: bool = False) -> bytes:
        self._values += 1
        size = self._chance.choice((0, 10, 60, 60, 300, 2000))
        filler = self._chance.randbytes(size)
        return f"{self._name}.{self._values} ".encode() + (filler.hex().encode() if text else filler)

    def _key_of_call(self) -> str | None:
        if self._chance.random() < 0.3:
            return None
        self._keys += 1
        return f"{self._name}-{self._keys}"

    def _place(self) -> tuple[str, int]:
        topic = self._chance.choices(list(TOPICS), (6, 2, 1))[0]
        return topic, self._chance.randrange(TOPICS[topic])

    async def _single(self) -> None:
        topic, partition = self._place()
        value, key = self._value(), self._chance.choice((b"", b"k%d" % self._chance.randrange(50), b"\xff\x00?&"))
        headers = {"h": f"v{self._values}"} if self._chance.random() < 0.2 else {}
        idempotency_key = self._key_of_call()
        asked = partition if self._chance.random() < 0.7 else None
        sent = Sent(fingerprint(value, key, headers), asked)
        query = "" if asked is None else f"&partition={asked}"
        query += f"&key={quote(key, safe='')}" if key else ""
        query += "" if idempotency_key is None else f"&idempotency_key={idempotency_key}"
        action = Produce(topic, (sent,), idempotency_key)
        outcome = await self._produce(
            action, f"/broker/topics/{topic}/produce?{query[1:]}", value, {f"Ayder-Header-{k}": v for k, v in headers.items()}
        )
        if outcome == "ok" and idempotency_key is not None and asked is not None:
            self._spent_key = (topic, idempotency_key, query)
            if self._chance.random() < 0.2:  # a retry of what was answered
                await self._produce(action, f"/broker/topics/{topic}/produce?{query[1:]}", value,
                                    {f"Ayder-Header-{k}": v for k, v in headers.items()})  # fmt: skip

    async def _lines(self) -> None:
        topic, partition = self._place()
        values = [self._value(text=True) for _ in range(self._chance.choice((1, 5, 40)))]
        lines = [json.dumps(value.decode()).encode() if self._chance.random() < 0.1 else value for value in values]
        key = self._key_of_call()
        action = Produce(topic, tuple(Sent(fingerprint(value), partition) for value in values), key)
        target = f"/broker/topics/{topic}/produce-ndjson?partition={partition}"
        headers = {} if key is None else {"Idempotency-Key": key}
        await self._produce(action, target, self._chance.choice((b"\n", b"\r\n")).join(lines), headers)

    def _typed_batch(self, key: str | None) -> tuple[Produce, bytes]:
        topic, _ = self._place()
        sent, lines = [], []
        for _ in range(self._chance.choice((2, 6, 30))):
            value, record_key = self._value(), b"k%d" % self._chance.randrange(50)
            partition = self._chance.randrange(TOPICS[topic]) if self._chance.random() < 0.7 else None
            headers = {"h": "x"} if self._chance.random() < 0.2 else {}
            line: dict[str, Any] = {"value_b64": base64.b64encode(value).decode(), "key": record_key.decode()}
            line |= {"headers": headers} if headers else {}
            line |= {} if partition is None else {"partition": partition}
            sent.append(Sent(fingerprint(value, record_key, headers), partition))
            lines.append(json.dumps(line).encode())
        return Produce(topic, tuple(sent), key), b"\n".join(lines)

    async def _typed(self) -> None:
        key = self._key_of_call()
        action, body = self._typed_batch(key)
        await self._produce(action, f"/broker/topics/{action.topic}/produce-ndjson", body, _typed_headers(key))

    async def _typed_race(self) -> None:
        """The same batch with the same key on two connections at once, then until its outcome is known."""
        self._keys += 1
        key = f"{self._name}-{self._keys}"
        action, body = self._typed_batch(key)
        target, other = f"/broker/topics/{action.topic}/produce-ndjson", Connection()
        try:
            async with trio.open_nursery() as nursery:
                for connection in (self._connection, other):
                    nursery.start_soon(
                        self._call, action, "POST", target, _receipt(action), body, _typed_headers(key), connection
                    )
        finally:
            await other.close()
        await self._traffic.serving.wait()
        await self._produce(action, target, body, _typed_headers(key))

    async def _refused(self) -> None:
        """Calls that must be refused whole."""
        value = self._value(text=True)
        match self._chance.randrange(4):
            case 0:
                action = Produce("bulk", (Sent(fingerprint(value)),))
                outcome = await self._produce(action, "/broker/topics/bulk/produce?partition=99", value)
            case 1:
                action, body = self._typed_batch(None)
                target = f"/broker/topics/{action.topic}/produce-ndjson"
                outcome = await self._produce(action, target, body + b'\n{"value":"x","json":1}', TYPED)
            case 2:
                action = Produce("bulk", (Sent(fingerprint(value)), Sent(fingerprint(b"over the limit"))))
                outcome = await self._produce(action, "/broker/topics/bulk/produce-ndjson", value + b"\nover the limit" * 10_000)
            case _:
                await self._reuse_key(value)
                return
        assert outcome in ("refused", "unknown"), (outcome, action)

    async def _reuse_key(self, value: bytes) -> None:
        """An idempotency key with another body. (Were it taken, the checker would see two effects of one key.)"""
        if self._spent_key is not None:
            topic, key, query = self._spent_key
            action = Produce(topic, (Sent(fingerprint(value)),), key)
            await self._produce(action, f"/broker/topics/{topic}/produce?{query[1:]}", value)

    # -- reading and positions ------------------------------------------------------------------------------------------
    async def _consume(self) -> None:
        """Read on for a group, then commit."""
        topic, partition = self._place()
        group = self._chance.choice(GROUPS)
        wait_ms = self._chance.choice((0, 0, 50))
        _, page = await self._call(
            Read(topic, partition, None, group), "GET",
            f"/broker/consume/{topic}/{group}/{partition}?encoding=b64&limit=50&wait_ms={wait_ms}", _page,
        )  # fmt: skip
        if isinstance(page, Page):
            last = page.next_offset - 1 + self._chance.choice((0, 0, 0, -3, 10**6))
            if last >= 0:
                await self._commit(topic, partition, group, last)

    async def _commit(self, topic: str, partition: int, group: str, offset: int) -> None:
        body = {"topic": topic, "group": group, "partition": partition, "offset": offset}
        action = Commit(topic, partition, group, offset)
        await self._call(action, "POST", "/broker/commit", _committed, json.dumps(body).encode())

    async def _read(self) -> None:
        topic, partition = self._place()
        end = self._traffic.ends[topic, partition]
        offset = self._chance.choice((0, end, max(0, end - 20), self._chance.randrange(end + 1)))
        target = f"/broker/topics/{topic}/{partition}/records?encoding=b64&limit=100&offset={offset}"
        await self._call(Read(topic, partition, offset), "GET", target, _page)

    async def _trim(self) -> None:
        partition = self._chance.randrange(TOPICS["trimmed"])
        end = self._traffic.ends["trimmed", partition]
        before = max(0, end - self._chance.choice((100, 30, 3, 0, -(10**6))))
        body = json.dumps({"topic": "trimmed", "partition": partition, "before_offset": before}).encode()
        action = DeleteBefore("trimmed", partition, before)
        await self._call(action, "POST", "/broker/delete-before", lambda said: Trimmed(said["log_start_offset"]), body)


# -- answers ------------------------------------------------------------------------------------------------------------
def _typed_headers(key: str | None) -> dict[str, str]:
    return TYPED if key is None else {**TYPED, "Idempotency-Key": key}


def _receipt(action: Produce) -> Callable[[Any], Receipt]:
    def decode(said: Any) -> Receipt:
        if "results" in said:
            runs = tuple(RunReceipt(one["partition"], one["first_offset"], one["count"]) for one in said["results"])
        elif "first_offset" in said:
            runs = (RunReceipt(said["partition"], said["first_offset"], said["count"]),)
        else:
            runs = (RunReceipt(said["partition"], said["offset"], 1),)
        assert said["ok"] is True, (said, action)
        flags = said["duplicate"], said["sealed"], said["durable"], said["synced"], said["mode"]
        return Receipt(runs, said["batch_id"], *flags)

    return decode


def _page(said: Any) -> Page:
    messages = said["messages"]
    offsets = [message["offset"] for message in messages]
    start = offsets[0] if offsets else said["next_offset"]
    assert offsets == list(range(start, start + len(offsets))) and said["count"] == len(offsets), said
    marks = tuple(
        fingerprint(
            base64.b64decode(message["value_b64"]), base64.b64decode(message.get("key_b64", "")), message.get("headers")
        )
        for message in messages
    )  # fmt: skip
    facts = said["high_watermark"], said["log_start_offset"], said["committed_offset"]
    return Page(start, marks, said["next_offset"], *facts)


def _committed(said: Any) -> Committed:
    return Committed(said["ignored"], said["batch_id"])


# -- before and after -----------------------------------------------------------------------------------------------------
async def set_up_topics(traffic: Traffic) -> None:
    """Create the topics; from here on ``aged`` may lose anything to its size limit."""
    connection = Connection()
    for topic, partitions in TOPICS.items():
        retention = {"max_bytes": AGED_MAX_BYTES} if topic == "aged" else {}
        body = json.dumps({"name": topic, "partitions": partitions, "retention": retention}).encode()
        reply = await connection.request(traffic.port, "POST", "/broker/topics", body)
        assert reply.status == 200, reply
    for partition in range(TOPICS["aged"]):
        traffic.recorder.invoke("size limit", DeleteBefore("aged", partition, ANYTHING))
    await connection.close()


async def read_everything(traffic: Traffic) -> None:
    """Record what every partition and group holds now."""
    connection = Connection()
    try:
        await _read_everything(traffic, connection)
    finally:
        await connection.close()


async def _read_everything(traffic: Traffic, connection: Connection) -> None:
    committed: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for group in GROUPS:
        reply = await connection.request(traffic.port, "GET", f"/broker/groups/{group}")
        for facts in reply.json.get("partitions", ()):
            committed[facts["topic"], facts["partition"]][group] = facts["committed_offset"]
    for topic, partitions in TOPICS.items():
        for partition in range(partitions):
            final = await _read_partition(connection, traffic.port, topic, partition, committed[topic, partition])
            traffic.recorder.final(final)


async def _read_partition(
    connection: Connection, port: int, topic: str, partition: int, committed: dict[str, int]
) -> FinalPartition:
    marks: list[str] = []
    query = "from=earliest"
    start: int | None = None
    while True:
        target = f"/broker/topics/{topic}/{partition}/records?encoding=b64&limit=10000&{query}"
        reply = await connection.request(port, "GET", target)
        assert reply.status == 200, reply
        page = _page(reply.json)
        start = page.start if start is None else start
        marks += page.records
        if page.next_offset >= page.high_watermark or not page.records:
            return FinalPartition(topic, partition, start, page.high_watermark, tuple(marks), committed)
        query = f"offset={page.next_offset}"
