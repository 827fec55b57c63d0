"""Every error ayder can answer with, and what each says about the operation.

Owns: the closed set of error codes and the exception that carries one. Must not know: HTTP statuses (``http/errors.py``
holds that table) or anything that raises them.

The one property a client builds its retry policy on is the *outcome*: ``NOT_APPLIED`` is a promise that the operation did
not happen and never will; ``UNKNOWN`` says that only the log can tell (retry with the same idempotency key).
"""

from __future__ import annotations

import enum
from typing import Any

__all__ = ["AyderError", "CorruptLog", "ErrorCode", "Outcome", "StoragePoisoned"]


class Outcome(enum.Enum):
    """What an error says about the operation it answers."""

    NOT_APPLIED = "not_applied"
    UNKNOWN = "unknown"


class ErrorCode(enum.Enum):
    """A wire code and its outcome. Two members may share a wire code where the old API gives one name to two statuses."""

    # code on the wire, outcome, a word that tells members with one wire code apart
    INVALID_REQUEST = ("invalid_request", Outcome.NOT_APPLIED)
    INVALID_JSON = ("invalid_json", Outcome.NOT_APPLIED)
    MISSING_FIELDS = ("missing_fields", Outcome.NOT_APPLIED)
    UNAUTHORIZED = ("unauthorized", Outcome.NOT_APPLIED)
    FORBIDDEN = ("forbidden", Outcome.NOT_APPLIED)
    ROUTE_NOT_FOUND = ("not_found", Outcome.NOT_APPLIED, "route")
    TOPIC_NOT_FOUND = ("topic_not_found", Outcome.NOT_APPLIED)
    PARTITION_NOT_FOUND = ("partition_not_found", Outcome.NOT_APPLIED)
    GROUP_NOT_FOUND = ("group_not_found", Outcome.NOT_APPLIED)
    METHOD_NOT_ALLOWED = ("method_not_allowed", Outcome.NOT_APPLIED)
    NOT_ACCEPTABLE = ("not_acceptable", Outcome.NOT_APPLIED)
    REQUEST_TIMEOUT = ("request_timeout", Outcome.NOT_APPLIED)
    TOPIC_EXISTS = ("topic_exists", Outcome.NOT_APPLIED)
    OFFSET_BEYOND_END = ("offset_out_of_range", Outcome.NOT_APPLIED, "a commit or a floor beyond the end")
    OFFSET_OUT_OF_RANGE = ("offset_out_of_range", Outcome.NOT_APPLIED, "a read below the log start")
    IDEMPOTENCY_KEY_REUSED = ("idempotency_key_reused", Outcome.NOT_APPLIED)
    PAYLOAD_TOO_LARGE = ("payload_too_large", Outcome.NOT_APPLIED)
    URI_TOO_LONG = ("uri_too_long", Outcome.NOT_APPLIED)
    HEADERS_TOO_LARGE = ("headers_too_large", Outcome.NOT_APPLIED)
    RATE_LIMITED = ("rate_limited", Outcome.NOT_APPLIED)
    OVERLOADED = ("overloaded", Outcome.NOT_APPLIED)
    STORAGE_FULL = ("storage_full", Outcome.NOT_APPLIED)
    SHUTTING_DOWN = ("shutting_down", Outcome.NOT_APPLIED)
    NOT_LEADER = ("not_leader", Outcome.NOT_APPLIED)
    NO_QUORUM = ("no_quorum", Outcome.NOT_APPLIED)
    SEALED_ONLY = ("sealed_only", Outcome.NOT_APPLIED)
    CHANGE_IN_PROGRESS = ("change_in_progress", Outcome.NOT_APPLIED)
    NOT_SUPPORTED = ("not_supported", Outcome.NOT_APPLIED)
    COMMIT_TIMEOUT = ("commit_timeout", Outcome.UNKNOWN)
    STORAGE_DAMAGED = ("storage_damaged", Outcome.UNKNOWN)
    INTERNAL = ("internal", Outcome.UNKNOWN)

    @property
    def wire(self) -> str:
        """The string in the ``error`` field of an answer."""
        return str(self.value[0])

    @property
    def outcome(self) -> Outcome:
        """Whether the operation surely did not happen."""
        outcome = self.value[1]
        assert isinstance(outcome, Outcome)
        return outcome


class AyderError(Exception):
    """An error a client is told about: a code, a sentence for people, and facts for programs (JSON values)."""

    def __init__(self, code: ErrorCode, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.facts = facts

    def __repr__(self) -> str:
        return f"AyderError({self.code.wire}, {self.message!r}, {self.facts})"


class StoragePoisoned(Exception):
    """A write or a sync failed: nobody knows what the disk holds, the store takes nothing more, the node must exit."""


class CorruptLog(Exception):
    """Bytes that had been synced no longer match their checksum: the node refuses to start and says what to do."""
