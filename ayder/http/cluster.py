"""Who belongs to the cluster, and who leads it: asked, and changed.

Owns: these requests and replies. Must not know: the rules of a change (``raft/membership.py``), how peers are reached.

Every node knows the addresses of the nodes its configuration names, and those of no other: a node that is to come must be in
``cluster.nodes`` of all. What changes here is who among them has a vote. One whose disk was replaced is removed and added again.

Invariants: one change at a time; a change is answered when it is committed, a promotion through its joint configuration; asking
for what is the case already changes nothing. Source: API.md 9; PREDECESSOR A16; thesis 4.1 - 4.4, 3.10.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import msgspec
import trio

from ayder.entries import NodeId
from ayder.errors import AyderError, ErrorCode
from ayder.http.context import Context
from ayder.http.exchange import Answer, Request, Response, Work
from ayder.http.params import decode_json, invalid
from ayder.http.routes import Route, Scope
from ayder.raft.consensus import Consensus, Role
from ayder.raft.membership_change import settle

__all__ = ["ROUTES", "MemberBody", "TransferBody"]

_NO_STORE: Final = ((b"cache-control", b"no-store"),)
_NO_TIME_MS: Final = 0
"""A change of the membership carries the log time of the entry before it: nothing depends on when it came."""

_encode = msgspec.json.Encoder().encode


class MemberBody(msgspec.Struct, forbid_unknown_fields=True):
    """A change of the membership. The addresses may be left out: they are what ``cluster.nodes`` says."""

    node_id: str
    advertise_addr: str | None = None
    http_addr: str | None = None
    priority: int | None = None


class TransferBody(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /ha/transfer``: to the voter that holds most, unless one is named."""

    node_id: str | None = None


_decode_member = msgspec.json.Decoder(MemberBody).decode
_decode_transfer = msgspec.json.Decoder(TransferBody).decode


# -- asked --------------------------------------------------------------------------------------------------------
def membership(context: Context, _request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``GET /ha/membership``: the configuration in force here, as bit masks over ``nodes`` and one by one."""
    consensus = context.broker.driver.consensus
    names = _known(context)
    members = consensus.membership
    facts = {
        "epoch": max(1, context.broker.state.membership_index),
        "joint_active": members.is_joint,
        "voters_old_mask": _mask(names, members.outgoing or members.voters),
        "voters_new_mask": _mask(names, members.voters),
        "learners_mask": _mask(names, members.learners),
        "node_count": len(names),
        "nodes": [_described(context, index, name) for index, name in enumerate(names)],
    }
    return Response(200, _encode({"ok": True, "membership": facts}), headers=_NO_STORE)


def _known(context: Context) -> list[NodeId]:
    """Every node by its place in the configuration, which does not change; then those only the log knows."""
    configured = [member.id for member in context.config.cluster.nodes]
    return configured + [name for name in context.broker.driver.consensus.membership.everyone if name not in configured]


def _mask(names: list[NodeId], chosen: tuple[NodeId, ...]) -> int:
    return sum(1 << index for index, name in enumerate(names) if name in chosen)


def _described(context: Context, index: int, name: NodeId) -> dict[str, object]:
    consensus, http = context.broker.driver.consensus, context.config.http
    member = context.config.cluster.member(name)
    own = f"{http.host}:{http.port}"
    return {
        "index": index,
        "node_id": name,
        "advertise_addr": None if member is None else _joined(member.host, member.raft_port),
        "http_addr": own if member is None else _joined(*member.client_address),
        "priority": 10 if member is None else member.priority,
        "is_voter": consensus.membership.is_voter(name),
        "is_learner": name in consensus.membership.learners,
        "is_leader": name == consensus.leader_id,
    }


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- changed ------------------------------------------------------------------------------------------------------
def change_membership(context: Context, request: Request, parameters: tuple[bytes, ...]) -> Answer:
    """``POST /ha/membership/{change}``."""
    change = _CHANGES.get(parameters[0])
    if change is None:
        raise AyderError(ErrorCode.ROUTE_NOT_FOUND, "a membership change is add, promote or remove")
    if context.broker.driver.alone:
        raise AyderError(ErrorCode.NOT_SUPPORTED, "this node is alone; name the nodes of a cluster in cluster.nodes")
    body: MemberBody = decode_json(_decode_member, request.body)
    _demand_leader(context)
    return Work(partial(_bounded, context, change, body))


async def _bounded(context: Context, change: Callable[[Context, MemberBody], Awaitable[Response]], body: MemberBody) -> Response:
    with trio.move_on_after(context.config.http.default_produce_timeout_ms / 1000):
        return await change(context, body)
    raise AyderError(ErrorCode.COMMIT_TIMEOUT, "the change was not committed in time; it may still be")


def _demand_leader(context: Context) -> None:
    broker = context.broker
    if broker.driver.consensus.role is not Role.LEADER or not broker.driver.ready:
        raise broker.not_ready()


async def _add(context: Context, body: MemberBody) -> Response:
    index, consensus = _place(context, body), context.broker.driver.consensus
    if body.node_id not in consensus.membership.everyone:
        await settle(context.broker.driver, lambda: consensus.add_learner(body.node_id, _NO_TIME_MS))
    role = "voter" if consensus.membership.is_voter(body.node_id) else "learner"
    return Response(200, _encode({"ok": True, "index": index, "node_id": body.node_id, "role": role}))


def _place(context: Context, body: MemberBody) -> int:
    """Where the node stands in the configuration, which must know it. What the request says of it must be the same."""
    member = context.config.cluster.member(body.node_id)
    if member is None:
        raise AyderError(ErrorCode.NOT_SUPPORTED, f"{body.node_id!r} is not in cluster.nodes: put it there on every node first")
    if body.advertise_addr not in (None, _joined(member.host, member.raft_port)):
        raise invalid("advertise_addr", f"differs from cluster.nodes, which has {_joined(member.host, member.raft_port)}")
    if body.http_addr not in (None, _joined(*member.client_address)):
        raise invalid("http_addr", f"differs from cluster.nodes, which has {_joined(*member.client_address)}")
    return context.config.cluster.nodes.index(member)


async def _promote(context: Context, body: MemberBody) -> Response:
    consensus = context.broker.driver.consensus
    if body.node_id not in consensus.membership.voters:
        await _caught_up(context, consensus, body.node_id)
        await settle(context.broker.driver, lambda: consensus.promote(body.node_id, _NO_TIME_MS))
    return Response(200, _encode({"ok": True, "node_id": body.node_id, "role": "voter"}))


async def _caught_up(context: Context, consensus: Consensus, node_id: NodeId) -> None:
    """A learner that is behind is waited for, half of the time there is. What else may be wrong with it, the change says."""
    with trio.move_on_after(context.config.http.default_produce_timeout_ms / 2000):
        while (lead := consensus.leadership) and node_id in consensus.membership.learners and not lead.is_caught_up(node_id):
            await context.broker.driver.wait_moved()


async def _remove(context: Context, body: MemberBody) -> Response:
    consensus = context.broker.driver.consensus
    if body.node_id in consensus.membership.everyone or context.config.cluster.member(body.node_id) is None:
        await settle(context.broker.driver, lambda: consensus.remove(body.node_id, _NO_TIME_MS))
    return Response(200, _encode({"ok": True, "node_id": body.node_id, "removed": True}))


_CHANGES: Final = {b"add": _add, b"promote": _promote, b"remove": _remove}


# -- who leads ----------------------------------------------------------------------------------------------------
def transfer(context: Context, request: Request, _parameters: tuple[bytes, ...]) -> Answer:
    """``POST /ha/transfer``: another voter leads when this is answered."""
    body: TransferBody = decode_json(_decode_transfer, request.body or b"{}")
    consensus = context.broker.driver.consensus
    _demand_leader(context)
    if body.node_id is not None and body.node_id not in consensus.voters:
        raise invalid("node_id", f"must be a voter: {', '.join(consensus.voters)}")
    return Work(partial(_transfer, context, body.node_id))


async def _transfer(context: Context, wanted: NodeId | None) -> Response:
    driver, consensus = context.broker.driver, context.broker.driver.consensus
    if wanted != consensus.node_id:
        term = consensus.current_term
        target = consensus.transfer_leadership(wanted)
        driver.advance()
        with trio.move_on_after(3 * context.config.raft.election_timeout_ms / 1000):
            while consensus.transfer_to == target or consensus.leader_id is None:
                await driver.wait_moved()
        if consensus.current_term == term or consensus.leader_id is None:
            raise AyderError(ErrorCode.COMMIT_TIMEOUT, f"{target} did not take over in time; it may still")
    return Response(200, _encode({"ok": True, "node_id": consensus.leader_id, "term": consensus.current_term}))


ROUTES = (
    Route("GET", "/ha/membership", membership, Scope("admin"), summary="The nodes of the cluster"),
    Route("POST", "/ha/membership/{change}", change_membership, Scope("admin"), summary="Add, promote or remove a node"),
    Route("POST", "/ha/transfer", transfer, Scope("admin"), summary="Let another node lead"),
)
