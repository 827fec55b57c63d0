"""JSON Schemas of what ayder answers, for the OpenAPI document.

Owns: the shapes of replies and the query parameters, as JSON Schema 2020-12. Must not know: routes, handlers. Request bodies are
not here: their schemas come from the classes that decode them.
"""

from __future__ import annotations

from typing import Any, Final

from ayder.errors import ErrorCode

__all__ = ["REPLIES", "Schema", "header", "integer", "query", "reference", "text"]

Schema = dict[str, Any]
INT64_MAX: Final = (1 << 63) - 1


def integer(description: str = "", *, least: int | None = None, most: int | None = None) -> Schema:
    """A 64-bit integer."""
    limits = {"minimum": least, "maximum": most}
    return _with(description, {"type": "integer", "format": "int64", **{k: v for k, v in limits.items() if v is not None}})


def text(description: str = "", *, choices: tuple[str, ...] = ()) -> Schema:
    """A string, perhaps one of a few."""
    return _with(description, {"type": "string", "enum": list(choices)} if choices else {"type": "string"})


def _with(description: str, schema: Schema) -> Schema:
    return {**schema, "description": description} if description else schema


def _boolean(description: str = "") -> Schema:
    return _with(description, {"type": "boolean"})


def _nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _fields(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def reference(name: str) -> Schema:
    """A schema among the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def query(name: str, schema: Schema) -> Schema:
    """An optional query parameter; its description is the schema's."""
    return _parameter("query", name, schema)


def header(name: str, schema: Schema) -> Schema:
    """An optional request header."""
    return _parameter("header", name, schema)


def _parameter(place: str, name: str, schema: Schema) -> Schema:
    described = {"description": schema["description"]} if "description" in schema else {}
    plain = {key: value for key, value in schema.items() if key != "description"}
    return {"name": name, "in": place, "required": False, **described, "schema": plain}


_OK: Final = {"ok": {"type": "boolean", "const": True}}
_OFFSET: Final = integer("Position of a record in its partition", least=0)
_LOG_START: Final = integer("The first offset still kept", least=0)
_HIGH_WATERMARK: Final = integer("The offset the next record will get", least=0)
_BATCH_ID: Final = integer(
    "Log index; increases, survives restarts; 'last_synced_batch_id' reaches it when it is on disk", least=1
)
_LIMITS: Final = {"ttl_ms": _nullable(integer("0: no limit")), "max_bytes": _nullable(integer("0: no limit"))}
_DURABLE: Final = {
    "partition": integer(least=0), "batch_id": _BATCH_ID, "sealed": _boolean(), "durable": _boolean("It is synced to disk"),
    "mode": text(choices=("sealed", "memory")), "synced": _nullable(_boolean()),
    "duplicate": _boolean("The idempotency key was seen before"),
}  # fmt: skip
_RECEIPT_EXTRAS: Final = {
    "ack": _with("With `receipt=1` or `ack`", {"type": "object"}),
    **{
        name: integer("With `timing=1`; microseconds")
        for name in ("queue_us", "recv_parse_us", "server_us", "produce_us", "sync_wait_us")
    },
}
_NEXT_AFTER: Final = _nullable(text("Pass it as `after` for the next page; null on the last"))
_TOPIC: Final = {
    "topic": text(), "storage": text(), "write_mode": _nullable(text()), "retention": _fields(_LIMITS),
}  # fmt: skip
_MESSAGE_EXTRAS: Final = {
    "key": text("Text mode"), "value": text("Text mode, when the value is UTF-8"),
    "value_b64": text("Base64"), "key_b64": text("Base64"),
    "headers": {"type": "object", "additionalProperties": {"type": "string"}},
}  # fmt: skip
_GROUP_PARTITION: Final = {
    "topic": text(), "partition": integer(least=0), "committed_offset": integer("The last record processed", least=0),
    "log_start_offset": _LOG_START, "high_watermark": _HIGH_WATERMARK, "lag": integer("Records not yet processed", least=0),
}  # fmt: skip
_FREED: Final = {"freed_bytes": integer("Bytes given back to the disk", least=0)}

REPLIES: Final[dict[str, Schema]] = {
    "Error": _fields(
        {
            "ok": {"type": "boolean", "const": False},
            "error": text(choices=tuple(dict.fromkeys(code.wire for code in ErrorCode))),
            "message": text("For people"),
            "outcome": text("not_applied: it did not happen and never will; unknown: retry with the same idempotency key",
                            choices=("not_applied", "unknown")),
        }
    ),
    "Receipt": _fields({**_OK, "offset": _OFFSET, **_DURABLE}, _RECEIPT_EXTRAS),
    "BatchReceipt": _fields(
        {**_OK, "first_offset": _OFFSET, "count": integer(least=1), **_DURABLE},
        {**_RECEIPT_EXTRAS, "results": _list(_fields({
            "partition": integer(least=0), "first_offset": _OFFSET, "count": integer(least=1), "duplicate": _boolean(),
        }))},
    ),
    "Message": _fields({"offset": _OFFSET, "partition": integer(least=0), "timestamp_ms": integer()}, _MESSAGE_EXTRAS),
    "Page": _fields(
        {
            "messages": _list(reference("Message")), "count": integer(least=0), "next_offset": _OFFSET,
            "committed_offset": _nullable(integer()), "truncated": _boolean("More is there now"),
            "log_start_offset": _LOG_START, "high_watermark": _HIGH_WATERMARK,
        },
        {"skipped_to": integer("Reading began at the log start, past expired records"),
         "as_of_index": integer("With `consistency=local`")},
    ),
    "TopicCreated": _fields({**_OK, "topic": text(), "partitions": integer(least=1), "created": _boolean("False: it existed")}),
    "TopicDeleted": _fields({**_OK, "topic": text(), "deleted": _boolean()}),
    "TopicList": _fields({
        **_OK, "topics": _list(_fields({**_TOPIC, "partitions": integer(least=1)})), "next_after": _NEXT_AFTER,
    }),
    "Topic": _fields({
        **_OK, **_TOPIC, "partition_count": integer(least=1),
        "partitions": _list(_fields({
            "partition": integer(least=0), "log_start_offset": _LOG_START, "high_watermark": _HIGH_WATERMARK,
            "bytes": integer("Values and keys kept", least=0), "retention": _fields(_LIMITS),
        })),
    }),
    "RetentionSet": _fields({
        **_OK, "ttl_applied": _boolean(), "size_applied": _boolean(), "sealed_bytes_after": integer(least=0),
    }),
    "DeletedBefore": _fields({
        **_OK, "deleted_count": integer(least=0), "freed_bytes": integer("Values and keys", least=0),
        "log_start_offset": _LOG_START,
    }),
    "Committed": _fields(
        {**_OK, "batch_id": _BATCH_ID},
        {"ignored": _boolean("It was backward and changed nothing"),
         "results": _list(_fields({**_OK, "ignored": _boolean()}))},
    ),
    "GroupList": _fields({
        **_OK, "groups": _list(_fields({"group": text(), "partitions": integer(least=1)})), "next_after": _NEXT_AFTER,
    }),
    "Group": _fields({**_OK, "group": text(), "lag": integer(least=0), "partitions": _list(_fields(_GROUP_PARTITION))}),
    "Health": _fields({"ok": {"type": "integer", "const": 1}}),
    "Readiness": _fields({
        "ready": _boolean(), "reasons": _list(text()), "role": text(choices=("leader", "follower", "candidate")),
        "leader": _nullable(text()), "term": integer(), "commit_index": integer(), "applied_index": integer(),
    }),
    "SealedStatus": _fields({
        **_OK, "last_synced_batch_id": integer("Receipts up to this are on disk", least=0), "commit_index": integer(),
        "applied_index": integer(), "first_index": integer(), "segments": integer(), "sealed_segments": integer(),
        "sealed_bytes": integer(),
    }),
    "Collected": _fields({**_OK, "sealed_bytes_after": integer(least=0), **_FREED, "targets_met": _boolean()}),
    "Compacted": _fields({**_OK, "result": text(), "async": _boolean(), **_FREED}),
    "Released": _fields({**_OK, "released": integer(), **_FREED}),
    "Membership": _fields({**_OK, "membership": _fields({
        "epoch": integer(), "joint_active": _boolean(), "voters_old_mask": integer(), "voters_new_mask": integer(),
        "learners_mask": integer(), "node_count": integer(),
        "nodes": _list(_fields({
            "index": integer(), "node_id": text(), "advertise_addr": _nullable(text()), "http_addr": text(),
            "priority": integer(), "is_voter": _boolean(), "is_learner": _boolean(), "is_leader": _boolean(),
        })),
    })}),
    "MembershipChanged": _fields(
        {**_OK, "node_id": text()},
        {"role": text(choices=("learner", "voter")), "index": integer("Of the node, in `nodes`"), "removed": _boolean()},
    ),
    "Transferred": _fields({**_OK, "node_id": text("Who leads"), "term": integer()}),
}  # fmt: skip
"""Schemas of replies, by the name they have among the components."""
