"""Who a peer is proven to be: mutual TLS 1.3 by one authority, or nobody but this machine.

Owns: the TLS contexts, the names in a certificate, the rule that plain connections stay on loopback. Must not know: messages,
who is a member.

A node is known by a DNS name in its certificate that equals its node id, byte for byte: no wildcard, no common name. The dialer
checks it before it says anything, the listener before it believes a hello. Host names play no part: nodes may move.
Source: RELIABILITY H-8.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable

import attrs
import trio

from ayder.entries import NodeId
from ayder.raft.frames import ProtocolError

__all__ = ["PeerTls", "demand_loopback", "demand_name", "is_loopback"]


@attrs.frozen(kw_only=True)
class PeerTls:
    """PEM files: the authority that signs every node of the cluster, and this node's certificate chain and key.

    The certificate serves both ways, so when it names purposes it needs both, server and client authentication.
    """

    ca: str
    certificate: str
    key: str = attrs.field(repr=False)

    def listening(self) -> ssl.SSLContext:
        """What accepts. Raises ``OSError`` (``ssl.SSLError`` is one) when a file cannot be read or does not fit."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # every connection is verified anew
        return context

    def dialling(self) -> ssl.SSLContext:
        """What connects. Raises as ``listening``."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, side: int) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # ``demand_name`` is stricter
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cafile=self.ca)
        context.load_cert_chain(self.certificate, self.key, password="")  # an encrypted key is refused, not asked about
        return context


def demand_name(stream: trio.abc.Stream, node_id: NodeId) -> None:
    """Raise ``ProtocolError`` unless the other end of a TLS stream, its handshake done, holds a certificate for this node.

    Any other stream proves nothing and is let pass: it is on loopback.
    """
    if not isinstance(stream, trio.SSLStream):
        return
    found = (stream.getpeercert() or {}).get("subjectAltName", ())
    names = [value for kind, value in found if kind == "DNS"]
    if node_id not in names:
        raise ProtocolError(f"the certificate is for {', '.join(names) or 'no DNS name'}, not for {node_id}")


def is_loopback(host: str) -> bool:
    """Whether a host, as written in the settings, surely is this machine."""
    if host == "localhost":
        return True
    try:
        parsed = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def demand_loopback(hosts: Iterable[str]) -> None:
    """Raise ``ValueError`` naming every host that plain connections may not use."""
    outside = sorted({host for host in hosts if not is_loopback(host)})
    if outside:
        raise ValueError(f"peers without TLS are allowed on loopback only, not on {', '.join(repr(host) for host in outside)}")
