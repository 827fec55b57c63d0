"""Consumer groups over HTTP: commit, list, describe with lag.

Owns: the requests and replies of these calls. Must not know: the commit rules beyond what a client may ask (the state machine
decides), where records lie.

``offset`` is the last record processed, reading resumes behind it; ``next_offset`` says the same by the first one not processed.
A request with several commits is one command: all of them are applied, or none. A group exists as long as it has a committed
offset; committing to a partition that does not exist, or beyond its end, is refused (PREDECESSOR A9 accepted both).

Invariants: -1 is never stored: ``offset`` -1 (``next_offset`` 0) forgets, and only with ``reset``; a group is its name, never a
hash of it (D-33). Source: API.md 5; RELIABILITY G-1 … G-4.
"""

from __future__ import annotations

import heapq
from typing import Annotated, Final

import msgspec

from ayder.commands import CommitOffset, CommitOffsets
from ayder.errors import AyderError, ErrorCode
from ayder.http.auth import Principal
from ayder.http.context import Context
from ayder.http.exchange import Answer, Request, Response, Work
from ayder.http.linearizable import linearizable
from ayder.http.params import Query, decode_json, invalid
from ayder.http.routes import Route, Scope
from ayder.records import check_name, partition_of
from ayder.state_machine import Committed

__all__ = ["ROUTES", "CommitBody"]

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000
INT64_MAX: Final = (1 << 63) - 1

_encode = msgspec.json.Encoder().encode


class CommitBody(msgspec.Struct, forbid_unknown_fields=True):
    """One commit; ``offset`` and ``next_offset`` exclude each other."""

    topic: str
    group: str
    partition: Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
    offset: Annotated[int, msgspec.Meta(ge=-1, le=INT64_MAX)] | None = None
    next_offset: Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)] | None = None
    reset: bool = False


_decode_commit = msgspec.json.Decoder(CommitBody | list[CommitBody]).decode


# -- commit -------------------------------------------------------------------------------------------------------
def commit(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /broker/commit``: an object, or an array of them."""
    _check_current(context)
    body: CommitBody | list[CommitBody] = decode_json(_decode_commit, request.body)
    bodies = body if isinstance(body, list) else [body]
    if not bodies:
        raise AyderError(ErrorCode.MISSING_FIELDS, "an empty array commits nothing")
    principal = request.principal
    assert isinstance(principal, Principal)
    command = CommitOffsets(tuple(_commit_offset(context, principal, each) for each in bodies))

    async def run() -> Response:
        result, log_index = await context.broker.execute(command)
        assert isinstance(result, Committed), result
        ignored = [not moved for moved in result.moved]
        if isinstance(body, CommitBody):
            return _json({"ok": True, "ignored": ignored[0], "batch_id": log_index})
        return _json({"ok": True, "results": [{"ok": True, "ignored": each} for each in ignored], "batch_id": log_index})

    return Work(run)


def _commit_offset(context: Context, principal: Principal, body: CommitBody) -> CommitOffset:
    """One commit of the command. Raises ``AyderError``; the same is checked again when the command is applied."""
    group = check_name("group", body.group)
    name = check_name("topic", body.topic)
    principal.require("consume", name)
    offset = _last_processed(body)
    topic = context.broker.topic(name)
    partition = context.broker.partition(topic, body.partition)
    if offset >= partition.next_offset:
        raise AyderError(
            ErrorCode.OFFSET_BEYOND_END, f"offset {offset} is not below the end of the partition",
            topic=name, partition=body.partition, offset=offset,
            log_start_offset=partition.log_start_offset, high_watermark=partition.next_offset,
        )  # fmt: skip
    return CommitOffset(topic.topic_id, body.partition, group, offset, body.reset)


def _last_processed(body: CommitBody) -> int:
    if body.offset is None and body.next_offset is None:
        raise AyderError(ErrorCode.MISSING_FIELDS, "offset (the last one processed) or next_offset is needed", parameter="offset")
    if body.offset is not None and body.next_offset is not None:
        raise invalid("next_offset", "excludes offset")
    offset = body.offset if body.next_offset is None else body.next_offset - 1
    assert offset is not None
    if offset < 0 and not body.reset:
        raise invalid("offset" if body.next_offset is None else "next_offset", "forgets what was committed: it needs reset")
    return offset


# -- groups -------------------------------------------------------------------------------------------------------
def list_groups(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /broker/groups``: those that committed in a topic the token may see, by name."""
    query, principal = Query(request.query), request.principal
    assert isinstance(principal, Principal)
    limit = query.integer("limit", DEFAULT_PAGE, least=1, most=MAX_PAGE) or DEFAULT_PAGE
    after = query.text("after")
    return linearizable(context, lambda: _group_list(context, principal, limit, after))


def _group_list(context: Context, principal: Principal, limit: int, after: str) -> Response:
    committed = context.broker.state.groups.committed
    names = heapq.nsmallest(
        limit + 1, (name for name, offsets in committed.items() if name > after and _may_see(context, principal, offsets))
    )
    groups = [{"group": name, "partitions": len(_visible(context, principal, committed[name]))} for name in names[:limit]]
    return _json({"ok": True, "groups": groups, "next_after": names[limit - 1] if len(names) > limit else None})


def describe_group(context: Context, request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``GET /broker/groups/{group}``: committed offset, end and lag of each partition it committed in."""
    principal = request.principal
    assert isinstance(principal, Principal)
    name = check_name("group", parameters[0].decode("utf-8", "replace"))
    return linearizable(context, lambda: _group(context, principal, name))


def _group(context: Context, principal: Principal, name: str) -> Response:
    offsets = _visible(context, principal, context.broker.state.groups.committed.get(name, {}))
    if not offsets:
        raise AyderError(ErrorCode.GROUP_NOT_FOUND, f"group {name!r} has no committed offset", group=name)
    partitions = [_partition_facts(context, uid, offset) for uid, offset in sorted(offsets.items())]
    return _json(
        {"ok": True, "group": name, "lag": sum(lag for _, lag in partitions), "partitions": [facts for facts, _ in partitions]}
    )


def _visible(context: Context, principal: Principal, offsets: dict[int, int]) -> dict[int, int]:
    """The part of a group's offsets in topics the token may see."""
    if principal.everything:
        return offsets
    topics = context.broker.state.catalogue.by_id
    return {uid: offset for uid, offset in offsets.items() if principal.allows("describe", topics[uid >> 16].name)}


def _may_see(context: Context, principal: Principal, offsets: dict[int, int]) -> bool:
    if principal.everything:
        return True
    topics = context.broker.state.catalogue.by_id
    return any(principal.allows("describe", topics[uid >> 16].name) for uid in offsets)


def _partition_facts(context: Context, uid: int, committed: int) -> tuple[dict[str, object], int]:
    catalogue = context.broker.state.catalogue
    partition = catalogue.partition(uid)
    assert partition is not None, "committed offsets go with their topic"
    lag = max(0, partition.next_offset - max(committed + 1, partition.log_start_offset))
    facts: dict[str, object] = {
        "topic": catalogue.by_id[uid >> 16].name,
        "partition": partition_of(uid),
        "committed_offset": committed,
        "log_start_offset": partition.log_start_offset,
        "high_watermark": partition.next_offset,
        "lag": lag,
    }
    return facts, lag


def _check_current(context: Context) -> None:
    if not context.broker.driver.ready:
        raise context.broker.not_ready()


def _json(fields: dict[str, object]) -> Response:
    return Response(200, _encode(fields))


ROUTES = (
    Route("POST", "/broker/commit", commit, Scope("consume"), summary="Commit offsets of a group"),
    Route("GET", "/broker/groups", list_groups, Scope("describe"), summary="List consumer groups"),
    Route("GET", "/broker/groups/{group}", describe_group, Scope("describe"), summary="Describe a group with its lag"),
)
