"""ayder: an HTTP-native durable event log and message bus."""

__version__ = "0.1.0"
