"""What a handler may reach: one object handed to every call, made once by the node.

Owns: nothing but the references. Must not know: routes, sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import attrs

from ayder.config import Config

if TYPE_CHECKING:
    from ayder.broker import Broker
    from ayder.fetch import Fetcher
    from ayder.http.admission import RateLimiter
    from ayder.http.auth import Authenticator
    from ayder.http.fan_out import FanOut
    from ayder.log_cleaner import LogCleaner
    from ayder.metrics import Metrics
    from ayder.raft.peers import PeerFacts

__all__ = ["Context", "NodeFacts"]


class NodeFacts(Protocol):
    """What the node says about itself."""

    @property
    def starting_reasons(self) -> list[str]:
        """Why the node is not ready; empty when it is."""
        ...

    def peer_facts(self) -> Mapping[str, PeerFacts]:
        """How the connections to the other nodes stand, by node id; empty for a node that is alone."""
        ...


@attrs.frozen(slots=True, eq=False)
class Context:
    """Everything behind the handlers."""

    config: Config
    broker: Broker
    fetcher: Fetcher
    cleaner: LogCleaner
    authenticator: Authenticator
    rate_limiter: RateLimiter
    metrics: Metrics
    fan_out: FanOut
    node: NodeFacts
