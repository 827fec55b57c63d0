"""Topics over HTTP: create, list, describe, delete; retention and delete-before.

Owns: the requests and replies of these calls. Must not know: how a policy is enforced (``log_cleaner.py``), where records lie.

A topic is created with the window settings of this node, so that every node that applies the command agrees on them. The
same settings again answer 200 with the real partition count, another count 409; without ``partitions`` an existing topic keeps
its own, and in any case its retention. Too many topics is 400: nothing the client can retry into success.

Invariants: a partition that does not exist is 404, never "all" (D-34); a floor beyond the end is 409 and changes nothing; the
counts in the reply of delete-before are those of the command that was applied. Source: API.md 2 and 6; PREDECESSOR A5, A10, A11.
"""

from __future__ import annotations

import heapq
from typing import Annotated, Final, Literal

import msgspec

from ayder.commands import (
    CreateTopic,
    DeleteTopic,
    Retention,
    SetRetention,
    TrimPartition,
    TrimPartitions,
)
from ayder.errors import AyderError, ErrorCode
from ayder.http.auth import Principal
from ayder.http.context import Context
from ayder.http.exchange import Answer, Request, Response, Work
from ayder.http.linearizable import linearizable
from ayder.http.params import Query, decode_json, invalid
from ayder.http.routes import Route, Scope
from ayder.partition import Partition
from ayder.records import check_name, partition_of
from ayder.state_machine import TopicChanged, Trimmed
from ayder.topics import Topic

__all__ = ["ROUTES", "CreateTopicBody", "DeleteBeforeBody", "RetentionBody"]

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000
INT64_MAX: Final = (1 << 63) - 1
Count = Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
"""A whole number of 64 bits, not negative."""

_encode = msgspec.json.Encoder().encode


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """How long records are kept; 0 is no limit, a field left out says nothing."""

    ttl_ms: Count | None = None
    max_bytes: Count | None = None


class CreateTopicBody(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /broker/topics``."""

    name: str
    partitions: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    storage: Literal["sealed", "rocket"] | None = None
    retention: Limits | None = None
    write_mode: Literal["async", "sync-majority", "sync-all"] | None = None


class LogTargets(msgspec.Struct, forbid_unknown_fields=True):
    """The old one-shot collection that retention could ask for: targets, see ``operations.py``."""

    max_age_ms: Count | None = None
    max_bytes: Count | None = None


class RetentionBody(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /broker/retention``; without a topic, or with ``*``, the default that every topic inherits."""

    topic: str | None = None
    partition: Count | None = None
    ttl_ms: Count | None = None
    max_bytes: Count | None = None
    sealed: LogTargets | None = None


class DeleteBeforeBody(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /broker/delete-before``: records below ``before_offset`` go."""

    topic: str
    partition: Count
    before_offset: Count


_decode_create = msgspec.json.Decoder(CreateTopicBody).decode
_decode_retention = msgspec.json.Decoder(RetentionBody).decode
_decode_delete_before = msgspec.json.Decoder(DeleteBeforeBody).decode


# -- topics -------------------------------------------------------------------------------------------------------
def create_topic(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /broker/topics``."""
    _check_current(context)
    command = _creation(context, decode_json(_decode_create, request.body))

    async def run() -> Response:
        result, _ = await context.broker.execute(command)
        assert isinstance(result, TopicChanged) and result.topic is not None, result
        partitions = len(result.topic.partitions)
        return _json({"ok": True, "topic": command.name, "partitions": partitions, "created": result.changed})

    return Work(run)


def _creation(context: Context, body: CreateTopicBody) -> CreateTopic:
    settings, catalogue = context.config.topics, context.broker.state.catalogue
    name = check_name("topic", body.name)
    storage = body.storage or settings.default_storage
    if storage == "rocket":
        raise AyderError(ErrorCode.NOT_SUPPORTED, "storage 'rocket' is not in this version; 'sealed' is", parameter="storage")
    existing = catalogue.by_name.get(name)
    default = settings.default_partitions if existing is None else len(existing.partitions)
    partitions = body.partitions or default
    if partitions > settings.max_partitions and existing is None:
        raise invalid("partitions", f"must be from 1 to {settings.max_partitions}")
    limits = body.retention or Limits()
    return context.broker.creation_of(
        name, partitions, storage=storage, retention=Retention(limits.ttl_ms, limits.max_bytes), write_mode=body.write_mode
    )


def list_topics(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /broker/topics``: those the token may read or write, by name."""
    query, principal = Query(request.query), request.principal
    limit = query.integer("limit", DEFAULT_PAGE, least=1, most=MAX_PAGE) or DEFAULT_PAGE
    after = query.text("after")
    assert isinstance(principal, Principal)
    return linearizable(context, lambda: _topic_list(context, principal, limit, after))


def _topic_list(context: Context, principal: Principal, limit: int, after: str) -> Response:
    by_name = context.broker.state.catalogue.by_name
    names = heapq.nsmallest(limit + 1, (name for name in by_name if name > after and principal.allows("describe", name)))
    topics = [_summary(by_name[name]) for name in names[:limit]]
    return _json({"ok": True, "topics": topics, "next_after": names[limit - 1] if len(names) > limit else None})


def _summary(topic: Topic) -> dict[str, object]:
    return {
        "topic": topic.name,
        "partitions": len(topic.partitions),
        "storage": topic.storage,
        "write_mode": topic.write_mode,
        "retention": _retention_fields(topic.retention),
    }


def describe_topic(context: Context, _request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``GET /broker/topics/{topic}``."""
    name = _topic_name(parameters[0])
    return linearizable(context, lambda: _topic(context, name))


def _topic(context: Context, name: str) -> Response:
    topic = context.broker.topic(name)
    partitions = [_partition_facts(context, topic, partition) for partition in topic.partitions]
    return _json({"ok": True, **_summary(topic), "partition_count": len(partitions), "partitions": partitions})


def _partition_facts(context: Context, topic: Topic, partition: Partition) -> dict[str, object]:
    number = partition_of(partition.uid)
    retention = context.broker.state.catalogue.effective_retention(topic, number)
    return {
        "partition": number,
        "log_start_offset": partition.log_start_offset,
        "high_watermark": partition.next_offset,
        "bytes": partition.retained_bytes,
        "retention": {"ttl_ms": retention.ttl_ms or 0, "max_bytes": retention.max_bytes or 0},
    }


def _retention_fields(retention: Retention) -> dict[str, int | None]:
    return {"ttl_ms": retention.ttl_ms, "max_bytes": retention.max_bytes}


def delete_topic(context: Context, _request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``DELETE /broker/topics/{topic}``: its records and committed offsets go with it."""
    name = _topic_name(parameters[0])

    async def run() -> Response:
        await context.broker.execute(DeleteTopic(name))
        return _json({"ok": True, "topic": name, "deleted": True})

    return Work(run)


# -- retention ----------------------------------------------------------------------------------------------------
def set_retention(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /broker/retention``."""
    _check_current(context)
    body: RetentionBody = decode_json(_decode_retention, request.body)
    topic = "*" if body.topic in (None, "", "*") else check_name("topic", body.topic)
    if topic == "*" and body.partition is not None:
        raise invalid("partition", "needs a topic")
    if topic != "*" and body.partition is not None:
        context.broker.partition(context.broker.topic(topic), body.partition)
    command = SetRetention(topic, body.partition, Retention(body.ttl_ms, body.max_bytes))

    async def run() -> Response:
        said = body.ttl_ms is not None or body.max_bytes is not None
        if said:
            await context.broker.execute(command)
            context.broker.retention_due.set()
        elif topic != "*":
            context.broker.topic(topic)
        if body.sealed is not None:
            await context.cleaner.collect()
        size = sum(segment.size_bytes for segment in context.broker.store.segments())
        ttl, limit = body.ttl_ms is not None, body.max_bytes is not None
        return _json({"ok": True, "ttl_applied": ttl, "size_applied": limit, "sealed_bytes_after": size})

    return Work(run)


def delete_before(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /broker/delete-before``."""
    _check_current(context)
    body: DeleteBeforeBody = decode_json(_decode_delete_before, request.body)
    topic = context.broker.topic(check_name("topic", body.topic))
    partition = context.broker.partition(topic, body.partition)
    if body.before_offset > partition.next_offset:
        raise AyderError(
            ErrorCode.OFFSET_BEYOND_END, f"before_offset {body.before_offset} is beyond the end of the partition",
            offset=body.before_offset, log_start_offset=partition.log_start_offset, high_watermark=partition.next_offset,
        )  # fmt: skip

    async def run() -> Response:
        deleted, freed = await _trim(context, partition, body.before_offset)
        facts = {"deleted_count": deleted, "freed_bytes": freed, "log_start_offset": partition.log_start_offset}
        return _json({"ok": True, **facts})

    return Work(run)


async def _trim(context: Context, partition: Partition, before_offset: int) -> tuple[int, int]:
    """Move the log start up; returns the records this very command removed, and their bytes."""
    bytes_before = await context.cleaner.bytes_before(partition, before_offset)
    if before_offset <= partition.log_start_offset:
        return 0, 0
    result, _ = await context.broker.execute(TrimPartitions((TrimPartition(partition.uid, before_offset, bytes_before),)))
    assert isinstance(result, Trimmed), result
    return result.records[0], result.record_bytes[0]


# -- shared -------------------------------------------------------------------------------------------------------
def _check_current(context: Context) -> None:
    """A node that is still applying its log would describe the past."""
    if not context.broker.driver.ready:
        raise context.broker.not_ready()


def _topic_name(raw: bytes) -> str:
    return check_name("topic", raw.decode("utf-8", "replace"))


def _json(fields: dict[str, object]) -> Response:
    return Response(200, _encode(fields))


ROUTES = (
    Route("POST", "/broker/topics", create_topic, Scope("admin"), summary="Create a topic"),
    Route("GET", "/broker/topics", list_topics, Scope("describe"), summary="List topics"),
    Route("GET", "/broker/topics/{topic}", describe_topic, Scope("describe", 0), summary="Describe a topic"),
    Route("DELETE", "/broker/topics/{topic}", delete_topic, Scope("admin"), summary="Delete a topic"),
    Route("POST", "/broker/retention", set_retention, Scope("admin"), summary="Set how long records are kept"),
    Route("POST", "/broker/delete-before", delete_before, Scope("admin"), summary="Delete records below an offset"),
)
