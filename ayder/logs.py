"""Log lines: one event a line with its fields, as text for people or JSON for machines.

Owns: the two formats. Must not know: who logs. Fields are what a call passes in ``extra``; a message is a constant sentence, so
that events can be counted.
"""

from __future__ import annotations

import json
import logging
import sys

from ayder.config import LoggingConfig

__all__ = ["set_up_logging"]

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (the name is the standard library's)
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return f"{self.formatTime(record)} {record.levelname.lower():<8} {record.name} {record.message}{fields}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        event |= _fields(record)
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def set_up_logging(config: LoggingConfig) -> None:
    """Log to standard error in the configured format, from the configured level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if config.format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
