"""Consume: pages of records for a group or a plain reader, by long-poll or as a tail, in the format ``Accept`` asks for.

Owns: where a reader starts, which format it gets, the facts beside the records. Must not know: where records lie.

A page that is in memory is answered at once; anything that waits or reads the disk is a ``Work``, cancelled when the client
hangs up (RELIABILITY C-1 … C-5).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable

import attrs
import trio

from ayder.errors import AyderError, ErrorCode
from ayder.fetch import Page
from ayder.http.context import Context
from ayder.http.exchange import Answer, Headers, Request, Response, Work
from ayder.http.linearizable import linearizable
from ayder.http.pages import render_binary, render_json, render_ndjson
from ayder.http.params import Query, invalid
from ayder.http.routes import Route, Scope
from ayder.http.tail import resume_offset, tail_response
from ayder.partition import Partition
from ayder.records import check_name
from ayder.topics import Topic

__all__ = ["ROUTES"]

DEFAULT_LIMIT = 100
MAX_LIMIT = 10_000
DEFAULT_PAGE_BYTES = 1 << 20
MAX_PAGE_BYTES = 16 << 20
_MEMO_ENTRIES = 1024
_PARTITION = re.compile(rb"[0-9]{1,9}")


@attrs.frozen(slots=True)
class _Options:
    """The query of a consume call, typed, remembered by its raw query."""

    offset: int | None
    start: str
    limit: int
    max_bytes: int
    wait_ms: int
    b64: bool
    local: bool


_options_memo: dict[bytes, _Options] = {}


def _options(raw: bytes) -> _Options:
    found = _options_memo.get(raw)
    if found is not None:
        return found
    query = Query(raw)
    offset = query.integer("offset", None, least=-1)
    options = _Options(
        offset=None if offset is None or offset < 0 else offset,
        start="earliest" if offset is not None and offset < 0 else query.text("from"),
        limit=query.integer("limit", DEFAULT_LIMIT, least=1, most=MAX_LIMIT) or DEFAULT_LIMIT,
        max_bytes=query.integer("max_bytes", DEFAULT_PAGE_BYTES, least=1, most=MAX_PAGE_BYTES) or DEFAULT_PAGE_BYTES,
        wait_ms=query.integer("wait_ms", 0) or 0,
        b64=query.text("encoding") == "b64",
        local=query.text("consistency", "linearizable", choices=("linearizable", "local")) == "local",
    )
    if offset is not None and query.text("from"):
        raise invalid("from", "excludes offset")
    if len(_options_memo) >= _MEMO_ENTRIES:
        _options_memo.clear()
    _options_memo[raw] = options
    return options


@attrs.frozen(slots=True)
class _Reader:
    """Who reads what from where."""

    context: Context
    topic: Topic
    partition: Partition
    options: _Options
    committed: int | None
    accept: bytes


def consume(context: Context, request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``GET /broker/consume/{topic}/{group}/{partition}``: from the committed offset + 1 unless told otherwise."""
    group = check_name("group", parameters[1].decode("utf-8", "replace"))
    return _read(context, request, parameters[0], parameters[2], group)


def records(context: Context, request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``GET /broker/topics/{topic}/{partition}/records``: the same without a group."""
    return _read(context, request, parameters[0], parameters[1], None)


def _read(context: Context, request: Request, raw_topic: bytes, raw_partition: bytes, group: str | None) -> Answer:
    options = _options(request.query)
    if options.local:
        return _read_here(context, request, options, raw_topic, raw_partition, group)
    return linearizable(context, lambda: _read_here(context, request, options, raw_topic, raw_partition, group))


def _read_here(
    context: Context, request: Request, options: _Options, raw_topic: bytes, raw_partition: bytes, group: str | None
) -> Response | Work:
    broker = context.broker
    topic = broker.topic(check_name("topic", raw_topic.decode("utf-8", "replace")))
    if not _PARTITION.fullmatch(raw_partition):
        raise invalid("partition", "must be a decimal number")
    partition = broker.partition(topic, int(raw_partition))
    committed = None if group is None else broker.state.groups.get(group, partition.uid)
    accept = request.headers.get(b"accept", b"")
    reader = _Reader(context, topic, partition, options, committed, accept)
    if b"text/event-stream" in accept:
        resumed = resume_offset(request)
        return Work(lambda: _tail(reader, resumed))
    start = _start_in_memory(reader)
    if start is not None:
        page = context.fetcher.from_memory(partition, start, options.limit, options.max_bytes)
        if page is not None and (page.slices or not options.wait_ms):
            return _answer(reader, start, page)
    return Work(lambda: _fetch(reader))


async def _fetch(reader: _Reader) -> Response:
    start = await _start(reader)
    options, partition, fetcher = reader.options, reader.partition, reader.context.fetcher
    wait_ms = min(options.wait_ms, reader.context.config.http.max_long_poll_ms)
    deadline = trio.current_time() + wait_ms / 1000
    while True:
        page = await fetcher.fetch(partition, start, options.limit, options.max_bytes)
        if (
            page.slices
            or trio.current_time() >= deadline
            or not fetcher.is_live(partition)
            or reader.context.broker.shutting_down
        ):
            return _answer(reader, start, page)
        await fetcher.wait_for_records(partition, max(start, partition.log_start_offset), deadline)


async def _tail(reader: _Reader, resumed: int | None) -> Response:
    start = await _start(reader) if resumed is None else resumed
    return tail_response(
        reader.context, reader.topic, reader.partition, start, reader.options.max_bytes, "b64" if reader.options.b64 else "text"
    )


# -- where to start -----------------------------------------------------------------------------------------------
def _start_in_memory(reader: _Reader) -> int | None:
    """The start offset where no look-up is needed; ``None`` for ``from=time:…``."""
    options, partition = reader.options, reader.partition
    if options.offset is not None:
        _check_not_below(partition, options.offset)
        return options.offset
    if not options.start:
        return partition.log_start_offset if reader.committed is None else reader.committed + 1
    if options.start == "earliest":
        return partition.log_start_offset
    if options.start == "latest":
        return partition.next_offset
    kind, _, value = options.start.partition(":")
    if kind == "tail" and re.fullmatch(r"[0-9]{1,18}", value):
        return max(partition.log_start_offset, partition.next_offset - int(value))
    if kind == "time":
        return None
    raise invalid("from", "must be earliest, latest, tail:N or time:RFC3339")


async def _start(reader: _Reader) -> int:
    start = _start_in_memory(reader)
    if start is None:
        time_ms = _parse_time(reader.options.start.partition(":")[2])
        start = await reader.context.fetcher.offset_at_time(reader.partition, time_ms)
    return start


def _parse_time(text: str) -> int:
    try:
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        raise invalid("from", f"time: must be an RFC 3339 time with a zone ({error})") from None


def _check_not_below(partition: Partition, offset: int) -> None:
    if offset < partition.log_start_offset:
        raise AyderError(
            ErrorCode.OFFSET_OUT_OF_RANGE,
            f"offset {offset} is below the log start {partition.log_start_offset}: those records are no longer kept",
            offset=offset,
            log_start_offset=partition.log_start_offset,
            high_watermark=partition.next_offset,
        )


# -- the answer ---------------------------------------------------------------------------------------------------
def _answer(reader: _Reader, asked: int, page: Page) -> Response:
    options = reader.options
    skipped = page.start_offset if page.start_offset > asked else None
    if skipped is not None and options.offset is not None:
        _check_not_below(reader.partition, options.offset)  # retention overtook this very read
    accept = reader.accept
    render = _renderer(accept) if accept and accept != b"application/json" else None
    if render is not None:
        content_type, encode = render
        headers = _page_headers(page, reader.committed, skipped)
        if options.local:
            headers += ((b"ayder-as-of-index", b"%d" % reader.context.broker.applied_index),)
        response = Response(200, encode(page, options.b64), content_type, headers)
    else:
        extra = b"" if skipped is None else b',"skipped_to":%d' % skipped
        if options.local:
            extra += b',"as_of_index":%d' % reader.context.broker.applied_index
        response = Response(200, render_json(page, b64=options.b64, committed=reader.committed, extra=extra))
    reader.context.metrics.records_out(reader.topic.topic_id, page.count, len(response.body))
    return response


def _renderer(accept: bytes) -> tuple[bytes, Callable[[Page, bool], bytes]] | None:
    """The encoder for an Accept header; ``None`` means JSON. Raises ``AyderError`` (not_acceptable)."""
    for part in accept.split(b","):
        kind = part.split(b";")[0].strip().lower()
        if kind == b"application/x-ndjson":
            return kind, lambda page, b64: render_ndjson(page, b64=b64)
        if kind == b"application/octet-stream":
            return kind, lambda page, _b64: render_binary(page)
        if kind in (b"application/*", b"*/*") or kind.endswith(b"json"):
            return None
    raise AyderError(
        ErrorCode.NOT_ACCEPTABLE,
        "a page comes as application/json, application/x-ndjson, application/octet-stream or text/event-stream",
    )


def _page_headers(page: Page, committed: int | None, skipped: int | None) -> Headers:
    headers = [
        (b"ayder-count", b"%d" % page.count),
        (b"ayder-next-offset", b"%d" % page.next_offset),
        (b"ayder-truncated", b"true" if page.truncated else b"false"),
        (b"ayder-log-start-offset", b"%d" % page.log_start_offset),
        (b"ayder-high-watermark", b"%d" % page.high_watermark),
    ]
    if committed is not None:
        headers.append((b"ayder-committed-offset", b"%d" % committed))
    if skipped is not None:
        headers.append((b"ayder-skipped-to", b"%d" % skipped))
    return tuple(headers)


ROUTES = (
    Route("GET", "/broker/consume/{topic}/{group}/{partition}", consume, Scope("consume", 0), summary="Read a page for a group"),
    Route("GET", "/broker/topics/{topic}/{partition}/records", records, Scope("consume", 0), summary="Read a page"),
)
