"""Produce: one record, a batch of lines, a batch of typed records; answered when they are durable and applied.

Owns: reading the request, the receipt. Must not know: how a record gets into the log (``broker``), sockets.

The hot path is one bare value a request: no task is started and none is woken for it. The handler leaves a waiter with the
broker; applying the block makes the waiter's receipt and the front sends it from there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial

import attrs
import msgspec
import trio

from ayder.broker import Broker
from ayder.errors import AyderError, ErrorCode
from ayder.http.context import Context
from ayder.http.errors import error_response
from ayder.http.exchange import Answer, Deferred, Request, Response, Work
from ayder.http.ndjson import TypedRecord, checked_headers, parse_records, split_lines
from ayder.http.params import Query, invalid
from ayder.http.routes import Body, Route, Scope
from ayder.pending import AppendWaiter
from ayder.records import Record, check_name
from ayder.runs import encode_records, encode_run
from ayder.topics import Topic, partition_for_key

__all__ = ["ROUTES"]

_RECORDS_TYPE = b"application/vnd.ayder.records+ndjson"
_HEADER_PREFIX = b"ayder-header-"
_MEMO_ENTRIES = 1024


@attrs.frozen(slots=True)
class _Options:
    """The query of a produce call, typed. Those without a key are remembered by their raw query."""

    partition: int | None
    key: bytes
    idempotency_key: bytes
    timeout_ns: int
    """0: as configured."""
    ack: str
    timing: bool
    receipt: bool
    plain: bool
    """Neither timing nor receipt nor ack asked for: the shortest receipt."""


_options_memo: dict[bytes, _Options] = {}


def _options(context: Context, raw: bytes) -> _Options:
    found = _options_memo.get(raw)
    if found is not None:
        return found
    query, topics = Query(raw), context.config.topics
    timeout_ms = query.integer("timeout_ms", 0, most=3_600_000) or 0
    timing, receipt = query.flag("timing"), query.flag("receipt")
    ack = query.text("ack", "", choices=("leader", "majority", "all"))
    options = _Options(
        partition=query.integer("partition", None, most=(1 << 31) - 1),
        key=query.raw("key", max_bytes=topics.max_key_bytes),
        idempotency_key=query.raw("idempotency_key", max_bytes=topics.max_idempotency_key_bytes),
        timeout_ns=timeout_ms * 1_000_000,
        ack=ack,
        timing=timing,
        receipt=receipt,
        plain=not (timing or receipt or ack),
    )
    if not options.key and not options.idempotency_key and len(raw) < 64:
        if len(_options_memo) >= _MEMO_ENTRIES:
            _options_memo.clear()
        _options_memo[raw] = options
    return options


class _Receipt(Deferred):
    """Waits for one run and becomes its receipt."""

    __slots__ = ("_batch", "_context", "_level", "_options", "_partition", "_started_ns", "deadline_ns", "done", "early")

    def __init__(self, context: Context, options: _Options, topic: Topic, partition: int, now_ns: int, *, batch: bool) -> None:
        super().__init__()
        self.deadline_ns = now_ns + (options.timeout_ns or context.config.http.default_produce_timeout_ms * 1_000_000)
        self.done = False
        self._context = context
        self._options = options
        self._level = _level(context, topic, options)
        self.early = self._level == "leader"
        self._partition = partition
        self._started_ns = now_ns
        self._batch = batch

    def appended(self, base_offset: int, count: int, log_index: int, duplicate: bool) -> None:
        """See ``pending.AppendWaiter``."""
        claims = self._context.broker.claims
        body = self._body(base_offset, count, log_index, claims, b"true" if duplicate else b"false")
        if self._level == "majority" and self._options.plain:
            self.resolve(Response(200, body))
            return
        _answer_at(self, self._context.broker, self._level, self._options, self._started_ns, body, log_index, self.deadline_ns)

    def written(self, base_offset: int, count: int, log_index: int) -> None:
        """See ``pending.AppendWaiter``."""
        broker = self._context.broker
        body = self._body(base_offset, count, log_index, broker.claims.replace(b'"durable":true', b'"durable":false'), b"false")
        durable = "leader" if broker.store.survives_restart else False
        ack: dict[str, object] = {"level": "leader", "durable": durable, "committed": False, "offset_provisional": True}
        facts = _facts(broker, ack, self._options, self._started_ns, log_index)
        self.resolve(Response(200, body[:-1] + facts + b"}"))

    def _body(self, base_offset: int, count: int, log_index: int, claims: bytes, duplicate: bytes) -> bytes:
        if self._batch:
            head = b'{"ok":true,"first_offset":%d,"count":%d,' % (base_offset, count)
        else:
            head = b'{"ok":true,"offset":%d,' % base_offset
        return b'%b"partition":%d,"batch_id":%d,%b,"duplicate":%b}' % (head, self._partition, log_index, claims, duplicate)

    def failed(self, error: AyderError) -> None:
        """See ``pending.AppendWaiter``."""
        self.resolve(error_response(error))


_LEVELS = {"async": "leader", "sync-majority": "majority", "sync-all": "all"}
"""What a write mode means where a request asks for no ``ack``."""


def _level(context: Context, topic: Topic, options: _Options) -> str:
    """How far the records must have come before the answer: as asked, else as the topic has it, else the cluster."""
    return options.ack or _LEVELS[topic.write_mode or context.config.cluster.write_mode]


def _answer_at(
    receipt: Deferred,
    broker: Broker,
    level: str,
    options: _Options,
    started_ns: int,
    body: bytes,
    log_index: int,
    deadline_ns: int,
) -> None:
    """The records are committed and applied: answer now, or when every voter has them.

    Who asked for less is told what was reached. One who asked for every copy and does not get it is told that the records stand.
    """
    asked_all = level == "all"

    def answer(everywhere: bool) -> None:
        if asked_all and not everywhere:
            receipt.resolve(error_response(_copies_missing(broker, log_index)))
            return
        reached: dict[str, object] = {"level": "all" if asked_all else "majority"}
        ack = reached if options.receipt or options.ack or level != "majority" else None
        facts = _facts(broker, ack, options, started_ns, log_index)
        receipt.resolve(Response(200, body[:-1] + facts + b"}"))

    if asked_all and broker.driver.consensus.everywhere_index < log_index:
        broker.every_copy.add(log_index, deadline_ns, answer)
    else:
        answer(True)


def _copies_missing(broker: Broker, log_index: int) -> AyderError:
    consensus = broker.driver.consensus
    copies, voters = consensus.copies(log_index), len(consensus.voters)
    return AyderError(
        ErrorCode.COMMIT_TIMEOUT,
        f"committed, so it stands; but {copies} of {voters} voters are known to have it on disk, and all were asked for",
        committed=True,
        replicas=f"{copies}/{voters}",
        batch_id=log_index,
    )


def _facts(broker: Broker, ack: dict[str, object] | None, options: _Options, started_ns: int, log_index: int) -> bytes:
    """What ``timing=1``, ``receipt=1`` and ``ack=`` add to a receipt: JSON fields, each beginning with a comma."""
    facts = b""
    if ack is not None:
        consensus = broker.driver.consensus
        ack |= {"copies": consensus.copies(log_index), "voters": len(consensus.voters)}
        ack |= {"term": _term_of(broker, log_index), "index": log_index}
        facts += b',"ack":' + msgspec.json.encode(ack)
    if options.timing:
        total_us = (time.monotonic_ns() - started_ns) // 1000
        sync_us = min(total_us, int(broker.driver.last_append_s * 1e6))
        timing = {
            "queue_us": total_us - sync_us,
            "recv_parse_us": 0,
            "server_us": total_us,
            "produce_us": total_us,
            "sync_wait_us": sync_us,
        }
        facts += b"," + msgspec.json.encode(timing)[1:-1]
    return facts


def _term_of(broker: Broker, log_index: int) -> int | None:
    """The term of an applied entry: a duplicate's may be an older one; ``None`` when the log no longer holds it."""
    consensus = broker.driver.consensus
    if log_index >= consensus.term_start_index:
        return consensus.current_term
    try:
        return broker.store.term_at(log_index)
    except LookupError:
        return None


# -- one record ---------------------------------------------------------------------------------------------------
@attrs.frozen(slots=True)
class _Prepared:
    """What the head of a produce call says, checked."""

    topic: str
    options: _Options
    idempotency_key: bytes
    headers: tuple[tuple[str, bytes], ...]
    bare: bool
    """No key, no headers, no idempotency key: the record is its value."""


def produce(context: Context, request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``POST /broker/topics/{topic}/produce``: the body is the value."""
    _demand_ready(context.broker)
    memo = request.memo
    prepared = memo.prepared if memo is not None else None
    if not isinstance(prepared, _Prepared):
        prepared = _prepare(context, request, parameters)
        if memo is not None:
            memo.prepared = prepared
    topic = context.broker.state.catalogue.by_name.get(prepared.topic)
    if topic is not None:
        return _submit_one(context, prepared, topic, request.body)
    options = prepared.options
    submit = partial(_submit_one, context, prepared, value=request.body)
    return _create_first(context, prepared.topic, submit, options, options.partition)


def _demand_ready(broker: Broker) -> None:
    """Before anything is judged: a follower's catalogue may be old, so what a topic allows is the leader's to say."""
    if not broker.driver.ready:
        raise broker.not_ready()


def _prepare(context: Context, request: Request, parameters: tuple[bytes, ...]) -> _Prepared:
    options = _options(context, request.query)
    idempotency_key = _idempotency_key(context, options, request.headers)
    headers = _record_headers(context, request.headers)
    topic = parameters[0].decode("utf-8", "replace")
    return _Prepared(topic, options, idempotency_key, headers, bare=not (options.key or idempotency_key or headers))


def _submit_one(context: Context, prepared: _Prepared, topic: Topic, value: bytes) -> _Receipt:
    options, broker = prepared.options, context.broker
    number = _partition(broker, topic, options.partition, options.key, prepared.idempotency_key)
    receipt = _Receipt(context, options, topic, number, time.monotonic_ns(), batch=False)
    if prepared.bare:
        broker.produce_value(topic, number, value, receipt)
    else:
        record = Record(value, options.key, prepared.headers)
        producer = _producer(prepared.idempotency_key, value)
        broker.produce_records(topic, number, (record,), receipt, producer=producer)
    return receipt


def _record_headers(context: Context, headers: dict[bytes, bytes]) -> tuple[tuple[str, bytes], ...]:
    found = [
        (name[len(_HEADER_PREFIX) :].decode("latin-1"), value)
        for name, value in headers.items()
        if name.startswith(_HEADER_PREFIX)
    ]
    return checked_headers(found, context.config.topics.max_headers_per_record) if found else ()


def _idempotency_key(context: Context, options: _Options, headers: dict[bytes, bytes]) -> bytes:
    key = options.idempotency_key or headers.get(b"idempotency-key", b"")
    if len(key) > context.config.topics.max_idempotency_key_bytes:
        raise invalid(
            "Idempotency-Key", f"must be at most {context.config.topics.max_idempotency_key_bytes} bytes, got {len(key)}"
        )
    return key


def _producer(idempotency_key: bytes, body: bytes) -> bytes:
    """The producer section of a run: what recognises a retry."""
    return hashlib.blake2b(body, digest_size=16).digest() + idempotency_key if idempotency_key else b""


def _partition(broker: Broker, topic: Topic, asked: int | None, key: bytes, idempotency_key: bytes) -> int:
    """The partition a record goes to. A retry must find the same one, so an idempotency key alone chooses like a key."""
    if asked is not None:
        if not 0 <= asked < len(topic.partitions):
            broker.partition(topic, asked)
        return asked
    if idempotency_key and not key:
        return partition_for_key(idempotency_key, len(topic.partitions))
    return broker.choose_partition(topic, key)


# -- topics that are not there yet --------------------------------------------------------------------------------
def _with_topic(
    context: Context, raw_name: bytes, submit: Callable[[Topic], Deferred], options: _Options, asked: int | None
) -> Answer:
    """Submit at once if the topic exists; else create it first. ``asked`` is the highest partition the request names."""
    name = raw_name.decode("utf-8", "replace")
    topic = context.broker.state.catalogue.by_name.get(name)
    return submit(topic) if topic is not None else _create_first(context, name, submit, options, asked)


def _create_first(
    context: Context, raw_name: str, submit: Callable[[Topic], Deferred], options: _Options, asked: int | None
) -> Answer:
    """Create the topic, as producing always has, then submit. A request that must fail then creates nothing."""
    name = check_name("topic", raw_name)
    if not context.config.topics.auto_create:
        context.broker.topic(name)
    partitions = context.config.topics.default_partitions
    if asked is not None and not 0 <= asked < partitions:
        raise AyderError(
            ErrorCode.PARTITION_NOT_FOUND,
            f"topic {name!r} would be created with partitions 0 to {partitions - 1}, not {asked}",
            topic=name,
            partition=asked,
        )
    return Work(lambda: _create_then(context, name, submit, options.timeout_ns // 1_000_000 or None))


async def _create_then(context: Context, name: str, submit: Callable[[Topic], Deferred], timeout_ms: int | None) -> Response:
    if name not in context.broker.state.catalogue.by_name:
        command = context.broker.creation_of(name, context.config.topics.default_partitions)
        try:
            await context.broker.execute(command, timeout_ms=timeout_ms)
        except AyderError as error:
            if error.code is not ErrorCode.TOPIC_EXISTS:  # somebody else created it meanwhile, with another count: fine
                raise
    answer = submit(context.broker.topic(name))
    if answer.response is None:
        resolved = trio.Event()
        answer.when_resolved = resolved.set
        await resolved.wait()
    assert answer.response is not None
    return answer.response


# -- batches ------------------------------------------------------------------------------------------------------
def produce_ndjson(context: Context, request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``POST /broker/topics/{topic}/produce-ndjson``: one record a line, all or nothing, contiguous."""
    _demand_ready(context.broker)
    content_type = request.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if content_type == _RECORDS_TYPE:
        return _produce_typed(context, request, parameters)
    options = _options(context, request.query)
    idempotency_key = _idempotency_key(context, options, request.headers)
    lines = split_lines(request.body, context.config.topics.max_batch_records)
    broker = context.broker

    def submit(topic: Topic) -> _Receipt:
        number = _partition(broker, topic, options.partition, b"", idempotency_key)
        receipt = _Receipt(context, options, topic, number, time.monotonic_ns(), batch=True)
        producer = _producer(idempotency_key, request.body)
        run = encode_run(topic.topic_id, number, lines.count, lines.ends, lines.values, gap=lines.gap, producer=producer)
        broker.produce_run(topic.partitions[number].uid, run, receipt)
        return receipt

    return _with_topic(context, parameters[0], submit, options, options.partition)


class _PartReceipt:
    """Waits for one run of a typed batch."""

    __slots__ = ("_batch", "_partition", "deadline_ns", "done", "early")

    def __init__(self, batch: _BatchReceipt, partition: int) -> None:
        self.deadline_ns = batch.deadline_ns
        self.done = False
        self.early = False
        self._batch = batch
        self._partition = partition

    def appended(self, base_offset: int, count: int, log_index: int, duplicate: bool) -> None:
        """See ``pending.AppendWaiter``."""
        self._batch.part(
            {"partition": self._partition, "first_offset": base_offset, "count": count, "duplicate": duplicate}, log_index
        )

    def written(self, base_offset: int, count: int, log_index: int) -> None:
        """See ``pending.AppendWaiter``. Never told: a typed batch is answered whole, at its commit."""

    def failed(self, error: AyderError) -> None:
        """See ``pending.AppendWaiter``."""
        self._batch.refuse(error)


class _BatchReceipt(Deferred):
    """Waits for every run of a typed batch; the first failure is the batch's, for its runs share one block and one verdict."""

    __slots__ = ("_context", "_left", "_level", "_options", "_results", "_started_ns", "deadline_ns")

    def __init__(self, context: Context, options: _Options, topic: Topic, runs: int, now_ns: int) -> None:
        super().__init__()
        self.deadline_ns = now_ns + (options.timeout_ns or context.config.http.default_produce_timeout_ms * 1_000_000)
        self._context = context
        self._options = options
        self._level = _level(context, topic, options)
        self._left = runs
        self._results: list[dict[str, object]] = []
        self._started_ns = now_ns

    def part(self, result: dict[str, object], log_index: int) -> None:
        """One run was applied."""
        self._results.append(result)
        self._left -= 1
        if self._left or self.response is not None:
            return
        count = sum(int(str(each["count"])) for each in self._results)
        first = self._results[0]
        receipt = {
            "ok": True,
            "first_offset": first["first_offset"],
            "count": count,
            "partition": first["partition"],
            "batch_id": log_index,
            **msgspec.json.decode(b"{%b}" % self._context.broker.claims),
            "duplicate": all(each["duplicate"] for each in self._results),
            "results": self._results,
        }
        body, broker = msgspec.json.encode(receipt), self._context.broker
        _answer_at(self, broker, self._level, self._options, self._started_ns, body, log_index, self.deadline_ns)

    def refuse(self, error: AyderError) -> None:
        """One run failed."""
        if self.response is None:
            self.resolve(error_response(error))


def _produce_typed(context: Context, request: Request, parameters: tuple[bytes, ...]) -> Answer:
    options = _options(context, request.query)
    idempotency_key = _idempotency_key(context, options, request.headers)
    topics = context.config.topics
    records = parse_records(
        request.body,
        max_records=topics.max_batch_records,
        max_key_bytes=topics.max_key_bytes,
        max_headers=topics.max_headers_per_record,
    )
    broker = context.broker

    def submit(topic: Topic) -> _BatchReceipt:
        groups = _by_partition(broker, topic, records, options, idempotency_key)
        receipt = _BatchReceipt(context, options, topic, len(groups), time.monotonic_ns())
        waiters: list[AppendWaiter] = [_PartReceipt(receipt, number) for number in groups]
        runs = [(topic.partitions[number].uid, encode_records(topic.topic_id, number, group)) for number, group in groups.items()]
        broker.produce_batch(runs, waiters, producer=_producer(idempotency_key, request.body))
        return receipt

    asked = [options.partition if number is None else number for _, number in records]
    return _with_topic(context, parameters[0], submit, options, _out_of_place(asked))


def _out_of_place(asked: list[int | None]) -> int | None:
    """The partition named that is least likely to exist: a negative one, else the highest; ``None`` when none is named."""
    named = [number for number in asked if number is not None]
    return min(named) if named and min(named) < 0 else max(named, default=None)


def _by_partition(
    broker: Broker, topic: Topic, records: list[TypedRecord], options: _Options, idempotency_key: bytes
) -> dict[int, list[Record]]:
    groups: dict[int, list[Record]] = {}
    for record, asked in records:
        number = options.partition if asked is None else asked
        number = _partition(broker, topic, number, record.key, idempotency_key)
        groups.setdefault(number, []).append(record)
    return groups


ROUTES = (
    Route("POST", "/broker/topics/{topic}/produce", produce, Scope("produce", 0), Body.PRODUCE, "Append one record"),
    Route("POST", "/broker/topics/{topic}/produce-ndjson", produce_ndjson, Scope("produce", 0), Body.PRODUCE, "Append a batch"),
)
